//! What comes out of a compressed image once and is wanted in another order: kept in a file that has no name.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use io::Cancel;
use rustix::fs::{CWD, Mode, OFlags, openat, unlink};
use rustix::io::Errno;

use super::libvirt_source::OVERHEAD_MAX;
use super::{Bounds, Payload, decompress};
use crate::{Error, Kind, Result};

/// A file without a name, which is gone when the process is, however it ends. Only its owner could open it.
///
/// # Errors
/// [`Kind::Io`] where the directory cannot hold one.
pub(super) fn nameless_file() -> Result<File> {
    // Not /tmp, which often is memory: what is kept here is as large as the guest.
    let directory = std::env::var_os("TMPDIR").filter(|name| !name.is_empty());
    let directory = directory.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    nameless_in(&directory).map_err(|errno| {
        let clause = format!("cannot keep what is decompressed in {}", directory.display());
        Error::io(clause, std::io::Error::from(errno))
            .hint("let TMPDIR name a directory with room for the guest's memory")
    })
}

fn nameless_in(directory: &Path) -> rustix::io::Result<File> {
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match openat(CWD, directory, flags | OFlags::TMPFILE, mode) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        opened => return opened.map(File::from),
    }
    // A file system that knows no such files: it has a name for a moment.
    loop {
        let number = TAKEN.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!(".vmstate-{}-{number}.tmp", std::process::id()));
        match openat(CWD, &path, flags | OFlags::CREATE | OFlags::NOFOLLOW, mode) {
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
            Ok(opened) => {
                unlink(&path)?;
                return Ok(opened.into());
            }
        }
    }
}

/// What comes out of a payload that was found to be sound, in a file without a name; `ram_bytes` is what its guest has.
///
/// # Errors
/// Those of the stream; [`Kind::Damaged`] where more comes out than the guest accounts for; [`Kind::Io`].
pub(crate) fn decompressed(file: &File, path: &Path, payload: &Payload, ram_bytes: u64) -> Result<File> {
    let Some(format) = payload.compressed() else {
        return Err(Error::new(Kind::Misuse, format!("{} is not compressed", path.display())));
    };
    let Bounds { end, .. } = Bounds::of(file, path, payload.at)?;
    let most = ram_bytes.saturating_mul(2).saturating_add(OVERHEAD_MAX);
    let mut stream = decompress(file, path, format, payload.at, end)?.take(most.saturating_add(1));
    let mut kept = nameless_file()?;
    let len = std::io::copy(&mut stream, &mut kept).map_err(|error| {
        Error::io(format!("cannot decompress {} into a temporary file", path.display()), error)
            .hint("let TMPDIR name a directory with room for the guest's memory")
    })?;
    if len > most {
        let clause = format!("{}: more than {most:#x} bytes come out of it", path.display());
        return Err(Error::new(Kind::Damaged, clause));
    }
    Ok(kept)
}

/// Hands on what it reads, and keeps it in a file at the same offsets.
pub(super) struct Spilling<R> {
    pub from: R,
    pub file: File,
    pub at: u64,
    pub cancel: Cancel,
}

impl<R: Read> Read for Spilling<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(std::io::Error::other(Error::interrupted()));
        }
        let len = self.from.read(buffer)?;
        self.file.write_all_at(&buffer[..len], self.at).map_err(|error| {
            let error = Error::io("cannot keep what is decompressed", error);
            std::io::Error::other(error.hint("let TMPDIR name a directory with room for the guest's memory"))
        })?;
        self.at += len as u64;
        Ok(len)
    }
}
