//! The short names of QEMU's stream.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;

/// A name as the stream has it: one length byte and that many bytes, no NUL.
///
/// QEMU calls it an idstr and uses it for sections, RAM blocks, subsections and capabilities. It holds 1
/// to 255 bytes of UTF-8 without control characters, so every value can be written, and none can mangle
/// a terminal. QEMU itself would take any byte; no QEMU writes others.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdStr(Box<str>);

impl IdStr {
    /// The longest name in bytes: its length is one byte on the wire.
    pub const LEN_MAX: usize = 255;

    /// The name `text`, or `None` where that is empty, too long, or holds a control character.
    pub fn new(text: &str) -> Option<IdStr> {
        let fits = (1..=IdStr::LEN_MAX).contains(&text.len());
        (fits && !text.chars().any(char::is_control)).then(|| IdStr(text.into()))
    }

    /// The name in `bytes`, on the same terms.
    pub fn from_bytes(bytes: &[u8]) -> Option<IdStr> {
        std::str::from_utf8(bytes).ok().and_then(IdStr::new)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for IdStr {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

// `Borrow` demands the same hash and order as `str` has: both are derived from the box's content.
impl Borrow<str> for IdStr {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl PartialEq<str> for IdStr {
    fn eq(&self, other: &str) -> bool {
        *self.0 == *other
    }
}

impl PartialEq<&str> for IdStr {
    fn eq(&self, other: &&str) -> bool {
        *self.0 == **other
    }
}

impl fmt::Display for IdStr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for IdStr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_1_to_255_printable_bytes() {
        let long = "x".repeat(255);
        let too_long = "x".repeat(256);
        for (text, expected) in [
            ("", false),
            ("pc.ram", true),
            ("/rom@etc/acpi/tables", true),
            (long.as_str(), true),
            (too_long.as_str(), false),
            ("a\0b", false),
            ("a\x1b[31mb", false),
        ] {
            assert_eq!(IdStr::new(text).is_some(), expected, "{text:?}");
        }
        assert_eq!(IdStr::from_bytes(b"\xff"), None);
    }
}
