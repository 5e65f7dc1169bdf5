//! Restore on demand: the guest runs at once, and its memory comes as it is asked for and in the background.
//!
//! vmstate is the source of a postcopy migration that has an image instead of a guest. When the stream ends the
//! guest is an ordinary one, with no tie to vmstate or to the image.

mod background;
mod fit;
#[cfg(test)]
mod hostile;
mod latency;
mod ledger;
mod recover;
mod rendezvous;
mod server;
mod token;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use io::{Cancel, RateLimit, ReadPair};
use serde_json::json;
use wire::postcopy::{Opening, RequestedBlock, Requests};
use wire::qemu::format::QEMU_VM_EOF;
use wire::qemu::{DiscardRange, PostcopyAdvise, Preamble, RamSetup};

pub(super) use self::background::READERS;
use self::fit::{Fit, fit, tells_page_size};
use self::latency::Latencies;
pub use self::recover::{TakeUpReport, TakeUpSettings, take_up};
use self::rendezvous::Rendezvous;
use self::server::{Served, Server, Signs, Waits};
use self::token::Token;
use super::feed::{EXIT_ON_ERROR_SINCE, plain};
use super::{Loaded, Mode, RUN_TIMEOUT, TellRunning, Via, load_failed};
use crate::job::{Observer, Stopwatch};
use crate::qemu::{self, HostBlock, Session};
use crate::qmp::CLOSED_HINT;
use crate::source::MappedRamFile;
use crate::{Error, Kind, Result};

/// What mends a restore that broke off.
pub(super) const TAKE_UP_HINT: &str =
    "the guest waits for the rest of its memory: vmstate restore --resume IMAGE --qmp ADDR gives it that";

/// How long a QEMU that has lost its source may take to say that it is there.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The name under which QEMU receives the socket.
const CHANNEL: &str = "vmstate-lazy";
/// The capabilities.
const POSTCOPY_RAM: &str = "postcopy-ram";
const POSTCOPY_PREEMPT: &str = "postcopy-preempt";
/// The first QEMU whose preempt channel is taken. That of 7.1 and 7.2 has to be ended by a mark, after which nobody
/// answers a target that still asks for a page of zeroes.
const PREEMPT_SINCE: u32 = 8;

/// How long a guest waited for pages that it asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultReport {
    /// How many requests came; a page may be asked for twice.
    pub requests: u64,
    /// Those that a page was sent for; for the others it was on its way.
    pub served: FaultTimes,
    /// Those of them that came while the background was sending.
    pub beside_background: FaultTimes,
    /// Those that came while it was not: held back by a limit, or done.
    pub without_background: FaultTimes,
    /// Whether the pages that were asked for had a connection of their own (QEMU's postcopy-preempt).
    pub preempt: bool,
}

/// How long requests were waited for, from their arrival until their page was in the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultTimes {
    /// How many there were.
    pub count: u64,
    /// Half of them took no longer; `None` where there were none.
    pub median: Option<Duration>,
    /// The same for 99 of 100.
    pub p99: Option<Duration>,
}

impl FaultTimes {
    fn of(latencies: &Latencies) -> FaultTimes {
        let quantile = |share| latencies.quantile(share);
        FaultTimes { count: latencies.count(), median: quantile(0.5), p99: quantile(0.99) }
    }
}

impl FaultReport {
    fn of(served: &Served, preempt: bool) -> FaultReport {
        let Waits { beside, alone } = &served.latencies;
        FaultReport {
            requests: served.requests,
            served: FaultTimes::of(&beside.with(alone)),
            beside_background: FaultTimes::of(beside),
            without_background: FaultTimes::of(alone),
            preempt,
        }
    }
}

/// A target that takes its guest on demand: it was looked at, and QEMU agreed.
pub(super) struct Prepared {
    fit: Fit,
    token: Token,
    rendezvous: Option<Rendezvous>,
}

/// Finds out whether a QEMU that waits takes the guest of `image` on demand, and has it ready for that.
///
/// # Errors
/// [`Kind::Unsupported`] and [`Kind::Incompatible`] where it does not, and a refusal of QEMU's with what mends it.
pub(super) fn prepare(
    image: &MappedRamFile,
    session: &mut Session,
    targets: &[HostBlock],
    pid: Option<u32>,
    observer: &dyn Observer,
) -> Result<Prepared> {
    let fit = fit(image, session, targets, pid)?;
    let token = Token::of(image, session)?;
    let rendezvous = configure(session, pid, observer)?;
    Ok(Prepared { fit, token, rendezvous })
}

/// Brings the guest of `image` up in a QEMU that waits, and returns when all of its memory is there. `let_go` is set
/// as soon as the guest may run.
///
/// # Errors
/// As [`restore`](super::restore).
#[allow(clippy::too_many_arguments, reason = "one call, of what its caller already has apart")]
pub(super) fn load(
    image: &MappedRamFile,
    pair: &ReadPair,
    prepared: Prepared,
    session: &mut Session,
    run: bool,
    limit: Option<&RateLimit>,
    watch: &mut Stopwatch<'_>,
    cancel: &Cancel,
    tell: TellRunning<'_>,
    let_go: &mut bool,
) -> Result<Loaded> {
    let Prepared { fit, token, rendezvous } = prepared;
    watch.phase("load");
    watch.progress.expect(fit.ledger.left_bytes());
    if let Err(error) = token.leave(&mut session.client) {
        watch
            .observer
            .warn(&format!("a restore that breaks off cannot be taken up again: {}", error.chain()));
    }
    let (opening, setup) = opening(image, &fit)?;
    // QEMU starts the guest, or does not, by what it was told last.
    if run {
        session.client.cont()?
    } else {
        session.client.stop()?
    }
    let (main, urgent) = connect(session, rendezvous.as_ref())?;
    let preempt = urgent.is_some();

    let requests = Requests::new(fit.blocks);
    let mut server = Server::new(image, pair, fit.ledger, requests, &setup, main, urgent, limit)?;
    server.open_with(opening);
    let signs = Signs::default();
    let stop = Cancel::new().map_err(|error| Error::io("cannot create an eventfd", error))?;
    let counters = watch.progress.counters();
    let (running, served) = std::thread::scope(|scope| {
        let served = scope.spawn(|| (server.serve(&signs, counters, &stop), Instant::now()));
        let running = wait_until_running(session, run, &signs, watch.observer, cancel);
        if running.is_err() && !signs.may_run.load(Ordering::Acquire) {
            stop.cancel();
        }
        if let Ok(Some(at)) = running {
            tell(so_far(at, counters.bytes_written.load(Ordering::Relaxed)), watch.so_far());
        }
        let served = served.join();
        (
            running,
            served.unwrap_or_else(|_| {
                (Err(Error::new(Kind::Io, "the thread that serves pages panicked")), Instant::now())
            }),
        )
    });
    let (served, resident_at) = served;
    *let_go = signs.may_run.load(Ordering::Acquire);
    let served = match (served, running.as_ref()) {
        (Ok(served), Ok(_)) => served,
        // What the server says is the cause; that QEMU went away, its echo.
        (Err(error), _) if error.kind() != Kind::Peer => return Err(broken(error, session, let_go)),
        (_, Err(_)) => return Err(broken(running.unwrap_err(), session, let_go)),
        (Err(error), _) => return Err(broken(error, session, let_go)),
    };
    let end = session.incoming_end()?;
    if end.status != "completed" {
        return Err(load_failed(&end));
    }
    if let Err(error) = Token::remove(&mut session.client) {
        watch.observer.warn(&format!("a note in QEMU was not removed: {}", error.chain()));
    }
    let (faults, read_bytes) = (FaultReport::of(&served, preempt), served.read_bytes);
    let running_at = running?.or(signs.loaded_at.get().copied()).unwrap_or(resident_at);
    watch.progress.complete();
    Ok(Loaded {
        run_state: session.client.status()?.status,
        resident_at: Some(resident_at),
        faults: Some(faults),
        ..so_far(running_at, read_bytes)
    })
}

/// What there is to say of a guest that runs since then.
fn so_far(running_at: Instant, read_bytes: u64) -> Loaded {
    Loaded {
        mode: Mode::Lazy,
        mode_reason: None,
        read_bytes,
        via: Via::Socket,
        reason: None,
        run_state: "running".to_owned(),
        running_at,
        resident_at: None,
        faults: None,
    }
}

/// Switches on what a lazy restore needs; a place to meet in where pages that are asked for can have a connection of
/// their own.
fn configure(session: &mut Session, pid: Option<u32>, observer: &dyn Observer) -> Result<Option<Rendezvous>> {
    let parameters = [("mode", json!("normal")), ("tls-creds", json!(""))];
    let knows = session.version.major >= PREEMPT_SINCE && session.knows_capability(POSTCOPY_PREEMPT)?;
    if knows {
        let rendezvous = match pid {
            Some(pid) => Rendezvous::new(pid),
            None => qemu::find_process(session, None).and_then(|peer| Rendezvous::new(peer.pid())),
        };
        match rendezvous {
            Ok(rendezvous) => {
                let configured = session.configure(&[POSTCOPY_RAM, POSTCOPY_PREEMPT], &parameters);
                return configured.map(|()| Some(rendezvous)).map_err(explain_refusal);
            }
            Err(error) => observer.note(&format!("one connection for all pages: {}", error.chain())),
        }
    }
    session.configure(&[POSTCOPY_RAM], &parameters).map(|()| None).map_err(explain_refusal)
}

/// Has QEMU take its guest from us: the main channel, and the one for pages that are asked for.
fn connect(
    session: &mut Session,
    rendezvous: Option<&Rendezvous>,
) -> Result<(UnixStream, Option<UnixStream>)> {
    let mut arguments = json!({});
    if (session.version.major, session.version.minor) >= EXIT_ON_ERROR_SINCE {
        arguments["exit-on-error"] = false.into();
    }
    if let Some(rendezvous) = rendezvous {
        arguments["uri"] = rendezvous.uri().into();
        session.client.execute("migrate-incoming", arguments)?;
        // QEMU takes the first for the main channel.
        return Ok((rendezvous.connect()?, Some(rendezvous.connect()?)));
    }
    let (ours, theirs) =
        UnixStream::pair().map_err(|error| Error::io("cannot create a socket pair", error))?;
    session.give_fd(CHANNEL, theirs.as_fd())?;
    arguments["uri"] = format!("fd:{CHANNEL}").into();
    session.incoming(CHANNEL, arguments)?;
    Ok((ours, None))
}

/// Waits until the guest runs and says since when; `None` where it is to stay paused.
///
/// An interrupt ends the wait as long as the guest cannot run. From then on it depends on this process, which goes on
/// until all memory is there.
fn wait_until_running(
    session: &mut Session,
    run: bool,
    signs: &Signs,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<Option<Instant>> {
    let mut warned = false;
    loop {
        match session.client.next_event(None) {
            Ok(Some(event)) if event.name == "RESUME" && run => {
                session.client.ignore_cancel(RUN_TIMEOUT);
                return Ok(Some(Instant::now()));
            }
            Ok(Some(event)) if event.name == "MIGRATION" => {}
            Ok(_) => continue,
            Err(error) if error.kind() == Kind::Interrupted && signs.may_run.load(Ordering::Acquire) => {
                session.client.ignore_cancel(RUN_TIMEOUT);
            }
            Err(error) => return Err(error),
        }
        if cancel.is_cancelled() && signs.may_run.load(Ordering::Acquire) && !warned {
            warned = true;
            observer.warn("the guest needs this process until its memory is there: it goes on");
        }
        let info = session.client.migration()?;
        match info.status.as_str() {
            "completed" if run => {
                // QEMU does not say why it started nothing: its disks, mostly. Asked again it does.
                session.client.cont()?;
                return Ok(Some(Instant::now()));
            }
            "completed" => return Ok(None),
            "failed" => return Err(load_failed(&info)),
            "postcopy-paused" => return Err(Error::new(Kind::Peer, "QEMU has paused the migration")),
            _ => {}
        }
    }
}

/// The error that a lazy restore broke off with: what became of the guest, and what mends it.
fn broken(error: Error, session: &mut Session, let_go: &mut bool) -> Error {
    if *let_go {
        // QEMU ends where its source goes away before it has loaded the devices, and may have ended by itself. One whose
        // main loop waits for a page does not answer: its guest runs.
        session.client.ignore_cancel(ANSWER_TIMEOUT);
        let is_gone = |error: &Error| error.hint_text() == Some(CLOSED_HINT);
        *let_go = !session.client.status().as_ref().is_err_and(is_gone);
    }
    if !*let_go {
        return error;
    }
    // What was changed in QEMU is put back by whoever gives the guest the rest: it is in use until then.
    session.leave_as_it_is();
    error.hint(TAKE_UP_HINT)
}

/// What mends a QEMU that refuses postcopy.
fn explain_refusal(error: Error) -> Error {
    // "Userfaultfd not available: Operation not permitted" since 8.0; "Userfaultfd not available" before, on stderr.
    let text = error.chain();
    if error.kind() == Kind::Unsupported {
        return error.hint("restore with --mode eager");
    }
    if text.contains("serfault") || text.contains("Postcopy is not supported") {
        return error.hint(
            "let QEMU's user catch faults: sysctl vm.unprivileged_userfaultfd=1, access to /dev/userfaultfd, \
             or CAP_SYS_PTRACE; or restore with --mode eager",
        );
    }
    error
}

/// The bytes that come before the first page, and the list of blocks in them.
fn opening(image: &MappedRamFile, fit: &Fit) -> Result<(Vec<u8>, RamSetup)> {
    let layout = image.layout();
    let setup = ram_setup(image, &fit.blocks, fit.target_page);
    let device_state = image.read(layout.device_state)?;
    let Some(sections) = device_state.strip_suffix(&[QEMU_VM_EOF]) else {
        let clause = format!("{}: device state has no end mark", image.path().display());
        return Err(Error::new(Kind::Damaged, clause));
    };
    // One page, of which nothing was sent yet: that there is a discard is what matters.
    let discards = fit
        .blocks
        .first()
        .map(|block| (block.name.clone(), vec![DiscardRange { start: 0, len: block.host_page }]));
    let opening = Opening {
        preamble: Preamble { configuration: layout.preamble.configuration.clone().map(plain) },
        section_id: layout.ram.section_id,
        setup: setup.clone(),
        advise: PostcopyAdvise {
            page_size_summary: fit.page_size_summary,
            target_page_size: fit.target_page,
        },
        discards: discards.into_iter().collect(),
        device_state: sections,
    };
    let mut bytes = Vec::with_capacity(sections.len() + (64 << 10));
    match opening.encode(&mut bytes) {
        Some(()) => Ok((bytes, setup)),
        None => Err(Error::new(Kind::Unsupported, "the device state is longer than 4 GiB")
            .hint("restore with --mode eager")),
    }
}

/// The list of blocks as a target with these pages has it.
fn ram_setup(image: &MappedRamFile, targets: &[RequestedBlock], target_page: u64) -> RamSetup {
    let entry = |(block, target): (&wire::mapped_ram::BlockPlacement, &RequestedBlock)| {
        let page_size = tells_page_size(target.host_page, target_page).then_some(target.host_page);
        wire::qemu::BlockEntry { page_size, address: None, ..block.entry() }
    };
    let blocks = image.layout().blocks.iter().zip(targets).map(entry).collect();
    RamSetup { blocks, multifd_flush: false }
}
