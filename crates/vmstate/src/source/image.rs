//! An image of any format, as far as a restore has to know it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use page::{PageSet, RamBlock};
use wire::FileRange;
use wire::qemu::vmdesc::VmDescription;
use wire::qemu::{Configuration, DeviceSection, DeviceState};

use super::{Format, MappedRamFile, Payload, Places, StreamFile};
use crate::manifest::Manifest;
use crate::{Error, Kind, Result};

/// An open image that was found to be sound.
#[derive(Debug)]
pub enum Image {
    /// Pages at fixed offsets.
    MappedRam(MappedRamFile),
    /// One record after the other.
    Stream(StreamFile),
}

impl Image {
    /// Opens an image that starts at the offset `start` of an open file or device, and reads all of it but
    /// its pages; a stream is read whole. `path` is for messages.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`] at the
    /// first fault, with file, offset and field; [`Kind::Io`].
    pub fn from_file(file: File, path: &Path, start: u64) -> Result<Image> {
        match Format::of(&file, path, start)?.has_places() {
            true => {
                let image = MappedRamFile::from_file(file, path, start)?;
                image.verify()?;
                Ok(Image::MappedRam(image))
            }
            false => StreamFile::read(&file, path, start).map(Image::Stream),
        }
    }

    /// What stands before QEMU's bytes.
    pub fn payload(&self) -> &Payload {
        match self {
            Image::MappedRam(image) => image.payload(),
            Image::Stream(stream) => stream.payload(),
        }
    }

    /// The configuration section.
    pub fn configuration(&self) -> Option<&Configuration> {
        match self {
            Image::MappedRam(image) => image.layout().preamble.configuration.as_ref(),
            Image::Stream(stream) => {
                stream.contents().preamble.as_ref().and_then(|preamble| preamble.configuration.as_ref())
            }
        }
    }

    /// The RAM blocks, in the image's order.
    pub fn blocks(&self) -> Vec<RamBlock> {
        match self {
            Image::MappedRam(image) => image.layout().blocks.iter().map(|block| block.ram_block()).collect(),
            Image::Stream(stream) => stream.blocks().collect(),
        }
    }

    /// The pages of block `index` that the image brings.
    ///
    /// # Errors
    /// As [`MappedRamFile::pages`].
    pub fn pages(&self, index: usize) -> Result<PageSet> {
        match self {
            Image::MappedRam(image) => match image.layout().blocks.get(index) {
                Some(block) => image.pages(block),
                None => Ok(PageSet::new(page::PageCount(0))),
            },
            Image::Stream(stream) => Ok(stream.pages(index)),
        }
    }

    /// Where the image has the pages of block `index`.
    ///
    /// # Errors
    /// As [`MappedRamFile::pages`].
    pub fn places(&self, index: usize) -> Result<Places> {
        match self {
            Image::MappedRam(image) => match image.layout().blocks.get(index) {
                Some(block) => Ok(Places::of_set(image.pages(block)?, block.pages.start, block.page_size)),
                None => Ok(Places::of_runs(&[], page::PageCount(0))),
            },
            Image::Stream(stream) => Ok(stream.places(index)),
        }
    }

    /// How many bytes of pages the image brings.
    ///
    /// # Errors
    /// As [`MappedRamFile::summary`].
    pub fn data_bytes(&self) -> Result<u64> {
        match self {
            Image::MappedRam(image) => Ok(image.summary()?.data_bytes),
            Image::Stream(stream) => {
                let contents = stream.contents();
                let pages = contents.blocks.iter().map(|block| block.pages).sum::<u64>();
                Ok(pages.saturating_mul(contents.page_size.bytes()))
            }
        }
    }

    /// The device state, taken apart.
    ///
    /// # Errors
    /// As [`MappedRamFile::devices`].
    pub fn devices(&self) -> Result<DeviceState> {
        match self {
            Image::MappedRam(image) => image.devices(),
            Image::Stream(stream) => Ok(stream.devices().clone()),
        }
    }

    /// The sections that QEMU loads before the RAM and the rest of the device state.
    pub fn early(&self) -> &[DeviceSection] {
        match self {
            Image::MappedRam(image) => &image.layout().early,
            Image::Stream(stream) => &stream.contents().early,
        }
    }

    /// The vmdescription, if there is one.
    ///
    /// # Errors
    /// As [`MappedRamFile::vmdescription`].
    pub fn vmdescription(&self) -> Result<Option<VmDescription>> {
        match self {
            Image::MappedRam(image) => image.vmdescription(),
            Image::Stream(stream) => stream.vmdescription(),
        }
    }

    /// The format.
    pub fn format(&self) -> Format {
        match (&self.payload().head, self) {
            (Some(head), _) => Format::Libvirt(head.format),
            (None, Image::MappedRam(_)) => Format::MappedRam,
            (None, Image::Stream(_)) => Format::Stream,
        }
    }

    /// Reads device state by the offsets that [`Image::devices`] and [`Image::early`] give; `file` is the image's.
    ///
    /// # Errors
    /// [`Kind::Io`]; [`Kind::Unsupported`] for early sections of a stream that is compressed.
    pub(crate) fn read(&self, file: &File, range: FileRange) -> Result<Vec<u8>> {
        if let Image::Stream(stream) = self {
            if stream.tail().start <= range.start {
                return Ok(stream.part(range).to_vec());
            }
            if stream.payload().compressed().is_some() {
                let clause =
                    format!("{}: early device state of a compressed stream", stream.path().display());
                return Err(Error::new(Kind::Unsupported, clause));
            }
        }
        let mut bytes = vec![0; range.len() as usize];
        file.read_exact_at(&mut bytes, range.start)
            .map_err(|error| Error::io("cannot read the image", error))?;
        Ok(bytes)
    }

    /// What vmstate noted when it saved the image.
    ///
    /// # Errors
    /// As [`MappedRamFile::manifest`].
    pub fn manifest(&self) -> Result<Option<Manifest>> {
        match self {
            Image::MappedRam(image) => image.manifest(),
            Image::Stream(stream) => Manifest::of(stream.vmdescription()?, stream.path()),
        }
    }

    /// The run state that a restore brings the guest to; `None` where the image does not record one.
    ///
    /// # Errors
    /// As [`MappedRamFile::run_state`].
    pub fn run_state(&self) -> Result<Option<&'static str>> {
        match self {
            Image::MappedRam(image) => image.run_state(),
            Image::Stream(stream) => stream.run_state(),
        }
    }
}
