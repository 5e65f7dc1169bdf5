//! A dense set of pages: one bit a page, as mapped-ram images have it.

use crate::{Mask, PageCount, PageIndex, PageRange, WINDOW_PAGES, Window};

/// The pages of one RAM block, one bit each.
///
/// Bit `i` of the set is bit `i % 64` of word `i / 64`, the layout of QEMU's bitmaps on a little-endian
/// host of 64 bits. It costs 32 MiB for a TiB of 4 KiB pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// An empty set over `pages` pages.
    pub fn new(pages: PageCount) -> PageSet {
        PageSet { words: vec![0; pages.0.div_ceil(64) as usize], pages: pages.0 }
    }

    /// The set whose words are `words`; bits beyond `pages` are dropped.
    ///
    /// # Panics
    /// When the number of words is not the one that `pages` takes.
    pub fn from_words(words: Vec<u64>, pages: PageCount) -> PageSet {
        assert_eq!(words.len() as u64, pages.0.div_ceil(64), "words of a page set");
        let mut set = PageSet { words, pages: pages.0 };
        if let (Some(last), tail @ 1..) = (set.words.last_mut(), pages.0 % 64) {
            *last &= (1 << tail) - 1;
        }
        set
    }

    /// The words.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many pages the set ranges over.
    pub fn capacity(&self) -> PageCount {
        PageCount(self.pages)
    }

    /// How many pages are in the set.
    pub fn count(&self) -> PageCount {
        PageCount(self.words.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[(page.0 / 64) as usize] >> (page.0 % 64) & 1 == 1
    }

    /// Adds a range of pages.
    ///
    /// # Panics
    /// When the range ends beyond the set.
    pub fn insert(&mut self, range: PageRange) {
        self.edit(range, |word, bits| *word |= bits);
    }

    /// Takes a range of pages out.
    ///
    /// # Panics
    /// When the range ends beyond the set.
    pub fn remove(&mut self, range: PageRange) {
        self.edit(range, |word, bits| *word &= !bits);
    }

    fn edit(&mut self, range: PageRange, apply: impl Fn(&mut u64, u64)) {
        assert!(range.end.0 <= self.pages, "pages {range} of a set of {:#x}", self.pages);
        let mut at = range.start.0;
        while at < range.end.0 {
            let upto = range.end.0.min((at / 64 + 1) * 64);
            let upper = if upto.is_multiple_of(64) { u64::MAX } else { (1 << (upto % 64)) - 1 };
            apply(&mut self.words[(at / 64) as usize], upper & (u64::MAX << (at % 64)));
            at = upto;
        }
    }

    /// Adds the marked pages of a window; pages beyond the set are left out.
    pub fn insert_window(&mut self, window: &Window) {
        let first = (window.first.0 / 64) as usize;
        for (word, bits) in self.words[first..].iter_mut().zip(window.mask.0) {
            *word |= bits;
        }
        if let (Some(last), tail @ 1..) = (self.words.last_mut(), self.pages % 64) {
            *last &= (1 << tail) - 1;
        }
    }

    /// The runs of consecutive pages that are in the set, in order.
    pub fn runs(&self) -> Runs<'_> {
        Runs { set: self, at: 0 }
    }

    /// The first run of consecutive pages in the set at or behind `from`.
    pub fn next_run(&self, from: PageIndex) -> Option<PageRange> {
        Runs { set: self, at: from.0 }.next()
    }

    /// Which pages of the window that begins at `first`, a multiple of [`WINDOW_PAGES`], are in the set.
    pub fn mask_at(&self, first: PageIndex) -> Mask {
        let at = (first.0 / 64) as usize;
        Mask(std::array::from_fn(|j| self.words.get(at + j).copied().unwrap_or(0)))
    }

    /// The windows with at least one page in the set, in order.
    pub fn windows(&self) -> impl Iterator<Item = Window> + '_ {
        self.words.chunks((WINDOW_PAGES / 64) as usize).enumerate().filter_map(|(i, words)| {
            let mask = Mask(std::array::from_fn(|j| words.get(j).copied().unwrap_or(0)));
            (!mask.is_empty()).then_some(Window { first: PageIndex(i as u64 * WINDOW_PAGES), mask })
        })
    }

    /// The page behind the run that `page` is in: the next that is in the set if it is not, or is not if it is.
    pub fn run_end(&self, page: PageIndex) -> PageIndex {
        PageIndex(self.next(page.0, !self.contains(page)))
    }

    fn next(&self, from: u64, wanted: bool) -> u64 {
        let mut at = from;
        while at < self.pages {
            let word = self.words[(at / 64) as usize];
            let rest = (if wanted { word } else { !word }) >> (at % 64);
            if rest != 0 {
                return (at + u64::from(rest.trailing_zeros())).min(self.pages);
            }
            at = (at / 64 + 1) * 64;
        }
        self.pages
    }
}

/// The runs of a [`PageSet`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    set: &'a PageSet,
    at: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let start = self.set.next(self.at, true);
        if start == self.set.pages {
            return None;
        }
        let end = self.set.next(start, false);
        self.at = end;
        Some(PageRange::new(start, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pages: u64, ranges: &[(u64, u64)]) {
        let mut set = PageSet::new(PageCount(pages));
        for &(start, end) in ranges {
            set.insert(PageRange::new(start, end));
        }
        let runs: Vec<_> = set.runs().map(|r| (r.start.0, r.end.0)).collect();
        assert_eq!(runs, ranges, "runs over {pages} pages");
        assert_eq!(set.count().0, ranges.iter().map(|(s, e)| e - s).sum::<u64>());

        let mut again = PageSet::new(PageCount(pages));
        for window in set.windows() {
            again.insert_window(&window);
        }
        assert_eq!(again, set, "the windows of a set make the set again");

        for &(start, end) in ranges {
            set.remove(PageRange::new(start, end));
        }
        assert_eq!(set.count(), PageCount(0));
    }

    #[test]
    fn a_run_ends_where_membership_changes() {
        let mut set = PageSet::new(PageCount(200));
        set.insert(PageRange::new(3, 130));
        for (page, end) in [(0, 3), (2, 3), (3, 130), (129, 130), (130, 200), (199, 200)] {
            assert_eq!(set.run_end(PageIndex(page)), PageIndex(end), "{page}");
        }
    }

    #[test]
    fn runs_and_windows_are_what_was_inserted() {
        check(0, &[]);
        check(1, &[(0, 1)]);
        check(64, &[(0, 64)]);
        check(65, &[(0, 1), (63, 65)]);
        check(1000, &[(0, 1), (64, 128), (255, 257), (999, 1000)]);
        check(1 << 16, &[(3, 60_000)]);
    }

    #[test]
    fn the_next_run_begins_where_one_asks_or_behind() {
        let mut set = PageSet::new(PageCount(300));
        set.insert(PageRange::new(10, 20));
        set.insert(PageRange::new(290, 300));
        for (from, expected) in [
            (0, Some((10, 20))),
            (15, Some((15, 20))),
            (20, Some((290, 300))),
            (299, Some((299, 300))),
            (300, None),
            (u64::MAX, None),
        ] {
            let found = set.next_run(PageIndex(from)).map(|run| (run.start.0, run.end.0));
            assert_eq!(found, expected, "{from}");
        }
    }

    #[test]
    fn a_window_is_cut_out_wherever_it_begins() {
        let mut set = PageSet::new(PageCount(300));
        set.insert(PageRange::new(250, 300));
        for (first, expected) in [(0, Mask::range(250, 256)), (256, Mask::range(0, 44)), (512, Mask::EMPTY)] {
            assert_eq!(set.mask_at(PageIndex(first)), expected, "{first}");
        }
    }

    #[test]
    fn bits_beyond_the_last_page_are_dropped() {
        let set = PageSet::from_words(vec![u64::MAX, u64::MAX], PageCount(70));
        assert_eq!(set.count(), PageCount(70));
        assert_eq!(set.runs().last(), Some(PageRange::new(0, 70)));
    }
}
