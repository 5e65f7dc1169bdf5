//! The state of a guest's devices by a migration without the memory that is shared under a name (`x-ignore-shared`).
//!
//! It is QEMU's own save in every respect, with QEMU's description of every field, but it leaves QEMU in
//! `postmigrate`, and what is not such memory comes along.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use serde_json::json;
use wire::qemu::format::X_IGNORE_SHARED;

use super::{HostBlock, Session};
use crate::{Error, Kind, Result};

/// The name under which QEMU receives the socket.
const STATE: &str = "vmstate-state";
/// The most memory that may come along, in bytes: ROMs and video memory.
const BESIDE_LEN_MAX: u64 = 64 << 20;
/// The most device state that is taken; as of `xen-save-devices-state`.
const STATE_LEN_MAX: u64 = 1 << 30;
/// The first QEMU that leaves out only files that were given by name; those before leave out all shared memory
/// (commit b0182e537e).
const NAMED_SINCE: (u32, u32) = (8, 1);

/// Finds out whether QEMU leaves this guest's memory out: all but `BESIDE_LEN_MAX` bytes of it.
///
/// # Errors
/// [`Kind::Unsupported`] where it does not, naming the first block that is too much.
pub fn require_ignorable(session: &mut Session, blocks: &[HostBlock]) -> Result<()> {
    if !session.knows_capability(X_IGNORE_SHARED)? {
        let clause = format!("QEMU {} has no migration capability `{X_IGNORE_SHARED}`", session.version);
        return Err(Error::new(Kind::Unsupported, clause));
    }
    let mut beside = 0u64;
    for block in blocks {
        beside = beside.saturating_add(block.used_length);
        if beside > BESIDE_LEN_MAX {
            if is_named(session, &block.name)? {
                beside -= block.used_length;
                continue;
            }
            let clause =
                format!("`{}` is not shared memory with a name, so QEMU would send all of it", block.name);
            return Err(Error::new(Kind::Unsupported, clause).hint(
                "give the guest a memory-backend-file with share=on, or leave --device-state at auto",
            ));
        }
    }
    Ok(())
}

/// Whether the block is a backend of the kind that QEMU leaves out. A block's name is its backend's id, behind the path
/// of the device that has it, if one has.
fn is_named(session: &mut Session, block: &str) -> Result<bool> {
    let path = format!("/objects/{}", block.rsplit('/').next().unwrap_or(block));
    let kind = match session.client.qom_string(&path, "type") {
        Ok(kind) => kind,
        Err(error) if error.is_refusal() => return Ok(false),
        Err(error) => return Err(error),
    };
    let named_only = (session.version.major, session.version.minor) >= NAMED_SINCE;
    if named_only && kind != "memory-backend-file" {
        return Ok(false);
    }
    let share = session.client.execute("qom-get", json!({ "path": path, "property": "share" }))?;
    Ok(share.as_bool() == Some(true))
}

/// The whole stream of such a migration, of a guest that is paused. QEMU is in `postmigrate` afterwards.
///
/// # Errors
/// As every QMP command; [`Kind::Peer`] with QEMU's own words; [`Kind::Unsupported`] where there is more of it than
/// vmstate handles.
pub fn described_state(session: &mut Session) -> Result<Vec<u8>> {
    session.configure(
        &[X_IGNORE_SHARED],
        &[("max-bandwidth", json!(1u64 << 60)), ("mode", json!("normal")), ("tls-creds", json!(""))],
    )?;
    let (ours, theirs) =
        UnixStream::pair().map_err(|error| Error::io("cannot create a socket pair", error))?;
    session.give_fd(STATE, theirs.as_fd())?;
    drop(theirs);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut bytes = Vec::new();
            let read = (&ours).take(STATE_LEN_MAX + 1).read_to_end(&mut bytes);
            // QEMU shall not wait for one who reads no more.
            let _ = ours.shutdown(std::net::Shutdown::Both);
            read.map(|_| bytes)
        });
        let end = session.migrate(&format!("fd:{STATE}")).and_then(|()| session.migration_end(None));
        if end.is_err() {
            let _ = ours.shutdown(std::net::Shutdown::Both);
        }
        let read =
            reader.join().map_err(|_| Error::new(Kind::Io, "the thread that reads QEMU's state panicked"))?;
        let end = end?;
        let bytes = read.map_err(|error| Error::io("cannot read QEMU's state", error))?;
        if bytes.len() as u64 > STATE_LEN_MAX {
            let clause = format!("the device state has more than {STATE_LEN_MAX} bytes");
            return Err(Error::new(Kind::Unsupported, clause).hint("save with --via qemu"));
        }
        if end.status != "completed" {
            let reason = end.error.unwrap_or_else(|| format!("status `{}`", end.status));
            return Err(Error::new(Kind::Peer, format!("QEMU could not save its devices: {reason}")));
        }
        Ok(bytes)
    })
}
