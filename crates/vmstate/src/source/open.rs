//! Opens an image of any format. A new format is one more arm here, and its file beside this one.

use std::io::{BufRead, Cursor, Read};
use std::sync::Arc;

use io::Inflow;

use super::flow::{Input, InputBytes, Source};
use super::{Bounds, Format, LibvirtSource, MappedRamSource, StreamSource};
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
                Some(format) => format,
                None => Format::of(&pair.buffered, &path, start)?,
            };
            match format {
                Format::MappedRam => Ok(Box::new(MappedRamSource::open(pair, &path, start)?)),
                Format::Libvirt(_) => Ok(Box::new(LibvirtSource::open(pair, &path, start, &cancel)?)),
                Format::Stream => {
                    let bounds = Bounds::of(&pair.buffered, &path, start)?;
                    let from = Inflow::of_file(Arc::new(pair), start, bounds.end, &cancel).map_err(cannot)?;
                    Ok(Box::new(StreamSource::open(Box::new(from), &path, start, Some(bounds.len()))?))
                }
            }
        }
        InputBytes::Sequential(mut from) => {
            let mut head = Vec::new();
            let format = match format {
                Some(format) => format,
                None => {
                    let peeked = (&mut from).take(PEEK_LEN).read_to_end(&mut head);
                    peeked.map_err(|error| Error::from_within(error).unwrap_or_else(cannot))?;
                    Format::of_head(&head, &path, 0)?
                }
            };
            let from: Box<dyn BufRead + Send> = Box::new(Cursor::new(head).chain(from));
            match format {
                Format::Stream => Ok(Box::new(StreamSource::open(from, &path, 0, None)?)),
                Format::MappedRam | Format::Libvirt(_) => {
                    let clause = format!(
                        "{}: a {} image is read at offsets, which a pipe has not",
                        path.display(),
                        format.name()
                    );
                    Err(Error::new(Kind::Misuse, clause).hint("give the name of the file"))
                }
            }
        }
    }
}
