//! The header's constants and offsets, the formats of what follows, and the limits that this crate sets.

use std::fmt;

/// The magic of an image that was written to its end (qemu_saveimage.h, 11.3).
pub const QEMU_SAVE_MAGIC: [u8; 16] = *b"LibvirtQemudSave";
/// The magic of an image that is being written, or whose writer was stopped (qemu_saveimage.h, 11.3).
pub const QEMU_SAVE_PARTIAL: [u8; 16] = *b"LibvirtQemudPart";
/// The version that is written. A reader takes 1 too, as libvirt does.
pub const QEMU_SAVE_VERSION: u32 = 2;
/// How many zero bytes libvirt leaves behind XML and cookie, for `virsh save-image-edit`.
pub const PADDING_LEN: u64 = 64 << 10;

/// The length of the header in bytes.
pub const HEADER_LEN: usize = 92;
/// The offset of the 16 bytes `magic`.
pub const MAGIC_AT: usize = 0;
/// The offset of the u32 `version`.
pub const VERSION_AT: usize = 16;
/// The offset of the u32 `data_len`: how many bytes of XML, cookie and padding follow the header.
pub const DATA_LEN_AT: usize = 20;
/// The offset of the u32 `was_running`.
pub const WAS_RUNNING_AT: usize = 24;
/// The offset of the u32 `format`, one of [`PayloadFormat`].
pub const FORMAT_AT: usize = 28;
/// The offset of the u32 `cookieOffset`: where the cookie begins, counted from the end of the header; 0
/// where there is none.
pub const COOKIE_OFFSET_AT: usize = 32;
/// The offset of `unused`, which is written as zero and not looked at.
pub const UNUSED_AT: usize = 36;
/// The length of `unused` in bytes.
pub const UNUSED_LEN: usize = 14 * size_of::<u32>();

const _: () = assert!(VERSION_AT == MAGIC_AT + QEMU_SAVE_MAGIC.len());
const _: () = assert!(DATA_LEN_AT == VERSION_AT + size_of::<u32>());
const _: () = assert!(WAS_RUNNING_AT == DATA_LEN_AT + size_of::<u32>());
const _: () = assert!(FORMAT_AT == WAS_RUNNING_AT + size_of::<u32>());
const _: () = assert!(COOKIE_OFFSET_AT == FORMAT_AT + size_of::<u32>());
const _: () = assert!(UNUSED_AT == COOKIE_OFFSET_AT + size_of::<u32>());
const _: () = assert!(HEADER_LEN == UNUSED_AT + UNUSED_LEN);

/// Limit: how long XML and cookie may each be, in bytes, their NUL included. libvirt's own protocol moves no
/// string of more than 4 MiB.
pub const TEXT_LEN_MAX: u64 = 16 << 20;

/// What stands behind the head. The numbers are those of libvirt's `virQEMUSaveFormat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum PayloadFormat {
    /// QEMU's stream.
    Raw = 0,
    /// The stream through `gzip`.
    Gzip = 1,
    /// The stream through `bzip2`.
    Bzip2 = 2,
    /// The stream through `xz`.
    Xz = 3,
    /// The stream through `lzop`.
    Lzop = 4,
    /// The stream through `zstd`; since libvirt 10.4.
    Zstd = 5,
    /// A mapped-ram image, its offsets counted from the start of the file; since libvirt 11.2.
    Sparse = 6,
}

impl PayloadFormat {
    /// All of them, in the order of their numbers.
    pub const ALL: [PayloadFormat; 7] = [
        PayloadFormat::Raw,
        PayloadFormat::Gzip,
        PayloadFormat::Bzip2,
        PayloadFormat::Xz,
        PayloadFormat::Lzop,
        PayloadFormat::Zstd,
        PayloadFormat::Sparse,
    ];

    /// The name, as `virsh save --image-format` and `save_image_format` of `qemu.conf` have it.
    pub const fn name(self) -> &'static str {
        match self {
            PayloadFormat::Raw => "raw",
            PayloadFormat::Gzip => "gzip",
            PayloadFormat::Bzip2 => "bzip2",
            PayloadFormat::Xz => "xz",
            PayloadFormat::Lzop => "lzop",
            PayloadFormat::Zstd => "zstd",
            PayloadFormat::Sparse => "sparse",
        }
    }

    /// The format of this number in the header.
    pub fn from_number(number: u32) -> Option<PayloadFormat> {
        PayloadFormat::ALL.into_iter().find(|format| *format as u32 == number)
    }

    /// What every payload of the format begins with.
    pub const fn magic(self) -> &'static [u8] {
        match self {
            PayloadFormat::Raw | PayloadFormat::Sparse => b"QEVM",
            PayloadFormat::Gzip => &[0x1f, 0x8b],
            PayloadFormat::Bzip2 => b"BZh",
            PayloadFormat::Xz => b"\xfd7zXZ\0",
            PayloadFormat::Lzop => b"\x89LZO\0\r\n\x1a\n",
            PayloadFormat::Zstd => &[0x28, 0xb5, 0x2f, 0xfd],
        }
    }

    /// Whether the stream is compressed as a whole.
    pub const fn is_compressed(self) -> bool {
        !matches!(self, PayloadFormat::Raw | PayloadFormat::Sparse)
    }
}

impl fmt::Display for PayloadFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// In which order the header's integers have their bytes: that of the host that wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ByteOrder {
    /// The least significant byte first.
    Little,
    /// The most significant byte first.
    Big,
}

impl ByteOrder {
    /// The integer in bytes.
    pub const fn bytes(self, value: u32) -> [u8; 4] {
        match self {
            ByteOrder::Little => value.to_le_bytes(),
            ByteOrder::Big => value.to_be_bytes(),
        }
    }

    /// The bytes as an integer.
    pub const fn value(self, bytes: [u8; 4]) -> u32 {
        match self {
            ByteOrder::Little => u32::from_le_bytes(bytes),
            ByteOrder::Big => u32::from_be_bytes(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_keep_libvirts_numbers() {
        for (number, format) in PayloadFormat::ALL.into_iter().enumerate() {
            assert_eq!(PayloadFormat::from_number(number as u32), Some(format));
        }
        assert_eq!(PayloadFormat::from_number(7), None);
    }

    #[test]
    fn only_raw_and_sparse_begin_alike() {
        let compressed = || PayloadFormat::ALL.into_iter().filter(|format| format.is_compressed());
        for one in compressed() {
            for other in PayloadFormat::ALL.into_iter().filter(|other| *other != one) {
                assert!(!one.magic().starts_with(other.magic()), "{one} {other}");
            }
        }
        assert_eq!(compressed().count(), 5);
    }
}
