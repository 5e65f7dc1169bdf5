//! Compare: in what two images of guests differ, whatever their formats.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};

use io::{AlignedBuffer, Cancel, ReadAhead};
use page::{Mask, PageIndex, WINDOW_PAGES};
use serde::Serialize;
use wire::libvirt::Head;
use wire::qemu::DeviceSection;

use super::inspect::SectionReader;
use super::{DirectIo, Observer, Stopwatch};
use crate::source::{
    Format, GuestShape, Input, KnownWindow, OpenedPlaced, PlacedPages, Source, Tail, open_placed,
};
use crate::{Error, Result};

/// How many ranges of pages are told of a block, and how many fields of a section; the rest is counted.
const RANGES_MAX: usize = 1024;
const FIELDS_MAX: usize = 64;
/// How many windows of both images are read ahead, and by how many threads.
const WINDOWS_AHEAD: u64 = 8;
const READERS: usize = 4;

/// One of the images to compare.
#[derive(Clone, Debug)]
pub struct Compared {
    /// The image: a file or a block device.
    pub path: PathBuf,
    /// Where in its file it starts.
    pub offset: u64,
    /// What it is read as; `None` looks at it.
    pub format: Option<Format>,
}

impl Compared {
    /// An image that is a file of its own.
    pub fn new(path: impl Into<PathBuf>) -> Compared {
        Compared { path: path.into(), offset: 0, format: None }
    }
}

/// What to compare.
#[derive(Clone, Debug)]
pub struct CompareSettings {
    /// The two images.
    pub one: Compared,
    /// The other one.
    pub other: Compared,
    /// Whether the pages are compared.
    pub ram: bool,
    /// Whether the device state is compared.
    pub devices: bool,
    /// Device sections and RAM blocks that do not count, by name; a device also by what is behind its last slash. `XML`
    /// and `cookie` are what libvirt's head has.
    pub ignore: Vec<String>,
    /// Whether pages are read past the page cache.
    pub direct_io: DirectIo,
}

impl CompareSettings {
    /// All of two images.
    pub fn new(one: Compared, other: Compared) -> CompareSettings {
        CompareSettings {
            one,
            other,
            ram: true,
            devices: true,
            ignore: Vec::new(),
            direct_io: DirectIo::Auto,
        }
    }

    fn ignores(&self, name: &str) -> bool {
        let is_it = |ignored: &String| {
            name == ignored || name.strip_suffix(ignored.as_str()).is_some_and(|front| front.ends_with('/'))
        };
        self.ignore.iter().any(is_it)
    }
}

/// In what two images differ. The fields are the keys of `vmstate compare --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Whether nothing differs of what was compared.
    pub same: bool,
    /// The formats, which may differ.
    pub formats: [&'static str; 2],
    /// Differences of the machines: what, and how it is in either.
    pub machine: Vec<ValueDifference>,
    /// Differences of what libvirt's heads say, where both images have one.
    pub domain: Vec<TextDifference>,
    /// The blocks that differ.
    pub blocks: Vec<BlockDifference>,
    /// How many bytes of pages were read of both and compared.
    pub compared_bytes: u64,
    /// How many pages differ, in all blocks.
    pub pages_different: u64,
    /// The device sections that differ, in the order of the first image.
    pub sections: Vec<SectionDifference>,
}

/// Something that has a value in either image; `None` where it has none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ValueDifference {
    /// What it is.
    pub name: String,
    /// In the first.
    pub one: Option<String>,
    /// In the second.
    pub other: Option<String>,
    /// Whether the values are bytes, as hexadecimal digits.
    #[serde(skip)]
    pub is_bytes: bool,
}

/// A text of libvirt's head that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TextDifference {
    /// `XML` or `cookie`.
    pub name: &'static str,
    /// Its length in either; `None` where there is none.
    pub bytes: [Option<u64>; 2],
    /// The offset in the text of the first byte that differs; the end of the shorter where that is the difference.
    pub first: Option<u64>,
}

/// A block whose memory differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockDifference {
    /// Its name.
    pub name: String,
    /// Its length in either; `None` where it has no such block. Pages are compared where both are the same.
    pub bytes: [Option<u64>; 2],
    /// The size of its pages.
    pub page_size: u64,
    /// How many pages differ.
    pub pages: u64,
    /// The offset in the block of the first byte that differs.
    pub first: Option<u64>,
    /// Runs of pages that differ, half-open, in bytes from the start of the block; the first 1,024.
    pub ranges: Vec<[u64; 2]>,
    /// How many more there are.
    pub more_ranges: u64,
    /// Where the last run ends, whether it is told or not.
    #[serde(skip)]
    last_end: u64,
}

/// A device section that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SectionDifference {
    /// Its name.
    pub name: String,
    /// Which of that name.
    pub instance_id: u32,
    /// Its version in either; `None` where there is no such section.
    pub versions: [Option<u32>; 2],
    /// The length of its payload in either.
    pub bytes: [Option<u64>; 2],
    /// The offset in the payload of the first byte that differs; the end of the shorter where that is the difference.
    pub first: Option<u64>,
    /// The fields that differ, where either image or a schema tells what fields there are; the first 64.
    pub fields: Vec<ValueDifference>,
    /// How many more there are.
    pub more_fields: u64,
}

/// Compares two images. A page that is not in an image equals one of zeroes; how an image keeps its pages, what its
/// device state is described by and what was noted about its making do not count. The run state is the one that a
/// restore brings the guest to, whether libvirt's head says it or the device state. XML and cookie are compared where
/// both images have a head of libvirt's and all of them is compared.
///
/// Of a stream, the offsets of its pages are kept in memory, 2 MiB for a GiB of data; one that is compressed is
/// decompressed into a file without a name, in `TMPDIR` or /var/tmp. One that comes out of a pipe is not taken.
///
/// # Errors
/// [`Kind::Damaged`](crate::Kind::Damaged) and [`Kind::Unsupported`](crate::Kind::Unsupported) at the first fault of
/// either, with file, offset and field; [`Kind::Misuse`](crate::Kind::Misuse) for a pipe; [`Kind::Io`](crate::Kind::Io),
/// [`Kind::Interrupted`](crate::Kind::Interrupted).
pub fn compare(settings: &CompareSettings, cancel: &Cancel, observer: &dyn Observer) -> Result<Comparison> {
    let mut watch = Stopwatch::start(observer);
    watch.phase("open");
    let open = |image: &Compared| {
        let input = Input::open(&image.path, image.offset, settings.direct_io, cancel)?;
        open_placed(input, image.format)
    };
    let OpenedPlaced { format: one_format, source: mut one, pages: one_pages } = open(&settings.one)?;
    let OpenedPlaced { format: other_format, source: mut other, pages: other_pages } = open(&settings.other)?;
    let mut comparison = Comparison {
        same: false,
        formats: [one_format.name(), other_format.name()],
        machine: machine(one.shape(), other.shape()),
        domain: Vec::new(),
        blocks: Vec::new(),
        compared_bytes: 0,
        pages_different: 0,
        sections: Vec::new(),
    };
    if let (Some(one), Some(other), true, true) =
        (one.domain(), other.domain(), settings.ram, settings.devices)
    {
        comparison.domain = domain(one, other);
        comparison.domain.retain(|difference| !settings.ignores(difference.name));
    }
    if settings.devices {
        watch.phase("devices");
        let lifted = [Lifted::of(&mut *one)?, Lifted::of(&mut *other)?];
        let sections = [lifted[0].sections(&lifted[1])?, lifted[1].sections(&lifted[0])?];
        comparison.sections = section_differences(sections, settings);
    }
    if settings.ram {
        watch.phase("ram");
        let sides = [(one.shape(), one_pages), (other.shape(), other_pages)];
        compare_ram(sides, settings, &mut comparison, cancel, &mut watch)?;
    }
    comparison.same = comparison.machine.is_empty()
        && comparison.domain.is_empty()
        && comparison.blocks.is_empty()
        && comparison.sections.is_empty();
    Ok(comparison)
}

/// Compares what the configurations say, but for how pages are kept.
fn machine(one: &GuestShape, other: &GuestShape) -> Vec<ValueDifference> {
    let facts = |shape: &GuestShape| {
        let configuration = shape.plain_configuration();
        let capabilities = configuration.as_ref().map(|configuration| {
            let names: Vec<_> = configuration.capabilities.iter().map(|name| name.as_str()).collect();
            names.join(", ")
        });
        let uuid = configuration.as_ref().and_then(|configuration| configuration.uuid);
        [
            ("machine", configuration.map(|configuration| configuration.machine.as_str().to_owned())),
            ("capabilities", capabilities.filter(|names| !names.is_empty())),
            ("uuid", uuid.map(|uuid| uuid.iter().map(|byte| format!("{byte:02x}")).collect())),
            ("page size", Some(shape.page_size.bytes().to_string())),
        ]
    };
    let pairs = facts(one).into_iter().zip(facts(other));
    let differing = pairs.filter(|((_, one), (_, other))| one != other);
    differing
        .map(|((name, one), (_, other))| ValueDifference {
            name: name.to_owned(),
            one,
            other,
            is_bytes: false,
        })
        .collect()
}

/// Compares what two heads of libvirt's say of the domain, but for its run state, which is that of the devices.
fn domain(one: &Head, other: &Head) -> Vec<TextDifference> {
    let texts = |head: &Head| [("XML", Some(head.xml.clone())), ("cookie", head.cookie.clone())];
    let pairs = texts(one).into_iter().zip(texts(other)).filter(|((_, one), (_, other))| one != other);
    pairs
        .map(|((name, one), (_, other))| TextDifference {
            name,
            bytes: [&one, &other].map(|text| text.as_ref().map(|text| text.len() as u64)),
            first: match (&one, &other) {
                (Some(one), Some(other)) => first_difference(one.as_bytes(), other.as_bytes()),
                _ => None,
            },
        })
        .collect()
}

/// A device section with its fields.
struct Section {
    name: String,
    instance_id: u32,
    version: u32,
    payload: Vec<u8>,
    /// The fields, where something tells them.
    fields: Option<Vec<FlatField>>,
}

/// The path of a field, and its value.
#[derive(Clone, PartialEq, Eq)]
struct FlatField {
    name: String,
    value: String,
    is_bytes: bool,
}

/// The device state of an image, taken out of it.
struct Lifted {
    path: PathBuf,
    tail: Tail,
    sections: Vec<(DeviceSection, Vec<u8>)>,
}

impl Lifted {
    fn of(source: &mut dyn Source) -> Result<Lifted> {
        let path = source.path().to_owned();
        let tail = source.tail()?.settled(&path)?;
        let early = source.shape().early.iter();
        let mut sections: Vec<_> =
            early.map(|early| (early.section.clone(), early.payload().to_vec())).collect();
        for section in tail.devices(&path)?.sections {
            let payload = tail.part(section.payload).to_vec();
            sections.push((section, payload));
        }
        Ok(Lifted { path, tail, sections })
    }

    /// The sections, their fields told by what the image itself says, or the other one of a section of that name and
    /// version where it accounts for every byte.
    fn sections(&self, other: &Lifted) -> Result<Vec<Section>> {
        let mut reader = SectionReader::of_tail(&self.tail, &self.path)?;
        if let Some(description) = other.tail.vmdescription(&other.path)? {
            reader.describe_by(description);
        }
        let mut told = Vec::new();
        for (section, payload) in &self.sections {
            reader.section(section, payload, &mut |report| {
                let fields = match &report.content {
                    super::SectionContent::Fields(_, fields) => {
                        let mut flat = Vec::new();
                        flatten(fields, "", &mut flat);
                        Some(flat)
                    }
                    super::SectionContent::Bytes(_) => None,
                };
                told.push(Section {
                    name: report.name.to_owned(),
                    instance_id: report.instance_id,
                    version: report.version,
                    payload: payload.clone(),
                    fields,
                });
            });
        }
        Ok(told)
    }
}

/// The fields as paths and values, structs and arrays unfolded.
fn flatten(fields: &wire::qemu::fields::Fields<'_>, prefix: &str, flat: &mut Vec<FlatField>) {
    for field in &fields.fields {
        let index = field.index.map_or_else(String::new, |index| format!("[{index}]"));
        flatten_value(&field.value, &format!("{prefix}{}{index}", field.name), flat);
    }
    for part in &fields.subsections {
        flatten(&part.content, &format!("{prefix}{}.", part.name), flat);
    }
}

fn flatten_value(value: &wire::qemu::fields::Value<'_>, path: &str, flat: &mut Vec<FlatField>) {
    use wire::qemu::fields::Value;
    match value {
        Value::Struct(fields) => flatten(fields, &format!("{path}."), flat),
        Value::Array(values) => {
            let each = values.iter().enumerate();
            each.for_each(|(i, value)| flatten_value(value, &format!("{path}[{i}]"), flat));
        }
        plain => flat.push(FlatField {
            name: path.to_owned(),
            value: plain.to_string(),
            is_bytes: matches!(plain, Value::Bytes(_)),
        }),
    }
}

fn section_differences(
    [one, mut other]: [Vec<Section>; 2],
    settings: &CompareSettings,
) -> Vec<SectionDifference> {
    let mut differences = Vec::new();
    for section in one {
        let is_it = |o: &Section| (&o.name, o.instance_id) == (&section.name, section.instance_id);
        let found = other.iter().position(is_it).map(|at| other.remove(at));
        differences.extend(section_difference(Some(&section), found.as_ref()));
    }
    differences.extend(other.iter().filter_map(|section| section_difference(None, Some(section))));
    differences.retain(|difference| !settings.ignores(&difference.name));
    differences
}

fn section_difference(one: Option<&Section>, other: Option<&Section>) -> Option<SectionDifference> {
    let named = one.or(other)?;
    let versions = [one, other].map(|section| section.map(|section| section.version));
    let bytes = [one, other].map(|section| section.map(|section| section.payload.len() as u64));
    let first = match (one, other) {
        (Some(one), Some(other)) => first_difference(&one.payload, &other.payload),
        _ => None,
    };
    if versions[0] == versions[1] && bytes[0] == bytes[1] && first.is_none() {
        return None;
    }
    let described = |section: Option<&Section>| section.and_then(|section| section.fields.clone());
    let mut fields = match (described(one), described(other)) {
        (Some(one), Some(other)) => field_differences(one, other),
        _ => Vec::new(),
    };
    let more_fields = fields.len().saturating_sub(FIELDS_MAX) as u64;
    fields.truncate(FIELDS_MAX);
    Some(SectionDifference {
        name: named.name.clone(),
        instance_id: named.instance_id,
        versions,
        bytes,
        first,
        fields,
        more_fields,
    })
}

/// The offset of the first byte in which two payloads differ; where one goes on behind the other, that is it.
fn first_difference(one: &[u8], other: &[u8]) -> Option<u64> {
    let differing = one.iter().zip(other).position(|(a, b)| a != b);
    let end = (one.len() != other.len()).then_some(one.len().min(other.len()));
    differing.or(end).map(|at| at as u64)
}

/// Names are unique but where a list has many elements: those are told apart by the order in which they come.
fn field_differences(one: Vec<FlatField>, other: Vec<FlatField>) -> Vec<ValueDifference> {
    let mut values: HashMap<String, VecDeque<FlatField>> = HashMap::new();
    let order: Vec<String> = other.iter().map(|field| field.name.clone()).collect();
    for field in other {
        values.entry(field.name.clone()).or_default().push_back(field);
    }
    let mut differences = Vec::new();
    for field in one {
        let theirs = values.get_mut(&field.name).and_then(VecDeque::pop_front);
        if theirs.as_ref() != Some(&field) {
            let is_bytes = field.is_bytes && theirs.as_ref().is_none_or(|theirs| theirs.is_bytes);
            let other = theirs.map(|theirs| theirs.value);
            differences.push(ValueDifference { name: field.name, one: Some(field.value), other, is_bytes });
        }
    }
    for name in order {
        if let Some(FlatField { value, is_bytes, .. }) = values.get_mut(&name).and_then(VecDeque::pop_front) {
            differences.push(ValueDifference { name, one: None, other: Some(value), is_bytes });
        }
    }
    differences
}

type Side<'a> = (&'a GuestShape, std::sync::Arc<dyn PlacedPages>);

fn compare_ram(
    [one, other]: [Side<'_>; 2],
    settings: &CompareSettings,
    comparison: &mut Comparison,
    cancel: &Cancel,
    watch: &mut Stopwatch<'_>,
) -> Result<()> {
    let page = one.0.page_size.bytes();
    let mut reader = PairReader::start([one.1.clone(), other.1.clone()], page)?;
    let lengths = |shape: &GuestShape, name: &str| {
        shape.blocks.iter().position(|block| block.name == name).map(|at| (at, shape.blocks[at].used_length))
    };
    let mut names: Vec<&str> = one.0.blocks.iter().map(|block| block.name.as_str()).collect();
    names.extend(
        other.0.blocks.iter().map(|block| block.name.as_str()).filter(|name| lengths(one.0, name).is_none()),
    );
    for name in names {
        if settings.ignores(name) {
            continue;
        }
        let found = [lengths(one.0, name), lengths(other.0, name)];
        let mut difference = BlockDifference {
            name: name.to_owned(),
            bytes: found.map(|found| found.map(|(_, bytes)| bytes)),
            page_size: page,
            pages: 0,
            first: None,
            ranges: Vec::new(),
            more_ranges: 0,
            last_end: 0,
        };
        let mut is_same = difference.bytes[0] == difference.bytes[1];
        // Pages of different sizes do not lie side by side.
        if let ([Some((a, length)), Some((b, _))], true) =
            (found, is_same && one.0.page_size == other.0.page_size)
        {
            for pair in pairs([windows(&*one.1, a)?, windows(&*other.1, b)?]) {
                if cancel.is_cancelled() {
                    return Err(Error::interrupted());
                }
                while reader.is_full() {
                    reader.take(page, length, &mut difference, comparison, watch)?;
                }
                reader.push(PairJob { blocks: [a, b], pair });
            }
            while reader.take(page, length, &mut difference, comparison, watch)? {}
            is_same = difference.pages == 0;
        }
        if !is_same {
            comparison.pages_different += difference.pages;
            comparison.blocks.push(difference);
        }
    }
    Ok(())
}

/// The windows of a block in which it has data, 40 bytes for a MiB of it.
fn windows(pages: &dyn PlacedPages, block: usize) -> Result<Vec<(PageIndex, Mask)>> {
    let mut windows = Vec::new();
    pages.windows(block, &mut |KnownWindow { first, data, .. }| {
        if !data.is_empty() {
            windows.push((first, data));
        }
        Ok(())
    })?;
    Ok(windows)
}

/// The pages of a window that either image has.
#[derive(Clone, Copy, Debug)]
struct Pair {
    first: PageIndex,
    data: [Mask; 2],
}

/// Merges the windows of both, which are in order.
fn pairs([one, other]: [Vec<(PageIndex, Mask)>; 2]) -> impl Iterator<Item = Pair> {
    let (mut one, mut other) = (one.into_iter().peekable(), other.into_iter().peekable());
    std::iter::from_fn(move || {
        let first = match (one.peek(), other.peek()) {
            (Some((a, _)), Some((b, _))) => *a.min(b),
            (Some((first, _)), None) | (None, Some((first, _))) => *first,
            (None, None) => return None,
        };
        let at_first = |windows: &mut std::iter::Peekable<std::vec::IntoIter<(PageIndex, Mask)>>| {
            windows.next_if(|(at, _)| *at == first).map_or(Mask::EMPTY, |(_, mask)| mask)
        };
        Some(Pair { first, data: [at_first(&mut one), at_first(&mut other)] })
    })
}

struct PairJob {
    blocks: [usize; 2],
    pair: Pair,
}

/// Reads windows of both images ahead: the first half of a buffer is the first image's.
struct PairReader {
    ahead: ReadAhead<PairJob>,
    spare: Vec<AlignedBuffer>,
    window_len: usize,
}

impl PairReader {
    fn start(sides: [std::sync::Arc<dyn PlacedPages>; 2], page: u64) -> Result<PairReader> {
        let window_len = (WINDOW_PAGES * page) as usize;
        let fill = move |job: &PairJob, buffer: &mut AlignedBuffer| {
            let Pair { first, data } = job.pair;
            let either = data[0].or(data[1]);
            for (((side, block), mask), half) in
                sides.iter().zip(job.blocks).zip(data).zip(buffer.chunks_mut(window_len))
            {
                let at = |index: usize| index * page as usize;
                // What only the other has is compared with zeroes.
                either.runs().for_each(|(start, end)| half[at(start)..at(end)].fill(0));
                mask.runs().try_for_each(|(start, end)| {
                    side.read_at(block, (first.0 + start as u64) * page, &mut half[at(start)..at(end)])
                })?;
            }
            Ok(())
        };
        let ahead = ReadAhead::start(READERS, fill)
            .map_err(|error| Error::io("a thread that reads cannot be started", error))?;
        Ok(PairReader { ahead, spare: Vec::new(), window_len })
    }

    fn is_full(&self) -> bool {
        self.ahead.pending() >= WINDOWS_AHEAD
    }

    fn push(&mut self, job: PairJob) {
        let buffer = self.spare.pop().unwrap_or_else(|| AlignedBuffer::new(2 * self.window_len));
        self.ahead.push(job, buffer);
    }

    /// Compares the oldest window that was read; whether there was one.
    fn take(
        &mut self,
        page: u64,
        length: u64,
        difference: &mut BlockDifference,
        comparison: &mut Comparison,
        watch: &Stopwatch<'_>,
    ) -> Result<bool> {
        let Some(filled) = self.ahead.take() else { return Ok(false) };
        filled
            .result
            .map_err(|error| Error::io(format!("cannot read the pages of `{}`", difference.name), error))?;
        let Pair { first, data } = filled.job.pair;
        let (one, other) = filled.buffer.split_at(self.window_len);
        let either = data[0].or(data[1]);
        let bytes = u64::from(either.count()) * page;
        comparison.compared_bytes += bytes;
        watch.progress.counters().bytes_written.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        for (start, end) in either.runs() {
            for index in start..end {
                let range = index * page as usize..(index + 1) * page as usize;
                let (one, other) = (&one[range.clone()], &other[range]);
                if one != other {
                    let at = (first.0 + index as u64) * page;
                    let within = first_difference(one, other).unwrap_or(0);
                    difference.note(at, (at + page).min(length), at + within);
                }
            }
        }
        self.spare.push(filled.buffer);
        Ok(true)
    }
}

impl BlockDifference {
    /// Notes a page that differs; they come in order.
    fn note(&mut self, start: u64, end: u64, first: u64) {
        self.pages += 1;
        self.first = self.first.or(Some(first));
        let goes_on = self.pages > 1 && self.last_end == start;
        self.last_end = end;
        if goes_on {
            if let (Some(last), 0) = (self.ranges.last_mut(), self.more_ranges) {
                last[1] = end;
            }
        } else if self.ranges.len() < RANGES_MAX {
            self.ranges.push([start, end]);
        } else {
            self.more_ranges += 1;
        }
    }
}

/// Compares two whole images.
///
/// # Errors
/// As [`compare`].
pub fn compare_files(one: &Path, other: &Path, cancel: &Cancel) -> Result<Comparison> {
    compare(&CompareSettings::new(Compared::new(one), Compared::new(other)), cancel, &super::Unobserved)
}
