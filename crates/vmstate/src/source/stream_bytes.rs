//! The bytes of a stream in their order, out of a file as they are or decompressed.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use wire::{Fault, FileRange};

use super::ends::{OfMemory, end_of, find_end};
use super::extents::unreadable;
use super::libvirt_source::{not_decompressed, refuse_too_much};
use super::{Bounds, Payload, decompress};
use crate::{Error, Kind, Result};

/// The most device state that is taken out of a compressed stream, in bytes. Unlike that of a file it takes memory
/// without having taken room on a disk, so less is believed.
const DECOMPRESSED_TAIL_MAX: u64 = 256 << 20;

/// A stream that is read once, from front to back.
pub(crate) struct StreamBytes<'a> {
    file: &'a File,
    path: &'a Path,
    /// The offset of the next byte: of the file, or of the stream where that was compressed.
    at: u64,
    /// The end of the file; `None` where the stream was compressed.
    end: Option<u64>,
    decompressed: Option<Box<dyn Read + Send>>,
    ram_bytes: u64,
}

impl<'a> StreamBytes<'a> {
    /// The stream of a payload.
    pub(super) fn open(file: &'a File, path: &'a Path, payload: &Payload) -> Result<StreamBytes<'a>> {
        let Bounds { end, .. } = Bounds::of(file, path, payload.at)?;
        let decompressed: Option<Box<dyn Read + Send>> = match payload.compressed() {
            Some(format) => Some(Box::new(decompress(file, path, format, payload.at, end)?)),
            None => None,
        };
        let (at, end) = if decompressed.is_some() { (0, None) } else { (payload.at, Some(end)) };
        Ok(StreamBytes { file, path, at, end, decompressed, ram_bytes: 0 })
    }

    /// The offset of the next byte.
    pub(super) fn position(&self) -> u64 {
        self.at
    }

    /// Says how much RAM the stream announces, which bounds how much may come out of it.
    pub(super) fn announce(&mut self, ram_bytes: u64) {
        self.ram_bytes = ram_bytes;
    }

    /// Reads until the window is full or the stream ends, and gives how many bytes that are.
    pub(crate) fn read(&mut self, window: &mut [u8]) -> Result<usize> {
        let Some(stream) = &mut self.decompressed else {
            let left = self.end.unwrap_or_default().saturating_sub(self.at);
            let len = window.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            self.file
                .read_exact_at(&mut window[..len], self.at)
                .map_err(|error| Error::io(format!("cannot read {}", self.path.display()), error))?;
            self.at += len as u64;
            return Ok(len);
        };
        let mut len = 0;
        while len < window.len() {
            match stream.read(&mut window[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(not_decompressed(self.path, self.at + len as u64, error)),
            }
        }
        self.at += len as u64;
        refuse_too_much(self.path, self.at, self.ram_bytes)?;
        Ok(len)
    }

    /// Reads what was decompressed to its end: what it says may be wrong because the payload is.
    ///
    /// # Errors
    /// That the payload is damaged.
    pub(super) fn drain(&mut self) -> Result<()> {
        let mut window = vec![0; 1 << 20];
        while self.decompressed.is_some() && self.read(&mut window)? > 0 {}
        Ok(())
    }

    /// The rest of the stream up to its end, of which `window` is a part that was read already.
    ///
    /// # Errors
    /// The fault of a stream that may end at either of two places, as the inner result.
    pub(super) fn rest(&mut self, window: &[u8]) -> Result<std::result::Result<Rest, Fault>> {
        let start = self.at - window.len() as u64;
        let cannot = |error| Error::io(format!("cannot read {}", self.path.display()), error);
        if let Some(end) = self.end {
            let end = find_end(self.file, start, end).map_err(cannot)?;
            return Ok(end.map(|end| Rest { range: FileRange::new(start, end), decompressed: None }));
        }
        let mut bytes = window.to_vec();
        let mut more = vec![0; 1 << 20];
        loop {
            let len = self.read(&mut more)?;
            bytes.extend_from_slice(&more[..len]);
            if len < more.len() {
                break;
            }
            if bytes.len() as u64 > DECOMPRESSED_TAIL_MAX {
                let clause = format!(
                    "{}: more than {DECOMPRESSED_TAIL_MAX:#x} bytes of device state come out of it",
                    self.path.display()
                );
                return Err(Error::new(Kind::Unsupported, clause));
            }
        }
        let end = end_of(&OfMemory { bytes: &bytes, base: start }, start, self.at);
        let end = end.map_err(|error| Error::io(format!("cannot read {}", self.path.display()), error))?;
        Ok(end.map(|end| {
            bytes.truncate((end - start) as usize);
            Rest { range: FileRange::new(start, end), decompressed: Some(bytes) }
        }))
    }
}

/// What stands behind the pages of a stream.
#[derive(Clone, Debug)]
pub struct Rest {
    /// Where: by offsets of the file, or of the stream where that was compressed.
    pub range: FileRange,
    /// The bytes, where they are not to be had from the file.
    decompressed: Option<Vec<u8>>,
}

impl Rest {
    /// The bytes.
    ///
    /// # Errors
    /// The fault of a range that is not to be read into memory; those of the system.
    pub(crate) fn bytes(&self, file: &File) -> std::io::Result<std::result::Result<Vec<u8>, Fault>> {
        if let Some(bytes) = &self.decompressed {
            return Ok(Ok(bytes.clone()));
        }
        if let Some(fault) = unreadable(file, self.range.end, self.range) {
            return Ok(Err(fault));
        }
        let mut bytes = vec![0; self.range.len() as usize];
        file.read_exact_at(&mut bytes, self.range.start)?;
        Ok(Ok(bytes))
    }
}
