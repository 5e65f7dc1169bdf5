//! Sections as JSON. The keys are promised: scripts read them.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use vmstate::job::fields::{FieldValue, Fields, SubsectionValue, Value};
use vmstate::job::{SectionContent, SectionReport};

/// A section, indented as an element of the array that all of them are in.
pub fn section(section: &SectionReport<'_>) -> String {
    // Strings and numbers alone: nothing of it can fail to be JSON.
    let text = serde_json::to_string_pretty(&Section(section)).unwrap_or_default();
    text.lines().map(|line| format!("\n    {line}")).collect()
}

struct Section<'a>(&'a SectionReport<'a>);

impl Serialize for Section<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let SectionReport { name, instance_id, version, offset, bytes, content, problem } = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", name)?;
        map.serialize_entry("instance_id", instance_id)?;
        map.serialize_entry("version", version)?;
        map.serialize_entry("offset", offset)?;
        map.serialize_entry("bytes", bytes)?;
        match content {
            SectionContent::Fields(by, fields) => {
                map.serialize_entry("described_by", by.name())?;
                map.serialize_entry("problem", problem)?;
                add_fields(&mut map, fields)?;
            }
            SectionContent::Bytes(bytes) => {
                map.serialize_entry("described_by", &None::<&str>)?;
                map.serialize_entry("problem", problem)?;
                map.serialize_entry("data", &Value::Bytes(bytes).to_string())?;
            }
        }
        map.end()
    }
}

fn add_fields<M: SerializeMap>(map: &mut M, content: &Fields<'_>) -> Result<(), M::Error> {
    let fields: Vec<Field<'_>> = content.fields.iter().map(Field).collect();
    map.serialize_entry("fields", &fields)?;
    let subsections: Vec<Subsection<'_>> = content.subsections.iter().map(Subsection).collect();
    map.serialize_entry("subsections", &subsections)
}

struct Subsection<'a>(&'a SubsectionValue<'a>);

impl Serialize for Subsection<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", self.0.name)?;
        map.serialize_entry("version", &self.0.version)?;
        map.serialize_entry("offset", &self.0.offset)?;
        add_fields(&mut map, &self.0.content)?;
        map.end()
    }
}

struct Field<'a>(&'a FieldValue<'a>);

impl Serialize for Field<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let FieldValue { name, index, kind, offset, len, value } = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", name)?;
        if let Some(index) = index {
            map.serialize_entry("index", index)?;
        }
        map.serialize_entry("type", kind)?;
        map.serialize_entry("offset", offset)?;
        map.serialize_entry("bytes", len)?;
        map.serialize_entry("value", &Json(value))?;
        map.end()
    }
}

/// Numbers and truths as JSON has them, bytes as a string of hexadecimal digits, structs as objects with `fields` and
/// `subsections`.
struct Json<'a>(&'a Value<'a>);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Unsigned(value) => serializer.serialize_u64(*value),
            Value::Signed(value) => serializer.serialize_i64(*value),
            Value::Bool(value) => serializer.serialize_bool(*value),
            Value::Null => serializer.serialize_unit(),
            bytes @ Value::Bytes(_) => serializer.collect_str(bytes),
            Value::Array(elements) => serializer.collect_seq(elements.iter().map(Json)),
            Value::Struct(content) => {
                let mut map = serializer.serialize_map(None)?;
                add_fields(&mut map, content)?;
                map.end()
            }
        }
    }
}
