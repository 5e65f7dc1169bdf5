//! How far a job is: read by whoever wants to know, at any time, from any thread.
//!
//! The job itself only counts. What it moves through lanes is in their counters; what QEMU moves is what QEMU says
//! of it, or what the kernel says of QEMU. A rate is made of readings, by [`Pace`], where somebody wants one.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use io::Counters;

/// What stands for a total that is not known.
const UNKNOWN: u64 = u64::MAX;
/// Over how long a rate is an average: long enough to be calm, short enough to notice a disk that has slowed down.
const WINDOW: Duration = Duration::from_secs(3);
/// More readings than these are not kept within [`WINDOW`]; a reader that is in such a hurry sees a shorter one.
const READINGS_MAX: usize = 256;
/// `/proc/PID/io` has seven short lines.
const PROC_IO_LEN_MAX: usize = 512;

/// How far one job is. Clones share it.
#[derive(Clone, Debug)]
pub struct Progress {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    phase: Mutex<&'static str>,
    /// When the first byte was about to move.
    moving: OnceLock<Instant>,
    /// Bytes to be moved or found to be zero; [`UNKNOWN`] until that is known.
    total: AtomicU64,
    /// Whether that much is done, whatever the counts say.
    is_complete: AtomicBool,
    /// What our own lanes and streams have done.
    counters: Arc<Counters>,
    /// What QEMU says that it has done, zero pages included, and without them.
    told_done: AtomicU64,
    told_moved: AtomicU64,
    /// A process that moves bytes and says nothing.
    reader: OnceLock<ProcessReads>,
}

/// What was read of a [`Progress`] at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgressReading {
    /// The phase; empty before the first.
    pub phase: &'static str,
    /// Since the job began.
    pub elapsed: Duration,
    /// Since RAM began to move; `None` before that.
    pub moving: Option<Duration>,
    /// Bytes of RAM that are done: moved, or found to be zero. Never more than `total_bytes`.
    pub done_bytes: u64,
    /// Bytes of RAM that will be done in the end; `None` where that is not known.
    pub total_bytes: Option<u64>,
    /// The part of `done_bytes` that was moved.
    pub moved_bytes: u64,
}

impl Progress {
    pub(crate) fn start() -> Progress {
        Progress {
            shared: Arc::new(Shared {
                started: Instant::now(),
                phase: Mutex::new(""),
                moving: OnceLock::new(),
                total: AtomicU64::new(UNKNOWN),
                is_complete: AtomicBool::new(false),
                counters: Arc::default(),
                told_done: AtomicU64::new(0),
                told_moved: AtomicU64::new(0),
                reader: OnceLock::new(),
            }),
        }
    }

    /// How far the job is now. Takes no lock that the job holds for longer than an assignment, and never waits for
    /// QEMU.
    pub fn read(&self) -> ProgressReading {
        let shared = &*self.shared;
        let total_bytes = Some(shared.total.load(Ordering::Relaxed)).filter(|total| *total != UNKNOWN);
        let ours = shared.counters.read();
        let told = shared.told_done.load(Ordering::Relaxed);
        let told_moved = shared.told_moved.load(Ordering::Relaxed);
        let read = shared.reader.get().map_or(0, ProcessReads::bytes);
        // What bridges a gap between pages is written without having been asked for, and a loader reads headers, too.
        let limit = total_bytes.unwrap_or(UNKNOWN);
        let moved_bytes = ours.bytes_written.saturating_add(told_moved).saturating_add(read);
        let done_bytes =
            ours.bytes_written.saturating_add(ours.bytes_zero).saturating_add(told).saturating_add(read);
        ProgressReading {
            phase: *shared.phase.lock().unwrap_or_else(PoisonError::into_inner),
            elapsed: shared.started.elapsed(),
            moving: shared.moving.get().map(Instant::elapsed),
            done_bytes: if shared.is_complete.load(Ordering::Relaxed) {
                limit
            } else {
                done_bytes.min(limit)
            },
            total_bytes,
            moved_bytes: moved_bytes.min(limit),
        }
    }

    pub(crate) fn enter(&self, phase: &'static str) {
        *self.shared.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }

    /// RAM begins to move: so many bytes of it, counting those that may turn out to be zero.
    pub(crate) fn expect(&self, total_bytes: u64) {
        self.shared.total.store(total_bytes, Ordering::Relaxed);
        self.shared.moving.get_or_init(Instant::now);
    }

    /// All of RAM is done. The total was an expectation: a guest that still ran may have touched pages since.
    pub(crate) fn complete(&self) {
        self.shared.is_complete.store(true, Ordering::Relaxed);
    }

    /// What lanes and streams of this job add to.
    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.shared.counters
    }

    /// QEMU is so far.
    pub(crate) fn told(&self, done_bytes: u64, moved_bytes: u64) {
        self.shared.told_done.store(done_bytes, Ordering::Relaxed);
        self.shared.told_moved.store(moved_bytes, Ordering::Relaxed);
    }

    /// A process reads what is moved, and cannot be asked meanwhile: from now on the kernel is asked what it reads,
    /// whenever somebody wants to know. Where the kernel does not tell, nothing is known.
    pub(crate) fn follow_reads_of(&self, pid: u32) {
        if let Some(reads) = ProcessReads::open(pid) {
            // Whoever was followed before goes on being followed: a job has one such process.
            let _ = self.shared.reader.set(reads);
        }
    }
}

/// What a process has read from now on, of files and of sockets, through the page cache or past it.
#[derive(Debug)]
struct ProcessReads {
    /// Its `/proc/PID/io`. The descriptor stays with that process: one that has ended cannot be taken for another.
    file: File,
    before: u64,
}

impl ProcessReads {
    fn open(pid: u32) -> Option<ProcessReads> {
        let file = File::open(format!("/proc/{pid}/io")).ok()?;
        let before = read_bytes(&file)?;
        Some(ProcessReads { file, before })
    }

    fn bytes(&self) -> u64 {
        read_bytes(&self.file).map_or(0, |now| now.saturating_sub(self.before))
    }
}

fn read_bytes(file: &File) -> Option<u64> {
    let mut text = [0; PROC_IO_LEN_MAX];
    let len = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(text.get(..len)?)
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix("rchar: "))?
        .trim()
        .parse()
        .ok()
}

/// Makes a rate and a time left of readings that follow each other.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// When since the beginning of the movement, how much was done, how much of it moved.
    readings: VecDeque<(Duration, u64, u64)>,
}

/// What a [`Pace`] makes of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes moved per second in the last seconds; zeros are not counted as speed.
    pub rate_bytes_per_s: u64,
    /// How long the rest takes if it goes on as in the last seconds; `None` where that cannot be said.
    pub left: Option<Duration>,
}

impl Pace {
    /// Takes a reading into account.
    pub fn note(&mut self, reading: &ProgressReading) -> Estimate {
        let Some(now) = reading.moving else { return Estimate::default() };
        if self.readings.is_empty() {
            // Nothing had moved when the movement began: also the first reading has something to compare with.
            self.readings.push_back((Duration::ZERO, 0, 0));
        }
        self.readings.push_back((now, reading.done_bytes, reading.moved_bytes));
        // The oldest that is kept lies just outside of the window, so that what is kept spans it.
        while self.readings.len() > READINGS_MAX
            || self.readings.get(1).is_some_and(|(at, ..)| now.saturating_sub(*at) >= WINDOW)
        {
            self.readings.pop_front();
        }
        let (since, done, moved) = self.readings.front().copied().unwrap_or_default();
        let seconds = now.saturating_sub(since).as_secs_f64();
        let per_s = |bytes: u64| if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 };
        let done_per_s = per_s(reading.done_bytes.saturating_sub(done));
        let rest = reading.total_bytes.map(|total| total.saturating_sub(reading.done_bytes));
        let left = match rest {
            Some(0) => Some(Duration::ZERO),
            // A rate that is next to nothing gives a time that no duration holds.
            Some(rest) => Duration::try_from_secs_f64(rest as f64 / done_per_s).ok(),
            None => None,
        };
        Estimate { rate_bytes_per_s: per_s(reading.moved_bytes.saturating_sub(moved)) as u64, left }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    const MIB: u64 = 1 << 20;

    fn reading(ms: u64, done: u64, moved: u64, total: Option<u64>) -> ProgressReading {
        ProgressReading {
            phase: "ram",
            elapsed: Duration::from_millis(ms + 10),
            moving: Some(Duration::from_millis(ms)),
            done_bytes: done * MIB,
            total_bytes: total.map(|total| total * MIB),
            moved_bytes: moved * MIB,
        }
    }

    #[test]
    fn a_pace_is_that_of_the_last_seconds_and_counts_no_zeros_as_speed() {
        let s = Duration::from_secs_f64;
        let mut pace = Pace::default();
        for (ms, done, moved, rate, left) in [
            // The first has the beginning to compare with.
            (1000, 100, 50, 50, Some(s(9.0))),
            (2000, 300, 100, 50, Some(s(700.0 / 150.0))),
            (3000, 300, 100, 33, Some(s(7.0))),
            // Three seconds without a byte: nothing is known of the time left.
            (5000, 300, 100, 0, None),
            (6000, 400, 150, 16, Some(s(18.0))),
            (7000, 1000, 800, 175, Some(s(0.0))),
        ] {
            let estimate = pace.note(&reading(ms, done, moved, Some(1000)));
            assert_eq!(estimate.rate_bytes_per_s / MIB, rate, "{ms}");
            assert_eq!(
                estimate.left.map(|left| left.as_millis()),
                left.map(|left| left.as_millis()),
                "{ms}: {estimate:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_known_is_not_said() {
        let before = ProgressReading { moving: None, ..reading(0, 0, 0, Some(10)) };
        assert_eq!(Pace::default().note(&before), Estimate::default());
        let at_once = Pace::default().note(&reading(0, 0, 0, Some(10)));
        assert_eq!(at_once, Estimate::default(), "no time has passed");
        let unknown = Pace::default().note(&reading(1000, 5, 5, None));
        assert_eq!(unknown, Estimate { rate_bytes_per_s: 5 * MIB, left: None });
    }

    #[test]
    fn a_hurried_reader_costs_no_memory() {
        let mut pace = Pace::default();
        for us in 0..10_000 {
            let mut reading = reading(0, 1, 1, Some(2));
            reading.moving = Some(Duration::from_micros(us));
            pace.note(&reading);
        }
        assert!(pace.readings.len() <= READINGS_MAX);
    }

    #[test]
    fn what_lanes_and_qemu_did_adds_up_to_no_more_than_the_total() {
        let progress = Progress::start();
        progress.enter("probe");
        assert_eq!(progress.read().phase, "probe");
        assert_eq!((progress.read().total_bytes, progress.read().moving), (None, None));
        progress.enter("ram");
        progress.expect(100);
        progress.counters().bytes_written.fetch_add(30, Ordering::Relaxed);
        progress.counters().bytes_zero.fetch_add(20, Ordering::Relaxed);
        let reading = progress.clone().read();
        assert_eq!((reading.phase, reading.done_bytes, reading.moved_bytes), ("ram", 50, 30));
        assert!(reading.moving.is_some());
        progress.told(25, 5);
        assert_eq!((progress.read().done_bytes, progress.read().moved_bytes), (75, 35));
        progress.counters().bytes_written.fetch_add(90, Ordering::Relaxed);
        assert_eq!((progress.read().done_bytes, progress.read().moved_bytes), (100, 100));
    }

    #[test]
    fn what_is_complete_is_all_done_whatever_was_counted() {
        let progress = Progress::start();
        progress.expect(100);
        progress.counters().bytes_written.fetch_add(98, Ordering::Relaxed);
        progress.complete();
        assert_eq!((progress.read().done_bytes, progress.read().moved_bytes), (100, 98));
    }

    #[test]
    fn what_a_process_reads_is_told_by_the_kernel() {
        let progress = Progress::start();
        progress.expect(UNKNOWN - 1);
        progress.follow_reads_of(std::process::id());
        let mut zeros = vec![0; 1 << 20];
        File::open("/dev/zero").unwrap().read_exact(&mut zeros).unwrap();
        assert!(progress.read().done_bytes >= 1 << 20, "{:?}", progress.read());
        // A process that is not there is not followed, and nothing is said of it.
        let other = Progress::start();
        other.follow_reads_of(u32::MAX);
        assert_eq!(other.read().done_bytes, 0);
    }
}
