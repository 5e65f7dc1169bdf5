//! A field of a vmdescription, in a JSON that no derive reads: QEMU repeats keys.

use std::fmt;

use serde::de::{self, IgnoredAny, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Description;

/// A field, or all elements of an array that are alike.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Field {
    /// Its name; not unique where array elements are listed one by one.
    pub name: String,
    /// How many elements follow one another; absent for one.
    pub array_len: Option<u64>,
    /// Which element of an array.
    pub index: Option<u64>,
    /// The type, as QEMU names it; `struct` has a schema of its own.
    pub kind: String,
    /// The schema of a struct.
    pub structure: Option<Box<Description>>,
    /// What lists, trees, versioned structs and fields of type `tmp` hold, one after the other. QEMU writes the keys
    /// of each description straight into the field's object, so that they come as often as there are elements
    /// (`migration/vmstate-types.c` `put_qtailq`, `put_tmp` and so on, 10.0).
    pub parts: Vec<Description>,
    /// The bytes of one element on the wire, subsections of a struct included.
    pub size: u64,
}

impl Field {
    /// A field that is no array and no struct.
    pub fn plain(name: &str, kind: &str, size: u64) -> Field {
        Field { name: name.into(), kind: kind.into(), size, ..Field::default() }
    }
}

impl Serialize for Field {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &self.name)?;
        if let Some(array_len) = self.array_len {
            map.serialize_entry("array_len", &array_len)?;
        }
        if let Some(index) = self.index {
            map.serialize_entry("index", &index)?;
        }
        map.serialize_entry("type", &self.kind)?;
        if let Some(structure) = &self.structure {
            map.serialize_entry("struct", structure)?;
        }
        for part in &self.parts {
            map.serialize_entry("vmsd_name", &part.vmsd_name)?;
            map.serialize_entry("version", &part.version)?;
            map.serialize_entry("fields", &part.fields)?;
            if !part.subsections.is_empty() {
                map.serialize_entry("subsections", &part.subsections)?;
            }
        }
        map.serialize_entry("size", &self.size)?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Field, D::Error> {
        deserializer.deserialize_map(FieldVisitor)
    }
}

struct FieldVisitor;

impl<'de> Visitor<'de> for FieldVisitor {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field with name, type and size")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field, A::Error> {
        let (mut name, mut kind, mut size) = (None, None, None);
        let (mut array_len, mut index, mut structure) = (None, None, None);
        let mut parts: Vec<Description> = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "name" => once(&mut name, "name", map.next_value()?)?,
                "type" => once(&mut kind, "type", map.next_value()?)?,
                "size" => once(&mut size, "size", map.next_value()?)?,
                "array_len" => once(&mut array_len, "array_len", map.next_value()?)?,
                "index" => once(&mut index, "index", map.next_value()?)?,
                "struct" => once(&mut structure, "struct", map.next_value()?)?,
                // The name is the first key of each description, so it begins the next.
                "vmsd_name" => {
                    parts.push(Description { vmsd_name: map.next_value()?, ..Description::default() });
                }
                "version" => current(&mut parts).version = map.next_value()?,
                "fields" => current(&mut parts).fields = map.next_value()?,
                "subsections" => current(&mut parts).subsections = map.next_value()?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Field {
            name: name.ok_or_else(|| de::Error::missing_field("name"))?,
            array_len: array_len.flatten(),
            index: index.flatten(),
            kind: kind.ok_or_else(|| de::Error::missing_field("type"))?,
            structure: structure.flatten(),
            parts,
            size: size.ok_or_else(|| de::Error::missing_field("size"))?,
        })
    }
}

fn once<T, E: de::Error>(slot: &mut Option<T>, key: &'static str, value: T) -> Result<(), E> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(E::duplicate_field(key)),
    }
}

/// The description that the next keys belong to.
#[allow(clippy::indexing_slicing, reason = "there is at least one")]
fn current(parts: &mut Vec<Description>) -> &mut Description {
    if parts.is_empty() {
        parts.push(Description::default());
    }
    let last = parts.len() - 1;
    &mut parts[last]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_with_every_element_and_written_alike() {
        let json = r#"{"name":"requests","type":"qtailq","vmsd_name":"request","version":1,"fields":[{"name":"tag","type":"uint32","size":4}],"vmsd_name":"request","version":1,"fields":[{"name":"tag","type":"uint32","size":4}],"size":11}"#;
        let field: Field = serde_json::from_str(json).unwrap();
        assert_eq!(field.parts.len(), 2);
        assert_eq!(field.parts[1].fields, [Field::plain("tag", "uint32", 4)]);
        assert_eq!(serde_json::to_string(&field).unwrap(), json);
    }

    #[test]
    fn what_is_told_twice_or_not_at_all_is_refused() {
        for (json, expected) in [
            (r#"{"name":"a","type":"b"}"#, "missing field `size`"),
            (r#"{"name":"a","size":1}"#, "missing field `type`"),
            (r#"{"type":"a","size":1}"#, "missing field `name`"),
            (r#"{"name":"a","name":"b","type":"c","size":1}"#, "duplicate field `name`"),
            (r#"{"name":"a","type":"c","size":1,"size":1}"#, "duplicate field `size`"),
            (r#"[]"#, "invalid type: sequence, expected a field with name, type and size"),
        ] {
            let error = serde_json::from_str::<Field>(json).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
