//! A stream as a source: read once from front to back, out of a file, a pipe, or whatever decompresses it.

use std::fs::File;
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use page::PageSize;
use wire::qemu::{DeviceSection, Event, StreamScanner, check_early, split_sections};
use wire::{Fault, FileRange};

use super::ends::{OfMemory, end_of, end_within, find_end};
use super::extents::{TAIL_LEN_MAX, unreadable};
use super::flow::{FlowingPage, FlowingPages, GuestShape, LiftedSection, Pages, Source, Tail};
use super::mapped_ram::{faulty, faulty_within};
use super::{Bounds, Format};
use crate::{Error, Kind, Result};

/// How much of what is behind the pages is read at first where nothing tells how much there is. Four times as much
/// each time.
const TAIL_FIRST: u64 = 4 << 20;

/// A stream whose block list was read.
pub struct StreamSource {
    path: PathBuf,
    from: Box<dyn BufRead + Send>,
    scanner: StreamScanner,
    shape: GuestShape,
    origin: Origin,
    /// What is known of the length of all pages before they come.
    data_bytes_max: Option<u64>,
    /// Where the device state begins, once RAM has ended.
    tail_at: Option<u64>,
}

/// What the bytes of a stream come out of, as far as that tells where they end.
#[derive(Debug)]
pub enum Origin {
    /// A file or device, within bounds that may reach beyond the stream.
    File(File, Bounds),
    /// A pipe, which is read no further than needed.
    Pipe,
    /// A decompressor, which is read to its end: it tells whether all before was whole.
    Decompressor,
}

/// What a step of the stream says to whoever reads it.
enum Said {
    Head(wire::qemu::Preamble),
    Ram(wire::qemu::SectionHeader),
    Blocks(Vec<wire::qemu::BlockEntry>),
    Early(DeviceSection),
    Pages,
    DeviceState(u64),
    Other,
    End,
}

impl StreamSource {
    /// Reads the stream up to its first page. The offset `start`, at which its first byte stands in its file, and
    /// `path` are for messages.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`] at the first fault, with file, offset and field; [`Kind::Io`],
    /// [`Kind::Interrupted`].
    pub fn open(
        from: Box<dyn BufRead + Send>,
        path: &Path,
        start: u64,
        origin: Origin,
    ) -> Result<StreamSource> {
        let mut source = StreamSource {
            path: path.to_owned(),
            from,
            origin,
            scanner: StreamScanner::new(start, PageSize::X86),
            shape: GuestShape {
                configuration: None,
                ram: wire::qemu::SectionHeader::ram(0),
                early: Vec::new(),
                blocks: Vec::new(),
                page_size: PageSize::X86,
            },
            data_bytes_max: None,
            tail_at: None,
        };
        // Everything before the pages: early sections are told by their offsets alone.
        let mut head = Vec::new();
        loop {
            match source.step(Some(&mut head), &mut |_| Ok(()))? {
                Said::Head(preamble) => {
                    if let Some(size) = preamble.configuration.as_ref().and_then(|c| c.page_size()) {
                        source.shape.page_size = size;
                    }
                    source.shape.configuration = preamble.configuration;
                }
                Said::Ram(header) => source.shape.ram = header,
                Said::Blocks(blocks) => source.shape.blocks = blocks,
                Said::Early(section) => {
                    let at =
                        |offset: u64| usize::try_from(offset.saturating_sub(start)).unwrap_or(usize::MAX);
                    let bytes = head.get(at(section.header_at)..at(section.end)).unwrap_or_default().to_vec();
                    source.shape.early.push(LiftedSection { section, bytes });
                }
                Said::Pages => break,
                Said::Other => {}
                // The scanner calls both of them faults before there are pages.
                Said::DeviceState(_) | Said::End => return Err(source.ended()),
            }
        }
        source.shape = source.shape.clone().checked(path)?;
        if let Origin::File(_, bounds) = &source.origin {
            // Every page of data has a word before it. What is behind the stream is not known from it yet, and few
            // pages are sent more than twice.
            let page = source.shape.page_size.bytes();
            let sent = source.shape.ram_bytes().saturating_mul(2);
            source.data_bytes_max = Some((bounds.len() / (page + 8) * page).min(sent));
        }
        Ok(source)
    }

    /// Takes what the stream says next, and appends the bytes that it took to `head`, if that is wanted.
    fn step(
        &mut self,
        head: Option<&mut Vec<u8>>,
        on_page: &mut dyn FnMut(FlowingPage<'_>) -> Result<()>,
    ) -> Result<Said> {
        let path = &self.path;
        let window = self.from.fill_buf().map_err(|error| read_failed(path, error))?;
        if window.is_empty() {
            return Ok(Said::End);
        }
        let at = self.scanner.position();
        let step = match self.scanner.step(window) {
            Ok(step) => step,
            Err(fault) => return Err(self.refused(fault)),
        };
        let consumed = step.consumed;
        if let Some(head) = head {
            head.extend_from_slice(&window[..consumed]);
        }
        let said = match step.event {
            Some(Event::Page { block, offset, at, data }) => {
                on_page(FlowingPage { block, offset, data: Some(data), at })?;
                Said::Other
            }
            Some(Event::Zero { block, offset }) => {
                on_page(FlowingPage { block, offset, data: None, at })?;
                Said::Other
            }
            Some(Event::Preamble(preamble)) => Said::Head(preamble),
            Some(Event::Section(header)) => Said::Ram(header),
            Some(Event::Blocks(setup)) => {
                if setup.multifd_flush {
                    return Err(multifd(path, at));
                }
                Said::Blocks(setup.blocks)
            }
            Some(Event::Flush) => return Err(multifd(path, at)),
            Some(Event::DeviceState { at, .. }) => Said::DeviceState(at),
            Some(Event::Early(section)) => Said::Early(section),
            Some(Event::Part { .. } | Event::End { .. }) => Said::Pages,
            Some(Event::Command(_) | Event::Eos | Event::Footer { .. }) | None => Said::Other,
        };
        self.from.consume(consumed);
        Ok(said)
    }

    /// The error that a fault of the stream is; one that comes of a damaged payload is that of the payload.
    fn refused(&mut self, fault: Fault) -> Error {
        if matches!(self.origin, Origin::Decompressor)
            && let Err(error) = std::io::copy(&mut self.from, &mut std::io::sink())
        {
            return read_failed(&self.path, error);
        }
        self.faulty(fault)
    }

    fn faulty(&self, fault: Fault) -> Error {
        match self.origin {
            Origin::Decompressor => faulty_within(&self.path, fault),
            Origin::File(..) | Origin::Pipe => faulty(&self.path, fault),
        }
    }

    /// The bytes from `at`, where the device state begins, to the end of the stream.
    fn tail_bytes(&mut self, at: u64) -> Result<Vec<u8>> {
        let path = &self.path;
        let failed = |error| read_failed(path, error);
        let mut bytes = self.scanner.leftover().to_vec();
        if let Origin::File(file, bounds) = &self.origin {
            let end = find_end(file, at, bounds.end).map_err(failed)?.map_err(|fault| self.faulty(fault))?;
            if let Some(fault) = unreadable(file, bounds.end, FileRange { start: at, end }) {
                return Err(self.faulty(fault));
            }
            let left = (end - at).saturating_sub(bytes.len() as u64);
            (&mut self.from).take(left).read_to_end(&mut bytes).map_err(failed)?;
            return Ok(bytes);
        }
        let mut wanted = TAIL_FIRST;
        loop {
            let more = wanted.saturating_sub(bytes.len() as u64);
            (&mut self.from).take(more).read_to_end(&mut bytes).map_err(failed)?;
            let end = at.saturating_add(bytes.len() as u64);
            let memory = OfMemory { bytes: &bytes, base: at };
            let found = if (bytes.len() as u64) < wanted {
                end_of(&memory, at, end).map_err(failed)?.map(Some)
            } else if matches!(self.origin, Origin::Pipe) {
                end_within(&memory, at, end).map_err(failed)?
            } else {
                Ok(None)
            };
            if let Some(end) = found.map_err(|fault| self.faulty(fault))? {
                bytes.truncate((end - at) as usize);
                return Ok(bytes);
            }
            if wanted > TAIL_LEN_MAX {
                let problem = format!("more than {TAIL_LEN_MAX:#x} bytes");
                return Err(self.faulty(Fault::unsupported(at, "device state", problem)));
            }
            wanted = (4 * wanted).min(TAIL_LEN_MAX + 1);
        }
    }

    /// The fault of a stream that ends where it may not.
    fn ended(&self) -> Error {
        match self.scanner.finish() {
            Err(fault) => self.faulty(fault),
            Ok(()) => {
                Error::new(Kind::Damaged, format!("{}: the stream has no device state", self.path.display()))
            }
        }
    }
}

/// What a read of a stream failed with; whoever reads may have put an error of ours into one of the system's.
fn read_failed(path: &Path, error: std::io::Error) -> Error {
    match Error::from_within(error) {
        Ok(ours) => ours,
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Error::new(Kind::Damaged, format!("{} became shorter while it was read", path.display()))
        }
        Err(error) => Error::io(format!("cannot read {}", path.display()), error),
    }
}

fn multifd(path: &Path, at: u64) -> Error {
    let problem = "the channels of multifd synchronise here: the pages are in those, not in this stream";
    faulty(path, Fault::unsupported(at, "RAM section", problem))
        .hint("save again without multifd, or with mapped-ram")
}

impl FlowingPages for StreamSource {
    fn for_each(&mut self, on_page: &mut dyn FnMut(FlowingPage<'_>) -> Result<()>) -> Result<()> {
        loop {
            match self.step(None, on_page)? {
                Said::DeviceState(at) => {
                    self.tail_at = Some(at);
                    return Ok(());
                }
                Said::End => return Err(self.ended()),
                _ => {}
            }
        }
    }
}

impl Source for StreamSource {
    fn format(&self) -> Format {
        Format::Stream
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn shape(&self) -> &GuestShape {
        &self.shape
    }

    fn data_bytes_max(&self) -> Result<Option<u64>> {
        Ok(self.data_bytes_max)
    }

    fn pages(&mut self) -> Result<Pages<'_>> {
        Ok(Pages::Flowing(self))
    }

    fn tail(&mut self) -> Result<Tail> {
        let Some(at) = self.tail_at else {
            return Err(Error::new(Kind::Misuse, "the tail of a stream comes behind its pages"));
        };
        let bytes = self.tail_bytes(at)?;
        let path = &self.path;
        let tail = Tail { bytes, at, was_running: None };
        // The lengths of early sections were guesses, which the description confirms or not.
        let early: Vec<_> = self.shape.early.iter().map(|early| early.section.clone()).collect();
        let description = if early.is_empty() { None } else { tail.vmdescription(path)? };
        check_early(&early, description.as_ref()).map_err(|fault| self.faulty(fault))?;
        split_sections(&tail.bytes, tail.at).map_err(|fault| self.faulty(fault))?;
        Ok(tail)
    }
}
