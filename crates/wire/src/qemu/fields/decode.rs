//! Reads a payload by its description.

use crate::qemu::format::QEMU_VM_SUBSECTION;
use crate::qemu::vmdesc::{Description, Device, Field};
use crate::{Fault, cursor::Cursor};

use super::{
    ARRAY_VALUES_MAX, DEPTH_MAX, FieldValue, Fields, NAME_LEN_MAX, SubsectionValue, VALUES_MAX, Value,
};

/// What stands on the wire for a pointer that leads nowhere (`include/migration/vmstate.h`
/// `VMS_NULLPTR_MARKER`, 10.0).
const VMS_NULLPTR_MARKER: u8 = b'0';

/// Reads the payload of one section; see [`FieldDecoder::decode`].
///
/// # Errors
/// As there.
pub fn decode_fields<'a>(device: &'a Device, payload: &'a [u8], base: u64) -> Result<Fields<'a>, Fault> {
    FieldDecoder::default().decode(device, payload, base)
}

/// Reads sections by their descriptions, and no more values in all than [`VALUES_MAX`].
#[derive(Clone, Debug)]
pub struct FieldDecoder {
    values_left: u64,
}

impl Default for FieldDecoder {
    fn default() -> FieldDecoder {
        FieldDecoder { values_left: VALUES_MAX }
    }
}

impl FieldDecoder {
    /// Reads a payload that stands at the absolute offset `base`. The description must account for every byte.
    ///
    /// # Errors
    /// Damaged: description and payload contradict each other. Unsupported: more values or deeper structs than the
    /// limits allow.
    pub fn decode<'a>(
        &mut self,
        device: &'a Device,
        payload: &'a [u8],
        base: u64,
    ) -> Result<Fields<'a>, Fault> {
        let mut reader = Reader { cursor: Cursor::new(payload, base), decoder: self };
        let fields = reader.fields(&device.fields, &device.subsections, 0)?;
        match reader.cursor.remaining() {
            0 => Ok(fields),
            left => {
                let problem = format!("{left} bytes are left behind what is described");
                Err(Fault::damaged(reader.cursor.position(), "payload", problem))
            }
        }
    }

    /// Counts values that are about to be read at `offset`.
    pub(super) fn spend(&mut self, values: u64, offset: u64) -> Result<(), Fault> {
        match self.values_left.checked_sub(values) {
            Some(left) => self.values_left = left,
            None => {
                let problem = format!("there are more than {VALUES_MAX} values");
                return Err(Fault::unsupported(offset, "device state", problem));
            }
        }
        Ok(())
    }
}

struct Reader<'a, 'b> {
    cursor: Cursor<'a>,
    decoder: &'b mut FieldDecoder,
}

impl<'a> Reader<'a, '_> {
    fn fields(
        &mut self,
        fields: &'a [Field],
        subsections: &'a [Description],
        depth: u32,
    ) -> Result<Fields<'a>, Fault> {
        if depth > DEPTH_MAX {
            let problem = format!("structs are nested more than {DEPTH_MAX} deep");
            return Err(Fault::unsupported(self.cursor.position(), "vmdescription", problem));
        }
        let mut content = Fields::default();
        for field in fields {
            content.fields.push(self.field(field, depth)?);
        }
        for description in subsections {
            content.subsections.push(self.subsection(description, depth)?);
        }
        Ok(content)
    }

    /// The head of a subsection has been there since the stream began to have any: type, counted name, version.
    fn subsection(&mut self, description: &'a Description, depth: u32) -> Result<SubsectionValue<'a>, Fault> {
        self.count(1)?;
        let offset = self.cursor.position();
        let wanted = printable(&description.vmsd_name, offset)?;
        let lacks = || Fault::damaged(offset, format!("subsection `{wanted}`"), "is described but not there");
        if self.cursor.u8("subsection").ok() != Some(QEMU_VM_SUBSECTION) {
            return Err(lacks());
        }
        let name = self.cursor.counted_string("subsection name").map_err(|_| lacks())?;
        if name != wanted {
            return Err(lacks());
        }
        let version = self.cursor.be32("subsection version").map_err(|error| error.at_end())?;
        let content = self.fields(&description.fields, &description.subsections, depth + 1)?;
        Ok(SubsectionValue { name: wanted, version, offset, content })
    }

    fn field(&mut self, field: &'a Field, depth: u32) -> Result<FieldValue<'a>, Fault> {
        let offset = self.cursor.position();
        let name = printable(&field.name, offset)?;
        let kind = printable(&field.kind, offset)?;
        let value = match field.array_len {
            None => self.element(field, depth)?,
            Some(len) => self.array(field, len, depth)?,
        };
        let len = self.cursor.position() - offset;
        Ok(FieldValue { name, index: field.index, kind, offset, len, value })
    }

    fn array(&mut self, field: &'a Field, len: u64, depth: u32) -> Result<Value<'a>, Fault> {
        let is_plain = field.structure.is_none() && field.parts.is_empty();
        let is_number = scalar(field).is_some() && field.kind != "uint8";
        if is_plain && (!is_number || len > ARRAY_VALUES_MAX) {
            let bytes = field.size.checked_mul(len).ok_or_else(|| self.too_long(field))?;
            return Ok(Value::Bytes(self.take(field, bytes)?));
        }
        // Elements of no length cost nothing in the payload, so the limit is asked before anything is allocated.
        self.decoder.clone().spend(len, self.cursor.position())?;
        let mut elements = Vec::new();
        for _ in 0..len {
            elements.push(self.element(field, depth)?);
        }
        Ok(Value::Array(elements))
    }

    fn element(&mut self, field: &'a Field, depth: u32) -> Result<Value<'a>, Fault> {
        self.count(1)?;
        let start = self.cursor.position();
        let value = match (&field.structure, field.kind.as_str()) {
            (Some(structure), _) => {
                Value::Struct(self.fields(&structure.fields, &structure.subsections, depth + 1)?)
            }
            (None, "qtailq" | "qlist") => self.list(field, depth)?,
            (None, "gtree") if !field.parts.is_empty() => self.tree(field, depth)?,
            (None, _) => match field.parts.as_slice() {
                // The fields of a `tmp` and of a `vstruct` stand for themselves.
                [part] => Value::Struct(self.fields(&part.fields, &part.subsections, depth + 1)?),
                _ => return self.plain(field),
            },
        };
        let read = self.cursor.position() - start;
        if read != field.size {
            let problem = format!("has {:#x} bytes, of which {read:#x} are described", field.size);
            return Err(Fault::damaged(start, format!("field `{}`", field.name), problem));
        }
        Ok(value)
    }

    /// A list: a byte 1 before each element, a byte 0 behind the last.
    fn list(&mut self, field: &'a Field, depth: u32) -> Result<Value<'a>, Fault> {
        let mut elements = Vec::new();
        for part in &field.parts {
            self.mark(field, 1)?;
            self.count(1)?;
            elements.push(Value::Struct(self.fields(&part.fields, &part.subsections, depth + 1)?));
        }
        self.mark(field, 0)?;
        Ok(Value::Array(elements))
    }

    /// A tree: be32 number of nodes, then as a list. The key of a node is a number, which is not described, or fields.
    fn tree(&mut self, field: &'a Field, depth: u32) -> Result<Value<'a>, Fault> {
        let nodes = self.cursor.be32("number of nodes").map_err(|error| error.at_end())?;
        let mut pairs = Vec::new();
        let mut parts = field.parts.iter();
        let has_keys = field.parts.len() as u64 == 2 * u64::from(nodes);
        while let Some(part) = parts.next() {
            self.mark(field, 1)?;
            self.count(2)?;
            let (key, value) = match has_keys {
                false => (Value::Unsigned(self.be(8)?), part),
                true => {
                    let key = self.fields(&part.fields, &part.subsections, depth + 1)?;
                    match parts.next() {
                        Some(value) => (Value::Struct(key), value),
                        None => break,
                    }
                }
            };
            let value = Value::Struct(self.fields(&value.fields, &value.subsections, depth + 1)?);
            pairs.push(Value::Array(vec![key, value]));
        }
        self.mark(field, 0)?;
        Ok(Value::Array(pairs))
    }

    fn mark(&mut self, field: &Field, wanted: u8) -> Result<(), Fault> {
        let at = self.cursor.position();
        if self.cursor.u8("mark of a list").ok() == Some(wanted) {
            return Ok(());
        }
        let problem = if wanted == 0 { "does not end after its last element" } else { "lacks an element" };
        Err(Fault::damaged(at, format!("field `{}`", field.name), problem))
    }

    fn plain(&mut self, field: &'a Field) -> Result<Value<'a>, Fault> {
        let Some(scalar) = scalar(field) else {
            return Ok(Value::Bytes(self.take(field, field.size)?));
        };
        let bytes = self.take(field, field.size)?;
        let bits = 8 * bytes.len() as u32;
        let value = bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        Ok(match scalar {
            Scalar::Unsigned => Value::Unsigned(value),
            Scalar::Signed => Value::Signed(((value << (64 - bits)) as i64) >> (64 - bits)),
            // A bool is one byte and nothing says that it is 0 or 1.
            Scalar::Bool if value > 1 => Value::Unsigned(value),
            Scalar::Bool => Value::Bool(value == 1),
            Scalar::Null if value == u64::from(VMS_NULLPTR_MARKER) => Value::Null,
            Scalar::Null => Value::Unsigned(value),
        })
    }

    fn be(&mut self, len: usize) -> Result<u64, Fault> {
        let bytes = self.cursor.bytes(len, "key").map_err(|error| error.at_end())?;
        Ok(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn take(&mut self, field: &Field, len: u64) -> Result<&'a [u8], Fault> {
        let taken = usize::try_from(len).ok().and_then(|len| self.cursor.bytes(len, "field").ok());
        taken.ok_or_else(|| self.too_long(field))
    }

    fn too_long(&self, field: &Field) -> Fault {
        let array = field.array_len.map(|len| format!("{len} times ")).unwrap_or_default();
        let problem = format!("{array}{:#x} bytes are more than the section has left", field.size);
        Fault::damaged(self.cursor.position(), format!("field `{}`", field.name), problem)
    }

    fn count(&mut self, values: u64) -> Result<(), Fault> {
        self.decoder.spend(values, self.cursor.position())
    }
}

/// What a field of one to eight bytes is.
enum Scalar {
    Unsigned,
    Signed,
    Bool,
    Null,
}

/// How a field is read that is a number by type and by length; a type that has another length than its name says is
/// somebody's own.
fn scalar(field: &Field) -> Option<Scalar> {
    // ` equal` and ` le` demand something of the value; none of them says that it is little-endian.
    let kind = field.kind.strip_suffix(" equal").or(field.kind.strip_suffix(" le")).unwrap_or(&field.kind);
    Some(match (kind, field.size) {
        ("uint8", 1) | ("uint16", 2) | ("uint32", 4) | ("uint64", 8) => Scalar::Unsigned,
        ("int8", 1) | ("int16", 2) | ("int32", 4) | ("int64" | "timer", 8) => Scalar::Signed,
        ("bool", 1) => Scalar::Bool,
        // Before 10.0 the type of a pointer that leads nowhere is called `uint64`.
        ("nullptr" | "uint64", 1) => Scalar::Null,
        _ => return None,
    })
}

/// Names are shown to people and written to terminals.
fn printable(name: &str, offset: u64) -> Result<&str, Fault> {
    if name.len() > NAME_LEN_MAX || name.chars().any(char::is_control) {
        let problem = format!("a name of {} bytes is too long or not printable", name.len());
        return Err(Fault::damaged(offset, "vmdescription", problem));
    }
    Ok(name)
}
