//! Follows a guest's serial console through the file that QEMU writes it to.
//!
//! A file needs nobody at the other end, so a guest never waits for a reader, and what it said stays for whoever
//! wants to know why a test failed. The wait is for the file to grow (inotify) or for QEMU to end (pidfd).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::inotify;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::process::{read_log, wait_readable};

/// How much of the console a message shows.
const TAIL_BYTES: usize = 400;
/// A line longer than this is cut: a guest that lost its mind must not take our memory.
const LINE_BYTES_MAX: usize = 1 << 16;

/// What the built-in guest says on one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// `P`: how many pages it owns; once, before the first round.
    Pages(u64),
    /// `R`: the round it has just finished.
    Round(u32),
    /// `E`: the page that did not hold what the guest had written; it halts.
    Fault(u64),
}

impl Mark {
    /// The mark on this line, or `None` if it is none (the firmware may speak too).
    pub fn parse(line: &str) -> Option<Mark> {
        let (kind, digits) = line.split_at_checked(1)?;
        if digits.len() != 8 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let number = u32::from_str_radix(digits, 16).ok()?;
        match kind {
            "P" => Some(Mark::Pages(number.into())),
            "R" => Some(Mark::Round(number)),
            "E" => Some(Mark::Fault(number.into())),
            _ => None,
        }
    }
}

/// A reader of a console's file, which may still grow.
#[derive(Debug)]
pub struct Serial {
    path: PathBuf,
    stderr_path: PathBuf,
    file: File,
    changes: OwnedFd,
    /// What was read of a line that has not ended yet.
    partial: Vec<u8>,
    tail: Vec<u8>,
    pages: Option<u64>,
    round: u32,
    fault: Option<u64>,
}

impl Serial {
    /// Follows the file at `path` from its beginning; it is created if it is not there yet, so one can begin to
    /// follow before QEMU is started. `stderr_path` is quoted in errors.
    ///
    /// # Errors
    /// [`Error::File`] when the file cannot be opened or watched.
    pub fn open(path: &Path, stderr_path: &Path) -> Result<Serial> {
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(Error::file("open", path))?;
        let watch = || -> io::Result<OwnedFd> {
            let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            inotify::add_watch(&changes, path, inotify::WatchFlags::MODIFY)?;
            Ok(changes)
        };
        Ok(Serial {
            path: path.to_owned(),
            stderr_path: stderr_path.to_owned(),
            file,
            changes: watch().map_err(Error::file("watch", path))?,
            partial: Vec::new(),
            tail: Vec::new(),
            pages: None,
            round: 0,
            fault: None,
        })
    }

    /// The last round that the built-in guest has finished, 0 before the first.
    ///
    /// # Errors
    /// [`Error::File`] when the console cannot be read, [`Error::GuestFault`] when the guest reported a page.
    pub fn latest_round(&mut self) -> Result<u32> {
        while self.next_line()?.is_some() {}
        self.checked_round()
    }

    /// Waits until the built-in guest has finished round `at_least`, and says which it has finished by then.
    /// `process` is QEMU's pidfd, if it is known: its end ends the wait.
    ///
    /// # Errors
    /// Like [`Serial::latest_round`], and [`Error::Deadline`].
    pub fn wait_for_round(
        &mut self,
        at_least: u32,
        process: Option<BorrowedFd<'_>>,
        deadline: Duration,
    ) -> Result<u32> {
        self.wait(&format!("round {at_least}"), process, deadline, |serial, _| {
            serial.checked_round().map(|round| (round >= at_least).then_some(round))
        })
    }

    /// How many pages the built-in guest says it owns; waits until it has said so.
    ///
    /// # Errors
    /// Like [`Serial::wait_for_round`].
    pub fn wait_for_pages(&mut self, process: Option<BorrowedFd<'_>>, deadline: Duration) -> Result<u64> {
        self.wait("page count", process, deadline, |serial, _| Ok(serial.pages))
    }

    /// Waits for a line that `accept` makes something of. Lines that an earlier wait went past are not seen again.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Deadline`].
    pub fn wait_for_line<T>(
        &mut self,
        awaited: &str,
        process: Option<BorrowedFd<'_>>,
        deadline: Duration,
        mut accept: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        self.wait(awaited, process, deadline, |_, line| Ok(line.and_then(&mut accept)))
    }

    /// Hands `check` each line, and a `None` before the first wait, until it makes something of it.
    fn wait<T>(
        &mut self,
        awaited: &str,
        process: Option<BorrowedFd<'_>>,
        deadline: Duration,
        mut check: impl FnMut(&Serial, Option<&str>) -> Result<Option<T>>,
    ) -> Result<T> {
        let end = Instant::now() + deadline;
        if let Some(found) = check(self, None)? {
            return Ok(found);
        }
        let mut process_ended = false;
        loop {
            while let Some(line) = self.next_line()? {
                if let Some(found) = check(self, Some(&line))? {
                    return Ok(found);
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if process_ended || left.is_zero() {
                return Err(Error::Deadline {
                    awaited: awaited.to_owned(),
                    deadline,
                    console: String::from_utf8_lossy(&self.tail).into_owned(),
                    stderr: read_log(&self.stderr_path),
                });
            }
            // What QEMU wrote before it ended is read once more before its end counts.
            process_ended = self.sleep(process, left)?;
        }
    }

    /// Sleeps until the file has grown or the process has ended, and says whether the process has.
    fn sleep(&self, process: Option<BorrowedFd<'_>>, left: Duration) -> Result<bool> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.changes.as_fd(), PollFlags::IN)];
        fds.extend(process.map(|process| PollFd::from_borrowed_fd(process, PollFlags::IN)));
        wait_readable(&mut fds, left, "wait for a console")?;
        let ended = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        // The events are only a wake-up; what they say is in the file.
        let mut events = [0; 4096];
        match rustix::io::read(&self.changes, &mut events) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(ended),
            Err(errno) => Err(Error::file("watch", &self.path)(errno.into())),
        }
    }

    /// The next whole line, without its end, or `None` while there is none.
    fn next_line(&mut self) -> Result<Option<String>> {
        loop {
            let end = self.partial.iter().position(|&byte| byte == b'\n');
            if let Some(end) = end.map(|end| end + 1).or_else(|| self.overlong()) {
                let line: Vec<u8> = self.partial.drain(..end).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                self.note(&line);
                return Ok(Some(line));
            }
            let mut bytes = [0; 4096];
            let len = match self.file.read(&mut bytes) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::file("read", &self.path)(error)),
            };
            if len == 0 {
                return Ok(None);
            }
            self.partial.extend_from_slice(&bytes[..len]);
            self.tail.extend_from_slice(&bytes[..len]);
            self.tail.drain(..self.tail.len().saturating_sub(TAIL_BYTES));
        }
    }

    fn overlong(&self) -> Option<usize> {
        (self.partial.len() >= LINE_BYTES_MAX).then_some(LINE_BYTES_MAX)
    }

    fn note(&mut self, line: &str) {
        match Mark::parse(line) {
            Some(Mark::Pages(pages)) => self.pages = Some(pages),
            Some(Mark::Round(round)) => self.round = round,
            Some(Mark::Fault(page)) => self.fault = Some(page),
            None => {}
        }
    }

    fn checked_round(&self) -> Result<u32> {
        match self.fault {
            Some(page) => Err(Error::GuestFault { page, round: self.round }),
            None => Ok(self.round),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const SOON: Duration = Duration::from_millis(20);

    fn console(text: &str) -> (tempfile::TempDir, Serial) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        fs::write(&path, text).unwrap();
        fs::write(dir.path().join("stderr"), "qemu: no such drive\n").unwrap();
        let serial = Serial::open(&path, &dir.path().join("stderr")).unwrap();
        (dir, serial)
    }

    fn append(dir: &tempfile::TempDir, text: &str) {
        use std::io::Write;
        File::options()
            .append(true)
            .open(dir.path().join("serial"))
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
    }

    #[test]
    fn marks_are_a_letter_and_eight_digits() {
        for (line, mark) in [
            ("P0000fa00", Some(Mark::Pages(0xfa00))),
            ("R0000002a", Some(Mark::Round(42))),
            ("E00100000", Some(Mark::Fault(0x10_0000))),
            ("R0000002", None),
            ("R+000002a", None),
            ("Rébécca", None),
            ("X0000002a", None),
            ("", None),
            ("é", None),
        ] {
            assert_eq!(Mark::parse(line), mark, "{line}");
        }
    }

    #[test]
    fn a_line_counts_only_when_it_is_whole() {
        let (dir, mut serial) = console("SeaBIOS\r\nP00000008\nR00000001\nR0000");
        assert_eq!(serial.latest_round().unwrap(), 1);
        append(&dir, "0002\n");
        assert_eq!(serial.latest_round().unwrap(), 2);
        assert_eq!(serial.wait_for_pages(None, SOON).unwrap(), 8);
    }

    #[test]
    fn a_wait_sees_what_is_written_while_it_waits() {
        let (dir, mut serial) = console("R00000001\n");
        assert_eq!(serial.latest_round().unwrap(), 1);
        std::thread::scope(|scope| {
            scope.spawn(|| append(&dir, "R00000002\nR00000003\n"));
            assert!(serial.wait_for_round(2, None, Duration::from_secs(10)).unwrap() >= 2);
        });
    }

    #[test]
    fn a_deadline_quotes_the_console_and_qemu() {
        let (_dir, mut serial) = console("R00000001\n");
        let error = serial.wait_for_round(2, None, SOON).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no round 2 within 20ms; the console says `R00000001\n`, QEMU says `qemu: no such drive`"
        );
    }

    #[test]
    fn a_fault_the_guest_reports_is_an_error_of_every_wait() {
        let (_dir, mut serial) = console("R00000001\nE00000207\n");
        let expected = "the guest reports that page 0x207 does not hold what it wrote, after round 1";
        assert_eq!(serial.latest_round().unwrap_err().to_string(), expected);
        assert_eq!(serial.wait_for_round(2, None, SOON).unwrap_err().to_string(), expected);
    }
}
