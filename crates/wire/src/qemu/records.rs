//! Writing the records of RAM's PART and END sections.

use std::sync::Arc;

use crate::cursor::Encoder;

use super::format::*;
use super::{BlockEntry, RamSetup};

/// Writes the records of pages into a stream, naming a block only where it differs from the record before.
///
/// The memory of the last block survives the end of a section, as QEMU's does, so one encoder serves one
/// channel for its whole life.
#[derive(Clone, Debug)]
pub struct RecordEncoder {
    blocks: Arc<[BlockEntry]>,
    last: Option<usize>,
}

impl RecordEncoder {
    /// An encoder for the blocks of `setup`.
    pub fn new(setup: &RamSetup) -> RecordEncoder {
        RecordEncoder { blocks: setup.blocks.clone().into(), last: None }
    }

    /// An encoder for records that are made apart from those before them on their channel: `last` is the block of the
    /// record that will stand before the first, `None` where there is none, or where it is not known.
    #[must_use]
    pub fn behind(&self, last: Option<usize>) -> RecordEncoder {
        RecordEncoder { blocks: self.blocks.clone(), last }
    }

    /// Appends the head of a page of data; the page itself must follow.
    ///
    /// # Panics
    /// When there is no such block, or `offset` is no page of it.
    pub fn page_head(&mut self, block: usize, offset: u64, out: &mut Vec<u8>) {
        self.head(block, offset, RAM_SAVE_FLAG_PAGE, out);
    }

    /// Appends the whole record of a page of zeroes.
    ///
    /// # Panics
    /// As [`RecordEncoder::page_head`].
    pub fn zero(&mut self, block: usize, offset: u64, out: &mut Vec<u8>) {
        self.head(block, offset, RAM_SAVE_FLAG_ZERO, out);
        out.push(0);
    }

    #[allow(clippy::indexing_slicing, reason = "the caller's block, as documented, no input")]
    fn head(&mut self, block: usize, offset: u64, flag: u64, out: &mut Vec<u8>) {
        let entry = &self.blocks[block];
        assert!(
            offset & RAM_FLAGS_MASK == 0 && offset < entry.used_length,
            "offset {offset:#x} of block `{}`",
            entry.name
        );
        let mut encoder = Encoder::new(out);
        if self.last == Some(block) {
            encoder.be64(offset | flag | RAM_SAVE_FLAG_CONTINUE);
        } else {
            encoder.be64(offset | flag);
            encoder.counted_string(&entry.name);
            self.last = Some(block);
        }
    }

    /// Appends the mark at which the multifd channels synchronise.
    pub fn flush(&self, out: &mut Vec<u8>) {
        Encoder::new(out).be64(RAM_SAVE_FLAG_MULTIFD_FLUSH);
    }

    /// Appends the end of a section's payload.
    pub fn eos(&self, out: &mut Vec<u8>) {
        Encoder::new(out).be64(RAM_SAVE_FLAG_EOS);
    }
}
