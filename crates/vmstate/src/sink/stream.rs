//! A stream composed of what a probe tells, device state without RAM, and RAM read from outside.
//!
//! It is what QEMU itself writes into a pipe, but for what QEMU says twice: a page that is there is sent as
//! data, or as zero where it is zero, and a page that never was there is not sent at all, since the memory of
//! a QEMU that waits for a guest is zero. Only small blocks are sent in full: a target's firmware may have
//! filled them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use io::{Counters, Outflow, OutflowError, PageContent};
use mem::GuestRam;
use page::{PageCount, PageIndex, PageSet, PageSize};
use wire::mapped_ram::{Sections, encode_tail};
use wire::qemu::{Item, Preamble, RamSetup, RecordEncoder};

use super::devices::{DeviceState, LiftedDevices, not_understood};
use crate::job::untold_pages;
use crate::manifest::Manifest;
use crate::qemu::Probe;
use crate::{Error, Kind, Result};

/// Blocks up to this length, in bytes, have their absent pages sent as zero.
pub(super) const ZEROED_LEN_MAX: u64 = 16 << 20;

/// A stream whose every byte but the pages is known.
#[derive(Debug)]
pub struct StreamComposition {
    head: Vec<u8>,
    setup: RamSetup,
    section_id: u32,
    tail: Vec<u8>,
}

/// How many bytes of pages a stream has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagesSent {
    /// As data.
    pub data_bytes: u64,
    /// As zero, of pages that were there.
    pub zero_bytes: u64,
}

impl StreamComposition {
    /// Composes the stream of a guest.
    ///
    /// # Errors
    /// [`Kind::Peer`] where the device state is not understood; [`Kind::Unsupported`] where it cannot be
    /// told apart into sections, or has no run state to record in.
    pub fn new(
        probe: &Probe,
        devices: DeviceState,
        run_state: &str,
        manifest: &Manifest,
    ) -> Result<StreamComposition> {
        let devices = LiftedDevices::new(devices, run_state, &probe.early)?;
        let section_id = probe.ram.section_id;
        let setup = RamSetup { blocks: probe.setup.blocks.clone(), multifd_flush: false };
        let mut head = Vec::new();
        Preamble { configuration: Some(probe.configuration.clone()) }.encode(&mut head);
        setup.encode_section(section_id, &mut head);
        let Sections { early, devices: rest } = devices.sections();
        head.extend_from_slice(early);
        Item::Part { section_id }.encode(&mut head);
        let page_size = probe.configuration.page_size().unwrap_or(PageSize::X86);
        let description = devices.describe(&probe.configuration, page_size.bytes(), manifest);
        // The end of one part of RAM is that of any other.
        let tail = encode_tail(section_id, Sections { early: b"", devices: rest }, &description)
            .map_err(not_understood)?;
        Ok(StreamComposition { head, setup, section_id, tail })
    }

    /// RAM's section id.
    pub fn section_id(&self) -> u32 {
        self.section_id
    }

    /// The length of all RAM blocks in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.setup.total()
    }

    /// Writes everything up to the last page, and counts pages as they go out. Region `i` of `ram` is block `i` of
    /// the probe.
    ///
    /// # Errors
    /// [`Kind::Io`] where the stream is not taken or memory not to be had; [`Kind::Interrupted`].
    pub fn write_ram(
        &self,
        ram: &Arc<GuestRam>,
        out: &mut Outflow,
        counters: &Counters,
    ) -> Result<PagesSent> {
        out.write(&self.head).map_err(stopped)?;
        let mut records = RecordEncoder::new(&self.setup);
        let mut sent = PagesSent::default();
        for (region, block) in self.setup.blocks.iter().enumerate() {
            let untold = |error| untold_pages(&block.name, error);
            let page = ram.block(region).page_size;
            let count = PageCount(block.used_length / page);
            let mut present = (block.used_length <= ZEROED_LEN_MAX).then(|| PageSet::new(count));
            for window in ram.windows(region).map_err(untold)? {
                let window = window.map_err(untold)?;
                if let Some(present) = &mut present {
                    present.insert_window(&window);
                }
                let pages = out
                    .write_pages(&**ram, &ram.piece(region, &window, 0), |content, offset, buffer| {
                        match content {
                            PageContent::Data => records.page_head(region, offset, buffer),
                            PageContent::Zero => records.zero(region, offset, buffer),
                        }
                    })
                    .map_err(stopped)?;
                counters.bytes_written.fetch_add(pages.data_bytes, Ordering::Relaxed);
                counters.bytes_zero.fetch_add(pages.zero_bytes, Ordering::Relaxed);
                sent.data_bytes += pages.data_bytes;
                sent.zero_bytes += pages.zero_bytes;
            }
            if let Some(present) = present {
                let mut bytes = Vec::new();
                let absent = (0..count.0).filter(|index| !present.contains(PageIndex(*index)));
                absent.for_each(|index| records.zero(region, index * page, &mut bytes));
                out.write(&bytes).map_err(stopped)?;
            }
        }
        Ok(sent)
    }

    /// Writes everything behind the pages. Without it the stream is none, and a loader says so: this is the
    /// last thing to be done, when everything else is known to be right.
    ///
    /// # Errors
    /// As [`StreamComposition::write_ram`].
    pub fn write_tail(&self, out: &mut Outflow) -> Result<()> {
        out.write(&self.tail).map_err(stopped)?;
        out.flush().map_err(stopped)
    }
}

pub(super) fn stopped(error: OutflowError) -> Error {
    match error {
        OutflowError::Cancelled => Error::interrupted(),
        OutflowError::Closed { .. } => Error::new(Kind::Io, error.to_string())
            .hint("the stream that it has is incomplete: throw it away, and look why the reader ended"),
        error => Error::from(error),
    }
}
