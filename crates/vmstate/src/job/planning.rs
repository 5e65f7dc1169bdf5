//! What it costs to find out which pages of a guest are there and to plan for them, without a guest of that size.
//!
//! The memory is reserved in this process; it has no more pages than those that are touched, evenly spread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mem::{GuestRam, PagemapMethod, Peer, Reserved};

use super::untold_pages;
use crate::{Error, Result};

/// How the pages of reserved memory are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Private memory, by the kernel's PAGEMAP_SCAN.
    Scan,
    /// Private memory, by the entries of `/proc/PID/pagemap`, as older kernels have it.
    Entries,
    /// A memfd, by the holes of the file.
    Holes,
}

impl Presence {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Presence::Scan => "private, PAGEMAP_SCAN",
            Presence::Entries => "private, /proc/PID/pagemap",
            Presence::Holes => "memfd, SEEK_DATA",
        }
    }
}

/// A guest's memory, as far as planning is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sparse {
    /// Its length.
    pub bytes: u64,
    /// In each of so many bytes
    pub every_bytes: u64,
    /// the first so many are there.
    pub run_bytes: u64,
}

impl Sparse {
    /// How many bytes are there.
    pub fn present_bytes(self) -> u64 {
        self.bytes / self.every_bytes * self.run_bytes
    }
}

/// What was found, and how long that took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Pages of 4 KiB that are there.
    pub pages: u64,
    /// Windows of pages that lanes would be given.
    pub windows: u64,
    /// A time for each measurement, in order.
    pub took: Vec<Duration>,
}

/// Reserves memory, touches it and plans for it `count` times.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io) where this kernel or this process cannot have it.
pub fn plan(sparse: Sparse, by: Presence, count: usize) -> Result<Planned> {
    let failed = |error| Error::io(format!("cannot reserve {} bytes of memory", sparse.bytes), error);
    let reserved = match by {
        Presence::Scan | Presence::Entries => Reserved::private(sparse.bytes),
        Presence::Holes => Reserved::shared(sparse.bytes),
    };
    let mut reserved = reserved.map_err(failed)?;
    reserved.touch(sparse.every_bytes, sparse.run_bytes).map_err(failed)?;
    let block = reserved.block();
    let unreachable = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::io("cannot look into this process", std::io::Error::other(error))
    };
    let peer = Arc::new(Peer::open(std::process::id()).map_err(|error| unreachable(error.into()))?);
    let method = match by {
        Presence::Scan => PagemapMethod::Scan,
        Presence::Entries => PagemapMethod::Entries,
        Presence::Holes => PagemapMethod::Auto,
    };
    let mut planned = Planned { pages: 0, windows: 0, took: Vec::with_capacity(count) };
    for _ in 0..count {
        let started = Instant::now();
        let ram = GuestRam::attach(peer.clone(), std::slice::from_ref(&block))
            .map_err(|error| unreachable(error.into()))?;
        (planned.pages, planned.windows) = (0, 0);
        for window in ram.windows_by(0, method).map_err(|error| untold_pages("reserved", error))? {
            let window = window.map_err(|error| untold_pages("reserved", error))?;
            planned.windows += 1;
            planned.pages += u64::from(window.mask.count());
        }
        planned.took.push(started.elapsed());
    }
    Ok(planned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_whatever_the_way() {
        let sparse = Sparse { bytes: 1 << 30, every_bytes: 200 << 20, run_bytes: 2 << 20 };
        for by in [Presence::Scan, Presence::Entries, Presence::Holes] {
            match plan(sparse, by, 2) {
                Ok(planned) => {
                    // Five whole stretches and the beginning of a sixth.
                    assert_eq!((planned.pages, planned.windows), (6 * 512, 12), "{by:?}");
                    assert_eq!(planned.took.len(), 2);
                }
                Err(error) => {
                    assert!(by == Presence::Scan && error.chain().contains("PAGEMAP_SCAN"), "{error:?}")
                }
            }
        }
        assert_eq!(sparse.present_bytes(), 10 << 20);
    }
}
