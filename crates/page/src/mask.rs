//! A set of up to 256 pages in four words.

use crate::WINDOW_PAGES;

/// A set of the pages of one window; bit `i` is the window's page `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct Mask(pub [u64; 4]);

impl Mask {
    /// No page.
    pub const EMPTY: Mask = Mask([0; 4]);
    /// All 256 pages.
    pub const FULL: Mask = Mask([u64::MAX; 4]);

    /// The pages `start..end`.
    ///
    /// # Panics
    /// When `end` lies before `start` or beyond the window.
    pub fn range(start: usize, end: usize) -> Mask {
        assert!(start <= end && end <= WINDOW_PAGES as usize, "mask range {start}..{end}");
        let mut mask = Mask::EMPTY;
        mask.insert_range(start, end);
        mask
    }

    /// Adds the pages `start..end`.
    ///
    /// # Panics
    /// When `end` lies before `start` or beyond the window.
    pub fn insert_range(&mut self, start: usize, end: usize) {
        assert!(start <= end && end <= WINDOW_PAGES as usize, "mask range {start}..{end}");
        for (i, word) in self.0.iter_mut().enumerate() {
            let from = start.clamp(i * 64, i * 64 + 64) - i * 64;
            let to = end.clamp(i * 64, i * 64 + 64) - i * 64;
            if from < to {
                let upper = if to == 64 { u64::MAX } else { (1 << to) - 1 };
                *word |= upper & (u64::MAX << from);
            }
        }
    }

    /// Adds one page.
    pub fn insert(&mut self, page: usize) {
        self.0[page / 64] |= 1 << (page % 64);
    }

    /// Takes one page out.
    pub fn remove(&mut self, page: usize) {
        self.0[page / 64] &= !(1 << (page % 64));
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: usize) -> bool {
        self.0[page / 64] >> (page % 64) & 1 == 1
    }

    /// How many pages.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// The pages in both.
    pub fn and(self, other: Mask) -> Mask {
        Mask(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }

    /// The pages in either.
    pub fn or(self, other: Mask) -> Mask {
        Mask(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    /// The runs of consecutive pages, in order, as half-open pairs.
    pub fn runs(&self) -> MaskRuns {
        MaskRuns { mask: *self, at: 0 }
    }

    /// The first page at or after `from` whose membership is `wanted`, or 256.
    fn next(&self, from: usize, wanted: bool) -> usize {
        let mut at = from;
        while at < WINDOW_PAGES as usize {
            let word = if wanted { self.0[at / 64] } else { !self.0[at / 64] };
            let rest = word >> (at % 64);
            if rest != 0 {
                return at + rest.trailing_zeros() as usize;
            }
            at = (at / 64 + 1) * 64;
        }
        WINDOW_PAGES as usize
    }
}

/// The runs of a [`Mask`].
#[derive(Clone, Debug)]
pub struct MaskRuns {
    mask: Mask,
    at: usize,
}

impl Iterator for MaskRuns {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<(usize, usize)> {
        let start = self.mask.next(self.at, true);
        if start == WINDOW_PAGES as usize {
            return None;
        }
        let end = self.mask.next(start, false);
        self.at = end;
        Some((start, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_what_was_inserted() {
        for ranges in [
            vec![],
            vec![(0, 256)],
            vec![(0, 1), (2, 3), (63, 65), (127, 129), (255, 256)],
            vec![(64, 128)],
            vec![(10, 200)],
        ] {
            let mut mask = Mask::EMPTY;
            for &(start, end) in &ranges {
                mask.insert_range(start, end);
            }
            assert_eq!(mask.runs().collect::<Vec<_>>(), ranges);
            assert_eq!(mask.count() as usize, ranges.iter().map(|(s, e)| e - s).sum::<usize>());
        }
    }

    #[test]
    fn empty_ranges_insert_nothing() {
        for at in [0, 63, 64, 255, 256] {
            assert!(Mask::range(at, at).is_empty(), "{at}");
        }
    }
}
