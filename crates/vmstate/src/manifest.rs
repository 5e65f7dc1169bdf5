//! What vmstate notes about a save, inside the image's vmdescription.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use wire::qemu::vmdesc::VmDescription;

use crate::qmp::Version;
use crate::{Error, Kind, Result};

/// The manifest: an extra key in the JSON of the vmdescription, which QEMU reads past.
///
/// Every field may be missing in an image of another version. Nothing in it is needed to restore the guest:
/// it is what a restore compares its target with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Manifest {
    /// The version of vmstate that wrote the image.
    pub vmstate_version: String,
    /// The version of the QEMU that ran the guest.
    pub qemu_version: String,
    /// Its packager's addition.
    pub qemu_package: String,
    /// When the guest was stopped, in seconds since 1970-01-01 UTC.
    pub saved_unix_s: u64,
    /// Who carried the RAM: `direct` or `qemu`.
    pub via: String,
    /// The run state that a restore brings the guest to.
    pub run_state: String,
    /// What the guest ran on.
    #[serde(flatten)]
    pub host: GuestFacts,
}

/// What a QEMU tells of the guest that it runs, beside its state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestFacts {
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The QOM type of the first processor, for example `qemu64-x86_64-cpu`.
    pub cpu_model: String,
    /// How many processors there are.
    pub cpus: u32,
    /// The backends of the guest's memory.
    pub memory_backends: Vec<MemoryBackend>,
    /// The disks that are plugged in and have a medium.
    pub disks: Vec<Disk>,
}

/// A memory backend (`query-memdev`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryBackend {
    /// Its id.
    pub id: String,
    /// Its size in bytes.
    pub size: u64,
    /// Whether other processes may map it.
    pub share: bool,
}

/// A disk (`query-block`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// What tells it from the others: the drive's id, else the device's id or QOM path.
    pub device: String,
    /// The image's file name, as QEMU has it.
    pub file: String,
    /// The image's format, for example `qcow2`.
    pub format: String,
    /// The size that the guest sees, in bytes.
    pub virtual_bytes: u64,
    /// Whether the guest cannot write it.
    pub read_only: bool,
    /// Whether QEMU writes the file once more when it closes it, so that its time and length tell nothing.
    pub written_at_close: bool,
    /// The file's length and time of change when the guest was stopped; `None` where it is no local file.
    pub state: Option<FileState>,
}

/// What tells whether a file has been written since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileState {
    /// The length in bytes.
    pub bytes: u64,
    /// The time of the last change, in seconds since 1970-01-01 UTC.
    pub mtime_s: i64,
    /// The nanoseconds of that time.
    pub mtime_ns: i64,
}

impl FileState {
    /// The state of the file at `path`; `None` where there is no such regular file or block device.
    pub fn of(path: &Path) -> Option<FileState> {
        let metadata = std::fs::metadata(path).ok()?;
        metadata.is_file().then(|| FileState {
            bytes: metadata.len(),
            mtime_s: metadata.mtime(),
            mtime_ns: metadata.mtime_nsec(),
        })
    }
}

impl Manifest {
    /// The manifest in the vmdescription of the image at `path`, which is for messages.
    pub(crate) fn of(description: Option<VmDescription>, path: &Path) -> Result<Option<Manifest>> {
        let Some(noted) = description.and_then(|description| description.vmstate) else { return Ok(None) };
        serde_json::from_value(noted).map(Some).map_err(|error| {
            let clause = format!("{}: the manifest is not as expected", path.display());
            Error::new(Kind::Damaged, clause).because(error)
        })
    }

    /// The manifest of a save that is happening now.
    pub(crate) fn now(qemu: &Version, via: &str, run_state: &str, host: GuestFacts) -> Manifest {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Manifest {
            vmstate_version: env!("CARGO_PKG_VERSION").to_owned(),
            qemu_version: qemu.to_string(),
            qemu_package: qemu.package.clone(),
            // A clock before 1970 is no reason to lose a guest.
            saved_unix_s: since_1970.map_or(0, |time| time.as_secs()),
            via: via.to_owned(),
            run_state: run_state.to_owned(),
            host,
        }
    }
}
