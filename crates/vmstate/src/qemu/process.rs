//! Which process is the QEMU at the other end of a monitor: proven, not believed.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mem::{Peer, PeerError};
use rustix::fs::{MemfdFlags, Stat};

use super::Session;
use crate::{Error, Kind, Result};

/// The name under which QEMU holds the proof for a moment.
pub(super) const PROOF: &str = "vmstate-proof";

/// How long a process may take from its fork to its program.
const FORK_MAX: Duration = Duration::from_secs(1);
/// How often it is looked at meanwhile.
const FORK_INTERVAL: Duration = Duration::from_millis(2);

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
    let holds = |pid| match Peer::open(pid).and_then(|peer| peer.holds(dev, ino)) {
        Ok(holds) => holds,
        Err(error) => matches!(error, PeerError::Denied { .. }),
    };
    match without_forks(holders.pids, holds, FORK_MAX).as_slice() {
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

/// Of several holders those that keep what they hold.
///
/// A process that was forked has what its parent has until its program begins: a child of ours, where another thread
/// starts one, or of libvirtd's.
fn without_forks(mut pids: Vec<u32>, holds: impl Fn(u32) -> bool, within: Duration) -> Vec<u32> {
    let begun = Instant::now();
    while pids.len() > 1 && begun.elapsed() < within {
        std::thread::sleep(FORK_INTERVAL);
        pids.retain(|pid| holds(*pid));
    }
    pids
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn who_holds_the_proof_only_until_its_program_begins_is_not_qemu() {
        let looks = Cell::new(0);
        let holds = |pid| {
            looks.set(looks.get() + u32::from(pid == 2));
            pid == 1 || looks.get() < 3
        };
        assert_eq!(without_forks(vec![1, 2], holds, Duration::from_secs(60)), [1]);
        assert_eq!(looks.get(), 3);
        // One that is alone need not be looked at again, and two that do not change stay two.
        assert_eq!(without_forks(vec![3], |_| unreachable!(), Duration::from_secs(60)), [3]);
        assert_eq!(without_forks(vec![1, 2], |_| true, Duration::ZERO), [1, 2]);
    }
}
