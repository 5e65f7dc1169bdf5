//! What an image says of itself once all of it has been checked.

use page::{PageCount, PageSize, RamBlock};

use crate::qemu::{BlockEntry, DeviceSection, Preamble, SectionHeader};
use crate::{FileRange, IdStr};

/// Where everything is in a mapped-ram image. All offsets count from the start of the file.
///
/// No two of the ranges overlap, and all lie within the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The offset of the magic.
    pub stream_start: u64,
    /// Magic, version, configuration.
    pub preamble: Preamble,
    /// The head of RAM's START section.
    pub ram: SectionHeader,
    /// The length of all blocks in bytes.
    pub total: u64,
    /// The blocks, in the order of the stream.
    pub blocks: Vec<BlockPlacement>,
    /// The sections of other handlers that stand before the end of RAM, in the order of the stream. They are
    /// device state that QEMU loads first: virtio-mem's, of how much memory is plugged in.
    pub early: Vec<DeviceSection>,
    /// The device state: from behind the footer of RAM's END up to and with the end mark.
    pub device_state: FileRange,
    /// The vmdescription, its five bytes of head included.
    pub vmdesc: Option<FileRange>,
    /// The length of the file in bytes.
    pub file_len: u64,
}

/// A block and its place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockPlacement {
    /// The block's idstr.
    pub name: IdStr,
    /// The used length in bytes, a multiple of the page size.
    pub used_length: u64,
    /// The page size that the bitmap counts in.
    pub page_size: PageSize,
    /// The offset of the mapped-ram header.
    pub header_at: u64,
    /// The guest-physical address, where `x-ignore-shared` is on.
    pub address: Option<u64>,
    /// The bitmap; empty for an ignored block.
    pub bitmap: FileRange,
    /// The pages; empty for an ignored block.
    pub pages: FileRange,
}

impl BlockPlacement {
    /// Whether the block is shared memory that `x-ignore-shared` left out of the image; since QEMU 11.0.
    pub fn is_ignored(&self) -> bool {
        self.pages.is_empty()
    }

    /// How many pages the block has.
    pub fn page_count(&self) -> PageCount {
        self.page_size.pages_of(self.used_length)
    }

    /// The block in the vocabulary of pages.
    pub fn ram_block(&self) -> RamBlock {
        RamBlock { name: self.name.as_str().into(), length: self.used_length, page_size: self.page_size }
    }

    /// The block as an entry of a stream's list.
    pub fn entry(&self) -> BlockEntry {
        BlockEntry {
            name: self.name.clone(),
            used_length: self.used_length,
            page_size: None,
            address: self.address,
        }
    }
}
