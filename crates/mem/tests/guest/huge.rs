//! Huge pages for a test: reserved from the kernel, and given back.

use std::fs::File;

use rustix::fs::{FlockOperation, flock};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// The size of the pages that the pool is of, in bytes.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Huge pages that belong to this test alone as long as it holds them: the pool is one for the whole machine.
pub struct HugePool {
    before: String,
    _lock: File,
}

impl HugePool {
    /// Reserves at least so many free pages, or says aloud why what is tested with them was not.
    pub fn reserve(pages: u64, tested: &str) -> Option<HugePool> {
        let missing = |why: &str| {
            println!("NOT TESTED here: {tested}: {why}");
            None
        };
        if meminfo("Hugepagesize:") != Some(HUGE_PAGE >> 10) {
            return missing("the machine's huge pages are not of 2 MiB");
        }
        let lock = match File::create(std::env::temp_dir().join("vmstate-huge-pages.lock")) {
            Ok(lock) => lock,
            Err(error) => return missing(&format!("the lock for the pool: {error}")),
        };
        flock(&lock, FlockOperation::LockExclusive).expect("the lock");
        let Ok(before) = std::fs::read_to_string(POOL) else {
            return missing("there is no pool of huge pages");
        };
        let total: u64 = before.trim().parse().expect("a number of pages");
        let wanted = total + pages.saturating_sub(free_huge_pages());
        if let Err(error) = std::fs::write(POOL, wanted.to_string()) {
            return missing(&format!("the pool cannot be changed: {error}"));
        }
        let pool = HugePool { before, _lock: lock };
        if free_huge_pages() < pages {
            return missing(&format!("the kernel has only {} of {pages} free huge pages", free_huge_pages()));
        }
        Some(pool)
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        // Pages still in use are given back when they are free.
        let _ = std::fs::write(POOL, self.before.trim());
    }
}

/// How many pages of the pool are free.
pub fn free_huge_pages() -> u64 {
    meminfo("HugePages_Free:").unwrap_or(0)
}

fn meminfo(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}
