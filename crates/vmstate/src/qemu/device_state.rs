//! The state of a guest's devices without its RAM.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{MemfdFlags, Mode, OFlags};
use serde_json::json;

use super::Session;
use super::session::Lending;
use crate::qmp::{Begun, Client};
use crate::{Error, Kind, Result};

/// The most device state that is taken. It is held in memory once; that of a large guest with a graphics
/// card has some tens of MiB.
const DEVICE_STATE_LEN_MAX: u64 = 1 << 30;

/// The output of `xen-save-devices-state`, through a descriptor: a confined QEMU could not open a path.
///
/// # Errors
/// As every QMP command; [`Kind::Unsupported`] where there is more of it than vmstate handles.
pub fn device_state(session: &mut Session) -> Result<Vec<u8>> {
    let lent = DeviceStateFile::begin(session)?.lent(session)?;
    let asked = lent.ask(&mut session.client)?;
    lent.read(session, asked)
}

/// A file for the state of a guest's devices, on its way to QEMU.
pub struct DeviceStateFile {
    memfd: File,
    lending: Lending,
}

/// Such a file that QEMU has.
pub struct LentDeviceStateFile {
    memfd: File,
    fdset: u64,
}

impl DeviceStateFile {
    /// Makes it, and begins to give it to QEMU.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn begin(session: &mut Session) -> Result<DeviceStateFile> {
        let memfd = rustix::fs::memfd_create("vmstate-device-state", MemfdFlags::CLOEXEC)
            .map_err(|error| Error::io("cannot create a memfd", error))?;
        let memfd = File::from(memfd);
        // QEMU takes a descriptor from a set only if its access mode is the one wanted, and a memfd's own is
        // read and write.
        let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
        let write_only = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| Error::io("cannot open a memfd for writing", error))?;
        let lending = session.begin_lending(write_only.as_fd())?;
        Ok(DeviceStateFile { memfd, lending })
    }

    /// Waits until QEMU has it.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn lent(self, session: &mut Session) -> Result<LentDeviceStateFile> {
        Ok(LentDeviceStateFile { memfd: self.memfd, fdset: session.end_lending(self.lending)? })
    }
}

impl LentDeviceStateFile {
    /// Asks QEMU to write into it.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn ask(&self, client: &mut Client) -> Result<Begun> {
        let filename = format!("/dev/fdset/{}", self.fdset);
        client.begin("xen-save-devices-state", json!({ "filename": filename, "live": false }))
    }

    /// What QEMU has written, by its answer. It begins to give the file back.
    ///
    /// # Errors
    /// As [`device_state`].
    pub fn read(mut self, session: &mut Session, asked: Begun) -> Result<Vec<u8>> {
        session.client.end(asked)?;
        session.begin_taking_back(self.fdset)?;
        let failed = |error| Error::io("cannot read the device state back", error);
        let len = self.memfd.metadata().map_err(failed)?.len();
        if len > DEVICE_STATE_LEN_MAX {
            return Err(Error::new(
                Kind::Unsupported,
                format!("the device state has {len} bytes, more than {DEVICE_STATE_LEN_MAX}"),
            )
            .hint("save with --via qemu"));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        self.memfd.rewind().map_err(failed)?;
        self.memfd.take(DEVICE_STATE_LEN_MAX).read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes)
    }
}
