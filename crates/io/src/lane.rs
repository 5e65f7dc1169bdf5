//! Lanes: threads that write pieces at fixed offsets of a file.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::cancel::Cancel;
use crate::counters::{Counters, add};
use crate::queue::Queue;
use crate::rate_limit::RateLimit;
use crate::supply::{Piece, Scratch, Supplied, Supply, runs};

/// The most lanes that can be started.
const LANES_MAX: usize = 256;

/// How many pieces wait for each lane: enough that none runs dry while the planner looks for the next.
const QUEUED_PER_LANE: usize = 4;

/// The page cache's unit, below which no alignment is accepted: a direct write must never share a cached
/// page with a buffered one, or the write-back of the latter could bring stale bytes over the former.
const ALIGN_MIN: usize = 4096;

/// A file that takes spans of raw memory at an offset. A lane writes through it; tests put faults under it.
pub trait PositionedWrite: Send + Sync {
    /// Writes up to `len` bytes from `base` at the file offset `offset`, and says how many it wrote.
    ///
    /// It never moves a file position, so any number of lanes may call it at once. A short count and
    /// `Interrupted` are ordinary answers; the lane goes on from there.
    ///
    /// # Errors
    /// What the system said; nothing is known then about the bytes of this call.
    ///
    /// # Safety
    /// `base..base + len` must be mapped and readable during the call. The bytes may change meanwhile.
    unsafe fn write_span_at(&self, base: *const u8, len: usize, offset: u64) -> io::Result<usize>;
}

impl PositionedWrite for File {
    unsafe fn write_span_at(&self, base: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        let offset =
            libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        // SAFETY: the caller keeps the span mapped and readable; the kernel copies or pins it before it
        // returns, and tolerates that the bytes change.
        let written = unsafe { libc::pwrite(self.as_raw_fd(), base.cast(), len, offset) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}

/// Where lanes write: two openings of one file.
pub struct LaneTarget {
    /// Opened with O_DIRECT; takes the aligned runs. Without it everything goes through the page cache.
    pub direct: Option<Box<dyn PositionedWrite>>,
    /// Opened without; takes unaligned heads and tails.
    pub buffered: Box<dyn PositionedWrite>,
}

impl LaneTarget {
    /// The target made of real files.
    pub fn files(direct: Option<File>, buffered: File) -> LaneTarget {
        let direct = direct.map(|file| -> Box<dyn PositionedWrite> { Box::new(file) });
        LaneTarget { direct, buffered: Box::new(buffered) }
    }
}

/// How lanes work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneSettings {
    /// How many threads, from 1 to 256.
    pub lanes: usize,
    /// What memory address, file offset and length of a direct write are multiples of: a power of two, at
    /// least 4096. [`crate::DirectIo::alignment`] has it.
    pub align: usize,
}

/// What lanes have beside the numbers that they cannot do without.
#[derive(Clone, Debug, Default)]
pub struct LaneOptions {
    /// How many bytes a second all of them together may write; `None` holds nobody up. Others may share it.
    pub limit: Option<Arc<RateLimit>>,
}

/// Why lanes stopped. The first failure is the one reported, by `deal` and by `finish` alike.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LaneError {
    /// The file did not take the bytes.
    #[error("write of {len:#x} bytes at file offset {offset:#x} (region {region})")]
    Write {
        /// The region of the piece.
        region: u32,
        /// The file offset at which the write failed.
        offset: u64,
        /// How many bytes were to be written there.
        len: usize,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A direct write was refused as misaligned (EINVAL): the file system does not take direct I/O as its
    /// probe promised.
    #[error(
        "direct write of {len:#x} bytes at file offset {offset:#x} (region {region}) refused as misaligned"
    )]
    DirectRefused {
        /// The region of the piece.
        region: u32,
        /// The file offset of the refused write.
        offset: u64,
        /// Its length.
        len: usize,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The bytes of a piece could not be had.
    #[error("memory of region {region} at {offset:#x}")]
    Supply {
        /// The region of the piece.
        region: u32,
        /// The piece's offset in its region.
        offset: u64,
        /// What the supply said.
        source: Arc<io::Error>,
    },
    /// A lane's thread or its slab could not be had.
    #[error("start of lane {lane}")]
    Start {
        /// Which lane.
        lane: usize,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A lane's thread panicked: a fault of this program.
    #[error("lane {lane} panicked: {message}")]
    Panicked {
        /// Which lane.
        lane: usize,
        /// The message of the panic.
        message: String,
    },
    /// The switch was thrown.
    #[error("cancelled")]
    Cancelled,
}

/// Running lanes. Dropping them without [`WriteLanes::finish`] stops them and waits for their threads.
pub struct WriteLanes {
    queue: Arc<Queue>,
    cancel: Cancel,
    threads: Vec<JoinHandle<()>>,
}

impl WriteLanes {
    /// Starts the threads. Each takes its slab when its first piece arrives.
    ///
    /// # Errors
    /// [`LaneError::Start`] when a thread cannot be started; those that were are gone again.
    ///
    /// # Panics
    /// When the settings are outside of what their docs say.
    pub fn start(
        target: LaneTarget,
        supply: Arc<dyn Supply>,
        settings: LaneSettings,
        counters: Arc<Counters>,
        cancel: Cancel,
    ) -> Result<WriteLanes, LaneError> {
        WriteLanes::start_with(target, supply, settings, LaneOptions::default(), counters, cancel)
    }

    /// [`WriteLanes::start`] with more to say.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn start_with(
        target: LaneTarget,
        supply: Arc<dyn Supply>,
        settings: LaneSettings,
        options: LaneOptions,
        counters: Arc<Counters>,
        cancel: Cancel,
    ) -> Result<WriteLanes, LaneError> {
        let LaneSettings { lanes, align } = settings;
        assert!((1..=LANES_MAX).contains(&lanes), "{lanes} lanes");
        assert!(align.is_power_of_two() && align >= ALIGN_MIN, "lanes aligned to {align:#x} bytes");
        let queue = Arc::new(Queue::new(lanes * QUEUED_PER_LANE));
        let target = Arc::new(target);
        // From here on an early return drops `started`, which stops and joins the threads it has.
        let mut started = WriteLanes { queue: queue.clone(), cancel: cancel.clone(), threads: Vec::new() };
        for number in 0..lanes {
            let lane = Lane {
                number,
                align,
                queue: queue.clone(),
                target: target.clone(),
                supply: supply.clone(),
                limit: options.limit.clone(),
                counters: counters.clone(),
                cancel: cancel.clone(),
            };
            let thread = thread::Builder::new()
                .name(format!("lane {number}"))
                .spawn(move || lane.run_guarded())
                .map_err(|source| LaneError::Start { lane: number, source: Arc::new(source) })?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// Hands a piece to the next free lane; blocks while the queue is full.
    ///
    /// # Errors
    /// The first failure of a lane, or [`LaneError::Cancelled`]; the piece is then not written.
    ///
    /// # Panics
    /// When the piece is not as the docs of [`Piece`] demand.
    pub fn deal(&self, piece: Piece) -> Result<(), LaneError> {
        piece.assert_whole();
        if self.cancel.is_cancelled() {
            // The queue is told as well: lanes that wait for a piece would not look at the switch.
            self.queue.fail(LaneError::Cancelled);
        }
        self.queue.push(piece)
    }

    /// Waits until everything dealt is written, and ends the threads.
    ///
    /// Afterwards nothing reads the supply and nothing writes to the target. The bytes are in the file, not
    /// yet on stable storage.
    ///
    /// # Errors
    /// The first failure of a lane, or [`LaneError::Cancelled`] when the switch was thrown before the end.
    pub fn finish(mut self) -> Result<(), LaneError> {
        self.queue.close();
        self.join();
        match self.queue.failure() {
            Some(failure) => Err(failure),
            None if self.cancel.is_cancelled() => Err(LaneError::Cancelled),
            None => Ok(()),
        }
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A lane catches its own panics, so there is nothing in the result.
            let _ = thread.join();
        }
    }
}

impl Drop for WriteLanes {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.queue.fail(LaneError::Cancelled);
            self.join();
        }
    }
}

struct Lane {
    number: usize,
    align: usize,
    queue: Arc<Queue>,
    target: Arc<LaneTarget>,
    supply: Arc<dyn Supply>,
    limit: Option<Arc<RateLimit>>,
    counters: Arc<Counters>,
    cancel: Cancel,
}

impl Lane {
    fn run_guarded(&self) {
        let failure = match catch_unwind(AssertUnwindSafe(|| self.run())) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(panic) => LaneError::Panicked { lane: self.number, message: panic_message(&*panic) },
        };
        self.queue.fail(failure);
    }

    fn run(&self) -> Result<(), LaneError> {
        let Some(mut piece) = self.queue.pop() else { return Ok(()) };
        let mut scratch = Scratch::new(piece.len as usize).map_err(|source| self.no_slab(source))?;
        scratch.touch();
        loop {
            self.check_cancel()?;
            scratch.reserve(piece.len as usize).map_err(|source| self.no_slab(source))?;
            self.move_piece(&piece, &mut scratch)?;
            match self.queue.pop() {
                Some(next) => piece = next,
                None => return Ok(()),
            }
        }
    }

    fn move_piece(&self, piece: &Piece, scratch: &mut Scratch) -> Result<(), LaneError> {
        let supplied = self.supply.supply(piece, scratch).map_err(|source| LaneError::Supply {
            region: piece.region,
            offset: piece.offset,
            source: Arc::new(source),
        })?;
        assert!(
            piece.holds(&supplied.write),
            "the supply names grains beyond the piece at {:#x}",
            piece.offset
        );
        if let Some(limit) = &self.limit {
            // What is left out costs nothing. A wait that the switch ends is seen before the next write.
            limit.wait(piece.bytes_in(&supplied.write), &self.cancel);
        }
        for (start, end) in runs(supplied.write) {
            let (from, to) = piece.bytes_of(start, end);
            let span = Span {
                base: supplied.base.wrapping_add(from),
                len: to - from,
                offset: piece.target + from as u64,
                region: piece.region,
            };
            self.write_run(span)?;
        }
        add(&self.counters.bytes_zero, piece.bytes_in(&left_out(piece, &supplied)));
        add(&self.counters.pieces, 1);
        Ok(())
    }

    /// Writes one run: the aligned middle directly, what is left at both ends through the page cache.
    fn write_run(&self, run: Span) -> Result<(), LaneError> {
        let Some(direct) = self.target.direct.as_deref() else { return self.write_buffered(run) };
        let (head, body) = aligned_middle(run.base.addr(), run.offset, run.len, self.align);
        if body == 0 {
            return self.write_buffered(run);
        }
        let (head, rest) = run.split_at(head);
        let (body, tail) = rest.split_at(body);
        self.write_buffered(head)?;
        self.write_direct(direct, body)?;
        self.write_buffered(tail)
    }

    fn write_buffered(&self, mut span: Span) -> Result<(), LaneError> {
        while span.len > 0 {
            let written = self.write_some(&*self.target.buffered, &span).map_err(|stop| stop.at(&span))?;
            span = self.advance(span, written);
        }
        Ok(())
    }

    fn write_direct(&self, direct: &dyn PositionedWrite, mut span: Span) -> Result<(), LaneError> {
        while span.len > 0 {
            let written = self.write_some(direct, &span).map_err(|stop| stop.at_direct(&span))?;
            // A short count that ends amid a unit would leave the rest misaligned: the torn unit is written
            // again, and where not even one unit was taken, the page cache takes that one.
            let whole = written - written % self.align;
            if whole > 0 {
                span = self.advance(span, whole);
            } else {
                let (unit, rest) = span.split_at(self.align);
                self.write_buffered(unit)?;
                span = rest;
            }
        }
        Ok(())
    }

    /// One write call that got somewhere. An interrupted one is repeated, unless the interruption was ours.
    fn write_some(&self, file: &dyn PositionedWrite, span: &Span) -> Result<usize, Stop> {
        loop {
            if self.cancel.is_cancelled() {
                return Err(Stop::Cancelled);
            }
            add(&self.counters.write_calls, 1);
            // SAFETY: the span lies within grains that the supply named in `write`, which its contract keeps
            // mapped and readable until this lane asks for its next piece.
            match unsafe { file.write_span_at(span.base, span.len, span.offset) } {
                Ok(0) => return Err(Stop::Failed(io::ErrorKind::WriteZero.into())),
                Ok(written) => return Ok(written.min(span.len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Stop::Failed(error)),
            }
        }
    }

    fn advance(&self, span: Span, written: usize) -> Span {
        add(&self.counters.bytes_written, written as u64);
        span.split_at(written).1
    }

    fn check_cancel(&self) -> Result<(), LaneError> {
        if self.cancel.is_cancelled() { Err(LaneError::Cancelled) } else { Ok(()) }
    }

    fn no_slab(&self, source: io::Error) -> LaneError {
        LaneError::Start { lane: self.number, source: Arc::new(source) }
    }
}

/// Why a write call got nowhere.
enum Stop {
    Cancelled,
    Failed(io::Error),
}

impl Stop {
    fn at(self, span: &Span) -> LaneError {
        match self {
            Stop::Cancelled => LaneError::Cancelled,
            Stop::Failed(source) => LaneError::Write {
                region: span.region,
                offset: span.offset,
                len: span.len,
                source: Arc::new(source),
            },
        }
    }

    fn at_direct(self, span: &Span) -> LaneError {
        match self {
            Stop::Failed(source) if source.raw_os_error() == Some(libc::EINVAL) => LaneError::DirectRefused {
                region: span.region,
                offset: span.offset,
                len: span.len,
                source: Arc::new(source),
            },
            other => other.at(span),
        }
    }
}

/// Raw memory and the place in the file it goes to.
struct Span {
    base: *const u8,
    len: usize,
    offset: u64,
    region: u32,
}

impl Span {
    /// The first `at` bytes, `at` being no more than there are, and the rest.
    fn split_at(self, at: usize) -> (Span, Span) {
        let rest = Span {
            base: self.base.wrapping_add(at),
            len: self.len - at,
            offset: self.offset + at as u64,
            region: self.region,
        };
        (Span { len: at, ..self }, rest)
    }
}

/// The lengths of the unaligned head and of the aligned middle of a span; the middle is empty where memory
/// and file do not meet at the same alignment.
fn aligned_middle(address: usize, offset: u64, len: usize, align: usize) -> (usize, usize) {
    // The remainder of a division by a usize fits one.
    let past = (offset % align as u64) as usize;
    if address % align != past {
        return (0, 0);
    }
    let head = (align - past) % align;
    match len.checked_sub(head) {
        Some(rest) => (head, rest - rest % align),
        None => (0, 0),
    }
}

/// The grains that the piece asked for and the supply found to be zero.
fn left_out(piece: &Piece, supplied: &Supplied) -> [u64; 4] {
    std::array::from_fn(|i| piece.mask[i] & !supplied.write[i])
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "no message".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_aligned_in_memory_and_file_is_direct() {
        for (address, offset, len, expected) in [
            (0x10000, 0x10000, 0x3000, (0, 0x3000)),
            (0x10000, 0x10000, 0x3005, (0, 0x3000)),
            (0x10200, 0x20200, 0x3000, (0xe00, 0x2000)),
            (0x10200, 0x20200, 0xdff, (0, 0)),
            (0x10200, 0x20200, 0xe00, (0xe00, 0)),
            (0x10000, 0x10200, 0x3000, (0, 0)),
            (0x10000, 0x10000, 0, (0, 0)),
        ] {
            assert_eq!(
                aligned_middle(address, offset, len, 4096),
                expected,
                "{address:#x} {offset:#x} {len:#x}"
            );
        }
    }
}
