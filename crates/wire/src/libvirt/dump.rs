//! A head as text.

use crate::dump::Dump;

use super::format::*;
use super::head::Head;

/// The fields of the head of an image that stands at the offset `base`. Of the texts it has where they are.
pub fn head(head: &Head, base: u64) -> Dump {
    let mut dump = Dump::default();
    let at = |field: usize| base + field as u64;
    let magic = if head.is_complete { QEMU_SAVE_MAGIC } else { QEMU_SAVE_PARTIAL };
    dump.line(at(MAGIC_AT), "magic", String::from_utf8_lossy(&magic));
    dump.line(at(VERSION_AT), "version", head.version);
    dump.line(at(DATA_LEN_AT), "data_len", format_args!("{:#x}", head.data_len()));
    dump.line(at(WAS_RUNNING_AT), "was_running", u32::from(head.was_running));
    dump.line(at(FORMAT_AT), "format", format_args!("{} ({})", head.format as u32, head.format));
    dump.line(at(COOKIE_OFFSET_AT), "cookie_offset", format_args!("{:#x}", head.cookie_offset()));
    let xml = head.xml_range(base);
    dump.line(xml.start, "xml", xml);
    if let Some(cookie) = head.cookie_range(base) {
        dump.line(cookie.start, "cookie", cookie);
    }
    let payload = base + head.len();
    let padding = crate::FileRange::new(payload - head.padding_len, payload);
    dump.line(padding.start, "padding", padding);
    dump.line(payload, "payload", head.format);
    dump
}
