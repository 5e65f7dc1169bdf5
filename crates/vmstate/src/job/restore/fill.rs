//! Shared memory of a waiting QEMU, filled from the image through the lanes, with QEMU out of the data path.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use io::{Cancel, Counters, FileSupply, LaneError, LaneOptions, LaneSettings, ReadPair, Supply, WriteLanes};
use mem::{Backing, BlockAddress, Fillable, GuestRam, Outlook, Residue};
use page::{PageSet, Window};
use rustix::io::Errno;
use wire::mapped_ram::BlockPlacement;

use super::Seen;
use super::map::Share;
use super::zero::beside;
use crate::qemu::Session;
use crate::source::MappedRamFile;
use crate::{Error, Kind, Result};

/// Blocks smaller than this go through the stream: a file of their own is not worth opening.
const BLOCK_LEN_MIN: u64 = 1 << 20;

/// The blocks of a target that can be filled from outside, by their place in the image's list.
pub(super) struct Filling {
    blocks: Vec<Option<Block>>,
}

/// One of them.
struct Block {
    name: String,
    ram: Arc<GuestRam>,
    fillable: Fillable,
}

/// How lanes are started.
pub(super) struct Start<'a> {
    /// How many.
    pub lanes: usize,
    /// What else they have.
    pub options: &'a LaneOptions,
    /// What ends them.
    pub cancel: &'a Cancel,
}

impl Filling {
    /// Finds the target's blocks that are shared memory. The reason is that of the largest block, if that
    /// is not among them.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where the largest block cannot be filled, with the reason.
    pub(super) fn prepare(
        image: &MappedRamFile,
        session: &mut Session,
        seen: &mut Seen,
        pid: Option<u32>,
    ) -> Result<Filling> {
        let peer = seen.process(session, pid)?;
        seen.find_addresses(session, &peer)?;
        let unreachable =
            |error| Error::new(Kind::Unsupported, "QEMU's process cannot be looked into").because(error);
        let outlook = Outlook::of(peer).map_err(unreachable)?;
        let layout = image.layout();
        let largest = layout.blocks.iter().map(|block| block.used_length).max().unwrap_or(0);
        let mut blocks = Vec::with_capacity(layout.blocks.len());
        for block in &layout.blocks {
            let name = block.name.as_str();
            let found = match seen.place_of(name, block.used_length, block.page_size) {
                Some(place) if block.used_length >= BLOCK_LEN_MIN => fillable(&outlook, place),
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

    /// The names of the blocks that are filled.
    pub(super) fn names(&self) -> Vec<String> {
        self.blocks.iter().flatten().map(|block| block.name.clone()).collect()
    }

    /// Fills every block: its pages from the image, and zero where the image has none.
    ///
    /// # Errors
    /// [`Kind::Io`], [`Kind::Interrupted`]; the target's memory is then worth nothing.
    pub(super) fn fill(
        &self,
        image: &MappedRamFile,
        pair: &ReadPair,
        start: &Start<'_>,
        counters: &Arc<Counters>,
    ) -> Result<()> {
        for (place, found) in image.layout().blocks.iter().zip(&self.blocks) {
            if let Some(block) = found {
                let pages = image.pages(place)?;
                block.make_whole(place, &pages, pair, start, counters)?;
            }
        }
        Ok(())
    }
}

fn fillable(outlook: &Outlook, place: BlockAddress) -> Result<Option<Block>> {
    let name = place.name.clone();
    let unreachable = || Error::new(Kind::Unsupported, format!("target's `{name}` cannot be reached"));
    let ram = outlook.attach(&[place]).map_err(|error| unreachable().because(error))?;
    if !matches!(ram.backing(0), Backing::SharedFile(_)) {
        return Ok(None);
    }
    let fillable = ram.open_for_filling(0).map_err(|error| unreachable().because(error))?;
    Ok(fillable.map(|fillable| Block { name, ram: Arc::new(ram), fillable }))
}

impl Block {
    /// Its pages from the image, and zero where the image has none.
    fn make_whole(
        &self,
        place: &BlockPlacement,
        pages: &PageSet,
        pair: &ReadPair,
        start: &Start<'_>,
        counters: &Arc<Counters>,
    ) -> Result<()> {
        let is_over = AtomicBool::new(false);
        if !self.fillable.is_populated() {
            // What is there is asked before it is filled: afterwards all of it would be.
            let there = self.ram.windows(0).map_err(|error| self.failed(error))?;
            self.make_zero_beside(there, pages, start, &is_over)?;
            return self.fill(place, pages, pair, start, counters);
        }
        // All of it is there. To look at that takes processors, and to fill it takes the disk.
        std::thread::scope(|scope| {
            let looking = scope.spawn(|| self.make_zero_beside(self.ram.whole(0), pages, start, &is_over));
            let filled = self.fill(place, pages, pair, start, counters);
            is_over.store(filled.is_err(), Ordering::Relaxed);
            let looked = looking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            filled.and(looked)
        })
    }

    /// Makes zero what is there beside the image's pages, where it is not zero already. A fresh target has next to
    /// nothing there; one whose memory was populated has all of it, and a memory file may have been used before.
    ///
    /// Nothing is given back: to punch out page by page takes longer than to look, and whoever has populated the memory
    /// would have to find it again. It is left when the rest has failed.
    fn make_zero_beside(
        &self,
        there: impl Iterator<Item = std::io::Result<Window>>,
        pages: &PageSet,
        start: &Start<'_>,
        is_over: &AtomicBool,
    ) -> Result<()> {
        let mut lanes = None;
        for window in there {
            if start.cancel.is_cancelled() || is_over.load(Ordering::Relaxed) {
                return Err(Error::interrupted());
            }
            let window = beside(&window.map_err(|error| self.failed(error))?, pages);
            if window.mask.is_empty() {
                continue;
            }
            let lanes = match &lanes {
                Some(lanes) => lanes,
                None => {
                    // What is looked at is no part of the image, and held to none of its limits.
                    let options = LaneOptions { limit: None, ..start.options.clone() };
                    let residue = Arc::new(Residue::of(self.ram.clone()));
                    &*lanes.insert(self.start(residue, start, options, &Arc::default())?)
                }
            };
            let piece = self.ram.piece(0, &window, self.fillable.offset);
            lanes.deal(piece).map_err(|error| self.lane_failed(error))?;
        }
        lanes.map_or(Ok(()), |lanes| lanes.finish().map_err(|error| self.lane_failed(error)))
    }

    /// Writes the image's pages to their places.
    fn fill(
        &self,
        place: &BlockPlacement,
        pages: &PageSet,
        pair: &ReadPair,
        start: &Start<'_>,
        counters: &Arc<Counters>,
    ) -> Result<()> {
        let copy = |file: &std::fs::File| file.try_clone().map_err(|error| self.failed(error));
        let align = pair.direct_io.alignment();
        let direct = pair.direct.as_ref().map(copy).transpose()?;
        let supply = FileSupply::new(direct, copy(&pair.buffered)?, align, vec![place.pages.start]);
        let lanes = self.start(Arc::new(supply), start, start.options.clone(), counters)?;
        for window in pages.windows() {
            let piece = self.ram.piece(0, &window, self.fillable.offset);
            lanes.deal(piece).map_err(|error| self.lane_failed(error))?;
        }
        lanes.finish().map_err(|error| self.lane_failed(error))
    }

    fn start(
        &self,
        supply: Arc<dyn Supply>,
        start: &Start<'_>,
        options: LaneOptions,
        counters: &Arc<Counters>,
    ) -> Result<WriteLanes> {
        let target = self.fillable.lane_target().map_err(|error| self.failed(error))?;
        let settings = LaneSettings { lanes: start.lanes, align: 4096 };
        WriteLanes::start_with(target, supply, settings, options, counters.clone(), start.cancel.clone())
            .map_err(|error| self.lane_failed(error))
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::io(format!("cannot fill the target's `{}`", self.name), error)
    }

    fn lane_failed(&self, error: LaneError) -> Error {
        let hint = match &error {
            LaneError::Cancelled => return Error::interrupted(),
            // What the kernel says of memory that it finds no page for.
            LaneError::Write { source, .. } if source.raw_os_error() == Some(Errno::FAULT.raw_os_error()) => {
                Some("the pool of huge pages may have run out: give it as many as the guest has")
            }
            _ => None,
        };
        let failed = format!("cannot fill the target's `{}`", self.name);
        let failed = Error::new(Kind::Io, failed).because(error);
        match hint {
            Some(hint) => failed.hint(hint),
            None => failed,
        }
    }
}
