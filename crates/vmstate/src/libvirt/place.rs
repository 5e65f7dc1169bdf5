//! Where the daemon's files are, seen from here.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Connection;

impl Connection {
    /// An absolute path of the daemon's as one of ours. One that runs in a container, or under another root, has files
    /// of its own.
    ///
    /// Of a socket that a service manager listens on it is the manager that is known, and it sees what its services see.
    pub(crate) fn path_from_here(&self, path: &Path) -> PathBuf {
        match mem::socket_peer_pid(self).and_then(other_root) {
            Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
            None => path.to_owned(),
        }
    }
}

/// The root directory of a process, where it is another one than ours or not mounted as ours is. A process that may not
/// be looked at is taken for one of ours.
fn other_root(pid: u32) -> Option<PathBuf> {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let of = |root: &Path, namespace: &Path| {
        // The link itself leads to a name; what stands there is looked at behind the slash.
        let metadata = fs::metadata(root.join(".")).ok()?;
        Some((metadata.dev(), metadata.ino(), fs::read_link(namespace).ok()?))
    };
    let theirs = of(&root, &PathBuf::from(format!("/proc/{pid}/ns/mnt")))?;
    let ours = of(Path::new("/"), Path::new("/proc/self/ns/mnt"))?;
    (theirs != ours).then_some(root)
}
