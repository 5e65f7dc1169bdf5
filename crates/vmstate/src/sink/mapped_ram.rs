//! A mapped-ram image composed of what a probe tells, device state without RAM, and RAM read from outside.

use page::PageSize;
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

/// The parts of a block's bitmap, as offsets and the bytes that go there: `parts` of its words, each of which begins at a
/// multiple of 512, and, where what is not written does not read as zero, the others too.
pub fn bitmap_pieces(
    place: &BlockPlacement,
    parts: impl Iterator<Item = (usize, Vec<u64>)>,
    zeroes: bool,
) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let (start, end) = (place.bitmap.start, place.bitmap.end);
    let parts = parts.map(move |(first, words)| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        (start + 8 * first as u64, bytes)
    });
    let mut parts = parts.peekable();
    let mut at = start;
    std::iter::from_fn(move || {
        match parts.peek() {
            Some((offset, _)) if !zeroes || *offset == at => {}
            None if !zeroes => return None,
            _ if at == end => return None,
            _ => {
                let unit = (end - at).min(BITMAP_UNIT as u64);
                at += unit;
                return Some((at - unit, vec![0; unit as usize]));
            }
        }
        let part = parts.next()?;
        at = part.0 + part.1.len() as u64;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_is_written_where_it_has_pages_and_whole_where_old_bytes_would_stay() {
        let unit = BITMAP_UNIT as u64;
        let bitmap = wire::FileRange { start: 100, end: 100 + 3 * unit + 16 };
        let place = BlockPlacement {
            name: IdStr::new("pc.ram").unwrap(),
            used_length: (3 * unit + 16) * 8 * 4096,
            page_size: PageSize::X86,
            header_at: 0,
            address: None,
            bitmap,
            pages: wire::FileRange { start: 1 << 20, end: 1 << 20 },
        };
        let parts = || [(512, vec![1; 512]), (1536, vec![2, 3])].into_iter();
        let of = |zeroes| -> Vec<(u64, usize, u8)> {
            let pieces = bitmap_pieces(&place, parts(), zeroes);
            pieces.map(|(at, bytes)| (at, bytes.len(), bytes[0])).collect()
        };
        let (second, last) = ((100 + unit, 4096, 1), (100 + 3 * unit, 16, 2));
        assert_eq!(of(false), [second, last]);
        assert_eq!(of(true), [(100, 4096, 0), second, (100 + 2 * unit, 4096, 0), last]);
        let nothing = bitmap_pieces(&place, std::iter::empty(), true);
        assert_eq!(nothing.map(|(_, bytes)| bytes.len()).sum::<usize>(), 3 * 4096 + 16);
    }
}
