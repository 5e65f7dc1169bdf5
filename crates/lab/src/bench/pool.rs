//! Huge pages for the time of a run: the pool is made as large as they need, and as it was afterwards.

use std::fs;

/// How many pages there are, of the size that the machine has by default (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// The size of a page in KiB.
const PAGE_KIB: u64 = 2048;
/// What guests need beside their memory, in pages.
const MARGIN: u64 = 4;

/// Pages that are free. What was added to them is given back when this is dropped.
pub struct HugePool {
    /// How many there were, where that was changed.
    before: Option<u64>,
}

impl HugePool {
    /// Sees to it that a guest of so many MiB finds its pages, or says why it does not.
    pub fn reserve(memory_mib: u64) -> Result<HugePool, String> {
        match meminfo("Hugepagesize:") {
            Some(PAGE_KIB) => {}
            Some(other) => return Err(format!("those of this machine have {other} KiB")),
            None => return Err("this kernel has none".to_owned()),
        }
        let needed = memory_mib * 1024 / PAGE_KIB + MARGIN;
        let free = free_pages();
        if free >= needed {
            return Ok(HugePool { before: None });
        }
        let failed = |error: std::io::Error| format!("{free} of {needed} are free, and {POOL}: {error}");
        let text = fs::read_to_string(POOL).map_err(failed)?;
        let before: u64 = text.trim().parse().map_err(|_| format!("{POOL} is no number"))?;
        fs::write(POOL, (before + needed - free).to_string()).map_err(failed)?;
        let pool = HugePool { before: Some(before) };
        // The kernel gives as many as it can find.
        match free_pages() {
            found if found < needed => Err(format!("the kernel finds {found} of {needed}")),
            _ => Ok(pool),
        }
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // What a guest that is still ending holds goes when that has ended.
            let _ = fs::write(POOL, before.to_string());
        }
    }
}

fn free_pages() -> u64 {
    meminfo("HugePages_Free:").unwrap_or(0).saturating_sub(meminfo("HugePages_Rsvd:").unwrap_or(0))
}

fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}
