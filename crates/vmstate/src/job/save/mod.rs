//! Save: a running guest becomes one image, complete and durable, or nothing at all.

mod direct;
mod envelope;
mod managed;
mod rehearsal;
mod room;
pub(super) use self::room::why_not_direct as why_not_direct_at;
mod via_qemu;
mod writing;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use io::{Cancel, DraftOptions, Owner, Replaced, Target, TargetKind};

use wire::libvirt::PayloadFormat;

pub use self::envelope::managed_image;
pub use self::managed::{ManagedSaveReport, ManagedSaveSettings, save_managed};
pub use self::rehearsal::{Rehearsal, rehearse};

use super::{DirectIo, Observer, Phases, Stopwatch, Via, anonymous_memory_bytes};
use crate::job::Record;
use crate::net::QmpAddress;
use crate::qemu::{self, Session};
use crate::qmp::{self, Client, RunStatus};
use crate::sink::Envelope;
use crate::{Error, Kind, Rate, Result};

/// The most channels; QEMU's own limit for multifd.
pub const CHANNELS_MAX: u16 = 255;

/// What becomes of the guest after a save that succeeded. One that failed always leaves it as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It stays paused.
    Pause,
    /// It runs on, if it ran before.
    Resume,
    /// QEMU ends.
    Quit,
}

/// The format of an image to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveFormat {
    /// Pages at fixed offsets: written and read in parallel.
    MappedRam,
    /// One record after the other, as QEMU writes it into a pipe: every QEMU reads it.
    Stream,
    /// Either of them behind what libvirt needs to restore the domain: mapped-ram for [`PayloadFormat::Sparse`], a
    /// stream for [`PayloadFormat::Raw`], and one that is compressed on its way for the others.
    Libvirt(PayloadFormat),
}

impl SaveFormat {
    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            SaveFormat::MappedRam => "mapped-ram",
            SaveFormat::Stream => "stream",
            SaveFormat::Libvirt(PayloadFormat::Raw) => "libvirt-raw",
            SaveFormat::Libvirt(PayloadFormat::Gzip) => "libvirt-gzip",
            SaveFormat::Libvirt(PayloadFormat::Bzip2) => "libvirt-bzip2",
            SaveFormat::Libvirt(PayloadFormat::Xz) => "libvirt-xz",
            SaveFormat::Libvirt(PayloadFormat::Lzop) => "libvirt-lzop",
            SaveFormat::Libvirt(PayloadFormat::Zstd) => "libvirt-zstd",
            SaveFormat::Libvirt(PayloadFormat::Sparse) => "libvirt-sparse",
        }
    }

    /// Whether its pages have places of their own, so that they are written in parallel and past the page cache.
    pub fn has_places(self) -> bool {
        matches!(self, SaveFormat::MappedRam | SaveFormat::Libvirt(PayloadFormat::Sparse))
    }

    /// Whether it is compressed, so that nobody knows how long it will be.
    pub fn is_compressed(self) -> bool {
        matches!(self, SaveFormat::Libvirt(payload) if payload.is_compressed())
    }
}

/// How QEMU is asked for the state of the devices when vmstate carries the RAM itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceStateBy {
    /// By the command; by a migration only where QEMU lacks that, and the guest's memory lets it.
    Auto,
    /// By `xen-save-devices-state`, which leaves the guest as it is and describes nothing.
    Command,
    /// By a migration with `x-ignore-shared`, with QEMU's own description of every field. The guest's memory has to be
    /// shared files that were given by name, and QEMU is in `postmigrate` afterwards.
    Migration,
}

/// What to save, where to, and how.
#[derive(Clone, Debug)]
pub struct SaveSettings {
    /// The guest's monitor.
    pub qmp: QmpAddress,
    /// The image to be: a file's name, a block device, a FIFO, or `-` for the standard output.
    pub image: PathBuf,
    /// The format; `None` takes mapped-ram, and a stream for what has no offsets.
    pub format: Option<SaveFormat>,
    /// Where in a file that is there the image starts. It is written in place then: what the file has before
    /// stays, what it has behind is lost, and there is no way back.
    pub offset: Option<u64>,
    /// Who carries the RAM.
    pub via: Via,
    /// How QEMU is asked for the state of the devices; of no account where QEMU carries the RAM.
    pub device_state: DeviceStateBy,
    /// How many channels write; `None` leaves it to vmstate.
    pub channels: Option<u16>,
    /// Whether pages bypass the page cache.
    pub direct_io: DirectIo,
    /// How many bytes of pages a second are written at the most, by whoever writes; `None` is no limit.
    pub rate_max: Option<Rate>,
    /// What becomes of the guest.
    pub then: Then,
    /// The state that a restore brings the guest to.
    pub record: Record,
    /// Whether an image of that name may be replaced, or what is on a device or behind the offset of a file.
    pub overwrite: bool,
    /// Whether the image is made durable before it gets its name.
    pub sync: bool,
    /// The permission bits of a new file.
    pub mode: u32,
    /// Whom a new file is given to.
    pub owner: Owner,
    /// The longest that QEMU may take to answer a command; `None` waits for ever.
    pub timeout: Option<Duration>,
    /// QEMU's process, where the caller knows it.
    pub pid: Option<u32>,
    /// The XML that an image of libvirt begins with, of a guest that is no domain yet. A domain is described by libvirt.
    pub domain_xml: Option<String>,
}

impl SaveSettings {
    /// The defaults of the command line for a guest at `qmp`.
    pub fn new(qmp: QmpAddress, image: impl Into<PathBuf>) -> SaveSettings {
        SaveSettings {
            qmp,
            image: image.into(),
            format: None,
            offset: None,
            via: Via::Auto,
            device_state: DeviceStateBy::Auto,
            channels: None,
            direct_io: DirectIo::Auto,
            rate_max: None,
            then: Then::Pause,
            record: Record::AsItWas,
            overwrite: false,
            sync: true,
            mode: 0o600,
            owner: Owner::default(),
            timeout: None,
            pid: None,
            domain_xml: None,
        }
    }

    fn channels(&self) -> u16 {
        self.channels.unwrap_or_else(default_channels)
    }
}

/// As many channels as serve a QEMU that reads: each of its threads waits for one request at a time, so it is their number
/// that keeps the disk busy (1 GiB read in 0.33 s with eight, in 0.50 s with two, on two processors).
pub(crate) const QEMU_CHANNELS: u16 = 8;

/// As many channels as QEMU writes with. Where one cannot write, QEMU frees what the others still use, and dies with its
/// guest (see `hold_back` of qemu/session/cancel.rs): on a full disk, of a guest whose memory is half zero, 24 times in 800
/// with eight channels on a busy host. One channel has no others. It takes 1.1 times as long as eight by direct I/O.
pub(crate) const QEMU_SAVE_CHANNELS: u16 = 1;

/// One channel per processor, at least two so that one can wait for the disk, at most eight: more never
/// helped, since the disk is the limit long before.
pub(crate) fn default_channels() -> u16 {
    // Asking reads half a dozen files of the control groups.
    static CHANNELS: OnceLock<u16> = OnceLock::new();
    *CHANNELS.get_or_init(|| std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8) as u16))
}

/// What a save did.
#[derive(Clone, Debug)]
pub struct SaveReport {
    /// Who carried the RAM: never [`Via::Auto`].
    pub via: Via,
    /// Why `auto` did not take the direct way, where it did not.
    pub reason: Option<String>,
    /// The image's format.
    pub format: SaveFormat,
    /// Whether pages bypassed the page cache.
    pub direct_io: bool,
    /// Why they did not, where they were to if they could.
    pub direct_io_reason: Option<String>,
    /// Channels used.
    pub channels: u16,
    /// The state recorded for the restore.
    pub run_state: String,
    /// Bytes of pages in the image.
    pub data_bytes: u64,
    /// Bytes of pages that were there and are zero, so that they are not in the image.
    pub zero_bytes: u64,
    /// Bytes of pages that were never touched, so that nobody had to look at them.
    pub hole_bytes: u64,
    /// The whole save.
    pub duration: Duration,
    /// From the guest's stop until everything of it was read.
    pub downtime: Duration,
    /// The most anonymous memory seen in this process.
    pub peak_memory_bytes: u64,
    /// How long each phase took.
    pub phases: Phases,
    /// How much of the phase `ram` was spent in waiting to learn which pages are there; `None` where QEMU carried them.
    pub presence: Option<Duration>,
    /// The image that this one has replaced. Its room comes back when the report and all copies of it are dropped.
    pub replaced: Option<Arc<Replaced>>,
}

impl SaveReport {
    /// Data bytes per second of the phase that moved them; 0 where none were.
    pub fn rate_bytes_per_s(&self) -> u64 {
        let moving = self.phases.0.iter().find(|(name, _)| *name == "ram").map_or(self.duration, |(_, d)| *d);
        if moving.is_zero() { 0 } else { (self.data_bytes as f64 / moving.as_secs_f64()) as u64 }
    }
}

/// What the way that was taken reports to the job.
struct Carried {
    run_state: String,
    direct_io: bool,
    data_bytes: u64,
    zero_bytes: u64,
    hole_bytes: u64,
    stopped_at: Instant,
    read_at: Instant,
    memory_bytes: u64,
    presence: Option<Duration>,
}

/// Saves a guest.
///
/// On success the image stands under its name, durable unless `sync` is off. On failure, and when `cancel`
/// is triggered, nothing stands there that did not before, the guest is in the state it was in, and QEMU
/// has its own settings back. The one exception is a guest that was found paused and that QEMU itself has saved
/// ([`Via::Qemu`], [`DeviceStateBy::Migration`]): when a step behind that one fails, it is still paused, but QEMU calls that `postmigrate`.
///
/// Once the image stands, `cancel` has no say any more. What goes wrong then is told by an error that begins with
/// "the image is saved".
///
/// # Errors
/// [`Kind::Misuse`] where the image exists and may not be replaced; [`Kind::Unsupported`] where the way
/// asked for cannot carry this guest; [`Kind::Peer`], [`Kind::Io`], [`Kind::Interrupted`].
pub fn save(settings: &SaveSettings, cancel: &Cancel, observer: &dyn Observer) -> Result<SaveReport> {
    if settings.channels.is_some_and(|n| n == 0 || n > CHANNELS_MAX) {
        return Err(Error::new(Kind::Misuse, format!("channels must be between 1 and {CHANNELS_MAX}")));
    }
    if settings.via == Via::Socket {
        return Err(Error::new(Kind::Unsupported, "a guest cannot be saved via socket yet")
            .hint("leave --via at auto"));
    }
    let kind = TargetKind::of(&settings.image, settings.offset)?;
    let mut watch = Stopwatch::start(observer);
    watch.phase("connect");
    let (format, envelope) = envelope::choose(settings, kind, cancel, observer)?;
    refuse_impossible(settings, kind, format)?;
    // QEMU takes its time to greet, in which the target is made. Whoever mistyped its name should not have the guest
    // touched, so nothing is said to QEMU before that is there.
    let called = Client::call(&settings.qmp, cancel);
    let mut target = Target::open(&settings.image, settings.offset, draft_options(settings), cancel)?;
    if let Some(envelope) = &envelope {
        target.reserve(envelope.len());
    }
    let (mut session, status, ahead) =
        super::resume::open_for_save(called?, &settings.image, cancel, observer, |session| {
            match settings.via {
                Via::Qemu => Ok(None),
                _ => direct::Asked::ahead(session).map(Some),
            }
        })?;
    session.client.timeout = settings.timeout;
    // What a failed save has written is removed on the way out, when the guest has long been resumed: on a slow
    // disk that takes its time.
    let carried =
        carry(settings, &mut session, (&mut target, kind, format), (status, ahead), cancel, &mut watch);
    let outcome = match carried.and_then(|done| envelop(&target, envelope.as_ref(), &done.0).map(|()| done)) {
        Ok(done) => publish(settings, &mut session, &mut target, cancel, &mut watch).map(|()| done),
        Err(error) => Err(error),
    };
    watch.phase("settle");
    let settled = match &outcome {
        Ok(_) => leave(session, settings.then),
        Err(_) => session.settle(),
    };
    let (carried, choice) = match (outcome, settled) {
        (Ok(done), Ok(())) => done,
        (Ok(_), Err(error)) => {
            return Err(Error::new(error.kind(), "the image is saved, but QEMU was not left as it was")
                .because(error));
        }
        (Err(error), Ok(())) => return Err(error),
        (Err(error), Err(worse)) => {
            // That QEMU is gone is told once, and is the reason of all that failed besides.
            if worse.chain() == error.chain() {
                return Err(error);
            }
            if worse.hint_text() == Some(qmp::CLOSED_HINT) && error.kind() != Kind::Interrupted {
                return Err(worse.because(error));
            }
            observer.warn(&format!("cleaning up failed as well: {}", worse.chain()));
            return Err(match worse.hint_text() {
                Some(hint) => error.hint(hint.to_owned()),
                None => error,
            });
        }
    };
    let (phases, duration) = watch.finish();
    Ok(SaveReport {
        via: choice.via,
        reason: choice.reason,
        format,
        direct_io: carried.direct_io,
        direct_io_reason: choice.direct_io_reason,
        channels: choice.channels,
        run_state: carried.run_state,
        data_bytes: carried.data_bytes,
        zero_bytes: carried.zero_bytes,
        hole_bytes: carried.hole_bytes,
        duration,
        downtime: carried.read_at.saturating_duration_since(carried.stopped_at),
        peak_memory_bytes: carried.memory_bytes.max(anonymous_memory_bytes()),
        phases,
        presence: carried.presence,
        replaced: target.take_replaced().map(Arc::new),
    })
}

/// Writes what stands in front of the guest, now that its state is known. Until then it is no image.
fn envelop(target: &Target, envelope: Option<&Envelope>, carried: &Carried) -> Result<()> {
    let Some(envelope) = envelope else { return Ok(()) };
    let failed = |error| Error::io(format!("cannot write {}", target.path().display()), error);
    target.write_all_at(&envelope.bytes(carried.run_state == "running"), 0).map_err(failed)
}

/// What was decided on the way.
struct Choice {
    via: Via,
    channels: u16,
    reason: Option<String>,
    direct_io_reason: Option<String>,
}

/// Chooses the way and takes it, up to and not including what makes it an image.
fn carry(
    settings: &SaveSettings,
    session: &mut Session,
    (target, kind, format): (&mut Target, TargetKind, SaveFormat),
    (status, ahead): (RunStatus, Option<direct::Asked>),
    cancel: &Cancel,
    watch: &mut Stopwatch<'_>,
) -> Result<(Carried, Choice)> {
    refuse_states(&status)?;
    if settings.via != Via::Qemu {
        watch.phase("probe");
    }
    let (prepared, reason) = choose(settings, session, ahead, kind, format, watch.observer)?;
    let bytes = match &prepared {
        Some(ready) => {
            let present = room::present_bytes(&ready.ram)?;
            direct::require_room(ready, present, target, format)?;
            present
        }
        // How much of it QEMU will find to be zero is not known.
        None => qemu::host_blocks(&mut session.client)?.iter().map(|block| block.used_length).sum(),
    };
    let rates = room::settle_direct_io(settings, target, bytes, watch.observer)?;
    let mut channels = settings.channels();
    let (carried, via) = match prepared {
        Some(ready) => {
            watch.observer.note("via direct: QEMU gives the device state only");
            if !target.is_sequential() {
                super::note_engine(watch.observer)?;
            }
            if rates.is_some_and(room::wants_order) {
                // One lane writes in the order of the file; a disk that seeks has nothing of more of them.
                channels = settings.channels.unwrap_or(1);
                ready.ram.write_gaps_below(room::SEEK_BYTES);
            }
            let way = (&*target, format, channels);
            (direct::carry(settings, session, (&status, ready, bytes), way, cancel, watch)?, Via::Direct)
        }
        None => {
            channels = settings.channels.unwrap_or(QEMU_SAVE_CHANNELS);
            (via_qemu::carry(settings, session, target, (bytes, channels), watch)?, Via::Qemu)
        }
    };
    let direct_io_reason = why_not_direct(target);
    if let Some(reason) = &direct_io_reason {
        watch.observer.note(&format!("no direct I/O: {reason}"));
    }
    if settings.then == Then::Resume {
        // All of the guest has been read: it need not wait for the disk.
        session.resume()?;
        // Nor need anybody else wait who wants to save it.
        session.begin_releasing()?;
    }
    Ok((carried, Choice { via, channels, reason, direct_io_reason }))
}

/// Makes an image of what was written. Behind this there is no way back, and no interrupt.
fn publish(
    settings: &SaveSettings,
    session: &mut Session,
    target: &mut Target,
    cancel: &Cancel,
    watch: &mut Stopwatch<'_>,
) -> Result<()> {
    watch.phase("publish");
    let can_go_back = !matches!(target, Target::Outflow(_));
    if can_go_back {
        if cancel.is_cancelled() {
            return Err(Error::interrupted());
        }
        if settings.sync {
            // By far the longest part, so what happens meanwhile is looked at before the image gets its name.
            target.sync()?;
        }
        watch.phase("name");
        if session.is_watching() {
            session.verify_still()?;
        }
        if cancel.is_cancelled() {
            return Err(Error::interrupted());
        }
    }
    session.ignore_cancel();
    Ok(target.publish()?)
}

/// Chooses the way: what the direct one needs, or why it is not taken.
fn choose(
    settings: &SaveSettings,
    session: &mut Session,
    ahead: Option<direct::Asked>,
    kind: TargetKind,
    format: SaveFormat,
    observer: &dyn Observer,
) -> Result<(Option<direct::Prepared>, Option<String>)> {
    if settings.via == Via::Qemu {
        via_qemu::refuse_sleeping(&session.client.status()?)?;
        return Ok((None, None));
    }
    let asked = match ahead {
        Some(asked) => asked,
        None => direct::Asked::ahead(session)?,
    };
    match direct::prepare(settings, session, asked) {
        Ok(ready) => Ok((Some(ready), None)),
        Err(error) if settings.via == Via::Auto && error.kind() == Kind::Unsupported => {
            if let Some(why) = why_not_qemu(kind, format) {
                return Err(Error::new(Kind::Unsupported, why).because(error).hint("save to a new file"));
            }
            via_qemu::refuse_sleeping(&session.client.status()?)?;
            observer.note(&format!("via qemu: {}", error.chain()));
            Ok((None, Some(error.chain())))
        }
        Err(error) => Err(error),
    }
}

/// Why QEMU itself cannot write this, if it cannot.
fn why_not_qemu(kind: TargetKind, format: SaveFormat) -> Option<&'static str> {
    match (kind, format) {
        (TargetKind::Device, _) => {
            Some("QEMU cannot write to a block device: it cuts its target to length first")
        }
        (_, format) if !format.has_places() => Some("a stream is written by the direct way only"),
        _ => None,
    }
}

/// Refuses what no guest could change, before anything is opened.
fn refuse_impossible(settings: &SaveSettings, kind: TargetKind, format: SaveFormat) -> Result<()> {
    if let SaveFormat::Libvirt(payload) = format {
        crate::sink::require_codec(payload)?;
    }
    match why_not_qemu(kind, format) {
        Some(why) if settings.via == Via::Qemu => {
            Err(Error::new(Kind::Unsupported, why).hint("leave --via at auto, or save to a new file"))
        }
        _ => Ok(()),
    }
}

fn draft_options(settings: &SaveSettings) -> DraftOptions {
    DraftOptions {
        mode: settings.mode,
        owner: settings.owner,
        overwrite: settings.overwrite,
        direct: match settings.direct_io {
            DirectIo::Auto => io::DirectChoice::Auto,
            DirectIo::On => io::DirectChoice::On,
            DirectIo::Off => io::DirectChoice::Off,
        },
        sync: settings.sync,
    }
}

/// Why pages do not bypass the page cache, if they do not.
fn why_not_direct(target: &Target) -> Option<String> {
    match target.direct_io() {
        io::DirectIo::Unsupported { reason } => Some(reason),
        io::DirectIo::Supported { .. } => None,
    }
}

/// Refuses a guest whose state cannot be saved, before anything is touched.
fn refuse_states(status: &RunStatus) -> Result<()> {
    let status = &status.status;
    let hint = match status.as_str() {
        "postmigrate" => {
            "QEMU has handed this guest over already: resume it with the QMP command cont, then save"
        }
        "inmigrate" => "this QEMU waits for a guest or is loading one: restore into it first",
        "finish-migrate" | "save-vm" | "restore-vm" | "colo" => "wait until QEMU is done with that",
        _ => return Ok(()),
    };
    Err(Error::new(Kind::Peer, format!("a guest in state `{status}` cannot be saved")).hint(hint))
}

/// The run state to record for a guest that was found in the state `before`.
fn recorded_state(record: Record, before: &RunStatus) -> String {
    match record {
        Record::AsItWas => before.status.clone(),
        Record::Running => "running".to_owned(),
        Record::Paused => "paused".to_owned(),
    }
}

/// Leaves the guest as the caller wants it after a success.
fn leave(mut session: Session, then: Then) -> Result<()> {
    match then {
        Then::Pause => session.keep_paused(),
        Then::Resume => session.resume()?,
        Then::Quit => {
            // A guest that somebody has resumed is not what the image holds any more, and not ours to end.
            session.verify_still()?;
            session.client.quit()?;
            session.abandon();
            return Ok(());
        }
    }
    session.settle()
}
