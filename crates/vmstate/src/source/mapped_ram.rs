//! A mapped-ram image in a file: its layout, its bitmaps, its pages, its device state.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use page::{PageRange, PageSet};
use serde_json::Value;
use wire::mapped_ram::{BitmapScanner, BlockPlacement, Layout, LayoutDecoder, Step};
use wire::qemu::vmdesc::{self, VmDescription};
use wire::qemu::{DeviceState, global_state};
use wire::{Fault, FaultKind, FileRange};

use super::extents::unreadable;
use super::{Bounds, FileExtents, Payload, open_image};
use crate::manifest::Manifest;
use crate::{Error, Kind, Result};

/// How much of a bitmap is read at once.
const BITMAP_CHUNK: usize = 64 << 10;
/// The head of a vmdescription: its type byte and its length.
const VMDESC_HEAD: u64 = 5;

/// How the pages of an image are kept, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// The length of the block, or of all.
    pub ram_bytes: u64,
    /// Pages that are in the image, those included that lie in a hole of the file.
    pub data_bytes: u64,
    /// Of these, the bytes that lie in a hole of the file: zero without taking room.
    pub zero_bytes: u64,
    /// Pages that are not in the image.
    pub hole_bytes: u64,
    /// Bytes on the disk under pages that are not in the image: left over from earlier passes of a live
    /// save. A loader never looks at them.
    pub stale_bytes: u64,
}

/// How the pages of one block are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockUse {
    /// The block's idstr.
    pub name: String,
    /// Its numbers.
    pub usage: Use,
}

/// An open image whose metadata was found to be sound.
#[derive(Debug)]
pub struct MappedRamFile {
    file: File,
    path: PathBuf,
    payload: Payload,
    layout: Layout,
}

impl MappedRamFile {
    /// Opens an image and reads its metadata: some kilobytes, whatever its size.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`] with file, offset and field; [`Kind::Io`].
    pub fn open(path: &Path) -> Result<MappedRamFile> {
        let file = open_image(path)?;
        MappedRamFile::from_file(file, path, 0)
    }

    /// Reads the metadata of an image that is open and starts at the offset `start` of its file or device,
    /// perhaps with a head of libvirt's; `path` is for messages.
    ///
    /// # Errors
    /// As [`MappedRamFile::open`].
    pub fn from_file(file: File, path: &Path, start: u64) -> Result<MappedRamFile> {
        let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
        let payload = Payload::of(&file, path, start)?;
        let bounds = Bounds::of(&file, path, payload.at)?.of_mapped_ram(&file).map_err(cannot)?;
        let bounds = bounds.map_err(|fault| faulty(path, fault))?;
        let mut decoder = LayoutDecoder::new(bounds.start, bounds.end);
        let mut bytes = Vec::new();
        let layout = loop {
            match decoder.step().map_err(|fault| faulty(path, fault))? {
                Step::Need { offset, len } => {
                    // The decoder asks within the file and within its own limits.
                    bytes.resize(len, 0);
                    file.read_exact_at(&mut bytes, offset).map_err(cannot)?;
                    decoder.supply(&bytes).map_err(|fault| faulty(path, fault))?;
                }
                Step::Done(layout) => break layout,
            }
        };
        Ok(MappedRamFile { file, path: path.to_owned(), payload, layout: *layout })
    }

    /// Where everything is.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What stands before QEMU's bytes.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a range of metadata.
    ///
    /// # Errors
    /// [`Kind::Io`]; [`Kind::Unsupported`] where it is larger than any device state vmstate handles.
    pub fn read(&self, range: FileRange) -> Result<Vec<u8>> {
        if let Some(fault) = unreadable(&self.file, self.layout.file_len, range) {
            return Err(faulty(&self.path, fault));
        }
        let mut bytes = vec![0; range.len() as usize];
        self.read_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// Reads bytes at an offset of the file.
    pub(crate) fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                Error::new(Kind::Damaged, format!("{} became shorter while it was read", self.path.display()))
            }
            _ => Error::io(format!("cannot read {} at {offset:#x}", self.path.display()), error),
        })
    }

    /// Hands every run of pages of `block` that are in the image to `on_run`, in order.
    ///
    /// # Errors
    /// [`Kind::Damaged`] where the bitmap marks a page beyond the block.
    pub fn runs(&self, block: &BlockPlacement, mut on_run: impl FnMut(PageRange)) -> Result<()> {
        let bitmap = block.bitmap;
        let fault = |fault| faulty(&self.path, fault);
        let mut scanner = BitmapScanner::new(bitmap.start, block.page_count());
        let mut extents = FileExtents::new(&self.file, self.layout.file_len);
        let mut chunk = vec![0; BITMAP_CHUNK.min(bitmap.len() as usize)];
        let mut at = bitmap.start;
        while at < bitmap.end {
            let (end, is_data) = extents.at(at);
            let end = end.min(bitmap.end);
            if is_data {
                let len = (end - at).min(BITMAP_CHUNK as u64) as usize;
                self.read_at(&mut chunk[..len], at)?;
                scanner.push(&chunk[..len], &mut on_run).map_err(fault)?;
                at += len as u64;
            } else {
                scanner.skip(end - at, &mut on_run).map_err(fault)?;
                at = end;
            }
        }
        if block.is_ignored() { Ok(()) } else { scanner.finish(&mut on_run).map_err(fault) }
    }

    /// The pages of `block` that are in the image.
    ///
    /// # Errors
    /// As [`MappedRamFile::runs`].
    pub fn pages(&self, block: &BlockPlacement) -> Result<PageSet> {
        let mut pages = PageSet::new(block.page_count());
        self.runs(block, |run| pages.insert(run))?;
        Ok(pages)
    }

    /// Reads part of a block as a guest would see it: pages that are not in the image are zero.
    ///
    /// # Errors
    /// [`Kind::Misuse`] where it reaches beyond the block; [`Kind::Io`].
    pub fn read_ram(
        &self,
        block: &BlockPlacement,
        pages: &PageSet,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<()> {
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= block.pages.len());
        if end.is_none() {
            return Err(Error::new(Kind::Misuse, format!("offset {offset:#x} of `{}`", block.name)));
        }
        let size = block.page_size.bytes();
        let mut at = 0;
        while at < bytes.len() {
            let position = offset + at as u64;
            let len = (size - position % size).min((bytes.len() - at) as u64) as usize;
            let target = &mut bytes[at..at + len];
            if pages.contains(page::PageIndex(position / size)) {
                self.read_at(target, block.pages.start + position)?;
            } else {
                target.fill(0);
            }
            at += len;
        }
        Ok(())
    }

    /// Reads pages that lie next to each other, all of which are in the image.
    ///
    /// # Errors
    /// [`Kind::Misuse`] where they reach beyond the block or are not as long as `bytes`; [`Kind::Io`].
    pub(crate) fn read_pages(&self, block: &BlockPlacement, run: PageRange, bytes: &mut [u8]) -> Result<()> {
        let size = block.page_size.bytes();
        let end = run.end.0.checked_mul(size).filter(|end| *end <= block.pages.len());
        if end.is_none() || run.count().0 * size != bytes.len() as u64 {
            return Err(Error::new(Kind::Misuse, format!("pages {run} of `{}`", block.name)));
        }
        self.read_at(bytes, block.pages.start + run.start.0 * size)
    }

    /// Checks what the layout does not tell: every bitmap, and that the device state can be taken apart.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`], with file, offset and field.
    pub fn verify(&self) -> Result<()> {
        for block in &self.layout.blocks {
            self.runs(block, |_| {})?;
        }
        let devices = self.devices()?;
        if let Some(section) = devices.section(global_state::GLOBAL_STATE_SECTION, 0) {
            let payload = self.read(section.payload)?;
            global_state::run_state(&payload).map_err(|mut fault| {
                fault.offset += section.payload.start;
                faulty(&self.path, fault)
            })?;
        }
        Ok(())
    }

    /// How much of the image is what, in total.
    ///
    /// # Errors
    /// As [`MappedRamFile::runs`].
    pub fn summary(&self) -> Result<Use> {
        let mut sum = Use::default();
        for block in &self.layout.blocks {
            let size = block.page_size.bytes();
            sum.ram_bytes += block.used_length;
            self.runs(block, |run| sum.data_bytes += run.count().0 * size)?;
        }
        sum.hole_bytes = sum.ram_bytes.saturating_sub(sum.data_bytes);
        Ok(sum)
    }

    /// How much of each block is what. Asks the file system about every run of pages.
    ///
    /// # Errors
    /// As [`MappedRamFile::runs`].
    pub fn block_use(&self) -> Result<Vec<BlockUse>> {
        let mut extents = FileExtents::new(&self.file, self.layout.file_len);
        let mut blocks = Vec::with_capacity(self.layout.blocks.len());
        for block in &self.layout.blocks {
            let size = block.page_size.bytes();
            let mut usage = Use { ram_bytes: block.used_length, ..Use::default() };
            let mut on_disk = 0;
            self.runs(block, |run| {
                let start = block.pages.start + run.start.0 * size;
                let end = (block.pages.start + run.end.0 * size).min(block.pages.end);
                usage.data_bytes += end - start;
                on_disk += extents.data_bytes(FileRange::new(start, end));
            })?;
            usage.zero_bytes = usage.data_bytes - on_disk;
            usage.hole_bytes = block.used_length - usage.data_bytes;
            usage.stale_bytes = extents.data_bytes(block.pages).saturating_sub(on_disk);
            blocks.push(BlockUse { name: block.name.as_str().to_owned(), usage });
        }
        Ok(blocks)
    }

    /// The device state, taken apart.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`], with file, offset and field.
    pub fn devices(&self) -> Result<DeviceState> {
        let layout = &self.layout;
        let end = layout.vmdesc.map_or(layout.device_state.end, |vmdesc| vmdesc.end);
        let blob = self.read(FileRange::new(layout.device_state.start, end))?;
        wire::qemu::split_sections(&blob, layout.device_state.start)
            .map_err(|fault| faulty(&self.path, fault))
    }

    /// The vmdescription, if there is one.
    ///
    /// # Errors
    /// [`Kind::Damaged`] where it is none.
    pub fn vmdescription(&self) -> Result<Option<VmDescription>> {
        let Some(json) = self.vmdescription_json()? else { return Ok(None) };
        vmdesc::parse(&json.1, json.0).map(Some).map_err(|fault| faulty(&self.path, fault))
    }

    /// The offset and the text of the vmdescription.
    fn vmdescription_json(&self) -> Result<Option<(u64, Vec<u8>)>> {
        let Some(range) = self.layout.vmdesc else { return Ok(None) };
        let start = (range.start + VMDESC_HEAD).min(range.end);
        Ok(Some((start, self.read(FileRange::new(start, range.end))?)))
    }

    /// What vmstate noted when it saved the image; `None` for other writers' images.
    ///
    /// # Errors
    /// As [`MappedRamFile::vmdescription`]; [`Kind::Damaged`] where the note is none.
    pub fn manifest(&self) -> Result<Option<Manifest>> {
        Manifest::of(self.vmdescription()?, &self.path)
    }

    /// The run state that a restore brings the guest to; `None` where the image does not record one, which
    /// QEMU takes for running.
    ///
    /// # Errors
    /// As [`MappedRamFile::devices`].
    pub fn run_state(&self) -> Result<Option<&'static str>> {
        let devices = self.devices()?;
        let section = devices.section(global_state::GLOBAL_STATE_SECTION, 0);
        let payload = section.map(|section| self.read(section.payload)).transpose()?;
        let recorded = payload.map(|payload| global_state::run_state(&payload)).transpose();
        Ok(self.payload.run_state(recorded.map_err(|fault| faulty(&self.path, fault))?))
    }

    /// The bytes that add a manifest to the image's vmdescription, and the offset from which they replace
    /// the rest of the file. QEMU's own text stays as it is, to the letter.
    pub(crate) fn vmdescription_with(&self, manifest: &Manifest) -> Result<Option<(u64, Vec<u8>)>> {
        let Some((start, json)) = self.vmdescription_json()? else { return Ok(None) };
        let Some(text) = json.trim_ascii_end().strip_suffix(b"}") else { return Ok(None) };
        let manifest = serde_json::to_value(manifest).unwrap_or(Value::Null);
        let separator = if text.trim_ascii_end().ends_with(b"{") { "" } else { "," };
        let addition = format!("{separator} \"vmstate\": {manifest}}}");
        let len = text.len() + addition.len();
        let Ok(len) = u32::try_from(len) else { return Ok(None) };
        let mut bytes = Vec::with_capacity(len as usize + 5);
        bytes.push(wire::qemu::format::QEMU_VM_VMDESCRIPTION);
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(text);
        bytes.extend_from_slice(addition.as_bytes());
        Ok(Some((start - VMDESC_HEAD, bytes)))
    }
}

/// The error that a fault of a file is.
pub(crate) fn faulty(path: &Path, fault: Fault) -> Error {
    let kind = match fault.kind {
        FaultKind::Damaged => Kind::Damaged,
        FaultKind::Unsupported => Kind::Unsupported,
    };
    Error::new(kind, format!("{}: {fault}", path.display()))
}

/// The error that a fault of what was decompressed is: its place is none of the file.
pub(crate) fn faulty_within(path: &Path, fault: Fault) -> Error {
    let kind = match fault.kind {
        FaultKind::Damaged => Kind::Damaged,
        FaultKind::Unsupported => Kind::Unsupported,
    };
    Error::new(kind, format!("{}, decompressed: {fault}", path.display()))
}
