//! A lazy restore whose vmstate has gone is taken up again: QEMU tells what has arrived, and gets the rest.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use io::{Cancel, DirectChoice, ReadPair};
use page::PageCount;
use serde_json::json;
use wire::DecodeError;
use wire::postcopy::{Message, RequestedBlock, Requests, decode_message, decode_received};
use wire::qemu::Command;

use super::super::{in_use, is_cached};
use super::fit::fit;
use super::ledger::Ledger;
use super::rendezvous::Rendezvous;
use super::server::{Server, Signs};
use super::token::Token;
use super::{CHANNEL, FaultReport, POSTCOPY_PREEMPT, POSTCOPY_RAM, ram_setup};
use crate::job::{Observer, Stopwatch};
use crate::net::QmpAddress;
use crate::qemu::{self, Session};
use crate::qmp::{Capability, Client};
use crate::source::{Image, open_image};
use crate::{Error, Kind, Rate, Result};

/// How long a target may take to notice that its source has gone.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to tell what it has. It does nothing else meanwhile.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// How much of the return path is read at once.
const INBOX_LEN: usize = 64 << 10;

/// Which guest to give the rest of its memory, and from where.
#[derive(Clone, Debug)]
pub struct TakeUpSettings {
    /// The image that the restore began with.
    pub image: PathBuf,
    /// The offset in its file or device at which it starts.
    pub offset: u64,
    /// The QEMU that waits for it.
    pub qmp: QmpAddress,
    /// Whether a QEMU is taken that does not say which image its memory comes from.
    pub force: bool,
    /// The limit of what is sent in the background. Who waits for a page gets it.
    pub rate_max: Option<Rate>,
}

/// What became of it.
#[derive(Debug)]
pub struct TakeUpReport {
    /// The run state afterwards.
    pub run_state: String,
    /// QEMU's process, where it could be told.
    pub qemu_pid: Option<u32>,
    /// Bytes of pages that were read.
    pub read_bytes: u64,
    /// Bytes of pages that had arrived before.
    pub arrived_bytes: u64,
    /// From the call until all memory was resident.
    pub resident: Duration,
    /// How the guest's own requests fared.
    pub faults: FaultReport,
}

/// Gives a guest the rest of its memory, whose lazy restore was killed or broke off.
///
/// # Errors
/// [`Kind::Misuse`] where the QEMU waits for no memory, or for another image's; [`Kind::Peer`], [`Kind::Io`],
/// after which it can be tried again.
pub fn take_up(settings: &TakeUpSettings, cancel: &Cancel, observer: &dyn Observer) -> Result<TakeUpReport> {
    let mut watch = Stopwatch::start(observer);
    watch.phase("check image");
    let file = open_image(&settings.image)?;
    let image = Image::from_file(file, &settings.image, settings.offset)?;
    let data_bytes = image.data_bytes()?;
    let Image::MappedRam(image) = image else {
        return Err(super::super::mode::refuse_stream());
    };
    // The very file that was looked at, whatever its name stands for.
    let path = format!("/proc/self/fd/{}", image.file().as_raw_fd());
    let mut pair = ReadPair::open(path.as_ref(), DirectChoice::Auto)
        .map_err(|error| Error::io(format!("cannot open {}", settings.image.display()), error))?;
    in_use::while_read(&pair.buffered, &settings.image)?;
    if is_cached(&pair, data_bytes) {
        pair.direct = None;
    }
    watch.phase("connect");
    let mut client = Client::connect(&settings.qmp, cancel)?;
    let version = client.version()?;
    wait_until_paused(&mut client)?;
    let token = Token::find(&mut client)?;
    match &token {
        Some(token) if token.is_of(&image)? => {}
        Some(_) => {
            let clause = format!("the guest's memory does not come from {}", settings.image.display());
            return Err(Error::new(Kind::Misuse, clause).hint("give the image that its restore began with"));
        }
        None if settings.force => {}
        None => {
            return Err(Error::new(Kind::Misuse, "QEMU does not say which image its memory comes from")
                .hint("if you are sure that it is this one, add --force"));
        }
    }
    let on: Vec<_> = client.capabilities()?.into_iter().filter(|c| c.state).map(|c| c.name).collect();
    let preempt = on.iter().any(|name| name == POSTCOPY_PREEMPT);
    let mut session = Session::bare(client, version);
    let targets = qemu::host_blocks(&mut session.client)?;
    let fit = fit(&image, &mut session, &targets, None)?;

    watch.phase("load");
    let (rendezvous, mut main) = reconnect(&mut session, preempt)?;
    let mut ledger = fit.ledger;
    let before = ledger.left_bytes();
    ask_what_has_arrived(&mut main, &mut ledger, &fit.blocks)?;
    let arrived_bytes = before - ledger.left_bytes();
    let urgent = rendezvous.as_ref().map(Rendezvous::connect).transpose()?;
    let (inbox, inbox_at) = go_on(&mut main)?;
    watch.progress.expect(ledger.left_bytes());
    session.client.ignore_cancel(HANDSHAKE_TIMEOUT);

    let setup = ram_setup(&image, &fit.blocks, fit.target_page);
    let requests = Requests::new(fit.blocks);
    let limit = settings.rate_max.map(Rate::limit);
    let mut server = Server::new(&image, &pair, ledger, requests, &setup, main, urgent, limit.as_deref())?;
    server.has_received(inbox, inbox_at);
    let signs = Signs::default();
    signs.may_run.store(true, Ordering::Release);
    // Nobody throws it: a guest that runs is not left without its memory.
    let never = Cancel::new().map_err(|error| Error::io("cannot create an eventfd", error))?;
    let served = server.serve(&signs, watch.progress.counters(), &never)?;
    let resident_at = Instant::now();
    drop(rendezvous);
    watch.progress.complete();
    let end = session.incoming_end()?;
    if end.status != "completed" {
        return Err(super::load_failed(&end));
    }
    let was_on = |name: &str| token.as_ref().is_some_and(|token| token.on.iter().any(|on| on == name));
    let off: Vec<_> = [POSTCOPY_RAM, POSTCOPY_PREEMPT]
        .into_iter()
        .filter(|name| on.iter().any(|on| on == name) && !was_on(name))
        .map(|name| Capability { name: name.to_owned(), state: false })
        .collect();
    session.client.set_capabilities(&off)?;
    Token::remove(&mut session.client)?;
    let run_state = session.client.status()?.status;
    let started = watch.started;
    Ok(TakeUpReport {
        run_state,
        qemu_pid: session.client.listener_pid(),
        read_bytes: served.read_bytes,
        arrived_bytes,
        resident: resident_at.duration_since(started),
        faults: FaultReport::of(&served, preempt),
    })
}

/// Makes sure that QEMU has lost its source. It may need a moment to notice.
fn wait_until_paused(client: &mut Client) -> Result<()> {
    let deadline = Instant::now() + NOTICE_TIMEOUT;
    loop {
        let status = client.migration()?.status;
        match status.as_str() {
            "postcopy-paused" => return Ok(()),
            "postcopy-active" | "postcopy-recover" | "postcopy-recover-setup" => {
                if client.next_event(Some(deadline))?.is_none() {
                    let clause = format!("the guest's memory is still on its way (status `{status}`)");
                    return Err(Error::new(Kind::Misuse, clause)
                        .hint("another vmstate sends it: wait for that to end"));
                }
            }
            _ => {
                let status = if status.is_empty() { "none" } else { &status };
                let clause = format!("this guest waits for no memory (migration status `{status}`)");
                return Err(Error::new(Kind::Misuse, clause)
                    .hint("only a restore with --mode lazy that broke off can be taken up again"));
            }
        }
    }
}

/// Gives QEMU a new connection, and a place for a second one where it needs that.
fn reconnect(session: &mut Session, preempt: bool) -> Result<(Option<Rendezvous>, UnixStream)> {
    let recover = |session: &mut Session, uri: &str| {
        session.client.execute("migrate-recover", json!({ "uri": uri })).map(drop)
    };
    if preempt {
        let pid = qemu::find_process(session, None)?.pid();
        let rendezvous = Rendezvous::new(pid)?;
        recover(session, &rendezvous.uri())?;
        let main = rendezvous.connect()?;
        return Ok((Some(rendezvous), main));
    }
    let (ours, theirs) =
        UnixStream::pair().map_err(|error| Error::io("cannot create a socket pair", error))?;
    session.give_fd(CHANNEL, theirs.as_fd())?;
    recover(session, &format!("fd:{CHANNEL}"))?;
    session.has_taken(CHANNEL);
    Ok((None, ours))
}

fn silent(error: std::io::Error) -> Error {
    Error::new(Kind::Peer, "QEMU does not say which pages it has").because(error)
}

/// Asks for the bitmap of every block, and notes what is there.
fn ask_what_has_arrived(main: &mut UnixStream, ledger: &mut Ledger, blocks: &[RequestedBlock]) -> Result<()> {
    main.set_read_timeout(Some(HANDSHAKE_TIMEOUT)).map_err(silent)?;
    let (mut bytes, mut at) = (Vec::new(), 0);
    for (index, block) in blocks.iter().enumerate() {
        let mut command = Vec::new();
        Command::RecvBitmap { block: block.name.clone() }.encode(&mut command);
        main.write_all(&command).map_err(silent)?;
        let message = take(main, &mut bytes, &mut at, decode_message)?;
        if message != (Message::ReceivedBitmap { block: block.name.clone() }) {
            let clause =
                format!("QEMU answers {message:?} where it was asked for the pages of `{}`", block.name);
            return Err(Error::new(Kind::Peer, clause));
        }
        let pages = PageCount(block.length / ledger.accounts[index].target_page);
        let arrived = take(main, &mut bytes, &mut at, |bytes, at| decode_received(bytes, at, pages))?;
        ledger.has_arrived(index, &arrived);
    }
    match bytes.is_empty() {
        true => Ok(()),
        false => Err(Error::new(Kind::Peer, "QEMU says more than it was asked for")),
    }
}

/// Lets QEMU go on. What it has said beyond that is the beginning of its requests.
fn go_on(main: &mut UnixStream) -> Result<(Vec<u8>, u64)> {
    let mut command = Vec::new();
    Command::PostcopyResume.encode(&mut command);
    main.write_all(&command).map_err(silent)?;
    let (mut bytes, mut at) = (Vec::new(), 0);
    match take(main, &mut bytes, &mut at, decode_message)? {
        Message::ResumeAck(_) => {}
        other => {
            return Err(Error::new(Kind::Peer, format!("QEMU answers {other:?} where it was to go on")));
        }
    }
    main.set_read_timeout(None).map_err(silent)?;
    Ok((bytes, at))
}

/// Takes one thing off the return path, reading as much as it needs.
fn take<T>(
    main: &mut UnixStream,
    bytes: &mut Vec<u8>,
    at: &mut u64,
    decode: impl Fn(&[u8], u64) -> std::result::Result<(T, usize), DecodeError>,
) -> Result<T> {
    loop {
        match decode(bytes, *at) {
            Ok((found, len)) => {
                bytes.drain(..len);
                *at += len as u64;
                return Ok(found);
            }
            Err(DecodeError::Fault(fault)) => return Err(super::server::lies(fault)),
            Err(DecodeError::Incomplete { .. }) => {
                let had = bytes.len();
                bytes.resize(had + INBOX_LEN, 0);
                let len = main.read(&mut bytes[had..]).map_err(silent)?;
                bytes.truncate(had + len);
                if len == 0 {
                    return Err(silent(std::io::ErrorKind::UnexpectedEof.into()));
                }
            }
        }
    }
}
