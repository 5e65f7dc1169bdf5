//! What vmstate notes about a save, inside the image's vmdescription.

use serde::{Deserialize, Serialize};

use crate::qmp::Version;

/// The manifest: an extra key in the JSON of the vmdescription, which QEMU reads past.
///
/// Every field may be missing in an image of another version.
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
}

impl Manifest {
    /// The manifest of a save that is happening now.
    pub(crate) fn now(qemu: &Version, via: &str, run_state: &str) -> Manifest {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Manifest {
            vmstate_version: env!("CARGO_PKG_VERSION").to_owned(),
            qemu_version: qemu.to_string(),
            qemu_package: qemu.package.clone(),
            // A clock before 1970 is no reason to lose a guest.
            saved_unix_s: since_1970.map_or(0, |time| time.as_secs()),
            via: via.to_owned(),
            run_state: run_state.to_owned(),
        }
    }
}
