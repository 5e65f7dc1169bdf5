//! A save that is not made: everything that can be found out without stopping the guest.

use std::time::Duration;

use io::{Cancel, Target, TargetKind};

use super::{SaveFormat, SaveSettings, direct, draft_options, refuse_impossible, refuse_states, room};
use crate::job::{Observer, Stopwatch, Via};
use crate::qemu::{self, Session};
use crate::{Error, Kind, Result};

/// What a save would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rehearsal {
    /// Who would carry the RAM: never [`Via::Auto`].
    pub via: Via,
    /// Why `auto` would not take the direct way, where it would not.
    pub reason: Option<String>,
    /// The format that the image would have.
    pub format: SaveFormat,
    /// The length of all RAM in bytes.
    pub ram_bytes: u64,
    /// The most that would be written, in bytes: the pages that are there, zero or not, and the metadata. Of the
    /// gaps between pages short ones are written along, which is not counted.
    pub bytes_max: u64,
    /// The room at the target in bytes; `None` where nothing limits it.
    pub room_bytes: Option<u64>,
    /// Whether a save would go ahead as far as room is concerned.
    pub fits: bool,
    /// Whether pages would bypass the page cache.
    pub direct_io: bool,
    /// Why they would not, where that is not plain.
    pub direct_io_reason: Option<String>,
    /// What a short trial says of the time that it would take at the most; `None` where none was made.
    pub expected: Option<Duration>,
}

/// Finds out what [`super::save()`] would do with these settings. The guest runs on, and nothing is left behind.
///
/// What a killed save has left in QEMU is said and stays there: only a save clears it.
///
/// A pipe is not opened: its reader would take that for a stream that has begun.
///
/// # Errors
/// Those of a save that would fail before it stops the guest, but for a lack of room, which is in the answer.
pub fn rehearse(settings: &SaveSettings, cancel: &Cancel, observer: &dyn Observer) -> Result<Rehearsal> {
    let kind = TargetKind::of(&settings.image, settings.offset)?;
    let mut watch = Stopwatch::start(observer);
    watch.phase("connect");
    let (format, envelope) = super::envelope::choose(settings, kind, cancel, observer)?;
    refuse_impossible(settings, kind, format)?;
    let mut target = match kind {
        TargetKind::Pipe => None,
        _ => Some(Target::open(&settings.image, settings.offset, draft_options(settings), cancel)?),
    };
    if let (Some(target), Some(envelope)) = (&mut target, &envelope) {
        target.reserve(envelope.len());
    }
    let mut session = crate::job::resume::open_for_rehearsal(&settings.qmp, cancel, observer)?;
    session.client.timeout = settings.timeout;
    let outcome = look(settings, &mut session, kind, format, target.as_mut(), &mut watch);
    watch.phase("settle");
    let settled = session.settle();
    let found = outcome?;
    settled?;
    Ok(found)
}

fn look(
    settings: &SaveSettings,
    session: &mut Session,
    kind: TargetKind,
    format: SaveFormat,
    mut target: Option<&mut Target>,
    watch: &mut Stopwatch<'_>,
) -> Result<Rehearsal> {
    refuse_states(&session.client.status()?)?;
    watch.phase("probe");
    let (prepared, reason) = super::choose(settings, session, None, kind, format, watch.observer)?;
    let ram_bytes = match &prepared {
        Some(ready) => (0..ready.ram.regions()).map(|region| ready.ram.block(region).length).sum(),
        None => qemu::host_blocks(&mut session.client)?.iter().map(|block| block.used_length).sum(),
    };
    let (via, pages, beside) = match &prepared {
        Some(ready) => {
            (Via::Direct, room::present_bytes(&ready.ram)?, room::metadata_bytes(&ready.ram, format))
        }
        None => (Via::Qemu, ram_bytes, 0),
    };
    let mut rates = None;
    let mut fits = true;
    let mut room_bytes = None;
    if let Some(target) = target.as_deref_mut() {
        room_bytes = target.room_bytes()?;
        fits = match &prepared {
            Some(ready) => match direct::require_room(ready, pages, target, format) {
                Ok(()) => true,
                Err(error) if is_lack_of_room(&error) => false,
                Err(error) => return Err(error),
            },
            // What QEMU will find to be zero is not known.
            None => room_bytes.is_none_or(|room| pages <= room),
        };
        rates = room::settle_direct_io(settings, target, pages, watch.observer)?;
    }
    let direct_io = target.as_deref().is_some_and(|target| target.direct().is_some());
    Ok(Rehearsal {
        via,
        reason,
        format,
        ram_bytes,
        bytes_max: pages + beside,
        room_bytes,
        fits,
        direct_io,
        direct_io_reason: target.as_deref().and_then(super::why_not_direct),
        // How long it takes to compress is not tried.
        expected: rates.filter(|_| !format.is_compressed()).map(|rates| {
            let rate = if direct_io { rates.direct_bytes_per_s } else { rates.buffered_bytes_per_s };
            let rate = settings.rate_max.map_or(rate, |max| rate.min(max.bytes_per_s().get()));
            Duration::from_secs_f64(pages as f64 / rate.max(1) as f64)
        }),
    })
}

/// A target that is too small is an answer here, not a failure.
fn is_lack_of_room(error: &Error) -> bool {
    use std::error::Error as _;
    let full = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
    error.kind() == Kind::Misuse
        || full.is_some_and(|source| source.kind() == std::io::ErrorKind::StorageFull)
}
