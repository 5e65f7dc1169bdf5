//! Begins an image of any format. A new format is one more arm here, and its file beside this one.

use io::Target;

use super::flow::{Means, Sink, byte_sink};
use super::{LibvirtSink, MappedRamSink, StreamSink};
use crate::source::Format;
use crate::{Error, Kind, Result};

/// Begins an image; nothing is written yet.
///
/// # Errors
/// [`Kind::Misuse`] for a format that needs offsets where there are none, and for one that has no end of its own in
/// the midst of something else; [`Kind::Io`].
pub fn create_sink<'a>(format: Format, target: &'a Target, means: Means) -> Result<Box<dyn Sink + 'a>> {
    refuse_misfits(format, target)?;
    match format {
        Format::MappedRam => Ok(Box::new(MappedRamSink::new(target, target.start(), means))),
        Format::Libvirt(payload) => Ok(Box::new(LibvirtSink::create(payload, target, means)?)),
        Format::Stream => {
            let out = byte_sink(target, &means)?;
            Ok(Box::new(StreamSink::new(out, means)))
        }
    }
}

fn refuse_misfits(format: Format, target: &Target) -> Result<()> {
    let refuse = |clause: String, hint: &str| Err(Error::new(Kind::Misuse, clause).hint(hint.to_owned()));
    match (format.is_sequential(), target) {
        (false, Target::Outflow(_)) => refuse(
            format!("a {} image cannot go into a pipe, which has no offsets", format.name()),
            "give a file, or -O stream",
        ),
        (true, Target::Place(place)) => refuse(
            format!("a {} image can only be a file of its own or go into a pipe", format.name()),
            match place.is_device() {
                true => "give a new file; a device takes a mapped-ram or libvirt-sparse image",
                false => "leave --offset out, or give another place",
            },
        ),
        _ => Ok(()),
    }
}
