//! A set of pages that takes memory only where it has some.

use std::collections::BTreeMap;

use crate::{Mask, PageCount, PageIndex, WINDOW_PAGES, Window};

/// How many words a chunk has: 4 KiB, the bits of 128 MiB of guest memory.
const CHUNK_WORDS: usize = 512;
/// How many pages a chunk ranges over.
const CHUNK_PAGES: u64 = CHUNK_WORDS as u64 * 64;

/// The pages of one RAM block, of which there may be few: a block can claim any length, and only pages that
/// are there take room here.
///
/// The bits are laid out as in [`crate::PageSet`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SparsePageSet {
    chunks: BTreeMap<u64, Box<[u64; CHUNK_WORDS]>>,
}

impl SparsePageSet {
    /// An empty set.
    pub fn new() -> SparsePageSet {
        SparsePageSet::default()
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        let first = PageIndex(page.0 - page.0 % WINDOW_PAGES);
        self.mask(first).contains((page.0 % WINDOW_PAGES) as usize)
    }

    /// Which pages of the window that begins at `first` are in the set.
    ///
    /// # Panics
    /// When `first` begins no window.
    pub fn mask(&self, first: PageIndex) -> Mask {
        let (chunk, word) = place(first);
        match self.chunks.get(&chunk) {
            Some(words) => Mask(std::array::from_fn(|i| words[word + i])),
            None => Mask::EMPTY,
        }
    }

    /// Adds the marked pages of a window.
    ///
    /// # Panics
    /// When its first page begins no window.
    pub fn insert(&mut self, window: &Window) {
        if window.mask.is_empty() {
            return;
        }
        let (chunk, word) = place(window.first);
        let words = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK_WORDS]));
        words[word..].iter_mut().zip(window.mask.0).for_each(|(word, bits)| *word |= bits);
    }

    /// Takes the marked pages of a window out.
    ///
    /// # Panics
    /// When its first page begins no window.
    pub fn remove(&mut self, window: &Window) {
        let (chunk, word) = place(window.first);
        if let Some(words) = self.chunks.get_mut(&chunk) {
            words[word..].iter_mut().zip(window.mask.0).for_each(|(word, bits)| *word &= !bits);
        }
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        self.chunks.clear();
    }

    /// How many pages are in the set.
    pub fn count(&self) -> PageCount {
        let words = self.chunks.values().flat_map(|words| words.iter());
        PageCount(words.map(|word| u64::from(word.count_ones())).sum())
    }

    /// The words of the set, in order, those parts left out that have no page: the first page of each part,
    /// and its words.
    pub fn parts(&self) -> impl Iterator<Item = (PageIndex, &[u64])> {
        self.chunks.iter().map(|(chunk, words)| (PageIndex(chunk * CHUNK_PAGES), words.as_slice()))
    }
}

/// The chunk of a window and its place there, in words.
fn place(first: PageIndex) -> (u64, usize) {
    assert!(first.0.is_multiple_of(WINDOW_PAGES), "a window at page {first}");
    (first.0 / CHUNK_PAGES, (first.0 % CHUNK_PAGES / 64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_is_there_and_comes_out_again() {
        let mut set = SparsePageSet::new();
        let far = 1u64 << 40;
        let windows = [
            (0, Mask::range(0, 1)),
            (256, Mask::FULL),
            (CHUNK_PAGES, Mask::range(63, 65)),
            (far, Mask::range(200, 256)),
        ];
        for (first, mask) in windows {
            set.insert(&Window { first: PageIndex(first), mask });
        }
        assert_eq!(set.count(), PageCount(1 + 256 + 2 + 56));
        assert_eq!(set.chunks.len(), 3, "memory is taken where pages are");
        for (first, mask) in windows {
            assert_eq!(set.mask(PageIndex(first)), mask);
            for page in 0..WINDOW_PAGES {
                assert_eq!(set.contains(PageIndex(first + page)), mask.contains(page as usize));
            }
        }
        let firsts: Vec<u64> = set.parts().map(|(first, _)| first.0).collect();
        assert_eq!(firsts, [0, CHUNK_PAGES, far]);
        set.remove(&Window { first: PageIndex(256), mask: Mask::range(1, 256) });
        assert_eq!(set.mask(PageIndex(256)), Mask::range(0, 1));
        set.remove(&Window { first: PageIndex(far * 2), mask: Mask::FULL });
        set.clear();
        assert_eq!(set, SparsePageSet::new());
    }
}
