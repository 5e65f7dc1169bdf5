//! Starting a QEMU that waits for a guest, on the command line that the guest was saved from.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;

use io::Cancel;
use mem::{Output, Program};
use rustix::fs::MemfdFlags;

use crate::qmp::{CLOSED_HINT, Client};
use crate::{Error, Kind, Result};

/// The id of the monitor that vmstate adds.
const MONITOR: &str = "vmstate-qmp";
/// How much of QEMU's messages is shown when it fails.
const MESSAGES_LEN_MAX: u64 = 4096;

/// What to start.
#[derive(Debug)]
pub struct LaunchSettings<'a> {
    /// The program and its arguments.
    pub command: &'a [OsString],
    /// Where its messages go; kept in memory where nothing is named.
    pub log: Option<&'a Path>,
    /// Whether it shares our terminal, standard streams and session.
    pub foreground: bool,
    /// A descriptor that it gets under the number that it has here, and keeps.
    pub pass: Option<OwnedFd>,
}

/// A QEMU that was started here. Dropping it leaves it running.
#[derive(Debug)]
pub struct Launched {
    child: Child,
    messages: Option<File>,
    user_qmp: Option<String>,
    foreground: bool,
    /// Whether the caller's arguments ask for a guest that stays paused.
    pub wants_pause: bool,
}

/// Starts QEMU with what a restore needs added: `-S`, `-incoming defer`, and a monitor of our own on a
/// socket pair, so that no path is made and nobody else can connect.
///
/// A detached QEMU has its own session, reads nothing, writes its messages to the log, and inherits none of
/// our descriptors but its end of the pair and what it is to keep.
///
/// # Errors
/// [`Kind::Misuse`] for arguments that cannot go together with a restore; [`Kind::Io`] where the program
/// cannot be started; [`Kind::Peer`], with QEMU's own messages, where it ends at once.
pub fn launch(settings: LaunchSettings<'_>, cancel: &Cancel) -> Result<(Client, Launched)> {
    let Some((program, args)) = settings.command.split_first() else {
        return Err(Error::new(Kind::Misuse, "no QEMU to start")
            .hint("give its command line: vmstate restore IMAGE -- qemu-system-x86_64 ..."));
    };
    refuse_arguments(args)?;
    let (ours, theirs) =
        UnixStream::pair().map_err(|error| Error::io("cannot create a socket pair", error))?;
    let theirs = OwnedFd::from(theirs);
    let mut all = args.to_vec();
    all.extend(
        [
            "-S",
            "-incoming",
            "defer",
            "-chardev",
            &format!("socket,id={MONITOR},fd={}", theirs.as_raw_fd()),
            "-mon",
            &format!("chardev={MONITOR},mode=control"),
        ]
        .map(OsString::from),
    );
    let start = Program {
        path: program.clone(),
        args: all,
        pass: [theirs].into_iter().chain(settings.pass).collect(),
    };
    let cannot = |error: std::io::Error| {
        Error::io(format!("cannot start {}", program.display()), error)
            .hint("name the QEMU to start by its path, or install it")
    };
    let (child, messages) = if settings.foreground {
        (start.spawn_foreground().map_err(cannot)?, None)
    } else {
        let messages = open_log(settings.log)?;
        let copy = || messages.try_clone().map_err(|error| Error::io("cannot duplicate a descriptor", error));
        let output = Output { stdout: Some(copy()?), stderr: Some(copy()?) };
        (start.spawn_detached(output).map_err(cannot)?, Some(messages))
    };
    let launched = Launched {
        child,
        messages,
        user_qmp: user_qmp(args),
        foreground: settings.foreground,
        wants_pause: args.iter().any(|arg| arg == "-S" || arg == "--S"),
    };
    match Client::from_socket(ours, "the QEMU that was started", cancel) {
        Ok(client) => Ok((client, launched)),
        Err(error) => Err(launched.give_up(error)),
    }
}

impl Launched {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The monitor among the caller's own arguments, if there is one.
    pub fn user_qmp(&self) -> Option<String> {
        self.user_qmp.clone()
    }

    /// Lets it go on by itself; in the foreground the caller is to wait for it.
    pub fn leave(self) -> Option<Child> {
        self.foreground.then_some(self.child)
    }

    /// Ends it and adds its messages to the error that led to that.
    pub fn give_up(mut self, error: Error) -> Error {
        // It may have ended by itself, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        match self.messages() {
            Some(text) if error.kind() != Kind::Interrupted => {
                // Its messages are told here, so nobody has to be sent to look at them.
                let hint = error.hint_text().filter(|hint| *hint != CLOSED_HINT).map(str::to_owned);
                let hint = lock_hint(&text).or(hint);
                let error = Error::new(error.kind(), format!("{}; QEMU says: {text}", error.chain()));
                match hint {
                    Some(hint) => error.hint(hint),
                    None => error,
                }
            }
            _ => error,
        }
    }

    /// What it wrote last, on one line.
    fn messages(&mut self) -> Option<String> {
        let file = self.messages.as_mut()?;
        let len = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(MESSAGES_LEN_MAX))).ok()?;
        let mut bytes = Vec::new();
        file.take(MESSAGES_LEN_MAX).read_to_end(&mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }
}

/// What mends a disk that another QEMU still holds.
pub(crate) fn lock_hint(text: &str) -> Option<String> {
    // The words of QEMU's file-posix driver, and of its hint.
    let held = text.contains("Failed to get") && text.contains(" lock")
        || text.contains("Is another process using the image");
    held.then(|| {
        "the guest that was saved may still hold its disks: end it first (vmstate save --then quit)"
            .to_owned()
    })
}

fn open_log(log: Option<&Path>) -> Result<File> {
    match log {
        Some(path) => {
            File::options().create(true).truncate(true).read(true).write(true).open(path).map_err(|error| {
                Error::io(format!("cannot write QEMU's messages to {}", path.display()), error)
            })
        }
        // Unlike a pipe, it needs no reader: QEMU outlives us.
        None => rustix::fs::memfd_create("qemu-messages", MemfdFlags::CLOEXEC)
            .map(File::from)
            .map_err(|error| Error::io("cannot create a memfd", error)),
    }
}

/// Refuses what would work against a restore.
fn refuse_arguments(args: &[OsString]) -> Result<()> {
    for arg in args {
        let bytes = arg.as_bytes();
        let name = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-")).unwrap_or_default();
        let why = match name {
            b"incoming" => "vmstate adds -incoming itself",
            b"loadvm" => "the guest comes from the image",
            b"daemonize" => "vmstate leaves QEMU running in the background by itself",
            _ => continue,
        };
        return Err(Error::new(Kind::Misuse, format!("{} among QEMU's arguments", arg.display()))
            .hint(format!("leave it out: {why}")));
    }
    Ok(())
}

/// The first monitor for programs among the arguments: `-qmp ADDR`, as an address that vmstate takes.
fn user_qmp(args: &[OsString]) -> Option<String> {
    let address = args.windows(2).find_map(|pair| {
        let [option, value] = pair else { return None };
        let is_qmp =
            ["-qmp", "--qmp", "-qmp-pretty", "--qmp-pretty"].iter().any(|name| option == OsStr::new(name));
        is_qmp.then(|| value.to_string_lossy().into_owned())
    })?;
    let address = address.split(',').next().unwrap_or_default();
    // `stdio`, `pty` and the like cannot be connected to.
    match (address.strip_prefix("unix:"), address.strip_prefix("tcp:")) {
        (Some(path), _) => Some(path.strip_prefix("path=").unwrap_or(path).to_owned()),
        (None, Some(_)) => Some(address.to_owned()),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn the_users_own_monitor_is_found() {
        for (line, expected) in [
            ("-m 1G", None),
            ("-qmp unix:/run/vm.qmp,server=on,wait=off -m 1G", Some("/run/vm.qmp")),
            ("--qmp tcp:localhost:4444,server=on", Some("tcp:localhost:4444")),
            ("-qmp unix:path=/run/vm.qmp,server=on", Some("/run/vm.qmp")),
            ("-qmp stdio", None),
            ("-qmp", None),
        ] {
            assert_eq!(user_qmp(&args(line)).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn arguments_that_fight_a_restore_are_refused() {
        for line in ["-incoming defer", "--loadvm x", "-m 1G -daemonize"] {
            assert_eq!(refuse_arguments(&args(line)).unwrap_err().kind(), Kind::Misuse, "{line}");
        }
        assert!(refuse_arguments(&args("-S -m 1G -name incoming")).is_ok());
    }
}
