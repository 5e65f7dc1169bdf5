//! What the lanes have done so far, for progress and for the final report.

use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers that lanes add to and the control plane reads at any time.
///
/// The fields are independent: a reading taken while lanes run may be a piece apart from one to the next.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes that reached the file, zero pages that bridge a gap included.
    pub bytes_written: AtomicU64,
    /// Bytes that a piece asked for and that were left out because they are zero.
    pub bytes_zero: AtomicU64,
    /// Pieces done.
    pub pieces: AtomicU64,
    /// Write calls made, those that a signal interrupted included.
    pub write_calls: AtomicU64,
    /// Reads that rings were given.
    pub ring_reads: AtomicU64,
}

/// The values of [`Counters`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CountersReading {
    /// See [`Counters::bytes_written`].
    pub bytes_written: u64,
    /// See [`Counters::bytes_zero`].
    pub bytes_zero: u64,
    /// See [`Counters::pieces`].
    pub pieces: u64,
    /// See [`Counters::write_calls`].
    pub write_calls: u64,
    /// See [`Counters::ring_reads`].
    pub ring_reads: u64,
}

impl Counters {
    /// The values now.
    pub fn read(&self) -> CountersReading {
        CountersReading {
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
            bytes_zero: self.bytes_zero.load(Ordering::Relaxed),
            pieces: self.pieces.load(Ordering::Relaxed),
            write_calls: self.write_calls.load(Ordering::Relaxed),
            ring_reads: self.ring_reads.load(Ordering::Relaxed),
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    // Relaxed: the numbers order nothing; whoever needs exact ones joins the lanes first.
    counter.fetch_add(amount, Ordering::Relaxed);
}
