//! The vmdescription: what a QEMU says of its own device state, in JSON, behind the end mark.
//!
//! QEMU never reads it. It names every FULL section and the size of each field in it, which makes it the
//! best witness of where sections end. vmstate writes one of its own, with a manifest under one more key.

mod field;

pub use field::Field;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Fault, FileRange, IdStr};

use super::format::{
    CAPABILITIES, CONFIGURATION_SUBSECTION_VERSION, QEMU_VM_VMDESCRIPTION, TARGET_PAGE_BITS, UUID,
    VMDESCRIPTION_HEADER_LEN, VMDESCRIPTION_LEN_MAX,
};
use super::{Configuration, DeviceSection};

/// A whole description.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmDescription {
    /// The fields of the configuration section; 7.2 does not describe them, 10.0 does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configuration: Option<Description>,
    /// The target's page size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// The FULL sections, in the order of the stream; those of RAM and other iterating handlers are not
    /// described.
    #[serde(default)]
    pub devices: Vec<Device>,
    /// vmstate's manifest; QEMU and its tools pass over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmstate: Option<Value>,
}

/// A FULL section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// The section's idstr.
    pub name: String,
    /// The section's instance id.
    pub instance_id: u32,
    /// The size of the payload in bytes; only handlers without a schema have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The name of the schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmsd_name: Option<String>,
    /// The version of the schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<i64>,
    /// The fields in the order of the payload.
    #[serde(default)]
    pub fields: Vec<Field>,
    /// The subsections behind the fields.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subsections: Vec<Description>,
}

/// A schema's part: the fields of a struct, of a subsection or of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// The name of the schema.
    #[serde(default)]
    pub vmsd_name: String,
    /// The version of the schema.
    #[serde(default)]
    pub version: i64,
    /// The fields in the order of the payload.
    #[serde(default)]
    pub fields: Vec<Field>,
    /// The subsections behind the fields.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subsections: Vec<Description>,
}

impl Device {
    /// The length of the section's payload in bytes, or `None` where the sizes make no length.
    pub fn payload_len(&self) -> Option<u64> {
        fields_len(&self.fields)?.checked_add(subsections_len(&self.subsections)?)
    }

    /// Whether it says no more than how long the payload is: that of a handler without a schema, and all that
    /// vmstate itself writes.
    pub fn is_opaque(&self) -> bool {
        let whole = |field: &Field| field.name == "data" && field.kind == "buffer" && field.parts.is_empty();
        self.vmsd_name.is_none() && matches!(self.fields.as_slice(), [field] if whole(field))
    }
}

impl Description {
    /// The length of its fields and subsections in bytes, or `None` where the sizes make no length.
    pub fn payload_len(&self) -> Option<u64> {
        fields_len(&self.fields)?.checked_add(subsections_len(&self.subsections)?)
    }
}

fn fields_len(fields: &[Field]) -> Option<u64> {
    fields
        .iter()
        .try_fold(0u64, |sum, field| sum.checked_add(field.size.checked_mul(field.array_len.unwrap_or(1))?))
}

fn subsections_len(subsections: &[Description]) -> Option<u64> {
    // The head of a subsection: type byte, length byte, name, be32 version. The depth of the recursion
    // is bounded by the JSON parser's limit of 128.
    subsections.iter().try_fold(0u64, |sum, part| {
        let head = 6u64.checked_add(part.vmsd_name.len() as u64)?;
        let inner = fields_len(&part.fields)?.checked_add(subsections_len(&part.subsections)?)?;
        sum.checked_add(head)?.checked_add(inner)
    })
}

/// Where a vmdescription was looked for, what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Located {
    /// The section, its five bytes of head included; it ends where the tail ends.
    Found(FileRange),
    /// There is none: the tail does not end in a description.
    Absent,
    /// The tail is too short to tell.
    TailTooShort,
}

/// Looks for a vmdescription that ends where `tail` ends; `tail` starts at the absolute offset `base`.
///
/// A tail of [`VMDESCRIPTION_LEN_MAX`] and five bytes always tells; a shorter one mostly does. JSON holds
/// no control character but white space, while a length below the limit begins with one, so the last
/// control character of the tail is part of the section's head.
pub fn locate(tail: &[u8], base: u64) -> Located {
    let is_text = |byte: &u8| *byte >= 0x20 || matches!(byte, b'\t' | b'\n' | b'\r');
    let longest = VMDESCRIPTION_LEN_MAX as usize + VMDESCRIPTION_HEADER_LEN;
    let skipped = tail.len().saturating_sub(longest);
    let Some(last) = tail.get(skipped..).unwrap_or_default().iter().rposition(|byte| !is_text(byte)) else {
        return if skipped > 0 || tail.len() == longest { Located::Absent } else { Located::TailTooShort };
    };
    let last = last + skipped;
    for distance in 1..VMDESCRIPTION_HEADER_LEN {
        let Some(at) = last.checked_sub(distance) else {
            return Located::TailTooShort;
        };
        let Some([QEMU_VM_VMDESCRIPTION, len @ ..]) = tail.get(at..).and_then(|t| t.first_chunk::<5>())
        else {
            continue;
        };
        let json = at + VMDESCRIPTION_HEADER_LEN;
        let starts_well = tail.get(json).is_none_or(|byte| *byte == b'{');
        if starts_well && u32::from_be_bytes(*len) as usize == tail.len() - json {
            let start = base.saturating_add(at as u64);
            let end = base.saturating_add(tail.len() as u64);
            return Located::Found(FileRange { start, end });
        }
    }
    Located::Absent
}

/// Parses the JSON of a description; `base` is the absolute offset of its first byte.
///
/// # Errors
/// Damaged: longer than [`VMDESCRIPTION_LEN_MAX`], no JSON, or not the shape of a description. JSON is
/// not read deeper than 128 levels.
pub fn parse(json: &[u8], base: u64) -> Result<VmDescription, Fault> {
    if json.len() > VMDESCRIPTION_LEN_MAX as usize {
        let problem = format!("{} bytes are more than {VMDESCRIPTION_LEN_MAX}", json.len());
        return Err(Fault::damaged(base, "vmdescription", problem));
    }
    serde_json::from_slice(json)
        .map_err(|error| Fault::damaged(base, "vmdescription", format!("is not as expected: {error}")))
}

/// Describes device state that is known by its sections alone: each is one field of bytes.
///
/// The shape is QEMU's, so that its `analyze-migration.py` finds its way. `manifest` goes under the key
/// `vmstate`.
pub fn describe(
    configuration: Option<&Configuration>,
    page_size: u64,
    sections: &[DeviceSection],
    manifest: Option<Value>,
) -> VmDescription {
    VmDescription {
        configuration: configuration.map(describe_configuration),
        page_size: Some(page_size),
        devices: sections
            .iter()
            .map(|section| Device {
                name: section.idstr.as_str().into(),
                instance_id: section.instance_id,
                version: Some(i64::from(section.version_id)),
                fields: vec![Field::plain("data", "buffer", section.payload.len())],
                ..Device::default()
            })
            .collect(),
        vmstate: manifest,
    }
}

fn describe_configuration(configuration: &Configuration) -> Description {
    let part = |name: &str, fields| Description {
        vmsd_name: name.into(),
        version: i64::from(CONFIGURATION_SUBSECTION_VERSION),
        fields,
        subsections: Vec::new(),
    };
    let mut whole = part(
        "configuration",
        vec![
            Field::plain("len", "uint32", 4),
            Field::plain("name", "buffer", configuration.machine.len() as u64),
        ],
    );
    if configuration.target_page_bits.is_some() {
        whole.subsections.push(part(TARGET_PAGE_BITS, vec![Field::plain("target_page_bits", "uint32", 4)]));
    }
    if !configuration.capabilities.is_empty() {
        let many = configuration.capabilities.len() > 1;
        let mut fields = vec![Field::plain("caps_count", "uint32", 4)];
        fields.extend(configuration.capabilities.iter().enumerate().map(|(i, name): (usize, &IdStr)| {
            let size = 1 + name.len() as u64;
            Field { index: many.then_some(i as u64), ..Field::plain("capabilities", "capability", size) }
        }));
        whole.subsections.push(part(CAPABILITIES, fields));
    }
    if configuration.uuid.is_some() {
        let data = Field { array_len: Some(16), ..Field::plain("uuid.data", "uint8", 1) };
        whole.subsections.push(part(UUID, vec![data]));
    }
    whole
}

impl VmDescription {
    /// Appends the section with its head.
    ///
    /// # Errors
    /// Unsupported: the JSON would be longer than [`VMDESCRIPTION_LEN_MAX`]; nothing is appended then.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), Fault> {
        let refused = |problem: String| Fault::unsupported(out.len() as u64, "vmdescription", problem);
        let json = serde_json::to_vec(self).map_err(|error| refused(format!("is no JSON: {error}")))?;
        if json.len() > VMDESCRIPTION_LEN_MAX as usize {
            return Err(refused(format!("{} bytes are more than {VMDESCRIPTION_LEN_MAX}", json.len())));
        }
        out.push(QEMU_VM_VMDESCRIPTION);
        out.extend_from_slice(&(json.len() as u32).to_be_bytes());
        out.extend_from_slice(&json);
        Ok(())
    }
}
