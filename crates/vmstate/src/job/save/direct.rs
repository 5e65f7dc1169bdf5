//! The direct way: QEMU gives the device state, vmstate takes the RAM from outside and composes the image.

use std::sync::Arc;
use std::time::Instant;

use io::{Cancel, Target};
use mem::{AttachError, AttachReason, BlockAddress, GuestRam, Peer, PeerError};
use page::PageSize;
use serde_json::json;

use super::writing::Writing;
use super::{Carried, DeviceStateBy, SaveFormat, SaveSettings, Stopwatch, Then, room, via_qemu};
use crate::manifest::Manifest;
use crate::qemu::{
    self, AskedBlocks, AskedFacts, DeviceStateFile, HostBlock, Probe, Probed, Probing, Session,
};
use crate::qmp::{Begun, RunStatus};
use crate::sink::{DeviceState, Means};
use crate::{Error, Kind, Result};

/// What gives the device state without RAM.
const DEVICE_STATE_COMMAND: &str = "xen-save-devices-state";

/// Everything that can be found out while the guest still runs.
pub(super) struct Prepared {
    probe: Probe,
    blocks: Vec<HostBlock>,
    pub(super) ram: Arc<GuestRam>,
    facts: AskedFacts,
    /// Where QEMU is to write the state of the devices; `None` where that comes by a migration of its own.
    devices: Option<DeviceStateFile>,
}

/// What QEMU is asked as soon as it has greeted.
pub(super) struct Asked {
    has_command: Begun,
    blocks: AskedBlocks,
}

impl Asked {
    /// Asks.
    pub(super) fn ahead(session: &mut Session) -> Result<Asked> {
        session.ask_settings()?;
        let blocks = qemu::ask_host_blocks(&mut session.client)?;
        Ok(Asked { has_command: session.client.begin(DEVICE_STATE_COMMAND, json!({}))?, blocks })
    }
}

/// Finds out whether the guest can be carried this way, and gets as far as can be got without stopping it.
///
/// QEMU reads a command byte by byte, so that it is the slower of the two: it is always asked ahead of what is done here.
///
/// # Errors
/// [`Kind::Unsupported`] where it cannot, with the reason; others where QEMU would refuse any other way too.
pub(super) fn prepare(settings: &SaveSettings, session: &mut Session, asked: Asked) -> Result<Prepared> {
    let blocks = asked.blocks.answered(&mut session.client)?;
    // Found out now: it is needed only when the guest has been stopped.
    let is_described = by_migration(settings, session, asked.has_command, &blocks)?;
    let ram_bytes = blocks.iter().map(|block| block.used_length).sum();
    let (probing, peer) = Probing::begin(session, ram_bytes, settings.pid)?;
    let peer = Arc::new(peer);
    let (probed, mut cancelling) = probing.listen(session)?;
    let devices = match (&probed, is_described) {
        (Probed::Plain(_), false) => Some(DeviceStateFile::begin(session)?),
        _ => None,
    };
    let facts = qemu::ask_guest_facts(&mut session.client)?;
    cancelling.ask(session)?;
    let attached = attach(session, &peer, &probed, &blocks);
    cancelling.end(session)?;
    let (probe, ram) = match (probed, attached) {
        (Probed::Obstacle(reason), _) => return Err(Error::new(Kind::Unsupported, reason)),
        (Probed::Plain(probe), attached) => (probe, attached?),
    };
    Ok(Prepared { probe, blocks, ram, facts, devices })
}

/// The guest's memory, as the probe and QEMU's own list of blocks tell it.
fn attach(
    session: &mut Session,
    peer: &Arc<Peer>,
    probed: &Probed,
    blocks: &[HostBlock],
) -> Result<Arc<GuestRam>> {
    let Probed::Plain(probe) = probed else {
        return Err(Error::new(Kind::Unsupported, "it is not looked at"));
    };
    let page_size = probe.configuration.page_size().unwrap_or(PageSize::X86);
    let found = qemu::with_addresses(&mut session.client, peer, blocks)?;
    let addresses = locate(probe, &found, page_size)?;
    let mut ram = GuestRam::attach(peer.clone(), &addresses).map_err(|error| {
        let hint = denied_hint(&error);
        let error = Error::new(Kind::Unsupported, "QEMU's memory cannot be reached").because(error);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    })?;
    if let Some(cancel) = session.client.cancel() {
        ram.heed(cancel);
    }
    Ok(Arc::new(ram))
}

/// Whether the device state is to come by a migration of its own, which leaves QEMU in `postmigrate`: where that is
/// asked for, and where QEMU has no other way to give it.
fn by_migration(
    settings: &SaveSettings,
    session: &mut Session,
    has_command: Begun,
    blocks: &[HostBlock],
) -> Result<bool> {
    let is_there = session.client.knows_command_by(has_command, DEVICE_STATE_COMMAND)?;
    match settings.device_state {
        DeviceStateBy::Auto | DeviceStateBy::Command if is_there => return Ok(false),
        DeviceStateBy::Command => return Err(no_command()),
        DeviceStateBy::Auto | DeviceStateBy::Migration => {}
    }
    let fits = via_qemu::refuse_sleeping(&session.client.status()?)
        .and_then(|()| qemu::require_ignorable(session, blocks));
    match fits {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == Kind::Unsupported && settings.device_state == DeviceStateBy::Auto => {
            Err(no_command())
        }
        Err(error) => Err(error),
    }
}

fn no_command() -> Error {
    Error::new(Kind::Unsupported, format!("this QEMU has no command {DEVICE_STATE_COMMAND}"))
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

/// Refuses a target without room for this guest, of which `present` bytes are there.
///
/// # Errors
/// As [`room::require`].
pub(super) fn require_room(
    prepared: &Prepared,
    present: u64,
    target: &Target,
    format: SaveFormat,
) -> Result<()> {
    room::require(&prepared.probe, &prepared.ram, present, target, format)
}

/// Stops the guest, which had this state, and writes everything of it to the target, all but what makes it an image. While
/// it ran, so many bytes of its pages were there.
pub(super) fn carry(
    settings: &SaveSettings,
    session: &mut Session,
    (status, prepared, present_bytes): (&RunStatus, Prepared, u64),
    (target, format, channels): (&Target, SaveFormat, u16),
    cancel: &Cancel,
    watch: &mut Stopwatch<'_>,
) -> Result<Carried> {
    let Prepared { probe, blocks, ram, facts, devices } = prepared;
    let mut facts = facts.answered(&mut session.client)?;
    let devices = devices.map(|devices| devices.lent(session)).transpose()?;
    watch.phase("stop");
    session.will_stop(status)?;
    let stopped_at = Instant::now();
    let (before, (asked, written)) = session.pause_and(|client| {
        let blocks = qemu::ask_host_blocks(client)?;
        Ok((blocks, devices.as_ref().map(|devices| devices.ask(client)).transpose()?))
    })?;
    if asked.answered(&mut session.client)? != blocks {
        return Err(Error::new(Kind::Peer, "the guest's RAM blocks changed during the save")
            .hint("memory or a device was plugged in meanwhile; save again"));
    }

    watch.phase("device state");
    let run_state = super::recorded_state(settings.record, &before);
    let devices = if let (Some(devices), Some(written)) = (devices, written) {
        let devices = devices.read(session, written)?;
        session.remember_standstill(&devices)?;
        DeviceState::Alone(devices)
    } else {
        // It may have fallen asleep since it was first looked at, and QEMU pauses a guest that was resumed meanwhile
        // by itself.
        via_qemu::refuse_sleeping(&before)?;
        session.verify_still()?;
        watch.observer.note("device state by a migration of its own: QEMU is in postmigrate afterwards");
        DeviceState::Described(qemu::described_state(session)?)
    };
    qemu::stat_disks(&mut facts, Some(ram.peer().pid()));
    let manifest = Manifest::now(&session.version, "direct", &run_state, facts);
    let means = Means {
        channels,
        counters: watch.progress.counters().clone(),
        sync: settings.sync,
        domain: None,
        was_running: None,
        cancel: cancel.clone(),
    };
    let composed = (devices, run_state.as_str(), &manifest);
    let mut writing = Writing::new(format, target, means, &probe, composed)?;

    session.end_taking_back()?;
    watch.phase("ram");
    watch.progress.expect(present_bytes);
    let moved = writing.pages(settings.rate_max, &ram)?;
    watch.progress.complete();
    let looked = session.begin_looking()?;
    ram.recheck().map_err(|error| {
        Error::new(Kind::Peer, "QEMU's memory changed its place during the save").because(error)
    })?;
    // Where only the guest's own state tells it surely, that is read once: before the image gets its name, but for a
    // guest that runs on before that, and for an image that is one as soon as it is written.
    if !session.client.has_late_events() || settings.then == Then::Resume || target.is_sequential() {
        session.verify_still_by(looked)?;
    }
    // All of the guest has been read: it need not wait for the disk.
    if settings.then == Then::Resume {
        session.begin_resuming()?;
    }
    let read_at = Instant::now();

    watch.phase("metadata");
    writing.complete(&ram)?;
    session.end_resuming()?;
    Ok(Carried {
        run_state,
        direct_io: target.direct().is_some(),
        data_bytes: moved.data_bytes,
        zero_bytes: moved.zero_bytes,
        hole_bytes: moved.ram_bytes.saturating_sub(moved.data_bytes + moved.zero_bytes),
        stopped_at,
        read_at,
        memory_bytes: moved.memory_bytes,
        presence: Some(moved.presence.waited),
    })
}
