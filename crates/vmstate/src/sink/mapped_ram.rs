//! A mapped-ram image composed of what a probe tells, device state without RAM, and RAM read from outside.

use page::{PageSet, PageSize};
use wire::FileRange;
use wire::IdStr;
use wire::mapped_ram::{BlockPlacement, ImagePlan, encode_tail};
use wire::qemu::format::MAPPED_RAM;
use wire::qemu::{Configuration, decode_xen_device_state, global_state, vmdesc};

use crate::manifest::Manifest;
use crate::qemu::Probe;
use crate::{Error, Kind, Result};

/// The unit in which a bitmap is written: what is zero in between stays a hole.
const BITMAP_UNIT: usize = 4096;

/// An image whose every byte but the pages and bitmaps is known.
#[derive(Debug)]
pub struct MappedRamComposition {
    plan: ImagePlan,
    tail: Vec<u8>,
}

impl MappedRamComposition {
    /// Composes the image of a guest.
    ///
    /// `devices` is the output of `xen-save-devices-state`, which always records the guest as running;
    /// `run_state` is recorded instead.
    ///
    /// # Errors
    /// [`Kind::Peer`] where the device state is not understood; [`Kind::Unsupported`] where it cannot be
    /// told apart into sections, or has no run state to record in.
    pub fn new(
        probe: &Probe,
        mut devices: Vec<u8>,
        run_state: &str,
        manifest: &Manifest,
    ) -> Result<MappedRamComposition> {
        let not_understood = |fault: wire::Fault| {
            let kind = match fault.kind {
                wire::FaultKind::Damaged => Kind::Peer,
                wire::FaultKind::Unsupported => Kind::Unsupported,
            };
            Error::new(kind, "QEMU's device state is not understood")
                .because(fault)
                .hint("save with --via qemu")
        };
        let state = decode_xen_device_state(&devices, 0).map_err(not_understood)?;
        match state.section(global_state::GLOBAL_STATE_SECTION, 0) {
            Some(section) => {
                let FileRange { start, end } = section.payload;
                global_state::patch_run_state(&mut devices[start as usize..end as usize], run_state)
                    .map_err(not_understood)?;
            }
            // Without the section a guest comes back running, as QEMU has it.
            None if run_state == "running" => {}
            None => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("this machine does not record run states, so `{run_state}` would be lost"),
                )
                .hint("save with --running, or --via qemu"));
            }
        }

        let page_size = probe.configuration.page_size().unwrap_or(PageSize::X86);
        let configuration = mapped(&probe.configuration);
        let plan = ImagePlan::new(&configuration, &probe.ram, &probe.setup.blocks, page_size, 0)
            .map_err(not_understood)?;
        let first = state.sections.first().map_or(state.eof_at, |section| section.header_at);
        let sections = &devices[first as usize..state.eof_at as usize];
        let noted = serde_json::to_value(manifest).ok();
        let description = vmdesc::describe(Some(&configuration), page_size.bytes(), &state.sections, noted);
        let tail = encode_tail(probe.ram.section_id, sections, &description).map_err(not_understood)?;
        Ok(MappedRamComposition { plan, tail })
    }

    /// The blocks and their places in the file.
    pub fn places(&self) -> impl ExactSizeIterator<Item = &BlockPlacement> {
        self.plan.blocks.iter().map(|block| &block.placement)
    }

    /// The length of the file in bytes.
    pub fn len(&self) -> u64 {
        self.plan.tail_offset + self.tail.len() as u64
    }

    /// Never: an image has metadata at least.
    pub fn is_empty(&self) -> bool {
        false
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

fn mapped(configuration: &Configuration) -> Configuration {
    let name = IdStr::new(MAPPED_RAM).expect("the capability's name is a constant");
    configuration.clone().with_capability(name)
}

/// The parts of a block's bitmap that are not zero: offsets and the bytes that go there.
pub fn bitmap_pieces(place: &BlockPlacement, pages: &PageSet) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let start = place.bitmap.start;
    pages.words().chunks(BITMAP_UNIT / 8).enumerate().filter_map(move |(i, words)| {
        let bytes = || words.iter().flat_map(|word| word.to_le_bytes()).collect();
        words.iter().any(|word| *word != 0).then(|| (start + (i * BITMAP_UNIT) as u64, bytes()))
    })
}
