//! The device state that an image gets: what QEMU gave, with the run state wanted.

use wire::FileRange;
use wire::mapped_ram::Sections;
use wire::qemu::vmdesc::{self, VmDescription};
use wire::qemu::{Configuration, DeviceSection, decode_xen_device_state, global_state};

use crate::manifest::Manifest;
use crate::qemu::EarlySection;
use crate::{Error, Kind, Result};

/// Device state lifted out of QEMU, its sections told apart.
#[derive(Debug)]
pub(super) struct LiftedDevices {
    /// The sections that go before the rest, and the rest, heads and footers included.
    early: Vec<u8>,
    devices: Vec<u8>,
    /// All of them, in this order; their offsets are those of where they were lifted from.
    sections: Vec<DeviceSection>,
}

impl LiftedDevices {
    /// Takes the output of `xen-save-devices-state`, which always records the guest as running, and records
    /// `run_state` instead. It has the early sections where their handlers were registered; `early` says which
    /// they are.
    ///
    /// # Errors
    /// [`Kind::Peer`] where it is not understood, or the early sections are not those of the probe;
    /// [`Kind::Unsupported`] where it cannot be told apart into sections, or has no run state to record in.
    pub(super) fn new(mut bytes: Vec<u8>, run_state: &str, early: &[EarlySection]) -> Result<LiftedDevices> {
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
        let mut rest = state.sections;
        let first = early.iter().map(|early| take(&mut rest, early)).collect::<Result<Vec<_>>>()?;
        let joined = |sections: &[DeviceSection]| {
            let bytes_of = |section: &DeviceSection| &bytes[section.header_at as usize..section.end as usize];
            sections.iter().flat_map(bytes_of).copied().collect::<Vec<u8>>()
        };
        let (early, devices) = (joined(&first), joined(&rest));
        Ok(LiftedDevices { early, devices, sections: first.into_iter().chain(rest).collect() })
    }

    /// The sections, heads and footers included, without an end mark.
    pub(super) fn sections(&self) -> Sections<'_> {
        Sections { early: &self.early, devices: &self.devices }
    }

    /// Their description, with the manifest in it.
    pub(super) fn describe(
        &self,
        configuration: &Configuration,
        page_size: u64,
        manifest: &Manifest,
    ) -> VmDescription {
        let noted = serde_json::to_value(manifest).ok();
        vmdesc::describe(Some(configuration), page_size, &self.sections, noted)
    }
}

/// Takes the section out of `sections` that the probe saw early.
fn take(sections: &mut Vec<DeviceSection>, early: &EarlySection) -> Result<DeviceSection> {
    let EarlySection { header, payload_len } = early;
    // The probe's length is the first place that could be the end, which a guest may have forged to hide what comes
    // behind it. Here the section was told apart by other means.
    let is_it = |section: &DeviceSection| {
        section.idstr == header.idstr
            && (section.section_id, section.instance_id) == (header.section_id, header.instance_id)
            && (section.version_id, section.payload.len()) == (header.version_id, *payload_len as u64)
    };
    match sections.iter().position(is_it) {
        Some(at) => Ok(sections.remove(at)),
        None => Err(Error::new(Kind::Peer, format!("`{}` is not what it was in the probe", header.idstr))
            .hint("a device was plugged in or out meanwhile; save again")),
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
