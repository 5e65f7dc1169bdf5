//! Shared memory of a waiting QEMU, filled from the image through the lanes, with QEMU out of the data path.

use std::sync::Arc;

use io::{Cancel, Counters, FileSupply, LaneOptions, LaneSettings, Piece, ReadPair, WriteLanes};
use mem::{Backing, BlockAddress, Fillable, GuestRam};
use page::WINDOW_PAGES;
use wire::mapped_ram::BlockPlacement;

use super::map::Share;
use super::zero::beside;
use crate::qemu::{self, Session};
use crate::source::MappedRamFile;
use crate::{Error, Kind, Result};

/// Blocks smaller than this go through the stream: a file of their own is not worth opening.
const BLOCK_LEN_MIN: u64 = 1 << 20;

/// The blocks of a target that can be filled from outside, by their place in the image's list.
pub(super) struct Filling {
    blocks: Vec<Option<(GuestRam, Fillable)>>,
}

impl Filling {
    /// Finds the target's blocks that are shared memory. The reason is that of the largest block, if that
    /// is not among them.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the largest block cannot be filled, with the reason.
    pub(super) fn prepare(image: &MappedRamFile, session: &mut Session, pid: Option<u32>) -> Result<Filling> {
        let peer = Arc::new(qemu::find_process(session, pid)?);
        let targets = qemu::host_blocks(&mut session.client)?;
        let targets = qemu::with_addresses(&mut session.client, &peer, &targets)?;
        let layout = image.layout();
        let largest = layout.blocks.iter().map(|block| block.used_length).max().unwrap_or(0);
        let mut blocks = Vec::with_capacity(layout.blocks.len());
        for block in &layout.blocks {
            let name = block.name.as_str();
            let address = targets.iter().find(|target| target.name == name).and_then(|target| target.address);
            let place = address.filter(|address| *address != 0).map(|address| BlockAddress {
                name: name.to_owned(),
                address,
                length: block.used_length,
                page_size: block.page_size.bytes(),
            });
            let found = match place {
                Some(place) if block.used_length >= BLOCK_LEN_MIN => fillable(&peer, place),
                Some(_) => Ok(None),
                None => Err(Error::new(Kind::Unsupported, format!("QEMU does not tell where `{name}` is"))),
            };
            blocks.push(match found {
                Ok(found) if found.is_some() || block.used_length < largest => found,
                Ok(_) => {
                    let clause =
                        format!("target's `{name}` is not shared memory that can be written from outside");
                    return Err(Error::new(Kind::Unsupported, clause)
                        .hint("give the target a memory-backend-memfd, or leave --via at auto"));
                }
                Err(error) if block.used_length == largest => return Err(error),
                Err(_) => None,
            });
        }
        Ok(Filling { blocks })
    }

    /// What the stream carries: the blocks that are not filled.
    pub(super) fn shares(&self) -> Vec<Share> {
        self.blocks.iter().map(|found| if found.is_some() { Share::Nothing } else { Share::Whole }).collect()
    }

    /// Fills every block: its pages from the image, and zero where the image has none.
    ///
    /// # Errors
    /// [`Kind::Io`], [`Kind::Interrupted`]; the target's memory is then worth nothing.
    pub(super) fn fill(
        &self,
        image: &MappedRamFile,
        pair: &ReadPair,
        lanes: (usize, &LaneOptions),
        counters: &Arc<Counters>,
        cancel: &Cancel,
    ) -> Result<()> {
        for (place, found) in image.layout().blocks.iter().zip(&self.blocks) {
            if let Some((ram, fillable)) = found {
                fill_block(image, place, ram, fillable, pair, lanes, counters, cancel)?;
            }
        }
        Ok(())
    }
}

fn fillable(peer: &Arc<mem::Peer>, place: BlockAddress) -> Result<Option<(GuestRam, Fillable)>> {
    let name = place.name.clone();
    let unreachable = || Error::new(Kind::Unsupported, format!("target's `{name}` cannot be reached"));
    let ram = GuestRam::attach(peer.clone(), &[place]).map_err(|error| unreachable().because(error))?;
    if !matches!(ram.backing(0), Backing::SharedFile(_)) {
        return Ok(None);
    }
    let fillable = ram.open_for_filling(0).map_err(|error| unreachable().because(error))?;
    Ok(fillable.map(|fillable| (ram, fillable)))
}

#[allow(clippy::too_many_arguments, reason = "one call, of what its caller already has apart")]
fn fill_block(
    image: &MappedRamFile,
    place: &BlockPlacement,
    ram: &GuestRam,
    fillable: &Fillable,
    pair: &ReadPair,
    (lanes, options): (usize, &LaneOptions),
    counters: &Arc<Counters>,
    cancel: &Cancel,
) -> Result<()> {
    let name = place.name.as_str();
    let pages = image.pages(place)?;
    let failed = |error| Error::io(format!("cannot fill the target's `{name}`"), error);
    // A fresh target has next to nothing there; a memory file that was used before has.
    for window in ram.windows(0).map_err(failed)? {
        if cancel.is_cancelled() {
            return Err(Error::interrupted());
        }
        for run in beside(&window.map_err(failed)?, &pages) {
            fillable.clear(run).map_err(failed)?;
        }
    }
    let copy = |file: &std::fs::File| file.try_clone().map_err(failed);
    let align = pair.direct_io.alignment();
    let direct = pair.direct.as_ref().map(copy).transpose()?;
    let supply = FileSupply::new(direct, copy(&pair.buffered)?, align, vec![place.pages.start]);
    let target = fillable.lane_target().map_err(failed)?;
    let lanes = WriteLanes::start_with(
        target,
        Arc::new(supply),
        LaneSettings { lanes, align: 4096 },
        options.clone(),
        counters.clone(),
        cancel.clone(),
    )?;
    let grain = place.page_size.bytes();
    for window in pages.windows() {
        let offset = window.first.0 * grain;
        let len = (place.used_length - offset).min(WINDOW_PAGES * grain);
        lanes.deal(Piece {
            region: 0,
            offset,
            target: fillable.offset + offset,
            grain: grain as u32,
            len: len as u32,
            mask: window.mask.0,
        })?;
    }
    lanes.finish().map_err(|error| match error {
        io::LaneError::Cancelled => Error::interrupted(),
        error => Error::new(Kind::Io, format!("cannot fill the target's `{name}`")).because(error),
    })
}
