//! A part of a file or device that is there already, written where it stands.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{CWD, FileType, Mode, OFlags, SeekFrom, fstat, openat, seek};
use rustix::io::Errno;

use crate::direct::{DirectChoice, DirectIo, is_same_file, unsupported};
use crate::draft::{DraftError, DraftOptions, DraftStep};
use crate::hold::hold_for_writing;

/// How many bytes at the start are held back until all others are on the disk: every format of images has its
/// magic there.
pub const HEAD_LEN: u64 = 8;

/// A part of a file from an offset to its end, or of a block device, that becomes an image in place.
///
/// There is no name to publish and no way back: what was there is lost as soon as [`Place::begin`] returns.
/// What can be kept is that nothing ever looks like an image that is not whole: the first [`HEAD_LEN`] bytes are
/// zero, on the disk, before anything else is written, and are written when all else is on the disk. Dropping a
/// place that was begun wipes them again.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    start: u64,
    /// The length of a device, which cannot change; `None` for a file.
    device_len: Option<u64>,
    buffered: File,
    direct: Option<File>,
    direct_io: DirectIo,
    sync: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    is_begun: bool,
    /// What was written to the head, and not yet to the file.
    head: [u8; HEAD_LEN as usize],
}

impl Place {
    /// Opens the file or device and changes nothing. Symbolic links are followed: devices have names that are.
    ///
    /// # Errors
    /// [`DraftError::Occupied`] where something is there and may not be overwritten; a device always has
    /// something there. [`DraftError::Held`] where a guest runs from it. [`DraftError::NotForThis`] where it is
    /// neither a file nor a device. A device that the system uses itself (mounted, swap) is `EBUSY`.
    pub fn open(path: &Path, start: u64, options: DraftOptions) -> Result<Place, DraftError> {
        let fail = |step| {
            let path = path.to_owned();
            move |source: Errno| DraftError::Io { path, step, source: source.into() }
        };
        let named = rustix::fs::stat(path).map_err(fail(DraftStep::Inspect))?;
        let is_device = match FileType::from_raw_mode(named.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => return Err(not_for_this(path, "only a regular file or a block device has offsets")),
        };
        if options.owner != Default::default() {
            return Err(not_for_this(path, "only a new file is given an owner"));
        }
        let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        // On a device O_EXCL asks for one that the system does not use, and keeps it so.
        let flags = if is_device { flags | OFlags::EXCL } else { flags };
        let buffered = File::from(openat(CWD, path, flags, Mode::empty()).map_err(fail(DraftStep::Open))?);
        let opened = fstat(&buffered).map_err(fail(DraftStep::Inspect))?;
        if (opened.st_dev, opened.st_ino) != (named.st_dev, named.st_ino) {
            let source = io::Error::other("the name changed hands while it was opened");
            return Err(DraftError::Io { path: path.to_owned(), step: DraftStep::Open, source });
        }
        // Where there are no locks nobody can say that they live from it, either.
        if hold_for_writing(&buffered).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            return Err(DraftError::Held { path: path.to_owned() });
        }
        // A device has no length of its own, but its end can be sought.
        let len = seek(&buffered, SeekFrom::End(0)).map_err(fail(DraftStep::Inspect))?;
        let bytes = len.saturating_sub(start);
        if bytes > 0 && !options.overwrite {
            return Err(DraftError::Occupied { path: path.to_owned(), start, bytes });
        }
        let mut place = Place {
            path: path.to_owned(),
            start,
            device_len: is_device.then_some(len),
            buffered,
            direct: None,
            direct_io: unsupported("switched off"),
            sync: options.sync,
            state: Mutex::default(),
        };
        if options.direct != DirectChoice::Off {
            place.open_direct(options.direct)?;
        }
        Ok(place)
    }

    /// Opens the twin for direct I/O. What is there must not be touched yet, so that the trial is a read.
    fn open_direct(&mut self, choice: DirectChoice) -> Result<(), DraftError> {
        let (direct, direct_io) =
            self.try_direct().map_err(|source| self.fail(DraftStep::OpenDirect, source))?;
        if let (DirectChoice::On, DirectIo::Unsupported { reason }) = (choice, &direct_io) {
            return Err(DraftError::NoDirectIo { path: self.path.clone(), reason: reason.clone() });
        }
        (self.direct, self.direct_io) = (direct, direct_io);
        Ok(())
    }

    fn try_direct(&self) -> io::Result<(Option<File>, DirectIo)> {
        let open = |access: OFlags| {
            let flags = access | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
            match openat(CWD, &self.path, flags, Mode::empty()) {
                Ok(opened) => Ok(Some(File::from(opened))),
                Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(None),
                Err(error) => Err(io::Error::from(error)),
            }
        };
        let (Some(trial), Some(direct)) = (open(OFlags::RDONLY)?, open(OFlags::WRONLY)?) else {
            return Ok((None, unsupported("the file system refuses O_DIRECT")));
        };
        if !is_same_file(&self.buffered, &direct)? || !is_same_file(&self.buffered, &trial)? {
            return Err(io::Error::other("the name changed hands while it was opened"));
        }
        let found = DirectIo::probe_read(&trial)?;
        Ok((matches!(found, DirectIo::Supported { .. }).then_some(direct), found))
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the image starts.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.device_len.is_some()
    }

    /// The descriptor that goes through the page cache: O_WRONLY.
    pub fn buffered(&self) -> &File {
        &self.buffered
    }

    /// The descriptor for pages, O_WRONLY | O_DIRECT, where direct I/O is wanted and supported.
    pub fn direct(&self) -> Option<&File> {
        self.direct.as_ref()
    }

    /// What was found out about direct I/O.
    pub fn direct_io(&self) -> &DirectIo {
        &self.direct_io
    }

    /// How many bytes an image may have here: of a device those to its end; of a file what the file system has
    /// left, and what the file has there already.
    ///
    /// # Errors
    /// What the system said.
    pub fn room_bytes(&self) -> Result<u64, DraftError> {
        if let Some(len) = self.device_len {
            return Ok(len.saturating_sub(self.start));
        }
        let asked = |source: Errno| self.fail(DraftStep::QuerySpace, source.into());
        let space = rustix::fs::fstatvfs(&self.buffered).map_err(asked)?;
        let file = fstat(&self.buffered).map_err(asked)?;
        // How many of the file's blocks lie behind the start is not known; no more than that many bytes.
        let behind = (file.st_size as u64).saturating_sub(self.start).min(file.st_blocks as u64 * 512);
        Ok(space.f_bavail.saturating_mul(space.f_frsize).saturating_add(behind))
    }

    /// Gives up what was there: from now on the head is zero, on the disk too. A file is cut at the start of the
    /// image and made to reach to `end`, with nothing but a hole in between.
    ///
    /// # Errors
    /// [`DraftError::TooSmall`] before anything is changed; otherwise what the system said.
    pub fn begin(&self, end: u64) -> Result<(), DraftError> {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match self.device_len {
            Some(len) if end > len => {
                return Err(DraftError::TooSmall {
                    path: self.path.clone(),
                    start: self.start,
                    has: len.saturating_sub(self.start),
                    needs: end.saturating_sub(self.start),
                });
            }
            Some(_) => {
                state.is_begun = true;
                self.wipe().map_err(|source| self.fail(DraftStep::WipeHead, source))?;
            }
            None => {
                state.is_begun = true;
                let cut = |len| self.buffered.set_len(len);
                // Not kept by a longer one: what was there must not show through the new image's holes.
                cut(self.start.min(end))
                    .and_then(|()| cut(end))
                    .map_err(|source| self.fail(DraftStep::SetLength, source))?;
            }
        }
        if self.sync {
            self.buffered.sync_all().map_err(|source| self.fail(DraftStep::SyncFile, source))?;
        }
        Ok(())
    }

    /// Sets the end of a file; a device has its own.
    ///
    /// # Errors
    /// What the system said.
    pub fn set_end(&self, end: u64) -> Result<(), DraftError> {
        match self.device_len {
            Some(_) => Ok(()),
            None => self.buffered.set_len(end).map_err(|source| self.fail(DraftStep::SetLength, source)),
        }
    }

    /// Writes bytes at an absolute offset; those of the head are kept back.
    ///
    /// # Errors
    /// What the system said.
    ///
    /// # Panics
    /// When the bytes stand before the start.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let within = offset.checked_sub(self.start).expect("what stands before the image is not ours");
        let held = usize::try_from(HEAD_LEN.saturating_sub(within)).unwrap_or(0).min(bytes.len());
        let (head, rest) = bytes.split_at(held);
        if !head.is_empty() {
            let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let at = within as usize;
            state.head[at..at + head.len()].copy_from_slice(head);
        }
        self.buffered.write_all_at(rest, offset + held as u64)
    }

    /// Says that somebody else, who knows nothing of a head held back, writes the image: it is in the file.
    ///
    /// # Errors
    /// What the system said.
    pub fn take_head(&self, reader: &File) -> Result<(), DraftError> {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        reader
            .read_exact_at(&mut state.head, self.start)
            .map_err(|source| self.fail(DraftStep::Reopen, source))
    }

    /// Completes the image: sync what was written, write the head, sync that.
    ///
    /// # Errors
    /// The step that failed; the head is wiped then, when the place is dropped.
    pub fn publish(&mut self) -> Result<(), DraftError> {
        self.publish_observed(|_| std::ops::ControlFlow::Continue(()))
    }

    /// Publishes, asking `observe` before each step; a break stops there as a crash would.
    pub(crate) fn publish_observed(
        &mut self,
        mut observe: impl FnMut(DraftStep) -> std::ops::ControlFlow<()>,
    ) -> Result<(), DraftError> {
        let steps: &[DraftStep] = match self.sync {
            true => &[DraftStep::SyncFile, DraftStep::WriteHead, DraftStep::SyncFile],
            false => &[DraftStep::WriteHead],
        };
        let head = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner).head;
        for &step in steps {
            if observe(step).is_break() {
                break;
            }
            match step {
                DraftStep::WriteHead => self.buffered.write_all_at(&head, self.start),
                _ => self.buffered.sync_all(),
            }
            .map_err(|source| self.fail(step, source))?;
        }
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_begun = false;
        Ok(())
    }

    /// Opens it for reading, to look at what somebody else wrote into it.
    ///
    /// # Errors
    /// What the system said, or that the name is another file's by now.
    pub fn open_for_reading(&self) -> Result<File, DraftError> {
        let failed = |source| self.fail(DraftStep::Reopen, source);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let opened = File::from(
            openat(CWD, &self.path, flags, Mode::empty()).map_err(|source| failed(source.into()))?,
        );
        match is_same_file(&self.buffered, &opened) {
            Ok(true) => Ok(opened),
            Ok(false) => Err(failed(io::Error::other("the name is another file's by now"))),
            Err(source) => Err(failed(source)),
        }
    }

    fn wipe(&self) -> io::Result<()> {
        self.buffered.write_all_at(&[0; HEAD_LEN as usize], self.start)
    }

    pub(crate) fn fail(&self, step: DraftStep, source: io::Error) -> DraftError {
        DraftError::Io { path: self.path.clone(), step, source }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        if state.is_begun {
            // Ours was never written, but somebody else may have written one. Nobody can be told of a failure.
            let _ = self.wipe();
        }
    }
}

pub(crate) fn not_for_this(path: &Path, what: &'static str) -> DraftError {
    DraftError::NotForThis { path: path.to_owned(), what }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::ops::ControlFlow;

    use super::*;

    const OLD: &[u8] = b"before  QEVM0003 the old image, rather longer than the new one";

    fn options() -> DraftOptions {
        DraftOptions { overwrite: true, ..DraftOptions::default() }
    }

    #[test]
    fn the_head_is_the_last_to_be_written_whatever_happens_before() {
        for (survived, is_whole) in [(0, false), (1, false), (2, true), (3, true)] {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let path = directory.path().join("disk");
            fs::write(&path, OLD).expect("a file");
            let mut place = Place::open(&path, 8, options()).expect("a file");
            assert_eq!(fs::read(&path).expect("the file"), OLD, "opening changes nothing");
            place.begin(8 + 20).expect("room");
            let begun = fs::read(&path).expect("the file");
            assert_eq!(begun, [&b"before  "[..], &[0; 20]].concat(), "nothing of the old image is left");
            place.write_all_at(b"QEVM", 8).expect("room");
            place.write_all_at(b"0003 the new", 12).expect("room");
            let written = fs::read(&path).expect("the file");
            assert_eq!(written, b"before  \0\0\0\0\0\0\0\0 the new\0\0\0\0");
            let mut steps = Vec::new();
            let published = place.publish_observed(|step| {
                steps.push(step);
                if steps.len() > survived { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            published.expect("no step fails");
            let order = [DraftStep::SyncFile, DraftStep::WriteHead, DraftStep::SyncFile];
            assert_eq!(steps, order[..order.len().min(survived + 1)]);
            let expected: &[u8] = if is_whole { b"before  QEVM0003 the new\0\0\0\0" } else { &written };
            assert_eq!(fs::read(&path).expect("the file"), expected, "after {survived} steps");
        }
    }

    #[test]
    fn a_place_that_is_given_up_has_no_head_although_another_wrote_one() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("disk");
        fs::write(&path, b"before  ").expect("a file");
        let place = Place::open(&path, 8, DraftOptions::default()).expect("nothing is there to be lost");
        place.begin(8).expect("room");
        place.buffered().write_all_at(b"QEVM0003 half", 8).expect("room");
        drop(place);
        assert_eq!(fs::read(&path).expect("the file"), b"before  \0\0\0\0\0\0\0\0 half");
    }

    #[test]
    fn what_somebody_lives_from_is_not_overwritten() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("disk");
        fs::write(&path, OLD).expect("a file");
        let held = File::open(&path).expect("the file");
        crate::hold(&held).expect("a lock");
        let error = Place::open(&path, 8, options()).expect_err("refused");
        let expected = format!("`{}` is the memory of a guest that runs", path.display());
        assert_eq!(error.to_string(), expected);
        drop(held);
        drop(Place::open(&path, 8, options()).expect("a file"));
    }

    #[test]
    fn what_is_there_is_overwritten_only_on_demand() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("disk");
        fs::write(&path, OLD).expect("a file");
        for (start, expected) in [
            (8, Some(format!("`{}` has 0x36 bytes from 0x8 on, which would be overwritten", path.display()))),
            (OLD.len() as u64, None),
            (4096, None),
        ] {
            let opened = Place::open(&path, start, DraftOptions::default());
            assert_eq!(opened.err().map(|error| error.to_string()), expected, "{start}");
        }
        drop(Place::open(&path, 8, options()).expect("a file"));
        assert_eq!(fs::read(&path).expect("the file"), OLD, "a place that was not begun changes nothing");
        let owner = "0".parse().expect("an owner");
        for (path, options, expected) in [
            (directory.path(), options(), "only a regular file or a block device has offsets"),
            (&path, DraftOptions { owner, ..options() }, "only a new file is given an owner"),
        ] {
            let error = Place::open(path, 8, options).expect_err("refused");
            assert_eq!(error.to_string(), format!("`{}`: {expected}", path.display()));
        }
    }
}
