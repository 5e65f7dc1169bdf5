//! What can go wrong around a QEMU of ours.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// The result of everything in this crate that touches the system.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the lab could not do it. Where a QEMU was running, what it wrote to stderr is part of the message: it is
/// nearly always the reason.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of the lab could not be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A program could not be started at all.
    #[error("cannot start {}", program.display())]
    Start {
        /// The program as it was named.
        program: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A program of the lab failed.
    #[error("{} failed with {status}: {stderr}", program.display())]
    Program {
        /// The program as it was named.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to stderr.
        stderr: String,
    },
    /// QEMU ended while something was expected of it.
    #[error("QEMU ended with {status} while waiting for {awaited}: {stderr}")]
    Ended {
        /// What was expected.
        awaited: String,
        /// How it ended.
        status: ExitStatus,
        /// What QEMU wrote to stderr.
        stderr: String,
    },
    /// Nothing happened within the deadline.
    #[error("no {awaited} within {deadline:?}; the console says `{console}`, QEMU says `{stderr}`")]
    Deadline {
        /// What was expected.
        awaited: String,
        /// How long it was waited for.
        deadline: Duration,
        /// The last lines of the guest's console, if it was one that was waited for.
        console: String,
        /// What QEMU wrote to stderr.
        stderr: String,
    },
    /// The guest found a page that did not hold what it had written there.
    #[error("the guest reports that page {page:#x} does not hold what it wrote, after round {round}")]
    GuestFault {
        /// The guest-physical page number.
        page: u64,
        /// The last round it had finished.
        round: u32,
    },
    /// Something that the set-up script provides is missing.
    #[error("{} is missing; hint: run scripts/setup.sh", path.display())]
    Asset {
        /// The missing file.
        path: PathBuf,
    },
    /// The system refused a call that has no file.
    #[error("cannot {action}")]
    System {
        /// What was tried, as a verb.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// Adapts an I/O error on `path`; for `map_err`.
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::File { action, path, source }
    }
}
