//! `/proc/PID/pagemap`, one call at a time: which pages of a stretch of address space are there.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::io::Errno;

/// Runs per PAGEMAP_SCAN call: 96 KiB of answers.
const SCAN_RUNS: usize = 4096;

/// Entries per read: 128 KiB of them, for 64 MiB of address space with 4 KiB pages. They stay in the cache of the
/// processor that looks through them, and have at most half as many runs.
const ENTRIES_PER_READ: usize = 16 << 10;

/// Bit 63 of a pagemap entry: the page is in memory (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY_PRESENT: u64 = 1 << 63;
/// Bit 62: the page is in swap. It has content as much as one in memory.
const ENTRY_SWAPPED: u64 = 1 << 62;

// linux/fs.h, since 6.7.
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// How much address space one PAGEMAP_SCAN call walks at the most, in bytes: a call cannot be interrupted, and one
/// over a tebibyte that is all there would take a second.
const SCAN_LEN: u64 = 64 << 30;

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<PageRegion>() == 24);
const _: () = assert!(size_of::<ScanArgument>() == 96);

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<ScanArgument>(b'f', 16);

/// A way to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By PAGEMAP_SCAN.
    Scan,
    /// By the entries.
    Entries,
}

/// Asks about one piece of address space after the other, with a buffer of its own for the answers. Several of them
/// may ask at once: the kernel takes the lock of the address space for reading only.
pub(crate) struct Walker {
    pagemap: Arc<File>,
    answers: Answers,
}

enum Answers {
    Scan(Vec<PageRegion>),
    Entries { page: u64, buffer: Vec<u8> },
}

impl Walker {
    pub(crate) fn new(pagemap: Arc<File>, way: Way) -> Walker {
        let answers = match way {
            Way::Scan => Answers::Scan(vec![PageRegion::default(); SCAN_RUNS]),
            Way::Entries => Answers::Entries {
                page: rustix::param::page_size() as u64,
                buffer: vec![0; ENTRIES_PER_READ * 8],
            },
        };
        Walker { pagemap, answers }
    }

    /// Asks once about the beginning of `rest`, which must not be empty: what is there goes behind `runs`, and `rest`
    /// is what was not asked about. A run that goes on may be found in two parts.
    pub(crate) fn step(&mut self, rest: &mut Range<u64>, runs: &mut Vec<Range<u64>>) -> io::Result<()> {
        match &mut self.answers {
            Answers::Scan(regions) => {
                let end = rest.end.min(rest.start.saturating_add(SCAN_LEN));
                let (found, walk_end) = scan(&self.pagemap, rest.start..end, regions)?;
                // The kernel gathers 512 runs at a time and leaves its end of the walk where it last had so many, also
                // when it has gone on to the end since: what follows would be told twice (seen on Linux 6.18).
                let reached = regions[..found].last().map_or(walk_end, |last| last.end.max(walk_end));
                if reached <= rest.start || reached > end {
                    return Err(io::Error::other(format!("PAGEMAP_SCAN stopped at {reached:#x}")));
                }
                runs.extend(regions[..found].iter().map(|region| region.start..region.end));
                rest.start = reached;
            }
            Answers::Entries { page, buffer } => {
                let entries = ((rest.end - rest.start) / *page).min(ENTRIES_PER_READ as u64);
                let buffer = &mut buffer[..entries as usize * 8];
                // A process that has ended gives no entries, and the error of a short read.
                self.pagemap.read_exact_at(buffer, rest.start / *page * 8)?;
                append_runs(buffer.as_chunks::<8>().0, rest.start, *page, runs);
                rest.start += entries * *page;
            }
        }
        Ok(())
    }
}

/// Whether the kernel knows PAGEMAP_SCAN, found by asking for one page.
pub(crate) fn has_scan(pagemap: &File, page: &Range<u64>) -> io::Result<bool> {
    match scan(pagemap, page.clone(), &mut [PageRegion::default()]) {
        Ok(_) => Ok(true),
        Err(Errno::NOTTY | Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// One PAGEMAP_SCAN call: how many runs it found, and the address it came to.
fn scan(pagemap: &File, range: Range<u64>, runs: &mut [PageRegion]) -> Result<(usize, u64), Errno> {
    let mut argument = ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        start: range.start,
        end: range.end,
        vec: runs.as_mut_ptr().expose_provenance() as u64,
        vec_len: runs.len() as u64,
        // Inverted and demanded: pages that are not the zero page.
        category_inverted: PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..ScanArgument::default()
    };
    loop {
        // SAFETY: the argument is laid out as the kernel's and says its own size; `vec` and `vec_len` are the
        // caller's slice, exclusively borrowed, which the kernel fills with plain numbers.
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut argument) };
        match usize::try_from(found) {
            Ok(found) => return Ok((found.min(runs.len()), argument.walk_end)),
            Err(_) => match Errno::from_io_error(&io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                error => return Err(error.unwrap_or(Errno::IO)),
            },
        }
    }
}

/// Whether the page of a pagemap entry is in memory or in swap.
pub(crate) fn is_there(entry: [u8; 8]) -> bool {
    u64::from_ne_bytes(entry) & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0
}

/// Puts the runs of pages that are there behind `runs`, where the first entry is that of the page at `address`.
fn append_runs(entries: &[[u8; 8]], address: u64, page: u64, runs: &mut Vec<Range<u64>>) {
    // The run that goes on, if there is one.
    let mut start = None;
    let mut at = address;
    for word in entries.chunks(64) {
        let any = word.iter().fold(0, |any, entry| any | u64::from_ne_bytes(*entry));
        // Most words have nothing: one look for all of it.
        let there = match is_there(any.to_ne_bytes()) {
            true => word.iter().rev().fold(0, |there, entry| there << 1 | u64::from(is_there(*entry))),
            false => 0,
        };
        let mut bit = 0;
        while bit < word.len() as u32 {
            let rest: u64 = there >> bit;
            let same = if start.is_some() { rest.trailing_ones() } else { rest.trailing_zeros() };
            // Zeros have moved in from above, and what is behind the last entry is zero as well.
            bit = (bit + same).min(word.len() as u32);
            if bit < word.len() as u32 {
                let edge = at + u64::from(bit) * page;
                match start.take() {
                    Some(start) => runs.push(start..edge),
                    None => start = Some(edge),
                }
            }
        }
        at += word.len() as u64 * page;
    }
    runs.extend(start.map(|start| start..at));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_runs_of_entries_are_those_of_one_entry_after_the_other(
            lengths in prop::collection::vec((prop_oneof![0..3usize, 60..70usize, 0..200usize], 0..4u8), 0..12),
        ) {
            // Neither, in memory, in swap, both; with bits that say something else.
            let entry = |kind: u8| (u64::from(kind) << 62 | 0x0080_0000_0000_1234).to_ne_bytes();
            let entries: Vec<[u8; 8]> =
                lengths.iter().flat_map(|&(length, kind)| std::iter::repeat_n(entry(kind), length)).collect();
            let (address, page) = (0x7f00_0000_0000u64, 4096);
            let mut expected: Vec<Range<u64>> = Vec::new();
            for at in (0..entries.len()).filter(|at| is_there(entries[*at])) {
                let start = address + at as u64 * page;
                match expected.last_mut() {
                    Some(last) if last.end == start => last.end += page,
                    _ => expected.push(start..start + page),
                }
            }
            let before = 1..2;
            let mut runs = vec![before.clone()];
            append_runs(&entries, address, page, &mut runs);
            prop_assert_eq!(&runs[0], &before);
            prop_assert_eq!(&runs[1..], &expected);
        }
    }
}
