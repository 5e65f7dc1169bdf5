//! The bitmap of a block: which of its pages are in the file.

use page::{PageCount, PageRange, PageSet};

use crate::Fault;

use super::format::{BITMAP_WORD_LEN, bitmap_len};

/// Reads a whole bitmap of `pages` pages from `bytes`, whose first stands at the absolute offset `base`.
///
/// # Errors
/// Damaged: another length than [`bitmap_len`] of the pages, a bit set beyond the last page.
pub fn decode_bitmap(bytes: &[u8], base: u64, pages: PageCount) -> Result<PageSet, Fault> {
    if bytes.len() as u64 != bitmap_len(pages.0) {
        let problem = format!("{:#x} bytes instead of {:#x}", bytes.len(), bitmap_len(pages.0));
        return Err(Fault::damaged(base, "bitmap", problem));
    }
    let (chunks, _) = bytes.as_chunks::<8>();
    let words: Vec<u64> = chunks.iter().map(|word| u64::from_le_bytes(*word)).collect();
    if let (Some(last), tail @ 1..) = (words.last(), pages.0 % 64)
        && last >> tail != 0
    {
        let at = base.saturating_add(bytes.len() as u64 - BITMAP_WORD_LEN);
        return Err(beyond(at, pages, (pages.0 - tail) + u64::from(63 - last.leading_zeros())));
    }
    Ok(PageSet::from_words(words, pages))
}

/// Appends the bitmap of a set.
pub fn encode_bitmap(set: &PageSet, out: &mut Vec<u8>) {
    for word in set.words() {
        out.extend_from_slice(&word.to_le_bytes());
    }
}

fn beyond(at: u64, pages: PageCount, page: u64) -> Fault {
    Fault::damaged(at, "bitmap", format!("page {page:#x} is marked, but the block has {:#x}", pages.0))
}

/// Reads a bitmap that arrives in pieces, and gives the runs of pages that are in the file.
///
/// A bitmap of a large guest has megabytes and mostly holes: the caller reads what the file has in any
/// pieces, skips its holes, and the scanner allocates nothing.
#[derive(Clone, Debug)]
pub struct BitmapScanner {
    base: u64,
    pages: PageCount,
    /// How many bytes were passed.
    at: u64,
    /// The run that the last piece ended in.
    open: Option<u64>,
}

impl BitmapScanner {
    /// A scanner for a bitmap of `pages` pages at the absolute offset `base`.
    pub fn new(base: u64, pages: PageCount) -> BitmapScanner {
        BitmapScanner { base, pages, at: 0, open: None }
    }

    /// How many bytes are yet to come.
    pub fn remaining(&self) -> u64 {
        bitmap_len(self.pages.0).saturating_sub(self.at)
    }

    /// Passes the next bytes and hands every run that ends in them to `on_run`.
    ///
    /// # Errors
    /// Damaged: more bytes than the bitmap has, a bit set beyond the last page.
    pub fn push(&mut self, bytes: &[u8], mut on_run: impl FnMut(PageRange)) -> Result<(), Fault> {
        if bytes.len() as u64 > self.remaining() {
            let at = self.base.saturating_add(self.at);
            return Err(Fault::damaged(at, "bitmap", "is longer than its block"));
        }
        // Little-endian words are a string of bytes whose bit i is page i: pieces may end at any byte.
        // Eight at a time is only for speed.
        let (words, tail) = bytes.as_chunks::<8>();
        for word in words {
            self.bits(u64::from_le_bytes(*word), 64, &mut on_run)?;
        }
        for byte in tail {
            self.bits(u64::from(*byte), 8, &mut on_run)?;
        }
        Ok(())
    }

    /// Passes `len` bytes of zero, as a hole of the file reads.
    ///
    /// # Errors
    /// Damaged: more bytes than the bitmap has.
    pub fn skip(&mut self, len: u64, mut on_run: impl FnMut(PageRange)) -> Result<(), Fault> {
        if len > self.remaining() {
            let at = self.base.saturating_add(self.at);
            return Err(Fault::damaged(at, "bitmap", "is longer than its block"));
        }
        if len > 0 {
            self.close(self.at * 8, &mut on_run);
        }
        self.at += len;
        Ok(())
    }

    /// Says that the bitmap is complete.
    ///
    /// # Errors
    /// Damaged: bytes are lacking.
    pub fn finish(mut self, mut on_run: impl FnMut(PageRange)) -> Result<(), Fault> {
        if self.remaining() > 0 {
            let at = self.base.saturating_add(self.at);
            return Err(Fault::damaged(at, "bitmap", format!("{:#x} bytes are lacking", self.remaining())));
        }
        self.close(self.pages.0, &mut on_run);
        Ok(())
    }

    fn close(&mut self, end: u64, on_run: &mut impl FnMut(PageRange)) {
        if let Some(start) = self.open.take() {
            on_run(PageRange::new(start, end));
        }
    }

    fn bits(&mut self, bits: u64, count: u64, on_run: &mut impl FnMut(PageRange)) -> Result<(), Fault> {
        let first = self.at * 8;
        let valid = self.pages.0.saturating_sub(first).min(count);
        let all = if count == 64 { u64::MAX } else { (1 << count) - 1 };
        if valid < count && bits >> valid != 0 {
            let page = first + u64::from(63 - bits.leading_zeros());
            return Err(beyond(self.base.saturating_add(self.at), self.pages, page));
        }
        self.at += count / 8;
        match (bits, self.open.is_some()) {
            (0, false) => return Ok(()),
            (ones, true) if ones == all => return Ok(()),
            _ => {}
        }
        let mut at = 0;
        while at < count {
            let rest = bits >> at;
            if self.open.is_some() {
                // Bits above the count are zero, so a run that fills the word ends at the count at most.
                let run = u64::from(rest.trailing_ones()).min(count - at);
                at += run;
                if at < count {
                    self.close(first + at, on_run);
                }
            } else if rest == 0 {
                break;
            } else {
                at += u64::from(rest.trailing_zeros());
                self.open = Some(first + at);
            }
        }
        Ok(())
    }
}
