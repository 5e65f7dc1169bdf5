//! What an image is written as: pages at fixed offsets by many lanes, or one record after the other.

use std::sync::Arc;

use io::{LaneOptions, LaneSettings, Target, WriteLanes};
use mem::GuestRam;

use super::SaveFormat;
use crate::job::{Presence, anonymous_memory_bytes};
use crate::manifest::Manifest;
use crate::qemu::Probe;
use crate::sink::{
    ByteSink, DeviceState, MappedRamComposition, Means, StreamComposition, bitmap_pieces, byte_sink,
    payload_sink,
};
use crate::{Error, Kind, Rate, Result};

/// An image of a guest that stands still, being written.
pub(super) enum Writing<'a> {
    Fixed { composition: MappedRamComposition, target: &'a Target, means: Means },
    Flowing { composition: StreamComposition, out: Box<dyn ByteSink>, means: Means },
}

/// What became of the pages.
pub(super) struct Moved {
    pub(super) data_bytes: u64,
    pub(super) zero_bytes: u64,
    /// The length of all RAM.
    pub(super) ram_bytes: u64,
    /// Our own memory while they moved.
    pub(super) memory_bytes: u64,
    pub(super) presence: Presence,
}

impl<'a> Writing<'a> {
    /// Composes the image; nothing is written yet.
    pub(super) fn new(
        format: SaveFormat,
        target: &'a Target,
        means: Means,
        probe: &Probe,
        (devices, run_state, manifest): (DeviceState, &str, &Manifest),
    ) -> Result<Writing<'a>> {
        match format.has_places() {
            true => {
                let start = target.start();
                let composition = MappedRamComposition::new(probe, devices, run_state, manifest, start)?;
                Ok(Writing::Fixed { composition, target, means })
            }
            false => {
                let composition = StreamComposition::new(probe, devices, run_state, manifest)?;
                let out = match format {
                    SaveFormat::Libvirt(payload) => payload_sink(payload, target, &means)?,
                    _ => byte_sink(target, &means)?,
                };
                Ok(Writing::Flowing { composition, out, means })
            }
        }
    }

    /// Writes every page that is there, no faster than that, and counts.
    pub(super) fn pages(&mut self, rate_max: Option<Rate>, ram: &Arc<GuestRam>) -> Result<Moved> {
        let limit = rate_max.map(Rate::limit);
        let mut presence = Presence::default();
        match self {
            Writing::Fixed { composition, target, means } => {
                target.begin(composition.end())?;
                let lanes = WriteLanes::start_with(
                    target.lane_target()?,
                    ram.clone(),
                    LaneSettings {
                        lanes: usize::from(means.channels),
                        align: target.direct_io().alignment(),
                    },
                    LaneOptions { limit, ..LaneOptions::default() },
                    means.counters.clone(),
                    means.cancel.clone(),
                )?;
                // The presence map is read here, after the device state: a device's handler may have written
                // memory.
                let dealt = deal(ram, composition, &lanes, &mut presence);
                let memory_bytes = anonymous_memory_bytes();
                // A lane that failed is the reason why dealing failed, so its error is the one to tell.
                lanes.finish()?;
                dealt?;
                let moved = means.counters.read();
                Ok(Moved {
                    data_bytes: moved.bytes_written,
                    zero_bytes: moved.bytes_zero,
                    ram_bytes: composition.ram_bytes(),
                    memory_bytes,
                    presence,
                })
            }
            Writing::Flowing { composition, out, means } => {
                // A limit holds up the pages, before they are compressed.
                let sent = composition.write_ram(ram, &mut **out, means, limit.as_deref(), &mut presence)?;
                Ok(Moved {
                    data_bytes: sent.data_bytes,
                    zero_bytes: sent.zero_bytes,
                    ram_bytes: composition.ram_bytes(),
                    memory_bytes: anonymous_memory_bytes(),
                    presence,
                })
            }
        }
    }

    /// Writes all the rest. Until then it is no image.
    pub(super) fn complete(self, ram: &GuestRam) -> Result<()> {
        match self {
            Writing::Fixed { composition, target, .. } => {
                let write = |offset, bytes: &[u8]| {
                    let failed =
                        |error| Error::io(format!("cannot write {}", target.path().display()), error);
                    target.write_all_at(bytes, offset).map_err(failed)
                };
                for (offset, bytes) in composition.metadata() {
                    write(offset, bytes)?;
                }
                for (region, place) in composition.places().enumerate() {
                    for (offset, bytes) in
                        bitmap_pieces(place, ram.data_parts(region), !target.reads_as_zero())
                    {
                        write(offset, &bytes)?;
                    }
                }
                Ok(())
            }
            Writing::Flowing { composition, mut out, .. } => {
                composition.write_tail(&mut *out)?;
                out.finish()
            }
        }
    }
}

/// Deals every page that is there to the lanes, a window at a time.
fn deal(
    ram: &GuestRam,
    composition: &MappedRamComposition,
    lanes: &WriteLanes,
    presence: &mut Presence,
) -> Result<()> {
    for (region, place) in composition.places().enumerate() {
        for window in presence.windows(ram, region, &place.name)? {
            lanes.deal(ram.piece(region, &window?, place.pages.start))?;
        }
    }
    Ok(())
}

/// The format that an image at this target has, if it can have the one wanted.
pub(super) fn format_for(wanted: Option<SaveFormat>, target: io::TargetKind) -> Result<SaveFormat> {
    use io::TargetKind::{Device, File, Pipe, Place};
    let refuse = |clause: &str, hint: &str| Err(Error::new(Kind::Misuse, clause).hint(hint.to_owned()));
    match (wanted, target) {
        (None, Pipe) => Ok(SaveFormat::Stream),
        (None, _) => Ok(SaveFormat::MappedRam),
        (Some(SaveFormat::Libvirt(_)), Pipe | Place | Device) => {
            refuse("an image of libvirt is a file of its own", "give another place, or another --format")
        }
        (Some(SaveFormat::MappedRam), Pipe) => {
            refuse("a mapped-ram image cannot go into a pipe, which has no offsets", "leave --format out")
        }
        (Some(SaveFormat::Stream), Place | Device) => refuse(
            "a stream can only be a file of its own or go into a pipe",
            "leave --format out, or give another place",
        ),
        (Some(format), File | Pipe | Place | Device) => Ok(format),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use io::TargetKind::{Device, File, Pipe, Place};

    #[test]
    fn the_format_follows_from_the_target_and_what_cannot_be_is_refused() {
        use SaveFormat::{Libvirt, MappedRam, Stream};
        use wire::libvirt::PayloadFormat;
        let pipe = "a mapped-ram image cannot go into a pipe, which has no offsets";
        let place = "a stream can only be a file of its own or go into a pipe";
        for (wanted, target, expected) in [
            (None, File, Ok(MappedRam)),
            (None, Place, Ok(MappedRam)),
            (None, Device, Ok(MappedRam)),
            (None, Pipe, Ok(Stream)),
            (Some(MappedRam), File, Ok(MappedRam)),
            (Some(MappedRam), Device, Ok(MappedRam)),
            (Some(MappedRam), Pipe, Err(pipe)),
            (Some(Stream), File, Ok(Stream)),
            (Some(Stream), Pipe, Ok(Stream)),
            (Some(Stream), Place, Err(place)),
            (Some(Stream), Device, Err(place)),
            (Some(Libvirt(PayloadFormat::Zstd)), File, Ok(Libvirt(PayloadFormat::Zstd))),
            (Some(Libvirt(PayloadFormat::Zstd)), Pipe, Err("an image of libvirt is a file of its own")),
        ] {
            let found = format_for(wanted, target).map_err(|error| error.to_string());
            assert_eq!(found, expected.map_err(str::to_owned), "{wanted:?} {target:?}");
        }
    }
}
