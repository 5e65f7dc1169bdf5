//! Where an image ends, told by itself: nothing in it says how long it is, and a loader reads no byte behind it.
//!
//! The end is that of the vmdescription which has the very sizes of the sections before it. Where an image has none,
//! it is the end mark, if only zeros stand behind that. A guest chooses bytes of its own device state and may write
//! what looks like an end: so the end of the file is believed before any other, and of two other ends neither.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use wire::qemu::format::{
    QEMU_VM_EOF, QEMU_VM_SECTION_FOOTER, QEMU_VM_VMDESCRIPTION, SECTION_FOOTER_LEN, SECTION_HEADER_LEN_MAX,
    VMDESCRIPTION_HEADER_LEN, VMDESCRIPTION_LEN_MAX,
};
use wire::qemu::vmdesc::{self, Located, VmDescription};
use wire::qemu::{Command, Item, SectionKind, decode_item, split_sections};
use wire::{Fault, FileRange};

use super::FileExtents;
use super::extents::{DENSE_ABOVE, TAIL_LEN_MAX};

/// How many bytes are looked through for an end, those in holes of the file not counted.
const SCANNED_MAX: u64 = 256 << 20;
/// How many bytes are looked through at once.
const CHUNK: u64 = 1 << 20;
/// How far behind an end another is looked for; as far as the image's device state is long, if that is more.
const LOOK_ON: u64 = 1 << 20;
/// How many places that look like an end are tried: each may be as long as a description can be.
const ENDS_TRIED_MAX: usize = 256;
/// How many descriptions that do not fit their sections are tried by what else can tell sections apart.
const DOUBTFUL_MAX: usize = 16;
/// How many bytes at the end of the file are looked at first for a description.
const DESCRIPTION_FIRST: u64 = 256 << 10;
/// What an end looks like: the footer of the last section, the end mark, the head of the description, the brace that
/// its JSON begins with.
const END_AND_DESCRIPTION: [u8; 2] = [QEMU_VM_EOF, QEMU_VM_VMDESCRIPTION];
const BEHIND_EOF: u64 = 1 + VMDESCRIPTION_HEADER_LEN as u64;

/// Bytes that are read by their offsets.
pub(super) trait ReadAt {
    /// Reads bytes that are there.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Where the extent that `offset` lies in ends, and whether it is data.
    fn extent(&self, offset: u64) -> (u64, bool);
}

/// Those of a file.
pub(super) struct OfFile<'a> {
    file: &'a File,
    extents: RefCell<FileExtents<'a>>,
}

impl<'a> OfFile<'a> {
    /// A file of `len` bytes.
    pub(super) fn new(file: &'a File, len: u64) -> OfFile<'a> {
        OfFile { file, extents: RefCell::new(FileExtents::new(file, len)) }
    }
}

impl ReadAt for OfFile<'_> {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    fn extent(&self, offset: u64) -> (u64, bool) {
        self.extents.borrow_mut().at(offset)
    }
}

/// Some in memory, of which the first has the offset `base`.
pub(super) struct OfMemory<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) base: u64,
}

impl ReadAt for OfMemory<'_> {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let at = offset.checked_sub(self.base).and_then(|at| usize::try_from(at).ok());
        let found = at.and_then(|at| self.bytes.get(at..)?.get(..bytes.len()));
        bytes.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn extent(&self, _offset: u64) -> (u64, bool) {
        (self.base.saturating_add(self.bytes.len() as u64), true)
    }
}

/// The offset behind the image whose device state begins at `start` of a file of `len` bytes. Where none is found it
/// is the end of the file: whoever reads that finds what is wrong.
///
/// # Errors
/// Unsupported, as the inner result: there are two places of which each can be the end. Those of the system.
pub(super) fn find_end(file: &File, start: u64, len: u64) -> io::Result<Result<u64, Fault>> {
    end_of(&OfFile::new(file, len), start, len)
}

/// As [`find_end`], of any bytes up to the offset `limit`.
pub(super) fn end_of(bytes: &dyn ReadAt, start: u64, limit: u64) -> io::Result<Result<u64, Fault>> {
    if ends_described(bytes, start, limit)? {
        return Ok(Ok(limit));
    }
    let scan = Scan::run(bytes, start, limit)?;
    match scan.only_end(start) {
        Ok(Some(end)) => return Ok(Ok(end)),
        Ok(None) => {}
        Err(fault) => return Ok(Err(fault)),
    }
    // Not every QEMU describes all of its devices, or any: then what can be read at all is taken.
    if splits(bytes, start, limit)? {
        return Ok(Ok(limit));
    }
    for end in &scan.doubtful {
        if is_mostly_described(bytes, start, *end)? {
            return Ok(Ok(*end));
        }
    }
    Ok(Ok(scan.end_before_zeros(bytes, start, limit)?.unwrap_or(limit)))
}

/// The offset behind the image in bytes that go on behind `limit`, if it can be told without these: a description
/// fits, and there are so many bytes behind it that another would have been seen.
///
/// # Errors
/// As [`find_end`].
pub(super) fn end_within(
    bytes: &dyn ReadAt,
    start: u64,
    limit: u64,
) -> io::Result<Result<Option<u64>, Fault>> {
    let scan = Scan::run(bytes, start, limit)?;
    Ok(scan.only_end(start).map(|end| end.filter(|end| looked_at_behind(start, *end) <= limit)))
}

fn looked_at_behind(start: u64, end: u64) -> u64 {
    end.saturating_add(LOOK_ON.max(end - start))
}

/// Whether the bytes up to `limit` end with a description of exactly the sections from `start` on.
fn ends_described(bytes: &dyn ReadAt, start: u64, limit: u64) -> io::Result<bool> {
    let longest = u64::from(VMDESCRIPTION_LEN_MAX) + VMDESCRIPTION_HEADER_LEN as u64;
    let mut len = DESCRIPTION_FIRST;
    let mut tail = Vec::new();
    loop {
        let from = start.max(limit.saturating_sub(len));
        tail.resize((limit - from) as usize, 0);
        bytes.read_at(&mut tail, from)?;
        match vmdesc::locate(&tail, from) {
            Located::Found(range) => {
                let json = tail.get((range.start - from) as usize + VMDESCRIPTION_HEADER_LEN..);
                let Ok(description) = vmdesc::parse(json.unwrap_or_default(), range.start) else {
                    return Ok(false);
                };
                return match range.start.checked_sub(1) {
                    Some(eof_at) if eof_at >= start => is_chain(bytes, start, eof_at, &description),
                    _ => Ok(false),
                };
            }
            Located::TailTooShort if from > start && len < longest => len = (4 * len).min(longest),
            Located::Absent | Located::TailTooShort => return Ok(false),
        }
    }
}

/// Whether sections of the very sizes that are described lie between `start` and the end mark at `eof_at`.
fn is_chain(bytes: &dyn ReadAt, start: u64, eof_at: u64, description: &VmDescription) -> io::Result<bool> {
    let mut eof = [0];
    bytes.read_at(&mut eof, eof_at)?;
    let mut devices = description.devices.iter();
    let mut head = [0; SECTION_HEADER_LEN_MAX];
    let (mut at, mut is_behind_command) = (start, false);
    while at < eof_at {
        let head = &mut head[..(eof_at - at).min(SECTION_HEADER_LEN_MAX as u64) as usize];
        bytes.read_at(head, at)?;
        let (header, head_len) = match decode_item(head, at) {
            Ok((Item::Section(header), len)) if header.kind == SectionKind::Full => (header, len as u64),
            // As where sections are told apart: one command, not a row of them.
            Ok((Item::Command(Command::SwitchoverStart), len)) if !is_behind_command => {
                is_behind_command = true;
                at += len as u64;
                continue;
            }
            _ => return Ok(false),
        };
        let described = devices
            .find(|device| header.idstr == device.name.as_str() && header.instance_id == device.instance_id);
        let payload_len = described.and_then(|device| device.payload_len());
        let footer_at = payload_len.and_then(|len| len.checked_add(at + head_len));
        let end = footer_at.and_then(|at| at.checked_add(SECTION_FOOTER_LEN as u64));
        let (Some(footer_at), Some(end)) = (footer_at, end.filter(|end| *end <= eof_at)) else {
            return Ok(false);
        };
        let mut footer = [0; SECTION_FOOTER_LEN];
        bytes.read_at(&mut footer, footer_at)?;
        let [kind, id @ ..] = footer;
        if kind != QEMU_VM_SECTION_FOOTER || u32::from_be_bytes(id) != header.section_id {
            return Ok(false);
        }
        (at, is_behind_command) = (end, false);
    }
    Ok(at == eof_at && eof == [QEMU_VM_EOF])
}

/// Whether the bytes between the two offsets can be told apart as device state, whatever tells it.
fn splits(bytes: &dyn ReadAt, start: u64, end: u64) -> io::Result<bool> {
    Ok(read_dense(bytes, start, end)?.is_some_and(|blob| split_sections(&blob, start).is_ok()))
}

/// Whether the bytes between the two offsets can be told apart as device state, and more than half of its sections are
/// as the description at its end says.
fn is_mostly_described(bytes: &dyn ReadAt, start: u64, end: u64) -> io::Result<bool> {
    let Some(blob) = read_dense(bytes, start, end)? else { return Ok(false) };
    let Ok(state) = split_sections(&blob, start) else { return Ok(false) };
    let json_at = state.vmdesc.map_or(end, |range| range.start + VMDESCRIPTION_HEADER_LEN as u64);
    let json = blob.get((json_at - start) as usize..).unwrap_or_default();
    let Ok(description) = vmdesc::parse(json, json_at) else { return Ok(false) };
    let mut devices = description.devices.iter();
    let mut known = 0;
    for section in &state.sections {
        // In the order of the stream, too. What is described further on is not found again.
        let rest = devices.clone();
        let found = devices.find(|device| {
            section.idstr == device.name.as_str() && section.instance_id == device.instance_id
        });
        match found {
            Some(device) => known += usize::from(device.payload_len() == Some(section.payload.len())),
            None => devices = rest,
        }
    }
    Ok(2 * known > state.sections.len())
}

/// Reads what is not too much to be read for a try, nor mostly a hole.
fn read_dense(bytes: &dyn ReadAt, start: u64, end: u64) -> io::Result<Option<Vec<u8>>> {
    let len = end.saturating_sub(start);
    let mut data = 0;
    let mut at = start;
    while len > DENSE_ABOVE && at < end {
        let (extent_end, is_data) = bytes.extent(at);
        let extent_end = extent_end.clamp(at + 1, end);
        data += if is_data { extent_end - at } else { 0 };
        at = extent_end;
    }
    if len > SCANNED_MAX || (len > DENSE_ABOVE && data < len / 2) {
        return Ok(None);
    }
    let mut blob = vec![0; len as usize];
    bytes.read_at(&mut blob, start)?;
    Ok(Some(blob))
}

/// What was seen on the way from the start of device state.
#[derive(Default)]
struct Scan {
    /// The offsets behind descriptions that fit the sections before them: one, or the first two.
    described: Vec<u64>,
    /// Those behind descriptions that can be read.
    doubtful: Vec<u64>,
    /// The offset of the last byte that is not zero.
    last_nonzero: Option<u64>,
    /// Whether all was seen up to the limit.
    is_all: bool,
}

impl Scan {
    fn run(bytes: &dyn ReadAt, start: u64, limit: u64) -> io::Result<Scan> {
        let mut scan = Scan::default();
        let (mut at, mut scanned, mut tried) = (start, 0, 0);
        let mut chunk = Vec::new();
        while at < limit {
            let upto = scan.described.first().map(|end| looked_at_behind(start, *end));
            if scanned >= SCANNED_MAX
                || at - start > TAIL_LEN_MAX
                || tried >= ENDS_TRIED_MAX
                || scan.described.len() > 1
                || upto.is_some_and(|upto| at >= upto)
            {
                return Ok(scan);
            }
            let (end, is_data) = bytes.extent(at);
            let end = end.clamp(at + 1, limit);
            if !is_data {
                // What an end looks like does not reach over a hole, which is a block at least.
                at = end;
                continue;
            }
            let end = end.min(at + CHUNK);
            // The footer may stand before the chunk, and what it is the end of behind.
            let from = at.saturating_sub(SECTION_FOOTER_LEN as u64).max(start);
            let to = (end + BEHIND_EOF).min(limit);
            chunk.resize((to - from) as usize, 0);
            bytes.read_at(&mut chunk, from)?;
            let own = &chunk[(at - from) as usize..(end - from) as usize];
            if let Some(last) = own.iter().rposition(|byte| *byte != 0) {
                scan.last_nonzero = Some(at + last as u64);
            }
            let marks = chunk.windows(2).enumerate().filter(|(_, pair)| *pair == END_AND_DESCRIPTION);
            for (found, _) in marks {
                let eof_at = from + found as u64;
                if !(at..end).contains(&eof_at) || tried >= ENDS_TRIED_MAX {
                    continue;
                }
                if let Some(range) = looks_like_an_end(&chunk, found, from, start).filter(|r| r.end <= limit)
                {
                    tried += 1;
                    scan.try_end(bytes, start, range)?;
                }
            }
            scanned += end - at;
            at = end;
        }
        scan.is_all = true;
        Ok(scan)
    }

    /// Tries the description at `json`, which stands behind the end mark and its head.
    fn try_end(&mut self, bytes: &dyn ReadAt, start: u64, json: FileRange) -> io::Result<()> {
        let mut text = vec![0; json.len() as usize];
        bytes.read_at(&mut text, json.start)?;
        let Ok(description) = vmdesc::parse(&text, json.start) else { return Ok(()) };
        if is_chain(bytes, start, json.start - BEHIND_EOF, &description)? {
            self.described.push(json.end);
        } else if self.doubtful.len() < DOUBTFUL_MAX {
            self.doubtful.push(json.end);
        }
        Ok(())
    }

    /// The one end whose description fits, if there is one.
    fn only_end(&self, start: u64) -> Result<Option<u64>, Fault> {
        match self.described.as_slice() {
            [] => Ok(None),
            [end] => Ok(Some(*end)),
            [one, other, ..] => {
                let problem =
                    format!("may end at {one:#x} or at {other:#x}, and a description fits at either");
                Err(Fault::unsupported(start, "device state", problem))
            }
        }
    }

    /// The offset behind the end mark of device state that is described by nothing, if only zeros stand behind it.
    fn end_before_zeros(&self, bytes: &dyn ReadAt, start: u64, limit: u64) -> io::Result<Option<u64>> {
        let Some(last) = self.last_nonzero.filter(|_| self.is_all) else { return Ok(None) };
        // The last footer ends in the number of its section, which may end in zeros itself.
        let behind = (last + 1 + SECTION_FOOTER_LEN as u64).min(limit);
        let Some(blob) = read_dense(bytes, start, behind)? else { return Ok(None) };
        let has_footer = |eof: &usize| {
            let footer = eof.checked_sub(SECTION_FOOTER_LEN).and_then(|at| blob.get(at));
            footer == Some(&QEMU_VM_SECTION_FOOTER)
        };
        let ends = ((last + 1 - start) as usize..blob.len()).filter(has_footer);
        let mut ends = ends.filter(|eof| blob.get(..=*eof).is_some_and(|b| split_sections(b, start).is_ok()));
        match (ends.next(), ends.next()) {
            (Some(eof), None) => Ok(Some(start + eof as u64 + 1)),
            _ => Ok(None),
        }
    }
}

/// Where the JSON of a description is, if the end mark at `found` of `chunk` has a footer before it and the head of one
/// behind; `from` is the offset of the chunk. At the very start of device state no footer is asked for.
fn looks_like_an_end(chunk: &[u8], found: usize, from: u64, start: u64) -> Option<FileRange> {
    let eof_at = from + found as u64;
    let footer = found.checked_sub(SECTION_FOOTER_LEN).and_then(|at| chunk.get(at));
    if eof_at != start && footer != Some(&QEMU_VM_SECTION_FOOTER) {
        return None;
    }
    let (len, rest) = chunk.get(found + 2..)?.split_first_chunk::<4>()?;
    let len = u32::from_be_bytes(*len);
    let is_one = rest.first() == Some(&b'{') && len <= VMDESCRIPTION_LEN_MAX;
    is_one.then(|| FileRange::of_len(eof_at + BEHIND_EOF, u64::from(len))).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const BASE: u64 = 0x1000;

    /// One section of device state and its end mark.
    fn section(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![4, 0, 0, 0, 9, 3];
        bytes.extend(b"dev");
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend(payload);
        bytes.extend([QEMU_VM_SECTION_FOOTER, 0, 0, 0, 9, QEMU_VM_EOF]);
        bytes
    }

    /// A description of it.
    fn description(payload_len: usize) -> Vec<u8> {
        let json = format!(
            r#"{{"devices":[{{"name":"dev","instance_id":0,"version":1,"fields":[{{"name":"data","type":"buffer","size":{payload_len}}}]}}]}}"#
        );
        [&[QEMU_VM_VMDESCRIPTION][..], &(json.len() as u32).to_be_bytes(), json.as_bytes()].concat()
    }

    fn device_state(payload: &[u8]) -> Vec<u8> {
        [section(payload), description(payload.len())].concat()
    }

    fn end(bytes: &[u8]) -> Result<u64, String> {
        let found = end_of(&OfMemory { bytes, base: BASE }, BASE, BASE + bytes.len() as u64).unwrap();
        found.map(|end| end - BASE).map_err(|fault| fault.to_string())
    }

    #[test]
    fn the_end_is_found_whatever_follows() {
        // What a guest may write into a device to look like an end.
        let lure = [&[QEMU_VM_SECTION_FOOTER, 0, 0, 0, 9, 0, 6, 0, 0, 0, 2][..], b"{}"].concat();
        let long = vec![1; 2 * CHUNK as usize - 20];
        for payload in [b"state".to_vec(), lure, vec![QEMU_VM_SECTION_FOOTER; 300], long] {
            let state = device_state(&payload);
            for follows in [vec![], vec![0; 5000], vec![0x7e; 5000], state.clone(), device_state(b"other")] {
                let bytes = [state.clone(), follows].concat();
                assert_eq!(end(&bytes), Ok(state.len() as u64), "{}", payload.len());
            }
        }
        // Nothing is found: as far as there are bytes.
        for bytes in [vec![], vec![QEMU_VM_SECTION_FOOTER; 4096], vec![0; 4096]] {
            assert_eq!(end(&bytes), Ok(bytes.len() as u64));
        }
    }

    #[test]
    fn an_end_is_found_wherever_it_lies_among_the_chunks() {
        for before in CHUNK as usize - 60..CHUNK as usize {
            let state = device_state(&vec![1; before]);
            let bytes = [state.as_slice(), &[0xff; 100]].concat();
            assert_eq!(end(&bytes), Ok(state.len() as u64), "{before}");
        }
    }

    #[test]
    fn what_a_guest_wrote_like_an_end_is_none_where_the_file_ends_well() {
        // Everything of it fits, as far as it goes.
        let forged = [&section(b"1234")[17..], &description(4)].concat();
        let state = device_state(&forged);
        assert_eq!(end(&state), Ok(state.len() as u64));
        let short = (17 + forged.len()) as u64;
        let whole = state.len() as u64;
        let problem = format!(
            "device state at 0x1000: may end at {:#x} or at {:#x}, and a description fits at either",
            BASE + short,
            BASE + whole
        );
        assert_eq!(end(&[state, vec![0; 5000]].concat()), Err(problem));
    }

    #[test]
    fn without_a_description_only_zeros_may_follow() {
        let state = section(b"state");
        let len = state.len() as u64;
        let with = |follows: &[u8]| end(&[state.as_slice(), follows].concat());
        for zeros in [0, 1, 4, 5, 5000] {
            assert_eq!(with(&vec![0; zeros]), Ok(len), "{zeros}");
        }
        for junk in [&[1][..], &[0, 0, 0, 1], &state, &device_state(b"other")] {
            assert_eq!(with(junk), Ok(len + junk.len() as u64), "it is not known where it ends");
        }
        // A number that ends in zeros stands in the last footer.
        let mut state = section(b"state");
        for at in [4, state.len() - 2] {
            state[at - 2..=at].copy_from_slice(&[9, 0, 0]);
        }
        let bytes = [state.as_slice(), &[0; 100]].concat();
        assert_eq!(end(&bytes), Ok(state.len() as u64));
        // What was cut is not made whole by zeros.
        for cut in 1..len as usize - 1 {
            let bytes = [&section(b"state")[..cut], &[0; 100]].concat();
            assert_eq!(end(&bytes), Ok(cut as u64 + 100), "{cut}");
        }
    }

    /// Sections of as many bytes as their numbers, those in `left_out` not described.
    fn sections(numbers: std::ops::Range<u8>, left_out: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut devices = Vec::new();
        for number in numbers {
            bytes.extend([4, 0, 0, 0, number, 1, b'a' + number, 0, 0, 0, 0, 0, 0, 0, 1]);
            bytes.extend(vec![0xaa; number as usize]);
            bytes.extend([QEMU_VM_SECTION_FOOTER, 0, 0, 0, number]);
            if !left_out.contains(&number) {
                let name = char::from(b'a' + number);
                let field = format!(r#"{{"name":"data","type":"buffer","size":{number}}}"#);
                devices
                    .push(format!(r#"{{"name":"{name}","instance_id":0,"version":1,"fields":[{field}]}}"#));
            }
        }
        let json = format!(r#"{{"devices":[{}]}}"#, devices.join(","));
        bytes.extend([QEMU_VM_EOF, QEMU_VM_VMDESCRIPTION]);
        bytes.extend((json.len() as u32).to_be_bytes());
        bytes.extend(json.as_bytes());
        bytes
    }

    #[test]
    fn a_description_that_leaves_a_device_out_tells_the_end_and_one_of_little_does_not() {
        for left_out in [&[][..], &[2], &[1, 5]] {
            let state = sections(1..6, left_out);
            for follows in [vec![], vec![0; 100], vec![0xff; 100], sections(1..6, &[])] {
                let bytes = [state.as_slice(), &follows].concat();
                assert_eq!(end(&bytes), Ok(state.len() as u64), "{left_out:?}");
            }
        }
        let state = sections(1..6, &[1, 2, 5]);
        assert_eq!(end(&[state.as_slice(), &[0xff; 100]].concat()), Ok(state.len() as u64 + 100));
        // An image that was cut, and behind it what could be its end.
        let cut = &sections(1..6, &[])[..60];
        let junk =
            [&[0xaa; 9][..], &[QEMU_VM_SECTION_FOOTER, 0, 0, 0, 2, 0, 6, 0, 0, 0, 2], b"{}\xff"].concat();
        let bytes = [cut, &junk].concat();
        assert_eq!(end(&bytes), Ok(bytes.len() as u64));
    }

    #[test]
    fn bytes_that_are_still_to_come_are_waited_for() {
        let state = device_state(b"state");
        let within = |behind: u64| {
            let bytes = [state.as_slice(), &vec![0; behind as usize]].concat();
            end_within(&OfMemory { bytes: &bytes, base: BASE }, BASE, BASE + bytes.len() as u64).unwrap()
        };
        assert_eq!(within(LOOK_ON), Ok(Some(BASE + state.len() as u64)));
        assert_eq!((within(LOOK_ON - 1), within(0)), (Ok(None), Ok(None)));
    }

    /// Some bytes, and behind them the same byte over and over, or a hole.
    struct Endless<'a> {
        front: &'a [u8],
        behind: Option<u8>,
        read: Cell<u64>,
    }

    impl ReadAt for Endless<'_> {
        fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
            self.read.set(self.read.get() + bytes.len() as u64);
            let front = self.front.get(offset as usize..).unwrap_or_default();
            let len = front.len().min(bytes.len());
            bytes[..len].copy_from_slice(&front[..len]);
            bytes[len..].fill(self.behind.unwrap_or(0));
            Ok(())
        }

        fn extent(&self, offset: u64) -> (u64, bool) {
            let len = self.front.len() as u64;
            match self.behind {
                None if offset >= len => (u64::MAX, false),
                None => (len, true),
                Some(_) => (u64::MAX, true),
            }
        }
    }

    #[test]
    fn what_is_behind_an_image_is_not_read_but_for_a_little() {
        let described = device_state(b"state");
        let plain = section(b"state");
        for (front, behind) in
            [(&described, Some(0xff)), (&described, Some(0)), (&described, None), (&plain, None)]
        {
            let bytes = Endless { front, behind, read: Cell::new(0) };
            assert_eq!(end_of(&bytes, 0, 1 << 50).unwrap(), Ok(front.len() as u64), "{behind:?}");
            // The end of the file is looked at too, for a description of the greatest length.
            let most = 3 * CHUNK + 3 * u64::from(VMDESCRIPTION_LEN_MAX);
            assert!(bytes.read.get() < most, "{behind:?}: {} bytes", bytes.read.get());
        }
        // Where no end is found, what is looked through has a limit.
        let bytes = Endless { front: &plain, behind: Some(0xff), read: Cell::new(0) };
        assert_eq!(end_of(&bytes, 0, 1 << 50).unwrap(), Ok(1 << 50));
        assert!(bytes.read.get() < SCANNED_MAX + SCANNED_MAX / 4, "{} bytes", bytes.read.get());
    }

    #[test]
    fn the_seeds_of_the_fuzz_target_pass_it() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/image_end");
        let seeds: Vec<_> = std::fs::read_dir(folder).unwrap().collect();
        assert!(seeds.len() >= 4);
        for seed in seeds {
            crate::source::fuzz::image_end(&std::fs::read(seed.unwrap().path()).unwrap());
        }
    }
}
