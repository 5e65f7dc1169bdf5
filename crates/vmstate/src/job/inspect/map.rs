//! Where guest memory is in an image, and what changed from one image to another.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use page::{PageCount, PageIndex, PageRange, PageSize, RamBlock};

use crate::source::{FileExtents, Format, Image, Place, Places, Stored, decompressed, open_image};
use crate::{Error, Kind, Result};

/// How much is read at once.
const CHUNK: u64 = 1 << 20;

/// How an image is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSettings {
    /// Where in its file the image starts.
    pub offset: u64,
    /// Whether pages are read to find those that are all zero. Without, they are zero where the image says so and
    /// where the file has a hole.
    pub scan: bool,
}

/// What is known of a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MapKind {
    /// Bytes that are not all zero, or were not looked at.
    Data,
    /// In the image, and all zero.
    Zero,
    /// Not in the image: reads as zero.
    Hole,
    /// The same bytes in both images, not all zero.
    Same,
    /// Other bytes than before.
    Changed,
    /// Zero before, bytes now.
    Appeared,
    /// Bytes before, zero now.
    Vanished,
    /// Zero in both images.
    Empty,
}

impl MapKind {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            MapKind::Data => "data",
            MapKind::Zero => "zero",
            MapKind::Hole => "hole",
            MapKind::Same => "same",
            MapKind::Changed => "changed",
            MapKind::Appeared => "appeared",
            MapKind::Vanished => "vanished",
            MapKind::Empty => "empty",
        }
    }
}

/// Where the bytes of a run are in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilePlace {
    /// The absolute offset of the first page.
    pub offset: u64,
    /// From one page to the next: the size of a page, or more where something stands between.
    pub stride: u64,
}

/// Pages of one block that are alike, at most a megabyte of them where they were read.
#[derive(Clone, Copy, Debug)]
pub struct MapRun<'a> {
    /// Which pages.
    pub range: PageRange,
    /// What they are.
    pub kind: MapKind,
    /// Where they are in the file, if they are and there is one file.
    pub place: Option<FilePlace>,
    bytes: Option<PageBytes<'a>>,
}

impl MapRun<'_> {
    /// The bytes of the page that many behind the first; `None` where it was not read.
    pub fn page(&self, index: u64) -> Option<&[u8]> {
        self.bytes.as_ref().map(|bytes| bytes.page(index))
    }
}

/// Pages in a buffer, apart from one another as in the file.
#[derive(Clone, Copy, Debug)]
struct PageBytes<'a> {
    bytes: &'a [u8],
    stride: u64,
    size: u64,
}

impl<'a> PageBytes<'a> {
    fn page(&self, index: u64) -> &'a [u8] {
        let start = (index * self.stride).min(self.bytes.len() as u64) as usize;
        let end = (index * self.stride + self.size).min(self.bytes.len() as u64) as usize;
        &self.bytes[start..end]
    }

    fn behind(self, pages: u64) -> PageBytes<'a> {
        let start = (pages * self.stride).min(self.bytes.len() as u64) as usize;
        PageBytes { bytes: &self.bytes[start..], ..self }
    }
}

/// Who is told what is where.
pub trait MapVisitor {
    /// A block begins; its runs follow from its first page to its last.
    fn block(&mut self, block: &RamBlock);
    /// The next pages of the block.
    fn run(&mut self, run: &MapRun<'_>);
}

/// An open image, for its map.
#[derive(Debug)]
pub struct MappedImage {
    /// What the places of the pages are offsets of.
    file: File,
    /// Whether that is not the image, but what came out of it.
    is_compressed: bool,
    path: PathBuf,
    image: Image,
}

impl MappedImage {
    /// Opens an image by vmstate or by QEMU, in any format that is read. One that is compressed is decompressed into a
    /// file without a name, in `TMPDIR` or /var/tmp.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`] at the first fault, with file, offset and field; [`Kind::Io`].
    pub fn open(path: &Path, offset: u64) -> Result<MappedImage> {
        let mut file = open_image(path)?;
        let again = file.try_clone().map_err(|error| cannot_read(path, error))?;
        let image = Image::from_file(again, path, offset)?;
        let is_compressed = image.payload().compressed().is_some();
        if is_compressed {
            let ram_bytes = image.blocks().iter().fold(0, |sum: u64, block| sum.saturating_add(block.length));
            file = decompressed(&file, path, image.payload(), ram_bytes)?;
        }
        Ok(MappedImage { image, file, is_compressed, path: path.to_owned() })
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.image.format()
    }

    /// The machine type, if the image records one.
    pub fn machine(&self) -> Option<String> {
        self.image.configuration().map(|configuration| configuration.machine.as_str().to_owned())
    }

    /// The RAM blocks, in the order of the image.
    pub fn blocks(&self) -> Vec<RamBlock> {
        self.image.blocks()
    }

    /// Reads the bytes of a run into `buffer`; `len` is the length of its block.
    fn read<'a>(
        &self,
        place: &Place,
        block: &RamBlock,
        buffer: &'a mut Vec<u8>,
    ) -> Result<Option<PageBytes<'a>>> {
        let Stored::Data { at, stride } = place.stored else { return Ok(None) };
        let size = block.page_size.bytes();
        let last = place.range.end.0 - 1;
        // The last page of a block may be there in part.
        let last_len = size.min(block.length - last * size);
        let len = (place.range.count().0 - 1) * stride + last_len;
        buffer.resize(len as usize, 0);
        self.file.read_exact_at(buffer, at).map_err(|error| cannot_read(&self.path, error))?;
        Ok(Some(PageBytes { bytes: buffer, stride, size }))
    }
}

fn cannot_read(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("cannot read {}", path.display()), error)
}

/// Tells what is where in an image. Beside what opening it takes, memory is needed for one bit a page of a mapped-ram
/// image, or for the runs of pages of a stream.
///
/// # Errors
/// [`Kind::Io`].
pub fn map(mapped: &MappedImage, settings: MapSettings, visitor: &mut dyn MapVisitor) -> Result<()> {
    for (index, block) in mapped.blocks().iter().enumerate() {
        visitor.block(block);
        let mut walk = Walk {
            mapped,
            block,
            settings,
            extents: FileExtents::new(&mapped.file, u64::MAX),
            buffer: Vec::new(),
        };
        for place in mapped.image.places(index)? {
            walk.place(place, visitor)?;
        }
    }
    Ok(())
}

struct Walk<'a> {
    mapped: &'a MappedImage,
    block: &'a RamBlock,
    settings: MapSettings,
    extents: FileExtents<'a>,
    buffer: Vec<u8>,
}

impl Walk<'_> {
    fn place(&mut self, place: Place, visitor: &mut dyn MapVisitor) -> Result<()> {
        let mut rest = Some(place);
        while let Some(place) = rest {
            rest = self.front(place, visitor)?;
        }
        Ok(())
    }

    /// Tells of the first pages, and returns the others.
    fn front(&mut self, place: Place, visitor: &mut dyn MapVisitor) -> Result<Option<Place>> {
        // Pages of a compressed image are nowhere in its file.
        let is_compressed = self.mapped.is_compressed;
        let tell = |kind, place: &Place, bytes| {
            let at = if is_compressed { None } else { file_place(place) };
            MapRun { range: place.range, kind, place: at, bytes }
        };
        let size = self.block.page_size.bytes();
        let Stored::Data { at, stride } = place.stored else {
            let kind = if place.stored == Stored::Zero { MapKind::Zero } else { MapKind::Hole };
            visitor.run(&tell(kind, &place, None));
            return Ok(None);
        };
        let (extent_end, is_data) = self.extents.at(at);
        let pages_within = (extent_end - at) / stride;
        if !is_data && stride == size && pages_within > 0 {
            let (front, rest) = place.split(PageIndex(place.range.start.0.saturating_add(pages_within)));
            visitor.run(&tell(MapKind::Zero, &front, None));
            return Ok(rest);
        }
        if !self.settings.scan {
            let upto = place.range.start.0.saturating_add(pages_within.max(1));
            let (front, rest) = place.split(PageIndex(upto));
            visitor.run(&tell(MapKind::Data, &front, None));
            return Ok(rest);
        }
        let (front, rest) = place.split(PageIndex(place.range.start.0 + chunk_pages(self.block.page_size)));
        let Some(bytes) = self.mapped.read(&front, self.block, &mut self.buffer)? else { return Ok(rest) };
        let kind = |page| if is_zero(bytes.page(page)) { MapKind::Zero } else { MapKind::Data };
        alike(front.range.count(), kind, |first, end, kind| {
            let page = |index| PageIndex(front.range.start.0 + index);
            // `split` keeps what is before the end, so of nothing before the first page it makes an empty front.
            let (_, from) = front.split(page(first));
            let (part, _) = from.unwrap_or(front).split(page(end));
            visitor.run(&tell(kind, &part, Some(bytes.behind(first))));
        });
        Ok(rest)
    }
}

fn file_place(place: &Place) -> Option<FilePlace> {
    match place.stored {
        Stored::Data { at, stride } => Some(FilePlace { offset: at, stride }),
        Stored::Zero | Stored::Absent => None,
    }
}

fn chunk_pages(size: PageSize) -> u64 {
    (CHUNK / size.bytes()).max(1)
}

/// Hands runs of pages of one kind to `on_run`: the first page, the page behind the last, the kind.
fn alike(pages: PageCount, kind: impl Fn(u64) -> MapKind, mut on_run: impl FnMut(u64, u64, MapKind)) {
    let mut first = 0;
    let mut this = None;
    for page in 0..=pages.0 {
        let next = (page < pages.0).then(|| kind(page));
        if next == this {
            continue;
        }
        if let Some(kind) = this {
            on_run(first, page, kind);
        }
        (first, this) = (page, next);
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // A block of 64 bytes is looked at without a branch.
    bytes.chunks(64).all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Tells what changed from one image to another: blocks are matched by their names, and pages that only one image has
/// are compared with zero. Every page that is in an image is read.
///
/// # Errors
/// [`Kind::Incompatible`] where a block's pages have other sizes; [`Kind::Io`].
pub fn map_changes(before: &MappedImage, after: &MappedImage, visitor: &mut dyn MapVisitor) -> Result<()> {
    let (old, new) = (before.blocks(), after.blocks());
    let find = |blocks: &[RamBlock], name: &str| blocks.iter().position(|block| block.name == name);
    for (index, block) in old.iter().enumerate() {
        changes(before, Some(index), after, find(&new, &block.name), visitor)?;
    }
    for (index, block) in new.iter().enumerate() {
        if find(&old, &block.name).is_none() {
            changes(before, None, after, Some(index), visitor)?;
        }
    }
    Ok(())
}

/// One image's part of a comparison of blocks.
struct Side<'a> {
    mapped: &'a MappedImage,
    block: Option<RamBlock>,
    places: Places,
    /// The run that is next, or `None` beyond the end of the block.
    rest: Option<Place>,
    buffer: Vec<u8>,
}

impl<'a> Side<'a> {
    fn new(mapped: &'a MappedImage, index: Option<usize>) -> Result<Side<'a>> {
        let block = index.and_then(|index| mapped.blocks().into_iter().nth(index));
        // There is no block of that number, so no image has a page of it.
        let mut places = mapped.image.places(index.unwrap_or(usize::MAX))?;
        let rest = places.next();
        Ok(Side { mapped, block, places, rest, buffer: Vec::new() })
    }

    /// How far the next run reaches.
    fn end(&self) -> Option<u64> {
        self.rest.map(|place| place.range.end.0)
    }

    /// Takes the pages up to `end`.
    fn take(&mut self, end: u64) -> Result<Option<PageBytes<'_>>> {
        let Some(place) = self.rest else { return Ok(None) };
        let (front, rest) = place.split(PageIndex(end));
        self.rest = rest.or_else(|| self.places.next());
        match &self.block {
            Some(block) => self.mapped.read(&front, block, &mut self.buffer),
            None => Ok(None),
        }
    }
}

fn changes(
    before: &MappedImage,
    old: Option<usize>,
    after: &MappedImage,
    new: Option<usize>,
    visitor: &mut dyn MapVisitor,
) -> Result<()> {
    let (mut old, mut new) = (Side::new(before, old)?, Side::new(after, new)?);
    let both = [&old.block, &new.block].into_iter().flatten().max_by_key(|block| block.length).cloned();
    let Some(block) = both else { return Ok(()) };
    if let (Some(a), Some(b)) = (&old.block, &new.block)
        && a.page_size != b.page_size
    {
        let clause = format!(
            "`{}` has pages of {:#x} bytes in {}, of {:#x} in {}",
            a.name,
            a.page_size.bytes(),
            before.path.display(),
            b.page_size.bytes(),
            after.path.display()
        );
        return Err(Error::new(Kind::Incompatible, clause));
    }
    visitor.block(&block);
    let mut at = 0;
    while let Some(end) = [old.end(), new.end()].into_iter().flatten().min() {
        let nothing =
            |side: &Side<'_>| side.rest.is_none_or(|place| !matches!(place.stored, Stored::Data { .. }));
        let is_empty = nothing(&old) && nothing(&new);
        let end = if is_empty { end } else { end.min(at + chunk_pages(block.page_size)) };
        let range = PageRange::new(at, end);
        let (a, b) = (old.take(end)?, new.take(end)?);
        let kind = |page: u64| match (bytes_of(&a, page), bytes_of(&b, page)) {
            (None, None) => MapKind::Empty,
            (None, Some(_)) => MapKind::Appeared,
            (Some(_), None) => MapKind::Vanished,
            (Some(old), Some(new)) if old == new => MapKind::Same,
            (Some(_), Some(_)) => MapKind::Changed,
        };
        if is_empty {
            visitor.run(&MapRun { range, kind: MapKind::Empty, place: None, bytes: None });
        } else {
            alike(range.count(), kind, |first, last, kind| {
                let range = PageRange::new(at + first, at + last);
                visitor.run(&MapRun { range, kind, place: None, bytes: None });
            });
        }
        at = end;
    }
    Ok(())
}

/// The bytes of a page that are not all zero.
fn bytes_of<'a>(pages: &Option<PageBytes<'a>>, page: u64) -> Option<&'a [u8]> {
    pages.as_ref().map(|pages| pages.page(page)).filter(|bytes| !is_zero(bytes))
}

/// A range of a block as `vmstate map` prints it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRange {
    /// The offset in the block, in bytes.
    pub offset: u64,
    /// The length in bytes.
    pub bytes: u64,
    /// What it is.
    pub kind: MapKind,
    /// Where it is in the file.
    pub place: Option<FilePlace>,
}

/// Joins runs that continue one another.
#[derive(Debug, Default)]
pub struct Joiner {
    size: u64,
    length: u64,
    last: Option<MapRange>,
}

impl Joiner {
    /// Begins a block; returns what is left of the one before.
    pub fn block(&mut self, block: &RamBlock) -> Option<MapRange> {
        self.size = block.page_size.bytes();
        self.length = block.length;
        self.last.take()
    }

    /// Adds a run; returns the range before it, if it does not continue that.
    pub fn run(&mut self, run: &MapRun<'_>) -> Option<MapRange> {
        let offset = run.range.start.0 * self.size;
        let end = (run.range.end.0 * self.size).min(self.length);
        let new = MapRange { offset, bytes: end - offset, kind: run.kind, place: run.place };
        if let Some(last) = &mut self.last
            && last.kind == new.kind
            && continues(last, &new, self.size)
        {
            last.bytes += new.bytes;
            return None;
        }
        self.last.replace(new)
    }

    /// What is left.
    pub fn finish(&mut self) -> Option<MapRange> {
        self.last.take()
    }
}

/// Whether `new` is where it would be if `last` went on in the file.
fn continues(last: &MapRange, new: &MapRange, size: u64) -> bool {
    match (last.place, new.place) {
        (None, None) => true,
        (Some(a), Some(b)) => a.stride == b.stride && a.offset + last.bytes / size * a.stride == b.offset,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, end: u64, kind: MapKind, at: Option<u64>) -> MapRun<'static> {
        let place = at.map(|offset| FilePlace { offset, stride: 4104 });
        MapRun { range: PageRange::new(start, end), kind, place, bytes: None }
    }

    #[test]
    fn runs_are_joined_where_they_go_on_in_memory_and_in_the_file() {
        let block = RamBlock { name: "ram".into(), length: (7 << 12) - 96, page_size: PageSize::X86 };
        let mut joiner = Joiner::default();
        assert_eq!(joiner.block(&block), None);
        let mut ranges = Vec::new();
        for run in [
            run(0, 1, MapKind::Data, Some(100)),
            run(1, 3, MapKind::Data, Some(4204)),
            // A page further on in the file than it would be.
            run(3, 4, MapKind::Data, Some(20_000)),
            run(4, 5, MapKind::Zero, Some(24_104)),
            run(5, 6, MapKind::Hole, None),
            run(6, 7, MapKind::Hole, None),
        ] {
            ranges.extend(joiner.run(&run));
        }
        ranges.extend(joiner.finish());
        let told: Vec<_> = ranges
            .iter()
            .map(|range| {
                (range.offset, range.bytes, range.kind.name(), range.place.map(|place| place.offset))
            })
            .collect();
        assert_eq!(
            told,
            [
                (0, 3 << 12, "data", Some(100)),
                (3 << 12, 1 << 12, "data", Some(20_000)),
                (4 << 12, 1 << 12, "zero", Some(24_104)),
                // The last page of a block may be there in part.
                (5 << 12, (2 << 12) - 96, "hole", None),
            ]
        );
    }

    #[test]
    fn pages_are_grouped_by_their_kind() {
        let kinds = [MapKind::Zero, MapKind::Zero, MapKind::Data, MapKind::Zero];
        let mut told = Vec::new();
        alike(PageCount(4), |page| kinds[page as usize], |first, end, kind| told.push((first, end, kind)));
        assert_eq!(told, [(0, 2, MapKind::Zero), (2, 3, MapKind::Data), (3, 4, MapKind::Zero)]);
        alike(PageCount(0), |_| MapKind::Data, |_, _, _| panic!("of nothing there is no run"));
    }

    #[test]
    fn a_page_is_zero_to_its_last_byte() {
        let mut page = vec![0; 4096];
        assert!(is_zero(&page) && is_zero(&[]));
        for at in [0, 63, 64, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }
}
