//! Threads that fill buffers ahead of whoever takes them, in the order in which they were asked for.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::aligned::AlignedBuffer;

/// How a job fills its buffer.
type Fill<J> = dyn Fn(&J, &mut AlignedBuffer) -> io::Result<()> + Send + Sync;

/// What is told whenever a job is done.
type Wake = dyn Fn() + Send + Sync;

/// A job that was done: what it was, what it filled, and what came of it.
#[derive(Debug)]
pub struct Filled<J> {
    /// The job, as it was pushed.
    pub job: J,
    /// The buffer that was pushed with it; push it again when it has been read.
    pub buffer: AlignedBuffer,
    /// Whether the buffer holds what was wanted.
    pub result: io::Result<()>,
}

/// Readers that work on several jobs at once and hand them back in order.
///
/// A disk is busy only while several requests wait for it, and whoever takes a stream apart makes one at a
/// time. The buffers are the caller's: as many as are pushed are ahead, so the memory has a bound.
pub struct ReadAhead<J> {
    shared: Arc<Shared<J>>,
    threads: Vec<JoinHandle<()>>,
    pushed: u64,
    taken: u64,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    to_readers: Condvar,
    to_taker: Condvar,
    wake: Box<Wake>,
}

struct State<J> {
    waiting: VecDeque<(u64, J, AlignedBuffer)>,
    done: BTreeMap<u64, Filled<J>>,
    is_closed: bool,
}

impl<J> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        // Nothing that can panic runs under the lock, so a poisoned one still holds a whole state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<J: Send + 'static> ReadAhead<J> {
    /// Starts `readers` threads, each of which fills one buffer at a time.
    ///
    /// # Errors
    /// When a thread cannot be started; those that were are gone again.
    pub fn start(
        readers: usize,
        fill: impl Fn(&J, &mut AlignedBuffer) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<ReadAhead<J>> {
        ReadAhead::start_waking(readers, fill, || {})
    }

    /// The same, for a taker that waits for more than its readers: `wake` is called after each job that is done, from
    /// its reader's thread, when [`ReadAhead::try_take`] already finds it.
    ///
    /// # Errors
    /// As [`ReadAhead::start`].
    pub fn start_waking(
        readers: usize,
        fill: impl Fn(&J, &mut AlignedBuffer) -> io::Result<()> + Send + Sync + 'static,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<ReadAhead<J>> {
        let state = State { waiting: VecDeque::new(), done: BTreeMap::new(), is_closed: false };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            to_readers: Condvar::new(),
            to_taker: Condvar::new(),
            wake: Box::new(wake),
        });
        let fill: Arc<Fill<J>> = Arc::new(fill);
        // From here on an early return drops `started`, which ends the threads it has.
        let mut started = ReadAhead { shared: shared.clone(), threads: Vec::new(), pushed: 0, taken: 0 };
        for number in 0..readers.max(1) {
            let (shared, fill) = (shared.clone(), fill.clone());
            let thread = thread::Builder::new()
                .name(format!("reader {number}"))
                .spawn(move || read_on(&shared, &*fill))?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// Asks for a buffer to be filled; never waits.
    pub fn push(&mut self, job: J, buffer: AlignedBuffer) {
        self.shared.lock().waiting.push_back((self.pushed, job, buffer));
        self.pushed += 1;
        self.shared.to_readers.notify_one();
    }

    /// How many jobs were pushed and not yet taken.
    pub fn pending(&self) -> u64 {
        self.pushed - self.taken
    }

    /// The oldest job that was not yet taken, if it is done; never waits.
    pub fn try_take(&mut self) -> Option<Filled<J>> {
        let filled = self.shared.lock().done.remove(&self.taken)?;
        self.taken += 1;
        Some(filled)
    }

    /// Waits for the oldest job that was not yet taken; `None` where there is none.
    pub fn take(&mut self) -> Option<Filled<J>> {
        if self.pending() == 0 {
            return None;
        }
        let mut state = self.shared.lock();
        loop {
            if let Some(filled) = state.done.remove(&self.taken) {
                self.taken += 1;
                return Some(filled);
            }
            state = self.shared.to_taker.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<J> Drop for ReadAhead<J> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.is_closed = true;
        state.waiting.clear();
        drop(state);
        self.shared.to_readers.notify_all();
        for thread in self.threads.drain(..) {
            // A reader catches its own panics, so there is nothing in the result.
            let _ = thread.join();
        }
    }
}

fn read_on<J>(shared: &Shared<J>, fill: &Fill<J>) {
    loop {
        let mut state = shared.lock();
        let (number, job, mut buffer) = loop {
            if state.is_closed {
                return;
            }
            if let Some(next) = state.waiting.pop_front() {
                break next;
            }
            state = shared.to_readers.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        let result = catch_unwind(AssertUnwindSafe(|| fill(&job, &mut buffer)))
            .unwrap_or_else(|_| Err(io::Error::other("a reader panicked")));
        shared.lock().done.insert(number, Filled { job, buffer, result });
        shared.to_taker.notify_one();
        (shared.wake)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_first_comes_first_whoever_is_done_first() {
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        let opened = gate.clone();
        let mut ahead = ReadAhead::start(2, move |job: &u8, buffer: &mut AlignedBuffer| {
            let mut is_open = opened.0.lock().unwrap();
            if *job == 0 {
                // The first job is not done before the second.
                while !*is_open {
                    is_open = opened.1.wait(is_open).unwrap();
                }
            } else {
                *is_open = true;
                opened.1.notify_all();
            }
            buffer.fill(*job);
            if *job == 2 { Err(io::ErrorKind::NotFound.into()) } else { Ok(()) }
        })
        .unwrap();
        for job in 0..4 {
            ahead.push(job, AlignedBuffer::new(4096));
        }
        for job in 0..4 {
            let filled = ahead.take().unwrap();
            assert_eq!((filled.job, filled.result.is_err()), (job, job == 2));
            assert!(filled.buffer.iter().all(|byte| *byte == job));
        }
        assert!(ahead.take().is_none(), "nothing is asked for");
    }

    #[test]
    fn whoever_is_woken_finds_the_job_done() {
        let (woken, wakes) = std::sync::mpsc::channel();
        let fill = |job: &u8, buffer: &mut AlignedBuffer| {
            buffer.fill(*job);
            Ok(())
        };
        let mut ahead = ReadAhead::start_waking(1, fill, move || woken.send(()).unwrap()).unwrap();
        assert!(ahead.try_take().is_none(), "nothing is asked for");
        for job in [3, 5] {
            ahead.push(job, AlignedBuffer::new(1));
            wakes.recv().unwrap();
            let filled = ahead.try_take().expect("it is done");
            assert_eq!((filled.job, filled.buffer[0]), (job, job));
        }
        assert!(ahead.try_take().is_none() && ahead.pending() == 0);
    }

    #[test]
    fn a_reader_that_panics_is_an_error_and_an_early_end_is_none() {
        let mut ahead = ReadAhead::start(1, |job: &u8, _: &mut AlignedBuffer| match job {
            0 => panic!("on purpose"),
            _ => Ok(()),
        })
        .unwrap();
        ahead.push(0, AlignedBuffer::new(1));
        ahead.push(1, AlignedBuffer::new(1));
        ahead.push(2, AlignedBuffer::new(1));
        assert_eq!(ahead.take().unwrap().result.unwrap_err().to_string(), "a reader panicked");
        assert!(ahead.take().unwrap().result.is_ok(), "the thread lives on");
    }
}
