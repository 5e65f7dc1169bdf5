//! Where in a stream each page is, for whoever must read them in another order.

use std::collections::BTreeMap;
use std::sync::Arc;

use io::{ReadPair, Supply};
use page::{Mask, PageIndex, WINDOW_PAGES};

use super::StreamSource;
use super::flow::{FlowingPage, FlowingPages, KnownWindow, PlacedPages, Source};
use crate::{Error, Kind, Result};

/// A page that the stream does not have as bytes.
const NOWHERE: u64 = u64::MAX;
/// What stands between two pages of one block that follow each other: the word of the second.
const WORD_LEN: u64 = 8;

/// The offsets of a window's pages.
type Offsets = Box<[u64; WINDOW_PAGES as usize]>;

/// The pages of a stream in a file, found by reading it once. Takes 8 bytes a page that has data, in whole windows:
/// 2 MiB for a GiB of it.
pub struct StreamIndex {
    pair: ReadPair,
    page: u64,
    blocks: Vec<BTreeMap<u64, Offsets>>,
}

impl StreamIndex {
    /// Reads the pages of `source` to their end; `pair` is the file that it reads.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn read(source: &mut StreamSource, pair: ReadPair) -> Result<StreamIndex> {
        let page = source.shape().page_size.bytes();
        let mut blocks: Vec<BTreeMap<u64, Offsets>> = Vec::new();
        blocks.resize_with(source.shape().blocks.len(), BTreeMap::new);
        source.for_each(&mut |FlowingPage { block, offset, data, at }| {
            let index = offset / page;
            let (window, slot) = (index / WINDOW_PAGES, (index % WINDOW_PAGES) as usize);
            match (data, blocks[block].get_mut(&window)) {
                (Some(_), Some(offsets)) => offsets[slot] = at,
                (Some(_), None) => {
                    let mut offsets = Box::new([NOWHERE; WINDOW_PAGES as usize]);
                    offsets[slot] = at;
                    blocks[block].insert(window, offsets);
                }
                (None, Some(offsets)) => offsets[slot] = NOWHERE,
                // It is zero, and it was: such records take no room here, however many there are.
                (None, None) => {}
            }
            Ok(())
        })?;
        Ok(StreamIndex { pair, page, blocks })
    }

    fn offset_of(&self, block: usize, index: u64) -> Option<u64> {
        let offsets = self.blocks.get(block)?.get(&(index / WINDOW_PAGES))?;
        Some(offsets[(index % WINDOW_PAGES) as usize]).filter(|at| *at != NOWHERE)
    }
}

impl PlacedPages for StreamIndex {
    fn windows(&self, block: usize, on_window: &mut dyn FnMut(KnownWindow) -> Result<()>) -> Result<()> {
        let Some(windows) = self.blocks.get(block) else { return Ok(()) };
        windows.iter().try_for_each(|(window, offsets)| {
            let mut data = Mask::EMPTY;
            offsets.iter().enumerate().filter(|(_, at)| **at != NOWHERE).for_each(|(i, _)| data.insert(i));
            let first = PageIndex(window * WINDOW_PAGES);
            if data.is_empty() { Ok(()) } else { on_window(KnownWindow { first, data, zero: Mask::EMPTY }) }
        })
    }

    fn read_at(&self, block: usize, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let page = self.page;
        let stride = page + WORD_LEN;
        let first = offset / page;
        let count = bytes.len() as u64 / page;
        if !offset.is_multiple_of(page) || !(bytes.len() as u64).is_multiple_of(page) {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let mut read = Vec::new();
        let mut done = 0;
        while done < count {
            let at = self.offset_of(block, first + done).ok_or(std::io::ErrorKind::InvalidInput)?;
            // Pages that were sent one after the other are read at once, with the words between them.
            let follows = |i: &u64| self.offset_of(block, first + done + i) == Some(at + i * stride);
            let run = (1..count - done).take_while(follows).last().unwrap_or(0) + 1;
            read.resize((run * stride - WORD_LEN) as usize, 0);
            self.pair.read_exact_at(&mut read, at)?;
            let target = &mut bytes[(done * page) as usize..((done + run) * page) as usize];
            for (target, source) in target.chunks_mut(page as usize).zip(read.chunks(stride as usize)) {
                target.copy_from_slice(&source[..page as usize]);
            }
            done += run;
        }
        Ok(())
    }

    fn supply(&self) -> Result<Arc<dyn Supply>> {
        Err(Error::new(Kind::Unsupported, "the pages of a stream are not read by lanes"))
    }
}
