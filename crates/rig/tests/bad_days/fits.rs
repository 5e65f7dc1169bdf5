//! Disks that are not as they were, monitors that cannot do it, processes that are not QEMU.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Mutex;

use lab::{Incoming, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::{
    Cancel, Error, Kind, Observer, RestoreReport, RestoreSettings, SaveSettings, Target, Unobserved, Via,
};
use vmstate_rig::DEADLINE;

use crate::{booted, images, names_in, other, paused_footprint, save_to, small, told};

/// A guest with a raw disk that it may write and does not.
fn with_disk(disk: &Path) -> QemuSpec {
    let mut spec = small();
    let drive = format!("if=none,id=data,format=raw,file={}", disk.display());
    spec.extra = ["-drive", &drive, "-device", "virtio-blk-pci,drive=data"].map(Into::into).to_vec();
    spec
}

#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Observer for Warnings {
    fn warn(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

fn restore(spec: &QemuSpec, image: &Path, force: bool, seen: &Warnings) -> Result<RestoreReport, Error> {
    let target = QemuSpec { incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
    let waiting = Target::Waiting(QmpAddress::Unix(target.qmp_path()));
    let settings = RestoreSettings { force, ..RestoreSettings::new(image, waiting) };
    vmstate::restore(&settings, &Cancel::new().unwrap(), seen)
}

#[test]
fn a_disk_that_was_written_since_the_save_is_refused_before_the_load() {
    let dir = images();
    let (disk, image) = (dir.path().join("disk.raw"), dir.path().join("vm.img"));
    std::fs::write(&disk, vec![1; 1 << 20]).unwrap();
    let spec = with_disk(&disk);
    let mut source = spec.start().unwrap();
    source.wait_for_round(1, DEADLINE).unwrap();
    save_to(&image, &source, Via::Direct, &Unobserved).unwrap();
    drop(source);

    let seen = Warnings::default();
    restore(&spec, &image, false, &seen).unwrap();
    assert_eq!(seen.0.lock().unwrap().as_slice(), [""; 0], "the disk as it was");

    // A copy of another name has a time of its own.
    let copy = dir.path().join("copy.raw");
    std::fs::write(&copy, vec![1; 1 << 20]).unwrap();
    let seen = Warnings::default();
    restore(&with_disk(&copy), &image, false, &seen).unwrap();
    let warnings = seen.0.into_inner().unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].ends_with("was written after the guest was saved; it may be a copy"), "{warnings:?}");

    std::fs::write(&disk, vec![2; 1 << 20]).unwrap();
    let error = restore(&spec, &image, false, &Warnings::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Incompatible);
    let clause = format!("target's disk `data`, `{}`, was written after the guest was saved", disk.display());
    assert_eq!(error.to_string(), clause);
    let seen = Warnings::default();
    restore(&spec, &image, true, &seen).unwrap();
    assert_eq!(seen.0.into_inner().unwrap(), [clause], "forced, and said all the same");
}

#[test]
fn a_monitor_on_tcp_is_refused_while_the_guest_runs() {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut spec = small();
    spec.extra = vec!["-qmp".into(), format!("tcp:127.0.0.1:{port},server=on,wait=off").into()];
    let mut qemu = spec.start().unwrap();
    qemu.wait_for_round(1, DEADLINE).unwrap();
    let mut observer = other(&qemu);
    let dir = images();
    for via in [Via::Direct, Via::Qemu, Via::Auto] {
        let address = QmpAddress::Tcp { host: "127.0.0.1".to_owned(), port };
        let settings = SaveSettings { via, ..SaveSettings::new(address, dir.path().join("vm.img")) };
        let (kind, chain, hint) = told(vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved));
        assert_eq!(kind, Kind::Unsupported, "{via:?}");
        assert_eq!(
            chain,
            format!("descriptors cannot be passed to the QMP monitor at tcp:127.0.0.1:{port}"),
            "{via:?}"
        );
        assert!(hint.contains("unix socket"), "{hint}");
    }
    assert!(observer.status().unwrap().running);
    assert_eq!(observer.take_events(), [], "the guest was never stopped");
    assert_eq!(names_in(dir.path()), [""; 0]);
}

#[test]
fn a_process_that_is_not_qemu_is_not_taken_for_it() {
    let (qemu, before) = booted();
    let dir = images();
    let settings = SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), dir.path().join("vm.img"));
    let mut stranger = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    // The saver itself holds what QEMU is known by, too.
    for pid in [stranger.id(), std::process::id()] {
        let settings = SaveSettings { pid: Some(pid), ..settings.clone() };
        let (kind, chain, hint) = told(vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved));
        assert_eq!(kind, Kind::Misuse);
        assert_eq!(chain, format!("process {pid} is not the QEMU behind {}", qemu.qmp_path().display()));
        assert_eq!(hint, "leave --pid out, or give QEMU's own process id");
    }
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert_eq!(before.changes(&paused_footprint(&qemu)), [""; 0]);
    let settings = SaveSettings { pid: Some(qemu.pid()), via: Via::Direct, ..settings };
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
}
