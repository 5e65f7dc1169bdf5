//! A stream composed of what a probe tells, device state without RAM, and RAM read from outside.
//!
//! It is what QEMU itself writes into a pipe, but for what QEMU says twice: a page that is there is sent as
//! data, or as zero where it is zero, and a page that never was there is not sent at all, since the memory of
//! a QEMU that waits for a guest is zero. Only small blocks are sent in full: a target's firmware may have
//! filled them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use io::{OutflowError, PIECE_GRAINS, PageContent, PageTaker, Piece, RateLimit};
use mem::GuestRam;
use page::{PageCount, PageIndex, PageSet, PageSize};
use wire::mapped_ram::{Sections, encode_tail};
use wire::qemu::{Item, Preamble, RamSetup, RecordEncoder};

use super::devices::{DeviceState, LiftedDevices, not_understood};
use super::flow::{ByteSink, Means, write_failed};
use super::records::{Makers, PagesSent, Records};
use crate::job::Presence;
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
        out: &mut dyn ByteSink,
        means: &Means,
        limit: Option<&RateLimit>,
        presence: &mut Presence,
    ) -> Result<PagesSent> {
        out.write_all(&self.head).map_err(write_failed)?;
        let mut sent = PagesSent::default();
        let mut makers = page_makers(ram, &self.setup, usize::from(means.channels))?;
        let mut write = |job: Job, made: std::io::Result<Records>| {
            let records = made.map_err(|error| match job.pages {
                Pages::Present(Piece { region, offset, .. }) => {
                    Error::from(io::LaneError::Supply { region, offset, source: Arc::new(error) })
                }
                Pages::Absent(..) => Error::io("cannot make the records of pages that are absent", error),
            })?;
            if let Some(limit) = limit {
                limit.wait(records.bytes.len() as u64, &means.cancel);
            }
            if means.cancel.is_cancelled() {
                return Err(Error::interrupted());
            }
            let emptied = out.write_owned(records.bytes).map_err(write_failed)?;
            // What waits for the limit has not moved yet.
            let PagesSent { data_bytes, zero_bytes } = records.sent;
            means.counters.bytes_written.fetch_add(data_bytes, Ordering::Relaxed);
            means.counters.bytes_zero.fetch_add(zero_bytes, Ordering::Relaxed);
            sent.data_bytes += data_bytes;
            sent.zero_bytes += zero_bytes;
            Ok(emptied)
        };
        for (region, block) in self.setup.blocks.iter().enumerate() {
            let count = PageCount(block.used_length / ram.block(region).page_size);
            let mut present = (block.used_length <= ZEROED_LEN_MAX).then(|| PageSet::new(count));
            let mut last = None;
            for window in presence.windows(ram, region, &block.name)? {
                let window = window?;
                if let Some(present) = &mut present {
                    present.insert_window(&window);
                }
                let piece = ram.piece(region, &window, 0);
                if piece.mask != [0; 4] {
                    let job = Job { region, pages: Pages::Present(piece), behind: last.replace(region) };
                    makers.push(job, &mut write)?;
                }
            }
            if let Some(present) = present {
                makers
                    .push(Job { region, pages: Pages::Absent(present, count.0), behind: last }, &mut write)?;
            }
        }
        makers.finish(&mut write)?;
        Ok(sent)
    }

    /// Writes everything behind the pages. Without it the stream is none, and a loader says so: this is the
    /// last thing to be done, when everything else is known to be right.
    ///
    /// # Errors
    /// As [`StreamComposition::write_ram`].
    pub fn write_tail(&self, out: &mut dyn ByteSink) -> Result<()> {
        out.write_all(&self.tail).map_err(write_failed)
    }
}

/// Pages whose records follow each other.
struct Job {
    region: usize,
    pages: Pages,
    /// The block of the record before.
    behind: Option<usize>,
}

enum Pages {
    /// The marked ones.
    Present(Piece),
    /// All but these, as zero, of so many.
    Absent(PageSet, u64),
}

fn page_makers(ram: &Arc<GuestRam>, setup: &RamSetup, threads: usize) -> Result<Makers<Job, PageTaker>> {
    let encoder = RecordEncoder::new(setup);
    let page_len = (0..ram.regions()).map(|region| ram.block(region).page_size).max().unwrap_or(0);
    let ram = ram.clone();
    let make = move |job: &Job, taker: &mut PageTaker, out: &mut Vec<u8>| {
        let mut records = encoder.behind(job.behind);
        match &job.pages {
            Pages::Present(piece) => {
                let taken = taker.take(&*ram, piece, out, |content, offset, out| match content {
                    PageContent::Data => records.page_head(job.region, offset, out),
                    PageContent::Zero => records.zero(job.region, offset, out),
                })?;
                Ok(PagesSent { data_bytes: taken.data_bytes, zero_bytes: taken.zero_bytes })
            }
            Pages::Absent(present, count) => {
                let page = ram.block(job.region).page_size;
                let absent = (0..*count).filter(|index| !present.contains(PageIndex(*index)));
                absent.for_each(|index| records.zero(job.region, index * page, out));
                Ok(PagesSent::default())
            }
        }
    };
    Makers::start(threads, page_len * u64::from(PIECE_GRAINS), make)
}

pub(super) fn stopped(error: OutflowError) -> Error {
    match error {
        OutflowError::Cancelled => Error::interrupted(),
        OutflowError::Closed { .. } => Error::new(Kind::Io, error.to_string())
            .hint("the stream that it has is incomplete: throw it away, and look why the reader ended"),
        error => Error::from(error),
    }
}
