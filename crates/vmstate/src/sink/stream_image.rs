//! A stream made of any source: what every QEMU loads.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use io::{AlignedBuffer, is_zero};
use page::{Mask, PageIndex, WINDOW_PAGES};
use wire::mapped_ram::encode_ram_end;
use wire::qemu::{Item, Preamble, RamSetup, RecordEncoder};

use super::flow::{ByteSink, Means, Sink, write_failed};
use super::records::{Makers, PagesSent, Records};
use super::stream::ZEROED_LEN_MAX;
use crate::source::{FlowingPage, GuestShape, KnownWindow, Pages, PlacedPages, Tail};
use crate::{Error, Result};

/// How many bytes of records come together before they are written.
const WRITE_LEN: usize = 1 << 20;
/// How many threads read pages and make their records: each waits for one request at a time. Where nothing is waited
/// for, there are no more of them than processors. On a disk that writes at the same time six are 3 % faster than three, and
/// twelve 3 % more, for 12 MiB.
const MAKERS: usize = 6;
/// How many pages are read at once where they are copied: their bytes are still in the processor's cache when they are
/// copied into the records.
const COPIED_PAGES: usize = 32;
/// What a record has beside its page, and a stream beside its records, generously.
const RECORD_LEN: u64 = 9;
const HEAD_LEN: u64 = 64 << 10;

/// A stream in the making.
pub struct StreamSink {
    out: Box<dyn ByteSink>,
    means: Means,
    buffer: Vec<u8>,
    section_id: u32,
}

impl StreamSink {
    /// A stream into `out`, of which nothing is written yet.
    pub fn new(out: Box<dyn ByteSink>, means: Means) -> StreamSink {
        StreamSink { out, means, buffer: Vec::with_capacity(2 * WRITE_LEN), section_id: 0 }
    }

    fn write_if_much(&mut self) -> Result<()> {
        if self.buffer.len() >= WRITE_LEN { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<()> {
        let bytes = std::mem::take(&mut self.buffer);
        self.buffer = self.out.write_owned(bytes).map_err(write_failed)?;
        Ok(())
    }

    /// Appends a page: its bytes, or, where they are zero, that.
    fn page(
        &mut self,
        records: &mut RecordEncoder,
        block: usize,
        offset: u64,
        data: Option<&[u8]>,
    ) -> Result<()> {
        append(records, block, offset, data, &mut self.buffer);
        self.write_if_much()
    }

    fn placed(&mut self, shape: &GuestShape, pages: Arc<dyn PlacedPages>) -> Result<()> {
        self.write()?;
        let page = shape.page_size.bytes();
        let mut makers = window_makers(shape, pages.clone())?;
        let (out, means) = (&mut self.out, &self.means);
        let mut write = |job: Job, made: std::io::Result<Records>| {
            let records = made.map_err(|error| {
                let PageIndex(first) = job.window.first;
                Error::io(format!("cannot read the pages from {first:#x} on"), error)
            })?;
            means.counters.bytes_written.fetch_add(records.sent.data_bytes, Ordering::Relaxed);
            means.counters.bytes_zero.fetch_add(records.sent.zero_bytes, Ordering::Relaxed);
            out.write_owned(records.bytes).map_err(write_failed)
        };
        for (block, entry) in shape.blocks.iter().enumerate() {
            let count = entry.used_length / page;
            // Blocks up to this length have their absent pages sent as zero: a target's firmware may have filled
            // them.
            let is_zeroed = entry.used_length <= ZEROED_LEN_MAX;
            let mut last = None;
            let mut next = 0;
            let mut push = |window: KnownWindow, end: u64| {
                if means.cancel.is_cancelled() {
                    return Err(Error::interrupted());
                }
                let absent = if is_zeroed { next..window.first.0 } else { 0..0 };
                next = end;
                if absent.is_empty() && window.data.is_empty() && window.zero.is_empty() && !is_zeroed {
                    // It would have no record, and the next one would take itself for another's follower.
                    return Ok(());
                }
                let is_whole = is_zeroed && window.first.0 < end;
                let pages = (end - window.first.0) as usize;
                let job = Job { block, window, pages, is_whole, absent, behind: last.replace(block) };
                makers.push(job, &mut write)
            };
            pages.windows(block, &mut |window| {
                let end = count.min(window.first.0 + WINDOW_PAGES);
                push(window, end)
            })?;
            if is_zeroed && count > 0 {
                // What is absent at the end.
                let first = PageIndex(count);
                push(KnownWindow { first, data: Mask::EMPTY, zero: Mask::EMPTY }, count)?;
            }
        }
        makers.finish(&mut write)
    }
}

/// A window of pages, and what stands before it.
struct Job {
    block: usize,
    window: KnownWindow,
    /// How many pages the window has.
    pages: usize,
    /// Whether those that are absent are sent as zero, too.
    is_whole: bool,
    /// Pages before the window that are sent as zero.
    absent: Range<u64>,
    /// The block of the record before.
    behind: Option<usize>,
}

fn window_makers(
    shape: &GuestShape,
    pages: Arc<dyn PlacedPages>,
) -> Result<Makers<Job, Option<AlignedBuffer>>> {
    let page = shape.page_size.bytes();
    let window_len = WINDOW_PAGES * page;
    let encoder = RecordEncoder::new(&setup(shape));
    let (threads, at_once) = match pages.reads_directly() {
        true => (MAKERS, WINDOW_PAGES as usize),
        false => (std::thread::available_parallelism().map_or(1, usize::from).min(MAKERS), COPIED_PAGES),
    };
    let make = move |job: &Job, scratch: &mut Option<AlignedBuffer>, out: &mut Vec<u8>| {
        let buffer = scratch.get_or_insert_with(|| AlignedBuffer::new(at_once * page as usize));
        let at = |index: usize| (index % at_once) * page as usize;
        let Job { block, window: KnownWindow { first, data, zero }, .. } = *job;
        let mut records = encoder.behind(job.behind);
        out.reserve((u64::from(data.count()) * (page + RECORD_LEN)) as usize);
        for index in job.absent.clone() {
            append(&mut records, block, index * page, None, out);
        }
        for from in (0..job.pages).step_by(at_once) {
            let upto = job.pages.min(from + at_once);
            for (start, end) in data.runs() {
                let (start, end) = (start.max(from), end.min(upto));
                if start < end {
                    let (offset, len) = ((first.0 + start as u64) * page, (end - start) * page as usize);
                    pages.read_at(block, offset, &mut buffer[at(start)..][..len])?;
                }
            }
            for i in from..upto {
                let offset = (first.0 + i as u64) * page;
                if data.contains(i) {
                    append(&mut records, block, offset, Some(&buffer[at(i)..][..page as usize]), out);
                } else if job.is_whole || zero.contains(i) {
                    append(&mut records, block, offset, None, out);
                }
            }
        }
        let counted = |mask: Mask| u64::from(mask.count()) * page;
        Ok(PagesSent { data_bytes: counted(data), zero_bytes: counted(zero) })
    };
    Makers::start(threads, window_len, make)
}

/// Appends the record of a page: its bytes, or, where they are zero, that.
fn append(records: &mut RecordEncoder, block: usize, offset: u64, data: Option<&[u8]>, out: &mut Vec<u8>) {
    match data.filter(|data| !is_zero(data)) {
        Some(data) => {
            records.page_head(block, offset, out);
            out.extend_from_slice(data);
        }
        None => records.zero(block, offset, out),
    }
}

fn setup(shape: &GuestShape) -> RamSetup {
    let plain = |block: &wire::qemu::BlockEntry| wire::qemu::BlockEntry {
        // What only a postcopy's list has.
        page_size: None,
        address: None,
        ..block.clone()
    };
    RamSetup { blocks: shape.blocks.iter().map(plain).collect(), multifd_flush: false }
}

impl Sink for StreamSink {
    fn metadata_bytes(&self, shape: &GuestShape) -> u64 {
        // Pages that are not in the source have no record, but for those of small blocks.
        (shape.ram_bytes() / shape.page_size.bytes()).saturating_mul(RECORD_LEN).saturating_add(HEAD_LEN)
    }

    fn write_pages(&mut self, shape: &GuestShape, pages: Pages<'_>) -> Result<()> {
        self.section_id = shape.ram.section_id;
        Preamble { configuration: shape.plain_configuration() }.encode(&mut self.buffer);
        setup(shape).encode_section(self.section_id, &mut self.buffer);
        self.buffer.extend_from_slice(&shape.early_bytes());
        Item::Part { section_id: self.section_id }.encode(&mut self.buffer);
        match pages {
            Pages::Placed(pages) => self.placed(shape, pages),
            Pages::Flowing(pages) => {
                let mut records = RecordEncoder::new(&setup(shape));
                let page = shape.page_size.bytes();
                pages.for_each(&mut |FlowingPage { block, offset, data, .. }| {
                    let counters = &self.means.counters;
                    let counter = if data.is_some() { &counters.bytes_written } else { &counters.bytes_zero };
                    counter.fetch_add(page, Ordering::Relaxed);
                    self.page(&mut records, block, offset, data)
                })
            }
        }
    }

    fn complete(&mut self, tail: &Tail) -> Result<()> {
        // The end of one part of RAM is that of any other.
        encode_ram_end(self.section_id, b"", &mut self.buffer);
        self.write()?;
        self.out.write_all(&tail.bytes).map_err(write_failed)?;
        self.out.finish()
    }
}
