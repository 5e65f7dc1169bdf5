//! Walking a whole stream that arrives in windows.

use std::collections::HashMap;

use page::PageSize;

use crate::cursor::Cursor;
use crate::{DecodeError, Fault, FileRange, Findings, IdStr, Report};

use super::decode::decode_total;
use super::early::{self, Front};
use super::format::*;
use super::{
    BlockListBuilder, BlockListVariant, Command, DeviceSection, Item, Preamble, RamSetup, SectionHeader,
    SectionKind, decode_block_entry, decode_item, decode_preamble,
};

/// What a stream says next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Magic, version, configuration. Always the first.
    Preamble(Preamble),
    /// A command.
    Command(Command),
    /// The head of RAM's START section.
    Section(SectionHeader),
    /// A whole section that another handler writes before the RAM goes.
    ///
    /// Its end is the first place that can be one, and a guest chooses bytes of its own device state: the
    /// vmdescription behind the stream is to say the same length.
    Early(DeviceSection),
    /// The whole payload of RAM's START section.
    Blocks(RamSetup),
    /// The head of one of RAM's PART sections.
    Part {
        /// RAM's section id.
        section_id: u32,
    },
    /// The head of RAM's END section.
    End {
        /// RAM's section id.
        section_id: u32,
    },
    /// A page of data.
    Page {
        /// The block, as an index into the list.
        block: usize,
        /// The offset in the block, in bytes.
        offset: u64,
        /// The absolute offset of the data in the stream.
        at: u64,
        /// One page.
        data: &'a [u8],
    },
    /// A page of zeroes.
    Zero {
        /// The block, as an index into the list.
        block: usize,
        /// The offset in the block, in bytes.
        offset: u64,
    },
    /// The multifd channels synchronise here.
    Flush,
    /// The end of a PART's or END's payload.
    Eos,
    /// The footer of one of RAM's sections.
    Footer {
        /// RAM's section id.
        section_id: u32,
    },
    /// The device state begins here. Always the last: the scanner takes no byte from here on.
    DeviceState {
        /// The absolute offset of the first byte that the scanner did not take.
        at: u64,
        /// Whether RAM's END was seen. A background snapshot has none, and its device state follows the
        /// last PART.
        ram_ended: bool,
    },
}

/// What one step of a scanner did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanStep<'a> {
    /// How many bytes of the input were taken. The caller drops them and passes the rest again.
    pub consumed: usize,
    /// What they said; `None` once all of the input is taken and no event is complete.
    pub event: Option<Event<'a>>,
}

/// Walks a stream that is not mapped-ram, from its preamble to the start of the device state.
///
/// The stream arrives in windows of any size, and any division gives the same events. Nothing is
/// allocated per page, and only an item that lies across the edge of a window is copied.
///
/// Iterating sections other than RAM's are not self-delimiting: they are refused as unsupported, at their
/// offset. A FULL section before the first part of RAM is an [`Event::Early`].
#[derive(Clone, Debug)]
pub struct StreamScanner {
    machine: Machine,
    /// The start of an item that the last window cut short; at most one item, the largest of which is a
    /// page or a command.
    carry: Vec<u8>,
    /// How much of `carry` the last event used.
    carry_used: usize,
}

#[derive(Clone, Debug)]
struct Machine {
    phase: Phase,
    at: u64,
    page_size: PageSize,
    variant: BlockListVariant,
    ram_id: u32,
    list: BlockListBuilder,
    lengths: Vec<u64>,
    names: HashMap<IdStr, usize>,
    current: Option<usize>,
    findings: Findings,
    early: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Preamble,
    /// Between sections. `Before` START, before the first PART, after it.
    Items(Progress),
    SetupTotal,
    SetupBlocks,
    SetupEnd {
        flush: bool,
    },
    Records {
        last: bool,
    },
    Footer(Progress),
    /// In the payload of an early section.
    Early(Box<OpenSection>),
    /// The next event is the device state.
    Ended {
        ram_ended: bool,
    },
    Done,
    Failed(Fault),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    NoRam,
    SetUp,
    Iterating,
    Ended,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct OpenSection {
    header: SectionHeader,
    header_at: u64,
    payload_at: u64,
    progress: Progress,
}

/// An event before it borrows its data.
enum Found {
    Nothing,
    Event(Event<'static>),
    Page { block: usize, offset: u64, data_at: usize },
}

impl StreamScanner {
    /// A scanner for the stream whose first byte has the absolute offset `start`.
    ///
    /// A stream tells its target's page size only where that is not the target's least; `page_size` is
    /// what counts otherwise, [`PageSize::X86`] for x86.
    pub fn new(start: u64, page_size: PageSize) -> StreamScanner {
        StreamScanner::with_findings(start, page_size, Findings::strict())
    }

    /// A scanner that notes what it can read past instead of stopping there; see
    /// [`StreamScanner::into_report`].
    pub fn surveying(start: u64, page_size: PageSize) -> StreamScanner {
        StreamScanner::with_findings(start, page_size, Findings::collecting())
    }

    fn with_findings(start: u64, page_size: PageSize, findings: Findings) -> StreamScanner {
        let machine = Machine {
            phase: Phase::Preamble,
            at: start,
            page_size,
            variant: BlockListVariant::default(),
            ram_id: 0,
            list: BlockListBuilder::default(),
            lengths: Vec::new(),
            names: HashMap::new(),
            current: None,
            findings,
            early: 0,
        };
        StreamScanner { machine, carry: Vec::new(), carry_used: 0 }
    }

    /// Takes bytes until an event is complete or the input is used up.
    ///
    /// # Errors
    /// The fault at which the stream cannot be read on; the same one from then on.
    pub fn step<'a>(&'a mut self, input: &'a [u8]) -> Result<ScanStep<'a>, Fault> {
        self.carry.drain(..self.carry_used);
        self.carry_used = 0;
        if self.is_done() {
            return Ok(ScanStep { consumed: 0, event: None });
        }
        let mut consumed = 0;
        let (found, start, len) = loop {
            let in_carry = !self.carry.is_empty();
            let source =
                if in_carry { self.carry.as_slice() } else { input.get(consumed..).unwrap_or_default() };
            match self.machine.parse(source) {
                Ok((found, len)) => {
                    self.machine.at += len as u64;
                    let start = consumed;
                    match (in_carry, &found) {
                        (true, Found::Nothing) => drop(self.carry.drain(..len)),
                        (true, _) => self.carry_used = len,
                        (false, _) => consumed += len,
                    }
                    if !matches!(found, Found::Nothing) {
                        break (found, start, len);
                    }
                }
                Err(DecodeError::Incomplete { needed, .. }) => {
                    // `needed` is what the item lacks at least, so the carry never runs past its end by
                    // more than the byte that a preamble looks ahead.
                    let rest = input.get(consumed..).unwrap_or_default();
                    let wanted =
                        if in_carry { usize::try_from(needed).unwrap_or(usize::MAX) } else { rest.len() };
                    let taken = rest.get(..wanted).unwrap_or(rest);
                    consumed += taken.len();
                    self.carry.extend_from_slice(taken);
                    if !in_carry || taken.is_empty() {
                        return Ok(ScanStep { consumed, event: None });
                    }
                }
                Err(DecodeError::Fault(fault)) => {
                    self.machine.phase = Phase::Failed(fault.clone());
                    return Err(fault);
                }
            }
        };
        let event = match found {
            Found::Nothing => None,
            Found::Event(event) => Some(event),
            Found::Page { block, offset, data_at } => {
                let source = if self.carry_used > 0 {
                    self.carry.get(data_at..len)
                } else {
                    input.get(start + data_at..start + len)
                };
                let data = source.unwrap_or_default();
                Some(Event::Page { block, offset, at: self.machine.at - data.len() as u64, data })
            }
        };
        Ok(ScanStep { consumed, event })
    }

    /// Passes a window and hands every event in it to `on_event`; gives how much of the window was taken.
    ///
    /// All of it is, unless the device state begins within.
    ///
    /// # Errors
    /// A fault of the stream, or the error of `on_event`.
    pub fn feed<E: From<Fault>>(
        &mut self,
        window: &[u8],
        mut on_event: impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let mut taken = 0;
        loop {
            let step = self.step(window.get(taken..).unwrap_or_default())?;
            taken += step.consumed;
            match step.event {
                Some(event) => on_event(event)?,
                None => return Ok(taken),
            }
        }
    }

    /// Bytes that were taken from the input but are not part of what was scanned.
    ///
    /// Empty but for a background snapshot, whose first FULL head is what tells that RAM is over: its
    /// bytes, which begin where [`Event::DeviceState`] says, may have come in an earlier window.
    pub fn leftover(&self) -> &[u8] {
        self.carry.get(self.carry_used..).unwrap_or_default()
    }

    /// Whether the device state was reached.
    pub fn is_done(&self) -> bool {
        self.machine.phase == Phase::Done
    }

    /// The absolute offset up to which the stream is understood.
    pub fn position(&self) -> u64 {
        self.machine.at
    }

    /// Says that the stream has ended.
    ///
    /// # Errors
    /// A damaged fault, unless the device state was reached.
    pub fn finish(&self) -> Result<(), Fault> {
        match &self.machine.phase {
            Phase::Done | Phase::Ended { .. } => Ok(()),
            Phase::Failed(fault) => Err(fault.clone()),
            _ => {
                let end = self.machine.at + (self.carry.len() - self.carry_used) as u64;
                Err(Fault::damaged(end, "stream", "ends before the RAM section does"))
            }
        }
    }

    /// What a surveying scanner found, the fault that stopped it last.
    pub fn into_report(self) -> Report {
        let failed = match &self.machine.phase {
            Phase::Failed(fault) => Some(fault.clone()),
            _ => None,
        };
        let mut report = self.machine.findings.into_report();
        if let Some(fault) = failed {
            report.push(fault);
        }
        report
    }
}

impl Machine {
    /// Reads one piece from the front of `source`, which stands at `self.at`.
    fn parse(&mut self, source: &[u8]) -> Result<(Found, usize), DecodeError> {
        match &self.phase {
            // The commonest first: one record a page.
            Phase::Records { last } => {
                let last = *last;
                self.record(source, last)
            }
            Phase::Preamble => self.preamble(source),
            Phase::Items(progress) => {
                let progress = *progress;
                self.item(source, progress)
            }
            Phase::SetupTotal => {
                let mut cursor = Cursor::new(source, self.at);
                self.list = decode_total(&mut cursor)?;
                self.phase = self.after_block();
                Ok((Found::Nothing, cursor.consumed()))
            }
            Phase::SetupBlocks => {
                let mut cursor = Cursor::new(source, self.at);
                let entry = decode_block_entry(&mut cursor, self.variant)?;
                self.list.push(entry, self.at, &mut self.findings)?;
                self.phase = self.after_block();
                Ok((Found::Nothing, cursor.consumed()))
            }
            Phase::SetupEnd { flush } => {
                let flush = *flush;
                self.setup_end(source, flush)
            }
            Phase::Footer(progress) => {
                let progress = *progress;
                self.footer(source, progress)
            }
            Phase::Early(open) => {
                let open = open.clone();
                self.early(source, *open)
            }
            Phase::Ended { ram_ended } => {
                let event = Event::DeviceState { at: self.at, ram_ended: *ram_ended };
                self.phase = Phase::Done;
                Ok((Found::Event(event), 0))
            }
            Phase::Done => Ok((Found::Nothing, 0)),
            Phase::Failed(fault) => Err(fault.clone().into()),
        }
    }

    fn preamble(&mut self, source: &[u8]) -> Result<(Found, usize), DecodeError> {
        let (preamble, len) = decode_preamble(source, self.at)?;
        self.variant = BlockListVariant::of(preamble.configuration.as_ref());
        if let Some(configuration) = &preamble.configuration {
            if configuration.is_mapped_ram() {
                let problem = "the stream has its pages at fixed offsets: read it as a mapped-ram image";
                return Err(Fault::unsupported(self.at, "configuration", problem).into());
            }
            self.page_size = configuration.page_size().unwrap_or(self.page_size);
        }
        self.phase = Phase::Items(Progress::NoRam);
        Ok((Found::Event(Event::Preamble(preamble)), len))
    }

    fn item(&mut self, source: &[u8], progress: Progress) -> Result<(Found, usize), DecodeError> {
        let (item, len) = decode_item(source, self.at)?;
        let at = self.at;
        let event = match item {
            Item::Section(header) => return self.section(header, progress, len),
            Item::Part { section_id } | Item::End { section_id } => {
                if progress == Progress::NoRam || section_id != self.ram_id {
                    let problem = format!("section {section_id} was not started");
                    return Err(Fault::damaged(at, "PART or END", problem).into());
                }
                let last = matches!(item, Item::End { .. });
                self.phase = Phase::Records { last };
                if last { Event::End { section_id } } else { Event::Part { section_id } }
            }
            Item::Command(command) => {
                match command {
                    Command::PostcopyAdvise(_) if self.variant == BlockListVariant::IgnoreShared => {
                        let problem = "announces postcopy, which excludes `x-ignore-shared`";
                        return Err(Fault::damaged(at, "command", problem).into());
                    }
                    Command::PostcopyAdvise(_) => self.variant = BlockListVariant::Postcopy,
                    Command::OpenReturnPath | Command::Ping(_) | Command::SwitchoverStart => {}
                    // What follows these is a conversation, not an image.
                    _ => {
                        let problem = "belongs to a postcopy or COLO stream, which is no image";
                        return Err(Fault::unsupported(at, "command", problem).into());
                    }
                }
                Event::Command(command)
            }
            Item::Eof => {
                return Err(Fault::damaged(at, "end mark", "stands before the end of the RAM section").into());
            }
            Item::Footer { section_id } => {
                let problem = format!("closes section {section_id}, but no section is open");
                return Err(Fault::damaged(at, "footer", problem).into());
            }
            Item::VmDescription { .. } => {
                return Err(Fault::damaged(at, "vmdescription", "stands before the end mark").into());
            }
        };
        Ok((Found::Event(event), len))
    }

    fn section(
        &mut self,
        header: SectionHeader,
        progress: Progress,
        len: usize,
    ) -> Result<(Found, usize), DecodeError> {
        let at = self.at;
        match (header.kind, progress) {
            (SectionKind::Start, Progress::NoRam) if header.idstr == RAM_SECTION => {
                if header.version_id != RAM_SECTION_VERSION {
                    let problem = format!("version {} is not {RAM_SECTION_VERSION}", header.version_id);
                    return Err(Fault::unsupported(at, "RAM section", problem).into());
                }
                self.ram_id = header.section_id;
                self.phase = Phase::SetupTotal;
                Ok((Found::Event(Event::Section(header)), len))
            }
            (SectionKind::Start, _) if header.idstr == RAM_SECTION => {
                Err(Fault::damaged(at, "RAM section", "is started twice").into())
            }
            // A background snapshot never ends RAM: its device state follows the last PART. The head is
            // left for whoever reads that.
            (SectionKind::Full, Progress::Iterating) => {
                self.phase = Phase::Done;
                Ok((Found::Event(Event::DeviceState { at, ram_ended: false }), 0))
            }
            (SectionKind::Full, Progress::NoRam | Progress::SetUp) => {
                self.early += 1;
                if self.early > EARLY_SECTIONS_MAX {
                    let problem = format!("is one more than {EARLY_SECTIONS_MAX} before the RAM");
                    return Err(Fault::damaged(at, format!("section `{}`", header.idstr), problem).into());
                }
                let payload_at = at + len as u64;
                self.phase =
                    Phase::Early(Box::new(OpenSection { header, header_at: at, payload_at, progress }));
                Ok((Found::Nothing, len))
            }
            _ => {
                let field = format!("section `{}`", header.idstr);
                let problem =
                    "hands its state over in pieces without lengths, which only QEMU can tell apart";
                Err(Fault::unsupported(at, field, problem).into())
            }
        }
    }

    fn early(&mut self, source: &[u8], open: OpenSection) -> Result<(Found, usize), DecodeError> {
        let OpenSection { header, header_at, payload_at, progress } = open;
        if source.is_empty() {
            return Err(DecodeError::Incomplete { offset: self.at, field: "early section", needed: 1 });
        }
        // One byte more than the limit is taken, wherever windows end, so that any division fails alike.
        let left = (EARLY_SECTION_LEN_MAX as u64 + 1).saturating_sub(self.at - payload_at);
        if left == 0 {
            let problem = format!("has no end within {EARLY_SECTION_LEN_MAX:#x} bytes");
            return Err(Fault::unsupported(header_at, format!("section `{}`", header.idstr), problem).into());
        }
        let ram_id = (progress != Progress::NoRam).then_some(self.ram_id);
        match early::front(source, self.at, header.section_id, ram_id)? {
            Front::Payload(len) => Ok((Found::Nothing, len.min(left as usize))),
            Front::Footer => {
                let end = self.at + SECTION_FOOTER_LEN as u64;
                let section = DeviceSection {
                    section_id: header.section_id,
                    idstr: header.idstr,
                    instance_id: header.instance_id,
                    version_id: header.version_id,
                    header_at,
                    payload: FileRange { start: payload_at, end: self.at },
                    end,
                };
                self.phase = Phase::Items(progress);
                Ok((Found::Event(Event::Early(section)), SECTION_FOOTER_LEN))
            }
        }
    }

    fn after_block(&self) -> Phase {
        if self.list.is_complete() { Phase::SetupEnd { flush: false } } else { Phase::SetupBlocks }
    }

    fn setup_end(&mut self, source: &[u8], flush: bool) -> Result<(Found, usize), DecodeError> {
        let mut cursor = Cursor::new(source, self.at);
        match cursor.be64("end of the RAM setup")? {
            RAM_SAVE_FLAG_MULTIFD_FLUSH if !flush => {
                self.phase = Phase::SetupEnd { flush: true };
                Ok((Found::Nothing, cursor.consumed()))
            }
            RAM_SAVE_FLAG_EOS => {
                let setup = std::mem::take(&mut self.list).finish(flush);
                self.lengths = setup.blocks.iter().map(|block| block.used_length).collect();
                self.names =
                    setup.blocks.iter().enumerate().map(|(i, block)| (block.name.clone(), i)).collect();
                self.phase = Phase::Footer(Progress::SetUp);
                Ok((Found::Event(Event::Blocks(setup)), cursor.consumed()))
            }
            word => {
                let problem = format!("{word:#x} is neither a flush nor an end");
                Err(Fault::damaged(self.at, "end of the RAM setup", problem).into())
            }
        }
    }

    fn record(&mut self, source: &[u8], last: bool) -> Result<(Found, usize), DecodeError> {
        let mut cursor = Cursor::new(source, self.at);
        let word = cursor.be64("RAM record")?;
        let offset = word & !RAM_FLAGS_MASK;
        let kind = word & RAM_FLAGS_MASK & !RAM_SAVE_FLAG_CONTINUE;
        match kind {
            RAM_SAVE_FLAG_PAGE => {
                let block = self.block_of(word, &mut cursor)?;
                let data_at = cursor.consumed();
                cursor.bytes(self.page_size.bytes() as usize, "page")?;
                Ok(match self.checked(block, offset)? {
                    Some(block) => (Found::Page { block, offset, data_at }, cursor.consumed()),
                    None => (Found::Nothing, cursor.consumed()),
                })
            }
            RAM_SAVE_FLAG_ZERO => {
                let block = self.block_of(word, &mut cursor)?;
                let fill = cursor.u8("zero page's fill byte")?;
                if fill != 0 {
                    let problem = format!("the page is filled with {fill:#04x}");
                    self.findings.note(Fault::unsupported(self.at, "zero page", problem))?;
                }
                Ok(match self.checked(block, offset)? {
                    Some(block) => (Found::Event(Event::Zero { block, offset }), cursor.consumed()),
                    None => (Found::Nothing, cursor.consumed()),
                })
            }
            RAM_SAVE_FLAG_MULTIFD_FLUSH if word == kind => {
                Ok((Found::Event(Event::Flush), cursor.consumed()))
            }
            RAM_SAVE_FLAG_EOS if word == kind => {
                self.phase = Phase::Footer(if last { Progress::Ended } else { Progress::Iterating });
                Ok((Found::Event(Event::Eos), cursor.consumed()))
            }
            _ => Err(refused_record(word, self.at).into()),
        }
    }

    /// The block of a record, `None` where it names one that is not in the list.
    ///
    /// The memory of the last block is changed only by [`Machine::checked`], once the record is complete:
    /// an incomplete one is parsed again.
    fn block_of(&self, word: u64, cursor: &mut Cursor<'_>) -> Result<Named, DecodeError> {
        if word & RAM_SAVE_FLAG_CONTINUE != 0 {
            return Ok(match self.current {
                Some(block) => Named::Known(block),
                None => Named::Unknown(Fault::damaged(self.at, "RAM record", "continues no block")),
            });
        }
        let name = cursor.counted_string("RAM record's block")?;
        Ok(match self.names.get(name.as_str()) {
            Some(block) => Named::Known(*block),
            None => {
                Named::Unknown(Fault::damaged(self.at, "RAM record", format!("block `{name}` is unknown")))
            }
        })
    }

    fn checked(&mut self, block: Named, offset: u64) -> Result<Option<usize>, Fault> {
        let block = match block {
            Named::Known(block) => block,
            Named::Unknown(fault) => {
                self.current = None;
                self.findings.note(fault)?;
                return Ok(None);
            }
        };
        self.current = Some(block);
        let length = self.lengths.get(block).copied().unwrap_or(0);
        let page = self.page_size.bytes();
        // Lengths are at most 2^52, so the subtraction is the only arithmetic that could go wrong.
        if length < page || offset > length - page || offset & (page - 1) != 0 {
            let problem = format!("offset {offset:#x} is no page of a block of {length:#x} bytes");
            self.findings.note(Fault::damaged(self.at, "RAM record", problem))?;
            return Ok(None);
        }
        Ok(Some(block))
    }

    fn footer(&mut self, source: &[u8], progress: Progress) -> Result<(Found, usize), DecodeError> {
        let (item, len) = match decode_item(source, self.at) {
            Err(DecodeError::Fault(_)) => (None, 0),
            other => other.map(|(item, len)| (Some(item), len))?,
        };
        let Some(Item::Footer { section_id }) = item else {
            let problem = "has no footer, as machine types before 2.4 write it";
            return Err(Fault::unsupported(self.at, "RAM section", problem).into());
        };
        if section_id != self.ram_id {
            let problem = format!("closes section {section_id}, but {} is open", self.ram_id);
            self.findings.note(Fault::damaged(self.at, "footer", problem))?;
        }
        self.phase = match progress {
            Progress::Ended => Phase::Ended { ram_ended: true },
            other => Phase::Items(other),
        };
        Ok((Found::Event(Event::Footer { section_id }), len))
    }
}

enum Named {
    Known(usize),
    Unknown(Fault),
}

/// Why a record's word is not taken.
pub(crate) fn refused_record(word: u64, at: u64) -> Fault {
    let kind = word & RAM_FLAGS_MASK & !RAM_SAVE_FLAG_CONTINUE;
    let unsupported = |what: &'static str| Fault::unsupported(at, "RAM record", what);
    match kind {
        RAM_SAVE_FLAG_XBZRLE => unsupported("is a difference (xbzrle), which no image holds"),
        RAM_SAVE_FLAG_HOOK => unsupported("is RDMA's"),
        RAM_SAVE_FLAG_COMPRESS_PAGE => unsupported("is a compressed page of QEMU before 9.1"),
        RAM_SAVE_FLAG_FULL => unsupported("has a flag that is obsolete since 2009"),
        _ => Fault::damaged(at, "RAM record", format!("{word:#x} has no known combination of flags")),
    }
}
