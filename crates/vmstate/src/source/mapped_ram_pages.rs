//! A mapped-ram image as a source: its pages are read by offset, in any order.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use io::{FileSupply, ReadPair, Supply};
use page::{Mask, PageIndex, PageRange, WINDOW_PAGES};
use wire::FileRange;

use super::extents::LongExtents;
use super::flow::{GuestShape, KnownWindow, LiftedSection, Pages, PlacedPages, Source, Tail};
use super::{FileExtents, Format, MappedRamFile};
use crate::{Error, Kind, Result};

/// A mapped-ram image that was found to be sound.
pub struct MappedRamSource {
    shape: GuestShape,
    placed: Arc<PlacedFile>,
}

struct PlacedFile {
    image: MappedRamFile,
    pair: ReadPair,
    /// Found when the pages were gone through, for whoever does so again.
    long: Mutex<LongExtents>,
}

impl MappedRamSource {
    /// Opens the image that starts at the offset `start` of a file or device; `path` is for messages.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`] at the first fault, with file, offset and field; [`Kind::Io`].
    pub fn open(pair: ReadPair, path: &Path, start: u64) -> Result<MappedRamSource> {
        let file = pair.buffered.try_clone().map_err(|error| cannot(path, error))?;
        let image = MappedRamFile::from_file(file, path, start)?;
        image.verify()?;
        let layout = image.layout();
        let page_size = layout.blocks.first().map_or(page::PageSize::X86, |block| block.page_size);
        if let Some(block) = layout.blocks.iter().find(|block| block.page_size != page_size) {
            let clause = format!(
                "{}: the pages of `{}` have {:#x} bytes, others {:#x}",
                path.display(),
                block.name,
                block.page_size.bytes(),
                page_size.bytes()
            );
            return Err(Error::new(Kind::Unsupported, clause));
        }
        let early = layout.early.iter().map(|section| {
            let bytes = image.read(FileRange::new(section.header_at, section.end))?;
            Ok(LiftedSection { section: section.clone(), bytes })
        });
        let shape = GuestShape {
            configuration: layout.preamble.configuration.clone(),
            ram: layout.ram.clone(),
            early: early.collect::<Result<Vec<_>>>()?,
            blocks: layout.blocks.iter().map(|block| block.entry()).collect(),
            page_size,
        }
        .checked(path)?;
        Ok(MappedRamSource { shape, placed: Arc::new(PlacedFile { image, pair, long: Mutex::default() }) })
    }

    /// The image.
    pub fn image(&self) -> &MappedRamFile {
        &self.placed.image
    }

    /// Its pages.
    pub fn placed(&self) -> Arc<dyn PlacedPages> {
        self.placed.clone()
    }
}

fn cannot(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("cannot read {}", path.display()), error)
}

impl Source for MappedRamSource {
    fn format(&self) -> Format {
        Format::MappedRam
    }

    fn path(&self) -> &Path {
        self.placed.image.path()
    }

    fn shape(&self) -> &GuestShape {
        &self.shape
    }

    fn end(&self) -> Option<u64> {
        Some(self.placed.image.layout().file_len)
    }

    fn data_bytes_max(&self) -> Result<Option<u64>> {
        let page = self.shape.page_size.bytes();
        let mut pages = 0;
        for block in 0..self.shape.blocks.len() {
            self.placed.windows(block, &mut |window| {
                pages += u64::from(window.data.count());
                Ok(())
            })?;
        }
        Ok(Some(pages * page))
    }

    fn pages(&mut self) -> Result<Pages<'_>> {
        Ok(Pages::Placed(self.placed()))
    }

    fn tail(&mut self) -> Result<Tail> {
        let image = &self.placed.image;
        let layout = image.layout();
        let end = layout.vmdesc.map_or(layout.device_state.end, |vmdesc| vmdesc.end);
        let at = layout.device_state.start;
        let tail = Tail { bytes: image.read(FileRange::new(at, end))?, at, was_running: None };
        tail.devices(image.path())?;
        Ok(tail)
    }
}

impl PlacedPages for PlacedFile {
    fn windows(&self, block: usize, on_window: &mut dyn FnMut(KnownWindow) -> Result<()>) -> Result<()> {
        let Some(place) = self.image.layout().blocks.get(block) else { return Ok(()) };
        let page = place.page_size.bytes();
        // Nothing that can panic runs under the lock.
        let long = self.long.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut extents = FileExtents::again(self.image.file(), self.image.layout().file_len, long);
        let mut gathering = Gathering { window: None, stopped: None, on_window };
        self.image.runs(place, |run| {
            // What lies in a hole of the file is zero and need not be read. Holes may begin and end amid a page:
            // only pages that lie in one as a whole count.
            let offset = |index: u64| place.pages.start + index * page;
            let mut at = run.start.0;
            while at < run.end.0 {
                let (end, is_data) = extents.at(offset(at));
                let whole = (end.min(offset(run.end.0)) - place.pages.start) / page;
                let (upto, is_data) = match (is_data, whole > at) {
                    (true, _) => ((end.min(offset(run.end.0)) - place.pages.start).div_ceil(page), true),
                    (false, true) => (whole, false),
                    (false, false) => (at + 1, true),
                };
                gathering.add(PageRange::new(at, upto.clamp(at + 1, run.end.0)), is_data);
                at = upto.clamp(at + 1, run.end.0);
            }
        })?;
        gathering.finish()?;
        *self.long.lock().unwrap_or_else(PoisonError::into_inner) = extents.into_long();
        Ok(())
    }

    fn reads_directly(&self) -> bool {
        self.pair.direct.is_some()
    }

    fn read_at(&self, block: usize, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let place = self.image.layout().blocks.get(block).ok_or(std::io::ErrorKind::InvalidInput)?;
        let within = offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= place.pages.len());
        if !within {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        self.pair.read_exact_at(bytes, place.pages.start + offset)
    }

    fn supply(&self) -> Result<Arc<dyn Supply>> {
        let copy = |file: &File| file.try_clone().map_err(|error| cannot(self.image.path(), error));
        let direct = self.pair.direct.as_ref().map(copy).transpose()?;
        let starts = self.image.layout().blocks.iter().map(|block| block.pages.start).collect();
        let align = self.pair.direct_io.alignment();
        Ok(Arc::new(FileSupply::new(direct, copy(&self.pair.buffered)?, align, starts)))
    }
}

/// Makes windows of runs, which come in order.
struct Gathering<'a> {
    window: Option<KnownWindow>,
    /// What the one who takes the windows said, who is not asked any more then.
    stopped: Option<Error>,
    on_window: &'a mut dyn FnMut(KnownWindow) -> Result<()>,
}

impl Gathering<'_> {
    fn add(&mut self, run: PageRange, is_data: bool) {
        let mut at = run.start.0;
        while at < run.end.0 {
            let first = at - at % WINDOW_PAGES;
            let upto = run.end.0.min(first + WINDOW_PAGES);
            if self.window.is_none_or(|window| window.first.0 != first) {
                self.flush();
                self.window =
                    Some(KnownWindow { first: PageIndex(first), data: Mask::EMPTY, zero: Mask::EMPTY });
            }
            if let Some(window) = &mut self.window {
                let mask = if is_data { &mut window.data } else { &mut window.zero };
                mask.insert_range((at - first) as usize, (upto - first) as usize);
            }
            at = upto;
        }
    }

    fn flush(&mut self) {
        if let (Some(window), None) = (self.window.take(), &self.stopped) {
            self.stopped = (self.on_window)(window).err();
        }
    }

    fn finish(mut self) -> Result<()> {
        self.flush();
        match self.stopped {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}
