//! The device state that an image gets: what QEMU gave, with the run state wanted.

use page::PageSize;
use wire::mapped_ram::Sections;
use wire::qemu::format::VMDESCRIPTION_HEADER_LEN;
use wire::qemu::vmdesc::{self, VmDescription};
use wire::qemu::{
    Configuration, DeviceSection, DeviceState as SplitState, Event, StreamScanner, check_early,
    decode_xen_device_state, global_state, split_sections,
};
use wire::{Fault, FileRange};

use crate::manifest::Manifest;
use crate::qemu::EarlySection;
use crate::{Error, Kind, Result};

/// Device state as QEMU gave it.
#[derive(Clone, Debug)]
pub enum DeviceState {
    /// The output of `xen-save-devices-state`, which always records the guest as running.
    Alone(Vec<u8>),
    /// The stream of a migration with `x-ignore-shared`.
    Described(Vec<u8>),
}

/// Device state lifted out of QEMU, its sections told apart.
#[derive(Debug)]
pub(super) struct LiftedDevices {
    /// The sections that go before the rest, and the rest, heads and footers included.
    early: Vec<u8>,
    devices: Vec<u8>,
    /// All of them, in this order; their offsets are those of where they were lifted from.
    sections: Vec<DeviceSection>,
    /// QEMU's own description of them, where it gave one.
    description: Option<VmDescription>,
}

impl LiftedDevices {
    /// Takes device state of either kind, and records `run_state`.
    ///
    /// # Errors
    /// As [`LiftedDevices::alone`] and [`LiftedDevices::described`].
    pub(super) fn new(state: DeviceState, run_state: &str, early: &[EarlySection]) -> Result<LiftedDevices> {
        match state {
            DeviceState::Alone(bytes) => LiftedDevices::alone(bytes, run_state, early),
            DeviceState::Described(bytes) => LiftedDevices::described(bytes, run_state, early),
        }
    }

    /// Takes the output of `xen-save-devices-state`, which always records the guest as running, and records
    /// `run_state` instead. It has the early sections where their handlers were registered; `early` says which
    /// they are.
    ///
    /// # Errors
    /// [`Kind::Peer`] where it is not understood, or the early sections are not those of the probe;
    /// [`Kind::Unsupported`] where it cannot be told apart into sections, or has no run state to record in.
    fn alone(mut bytes: Vec<u8>, run_state: &str, early: &[EarlySection]) -> Result<LiftedDevices> {
        let state = decode_xen_device_state(&bytes, 0).map_err(not_understood)?;
        record(&mut bytes, &state, run_state)?;
        let mut rest = state.sections;
        let first = early.iter().map(|early| take(&mut rest, early)).collect::<Result<Vec<_>>>()?;
        Ok(LiftedDevices::of(&bytes, first, rest, None))
    }

    /// Takes the stream of a migration with `x-ignore-shared`. The pages in it are not looked at: they are read
    /// from outside, as all others are.
    ///
    /// # Errors
    /// As [`LiftedDevices::alone`].
    fn described(mut bytes: Vec<u8>, run_state: &str, early: &[EarlySection]) -> Result<LiftedDevices> {
        let mut scanner = StreamScanner::new(0, PageSize::X86);
        let (mut found, mut device_state_at) = (Vec::new(), None);
        let on_event = |event: Event<'_>| {
            match event {
                Event::Early(section) => found.push(section),
                Event::DeviceState { at, .. } => device_state_at = Some(at),
                _ => {}
            }
            Ok::<_, Fault>(())
        };
        scanner.feed(&bytes, on_event).and_then(|_| scanner.finish()).map_err(not_understood)?;
        let start = device_state_at.unwrap_or(bytes.len() as u64);
        let state = split_sections(&bytes[start as usize..], start).map_err(not_understood)?;
        let description = state
            .vmdesc
            .map(|range| {
                let json = range.start + VMDESCRIPTION_HEADER_LEN as u64;
                vmdesc::parse(bytes.get(json as usize..).unwrap_or_default(), json)
            })
            .transpose()
            .map_err(not_understood)?;
        check_early(&found, description.as_ref()).map_err(not_understood)?;
        record(&mut bytes, &state, run_state)?;
        let first = early.iter().map(|early| take(&mut found, early)).collect::<Result<Vec<_>>>()?;
        if let Some(section) = found.first() {
            return Err(Error::new(Kind::Peer, format!("`{}` was not there in the probe", section.idstr))
                .hint("a device was plugged in meanwhile; save again"));
        }
        Ok(LiftedDevices::of(&bytes, first, state.sections, description))
    }

    fn of(
        bytes: &[u8],
        first: Vec<DeviceSection>,
        rest: Vec<DeviceSection>,
        description: Option<VmDescription>,
    ) -> LiftedDevices {
        let joined = |sections: &[DeviceSection]| {
            let bytes_of = |section: &DeviceSection| &bytes[section.header_at as usize..section.end as usize];
            sections.iter().flat_map(bytes_of).copied().collect::<Vec<u8>>()
        };
        let (early, devices) = (joined(&first), joined(&rest));
        LiftedDevices { early, devices, sections: first.into_iter().chain(rest).collect(), description }
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
        let ours = vmdesc::describe(Some(configuration), page_size, &self.sections, noted);
        match &self.description {
            // The configuration is that of the image, not of the migration.
            Some(theirs) => VmDescription { devices: theirs.devices.clone(), ..ours },
            None => ours,
        }
    }
}

/// Records the run state, where there is a place for it.
fn record(bytes: &mut [u8], state: &SplitState, run_state: &str) -> Result<()> {
    match state.section(global_state::GLOBAL_STATE_SECTION, 0) {
        Some(section) => {
            let FileRange { start, end } = section.payload;
            global_state::patch_run_state(&mut bytes[start as usize..end as usize], run_state)
                .map_err(not_understood)
        }
        // Without the section a guest comes back running, as QEMU has it.
        None if run_state == "running" => Ok(()),
        None => Err(Error::new(
            Kind::Unsupported,
            format!("this machine does not record run states, so `{run_state}` would be lost"),
        )
        .hint("save with --running, or --via qemu")),
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
