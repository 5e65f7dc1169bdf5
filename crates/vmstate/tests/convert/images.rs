//! Guests out of nothing, written as images of every format by the simplest code there is, and read back by it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use page::{PageIndex, PageSize};
use vmstate::source::{MappedRamFile, StreamFile};
use wire::IdStr;
use wire::mapped_ram::{ImagePlan, encode_ram_end};
use wire::qemu::vmdesc::{Device, Field, VmDescription};
use wire::qemu::{
    BlockEntry, Configuration, Event, Item, Preamble, RamSetup, RecordEncoder, SectionHeader, StreamScanner,
};

pub const PAGE: usize = 4096;
/// The section id of RAM, unlike that of any QEMU, so that it shows where it gets lost.
pub const RAM_ID: u32 = 77;

const EARLY: &str = "0000:00:05.0/virtio-mem-early";
const EARLY_LEN: usize = 900;

/// A page of a guest, and how an image has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// Not in the image.
    Absent,
    /// In the image, as zero: a record of a stream; a bit of a bitmap over a hole of the file.
    Zero,
    /// In the image as bytes, which are all zero.
    Blank,
    /// Bytes.
    Data(u8),
}

impl Page {
    pub fn bytes(self) -> Vec<u8> {
        match self {
            Page::Absent | Page::Zero | Page::Blank => vec![0; PAGE],
            // The last byte tells it from a page of zeroes, too.
            Page::Data(seed) => {
                (0..PAGE).map(|i| (i as u8).wrapping_mul(seed | 1) ^ seed).map(|b| b.max(1)).collect()
            }
        }
    }
}

/// The payload of a `globalstate` section.
fn global_state(state: &str) -> Vec<u8> {
    let mut payload = vec![0; wire::qemu::global_state::PAYLOAD_LEN];
    wire::qemu::global_state::patch_run_state(&mut payload, state).unwrap();
    payload
}

/// A guest: its blocks, each with its pages.
#[derive(Clone, Debug, Default)]
pub struct Guest {
    pub blocks: Vec<(String, Vec<Page>)>,
    /// Whether its device state is described, and has an early section, which cannot be told apart without that.
    pub is_described: bool,
    /// Whether the description says no more than how long the sections are, as vmstate's does.
    pub is_opaque: bool,
    /// The run state that its device state records, if it records one.
    pub run_state: Option<&'static str>,
}

impl Guest {
    /// What its memory holds, block by block.
    pub fn memory(&self) -> Vec<Vec<u8>> {
        self.blocks.iter().map(|(_, pages)| pages.iter().flat_map(|page| page.bytes()).collect()).collect()
    }

    pub fn configuration() -> Configuration {
        Configuration::new(IdStr::new("pc-q35-9.9").unwrap())
    }

    pub fn entries(&self) -> Vec<BlockEntry> {
        self.blocks
            .iter()
            .map(|(name, pages)| BlockEntry {
                name: IdStr::new(name).unwrap(),
                used_length: (pages.len() * PAGE) as u64,
                page_size: None,
                address: None,
            })
            .collect()
    }

    /// A section that another handler writes before the pages go.
    pub fn early(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if !self.is_described {
            return bytes;
        }
        SectionHeader {
            kind: wire::qemu::SectionKind::Full,
            section_id: 21,
            idstr: IdStr::new(EARLY).unwrap(),
            instance_id: 0,
            version_id: 1,
        }
        .encode(&mut bytes);
        bytes.extend([5; EARLY_LEN]);
        Item::Footer { section_id: 21 }.encode(&mut bytes);
        bytes
    }

    /// Device state and its description, if there is one, up to the end of the file.
    pub fn tail(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let whole = |len: usize| Field::plain("data", "buffer", len as u64);
        let early = match self.is_opaque {
            true => whole(EARLY_LEN),
            false => Field::plain("bitmap", "buffer", EARLY_LEN as u64),
        };
        let mut devices = vec![Device { name: EARLY.into(), fields: vec![early], ..Device::default() }];
        let mut sections = vec![
            (3, "timer", vec![1, 2, 3]),
            (9, "0000:00:02.0/vga", vec![0x7e; 300]),
            (12, "empty", vec![]),
        ];
        sections.extend(self.run_state.map(|state| (13, "globalstate", global_state(state))));
        for (id, name, payload) in sections {
            SectionHeader {
                kind: wire::qemu::SectionKind::Full,
                section_id: id,
                idstr: IdStr::new(name).unwrap(),
                instance_id: 0,
                version_id: 2,
            }
            .encode(&mut bytes);
            bytes.extend(&payload);
            Item::Footer { section_id: id }.encode(&mut bytes);
            let fields = match self.is_opaque {
                true => vec![whole(payload.len())],
                false => vec![
                    Field::plain("first", "uint8", payload.len().min(1) as u64),
                    Field::plain("rest", "buffer", payload.len().saturating_sub(1) as u64),
                ],
            };
            devices.push(Device { name: name.into(), version: Some(2), fields, ..Device::default() });
        }
        bytes.push(0);
        if !self.is_described {
            return bytes;
        }
        let description = VmDescription {
            page_size: Some(PAGE as u64),
            devices,
            vmstate: Some(serde_json::json!({ "vmstate_version": "of another", "via": "hand" })),
            ..VmDescription::default()
        };
        description.encode(&mut bytes).unwrap();
        bytes
    }

    /// As a mapped-ram image from the offset `start` of a file on.
    pub fn write_mapped_ram(&self, path: &Path, start: u64) {
        let configuration = Guest::configuration().with_capability(IdStr::new("mapped-ram").unwrap());
        let plan = ImagePlan::new(
            &configuration,
            &SectionHeader::ram(RAM_ID),
            &self.entries(),
            PageSize::X86,
            start,
        )
        .unwrap();
        let file = File::create(path).unwrap();
        let mut tail = Vec::new();
        encode_ram_end(RAM_ID, &self.early(), &mut tail);
        tail.extend(self.tail());
        file.set_len(plan.tail_offset).unwrap();
        file.write_all_at(&tail, plan.tail_offset).unwrap();
        for (block, (_, pages)) in plan.blocks.iter().zip(&self.blocks) {
            file.write_all_at(&block.metadata, block.metadata_at).unwrap();
            let mut bitmap = vec![0u8; block.placement.bitmap.len() as usize];
            for (i, page) in pages.iter().enumerate() {
                let at = block.placement.pages.start + (i * PAGE) as u64;
                if *page != Page::Absent {
                    bitmap[i / 8] |= 1 << (i % 8);
                }
                if matches!(page, Page::Blank | Page::Data(_)) {
                    file.write_all_at(&page.bytes(), at).unwrap();
                }
            }
            file.write_all_at(&bitmap, block.placement.bitmap.start).unwrap();
        }
    }

    /// As a stream: first whatever `before` says, block, page, what it was then; then every page.
    pub fn write_stream(&self, path: &Path, before: &[(usize, usize, Page)]) {
        std::fs::write(path, self.stream(before)).unwrap();
    }

    pub fn stream(&self, before: &[(usize, usize, Page)]) -> Vec<u8> {
        let mut out = Vec::new();
        let setup = RamSetup { blocks: self.entries(), multifd_flush: false };
        Preamble { configuration: Some(Guest::configuration()) }.encode(&mut out);
        setup.encode_section(RAM_ID, &mut out);
        out.extend(self.early());
        Item::Part { section_id: RAM_ID }.encode(&mut out);
        let mut records = RecordEncoder::new(&setup);
        let mut send = |block: usize, index: usize, page: Page, out: &mut Vec<u8>| match page {
            Page::Absent => {}
            Page::Zero => records.zero(block, (index * PAGE) as u64, out),
            Page::Blank | Page::Data(_) => {
                records.page_head(block, (index * PAGE) as u64, out);
                out.extend(page.bytes());
            }
        };
        for (block, index, page) in before {
            send(*block, *index, *page, &mut out);
        }
        for (block, (_, pages)) in self.blocks.iter().enumerate() {
            for (index, page) in pages.iter().enumerate() {
                let had = before.iter().any(|(b, i, was)| (*b, *i) == (block, index) && *was != Page::Absent);
                // What is not there must be taken back where it was there before.
                let now = if had && *page == Page::Absent { Page::Zero } else { *page };
                send(block, index, now, &mut out);
            }
        }
        encode_ram_end(RAM_ID, b"", &mut out);
        out.extend(self.tail());
        out
    }
}

/// What an image says: its memory, its early sections, its device state with all that follows, RAM's section id, its configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Content {
    pub memory: Vec<Vec<u8>>,
    pub early: Vec<u8>,
    pub tail: Vec<u8>,
    pub ram_id: u32,
    pub configuration: Option<Configuration>,
}

impl Content {
    pub fn of(guest: &Guest) -> Content {
        Content {
            memory: guest.memory(),
            early: guest.early(),
            tail: guest.tail(),
            ram_id: RAM_ID,
            configuration: Some(Guest::configuration()),
        }
    }
}

pub fn read_mapped_ram(path: &Path, start: u64) -> Content {
    let image = MappedRamFile::from_file(File::open(path).unwrap(), path, start)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    image.verify().unwrap_or_else(|error| panic!("{}", error.chain()));
    let layout = image.layout().clone();
    let memory = layout.blocks.iter().map(|block| {
        let mut bytes = vec![0; block.used_length as usize];
        image.read_ram(block, &image.pages(block).unwrap(), 0, &mut bytes).unwrap();
        bytes
    });
    let file = std::fs::read(path).unwrap();
    Content {
        memory: memory.collect(),
        early: layout
            .early
            .iter()
            .flat_map(|e| &file[e.header_at as usize..e.end as usize])
            .copied()
            .collect(),
        tail: file[layout.device_state.start as usize..].to_vec(),
        ram_id: layout.ram.section_id,
        configuration: layout.preamble.configuration.map(|c| c.without_capability("mapped-ram")),
    }
}

pub fn read_stream(path: &Path) -> Content {
    let bytes = std::fs::read(path).unwrap();
    // That it is sound is somebody else's opinion.
    StreamFile::read(&File::open(path).unwrap(), path, 0).unwrap_or_else(|error| panic!("{}", error.chain()));
    let mut content =
        Content { memory: Vec::new(), early: Vec::new(), tail: Vec::new(), ram_id: 0, configuration: None };
    let mut scanner = StreamScanner::new(0, PageSize::X86);
    scanner
        .feed::<wire::Fault>(&bytes, |event| {
            match event {
                Event::Preamble(preamble) => content.configuration = preamble.configuration,
                Event::Section(header) => content.ram_id = header.section_id,
                Event::Blocks(setup) => {
                    content.memory = setup.blocks.iter().map(|b| vec![0; b.used_length as usize]).collect();
                }
                Event::Page { block, offset, data, .. } => {
                    content.memory[block][offset as usize..][..PAGE].copy_from_slice(data);
                }
                Event::Zero { block, offset } => content.memory[block][offset as usize..][..PAGE].fill(0),
                Event::Early(early) => {
                    content.early.extend(&bytes[early.header_at as usize..early.end as usize])
                }
                Event::DeviceState { at, .. } => content.tail = bytes[at as usize..].to_vec(),
                _ => {}
            }
            Ok(())
        })
        .unwrap();
    content
}

/// Which pages of a block are marked in a mapped-ram image.
pub fn marked(path: &Path, block: usize) -> Vec<u64> {
    let image = MappedRamFile::open(path).unwrap();
    let place = &image.layout().blocks[block];
    let pages = image.pages(place).unwrap();
    (0..place.page_count().0).filter(|i| pages.contains(PageIndex(*i))).collect()
}
