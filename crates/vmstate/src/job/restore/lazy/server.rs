//! The source of a postcopy that has an image instead of a guest: one thread, one loop, sockets that never block it.
//!
//! What is asked for goes first; the background fills what is left of the socket. Nothing here waits for QEMU's
//! monitor: QEMU's main loop may itself wait for a page.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use io::{Cancel, Counters, RateLimit, ReadPair};
use page::{PageIndex, PageRange};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, send, sendmsg};
use wire::DecodeError;
use wire::postcopy::format::PING_PACKAGED;
use wire::postcopy::{Message, Requests, Wanted, decode_message};
use wire::qemu::{Item, RamSetup, RecordEncoder};

use super::background::{Background, Next};
use super::latency::Latencies;
use super::ledger::Ledger;
use crate::source::MappedRamFile;
use crate::{Error, Kind, Result};

/// How much of the background is queued at once where it shares its socket with the faults: they wait behind it.
const CHUNK_SHARED: u64 = 64 << 10;
/// The same where they have a channel of their own.
const CHUNK_ALONE: u64 = 256 << 10;
/// How much the main channel's socket holds where faults have their own: target and server need not take turns then.
const BUFFER_LEN: usize = 1 << 20;
/// How much is queued for faults before the queue has to drain.
const ANSWERS_LEN_MAX: usize = 256 << 10;
/// How many requests are taken before the first of them is answered; a target has one a virtual processor.
const REQUESTS_MAX: usize = 1 << 12;
/// How much of the return path is read at once.
const INBOX_LEN: usize = 16 << 10;
/// How many pieces of memory one call sends at the most (linux/uio.h `UIO_MAXIOV`).
const SLICES_MAX: usize = 1024;

/// What the server tells while it runs.
#[derive(Debug, Default)]
pub(super) struct Signs {
    /// All of the opening is on its way: from here on the guest may run at any moment.
    pub may_run: AtomicBool,
    /// When QEMU had loaded the devices: RUN is what it reads next.
    pub loaded_at: OnceLock<Instant>,
}

/// What a server did that came to its end.
#[derive(Debug)]
pub(super) struct Served {
    /// Requests, repeated ones included.
    pub requests: u64,
    /// From a request's arrival until its page was in the socket.
    pub latencies: Waits,
    /// Bytes of pages that were read from the image.
    pub read_bytes: u64,
}

/// How long answers were waited for, apart by what else was under way when they were asked for.
#[derive(Debug)]
pub(super) struct Waits {
    /// The background was sending.
    pub beside: Latencies,
    /// It had nothing to send: held back by a limit, or done.
    pub alone: Latencies,
}

impl Waits {
    fn new() -> Waits {
        Waits { beside: Latencies::new(), alone: Latencies::new() }
    }

    fn add(&mut self, asked: Asked) {
        let latencies = if asked.is_beside { &mut self.beside } else { &mut self.alone };
        latencies.add(asked.at.elapsed());
    }
}

/// When something was asked for, and whether the background was sending then.
#[derive(Clone, Copy, Debug)]
struct Asked {
    at: Instant,
    is_beside: bool,
}

/// Heads of records, and a part of the background's buffer behind them.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Where the heads end; they begin where those of the piece before do.
    heads_end: usize,
    /// Where the bytes are.
    from: usize,
    len: usize,
}

/// One direction of one connection: bytes on their way out, and when each answer among them was asked for. Pages of the
/// background stay where they were read and go before everything that was queued after them.
struct Channel {
    socket: UnixStream,
    out: Vec<u8>,
    /// How much of `out` has gone.
    gone: usize,
    /// Where in `out` an answer ends, and since when it is waited for.
    answers: VecDeque<(usize, Asked)>,
    records: RecordEncoder,
    heads: Vec<u8>,
    pieces: Vec<Piece>,
    /// How many of the pieces have gone, and how much of the next one.
    pieces_gone: usize,
    within: usize,
}

impl Channel {
    fn new(socket: UnixStream, setup: &RamSetup) -> Channel {
        Channel {
            socket,
            out: Vec::new(),
            gone: 0,
            answers: VecDeque::new(),
            records: RecordEncoder::new(setup),
            heads: Vec::new(),
            pieces: Vec::new(),
            pieces_gone: 0,
            within: 0,
        }
    }

    fn pending(&self) -> usize {
        self.out.len() - self.gone + self.pieces.len() - self.pieces_gone
    }

    /// Sends what the socket takes; `bytes` is what the pieces are parts of.
    fn flush(&mut self, bytes: &[u8], latencies: &mut Waits) -> Result<(), Errno> {
        if !self.flush_pieces(bytes)? {
            return Ok(());
        }
        while self.gone < self.out.len() {
            match send(&self.socket, &self.out[self.gone..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(len) => self.gone += len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error),
            }
        }
        while let Some((end, asked)) = self.answers.front()
            && *end <= self.gone
        {
            latencies.add(*asked);
            self.answers.pop_front();
        }
        if self.gone == self.out.len() {
            self.out.clear();
            self.gone = 0;
        }
        Ok(())
    }

    /// Sends what the socket takes of the pieces. Whether all of them have gone.
    fn flush_pieces(&mut self, bytes: &[u8]) -> Result<bool, Errno> {
        while self.pieces_gone < self.pieces.len() {
            let mut slices = Vec::with_capacity(SLICES_MAX.min(2 * self.pieces.len()));
            let mut heads_start = match self.pieces_gone.checked_sub(1) {
                Some(before) => self.pieces[before].heads_end,
                None => 0,
            };
            let mut skip = self.within;
            for piece in &self.pieces[self.pieces_gone..] {
                if slices.len() + 2 > SLICES_MAX {
                    break;
                }
                let heads = &self.heads[heads_start..piece.heads_end];
                heads_start = piece.heads_end;
                for part in [heads, &bytes[piece.from..piece.from + piece.len]] {
                    let skipped = skip.min(part.len());
                    skip -= skipped;
                    if skipped < part.len() {
                        slices.push(IoSlice::new(&part[skipped..]));
                    }
                }
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.socket, &slices, &mut SendAncillaryBuffer::default(), flags) {
                Ok(len) => self.advance(len),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.heads.clear();
        self.pieces.clear();
        (self.pieces_gone, self.within) = (0, 0);
        Ok(true)
    }

    /// So many bytes of the pieces have gone.
    fn advance(&mut self, len: usize) {
        self.within += len;
        while let Some(piece) = self.pieces.get(self.pieces_gone) {
            let heads_start = match self.pieces_gone.checked_sub(1) {
                Some(before) => self.pieces[before].heads_end,
                None => 0,
            };
            let whole = piece.heads_end - heads_start + piece.len;
            if self.within < whole {
                return;
            }
            self.within -= whole;
            self.pieces_gone += 1;
        }
    }
}

/// How far the conversation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Pages are sent.
    Filling,
    /// The end was sent; only the preempt channel still answers.
    Ending,
    /// The target has said that it has all.
    Done,
}

pub(super) struct Server<'a> {
    image: &'a MappedRamFile,
    ledger: Ledger,
    requests: Requests,
    section_id: u32,
    main: Channel,
    urgent: Option<Channel>,
    inbox: Vec<u8>,
    /// The offset on the return path of the inbox's first byte.
    inbox_at: u64,
    waiting: VecDeque<(Wanted, Asked)>,
    stage: Stage,
    served: Served,
    scratch: Vec<u8>,
    background: Option<Background>,
    /// Nothing of the background was read yet that could be sent.
    is_starved: bool,
    limit: Option<&'a RateLimit>,
    /// When the limit lets the background go on.
    not_before: Option<Instant>,
}

impl<'a> Server<'a> {
    /// A server of the pages that `ledger` has left. The limit is the background's: who waits for a page gets it.
    ///
    /// # Errors
    /// As [`Background::start`].
    #[allow(clippy::too_many_arguments, reason = "one call, of what its callers have apart")]
    pub(super) fn new(
        image: &'a MappedRamFile,
        pair: &ReadPair,
        ledger: Ledger,
        requests: Requests,
        setup: &RamSetup,
        main: UnixStream,
        urgent: Option<UnixStream>,
        limit: Option<&'a RateLimit>,
    ) -> Result<Server<'a>> {
        if urgent.is_some() && set_socket_send_buffer_size_force(&main, BUFFER_LEN).is_err() {
            // Without privileges the system's own limit holds, which costs a little speed.
            let _ = set_socket_send_buffer_size(&main, BUFFER_LEN);
        }
        Ok(Server {
            image,
            background: Background::start(pair, &ledger)?,
            is_starved: false,
            ledger,
            requests,
            section_id: image.layout().ram.section_id,
            main: Channel::new(main, setup),
            urgent: urgent.map(|socket| Channel::new(socket, setup)),
            inbox: Vec::with_capacity(INBOX_LEN),
            inbox_at: 0,
            waiting: VecDeque::new(),
            stage: Stage::Filling,
            served: Served { requests: 0, latencies: Waits::new(), read_bytes: 0 },
            scratch: Vec::new(),
            limit,
            not_before: None,
        })
    }

    /// Puts bytes in front of everything else on the main channel.
    pub(super) fn open_with(&mut self, bytes: Vec<u8>) {
        self.main.out = bytes;
    }

    /// What was read of the return path before the server began.
    pub(super) fn has_received(&mut self, bytes: Vec<u8>, at: u64) {
        (self.inbox, self.inbox_at) = (bytes, at);
    }

    /// Serves until the target has all that the image has. `stop` ends it early; nobody throws it once the guest
    /// may run.
    ///
    /// Whatever it ends by, the connections are closed then: a target that lacks pages notices, and waits to be
    /// taken up again.
    ///
    /// # Errors
    /// [`Kind::Io`] where the image cannot be read, [`Kind::Peer`] where the target lies or goes away,
    /// [`Kind::Interrupted`].
    pub(super) fn serve(mut self, signs: &Signs, counters: &Counters, stop: &Cancel) -> Result<Served> {
        let mut opened = false;
        self.take_messages(signs)?;
        while self.stage != Stage::Done {
            self.answer()?;
            self.fill(counters)?;
            self.flush()?;
            if !opened && self.main.pending() == 0 {
                opened = true;
                signs.may_run.store(true, Ordering::Release);
            }
            self.wait(stop)?;
            if stop.is_cancelled() {
                return Err(Error::interrupted());
            }
            self.receive(signs)?;
        }
        Ok(self.served)
    }

    /// Waits until something can be done.
    fn wait(&self, stop: &Cancel) -> Result<()> {
        let when = |wanted: bool, flag: PollFlags| if wanted { flag } else { PollFlags::empty() };
        // Where the main channel has nothing queued, the background has more for it until the end was sent.
        let pause = self.not_before.map(|at| at.saturating_duration_since(Instant::now()));
        let pause = pause.filter(|pause| !pause.is_zero());
        let has_more = self.stage == Stage::Filling && self.waiting.is_empty() && pause.is_none();
        let has_more = has_more && !self.is_starved;
        let main = when(self.waiting.len() < REQUESTS_MAX, PollFlags::IN)
            | when(self.main.pending() > 0 || has_more, PollFlags::OUT);
        let mut fds = vec![PollFd::new(stop, PollFlags::IN), PollFd::new(&self.main.socket, main)];
        if let Some(urgent) = self.urgent.as_ref().filter(|urgent| urgent.pending() > 0) {
            fds.push(PollFd::from_borrowed_fd(urgent.socket.as_fd(), PollFlags::OUT));
        }
        if let Some(background) = self.background.as_ref().filter(|_| self.is_starved) {
            fds.push(PollFd::from_borrowed_fd(background.ready(), PollFlags::IN));
        }
        let timeout = pause.filter(|_| self.stage == Stage::Filling).map(timespec);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(Error::io("cannot wait for QEMU", error)),
        }
    }

    /// Reads what has come on the return path.
    fn receive(&mut self, signs: &Signs) -> Result<()> {
        while self.waiting.len() < REQUESTS_MAX {
            let had = self.inbox.len();
            self.inbox.resize(had + INBOX_LEN, 0);
            let received = recv(&self.main.socket, &mut self.inbox[had..], RecvFlags::DONTWAIT);
            self.inbox.truncate(had + received.as_ref().map_or(0, |(len, _)| *len));
            match received {
                Ok((0, _)) => return Err(self.gone_away(None)),
                Ok(_) => self.take_messages(signs)?,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.gone_away(Some(error))),
            }
            if self.stage == Stage::Done {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes the whole messages of the inbox.
    fn take_messages(&mut self, signs: &Signs) -> Result<()> {
        let now = Instant::now();
        let mut taken = 0;
        loop {
            let at = self.inbox_at + taken as u64;
            let (message, len) = match decode_message(&self.inbox[taken..], at) {
                Ok(found) => found,
                Err(DecodeError::Incomplete { .. }) => break,
                Err(DecodeError::Fault(fault)) => return Err(lies(fault)),
            };
            taken += len;
            match message {
                Message::RequestPages(request) => {
                    let wanted = self.requests.judge(&request, at).map_err(lies)?;
                    self.served.requests += 1;
                    let is_held = self.not_before.is_some_and(|at| at > now) && self.main.pending() == 0;
                    let is_beside = self.stage == Stage::Filling && !is_held;
                    self.waiting.push_back((wanted, Asked { at: now, is_beside }));
                }
                Message::Pong(PING_PACKAGED) => drop(signs.loaded_at.set(now)),
                Message::Pong(_) | Message::SwitchoverAck => {}
                Message::Shut(0) if self.stage == Stage::Ending => {
                    self.stage = Stage::Done;
                    break;
                }
                Message::Shut(error) => {
                    let clause = format!("QEMU ended the migration before it had all pages (error {error})");
                    return Err(Error::new(Kind::Peer, clause));
                }
                Message::ReceivedBitmap { .. } | Message::ResumeAck(_) => {
                    let clause = format!("QEMU sent what nobody asked for at {at:#x} of the return path");
                    return Err(Error::new(Kind::Peer, clause));
                }
            }
        }
        self.inbox.drain(..taken);
        self.inbox_at += taken as u64;
        Ok(())
    }

    /// Queues the pages that were asked for, as far as they were not sent already.
    fn answer(&mut self) -> Result<()> {
        while let Some((wanted, asked)) = self.waiting.front().copied() {
            let channel = self.urgent.as_ref().unwrap_or(&self.main);
            if channel.pending() > ANSWERS_LEN_MAX {
                return Ok(());
            }
            // Without the main channel there is nothing to answer on, and nobody who would have to be: when the
            // target has read the end, a page that is missing is zero.
            let is_answered = self.urgent.is_none() && self.stage != Stage::Filling;
            let page = wanted.pages.start;
            if !is_answered && self.ledger.take(wanted.block, page) {
                let one = PageRange::new(page.0, page.0 + 1);
                self.queue(wanted.block, one, Some(asked))?;
            }
            match self.waiting.front_mut() {
                Some((rest, _)) if page.0 + 1 < rest.pages.end.0 && !is_answered => {
                    rest.pages.start = PageIndex(page.0 + 1);
                }
                _ => drop(self.waiting.pop_front()),
            }
        }
        Ok(())
    }

    /// Queues the next pages of the background, or the end.
    fn fill(&mut self, counters: &Counters) -> Result<()> {
        self.is_starved = false;
        if self.stage != Stage::Filling || self.main.pending() > 0 || !self.waiting.is_empty() {
            return Ok(());
        }
        if self.not_before.is_some_and(|at| at > Instant::now()) {
            return Ok(());
        }
        let chunk = if self.urgent.is_some() { CHUNK_ALONE } else { CHUNK_SHARED };
        let had = self.served.read_bytes;
        match &mut self.background {
            None => match self.ledger.next(chunk) {
                Some((block, run)) => self.queue(block, run, None)?,
                None => return self.end(),
            },
            Some(background) => match self.ledger.next_near(chunk) {
                Some((block, run)) => self.queue(block, run, None)?,
                None => match background.next(self.image, &mut self.ledger, chunk)? {
                    Next::Pages { block, run, from } => self.queue_in_place(block, run, from),
                    Next::NotYet => self.is_starved = true,
                    Next::Nothing => return self.end(),
                },
            },
        }
        if let Some(limit) = self.limit.filter(|_| self.served.read_bytes > had) {
            let now = Instant::now();
            self.not_before = Some(now + limit.reserve(self.served.read_bytes - had, now));
        }
        counters.bytes_written.store(self.served.read_bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Queues host pages of which the background has the bytes, from `from` on, without copying them.
    fn queue_in_place(&mut self, block: usize, run: PageRange, from: usize) {
        let account = &self.ledger.accounts[block];
        let target = account.target_pages(run);
        let page = account.target_page;
        let section_id = self.section_id;
        let Channel { records, heads, pieces, .. } = &mut self.main;
        Item::Part { section_id }.encode(heads);
        for (index, number) in (target.start.0..target.end.0).enumerate() {
            if account.data.contains(PageIndex(number)) {
                records.page_head(block, number * page, heads);
                let (from, len) = (from + index * page as usize, page as usize);
                pieces.push(Piece { heads_end: heads.len(), from, len });
                self.served.read_bytes += page;
            } else {
                records.zero(block, number * page, heads);
            }
        }
        records.eos(heads);
        Item::Footer { section_id }.encode(heads);
        pieces.push(Piece { heads_end: heads.len(), from: 0, len: 0 });
    }

    /// Queues the end of RAM and of the stream.
    fn end(&mut self) -> Result<()> {
        assert_eq!(self.ledger.left_bytes(), 0, "the end is sent behind the last page");
        let section_id = self.section_id;
        let Channel { out, records, .. } = &mut self.main;
        Item::End { section_id }.encode(out);
        records.eos(out);
        Item::Footer { section_id }.encode(out);
        Item::Eof.encode(out);
        self.stage = Stage::Ending;
        Ok(())
    }

    /// Queues host pages: an answer on the preempt channel if there is one, all else on the main channel.
    fn queue(&mut self, block: usize, pages: PageRange, asked: Option<Asked>) -> Result<()> {
        let account = &self.ledger.accounts[block];
        let place = &self.image.layout().blocks[block];
        let target = account.target_pages(pages);
        let page = account.target_page;
        let (channel, section_id) = match (&mut self.urgent, asked) {
            (Some(urgent), Some(_)) => (urgent, None),
            _ => (&mut self.main, Some(self.section_id)),
        };
        let out = &mut channel.out;
        if let Some(section_id) = section_id {
            Item::Part { section_id }.encode(out);
        }
        let mut at = target.start;
        while at < target.end {
            let run = account.data.next_run(at).map(|run| (run.start.max(at), run.end.min(target.end)));
            let (data_start, data_end) = match run {
                Some((start, end)) if start < target.end => (start, end),
                _ => (target.end, target.end),
            };
            for zero in at.0..data_start.0 {
                channel.records.zero(block, zero * page, out);
            }
            let data = PageRange::new(data_start.0, data_end.0);
            self.scratch.resize((data.count().0 * page) as usize, 0);
            self.image.read_pages(place, data, &mut self.scratch)?;
            self.served.read_bytes += self.scratch.len() as u64;
            for (index, bytes) in (data_start.0..).zip(self.scratch.chunks_exact(page as usize)) {
                channel.records.page_head(block, index * page, out);
                out.extend_from_slice(bytes);
            }
            at = data_end;
        }
        if let Some(section_id) = section_id {
            channel.records.eos(out);
            Item::Footer { section_id }.encode(out);
        }
        if let Some(asked) = asked {
            channel.answers.push_back((out.len(), asked));
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let latencies = &mut self.served.latencies;
        let mut flushed = Ok(());
        if let Some(urgent) = &mut self.urgent {
            match urgent.flush(&[], latencies) {
                // The target closes it as soon as it has all.
                Err(Errno::PIPE | Errno::CONNRESET) if self.stage != Stage::Filling => {
                    urgent.out.clear();
                    urgent.gone = 0;
                    urgent.answers.clear();
                }
                other => flushed = other,
            }
        }
        let bytes = self.background.as_ref().map_or(&[][..], Background::bytes);
        flushed.and_then(|()| self.main.flush(bytes, latencies)).map_err(|error| self.gone_away(Some(error)))
    }

    fn gone_away(&self, error: Option<Errno>) -> Error {
        let left = self.ledger.left_bytes();
        let clause = format!("QEMU closed the connection with {left:#x} bytes of its memory to come");
        match error {
            Some(error) => Error::new(Kind::Peer, clause).because(std::io::Error::from(error)),
            None => Error::new(Kind::Peer, clause),
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    // A limit waits for a year at the most.
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}

pub(super) fn lies(fault: wire::Fault) -> Error {
    Error::new(Kind::Peer, format!("QEMU sent what is no return path: {fault}"))
}
