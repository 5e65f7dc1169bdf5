//! xz. Streams are told apart by their headers, which are alike within a file.

use std::io::{self, Write};

use lzma_rust2::{XzOptions, XzReader, XzWriter};

use super::bzip2::until_next;
use super::{DICTIONARY_KIB_MAX, Member, Pieces, Rest, read_piece};

/// The level that libvirt asks xz for.
const PRESET: u32 = 3;
const MAGIC: [u8; 6] = *b"\xfd7zXZ\0";
/// Magic, flags and their CRC.
const HEADER_LEN: usize = 12;

pub(super) struct Xz;

impl Pieces for Xz {
    /// The dictionary of the level: a smaller piece would compress worse, a larger one hardly better.
    fn chunk_len(&self) -> usize {
        4 << 20
    }

    fn compress(&self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        let out = Vec::with_capacity(chunk.len() / 4);
        let mut encoder = XzWriter::new(out, XzOptions::with_preset(PRESET))?;
        encoder.write_all(chunk)?;
        encoder.finish()
    }

    fn piece_len(&self, window: &[u8], is_all: bool, first: &[u8]) -> Option<usize> {
        until_next(window, is_all, first.get(..HEADER_LEN)?)
    }

    fn decompress(&self, piece: &[u8], _first: &[u8]) -> io::Result<Vec<u8>> {
        read_piece(XzReader::new_mem_limit(piece, true, DICTIONARY_KIB_MAX), self.chunk_len())
    }

    fn begins(&self, bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC)
    }

    fn member(&self, input: Rest, _first: &[u8]) -> io::Result<Box<dyn Member>> {
        Ok(Box::new(XzReader::new_mem_limit(input, false, DICTIONARY_KIB_MAX)))
    }
}

impl Member for XzReader<Rest> {
    fn into_rest(self: Box<Self>) -> Rest {
        self.into_inner()
    }
}
