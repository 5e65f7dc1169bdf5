//! Where an image is in what it was written into: from an offset, and up to where.
//!
//! A file ends where its image does. A device does not, and nothing in an image tells its length: the end is
//! found by what stands there, the end mark with a description of exactly the sections before it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, fstat, seek};
use wire::mapped_ram::survey::{LayoutSurvey, SurveyStep};
use wire::qemu::format::{QEMU_VM_EOF, QEMU_VM_SECTION_FOOTER, QEMU_VM_VMDESCRIPTION};
use wire::qemu::{Witness, split_sections, vmdesc};

use crate::{Error, Kind, Result};

/// How much device state is looked through at first, in bytes, and how much at most. Four times as much each
/// time.
const WINDOW_FIRST: u64 = 1 << 20;
const WINDOW_MAX: u64 = 256 << 20;
/// What the end of device state looks like: the footer of the last section, the end mark, the head of the
/// description, the brace that its JSON begins with.
const FOOTER_LEN: usize = 5;
/// How many places that look like one are tried: each may be as long as a description can be.
const ENDS_TRIED_MAX: usize = 256;
const DESCRIPTION_HEAD_LEN: usize = 5;

/// Opens an image for reading. What is no file or device is refused, and opening a FIFO does not wait for a
/// writer.
///
/// # Errors
/// [`Kind::Io`]; [`Kind::Misuse`] where it is neither a file nor a block device.
pub fn open_image(path: &Path) -> Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(|error| Error::io(format!("cannot open {}", path.display()), error))?;
    is_device(&file, path)?;
    Ok(file)
}

fn is_device(file: &File, path: &Path) -> Result<bool> {
    let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
    match FileType::from_raw_mode(fstat(file).map_err(cannot)?.st_mode) {
        FileType::RegularFile => Ok(false),
        FileType::BlockDevice => Ok(true),
        _ => {
            let clause = format!("{} is neither a regular file nor a block device", path.display());
            Err(Error::new(Kind::Misuse, clause))
        }
    }
}

/// Where an image is in its file or device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The offset of the image's first byte.
    pub start: u64,
    /// The length of the file, or of the device up to the image's end: all offsets count from the start of
    /// the file.
    pub end: u64,
    /// Whether it is on a block device.
    pub is_device: bool,
}

impl Bounds {
    /// The bounds of what may be an image that starts at `start`.
    ///
    /// # Errors
    /// [`Kind::Misuse`] where it is neither a file nor a block device; [`Kind::Damaged`] where it ends before
    /// `start`.
    pub fn of(file: &File, path: &Path, start: u64) -> Result<Bounds> {
        let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
        let is_device = is_device(file, path)?;
        // A device has no length of its own, but its end can be sought.
        let end = seek(file, SeekFrom::End(0)).map_err(cannot)?;
        if start > end {
            let clause = format!("{} ends at {end:#x}, before the offset {start:#x}", path.display());
            return Err(Error::new(Kind::Damaged, clause));
        }
        Ok(Bounds { start, end, is_device })
    }

    /// How many bytes there are from the start on.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }

    /// The same, but with the end of the mapped-ram image instead of the device's; where no end is found, as
    /// it was: whoever reads on will find what is wrong.
    ///
    /// # Errors
    /// What the system said.
    pub fn of_mapped_ram(self, file: &File) -> std::io::Result<Bounds> {
        if !self.is_device {
            return Ok(self);
        }
        let end = match device_state_start(file, self)? {
            Some(start) => find_end(file, start, self.end)?,
            None => None,
        };
        Ok(Bounds { end: end.unwrap_or(self.end), ..self })
    }
}

/// Where the device state of the image begins, if it can be followed so far.
fn device_state_start(file: &File, bounds: Bounds) -> std::io::Result<Option<u64>> {
    // A survey: that no description stands at the end of the device is no fault here.
    let mut survey = LayoutSurvey::new(bounds.start, bounds.end);
    let mut bytes = Vec::new();
    while let SurveyStep::Need { offset, len } = survey.step() {
        bytes.resize(len, 0);
        file.read_exact_at(&mut bytes, offset)?;
        survey.supply(&bytes);
    }
    Ok(survey.finish().layout.map(|layout| layout.device_state.start))
}

/// The offset behind the description, if there is one within the limits.
fn find_end(file: &File, start: u64, device_end: u64) -> std::io::Result<Option<u64>> {
    let mut blob = Vec::new();
    let mut window = WINDOW_FIRST;
    let mut doubtful = None;
    loop {
        let len = window.min(device_end.saturating_sub(start));
        let had = blob.len();
        blob.resize(len as usize, 0);
        file.read_exact_at(&mut blob[had..], start + had as u64)?;
        match end_within(&blob, start) {
            Some((end, Witness::VmDescription)) => return Ok(Some(start + end as u64)),
            found => doubtful = doubtful.or(found),
        }
        if len < window || window >= WINDOW_MAX {
            return Ok(doubtful.map(|(end, _)| start + end as u64));
        }
        window *= 4;
    }
}

/// The length of the device state at the front of `blob`, its description included, and what vouches for it.
///
/// A guest chooses bytes of its own device state, and so may write what looks like an end. The first whose
/// description has the very sizes of the sections before it is taken. Only where there is none, as of QEMUs that
/// leave devices out of their descriptions, is it the first that can be read at all.
fn end_within(blob: &[u8], base: u64) -> Option<(usize, Witness)> {
    let described_end = |at: usize| -> Option<usize> {
        let (&eof, rest) = blob.get(at..)?.split_first()?;
        let (&kind, rest) = rest.split_first()?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        if (eof, kind, rest.first()?) != (QEMU_VM_EOF, QEMU_VM_VMDESCRIPTION, &b'{') {
            return None;
        }
        (at + 1 + DESCRIPTION_HEAD_LEN).checked_add(u32::from_be_bytes(*len) as usize)
    };
    let mut doubtful = None;
    let footers = blob.iter().enumerate().filter(|(_, byte)| **byte == QEMU_VM_SECTION_FOOTER);
    let ends = footers.map(|(at, _)| at + FOOTER_LEN).filter_map(|eof| Some((eof, described_end(eof)?)));
    for (eof, end) in ends.take(ENDS_TRIED_MAX) {
        let json = eof + 1 + DESCRIPTION_HEAD_LEN;
        let read = |json_bytes| {
            vmdesc::parse(json_bytes, base + json as u64).ok()?;
            let state = split_sections(blob.get(..end)?, base).ok()?;
            (state.eof_at == base + eof as u64).then_some((end, state.witness))
        };
        let state = blob.get(json..end).and_then(read);
        match state {
            Some((_, Witness::VmDescription)) => return state,
            found => doubtful = doubtful.or(found),
        }
    }
    doubtful
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One section of device state, its end mark, and a description that fits it.
    fn device_state(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![4, 0, 0, 0, 9, 3];
        bytes.extend(b"dev");
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend(payload);
        bytes.extend([QEMU_VM_SECTION_FOOTER, 0, 0, 0, 9, QEMU_VM_EOF]);
        let json = format!(
            r#"{{"devices":[{{"name":"dev","instance_id":0,"version":1,"fields":[{{"name":"data","type":"buffer","size":{}}}]}}]}}"#,
            payload.len()
        );
        bytes.push(QEMU_VM_VMDESCRIPTION);
        bytes.extend((json.len() as u32).to_be_bytes());
        bytes.extend(json.as_bytes());
        bytes
    }

    #[test]
    fn the_end_is_found_whatever_follows() {
        // What a guest may write into a device to look like an end.
        let lure = [&[QEMU_VM_SECTION_FOOTER, 0, 0, 0, 9, 0, 6, 0, 0, 0, 2][..], b"{}"].concat();
        for payload in [b"state".to_vec(), lure, vec![QEMU_VM_SECTION_FOOTER; 300]] {
            let state = device_state(&payload);
            for follows in [vec![], vec![0; 5000], vec![0x7e; 5000], state.clone()] {
                let blob = [state.clone(), follows].concat();
                let expected = Some((state.len(), Witness::VmDescription));
                assert_eq!(end_within(&blob, 0x1000), expected, "{payload:x?}");
            }
            let cut = end_within(&state[..state.len() - 1], 0x1000);
            assert!(cut.is_none_or(|(_, witness)| witness != Witness::VmDescription), "{payload:x?}");
        }
        assert_eq!(end_within(&[], 0), None);
        assert_eq!(end_within(&[QEMU_VM_SECTION_FOOTER; 4096], 0), None);
    }
}
