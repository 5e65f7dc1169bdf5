//! One byte after the other: into a pipe, a socket, or a file that is written from front to back.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::cancel::Cancel;
use crate::draft::{DraftError, DraftStep};

/// How many bytes are gathered before they are written: what is worth a system call.
const WRITE_LEN: usize = 1 << 20;

/// What a pipe is asked to hold, in bytes: the most that the kernel gives to everybody.
const PIPE_LEN: usize = 1 << 20;

/// How often a FIFO without a reader is looked at.
const READER_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Where the standard output goes by name.
const STDOUT_NAMES: [&str; 2] = ["-", "/dev/stdout"];

/// Why a stream could not be written.
#[derive(Debug, thiserror::Error)]
pub enum OutflowError {
    /// Whoever read has closed its end.
    #[error("the reader of `{}` has gone", path.display())]
    Closed {
        /// The path.
        path: PathBuf,
    },
    /// The bytes were not taken.
    #[error("write of {len:#x} bytes to `{}` at {offset:#x}", path.display())]
    Write {
        /// The path.
        path: PathBuf,
        /// How many bytes had been written.
        offset: u64,
        /// How many were to be.
        len: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The switch was thrown.
    #[error("cancelled")]
    Cancelled,
}

/// How bytes get into a descriptor without waiting for longer than the switch allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// A regular file takes what it is given.
    Whole,
    /// A pipe that does not block.
    Pipe,
    /// A socket, told not to block at each call.
    Socket,
    /// Anything else may block.
    Blocking,
}

/// A descriptor that is written from front to back, with everything that waits at most in one buffer.
///
/// Waiting for a slow reader ends with the switch.
#[derive(Debug)]
pub struct Outflow {
    path: PathBuf,
    file: File,
    manner: Manner,
    cancel: Cancel,
    buffer: Vec<u8>,
    written: u64,
}

impl Outflow {
    /// Whether the name stands for the standard output.
    pub fn is_stdout(path: &Path) -> bool {
        STDOUT_NAMES.iter().any(|name| path.as_os_str() == *name)
    }

    /// Opens a pipe, a FIFO or the standard output (`-`). A FIFO without a reader is waited for.
    ///
    /// # Errors
    /// What the system said; `Interrupted` when the switch was thrown while waiting.
    pub fn open(path: &Path, cancel: &Cancel) -> Result<Outflow, DraftError> {
        let fail =
            |source: io::Error| DraftError::Io { path: path.to_owned(), step: DraftStep::Open, source };
        let file = if Outflow::is_stdout(path) {
            let own = io::stdout().as_fd().try_clone_to_owned().map_err(fail)?;
            if own.is_terminal() {
                return Err(DraftError::NotForThis {
                    path: path.to_owned(),
                    what: "the standard output is a terminal",
                });
            }
            File::from(own)
        } else {
            open_fifo(path, cancel).map_err(fail)?
        };
        Outflow::over(file, path, cancel).map_err(fail)
    }

    /// Writes into a descriptor that is open, from where it stands; `path` is for messages.
    ///
    /// # Errors
    /// When the descriptor cannot be looked at.
    pub fn over(file: File, path: &Path, cancel: &Cancel) -> io::Result<Outflow> {
        let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
        let (file, manner) = match kind {
            FileType::RegularFile => (file, Manner::Whole),
            FileType::Socket => (file, Manner::Socket),
            FileType::Fifo => {
                // A larger pipe is faster and not more: the system may refuse.
                let _ = rustix::pipe::fcntl_setpipe_size(&file, PIPE_LEN);
                match reopened(&file) {
                    Some(reopened) => (reopened, Manner::Pipe),
                    None => (file, Manner::Blocking),
                }
            }
            _ => (file, Manner::Blocking),
        };
        let path = path.to_owned();
        Ok(Outflow { path, file, manner, cancel: cancel.clone(), buffer: Vec::new(), written: 0 })
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor once more, without what waits in the buffer.
    pub(crate) fn try_clone_file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// How many bytes were given so far, those in the buffer included.
    pub fn position(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Appends bytes; they are written when enough have come together, and at once where they are many.
    ///
    /// # Errors
    /// [`OutflowError`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), OutflowError> {
        if self.buffer.len() + bytes.len() < WRITE_LEN {
            self.buffer.extend_from_slice(bytes);
            return Ok(());
        }
        self.flush()?;
        self.put(bytes)
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// [`OutflowError`].
    pub fn flush(&mut self) -> Result<(), OutflowError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.put(&buffer)?;
        buffer.clear();
        self.buffer = buffer;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), OutflowError> {
        let mut at = 0;
        while at < bytes.len() {
            if self.cancel.is_cancelled() {
                return Err(OutflowError::Cancelled);
            }
            // A regular file takes what it is given, and the switch is looked at between.
            let some = &bytes[at..bytes.len().min(at + WRITE_LEN)];
            match write_some(&self.file, self.manner, some) {
                Ok(0) => return Err(self.failed(some.len(), io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    at += written;
                    self.written += written as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let waited = wait_for_room(&self.file, &self.cancel);
                    waited.map_err(|source| self.failed(some.len(), source))?;
                }
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    return Err(OutflowError::Closed { path: self.path.clone() });
                }
                Err(error) => return Err(self.failed(some.len(), error.into())),
            }
        }
        Ok(())
    }

    fn failed(&self, len: usize, source: io::Error) -> OutflowError {
        OutflowError::Write { path: self.path.clone(), offset: self.written, len, source }
    }

    /// Writes what waits and, where that is a file and `sync` is wanted, waits until it is on the disk.
    ///
    /// # Errors
    /// [`OutflowError`].
    pub fn finish(mut self, sync: bool) -> Result<(), OutflowError> {
        self.flush()?;
        if sync && self.manner == Manner::Whole {
            self.file.sync_all().map_err(|source| self.failed(0, source))?;
        }
        Ok(())
    }
}

fn write_some(file: &File, manner: Manner, bytes: &[u8]) -> rustix::io::Result<usize> {
    match manner {
        Manner::Socket => rustix::net::send(file, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
        _ => rustix::io::write(file, bytes),
    }
}

fn wait_for_room(file: &File, cancel: &Cancel) -> io::Result<()> {
    let mut fds =
        [PollFd::new(file, PollFlags::OUT), PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN)];
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The pipe opened anew without blocking. To change the descriptor's own flag would change it for everybody who
/// shares it: the shell, for one.
fn reopened(pipe: &File) -> Option<File> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let name = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    openat(CWD, name, flags, Mode::empty()).ok().map(File::from)
}

fn open_fifo(path: &Path, cancel: &Cancel) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    loop {
        if cancel.is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        match openat(CWD, path, flags, Mode::empty()) {
            Ok(opened) => return Ok(File::from(opened)),
            // Nobody reads yet, and nothing tells when somebody does.
            Err(Errno::NXIO) => {
                let mut fds = [PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN)];
                let _ = poll(&mut fds, Some(&READER_INTERVAL));
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_reader_that_has_gone_is_told_of_pipes_and_sockets() {
        let cancel = Cancel::new().expect("an eventfd");
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        let (one, other) = UnixStream::pair().expect("a pair");
        drop(other);
        for file in [std::os::fd::OwnedFd::from(writer), one.into()] {
            let mut out = Outflow::over(File::from(file), Path::new("/x"), &cancel).expect("a descriptor");
            out.write(b"lost").expect("the buffer takes it");
            let error = out.flush().expect_err("nobody reads");
            assert_eq!(error.to_string(), "the reader of `/x` has gone");
        }
    }

    #[test]
    fn a_reader_that_does_not_read_holds_up_nobody_who_cancels() {
        let cancel = Cancel::new().expect("an eventfd");
        let (_reader, writer) = io::pipe().expect("a pipe");
        let (one, _other) = UnixStream::pair().expect("a pair");
        for file in [std::os::fd::OwnedFd::from(writer), one.into()] {
            let mut out = Outflow::over(File::from(file), Path::new("/x"), &cancel).expect("a descriptor");
            let switch = cancel.clone();
            let full = vec![1; 8 << 20];
            // Whether the switch is thrown before the wait or within it, the end is the same.
            let error = std::thread::scope(|scope| {
                scope.spawn(move || switch.cancel());
                out.write(&full).expect_err("nobody reads")
            });
            assert!(matches!(error, OutflowError::Cancelled), "{error}");
        }
    }

    #[test]
    fn a_large_write_arrives_whole_at_a_slow_reader() {
        let cancel = Cancel::new().expect("an eventfd");
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let bytes: Vec<u8> = (0..5_000_003u32).map(|i| ((i * 7) >> 3) as u8).collect();
        let writer = File::from(std::os::fd::OwnedFd::from(writer));
        let mut out = Outflow::over(writer, Path::new("-"), &cancel).expect("a pipe");
        let mut found = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                out.write(&bytes).expect("a reader");
                out.finish(true).expect("a reader");
            });
            reader.read_to_end(&mut found).expect("all of it");
        });
        assert!(found == bytes, "{} bytes of {}", found.len(), bytes.len());
    }

    #[test]
    fn small_writes_and_large_ones_follow_each_other() {
        let cancel = Cancel::new().expect("an eventfd");
        let file = tempfile::tempfile().expect("a file");
        let mut out =
            Outflow::over(file.try_clone().expect("a descriptor"), Path::new("/x"), &cancel).expect("a file");
        let mut expected = Vec::new();
        for (i, len) in
            [5, WRITE_LEN - 5, 1, 3 * WRITE_LEN + 7, 9, WRITE_LEN - 1, 0, 1].into_iter().enumerate()
        {
            let bytes: Vec<u8> = (0..len).map(|at| (at / 253 + at + i) as u8).collect();
            out.write(&bytes).expect("room");
            expected.extend_from_slice(&bytes);
            assert_eq!(out.position(), expected.len() as u64);
        }
        out.finish(true).expect("room");
        let mut found = vec![0; expected.len() + 1];
        assert_eq!(std::os::unix::fs::FileExt::read_at(&file, &mut found, 0).expect("it"), expected.len());
        assert!(found[..expected.len()] == expected);
    }
}
