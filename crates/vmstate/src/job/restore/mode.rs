//! When the guest's memory comes: before it runs, or as it asks for it.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;

use super::map::{self, Share};
use super::{RestoreSettings, Seen, Target, Via, in_use, lazy};
use crate::job::Observer;
use crate::qemu::{Session, map_arguments};
use crate::source::{Image, MappedRamFile};
use crate::{Error, Kind, Result};

/// Images with no more data than this are read as a whole, if nobody says otherwise: that takes some tenths of
/// a second, and leaves no tie between the guest and a file.
const SMALL_BYTES: u64 = 256 << 20;

/// Why `auto` reads an image as a whole.
const SMALL: &str = "the image is small";
const CACHED: &str = "the image is in the page cache";

// linux/magic.h: file systems whose files lie on another machine, or with another program.
const REMOTE: [u64; 8] =
    [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x517b, 0x6573_5546, 0x00c3_6400, 0x0102_1997, 0x5346_414f];

/// When the guest's memory comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// As is best for the image and the target; the report says which it was and why.
    Auto,
    /// Before the guest runs.
    Eager,
    /// When the guest asks for it: its RAM is a private mapping of the image.
    Map,
    /// When the guest asks for it, and all of it in the background: when the restore is over, the guest is an
    /// ordinary one with no tie to the image.
    Lazy,
}

impl Mode {
    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Auto => "auto",
            Mode::Eager => "eager",
            Mode::Map => "map",
            Mode::Lazy => "lazy",
        }
    }
}

/// The mode that a restore takes, and what it needs for it.
#[derive(Debug)]
pub(super) struct Plan {
    /// [`Mode::Auto`] only for a target that waits: what it can do is seen when it is there.
    pub(super) mode: Mode,
    /// Why, where it was not asked for.
    pub(super) reason: Option<String>,
    /// The command line that maps the image, and the description that it names.
    pub(super) mapped: Option<(Vec<OsString>, File)>,
    /// Why `auto` has all of the memory come first where the target does not map the image.
    whole: Option<&'static str>,
}

impl Plan {
    fn asked(mode: Mode) -> Plan {
        Plan { mode, reason: None, mapped: None, whole: None }
    }

    /// The plan of `auto` for a target that cannot map the image: on demand, if it takes that.
    pub(super) fn unmapped(reason: impl Into<String>) -> Plan {
        Plan { reason: Some(reason.into()), ..Plan::asked(Mode::Auto) }
    }

    /// The plan to read everything first, for this reason.
    pub(super) fn eager(reason: impl Into<String>, observer: &dyn Observer) -> Plan {
        let reason = reason.into();
        observer.note(&format!("mode eager: {reason}"));
        Plan { reason: Some(reason), ..Plan::asked(Mode::Eager) }
    }

    /// Looks at the target that is there now, and says what it does with the image. `whole` is what else speaks
    /// against a guest that runs before its memory has come.
    ///
    /// # Errors
    /// As [`map::shares`] and [`lazy::prepare`], where the mode was asked for.
    pub(super) fn settle(
        &mut self,
        image: &Image,
        session: &mut Session,
        seen: &mut Seen,
        pid: Option<u32>,
        whole: Option<&'static str>,
        observer: &dyn Observer,
    ) -> Result<Settled> {
        let Image::MappedRam(image) = image else { return Ok(Settled::Whole) };
        match self.mode {
            Mode::Eager => return Ok(Settled::Whole),
            Mode::Lazy => {
                return lazy::prepare(image, session, &seen.blocks, pid, observer).map(Settled::OnDemand);
            }
            Mode::Map | Mode::Auto => {}
        }
        if self.reason.is_none() || self.mode == Mode::Map {
            match self.share(image, session, seen, pid, observer) {
                Ok(shares) => return Ok(Settled::Mapped(shares)),
                Err(error) if self.mode == Mode::Auto && error.kind() == Kind::Unsupported => {
                    self.reason = Some(error.chain());
                }
                Err(error) => return Err(error),
            }
        }
        let unmapped = self.reason.take().unwrap_or_default();
        if let Some(why) = self.whole {
            *self = Plan::eager(why, observer);
            return Ok(Settled::Whole);
        }
        if let Some(why) = whole {
            *self = Plan::eager(format!("{unmapped}; {why}"), observer);
            return Ok(Settled::Whole);
        }
        match lazy::prepare(image, session, &seen.blocks, pid, observer) {
            Ok(prepared) => {
                let reason = format!("the image is large and not cached; {unmapped}");
                observer.note(&format!("mode lazy: {reason}"));
                *self = Plan { reason: Some(reason), ..Plan::asked(Mode::Lazy) };
                Ok(Settled::OnDemand(prepared))
            }
            Err(error)
                if error.is_refusal() || matches!(error.kind(), Kind::Unsupported | Kind::Incompatible) =>
            {
                *self = Plan::eager(format!("{unmapped}; {}", error.chain()), observer);
                Ok(Settled::Whole)
            }
            Err(error) => Err(error),
        }
    }

    /// What a stream has to carry where the target's memory is the image.
    fn share(
        &mut self,
        image: &MappedRamFile,
        session: &mut Session,
        seen: &mut Seen,
        pid: Option<u32>,
        observer: &dyn Observer,
    ) -> Result<Vec<Share>> {
        let shares = map::shares(image, session, seen, pid)?;
        if self.mode == Mode::Auto {
            self.reason = Some("the target's memory is a mapping of the image".to_owned());
            observer.note("mode map: the target's memory is a mapping of the image");
        }
        self.mode = Mode::Map;
        Ok(shares)
    }
}

/// What a target does with an image.
pub(super) enum Settled {
    /// It takes all of it before the guest runs.
    Whole,
    /// It lives from it; the stream carries what is said here.
    Mapped(Vec<Share>),
    /// It asks for it.
    OnDemand(lazy::Prepared),
}

/// Chooses the mode, before there is a target.
///
/// # Errors
/// [`Kind::Unsupported`] and [`Kind::Incompatible`] where the image is to be mapped and cannot be;
/// [`Kind::Misuse`] for settings that do not go together.
pub(super) fn plan(
    settings: &RestoreSettings,
    image: &Image,
    data_bytes: u64,
    is_cached: bool,
    observer: &dyn Observer,
) -> Result<Plan> {
    let eager = |reason: &str| Ok(Plan::eager(reason, observer));
    let mapped = match settings.mode {
        Mode::Eager => return Ok(Plan::asked(Mode::Eager)),
        Mode::Lazy if settings.via != Via::Auto => {
            return Err(Error::new(Kind::Misuse, "--mode lazy together with --via")
                .hint("leave --via out: vmstate carries the RAM of a lazy restore"));
        }
        Mode::Lazy => match image {
            Image::MappedRam(_) => return Ok(Plan::asked(Mode::Lazy)),
            Image::Stream(_) => return Err(refuse_stream()),
        },
        Mode::Map if settings.via != Via::Auto => {
            return Err(Error::new(Kind::Misuse, "--mode map together with --via")
                .hint("leave --via out: nobody carries the RAM of a mapped image"));
        }
        Mode::Map => match image {
            Image::MappedRam(image) => image,
            Image::Stream(_) => return Err(refuse_stream()),
        },
        Mode::Auto => match image {
            Image::Stream(_) => return eager("the pages of a stream lie amid its records"),
            Image::MappedRam(_) if settings.via != Via::Auto => return eager("--via says who reads it"),
            Image::MappedRam(image) => match settings.target {
                // What it maps it maps already.
                Target::Waiting(_) => {
                    let whole = match (data_bytes <= SMALL_BYTES, is_cached) {
                        (true, _) => Some(SMALL),
                        (false, true) => Some(CACHED),
                        (false, false) => None,
                    };
                    return Ok(Plan { whole, ..Plan::asked(Mode::Auto) });
                }
                Target::Launch { .. } if data_bytes <= SMALL_BYTES => return eager(SMALL),
                Target::Launch { .. } if is_cached => return eager(CACHED),
                Target::Launch { .. } if is_remote(image) => {
                    return Ok(Plan::unmapped(
                        "it lies on another machine, which the guest would depend on for ever",
                    ));
                }
                Target::Launch { .. } => image,
            },
        },
    };
    let Target::Launch { command, .. } = &settings.target else { return Ok(Plan::asked(settings.mode)) };
    match rewrite(mapped, command, observer) {
        Ok(rewritten) => {
            let reason =
                (settings.mode == Mode::Auto).then(|| "the image is large and not cached".to_owned());
            if let Some(reason) = &reason {
                observer.note(&format!("mode map: {reason}"));
            }
            Ok(Plan { reason, mapped: Some(rewritten), ..Plan::asked(Mode::Map) })
        }
        Err(error) if settings.mode == Mode::Auto && error.kind() != Kind::Io => {
            Ok(Plan::unmapped(error.chain()))
        }
        Err(error) => Err(error),
    }
}

/// Why a stream is neither mapped nor read on demand.
pub(super) fn refuse_stream() -> Error {
    Error::new(Kind::Unsupported, "the pages of a stream lie amid its records")
        .hint("restore with --mode eager, or save in the format mapped-ram")
}

/// The command line that maps the image by a descriptor, and that descriptor.
fn rewrite(
    image: &MappedRamFile,
    command: &[OsString],
    observer: &dyn Observer,
) -> Result<(Vec<OsString>, File)> {
    let blocks = map::candidates(image)?;
    let held = in_use::while_mapped(image, observer)?;
    // By its descriptor: whatever the image's name stands for by then, it is the file that was checked.
    let path = format!("/proc/self/fd/{}", held.as_raw_fd());
    let rewritten = map_arguments(command, &blocks, &path)?;
    for note in &rewritten.notes {
        observer.note(note);
    }
    Ok((rewritten.command, held))
}

/// Whether the image's file comes from another machine or program, which may be gone while the guest runs.
fn is_remote(image: &MappedRamFile) -> bool {
    #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
    rustix::fs::fstatfs(image.file()).is_ok_and(|found| REMOTE.contains(&(found.f_type as u32 as u64)))
}
