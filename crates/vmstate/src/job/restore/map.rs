//! The guest's RAM as a private mapping of the image: nothing is read before the guest asks for it.

use std::os::unix::fs::FileTypeExt;

use mem::Outlook;
use page::{PageRange, PageSet};
use wire::mapped_ram::BlockPlacement;

use super::Seen;
use crate::qemu::{ImageBlock, Session};
use crate::source::{FileExtents, MappedRamFile};
use crate::{Error, Kind, Result};

/// How much of what lies under pages that are not in the image is read at once.
const CHUNK: usize = 1 << 20;
/// What mends an image that cannot be mapped.
const EAGER_HINT: &str = "restore with --mode eager";

/// What a stream carries of a block.
#[derive(Debug)]
pub(super) enum Share {
    /// All of it.
    Whole,
    /// Nothing: its memory is filled already.
    Nothing,
    /// These pages, and all of them as zero: the memory has something else there.
    Zero(PageSet),
}

/// The blocks of an image that may be mapped: all that QEMU could map from it.
///
/// # Errors
/// [`Kind::Unsupported`] where none can be: an image on a device, or one whose pages do not lie on whole pages
/// of the host.
pub(super) fn candidates(image: &MappedRamFile) -> Result<Vec<ImageBlock>> {
    let found = image.file().metadata().map_err(|error| Error::io("cannot stat the image", error))?;
    if found.file_type().is_block_device() {
        let clause = format!("{} is a device, which QEMU does not map", image.path().display());
        return Err(Error::new(Kind::Unsupported, clause).hint(EAGER_HINT));
    }
    on_whole_pages(&image.layout().blocks, rustix::param::page_size() as u64)
}

/// Those of the blocks whose pages lie on whole pages of a host that has pages of `host` bytes.
fn on_whole_pages(blocks: &[BlockPlacement], host: u64) -> Result<Vec<ImageBlock>> {
    let blocks = blocks.iter().filter(|block| !block.is_ignored());
    let aligned = |block: &&BlockPlacement| {
        block.pages.start.is_multiple_of(host) && block.used_length.is_multiple_of(host)
    };
    if let Some(block) = blocks.clone().max_by_key(|block| block.used_length).filter(|block| !aligned(block))
    {
        let clause = format!(
            "the pages of `{}` start at {:#x} of the image, which is amid a page of the host",
            block.name, block.pages.start
        );
        return Err(Error::new(Kind::Unsupported, clause).hint(EAGER_HINT));
    }
    Ok(blocks
        .filter(aligned)
        .map(|block| ImageBlock {
            name: block.name.as_str().to_owned(),
            length: block.used_length,
            offset: block.pages.start,
        })
        .collect())
}

/// What of each block the stream has to carry, found by looking at where the target's memory is.
///
/// Of a block that is a mapping of the image these are the pages that the image has as zero and its file does
/// not: earlier passes of a live save leave such bytes behind, and a loader never looks at them.
///
/// # Errors
/// [`Kind::Unsupported`] where the largest block is not mapped from the image.
pub(super) fn shares(
    image: &MappedRamFile,
    session: &mut Session,
    seen: &mut Seen,
    pid: Option<u32>,
) -> Result<Vec<Share>> {
    let peer = seen.process(session, pid)?;
    // Where it cannot be looked into, none of its blocks is known to be mapped.
    let outlook = Outlook::of(peer).ok();
    let layout = image.layout();
    let largest = layout.blocks.iter().map(|block| block.used_length).max().unwrap_or(0);
    let mut shares = Vec::with_capacity(layout.blocks.len());
    for block in &layout.blocks {
        let name = block.name.as_str();
        let place = seen.place_of(name, block.used_length, block.page_size);
        // One that cannot be looked at is not known to be mapped, and is carried.
        let ram = place.zip(outlook.as_ref()).and_then(|(place, outlook)| outlook.attach(&[place]).ok());
        let offset = match &ram {
            Some(ram) => ram
                .private_offset_in(0, image.file())
                .map_err(|error| Error::io(format!("cannot look at the target's `{name}`"), error))?,
            None => None,
        };
        let is_mapped = !block.is_ignored() && offset == Some(block.pages.start);
        if !is_mapped && block.used_length == largest {
            let clause = format!("target's `{name}` is not mapped from {}", image.path().display());
            return Err(Error::new(Kind::Unsupported, clause)
                .hint("let vmstate start the target: it adds what maps it; or restore with --mode eager"));
        }
        shares.push(match is_mapped {
            true => Share::Zero(stale_pages(image, block)?),
            false => Share::Whole,
        });
    }
    Ok(shares)
}

/// The pages that the bitmap has as zero and the file does not. The bitmap is right.
///
/// Holes of the file are not looked into; on a file system that does not tell them, everything is.
fn stale_pages(image: &MappedRamFile, block: &BlockPlacement) -> Result<PageSet> {
    let page = block.page_size.bytes();
    let mut stale = PageSet::new(block.page_count());
    let mut extents = FileExtents::new(image.file(), image.layout().file_len);
    let mut bytes = vec![0; CHUNK];
    let mut next = 0;
    let mut failure = None;
    let mut look = |from: u64, to: u64| -> Result<()> {
        let (mut at, end) = (block.pages.start + from * page, block.pages.start + to * page);
        while at < end {
            let (until, is_data) = extents.at(at);
            let until = until.min(end);
            if is_data {
                // Of an extent that ends amid a page the whole page is looked at.
                let first = (at - block.pages.start) / page;
                let len = ((until - block.pages.start).div_ceil(page) - first) * page;
                let len = len.min(CHUNK as u64 / page * page) as usize;
                let chunk = &mut bytes[..len];
                image.read_at(chunk, block.pages.start + first * page)?;
                for (index, content) in (first..).zip(chunk.chunks(page as usize)) {
                    if content.iter().any(|byte| *byte != 0) {
                        stale.insert(PageRange::new(index, index + 1));
                    }
                }
                at = block.pages.start + first * page + len as u64;
            } else {
                at = until;
            }
        }
        Ok(())
    };
    let pages = block.page_count().0;
    image.runs(block, |run| {
        if failure.is_none() {
            failure = look(next, run.start.0).err();
        }
        next = run.end.0;
    })?;
    match failure {
        Some(error) => Err(error),
        None => look(next, pages),
    }?;
    Ok(stale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use page::PageSize;
    use wire::{FileRange, IdStr};

    fn block(name: &str, pages_at: u64, length: u64) -> BlockPlacement {
        BlockPlacement {
            name: IdStr::new(name).unwrap(),
            used_length: length,
            page_size: PageSize::X86,
            header_at: 0x100,
            address: None,
            bitmap: FileRange::of_len(0x200, 8).unwrap(),
            pages: FileRange::of_len(pages_at, length).unwrap(),
        }
    }

    #[test]
    fn pages_amid_a_page_of_the_host_are_refused_for_the_ram_and_left_out_for_the_rest() {
        let found = |ram_at, rom_at, host| {
            on_whole_pages(&[block("rom", rom_at, 0x1000), block("pc.ram", ram_at, 0x10_0000)], host)
        };
        let names = |blocks: Vec<ImageBlock>| blocks.into_iter().map(|b| b.name).collect::<Vec<_>>();
        assert_eq!(names(found(0x10_0000, 0x1000, 4096).unwrap()), ["rom", "pc.ram"]);
        assert_eq!(names(found(0x10_0000, 0x1200, 4096).unwrap()), ["pc.ram"]);
        // An image of a host with small pages, on one with pages of 64 KiB.
        assert_eq!(names(found(0x10_0000, 0x1_0000, 65536).unwrap()), ["pc.ram"]);
        for (at, host) in [(0x10_0200, 4096), (0x10_1000, 65536)] {
            let error = found(at, 0x1000, host).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            let clause = format!(
                "the pages of `pc.ram` start at {at:#x} of the image, which is amid a page of the host"
            );
            assert_eq!((error.to_string(), error.hint_text()), (clause, Some(EAGER_HINT)));
        }
    }
}
