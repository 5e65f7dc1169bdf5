//! The vocabulary every other crate speaks: pages, ranges of pages, sets of pages, RAM blocks.
//!
//! Ranges are half-open everywhere. A [`PageIndex`] counts within one RAM block, in units of that
//! image's page size; nothing here knows where the bytes are.

mod mask;
mod set;
mod sparse;

pub use mask::{Mask, MaskRuns};
pub use set::{PageSet, Runs};
pub use sparse::SparsePageSet;

use std::fmt;

/// The number of pages in one [`Window`]; a window is what a lane handles at a time (1 MiB of 4 KiB pages).
pub const WINDOW_PAGES: u64 = 256;

/// The index of a page within its RAM block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageIndex(pub u64);

/// A number of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageCount(pub u64);

/// The size of a page in bytes: a power of two from 1 KiB (the smallest QEMU target page) to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageSize(u32);

impl PageSize {
    /// 4 KiB, the target page of x86.
    pub const X86: PageSize = PageSize(12);

    /// The page size of `bytes`, or `None` where that is no page size.
    pub const fn new(bytes: u64) -> Option<PageSize> {
        if bytes.is_power_of_two() && bytes >= 1 << 10 && bytes <= 1 << 30 {
            Some(PageSize(bytes.trailing_zeros()))
        } else {
            None
        }
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The binary logarithm of the size.
    pub const fn shift(self) -> u32 {
        self.0
    }

    /// How many pages hold `len` bytes, the last one possibly in part.
    pub const fn pages_of(self, len: u64) -> PageCount {
        PageCount(len.div_ceil(1 << self.0))
    }
}

/// A half-open range of pages of one RAM block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first page.
    pub start: PageIndex,
    /// The page after the last.
    pub end: PageIndex,
}

impl PageRange {
    /// The range `start..end`.
    ///
    /// # Panics
    /// When `end` lies before `start`: ranges are made by the caller, never read from a file.
    pub const fn new(start: u64, end: u64) -> PageRange {
        assert!(start <= end, "a page range ends before it starts");
        PageRange { start: PageIndex(start), end: PageIndex(end) }
    }

    /// How many pages.
    pub const fn count(self) -> PageCount {
        PageCount(self.end.0 - self.start.0)
    }

    /// Whether it holds no page.
    pub const fn is_empty(self) -> bool {
        self.start.0 == self.end.0
    }
}

/// What an image or a guest says of a range of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Presence {
    /// The bytes are there and must be moved.
    Data,
    /// Known to read as zero.
    Zero,
    /// Never written: no memory or no file block behind it. Reads as zero.
    Absent,
}

/// A range of pages of one RAM block and what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which pages.
    pub range: PageRange,
    /// What they are.
    pub presence: Presence,
}

/// Up to [`WINDOW_PAGES`] pages, aligned to that number, of which the marked ones matter.
///
/// Planners deal windows instead of lists of ranges: however scattered the pages, a window is 40 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The first page, a multiple of [`WINDOW_PAGES`].
    pub first: PageIndex,
    /// Which of the pages, counted from `first`.
    pub mask: Mask,
}

/// A RAM block: a named, contiguous piece of guest memory, in QEMU's sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's idstr, for example `pc.ram`.
    pub name: String,
    /// The used length in bytes.
    pub length: u64,
    /// The page size that the image counts in.
    pub page_size: PageSize,
}

impl RamBlock {
    /// How many pages the block has, the last one possibly in part.
    pub fn pages(&self) -> PageCount {
        self.page_size.pages_of(self.length)
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start.0, self.end.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_powers_of_two_within_bounds() {
        for (bytes, expected) in [
            (0, None),
            (512, None),
            (1024, Some(10)),
            (4096, Some(12)),
            (4097, None),
            (1 << 30, Some(30)),
            (1 << 31, None),
            (u64::MAX, None),
        ] {
            assert_eq!(PageSize::new(bytes).map(PageSize::shift), expected, "{bytes}");
        }
    }

    #[test]
    fn an_odd_tail_counts_as_a_page() {
        assert_eq!(PageSize::X86.pages_of(4097), PageCount(2));
        assert_eq!(PageSize::X86.pages_of(0), PageCount(0));
    }
}
