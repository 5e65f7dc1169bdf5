//! The header behind each entry of the block list, and the limits that this crate sets.
//!
//! Source: QEMU 10.0 `migration/ram.c` `struct MappedRamHeader`; the same since 9.0.

use crate::cursor::{Cursor, Encoder};
use crate::{DecodeError, Fault};

/// The version of the header; QEMU takes this one and 0, which nobody wrote (ram.c, 10.0).
pub const MAPPED_RAM_HDR_VERSION: u32 = 1;
/// To what QEMU aligns the pages of a block in the file; a reader demands page alignment only
/// (ram.c, 10.0).
pub const MAPPED_RAM_FILE_OFFSET_ALIGNMENT: u64 = 0x10_0000;

/// The length of the header in bytes; it is packed.
pub const HEADER_LEN: usize = 28;
/// The offset of the be32 `version`.
pub const VERSION_AT: usize = 0;
/// The offset of the be64 `page_size`.
pub const PAGE_SIZE_AT: usize = 4;
/// The offset of the be64 `bitmap_offset`.
pub const BITMAP_OFFSET_AT: usize = 12;
/// The offset of the be64 `pages_offset`.
pub const PAGES_OFFSET_AT: usize = 20;

/// The bytes of a word of the bitmap: QEMU writes its `unsigned long`s as they are in memory, and only
/// little-endian hosts of 64 bits are understood here.
pub const BITMAP_WORD_LEN: u64 = 8;

/// Limit: the length of an image in bytes. Offsets of files have 63 bits.
pub const FILE_LEN_MAX: u64 = i64::MAX as u64;
/// Limit: how many items may stand between the block list and the end of RAM. A save of a running guest
/// writes one PART each time it has used up its share of bandwidth, every 100 ms.
pub const RAM_SECTIONS_MAX: u64 = 1 << 20;

const _: () = assert!(PAGE_SIZE_AT == VERSION_AT + size_of::<u32>());
const _: () = assert!(BITMAP_OFFSET_AT == PAGE_SIZE_AT + size_of::<u64>());
const _: () = assert!(PAGES_OFFSET_AT == BITMAP_OFFSET_AT + size_of::<u64>());
const _: () = assert!(HEADER_LEN == PAGES_OFFSET_AT + size_of::<u64>());

/// The header as it stands in the file; its numbers are not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The target's page size in bytes: one bit of the bitmap stands for so many.
    pub page_size: u64,
    /// The offset of the bitmap from the start of the file.
    pub bitmap_offset: u64,
    /// The offset of the pages from the start of the file.
    pub pages_offset: u64,
}

impl Header {
    /// Takes a header.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] where bytes lack; unsupported where the version is another.
    pub fn decode(cursor: &mut Cursor<'_>) -> Result<Header, DecodeError> {
        let at = cursor.position();
        let version = cursor.be32("mapped-ram header")?;
        if version != MAPPED_RAM_HDR_VERSION {
            let problem = format!("version {version} is not {MAPPED_RAM_HDR_VERSION}");
            return Err(Fault::unsupported(at, "mapped-ram header", problem).into());
        }
        Ok(Header {
            page_size: cursor.be64("mapped-ram header")?,
            bitmap_offset: cursor.be64("mapped-ram header")?,
            pages_offset: cursor.be64("mapped-ram header")?,
        })
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(out);
        encoder.be32(MAPPED_RAM_HDR_VERSION);
        encoder.be64(self.page_size);
        encoder.be64(self.bitmap_offset);
        encoder.be64(self.pages_offset);
    }
}

/// The length of the bitmap of `pages` pages in bytes: whole words.
pub const fn bitmap_len(pages: u64) -> u64 {
    pages.div_ceil(64) * BITMAP_WORD_LEN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_has_whole_words() {
        for (pages, expected) in [(0, 0), (1, 8), (64, 8), (65, 16), (1 << 18, 1 << 15)] {
            assert_eq!(bitmap_len(pages), expected, "{pages}");
        }
    }

    #[test]
    fn fields_stand_at_their_offsets() {
        let mut bytes = Vec::new();
        Header { page_size: 0x1000, bitmap_offset: 0x8b, pages_offset: 0x10_0000 }.encode(&mut bytes);
        assert_eq!(bytes.len(), HEADER_LEN);
        for (at, expected) in
            [(PAGE_SIZE_AT, 0x1000u64), (BITMAP_OFFSET_AT, 0x8b), (PAGES_OFFSET_AT, 0x10_0000)]
        {
            assert_eq!(bytes[at..at + 8], expected.to_be_bytes(), "{at}");
        }
    }
}
