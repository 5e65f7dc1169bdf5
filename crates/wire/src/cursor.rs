//! Taking fields out of bytes, and putting them in.

use crate::{DecodeError, Fault, IdStr};

/// A bounded reader over bytes that stand at a known place of a file or a stream.
///
/// Every field that is taken is named, so that an error can say what is cut short and where. All
/// integers of QEMU's stream are big-endian.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    base: u64,
}

impl<'a> Cursor<'a> {
    /// A cursor at the first of `bytes`, whose absolute offset is `base`.
    pub fn new(bytes: &'a [u8], base: u64) -> Cursor<'a> {
        Cursor { bytes, at: 0, base }
    }

    /// The absolute offset of the next byte.
    pub fn position(&self) -> u64 {
        // A caller's base is a file offset, so the sum fits; a nonsensical base must still not panic.
        self.base.saturating_add(self.at as u64)
    }

    /// How many bytes were taken so far.
    pub fn consumed(&self) -> usize {
        self.at
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The bytes that are left.
    pub fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// Takes `len` bytes.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] where fewer are left; nothing is taken then.
    pub fn bytes(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        match self.rest().get(..len) {
            Some(taken) => {
                self.at += len;
                Ok(taken)
            }
            None => Err(self.incomplete(len, field)),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        match self.rest().first_chunk::<N>() {
            Some(taken) => {
                self.at += N;
                Ok(*taken)
            }
            None => Err(self.incomplete(N, field)),
        }
    }

    fn incomplete(&self, wanted: usize, field: &'static str) -> DecodeError {
        let needed = (wanted - self.remaining()) as u64;
        DecodeError::Incomplete { offset: self.position(), field, needed }
    }

    /// The next byte without taking it.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] where none is left.
    pub fn peek(&self, field: &'static str) -> Result<u8, DecodeError> {
        self.rest().first().copied().ok_or_else(|| self.incomplete(1, field))
    }

    /// Takes a byte.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] where none is left.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        Ok(u8::from_be_bytes(self.array(field)?))
    }

    /// Takes a big-endian integer of 2 bytes.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] where fewer are left.
    pub fn be16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        Ok(u16::from_be_bytes(self.array(field)?))
    }

    /// Takes a big-endian integer of 4 bytes.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] where fewer are left.
    pub fn be32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_be_bytes(self.array(field)?))
    }

    /// Takes a big-endian integer of 8 bytes.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] where fewer are left.
    pub fn be64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_be_bytes(self.array(field)?))
    }

    /// Takes a name: a length byte and that many bytes.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] where bytes lack; a damaged fault where the name is empty or not
    /// printable.
    pub fn counted_string(&mut self, field: &'static str) -> Result<IdStr, DecodeError> {
        let start = self.position();
        let len = self.u8(field)?;
        let bytes = self.bytes(usize::from(len), field)?;
        IdStr::from_bytes(bytes)
            .ok_or_else(|| Fault::damaged(start, field, "is empty or not printable text").into())
    }
}

/// The writing side of [`Cursor`]: appends fields to a vector.
#[derive(Debug)]
pub struct Encoder<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> Encoder<'a> {
    /// An encoder that appends to `out`.
    pub fn new(out: &'a mut Vec<u8>) -> Encoder<'a> {
        Encoder { out }
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Appends a byte.
    pub fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    /// Appends a big-endian integer of 2 bytes.
    pub fn be16(&mut self, value: u16) {
        self.bytes(&value.to_be_bytes());
    }

    /// Appends a big-endian integer of 4 bytes.
    pub fn be32(&mut self, value: u32) {
        self.bytes(&value.to_be_bytes());
    }

    /// Appends a big-endian integer of 8 bytes.
    pub fn be64(&mut self, value: u64) {
        self.bytes(&value.to_be_bytes());
    }

    /// Appends a length byte and the name.
    pub fn counted_string(&mut self, name: &IdStr) {
        // An IdStr is at most 255 bytes long, by construction.
        self.u8(name.len() as u8);
        self.bytes(name.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_field_says_what_lacks_and_where() {
        let mut cursor = Cursor::new(&[1, 2, 3], 0x100);
        assert_eq!(cursor.u8("version"), Ok(1));
        let error = cursor.be32("section id").unwrap_err();
        assert_eq!(error.to_string(), "section id at 0x101: 2 more bytes are needed");
        assert_eq!(error.at_end().to_string(), "section id at 0x101: the input ends 2 bytes too early");
        assert_eq!(cursor.be16("rest"), Ok(0x0203), "a field that was cut short takes nothing");
    }

    #[test]
    fn names_are_checked_as_they_are_taken() {
        let mut cursor = Cursor::new(b"\x03ram\x00", 7);
        assert_eq!(cursor.counted_string("name").unwrap(), "ram");
        assert_eq!(
            cursor.counted_string("name").unwrap_err().to_string(),
            "name at 0xb: is empty or not printable text"
        );
    }
}
