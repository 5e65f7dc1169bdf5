//! Pieces on their way: read where they come from a file, filled, written, several at a time where there is a ring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::pool::Pool;
use super::span::{Span, Stop, aligned_middle};
use super::work::Lane;
use super::{LaneError, RingWrite};
use crate::counters::add;
use crate::file_supply::FileSupply;
use crate::ring::{Direction, Ring, Transfer};
use crate::supply::{Piece, Scratch, Supplied, runs};

/// A piece and the buffer that its bytes are in. Every request of the piece has a share of it, and when the last
/// comes home the buffer is free.
pub(super) struct Loaded {
    piece: Piece,
    scratch: Scratch,
    /// Where in the target's memory the piece begins, if it is read to its place. Its buffer only holds its turn then,
    /// and is not touched.
    place: Option<*mut u8>,
}

impl Loaded {
    /// Where the piece is read to.
    fn base(&self) -> *mut u8 {
        self.place.unwrap_or_else(|| self.scratch.base())
    }

    /// What kept the bytes of a span from being read. Where the target's own memory could not be had, it is the target
    /// that failed.
    fn unread(&self, base: *const u8, len: usize, source: io::Error) -> LaneError {
        match self.place {
            Some(place) if source.raw_os_error() == Some(libc::EFAULT) => {
                let from = base.addr().saturating_sub(place.addr()) as u64;
                let Piece { region, target, .. } = self.piece;
                LaneError::Write { region, offset: target + from, len, source: Arc::new(source) }
            }
            _ => unsupplied(&self.piece, source),
        }
    }
}

/// A request that is under way or waits to be.
pub(super) struct Flight {
    loaded: Rc<Loaded>,
    direction: Direction,
    /// What is left to be moved.
    span: Span,
    /// When it set out. How long it was under way is known when the lane looks, which may be later.
    since: Instant,
}

/// Everything that a lane has in hand.
///
/// The ring is dropped first, which waits for what the kernel still has.
pub(super) struct Flights<'a> {
    ring: Option<Ring<Flight>>,
    lane: &'a Lane,
    /// What the ring had no room for, and what has to be done again.
    waiting: VecDeque<Flight>,
    pool: Pool,
    spare: Option<Scratch>,
    /// How many pieces are being read.
    reading: usize,
}

impl<'a> Flights<'a> {
    pub(super) fn new(lane: &'a Lane, ring: Option<Ring<Flight>>, first: &Piece) -> Flights<'a> {
        // Pieces of one job have one grain, but the first may be a short one.
        let len = crate::PIECE_GRAINS as usize * first.grain as usize;
        let pool = Pool::new(lane.lanes, len, ring.is_some());
        Flights { ring, lane, waiting: VecDeque::new(), pool, spare: None, reading: 0 }
    }

    /// Whether pieces are being read, which have to be written afterwards.
    pub(super) fn is_reading(&self) -> bool {
        self.reading > 0
    }

    /// Whether there is a buffer for another piece. Only where there is none is anything taken home.
    pub(super) fn has_room(&mut self) -> Result<bool, LaneError> {
        self.send()?;
        self.take_spare()?;
        if self.spare.is_none() {
            self.advance()?;
            self.take_spare()?;
        }
        Ok(self.spare.is_some() && self.waiting.is_empty())
    }

    fn take_spare(&mut self) -> Result<(), LaneError> {
        if self.spare.is_none() {
            self.spare = self.pool.take().map_err(|source| LaneError::start(self.lane.number, source))?;
        }
        Ok(())
    }

    /// Sets a piece on its way when there is room: read by the ring where it is part of a file, straight to its place
    /// where the target is memory, or had from the supply and written.
    pub(super) fn begin(&mut self, piece: Piece) -> Result<(), LaneError> {
        self.lane.check_cancel()?;
        while !self.has_room()? {
            self.wait()?;
        }
        let mut scratch = self.spare.take().expect("a buffer, for which there is room");
        scratch.reserve(piece.len as usize).map_err(|source| LaneError::start(self.lane.number, source))?;
        let place = self.lane.target.memory.as_ref();
        let place = place.and_then(|memory| memory.place_of(piece.target, piece.len as usize));
        let is_read = |file: &&FileSupply| place.is_some() || self.ring.is_some() && file.is_direct();
        match self.lane.supply.as_file().filter(is_read) {
            Some(file) => {
                self.begin_reading(file, Loaded { piece, scratch, place })?;
                self.send()
            }
            None => {
                let supplied = self.lane.supply.supply(&piece, &mut scratch);
                let supplied = supplied.map_err(|source| unsupplied(&piece, source))?;
                self.begin_writing(Loaded { piece, scratch, place: None }, supplied)?;
                self.advance()
            }
        }
    }

    /// Waits until something comes home.
    pub(super) fn wait(&mut self) -> Result<(), LaneError> {
        self.lane.check_cancel()?;
        if let Some(ring) = &mut self.ring {
            ring.wait().map_err(|source| LaneError::start(self.lane.number, source))?;
        }
        self.advance()
    }

    /// Waits until everything is home.
    pub(super) fn land(mut self) -> Result<(), LaneError> {
        self.bring_home()
    }

    fn bring_home(&mut self) -> Result<(), LaneError> {
        self.advance()?;
        while self.ring.as_ref().is_some_and(|ring| !ring.is_idle()) || !self.waiting.is_empty() {
            self.wait()?;
        }
        Ok(())
    }

    /// Starts what waits, as far as the ring has room.
    fn send(&mut self) -> Result<(), LaneError> {
        while self.ring.as_ref().is_some_and(|ring| !ring.is_full()) {
            let Some(flight) = self.waiting.pop_front() else { break };
            self.lane.check_cancel()?;
            self.start(flight)?;
        }
        let Some(ring) = &mut self.ring else { return Ok(()) };
        ring.submit().map_err(|source| LaneError::start(self.lane.number, source))
    }

    /// Starts what waits, and takes home what is done, but of the pieces that have been read only the first.
    ///
    /// To write one may be to copy it. Whoever took all of them home at once would copy a dozen while nothing is
    /// being read, and then read a dozen while nothing is copied.
    fn advance(&mut self) -> Result<(), LaneError> {
        loop {
            self.send()?;
            let mut is_quiet = true;
            while let Some((flight, moved)) = self.ring.as_mut().and_then(Ring::done) {
                self.pool.learn(flight.since.elapsed());
                let reading = self.reading;
                self.arrive(flight, moved)?;
                if self.reading < reading {
                    return self.send();
                }
                is_quiet = false;
            }
            if is_quiet {
                return Ok(());
            }
        }
    }

    fn start(&mut self, mut flight: Flight) -> Result<(), LaneError> {
        let Flight { direction, span, .. } = flight;
        let (descriptor, len) = match direction {
            Direction::Read => {
                add(&self.lane.counters.ring_reads, 1);
                (self.image(), span.len)
            }
            Direction::Write => {
                let direct = self.lane.target.direct.as_deref().expect("a direct write has its file");
                match direct.ring_write(span.base, span.len, span.offset) {
                    RingWrite::Inline => {
                        self.lane.write_direct(direct, span)?;
                        flight.span.len = 0;
                        return self.settle(flight);
                    }
                    RingWrite::Ring { descriptor, len } => {
                        add(&self.lane.counters.write_calls, 1);
                        (descriptor, len.min(span.len))
                    }
                    RingWrite::Refused(error) => {
                        add(&self.lane.counters.write_calls, 1);
                        return self.arrive(flight, Err(error));
                    }
                }
            }
        };
        let transfer = Transfer {
            direction,
            descriptor,
            base: span.base.cast_mut(),
            // A piece has at most 256 grains of 64 KiB.
            len: len as u32,
            offset: span.offset,
        };
        flight.since = Instant::now();
        let ring = self.ring.as_mut().expect("flights are for a ring");
        // SAFETY: what is written lies in grains that the supply named, which stay until their scratch is used
        // again; what is read goes to the scratch itself. The flight shares the scratch, and nobody touches it
        // before the last share comes home. Or it goes to the target's memory, which is the piece's alone, to which
        // nobody has a reference, and which stays mapped as long as the target. Target and files are the lane's,
        // which outlives its ring.
        unsafe { ring.start(transfer, flight) };
        Ok(())
    }

    fn image(&self) -> BorrowedFd<'a> {
        let file = self.lane.supply.as_file().and_then(FileSupply::direct);
        file.expect("only files with direct I/O are read by a ring")
    }

    /// Goes on with a request that has come back.
    fn arrive(&mut self, mut flight: Flight, moved: io::Result<usize>) -> Result<(), LaneError> {
        let span = flight.span;
        flight.span = match (flight.direction, moved) {
            (_, Err(error)) if error.kind() == io::ErrorKind::Interrupted => span,
            (Direction::Write, Ok(0)) => {
                return Err(Stop::Failed(io::ErrorKind::WriteZero.into()).at_direct(&span));
            }
            (Direction::Write, Ok(moved)) => self.lane.advance_direct(span, moved.min(span.len))?,
            (Direction::Write, Err(error)) => return Err(Stop::Failed(error).at_direct(&span)),
            (Direction::Read, Ok(moved)) => self.go_on_reading(&flight.loaded, span, moved.min(span.len))?,
            (Direction::Read, Err(error)) => return Err(flight.loaded.unread(span.base, span.len, error)),
        };
        self.settle(flight)
    }

    /// Queues what is left of a request, or gives its share of the buffer up.
    fn settle(&mut self, flight: Flight) -> Result<(), LaneError> {
        match (flight.span.len, flight.direction) {
            (0, Direction::Read) => self.end_reading(flight.loaded),
            (0, Direction::Write) => {
                self.end_writing(flight.loaded);
                Ok(())
            }
            _ => {
                self.waiting.push_front(flight);
                Ok(())
            }
        }
    }

    /// Reads the marked grains: by the ring what is aligned, at once what is not.
    fn begin_reading(&mut self, file: &FileSupply, loaded: Loaded) -> Result<(), LaneError> {
        let (piece, loaded) = (loaded.piece, Rc::new(loaded));
        let has_ring = self.ring.is_some() && file.is_direct();
        self.reading += 1;
        for (start, end) in runs(piece.mask) {
            let (from, to) = piece.bytes_of(start, end);
            let (base, len) = (loaded.base().wrapping_add(from), to - from);
            let offset = file.offset_of(&piece, from).map_err(|source| unsupplied(&piece, source))?;
            if has_ring && file.is_aligned(base, len, offset) {
                let span = Span { base: base.cast_const(), len, offset, region: piece.region };
                self.queue(&loaded, Direction::Read, span);
            } else {
                self.read_now(file, &loaded, base, len, offset)?;
            }
        }
        self.end_reading(loaded)
    }

    /// What is left of a span of which so many bytes were read. Where that is no longer aligned, it is read at
    /// once.
    fn go_on_reading(&self, loaded: &Loaded, span: Span, moved: usize) -> Result<Span, LaneError> {
        let (_, rest) = span.split_at(moved);
        let file = self.lane.supply.as_file().expect("what is read is a file");
        if moved == 0 {
            return Err(loaded.unread(span.base, span.len, io::ErrorKind::UnexpectedEof.into()));
        }
        if file.is_aligned(rest.base, rest.len, rest.offset) {
            return Ok(rest);
        }
        self.read_now(file, loaded, rest.base.cast_mut(), rest.len, rest.offset)?;
        Ok(Span { len: 0, ..rest })
    }

    /// Reads a part of a piece while this thread waits. It must be in no request.
    fn read_now(
        &self,
        file: &FileSupply,
        loaded: &Loaded,
        base: *mut u8,
        len: usize,
        offset: u64,
    ) -> Result<(), LaneError> {
        // SAFETY: a part of the piece's scratch or of its place in the target's memory that the kernel has not got:
        // runs do not overlap, and what is left of a request has come back.
        unsafe { file.read(base, len, offset) }.map_err(|source| loaded.unread(base, len, source))
    }

    /// Gives up a share of a piece that is being read; with the last of them it can be written, or is there.
    fn end_reading(&mut self, loaded: Rc<Loaded>) -> Result<(), LaneError> {
        let Some(loaded) = Rc::into_inner(loaded) else { return Ok(()) };
        self.reading -= 1;
        let piece = loaded.piece;
        if loaded.place.is_some() {
            let bytes = piece.bytes_in(&piece.mask);
            self.hold_back(bytes)?;
            add(&self.lane.counters.bytes_written, bytes);
            self.end_writing(Rc::new(loaded));
            return Ok(());
        }
        let supplied = Supplied { base: loaded.base(), write: piece.mask };
        self.begin_writing(loaded, supplied)
    }

    /// Waits until so many bytes may be moved, where there is a limit.
    fn hold_back(&mut self, bytes: u64) -> Result<(), LaneError> {
        let lane = self.lane;
        let Some(limit) = &lane.limit else { return Ok(()) };
        // A wait that the switch ends is seen before the next piece.
        let now = Instant::now();
        let until = now + limit.reserve(bytes, now);
        if until > now {
            // Whoever is held up gains nothing by having requests under way, and what they have moved counts only
            // when they are home.
            self.bring_home()?;
            lane.cancel.wait(until.saturating_duration_since(Instant::now()));
        }
        Ok(())
    }

    /// Writes what the supply named: the aligned middle of each run directly, by the ring where there is one, and
    /// what is left at both ends through the page cache.
    fn begin_writing(&mut self, loaded: Loaded, supplied: Supplied) -> Result<(), LaneError> {
        let (lane, piece) = (self.lane, loaded.piece);
        assert!(
            piece.holds(&supplied.write),
            "the supply names grains beyond the piece at {:#x}",
            piece.offset
        );
        // What is left out costs nothing.
        self.hold_back(piece.bytes_in(&supplied.write))?;
        let loaded = Rc::new(loaded);
        for (start, end) in runs(supplied.write) {
            let (from, to) = piece.bytes_of(start, end);
            let run = Span {
                base: supplied.base.wrapping_add(from),
                len: to - from,
                offset: piece.target + from as u64,
                region: piece.region,
            };
            let Some(direct) = lane.target.direct.as_deref() else {
                lane.write_buffered(run)?;
                continue;
            };
            let (head, body) = aligned_middle(run.base.addr(), run.offset, run.len, lane.align);
            if body == 0 {
                lane.write_buffered(run)?;
                continue;
            }
            let (head, rest) = run.split_at(head);
            let (body, tail) = rest.split_at(body);
            lane.write_buffered(head)?;
            match self.ring {
                Some(_) => self.queue(&loaded, Direction::Write, body),
                None => lane.write_direct(direct, body)?,
            }
            lane.write_buffered(tail)?;
        }
        add(&lane.counters.bytes_zero, piece.bytes_in(&left_out(&piece, &supplied)));
        self.end_writing(loaded);
        Ok(())
    }

    /// Gives up a share of a piece that is being written; with the last of them its buffer is free.
    fn end_writing(&mut self, loaded: Rc<Loaded>) {
        if let Some(Loaded { scratch, .. }) = Rc::into_inner(loaded) {
            add(&self.lane.counters.pieces, 1);
            self.pool.put(scratch);
        }
    }

    fn queue(&mut self, loaded: &Rc<Loaded>, direction: Direction, span: Span) {
        let (loaded, since) = (loaded.clone(), Instant::now());
        self.waiting.push_back(Flight { loaded, direction, span, since });
    }
}

/// The grains that the piece asked for and the supply found to be zero.
fn left_out(piece: &Piece, supplied: &Supplied) -> [u64; 4] {
    std::array::from_fn(|i| piece.mask[i] & !supplied.write[i])
}

fn unsupplied(piece: &Piece, source: io::Error) -> LaneError {
    LaneError::Supply { region: piece.region, offset: piece.offset, source: Arc::new(source) }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::*;
    use crate::lane::PositionedWrite;
    use crate::{
        Cancel, Counters, DirectChoice, EngineChoice, LaneOptions, LaneSettings, LaneTarget, ReadPair,
        WriteLanes,
    };

    const PIECES: u64 = 48;
    const PIECE: u64 = 1 << 20;

    /// What notes, at each write, how many reads have begun. It holds the write up until there is a piece that could be
    /// begun.
    #[derive(Default)]
    struct Noted {
        counters: Arc<Counters>,
        dealt: Mutex<u64>,
        more: Condvar,
        begun: Mutex<Vec<u64>>,
    }

    impl PositionedWrite for Noted {
        unsafe fn write_span_at(&self, _: *const u8, len: usize, _: u64) -> io::Result<usize> {
            let begun = self.counters.read().ring_reads;
            let dealt = self.dealt.lock().unwrap();
            let dealt = self.more.wait_while(dealt, |dealt| *dealt <= begun && *dealt < PIECES);
            drop(dealt.unwrap());
            self.begun.lock().unwrap().push(begun);
            Ok(len)
        }
    }

    #[test]
    #[allow(clippy::print_stderr, reason = "a test that cannot look says so")]
    fn while_a_piece_is_copied_the_next_are_read() {
        let source = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        source.as_file().set_len(PIECES * PIECE).unwrap();
        let pair = ReadPair::open(source.path(), DirectChoice::Auto).unwrap();
        if let Err(error) = EngineChoice::IoUring.engine() {
            return eprintln!("not looked at: io_uring: {error}");
        }
        let align = pair.direct_io.alignment();
        let Some(direct) = pair.direct else { return eprintln!("not looked at: no direct I/O here") };
        let supply = FileSupply::new(Some(direct), pair.buffered, align, vec![0]);
        let noted = Arc::new(Noted::default());
        let lanes = WriteLanes::start_with(
            LaneTarget { direct: None, buffered: Box::new(noted.clone()), memory: None },
            Arc::new(supply),
            LaneSettings { lanes: 1, align: 4096 },
            LaneOptions { engine: EngineChoice::IoUring, ..LaneOptions::default() },
            noted.counters.clone(),
            Cancel::new().unwrap(),
        )
        .unwrap();
        for offset in (0..PIECES).map(|number| number * PIECE) {
            let (grain, len, mask) = (4096, PIECE as u32, [u64::MAX; 4]);
            lanes.deal(Piece { region: 0, offset, target: offset, grain, len, mask }).unwrap();
            *noted.dealt.lock().unwrap() += 1;
            noted.more.notify_all();
        }
        lanes.finish().unwrap();
        let begun = noted.begun.lock().unwrap();
        assert_eq!(begun.len() as u64, PIECES);
        for (number, pair) in begun.windows(2).enumerate() {
            assert!(pair[0] == PIECES || pair[1] > pair[0], "at write {}: {begun:?}", number + 1);
        }
    }
}
