//! gzip. A member of ours tells its length in an extra field, which other readers pass over: nothing else in the
//! format does.

use std::io::{self, Write};

use flate2::bufread::GzDecoder;
use flate2::read::MultiGzDecoder;
use flate2::{Compression, GzBuilder};

use super::{Member, PIECE_LEN_MAX, Pieces, Rest, damaged, read_piece};

/// The level that gzip itself takes by default.
const LEVEL: u32 = 6;
/// The extra subfield, after RFC 1952, 2.3.1.1: its name, the length of its data, and of that the member's length
/// as an le32.
const SUBFIELD: [u8; 4] = [b'V', b'S', 4, 0];
const MAGIC: [u8; 3] = [0x1f, 0x8b, 8];
const FLAGS_AT: usize = 3;
const FEXTRA: u8 = 4;
const XLEN_AT: usize = 10;
const SUBFIELD_AT: usize = XLEN_AT + 2;
const LEN_AT: usize = SUBFIELD_AT + SUBFIELD.len();

pub(super) struct Gzip;

impl Pieces for Gzip {
    fn chunk_len(&self) -> usize {
        1 << 20
    }

    fn compress(&self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        let extra = [SUBFIELD, [0; 4]].concat();
        let out = Vec::with_capacity(chunk.len() / 2);
        let mut encoder = GzBuilder::new().extra(extra).write(out, Compression::new(LEVEL));
        encoder.write_all(chunk)?;
        let mut member = encoder.finish()?;
        let len = u32::try_from(member.len()).map_err(|_| damaged("a member is too long"))?;
        member[LEN_AT..LEN_AT + 4].copy_from_slice(&len.to_le_bytes());
        Ok(member)
    }

    fn piece_len(&self, window: &[u8], _is_all: bool, _first: &[u8]) -> Option<usize> {
        let is_ours = window.starts_with(&MAGIC)
            && window.get(FLAGS_AT)? & FEXTRA != 0
            && window.get(XLEN_AT..SUBFIELD_AT)? == [8, 0]
            && window.get(SUBFIELD_AT..LEN_AT)? == SUBFIELD;
        let len = u32::from_le_bytes(*window.get(LEN_AT..)?.first_chunk()?) as usize;
        (is_ours && len <= PIECE_LEN_MAX).then_some(len)
    }

    fn decompress(&self, piece: &[u8], _first: &[u8]) -> io::Result<Vec<u8>> {
        read_piece(MultiGzDecoder::new(piece), self.chunk_len())
    }

    fn begins(&self, bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC[..2])
    }

    fn member(&self, input: Rest, _first: &[u8]) -> io::Result<Box<dyn Member>> {
        Ok(Box::new(GzDecoder::new(input)))
    }
}

impl Member for GzDecoder<Rest> {
    fn into_rest(self: Box<Self>) -> Rest {
        self.into_inner()
    }
}
