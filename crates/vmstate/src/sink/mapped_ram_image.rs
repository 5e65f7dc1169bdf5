//! A mapped-ram image made of any source.

use std::sync::Arc;

use io::{LaneSettings, Piece, Staging, Supply, Target, WriteLanes};
use page::{Mask, PageIndex, PageSize, SparsePageSet, WINDOW_PAGES, Window};
use wire::IdStr;
use wire::mapped_ram::{BlockPlacement, ImagePlan, encode_ram_end};
use wire::qemu::Configuration;
use wire::qemu::format::MAPPED_RAM;

use super::devices::not_understood;
use super::flow::{Means, Sink};
use super::stream::ZEROED_LEN_MAX;
use crate::source::{FlowingPage, GuestShape, Pages, PlacedPages, Tail};
use crate::{Error, Kind, Result};

/// The unit in which a bitmap is written, in words: what is zero in between stays a hole.
const BITMAP_WORDS: usize = 512;
/// What a block has beside its pages and bits, and an image beside its blocks, generously.
const HEAD_LEN: u64 = 16 << 10;
const TAIL_LEN: u64 = 1 << 20;

/// A mapped-ram image in the making.
pub struct MappedRamSink<'a> {
    target: &'a Target,
    start: u64,
    means: Means,
    planned: Option<Planned>,
}

/// An image whose blocks have their places.
struct Planned {
    plan: ImagePlan,
    section_id: u32,
    early: Vec<u8>,
    /// The pages whose bits are to be set, block by block. They take memory where there are some, and bits that are
    /// not written stay holes.
    present: Vec<SparsePageSet>,
}

impl<'a> MappedRamSink<'a> {
    /// An image whose magic stands at the offset `start` of the target.
    pub fn new(target: &'a Target, start: u64, means: Means) -> MappedRamSink<'a> {
        MappedRamSink { target, start, means, planned: None }
    }

    fn lanes(&self, supply: Arc<dyn Supply>) -> Result<WriteLanes> {
        let settings = LaneSettings {
            lanes: usize::from(self.means.channels),
            align: self.target.direct_io().alignment(),
        };
        let (counters, cancel) = (self.means.counters.clone(), self.means.cancel.clone());
        Ok(WriteLanes::start(self.target.lane_target()?, supply, settings, counters, cancel)?)
    }

    fn placed(&self, planned: &mut Planned, pages: &dyn PlacedPages) -> Result<()> {
        let lanes = self.lanes(pages.supply()?)?;
        let zeroes_are_holes = self.target.reads_as_zero();
        let mut deal = || -> Result<()> {
            for (block, place) in planned.plan.blocks.iter().map(|block| &block.placement).enumerate() {
                let present = &mut planned.present[block];
                pages.windows(block, &mut |window| {
                    present.insert(&Window { first: window.first, mask: window.data.or(window.zero) });
                    // A page that is zero is marked, and its bytes stay a hole; where what is not written is not
                    // zero, it is written like any other.
                    let mask = if zeroes_are_holes { window.data } else { window.data.or(window.zero) };
                    let zeroes = u64::from(window.zero.count()) * place.page_size.bytes();
                    self.means.counters.bytes_zero.fetch_add(zeroes, std::sync::atomic::Ordering::Relaxed);
                    match mask.is_empty() {
                        true => Ok(()),
                        false => Ok(lanes.deal(piece(block as u32, place, window.first, mask))?),
                    }
                })?;
            }
            Ok(())
        };
        let dealt = deal();
        finish(lanes, dealt)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.target
            .write_all_at(bytes, offset)
            .map_err(|error| Error::io(format!("cannot write {}", self.target.path().display()), error))
    }
}

/// Ends the lanes. A lane that failed is the reason why dealing failed, so its error is the one to tell; that it was
/// stopped is not.
fn finish(lanes: WriteLanes, dealt: Result<()>) -> Result<()> {
    match (lanes.finish(), dealt) {
        (Ok(()), dealt) => dealt,
        (Err(io::LaneError::Cancelled), Err(error)) => Err(error),
        (Err(error), _) => Err(error.into()),
    }
}

/// A piece of a window of a block's pages.
fn piece(region: u32, place: &BlockPlacement, first: PageIndex, mask: Mask) -> Piece {
    let grain = place.page_size.bytes();
    let offset = first.0 * grain;
    Piece {
        region,
        offset,
        target: place.pages.start + offset,
        grain: grain as u32,
        len: (place.used_length - offset).min(WINDOW_PAGES * grain) as u32,
        mask: mask.0,
    }
}

impl Sink for MappedRamSink<'_> {
    fn metadata_bytes(&self, shape: &GuestShape) -> u64 {
        let pages = shape.ram_bytes() / shape.page_size.bytes();
        pages / 8 + shape.blocks.len() as u64 * HEAD_LEN + TAIL_LEN
    }

    fn write_pages(&mut self, shape: &GuestShape, pages: Pages<'_>) -> Result<()> {
        let mut planned = Planned::new(shape, self.start)?;
        // The device state is yet to come: the end is moved when it has.
        self.target.begin(planned.plan.tail_offset)?;
        match pages {
            Pages::Placed(pages) => self.placed(&mut planned, &*pages)?,
            Pages::Flowing(pages) => {
                let mut gathering = Gathering::start(self, &mut planned)?;
                let flowed = pages.for_each(&mut |page| gathering.page(page));
                gathering.finish(flowed)?;
            }
        }
        self.planned = Some(planned);
        Ok(())
    }

    fn complete(&mut self, tail: &Tail) -> Result<()> {
        let Some(planned) = self.planned.take() else {
            return Err(Error::new(Kind::Misuse, "an image is completed behind its pages"));
        };
        let mut bytes = Vec::with_capacity(tail.bytes.len() + 64);
        encode_ram_end(planned.section_id, &planned.early, &mut bytes);
        bytes.extend_from_slice(&tail.bytes);
        let at = planned.plan.tail_offset;
        self.target.set_end(at + bytes.len() as u64)?;
        for block in &planned.plan.blocks {
            self.write_at(&block.metadata, block.metadata_at)?;
        }
        for (block, present) in planned.plan.blocks.iter().zip(&planned.present) {
            self.write_bitmap(&block.placement, present)?;
        }
        self.write_at(&bytes, at)
    }
}

impl MappedRamSink<'_> {
    fn write_bitmap(&self, place: &BlockPlacement, present: &SparsePageSet) -> Result<()> {
        let bitmap = place.bitmap;
        if !self.target.reads_as_zero() {
            let zeroes = vec![0; BITMAP_WORDS * 8];
            let mut at = bitmap.start;
            while at < bitmap.end {
                let len = (bitmap.end - at).min(zeroes.len() as u64);
                self.write_at(&zeroes[..len as usize], at)?;
                at += len;
            }
        }
        for (first, words) in present.parts() {
            // A part may reach beyond the last word that the bitmap has; what it holds there is nothing.
            let at = bitmap.start + first.0 / 8;
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.truncate(usize::try_from(bitmap.end.saturating_sub(at)).unwrap_or(usize::MAX));
            self.write_at(&bytes, at)?;
        }
        Ok(())
    }
}

impl Planned {
    fn new(shape: &GuestShape, start: u64) -> Result<Planned> {
        let name = IdStr::new(MAPPED_RAM).expect("the capability's name is a constant");
        let Some(configuration) = shape.plain_configuration().map(|c: Configuration| c.with_capability(name))
        else {
            let clause = "a mapped-ram image needs a configuration section, and the source has none";
            return Err(Error::new(Kind::Unsupported, clause)
                .hint("save the guest without -global migration.send-configuration=off"));
        };
        let plan = ImagePlan::new(&configuration, &shape.ram, &shape.blocks, shape.page_size, start)
            .map_err(not_understood)?;
        let present = plan.blocks.iter().map(|_| SparsePageSet::new()).collect();
        Ok(Planned { plan, section_id: shape.ram.section_id, early: shape.early_bytes(), present })
    }
}

/// Gathers the pages of a stream into windows, in the order in which they come, and deals those to lanes.
struct Gathering<'a, 'b> {
    sink: &'a MappedRamSink<'b>,
    planned: &'a mut Planned,
    staging: Arc<Staging>,
    /// Always there, but for a moment.
    lanes: Option<WriteLanes>,
    /// The pages that lanes may still be writing, block by block: one that comes again has to wait for them, or the
    /// older of the two may be the one that stays.
    dealt: Vec<SparsePageSet>,
    open: Option<OpenWindow>,
}

/// The window that pages are gathered in.
struct OpenWindow {
    block: usize,
    first: PageIndex,
    bytes: Vec<u8>,
    data: Mask,
    zero: Mask,
}

impl<'a, 'b> Gathering<'a, 'b> {
    fn start(sink: &'a MappedRamSink<'b>, planned: &'a mut Planned) -> Result<Gathering<'a, 'b>> {
        let staging = Arc::new(Staging::default());
        let lanes = Some(sink.lanes(staging.clone())?);
        let dealt = planned.present.iter().map(|_| SparsePageSet::new()).collect();
        Ok(Gathering { sink, planned, staging, lanes, dealt, open: None })
    }

    fn page(&mut self, FlowingPage { block, offset, data, .. }: FlowingPage<'_>) -> Result<()> {
        let size = self.page_size(block);
        let index = offset >> size.shift();
        let first = PageIndex(index - index % WINDOW_PAGES);
        if self.open.as_ref().is_none_or(|open| (open.block, open.first) != (block, first)) {
            self.flush()?;
            let mut bytes = self.staging.buffer();
            // What is in it of another window is not marked, and so not written.
            bytes.resize((WINDOW_PAGES * size.bytes()) as usize, 0);
            self.open = Some(OpenWindow { block, first, bytes, data: Mask::EMPTY, zero: Mask::EMPTY });
        }
        let Some(open) = &mut self.open else { return Ok(()) };
        let page = (index - first.0) as usize;
        match data.filter(|data| !io::is_zero(data)) {
            Some(data) => {
                let at = page * size.bytes() as usize;
                open.bytes[at..at + data.len()].copy_from_slice(data);
                open.data.insert(page);
                open.zero.remove(page);
            }
            None => {
                open.zero.insert(page);
                open.data.remove(page);
            }
        }
        Ok(())
    }

    fn page_size(&self, block: usize) -> PageSize {
        self.planned.plan.blocks.get(block).map_or(PageSize::X86, |block| block.placement.page_size)
    }

    fn flush(&mut self) -> Result<()> {
        let Some(OpenWindow { block, first, mut bytes, mut data, zero }) = self.open.take() else {
            return Ok(());
        };
        let place = &self.planned.plan.blocks[block].placement;
        let present = &mut self.planned.present[block];
        let grain = place.page_size.bytes() as usize;
        let counters = &self.sink.means.counters;
        counters
            .bytes_zero
            .fetch_add(u64::from(zero.count()) * grain as u64, std::sync::atomic::Ordering::Relaxed);
        // A page that had bytes and is zero now has to lose them. One that had none stays a hole: in a small block,
        // which a target's firmware may have filled, it is marked all the same, and in others it is not there.
        let is_small = place.used_length <= ZEROED_LEN_MAX;
        let had = present.mask(first);
        let written = match self.sink.target.reads_as_zero() {
            true => zero.and(had),
            false if is_small => zero,
            false => zero.and(had),
        };
        for (from, to) in written.runs() {
            bytes[from * grain..to * grain].fill(0);
        }
        data = data.or(written);
        if is_small {
            present.insert(&Window { first, mask: zero });
        }
        present.insert(&Window { first, mask: data });
        if data.is_empty() {
            return Ok(());
        }
        if !self.dealt[block].mask(first).and(data).is_empty() {
            self.wait_for_lanes()?;
        }
        let place = &self.planned.plan.blocks[block].placement;
        let region = self.staging.hand(bytes);
        if let Some(lanes) = &self.lanes {
            lanes.deal(Piece { region, ..piece(0, place, first, data) })?;
        }
        self.dealt[block].insert(&Window { first, mask: data });
        Ok(())
    }

    /// Waits until everything dealt is written. It is as often as a live save went over the memory.
    fn wait_for_lanes(&mut self) -> Result<()> {
        if let Some(lanes) = self.lanes.take() {
            lanes.finish()?;
        }
        self.staging.reset();
        self.dealt.iter_mut().for_each(SparsePageSet::clear);
        self.lanes = Some(self.sink.lanes(self.staging.clone())?);
        Ok(())
    }

    fn finish(mut self, flowed: Result<()>) -> Result<()> {
        let flushed = flowed.and_then(|()| self.flush());
        match self.lanes.take() {
            Some(lanes) => finish(lanes, flushed),
            None => flushed,
        }
    }
}
