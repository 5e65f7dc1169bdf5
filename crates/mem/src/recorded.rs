//! Which pages of a block were supplied as data: written by lanes, side by side, and read when they are done.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use page::PageCount;

/// The words of a chunk: 4 KiB, the bits of 128 MiB of guest memory.
const CHUNK_WORDS: usize = 512;

/// One bit for each page of a block. What it takes of memory, and of time to be read, goes by the stretches that have
/// data and not by the length of the block: an idle guest of 512 GiB has a bitmap of 16 MiB with a few words in it.
#[derive(Debug)]
pub(crate) struct Recorded {
    chunks: Vec<OnceLock<Box<[AtomicU64; CHUNK_WORDS]>>>,
    words: usize,
}

impl Recorded {
    pub(crate) fn new(pages: PageCount) -> Recorded {
        let words = pages.0.div_ceil(64) as usize;
        let chunks = (0..words.div_ceil(CHUNK_WORDS)).map(|_| OnceLock::new()).collect();
        Recorded { chunks, words }
    }

    /// Adds the pages of a window, the first of which is that of the word `first`. A window has its words to itself, so
    /// lanes never meet in one.
    ///
    /// # Panics
    /// When the window is none of the block's.
    pub(crate) fn add(&self, first: usize, bits: [u64; 4]) {
        if bits == [0; 4] {
            return;
        }
        let chunk = self.chunks[first / CHUNK_WORDS]
            .get_or_init(|| Box::new([const { AtomicU64::new(0) }; CHUNK_WORDS]));
        for (word, bits) in chunk[first % CHUNK_WORDS..].iter().zip(bits) {
            // Relaxed: whoever reads the words joins the lanes first.
            word.fetch_or(bits, Ordering::Relaxed);
        }
    }

    /// The stretches that have pages, in order: where in the words of the whole each begins, and its words.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (usize, Vec<u64>)> {
        self.chunks.iter().enumerate().filter_map(|(i, chunk)| {
            let first = i * CHUNK_WORDS;
            let len = CHUNK_WORDS.min(self.words - first);
            let words = chunk.get()?[..len].iter().map(|word| word.load(Ordering::Relaxed)).collect();
            Some((first, words))
        })
    }

    /// All words.
    pub(crate) fn all(&self) -> Vec<u64> {
        let mut all = vec![0; self.words];
        for (first, words) in self.parts() {
            all[first..first + words.len()].copy_from_slice(&words);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_without_pages_take_nothing_and_the_last_ends_with_the_block() {
        // A chunk is of 32768 pages: four, and a fifth of which there are two words.
        let recorded = Recorded::new(PageCount(4 * 32768 + 65));
        recorded.add(1536, [0; 4]);
        assert_eq!(recorded.parts().count(), 0);
        recorded.add(508, [1, 0, 0, 1 << 63]);
        recorded.add(508, [2, 0, 0, 0]);
        recorded.add(2048, [5, 1, 0, 0]);
        let parts: Vec<_> = recorded.parts().collect();
        let mut first = vec![0; 512];
        (first[508], first[511]) = (3, 1 << 63);
        assert_eq!(parts, [(0, first), (2048, vec![5, 1])]);
        let all = recorded.all();
        assert_eq!((all.len(), all[508], all[2048], all[2049]), (2050, 3, 5, 1));
    }
}
