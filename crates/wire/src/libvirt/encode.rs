//! Writing a head.

use super::format::{QEMU_SAVE_MAGIC, QEMU_SAVE_PARTIAL, UNUSED_LEN};
use super::head::Head;

impl Head {
    /// Appends the 92 bytes of the header alone: what is written over a partial image's when it is complete.
    pub fn encode_header(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(if self.is_complete { &QEMU_SAVE_MAGIC } else { &QEMU_SAVE_PARTIAL });
        // Each text is below 16 MiB and an alignment below 1 MiB; what is beyond a u32 no constructor makes.
        let data_len = u32::try_from(self.data_len()).unwrap_or(u32::MAX);
        let cookie_offset = u32::try_from(self.cookie_offset()).unwrap_or(u32::MAX);
        for value in [self.version, data_len, u32::from(self.was_running), self.format as u32, cookie_offset]
        {
            out.extend_from_slice(&self.byte_order.bytes(value));
        }
        out.extend_from_slice(&[0; UNUSED_LEN]);
    }

    /// Appends the header, the XML, the cookie and the padding.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let until = |offset: u64| start.saturating_add(usize::try_from(offset).unwrap_or(usize::MAX));
        self.encode_header(out);
        out.extend_from_slice(self.xml.as_bytes());
        out.push(0);
        if let (Some(cookie), Some(range)) = (&self.cookie, self.cookie_range(0)) {
            out.resize(until(range.start), 0);
            out.extend_from_slice(cookie.as_bytes());
        }
        out.resize(until(self.len()), 0);
    }
}
