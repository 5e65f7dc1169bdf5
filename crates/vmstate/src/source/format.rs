//! Telling formats apart by their first bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use wire::DecodeError;
use wire::qemu::decode_preamble;

use super::Bounds;
use super::mapped_ram::faulty;
use crate::{Error, Kind, Result};

/// How much of a file is looked at: the longest preamble has a few hundred bytes.
const HEAD_LEN: u64 = 64 << 10;
/// The magics of libvirt's save images, complete and not.
const LIBVIRT_MAGICS: [&[u8]; 2] = [b"LibvirtQemudSave", b"LibvirtQemudPart"];

/// The formats of images that vmstate reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Pages at fixed offsets of the file.
    MappedRam,
    /// One record after the other.
    Stream,
}

impl Format {
    /// Every format, in the order in which they are listed to users.
    pub const ALL: [Format; 2] = [Format::MappedRam, Format::Stream];

    /// Whether it can be read and written from front to back, as a pipe is.
    pub fn is_sequential(self) -> bool {
        match self {
            Format::MappedRam => false,
            Format::Stream => true,
        }
    }

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Format::MappedRam => "mapped-ram",
            Format::Stream => "stream",
        }
    }

    /// The format of an open file from the offset `start` on.
    ///
    /// # Errors
    /// [`Kind::Damaged`] where it is no image; [`Kind::Unsupported`] for formats that are known but not
    /// read; [`Kind::Misuse`] for what is no file.
    pub fn of(file: &File, path: &Path, start: u64) -> Result<Format> {
        let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
        let bounds = Bounds::of(file, path, start)?;
        let mut head = vec![0; bounds.len().min(HEAD_LEN) as usize];
        file.read_exact_at(&mut head, start).map_err(cannot)?;
        Format::of_head(&head, path, start)
    }

    /// The format of an image whose first bytes are `head` and stand at the offset `start`.
    ///
    /// # Errors
    /// As [`Format::of`], but for the system's.
    pub fn of_head(head: &[u8], path: &Path, start: u64) -> Result<Format> {
        if LIBVIRT_MAGICS.iter().any(|magic| head.starts_with(magic)) {
            let clause = format!("{} is a save image of libvirt, which is not read yet", path.display());
            return Err(Error::new(Kind::Unsupported, clause));
        }
        let (preamble, _) =
            decode_preamble(head, start).map_err(DecodeError::at_end).map_err(|fault| faulty(path, fault))?;
        let is_mapped = preamble.configuration.is_some_and(|configuration| configuration.is_mapped_ram());
        Ok(if is_mapped { Format::MappedRam } else { Format::Stream })
    }
}
