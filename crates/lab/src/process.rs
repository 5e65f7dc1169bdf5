//! What is common to the programs the lab runs: their arguments, their end, their last words.

use std::ffi::{OsStr, OsString};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// QEMU's option syntax takes a doubled comma for one that belongs to the value.
pub fn escaped(path: &Path) -> OsString {
    let mut bytes = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        bytes.extend(std::iter::repeat_n(byte, if byte == b',' { 2 } else { 1 }));
    }
    OsString::from_vec(bytes)
}

/// Runs a program to its end, and makes an error of a failure.
pub fn run(program: &Path, args: &[&OsStr]) -> Result<()> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Start { program: program.to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    Err(Error::Program { program: program.to_owned(), status: output.status, stderr })
}

/// Whether the process of this pidfd ends within `limit`.
pub fn ended_within(pidfd: BorrowedFd<'_>, limit: Duration) -> Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    wait_readable(&mut fds, limit, "wait for a process")?;
    Ok(!fds[0].revents().is_empty())
}

/// Sleeps until one of `fds` is ready or `limit` has passed, whatever signals come.
pub fn wait_readable(fds: &mut [PollFd<'_>], limit: Duration, action: &'static str) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let seconds = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
        let timeout = Timespec { tv_sec: seconds, tv_nsec: left.subsec_nanos().into() };
        match poll(fds, Some(&timeout)) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::System { action, source: errno.into() }),
        }
    }
}

/// What a log says, for a message; a log that cannot be read says nothing.
pub fn read_log(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim_end().to_owned()
}
