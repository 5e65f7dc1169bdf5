//! A stream image in a file: read once from start to end, since nothing in it tells where anything is.

use std::fs::File;
use std::path::Path;

use page::{PageIndex, PageSize};
use wire::Report;
use wire::qemu::{BlockEntry, DeviceSection, Event, Preamble, StreamScanner};

use super::Payload;
use super::stream_bytes::{Rest, StreamBytes};
use crate::Result;

/// How much is read at once.
const WINDOW: usize = 1 << 20;

/// A block of a stream and how many records it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamBlock {
    /// Name and length.
    pub entry: BlockEntry,
    /// Pages that were sent, each time counted: a live save sends some more than once.
    pub pages: u64,
    /// Pages that were sent as zero.
    pub zero_pages: u64,
}

/// What a scan of a stream found.
#[derive(Clone, Debug)]
pub struct StreamContents {
    /// Magic, version, configuration; `None` where not even that could be read.
    pub preamble: Option<Preamble>,
    /// The page size that the records count in.
    pub page_size: PageSize,
    /// The RAM blocks.
    pub blocks: Vec<StreamBlock>,
    /// The sections of other handlers that stand before the pages.
    pub early: Vec<DeviceSection>,
    /// Device state, end mark and vmdescription, up to the end of the stream; `None` where the RAM section
    /// could not be followed to its end, or the stream may end at several places.
    pub tail: Option<Rest>,
    /// The faults.
    pub report: Report,
}

/// Scans a stream and lists every fault of its RAM part. Its offsets count from the start of the file; those of one
/// that is compressed, from the start of what comes out of it.
///
/// # Errors
/// Only of the operating system, and what keeps a stream from being decompressed; what is wrong with it is in the
/// report.
pub fn scan_stream(file: &File, path: &Path, payload: &Payload) -> Result<StreamContents> {
    scan_pages(file, path, payload, |_| {})
}

/// A page of a stream.
pub(super) struct SentPage {
    /// The block, as its place in the list.
    pub block: usize,
    /// The page.
    pub page: PageIndex,
    /// The size of pages.
    pub size: PageSize,
    /// Where its bytes are in the file; `None` where it was sent as zero.
    pub data_at: Option<u64>,
}

/// As [`scan_stream`], and hands every page to `on_page`.
pub(super) fn scan_pages(
    file: &File,
    path: &Path,
    payload: &Payload,
    mut on_page: impl FnMut(SentPage),
) -> Result<StreamContents> {
    let mut bytes = StreamBytes::open(file, path, payload)?;
    let mut scanner = StreamScanner::surveying(bytes.position(), PageSize::X86);
    let mut contents = StreamContents {
        preamble: None,
        page_size: PageSize::X86,
        blocks: Vec::new(),
        early: Vec::new(),
        tail: None,
        report: Report::default(),
    };
    let mut window = vec![0; WINDOW];
    let mut doubt = None;
    loop {
        let start = bytes.position();
        let read = bytes.read(&mut window)?;
        if read == 0 {
            break;
        }
        let mut tail = None;
        let fed = scanner.feed(&window[..read], |event| {
            match event {
                Event::Preamble(preamble) => {
                    if let Some(size) = preamble.configuration.as_ref().and_then(|c| c.page_size()) {
                        contents.page_size = size;
                    }
                    contents.preamble = Some(preamble);
                }
                Event::Blocks(setup) => {
                    let block = |entry| StreamBlock { entry, pages: 0, zero_pages: 0 };
                    contents.blocks = setup.blocks.into_iter().map(block).collect();
                }
                Event::Page { block, offset, at, .. } => {
                    let size = contents.page_size;
                    on_page(SentPage {
                        block,
                        page: PageIndex(offset >> size.shift()),
                        size,
                        data_at: Some(at),
                    });
                    contents.blocks.get_mut(block).into_iter().for_each(|block| block.pages += 1);
                }
                Event::Zero { block, offset } => {
                    let size = contents.page_size;
                    on_page(SentPage { block, page: PageIndex(offset >> size.shift()), size, data_at: None });
                    contents.blocks.get_mut(block).into_iter().for_each(|block| block.zero_pages += 1);
                }
                Event::Early(section) => contents.early.push(section),
                Event::DeviceState { at, .. } => tail = Some(at),
                _ => {}
            }
            Ok::<_, wire::Fault>(())
        });
        if fed.is_err() {
            // The scanner remembers the fault for its report, unless it is one of the payload.
            bytes.drain()?;
            break;
        }
        bytes.announce(
            contents.blocks.iter().fold(0, |sum, block| block.entry.used_length.saturating_add(sum)),
        );
        if let Some(tail) = tail {
            let from = usize::try_from(tail.saturating_sub(start)).unwrap_or(read).min(read);
            match bytes.rest(&window[from..read])? {
                Ok(rest) => contents.tail = Some(rest),
                Err(fault) => doubt = Some(fault),
            }
            break;
        }
    }
    let ended = scanner.finish();
    contents.report = scanner.into_report();
    doubt.into_iter().for_each(|fault| contents.report.push(fault));
    if let Err(fault) = ended
        && !contents.report.faults.contains(&fault)
    {
        contents.report.push(fault);
    }
    Ok(contents)
}
