//! A file read member after member, where its pieces cannot be told apart, to the last one and the zeros behind it.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{Pieces, damaged};

/// How much is read at once.
const CHUNK: usize = 256 << 10;
/// The longest magic of a member.
const MAGIC_LEN_MAX: usize = 6;

/// What bytes are read from.
enum From {
    /// A file, by offset.
    File(Arc<File>),
    /// A pipe, or what comes in order for another reason.
    Pipe(Box<dyn Read + Send>),
}

/// The rest of a part of a file, or of what comes through a pipe.
pub(super) struct Rest {
    from: From,
    /// The offset of the next byte that is not in the buffer.
    at: u64,
    /// The end, as far as it is known.
    end: u64,
    buffer: Vec<u8>,
    used: usize,
}

impl Rest {
    /// What stands in `file` from `at` to `end`.
    pub(super) fn new(file: Arc<File>, at: u64, end: u64) -> Rest {
        Rest { from: From::File(file), at, end, buffer: Vec::new(), used: 0 }
    }

    /// What comes out of a pipe, from the offset `at` on.
    pub(super) fn of_pipe(from: Box<dyn Read + Send>, at: u64) -> Rest {
        Rest { from: From::Pipe(from), at, end: u64::MAX, buffer: Vec::new(), used: 0 }
    }

    /// The bytes at hand, at least `wanted` of them unless the end comes first.
    pub(super) fn peek(&mut self, wanted: usize) -> io::Result<&[u8]> {
        while self.buffer.len() - self.used < wanted && self.at < self.end {
            self.buffer.drain(..self.used);
            self.used = 0;
            let had = self.buffer.len();
            let len = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(CHUNK);
            self.buffer.resize(had + len, 0);
            let target = &mut self.buffer[had..];
            let read = match &mut self.from {
                From::File(file) => file.read_at(target, self.at),
                From::Pipe(pipe) => pipe.read(target),
            };
            self.buffer.truncate(had + *read.as_ref().unwrap_or(&0));
            if read.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {
                continue;
            }
            match (read?, &self.from) {
                (0, From::File(_)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                (0, From::Pipe(_)) => self.end = self.at,
                (read, _) => self.at += read as u64,
            }
        }
        Ok(&self.buffer[self.used..])
    }

    /// The offset of the first byte from here on that is not zero. A hole of the file is passed over.
    pub(super) fn first_nonzero(&mut self) -> io::Result<Option<u64>> {
        loop {
            let start = self.at - (self.buffer.len() - self.used) as u64;
            let bytes = self.peek(1)?;
            if bytes.is_empty() {
                return Ok(None);
            }
            if let Some(found) = bytes.iter().position(|byte| *byte != 0) {
                return Ok(Some(start + found as u64));
            }
            self.used = self.buffer.len();
            let From::File(file) = &self.from else { continue };
            self.at = match seek(&**file, SeekFrom::Data(self.at)) {
                Ok(data) => data.clamp(self.at, self.end),
                Err(Errno::NXIO) => self.end,
                // A file system that does not tell has data everywhere.
                Err(_) => self.at,
            };
        }
    }
}

impl Read for Rest {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.peek(1)?;
        let len = bytes.len().min(buffer.len());
        buffer[..len].copy_from_slice(&bytes[..len]);
        self.consume(len);
        Ok(len)
    }
}

impl BufRead for Rest {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.peek(1)
    }

    fn consume(&mut self, len: usize) {
        self.used = (self.used + len).min(self.buffer.len());
    }
}

/// One member that is being read: what is decompressed ends where it does.
pub(super) trait Member: Read + Send {
    /// What stands behind it, once it was read to its end.
    fn into_rest(self: Box<Self>) -> Rest;
}

/// Reads member after member.
pub(super) struct Members {
    pieces: &'static dyn Pieces,
    first: Arc<[u8]>,
    state: Option<State>,
}

enum State {
    /// At the beginning of the file, or amid one that has parts within its members.
    Start(Rest),
    /// Behind a whole member.
    Between(Rest),
    Within(Box<dyn Member>),
}

impl Members {
    /// A reader of `rest`, which begins behind a whole member if `is_between`. `first` are the first bytes of the file.
    pub(super) fn new(
        pieces: &'static dyn Pieces,
        rest: Rest,
        first: Arc<[u8]>,
        is_between: bool,
    ) -> Members {
        let state = if is_between { State::Between(rest) } else { State::Start(rest) };
        Members { pieces, first, state: Some(state) }
    }

    /// The member that begins here; `None` where nothing but zeros follows.
    fn next(&self, mut rest: Rest) -> io::Result<Option<Box<dyn Member>>> {
        if self.pieces.begins(rest.peek(MAGIC_LEN_MAX)?) {
            return self.pieces.member(rest, &self.first).map(Some);
        }
        match rest.first_nonzero()? {
            None => Ok(None),
            Some(at) => Err(damaged(format!("something else stands behind the payload, at {at:#x}"))),
        }
    }
}

impl Read for Members {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // An error ends it: there is no state then.
        while let Some(state) = self.state.take() {
            let mut member = match state {
                State::Start(rest) => self.pieces.member(rest, &self.first)?,
                State::Between(rest) => match self.next(rest)? {
                    Some(member) => member,
                    None => return Ok(0),
                },
                State::Within(member) => member,
            };
            let len = member.read(buffer)?;
            if len > 0 || buffer.is_empty() {
                self.state = Some(State::Within(member));
                return Ok(len);
            }
            self.state = Some(State::Between(member.into_rest()));
        }
        Ok(0)
    }
}
