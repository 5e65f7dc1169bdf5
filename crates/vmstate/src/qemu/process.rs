//! Which process is the QEMU at the other end of a monitor: proven, not believed.

use std::os::fd::AsFd;

use mem::{Peer, PeerError};
use rustix::fs::{MemfdFlags, Stat};

use super::Session;
use crate::{Error, Kind, Result};

/// The name under which QEMU holds the proof for a moment.
pub(super) const PROOF: &str = "vmstate-proof";

/// Finds QEMU's process.
///
/// A fresh memfd is given to QEMU; whoever holds its inode afterwards is QEMU. The socket's own credentials
/// name whoever called `listen` (libvirtd, when it made the socket), so they are no more than a candidate,
/// as is `pid`, the caller's own belief.
///
/// # Errors
/// [`Kind::Unsupported`] where QEMU runs on another host or in a process that may not be looked at, each
/// with a hint; [`Kind::Misuse`] where `pid` is given and is not QEMU.
pub fn find_process(session: &mut Session, pid: Option<u32>) -> Result<Peer> {
    let proof = rustix::fs::memfd_create(PROOF, MemfdFlags::CLOEXEC)
        .map_err(|error| Error::io("cannot create a memfd", error))?;
    let stat = rustix::fs::fstat(&proof).map_err(|error| Error::io("cannot stat a memfd", error))?;
    session.give_fd(PROOF, proof.as_fd())?;
    let found = search(session, pid, &stat);
    session.take_fd_back(PROOF)?;
    found
}

/// Finds the process that holds the file of `proof`, as we do.
pub(super) fn search(session: &Session, pid: Option<u32>, proof: &Stat) -> Result<Peer> {
    let (dev, ino) = (proof.st_dev, proof.st_ino);
    // A socket pair names its maker, which is us.
    let listener = session.client.listener_pid().filter(|listener| *listener != std::process::id());
    if let Some(candidate) = pid.or(listener) {
        match Peer::open(candidate).and_then(|peer| peer.holds(dev, ino).map(|held| held.then_some(peer))) {
            // We hold the proof as well.
            Ok(Some(peer)) if candidate != std::process::id() => return Ok(peer),
            Err(denied @ PeerError::Denied { .. }) => return Err(unreachable(denied)),
            _ if pid.is_some() => {
                let clause = format!("process {candidate} is not the QEMU behind {}", session.client.name());
                return Err(
                    Error::new(Kind::Misuse, clause).hint("leave --pid out, or give QEMU's own process id")
                );
            }
            _ => {}
        }
    }
    let holders = mem::find_holders(dev, ino)
        .map_err(|error| Error::io("the processes of this machine cannot be listed", error))?;
    match holders.pids.as_slice() {
        [pid] => Peer::open(*pid).map_err(unreachable),
        [] => Err(Error::new(Kind::Unsupported, "QEMU's process is not visible from here")
            .hint("run vmstate on QEMU's own host, in its process namespace, as root or QEMU's user")),
        several => Err(Error::new(
            Kind::Unsupported,
            format!("several processes ({several:?}) could be the QEMU behind {}", session.client.name()),
        )
        .hint("name the right one with --pid")),
    }
}

fn unreachable(error: PeerError) -> Error {
    let hint = match &error {
        PeerError::Denied { hint, .. } => Some(hint.clone()),
        _ => None,
    };
    let error = Error::new(Kind::Unsupported, "QEMU's process cannot be looked into").because(error);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}
