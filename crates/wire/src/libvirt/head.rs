//! The head of an image once all of it has been checked.

use crate::{Fault, FileRange};

use super::format::{ByteOrder, HEADER_LEN, PADDING_LEN, PayloadFormat, QEMU_SAVE_VERSION, TEXT_LEN_MAX};

/// What stands in front of the guest's state in an image of libvirt.
///
/// XML and cookie are text without their NUL; both are at most [`TEXT_LEN_MAX`] long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Whether the magic says that the image was written to its end. One that is not is a [`Head`] only in a
    /// survey, or when it is about to be written.
    pub is_complete: bool,
    /// The byte order of the header's integers.
    pub byte_order: ByteOrder,
    /// The version: 2, or 1, which libvirt takes as well.
    pub version: u32,
    /// Whether a restore lets the guest run. libvirt takes every number but zero for yes.
    pub was_running: bool,
    /// What stands behind the head.
    pub format: PayloadFormat,
    /// The domain's XML, as libvirt would define it again.
    pub xml: String,
    /// What libvirt notes about the running domain beside its XML, an element `cookie`, if there is one.
    pub cookie: Option<String>,
    /// How many bytes stand between the NUL of the XML and the cookie: none, where libvirt wrote them.
    pub gap_len: u64,
    /// How many bytes stand between the NUL of the last text and the payload.
    pub padding_len: u64,
}

impl Head {
    /// The head of a new image as libvirt 11.3 would write it on a little-endian host.
    ///
    /// # Errors
    /// Unsupported, its offset the place in the image: XML that is empty, a text with a NUL in it or longer
    /// than [`TEXT_LEN_MAX`].
    pub fn new(
        format: PayloadFormat,
        was_running: bool,
        xml: String,
        cookie: Option<String>,
    ) -> Result<Head, Fault> {
        let head = Head {
            is_complete: true,
            byte_order: ByteOrder::Little,
            version: QEMU_SAVE_VERSION,
            was_running,
            format,
            xml,
            cookie,
            gap_len: 0,
            padding_len: PADDING_LEN,
        };
        let refuse = |at, field: &'static str, problem: &'static str| {
            Err(Fault::unsupported(HEADER_LEN as u64 + at, field, problem))
        };
        if head.xml.is_empty() {
            return refuse(0, "domain XML", "is empty");
        }
        for (at, field, text) in
            [(0, "domain XML", Some(&head.xml)), (head.xml.len() as u64 + 1, "cookie", head.cookie.as_ref())]
        {
            let Some(text) = text else { continue };
            if text.contains('\0') {
                return refuse(at, field, "has a NUL in it, where it would end");
            }
            if text.len() as u64 >= TEXT_LEN_MAX {
                return refuse(at, field, "is longer than any that is read");
            }
        }
        Ok(head)
    }

    /// The same head with as much padding more as brings the payload of an image at the offset `base` to a
    /// multiple of `alignment`.
    ///
    /// # Panics
    /// When `alignment` is zero or more than a mebibyte: the length of the padding is a u32 in the file.
    pub fn aligned(mut self, base: u64, alignment: u64) -> Head {
        assert!((1..=1 << 20).contains(&alignment), "an alignment of {alignment:#x} bytes");
        let end = base + self.len();
        self.padding_len += end.next_multiple_of(alignment) - end;
        self
    }

    /// How many bytes of XML, cookie and padding follow the header.
    pub fn data_len(&self) -> u64 {
        let cookie = self.cookie.as_ref().map_or(0, |cookie| cookie.len() as u64 + 1);
        self.xml.len() as u64 + 1 + self.gap_len + cookie + self.padding_len
    }

    /// The length of the head in bytes: the payload begins behind it.
    pub fn len(&self) -> u64 {
        HEADER_LEN as u64 + self.data_len()
    }

    /// Whether it has no byte, which never is so.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The field `cookieOffset`.
    pub(super) fn cookie_offset(&self) -> u64 {
        self.cookie.as_ref().map_or(0, |_| self.xml.len() as u64 + 1 + self.gap_len)
    }

    /// Where the XML is in an image at the offset `base`, without its NUL.
    pub fn xml_range(&self, base: u64) -> FileRange {
        let start = base + HEADER_LEN as u64;
        FileRange::new(start, start + self.xml.len() as u64)
    }

    /// Where the cookie is in an image at the offset `base`, without its NUL.
    pub fn cookie_range(&self, base: u64) -> Option<FileRange> {
        let start = base + HEADER_LEN as u64 + self.cookie_offset();
        self.cookie.as_ref().map(|cookie| FileRange::new(start, start + cookie.len() as u64))
    }

    /// Compares the first bytes of the payload with the format that the header names. `at` is their offset;
    /// fewer bytes than the format's magic has are all that there are.
    ///
    /// # Errors
    /// Damaged: something else stands there.
    pub fn check_payload(&self, first: &[u8], at: u64) -> Result<(), Fault> {
        if first.starts_with(self.format.magic()) {
            return Ok(());
        }
        let problem = format!("does not begin as {} does", self.format);
        Err(Fault::damaged(at, "payload", problem))
    }
}
