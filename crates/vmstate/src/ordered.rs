//! Work that is done by several threads and comes back in its order.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

type Job<I, O> = (I, SyncSender<O>);

/// Threads that all do the same, and what they have in hand.
#[derive(Debug)]
pub(crate) struct Ordered<I, O> {
    jobs: Option<SyncSender<Job<I, O>>>,
    pending: VecDeque<Receiver<O>>,
    threads: Vec<JoinHandle<()>>,
    /// Nobody wants what is not done yet.
    is_abandoned: Arc<AtomicBool>,
}

impl<I: Send + 'static, O: Send + 'static> Ordered<I, O> {
    /// Starts `count` threads that go by `name`.
    ///
    /// # Errors
    /// What the system said.
    pub(crate) fn start(
        name: &str,
        count: usize,
        work: impl Fn(I) -> O + Send + Sync + 'static,
    ) -> io::Result<Ordered<I, O>> {
        let work = Arc::new(work);
        let (jobs, queue) = sync_channel::<Job<I, O>>(count + 1);
        let queue = Arc::new(Mutex::new(queue));
        let is_abandoned = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::with_capacity(count);
        for _ in 0..count {
            let (work, queue, is_abandoned) = (work.clone(), queue.clone(), is_abandoned.clone());
            let thread = std::thread::Builder::new().name(name.to_owned());
            threads.push(thread.spawn(move || {
                loop {
                    // One thread waits for work, the others for it: a lock a piece costs nothing.
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((input, done)) = job else { return };
                    if is_abandoned.load(Ordering::Relaxed) {
                        return;
                    }
                    // Whoever asked may have gone.
                    let _ = done.send(work(input));
                }
            })?);
        }
        Ok(Ordered { jobs: Some(jobs), pending: VecDeque::new(), threads, is_abandoned })
    }

    /// Whether there is as much in hand as keeps every thread busy.
    pub(crate) fn is_full(&self) -> bool {
        self.pending.len() > self.threads.len()
    }

    /// Hands out work. Does not wait while it is not full.
    pub(crate) fn push(&mut self, input: I) -> io::Result<()> {
        let (done, outcome) = sync_channel(1);
        let Some(jobs) = &self.jobs else { return Err(ended()) };
        jobs.send((input, done)).map_err(|_| ended())?;
        self.pending.push_back(outcome);
        Ok(())
    }

    /// Waits for the oldest; `None` where nothing is in hand.
    ///
    /// # Errors
    /// Where the thread that had it panicked.
    pub(crate) fn pop(&mut self) -> Option<io::Result<O>> {
        self.pending.pop_front().map(|outcome| outcome.recv().map_err(|_| ended()))
    }
}

fn ended() -> io::Error {
    io::Error::other("a working thread panicked")
}

impl<I, O> Drop for Ordered<I, O> {
    fn drop(&mut self) {
        // A guest may wait for this: what is in hand is the most that it waits for.
        self.is_abandoned.store(true, Ordering::Relaxed);
        self.jobs = None;
        self.pending.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
