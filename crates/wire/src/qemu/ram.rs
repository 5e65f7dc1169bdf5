//! The list of RAM blocks that opens the RAM section.

use std::collections::HashSet;

use crate::{Fault, Findings, IdStr};

use super::Configuration;
use super::format::{RAM_BLOCKS_MAX, RAM_FLAGS_MASK, RAM_LEN_MAX};

/// Which optional field the entries of a block list have. Nothing in the list itself tells.
///
/// The two capabilities exclude each other in every QEMU. The mapped-ram header, which follows an entry
/// when that capability is on, is read by [`crate::mapped_ram`], since the stream goes on elsewhere in
/// the file then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum BlockListVariant {
    /// None.
    #[default]
    Plain,
    /// `postcopy-ram` is on: blocks with pages other than the host's tell their page size.
    Postcopy,
    /// `x-ignore-shared` is on: every block tells its guest-physical address.
    IgnoreShared,
}

impl BlockListVariant {
    /// The variant that a configuration announces; postcopy is announced by a command instead.
    pub fn of(configuration: Option<&Configuration>) -> BlockListVariant {
        match configuration.is_some_and(Configuration::ignores_shared) {
            true => BlockListVariant::IgnoreShared,
            false => BlockListVariant::Plain,
        }
    }
}

/// A RAM block as the list has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockEntry {
    /// The block's idstr.
    pub name: IdStr,
    /// The used length in bytes.
    pub used_length: u64,
    /// The page size of the backend in bytes, where the list tells it.
    pub page_size: Option<u64>,
    /// The guest-physical address, where the list tells it.
    pub address: Option<u64>,
}

/// The payload of the START section of RAM.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct RamSetup {
    /// The blocks, in the order of the stream. Their used lengths add up to the total in the stream.
    pub blocks: Vec<BlockEntry>,
    /// Whether the multifd channels synchronise before the payload ends; since 8.1.
    pub multifd_flush: bool,
}

impl RamSetup {
    /// The length of all blocks in bytes.
    pub fn total(&self) -> u64 {
        self.blocks.iter().fold(0, |sum, block| sum.saturating_add(block.used_length))
    }
}

/// A block list in the making: what was announced, what has come, and whether the two agree.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlockListBuilder {
    total: u64,
    sum: u64,
    blocks: Vec<BlockEntry>,
    names: HashSet<IdStr>,
}

impl BlockListBuilder {
    /// A list whose blocks add up to `total` bytes, as the word at `offset` says.
    pub(crate) fn new(total: u64, offset: u64) -> Result<BlockListBuilder, Fault> {
        if total > RAM_LEN_MAX {
            let problem = format!("{total:#x} bytes are more than {RAM_LEN_MAX:#x}");
            return Err(Fault::damaged(offset, "total RAM size", problem));
        }
        Ok(BlockListBuilder { total, ..BlockListBuilder::default() })
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Whether all that was announced has come.
    pub(crate) fn is_complete(&self) -> bool {
        self.sum >= self.total
    }

    /// Adds the entry that stands at `offset`.
    pub(crate) fn push(
        &mut self,
        entry: BlockEntry,
        offset: u64,
        findings: &mut Findings,
    ) -> Result<(), Fault> {
        let field = || format!("RAM block `{}`", entry.name);
        if self.blocks.len() == RAM_BLOCKS_MAX {
            return Err(Fault::damaged(offset, field(), format!("is one more than {RAM_BLOCKS_MAX}")));
        }
        // Each length is bounded here and their number above, so the sum cannot overflow. A length that
        // is no multiple of the least page would spoil the flags in the low bits of the total.
        if entry.used_length == 0 || entry.used_length & RAM_FLAGS_MASK != 0 {
            let problem = format!("used length {:#x} is no number of pages", entry.used_length);
            return Err(Fault::damaged(offset, field(), problem));
        }
        if entry.used_length > RAM_LEN_MAX {
            let problem = format!("used length {:#x} is more than {RAM_LEN_MAX:#x}", entry.used_length);
            return Err(Fault::damaged(offset, field(), problem));
        }
        self.sum += entry.used_length;
        if self.sum > self.total {
            let problem =
                format!("the blocks add up to {:#x} bytes, the total is {:#x}", self.sum, self.total);
            findings.note(Fault::damaged(offset, field(), problem))?;
        }
        if !self.names.insert(entry.name.clone()) {
            findings.note(Fault::damaged(offset, field(), "is listed twice"))?;
        }
        self.blocks.push(entry);
        Ok(())
    }

    pub(crate) fn finish(self, multifd_flush: bool) -> RamSetup {
        RamSetup { blocks: self.blocks, multifd_flush }
    }
}
