//! The metadata of a stream as text.

use crate::dump::Dump;

use super::fields::{FieldValue, Fields, Value};
use super::format::FILE_HEADER_LEN;
use super::{DeviceState, Preamble, RamSetup};

/// The fields of a preamble that stands at `base`.
pub fn preamble(preamble: &Preamble, base: u64) -> Dump {
    let mut dump = Dump::default();
    dump.line(base, "magic", "QEVM");
    dump.line(base + 4, "version", super::format::QEMU_VM_FILE_VERSION);
    let Some(configuration) = &preamble.configuration else { return dump };
    let mut at = base + FILE_HEADER_LEN as u64;
    dump.line(at, "configuration.machine", &configuration.machine);
    at += 5 + configuration.machine.len() as u64;
    // Behind the name: each subsection has a type byte, a counted name, a be32 version, its fields.
    if let Some(bits) = configuration.target_page_bits {
        dump.line(at, "configuration.target_page_bits", bits);
        at += 6 + super::format::TARGET_PAGE_BITS.len() as u64 + 4;
    }
    if !configuration.capabilities.is_empty() {
        let names: Vec<&str> = configuration.capabilities.iter().map(|name| name.as_str()).collect();
        dump.line(at, "configuration.capabilities", names.join(" "));
        let listed: u64 = configuration.capabilities.iter().map(|name| 1 + name.len() as u64).sum();
        at += 6 + super::format::CAPABILITIES.len() as u64 + 4 + listed;
    }
    if let Some(uuid) = configuration.uuid {
        let text: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        dump.line(at, "configuration.uuid", text);
    }
    dump
}

/// The fields of a list of RAM blocks whose payload stands at `base`.
pub fn ram_setup(setup: &RamSetup, base: u64) -> Dump {
    let mut dump = Dump::default();
    dump.line(base, "ram.total", format_args!("{:#x}", setup.total()));
    let mut at = base + 8;
    for block in &setup.blocks {
        let name = &block.name;
        at += 1 + name.len() as u64;
        dump.line(at, format!("{name}.used_length"), format_args!("{:#x}", block.used_length));
        at += 8;
        if let Some(page_size) = block.page_size {
            dump.line(at, format!("{name}.page_size"), format_args!("{page_size:#x}"));
            at += 8;
        }
        if let Some(address) = block.address {
            dump.line(at, format!("{name}.address"), format_args!("{address:#x}"));
            at += 8;
        }
    }
    if setup.multifd_flush {
        dump.line(at, "ram.multifd_flush", true);
    }
    dump
}

/// The sections of device state.
pub fn device_state(state: &DeviceState) -> Dump {
    let mut dump = Dump::default();
    for section in &state.sections {
        dump.line(
            section.header_at,
            format!("section {} `{}`", section.section_id, section.idstr),
            format_args!(
                "instance {:#x}, version {}, {:#x} bytes",
                section.instance_id,
                section.version_id,
                section.payload.len()
            ),
        );
    }
    dump.line(state.eof_at, "end mark", "0x00");
    if let Some(vmdesc) = state.vmdesc {
        dump.line(vmdesc.start, "vmdescription", vmdesc);
    }
    dump
}

/// The values of a section, each under its whole path. Elements of an array of numbers share a line.
pub fn fields(fields: &Fields<'_>) -> Dump {
    let mut dump = Dump::default();
    add_fields(&mut dump, "", fields);
    dump
}

fn add_fields(dump: &mut Dump, path: &str, content: &Fields<'_>) {
    for FieldValue { name, index, offset, value, .. } in &content.fields {
        let index = index.map(|index| format!("[{index}]")).unwrap_or_default();
        add_value(dump, *offset, format!("{path}{name}{index}"), value);
    }
    for subsection in &content.subsections {
        let name = subsection.name;
        dump.line(subsection.offset, format!("{path}{name}"), format_args!("version {}", subsection.version));
        add_fields(dump, &format!("{path}{name}."), &subsection.content);
    }
}

fn add_value(dump: &mut Dump, offset: u64, path: String, value: &Value<'_>) {
    match value {
        Value::Struct(content) => add_fields(dump, &format!("{path}."), content),
        Value::Array(elements)
            if elements.iter().any(|e| matches!(e, Value::Struct(_) | Value::Array(_))) =>
        {
            for (index, element) in elements.iter().enumerate() {
                // The fields within tell their own offsets; a key of a tree shows that of the tree.
                add_value(dump, offset, format!("{path}[{index}]"), element);
            }
        }
        Value::Array(elements) => {
            let texts: Vec<String> = elements.iter().map(Value::to_string).collect();
            dump.line(offset, path, texts.join(" "));
        }
        value => dump.line(offset, path, value),
    }
}
