//! Lanes: threads that write pieces at fixed offsets of a file.

mod flight;
mod pool;
mod span;
mod work;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::fs::fstatfs;

use self::work::Lane;
use crate::cancel::Cancel;
use crate::counters::Counters;
use crate::engine::EngineChoice;
use crate::queue::Queue;
use crate::rate_limit::RateLimit;
use crate::supply::{Piece, Supply};

/// The most lanes that can be started.
const LANES_MAX: usize = 256;

/// How many pieces wait for each lane: enough that none runs dry while the planner looks for the next.
const QUEUED_PER_LANE: usize = 4;

/// `TMPFS_MAGIC` of linux/magic.h: the type of tmpfs, as statfs has it.
const TMPFS_MAGIC: u64 = 0x0102_1994;

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

    /// How a lane that has a ring is to go about a write of `len` bytes from `base` at `offset`.
    ///
    /// Without an answer of its own a file is written by [`PositionedWrite::write_span_at`], ring or not.
    fn ring_write(&self, base: *const u8, len: usize, offset: u64) -> RingWrite<'_> {
        let _ = (base, len, offset);
        RingWrite::Inline
    }
}

/// How a write gets done that a ring could do.
#[derive(Debug)]
pub enum RingWrite<'a> {
    /// By the lane itself, with [`PositionedWrite::write_span_at`].
    Inline,
    /// By the ring.
    Ring {
        /// Where to; open for as long as the file is.
        descriptor: BorrowedFd<'a>,
        /// How many of the bytes to write at once: at most as many as were asked about.
        len: usize,
    },
    /// Not at all: this is taken for the answer of the ring. For a file with faults, which is tested with.
    Refused(io::Error),
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

    fn ring_write(&self, _base: *const u8, len: usize, _offset: u64) -> RingWrite<'_> {
        RingWrite::Ring { descriptor: self.as_fd(), len }
    }
}

impl<T: PositionedWrite + ?Sized> PositionedWrite for Arc<T> {
    unsafe fn write_span_at(&self, base: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        // SAFETY: the caller's promise is the one asked for.
        unsafe { T::write_span_at(self, base, len, offset) }
    }

    fn ring_write(&self, base: *const u8, len: usize, offset: u64) -> RingWrite<'_> {
        T::ring_write(self, base, len, offset)
    }
}

/// A file that lies in the memory of this process as well, so that what is read from another file may go to its place
/// at once, without a copy.
///
/// A lane never touches that memory itself. It names it to the kernel, by ring or by pread, and the kernel has an error
/// (EFAULT) where a page of it cannot be had.
///
/// # Safety
/// What [`LaneMemory::place_of`] answers must be mapped writable for as long as the value lives, whatever becomes of the
/// file, and nobody may have a reference to its bytes.
pub unsafe trait LaneMemory: Send + Sync {
    /// Where the `len` bytes at the file offset `offset` are; `None` where not all of them are mapped.
    fn place_of(&self, offset: u64, len: usize) -> Option<*mut u8>;
}

// SAFETY: whoever has the Arc keeps the value alive.
unsafe impl<T: LaneMemory + ?Sized> LaneMemory for Arc<T> {
    fn place_of(&self, offset: u64, len: usize) -> Option<*mut u8> {
        T::place_of(self, offset, len)
    }
}

/// Where lanes write: two openings of one file.
pub struct LaneTarget {
    /// Opened with O_DIRECT; takes the aligned runs. Without it everything goes through the page cache.
    pub direct: Option<Box<dyn PositionedWrite>>,
    /// Opened without; takes unaligned heads and tails.
    pub buffered: Box<dyn PositionedWrite>,
    /// The same as memory, where it is worth while to read straight into it: what comes from a file is not written then.
    pub memory: Option<Box<dyn LaneMemory>>,
}

impl LaneTarget {
    /// The target made of real files.
    ///
    /// A file in memory is written without its direct opening: tmpfs takes O_DIRECT and copies all the same, and a
    /// ring would have threads of the kernel make the copies (1 GiB on tmpfs: 443 ms so, 408 ms without).
    pub fn files(direct: Option<File>, buffered: File) -> LaneTarget {
        let direct = direct
            .filter(|file| !is_in_memory(file))
            .map(|file| -> Box<dyn PositionedWrite> { Box::new(file) });
        LaneTarget { direct, buffered: Box::new(buffered), memory: None }
    }
}

/// Whether a file lies on tmpfs; one that cannot be asked does not.
fn is_in_memory(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| u64::try_from(found.f_type) == Ok(TMPFS_MAGIC))
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
    /// What they move bytes with.
    pub engine: EngineChoice,
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

impl LaneError {
    fn start(lane: usize, source: io::Error) -> LaneError {
        LaneError::Start { lane, source: Arc::new(source) }
    }
}

/// Running lanes. Dropping them without [`WriteLanes::finish`] stops them and waits for their threads.
pub struct WriteLanes {
    queue: Arc<Queue>,
    cancel: Cancel,
    threads: Vec<JoinHandle<()>>,
}

impl WriteLanes {
    /// Starts the threads. Each takes its slab and its ring when its first piece arrives.
    ///
    /// # Errors
    /// [`LaneError::Start`] when the engine is not to be had or a thread cannot be started; those that were are
    /// gone again.
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
        let engine = options.engine.engine().map_err(|source| LaneError::start(0, source))?;
        let queue = Arc::new(Queue::new(lanes * QUEUED_PER_LANE));
        let target = Arc::new(target);
        // From here on an early return drops `started`, which stops and joins the threads it has.
        let mut started = WriteLanes { queue: queue.clone(), cancel: cancel.clone(), threads: Vec::new() };
        for number in 0..lanes {
            let lane = Lane {
                number,
                lanes,
                align,
                engine: engine.clone(),
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
                .map_err(|source| LaneError::start(number, source))?;
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
