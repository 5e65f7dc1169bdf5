//! Finding out where everything is in an image, by reading as little of it as possible.

use std::fmt;

use page::PageSize;

use crate::cursor::Cursor;
use crate::qemu::early::{DescribedLengths, early_payload_len, only_payload_len};
use crate::qemu::format::*;
use crate::qemu::vmdesc::{self, Located};
use crate::qemu::{
    BlockListBuilder, BlockListVariant, Command, DeviceSection, Item, Preamble, SectionHeader, SectionKind,
    decode_block_entry, decode_item, decode_preamble, decode_total, refused_record,
};
use crate::{DecodeError, Fault, FileRange, Findings, IdStr, Report};

use super::format::{FILE_LEN_MAX, Header, RAM_SECTIONS_MAX, bitmap_len};
use super::layout::{BlockPlacement, Layout};

/// How many bytes are asked for at once while the stream is followed: enough for the metadata of a block.
const READ_LEN: usize = 4096;
/// How many bytes at the end of the file are looked at first for a vmdescription; QEMU's have some
/// 100 KiB.
const TAIL_LEN: usize = 256 << 10;
/// How many bytes at the end of the file tell for certain: a description of the greatest length, its head,
/// and the end mark before it.
const TAIL_LEN_MAX: usize = VMDESCRIPTION_LEN_MAX as usize + VMDESCRIPTION_HEADER_LEN + 1;

/// What a decoder wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Bytes of the file: pass them to [`LayoutDecoder::supply`].
    Need {
        /// Their absolute offset.
        offset: u64,
        /// How many; never zero, and never beyond the end of the file.
        len: usize,
    },
    /// Nothing more.
    Done(Box<Layout>),
}

/// Reads the metadata of a mapped-ram image without I/O of its own.
///
/// The caller loops over [`step`](LayoutDecoder::step) and [`supply`](LayoutDecoder::supply). Some
/// kilobytes a block and the vmdescription are read, whatever the size of the image. The bitmaps are not:
/// [`super::BitmapScanner`] reads and checks them.
///
/// Everything that a crash or an enemy can have done to the metadata is a fault: sizes against the file
/// and each other, overlapping ranges, a total that is not the sum, a page size that is none, pages in
/// PARTs, a RAM section that never ended, a missing end.
#[derive(Clone, Debug)]
pub struct LayoutDecoder {
    state: State,
    file_len: u64,
    findings: Findings,
    /// Whether only the start of the device state is looked for; see [`LayoutDecoder::seeking`].
    is_seeking: bool,
    phase: Phase,
    /// The offset of the next byte of the stream.
    at: u64,
    /// Bytes of the file from `window_at` on.
    window: Vec<u8>,
    window_at: u64,
    /// What the caller was asked for.
    wanted: Option<(u64, usize)>,
}

/// What is known so far.
#[derive(Clone, Debug)]
struct State {
    stream_start: u64,
    preamble: Option<Preamble>,
    variant: BlockListVariant,
    page_size: Option<PageSize>,
    ram: Option<SectionHeader>,
    list: BlockListBuilder,
    blocks: Vec<BlockPlacement>,
    /// Everything that must not overlap, with its name for the fault.
    regions: Vec<(FileRange, Region)>,
    /// Where the stream went on after the last jump.
    run_start: u64,
    sections: u64,
    /// Whether RAM has gone on after its START: from then on nothing is early.
    has_parts: bool,
    early: Vec<DeviceSection>,
    /// The early section whose end is being looked for.
    open: Option<OpenSection>,
    /// What the vmdescription tells of lengths, once it was looked at for them.
    described: Option<DescribedLengths>,
    device_state_at: u64,
    device_state_end: u64,
    vmdesc: Option<FileRange>,
    /// Whether a survey could not follow the stream to here.
    is_lost: bool,
}

/// A section of which the head was read.
#[derive(Clone, Debug)]
struct OpenSection {
    header: SectionHeader,
    header_at: u64,
    payload_at: u64,
}

#[derive(Clone, Debug)]
enum Region {
    Stream,
    Bitmap(IdStr),
    Pages(IdStr),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Preamble,
    Start,
    Total,
    Block,
    /// In the payload of a RAM section; the last one is END's.
    Payload {
        last: bool,
    },
    Footer {
        last: bool,
    },
    Items,
    /// Looks for the vmdescription, for the length of an early section.
    Locate {
        len: usize,
    },
    /// Reads it; it ends where the file does.
    Describe,
    /// The early section ends here, if what is described is true.
    EarlyFooter,
    /// The end of the early section is to be searched for.
    EarlySearch,
    Tail {
        len: usize,
    },
    Done,
}

impl LayoutDecoder {
    /// A decoder for the image whose magic stands at `stream_start` of a file of `file_len` bytes.
    pub fn new(stream_start: u64, file_len: u64) -> LayoutDecoder {
        LayoutDecoder::with_findings(stream_start, file_len, Findings::strict())
    }

    /// A decoder that notes what it can read past; see [`super::survey`].
    pub(super) fn surveying(stream_start: u64, file_len: u64) -> LayoutDecoder {
        LayoutDecoder::with_findings(stream_start, file_len, Findings::collecting())
    }

    /// A decoder that goes as far as the start of the device state and does not look at the end of the file, where
    /// something else may stand: it takes early sections to end at the first place that can be their end.
    pub(super) fn seeking(stream_start: u64, file_len: u64) -> LayoutDecoder {
        let mut decoder = LayoutDecoder::surveying(stream_start, file_len);
        decoder.is_seeking = true;
        decoder.state.described = Some(DescribedLengths::default());
        decoder
    }

    fn with_findings(stream_start: u64, file_len: u64, findings: Findings) -> LayoutDecoder {
        let state = State {
            stream_start,
            preamble: None,
            variant: BlockListVariant::default(),
            page_size: None,
            ram: None,
            list: BlockListBuilder::default(),
            blocks: Vec::new(),
            regions: Vec::new(),
            run_start: stream_start,
            sections: 0,
            has_parts: false,
            early: Vec::new(),
            open: None,
            described: None,
            device_state_at: 0,
            device_state_end: 0,
            vmdesc: None,
            is_lost: false,
        };
        LayoutDecoder {
            state,
            file_len: file_len.min(FILE_LEN_MAX),
            findings,
            is_seeking: false,
            phase: Phase::Preamble,
            at: stream_start,
            window: Vec::new(),
            window_at: stream_start,
            wanted: None,
        }
    }

    /// Says what is needed next, or gives the layout.
    ///
    /// Asked again before [`supply`](LayoutDecoder::supply), it says the same.
    ///
    /// # Errors
    /// The first fault of the image.
    pub fn step(&mut self) -> Result<Step, Fault> {
        if let Some((offset, len)) = self.wanted {
            return Ok(Step::Need { offset, len });
        }
        while self.phase != Phase::Done {
            match self.advance() {
                Ok(()) => {}
                Err(DecodeError::Incomplete { offset, field, needed }) => {
                    return self.need(offset, field, needed);
                }
                Err(DecodeError::Fault(fault)) => return Err(fault),
            }
        }
        self.layout().map(|layout| Step::Done(Box::new(layout)))
    }

    /// Passes the bytes that were asked for, or as many of them as one read gave.
    ///
    /// # Errors
    /// Damaged: no byte at all, which says that the file is shorter than its length.
    pub fn supply(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let Some((offset, len)) = self.wanted.take() else { return Ok(()) };
        if bytes.is_empty() {
            return Err(Fault::damaged(offset, "file", "ends before its length"));
        }
        let bytes = bytes.get(..len).unwrap_or(bytes);
        // What lies behind the stream's position is of no more use; keep the rest and go on behind it.
        let used = usize::try_from(self.at.saturating_sub(self.window_at)).unwrap_or(usize::MAX);
        if offset == self.window_at + self.window.len() as u64 && used <= self.window.len() {
            self.window.drain(..used);
            self.window_at += used as u64;
        } else {
            self.window.clear();
            self.window_at = offset;
        }
        self.window.extend_from_slice(bytes);
        Ok(())
    }

    /// The bytes at hand from the stream's position on.
    fn rest(&self) -> &[u8] {
        let from = self.at.checked_sub(self.window_at).and_then(|from| usize::try_from(from).ok());
        from.and_then(|from| self.window.get(from..)).unwrap_or_default()
    }

    fn need(&mut self, at: u64, field: &'static str, needed: u64) -> Result<Step, Fault> {
        let offset = self.at + self.rest().len() as u64;
        let left = self.file_len.saturating_sub(offset);
        if left < needed.max(1) {
            let problem = format!("the file ends at {:#x}, {} bytes too early", self.file_len, needed - left);
            return Err(Fault::damaged(at, field, problem));
        }
        // What is left of the file may be more than memory holds; what is asked for is not: an item has
        // at most 64 KiB, a tail 16 MiB.
        let len = needed.max(READ_LEN as u64).min(left) as usize;
        self.wanted = Some((offset, len));
        Ok(Step::Need { offset, len })
    }

    /// Reads one piece of the stream from what is at hand.
    fn advance(&mut self) -> Result<(), DecodeError> {
        match self.phase {
            Phase::Preamble => self.preamble(),
            Phase::Start => self.start(),
            Phase::Total => self.total(),
            Phase::Block => self.block(),
            Phase::Payload { last } => self.payload(last),
            Phase::Footer { last } => self.footer(last),
            Phase::Items => self.item(),
            Phase::Locate { len } => self.locate(len),
            Phase::Describe => self.describe(),
            Phase::EarlyFooter => self.early_footer(),
            Phase::EarlySearch => self.early_search(),
            Phase::Tail { len } => self.tail(len),
            Phase::Done => Ok(()),
        }
    }

    fn preamble(&mut self) -> Result<(), DecodeError> {
        let (preamble, len) = decode_preamble(self.rest(), self.at)?;
        let configuration = preamble.configuration.as_ref();
        if !configuration.is_some_and(|configuration| configuration.is_mapped_ram()) {
            let problem = "names no capability `mapped-ram`: this is a plain stream";
            return Err(Fault::unsupported(self.at, "configuration", problem).into());
        }
        self.state.variant = BlockListVariant::of(configuration);
        self.state.page_size = configuration.and_then(|c| c.page_size());
        self.state.preamble = Some(preamble);
        self.at += len as u64;
        self.phase = Phase::Start;
        Ok(())
    }

    fn start(&mut self) -> Result<(), DecodeError> {
        let (item, len) = decode_item(self.rest(), self.at)?;
        let header = match item {
            Item::Section(header) if header.kind == SectionKind::Start && header.idstr == RAM_SECTION => {
                header
            }
            Item::Section(header) if header.kind == SectionKind::Full => return self.early(header, len),
            other => return Err(foreign_item(&other, self.at).into()),
        };
        if header.version_id != RAM_SECTION_VERSION {
            let problem = format!("version {} is not {RAM_SECTION_VERSION}", header.version_id);
            return Err(Fault::unsupported(self.at, "RAM section", problem).into());
        }
        self.state.ram = Some(header);
        self.at += len as u64;
        self.phase = Phase::Total;
        Ok(())
    }

    fn total(&mut self) -> Result<(), DecodeError> {
        let mut cursor = Cursor::new(self.rest(), self.at);
        let list = decode_total(&mut cursor)?;
        self.at = cursor.position();
        self.state.list = list;
        self.phase = self.after_block();
        Ok(())
    }

    fn after_block(&self) -> Phase {
        if self.state.list.is_complete() { Phase::Payload { last: false } } else { Phase::Block }
    }

    fn block(&mut self) -> Result<(), DecodeError> {
        let mut cursor = Cursor::new(self.rest(), self.at);
        let entry = decode_block_entry(&mut cursor, self.state.variant)?;
        let header_at = cursor.position();
        let header = Header::decode(&mut cursor)?;
        let end = cursor.position();
        let (name, used_length, address) = (entry.name.clone(), entry.used_length, entry.address);
        self.state.list.push(entry, self.at, &mut self.findings)?;

        let fault = |problem: String| {
            Fault::damaged(header_at, format!("mapped-ram header of block `{name}`"), problem)
        };
        // `page_size` divides the length below, and QEMU itself divides by it unseen.
        let page_size = PageSize::new(header.page_size)
            .ok_or_else(|| fault(format!("page size {:#x} is none", header.page_size)))?;
        match self.state.page_size {
            Some(known) if known != page_size => {
                let problem =
                    format!("page size {:#x} is not the image's {:#x}", header.page_size, known.bytes());
                self.findings.note(fault(problem))?;
            }
            _ => self.state.page_size = Some(page_size),
        }
        if used_length % page_size.bytes() != 0 {
            let problem = format!("used length {used_length:#x} is no multiple of {:#x}", page_size.bytes());
            return Err(fault(problem).into());
        }

        let is_ignored = address.is_some() && header.bitmap_offset == 0 && header.pages_offset == 0;
        let (bitmap, pages) = if is_ignored {
            (FileRange::default(), FileRange::default())
        } else {
            let within = |what: &str, start: u64, len: u64| {
                let range = FileRange::of_len(start, len).filter(|range| range.end <= self.file_len);
                range.filter(|range| range.start >= self.state.stream_start).ok_or_else(|| {
                    // Where it begins may be right and the file be cut.
                    fault(match (self.state.stream_start..self.file_len).contains(&start) {
                        true => format!(
                            "{what} offset {start:#x}: its {len:#x} bytes go beyond the end of the file at {:#x}",
                            self.file_len
                        ),
                        false => format!("{what} offset {start:#x} lies outside the file"),
                    })
                })
            };
            if header.pages_offset % page_size.bytes() != 0 {
                let problem = format!("pages offset {:#x} is not aligned to pages", header.pages_offset);
                self.findings.note(fault(problem))?;
            }
            let count = page_size.pages_of(used_length).0;
            let bitmap = within("bitmap", header.bitmap_offset, bitmap_len(count));
            let pages = within("pages", header.pages_offset, used_length)?;
            let bitmap = match bitmap {
                Ok(bitmap) => bitmap,
                // The stream goes on behind the pages, so a survey can do without the bitmap.
                Err(fault) => {
                    self.findings.note(fault)?;
                    FileRange::default()
                }
            };
            (bitmap, pages)
        };
        if !is_ignored {
            let run = FileRange { start: self.state.run_start, end };
            self.state.regions.push((run, Region::Stream));
            self.state.regions.push((bitmap, Region::Bitmap(name.clone())));
            self.state.regions.push((pages, Region::Pages(name.clone())));
            self.state.run_start = pages.end;
        }
        self.at = if is_ignored { end } else { pages.end };
        self.state.blocks.push(BlockPlacement {
            name,
            used_length,
            page_size,
            header_at,
            address,
            bitmap,
            pages,
        });
        self.phase = self.after_block();
        Ok(())
    }

    fn payload(&mut self, last: bool) -> Result<(), DecodeError> {
        let mut cursor = Cursor::new(self.rest(), self.at);
        let word = cursor.be64("RAM record")?;
        match word & RAM_FLAGS_MASK & !RAM_SAVE_FLAG_CONTINUE {
            RAM_SAVE_FLAG_EOS if word == RAM_SAVE_FLAG_EOS => {
                self.at = cursor.position();
                self.phase = Phase::Footer { last };
                Ok(())
            }
            RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_MULTIFD_FLUSH => {
                let problem = format!("{word:#x} has no place in a mapped-ram image");
                Err(Fault::damaged(self.at, "RAM record", problem).into())
            }
            _ => Err(refused_record(word, self.at).into()),
        }
    }

    fn footer(&mut self, last: bool) -> Result<(), DecodeError> {
        let (item, len) = decode_item(self.rest(), self.at)?;
        let expected = self.ram_id();
        match item {
            Item::Footer { section_id } if section_id == expected => {}
            Item::Footer { section_id } => {
                let problem = format!("closes section {section_id}, but {expected} is open");
                self.findings.note(Fault::damaged(self.at, "footer", problem))?;
            }
            _ => return Err(Fault::damaged(self.at, "RAM section", "has no footer").into()),
        }
        self.at += len as u64;
        self.phase = Phase::Items;
        if last {
            self.state.device_state_at = self.at;
            self.state.device_state_end = self.at;
            self.phase = if self.is_seeking { Phase::Done } else { Phase::Tail { len: TAIL_LEN } };
        }
        Ok(())
    }

    fn item(&mut self) -> Result<(), DecodeError> {
        let (item, len) = decode_item(self.rest(), self.at)?;
        self.state.sections += 1;
        if self.state.sections > RAM_SECTIONS_MAX {
            let problem = format!("more than {RAM_SECTIONS_MAX} of them");
            return Err(Fault::damaged(self.at, "RAM sections", problem).into());
        }
        match item {
            Item::Part { section_id } if section_id == self.ram_id() => {
                self.state.has_parts = true;
                self.phase = Phase::Payload { last: false };
            }
            Item::End { section_id } if section_id == self.ram_id() => {
                self.phase = Phase::Payload { last: true };
            }
            Item::Command(Command::SwitchoverStart) => {}
            Item::Section(header) if header.kind == SectionKind::Full && !self.state.has_parts => {
                return self.early(header, len);
            }
            other => return Err(foreign_item(&other, self.at).into()),
        }
        self.at += len as u64;
        Ok(())
    }

    fn ram_id(&self) -> u32 {
        self.state.ram.as_ref().map_or(0, |ram| ram.section_id)
    }

    /// Begins an early section, whose head stands at the position and has `len` bytes.
    fn early(&mut self, header: SectionHeader, len: usize) -> Result<(), DecodeError> {
        if self.state.early.len() == EARLY_SECTIONS_MAX {
            let problem = format!("is one more than {EARLY_SECTIONS_MAX} before the end of RAM");
            return Err(Fault::damaged(self.at, format!("section `{}`", header.idstr), problem).into());
        }
        let payload_at = self.at + len as u64;
        self.state.open = Some(OpenSection { header, header_at: self.at, payload_at });
        self.at = payload_at;
        self.phase = match self.state.described {
            Some(_) => self.described_end(),
            None => Phase::Locate { len: TAIL_LEN },
        };
        Ok(())
    }

    /// Goes to where the open section ends by the description, or else to its payload.
    fn described_end(&mut self) -> Phase {
        let Some(open) = &self.state.open else { return Phase::Items };
        let len = self
            .state
            .described
            .as_ref()
            .and_then(|lengths| lengths.find(&open.header.idstr, open.header.instance_id));
        let end = len.and_then(|len| open.payload_at.checked_add(len));
        let fits = |end: &u64| {
            end.checked_add(SECTION_FOOTER_LEN as u64).is_some_and(|footer_end| footer_end <= self.file_len)
        };
        match end.filter(fits) {
            Some(end) => {
                self.at = end;
                Phase::EarlyFooter
            }
            None => {
                self.at = open.payload_at;
                Phase::EarlySearch
            }
        }
    }

    /// Looks at the last `len` bytes of the file for a description.
    fn locate(&mut self, len: usize) -> Result<(), DecodeError> {
        let payload_at = self.state.open.as_ref().map_or(self.at, |open| open.payload_at);
        let start = payload_at.max(self.file_len.saturating_sub(len as u64));
        let tail = self.wanted_bytes(start, self.file_len - start, "end of the image")?;
        match vmdesc::locate(tail, start) {
            Located::Found(range) => {
                self.at = range.start;
                self.phase = Phase::Describe;
            }
            Located::TailTooShort if start > payload_at => {
                self.phase = Phase::Locate { len: (4 * len).min(TAIL_LEN_MAX) };
            }
            Located::Absent | Located::TailTooShort => self.use_lengths(DescribedLengths::default()),
        }
        Ok(())
    }

    fn describe(&mut self) -> Result<(), DecodeError> {
        let start = self.at;
        let section = self.wanted_bytes(start, self.file_len.saturating_sub(start), "vmdescription")?;
        let json = section.get(VMDESCRIPTION_HEADER_LEN..).unwrap_or_default();
        // One that cannot be read tells nothing here; what is wrong with it is told by whoever needs it.
        let lengths = match vmdesc::parse(json, start) {
            Ok(description) => DescribedLengths::of(&description),
            Err(_) => DescribedLengths::default(),
        };
        self.use_lengths(lengths);
        Ok(())
    }

    fn use_lengths(&mut self, lengths: DescribedLengths) {
        self.state.described = Some(lengths);
        self.phase = self.described_end();
    }

    fn early_footer(&mut self) -> Result<(), DecodeError> {
        // That so many bytes are left was seen before the end was taken for described.
        let bytes = self.wanted_bytes(self.at, SECTION_FOOTER_LEN as u64, "footer")?;
        let id = match bytes.first_chunk::<SECTION_FOOTER_LEN>() {
            Some([QEMU_VM_SECTION_FOOTER, id @ ..]) => Some(u32::from_be_bytes(*id)),
            _ => None,
        };
        let Some(open) = &self.state.open else { return Ok(()) };
        if id == Some(open.header.section_id) {
            self.close(self.at);
        } else {
            // QEMU's descriptions leave out what its devices write by hand.
            self.at = open.payload_at;
            self.phase = Phase::EarlySearch;
        }
        Ok(())
    }

    fn early_search(&mut self) -> Result<(), DecodeError> {
        let Some(open) = self.state.open.clone() else { return Ok(()) };
        // What may follow the footer has to be seen, too: at most a head with the longest name.
        let len = (EARLY_SECTION_LEN_MAX + SECTION_FOOTER_LEN + SECTION_HEADER_LEN_MAX) as u64;
        let left = self.file_len.saturating_sub(open.payload_at);
        let ram_id = self.state.ram.as_ref().map(|ram| ram.section_id);
        let is_seeking = self.is_seeking;
        let window = self.wanted_bytes(open.payload_at, len.min(left), "early section")?;
        let len = match is_seeking {
            true => early_payload_len(window, open.payload_at, &open.header, ram_id)
                .map_err(DecodeError::at_end)?,
            false => only_payload_len(window, open.payload_at, &open.header, ram_id, left <= len)?,
        };
        self.close(open.payload_at + len as u64);
        Ok(())
    }

    /// Ends the open section, whose footer stands at `footer_at`.
    fn close(&mut self, footer_at: u64) {
        self.at = footer_at + SECTION_FOOTER_LEN as u64;
        self.phase = if self.state.ram.is_some() { Phase::Items } else { Phase::Start };
        let Some(OpenSection { header, header_at, payload_at }) = self.state.open.take() else { return };
        self.state.early.push(DeviceSection {
            section_id: header.section_id,
            idstr: header.idstr,
            instance_id: header.instance_id,
            version_id: header.version_id,
            header_at,
            payload: FileRange { start: payload_at, end: footer_at },
            end: self.at,
        });
    }

    /// Goes to the offset `start` and gives the `len` bytes from there, which do not reach beyond the file.
    fn wanted_bytes(&mut self, start: u64, len: u64, field: &'static str) -> Result<&[u8], DecodeError> {
        self.at = start;
        let at_hand = self.rest().len() as u64;
        if at_hand < len {
            return Err(DecodeError::Incomplete { offset: start + at_hand, field, needed: len - at_hand });
        }
        Ok(self.rest().get(..len as usize).unwrap_or_default())
    }

    /// Looks at the last `len` bytes of the file for what ends the image.
    fn tail(&mut self, len: usize) -> Result<(), DecodeError> {
        let start = self.state.device_state_at.max(self.file_len.saturating_sub(len as u64));
        self.at = start;
        let wanted = self.file_len - start;
        let tail = self.rest();
        if (tail.len() as u64) < wanted {
            let needed = wanted - tail.len() as u64;
            let offset = start + tail.len() as u64;
            return Err(DecodeError::Incomplete { offset, field: "end of the image", needed });
        }
        let vmdesc = match vmdesc::locate(tail, start) {
            Located::Found(range) => Some(range),
            Located::TailTooShort if start > self.state.device_state_at => {
                // Four times as much each time: what is read again adds up to a third.
                self.phase = Phase::Tail { len: (4 * len).min(TAIL_LEN_MAX) };
                return Ok(());
            }
            Located::Absent | Located::TailTooShort => None,
        };
        let end = vmdesc.map_or(self.file_len, |range| range.start);
        let last = end.checked_sub(start + 1).and_then(|at| tail.get(at as usize)).copied();
        self.state.vmdesc = vmdesc;
        self.state.device_state_end = end;
        match last {
            Some(QEMU_VM_EOF) => {}
            // The tail may begin with the description: the byte before it is one more to ask for.
            None if start > self.state.device_state_at => {
                self.phase = Phase::Tail { len: (4 * len).min(TAIL_LEN_MAX) };
                return Ok(());
            }
            _ => {
                let problem = "no end mark stands before the end of the file or its vmdescription";
                self.findings.note(Fault::damaged(end, "device state", problem))?;
            }
        }
        self.phase = Phase::Done;
        // Where the stream goes after it was lost is unknown, and so is what it overlaps.
        if !self.state.is_lost {
            let run = FileRange { start: self.state.run_start.min(self.file_len), end: self.file_len };
            self.state.regions.push((run, Region::Stream));
            self.check_overlaps()?;
        }
        Ok(())
    }

    fn check_overlaps(&mut self) -> Result<(), Fault> {
        let mut regions = std::mem::take(&mut self.state.regions);
        regions.retain(|(range, _)| !range.is_empty());
        regions.sort_by_key(|(range, _)| (range.start, range.end));
        // Sorted by start, an overlap shows between a region and the one that reached farthest so far.
        let mut farthest: Option<&(FileRange, Region)> = None;
        for this in &regions {
            if let Some(other) = farthest.filter(|other| other.0.overlaps(this.0)) {
                let problem = format!("{} overlaps {} at {}", this.0, other.1, other.0);
                self.findings.note(Fault::damaged(this.0.start, this.1.to_string(), problem))?;
            }
            if farthest.is_none_or(|other| other.0.end < this.0.end) {
                farthest = Some(this);
            }
        }
        Ok(())
    }

    fn layout(&self) -> Result<Layout, Fault> {
        let state = &self.state;
        let (Some(preamble), Some(ram)) = (state.preamble.clone(), state.ram.clone()) else {
            return Err(Fault::damaged(state.stream_start, "image", "has no RAM section"));
        };
        Ok(Layout {
            stream_start: state.stream_start,
            preamble,
            ram,
            total: state.list.total(),
            blocks: state.blocks.clone(),
            early: state.early.clone(),
            device_state: FileRange { start: state.device_state_at, end: state.device_state_end },
            vmdesc: state.vmdesc,
            file_len: self.file_len,
        })
    }

    /// Notes a fault behind which the stream cannot be followed, and turns to the end of the file; `false`
    /// where that is what failed.
    pub(super) fn abandon(&mut self, fault: Fault) -> bool {
        // Only a survey abandons: its findings take every fault. The end of the file may be what failed
        // already, and is not worth a second line.
        if self.findings.last() != Some(&fault) {
            let _ = self.findings.note(fault);
        }
        if self.is_seeking || self.state.is_lost || matches!(self.phase, Phase::Tail { .. } | Phase::Done) {
            return false;
        }
        self.state.is_lost = true;
        self.state.device_state_at = self.at.min(self.file_len);
        self.wanted = None;
        self.phase = Phase::Tail { len: TAIL_LEN };
        true
    }

    /// Whether the stream could not be followed to the end of RAM.
    pub(super) fn is_lost(&self) -> bool {
        self.state.is_lost
    }

    /// The vmdescription, where the end of the file was looked at.
    pub(super) fn vmdesc(&self) -> Option<FileRange> {
        self.state.vmdesc
    }

    /// The blocks that were understood.
    pub(super) fn blocks(&self) -> &[BlockPlacement] {
        &self.state.blocks
    }

    pub(super) fn into_report(self) -> Report {
        self.findings.into_report()
    }
}

/// Why an item has no place where only RAM's sections do.
fn foreign_item(item: &Item, at: u64) -> Fault {
    match item {
        Item::Section(header) if header.idstr == RAM_SECTION => {
            Fault::damaged(at, "RAM section", "is started twice")
        }
        Item::Section(header) => match header.kind {
            SectionKind::Start => Fault::unsupported(
                at,
                format!("section `{}`", header.idstr),
                "hands its state over in pieces without lengths, which only QEMU can tell apart",
            ),
            SectionKind::Full => Fault::unsupported(
                at,
                format!("section `{}`", header.idstr),
                "stands before the end of RAM, as in a background snapshot, whose bitmaps are empty",
            ),
        },
        Item::Eof => {
            Fault::damaged(at, "RAM section", "never ends: the save was cut short and its bitmaps are empty")
        }
        Item::Command(_) => Fault::unsupported(at, "command", "has no place in an image"),
        Item::Part { section_id } | Item::End { section_id } => {
            Fault::damaged(at, "PART or END", format!("section {section_id} was not started"))
        }
        Item::Footer { .. } => Fault::damaged(at, "footer", "closes no section"),
        Item::VmDescription { .. } => Fault::damaged(at, "vmdescription", "stands before the end mark"),
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Region::Stream => f.write_str("stream"),
            Region::Bitmap(name) => write!(f, "bitmap of block `{name}`"),
            Region::Pages(name) => write!(f, "pages of block `{name}`"),
        }
    }
}
