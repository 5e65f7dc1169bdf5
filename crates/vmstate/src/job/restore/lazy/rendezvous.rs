//! Where QEMU and vmstate meet when one connection is not enough: a socket in a directory that nobody else enters.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Kind, Result};

/// The longest path that fits a unix socket's address (unix(7)), with its NUL.
const SOCKET_PATH_MAX: usize = 108;

/// A private directory with room for a socket of QEMU's. It goes when this is dropped.
#[derive(Debug)]
pub(super) struct Rendezvous {
    dir: PathBuf,
}

impl Rendezvous {
    /// A directory that the QEMU of process `pid` can make a socket in.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where QEMU has another view of the file system, or the path is too long for a socket;
    /// [`Kind::Io`].
    pub(super) fn new(pid: u32) -> Result<Rendezvous> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let view = |who: &str| fs::read_link(format!("/proc/{who}/ns/mnt")).ok();
        if view("self").is_none() || view("self") != view(&pid.to_string()) {
            return Err(Error::new(Kind::Unsupported, "QEMU has another view of the file system"));
        }
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("vmstate-{}-{count}", std::process::id()));
        let rendezvous = Rendezvous { dir };
        if rendezvous.path().as_os_str().len() >= SOCKET_PATH_MAX {
            let clause = format!("{} is too long for a socket", rendezvous.path().display());
            return Err(Error::new(Kind::Unsupported, clause));
        }
        let cannot = |error| Error::io(format!("cannot make {}", rendezvous.dir.display()), error);
        // One that a killed process of the same number left holds nothing that is still needed.
        rendezvous.remove();
        fs::DirBuilder::new().mode(0o700).create(&rendezvous.dir).map_err(cannot)?;
        let owner = fs::metadata(format!("/proc/{pid}")).map_err(cannot)?;
        let ours = fs::metadata(&rendezvous.dir).map_err(cannot)?;
        if owner.uid() != ours.uid() {
            // Root can give it away and still enter it.
            std::os::unix::fs::chown(&rendezvous.dir, Some(owner.uid()), Some(owner.gid()))
                .map_err(cannot)?;
        }
        Ok(rendezvous)
    }

    fn path(&self) -> PathBuf {
        self.dir.join("source")
    }

    /// The address for QEMU to listen at.
    pub(super) fn uri(&self) -> String {
        format!("unix:{}", self.path().display())
    }

    /// Connects to QEMU. The first connection becomes the main channel.
    ///
    /// # Errors
    /// [`Kind::Io`].
    pub(super) fn connect(&self) -> Result<UnixStream> {
        UnixStream::connect(self.path())
            .map_err(|error| Error::io("cannot connect to QEMU's own socket", error))
    }

    fn remove(&self) {
        // QEMU may have removed its socket already; what cannot be removed is empty and harms nobody.
        let _ = fs::remove_file(self.path());
        let _ = fs::remove_dir(&self.dir);
    }
}

impl Drop for Rendezvous {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_enters_and_nothing_is_left() {
        let rendezvous = Rendezvous::new(std::process::id()).unwrap();
        let dir = rendezvous.dir.clone();
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        let listener = std::os::unix::net::UnixListener::bind(rendezvous.path()).unwrap();
        rendezvous.connect().unwrap();
        drop((rendezvous, listener));
        assert!(!dir.exists());
    }
}
