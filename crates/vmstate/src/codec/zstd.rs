//! zstd. Where a frame ends is told by walking its blocks, which have their lengths in front.

use std::cell::RefCell;
use std::io;

use zstd::bulk::Compressor;
use zstd::stream::read::Decoder;
use zstd::zstd_safe::{CParameter, find_frame_compressed_size};

use super::{Member, PIECE_LEN_MAX, Pieces, Rest, read_piece};

/// The level that zstd itself takes by default.
const LEVEL: i32 = 3;
/// The largest window that is taken, as a power of two: that of the stock program.
const WINDOW_LOG_MAX: u32 = 27;

thread_local! {
    /// A compressor has megabytes of tables, which each thread makes once.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
}

pub(super) struct Zstd;

impl Pieces for Zstd {
    fn chunk_len(&self) -> usize {
        4 << 20
    }

    fn compress(&self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        COMPRESSOR.with_borrow_mut(|compressor| {
            let compressor = match compressor {
                Some(compressor) => compressor,
                None => {
                    let mut new = Compressor::new(LEVEL)?;
                    // As the stock program does.
                    new.set_parameter(CParameter::ChecksumFlag(true))?;
                    compressor.insert(new)
                }
            };
            compressor.compress(chunk)
        })
    }

    fn piece_len(&self, window: &[u8], _is_all: bool, _first: &[u8]) -> Option<usize> {
        find_frame_compressed_size(window).ok().filter(|len| *len <= PIECE_LEN_MAX)
    }

    fn decompress(&self, piece: &[u8], _first: &[u8]) -> io::Result<Vec<u8>> {
        let mut decoder = Decoder::with_buffer(piece)?;
        decoder.window_log_max(WINDOW_LOG_MAX)?;
        read_piece(decoder, self.chunk_len())
    }

    fn begins(&self, bytes: &[u8]) -> bool {
        // A frame, or one that is to be skipped.
        bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || matches!(bytes, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
    }

    fn member(&self, input: Rest, _first: &[u8]) -> io::Result<Box<dyn Member>> {
        let mut decoder = Decoder::with_buffer(input)?.single_frame();
        decoder.window_log_max(WINDOW_LOG_MAX)?;
        Ok(Box::new(decoder))
    }
}

impl Member for Decoder<'static, Rest> {
    fn into_rest(self: Box<Self>) -> Rest {
        self.finish()
    }
}
