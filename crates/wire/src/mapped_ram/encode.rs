//! Composing an image: what goes where, before a byte is written.

use page::PageSize;

use crate::cursor::Encoder;
use crate::qemu::format::{
    QEMU_VM_EOF, RAM_BLOCKS_MAX, RAM_FLAGS_MASK, RAM_LEN_MAX, RAM_SAVE_FLAG_EOS, RAM_SAVE_FLAG_MEM_SIZE,
};
use crate::qemu::vmdesc::VmDescription;
use crate::qemu::{BlockEntry, Configuration, Item, Preamble, SectionHeader};
use crate::{Fault, FileRange};

use super::format::{HEADER_LEN, Header, MAPPED_RAM_FILE_OFFSET_ALIGNMENT, bitmap_len};
use super::layout::BlockPlacement;

/// An image before it is written: which bytes of metadata go where, and where bitmaps, pages and the tail
/// go.
///
/// The places are those that QEMU itself would choose, so the metadata of a file of ours and one of
/// QEMU's compare equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePlan {
    /// The blocks, in the order of the stream.
    pub blocks: Vec<PlannedBlock>,
    /// The offset behind the last block's pages: the tail goes here, see [`encode_tail`].
    pub tail_offset: u64,
}

/// A block of a planned image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedBlock {
    /// The offset at which [`metadata`](PlannedBlock::metadata) goes.
    pub metadata_at: u64,
    /// The bytes in front of the block's bitmap: its entry in the list and its header. The first block's
    /// begin with all that stands before the list.
    pub metadata: Vec<u8>,
    /// The block, its bitmap and its pages.
    pub placement: BlockPlacement,
}

impl ImagePlan {
    /// Plans an image whose magic stands at `stream_start`.
    ///
    /// `ram` is the head of RAM's START section, whose section id a probe of the guest gives; `blocks`
    /// lists name and length, in the guest's order.
    ///
    /// # Errors
    /// Unsupported, its offset the place in the image: a configuration without `mapped-ram` or with
    /// `x-ignore-shared`, no block, more than [`RAM_BLOCKS_MAX`], a length that is no number of pages, an
    /// image longer than a file can be.
    pub fn new(
        configuration: &Configuration,
        ram: &SectionHeader,
        blocks: &[BlockEntry],
        page_size: PageSize,
        stream_start: u64,
    ) -> Result<ImagePlan, Fault> {
        let refuse = |at: u64, problem: &'static str| Fault::unsupported(at, "planned image", problem);
        if !configuration.is_mapped_ram() || configuration.ignores_shared() {
            return Err(refuse(stream_start, "needs the capability `mapped-ram` without `x-ignore-shared`"));
        }
        if blocks.is_empty() || blocks.len() > RAM_BLOCKS_MAX {
            return Err(refuse(stream_start, "has no block or too many"));
        }
        let mut metadata = Vec::new();
        Preamble { configuration: Some(configuration.clone()) }.encode(&mut metadata);
        ram.encode(&mut metadata);
        let total = blocks.iter().try_fold(0u64, |sum, block| sum.checked_add(block.used_length));
        let Some(total) = total.filter(|total| *total <= RAM_LEN_MAX && total & RAM_FLAGS_MASK == 0) else {
            return Err(refuse(stream_start, "has more RAM than fits, or no number of pages"));
        };
        Encoder::new(&mut metadata).be64(total | RAM_SAVE_FLAG_MEM_SIZE);

        let mut at = stream_start;
        let mut planned = Vec::with_capacity(blocks.len());
        for block in blocks {
            let len = block.used_length;
            if len == 0 || len % page_size.bytes() != 0 {
                return Err(refuse(at, "has a block that is no number of pages"));
            }
            BlockEntry { page_size: None, address: None, ..block.clone() }.encode(&mut metadata);
            let place = || {
                let header_at = at.checked_add(metadata.len() as u64)?;
                let bitmap_at = header_at.checked_add(HEADER_LEN as u64)?;
                let bitmap = FileRange::of_len(bitmap_at, bitmap_len(page_size.pages_of(len).0))?;
                let pages_at = bitmap.end.checked_next_multiple_of(MAPPED_RAM_FILE_OFFSET_ALIGNMENT)?;
                Some((header_at, bitmap, FileRange::of_len(pages_at, len)?))
            };
            let Some((header_at, bitmap, pages)) = place() else {
                return Err(refuse(at, "is longer than a file can be"));
            };
            let header = Header {
                page_size: page_size.bytes(),
                bitmap_offset: bitmap.start,
                pages_offset: pages.start,
            };
            header.encode(&mut metadata);
            planned.push(PlannedBlock {
                metadata_at: at,
                metadata: std::mem::take(&mut metadata),
                placement: BlockPlacement {
                    name: block.name.clone(),
                    used_length: len,
                    page_size,
                    header_at,
                    address: None,
                    bitmap,
                    pages,
                },
            });
            at = pages.end;
        }
        Ok(ImagePlan { blocks: planned, tail_offset: at })
    }
}

/// The FULL sections of an image with heads and footers, without an end mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sections<'a> {
    /// Those that QEMU loads before the rest; they go between RAM's START and its END, where QEMU itself puts
    /// them.
    pub early: &'a [u8],
    /// All others: what `xen-save-devices-state` gives, less its eight bytes of head, its last byte and the
    /// early ones.
    pub devices: &'a [u8],
}

/// The bytes behind the last block's pages: the end of RAM's START, the early sections, RAM's END, the device
/// state, the end mark, the vmdescription. `section_id` is that of the START.
///
/// # Errors
/// As [`VmDescription::encode`].
pub fn encode_tail(
    section_id: u32,
    sections: Sections<'_>,
    description: &VmDescription,
) -> Result<Vec<u8>, Fault> {
    let mut out = Vec::with_capacity(sections.early.len() + sections.devices.len() + 64);
    encode_ram_end(section_id, sections.early, &mut out);
    out.extend_from_slice(sections.devices);
    out.push(QEMU_VM_EOF);
    description.encode(&mut out)?;
    Ok(out)
}

/// Appends what ends RAM: the end of the section that is open, the START of a mapped-ram image or a PART of a stream,
/// then, in a mapped-ram image, the early sections, and an END without pages. Device state follows.
pub fn encode_ram_end(section_id: u32, early: &[u8], out: &mut Vec<u8>) {
    Encoder::new(out).be64(RAM_SAVE_FLAG_EOS);
    Item::Footer { section_id }.encode(out);
    out.extend_from_slice(early);
    Item::End { section_id }.encode(out);
    Encoder::new(out).be64(RAM_SAVE_FLAG_EOS);
    Item::Footer { section_id }.encode(out);
}
