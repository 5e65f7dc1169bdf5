//! The records of a stream, made by several threads and handed on in order.

use crate::ordered::Ordered;
use crate::{Error, Result};

/// How many bytes of pages are in the making at the most: pages may be larger than those of x86.
const BYTES_MAX: u64 = 32 << 20;
/// The most threads.
const MAKERS_MAX: usize = 16;

/// How many bytes of pages became records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagesSent {
    /// As data.
    pub data_bytes: u64,
    /// As zero, of pages that were there.
    pub zero_bytes: u64,
}

/// Records that follow each other, of a job.
pub(super) struct Records {
    pub(super) bytes: Vec<u8>,
    pub(super) sent: PagesSent,
}

/// What a thread works with: a job, and what is used again by the next one.
struct Work<J, S> {
    job: J,
    scratch: S,
    bytes: Vec<u8>,
}

struct Made<J, S> {
    job: J,
    scratch: S,
    outcome: std::io::Result<Records>,
}

/// Threads that make records of jobs, each on its own: a page is read, looked at and copied by one of them, while
/// whoever has the records before it hands them on.
pub(super) struct Makers<J, S> {
    pool: Ordered<Work<J, S>, Made<J, S>>,
    spare: Vec<(S, Vec<u8>)>,
}

/// Takes the records of a job, and gives back a buffer for others.
type OnRecords<'a, J> = &'a mut dyn FnMut(J, std::io::Result<Records>) -> Result<Vec<u8>>;

impl<J: Send + 'static, S: Default + Send + 'static> Makers<J, S> {
    /// Starts at most `threads` threads for jobs of `job_len` bytes of pages. `make` appends the records of a job.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn start(
        threads: usize,
        job_len: u64,
        make: impl Fn(&J, &mut S, &mut Vec<u8>) -> std::io::Result<PagesSent> + Send + Sync + 'static,
    ) -> Result<Makers<J, S>> {
        let affordable = usize::try_from(BYTES_MAX / job_len.max(1)).unwrap_or(usize::MAX);
        let threads = threads.min(affordable).clamp(1, MAKERS_MAX);
        let work = move |Work { job, mut scratch, mut bytes }: Work<J, S>| {
            bytes.clear();
            let made = make(&job, &mut scratch, &mut bytes);
            Made { job, scratch, outcome: made.map(|sent| Records { bytes, sent }) }
        };
        let pool = Ordered::start("records", threads, work)
            .map_err(|error| Error::io("a thread that makes records cannot be started", error))?;
        Ok(Makers { pool, spare: Vec::new() })
    }

    /// Hands out a job; while every thread has enough to do, the oldest records are waited for and handed on first.
    ///
    /// # Errors
    /// Those of `on_records`.
    pub(super) fn push(&mut self, job: J, on_records: OnRecords<'_, J>) -> Result<()> {
        while self.pool.is_full() {
            self.take(on_records)?;
        }
        let (scratch, bytes) = self.spare.pop().unwrap_or_default();
        self.pool.push(Work { job, scratch, bytes }).map_err(ended)
    }

    /// Hands on everything that is still in the making.
    ///
    /// # Errors
    /// Those of `on_records`.
    pub(super) fn finish(mut self, on_records: OnRecords<'_, J>) -> Result<()> {
        while self.take(on_records)? {}
        Ok(())
    }

    fn take(&mut self, on_records: OnRecords<'_, J>) -> Result<bool> {
        let Some(made) = self.pool.pop() else { return Ok(false) };
        let Made { job, scratch, outcome } = made.map_err(ended)?;
        let bytes = on_records(job, outcome)?;
        self.spare.push((scratch, bytes));
        Ok(true)
    }
}

fn ended(error: std::io::Error) -> Error {
    Error::io("cannot make the records of the stream", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_in_the_order_of_their_jobs_and_buffers_are_used_again() {
        let (is_done, second) = std::sync::mpsc::channel();
        let second = std::sync::Mutex::new(second);
        let make = move |job: &u8, scratch: &mut Vec<u8>, bytes: &mut Vec<u8>| {
            assert!(bytes.is_empty(), "a buffer is handed out empty");
            if *job == 0 {
                // The first one is done after the second.
                second.lock().unwrap().recv().unwrap();
            } else if *job == 1 {
                is_done.send(()).unwrap();
            }
            scratch.push(*job);
            bytes.extend([*job, *job]);
            match job {
                99 => Err(std::io::Error::other("on purpose")),
                _ => Ok(PagesSent { data_bytes: u64::from(*job), zero_bytes: 1 }),
            }
        };
        let mut makers = Makers::start(3, 1, make).unwrap();
        let (mut found, mut failed) = (Vec::new(), Vec::new());
        let mut on_records = |job: u8, records: std::io::Result<Records>| match records {
            Ok(records) => {
                assert_eq!(records.sent, PagesSent { data_bytes: u64::from(job), zero_bytes: 1 });
                found.extend_from_slice(&records.bytes);
                Ok(records.bytes)
            }
            Err(error) => {
                failed.push((job, error.to_string()));
                Ok(Vec::new())
            }
        };
        for job in 0..100 {
            makers.push(job, &mut on_records).unwrap();
        }
        assert!(makers.spare.len() <= 5, "{} buffers", makers.spare.len());
        makers.finish(&mut on_records).unwrap();
        assert_eq!(found, (0..99).flat_map(|job| [job, job]).collect::<Vec<u8>>());
        assert_eq!(failed, [(99, "on purpose".to_owned())]);
    }
}
