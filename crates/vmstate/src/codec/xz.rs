//! xz. Streams are told apart by their headers, which are alike within a file.

use std::io::{self, Read, Write};

use lzma_rust2::{XzOptions, XzReader, XzWriter};

use super::bzip2::until_next;
use super::{DICTIONARY_KIB_MAX, Pieces, read_piece};

/// The level that libvirt asks xz for.
const PRESET: u32 = 3;
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

    fn stream(&self, input: Box<dyn Read + Send>, _first: &[u8]) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(XzReader::new_mem_limit(input, true, DICTIONARY_KIB_MAX)))
    }
}
