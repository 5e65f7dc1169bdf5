//! bzip2. A stream begins on a byte and with ten bytes that nothing else is likely to hold, so streams are told apart
//! by these; what was cut at a place that only looks so is read as a whole.

use std::io::{self, Write};

use bzip2::Compression;
use bzip2::bufread::BzDecoder;
use bzip2::read::MultiBzDecoder;
use bzip2::write::BzEncoder;

use super::{Member, PIECE_LEN_MAX, Pieces, Rest, read_piece};

/// `BZh`, the level, and the magic of a block.
const SIGNATURE_LEN: usize = 10;

pub(super) struct Bzip2;

impl Pieces for Bzip2 {
    /// One block of the best level, which holds 19 bytes less than 900,000.
    fn chunk_len(&self) -> usize {
        878 << 10
    }

    fn compress(&self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        let mut encoder = BzEncoder::new(Vec::with_capacity(chunk.len() / 2), Compression::best());
        encoder.write_all(chunk)?;
        encoder.finish()
    }

    fn piece_len(&self, window: &[u8], is_all: bool, first: &[u8]) -> Option<usize> {
        until_next(window, is_all, first.get(..SIGNATURE_LEN)?)
    }

    fn decompress(&self, piece: &[u8], _first: &[u8]) -> io::Result<Vec<u8>> {
        read_piece(MultiBzDecoder::new(piece), self.chunk_len())
    }

    fn begins(&self, bytes: &[u8]) -> bool {
        bytes.starts_with(b"BZh")
    }

    fn member(&self, input: Rest, _first: &[u8]) -> io::Result<Box<dyn Member>> {
        Ok(Box::new(BzDecoder::new(input)))
    }
}

impl Member for BzDecoder<Rest> {
    fn into_rest(self: Box<Self>) -> Rest {
        self.into_inner()
    }
}

/// How long it is to the next place that begins like the first; to the end, where there is none and the window has
/// the end.
pub(super) fn until_next(window: &[u8], is_all: bool, signature: &[u8]) -> Option<usize> {
    let next = memchr::memmem::find(window.get(1..)?, signature).map(|at| at + 1);
    next.or(is_all.then_some(window.len())).filter(|len| *len <= PIECE_LEN_MAX)
}
