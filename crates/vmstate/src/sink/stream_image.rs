//! A stream made of any source: what every QEMU loads.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use io::{AlignedBuffer, ReadAhead};
use page::{Mask, PageIndex, WINDOW_PAGES};
use wire::mapped_ram::encode_ram_end;
use wire::qemu::{Item, Preamble, RamSetup, RecordEncoder};

use super::flow::{ByteSink, Means, Sink, write_failed};
use super::stream::ZEROED_LEN_MAX;
use crate::source::{FlowingPage, GuestShape, KnownWindow, Pages, PlacedPages, Tail};
use crate::{Error, Result};

/// How many bytes of records come together before they are written.
const WRITE_LEN: usize = 1 << 20;
/// How many threads read: each waits for one request at a time.
const READERS: usize = 4;
/// How many windows are read ahead.
const WINDOWS_AHEAD: u64 = 8;
/// The most bytes of pages that are ahead: pages may be larger than those of x86.
const BYTES_AHEAD: u64 = 32 << 20;
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
        if self.buffer.len() >= WRITE_LEN {
            self.out.write_from(&mut self.buffer).map_err(write_failed)
        } else {
            Ok(())
        }
    }

    fn write(&mut self) -> Result<()> {
        self.out.write_all(&self.buffer).map_err(write_failed)?;
        self.buffer.clear();
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
        match data.filter(|data| !is_zero(data)) {
            Some(data) => {
                records.page_head(block, offset, &mut self.buffer);
                self.buffer.extend_from_slice(data);
            }
            None => records.zero(block, offset, &mut self.buffer),
        }
        self.write_if_much()
    }

    fn placed(&mut self, shape: &GuestShape, pages: Arc<dyn PlacedPages>) -> Result<()> {
        let mut records = RecordEncoder::new(&setup(shape));
        let page = shape.page_size.bytes();
        let mut reader = WindowReader::start(pages.clone(), page)?;
        for (block, entry) in shape.blocks.iter().enumerate() {
            let count = entry.used_length / page;
            // Blocks up to this length have their absent pages sent as zero: a target's firmware may have filled
            // them.
            let zeroed = entry.used_length <= ZEROED_LEN_MAX;
            let mut next = 0;
            let mut write = |sink: &mut Self, window: KnownWindow, bytes: &[u8]| -> Result<()> {
                if zeroed {
                    sink.zeroes(&mut records, block, page, next..window.first.0)?;
                }
                let in_window = (count - window.first.0).min(WINDOW_PAGES);
                for i in 0..in_window as usize {
                    let offset = (window.first.0 + i as u64) * page;
                    let at = i * page as usize;
                    if window.data.contains(i) {
                        sink.page(&mut records, block, offset, bytes.get(at..at + page as usize))?;
                    } else if zeroed || window.zero.contains(i) {
                        sink.page(&mut records, block, offset, None)?;
                    }
                }
                next = window.first.0 + in_window;
                let counted = |mask: Mask| u64::from(mask.count()) * page;
                sink.means.counters.bytes_written.fetch_add(counted(window.data), Ordering::Relaxed);
                sink.means.counters.bytes_zero.fetch_add(counted(window.zero), Ordering::Relaxed);
                Ok(())
            };
            pages.windows(block, &mut |window| {
                if self.means.cancel.is_cancelled() {
                    return Err(Error::interrupted());
                }
                while reader.is_full() {
                    reader.take(&mut |window, bytes| write(self, window, bytes))?;
                }
                reader.push(block, window);
                Ok(())
            })?;
            while reader.take(&mut |window, bytes| write(self, window, bytes))? {}
            if zeroed {
                self.zeroes(&mut records, block, page, next..count)?;
            }
        }
        Ok(())
    }

    fn zeroes(
        &mut self,
        records: &mut RecordEncoder,
        block: usize,
        page: u64,
        pages: std::ops::Range<u64>,
    ) -> Result<()> {
        pages.into_iter().try_for_each(|index| self.page(records, block, index * page, None))
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

pub(super) fn is_zero(page: &[u8]) -> bool {
    // Nearly every page that is not zero shows it at once.
    page.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
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

/// Reads windows of placed pages ahead and gives them back in order.
struct WindowReader {
    ahead: ReadAhead<(usize, KnownWindow)>,
    spare: Vec<AlignedBuffer>,
    window_len: usize,
    windows_max: u64,
}

impl WindowReader {
    fn start(pages: Arc<dyn PlacedPages>, page: u64) -> Result<WindowReader> {
        let fill = move |(block, window): &(usize, KnownWindow), buffer: &mut AlignedBuffer| {
            window.data.runs().try_for_each(|(start, end)| {
                let at = |index: usize| index * page as usize;
                let offset = (window.first.0 + start as u64) * page;
                pages.read_at(*block, offset, &mut buffer[at(start)..at(end)])
            })
        };
        let ahead = ReadAhead::start(READERS, fill)
            .map_err(|error| Error::io("a thread that reads cannot be started", error))?;
        let window_len = (WINDOW_PAGES * page) as usize;
        let windows_max = (BYTES_AHEAD / window_len as u64).clamp(1, WINDOWS_AHEAD);
        Ok(WindowReader { ahead, spare: Vec::new(), window_len, windows_max })
    }

    fn is_full(&self) -> bool {
        self.ahead.pending() >= self.windows_max
    }

    fn push(&mut self, block: usize, window: KnownWindow) {
        let buffer = self.spare.pop().unwrap_or_else(|| AlignedBuffer::new(self.window_len));
        self.ahead.push((block, window), buffer);
    }

    /// Waits for the oldest window and hands it to `on_window`; whether there was one.
    fn take(&mut self, on_window: &mut dyn FnMut(KnownWindow, &[u8]) -> Result<()>) -> Result<bool> {
        let Some(filled) = self.ahead.take() else { return Ok(false) };
        let (_, window) = filled.job;
        filled.result.map_err(|error| {
            let PageIndex(first) = window.first;
            Error::io(format!("cannot read the pages from {first:#x} on"), error)
        })?;
        on_window(window, &filled.buffer)?;
        self.spare.push(filled.buffer);
        Ok(true)
    }
}
