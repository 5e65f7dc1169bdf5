//! The metadata of an image as text.

use crate::FileRange;
use crate::dump::Dump;
use crate::qemu;

use super::format::{BITMAP_OFFSET_AT, PAGE_SIZE_AT, PAGES_OFFSET_AT, VERSION_AT};
use super::layout::Layout;

/// The fields of a layout.
pub fn layout(layout: &Layout) -> Dump {
    let mut dump = qemu::dump::preamble(&layout.preamble, layout.stream_start);
    // What stands between the magic and RAM's START is the preamble, which has one encoding only.
    let mut encoded = Vec::new();
    layout.preamble.encode(&mut encoded);
    let at = layout.stream_start + encoded.len() as u64;
    dump.line(at, "ram.section_id", layout.ram.section_id);
    layout.ram.encode(&mut encoded);
    let at = layout.stream_start + encoded.len() as u64;
    dump.line(at, "ram.total", format_args!("{:#x}", layout.total));
    for block in &layout.blocks {
        let name = &block.name;
        let at = block.header_at;
        // The entry ends where the header begins: used length, then the address if there is one.
        let address_at = at.saturating_sub(8);
        let length_at = if block.address.is_some() { at.saturating_sub(16) } else { address_at };
        dump.line(length_at, format!("{name}.used_length"), format_args!("{:#x}", block.used_length));
        if let Some(address) = block.address {
            dump.line(address_at, format!("{name}.address"), format_args!("{address:#x}"));
        }
        dump.line(at + VERSION_AT as u64, format!("{name}.version"), 1);
        let page_size = block.page_size.bytes();
        dump.line(at + PAGE_SIZE_AT as u64, format!("{name}.page_size"), format_args!("{page_size:#x}"));
        dump.line(at + BITMAP_OFFSET_AT as u64, format!("{name}.bitmap"), block.bitmap);
        dump.line(at + PAGES_OFFSET_AT as u64, format!("{name}.pages"), block.pages);
    }
    for section in &layout.early {
        let range = FileRange::new(section.header_at, section.end);
        dump.line(
            section.header_at,
            format!("early section {} `{}`", section.section_id, section.idstr),
            range,
        );
    }
    dump.line(layout.device_state.start, "device_state", layout.device_state);
    if let Some(vmdesc) = layout.vmdesc {
        dump.line(vmdesc.start, "vmdescription", vmdesc);
    }
    dump.line(layout.file_len, "end", "end of the file");
    dump
}
