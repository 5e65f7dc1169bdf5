//! An image of libvirt as a source: QEMU's bytes behind the head, as what they are.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use io::{Cancel, Inflow, ReadPair};
use wire::DecodeError;
use wire::libvirt::{Head, PayloadFormat};

use super::extents::TAIL_LEN_MAX;
use super::flow::{GuestShape, Pages, Source, Tail};
use super::libvirt::FIRST_LEN;
use super::mapped_ram::faulty;
use super::spill::{Spilling, nameless_file};
use super::{
    Bounds, Format, MappedRamSource, Origin, Payload, StreamIndex, StreamSource, decompress, decompress_once,
};
use crate::{Error, Kind, Result};

/// How much of a decompressed stream is handed on at once.
const CHUNK: usize = 1 << 20;
/// The most that may come out of a compressed stream beside the RAM that it announces, in bytes: device state, records
/// of zero pages, and what stands before the announcement.
pub(super) const OVERHEAD_MAX: u64 = TAIL_LEN_MAX + (64 << 20);

/// An image behind a head of libvirt's.
pub struct LibvirtSource {
    head: Head,
    inner: Box<dyn Source>,
}

impl LibvirtSource {
    /// Opens the image that starts at the offset `start` of a file or device; `path` is for messages.
    ///
    /// # Errors
    /// As of the formats within; [`Kind::Misuse`] where there is no head.
    pub fn open(pair: ReadPair, path: &Path, start: u64, cancel: &Cancel) -> Result<LibvirtSource> {
        let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
        let payload = Payload::of(&pair.buffered, path, start)?;
        // Whoever said what it is may have been wrong.
        Format::of_payload(&pair.buffered, path, &payload)?;
        let compressed = payload.compressed();
        let Some(head) = payload.head else {
            let clause = format!("{}: is no save image of libvirt", path.display());
            return Err(Error::new(Kind::Misuse, clause));
        };
        let bounds = Bounds::of(&pair.buffered, path, payload.at)?;
        let inner: Box<dyn Source> = if let Some(format) = compressed {
            let stream = decompress(&pair.buffered, path, format, payload.at, bounds.end)?;
            Box::new(bounded(path, stream, |stream| stream)?)
        } else if head.format == PayloadFormat::Sparse {
            Box::new(MappedRamSource::open(pair, path, start)?)
        } else {
            let origin = Origin::File(pair.buffered.try_clone().map_err(cannot)?, bounds);
            let from = Inflow::of_file(Arc::new(pair), payload.at, bounds.end, cancel).map_err(cannot)?;
            Box::new(StreamSource::open(Box::new(from), path, payload.at, origin)?)
        };
        Ok(LibvirtSource { head, inner })
    }

    /// What stands behind a head, opened in another way.
    pub(super) fn around(head: Head, inner: Box<dyn Source>) -> LibvirtSource {
        LibvirtSource { head, inner }
    }

    /// Opens an image that comes out of a pipe: raw, or compressed, which one thread decompresses.
    ///
    /// # Errors
    /// As of the formats within; [`Kind::Misuse`] where there is no head, and for `sparse`, whose pages have places.
    pub fn open_once(mut from: Box<dyn BufRead + Send>, path: &Path) -> Result<LibvirtSource> {
        let cannot = |error| Error::from_within(error).unwrap_or_else(|error| cannot_read(path, error));
        let (head, rest) = read_head(&mut from, path)?;
        let at = head.len();
        let mut first = rest;
        (&mut from)
            .take(FIRST_LEN.saturating_sub(first.len() as u64))
            .read_to_end(&mut first)
            .map_err(cannot)?;
        head.check_payload(&first, at).map_err(|fault| faulty(path, fault))?;
        let from = Cursor::new(first).chain(from);
        let inner: Box<dyn Source> = match head.format {
            PayloadFormat::Raw => Box::new(StreamSource::open(Box::new(from), path, at, Origin::Pipe)?),
            PayloadFormat::Sparse => {
                let clause = format!(
                    "{}: the pages of a libvirt-sparse image are read at offsets, which a pipe has not",
                    path.display()
                );
                return Err(Error::new(Kind::Misuse, clause).hint("give the name of the file"));
            }
            format => Box::new(bounded(path, decompress_once(from, path, format, at)?, |stream| stream)?),
        };
        Ok(LibvirtSource { head, inner })
    }
}

fn cannot_read(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("cannot read {}", path.display()), error)
}

/// Reads a head off what cannot be read twice, and gives with it what was read of the payload behind it.
fn read_head(from: &mut dyn BufRead, path: &Path) -> Result<(Head, Vec<u8>)> {
    let cannot = |error| Error::from_within(error).unwrap_or_else(|error| cannot_read(path, error));
    let mut bytes = Vec::new();
    let head = loop {
        // Where it ends nobody knows; a text has a greatest length all the same.
        match Head::decode(&bytes, 0, u64::MAX) {
            Ok(head) => break head,
            Err(DecodeError::Incomplete { needed, offset, field }) => {
                let had = (&mut *from).take(needed).read_to_end(&mut bytes).map_err(cannot)?;
                if (had as u64) < needed {
                    let needed = needed - had as u64;
                    return Err(faulty(path, DecodeError::Incomplete { needed, offset, field }.at_end()));
                }
            }
            Err(DecodeError::Fault(fault)) => return Err(faulty(path, fault)),
        }
    };
    let within = bytes.len() as u64;
    let padding = head.len().saturating_sub(within);
    let skipped = std::io::copy(&mut (&mut *from).take(padding), &mut std::io::sink()).map_err(cannot)?;
    if skipped < padding {
        let needed = padding - skipped;
        let fault = DecodeError::Incomplete { needed, offset: within + skipped, field: "padding" }.at_end();
        return Err(faulty(path, fault));
    }
    let rest = bytes.split_off(within.min(head.len()) as usize);
    Ok((head, rest))
}

/// The stream that comes out of a compressed one, read through `around`, once it has been bounded.
fn bounded<R, A>(path: &Path, stream: R, around: impl FnOnce(Bounded<R>) -> A) -> Result<StreamSource>
where
    R: Read,
    A: Read + Send + 'static,
{
    let ram_bytes = Arc::new(AtomicU64::new(0));
    let bounded =
        around(Bounded { inner: stream, path: path.to_owned(), at: 0, ram_bytes: ram_bytes.clone() });
    let from = Box::new(BufReader::with_capacity(CHUNK, bounded));
    let source = StreamSource::open(from, path, 0, Origin::Decompressor)?;
    ram_bytes.store(source.shape().ram_bytes(), Ordering::Relaxed);
    Ok(source)
}

/// Decompresses what stands in `file` between the two offsets of `range`, and reads its pages to their end: gives the
/// stream at its tail, and its pages, which from then on are read out of a file without a name.
///
/// # Errors
/// Those of the stream; [`Kind::Io`] where there is no room for what comes out; [`Kind::Interrupted`].
pub(super) fn spilled(
    file: &File,
    path: &Path,
    format: PayloadFormat,
    range: [u64; 2],
    cancel: &Cancel,
) -> Result<(StreamSource, StreamIndex)> {
    let [at, end] = range;
    let stream = decompress(file, path, format, at, end)?;
    let kept = nameless_file()?;
    let again = kept.try_clone().map_err(|error| Error::io("cannot keep what is decompressed", error))?;
    let cancel = cancel.clone();
    let mut source = bounded(path, stream, |from| Spilling { from, file: kept, at: 0, cancel })?;
    let index = StreamIndex::read(&mut source, ReadPair::buffered(again))?;
    Ok((source, index))
}

impl Source for LibvirtSource {
    fn format(&self) -> Format {
        Format::Libvirt(self.head.format)
    }

    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn shape(&self) -> &GuestShape {
        self.inner.shape()
    }

    fn domain(&self) -> Option<&Head> {
        Some(&self.head)
    }

    fn end(&self) -> Option<u64> {
        self.inner.end()
    }

    fn data_bytes_max(&self) -> Result<Option<u64>> {
        self.inner.data_bytes_max()
    }

    fn pages(&mut self) -> Result<Pages<'_>> {
        self.inner.pages()
    }

    /// As QEMU wrote it, and beside it whether libvirt's head says that the guest ran.
    fn tail(&mut self) -> Result<Tail> {
        Ok(Tail { was_running: Some(self.head.was_running), ..self.inner.tail()? })
    }
}

/// Hands on what is decompressed. What comes out of little may be very much: more than a guest has is refused.
struct Bounded<R> {
    inner: R,
    path: PathBuf,
    /// How many bytes came out so far.
    at: u64,
    /// How much RAM the stream announces, once that is known.
    ram_bytes: Arc<AtomicU64>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = match self.inner.read(buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Err(error) => return Err(std::io::Error::other(not_decompressed(&self.path, self.at, error))),
        };
        self.at += len as u64;
        refuse_too_much(&self.path, self.at, self.ram_bytes.load(Ordering::Relaxed))
            .map_err(std::io::Error::other)?;
        Ok(len)
    }
}

/// What a payload is that cannot be decompressed; so many bytes came out of it.
pub(super) fn not_decompressed(path: &Path, at: u64, error: std::io::Error) -> Error {
    // Whoever reads a pipe may have been interrupted.
    let error = match Error::from_within(error) {
        Ok(ours) => return ours,
        Err(error) => error,
    };
    let clause = format!("{}: cannot be decompressed beyond {at:#x} of its stream", path.display());
    match error.kind() {
        ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof | ErrorKind::Other => {
            Error::new(Kind::Damaged, clause).because(error)
        }
        _ => Error::io(clause, error),
    }
}

/// Refuses a payload out of which so many bytes came, if its guest cannot account for them.
pub(super) fn refuse_too_much(path: &Path, len: u64, ram_bytes: u64) -> Result<()> {
    // A live save sends pages more than once, and libvirt saves guests that stand still.
    let most = ram_bytes.saturating_mul(2).saturating_add(OVERHEAD_MAX);
    if len <= most {
        return Ok(());
    }
    let clause = format!(
        "{}: more than {most:#x} bytes come out of it, of a guest with {ram_bytes:#x} bytes of RAM",
        path.display()
    );
    Err(Error::new(Kind::Damaged, clause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_comes_out_than_a_guest_accounts_for() {
        let ram_bytes = Arc::new(AtomicU64::new(0));
        let mut bounded = Bounded {
            inner: std::io::repeat(1),
            path: "image".into(),
            at: OVERHEAD_MAX - 10,
            ram_bytes: ram_bytes.clone(),
        };
        assert_eq!(bounded.read(&mut [0; 10]).unwrap(), 10);
        let error = Error::from_within(bounded.read(&mut [0; 1]).unwrap_err()).unwrap();
        let clause = format!(
            "image: more than {OVERHEAD_MAX:#x} bytes come out of it, of a guest with 0x0 bytes of RAM"
        );
        assert_eq!((error.kind(), error.chain()), (Kind::Damaged, clause));
        ram_bytes.store(5, Ordering::Relaxed);
        assert_eq!(bounded.read(&mut [0; 9]).unwrap(), 9);
        assert!(bounded.read(&mut [0; 1]).is_err());
    }
}
