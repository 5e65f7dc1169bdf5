//! Finding the sections in a blob of device state.
//!
//! A FULL section carries no length: `04 id idstr instance version`, a payload that only its device
//! understands, `7e id`. Two witnesses tell where payloads end: the sizes in a vmdescription, and the
//! demand that behind every footer a well-formed section, or the end, follows. The second is a search:
//! all places that could be a footer are listed in one pass, then the ways from the start to the end are
//! counted from the back. One way is an answer; more are not, since a guest chooses bytes of its own
//! device state.

use std::collections::{HashMap, HashSet};

use crate::{DecodeError, Fault, FileRange, IdStr};

use super::format::*;
use super::vmdesc::{self, Located, VmDescription};
use super::{Command, Item, SectionHeader, SectionKind, decode_item, decode_preamble};

/// A FULL section of the device state, by absolute offsets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSection {
    /// The sender's number for the handler.
    pub section_id: u32,
    /// The handler's name.
    pub idstr: IdStr,
    /// Which of the handlers of that name.
    pub instance_id: u32,
    /// The version of the payload.
    pub version_id: u32,
    /// The offset of the type byte.
    pub header_at: u64,
    /// The payload.
    pub payload: FileRange,
    /// The offset behind the footer.
    pub end: u64,
}

/// What the ends of sections were told by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Witness {
    /// The sizes in a vmdescription, each of which ended at a footer.
    VmDescription,
    /// There is only one way to read the blob.
    OnlyReading,
    /// There are several, but only one in which no section id and no name appears twice.
    DistinctSections,
}

/// The device state of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// The sections, in the order of the stream.
    pub sections: Vec<DeviceSection>,
    /// The offset of the end mark.
    pub eof_at: u64,
    /// The vmdescription behind the end mark, its head included.
    pub vmdesc: Option<FileRange>,
    /// What the ends of sections were told by.
    pub witness: Witness,
}

impl DeviceState {
    /// The section of that name and instance.
    pub fn section(&self, idstr: &str, instance_id: u32) -> Option<&DeviceSection> {
        self.sections.iter().find(|section| section.idstr == idstr && section.instance_id == instance_id)
    }
}

/// Finds the sections of `blob`, which starts at the absolute offset `base`: the FULL sections behind
/// RAM's END, the end mark, and, if there is one, the vmdescription, up to the end of the file.
///
/// # Errors
/// Damaged: no end mark, a section without an end. Unsupported: a blob that can be read in several ways
/// of which none is better, sections without footers.
pub fn split_sections(blob: &[u8], base: u64) -> Result<DeviceState, Fault> {
    Splitter::new(blob, base)?.split()
}

/// Reads the output of `xen-save-devices-state`: a preamble without configuration, then device state.
///
/// # Errors
/// As [`decode_preamble`] and [`split_sections`].
pub fn decode_xen_device_state(bytes: &[u8], base: u64) -> Result<DeviceState, Fault> {
    let (preamble, len) = decode_preamble(bytes, base).map_err(DecodeError::at_end)?;
    if preamble.configuration.is_some() {
        let problem = "a configuration stands where device state alone was expected";
        return Err(Fault::damaged(base.saturating_add(len as u64), "device state", problem));
    }
    split_sections(bytes.get(len..).unwrap_or_default(), base.saturating_add(len as u64))
}

pub(crate) struct Splitter<'a> {
    blob: &'a [u8],
    base: u64,
    vmdesc: Option<FileRange>,
    /// The place of the end mark in the blob.
    eof: usize,
}

/// What stands behind a footer, or at the start.
#[derive(Clone, Debug)]
enum Next {
    End,
    Section { header: SectionHeader, header_at: usize, payload_at: usize },
}

/// A place that may be the footer of a section, with what follows it.
struct Junction {
    at: usize,
    section_id: u32,
    next: Next,
    /// How many ways lead from here to the end; saturates.
    ways: u32,
}

/// The junctions of one section id from which a way leads to the end, from the last to the first.
#[derive(Default)]
struct Candidates {
    /// Index into the junctions.
    junctions: Vec<usize>,
    /// Their places, descending.
    places: Vec<usize>,
    /// The sum of the ways from each and those behind it.
    sums: Vec<u32>,
}

impl Candidates {
    /// How many of them stand at or behind `from`.
    fn reachable(&self, from: usize) -> usize {
        self.places.partition_point(|place| *place >= from)
    }

    fn ways(&self, from: usize) -> u32 {
        self.reachable(from).checked_sub(1).and_then(|i| self.sums.get(i)).copied().unwrap_or(0)
    }
}

impl<'a> Splitter<'a> {
    pub(crate) fn new(blob: &'a [u8], base: u64) -> Result<Splitter<'a>, Fault> {
        let vmdesc = match vmdesc::locate(blob, base) {
            Located::Found(range) => Some(range),
            Located::Absent | Located::TailTooShort => None,
        };
        let end = match vmdesc {
            Some(range) => (range.start - base) as usize,
            None => blob.len(),
        };
        match end.checked_sub(1) {
            Some(eof) if blob.get(eof) == Some(&QEMU_VM_EOF) => Ok(Splitter { blob, base, vmdesc, eof }),
            _ => {
                let at = base.saturating_add(end as u64);
                Err(Fault::damaged(at, "device state", "has no end mark before its end"))
            }
        }
    }

    /// The vmdescription behind the end mark, its head included.
    pub(crate) fn vmdesc(&self) -> Option<FileRange> {
        self.vmdesc
    }

    fn offset(&self, at: usize) -> u64 {
        self.base.saturating_add(at as u64)
    }

    fn split(&self) -> Result<DeviceState, Fault> {
        if let Some(range) = self.vmdesc {
            let json = range.start + VMDESCRIPTION_HEADER_LEN as u64;
            let bytes = self.blob.get((json - self.base) as usize..).unwrap_or_default();
            if let Ok(description) = vmdesc::parse(bytes, json)
                && let Ok(sections) = self.by_sizes(&description)
            {
                return Ok(self.state(sections, Witness::VmDescription));
            }
        }
        self.by_search()
    }

    fn state(&self, sections: Vec<DeviceSection>, witness: Witness) -> DeviceState {
        DeviceState { sections, eof_at: self.offset(self.eof), vmdesc: self.vmdesc, witness }
    }

    /// Walks by the sizes of a description; each section must end at its footer, the last before the end.
    pub(crate) fn by_sizes(&self, description: &VmDescription) -> Result<Vec<DeviceSection>, Fault> {
        let mut devices = description.devices.iter();
        let mut sections = Vec::new();
        let mut at = 0;
        loop {
            let (header, header_at, payload_at) = match self.next(at) {
                Some(Next::Section { header, header_at, payload_at }) => (header, header_at, payload_at),
                Some(Next::End) => return Ok(sections),
                None => {
                    return Err(Fault::damaged(self.offset(at), "device state", "no section stands here"));
                }
            };
            let field = || format!("section `{}`", header.idstr);
            // Sections that were written before RAM are described too, but are not in the blob: skip.
            let described = devices.find(|device| {
                header.idstr == device.name.as_str() && header.instance_id == device.instance_id
            });
            let Some(len) = described.and_then(|device| device.payload_len()) else {
                return Err(Fault::damaged(self.offset(header_at), field(), "is not described"));
            };
            let end = usize::try_from(len).ok().and_then(|len| payload_at.checked_add(len));
            let footer = end.and_then(|end| self.footer(end).map(|id| (end, id)));
            match footer {
                Some((end, id)) if id == header.section_id => {
                    sections.push(self.section(header, header_at, payload_at, end));
                    at = end + SECTION_FOOTER_LEN;
                }
                _ => {
                    let problem = format!("does not end after the {len:#x} bytes that are described");
                    return Err(Fault::damaged(self.offset(header_at), field(), problem));
                }
            }
        }
    }

    fn section(
        &self,
        header: SectionHeader,
        header_at: usize,
        payload_at: usize,
        footer_at: usize,
    ) -> DeviceSection {
        DeviceSection {
            section_id: header.section_id,
            idstr: header.idstr,
            instance_id: header.instance_id,
            version_id: header.version_id,
            header_at: self.offset(header_at),
            payload: FileRange { start: self.offset(payload_at), end: self.offset(footer_at) },
            end: self.offset(footer_at + SECTION_FOOTER_LEN),
        }
    }

    /// The id in the footer at `at`, if one stands there, before the end mark.
    fn footer(&self, at: usize) -> Option<u32> {
        match self.blob.get(at..self.eof)?.first_chunk::<SECTION_FOOTER_LEN>()? {
            [QEMU_VM_SECTION_FOOTER, id @ ..] => Some(u32::from_be_bytes(*id)),
            _ => None,
        }
    }

    /// What stands at `at`, where a section or the end may: a plausible head, or the one end mark that
    /// can be the last.
    fn next(&self, at: usize) -> Option<Next> {
        if at == self.eof {
            return Some(Next::End);
        }
        let bytes = self.blob.get(at..self.eof)?;
        let (item, len) = match bytes.first()? {
            &QEMU_VM_SECTION_FULL | &QEMU_VM_COMMAND => decode_item(bytes, self.offset(at)).ok()?,
            _ => return None,
        };
        match item {
            Item::Section(header) if is_plausible(&header) => {
                Some(Next::Section { header, header_at: at, payload_at: at + len })
            }
            // A command may stand between sections; what follows it decides. Only one, so that a blob
            // full of them costs no more.
            Item::Command(Command::SwitchoverStart) if self.blob.get(at + len) != Some(&QEMU_VM_COMMAND) => {
                self.next(at + len)
            }
            _ => None,
        }
    }

    fn by_search(&self) -> Result<DeviceState, Fault> {
        let Some(first) = self.next(0) else {
            return Err(Fault::damaged(self.base, "device state", "does not begin with a section"));
        };
        let (junctions, candidates) = self.count_ways()?;
        let ways = ways_from(&first, &candidates);
        let (path, witness) = match ways {
            0 => return Err(self.first_without_end(first, &junctions)),
            1 => (self.paths(&first, &junctions, &candidates, false)?, Witness::OnlyReading),
            _ => (self.paths(&first, &junctions, &candidates, true)?, Witness::DistinctSections),
        };
        Ok(self.state(path, witness))
    }

    /// Lists all junctions and counts the ways from each to the end.
    fn count_ways(&self) -> Result<(Vec<Junction>, HashMap<u32, Candidates>), Fault> {
        let mut junctions = Vec::new();
        let bytes = self.blob.get(..self.eof).unwrap_or_default();
        let marks = bytes.iter().enumerate().filter(|(_, byte)| **byte == QEMU_VM_SECTION_FOOTER);
        for (at, _) in marks {
            let Some(section_id) = self.footer(at).filter(|id| *id <= SECTION_ID_MAX) else { continue };
            let Some(next) = self.next(at + SECTION_FOOTER_LEN) else { continue };
            if junctions.len() == SECTION_ENDS_MAX {
                let problem = format!("more than {SECTION_ENDS_MAX} places look like the end of a section");
                return Err(Fault::unsupported(self.offset(at), "device state", problem));
            }
            junctions.push(Junction { at, section_id, next, ways: 0 });
        }
        let mut candidates: HashMap<u32, Candidates> = HashMap::new();
        for (index, junction) in junctions.iter_mut().enumerate().rev() {
            junction.ways = ways_from(&junction.next, &candidates);
            if junction.ways > 0 {
                let list = candidates.entry(junction.section_id).or_default();
                list.junctions.push(index);
                list.places.push(junction.at);
                list.sums.push(list.sums.last().copied().unwrap_or(0).saturating_add(junction.ways));
            }
        }
        Ok((junctions, candidates))
    }

    /// Follows the ways from the start to the end. With `distinct`, those on which a section id or a name
    /// appears twice are passed over, and there must be exactly one other.
    fn paths(
        &self,
        first: &Next,
        junctions: &[Junction],
        candidates: &HashMap<u32, Candidates>,
        distinct: bool,
    ) -> Result<Vec<DeviceSection>, Fault> {
        let mut found: Option<Vec<DeviceSection>> = None;
        let mut path: Vec<Frame<'_>> = Vec::new();
        let mut seen_ids: HashSet<u32> = HashSet::new();
        let mut seen_names: HashSet<(&IdStr, u32)> = HashSet::new();
        let mut next = Some(first);
        for _ in 0..SECTION_PATHS_MAX.max(2 * junctions.len()) {
            match next.take() {
                Some(Next::End) => {
                    let sections: Vec<DeviceSection> = path
                        .iter()
                        .filter_map(|f| {
                            let footer = junctions.get(f.footer?)?;
                            Some(self.section(f.header.clone(), f.header_at, f.payload_at, footer.at))
                        })
                        .collect();
                    if !distinct {
                        return Ok(sections);
                    }
                    if let Some(other) = found.replace(sections) {
                        let differ = other.iter().zip(found.iter().flatten()).find(|(a, b)| a != b);
                        return Err(self.ambiguous(differ));
                    }
                }
                Some(Next::Section { header, header_at, payload_at }) => {
                    let name = (&header.idstr, header.instance_id);
                    let is_new = !seen_ids.contains(&header.section_id) && !seen_names.contains(&name);
                    if is_new || !distinct {
                        seen_ids.insert(header.section_id);
                        seen_names.insert(name);
                        let left = candidates
                            .get(&header.section_id)
                            .map_or(&[][..], |c| c.junctions.get(..c.reachable(*payload_at)).unwrap_or(&[]));
                        path.push(Frame {
                            header,
                            header_at: *header_at,
                            payload_at: *payload_at,
                            left,
                            footer: None,
                        });
                    }
                }
                None => {}
            }
            // Go on from the deepest section that has an end left to try; the nearest end first.
            while let Some(frame) = path.last_mut() {
                if let Some((nearest, rest)) = frame.left.split_last() {
                    frame.left = rest;
                    frame.footer = Some(*nearest);
                    next = junctions.get(*nearest).map(|junction| &junction.next);
                    break;
                }
                seen_ids.remove(&frame.header.section_id);
                seen_names.remove(&(&frame.header.idstr, frame.header.instance_id));
                path.pop();
            }
            if next.is_none() {
                return found.ok_or_else(|| self.ambiguous(None));
            }
        }
        Err(self.ambiguous(None))
    }

    fn ambiguous(&self, differ: Option<(&DeviceSection, &DeviceSection)>) -> Fault {
        match differ {
            Some((a, b)) if a.header_at == b.header_at => Fault::unsupported(
                a.header_at,
                format!("section `{}`", a.idstr),
                format!("may end at {:#x} or at {:#x}", a.payload.end, b.payload.end),
            ),
            _ => Fault::unsupported(self.base, "device state", "can be read in several ways"),
        }
    }

    /// The fault of a blob that leads nowhere: the section at which the nearest ends run out.
    fn first_without_end(&self, first: Next, junctions: &[Junction]) -> Fault {
        let mut ends: HashMap<u32, Vec<usize>> = HashMap::new();
        for (index, junction) in junctions.iter().enumerate() {
            ends.entry(junction.section_id).or_default().push(index);
        }
        let mut next = first;
        // Each step goes forward in the blob, so the junctions bound the steps.
        while let Next::Section { header, header_at, payload_at } = next {
            let nearest = ends.get(&header.section_id).and_then(|list| {
                let behind = |index: &usize| junctions.get(*index).is_some_and(|j| j.at < payload_at);
                list.get(list.partition_point(behind)).and_then(|index| junctions.get(*index))
            });
            match nearest {
                Some(junction) => next = junction.next.clone(),
                None => {
                    let field = format!("section `{}`", header.idstr);
                    return Fault::damaged(self.offset(header_at), field, "has no end");
                }
            }
        }
        Fault::damaged(self.base, "device state", "has no reading that reaches its end")
    }
}

/// A section on the way that is being followed.
struct Frame<'j> {
    header: &'j SectionHeader,
    header_at: usize,
    payload_at: usize,
    /// The ends that are left to try, the farthest first.
    left: &'j [usize],
    /// The end that is being tried.
    footer: Option<usize>,
}

fn ways_from(next: &Next, candidates: &HashMap<u32, Candidates>) -> u32 {
    match next {
        Next::End => 1,
        Next::Section { header, payload_at, .. } => {
            candidates.get(&header.section_id).map_or(0, |list| list.ways(*payload_at))
        }
    }
}

/// Whether a head that was found by searching can be one: section ids and versions are small counters,
/// and names are printable ASCII.
pub(super) fn is_plausible(header: &SectionHeader) -> bool {
    header.kind == SectionKind::Full
        && header.section_id <= SECTION_ID_MAX
        && header.version_id <= SECTION_VERSION_MAX
        && header.idstr.bytes().all(|byte| (0x20..0x7f).contains(&byte))
}
