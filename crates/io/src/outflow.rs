//! One byte after the other: into a pipe, a socket, or a file that is written from front to back.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::cancel::Cancel;
use crate::draft::{DraftError, DraftStep};
use crate::rate_limit::RateLimit;
use crate::supply::{Piece, Scratch, Supply};

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
    /// The bytes of a piece could not be had.
    #[error("memory of region {region} at {offset:#x}")]
    Supply {
        /// The region of the piece.
        region: u32,
        /// The piece's offset in its region.
        offset: u64,
        /// What the supply said.
        source: io::Error,
    },
    /// The switch was thrown.
    #[error("cancelled")]
    Cancelled,
}

/// What a page of a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// Bytes: they follow what was appended for them.
    Data,
    /// Nothing but zeros, although it was marked: no bytes follow.
    Zero,
}

/// How many bytes of pages went out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagesWritten {
    /// With their bytes.
    pub data_bytes: u64,
    /// As zero.
    pub zero_bytes: u64,
}

/// What takes the bytes where they do not go into a descriptor as they are: a compressor, for one.
///
/// It is handed a MiB or so at a time, and looks for itself that it does not wait for longer than it may.
pub trait Through: Write + Send {
    /// Writes all that it holds, and the end. Nothing is written any more.
    ///
    /// # Errors
    /// Whatever keeps it from that.
    fn finish(&mut self) -> io::Result<()>;
}

/// Where the bytes go.
enum Way {
    Descriptor(File, Manner),
    Through(Box<dyn Through>),
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Way::Descriptor(file, manner) => f.debug_tuple("Descriptor").field(file).field(manner).finish(),
            Way::Through(_) => f.debug_tuple("Through").finish_non_exhaustive(),
        }
    }
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
/// Waiting for a slow reader ends with the switch. The memory it takes is the buffer and one piece.
#[derive(Debug)]
pub struct Outflow {
    path: PathBuf,
    way: Way,
    cancel: Cancel,
    buffer: Vec<u8>,
    page: Vec<u8>,
    scratch: Option<Scratch>,
    limit: Option<Arc<RateLimit>>,
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
        Ok(Outflow::by(Way::Descriptor(file, manner), path, cancel))
    }

    /// Hands its bytes to `through`; `path` is for messages.
    pub fn through(through: Box<dyn Through>, path: &Path, cancel: &Cancel) -> Outflow {
        Outflow::by(Way::Through(through), path, cancel)
    }

    fn by(way: Way, path: &Path, cancel: &Cancel) -> Outflow {
        Outflow {
            path: path.to_owned(),
            way,
            cancel: cancel.clone(),
            buffer: Vec::new(),
            page: Vec::new(),
            scratch: None,
            limit: None,
            written: 0,
        }
    }

    /// From now on writes no faster than this.
    pub fn limit(&mut self, limit: Arc<RateLimit>) {
        self.limit = Some(limit);
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor once more, without what waits in the buffer.
    pub(crate) fn try_clone_file(&self) -> io::Result<File> {
        match &self.way {
            Way::Descriptor(file, _) => file.try_clone(),
            Way::Through(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// How many bytes were given so far, those in the buffer included.
    pub fn position(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Appends bytes; they are written when enough have come together.
    ///
    /// # Errors
    /// [`OutflowError`], but for supplies.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), OutflowError> {
        for chunk in bytes.chunks(WRITE_LEN) {
            self.buffer.extend_from_slice(chunk);
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Appends the marked pages of a piece, in order. `head` appends what stands before each page: it is told
    /// what the page is and its offset in the region.
    ///
    /// # Errors
    /// [`OutflowError`].
    pub fn write_pages(
        &mut self,
        supply: &dyn Supply,
        piece: &Piece,
        mut head: impl FnMut(PageContent, u64, &mut Vec<u8>),
    ) -> Result<PagesWritten, OutflowError> {
        piece.assert_whole();
        let failed = |source| OutflowError::Supply { region: piece.region, offset: piece.offset, source };
        let mut scratch = match self.scratch.take() {
            Some(scratch) => scratch,
            None => Scratch::new(piece.len as usize).map_err(failed)?,
        };
        scratch.reserve(piece.len as usize).map_err(failed)?;
        let supplied = supply.supply(piece, &mut scratch).map_err(failed)?;
        assert!(piece.holds(&supplied.write), "the supply names grains beyond the piece");
        let mut done = PagesWritten::default();
        let marked = |mask: &[u64; 4], i: usize| mask[i / 64] >> (i % 64) & 1 == 1;
        for i in (0..piece.grains() as usize).filter(|i| marked(&piece.mask, *i)) {
            let (from, to) = piece.bytes_of(i, i + 1);
            let len = to - from;
            if marked(&supplied.write, i) {
                self.page.clear();
                self.page.reserve(len);
                // SAFETY: the supply named this grain, so its bytes are mapped and readable until the scratch is
                // used again. Others may change them; whatever is copied is taken as it is.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        supplied.base.wrapping_add(from),
                        self.page.as_mut_ptr(),
                        len,
                    );
                }
                // SAFETY: `len` bytes were reserved and have just been written.
                unsafe { self.page.set_len(len) };
            } else {
                self.page.clear();
            }
            let offset = piece.offset + from as u64;
            // What the supply bridges a gap with is zero, too.
            if is_zero(&self.page) {
                head(PageContent::Zero, offset, &mut self.buffer);
                done.zero_bytes += len as u64;
            } else {
                head(PageContent::Data, offset, &mut self.buffer);
                self.buffer.extend_from_slice(&self.page);
                done.data_bytes += len as u64;
            }
            self.flush_if_full()?;
        }
        self.scratch = Some(scratch);
        Ok(done)
    }

    fn flush_if_full(&mut self) -> Result<(), OutflowError> {
        if self.buffer.len() >= WRITE_LEN { self.flush() } else { Ok(()) }
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// [`OutflowError`], but for supplies.
    pub fn flush(&mut self) -> Result<(), OutflowError> {
        if let Some(limit) = &self.limit {
            // A wait that the switch ends is seen before the first write.
            limit.wait(self.buffer.len() as u64, &self.cancel);
        }
        match &mut self.way {
            Way::Through(through) => {
                if self.cancel.is_cancelled() {
                    return Err(OutflowError::Cancelled);
                }
                through.write_all(&self.buffer).map_err(|source| self.failed(0, source))?;
                self.written += self.buffer.len() as u64;
            }
            Way::Descriptor(..) => self.flush_into_descriptor()?,
        }
        self.buffer.clear();
        Ok(())
    }

    fn flush_into_descriptor(&mut self) -> Result<(), OutflowError> {
        let Way::Descriptor(file, manner) = &self.way else { return Ok(()) };
        let mut at = 0;
        while at < self.buffer.len() {
            if self.cancel.is_cancelled() {
                return Err(OutflowError::Cancelled);
            }
            match write_some(file, *manner, &self.buffer[at..]) {
                Ok(0) => return Err(self.failed(at, io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    at += written;
                    self.written += written as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    wait_for_room(file, &self.cancel).map_err(|source| self.failed(at, source))?;
                }
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    return Err(OutflowError::Closed { path: self.path.clone() });
                }
                Err(error) => return Err(self.failed(at, error.into())),
            }
        }
        Ok(())
    }

    fn failed(&self, at: usize, source: io::Error) -> OutflowError {
        let len = self.buffer.len() - at;
        OutflowError::Write { path: self.path.clone(), offset: self.written, len, source }
    }

    /// Writes what waits and, where that is a file and `sync` is wanted, waits until it is on the disk. What goes
    /// through something else ends there.
    ///
    /// # Errors
    /// [`OutflowError`], but for supplies.
    pub fn finish(mut self, sync: bool) -> Result<(), OutflowError> {
        self.flush()?;
        let done = match &mut self.way {
            Way::Descriptor(file, Manner::Whole) if sync => file.sync_all(),
            Way::Descriptor(..) => Ok(()),
            Way::Through(through) => through.finish(),
        };
        done.map_err(|source| self.failed(0, source))
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

fn is_zero(page: &[u8]) -> bool {
    // Nearly every page that is not zero shows it at once.
    page.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
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

    /// Page `i` is full of the byte `i % 3`.
    struct Thirds;

    // SAFETY: every grain named was written to the scratch, which is left alone until the next call.
    unsafe impl Supply for Thirds {
        fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<crate::supply::Supplied> {
            for i in 0..piece.grains() as usize {
                let (from, to) = piece.bytes_of(i, i + 1);
                // SAFETY: the scratch holds the whole piece.
                unsafe { scratch.as_mut_ptr().wrapping_add(from).write_bytes((i % 3) as u8, to - from) };
            }
            // Page 6 is left out by the supply, and every other one is written, marked or not.
            Ok(crate::supply::Supplied { base: scratch.as_mut_ptr(), write: [!(1 << 6), !0, !0, !0] })
        }
    }

    fn piece(mask: [u64; 4]) -> Piece {
        Piece { region: 0, offset: 1 << 20, target: 0, grain: 4096, len: 1 << 20, mask }
    }

    #[test]
    fn marked_pages_go_out_in_order_and_zeros_without_their_bytes() {
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let cancel = Cancel::new().expect("an eventfd");
        let writer = File::from(std::os::fd::OwnedFd::from(writer));
        let mut out = Outflow::over(writer, Path::new("-"), &cancel).expect("a pipe");
        out.write(b"begin").expect("room");
        let done = out
            .write_pages(&Thirds, &piece([0b111_1001, 0, 0, 0]), |content, offset, buffer| {
                buffer.extend_from_slice(format!("[{content:?} {offset:#x}]").as_bytes());
            })
            .expect("room");
        assert_eq!(done, PagesWritten { data_bytes: 2 * 4096, zero_bytes: 3 * 4096 });
        let position = out.position();
        out.finish(true).expect("room");
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).expect("all of it");
        assert_eq!(bytes.len() as u64, position);
        let mut expected = b"begin[Zero 0x100000][Zero 0x103000][Data 0x104000]".to_vec();
        expected.extend([1; 4096]);
        expected.extend(b"[Data 0x105000]");
        expected.extend([2; 4096]);
        expected.extend(b"[Zero 0x106000]");
        assert_eq!(bytes, expected);
    }

    /// Keeps what it is handed where the test looks, and takes no more than so many bytes.
    struct Kept {
        bytes: Arc<std::sync::Mutex<Vec<u8>>>,
        room: usize,
    }

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut kept = self.bytes.lock().expect("nobody panicked");
            let len = bytes.len().min(self.room - kept.len());
            kept.extend_from_slice(&bytes[..len]);
            Ok(len)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Through for Kept {
        fn finish(&mut self) -> io::Result<()> {
            self.write_all(b" end")
        }
    }

    #[test]
    fn what_goes_through_something_is_whole_and_its_failures_are_told() {
        let cancel = Cancel::new().expect("an eventfd");
        let bytes = Arc::new(std::sync::Mutex::new(Vec::new()));
        let through = |room| Box::new(Kept { bytes: bytes.clone(), room });
        let mut out = Outflow::through(through(100), Path::new("/x"), &cancel);
        out.write(b"begin").expect("room");
        out.flush().expect("room");
        out.write(b" more").expect("room");
        assert_eq!(out.position(), 10);
        out.finish(true).expect("room");
        assert_eq!(*bytes.lock().expect("nobody panicked"), b"begin more end");

        let mut out = Outflow::through(through(16), Path::new("/x"), &cancel);
        out.write(b"begin").expect("the buffer takes it");
        let error = out.finish(true).expect_err("there is room for two bytes");
        assert_eq!(error.to_string(), "write of 0x5 bytes to `/x` at 0x0");
        let mut out = Outflow::through(through(100), Path::new("/x"), &cancel);
        out.write(b"begin").expect("the buffer takes it");
        cancel.cancel();
        assert!(matches!(out.flush().expect_err("cancelled"), OutflowError::Cancelled));
    }

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
    fn a_limit_holds_up_what_follows_and_nobody_who_cancels() {
        let cancel = Cancel::new().expect("an eventfd");
        let file = tempfile::tempfile().expect("a file");
        let mut out = Outflow::over(file, Path::new("/x"), &cancel).expect("a file");
        out.limit(Arc::new(RateLimit::new(std::num::NonZeroU64::MIN)));
        out.write(b"first").expect("room");
        out.flush().expect("the first bytes wait for nobody");
        out.write(b"second").expect("the buffer takes it");
        let switch = cancel.clone();
        let error = std::thread::scope(|scope| {
            scope.spawn(move || switch.cancel());
            out.flush().expect_err("five seconds are owed")
        });
        assert!(matches!(error, OutflowError::Cancelled), "{error:?}");
        assert_eq!(out.written, 5);
    }
}
