//! Restore: an image becomes a guest again, in a QEMU that is started for it or one that waits.

mod background;
mod domain;
mod feed;
mod fill;
mod fit;
mod in_use;
mod lazy;
mod map;
mod mode;
mod prefetch;
mod ready;
mod zero;

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io::{Cancel, LaneOptions, ReadPair};
use mem::{BlockAddress, Peer};
use page::PageSize;
use serde_json::json;
use wire::qemu::format::MAPPED_RAM;

pub use self::background::{Answer, Server, start_server};
pub use self::domain::{DomainRestoreReport, DomainRestoreSettings, restore_domain};
use self::fill::Filling;
pub use self::lazy::{FaultReport, FaultTimes, TakeUpReport, TakeUpSettings, take_up};
use self::map::Share;
pub use self::mode::Mode;
use self::mode::{Plan, Settled};
use self::ready::Listener;
pub use self::ready::ReadySerial;
use self::zero::{Verified, verify_zero};
use super::save::{CHANNELS_MAX, QEMU_CHANNELS, default_channels};
use super::{DirectIo, Observer, Phases, Stopwatch, Via, note_engine};
use crate::net::QmpAddress;
use crate::qemu::{self, HostBlock, LaunchSettings, Launched, Session};
use crate::qmp::MigrationInfo;
use crate::source::{Image, MappedRamFile, StreamFile, open_image};
use crate::{Error, Kind, Rate, Result};

/// How long a guest may take to run once it was told to: QEMU takes its disks back first.
const RUN_TIMEOUT: Duration = Duration::from_secs(120);

/// The name under which QEMU receives a stream's file.
const STREAM: &str = "vmstate-stream";
/// The first QEMU that takes `file:` addresses of descriptor sets.
const FILE_SINCE: (u32, u32) = (8, 2);

/// The state of the guest after a restore, or the one recorded for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// As it was before the save.
    AsItWas,
    /// Running.
    Running,
    /// Paused.
    Paused,
}

/// The QEMU that the guest comes back in.
#[derive(Clone, Debug)]
pub enum Target {
    /// One that waits with `-incoming defer`.
    Waiting(QmpAddress),
    /// One that is started.
    Launch {
        /// The program and its arguments, as they were when the guest was saved.
        command: Vec<OsString>,
        /// Where its messages go.
        log: Option<PathBuf>,
        /// Whether it keeps our terminal and session.
        foreground: bool,
    },
}

/// What to restore, into what, and how.
#[derive(Clone, Debug)]
pub struct RestoreSettings {
    /// The image.
    pub image: PathBuf,
    /// The offset in its file or device at which it starts.
    pub offset: u64,
    /// The QEMU.
    pub target: Target,
    /// When the guest's memory comes.
    pub mode: Mode,
    /// Who carries the RAM.
    pub via: Via,
    /// How many channels read; `None` leaves it to vmstate.
    pub channels: Option<u16>,
    /// Whether pages bypass the page cache.
    pub direct_io: DirectIo,
    /// How many bytes of pages a second are read at the most; `None` is no limit. A QEMU that reads by itself knows
    /// none.
    pub rate_max: Option<Rate>,
    /// The state to bring the guest to.
    pub record: Record,
    /// Whether a target is taken that does not fit in ways that may be meant: other devices, changed disks.
    pub force: bool,
    /// What the guest says on its console when it is ready: the restore waits for that, if the guest runs.
    pub ready: Option<ReadySerial>,
    /// Whether the restore ends only when the guest's memory is resident. Of a mapped guest that is when the image is
    /// in the page cache; in the other modes it is so in any case.
    pub wait: bool,
}

impl RestoreSettings {
    /// The defaults of the command line.
    pub fn new(image: impl Into<PathBuf>, target: Target) -> RestoreSettings {
        RestoreSettings {
            image: image.into(),
            offset: 0,
            target,
            mode: Mode::Auto,
            via: Via::Auto,
            channels: None,
            direct_io: DirectIo::Auto,
            rate_max: None,
            record: Record::AsItWas,
            force: false,
            ready: None,
            wait: false,
        }
    }
}

/// What a restore did.
#[derive(Debug)]
pub struct RestoreReport {
    /// When the memory came: never [`Mode::Auto`].
    pub mode: Mode,
    /// Why `auto` took that mode; `None` where it was asked for.
    pub mode_reason: Option<String>,
    /// Who carried the RAM, or in [`Mode::Map`] what of it was carried: never [`Via::Auto`].
    pub via: Via,
    /// Why `auto` took no better way, where it did not.
    pub reason: Option<String>,
    /// QEMU's process, where it is ours or could be told.
    pub qemu_pid: Option<u32>,
    /// The monitor that the guest can be reached by, where one is known.
    pub qmp: Option<String>,
    /// Whether pages bypassed the page cache.
    pub direct_io: bool,
    /// Channels used.
    pub channels: u16,
    /// The run state after the restore.
    pub run_state: String,
    /// From the call until the guest could run its first instruction.
    pub first_instruction: Duration,
    /// From QEMU being ready until then.
    pub first_instruction_from_ready: Duration,
    /// From the call until the guest's console said what [`RestoreSettings::ready`] names; `None` where nobody asked,
    /// or where the guest does not run.
    pub guest_ready: Option<Duration>,
    /// From the call until all memory was resident: for an eager restore the moment of the first instruction, for a
    /// lazy one when the last page had been sent. A mapped guest's memory comes as it is asked for: `None`, or with
    /// [`RestoreSettings::wait`] when all of the image was in the page cache.
    pub resident: Option<Duration>,
    /// How the guest's own requests for pages fared; of a lazy restore only.
    pub faults: Option<FaultReport>,
    /// Bytes of pages that were read by the end of the restore.
    pub read_bytes: u64,
    /// How long each phase took.
    pub phases: Phases,
    /// The QEMU in the foreground, which the caller is to wait for.
    pub foreground: Option<std::process::Child>,
}

/// Restores a guest, everything first: it runs when all of its memory is there.
///
/// The image is checked as a whole before QEMU sees a byte of it, and compared with the target's RAM
/// blocks: QEMU itself checks neither, and a truncated image crashes it.
///
/// # Errors
/// [`Kind::Damaged`] and [`Kind::Unsupported`] for the image, [`Kind::Incompatible`] where image and target
/// do not fit, [`Kind::Peer`] with QEMU's own words. A QEMU that was started is ended again.
pub fn restore(
    settings: &RestoreSettings,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Result<RestoreReport> {
    if settings.channels.is_some_and(|n| n == 0 || n > CHANNELS_MAX) {
        return Err(Error::new(Kind::Misuse, format!("channels must be between 1 and {CHANNELS_MAX}")));
    }
    let mut watch = Stopwatch::start(observer);
    watch.phase("check image");
    let cannot_open = |error| Error::io(format!("cannot open {}", settings.image.display()), error);
    // Looked at first: to open a FIFO would wait for a writer.
    drop(open_image(&settings.image)?);
    let mut pair = ReadPair::open(
        &settings.image,
        match settings.direct_io {
            DirectIo::Auto => io::DirectChoice::Auto,
            DirectIo::On => io::DirectChoice::On,
            DirectIo::Off => io::DirectChoice::Off,
        },
    )
    .map_err(cannot_open)?;
    in_use::while_read(&pair.buffered, &settings.image)?;
    // The very file that QEMU gets, whatever its name stands for by then, but with a position of its own:
    // QEMU starts to read where its descriptor stands.
    let own = format!("/proc/self/fd/{}", pair.buffered.as_raw_fd());
    let file = File::open(own).map_err(cannot_open)?;
    let image = Image::from_file(file, &settings.image, settings.offset)?;
    let data_bytes = image.data_bytes()?;
    if matches!(image, Image::Stream(_)) {
        refuse_for_stream(settings, image.payload().compressed().is_some())?;
        pair.direct = None;
    }
    if let io::DirectIo::Unsupported { reason } = &pair.direct_io {
        observer.note(&format!("no direct I/O: {reason}"));
    }
    let is_cached = is_cached(&pair, data_bytes);
    let plan = mode::plan(settings, &image, data_bytes, is_cached, observer)?;
    if settings.direct_io == DirectIo::Auto && is_cached && pair.direct.take().is_some() {
        observer.note("the image is in the page cache: it is read from there");
    }

    watch.phase("start");
    let (mut session, launched, plan) = start(settings, plan, cancel)?;
    let ready = Instant::now();
    let mut let_go = false;
    // It has to listen before the guest can speak.
    let qemu = launched.as_ref().map(Launched::pid).or_else(|| session.client.listener_pid());
    let told = Frame {
        settings,
        started: watch.started,
        ready,
        qemu,
        qmp: match &settings.target {
            Target::Waiting(address) => Some(address.to_string()),
            Target::Launch { .. } => launched.as_ref().and_then(Launched::user_qmp),
        },
        is_direct: pair.direct.is_some(),
    };
    let tell = |loaded, phases| observer.running(&told.report(loaded, phases, None));
    let (listener, outcome) =
        match settings.ready.as_ref().map(|ready| Listener::start(ready, qemu)).transpose() {
            Ok(listener) => {
                let outcome = load(
                    settings,
                    plan,
                    (&image, data_bytes),
                    &pair,
                    launched.as_ref(),
                    &mut session,
                    cancel,
                    &mut watch,
                    &tell,
                    &mut let_go,
                );
                (listener, outcome)
            }
            Err(error) => (None, Err(error)),
        };
    watch.phase("settle");
    let mut loaded = match (outcome, launched.as_ref()) {
        (Ok(loaded), _) => loaded,
        // It is ended in a moment, and may not answer before: a load keeps QEMU's monitor busy to its end.
        (Err(error), Some(_)) if !let_go => {
            session.abandon();
            return Err(match launched {
                Some(launched) => launched.give_up(error),
                None => error,
            });
        }
        (Err(error), _) => {
            if let Err(worse) = session.settle() {
                observer.warn(&format!("cleaning up failed as well: {}", worse.chain()));
            }
            // A lazy restore says itself what is to be done.
            let pid = qemu.filter(|_| let_go && error.hint_text() != Some(lazy::TAKE_UP_HINT));
            return Err(left_alone(error, pid));
        }
    };
    // The guest is there, and may run: what could not be put back is worth a word, not the guest.
    if let Err(worse) = session.settle() {
        observer.warn(&format!("QEMU's own settings were not all put back: {}", worse.chain()));
    }
    let foreground = launched.and_then(Launched::leave);
    let ready_at = linger(settings, (&image, data_bytes), listener, &mut loaded, &mut watch, cancel)
        .map_err(|error| left_alone(error, qemu))?;
    let (phases, _) = watch.finish();
    Ok(RestoreReport { foreground, ..told.report(loaded, phases, ready_at) })
}

/// What a report says whatever becomes of the load.
struct Frame<'a> {
    settings: &'a RestoreSettings,
    started: Instant,
    ready: Instant,
    qemu: Option<u32>,
    qmp: Option<String>,
    is_direct: bool,
}

impl Frame<'_> {
    fn report(&self, loaded: Loaded, phases: Phases, ready_at: Option<Instant>) -> RestoreReport {
        let Loaded { mode, mode_reason, via, reason, run_state, running_at, .. } = loaded;
        // QEMU says that the guest runs when it does already: one that was heard before has run by then.
        let running_at = ready_at.map_or(running_at, |at| at.min(running_at));
        let channels = self.settings.channels.unwrap_or_else(|| match via {
            Via::Qemu => QEMU_CHANNELS,
            _ => default_channels(),
        });
        RestoreReport {
            mode,
            mode_reason,
            via,
            reason,
            qemu_pid: self.qemu,
            qmp: self.qmp.clone(),
            // Of a mapped image it is QEMU that reads, page by page and through the page cache.
            direct_io: mode != Mode::Map && self.is_direct,
            channels: match mode {
                Mode::Lazy => lazy::READERS,
                Mode::Map => 1,
                Mode::Eager | Mode::Auto => channels,
            },
            run_state,
            first_instruction: running_at.duration_since(self.started),
            first_instruction_from_ready: running_at.duration_since(self.ready),
            guest_ready: ready_at.map(|at| at.duration_since(self.started)),
            resident: loaded.resident_at.map(|at| at.duration_since(self.started)),
            faults: loaded.faults,
            read_bytes: loaded.read_bytes,
            phases,
            foreground: None,
        }
    }
}

/// Tells of a guest that runs while its memory is on its way.
type TellRunning<'a> = &'a dyn Fn(Loaded, Phases);

/// The error of a restore whose guest may run all the same.
fn left_alone(error: Error, qemu: Option<u32>) -> Error {
    match qemu {
        Some(pid) => error.hint(format!("the guest may run: QEMU, process {pid}, was left alone")),
        None => error,
    }
}

/// Waits for what was to be waited for although the guest is there: that the image is in the page cache, and that the
/// guest says that it is ready. When it said so.
fn linger(
    settings: &RestoreSettings,
    (image, data_bytes): (&Image, u64),
    listener: Option<Listener>,
    loaded: &mut Loaded,
    watch: &mut Stopwatch<'_>,
    cancel: &Cancel,
) -> Result<Option<Instant>> {
    if let (true, Mode::Map, Image::MappedRam(image)) = (settings.wait, loaded.mode, image) {
        watch.phase("prefetch");
        let is_held =
            prefetch::prefetch(image, data_bytes, watch.progress.counters(), watch.observer, cancel)?;
        loaded.resident_at = is_held.then(Instant::now);
        loaded.read_bytes = data_bytes;
        watch.progress.complete();
    }
    let Some(mut listener) = listener else { return Ok(None) };
    watch.phase("ready");
    if loaded.run_state == "running" {
        return match listener.wait(cancel)? {
            None => Err(Error::interrupted()),
            heard => Ok(heard),
        };
    }
    // It may have run, and said it, and stopped since.
    let heard = listener.heard()?;
    if heard.is_none() {
        let clause =
            format!("the guest is {}: nobody waited until its console says it is ready", loaded.run_state);
        watch.observer.warn(&clause);
    }
    Ok(heard)
}

/// Starts the target, or connects to it. Where it turns out not to know how to map an image, and nobody asked
/// for that, it is started once more as it was given.
fn start(
    settings: &RestoreSettings,
    mut plan: Plan,
    cancel: &Cancel,
) -> Result<(Session, Option<Launched>, Plan)> {
    let (command, log, foreground) = match &settings.target {
        Target::Waiting(address) => return Ok((Session::open(address, cancel)?, None, plan)),
        Target::Launch { command, log, foreground } => (command, log.as_deref(), *foreground),
    };
    let launch = |command: &[OsString], pass| -> Result<(Session, Launched)> {
        let (mut client, launched) = qemu::launch(LaunchSettings { command, log, foreground, pass }, cancel)?;
        // Nobody else can have it migrate: it is new, and this monitor its only one that is known.
        match client.version() {
            Ok(version) => Ok((Session::bare(client, version), launched)),
            Err(error) => Err(launched.give_up(error)),
        }
    };
    if let Some((command, held)) = plan.mapped.take() {
        match launch(&command, Some(held.into())) {
            Ok((session, launched)) => return Ok((session, Some(launched), plan)),
            Err(error) if qemu::is_too_old_to_map(&error.chain()) => {
                let clause = "this QEMU cannot map an image: 8.2 is the first that can";
                if settings.mode != Mode::Auto {
                    return Err(Error::new(Kind::Unsupported, clause).hint("restore with --mode eager"));
                }
                plan = Plan::unmapped(clause);
            }
            Err(error) => return Err(error),
        }
    }
    let (session, launched) = launch(command, None)?;
    Ok((session, Some(launched), plan))
}

/// What was seen of a target before the load and holds after it: QEMU neither moves its blocks nor itself.
struct Seen {
    /// With their addresses, once somebody has asked for them.
    blocks: Vec<HostBlock>,
    /// QEMU's process, where it was proven already.
    peer: Option<Arc<Peer>>,
}

impl Seen {
    /// QEMU's process, proven when it is first asked for.
    fn process(&mut self, session: &mut Session, pid: Option<u32>) -> Result<Arc<Peer>> {
        if let Some(peer) = &self.peer {
            return Ok(peer.clone());
        }
        let peer = Arc::new(qemu::find_process(session, pid)?);
        self.peer = Some(peer.clone());
        Ok(peer)
    }

    /// Finds the addresses of the blocks where QEMU has not told them.
    fn find_addresses(&mut self, session: &mut Session, peer: &Peer) -> Result<()> {
        self.blocks = qemu::with_addresses(&mut session.client, peer, &self.blocks)?;
        Ok(())
    }

    /// Where a block lies, by its name.
    fn place_of(&self, name: &str, length: u64, page_size: PageSize) -> Option<BlockAddress> {
        let block = self.blocks.iter().find(|block| block.name == name)?;
        let address = block.address.filter(|address| *address != 0)?;
        Some(BlockAddress { name: name.to_owned(), address, length, page_size: page_size.bytes() })
    }
}

/// What a load that succeeded tells.
struct Loaded {
    mode: Mode,
    mode_reason: Option<String>,
    read_bytes: u64,
    via: Via,
    reason: Option<String>,
    run_state: String,
    running_at: Instant,
    resident_at: Option<Instant>,
    faults: Option<FaultReport>,
}

/// Compares the image with the target, has its memory filled and QEMU load the rest, and brings the guest
/// to the state wanted. `let_go` is set as soon as the guest may run.
#[allow(clippy::too_many_arguments, reason = "one call, of what its caller already has apart")]
fn load(
    settings: &RestoreSettings,
    mut plan: Plan,
    (image, data_bytes): (&Image, u64),
    pair: &ReadPair,
    launched: Option<&Launched>,
    session: &mut Session,
    cancel: &Cancel,
    watch: &mut Stopwatch<'_>,
    tell: TellRunning<'_>,
    let_go: &mut bool,
) -> Result<Loaded> {
    let pid = launched.map(Launched::pid);
    let wants_pause = launched.is_some_and(|launched| launched.wants_pause);
    watch.phase("compare");
    require_waiting(session)?;
    let blocks = fit::compare(image, session, pid, settings.force, watch.observer)?;
    let mut seen = Seen { blocks, peer: None };
    let run = wants_to_run(settings, image.run_state()?, wants_pause);
    let is_unreachable = launched.is_some_and(|launched| launched.user_qmp().is_none());
    let whole = match (run, is_unreachable) {
        (false, _) => Some("the guest is to stay paused"),
        (true, true) => Some("without -qmp among QEMU's arguments it would be lost if vmstate were killed"),
        (true, false) => None,
    };
    let mapped = match (plan.settle(image, session, &mut seen, pid, whole, watch.observer)?, image) {
        (Settled::OnDemand(prepared), Image::MappedRam(image)) => {
            if is_unreachable {
                watch.observer.warn(
                    "no -qmp among QEMU's arguments: if vmstate is killed before the memory is there, the guest is lost",
                );
            }
            let limit = settings.rate_max.map(Rate::limit);
            let limit = limit.as_deref();
            let reason = plan.reason;
            let tell = |loaded, phases| tell(Loaded { mode_reason: reason.clone(), ..loaded }, phases);
            return lazy::load(image, pair, prepared, session, run, limit, watch, cancel, &tell, let_go)
                .map(|loaded| Loaded { mode_reason: reason.clone(), ..loaded });
        }
        (Settled::Mapped(shares), image) => {
            // One that vmstate started has it by birth.
            if let (None, Image::MappedRam(image)) = (launched, image) {
                in_use::by_qemu(image, session, watch.observer)?;
            }
            Some(shares)
        }
        _ => None,
    };
    let (way, reason) = match (image, mapped) {
        (Image::MappedRam(image), Some(shares)) => (Way::Mapped(image, shares), None),
        (Image::MappedRam(image), None) => choose(settings, image, &mut seen, pid, session)?,
        (Image::Stream(stream), _) if stream.payload().compressed().is_some() => {
            (Way::Decompressed(stream), None)
        }
        (Image::Stream(_), _) => (Way::Stream, None),
    };
    let via = way.via();
    match &reason {
        Some(reason) => watch.observer.note(&format!("via {}: {reason}", via.name())),
        None => watch.observer.note(&format!("via {}", via.name())),
    }

    watch.phase("load");
    let progress = &watch.progress;
    let read_bytes = match &way {
        Way::Mapped(image, shares) => carried_bytes(image, shares)?,
        _ => data_bytes,
    };
    let is_prefetched = settings.wait && matches!(way, Way::Mapped(..));
    progress.expect(if is_prefetched { data_bytes } else { read_bytes });
    if matches!(way, Way::Qemu | Way::Stream) {
        // Its monitor is silent during a load of mapped-ram: what QEMU has read, the kernel knows. Whose process it
        // is has to be proven, since another's reads would be told as ours.
        let proven = || Some(qemu::find_process(session, None).ok()?.pid());
        if let Some(pid) = pid.or_else(proven) {
            progress.follow_reads_of(pid);
        }
    }
    let channels = settings.channels.unwrap_or_else(default_channels);
    let limit = settings.rate_max.map(Rate::limit);
    let mut zeroed = Vec::new();
    match way {
        Way::Qemu => {
            let channels = settings.channels.unwrap_or(QEMU_CHANNELS);
            by_qemu(pair, image.payload().at, channels, session)?;
        }
        Way::Stream => by_stream(pair, image.payload().at, session)?,
        Way::Decompressed(stream) => {
            prepare_plain(session)?;
            let counters = progress.counters();
            feed::feed_decompressed(stream, &pair.buffered, session, limit.as_deref(), counters, cancel)?;
        }
        Way::Direct(image, filling) => {
            note_engine(watch.observer)?;
            prepare_plain(session)?;
            let options = LaneOptions { limit: limit.clone(), ..LaneOptions::default() };
            let start = fill::Start { lanes: usize::from(channels), options: &options, cancel };
            filling.fill(image, pair, &start, progress.counters())?;
            feed::feed(image, &filling.shares(), session, limit.as_deref(), progress.counters(), cancel)?;
            zeroed = filling.names();
        }
        Way::Socket(image) => {
            prepare_plain(session)?;
            let shares: Vec<_> = image.layout().blocks.iter().map(|_| Share::Whole).collect();
            feed::feed(image, &shares, session, limit.as_deref(), progress.counters(), cancel)?;
        }
        Way::Mapped(image, shares) => {
            prepare_plain(session)?;
            feed::feed(image, &shares, session, limit.as_deref(), progress.counters(), cancel)?;
        }
    }

    if !is_prefetched {
        watch.progress.complete();
    }

    watch.phase("verify");
    if let Verified::Unseen(reason) = verify_zero(image, session, &mut seen, &zeroed, pid)? {
        watch.observer.warn(&format!("the target's memory could not be verified: {reason}"));
    }

    watch.phase("run");
    if cancel.is_cancelled() {
        return Err(Error::interrupted());
    }
    if run {
        // From here on the guest may run and write its disks: nobody may end it any more.
        session.client.ignore_cancel(RUN_TIMEOUT);
        *let_go = true;
        session.client.cont().map_err(|error| {
            *let_go = !error.is_refusal();
            match qemu::lock_hint(&error.chain()) {
                Some(hint) => error.hint(hint),
                None => error,
            }
        })?;
    }
    let running_at = Instant::now();
    let run_state = session.client.status()?.status;
    let resident_at = (plan.mode == Mode::Eager).then_some(running_at);
    Ok(Loaded {
        mode: plan.mode,
        mode_reason: plan.reason,
        read_bytes,
        via,
        reason,
        run_state,
        running_at,
        resident_at,
        faults: None,
    })
}

/// Whether the guest shall run after the restore.
fn wants_to_run(settings: &RestoreSettings, recorded: Option<&str>, wants_pause: bool) -> bool {
    match settings.record {
        Record::Running => true,
        Record::Paused => false,
        // A suspended guest has to be let go, too, so that it can be woken.
        Record::AsItWas => matches!(recorded.unwrap_or("running"), "running" | "suspended") && !wants_pause,
    }
}

/// The ways for RAM into a target.
enum Way<'a> {
    /// QEMU reads the image itself.
    Qemu,
    /// QEMU reads the image itself, which is a stream.
    Stream,
    /// vmstate decompresses a stream, and QEMU reads what comes out.
    Decompressed(&'a StreamFile),
    /// Shared memory is filled through the lanes, the rest goes through a stream.
    Direct(&'a MappedRamFile, Filling),
    /// Everything goes through a stream.
    Socket(&'a MappedRamFile),
    /// The memory is the image; what is not goes through a stream.
    Mapped(&'a MappedRamFile, Vec<Share>),
}

impl Way<'_> {
    fn via(&self) -> Via {
        match self {
            Way::Qemu | Way::Stream => Via::Qemu,
            Way::Direct(..) | Way::Mapped(..) => Via::Direct,
            Way::Decompressed(_) | Way::Socket(_) => Via::Socket,
        }
    }
}

/// Chooses the way. Shared memory is filled faster from outside than by QEMU; private memory is not, since
/// only its own process can write it without a copy more; and a QEMU without mapped-ram is fed.
fn choose<'a>(
    settings: &RestoreSettings,
    image: &'a MappedRamFile,
    seen: &mut Seen,
    pid: Option<u32>,
    session: &mut Session,
) -> Result<(Way<'a>, Option<String>)> {
    let direct = match settings.via {
        Via::Qemu => {
            refuse_rate(settings)?;
            return Ok((Way::Qemu, None));
        }
        Via::Socket => return Ok((Way::Socket(image), None)),
        Via::Direct | Via::Auto => Filling::prepare(image, session, seen, pid),
    };
    let reason = match direct {
        Ok(filling) => return Ok((Way::Direct(image, filling), None)),
        Err(error) if settings.via == Via::Auto && error.kind() == Kind::Unsupported => error.chain(),
        Err(error) => return Err(error),
    };
    if settings.rate_max.is_some() {
        let reason = format!("QEMU reads an image as fast as it can, whatever the limit; {reason}");
        return Ok((Way::Socket(image), Some(reason)));
    }
    // Of the two capabilities, direct I/O is the younger, and with it descriptor sets came to work.
    let knows =
        session.knows_capability(MAPPED_RAM)? && session.client.parameters()?.contains_key("direct-io");
    if knows {
        return Ok((Way::Qemu, Some(reason)));
    }
    let reason = format!("QEMU {} reads no mapped-ram image from descriptors; {reason}", session.version);
    Ok((Way::Socket(image), Some(reason)))
}

/// Has QEMU load the image in parallel.
fn by_qemu(pair: &ReadPair, offset: u64, channels: u16, session: &mut Session) -> Result<()> {
    session
        .configure(
            &[MAPPED_RAM, "multifd"],
            &[
                ("multifd-channels", json!(channels)),
                ("multifd-compression", json!("none")),
                ("direct-io", json!(pair.direct.is_some())),
                ("mode", json!("normal")),
                ("tls-creds", json!("")),
            ],
        )
        .map_err(|error| match error.kind() {
            Kind::Unsupported => error.hint("restore into QEMU 9.1 or later, or with --via socket"),
            _ => error,
        })?;
    let mut fds = vec![pair.buffered.as_fd()];
    fds.extend(pair.direct.as_ref().map(|file| file.as_fd()));
    let fdset = session.add_fdset(&fds)?;
    hold(session)?;
    session.client.execute(
        "migrate-incoming",
        json!({ "uri": format!("file:/dev/fdset/{fdset},offset={offset}"), "exit-on-error": false }),
    )?;
    // Unlike an outgoing migration this one cannot be cancelled; a QEMU of ours is ended instead.
    let end = session.incoming_end()?;
    if end.status != "completed" {
        return Err(load_failed(&end));
    }
    session.remove_fdset(fdset)
}

/// Has QEMU load a stream by itself. It reads where the descriptor stands; nobody else reads by this one.
fn by_stream(pair: &ReadPair, offset: u64, session: &mut Session) -> Result<()> {
    prepare_plain(session)?;
    rustix::fs::seek(&pair.buffered, rustix::fs::SeekFrom::Start(offset))
        .map_err(|error| Error::io("cannot go to the offset of the image", error))?;
    let mut uri = format!("fd:{STREAM}");
    let fdset = if (session.version.major, session.version.minor) >= FILE_SINCE {
        // The address for files is not given up as that for descriptors is.
        let fdset = session.add_fdset(&[pair.buffered.as_fd()])?;
        uri = format!("file:/dev/fdset/{fdset},offset={offset}");
        Some(fdset)
    } else {
        session.give_fd(STREAM, pair.buffered.as_fd())?;
        None
    };
    hold(session)?;
    let mut arguments = json!({ "uri": uri });
    if (session.version.major, session.version.minor) >= feed::EXIT_ON_ERROR_SINCE {
        arguments["exit-on-error"] = false.into();
    }
    session.incoming(STREAM, arguments)?;
    let end = session.incoming_end()?;
    if end.status != "completed" {
        return Err(load_failed(&end));
    }
    fdset.map_or(Ok(()), |fdset| session.remove_fdset(fdset))
}

/// Refuses a limit where QEMU reads: its `max-bandwidth` is one of sending.
fn refuse_rate(settings: &RestoreSettings) -> Result<()> {
    match settings.rate_max {
        None => Ok(()),
        Some(rate) => {
            let clause = format!("QEMU reads an image as fast as it can, it cannot be held to {rate}");
            Err(Error::new(Kind::Unsupported, clause)
                .hint("leave --max-bandwidth out, or restore with --via socket"))
        }
    }
}

/// Refuses what there is no way to do with a stream.
fn refuse_for_stream(settings: &RestoreSettings, is_compressed: bool) -> Result<()> {
    if !is_compressed {
        refuse_rate(settings)?;
    }
    let refuse = |clause: &str, hint: &str| Err(Error::new(Kind::Unsupported, clause).hint(hint.to_owned()));
    match (settings.via, settings.direct_io) {
        (Via::Direct | Via::Qemu, _) if is_compressed => {
            refuse("a compressed stream goes into QEMU through a socket only", "leave --via at auto")
        }
        (Via::Direct | Via::Socket, _) if !is_compressed => {
            refuse("a stream is loaded by QEMU itself only", "leave --via at auto")
        }
        (_, DirectIo::On) => {
            refuse("a stream is read through the page cache only", "leave --direct-io at auto")
        }
        _ => Ok(()),
    }
}

/// Readies QEMU for a stream without any capability.
fn prepare_plain(session: &mut Session) -> Result<()> {
    session.configure(&[], &[("mode", json!("normal")), ("tls-creds", json!(""))])
}

/// Says that the guest shall not start by itself when it has arrived. The last thing before the load: a QEMU
/// that still waits after a failure should not have been told anything.
fn hold(session: &mut Session) -> Result<()> {
    session.client.stop()
}

/// The error that an incoming migration ended in.
fn load_failed(end: &MigrationInfo) -> Error {
    let reason = end.error.clone().unwrap_or_else(|| format!("status `{}`", end.status));
    Error::new(Kind::Peer, format!("QEMU could not load the image: {reason}"))
        .hint("start it with the machine and devices that the guest was saved with")
}

/// Whether all but crumbs of the image is in the page cache, from where it is read faster than from any disk.
/// What is not there would come slower through the cache than past it.
pub(in crate::job) fn is_cached(pair: &ReadPair, data_bytes: u64) -> bool {
    io::is_nearly_cached(&pair.buffered, data_bytes).unwrap_or(false)
}

/// How many bytes of pages the stream carries.
fn carried_bytes(image: &MappedRamFile, shares: &[Share]) -> Result<u64> {
    let mut sum = 0;
    for (block, share) in image.layout().blocks.iter().zip(shares) {
        if matches!(share, Share::Whole) {
            sum += image.pages(block)?.count().0 * block.page_size.bytes();
        }
    }
    Ok(sum)
}

/// Makes sure that QEMU waits for a guest.
fn require_waiting(session: &mut Session) -> Result<()> {
    let status = session.client.status()?.status;
    if status == "inmigrate" {
        return Ok(());
    }
    Err(Error::new(
        Kind::Incompatible,
        format!("the target is in state `{status}`, it does not wait for a guest"),
    )
    .hint("start it with -incoming defer"))
}
