//! When a guest is ready: when its console says so.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread::JoinHandle;
use std::time::Instant;

use io::Cancel;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{Error, Kind, Result};

/// How much of the console is read at once.
const CHUNK: usize = 1 << 16;
/// A longer text is no mark.
const TEXT_LEN_MAX: usize = 1024;

/// What a guest says on its console when it is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadySerial {
    /// The file that QEMU writes the console to, as by `-serial file:FILE`.
    pub console: PathBuf,
    /// What stands in a line of it; a line that has not ended yet counts, as that of a login prompt.
    pub text: String,
}

impl FromStr for ReadySerial {
    type Err = Error;

    /// Reads `FILE:TEXT`; the file is what stands before the first colon.
    fn from_str(words: &str) -> Result<ReadySerial> {
        let refuse = |clause: &str| {
            Err(Error::new(Kind::Misuse, clause).hint("write FILE:TEXT, such as serial.log:login"))
        };
        let Some((console, text)) = words.split_once(':') else {
            return refuse("no colon between the file and the text");
        };
        match () {
            () if console.is_empty() => refuse("no file before the colon"),
            () if text.is_empty() => refuse("no text after the colon"),
            () if text.len() > TEXT_LEN_MAX => refuse("the text has more than 1024 bytes"),
            () if text.contains(['\n', '\r']) => refuse("the text is more than one line"),
            () => Ok(ReadySerial { console: console.into(), text: text.to_owned() }),
        }
    }
}

/// Follows the console from a moment at which the guest cannot run yet, in a thread of its own: when the guest speaks,
/// this restore may still be busy with its memory. The thread ends when this is dropped.
#[derive(Debug)]
pub(super) struct Listener {
    stop: Cancel,
    thread: Option<JoinHandle<Result<Option<Instant>>>>,
}

impl Listener {
    /// Begins to listen; what the console has said before is not heard. `qemu` is the process whose end ends the wait.
    ///
    /// # Errors
    /// [`Kind::Misuse`] where there is no such file, or it is none that grows; [`Kind::Io`].
    pub(super) fn start(ready: &ReadySerial, qemu: Option<u32>) -> Result<Listener> {
        let console = Console::open(ready)?;
        // Where QEMU's process is not to be seen, a signal ends the wait.
        let process = qemu
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(Pid::from_raw)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let stop = Cancel::new().map_err(|error| Error::io("cannot create an eventfd", error))?;
        let thread = std::thread::Builder::new()
            .name("console".to_owned())
            .spawn({
                let stop = stop.clone();
                move || console.listen(process.as_ref(), &stop)
            })
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Listener { stop, thread: Some(thread) })
    }

    /// Waits until the text was heard, and says when that was; `None` where `cancel` was thrown before.
    ///
    /// # Errors
    /// [`Kind::Peer`] where QEMU ended before, [`Kind::Io`] where the console cannot be read.
    pub(super) fn wait(mut self, cancel: &Cancel) -> Result<Option<Instant>> {
        // The thread throws its own switch when it ends.
        while !cancel.is_cancelled() && !self.stop.is_cancelled() {
            let mut fds = [PollFd::new(cancel, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io("cannot wait for the console", error)),
            }
        }
        self.heard()
    }

    /// What was heard until now.
    ///
    /// # Errors
    /// As [`Listener::wait`].
    pub(super) fn heard(&mut self) -> Result<Option<Instant>> {
        self.stop.cancel();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(heard)) => heard,
            Some(Err(_)) => Err(Error::new(Kind::Io, "the thread that follows the console panicked")),
            None => Ok(None),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.heard();
    }
}

/// The file of a console.
struct Console {
    path: PathBuf,
    file: File,
    changes: OwnedFd,
    text: String,
    /// The end of what was read, where the text may have begun.
    tail: Vec<u8>,
}

impl Console {
    fn open(ready: &ReadySerial) -> Result<Console> {
        let path = ready.console.as_path();
        let failed = |error: std::io::Error| {
            let kind = if error.kind() == ErrorKind::NotFound { Kind::Misuse } else { Kind::Io };
            Error::new(kind, format!("cannot follow the console {}", path.display()))
                .because(error)
                .hint("have QEMU write it to a file: -serial file:FILE")
        };
        // A FIFO or a terminal would be waited for, and what we read of it another would lack.
        let found = std::fs::metadata(path).map_err(failed)?;
        if !found.is_file() {
            let clause = format!("the console {} is no regular file", path.display());
            return Err(Error::new(Kind::Misuse, clause)
                .hint("have QEMU write it to a file as well: -chardev ...,logfile=FILE"));
        }
        let mut file = File::open(path).map_err(failed)?;
        let watch = || -> std::io::Result<OwnedFd> {
            let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            inotify::add_watch(&changes, path, inotify::WatchFlags::MODIFY)?;
            Ok(changes)
        };
        let changes = watch().map_err(failed)?;
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Console { path: path.to_owned(), file, changes, text: ready.text.clone(), tail: Vec::new() })
    }

    /// Reads what comes until the text is there, and says when it was.
    fn listen(mut self, process: Option<&OwnedFd>, stop: &Cancel) -> Result<Option<Instant>> {
        let heard = self.listen_until(process, stop);
        // Whoever waits for this thread waits for the switch.
        stop.cancel();
        heard
    }

    fn listen_until(&mut self, process: Option<&OwnedFd>, stop: &Cancel) -> Result<Option<Instant>> {
        let mut has_ended = false;
        loop {
            // Looked at after each wake-up, the last one included: what a QEMU said before its end counts.
            if self.says_it()? {
                return Ok(Some(Instant::now()));
            }
            if stop.is_cancelled() {
                return Ok(None);
            }
            if has_ended {
                let (console, text) = (self.path.display(), &self.text);
                let clause = format!("QEMU ended before its console {console} said `{text}`");
                return Err(Error::new(Kind::Peer, clause));
            }
            let mut fds = vec![PollFd::new(&self.changes, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
            fds.extend(process.map(|process| PollFd::new(process, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(cannot_read(&self.path, error.into())),
            }
            has_ended = fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
            drop(fds);
            self.forget_changes()?;
        }
    }

    /// Whether the text stands in what was written since the last look, or ends there.
    fn says_it(&mut self) -> Result<bool> {
        let mut chunk = vec![0; CHUNK];
        loop {
            match self.file.read(&mut chunk) {
                Ok(0) => return Ok(false),
                Ok(len) => {
                    if completes(&mut self.tail, &chunk[..len], self.text.as_bytes()) {
                        return Ok(true);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(cannot_read(&self.path, error)),
            }
        }
    }

    fn forget_changes(&self) -> Result<()> {
        let mut events = [0u8; 4096];
        match rustix::io::read(&self.changes, &mut events) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(cannot_read(&self.path, error.into())),
        }
    }
}

fn cannot_read(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("cannot read the console {}", path.display()), error)
}

/// Whether `text` stands in `tail` and `chunk` together; if not, as much is kept in `tail` as the text may begin in.
fn completes(tail: &mut Vec<u8>, chunk: &[u8], text: &[u8]) -> bool {
    tail.extend_from_slice(chunk);
    if tail.windows(text.len()).any(|window| window == text) {
        return true;
    }
    tail.drain(..tail.len().saturating_sub(text.len() - 1));
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_and_a_text_are_told_apart_by_the_first_colon() {
        for (words, console, text) in
            [("serial.log:login", "serial.log", "login"), ("/a b/c:d: e", "/a b/c", "d: e")]
        {
            let found: ReadySerial = words.parse().unwrap();
            assert_eq!((found.console.to_str(), found.text.as_str()), (Some(console), text));
        }
        for (words, clause) in [
            ("serial.log", "no colon between the file and the text"),
            (":login", "no file before the colon"),
            ("serial.log:", "no text after the colon"),
            ("a:two\nlines", "the text is more than one line"),
            (&format!("a:{}", "x".repeat(1025)), "the text has more than 1024 bytes"),
        ] {
            let error = words.parse::<ReadySerial>().unwrap_err();
            assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Misuse, clause));
        }
    }

    #[test]
    fn a_text_is_found_however_it_is_cut() {
        let said = b"aab aabaac login: ";
        for text in ["aabaac", "login: ", "a", " "] {
            for step in 1..=said.len() {
                let mut tail = Vec::new();
                let found = said.chunks(step).any(|chunk| completes(&mut tail, chunk, text.as_bytes()));
                assert!(found, "{text:?} in pieces of {step}");
                assert!(tail.len() <= said.len());
            }
        }
        let mut tail = Vec::new();
        assert!(!said.chunks(3).any(|chunk| completes(&mut tail, chunk, b"logout")));
        assert_eq!(tail, b"gin: ");
    }

    /// A console that has said something already.
    fn console(text: &str) -> (tempfile::NamedTempFile, ReadySerial) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"ready before\n").unwrap();
        let ready = ReadySerial { console: file.path().to_owned(), text: text.to_owned() };
        (file, ready)
    }

    #[test]
    fn only_what_comes_after_the_beginning_is_heard() {
        let cancel = Cancel::new().unwrap();
        let (mut file, ready) = console("ready");
        let begun = Instant::now();
        let listener = Listener::start(&ready, Some(std::process::id())).unwrap();
        file.write_all(b"not yet rea").unwrap();
        file.write_all(b"dy").unwrap();
        let heard = listener.wait(&cancel).unwrap().unwrap();
        assert!(heard >= begun && heard <= Instant::now());

        let mut listener = Listener::start(&ready, None).unwrap();
        assert_eq!(listener.heard().unwrap(), None, "it was said before");
    }

    #[test]
    fn a_wait_ends_with_the_switch_and_with_qemu() {
        let (_file, ready) = console("never");
        let cancel = Cancel::new().unwrap();
        let listener = Listener::start(&ready, None).unwrap();
        cancel.cancel();
        assert_eq!(listener.wait(&cancel).unwrap(), None);

        let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let listener = Listener::start(&ready, Some(process.id())).unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        let error = listener.wait(&Cancel::new().unwrap()).unwrap_err();
        assert_eq!(error.kind(), Kind::Peer);
        let clause = format!("QEMU ended before its console {} said `never`", ready.console.display());
        assert_eq!(error.to_string(), clause);
    }

    #[test]
    fn what_is_no_file_that_grows_is_refused() {
        for (path, clause) in [
            ("/no/such/console", "cannot follow the console /no/such/console"),
            ("/dev/null", "the console /dev/null is no regular file"),
            ("/tmp", "the console /tmp is no regular file"),
        ] {
            let ready = ReadySerial { console: path.into(), text: "x".to_owned() };
            let error = Listener::start(&ready, None).unwrap_err();
            assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Misuse, clause));
        }
    }
}
