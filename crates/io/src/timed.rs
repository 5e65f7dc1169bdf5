//! Whether direct I/O is worth having: a short write each way, with the clock running; the direct one alone where
//! that leaves no doubt.
//!
//! A file system may take O_DIRECT and be a hundred times slower by it. What the kernel tells about alignment
//! does not show that; a few megabytes do.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::slab::Slab;

/// The first direct write, in bytes: small, so that one at a crawl ends soon.
const FIRST_LEN: usize = 64 << 10;
/// The largest, in bytes: what a lane writes at once.
const LARGEST_LEN: usize = 1 << 20;
/// When the direct writes have taken so long, no larger one follows.
const DIRECT_TIME_MAX: Duration = Duration::from_millis(25);
/// Direct I/O is left where it is less than this part as fast. It has to be much slower: that it does not
/// fill the page cache is worth something, and one short trial is not precise.
const SLOWER_BY: u64 = 4;

/// Direct I/O that is as fast with one request under way is no trap: lanes have many. The other half of the trial waits
/// for the disk, some 15 ms, and is spared.
const BEYOND_DOUBT_BYTES_PER_S: u64 = 500_000_000;

/// How fast a file took a few megabytes, in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// Past the page cache, by the largest write that there was time for.
    pub direct_bytes_per_s: u64,
    /// Through the page cache, until all was on the disk. Where direct I/O is fast beyond doubt this was not tried, and
    /// is the same number.
    pub buffered_bytes_per_s: u64,
}

impl Rates {
    /// Whether direct I/O is so much slower that it is a trap.
    pub fn is_trap(self) -> bool {
        self.direct_bytes_per_s < self.buffered_bytes_per_s / SLOWER_BY
    }

    /// The greater of the two: what may be expected of the file.
    pub fn best_bytes_per_s(self) -> u64 {
        self.direct_bytes_per_s.max(self.buffered_bytes_per_s)
    }

    /// Measures. The first few megabytes of the file are overwritten; it is for files just created, and the
    /// caller cuts them to length again.
    ///
    /// # Errors
    /// What makes any write fail.
    pub(crate) fn measure(direct: &File, buffered: &File) -> io::Result<Rates> {
        let slab = Slab::map(1, LARGEST_LEN)?;
        slab.touch();
        // Zeros could be left out by a file system that compresses or looks for them.
        fill(&slab);
        let (mut at, mut len) = (0, FIRST_LEN);
        let began = Instant::now();
        let direct_bytes_per_s = loop {
            let since = Instant::now();
            write_all(direct, &slab, len, at)?;
            at += len;
            if len == LARGEST_LEN || began.elapsed() > DIRECT_TIME_MAX {
                break rate(len, since.elapsed());
            }
            len *= 2;
        };
        if direct_bytes_per_s >= BEYOND_DOUBT_BYTES_PER_S {
            return Ok(Rates { direct_bytes_per_s, buffered_bytes_per_s: direct_bytes_per_s });
        }
        let since = Instant::now();
        let mut from = 0;
        while from < at {
            let len = (at - from).min(LARGEST_LEN);
            write_all(buffered, &slab, len, at + from)?;
            from += len;
        }
        buffered.sync_data()?;
        Ok(Rates { direct_bytes_per_s, buffered_bytes_per_s: rate(at, since.elapsed()) })
    }
}

fn fill(slab: &Slab) {
    let base = slab.buffer(0).cast::<u64>();
    let mut word = 0x9e37_79b9_7f4a_7c15u64;
    for i in 0..LARGEST_LEN / 8 {
        // xorshift64: any numbers will do that no compressor finds a pattern in.
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        // SAFETY: word `i` lies in the slab's first buffer, which is aligned, mapped and this function's alone.
        unsafe { base.wrapping_add(i).write_volatile(word) };
    }
}

/// Bytes per second; a time too short to be told counts as a nanosecond.
fn rate(bytes: usize, took: Duration) -> u64 {
    let per_s = bytes as u128 * 1_000_000_000 / took.as_nanos().max(1);
    u64::try_from(per_s).unwrap_or(u64::MAX)
}

fn write_all(file: &File, slab: &Slab, len: usize, at: usize) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let base = slab.buffer(0).wrapping_add(done);
        // SAFETY: `done..len` lies within the slab's first buffer, which outlives the call and is read only.
        let written = unsafe { libc::pwrite(file.as_raw_fd(), base.cast(), len - done, (at + done) as i64) };
        match usize::try_from(written) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => done += written,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_direct_io_at_less_than_a_quarter_of_the_speed_is_a_trap() {
        const MB: u64 = 1_000_000;
        for (direct, buffered, expected) in [
            // The one that was seen: 3.6 MB/s with, 4 GB/s without.
            (3_600_000, 4_000 * MB, true),
            (99 * MB, 400 * MB, true),
            (100 * MB, 400 * MB, false),
            (400 * MB, 400 * MB, false),
            (3_800 * MB, 900 * MB, false),
            (0, 4, true),
            (0, 0, false),
            (u64::MAX, u64::MAX, false),
        ] {
            let rates = Rates { direct_bytes_per_s: direct, buffered_bytes_per_s: buffered };
            assert_eq!(rates.is_trap(), expected, "{rates:?}");
        }
    }

    #[test]
    fn a_rate_is_bytes_by_seconds_and_never_divides_by_zero() {
        for (bytes, took, expected) in [
            (1_000_000, Duration::from_millis(500), 2_000_000),
            (64 << 10, Duration::ZERO, 65_536_000_000_000),
            (0, Duration::from_secs(1), 0),
        ] {
            assert_eq!(rate(bytes, took), expected, "{bytes} {took:?}");
        }
    }

    #[test]
    fn a_trial_measures_both_ways() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let open =
            || File::options().create(true).truncate(false).write(true).open(directory.path().join("x"));
        let (one, other) = (open().expect("a file"), open().expect("a file"));
        let rates = Rates::measure(&one, &other).expect("room for a few megabytes");
        assert!(rates.direct_bytes_per_s > 0 && rates.buffered_bytes_per_s > 0, "{rates:?}");
        assert_eq!(rates.best_bytes_per_s(), rates.direct_bytes_per_s.max(rates.buffered_bytes_per_s));
    }
}
