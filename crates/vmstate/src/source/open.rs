//! Opens an image of any format. A new format is one more arm here, and its file beside this one.

use std::io::{BufRead, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use io::{Inflow, ReadPair};

use super::flow::{Input, InputBytes, Source};
use super::libvirt::is_head;
use super::libvirt_source::spilled;
use super::{
    Bounds, Format, LibvirtSource, MappedRamSource, Origin, Payload, PlacedPages, StreamIndex, StreamSource,
};
use crate::{Error, Kind, Result};

/// How much of what cannot be read twice is looked at to tell its format.
const PEEK_LEN: u64 = 64 << 10;

/// Opens an image as what it is, or as what it is said to be.
///
/// # Errors
/// [`Kind::Damaged`] and [`Kind::Unsupported`] at the first fault of what stands before the pages, with file, offset
/// and field; [`Kind::Misuse`] for a format that needs offsets where there are none; [`Kind::Io`],
/// [`Kind::Interrupted`].
pub fn open_source(input: Input, format: Option<Format>) -> Result<Box<dyn Source>> {
    let Input { path, start, bytes, cancel } = input;
    let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
    match bytes {
        InputBytes::File(pair) => {
            let format = match format {
                Some(format @ (Format::MappedRam | Format::Stream)) => format,
                said => {
                    let found = Format::of(&pair.buffered, &path, start)?;
                    found.require_said(said, &path)?;
                    found
                }
            };
            match format {
                Format::MappedRam => Ok(Box::new(MappedRamSource::open(pair, &path, start)?)),
                Format::Libvirt(_) => Ok(Box::new(LibvirtSource::open(pair, &path, start, &cancel)?)),
                Format::Stream => {
                    let bounds = Bounds::of(&pair.buffered, &path, start)?;
                    let origin = Origin::File(pair.buffered.try_clone().map_err(cannot)?, bounds);
                    let from = Inflow::of_file(Arc::new(pair), start, bounds.end, &cancel).map_err(cannot)?;
                    Ok(Box::new(StreamSource::open(Box::new(from), &path, start, origin)?))
                }
            }
        }
        InputBytes::Sequential(mut from) => {
            let mut head = Vec::new();
            if !matches!(format, Some(Format::MappedRam | Format::Stream)) {
                let peeked = (&mut from).take(PEEK_LEN).read_to_end(&mut head);
                peeked.map_err(|error| Error::from_within(error).unwrap_or_else(cannot))?;
            }
            let found = match format {
                Some(format @ (Format::MappedRam | Format::Stream)) => Some(format),
                // Which of them it is its head tells.
                _ if is_head(&head) => None,
                said => {
                    let found = Format::of_head(&head, &path, 0)?;
                    found.require_said(said, &path)?;
                    Some(found)
                }
            };
            let from: Box<dyn BufRead + Send> = Box::new(Cursor::new(head).chain(from));
            match found {
                Some(Format::Stream) => Ok(Box::new(StreamSource::open(from, &path, 0, Origin::Pipe)?)),
                Some(Format::MappedRam) => {
                    let clause = format!(
                        "{}: a {} image is read at offsets, which a pipe has not",
                        path.display(),
                        Format::MappedRam.name()
                    );
                    Err(Error::new(Kind::Misuse, clause).hint("give the name of the file"))
                }
                Some(Format::Libvirt(_)) | None => {
                    let source = LibvirtSource::open_once(from, &path)?;
                    source.format().require_said(format, &path)?;
                    Ok(Box::new(source))
                }
            }
        }
    }
}

/// An image whose pages can be read in any order, and its tail at once.
pub struct OpenedPlaced {
    /// What it was read as.
    pub format: Format,
    /// The image, its pages taken.
    pub source: Box<dyn Source>,
    /// Its pages.
    pub pages: Arc<dyn PlacedPages>,
}

/// The name by which an image is opened that is read more than once: that of the standard input where that is a file.
///
/// # Errors
/// [`Kind::Misuse`] for what is read once.
pub fn readable_again(path: &Path) -> Result<PathBuf> {
    if Inflow::is_sequential(path) {
        return Err(read_once(path));
    }
    Ok(if Inflow::is_stdin(path) { PathBuf::from("/dev/stdin") } else { path.to_owned() })
}

fn read_once(path: &Path) -> Error {
    let clause =
        format!("{}: a pipe is read once, and its pages are wanted in another order", path.display());
    Error::new(Kind::Misuse, clause).hint("convert it into a file first")
}

/// Opens an image whose pages are to be read in any order. A stream is read to its end for that, and what is compressed
/// is decompressed into a file without a name, in `TMPDIR` or /var/tmp.
///
/// # Errors
/// As [`open_source`]; [`Kind::Misuse`] for what cannot be read twice.
pub fn open_placed(input: Input, format: Option<Format>) -> Result<OpenedPlaced> {
    let Input { path, start, bytes, cancel } = input;
    let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
    let InputBytes::File(pair) = bytes else {
        return Err(read_once(&path));
    };
    // A head of libvirt's is looked behind, unless the image is said to begin at once.
    let payload = match format {
        Some(Format::MappedRam | Format::Stream) => Payload { head: None, at: start },
        _ => Payload::of(&pair.buffered, &path, start)?,
    };
    let format = match format {
        Some(format @ (Format::MappedRam | Format::Stream)) => format,
        said => {
            let found = Format::of_payload(&pair.buffered, &path, &payload)?;
            found.require_said(said, &path)?;
            found
        }
    };
    let (source, pages): (Box<dyn Source>, Arc<dyn PlacedPages>) = match format {
        _ if format.has_places() => {
            let source = MappedRamSource::open(pair, &path, payload.at)?;
            let pages = source.placed();
            (Box::new(source), pages)
        }
        Format::Libvirt(compressed) if compressed.is_compressed() => {
            let bounds = Bounds::of(&pair.buffered, &path, payload.at)?;
            let range = [payload.at, bounds.end];
            let (source, index) = spilled(&pair.buffered, &path, compressed, range, &cancel)?;
            (Box::new(source), Arc::new(index))
        }
        _ => {
            let bounds = Bounds::of(&pair.buffered, &path, payload.at)?;
            let again = ReadPair::buffered(pair.buffered.try_clone().map_err(cannot)?);
            let origin = Origin::File(pair.buffered.try_clone().map_err(cannot)?, bounds);
            let from = Inflow::of_file(Arc::new(pair), payload.at, bounds.end, &cancel).map_err(cannot)?;
            let mut source = StreamSource::open(Box::new(from), &path, payload.at, origin)?;
            let index = StreamIndex::read(&mut source, again)?;
            (Box::new(source), Arc::new(index))
        }
    };
    let source = match payload.head {
        Some(head) => Box::new(LibvirtSource::around(head, source)),
        None => source,
    };
    Ok(OpenedPlaced { format, source, pages })
}
