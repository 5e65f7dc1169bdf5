//! A file in the making: it has a temporary name until it is whole.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, flock, openat, statat, unlinkat};
use rustix::io::Errno;

use crate::direct::{DirectChoice, DirectIo, open_direct, unsupported};
use crate::lane::LaneTarget;
use crate::owner::Owner;
use crate::timed::Rates;

/// The longest file name that common file systems take, in bytes.
const NAME_MAX: usize = 255;

/// How many temporary names are tried before giving up: each has 64 random bits.
const NAME_ATTEMPTS: usize = 16;

/// How a draft is made and published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftOptions {
    /// The permission bits of the file, whatever the umask says. Guest memory is secret: 0600 unless told.
    pub mode: u32,
    /// Whom the file is given to. Refused by the system, but for root, where that is somebody else.
    pub owner: Owner,
    /// Whether a file that stands under the final name may be replaced.
    pub overwrite: bool,
    /// Whether pages go past the page cache.
    pub direct: DirectChoice,
    /// Whether publishing waits for stable storage.
    pub sync: bool,
}

impl Default for DraftOptions {
    fn default() -> DraftOptions {
        DraftOptions {
            mode: 0o600,
            owner: Owner::default(),
            overwrite: false,
            direct: DirectChoice::Auto,
            sync: true,
        }
    }
}

/// What was being done when a draft failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the display texts say it")]
pub enum DraftStep {
    OpenDirectory,
    Inspect,
    CreatePartial,
    SetOwner,
    SetMode,
    Open,
    OpenDirect,
    Measure,
    WipeHead,
    WriteHead,
    SetLength,
    QuerySpace,
    Reopen,
    SyncFile,
    Rename,
    SyncDirectory,
}

impl std::fmt::Display for DraftStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DraftStep::OpenDirectory => "opening the directory",
            DraftStep::Inspect => "looking at the name",
            DraftStep::CreatePartial => "creating the temporary file",
            DraftStep::SetOwner => "setting the owner",
            DraftStep::SetMode => "setting the permissions",
            DraftStep::Open => "opening for writing",
            DraftStep::OpenDirect => "opening for direct I/O",
            DraftStep::Measure => "trying how fast it is",
            DraftStep::WipeHead => "wiping the head of what was there",
            DraftStep::WriteHead => "writing the head",
            DraftStep::SetLength => "setting the length",
            DraftStep::QuerySpace => "asking for free space",
            DraftStep::Reopen => "opening the temporary file again",
            DraftStep::SyncFile => "syncing the file",
            DraftStep::Rename => "renaming to the final name",
            DraftStep::SyncDirectory => "syncing the directory",
        })
    }
}

/// What stands where a regular file should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the display texts say it")]
pub enum Obstacle {
    Directory,
    /// Replacing the link would leave the file it points to as it was, and following it could publish
    /// across file systems, which no rename can.
    SymbolicLink,
    /// The path is empty, or ends in a slash, `.` or `..`.
    NoFileName,
    BlockDevice,
    CharacterDevice,
    Fifo,
    Socket,
    Unknown,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Obstacle::Directory => "a directory",
            Obstacle::SymbolicLink => "a symbolic link",
            Obstacle::NoFileName => "not the name of a file",
            Obstacle::BlockDevice => "a block device",
            Obstacle::CharacterDevice => "a character device",
            Obstacle::Fifo => "a FIFO",
            Obstacle::Socket => "a socket",
            Obstacle::Unknown => "of an unknown file type",
        })
    }
}

/// Why a draft could not be made or published.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// The final name is taken, at the start or at the moment of publishing, and overwriting was not allowed.
    #[error("`{}` exists", path.display())]
    Exists {
        /// The final path.
        path: PathBuf,
    },
    /// The final path cannot be that of a file.
    #[error("`{}` is {obstacle}", path.display())]
    NotAFile {
        /// The final path.
        path: PathBuf,
        /// What it is.
        obstacle: Obstacle,
    },
    /// The final path is something that could be written to, but that this version does not write to.
    #[error("`{}` is {obstacle}: writing to one is not supported", path.display())]
    Unsupported {
        /// The final path.
        path: PathBuf,
        /// What it is.
        obstacle: Obstacle,
    },
    /// What is there already would be overwritten, and overwriting was not allowed.
    #[error("`{}` has {bytes:#x} bytes from {start:#x} on, which would be overwritten", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
        /// Where the image is to start.
        start: u64,
        /// How many bytes are there from then on.
        bytes: u64,
    },
    /// A guest lives from what is there: see [`hold`](crate::hold()).
    #[error("`{}` is the memory of a guest that runs", path.display())]
    Held {
        /// The path.
        path: PathBuf,
    },
    /// There is not enough room, and there will not be: a device does not grow.
    #[error("`{}` has {has:#x} bytes from {start:#x} on, the image takes {needs:#x}", path.display())]
    TooSmall {
        /// The path.
        path: PathBuf,
        /// Where the image is to start.
        start: u64,
        /// The room from there on, in bytes.
        has: u64,
        /// The length of the image in bytes.
        needs: u64,
    },
    /// An offset or an owner was asked for where there is none to be given.
    #[error("`{}`: {what}", path.display())]
    NotForThis {
        /// The path.
        path: PathBuf,
        /// What cannot be.
        what: &'static str,
    },
    /// Direct I/O was demanded and is not to be had.
    #[error("`{}`: no direct I/O: {reason}", path.display())]
    NoDirectIo {
        /// The final path.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The system refused a step.
    #[error("`{}`: {step}", path.display())]
    Io {
        /// The path that the step was about.
        path: PathBuf,
        /// What was being done.
        step: DraftStep,
        /// What the system said.
        source: io::Error,
    },
}

/// A file that is written under a temporary name and becomes visible whole or not at all.
///
/// The temporary name is `.NAME.vmstate-PID-RANDOM.partial` in the directory of the final one, so that the
/// rename stays within a file system and a stray draft can be told from anything else. Dropping the draft
/// removes it.
///
/// There are two descriptors with exactly the flags that QEMU accepts in an fdset: one O_WRONLY, one
/// O_WRONLY | O_DIRECT. Both are of one inode.
#[derive(Debug)]
pub struct Draft {
    pub(crate) path: PathBuf,
    pub(crate) name: OsString,
    pub(crate) partial_path: PathBuf,
    pub(crate) partial_name: OsString,
    pub(crate) directory: File,
    pub(crate) directory_path: PathBuf,
    pub(crate) buffered: File,
    pub(crate) options: DraftOptions,
    /// Whether the temporary name is still to be removed.
    pub(crate) is_partial: bool,
    /// Where the image begins: what stands before it is written last.
    pub(crate) start: u64,
    /// What stood under the final name until this took its place.
    pub(crate) replaced: Option<Replaced>,
    direct: Option<File>,
    direct_io: DirectIo,
}

impl Draft {
    /// Creates the temporary file for `path`, empty, and probes direct I/O on it.
    ///
    /// # Errors
    /// [`DraftError::Exists`] at once when the final name is taken and may not be replaced; the other
    /// variants as their docs say. Nothing is left behind.
    pub fn create(path: &Path, options: DraftOptions) -> Result<Draft, DraftError> {
        let (directory_path, name) = split_path(path)?;
        let fail = |step, path: &Path| {
            let path = path.to_owned();
            move |source: Errno| DraftError::Io { path, step, source: source.into() }
        };
        let directory_flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&directory_path, directory_flags, Mode::empty())
            .map(File::from)
            .map_err(fail(DraftStep::OpenDirectory, &directory_path))?;
        refuse_obstacles(&directory, name, path, options.overwrite)?;

        let (partial_name, buffered) =
            create_partial(&directory, name, options.mode).map_err(fail(DraftStep::CreatePartial, path))?;
        // From here on an early return drops the draft, which removes the file again.
        let mut draft = Draft {
            path: path.to_owned(),
            name: name.to_owned(),
            partial_path: directory_path.join(&partial_name),
            partial_name,
            directory,
            directory_path,
            buffered,
            options,
            is_partial: true,
            start: 0,
            replaced: None,
            direct: None,
            direct_io: unsupported("switched off"),
        };
        // The owner first: giving a file away can cost it permission bits.
        let Owner { user, group } = options.owner;
        if (user, group) != (None, None) {
            std::os::unix::fs::fchown(&draft.buffered, user, group)
                .map_err(|source| draft.fail(DraftStep::SetOwner, source))?;
        }
        // The umask has cut the mode that the file was created with.
        rustix::fs::fchmod(&draft.buffered, Mode::from_raw_mode(options.mode))
            .map_err(fail(DraftStep::SetMode, &draft.partial_path))?;
        if options.direct != DirectChoice::Off {
            draft.open_direct()?;
        }
        Ok(draft)
    }

    fn open_direct(&mut self) -> Result<(), DraftError> {
        let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (direct, direct_io) = open_direct(
            &self.buffered,
            || openat(&self.directory, &self.partial_name, flags, Mode::empty()),
            |direct| {
                let found = DirectIo::probe_write(direct)?;
                // The trial left a few zeros behind.
                self.buffered.set_len(0)?;
                Ok(found)
            },
        )
        .map_err(|source| self.fail(DraftStep::OpenDirect, source))?;
        if let (DirectChoice::On, DirectIo::Unsupported { reason }) = (self.options.direct, &direct_io) {
            return Err(DraftError::NoDirectIo { path: self.path.clone(), reason: reason.clone() });
        }
        (self.direct, self.direct_io) = (direct, direct_io);
        Ok(())
    }

    /// Tries how fast the file is with direct I/O and without, which takes some 50 ms; `None` where there is no
    /// choice to make. The file is empty afterwards.
    ///
    /// # Errors
    /// What makes any write fail, a full disk for one.
    pub fn measure(&self) -> Result<Option<Rates>, DraftError> {
        let Some(direct) = &self.direct else { return Ok(None) };
        let rates = Rates::measure(direct, &self.buffered);
        // Also after a failure: what was written is not the image's.
        let cut = self.buffered.set_len(0);
        let rates = rates.map_err(|source| self.fail(DraftStep::Measure, source))?;
        cut.map_err(|source| self.fail(DraftStep::SetLength, source))?;
        Ok(Some(rates))
    }

    /// The file whose name this one has got by [`Draft::publish`], if there was one. Where it is not asked for, it goes
    /// with the draft.
    pub fn take_replaced(&mut self) -> Option<Replaced> {
        self.replaced.take()
    }

    /// Lets go of direct I/O, for this reason.
    pub fn leave_direct(&mut self, reason: &str) {
        (self.direct, self.direct_io) = (None, unsupported(reason));
    }

    /// The final path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The temporary path.
    pub fn partial_path(&self) -> &Path {
        &self.partial_path
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

    /// The file as lanes want it, on duplicates of the draft's descriptors.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn lane_target(&self) -> Result<LaneTarget, DraftError> {
        let duplicate = |file: &File| file.try_clone().map_err(|source| self.fail(DraftStep::Reopen, source));
        Ok(LaneTarget::files(self.direct.as_ref().map(duplicate).transpose()?, duplicate(&self.buffered)?))
    }

    /// Opens the temporary file for reading, to look at what somebody else wrote into it.
    ///
    /// # Errors
    /// What the system said, or that the temporary name is another file's by now.
    pub fn open_for_reading(&self) -> Result<File, DraftError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(&self.directory, &self.partial_name, flags, Mode::empty())
            .map(File::from)
            .map_err(|source| self.fail(DraftStep::Reopen, source.into()))?;
        match crate::direct::is_same_file(&self.buffered, &opened) {
            Ok(true) => Ok(opened),
            Ok(false) => Err(self.changeling(DraftStep::Reopen)),
            Err(source) => Err(self.fail(DraftStep::Reopen, source)),
        }
    }

    /// Sets the length of the file; what it gains is a hole.
    ///
    /// # Errors
    /// What the system said.
    pub fn set_len(&self, bytes: u64) -> Result<(), DraftError> {
        self.buffered.set_len(bytes).map_err(|source| self.fail(DraftStep::SetLength, source))
    }

    /// How many bytes the file system has left for this user. A promise to nobody: others write as well.
    ///
    /// # Errors
    /// What the system said.
    pub fn free_bytes(&self) -> Result<u64, DraftError> {
        let found = rustix::fs::fstatvfs(&self.directory)
            .map_err(|source| self.fail(DraftStep::QuerySpace, source.into()))?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    /// The error for a temporary name that has become another file's.
    pub(crate) fn changeling(&self, step: DraftStep) -> DraftError {
        let text = format!("another file has taken the temporary name `{}`", self.partial_path.display());
        self.fail(step, io::Error::other(text))
    }

    pub(crate) fn fail(&self, step: DraftStep, source: io::Error) -> DraftError {
        let path = match step {
            DraftStep::Rename => &self.path,
            DraftStep::SyncDirectory | DraftStep::QuerySpace => &self.directory_path,
            _ => &self.partial_path,
        };
        DraftError::Io { path: path.clone(), step, source }
    }
}

/// A file that has lost its name to a new one. Its room comes back when this is dropped, which some file systems take half
/// a second a GiB for: whoever has something to do first does it before.
#[derive(Debug)]
pub struct Replaced(pub(crate) OwnedFd);

impl AsFd for Replaced {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.is_partial {
            // Nobody can be told here; what may be left is recognisable by its name.
            let _ = unlinkat(&self.directory, &self.partial_name, AtFlags::empty());
        }
    }
}

/// The directory and the name within it that `path` stands for.
pub(crate) fn split_path(path: &Path) -> Result<(PathBuf, &OsStr), DraftError> {
    let bytes = path.as_os_str().as_bytes();
    // `Path` drops a trailing slash or dot, which would turn `images/` into a file called `images`.
    let is_cut = bytes.ends_with(b"/") || bytes.ends_with(b"/.");
    match path.file_name() {
        Some(name) if !is_cut => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            Ok((parent.unwrap_or(Path::new(".")).to_owned(), name))
        }
        _ => Err(DraftError::NotAFile { path: path.to_owned(), obstacle: Obstacle::NoFileName }),
    }
}

/// Refuses a final name that is taken by something else than a file that may be replaced.
fn refuse_obstacles(directory: &File, name: &OsStr, path: &Path, overwrite: bool) -> Result<(), DraftError> {
    let found = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => FileType::from_raw_mode(found.st_mode),
        Err(Errno::NOENT) => return Ok(()),
        Err(source) => {
            return Err(DraftError::Io {
                path: path.to_owned(),
                step: DraftStep::Inspect,
                source: source.into(),
            });
        }
    };
    let path = path.to_owned();
    let obstacle = match found {
        FileType::RegularFile if overwrite => return Ok(()),
        FileType::RegularFile => return Err(DraftError::Exists { path }),
        FileType::BlockDevice => Obstacle::BlockDevice,
        FileType::CharacterDevice => Obstacle::CharacterDevice,
        FileType::Fifo => Obstacle::Fifo,
        FileType::Socket => Obstacle::Socket,
        FileType::Directory => Obstacle::Directory,
        FileType::Symlink => Obstacle::SymbolicLink,
        FileType::Unknown => Obstacle::Unknown,
    };
    match obstacle {
        Obstacle::BlockDevice | Obstacle::CharacterDevice | Obstacle::Fifo | Obstacle::Socket => {
            Err(DraftError::Unsupported { path, obstacle })
        }
        _ => Err(DraftError::NotAFile { path, obstacle }),
    }
}

fn create_partial(directory: &File, name: &OsStr, mode: u32) -> Result<(OsString, File), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for _ in 0..NAME_ATTEMPTS {
        let partial = partial_name(name, RandomState::new().hash_one(name));
        match openat(directory, &partial, flags, Mode::from_raw_mode(mode)) {
            Ok(descriptor) => {
                // While anybody has this descriptor the draft is no stray. Where there are no locks, strays stay.
                let _ = flock(&descriptor, FlockOperation::NonBlockingLockExclusive);
                return Ok((partial, File::from(descriptor)));
            }
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::EXIST)
}

/// `.NAME.vmstate-PID-RANDOM.partial`, the name cut so that the whole fits a directory entry.
fn partial_name(name: &OsStr, random: u64) -> OsString {
    let suffix = format!(".vmstate-{}-{random:016x}.partial", std::process::id());
    let mut partial = partial_prefix(name, suffix.len());
    partial.extend_from_slice(suffix.as_bytes());
    OsString::from_vec(partial)
}

/// What comes before a suffix of `suffix_len` bytes in the temporary name of `name`.
pub(crate) fn partial_prefix(name: &OsStr, suffix_len: usize) -> Vec<u8> {
    let kept = name.as_bytes().len().min(NAME_MAX.saturating_sub(1 + suffix_len));
    [b".", &name.as_bytes()[..kept]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_names_are_hidden_recognisable_and_short_enough() {
        let pid = std::process::id();
        let short = partial_name(OsStr::new("vm.img"), 0x2a);
        assert_eq!(short, OsString::from(format!(".vm.img.vmstate-{pid}-000000000000002a.partial")));
        assert_eq!(partial_name(OsStr::new(&"x".repeat(255)), 1).len(), 255);
    }
}
