//! The one error type of the library: what happened, whose fault it is, and what mends it.

use std::error::Error as StdError;
use std::fmt;
use std::path::Path;

/// Whose fault a failure is; a caller may match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The image's bytes contradict themselves or its format.
    Damaged,
    /// The image or the guest has something that this version does not handle.
    Unsupported,
    /// QEMU, or whoever is at the other end, refused or broke the protocol.
    Peer,
    /// Image and target do not fit each other.
    Incompatible,
    /// The operating system refused.
    Io,
    /// The caller cancelled.
    Interrupted,
    /// The caller asked for something that makes no sense.
    Misuse,
}

impl Kind {
    /// The name of the kind as it appears in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Damaged => "damaged",
            Kind::Unsupported => "unsupported",
            Kind::Peer => "peer",
            Kind::Incompatible => "incompatible",
            Kind::Io => "io",
            Kind::Interrupted => "interrupted",
            Kind::Misuse => "misuse",
        }
    }
}

/// A failure: one clause, a kind, perhaps a hint that mends it, perhaps a source.
///
/// `Display` gives the clause alone; the source is in the chain and is not repeated.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    clause: String,
    hint: Option<String>,
    refusal: bool,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The result of everything that can fail here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` that says `clause`.
    pub fn new(kind: Kind, clause: impl Into<String>) -> Error {
        Error(Box::new(Inner { kind, clause: clause.into(), hint: None, refusal: false, source: None }))
    }

    /// The operating system's refusal of what `clause` names.
    pub fn io(clause: impl Into<String>, source: impl Into<std::io::Error>) -> Error {
        let source = source.into();
        let hint = room_hint(&source);
        Error::new(Kind::Io, clause).because(source).hint_if(hint)
    }

    /// The error of ours that was put into one of the system's on its way through a reader or writer; the system's
    /// own as it is.
    pub(crate) fn from_within(error: std::io::Error) -> std::result::Result<Error, std::io::Error> {
        if error.get_ref().is_some_and(|inner| inner.is::<Error>()) {
            match error.into_inner().map(|inner| inner.downcast::<Error>()) {
                Some(Ok(ours)) => return Ok(*ours),
                Some(Err(other)) => return Err(std::io::Error::other(other)),
                None => return Err(std::io::ErrorKind::Other.into()),
            }
        }
        match error.get_ref().and_then(|inner| inner.downcast_ref::<io::LaneError>()) {
            Some(lanes) => Ok(Error::from(lanes.clone())),
            None => Err(error),
        }
    }

    /// Names the file of a write that failed in a lane, which knows of descriptors alone.
    pub(crate) fn of_file(mut self, path: &Path) -> Error {
        let lanes = self.0.source.as_ref().and_then(|source| source.downcast_ref::<io::LaneError>());
        if let Some(io::LaneError::Write { .. } | io::LaneError::DirectRefused { .. }) = lanes {
            self.0.clause = format!("cannot write {}", path.display());
        }
        self
    }

    /// QEMU's refusal of a command, in its own words; it goes on all the same.
    pub(crate) fn refusal(clause: impl Into<String>) -> Error {
        let mut error = Error::new(Kind::Peer, clause);
        error.0.refusal = true;
        error
    }

    /// Whether QEMU was there and refused, rather than being gone or out of its mind.
    pub fn is_refusal(&self) -> bool {
        self.0.refusal
    }

    /// The caller's wish to stop.
    pub fn interrupted() -> Error {
        Error::new(Kind::Interrupted, "interrupted")
    }

    /// Adds what led to it.
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// Adds what mends it, a whole phrase in the imperative.
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.0.hint = Some(hint.into());
        self
    }

    fn hint_if(self, hint: Option<&'static str>) -> Error {
        match hint {
            Some(hint) => self.hint(hint),
            None => self,
        }
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What mends it, where that is known.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The clause and those of its sources, joined by colons.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.clause)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

impl From<io::DraftError> for Error {
    fn from(error: io::DraftError) -> Error {
        use io::DraftError as E;
        match &error {
            E::Exists { .. } => {
                Error::new(Kind::Misuse, error.to_string()).hint("give another name, or --overwrite")
            }
            E::NotAFile { .. } => Error::new(Kind::Misuse, error.to_string()).hint(NAME_HINT),
            E::Unsupported { .. } => Error::new(Kind::Unsupported, error.to_string()).hint(NAME_HINT),
            E::Occupied { .. } => Error::new(Kind::Misuse, error.to_string())
                .hint("give --overwrite if what is there may go, or another place"),
            E::Held { .. } => Error::new(Kind::Misuse, error.to_string())
                .hint("give another place, or end the guests that were restored from it by --mode map"),
            E::TooSmall { .. } => {
                Error::new(Kind::Misuse, error.to_string()).hint("give a larger one, or save to a file")
            }
            E::NotForThis { .. } => Error::new(Kind::Misuse, error.to_string()),
            E::NoDirectIo { .. } => Error::new(Kind::Unsupported, error.to_string())
                .hint("leave --direct-io at auto, or save to a file system that has it"),
            E::Io { .. } => {
                let clause = error.to_string();
                match error {
                    E::Io { source, .. } if source.kind() == std::io::ErrorKind::Interrupted => {
                        Error::interrupted()
                    }
                    E::Io { step, source, .. } => {
                        let hint = target_hint(step, source.kind());
                        let error = Error::io(clause, source);
                        match hint {
                            Some(hint) => error.hint(hint),
                            None => error,
                        }
                    }
                    _ => Error::new(Kind::Io, clause),
                }
            }
        }
    }
}

impl From<io::LaneError> for Error {
    fn from(error: io::LaneError) -> Error {
        if matches!(error, io::LaneError::Cancelled) {
            return Error::interrupted();
        }
        let hint = system_error(&error).and_then(room_hint);
        Error::new(Kind::Io, "the guest's memory could not be written").because(error).hint_if(hint)
    }
}

impl From<io::OutflowError> for Error {
    fn from(error: io::OutflowError) -> Error {
        let error = match error {
            io::OutflowError::Cancelled => return Error::interrupted(),
            // A lane, or whatever else the bytes go through, has its own words.
            io::OutflowError::Write { path, offset, len, source } => match Error::from_within(source) {
                Ok(error) => return error,
                Err(source) => io::OutflowError::Write { path, offset, len, source },
            },
            error => error,
        };
        let hint = system_error(&error).and_then(room_hint);
        Error::new(Kind::Io, "the stream could not be written").because(error).hint_if(hint)
    }
}

const NAME_HINT: &str = "give the name of a file that is not there yet";

/// What mends a target that cannot be made.
fn target_hint(step: io::DraftStep, kind: std::io::ErrorKind) -> Option<&'static str> {
    use std::io::ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem};
    match (step, kind) {
        (io::DraftStep::OpenDirectory, NotFound) => {
            Some("create the directory first, or save to another one")
        }
        (_, ReadOnlyFilesystem) => Some("save to a file system that can be written"),
        (io::DraftStep::SetOwner, PermissionDenied) => {
            Some("only root gives files away: run vmstate as root")
        }
        (io::DraftStep::Open, std::io::ErrorKind::ResourceBusy) => {
            Some("it is mounted or used otherwise: give one that is not")
        }
        (_, PermissionDenied) => Some("save to a directory that you may write, or run vmstate as root"),
        _ => None,
    }
}

pub(crate) const FULL_HINT: &str = "the file system is full: free some space, or save to another one";

const LIMIT_HINT: &str = "files may not be so large here: raise the limit of this process (ulimit -f), or save to another \
    file system";

/// The operating system's own error at the end of a chain.
fn system_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a std::io::Error> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(found) = error.downcast_ref::<std::io::Error>() {
            return Some(found);
        }
        if let Some(found) = error.downcast_ref::<std::sync::Arc<std::io::Error>>() {
            return Some(found);
        }
        at = error.source();
    }
    None
}

/// What to do where there is no room for what is written.
fn room_hint(error: &std::io::Error) -> Option<&'static str> {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    match error.kind() {
        StorageFull | QuotaExceeded => Some(FULL_HINT),
        FileTooLarge => Some(LIMIT_HINT),
        _ => None,
    }
}
