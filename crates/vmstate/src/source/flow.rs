//! What every format gives of a guest: its shape, its pages, its device state. Sinks take the same three.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use io::{Inflow, ReadPair, Supply};
use page::{Mask, PageIndex, PageSize, RamBlock};
use wire::libvirt::Head;
use wire::qemu::format::{MAPPED_RAM, VMDESCRIPTION_HEADER_LEN, X_IGNORE_SHARED};
use wire::qemu::vmdesc::{self, VmDescription};
use wire::qemu::{
    BlockEntry, Configuration, DeviceSection, DeviceState, SectionHeader, global_state, split_sections,
};

use super::libvirt::effective_run_state;
use super::mapped_ram::faulty;
use super::{Bounds, Format, open_image};
use crate::job::DirectIo;
use crate::{Error, Kind, Result};

/// What stands before the pages of a guest in every format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestShape {
    /// The configuration section, as the image has it; absent in streams of machines that send none.
    pub configuration: Option<Configuration>,
    /// The head of RAM's START section.
    pub ram: SectionHeader,
    /// The sections that other handlers write before the pages go.
    pub early: Vec<LiftedSection>,
    /// The RAM blocks, in the image's order: name and length.
    pub blocks: Vec<BlockEntry>,
    /// The size of the pages that are counted.
    pub page_size: PageSize,
}

/// A device section taken out of an image, byte for byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiftedSection {
    /// Its head, and where in the image it stood.
    pub section: DeviceSection,
    /// All of it, head and footer included.
    pub bytes: Vec<u8>,
}

impl LiftedSection {
    /// The payload.
    pub fn payload(&self) -> &[u8] {
        let DeviceSection { header_at, payload, .. } = &self.section;
        let at = |offset: u64| usize::try_from(offset.saturating_sub(*header_at)).unwrap_or(usize::MAX);
        self.bytes.get(at(payload.start)..at(payload.end)).unwrap_or_default()
    }
}

impl GuestShape {
    /// The early sections, one after the other, as every image has them behind the START of RAM.
    pub fn early_bytes(&self) -> Vec<u8> {
        self.early.iter().flat_map(|early| early.bytes.iter().copied()).collect()
    }

    /// A shape of which all RAM can be had, `path` being for messages.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for an image that leaves shared memory out.
    pub(crate) fn checked(self, path: &Path) -> Result<GuestShape> {
        if self.configuration.as_ref().is_some_and(Configuration::ignores_shared) {
            let clause = format!(
                "{} leaves shared memory out ({X_IGNORE_SHARED}): it is not a whole guest",
                path.display()
            );
            return Err(Error::new(Kind::Unsupported, clause)
                .hint("restore it where that memory is, and save the guest from there"));
        }
        Ok(self)
    }

    /// The configuration without what tells only how the pages are kept.
    pub fn plain_configuration(&self) -> Option<Configuration> {
        self.configuration.clone().map(|configuration| configuration.without_capability(MAPPED_RAM))
    }

    /// The blocks in the vocabulary of pages.
    pub fn ram_blocks(&self) -> impl ExactSizeIterator<Item = RamBlock> {
        self.blocks.iter().map(|block| RamBlock {
            name: block.name.as_str().to_owned(),
            length: block.used_length,
            page_size: self.page_size,
        })
    }

    /// The length of all blocks in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.blocks.iter().fold(0, |sum, block| sum.saturating_add(block.used_length))
    }
}

/// What stands behind the pages in every format: device sections, the end mark, the vmdescription, byte for byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Where in the source the first of them stands, for messages.
    pub at: u64,
    /// Whether libvirt's head says that the guest ran, where there is one: it counts more than what `bytes` record.
    pub was_running: Option<bool>,
}

impl Tail {
    /// The same for whoever does not see libvirt's head: where that has another run state than the device state, the
    /// device state gets it. libvirt stops a guest before it has QEMU save it, so QEMU records that it was paused.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`], with file, offset and field.
    pub fn settled(mut self, path: &Path) -> Result<Tail> {
        let was_running = self.was_running.take();
        if was_running.is_none() {
            return Ok(self);
        }
        let devices = self.devices(path)?;
        let Some(section) = devices.section(global_state::GLOBAL_STATE_SECTION, 0) else { return Ok(self) };
        let range = section.payload;
        let at = |offset: u64| usize::try_from(offset.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let places = at(range.start)..at(range.end);
        let Some(payload) = self.bytes.get_mut(places) else { return Ok(self) };
        let recorded = global_state::run_state(payload).ok();
        let counts = effective_run_state(was_running, recorded);
        if let Some(state) = counts.filter(|state| Some(*state) != recorded) {
            global_state::patch_run_state(payload, state).map_err(|fault| faulty(path, fault))?;
        }
        Ok(self)
    }

    /// The sections, by offsets that count from [`Tail::at`] on as in the source.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`], with file, offset and field.
    pub fn devices(&self, path: &Path) -> Result<DeviceState> {
        split_sections(&self.bytes, self.at).map_err(|fault| faulty(path, fault))
    }

    /// What describes the sections, if the image has that.
    ///
    /// # Errors
    /// [`Kind::Damaged`] where it is no description.
    pub fn vmdescription(&self, path: &Path) -> Result<Option<VmDescription>> {
        let Some(range) = self.devices(path)?.vmdesc else { return Ok(None) };
        let json = self.part(range).get(VMDESCRIPTION_HEADER_LEN..).unwrap_or_default();
        let at = range.start + VMDESCRIPTION_HEADER_LEN as u64;
        match json.is_empty() {
            true => Ok(None),
            false => vmdesc::parse(json, at).map(Some).map_err(|fault| faulty(path, fault)),
        }
    }

    /// The bytes of a range of the source.
    pub fn part(&self, range: wire::FileRange) -> &[u8] {
        let at = |offset: u64| usize::try_from(offset.saturating_sub(self.at)).unwrap_or(usize::MAX);
        self.bytes.get(at(range.start)..at(range.end)).unwrap_or_default()
    }
}

/// Up to 256 pages of a block and what is known of them. Those that are in neither mask are not in the image and
/// read as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownWindow {
    /// The first page, a multiple of [`page::WINDOW_PAGES`].
    pub first: PageIndex,
    /// Pages whose bytes have to be read.
    pub data: Mask,
    /// Pages that the image has, known to be zero without being read.
    pub zero: Mask,
}

/// The pages of an image in which each has a place: they are read in any order, by many threads at once.
pub trait PlacedPages: Send + Sync {
    /// Hands every window of a block in which the image has a page to `on_window`, in order.
    ///
    /// # Errors
    /// Those of the image, and whatever `on_window` says.
    fn windows(&self, block: usize, on_window: &mut dyn FnMut(KnownWindow) -> Result<()>) -> Result<()>;

    /// Reads bytes of pages that [`PlacedPages::windows`] calls data: `bytes` lies within a run of them, and
    /// `offset` counts from the start of the block.
    ///
    /// # Errors
    /// What the system said; `InvalidInput` for a block that is not there.
    fn read_at(&self, block: usize, offset: u64, bytes: &mut [u8]) -> std::io::Result<()>;

    /// Whether these bytes come from a device, past the page cache, so that few long reads are better than many short
    /// ones.
    fn reads_directly(&self) -> bool {
        false
    }

    /// The same for lanes: region `i` is block `i`. Every page that a piece marks is one that is called data.
    ///
    /// # Errors
    /// When no descriptor is left.
    fn supply(&self) -> Result<Arc<dyn Supply>>;
}

/// A page as it comes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowingPage<'a> {
    /// The place of its block in the list.
    pub block: usize,
    /// Its offset in the block: a page's, and within the block.
    pub offset: u64,
    /// Its bytes, one page of them; `None` where it was sent as zero.
    pub data: Option<&'a [u8]>,
    /// Where in the stream its bytes stand, or the record that says that it is zero ended.
    pub at: u64,
}

/// The pages of an image that is read once, from front to back. One that comes again replaces what came before.
pub trait FlowingPages {
    /// Hands every page to `on_page`, in the order of the stream. Called once.
    ///
    /// # Errors
    /// Those of the image, and whatever `on_page` says.
    fn for_each(&mut self, on_page: &mut dyn FnMut(FlowingPage<'_>) -> Result<()>) -> Result<()>;
}

/// The pages of an image, as its format keeps them.
pub enum Pages<'a> {
    /// At places of their own.
    Placed(Arc<dyn PlacedPages>),
    /// One after the other.
    Flowing(&'a mut dyn FlowingPages),
}

/// An open image of any format. What is called in this order is the whole of a guest:
/// [`shape`](Source::shape), [`pages`](Source::pages), [`tail`](Source::tail).
pub trait Source: Send {
    /// The format.
    fn format(&self) -> Format;

    /// The path, for messages.
    fn path(&self) -> &Path;

    /// What stands before the pages; known when the image has been opened.
    fn shape(&self) -> &GuestShape;

    /// The head that libvirt put in front of it, where there is one.
    fn domain(&self) -> Option<&Head> {
        None
    }

    /// Where in its file the image ends, where that is known before it is read.
    fn end(&self) -> Option<u64> {
        None
    }

    /// How many bytes of pages there are at the most, as far as that can be known beforehand.
    ///
    /// # Errors
    /// Those of the image.
    fn data_bytes_max(&self) -> Result<Option<u64>>;

    /// The pages. Those that flow have to be taken before the tail is asked for.
    ///
    /// # Errors
    /// Those of the image.
    fn pages(&mut self) -> Result<Pages<'_>>;

    /// What stands behind the pages; its sections have been told apart, so that it is whole.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`], with file, offset and field.
    fn tail(&mut self) -> Result<Tail>;
}

/// The bytes of an image, before anything is known of them.
pub struct Input {
    /// The path, for messages.
    pub path: PathBuf,
    /// Where the image starts.
    pub start: u64,
    /// The bytes.
    pub bytes: InputBytes,
    /// The switch that ends the waiting.
    pub cancel: io::Cancel,
}

/// How the bytes can be read.
pub enum InputBytes {
    /// At any offset.
    File(ReadPair),
    /// Once, from the image's first byte on.
    Sequential(Box<dyn BufRead + Send>),
}

impl Input {
    /// Opens what the name stands for: a file, a block device, a FIFO, or the standard input (`-`), which is read at
    /// any offset where it is a file.
    ///
    /// # Errors
    /// [`Kind::Io`]; [`Kind::Misuse`] for an offset where there is none, and for what has no bytes.
    pub fn open(path: &Path, start: u64, direct: DirectIo, cancel: &io::Cancel) -> Result<Input> {
        let cannot = |error| Error::io(format!("cannot open {}", path.display()), error);
        let bytes = if Inflow::is_sequential(path) {
            if start != 0 {
                let clause = format!("{}: a pipe has no offsets", path.display());
                return Err(Error::new(Kind::Misuse, clause));
            }
            InputBytes::Sequential(Box::new(Inflow::open(path, cancel).map_err(cannot)?))
        } else {
            let path = if Inflow::is_stdin(path) { Path::new("/dev/stdin") } else { path };
            // It may be a directory, or anything else that cannot be read at offsets.
            let file = open_image(path)?;
            Bounds::of(&file, path, start)?;
            InputBytes::File(ReadPair::open(path, direct.into()).map_err(|error| {
                let unsupported = error.kind() == std::io::ErrorKind::Unsupported;
                if unsupported {
                    Error::new(Kind::Unsupported, format!("{}", path.display())).because(error)
                } else {
                    cannot(error)
                }
            })?)
        };
        Ok(Input { path: path.to_owned(), start, bytes, cancel: cancel.clone() })
    }
}
