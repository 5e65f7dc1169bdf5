//! Streams through a compressor, as libvirt keeps them: gzip, bzip2, xz, lzop and zstd, in process and in parallel.
//!
//! What is written consists of pieces that were compressed apart: members of gzip, frames of zstd, streams of bzip2
//! and xz, blocks of lzop. The stock programs decompress such a file like any other; [`Decompressor`] hands its
//! pieces to several threads. A file by a stock program is one piece as a rule, which one thread decompresses.
//!
//! Behind the last piece there may be zeros, as where a file was padded or lies on a device. Anything else is an error:
//! the stock programs differ in what they say of it, and pass over what may be a damaged piece.
//!
//! Memory is bounded whatever a file says: pieces, windows and dictionaries have limits, and only so many pieces are
//! in flight. How much comes out of a file in the end is for the reader to bound: it knows the guest's RAM.

mod bzip2;
#[doc(hidden)]
pub mod fuzz;
mod gzip;
mod lzo1x;
mod lzop;
mod members;
mod read;
mod write;
mod xz;
mod zstd;

use std::fmt;
use std::io::{self, Read};

use wire::libvirt::PayloadFormat;

use members::{Member, Rest};
pub use read::{Decompressor, decompress_once};
pub use write::Compressor;

/// The most that one piece may hold before and after compression, in bytes, to be decompressed apart; what is larger
/// is decompressed as a stream.
const PIECE_LEN_MAX: usize = 8 << 20;
/// The most memory that the dictionary of a stream may ask for, in KiB; `xz -9` uses 64 MiB.
const DICTIONARY_KIB_MAX: u32 = 192 << 10;

/// A compressor that libvirt knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// RFC 1952.
    Gzip,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
    /// LZO1X in lzop's container.
    Lzop,
    /// RFC 8878.
    Zstd,
}

impl Codec {
    /// All of them.
    pub const ALL: [Codec; 5] = [Codec::Gzip, Codec::Bzip2, Codec::Xz, Codec::Lzop, Codec::Zstd];

    /// The name of the stock program.
    pub const fn name(self) -> &'static str {
        match self {
            Codec::Gzip => "gzip",
            Codec::Bzip2 => "bzip2",
            Codec::Xz => "xz",
            Codec::Lzop => "lzop",
            Codec::Zstd => "zstd",
        }
    }

    /// What libvirt compresses a stream of this format with; `None` where it does not.
    pub const fn of(format: PayloadFormat) -> Option<Codec> {
        match format {
            PayloadFormat::Raw | PayloadFormat::Sparse => None,
            PayloadFormat::Gzip => Some(Codec::Gzip),
            PayloadFormat::Bzip2 => Some(Codec::Bzip2),
            PayloadFormat::Xz => Some(Codec::Xz),
            PayloadFormat::Lzop => Some(Codec::Lzop),
            PayloadFormat::Zstd => Some(Codec::Zstd),
        }
    }

    fn pieces(self) -> &'static dyn Pieces {
        match self {
            Codec::Gzip => &gzip::Gzip,
            Codec::Bzip2 => &bzip2::Bzip2,
            Codec::Xz => &xz::Xz,
            Codec::Lzop => &lzop::Lzop,
            Codec::Zstd => &zstd::Zstd,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a format has to tell so that its pieces can be made and undone apart.
trait Pieces: Sync {
    /// How many bytes go into one piece.
    fn chunk_len(&self) -> usize;

    /// What stands before the first piece.
    fn head(&self) -> Vec<u8> {
        Vec::new()
    }

    /// What stands behind the last piece.
    fn tail(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Compresses a chunk.
    fn compress(&self, chunk: &[u8]) -> io::Result<Vec<u8>>;

    /// The length of the piece that `window` begins with, or `None` where that cannot be told: the rest is one
    /// stream then. `is_all` says that nothing follows the window. `first` are the first bytes of the file.
    fn piece_len(&self, window: &[u8], is_all: bool, first: &[u8]) -> Option<usize>;

    /// Decompresses a piece, which must end with its last byte and hold no more than [`PIECE_LEN_MAX`].
    fn decompress(&self, piece: &[u8], first: &[u8]) -> io::Result<Vec<u8>>;

    /// Whether a piece is the last of its member, so that behind it another member begins, or nothing.
    fn ends_member(&self, _piece: &[u8]) -> bool {
        true
    }

    /// Whether a member begins like `bytes`.
    fn begins(&self, bytes: &[u8]) -> bool;

    /// Decompresses a stream from the beginning of a piece to the end of its member.
    fn member(&self, input: Rest, first: &[u8]) -> io::Result<Box<dyn Member>>;
}

/// Reads all of a piece, which must be no longer than one may be.
fn read_piece(reader: impl Read, hint: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(hint.min(PIECE_LEN_MAX));
    reader.take(PIECE_LEN_MAX as u64 + 1).read_to_end(&mut out)?;
    if out.len() > PIECE_LEN_MAX {
        return Err(damaged("a piece holds more than one may"));
    }
    Ok(out)
}

fn damaged(problem: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem.into())
}

/// How many threads compress or decompress: all that the machine has, up to a number that keeps memory bounded.
fn default_threads() -> usize {
    const THREADS_MAX: usize = 32;
    std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
}

#[cfg(test)]
mod tests;
