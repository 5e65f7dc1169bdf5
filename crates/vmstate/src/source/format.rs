//! Telling formats apart by their first bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use wire::libvirt::PayloadFormat;
use wire::qemu::decode_preamble;
use wire::qemu::format::QEMU_VM_FILE_MAGIC;
use wire::{DecodeError, Fault};

use super::mapped_ram::faulty;
use super::{Bounds, Payload};
use crate::{Error, Kind, Result};

/// How much of a file is looked at: the longest preamble has a few hundred bytes.
const HEAD_LEN: u64 = 64 << 10;

/// The formats of images that vmstate reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Pages at fixed offsets of the file.
    MappedRam,
    /// One record after the other.
    Stream,
    /// Either of them behind a head of libvirt's, a stream perhaps compressed.
    Libvirt(PayloadFormat),
}

impl Format {
    /// QEMU's own formats, in the order in which they are listed to users.
    pub const ALL: [Format; 2] = [Format::MappedRam, Format::Stream];

    /// libvirt's, in the order of their numbers.
    pub const LIBVIRT: [Format; 7] = [
        Format::Libvirt(PayloadFormat::Raw),
        Format::Libvirt(PayloadFormat::Gzip),
        Format::Libvirt(PayloadFormat::Bzip2),
        Format::Libvirt(PayloadFormat::Xz),
        Format::Libvirt(PayloadFormat::Lzop),
        Format::Libvirt(PayloadFormat::Zstd),
        Format::Libvirt(PayloadFormat::Sparse),
    ];

    /// Whether it can be written from front to back, as into a pipe.
    pub fn is_sequential(self) -> bool {
        !self.has_places()
    }

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Format::MappedRam => "mapped-ram",
            Format::Stream => "stream",
            Format::Libvirt(PayloadFormat::Raw) => "libvirt-raw",
            Format::Libvirt(PayloadFormat::Gzip) => "libvirt-gzip",
            Format::Libvirt(PayloadFormat::Bzip2) => "libvirt-bzip2",
            Format::Libvirt(PayloadFormat::Xz) => "libvirt-xz",
            Format::Libvirt(PayloadFormat::Lzop) => "libvirt-lzop",
            Format::Libvirt(PayloadFormat::Zstd) => "libvirt-zstd",
            Format::Libvirt(PayloadFormat::Sparse) => "libvirt-sparse",
        }
    }

    /// Whether each page has a place of its own in the file, whatever stands before it.
    pub fn has_places(self) -> bool {
        matches!(self, Format::MappedRam | Format::Libvirt(PayloadFormat::Sparse))
    }

    /// Refuses an image that is another one of libvirt's, or none of them, than it was said to be. QEMU's own formats
    /// refuse each other themselves, by their first bytes.
    ///
    /// # Errors
    /// [`Kind::Misuse`].
    pub(super) fn require_said(self, said: Option<Format>, path: &Path) -> Result<()> {
        match said {
            Some(said @ Format::Libvirt(_)) if said != self => {
                let clause =
                    format!("{} is a {} image, and not {}", path.display(), self.name(), said.name());
                Err(Error::new(Kind::Misuse, clause)
                    .hint("leave -f out: the first bytes tell what an image is"))
            }
            _ => Ok(()),
        }
    }

    /// Whether it is a stream that is compressed.
    pub fn is_compressed(self) -> bool {
        matches!(self, Format::Libvirt(payload) if payload.is_compressed())
    }

    /// The format of an open file from the offset `start` on.
    ///
    /// # Errors
    /// [`Kind::Damaged`] where it is no image;
    /// [`Kind::Unsupported`] for formats that are known but not read;
    /// [`Kind::Misuse`] for what is no file.
    pub fn of(file: &File, path: &Path, start: u64) -> Result<Format> {
        Format::of_payload(file, path, &Payload::of(file, path, start)?)
    }

    /// The format of an image whose payload was found.
    ///
    /// # Errors
    /// As [`Format::of`].
    pub(crate) fn of_payload(file: &File, path: &Path, payload: &Payload) -> Result<Format> {
        Format::survey(file, path, payload)?.map_err(|fault| faulty(path, fault))
    }

    /// The same, with what is wrong with an image that is one as the inner result.
    ///
    /// # Errors
    /// [`Kind::Damaged`] where it is no image at all; [`Kind::Io`].
    pub(crate) fn survey(
        file: &File,
        path: &Path,
        payload: &Payload,
    ) -> Result<std::result::Result<Format, Fault>> {
        let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
        let libvirts = payload.head.as_ref().map(|head| head.format);
        if let Some(format) = libvirts.filter(|format| format.is_compressed()) {
            return Ok(Ok(Format::Libvirt(format)));
        }
        let bounds = Bounds::of(file, path, payload.at)?;
        let mut head = vec![0; bounds.len().min(HEAD_LEN) as usize];
        file.read_exact_at(&mut head, payload.at).map_err(cannot)?;
        if !head.starts_with(&QEMU_VM_FILE_MAGIC.to_be_bytes()) {
            return Format::of_head(&head, path, payload.at).map(Ok);
        }
        let preamble = match decode_preamble(&head, payload.at).map_err(DecodeError::at_end) {
            Ok((preamble, _)) => preamble,
            Err(fault) => return Ok(Err(fault)),
        };
        let is_mapped = preamble.configuration.is_some_and(|configuration| configuration.is_mapped_ram());
        Ok(match libvirts {
            None => Ok(if is_mapped { Format::MappedRam } else { Format::Stream }),
            Some(format) if is_mapped == (format == PayloadFormat::Sparse) => Ok(Format::Libvirt(format)),
            Some(format) => {
                let found = if is_mapped { "a mapped-ram image" } else { "a stream" };
                let problem = format!("is {found}, which {format} is not");
                Err(Fault::damaged(payload.at, "payload", problem))
            }
        })
    }

    /// The format of an image whose first bytes are `head` and stand at the offset `start`. Of libvirt's, only that it
    /// is one of them can be told so.
    ///
    /// # Errors
    /// As [`Format::of`], but for the system's.
    pub fn of_head(head: &[u8], path: &Path, start: u64) -> Result<Format> {
        if super::libvirt::is_head(head) {
            let clause =
                format!("{}: an image of libvirt is read at offsets, which a pipe has not", path.display());
            return Err(Error::new(Kind::Misuse, clause).hint("give the name of the file"));
        }
        let (preamble, _) =
            decode_preamble(head, start).map_err(DecodeError::at_end).map_err(|fault| faulty(path, fault))?;
        let is_mapped = preamble.configuration.is_some_and(|configuration| configuration.is_mapped_ram());
        Ok(if is_mapped { Format::MappedRam } else { Format::Stream })
    }
}
