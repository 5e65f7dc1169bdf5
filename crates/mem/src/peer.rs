//! A process held so that it cannot be mistaken for another.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, openat, readlinkat, statat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::maps::Mappings;

/// The most of a `/proc/PID/stat` that is read; it has about 50 numbers.
const STAT_MAX: u64 = 4096;

/// The place of the start time among the fields that follow the command name (field 22 of the line, see
/// proc_pid_stat(5); the name is the second).
const START_TIME_AFTER_NAME: usize = 22 - 3;

/// Why a process cannot be looked into.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// There is no such process, or it has ended.
    #[error("process {pid} is gone")]
    Gone {
        /// Its number.
        pid: u32,
    },
    /// The kernel forbids it.
    #[error("no permission for {what} of process {pid}")]
    Denied {
        /// Its number.
        pid: u32,
        /// What was wanted.
        what: &'static str,
        /// What would help, in words for the user.
        hint: String,
    },
    /// Anything else.
    #[error("{what} of process {pid}")]
    Io {
        /// Its number.
        pid: u32,
        /// What was wanted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A process that is held by a pidfd, by its directory in `/proc` and by its start time.
///
/// Everything in `/proc` is opened relative to that directory, which stays the one of this process: should
/// it end and its number be given to another, the directory is empty and not the other's.
#[derive(Debug)]
pub struct Peer {
    pid: Pid,
    pidfd: OwnedFd,
    directory: OwnedFd,
    start_time: u64,
}

/// A descriptor of the process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    /// Its number there.
    pub number: u32,
    /// The inode of its file, on whatever device.
    pub inode: u64,
}

impl Peer {
    /// Takes hold of a running process.
    ///
    /// # Errors
    /// [`PeerError::Gone`] when there is none of this number; the other variants as their docs say.
    pub fn open(pid: u32) -> Result<Peer, PeerError> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(PeerError::Gone { pid })?;
        let fail = |what| move |error: Errno| peer_error(pid, what, error.into());
        let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(fail("a handle"))?;
        let directory_flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match rustix::fs::open(format!("/proc/{pid}"), directory_flags, Mode::empty()) {
            Ok(directory) => directory,
            // There was a process just now: /proc hides it (mount option hidepid), or it has ended since.
            Err(Errno::NOENT) if !has_ended(&pidfd) => {
                let hint = "/proc hides the processes of other users: run as its user, or as root".to_owned();
                return Err(PeerError::Denied { pid, what: "the directory in /proc", hint });
            }
            Err(error) => return Err(fail("the directory in /proc")(error)),
        };
        let start_time = read_start_time(&directory).map_err(|error| peer_error(pid, "the state", error))?;
        let peer = Peer { pid: number, pidfd, directory, start_time };
        // The pidfd was there first: as long as its process lives, the number was nobody else's meanwhile.
        if peer.is_alive() { Ok(peer) } else { Err(PeerError::Gone { pid }) }
    }

    /// The process number.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// When the process started, in clock ticks since boot: with the number, its name for all time.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Whether the process has not ended. A zombie has.
    pub fn is_alive(&self) -> bool {
        !has_ended(&self.pidfd)
    }

    /// Whether the process is alive and still the one that was opened.
    pub fn is_same(&self) -> bool {
        read_start_time(&self.directory).is_ok_and(|now| now == self.start_time) && self.is_alive()
    }

    /// The handle, for waiting in `poll`: readable when the process has ended.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// The mappings of the process.
    ///
    /// # Errors
    /// As [`PeerError`] says.
    pub fn mappings(&self) -> Result<Mappings, PeerError> {
        let read = |file: File| Mappings::read(BufReader::new(file));
        let mappings = self
            .open_file("maps")
            .and_then(read)
            .map_err(|error| peer_error(self.pid(), "the memory map", error))?;
        // The map of a process that has ended is empty, and no error.
        if self.is_alive() { Ok(mappings) } else { Err(PeerError::Gone { pid: self.pid() }) }
    }

    /// Whether the process has a descriptor of the file `(device, inode)`.
    ///
    /// A file that nobody else can have, such as a memfd just sent to it, thus proves that the process is the
    /// one that answers on a socket.
    ///
    /// # Errors
    /// As [`PeerError`] says.
    pub fn holds(&self, device: u64, inode: u64) -> Result<bool, PeerError> {
        let mut holds = false;
        self.visit_descriptors(|_, found| {
            holds = (found.st_dev, found.st_ino) == (device, inode);
            !holds
        })?;
        Ok(holds)
    }

    /// The regular files that the process has open.
    pub(crate) fn regular_files(&self) -> Result<Vec<Held>, PeerError> {
        let mut files = Vec::new();
        self.visit_descriptors(|number, found| {
            if FileType::from_raw_mode(found.st_mode) == FileType::RegularFile {
                files.push(Held { number, inode: found.st_ino });
            }
            true
        })?;
        Ok(files)
    }

    /// Whether the process has descriptors of files that the kernel made for purposes of their own, each by what
    /// its link in `/proc/PID/fd` contains, such as `[userfaultfd]`.
    pub(crate) fn holds_special<const N: usize>(&self, names: [&str; N]) -> Result<[bool; N], PeerError> {
        let fail = |error: Errno| peer_error(self.pid(), "the descriptors", error.into());
        let mut holds = [false; N];
        let listing = self.open_descriptors().map_err(fail)?;
        for number in Descriptors::of(&listing).map_err(fail)? {
            match readlinkat(&listing, number.map_err(fail)?.to_string(), Vec::new()) {
                Ok(link) => {
                    let link = link.to_string_lossy();
                    for (holds, name) in holds.iter_mut().zip(names) {
                        *holds |= link.contains(name);
                    }
                }
                // Closed since it was listed.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(fail(error)),
            }
        }
        Ok(holds)
    }

    /// Shows the descriptors to `visit` until it answers `false`.
    fn visit_descriptors(&self, mut visit: impl FnMut(u32, &Stat) -> bool) -> Result<(), PeerError> {
        let fail = |error: Errno| peer_error(self.pid(), "the descriptors", error.into());
        let listing = self.open_descriptors().map_err(fail)?;
        for number in Descriptors::of(&listing).map_err(fail)? {
            let number = number.map_err(fail)?;
            match statat(&listing, number.to_string(), AtFlags::empty()) {
                Ok(found) if !visit(number, &found) => break,
                // Closed since it was listed.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(error) => return Err(fail(error)),
            }
        }
        Ok(())
    }

    fn open_descriptors(&self) -> Result<OwnedFd, Errno> {
        openat(&self.directory, "fd", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    }

    /// The type of what a path below the process's directory in `/proc` leads to, without opening it.
    pub(crate) fn file_type(&self, path: &str) -> io::Result<FileType> {
        Ok(FileType::from_raw_mode(statat(&self.directory, path, AtFlags::empty())?.st_mode))
    }

    /// Opens a file below the process's directory in `/proc`, read-only and as a description of our own.
    pub(crate) fn open_file(&self, path: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        Ok(File::from(openat(&self.directory, path, flags, Mode::empty())?))
    }

    /// Sorts an error about `what` of this process.
    pub(crate) fn error(&self, what: &'static str, error: io::Error) -> PeerError {
        peer_error(self.pid(), what, error)
    }
}

/// Whether the process of a pidfd has ended, which makes the pidfd readable.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    loop {
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(ready) => return ready > 0,
            Err(Errno::INTR) => {}
            // What cannot be watched cannot be relied on.
            Err(_) => return true,
        }
    }
}

/// The processes found to hold a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// Their numbers, in no order.
    pub pids: Vec<u32>,
    /// How many processes could not be looked into: when nobody is found, this says how much that means.
    pub denied: u32,
}

/// Finds the processes, other than this one, that have a descriptor of the file `(device, inode)`.
///
/// # Errors
/// When `/proc` cannot be listed. Processes that end meanwhile are left out.
pub fn find_holders(device: u64, inode: u64) -> io::Result<Holders> {
    let mut holders = Holders::default();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        match Peer::open(pid).and_then(|peer| peer.holds(device, inode)) {
            Ok(true) => holders.pids.push(pid),
            Ok(false) | Err(PeerError::Gone { .. }) => {}
            Err(PeerError::Denied { .. }) => holders.denied += 1,
            Err(PeerError::Io { source, .. }) => return Err(source),
        }
    }
    Ok(holders)
}

/// The numbers in a listing of `/proc/PID/fd`.
struct Descriptors(Dir);

impl Descriptors {
    fn of(listing: &OwnedFd) -> Result<Descriptors, Errno> {
        Dir::read_from(listing).map(Descriptors)
    }
}

impl Iterator for Descriptors {
    type Item = Result<u32, Errno>;

    fn next(&mut self) -> Option<Result<u32, Errno>> {
        loop {
            match self.0.next()? {
                // The directory itself and its parent are no numbers.
                Ok(entry) => match entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) {
                    Some(number) => return Some(Ok(number)),
                    None => continue,
                },
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// The start time of the process whose directory in `/proc` this is.
fn read_start_time(directory: &OwnedFd) -> io::Result<u64> {
    let file = File::from(openat(directory, "stat", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
    let mut line = Vec::new();
    file.take(STAT_MAX).read_to_end(&mut line)?;
    parse_start_time(&line).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time in stat"))
}

fn parse_start_time(line: &[u8]) -> Option<u64> {
    // The command name is in parentheses and may hold any byte, parentheses and spaces included; none
    // follows the last one.
    let after_name = line.iter().rposition(|&byte| byte == b')')? + 1;
    let fields = std::str::from_utf8(&line[after_name..]).ok()?;
    fields.split_ascii_whitespace().nth(START_TIME_AFTER_NAME)?.parse().ok()
}

pub(crate) fn peer_error(pid: u32, what: &'static str, source: io::Error) -> PeerError {
    match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::SRCH | Errno::NOENT) => PeerError::Gone { pid },
        Some(Errno::ACCESS | Errno::PERM) => PeerError::Denied { pid, what, hint: permission_hint(pid) },
        _ => PeerError::Io { pid, what, source },
    }
}

/// What keeps us from looking into a process, as far as can be told from outside.
fn permission_hint(pid: u32) -> String {
    let ours = rustix::process::geteuid().as_raw();
    let owner = std::fs::metadata(format!("/proc/{pid}")).map(|found| found.uid()).ok();
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    hint_for(ours, owner, scope.trim())
}

/// What would help the user `ours` against a process of `owner`, where Yama's scope is `scope`; empty without Yama.
fn hint_for(ours: u32, owner: Option<u32>, scope: &str) -> String {
    match (owner, scope) {
        // A process that may not be dumped belongs to root in /proc whoever runs it, so this comes first
        // only where the owner is somebody else.
        (Some(owner), _) if owner != ours && owner != 0 => {
            format!("it belongs to user {owner}: run as that user, or as root")
        }
        (_, scope @ ("1" | "2" | "3")) => {
            format!("kernel.yama.ptrace_scope is {scope}: run as root or with CAP_SYS_PTRACE, or set it to 0")
        }
        (Some(0), _) if ours != 0 => "it belongs to root or may not be dumped: run as root".to_owned(),
        _ => "run as root with CAP_SYS_PTRACE; a container or security module may forbid it still".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let rest = "S 1 2 3 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        for name in ["qemu", "a) b (c", ") S 1 1 1"] {
            assert_eq!(parse_start_time(format!("42 ({name}) {rest}\n").as_bytes()), Some(4711), "{name}");
        }
        for line in ["", "42 (qemu", "42 (qemu) S 1 2", "42 (qemu) S 1 2 3 0 -1 4 1 0 0 0 0 0 0 0 20 0 1 0 x"]
        {
            assert_eq!(parse_start_time(line.as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn what_forbids_a_look_is_told_with_what_mends_it() {
        let user = "it belongs to user 107: run as that user, or as root";
        let scope = |n| {
            format!("kernel.yama.ptrace_scope is {n}: run as root or with CAP_SYS_PTRACE, or set it to 0")
        };
        let root = "it belongs to root or may not be dumped: run as root";
        let other = "run as root with CAP_SYS_PTRACE; a container or security module may forbid it still";
        for (ours, owner, found, expected) in [
            (1000, Some(107), "1", user.to_owned()),
            (1000, Some(1000), "1", scope(1)),
            (1000, Some(1000), "2", scope(2)),
            (0, Some(0), "3", scope(3)),
            (1000, Some(0), "1", scope(1)),
            (1000, Some(0), "0", root.to_owned()),
            (1000, Some(0), "", root.to_owned()),
            (1000, Some(1000), "0", other.to_owned()),
            (0, None, "", other.to_owned()),
        ] {
            assert_eq!(hint_for(ours, owner, found), expected, "{ours} {owner:?} {found}");
        }
    }

    #[test]
    fn this_process_is_itself() {
        let peer = Peer::open(std::process::id()).expect("our own process");
        assert!(peer.is_same());
        assert!(!peer.mappings().expect("our own map").as_slice().is_empty());
    }

    #[test]
    fn numbers_of_no_process_are_gone() {
        for pid in [0, u32::MAX, i32::MAX as u32] {
            let refused = Peer::open(pid).expect_err("no such process");
            assert!(matches!(refused, PeerError::Gone { pid: gone } if gone == pid), "{refused}");
        }
    }
}
