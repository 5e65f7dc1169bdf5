//! What stands in a section of device state, field by field.
//!
//! The stream holds values and nothing else: which field comes where is known to the device alone. A vmdescription
//! tells it ([`decode_fields`] reads by one); where an image has none, that of another image of the same machine
//! serves once its subsections were compared with those that are there ([`FieldDecoder::fit`]), and for two sections there is a
//! [`schema`] here. All values are big-endian.

mod decode;
mod fit;
pub mod schema;
mod x86_cpu;

use std::fmt;

pub use decode::{FieldDecoder, decode_fields};

/// Limit: how many values one [`FieldDecoder`] reads. A guest with 255 processors has some 60,000.
pub const VALUES_MAX: u64 = 1 << 18;
/// Limit: an array of numbers with more elements stays bytes.
pub const ARRAY_VALUES_MAX: u64 = 4096;
/// Limit: how deep structs are nested. QEMU's are at most eight deep.
pub const DEPTH_MAX: u32 = 64;
/// Limit: the length in bytes of a name or a type in a vmdescription.
pub const NAME_LEN_MAX: usize = 255;

/// The fields of a section, a struct or a subsection, and the subsections behind them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields<'a> {
    /// The fields, in the order of the payload.
    pub fields: Vec<FieldValue<'a>>,
    /// The subsections, in the order of the payload: only those that the device had a reason to write.
    pub subsections: Vec<SubsectionValue<'a>>,
}

/// A subsection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubsectionValue<'a> {
    /// Its name, for example `cpu/poll_control_msr`.
    pub name: &'a str,
    /// Its version.
    pub version: u32,
    /// The absolute offset of its head.
    pub offset: u64,
    /// What it holds.
    pub content: Fields<'a>,
}

/// A field and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldValue<'a> {
    /// Its name; not unique where array elements are listed one by one.
    pub name: &'a str,
    /// Which element of an array, where each is listed by itself.
    pub index: Option<u64>,
    /// The type, as QEMU names it.
    pub kind: &'a str,
    /// The absolute offset of its first byte.
    pub offset: u64,
    /// Its length in bytes; that of all elements of an array.
    pub len: u64,
    /// Its value.
    pub value: Value<'a>,
}

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// An unsigned integer.
    Unsigned(u64),
    /// A signed integer.
    Signed(i64),
    /// Yes or no.
    Bool(bool),
    /// A pointer that leads nowhere.
    Null,
    /// Bytes: a buffer, an array of `uint8`, or a type that is not known here.
    Bytes(&'a [u8]),
    /// Fields of its own.
    Struct(Fields<'a>),
    /// Elements of an array or a list; those of a tree are pairs of key and value.
    Array(Vec<Value<'a>>),
}

/// Integers without a sign in hexadecimal, others in decimal; bytes as they stand. Structs and arrays show what they
/// are, not what they hold.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Unsigned(value) => write!(f, "{value:#x}"),
            Value::Signed(value) => write!(f, "{value}"),
            Value::Bool(value) => write!(f, "{value}"),
            Value::Null => f.write_str("null"),
            Value::Bytes(bytes) => bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
            Value::Struct(_) => f.write_str("struct"),
            Value::Array(elements) => write!(f, "{} elements", elements.len()),
        }
    }
}
