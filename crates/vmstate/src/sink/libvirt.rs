//! An image of libvirt made of any source: a head, and behind it a stream, one that is compressed, or a mapped-ram
//! image whose offsets count from the head.

use io::Target;
use wire::libvirt::{Head, PayloadFormat};
use wire::qemu::global_state;

use super::flow::{ByteSink, Means, Sink, byte_sink, write_failed};
use super::{MappedRamSink, StreamSink};
use crate::source::{GuestShape, Pages, Tail};
use crate::{Error, Kind, Result};

/// To what the payload of a sparse image is aligned: pages are, and what stands before them may as well be.
const ALIGNMENT: u64 = 4096;

/// What libvirt's head says of a guest beside what QEMU says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// The domain's XML, as `virsh dumpxml --migratable --security-info` gives it.
    pub xml: String,
    /// libvirt's cookie, which pins the CPU that QEMU made; images without one are restored as well.
    pub cookie: Option<String>,
}

/// The head of an image in the making, of which nothing is open but whether the image is complete and whether the guest
/// ran: neither changes its length.
#[derive(Clone, Debug)]
pub(crate) struct Envelope {
    head: Head,
}

impl Envelope {
    /// The head of an image of that format.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for an XML or a cookie that no image can have.
    pub(crate) fn new(format: PayloadFormat, domain: Domain) -> Result<Envelope> {
        let Domain { xml, cookie } = domain;
        let head = Head::new(format, true, xml, cookie).map_err(|fault| {
            Error::new(Kind::Unsupported, "the description of the domain fits no image").because(fault)
        })?;
        Ok(Envelope { head })
    }

    /// How many bytes it takes.
    pub(crate) fn len(&self) -> u64 {
        self.head.len()
    }

    /// Its bytes once the image is complete, for a guest that ran or did not.
    pub(crate) fn bytes(&self, was_running: bool) -> Vec<u8> {
        self.encoded(true, was_running)
    }

    fn encoded(&self, is_complete: bool, was_running: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        Head { is_complete, was_running, ..self.head.clone() }.encode(&mut bytes);
        bytes
    }
}

/// An image of libvirt in the making.
pub struct LibvirtSink<'a> {
    target: &'a Target,
    envelope: Envelope,
    /// What a head in a pipe has said of the guest.
    has_said_running: bool,
    inner: Box<dyn Sink + 'a>,
}

impl<'a> LibvirtSink<'a> {
    /// An image of a format at the start of the target.
    ///
    /// Into a file goes a head that says that the image is not complete, as libvirt does it; a pipe cannot be gone back
    /// in, so what goes there says from the start whether the guest ran: what is known of it, or that it did, and one that did
    /// not is refused then.
    ///
    /// # Errors
    /// [`Kind::Misuse`] without a domain; [`Kind::Unsupported`] for an XML that no image can have, and for compression
    /// in a build without codecs; [`Kind::Io`].
    pub fn create(format: PayloadFormat, target: &'a Target, means: Means) -> Result<LibvirtSink<'a>> {
        let Some(domain) = means.domain.clone() else {
            let clause = "an image of libvirt needs the XML of its domain, which the source does not have";
            return Err(Error::new(Kind::Misuse, clause)
                .hint("give it with --xml: virsh dumpxml --migratable DOMAIN"));
        };
        let envelope = Envelope::new(format, domain)?;
        let has_said_running = means.was_running.unwrap_or(true);
        let start = target.start();
        if format == PayloadFormat::Sparse {
            let envelope = Envelope { head: envelope.head.aligned(start, ALIGNMENT) };
            let inner = Box::new(MappedRamSink::new(target, start + envelope.len(), means));
            return Ok(LibvirtSink { target, envelope, has_said_running, inner });
        }
        let mut out = byte_sink(target, &means)?;
        out.write_all(&envelope.encoded(target.is_sequential(), has_said_running)).map_err(write_failed)?;
        if format.is_compressed() {
            out = compressed(format, out)?;
        }
        Ok(LibvirtSink { target, envelope, has_said_running, inner: Box::new(StreamSink::new(out, means)) })
    }
}

impl Sink for LibvirtSink<'_> {
    fn metadata_bytes(&self, shape: &GuestShape) -> u64 {
        self.inner.metadata_bytes(shape) + self.envelope.len()
    }

    fn write_pages(&mut self, shape: &GuestShape, pages: Pages<'_>) -> Result<()> {
        self.inner.write_pages(shape, pages)
    }

    fn complete(&mut self, tail: &Tail) -> Result<()> {
        let was_running = match tail.was_running {
            Some(was_running) => was_running,
            None => was_running(tail, self.target)?,
        };
        let is_sequential = self.target.is_sequential();
        if is_sequential && was_running != self.has_said_running {
            let clause = match was_running {
                true => "the guest ran, and the head in the pipe says already that it was paused",
                false => "the guest was paused, and the head in the pipe says already that it ran",
            };
            return Err(Error::new(Kind::Unsupported, clause).hint("convert into a file"));
        }
        self.inner.complete(tail)?;
        if is_sequential {
            return Ok(());
        }
        // All of it now, and not the header alone: in a mapped-ram image nothing stands there yet.
        self.target
            .write_all_at(&self.envelope.bytes(was_running), self.target.start())
            .map_err(|error| Error::io(format!("cannot write {}", self.target.path().display()), error))
    }
}

/// A way into the target that compresses where `format` has it so, for whoever writes a stream; what stands in front of
/// that is left to others.
///
/// # Errors
/// As [`require_codec`]; when no descriptor or no thread is left.
pub(crate) fn payload_sink(
    format: PayloadFormat,
    target: &Target,
    means: &Means,
) -> Result<Box<dyn ByteSink>> {
    compressed(format, byte_sink(target, means)?)
}

/// Refuses a format that this build cannot compress.
///
/// # Errors
/// [`Kind::Unsupported`].
pub(crate) fn require_codec(format: PayloadFormat) -> Result<()> {
    if !format.is_compressed() || cfg!(feature = "codecs") {
        return Ok(());
    }
    let clause = format!("this build does not compress by {format}");
    Err(Error::new(Kind::Unsupported, clause).hint("use a vmstate that was built with the feature `codecs`"))
}

/// Whether a restore lets the guest of this device state run; QEMU takes one that is not recorded for running.
fn was_running(tail: &Tail, target: &Target) -> Result<bool> {
    let devices = tail.devices(target.path())?;
    let Some(section) = devices.section(global_state::GLOBAL_STATE_SECTION, 0) else { return Ok(true) };
    let state = global_state::run_state(tail.part(section.payload)).map_err(|fault| {
        Error::new(Kind::Damaged, "the run state in the device state is none").because(fault)
    })?;
    Ok(state == "running")
}

#[cfg(feature = "codecs")]
mod compressing {
    use std::io::Write;

    use wire::libvirt::PayloadFormat;

    use crate::Result;
    use crate::codec::{Codec, Compressor};
    use crate::sink::flow::{ByteSink, write_failed};

    /// Bytes that are compressed on their way.
    pub(super) struct Compressing {
        /// `None` once it is finished.
        compressor: Option<Compressor<Box<dyn ByteSink>>>,
    }

    /// Compresses what is written into it, as the format has it.
    pub(in crate::sink) fn compressed(
        format: PayloadFormat,
        out: Box<dyn ByteSink>,
    ) -> Result<Box<dyn ByteSink>> {
        let Some(codec) = Codec::of(format) else { return Ok(out) };
        let compressor = Compressor::new(codec, out).map_err(write_failed)?;
        Ok(Box::new(Compressing { compressor: Some(compressor) }))
    }

    impl Write for Compressing {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            match &mut self.compressor {
                Some(compressor) => compressor.write(bytes),
                None => Err(std::io::ErrorKind::BrokenPipe.into()),
            }
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl ByteSink for Compressing {
        fn finish(&mut self) -> Result<()> {
            match self.compressor.take() {
                Some(compressor) => compressor.finish().map_err(write_failed)?.finish(),
                None => Ok(()),
            }
        }
    }
}
#[cfg(feature = "codecs")]
use compressing::compressed;

#[cfg(not(feature = "codecs"))]
fn compressed(format: PayloadFormat, out: Box<dyn ByteSink>) -> Result<Box<dyn ByteSink>> {
    require_codec(format).map(|()| out)
}

#[cfg(all(test, feature = "codecs"))]
mod tests {
    use std::io::Write;

    use super::*;

    /// Takes so many bytes, and then there is no room.
    struct Filling(usize);

    impl Write for Filling {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            match self.0.min(bytes.len()) {
                0 => Err(std::io::ErrorKind::StorageFull.into()),
                len => {
                    self.0 -= len;
                    Ok(len)
                }
            }
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl ByteSink for Filling {
        fn finish(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_fails_behind_a_compressor_is_told_as_what_it_is() {
        // What cannot be compressed, so that the disk is full while there is more to come.
        let mut state = 1u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        let bytes: Vec<u8> = (0..1u64 << 20).flat_map(|_| next()).collect();
        let enough = 2 * bytes.len();
        for format in [PayloadFormat::Gzip, PayloadFormat::Zstd, PayloadFormat::Lzop] {
            let write = |room: usize| {
                let mut out = compressed(format, Box::new(Filling(room)))?;
                out.write_all(&bytes).map_err(write_failed)?;
                out.finish()
            };
            for room in [0, 1 << 10, 1 << 20] {
                let error = write(room).expect_err("it is full");
                assert!(error.chain().contains("no storage space"), "{format} {room}: {}", error.chain());
            }
            write(enough).expect("there is room");
        }
    }
}
