//! Decompressing a stream, in parallel where it has pieces.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::members::{Members, Rest};
use super::{Codec, PIECE_LEN_MAX, default_threads};
use crate::ordered::Ordered;

/// How much of a file is looked at to tell how its first piece ends.
const WINDOW: usize = PIECE_LEN_MAX + (64 << 10);
/// So many zeros begin no piece: lzop's end, behind which nothing but zeros may stand.
const ZEROS_LEN: usize = 4;
/// How many bytes at the front of the file are kept for what every piece needs to know.
const FIRST_LEN: usize = 4 << 10;

/// Decompresses the rest of a file from an offset on.
pub struct Decompressor {
    codec: Codec,
    file: Arc<File>,
    start: u64,
    /// The end of the file, as it was.
    end: u64,
    first: Arc<[u8]>,
    /// Bytes of the file that belong to no piece yet, from `used` on, and the offset of the first of these.
    window: Vec<u8>,
    used: usize,
    at: u64,
    pool: Ordered<Piece, Done>,
    /// Where the stream begins that the rest is, if there are no more pieces.
    rest_at: Option<u64>,
    stream: Option<Members>,
    /// Whether what follows the pieces so far follows a whole member.
    is_between: bool,
    current: Vec<u8>,
    given: usize,
}

struct Piece {
    at: u64,
    /// Whether it follows a whole member.
    is_between: bool,
    bytes: Vec<u8>,
}

struct Done {
    at: u64,
    is_between: bool,
    outcome: io::Result<Vec<u8>>,
}

impl Decompressor {
    /// A decompressor of what stands in `file` from `start` to `end`.
    ///
    /// # Errors
    /// What the system said.
    pub fn new(codec: Codec, file: File, start: u64, end: u64) -> io::Result<Decompressor> {
        Decompressor::with_threads(codec, file, start, end, default_threads())
    }

    /// As [`Decompressor::new`], with a number of threads.
    ///
    /// # Errors
    /// As there.
    pub fn with_threads(
        codec: Codec,
        file: File,
        start: u64,
        end: u64,
        threads: usize,
    ) -> io::Result<Decompressor> {
        let len = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
        let mut first = vec![0; FIRST_LEN.min(len)];
        file.read_exact_at(&mut first, start)?;
        let first: Arc<[u8]> = first.into();
        let shared = first.clone();
        let pieces = codec.pieces();
        let pool = Ordered::start("vmstate-codec", threads.max(1), move |piece: Piece| Done {
            at: piece.at,
            is_between: piece.is_between,
            outcome: pieces.decompress(&piece.bytes, &shared),
        })?;
        // Without its end a file is read as a stream, which says so when it comes there.
        let mut tail = pieces.tail();
        let tail_at = end.saturating_sub(tail.len() as u64).max(start);
        tail.truncate(usize::try_from(end - tail_at).unwrap_or_default());
        file.read_exact_at(&mut tail, tail_at)?;
        let rest_at = (tail != pieces.tail()).then_some(start);
        Ok(Decompressor {
            codec,
            file: Arc::new(file),
            start,
            end,
            first,
            window: Vec::new(),
            used: 0,
            at: start,
            pool,
            rest_at,
            stream: None,
            is_between: false,
            current: Vec::new(),
            given: 0,
        })
    }

    /// Reads on until `wanted` bytes are at hand, or the file ends.
    fn fill_window(&mut self, wanted: usize) -> io::Result<()> {
        let had = self.window.len() - self.used;
        let read_at = self.at + had as u64;
        if had >= wanted || read_at == self.end {
            return Ok(());
        }
        self.window.drain(..self.used);
        self.used = 0;
        let len = usize::try_from(self.end - read_at).unwrap_or(usize::MAX).min(WINDOW - had);
        self.window.resize(had + len, 0);
        self.file.read_exact_at(&mut self.window[had..], read_at)
    }

    /// The length of the next piece, whose bytes are at hand; `None` where the rest has none.
    fn next_len(&mut self) -> io::Result<Option<usize>> {
        // At first half a window, so that what is moved to its front is not moved for every piece.
        for wanted in [WINDOW / 2, WINDOW] {
            self.fill_window(wanted)?;
            let window = &self.window[self.used..];
            let is_all = self.at + window.len() as u64 == self.end;
            let len = self.codec.pieces().piece_len(window, is_all, &self.first);
            if let Some(len) = len.filter(|len| (1..=window.len()).contains(len)) {
                return Ok(Some(len));
            }
        }
        Ok(None)
    }

    /// Takes pieces off the file for as long as the threads want any.
    fn hand_out(&mut self) -> io::Result<()> {
        while self.rest_at.is_none() && self.at < self.end && !self.pool.is_full() {
            if self.is_behind_all()? {
                self.at = self.end;
                break;
            }
            let Some(len) = self.next_len()? else {
                self.rest_at = Some(self.at);
                self.window = Vec::new();
                self.used = 0;
                break;
            };
            let bytes = self.window[self.used..self.used + len].to_vec();
            let ends_member = self.codec.pieces().ends_member(&bytes);
            self.pool.push(Piece { at: self.at, is_between: self.is_between, bytes })?;
            self.is_between = ends_member;
            self.used += len;
            self.at += len as u64;
        }
        Ok(())
    }

    /// Whether only zeros are left, at least as many as lzop's end has, and pieces stood before them.
    fn is_behind_all(&mut self) -> io::Result<bool> {
        self.fill_window(ZEROS_LEN)?;
        let window = &self.window[self.used..];
        if self.at == self.start || window.iter().take(ZEROS_LEN).any(|byte| *byte != 0) {
            return Ok(false);
        }
        if !self.is_between && window.len() < ZEROS_LEN {
            return Ok(false);
        }
        Ok(Rest::new(self.file.clone(), self.at, self.end).first_nonzero()?.is_none())
    }

    fn open_stream(&mut self, at: u64, is_between: bool) {
        let rest = Rest::new(self.file.clone(), at, self.end);
        self.stream = Some(Members::new(self.codec.pieces(), rest, self.first.clone(), is_between));
    }
}

/// Decompresses what can be read once only, in one thread. Its first byte stands at the offset `at`, for messages.
///
/// # Errors
/// What reading said.
pub fn decompress_once(
    codec: Codec,
    from: impl Read + Send + 'static,
    at: u64,
) -> io::Result<Box<dyn Read + Send>> {
    let mut rest = Rest::of_pipe(Box::new(from), at);
    let first = rest.peek(FIRST_LEN)?;
    let first = first[..first.len().min(FIRST_LEN)].into();
    Ok(Box::new(Members::new(codec.pieces(), rest, first, false)))
}

impl Read for Decompressor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = &self.current[self.given..];
            if !left.is_empty() || buffer.is_empty() {
                let len = left.len().min(buffer.len());
                buffer[..len].copy_from_slice(&left[..len]);
                self.given += len;
                return Ok(len);
            }
            if let Some(stream) = &mut self.stream {
                return stream.read(buffer);
            }
            self.hand_out()?;
            match self.pool.pop() {
                Some(done) => match done? {
                    Done { outcome: Ok(bytes), .. } => {
                        self.current = bytes;
                        self.given = 0;
                    }
                    // A piece that is none, or holds more than one may: the stream decides, from there on.
                    Done { at, is_between, outcome: Err(_) } => self.open_stream(at, is_between),
                },
                None => match self.rest_at {
                    Some(at) => self.open_stream(at, self.is_between),
                    // An empty file is no stream of any kind.
                    None if self.first.is_empty() => self.open_stream(self.at, false),
                    None => return Ok(0),
                },
            }
        }
    }
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decompressor")
            .field("codec", &self.codec)
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}
