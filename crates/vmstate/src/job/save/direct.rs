//! The direct way: QEMU gives the device state, vmstate takes the RAM from outside and composes the image.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use io::{Cancel, Counters, Draft, LaneSettings, WriteLanes};
use mem::{AttachError, AttachReason, BlockAddress, GuestRam, PeerError};
use page::PageSize;

use super::{Carried, SaveSettings, Stopwatch, anonymous_memory_bytes};
use crate::manifest::{GuestFacts, Manifest};
use crate::qemu::{self, HostBlock, Probe, Probed, Session};
use crate::sink::{MappedRamComposition, bitmap_pieces};
use crate::{Error, Kind, Result};

/// Everything that can be found out while the guest still runs.
pub(super) struct Prepared {
    probe: Probe,
    blocks: Vec<HostBlock>,
    ram: Arc<GuestRam>,
    facts: GuestFacts,
}

/// Finds out whether the guest can be carried this way, and gets as far as can be got without stopping it.
///
/// # Errors
/// [`Kind::Unsupported`] where it cannot, with the reason; others where QEMU would refuse any other way too.
pub(super) fn prepare(settings: &SaveSettings, session: &mut Session) -> Result<Prepared> {
    let peer = qemu::find_process(session, settings.pid)?;
    let probe = match qemu::probe(session)? {
        Probed::Plain(probe) => probe,
        Probed::Obstacle(reason) => return Err(Error::new(Kind::Unsupported, reason)),
    };
    let blocks = qemu::host_blocks(&mut session.client)?;
    let page_size = probe.configuration.page_size().unwrap_or(PageSize::X86);
    let found = qemu::with_addresses(&mut session.client, &peer, &blocks)?;
    let addresses = locate(&probe, &found, page_size)?;
    let ram = GuestRam::attach(Arc::new(peer), &addresses).map_err(|error| {
        let hint = denied_hint(&error);
        let error = Error::new(Kind::Unsupported, "QEMU's memory cannot be reached").because(error);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    })?;
    let facts = qemu::guest_facts(&mut session.client)?;
    Ok(Prepared { probe, blocks, ram: Arc::new(ram), facts })
}

/// What would help where the kernel forbids to look into the process.
fn denied_hint(error: &AttachError) -> Option<String> {
    match error {
        AttachError::Peer(PeerError::Denied { hint, .. })
        | AttachError::Block { reason: AttachReason::Peer(PeerError::Denied { hint, .. }), .. } => {
            Some(hint.clone())
        }
        _ => None,
    }
}

/// Matches the blocks that migrate with those that QEMU's process holds.
fn locate(probe: &Probe, blocks: &[HostBlock], page_size: PageSize) -> Result<Vec<BlockAddress>> {
    probe
        .setup
        .blocks
        .iter()
        .map(|entry| {
            let unsupported = |what: String| Error::new(Kind::Unsupported, what);
            let name = entry.name.as_str();
            let block = blocks
                .iter()
                .find(|block| block.name == name)
                .ok_or_else(|| unsupported(format!("`info ramblock` does not list `{name}`")))?;
            if block.used_length != entry.used_length {
                return Err(unsupported(format!(
                    "`{name}` has {:#x} bytes in the stream and {:#x} in `info ramblock`",
                    entry.used_length, block.used_length
                )));
            }
            let address = block.address.filter(|address| *address != 0).ok_or_else(|| {
                unsupported(format!("this QEMU does not tell where `{name}` is (8.0 and later do)"))
            })?;
            Ok(BlockAddress {
                name: name.to_owned(),
                address,
                length: entry.used_length,
                page_size: page_size.bytes(),
            })
        })
        .collect()
}

/// Stops the guest and writes everything of it into the draft, all but its name.
pub(super) fn carry(
    settings: &SaveSettings,
    session: &mut Session,
    prepared: Prepared,
    draft: &Draft,
    cancel: &Cancel,
    watch: &mut Stopwatch<'_>,
) -> Result<Carried> {
    let Prepared { probe, blocks, ram, mut facts } = prepared;
    watch.phase("stop");
    let stopped_at = Instant::now();
    let before = session.pause()?;
    if qemu::host_blocks(&mut session.client)? != blocks {
        return Err(Error::new(Kind::Peer, "the guest's RAM blocks changed during the save")
            .hint("memory or a device was plugged in meanwhile; save again"));
    }

    watch.phase("device state");
    let run_state = super::recorded_state(settings.record, &before);
    let devices = qemu::device_state(session)?;
    qemu::stat_disks(&mut facts, Some(ram.peer().pid()));
    let manifest = Manifest::now(&session.version, "direct", &run_state, facts);
    let composition = MappedRamComposition::new(&probe, devices, &run_state, &manifest)?;

    watch.phase("ram");
    draft.set_len(composition.len())?;
    let counters = Arc::new(Counters::default());
    let lanes = WriteLanes::start(
        draft.lane_target()?,
        ram.clone(),
        LaneSettings { lanes: usize::from(settings.channels()), align: draft.direct_io().alignment() },
        counters.clone(),
        cancel.clone(),
    )?;
    // The presence map is read here, after the device state: a device's handler may have written memory.
    let dealt = deal(&ram, &composition, &lanes);
    let memory_bytes = anonymous_memory_bytes();
    // A lane that failed is the reason why dealing failed, so its error is the one to tell.
    lanes.finish()?;
    dealt?;
    ram.recheck().map_err(|error| {
        Error::new(Kind::Peer, "QEMU's memory changed its place during the save").because(error)
    })?;
    session.verify_still()?;
    let read_at = Instant::now();

    watch.phase("metadata");
    let moved = counters.read();
    let write = |offset, bytes: &[u8]| {
        let failed = |error| Error::io(format!("cannot write {}", draft.path().display()), error);
        draft.buffered().write_all_at(bytes, offset).map_err(failed)
    };
    for (offset, bytes) in composition.metadata() {
        write(offset, bytes)?;
    }
    for (region, place) in composition.places().enumerate() {
        for (offset, bytes) in bitmap_pieces(place, &ram.data_pages(region)) {
            write(offset, &bytes)?;
        }
    }
    let total = composition.ram_bytes();
    Ok(Carried {
        run_state,
        direct_io: draft.direct().is_some(),
        data_bytes: moved.bytes_written,
        zero_bytes: moved.bytes_zero,
        hole_bytes: total.saturating_sub(moved.bytes_written + moved.bytes_zero),
        stopped_at,
        read_at,
        memory_bytes,
    })
}

/// Deals every page that is there to the lanes, a window at a time.
fn deal(ram: &GuestRam, composition: &MappedRamComposition, lanes: &WriteLanes) -> Result<()> {
    for (region, place) in composition.places().enumerate() {
        let untold =
            |error| Error::io(format!("cannot tell which pages of `{}` are there", place.name), error);
        for window in ram.windows(region).map_err(untold)? {
            lanes.deal(ram.piece(region, &window.map_err(untold)?, place.pages.start))?;
        }
    }
    Ok(())
}
