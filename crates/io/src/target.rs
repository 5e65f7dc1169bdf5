//! Where an image goes: what a name stands for, and what can be done there.

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::FileType;

use crate::cancel::Cancel;
use crate::direct::{DirectIo, unsupported};
use crate::draft::{Draft, DraftError, DraftOptions, DraftStep, Replaced};
use crate::lane::LaneTarget;
use crate::outflow::Outflow;
use crate::place::{Place, not_for_this};
use crate::timed::Rates;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// A file to be, or one to be replaced.
    File,
    /// A file that is there and is written from an offset on.
    Place,
    /// A block device.
    Device,
    /// A pipe, a FIFO, or the standard output.
    Pipe,
}

impl TargetKind {
    /// Looks at the name and opens nothing. Links are followed to devices and pipes, which have names that are
    /// links; a link to a file is left to [`Draft`], which refuses it.
    ///
    /// # Errors
    /// [`DraftError::NotForThis`] for an offset where there is none; what the system said.
    pub fn of(path: &Path, offset: Option<u64>) -> Result<TargetKind, DraftError> {
        if Outflow::is_stdout(path) {
            return TargetKind::pipe(path, offset);
        }
        let found = match (rustix::fs::stat(path), offset) {
            (Ok(found), _) => FileType::from_raw_mode(found.st_mode),
            (Err(rustix::io::Errno::NOENT), Some(_)) => {
                return Err(not_for_this(
                    path,
                    "an offset is one of a file that is there, and this one is not",
                ));
            }
            (Err(source), Some(_)) => {
                let path = path.to_owned();
                return Err(DraftError::Io { path, step: DraftStep::Inspect, source: source.into() });
            }
            // The draft says it better: whether it is the directory that lacks, or may not be read.
            (Err(_), None) => return Ok(TargetKind::File),
        };
        match (found, offset) {
            (FileType::BlockDevice, _) => Ok(TargetKind::Device),
            (FileType::Fifo, _) => TargetKind::pipe(path, offset),
            (_, Some(_)) => Ok(TargetKind::Place),
            (_, None) => Ok(TargetKind::File),
        }
    }

    fn pipe(path: &Path, offset: Option<u64>) -> Result<TargetKind, DraftError> {
        match offset {
            None => Ok(TargetKind::Pipe),
            Some(_) => Err(not_for_this(path, "a pipe has no offsets")),
        }
    }
}

/// A place for an image, whole or not at all as far as that kind of place can keep it.
#[derive(Debug)]
pub enum Target {
    /// A new file: it gets its name when it is whole.
    Draft(Draft),
    /// A part of a file, or a device: it gets its head when the rest is whole.
    Place(Place),
    /// A pipe: what was written cannot be taken back.
    Outflow(Outflow),
}

impl Target {
    /// Opens what the name stands for. Nothing that is there is changed yet.
    ///
    /// # Errors
    /// As [`TargetKind::of`], [`Draft::create`], [`Place::open`] and [`Outflow::open`].
    pub fn open(
        path: &Path,
        offset: Option<u64>,
        options: DraftOptions,
        cancel: &Cancel,
    ) -> Result<Target, DraftError> {
        Ok(match TargetKind::of(path, offset)? {
            TargetKind::File => Target::Draft(Draft::create(path, options)?),
            TargetKind::Place | TargetKind::Device => {
                Target::Place(Place::open(path, offset.unwrap_or(0), options)?)
            }
            TargetKind::Pipe if options.owner != Default::default() => {
                return Err(not_for_this(path, "only a new file is given an owner"));
            }
            TargetKind::Pipe => Target::Outflow(Outflow::open(path, cancel)?),
        })
    }

    /// The path.
    pub fn path(&self) -> &Path {
        match self {
            Target::Draft(draft) => draft.path(),
            Target::Place(place) => place.path(),
            Target::Outflow(outflow) => outflow.path(),
        }
    }

    /// Whether bytes can only follow each other.
    pub fn is_sequential(&self) -> bool {
        matches!(self, Target::Outflow(_))
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        matches!(self, Target::Place(place) if place.is_device())
    }

    /// The offset at which the image starts.
    pub fn start(&self) -> u64 {
        match self {
            Target::Draft(draft) => draft.start,
            Target::Place(place) => place.start(),
            Target::Outflow(_) => 0,
        }
    }

    /// Keeps so many bytes free at the beginning of a new file, for what its image is to stand behind. Elsewhere it has
    /// no effect: a place has its own start, and in a pipe things stand behind each other anyway.
    pub fn reserve(&mut self, len: u64) {
        if let Target::Draft(draft) = self {
            draft.start = len;
        }
    }

    /// Whether what is not written reads as zero. On a device it reads as what was there before.
    pub fn reads_as_zero(&self) -> bool {
        !self.is_device()
    }

    /// The descriptor that goes through the page cache: O_WRONLY. A pipe gives none.
    pub fn buffered(&self) -> Option<&File> {
        match self {
            Target::Draft(draft) => Some(draft.buffered()),
            Target::Place(place) => Some(place.buffered()),
            Target::Outflow(_) => None,
        }
    }

    /// The descriptor for pages, O_WRONLY | O_DIRECT, where direct I/O is wanted and supported.
    pub fn direct(&self) -> Option<&File> {
        match self {
            Target::Draft(draft) => draft.direct(),
            Target::Place(place) => place.direct(),
            Target::Outflow(_) => None,
        }
    }

    /// What was found out about direct I/O.
    pub fn direct_io(&self) -> DirectIo {
        match self {
            Target::Draft(draft) => draft.direct_io().clone(),
            Target::Place(place) => place.direct_io().clone(),
            Target::Outflow(_) => unsupported("a pipe has none"),
        }
    }

    /// Tries how fast it is with direct I/O and without; `None` where there is no choice to make, or nothing may
    /// be overwritten for it.
    ///
    /// # Errors
    /// As [`Draft::measure`].
    pub fn measure(&self) -> Result<Option<Rates>, DraftError> {
        match self {
            Target::Draft(draft) => draft.measure(),
            Target::Place(_) | Target::Outflow(_) => Ok(None),
        }
    }

    /// Lets go of direct I/O, for this reason. Only a draft was measured, so only a draft is slow.
    pub fn leave_direct(&mut self, reason: &str) {
        if let Target::Draft(draft) = self {
            draft.leave_direct(reason);
        }
    }

    /// How many bytes an image may have here; `None` where nothing limits it or nobody knows.
    ///
    /// # Errors
    /// What the system said.
    pub fn room_bytes(&self) -> Result<Option<u64>, DraftError> {
        match self {
            Target::Draft(draft) => draft.free_bytes().map(Some),
            Target::Place(place) => place.room_bytes().map(Some),
            Target::Outflow(_) => Ok(None),
        }
    }

    /// Begins an image that ends at the offset `end`. What was in its place is lost from here on.
    ///
    /// # Errors
    /// As [`Place::begin`].
    pub fn begin(&self, end: u64) -> Result<(), DraftError> {
        match self {
            Target::Draft(draft) => draft.set_len(end),
            Target::Place(place) => place.begin(end),
            Target::Outflow(_) => Ok(()),
        }
    }

    /// Moves the end of the image.
    ///
    /// # Errors
    /// What the system said.
    pub fn set_end(&self, end: u64) -> Result<(), DraftError> {
        match self {
            Target::Draft(draft) => draft.set_len(end),
            Target::Place(place) => place.set_end(end),
            Target::Outflow(_) => Ok(()),
        }
    }

    /// The target to be written from front to back.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn outflow(&self, cancel: &Cancel) -> Result<Outflow, DraftError> {
        let opened = match self {
            Target::Draft(Draft { buffered: file, start, .. }) => file.try_clone().and_then(|mut file| {
                file.seek(io::SeekFrom::Start(*start))?;
                Ok(file)
            }),
            Target::Place(place) => place.buffered().try_clone(),
            Target::Outflow(outflow) => outflow.try_clone_file(),
        };
        let fail = |source| DraftError::Io { path: self.path().to_owned(), step: DraftStep::Reopen, source };
        opened.and_then(|file| Outflow::over(file, self.path(), cancel)).map_err(fail)
    }

    /// The target as lanes want it, on duplicates of its descriptors.
    ///
    /// # Errors
    /// When no descriptor is left.
    ///
    /// # Panics
    /// For a pipe, which has no offsets.
    pub fn lane_target(&self) -> Result<LaneTarget, DraftError> {
        let buffered = self.buffered().expect("lanes write at offsets, and a pipe has none");
        let duplicate = |file: &File| {
            let path = self.path().to_owned();
            file.try_clone().map_err(|source| DraftError::Io { path, step: DraftStep::Reopen, source })
        };
        Ok(LaneTarget::files(self.direct().map(duplicate).transpose()?, duplicate(buffered)?))
    }

    /// Writes metadata at an absolute offset, through the page cache.
    ///
    /// # Errors
    /// What the system said; `Unsupported` for a pipe.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Target::Draft(draft) => draft.buffered().write_all_at(bytes, offset),
            Target::Place(place) => place.write_all_at(bytes, offset),
            Target::Outflow(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Opens it for reading, to look at what somebody else has written into it: all of it, the head included.
    ///
    /// # Errors
    /// What the system said, or that the name is another file's by now.
    pub fn open_for_reading(&self) -> Result<File, DraftError> {
        match self {
            Target::Draft(draft) => draft.open_for_reading(),
            Target::Place(place) => {
                let reader = place.open_for_reading()?;
                place.take_head(&reader)?;
                Ok(reader)
            }
            Target::Outflow(outflow) => Err(DraftError::Io {
                path: outflow.path().to_owned(),
                step: DraftStep::Reopen,
                source: io::ErrorKind::Unsupported.into(),
            }),
        }
    }

    /// Brings to the disk what was written so far, so that nothing long is left for [`Target::publish`].
    ///
    /// # Errors
    /// What the system said.
    pub fn sync(&self) -> Result<(), DraftError> {
        let Some(buffered) = self.buffered() else { return Ok(()) };
        let path = self.path().to_owned();
        buffered.sync_all().map_err(|source| DraftError::Io { path, step: DraftStep::SyncFile, source })
    }

    /// The file whose name the image has got, if there was one.
    pub fn take_replaced(&mut self) -> Option<Replaced> {
        match self {
            Target::Draft(draft) => draft.take_replaced(),
            Target::Place(_) | Target::Outflow(_) => None,
        }
    }

    /// Makes the image whole: under its name, with its head, or, of a pipe, by the last byte written.
    ///
    /// # Errors
    /// As [`Draft::publish`] and [`Place::publish`].
    pub fn publish(&mut self) -> Result<(), DraftError> {
        match self {
            Target::Draft(draft) => draft.publish(),
            Target::Place(place) => place.publish(),
            Target::Outflow(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_for_what_is_behind_it() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("file"), "x").expect("a file");
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, rustix::fs::Mode::RWXU, 0)
            .expect("a FIFO");
        std::os::unix::fs::symlink(at("fifo"), at("link")).expect("a link");
        let none = "an offset is one of a file that is there, and this one is not";
        for (path, offset, expected) in [
            ("-".into(), None, Ok(TargetKind::Pipe)),
            ("/dev/stdout".into(), None, Ok(TargetKind::Pipe)),
            ("-".into(), Some(0), Err("`-`: a pipe has no offsets".to_owned())),
            (at("new"), None, Ok(TargetKind::File)),
            (at("new"), Some(0), Err(format!("`{}`: {none}", at("new").display()))),
            (at("file"), None, Ok(TargetKind::File)),
            (at("file"), Some(0), Ok(TargetKind::Place)),
            (at("fifo"), None, Ok(TargetKind::Pipe)),
            (at("link"), None, Ok(TargetKind::Pipe)),
            (at("fifo"), Some(4096), Err(format!("`{}`: a pipe has no offsets", at("fifo").display()))),
        ] {
            let found = TargetKind::of(&path, offset).map_err(|error| error.to_string());
            assert_eq!(found, expected, "{} {offset:?}", path.display());
        }
    }
}
