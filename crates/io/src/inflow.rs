//! One byte after the other, the other way: out of a pipe, or of a file that is read ahead.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat};
use rustix::io::Errno;

use crate::ahead::ReadAhead;
use crate::aligned::AlignedBuffer;
use crate::cancel::Cancel;
use crate::direct::ReadPair;
use crate::lane::LaneError;

/// How many bytes are read at once.
const CHUNK: usize = 1 << 20;

/// How many chunks a file is read ahead.
const CHUNKS_AHEAD: usize = 8;

/// How many of them at once.
const READERS: usize = 4;

/// Where the standard input comes from by name.
const STDIN_NAMES: [&str; 2] = ["-", "/dev/stdin"];

/// A source of bytes that is read from front to back. Waiting for a slow writer ends with the switch: the read
/// then fails with an error whose source is [`LaneError::Cancelled`].
pub struct Inflow {
    from: From,
    /// What was read and not yet consumed.
    current: Option<AlignedBuffer>,
    at: usize,
    end: usize,
}

enum From {
    Pipe { file: File, cancel: Cancel },
    File { ahead: ReadAhead<(u64, usize)>, next: u64, end: u64, cancel: Cancel },
}

impl Inflow {
    /// Whether the name stands for the standard input.
    pub fn is_stdin(path: &Path) -> bool {
        STDIN_NAMES.iter().any(|name| path.as_os_str() == *name)
    }

    /// Whether what the name stands for can be read once only: the standard input, where that is no file, a FIFO,
    /// a socket.
    pub fn is_sequential(path: &Path) -> bool {
        let found = match Inflow::is_stdin(path) {
            true => fstat(io::stdin()),
            false => rustix::fs::stat(path),
        };
        found.is_ok_and(|found| {
            !matches!(
                FileType::from_raw_mode(found.st_mode),
                FileType::RegularFile | FileType::BlockDevice | FileType::Directory
            )
        })
    }

    /// Opens the standard input (`-`) or a FIFO; a FIFO without a writer reads as empty only after one has come
    /// and gone.
    ///
    /// # Errors
    /// What the system said.
    pub fn open(path: &Path, cancel: &Cancel) -> io::Result<Inflow> {
        let file = if Inflow::is_stdin(path) {
            File::from(io::stdin().as_fd().try_clone_to_owned()?)
        } else {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
            File::from(rustix::fs::open(path, flags, Mode::empty())?)
        };
        let from = From::Pipe { file, cancel: cancel.clone() };
        Ok(Inflow { from, current: None, at: 0, end: 0 })
    }

    /// Reads the bytes `start..end` of a file, several chunks ahead and past the page cache where `pair` has a
    /// descriptor for that.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn of_file(pair: Arc<ReadPair>, start: u64, end: u64, cancel: &Cancel) -> io::Result<Inflow> {
        let ahead = ReadAhead::start(READERS, move |job: &(u64, usize), buffer: &mut AlignedBuffer| {
            pair.read_exact_at(&mut buffer[..job.1], job.0)
        })?;
        let from = From::File { ahead, next: start, end, cancel: cancel.clone() };
        Ok(Inflow { from, current: None, at: 0, end: 0 })
    }

    /// Reads the next chunk, where nothing is left of the last one.
    fn refill(&mut self) -> io::Result<()> {
        match &mut self.from {
            From::Pipe { file, cancel } => {
                let buffer = self.current.get_or_insert_with(|| AlignedBuffer::new(CHUNK));
                self.at = 0;
                self.end = read_pipe(file, buffer, cancel)?;
            }
            From::File { ahead, next, end, cancel } => {
                if cancel.is_cancelled() {
                    return Err(io::Error::other(LaneError::Cancelled));
                }
                let mut spare = self.current.take();
                while *next < *end && (ahead.pending() as usize) < CHUNKS_AHEAD {
                    // Chunks begin at multiples of their length, wherever the first one does.
                    let upto = ((*next / CHUNK as u64 + 1) * CHUNK as u64).min(*end);
                    let buffer = spare.take().unwrap_or_else(|| AlignedBuffer::new(CHUNK));
                    ahead.push((*next, (upto - *next) as usize), buffer);
                    *next = upto;
                }
                (self.at, self.end) = (0, 0);
                if let Some(filled) = ahead.take() {
                    filled.result?;
                    self.end = filled.job.1;
                    self.current = Some(filled.buffer);
                }
            }
        }
        Ok(())
    }
}

/// Reads what there is, waiting for something or the end.
fn read_pipe(file: &mut File, buffer: &mut [u8], cancel: &Cancel) -> io::Result<usize> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(file.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = !fds[1].revents().is_empty();
        if cancel.is_cancelled() {
            return Err(io::Error::other(LaneError::Cancelled));
        }
        if ready {
            match file.read(buffer) {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                read => return read,
            }
        }
    }
}

impl BufRead for Inflow {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at >= self.end {
            self.refill()?;
        }
        Ok(self.current.as_deref().and_then(|buffer| buffer.get(self.at..self.end)).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        self.at = (self.at + amount).min(self.end);
    }
}

impl Read for Inflow {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(bytes)?;
        self.consume(read);
        Ok(read)
    }
}

impl std::fmt::Debug for Inflow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflow").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    use crate::direct::DirectChoice;

    #[test]
    fn a_file_is_read_from_any_offset_to_any_end() {
        let bytes: Vec<u8> = (0..(3 << 20) + 77u32).map(|i| (i / 251) as u8).collect();
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.as_file().write_all(&bytes).unwrap();
        let cancel = Cancel::new().unwrap();
        for choice in [DirectChoice::Auto, DirectChoice::Off] {
            let pair = Arc::new(ReadPair::open(file.path(), choice).unwrap());
            let len = bytes.len();
            for (start, end) in [(0, len), (0, 0), (5, len), (4096, 1 << 20), (1 << 20, len - 1), (len, len)]
            {
                let mut read = Vec::new();
                let mut inflow = Inflow::of_file(pair.clone(), start as u64, end as u64, &cancel).unwrap();
                inflow.read_to_end(&mut read).unwrap();
                assert!(read == bytes[start..end], "{start}..{end}");
            }
        }
        let pair = Arc::new(ReadPair::open(file.path(), DirectChoice::Off).unwrap());
        let mut beyond = Inflow::of_file(pair, 0, bytes.len() as u64 + 1, &cancel).unwrap();
        let error = beyond.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_pipe_ends_with_its_writer_and_waiting_with_the_switch() {
        let cancel = Cancel::new().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(Inflow::is_sequential(&path) && !Inflow::is_sequential(directory.path()));
        let mut inflow = Inflow::open(&path, &cancel).unwrap();
        let mut writer = File::options().write(true).open(&path).unwrap();
        writer.write_all(b"bytes").unwrap();
        let mut read = [0; 5];
        inflow.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"bytes");
        let thrower = cancel.clone();
        let throwing = std::thread::spawn(move || thrower.cancel());
        assert_eq!(inflow.read(&mut read).unwrap_err().to_string(), "cancelled");
        throwing.join().unwrap();
        let mut fresh = Inflow {
            from: From::Pipe { file: File::open("/dev/null").unwrap(), cancel: Cancel::new().unwrap() },
            current: None,
            at: 0,
            end: 0,
        };
        assert_eq!(fresh.read(&mut read).unwrap(), 0);
    }
}
