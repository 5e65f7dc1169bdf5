//! The state of a guest's devices without its RAM.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{MemfdFlags, Mode, OFlags};

use super::Session;
use crate::{Error, Kind, Result};

/// The most device state that is taken. It is held in memory once; that of a large guest with a graphics
/// card has some tens of MiB.
const DEVICE_STATE_LEN_MAX: u64 = 1 << 30;

/// The output of `xen-save-devices-state`, through a descriptor: a confined QEMU could not open a path.
///
/// # Errors
/// As every QMP command; [`Kind::Unsupported`] where there is more of it than vmstate handles.
pub fn device_state(session: &mut Session) -> Result<Vec<u8>> {
    let memfd = rustix::fs::memfd_create("vmstate-device-state", MemfdFlags::CLOEXEC)
        .map_err(|error| Error::io("cannot create a memfd", error))?;
    let mut memfd = File::from(memfd);
    // QEMU takes a descriptor from a set only if its access mode is the one wanted, and a memfd's own is
    // read and write.
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    let write_only = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::io("cannot open a memfd for writing", error))?;
    let fdset = session.add_fdset(&[write_only.as_fd()])?;
    drop(write_only);
    session.client.save_devices_state(&format!("/dev/fdset/{fdset}"))?;
    session.remove_fdset(fdset)?;

    let failed = |error| Error::io("cannot read the device state back", error);
    let len = memfd.metadata().map_err(failed)?.len();
    if len > DEVICE_STATE_LEN_MAX {
        return Err(Error::new(
            Kind::Unsupported,
            format!("the device state has {len} bytes, more than {DEVICE_STATE_LEN_MAX}"),
        )
        .hint("save with --via qemu"));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    memfd.rewind().map_err(failed)?;
    memfd.take(DEVICE_STATE_LEN_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
