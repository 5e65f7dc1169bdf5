//! The metadata of an image as text.

use crate::dump::Dump;
use crate::qemu;
use crate::qemu::format::FILE_HEADER_LEN;

use super::format::{BITMAP_OFFSET_AT, PAGE_SIZE_AT, PAGES_OFFSET_AT, VERSION_AT};
use super::layout::Layout;

/// The fields of a layout.
pub fn layout(layout: &Layout) -> Dump {
    let mut dump = qemu::dump::preamble(&layout.preamble, layout.stream_start);
    let at = layout.stream_start + FILE_HEADER_LEN as u64;
    let start = layout.blocks.first().map_or(at, |block| block.header_at);
    dump.line(start, "ram.section_id", layout.ram.section_id);
    dump.line(start, "ram.version_id", layout.ram.version_id);
    dump.line(start, "ram.total", format_args!("{:#x}", layout.total));
    for block in &layout.blocks {
        let name = &block.name;
        let at = block.header_at;
        if let Some(address) = block.address {
            dump.line(at - 8, format!("{name}.address"), format_args!("{address:#x}"));
        }
        dump.line(at, format!("{name}.used_length"), format_args!("{:#x}", block.used_length));
        dump.line(at + VERSION_AT as u64, format!("{name}.version"), 1);
        let page_size = block.page_size.bytes();
        dump.line(at + PAGE_SIZE_AT as u64, format!("{name}.page_size"), format_args!("{page_size:#x}"));
        dump.line(at + BITMAP_OFFSET_AT as u64, format!("{name}.bitmap"), block.bitmap);
        dump.line(at + PAGES_OFFSET_AT as u64, format!("{name}.pages"), block.pages);
    }
    dump.line(layout.device_state.start, "device_state", layout.device_state);
    if let Some(vmdesc) = layout.vmdesc {
        dump.line(vmdesc.start, "vmdescription", vmdesc);
    }
    dump.line(layout.file_len, "end", "end of the file");
    dump
}
