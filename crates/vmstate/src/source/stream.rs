//! A stream image in a file: read once from start to end, since nothing in it tells where anything is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use page::{PageIndex, PageSize};
use wire::qemu::{BlockEntry, DeviceSection, Event, Preamble, StreamScanner};
use wire::{FileRange, Report};

use super::Bounds;
use crate::{Error, Result};

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
    /// Device state, end mark and vmdescription, up to the end of the file; `None` where the RAM section
    /// could not be followed to its end.
    pub tail: Option<FileRange>,
    /// The faults.
    pub report: Report,
}

/// Scans a stream that starts at the offset `start` of its file and lists every fault of its RAM part.
///
/// # Errors
/// Only of the operating system; what is wrong with the stream is in the report.
pub fn scan_stream(file: &File, path: &Path, start: u64) -> Result<StreamContents> {
    scan_pages(file, path, start, |_, _| {})
}

/// As [`scan_stream`], and hands every page to `on_page`: its block's place in the list, and itself.
pub(super) fn scan_pages(
    file: &File,
    path: &Path,
    start: u64,
    mut on_page: impl FnMut(usize, PageIndex),
) -> Result<StreamContents> {
    let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
    let Bounds { end: len, .. } = Bounds::of(file, path, start)?;
    let mut scanner = StreamScanner::surveying(start, PageSize::X86);
    let mut contents = StreamContents {
        preamble: None,
        page_size: PageSize::X86,
        blocks: Vec::new(),
        early: Vec::new(),
        tail: None,
        report: Report::default(),
    };
    let mut window = vec![0; WINDOW.min(usize::try_from(len - start).unwrap_or(WINDOW))];
    let mut at = start;
    let mut tail = None;
    while at < len && tail.is_none() {
        let read = window.len().min(usize::try_from(len - at).unwrap_or(WINDOW));
        file.read_exact_at(&mut window[..read], at).map_err(cannot)?;
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
                Event::Page { block, offset, .. } => {
                    on_page(block, PageIndex(offset >> contents.page_size.shift()));
                    contents.blocks.get_mut(block).into_iter().for_each(|block| block.pages += 1);
                }
                Event::Zero { block, offset } => {
                    on_page(block, PageIndex(offset >> contents.page_size.shift()));
                    contents.blocks.get_mut(block).into_iter().for_each(|block| block.zero_pages += 1);
                }
                Event::Early(section) => contents.early.push(section),
                Event::DeviceState { at, .. } => tail = Some(at),
                _ => {}
            }
            Ok::<_, wire::Fault>(())
        });
        if fed.is_err() {
            // The scanner remembers the fault for its report.
            break;
        }
        at += read as u64;
    }
    let ended = scanner.finish();
    contents.report = scanner.into_report();
    if let Err(fault) = ended
        && !contents.report.faults.contains(&fault)
    {
        contents.report.push(fault);
    }
    contents.tail = tail.map(|tail| FileRange::new(tail.min(len), len));
    Ok(contents)
}
