//! What an image holds.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;
use wire::qemu::{Configuration, DeviceSection, DeviceState, vmdesc};

use crate::manifest::Manifest;
use crate::source::{BlockUse, Bounds, DomainInfo, Format, MappedRamFile, StreamFile, open_image};
use crate::{Error, Result};

/// What an image holds. The fields are the keys of `vmstate info --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageInfo {
    /// `mapped-ram`, `stream`, or one of libvirt's, such as `libvirt-zstd`.
    pub format: &'static str,
    /// What libvirt's head tells of the domain; `None` where there is none.
    pub domain: Option<DomainInfo>,
    /// The machine type, for example `pc-q35-10.0`.
    pub machine: Option<String>,
    /// The capabilities that the image records.
    pub capabilities: Vec<String>,
    /// The target's page size in bytes.
    pub page_size: u64,
    /// The state that a restore brings the guest to.
    pub run_state: Option<String>,
    /// What vmstate noted when it saved the image; `None` for images by others.
    pub saved: Option<Manifest>,
    /// The length of the file, or of the device.
    pub file_bytes: u64,
    /// What the file takes on the disk.
    pub disk_bytes: u64,
    /// The length of all RAM.
    pub ram_bytes: u64,
    /// Pages that are in the image.
    pub data_bytes: u64,
    /// Of these, pages that take no room because they lie in a hole of the file; in a stream, pages that
    /// were sent as zero.
    pub zero_bytes: u64,
    /// Pages that are not in the image; they read as zero.
    pub hole_bytes: u64,
    /// The RAM blocks, in the order of the stream.
    pub blocks: Vec<BlockSummary>,
    /// The length of the device state.
    pub device_bytes: u64,
    /// The device sections, in the order of the stream: the early ones first.
    pub devices: Vec<SectionSummary>,
    /// Whether the device state is described field by field, as QEMU does it.
    pub described: bool,
}

/// A RAM block of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockSummary {
    /// The block's idstr.
    pub name: String,
    /// Its length.
    pub ram_bytes: u64,
    /// Pages that are in the image.
    pub data_bytes: u64,
    /// As [`ImageInfo::zero_bytes`].
    pub zero_bytes: u64,
    /// Pages that are not in the image.
    pub hole_bytes: u64,
    /// Bytes on the disk that belong to no page of the image: left over from passes of a live save.
    pub stale_bytes: u64,
}

/// A device section of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SectionSummary {
    /// The section's idstr.
    pub name: String,
    /// Which of that name.
    pub instance_id: u32,
    /// The version of the payload.
    pub version: u32,
    /// The length of the payload.
    pub bytes: u64,
    /// The absolute offset of the payload.
    pub offset: u64,
    /// Whether it stands before the end of RAM, so that QEMU loads it first.
    pub early: bool,
}

/// Tells what an image holds, by vmstate or by QEMU, in any format that is read.
///
/// Of a mapped-ram image some kilobytes a block are read; a stream is read whole.
///
/// # Errors
/// [`Kind::Damaged`](crate::Kind::Damaged) at the first fault, with file, offset and field; [`Kind::Unsupported`](crate::Kind::Unsupported); [`Kind::Io`](crate::Kind::Io).
pub fn info(path: &Path) -> Result<ImageInfo> {
    info_at(path, 0)
}

/// As [`info`], for an image that starts at the offset `start` of its file or device.
///
/// # Errors
/// As there.
pub fn info_at(path: &Path, start: u64) -> Result<ImageInfo> {
    let file = open_image(path)?;
    let format = Format::of(&file, path, start)?;
    match format.has_places() {
        true => mapped_ram(file, path, start, format),
        false => stream(file, path, start, format),
    }
}

fn mapped_ram(file: File, path: &Path, start: u64, format: Format) -> Result<ImageInfo> {
    let image = MappedRamFile::from_file(file, path, start)?;
    let layout = image.layout();
    let blocks: Vec<BlockSummary> = image
        .block_use()?
        .into_iter()
        .map(|BlockUse { name, usage }| BlockSummary {
            name,
            ram_bytes: usage.ram_bytes,
            data_bytes: usage.data_bytes,
            zero_bytes: usage.zero_bytes,
            hole_bytes: usage.hole_bytes,
            stale_bytes: usage.stale_bytes,
        })
        .collect();
    let devices = image.devices()?;
    let description = image.vmdescription()?;
    let facts = Facts {
        format,
        domain: DomainInfo::of(image.payload()),
        page_size: layout.blocks.first().map_or(0, |block| block.page_size.bytes()),
        configuration: layout.preamble.configuration.as_ref(),
        blocks,
        run_state: image.run_state()?.map(str::to_owned),
        description: description.as_ref(),
        device_bytes: layout.device_state.len(),
        early: &layout.early,
        devices: &devices,
    };
    facts.summary(image.file(), path, start)
}

fn stream(file: File, path: &Path, start: u64, format: Format) -> Result<ImageInfo> {
    let image = StreamFile::read(&file, path, start)?;
    let contents = image.contents();
    let page = contents.page_size.bytes();
    let blocks: Vec<BlockSummary> = contents
        .blocks
        .iter()
        .map(|block| {
            let sent = block.pages.saturating_mul(page);
            let zero = block.zero_pages.saturating_mul(page);
            BlockSummary {
                name: block.entry.name.as_str().to_owned(),
                ram_bytes: block.entry.used_length,
                data_bytes: sent,
                zero_bytes: zero,
                hole_bytes: block.entry.used_length.saturating_sub(sent.saturating_add(zero)),
                stale_bytes: 0,
            }
        })
        .collect();
    let devices = image.devices();
    let description = image.vmdescription()?;
    let facts = Facts {
        format,
        domain: DomainInfo::of(image.payload()),
        page_size: page,
        configuration: contents.preamble.as_ref().and_then(|preamble| preamble.configuration.as_ref()),
        blocks,
        run_state: image.run_state()?.map(str::to_owned),
        description: description.as_ref(),
        device_bytes: devices.eof_at - image.tail().start + 1,
        early: &contents.early,
        devices,
    };
    facts.summary(&file, path, start)
}

/// What both formats tell, each in its own way.
struct Facts<'a> {
    format: Format,
    domain: Option<DomainInfo>,
    page_size: u64,
    configuration: Option<&'a Configuration>,
    blocks: Vec<BlockSummary>,
    run_state: Option<String>,
    description: Option<&'a vmdesc::VmDescription>,
    /// The length of the device state without the early sections.
    device_bytes: u64,
    early: &'a [DeviceSection],
    devices: &'a DeviceState,
}

impl Facts<'_> {
    fn summary(self, file: &File, path: &Path, start: u64) -> Result<ImageInfo> {
        let metadata =
            file.metadata().map_err(|error| Error::io(format!("cannot read {}", path.display()), error))?;
        let bounds = Bounds::of(file, path, start)?;
        let sum = |field: fn(&BlockSummary) -> u64| {
            self.blocks.iter().map(field).fold(0, |sum: u64, bytes| sum.saturating_add(bytes))
        };
        let manifest = self.description.and_then(|description| description.vmstate.clone());
        let described = self.description.is_some_and(|description| {
            description.devices.iter().any(|device| device.fields.iter().any(|field| field.name != "data"))
        });
        Ok(ImageInfo {
            format: self.format.name(),
            domain: self.domain,
            machine: self.configuration.map(|c| c.machine.as_str().to_owned()),
            capabilities: self.configuration.map_or_else(Vec::new, |c| {
                c.capabilities.iter().map(|capability| capability.as_str().to_owned()).collect()
            }),
            page_size: self.page_size,
            run_state: self.run_state,
            saved: manifest.and_then(|value| serde_json::from_value(value).ok()),
            file_bytes: bounds.end,
            // A device takes all of itself.
            disk_bytes: if bounds.is_device { bounds.end } else { metadata.blocks() * 512 },
            ram_bytes: sum(|block| block.ram_bytes),
            data_bytes: sum(|block| block.data_bytes),
            zero_bytes: sum(|block| block.zero_bytes),
            hole_bytes: sum(|block| block.hole_bytes),
            blocks: self.blocks,
            device_bytes: self
                .early
                .iter()
                .fold(self.device_bytes, |sum, section| sum + (section.end - section.header_at)),
            devices: (self.early.iter().map(|section| (section, true)))
                .chain(self.devices.sections.iter().map(|section| (section, false)))
                .map(|(section, early)| SectionSummary {
                    name: section.idstr.as_str().to_owned(),
                    instance_id: section.instance_id,
                    version: section.version_id,
                    bytes: section.payload.len(),
                    offset: section.payload.start,
                    early,
                })
                .collect(),
            described,
        })
    }
}
