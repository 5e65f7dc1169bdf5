//! What every format takes of a guest, to write it: its shape and pages, then its device state.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use io::{Cancel, Counters, LaneSettings, Outflow, PIECE_GRAINS, Part, Piece, Staging, Target, WriteLanes};

use rustix::process::{Resource, getrlimit};

use super::Domain;
use crate::source::{GuestShape, Pages, Tail};
use crate::{Error, Result};

/// With what an image is written.
#[derive(Clone, Debug)]
pub struct Means {
    /// How many lanes there are.
    pub channels: u16,
    /// What is counted as it is done.
    pub counters: Arc<Counters>,
    /// Whether what goes to the standard output is made durable, where that is a file. A target that gets its name
    /// or head last is synced then.
    pub sync: bool,
    /// What goes into the head of an image of libvirt, where there is one.
    pub domain: Option<Domain>,
    /// Whether that head is to say that the guest ran, where that is known before the device state is.
    pub was_running: Option<bool>,
    /// The switch that stops everything.
    pub cancel: Cancel,
}

/// An image in the making. The calls come in this order, each of them once; after an error nothing but dropping it
/// is right. Nothing that it writes passes for an image before [`complete`](Sink::complete) has succeeded.
pub trait Sink {
    /// How many bytes the image takes beside its pages, at the most.
    fn metadata_bytes(&self, shape: &GuestShape) -> u64;

    /// Writes what stands before the pages, and the pages.
    ///
    /// # Errors
    /// Those of the pages; [`Kind::Unsupported`](crate::Kind::Unsupported) for a guest that the format has no way to
    /// keep; [`Kind::Io`](crate::Kind::Io), [`Kind::Interrupted`](crate::Kind::Interrupted).
    fn write_pages(&mut self, shape: &GuestShape, pages: Pages<'_>) -> Result<()>;

    /// Writes everything else.
    ///
    /// # Errors
    /// As [`Sink::write_pages`].
    fn complete(&mut self, tail: &Tail) -> Result<()>;
}

/// Bytes that follow each other into a file, a pipe, or whatever compresses them first. Errors of ours may be put
/// into those of the system, see [`std::io::Error::other`].
pub trait ByteSink: Write + Send {
    /// Writes a buffer that the caller gives away, and gives back an empty one: whoever has much to write saves a copy
    /// by it.
    ///
    /// # Errors
    /// As [`Write::write_all`].
    fn write_owned(&mut self, mut bytes: Vec<u8>) -> std::io::Result<Vec<u8>> {
        self.write_all(&bytes)?;
        bytes.clear();
        Ok(bytes)
    }

    /// Writes what waits. Nothing is written any more.
    ///
    /// # Errors
    /// [`Kind::Io`](crate::Kind::Io), [`Kind::Interrupted`](crate::Kind::Interrupted).
    fn finish(&mut self) -> Result<()>;
}

/// The bytes of a target, from its start on: into a file by lanes, past the page cache where that can be; into a
/// pipe by one thread.
///
/// # Errors
/// When no descriptor or no thread is left.
pub fn byte_sink(target: &Target, means: &Means) -> Result<Box<dyn ByteSink>> {
    match target.is_sequential() {
        true => Ok(Box::new(Piped { out: Some(target.outflow(&means.cancel)?), sync: means.sync })),
        false => Ok(Box::new(LaneBytes::start(target, means)?)),
    }
}

/// What a write failed with; whoever writes may have put an error of ours into one of the system's.
pub(crate) fn write_failed(error: std::io::Error) -> Error {
    Error::from_within(error).unwrap_or_else(|error| Error::io("cannot write the image", error))
}

fn not_lengthened(error: std::io::Error) -> Error {
    Error::io("cannot set the length of the image", error)
}

/// A pipe, or the standard output.
struct Piped {
    /// `None` once it is finished.
    out: Option<Outflow>,
    sync: bool,
}

impl Write for Piped {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let Some(out) = &mut self.out else { return Err(std::io::ErrorKind::BrokenPipe.into()) };
        let written = out.write(bytes).map_err(super::stream::stopped);
        written.map(|()| bytes.len()).map_err(std::io::Error::other)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let Some(out) = &mut self.out else { return Ok(()) };
        out.flush().map_err(super::stream::stopped).map_err(std::io::Error::other)
    }
}

impl ByteSink for Piped {
    fn finish(&mut self) -> Result<()> {
        match self.out.take() {
            Some(out) => out.finish(self.sync).map_err(super::stream::stopped),
            None => Ok(()),
        }
    }
}

/// The grain of what is written front to back: a multiple of any alignment that lanes accept does not matter here,
/// since every piece but the last is whole.
const GRAIN: u32 = 4096;
/// How many bytes go to a lane at once.
const PIECE: usize = (PIECE_GRAINS * GRAIN) as usize;

/// How far a file is made longer ahead of what is written into it, in bytes.
const AHEAD: u64 = 256 << 20;

/// A file that is written front to back by lanes: what is gathered goes to them a MiB at a time.
struct LaneBytes {
    /// `None` once it is finished.
    lanes: Option<WriteLanes>,
    staging: Arc<Staging>,
    /// What the next piece consists of so far, `gathered_len` bytes of it in parts and the rest as it was written.
    gathered: Vec<Part>,
    gathered_len: usize,
    written: Vec<u8>,
    /// Where in the file the next piece begins.
    at: u64,
    /// A new file, and how long it was made: a write that lengthens a file has it for itself, and the others wait.
    file: Option<File>,
    grown: u64,
}

impl LaneBytes {
    fn start(target: &Target, means: &Means) -> Result<LaneBytes> {
        let staging = Arc::new(Staging::default());
        let settings =
            LaneSettings { lanes: usize::from(means.channels), align: target.direct_io().alignment() };
        // What these lanes write is the file's bytes and not the guest's: they are not what is counted.
        let counters = Arc::new(Counters::default());
        let lanes = WriteLanes::start(
            target.lane_target()?,
            staging.clone(),
            settings,
            counters,
            means.cancel.clone(),
        )?;
        Ok(LaneBytes {
            lanes: Some(lanes),
            staging,
            gathered: Vec::new(),
            gathered_len: 0,
            written: Vec::new(),
            at: target.start(),
            file: match target {
                Target::Draft(draft) => Some(draft.buffered().try_clone().map_err(not_lengthened)?),
                _ => None,
            },
            grown: 0,
        })
    }

    /// How many bytes the next piece still lacks. Pieces end at multiples of their length, so that every one but the
    /// first and last is aligned.
    fn room(&self) -> usize {
        PIECE - self.at as usize % PIECE - self.gathered_len - self.written.len()
    }

    /// An empty buffer that may have been used before.
    fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.staging.buffer();
        buffer.clear();
        buffer
    }

    /// Makes a part of what was written piecemeal.
    fn close_written(&mut self) {
        if !self.written.is_empty() {
            self.gathered_len += self.written.len();
            self.gathered.push(Part::whole(std::mem::take(&mut self.written)));
        }
    }

    /// Gives the lanes what is gathered.
    fn deal(&mut self) -> Result<()> {
        self.close_written();
        let Some(lanes) = &self.lanes else { return Ok(()) };
        if self.gathered.is_empty() {
            return Ok(());
        }
        let len = std::mem::take(&mut self.gathered_len) as u32;
        let mask = page::Mask::range(0, len.div_ceil(GRAIN) as usize).0;
        let target = self.at;
        self.at += u64::from(len);
        if let Some(file) = &self.file
            && self.at > self.grown
        {
            self.grown = self.at + AHEAD;
            // Where it is not to be had, the writes are slower and just as right. To ask for more than a process may
            // have of a file would end it.
            if getrlimit(Resource::Fsize).current.is_none_or(|limit| self.grown <= limit) {
                let _ = file.set_len(self.grown);
            }
        }
        let region = self.staging.hand_parts(std::mem::take(&mut self.gathered));
        Ok(lanes.deal(Piece { region, offset: 0, target, grain: GRAIN, len, mask })?)
    }
}

impl Write for LaneBytes {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = self.room();
        let (now, _) = bytes.split_at(bytes.len().min(room));
        if self.written.is_empty() {
            self.written = self.buffer();
            self.written.reserve(PIECE);
        }
        self.written.extend_from_slice(now);
        if now.len() == room {
            self.deal().map_err(std::io::Error::other)?;
        }
        Ok(now.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl ByteSink for LaneBytes {
    fn write_owned(&mut self, bytes: Vec<u8>) -> std::io::Result<Vec<u8>> {
        self.close_written();
        let mut rest = Part::whole(bytes);
        while !rest.is_empty() {
            let part = rest.split_to(self.room());
            self.gathered_len += part.len();
            self.gathered.push(part);
            if self.room() == 0 {
                self.deal().map_err(std::io::Error::other)?;
            }
        }
        Ok(self.buffer())
    }

    fn finish(&mut self) -> Result<()> {
        let dealt = self.deal();
        // A lane that failed is the reason why dealing failed, so its error is the one to tell.
        if let Some(lanes) = self.lanes.take() {
            lanes.finish()?;
        }
        dealt?;
        match &self.file {
            Some(file) if self.grown > 0 => file.set_len(self.at).map_err(not_lengthened),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use io::{Cancel, DraftOptions};

    #[test]
    fn bytes_follow_each_other_however_they_are_handed_over() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("bytes");
        let cancel = Cancel::new().unwrap();
        let mut target = Target::open(&path, None, DraftOptions::default(), &cancel).unwrap();
        let means = Means {
            channels: 2,
            counters: Arc::default(),
            sync: false,
            domain: None,
            was_running: None,
            cancel: cancel.clone(),
        };
        let mut out = LaneBytes::start(&target, &means).unwrap();
        let mut expected = Vec::new();
        // Less than a piece, more than one, exactly one, several; with something gathered and without.
        let lens = [77, PIECE + 5, PIECE, 0, 3 * PIECE + 1, 1, PIECE - 1, 2 * PIECE];
        for (i, len) in lens.into_iter().cycle().take(29).enumerate() {
            let bytes: Vec<u8> = (0..len).map(|at| (at / 253 + at + i) as u8 | 1).collect();
            expected.extend_from_slice(&bytes);
            if i % 3 == 0 {
                out.write_all(&bytes).unwrap();
            } else {
                assert!(out.write_owned(bytes).unwrap().is_empty());
            }
        }
        out.finish().unwrap();
        target.publish().unwrap();
        assert!(std::fs::read(&path).unwrap() == expected);
    }
}
