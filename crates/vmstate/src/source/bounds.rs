//! Where an image is in what it was written into: from an offset, and up to where.
//!
//! Neither a file nor a device need end where its image does, and nothing in an image tells its length: the end is
//! found by what stands there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, fstat, seek};
use wire::Fault;
use wire::mapped_ram::Layout;
use wire::mapped_ram::survey::{LayoutSurvey, SurveyStep};

use super::ends::find_end;
use crate::{Error, Kind, Result};

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
    /// The end of the file or device, or that of the image in it: all offsets count from the start of the file.
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

    /// The same, but with the end of the mapped-ram image instead of the file's or device's; where no end is found, as
    /// it was: whoever reads on will find what is wrong.
    ///
    /// # Errors
    /// Unsupported, as the inner result: the image may end at either of two places. What the system said.
    pub fn of_mapped_ram(self, file: &File) -> std::io::Result<Result<Bounds, Fault>> {
        let Some(layout) = survey(file, LayoutSurvey::seeking(self.start, self.end))? else {
            return Ok(Ok(self));
        };
        let start = layout.device_state.start;
        let end = match find_end(file, start, self.end)? {
            Ok(end) => end,
            Err(fault) => return Ok(Err(fault)),
        };
        let bounds = Bounds { end, ..self };
        // Where early sections end was a guess on the way there. Now their description is known, if it is one.
        let is_sure = layout.early.is_empty() || end == self.end || {
            let found = survey(file, LayoutSurvey::new(self.start, end))?;
            found.is_some_and(|found| found.device_state.start == start)
        };
        Ok(Ok(if is_sure { bounds } else { self }))
    }
}

/// The layout of an image, if it can be followed.
fn survey(file: &File, mut survey: LayoutSurvey) -> std::io::Result<Option<Layout>> {
    let mut bytes = Vec::new();
    while let SurveyStep::Need { offset, len } = survey.step() {
        bytes.resize(len, 0);
        file.read_exact_at(&mut bytes, offset)?;
        survey.supply(&bytes);
    }
    Ok(survey.finish().layout)
}
