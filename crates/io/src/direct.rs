//! Direct I/O: whether a file takes it, and at which alignment.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx};
use rustix::io::Errno;

use crate::slab::Slab;

/// The alignment assumed where the kernel does not tell (before 6.1): it suits sectors of 512 and of 4096
/// bytes, and is the least a lane accepts.
const ALIGN_UNTOLD: u32 = 4096;

/// The largest alignment that is believed: no file system asks for more than a huge page.
const ALIGN_MAX: u32 = 2 << 20;

/// Whether a file takes direct I/O.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DirectIo {
    /// It does: a trial went through.
    Supported {
        /// What memory addresses must be multiples of, in bytes.
        memory_align: u32,
        /// What file offsets and lengths must be multiples of, in bytes.
        offset_align: u32,
    },
    /// It does not, or was not asked.
    Unsupported {
        /// Why, in words for the user.
        reason: String,
    },
}

/// Whether to go past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectChoice {
    /// Where the file takes it.
    #[default]
    Auto,
    /// Always: a file that does not take it is an error.
    On,
    /// Never.
    Off,
}

impl DirectIo {
    /// The alignment for [`crate::LaneSettings`]: what the file wants, and at least 4096 bytes.
    pub fn alignment(&self) -> usize {
        match *self {
            DirectIo::Supported { memory_align, offset_align } => {
                memory_align.max(offset_align).max(ALIGN_UNTOLD) as usize
            }
            DirectIo::Unsupported { .. } => ALIGN_UNTOLD as usize,
        }
    }

    /// Probes a file opened with O_DIRECT for writing, by one aligned write of zeros at offset 0.
    ///
    /// It destroys what is there, so it is for files just created; the caller cuts them to length again.
    ///
    /// # Errors
    /// What makes any write fail (a full disk, a broken one). A refusal of *direct* writes is an answer.
    pub fn probe_write(direct: &File) -> io::Result<DirectIo> {
        DirectIo::probe(direct, |file, slab, len| {
            // SAFETY: the slab's first buffer has `len` bytes and outlives the call.
            unsafe { libc::pwrite(file.as_raw_fd(), slab.buffer(0).cast(), len, 0) }
        })
    }

    /// Probes a file opened with O_DIRECT for reading, by one aligned read at offset 0.
    ///
    /// # Errors
    /// What makes any read fail. A refusal of *direct* reads is an answer.
    pub fn probe_read(direct: &File) -> io::Result<DirectIo> {
        DirectIo::probe(direct, |file, slab, len| {
            // SAFETY: the slab's first buffer has `len` bytes, belongs to this call and outlives it.
            unsafe { libc::pread(file.as_raw_fd(), slab.buffer(0).cast(), len, 0) }
        })
    }

    fn probe(direct: &File, trial: impl Fn(&File, &Slab, usize) -> isize) -> io::Result<DirectIo> {
        let (memory_align, offset_align) = match told_alignment(direct)? {
            Told::Aligned(memory_align, offset_align) => (memory_align, offset_align),
            Told::Refused => return Ok(unsupported("the file system offers none")),
            Told::Nothing => (ALIGN_UNTOLD, ALIGN_UNTOLD),
        };
        let len = offset_align.max(ALIGN_UNTOLD) as usize;
        // A huge page would be cleared for a few bytes of it.
        let slab = Slab::map_plain(1, len)?;
        loop {
            if trial(direct, &slab, len) >= 0 {
                return Ok(DirectIo::Supported { memory_align, offset_align });
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EINVAL | libc::EOPNOTSUPP) => {
                    return Ok(unsupported(&format!("a trial of {len:#x} bytes was refused: {error}")));
                }
                _ => return Err(error),
            }
        }
    }
}

pub(crate) fn unsupported(reason: &str) -> DirectIo {
    DirectIo::Unsupported { reason: reason.to_owned() }
}

/// What statx says of direct I/O.
enum Told {
    /// Memory and offset alignment.
    Aligned(u32, u32),
    /// The file system says it has none.
    Refused,
    /// The kernel or the file system does not say.
    Nothing,
}

fn told_alignment(file: &File) -> io::Result<Told> {
    let told = match statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(told) => told,
        Err(Errno::NOSYS) => return Ok(Told::Nothing),
        Err(error) => return Err(error.into()),
    };
    if told.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(Told::Nothing);
    }
    let (memory, offset) = (told.stx_dio_mem_align, told.stx_dio_offset_align);
    let is_sane = |align: u32| align.is_power_of_two() && align <= ALIGN_MAX;
    match (memory, offset) {
        (0, _) | (_, 0) => Ok(Told::Refused),
        _ if is_sane(memory) && is_sane(offset) => Ok(Told::Aligned(memory, offset)),
        _ => Ok(Told::Nothing),
    }
}

/// A file opened for reading twice: for metadata through the page cache, for pages past it.
#[derive(Debug)]
pub struct ReadPair {
    /// Opened O_RDONLY.
    pub buffered: File,
    /// Opened O_RDONLY | O_DIRECT, where that was wanted and is taken.
    pub direct: Option<File>,
    /// What was found out about direct I/O.
    pub direct_io: DirectIo,
}

impl ReadPair {
    /// Opens `path`. Both descriptors are of one inode, whatever happens to the name meanwhile.
    ///
    /// # Errors
    /// What the system said; `Unsupported` when direct I/O was demanded and is not to be had.
    pub fn open(path: &Path, choice: DirectChoice) -> io::Result<ReadPair> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
        let buffered = File::from(openat(CWD, path, flags, Mode::empty())?);
        let (direct, direct_io) = match choice {
            DirectChoice::Off => (None, unsupported("switched off")),
            DirectChoice::Auto | DirectChoice::On => open_direct(
                &buffered,
                || openat(CWD, path, flags | OFlags::DIRECT, Mode::empty()),
                DirectIo::probe_read,
            )?,
        };
        match &direct_io {
            DirectIo::Unsupported { reason } if choice == DirectChoice::On => {
                Err(io::Error::new(io::ErrorKind::Unsupported, format!("no direct I/O: {reason}")))
            }
            _ => Ok(ReadPair { buffered, direct, direct_io }),
        }
    }
}

impl ReadPair {
    /// What is open already, read through the page cache.
    pub fn buffered(file: File) -> ReadPair {
        ReadPair { buffered: file, direct: None, direct_io: unsupported("switched off") }
    }

    /// Fills `bytes` from the offset `at` on. What is aligned goes past the page cache, where that is supported; the
    /// rest does not.
    ///
    /// # Errors
    /// What the system said; `UnexpectedEof` where the file ends before.
    pub fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let align = self.direct_io.alignment();
        let mut done = 0;
        while done < bytes.len() {
            let (rest, offset) = (&mut bytes[done..], at + done as u64);
            let read = match &self.direct {
                Some(direct)
                    if offset.is_multiple_of(align as u64)
                        && rest.as_ptr().addr().is_multiple_of(align)
                        && rest.len() >= align =>
                {
                    let whole = rest.len() - rest.len() % align;
                    direct.read_at(&mut rest[..whole], offset)
                }
                _ => self.buffered.read_at(rest, offset),
            };
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Opens the twin of `buffered` and probes it; the twin is there exactly when direct I/O is supported.
pub(crate) fn open_direct(
    buffered: &File,
    open: impl FnOnce() -> rustix::io::Result<std::os::fd::OwnedFd>,
    probe: impl FnOnce(&File) -> io::Result<DirectIo>,
) -> io::Result<(Option<File>, DirectIo)> {
    let direct = match open() {
        Ok(descriptor) => File::from(descriptor),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => {
            return Ok((None, unsupported("the file system refuses O_DIRECT")));
        }
        Err(error) => return Err(error.into()),
    };
    if !is_same_file(buffered, &direct)? {
        return Err(io::Error::other("the name changed hands while it was opened"));
    }
    let found = probe(&direct)?;
    Ok((matches!(found, DirectIo::Supported { .. }).then_some(direct), found))
}

/// Whether two descriptors are of one inode.
pub(crate) fn is_same_file(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_is_never_below_a_cached_page() {
        for (found, expected) in [
            (DirectIo::Supported { memory_align: 4, offset_align: 512 }, 4096),
            (DirectIo::Supported { memory_align: 4096, offset_align: 16384 }, 16384),
            (DirectIo::Supported { memory_align: 65536, offset_align: 512 }, 65536),
            (unsupported("x"), 4096),
        ] {
            assert_eq!(found.alignment(), expected, "{found:?}");
        }
    }
}
