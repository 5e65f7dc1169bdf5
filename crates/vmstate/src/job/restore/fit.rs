//! Whether an image and a target fit each other, found out before anything is lost. QEMU checks some of it
//! in the middle of the load, and some of it not at all.

use std::collections::HashMap;

use wire::qemu::{DeviceSection, decode_xen_device_state};

use crate::job::Observer;
use crate::manifest::{Disk, FileState, Manifest};
use crate::qemu::{self, HostBlock, Session};
use crate::source::Image;
use crate::{Error, Kind, Result};

/// Compares an image with the target that is to take it: machine, RAM blocks, devices, disks. Returns the target's
/// blocks.
///
/// # Errors
/// [`Kind::Incompatible`], naming both sides and what mends it. With `force` only machine and RAM blocks
/// count, without which nothing can be restored at all; the rest are warnings then.
pub(super) fn compare(
    image: &Image,
    session: &mut Session,
    pid: Option<u32>,
    force: bool,
    observer: &dyn Observer,
) -> Result<Vec<HostBlock>> {
    machine(image, session)?;
    let targets = blocks(image, session, observer)?;
    let mut misfits = devices(image, session, observer)?;
    match image.manifest() {
        Ok(Some(manifest)) => misfits.extend(host(&manifest, session, pid, observer)?),
        Ok(None) => {}
        Err(error) => observer.warn(&format!("the disks were not compared: {}", error.chain())),
    }
    if run_state_is_final(image)? {
        let state = image.run_state()?.unwrap_or_default();
        return Err(Error::new(
            Kind::Unsupported,
            format!("the image records the run state `{state}`, in which no QEMU takes a guest"),
        )
        .hint("save the guest again, in another state"));
    }
    for misfit in misfits {
        if !force {
            return Err(misfit);
        }
        observer.warn(&misfit.to_string());
    }
    Ok(targets)
}

/// Whether QEMU would end itself over the run state that the image records: it allows some transitions from
/// `inmigrate` and no others (system/runstate.c `runstate_transitions_def`, 10.0).
fn run_state_is_final(image: &Image) -> Result<bool> {
    Ok(matches!(image.run_state()?, Some("debug" | "inmigrate" | "restore-vm" | "save-vm")))
}

fn incompatible(clause: String, hint: impl Into<String>) -> Error {
    Error::new(Kind::Incompatible, clause).hint(hint)
}

fn machine(image: &Image, session: &mut Session) -> Result<()> {
    let Some(configuration) = image.configuration() else { return Ok(()) };
    let class = session.client.qom_string("/machine", "type")?;
    let machine = class.strip_suffix("-machine").unwrap_or(&class);
    if configuration.machine == machine {
        return Ok(());
    }
    Err(incompatible(
        format!("target is a `{machine}`, image has a `{}`", configuration.machine),
        format!("start the target with -machine {}", configuration.machine),
    ))
}

/// QEMU takes an image of 64 MiB into a guest of 128 MiB without a word.
fn blocks(image: &Image, session: &mut Session, observer: &dyn Observer) -> Result<Vec<HostBlock>> {
    let blocks = image.blocks();
    let targets = qemu::host_blocks(&mut session.client)?;
    for block in &blocks {
        let name = block.name.as_str();
        let Some(target) = targets.iter().find(|target| target.name == name) else {
            return Err(incompatible(
                format!("target has no RAM block `{name}`"),
                "start the target with the devices and memory backends that the guest was saved with",
            ));
        };
        let (has, wants) = (target.used_length, block.length);
        if has != wants {
            let is_main = blocks.iter().all(|other| other.length <= wants);
            return Err(incompatible(
                format!("target has {has:#x} bytes for `{name}`, image has {wants:#x}"),
                match is_main {
                    true => format!("start the target with -m {}M", wants >> 20),
                    false => "start the target with the devices that the guest was saved with".to_owned(),
                },
            ));
        }
    }
    for surplus in targets.iter().filter(|target| !blocks.iter().any(|block| block.name == target.name)) {
        observer
            .warn(&format!("target has a RAM block `{}`, image has none: it stays as it is", surplus.name));
    }
    Ok(targets)
}

/// Compares the device sections with those that the target would write now, fresh as it is. QEMU fails in
/// mid-load where it lacks one, and says nothing of one that the image lacks: such a device would come up
/// as after a reset, under a guest that knows nothing of it.
fn devices(image: &Image, session: &mut Session, observer: &dyn Observer) -> Result<Vec<Error>> {
    if !session.client.passes_descriptors() {
        observer.note("the target's devices could not be compared: its monitor passes no descriptors");
        return Ok(Vec::new());
    }
    let bytes = match qemu::device_state(session) {
        Ok(bytes) => bytes,
        Err(error) if error.is_refusal() => {
            observer.note(&format!("the target's devices could not be compared: {}", error.chain()));
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    let target = match decode_xen_device_state(&bytes, 0) {
        Ok(target) => target,
        Err(fault) => {
            observer.note(&format!("the target's devices could not be compared: {fault}"));
            return Ok(Vec::new());
        }
    };
    let known: HashMap<_, _> =
        target.sections.iter().map(|s| ((s.idstr.as_str(), s.instance_id), s.version_id)).collect();
    let devices = image.devices()?;
    // The target writes its early sections among the others.
    let saved: Vec<_> = image.early().iter().chain(&devices.sections).collect();
    let mut misfits = Vec::new();
    for section in &saved {
        let name = section.idstr.as_str();
        match known.get(&(name, section.instance_id)) {
            None => misfits.push(incompatible(
                format!("target has no device `{name}`{}, image has one", instance(section.instance_id)),
                "start the target with the devices that the guest was saved with; --force tries all the same",
            )),
            Some(version) if *version < section.version_id => misfits.push(incompatible(
                format!(
                    "target knows version {version} of device `{name}`, image has version {}",
                    section.version_id
                ),
                "restore into a QEMU as new as the one that was saved",
            )),
            Some(_) => {}
        }
    }
    for section in &target.sections {
        let is_it = |saved: &&&DeviceSection| {
            (saved.instance_id, &saved.idstr) == (section.instance_id, &section.idstr)
        };
        if saved.iter().find(is_it).is_none() {
            let name = section.idstr.as_str();
            observer.warn(&format!(
                "target has a device `{name}`{}, image has none: it comes up as after a reset",
                instance(section.instance_id)
            ));
        }
    }
    Ok(misfits)
}

/// The first instance needs no number.
fn instance(id: u32) -> String {
    if id == 0 { String::new() } else { format!(" (instance {id})") }
}

/// Compares what the manifest notes beside the guest's state.
fn host(
    saved: &Manifest,
    session: &mut Session,
    pid: Option<u32>,
    observer: &dyn Observer,
) -> Result<Vec<Error>> {
    let mut target = qemu::guest_facts(&mut session.client)?;
    let pid = pid.or_else(|| session.client.listener_pid());
    qemu::stat_disks(&mut target, pid);
    let saved = &saved.host;
    for (what, has, had) in [
        ("accelerator", &target.accelerator, &saved.accelerator),
        ("CPU model", &target.cpu_model, &saved.cpu_model),
    ] {
        if !had.is_empty() && !has.is_empty() && has != had {
            observer.warn(&format!("target's {what} is `{has}`, the guest was saved with `{had}`"));
        }
    }
    let mut misfits = Vec::new();
    for disk in saved.disks.iter().filter(|disk| !disk.device.is_empty()) {
        match target.disks.iter().find(|target| target.device == disk.device) {
            Some(target) => misfits.extend(compare_disks(disk, target, observer)),
            // A disk without its device is told of by the sections; here it is the medium that lacks.
            None => misfits.push(incompatible(
                format!("target has no disk `{}`, the guest was saved with `{}`", disk.device, disk.file),
                "start the target with the disks that the guest was saved with",
            )),
        }
    }
    Ok(misfits)
}

fn compare_disks(saved: &Disk, target: &Disk, observer: &dyn Observer) -> Option<Error> {
    let name = &saved.device;
    if saved.virtual_bytes != target.virtual_bytes {
        return Some(incompatible(
            format!(
                "target's disk `{name}` has {} bytes, the guest was saved with {}",
                target.virtual_bytes, saved.virtual_bytes
            ),
            format!("give the target the disk that the guest was saved with, `{}`", saved.file),
        ));
    }
    let (Some(then), Some(now)) = (saved.state, target.state) else { return None };
    if saved.read_only || then == now {
        return None;
    }
    let what = match (then.bytes == now.bytes, newer(now, then)) {
        (false, _) => format!("has {} bytes on the host, it had {}", now.bytes, then.bytes),
        (true, true) => "was written after the guest was saved".to_owned(),
        (true, false) => "is older than when the guest was saved".to_owned(),
    };
    // A copy under another name has a time of its own.
    let excuse = match () {
        () if saved.written_at_close => Some("QEMU itself writes such a disk when it ends"),
        () if saved.file != target.file && then.bytes == now.bytes => Some("it may be a copy"),
        () => None,
    };
    if let Some(excuse) = excuse {
        observer.warn(&format!("target's disk `{name}`, `{}`, {what}; {excuse}", target.file));
        return None;
    }
    Some(incompatible(
        format!("target's disk `{name}`, `{}`, {what}", target.file),
        "the guest's memory does not know of it and would damage the file system: give the disk as it was, or \
         --force if it is known to be the same",
    ))
}

fn newer(one: FileState, other: FileState) -> bool {
    (one.mtime_s, one.mtime_ns) > (other.mtime_s, other.mtime_ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Warnings(Mutex<Vec<String>>);

    impl Observer for Warnings {
        fn warn(&self, text: &str) {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }

    fn disk(file: &str, bytes: u64, mtime_s: i64) -> Disk {
        Disk {
            device: "disk0".to_owned(),
            file: file.to_owned(),
            virtual_bytes: 4096,
            state: Some(FileState { bytes, mtime_s, mtime_ns: 0 }),
            ..Disk::default()
        }
    }

    #[test]
    fn a_disk_that_was_written_since_is_refused_and_a_copy_is_doubted() {
        let saved = disk("/a", 100, 10);
        for (target, misfit, warnings) in [
            (disk("/a", 100, 10), None, 0),
            (
                disk("/a", 100, 11),
                Some("target's disk `disk0`, `/a`, was written after the guest was saved"),
                0,
            ),
            (
                disk("/a", 100, 9),
                Some("target's disk `disk0`, `/a`, is older than when the guest was saved"),
                0,
            ),
            (
                disk("/a", 101, 10),
                Some("target's disk `disk0`, `/a`, has 101 bytes on the host, it had 100"),
                0,
            ),
            (disk("/b", 100, 11), None, 1),
            (
                disk("/b", 99, 11),
                Some("target's disk `disk0`, `/b`, has 99 bytes on the host, it had 100"),
                0,
            ),
            (
                Disk { virtual_bytes: 8192, ..disk("/a", 100, 10) },
                Some("target's disk `disk0` has 8192 bytes, the guest was saved with 4096"),
                0,
            ),
            (Disk { state: None, ..disk("/a", 100, 11) }, None, 0),
        ] {
            let seen = Warnings::default();
            let found = compare_disks(&saved, &target, &seen).map(|error| error.to_string());
            assert_eq!(found.as_deref(), misfit, "{target:?}");
            assert_eq!(seen.0.lock().unwrap().len(), warnings, "{target:?}");
        }
        let lazy = Disk { written_at_close: true, ..saved.clone() };
        let seen = Warnings::default();
        assert!(compare_disks(&lazy, &disk("/a", 101, 11), &seen).is_none());
        assert_eq!(seen.0.lock().unwrap().len(), 1);
        let read_only = Disk { read_only: true, ..saved };
        assert!(compare_disks(&read_only, &disk("/a", 100, 11), &Warnings::default()).is_none());
    }
}
