//! Drafts whose maker was killed before it could remove them.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FlockOperation, Mode, OFlags, flock, openat, unlinkat};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use crate::direct::is_same_file;
use crate::draft::{partial_prefix, split_path};

/// Removes the drafts of `path` that nobody is making any more, and returns their names.
///
/// A draft is removed only if no process of this machine has the number in its name *and* nobody holds its lock.
/// The lock is the surer of the two: it is held as long as any process has the descriptor, a QEMU that still writes
/// or a process of another container too. What cannot be looked at is left, and is no error: these are files that
/// nobody has asked about.
pub fn remove_strays(path: &Path) -> Vec<PathBuf> {
    let Ok((directory_path, name)) = split_path(path) else { return Vec::new() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = rustix::fs::open(&directory_path, flags, Mode::empty()).map(File::from) else {
        return Vec::new();
    };
    let Ok(entries) = Dir::read_from(&directory) else { return Vec::new() };
    let mut removed = Vec::new();
    for entry in entries.filter_map(Result::ok) {
        let found = OsStr::from_bytes(entry.file_name().to_bytes());
        if maker(found, name).is_some_and(is_gone) && remove(&directory, found) {
            removed.push(directory_path.join(found));
        }
    }
    removed.sort();
    removed
}

/// The process in the name of a draft of `name`, if `found` is one.
fn maker(found: &OsStr, name: &OsStr) -> Option<Pid> {
    let found = found.as_bytes();
    let rest = found.strip_suffix(b".partial")?;
    // The name may have been cut, by a length that the number of the process has a part in.
    let at = rest.windows(9).rposition(|window| window == b".vmstate-")?;
    let (before, rest) = (rest.get(..at)?, std::str::from_utf8(rest.get(at + 9..)?).ok()?);
    let (pid, random) = rest.split_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(pid) || random.len() != 16 || !random.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (before == partial_prefix(name, found.len() - before.len())).then_some(())?;
    Pid::from_raw(pid.parse().ok()?)
}

fn is_gone(pid: Pid) -> bool {
    test_kill_process(pid) == Err(Errno::SRCH)
}

/// Removes a draft, if it is a regular file that nobody holds.
fn remove(directory: &File, name: &OsStr) -> bool {
    // Without blocking: what has the name of a draft may be a FIFO.
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let open = || openat(directory, name, flags, Mode::empty()).map(File::from).ok();
    let Some(file) = open().filter(|file| file.metadata().is_ok_and(|found| found.is_file())) else {
        return false;
    };
    flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        // Another may have removed it meanwhile, and a third have taken the name.
        && open().is_some_and(|again| is_same_file(&file, &again).unwrap_or(false))
        && unlinkat(directory, name, rustix::fs::AtFlags::empty()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_drafts_of_one_name_are_told() {
        let long = "x".repeat(255);
        let cut = format!(".{}.vmstate-77-0123456789abcdef.partial", "x".repeat(255 - 1 - 36));
        assert_eq!(cut.len(), 255);
        for (found, name, expected) in [
            (".vm.img.vmstate-77-0123456789abcdef.partial", "vm.img", Some(77)),
            (".vm.img.vmstate-77-0123456789abcdef.partial", "vm", None),
            (".vm.img.vmstate-77-0123456789abcdef.partial", "vm.img2", None),
            ("vm.img.vmstate-77-0123456789abcdef.partial", "vm.img", None),
            (".vm.img.vmstate-77-0123456789abcde.partial", "vm.img", None),
            (".vm.img.vmstate-77-0123456789abcdeg.partial", "vm.img", None),
            (".vm.img.vmstate--7-0123456789abcdef.partial", "vm.img", None),
            (".vm.img.vmstate-0-0123456789abcdef.partial", "vm.img", None),
            (".vm.img.vmstate-77-0123456789abcdef.part", "vm.img", None),
            (".a.vmstate-1.vmstate-77-0123456789abcdef.partial", "a.vmstate-1", Some(77)),
            (&cut, &long, Some(77)),
            (&cut, "x", None),
        ] {
            let told = maker(OsStr::new(found), OsStr::new(name)).map(|pid| pid.as_raw_nonzero().get());
            assert_eq!(told, expected, "{found} of {name}");
        }
    }

    #[test]
    fn a_stray_draft_is_removed_and_one_that_is_held_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("vm.img");
        // No kernel gives this number away.
        let of = |pid: u32, name: &str| {
            directory.path().join(format!(".{name}.vmstate-{pid}-0123456789abcdef.partial"))
        };
        let (stray, held, live, other) = (
            of(1 << 30, "vm.img"),
            of((1 << 30) + 1, "vm.img"),
            of(std::process::id(), "vm.img"),
            of(1 << 30, "b"),
        );
        for file in [&stray, &held, &live, &other] {
            std::fs::write(file, "pages").expect("a file");
        }
        let holder = File::open(&held).expect("the file");
        flock(&holder, FlockOperation::LockExclusive).expect("the lock");
        assert_eq!(remove_strays(&path), std::slice::from_ref(&stray));
        assert_eq!([&stray, &held, &live, &other].map(|file| file.exists()), [false, true, true, true]);
        drop(holder);
        assert_eq!(remove_strays(&path), [held]);
        assert_eq!(remove_strays(Path::new("/no/such/directory/vm.img")), [""; 0].map(PathBuf::from));
    }
}
