//! A mapped-ram image composed of what a probe tells, device state without RAM, and RAM read from outside.

use page::{PageSet, PageSize};
use wire::IdStr;
use wire::mapped_ram::{BlockPlacement, ImagePlan, encode_tail};
use wire::qemu::Configuration;
use wire::qemu::format::MAPPED_RAM;

use super::devices::{DeviceState, LiftedDevices, not_understood};
use crate::Result;
use crate::manifest::Manifest;
use crate::qemu::Probe;

/// The unit in which a bitmap is written: what is zero in between stays a hole.
const BITMAP_UNIT: usize = 4096;

/// An image whose every byte but the pages and bitmaps is known.
#[derive(Debug)]
pub struct MappedRamComposition {
    plan: ImagePlan,
    tail: Vec<u8>,
}

impl MappedRamComposition {
    /// Composes the image of a guest from the offset `start` of a file or device on.
    ///
    /// Whatever run state `devices` record, `run_state` is recorded instead.
    ///
    /// # Errors
    /// [`Kind::Peer`](crate::Kind::Peer) where the device state is not understood;
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) where it cannot be told apart into sections, or has no
    /// run state to record in.
    pub fn new(
        probe: &Probe,
        devices: DeviceState,
        run_state: &str,
        manifest: &Manifest,
        start: u64,
    ) -> Result<MappedRamComposition> {
        let devices = LiftedDevices::new(devices, run_state, &probe.early)?;
        let (configuration, plan) = plan(probe, start)?;
        let page_size = probe.configuration.page_size().unwrap_or(PageSize::X86);
        let description = devices.describe(&configuration, page_size.bytes(), manifest);
        let tail =
            encode_tail(probe.ram.section_id, devices.sections(), &description).map_err(not_understood)?;
        Ok(MappedRamComposition { plan, tail })
    }

    /// The offset at which the image of a guest ends, but for its device state, which is not known before
    /// the guest is stopped.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) where no image can be that long.
    pub fn pages_end(probe: &Probe, start: u64) -> Result<u64> {
        Ok(plan(probe, start)?.1.tail_offset)
    }

    /// The blocks and their places in the file.
    pub fn places(&self) -> impl ExactSizeIterator<Item = &BlockPlacement> {
        self.plan.blocks.iter().map(|block| &block.placement)
    }

    /// The offset behind the image: the length of a file that ends with it.
    pub fn end(&self) -> u64 {
        self.plan.tail_offset + self.tail.len() as u64
    }

    /// The length of all RAM blocks in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.places().map(|place| place.used_length).sum()
    }

    /// All metadata but the bitmaps: offsets and the bytes that go there.
    pub fn metadata(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let blocks = self.plan.blocks.iter().map(|block| (block.metadata_at, block.metadata.as_slice()));
        blocks.chain(std::iter::once((self.plan.tail_offset, self.tail.as_slice())))
    }
}

fn plan(probe: &Probe, start: u64) -> Result<(Configuration, ImagePlan)> {
    let name = IdStr::new(MAPPED_RAM).expect("the capability's name is a constant");
    let configuration = probe.configuration.clone().with_capability(name);
    let page_size = probe.configuration.page_size().unwrap_or(PageSize::X86);
    let plan = ImagePlan::new(&configuration, &probe.ram, &probe.setup.blocks, page_size, start)
        .map_err(not_understood)?;
    Ok((configuration, plan))
}

/// The parts of a block's bitmap, as offsets and the bytes that go there: those that are not zero, and, where
/// what is not written does not read as zero, the others too.
pub fn bitmap_pieces(
    place: &BlockPlacement,
    pages: &PageSet,
    zeroes: bool,
) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let start = place.bitmap.start;
    pages.words().chunks(BITMAP_UNIT / 8).enumerate().filter_map(move |(i, words)| {
        let bytes = || words.iter().flat_map(|word| word.to_le_bytes()).collect();
        (zeroes || words.iter().any(|word| *word != 0)).then(|| (start + (i * BITMAP_UNIT) as u64, bytes()))
    })
}
