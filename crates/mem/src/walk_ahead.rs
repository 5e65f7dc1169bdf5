//! Threads that walk a long stretch ahead of whoever takes its runs.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use ::io::Cancel;

use crate::pagemap::{Walker, Way};

/// How threads walk a stretch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gait {
    /// How many threads walk ahead.
    pub threads: usize,
    /// The part of it that one of them walks before the next one is due, in bytes.
    pub chunk_bytes: u64,
    /// So many runs are handed over, or a few more: as many as one more call finds.
    pub batch_runs: usize,
}

impl Gait {
    /// What is best for a stretch of so many bytes, where threads are worth being started.
    pub(crate) fn of(way: Way, length: u64) -> Option<Gait> {
        let bytes_min = match way {
            // Page tables that do not exist are skipped; those of 64 GiB take 50 ms where all of them do.
            Way::Scan => 64 << 30,
            // Each page costs 4 to 5 ns, whether it is there or not: 20 ms.
            Way::Entries => 16 << 30,
        };
        if length < bytes_min {
            return None;
        }
        let processors = thread::available_parallelism().map_or(1, |processors| processors.get());
        let threads = processors.min(THREADS_MAX);
        (threads > 1).then_some(Gait { threads, chunk_bytes: 4 << 30, batch_runs: 4096 })
    }
}

/// More of them would be in each other's way at the lock of the address space.
const THREADS_MAX: usize = 4;

/// What a thread may have found that nobody has taken: so many times [`Gait::batch_runs`]. With four threads and no
/// more runs in one call than there are, these are less than 4 MiB.
const BATCHES_AHEAD: usize = 4;

/// Runs that were found, in order.
struct Batch {
    runs: Vec<Range<u64>>,
    /// Whether the chunk has no more.
    is_last: bool,
}

/// Threads that walk one chunk of a stretch each, in turn, and hand over what they find in order.
///
/// One that is too far ahead waits. When this is dropped they end with the call that they have made to the kernel,
/// and are waited for.
pub(crate) struct WalkAhead {
    /// What each thread has found.
    found: Vec<Receiver<io::Result<Batch>>>,
    threads: Vec<JoinHandle<()>>,
    /// Whose chunk is due.
    due: usize,
    /// How many chunks are left, that one included.
    chunks: u64,
}

impl WalkAhead {
    /// Starts to walk; `None` where no threads are to be had.
    pub(crate) fn start(
        pagemap: &Arc<File>,
        way: Way,
        addresses: &Range<u64>,
        gait: Gait,
        cancel: Option<&Cancel>,
    ) -> Option<WalkAhead> {
        let chunks = (addresses.end - addresses.start).div_ceil(gait.chunk_bytes);
        // From here on an early return drops `ahead`, which ends the threads it has.
        let mut ahead = WalkAhead { found: Vec::new(), threads: Vec::new(), due: 0, chunks };
        for number in 0..gait.threads {
            let (sender, found) = sync_channel(BATCHES_AHEAD);
            let course = Course {
                walker: Walker::new(pagemap.clone(), way),
                addresses: addresses.clone(),
                first: number as u64 * gait.chunk_bytes,
                every: gait.threads as u64 * gait.chunk_bytes,
                gait,
                cancel: cancel.cloned(),
            };
            let thread = thread::Builder::new()
                .name(format!("walker {number}"))
                .spawn(move || course.walk(&sender))
                .ok()?;
            ahead.found.push(found);
            ahead.threads.push(thread);
        }
        Some(ahead)
    }

    /// The next runs, as addresses; `None` when the stretch has no more.
    pub(crate) fn take(&mut self) -> io::Result<Option<Vec<Range<u64>>>> {
        if self.chunks == 0 {
            return Ok(None);
        }
        // A thread that says nothing must not pass for memory with nothing in it.
        let died = |_| Err(io::Error::other("a thread that looks for pages has died"));
        let batch = self.found[self.due].recv().unwrap_or_else(died)?;
        if batch.is_last {
            self.due = (self.due + 1) % self.found.len();
            self.chunks -= 1;
        }
        Ok(Some(batch.runs))
    }
}

impl Drop for WalkAhead {
    fn drop(&mut self) {
        // Whoever waits to hand something over waits no longer.
        self.found.clear();
        for thread in self.threads.drain(..) {
            // One that has panicked has said so by its silence.
            let _ = thread.join();
        }
    }
}

/// What one thread walks.
struct Course {
    walker: Walker,
    addresses: Range<u64>,
    /// Where its first chunk is, from the beginning, and how far apart they are.
    first: u64,
    every: u64,
    gait: Gait,
    cancel: Option<Cancel>,
}

impl Course {
    fn walk(mut self, sender: &SyncSender<io::Result<Batch>>) {
        let length = self.addresses.end - self.addresses.start;
        let mut next = Some(self.first);
        while let Some(start) = next.filter(|start| *start < length) {
            let end = length.min(start.saturating_add(self.gait.chunk_bytes));
            let mut rest = self.addresses.start + start..self.addresses.start + end;
            while !rest.is_empty() {
                let batch = self.batch(&mut rest);
                let is_over = batch.is_err();
                // Nobody takes it when the stream was dropped.
                if sender.send(batch).is_err() || is_over {
                    return;
                }
            }
            next = start.checked_add(self.every);
        }
    }

    fn batch(&mut self, rest: &mut Range<u64>) -> io::Result<Batch> {
        let mut runs = Vec::new();
        while !rest.is_empty() && runs.len() < self.gait.batch_runs {
            if self.cancel.as_ref().is_some_and(Cancel::is_cancelled) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            self.walker.step(rest, &mut runs)?;
        }
        Ok(Batch { runs, is_last: rest.is_empty() })
    }
}
