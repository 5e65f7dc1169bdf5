//! Compressing a stream in pieces.

use std::io::{self, Write};

use super::{Codec, default_threads};
use crate::ordered::Ordered;

/// Compresses what is written into it, by several threads, and writes it on in order.
///
/// [`Compressor::finish`] must be called: without it the end is missing.
#[derive(Debug)]
pub struct Compressor<W> {
    out: W,
    codec: Codec,
    chunk: Vec<u8>,
    pool: Ordered<Vec<u8>, io::Result<Vec<u8>>>,
    has_pieces: bool,
}

impl<W: Write> Compressor<W> {
    /// A compressor that uses as many threads as the machine has, and writes what stands at the front.
    ///
    /// # Errors
    /// What the system, or `out`, said.
    pub fn new(codec: Codec, out: W) -> io::Result<Compressor<W>> {
        Compressor::with_threads(codec, out, default_threads())
    }

    /// As [`Compressor::new`], with a number of threads.
    ///
    /// # Errors
    /// As there.
    pub fn with_threads(codec: Codec, mut out: W, threads: usize) -> io::Result<Compressor<W>> {
        let pieces = codec.pieces();
        let pool =
            Ordered::start("vmstate-codec", threads.max(1), move |chunk: Vec<u8>| pieces.compress(&chunk))?;
        out.write_all(&pieces.head())?;
        Ok(Compressor { out, codec, chunk: Vec::with_capacity(pieces.chunk_len()), pool, has_pieces: false })
    }

    /// Compresses what is left, writes all of it and the end, and gives the writer back.
    ///
    /// # Errors
    /// What the writer said.
    pub fn finish(mut self) -> io::Result<W> {
        // Of nothing at all there is a piece, too: an empty file is none that a stock program takes.
        if !self.chunk.is_empty() || !self.has_pieces {
            self.push()?;
        }
        while let Some(piece) = self.pool.pop() {
            self.out.write_all(&piece??)?;
        }
        self.out.write_all(&self.codec.pieces().tail())?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn push(&mut self) -> io::Result<()> {
        self.has_pieces = true;
        let empty = Vec::with_capacity(self.codec.pieces().chunk_len());
        self.pool.push(std::mem::replace(&mut self.chunk, empty))
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.codec.pieces().chunk_len() - self.chunk.len();
        let taken = &bytes[..bytes.len().min(room)];
        self.chunk.extend_from_slice(taken);
        if taken.len() == room {
            if self.pool.is_full()
                && let Some(piece) = self.pool.pop()
            {
                self.out.write_all(&piece??)?;
            }
            self.push()?;
        }
        Ok(taken.len())
    }

    /// Does nothing: a piece that was cut short would compress worse, and only the end is worth having.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
