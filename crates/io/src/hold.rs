//! A file that somebody lives from is not written in place: who writes asks, who lives from it says so.

use std::fs::File;
use std::io;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Says that the file is lived from, by a shared lock of this very description: whoever it is passed on to
/// keeps the lock, and the last one's end gives it up. Many may hold one file.
///
/// A lock keeps away who asks for it, and that is vmstate: [`Place`](crate::Place) does before it overwrites
/// anything. It does not keep away other programs, nor, on network file systems without locks, other hosts.
///
/// # Errors
/// `WouldBlock` while the file is being written in place; `Unsupported` where the file system has no locks.
pub fn hold(file: &File) -> io::Result<()> {
    lock(file, FlockOperation::NonBlockingLockShared)
}

/// Asks for a file to be written in place, and keeps others from living from it meanwhile.
///
/// # Errors
/// As [`hold`].
pub(crate) fn hold_for_writing(file: &File) -> io::Result<()> {
    lock(file, FlockOperation::NonBlockingLockExclusive)
}

fn lock(file: &File, operation: FlockOperation) -> io::Result<()> {
    match flock(file, operation) {
        Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
            Err(io::ErrorKind::Unsupported.into())
        }
        locked => Ok(locked?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_live_from_a_file_and_none_while_it_is_written() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image");
        std::fs::write(&path, "pages").expect("a file");
        let open = || File::options().read(true).write(true).open(&path).expect("the file");
        let kind = |held: io::Result<()>| held.err().map(|error| error.kind());
        let (one, other, writer) = (open(), open(), open());
        assert_eq!([kind(hold(&one)), kind(hold(&other))], [None, None]);
        assert_eq!(kind(hold_for_writing(&writer)), Some(io::ErrorKind::WouldBlock));
        // A duplicate is the same hold: it ends with the last of them.
        let inherited = one.try_clone().expect("a descriptor");
        drop((one, other));
        assert_eq!(kind(hold_for_writing(&writer)), Some(io::ErrorKind::WouldBlock));
        drop(inherited);
        assert_eq!(kind(hold_for_writing(&writer)), None);
        assert_eq!(kind(hold(&open())), Some(io::ErrorKind::WouldBlock));
    }
}
