//! An image that is lived from is not written in place: who reads it has a lock, which who writes it asks for.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use crate::job::Observer;
use crate::qemu::Session;
use crate::source::MappedRamFile;
use crate::{Error, Kind, Result};

/// The name by which a QEMU that maps an image keeps the descriptor with the lock.
const HELD: &str = "vmstate-image";

/// Says that the image is read, for as long as anybody has this description of it. Whoever QEMU is that gets a duplicate
/// reads it, too.
///
/// A file system without locks keeps nobody away, which is no reason not to read.
///
/// # Errors
/// [`Kind::Unsupported`] while the image is being written in place.
pub(super) fn while_read(file: &File, path: &Path) -> Result<()> {
    lock(file, path).map(drop)
}

/// A description of the image that says, as long as anybody has it, that guests live from the image.
///
/// # Errors
/// [`Kind::Unsupported`] while the image is being written in place.
pub(super) fn while_mapped(image: &MappedRamFile, observer: &dyn Observer) -> Result<File> {
    let cannot = |error| Error::io(format!("cannot open {}", image.path().display()), error);
    let file = File::open(format!("/proc/self/fd/{}", image.file().as_raw_fd())).map_err(cannot)?;
    if let Some(error) = lock(&file, image.path())? {
        let clause = "the image could not be locked, so nothing keeps it from being overwritten";
        observer.warn(&format!("{clause}: {error}"));
    }
    Ok(file)
}

/// Has a QEMU that maps the image already keep such a description to its end.
///
/// # Errors
/// As [`while_mapped`]; as every QMP command.
pub(super) fn by_qemu(image: &MappedRamFile, session: &mut Session, observer: &dyn Observer) -> Result<()> {
    let held = while_mapped(image, observer)?;
    match session.leave_fd(HELD, held.as_fd()) {
        Err(error) if error.kind() == Kind::Unsupported => {
            let clause = "nothing keeps the image from being overwritten while the guest lives from it";
            observer.warn(&format!("{clause}: {}", error.chain()));
            Ok(())
        }
        other => other,
    }
}

/// Asks for the lock; why there is none, where the file system has no locks.
fn lock(file: &File, path: &Path) -> Result<Option<std::io::Error>> {
    match io::hold(file) {
        Ok(()) => Ok(None),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            let clause = format!("{} is being written", path.display());
            Err(Error::new(Kind::Unsupported, clause).hint("wait until it is whole"))
        }
        Err(error) => Ok(Some(error)),
    }
}
