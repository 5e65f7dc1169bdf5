//! The device state that an image gets: what QEMU gave, with the run state wanted.

use wire::FileRange;
use wire::qemu::vmdesc::{self, VmDescription};
use wire::qemu::{Configuration, DeviceState, decode_xen_device_state, global_state};

use crate::manifest::Manifest;
use crate::{Error, Kind, Result};

/// Device state lifted out of QEMU, its sections told apart.
#[derive(Debug)]
pub(super) struct LiftedDevices {
    bytes: Vec<u8>,
    state: DeviceState,
}

impl LiftedDevices {
    /// Takes the output of `xen-save-devices-state`, which always records the guest as running, and records
    /// `run_state` instead.
    ///
    /// # Errors
    /// [`Kind::Peer`] where it is not understood; [`Kind::Unsupported`] where it cannot be told apart into
    /// sections, or has no run state to record in.
    pub(super) fn new(mut bytes: Vec<u8>, run_state: &str) -> Result<LiftedDevices> {
        let state = decode_xen_device_state(&bytes, 0).map_err(not_understood)?;
        match state.section(global_state::GLOBAL_STATE_SECTION, 0) {
            Some(section) => {
                let FileRange { start, end } = section.payload;
                global_state::patch_run_state(&mut bytes[start as usize..end as usize], run_state)
                    .map_err(not_understood)?;
            }
            // Without the section a guest comes back running, as QEMU has it.
            None if run_state == "running" => {}
            None => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("this machine does not record run states, so `{run_state}` would be lost"),
                )
                .hint("save with --running, or --via qemu"));
            }
        }
        Ok(LiftedDevices { bytes, state })
    }

    /// The sections, heads and footers included, without an end mark.
    pub(super) fn sections(&self) -> &[u8] {
        let first = self.state.sections.first().map_or(self.state.eof_at, |section| section.header_at);
        &self.bytes[first as usize..self.state.eof_at as usize]
    }

    /// Their description, with the manifest in it.
    pub(super) fn describe(
        &self,
        configuration: &Configuration,
        page_size: u64,
        manifest: &Manifest,
    ) -> VmDescription {
        let noted = serde_json::to_value(manifest).ok();
        vmdesc::describe(Some(configuration), page_size, &self.state.sections, noted)
    }
}

/// The error for what QEMU sent and vmstate cannot make an image of.
pub(super) fn not_understood(fault: wire::Fault) -> Error {
    let kind = match fault.kind {
        wire::FaultKind::Damaged => Kind::Peer,
        wire::FaultKind::Unsupported => Kind::Unsupported,
    };
    Error::new(kind, "QEMU's device state is not understood").because(fault).hint("save with --via qemu")
}
