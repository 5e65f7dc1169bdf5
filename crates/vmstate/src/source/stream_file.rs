//! A stream image in a file, read once and found to be sound.

use std::fs::File;
use std::path::{Path, PathBuf};

use page::{PageSet, RamBlock};
use wire::FileRange;
use wire::qemu::vmdesc::{self, VmDescription};
use wire::qemu::{DeviceState, check_early, global_state, split_sections};

use super::Payload;
use super::mapped_ram::{faulty, faulty_within};
use super::places::{Places, SentRun};
use super::stream::{StreamContents, scan_pages};
use super::stream_bytes::StreamBytes;
use crate::{Error, Kind, Result};

/// The head of a vmdescription: its type byte and its length.
const VMDESC_HEAD: usize = 5;
/// Limit: into how many runs the pages of a compressed stream may fall. A guest that stood still, as libvirt's do, is
/// sent in order, and what comes out of few bytes may be very much.
const RUNS_MAX: usize = 4 << 20;

/// A stream that was read to its end.
#[derive(Debug)]
pub struct StreamFile {
    path: PathBuf,
    payload: Payload,
    contents: StreamContents,
    /// Which pages were sent, in the order of the stream, neighbours joined. Their number is bounded by the
    /// length of the file, whatever lengths the blocks claim.
    sent: Vec<Vec<SentRun>>,
    tail: FileRange,
    blob: Vec<u8>,
    devices: DeviceState,
}

impl StreamFile {
    /// Reads the stream that starts at the offset `start` of an open file, perhaps behind a head of libvirt's and
    /// compressed; `path` is for messages.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`] at the first fault, with file, offset and field;
    /// [`Kind::Io`].
    pub fn read(file: &File, path: &Path, start: u64) -> Result<StreamFile> {
        let payload = Payload::of(file, path, start)?;
        let runs_max = if payload.compressed().is_some() { RUNS_MAX } else { usize::MAX };
        let mut runs = 0;
        let mut sent: Vec<Vec<SentRun>> = Vec::new();
        let contents = scan_pages(file, path, &payload, |page| {
            // The scanner knows no more blocks than a guest can have.
            sent.resize_with(sent.len().max(page.block + 1), Vec::new);
            if runs <= runs_max {
                runs += usize::from(SentRun::add(&mut sent[page.block], &page));
            }
        })?;
        if runs > runs_max {
            let clause = format!("{}: its pages fall into more than {runs_max} runs", path.display());
            return Err(Error::new(Kind::Unsupported, clause));
        }
        let is_compressed = payload.compressed().is_some();
        let faulty = |path: &Path, fault| match is_compressed {
            true => faulty_within(path, fault),
            false => faulty(path, fault),
        };
        if let Some(fault) = contents.report.faults.first() {
            return Err(faulty(path, fault.clone()));
        }
        let Some(rest) = &contents.tail else {
            let clause = format!("{}: the stream has no device state", path.display());
            return Err(Error::new(Kind::Damaged, clause));
        };
        let tail = rest.range;
        let blob = rest
            .bytes(file)
            .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))?
            .map_err(|fault| faulty(path, fault))?;
        let devices = split_sections(&blob, tail.start).map_err(|fault| faulty(path, fault))?;
        let stream = StreamFile { path: path.to_owned(), payload, contents, sent, tail, blob, devices };
        let description = if stream.contents.early.is_empty() { None } else { stream.vmdescription()? };
        check_early(&stream.contents.early, description.as_ref()).map_err(|fault| faulty(path, fault))?;
        Ok(stream)
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What stands before QEMU's bytes.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// The stream once more, from its first byte on; `file` is its image.
    ///
    /// # Errors
    /// As [`StreamFile::read`].
    pub(crate) fn bytes<'a>(&'a self, file: &'a File) -> Result<StreamBytes<'a>> {
        let mut bytes = StreamBytes::open(file, &self.path, &self.payload)?;
        bytes.announce(self.blocks().fold(0, |sum, block| block.length.saturating_add(sum)));
        Ok(bytes)
    }

    /// What the scan found.
    pub fn contents(&self) -> &StreamContents {
        &self.contents
    }

    /// Device state, end mark and vmdescription.
    pub fn tail(&self) -> FileRange {
        self.tail
    }

    /// The RAM blocks, in the order of the stream.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = RamBlock> {
        self.contents.blocks.iter().map(|block| RamBlock {
            name: block.entry.name.as_str().to_owned(),
            length: block.entry.used_length,
            page_size: self.contents.page_size,
        })
    }

    /// The pages of a block that were sent, as data or as zero.
    ///
    /// The set is as large as the block claims to be: compare that with something first.
    pub fn pages(&self, block: usize) -> PageSet {
        let length = self.contents.blocks.get(block).map_or(0, |block| block.entry.used_length);
        let mut pages = PageSet::new(self.contents.page_size.pages_of(length));
        self.sent.get(block).into_iter().flatten().for_each(|run| pages.insert(run.range));
        pages
    }

    /// Where the pages of a block are.
    pub(super) fn places(&self, block: usize) -> Places {
        let length = self.contents.blocks.get(block).map_or(0, |block| block.entry.used_length);
        let pages = self.contents.page_size.pages_of(length);
        Places::of_runs(self.sent.get(block).map_or(&[], Vec::as_slice), pages)
    }

    /// The device state, taken apart.
    pub fn devices(&self) -> &DeviceState {
        &self.devices
    }

    /// The bytes of a range of device state.
    pub(crate) fn part(&self, range: FileRange) -> &[u8] {
        let at = |offset: u64| usize::try_from(offset.saturating_sub(self.tail.start)).unwrap_or(usize::MAX);
        self.blob.get(at(range.start)..at(range.end)).unwrap_or_default()
    }

    /// The run state that a restore brings the guest to; `None` where the stream does not record one.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`], with file, offset and field.
    pub fn run_state(&self) -> Result<Option<&'static str>> {
        let section = self.devices.section(global_state::GLOBAL_STATE_SECTION, 0);
        let state = section.map(|section| global_state::run_state(self.part(section.payload)));
        let recorded = state.transpose().map_err(|fault| faulty(&self.path, fault))?;
        Ok(self.payload.run_state(recorded))
    }

    /// The vmdescription, if there is one.
    ///
    /// # Errors
    /// [`Kind::Damaged`] where it is none.
    pub fn vmdescription(&self) -> Result<Option<VmDescription>> {
        let Some(range) = self.devices.vmdesc else { return Ok(None) };
        match self.part(range).get(VMDESC_HEAD..) {
            Some(json) if !json.is_empty() => vmdesc::parse(json, range.start + VMDESC_HEAD as u64)
                .map(Some)
                .map_err(|fault| faulty(&self.path, fault)),
            _ => Ok(None),
        }
    }
}
