//! Restores that cannot be: damaged images, targets that do not fit, QEMUs that do not start.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use lab::{Incoming, MachineKind, Qemu, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::source::MappedRamFile;
use vmstate::{Cancel, Error, Kind, Observer, RestoreReport, RestoreSettings, Target, Unobserved, Via};
use vmstate_rig::{DEADLINE, Hook, client};

use crate::{booted, images, names_in, save_to, says, small, told};

fn settings(image: &Path, target: Target) -> RestoreSettings {
    RestoreSettings::new(image, target)
}

fn restore(
    image: &Path,
    target: Target,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Result<RestoreReport, Error> {
    vmstate::restore(&settings(image, target), cancel, observer)
}

/// A QEMU to be started with its files in a directory of its own, by which its process is known.
struct Launch {
    home: tempfile::TempDir,
    command: Vec<OsString>,
}

impl Launch {
    fn new(spec: &QemuSpec) -> Launch {
        let home = tempfile::tempdir().unwrap();
        let mut command = vec![spec.program.clone().into_os_string()];
        command.extend(spec.machine_args(home.path()).unwrap());
        Launch { home, command }
    }

    fn target(&self) -> Target {
        Target::Launch { command: self.command.clone(), log: None, foreground: false }
    }

    fn restore(&self, image: &Path) -> Result<RestoreReport, Error> {
        restore(image, self.target(), &Cancel::new().unwrap(), &Unobserved)
    }

    /// The processes that name the directory on their command line.
    fn processes(&self) -> Vec<PathBuf> {
        let home = self.home.path().to_str().unwrap();
        let entries = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
        entries
            .filter(|path| {
                let line = fs::read(path.join("cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(home)
            })
            .collect()
    }
}

/// An image of a guest like `spec`.
fn image_of(spec: &QemuSpec, image: &Path) -> Qemu {
    let mut qemu = spec.start().unwrap();
    qemu.wait_for_round(1, DEADLINE).unwrap();
    save_to(image, &qemu, Via::Direct, &Unobserved).unwrap();
    qemu
}

#[test]
fn a_damaged_image_is_refused_before_a_qemu_starts() {
    let dir = images();
    let image = dir.path().join("vm.img");
    drop(image_of(&small(), &image));
    let layout = MappedRamFile::open(&image).unwrap().layout().clone();
    let whole = fs::read(&image).unwrap();
    let block = layout.blocks.iter().max_by_key(|block| block.used_length).unwrap();
    let (devices, description) = (layout.device_state, layout.vmdesc.unwrap());
    let middle = |start: u64, end: u64| (start + end) / 2;

    let mut damages: Vec<(String, Vec<u8>)> = Vec::new();
    for len in [
        0,
        1,
        7,
        8,
        9,
        100,
        middle(block.bitmap.start, block.bitmap.end),
        block.bitmap.end,
        block.pages.start,
        middle(block.pages.start, block.pages.end),
        block.pages.end,
        devices.start + 1,
        middle(devices.start, devices.end),
        devices.end - 1,
        description.start + 1,
        middle(description.start, description.end),
        description.end - 1,
    ] {
        damages.push((format!("cut at {len:#x}"), whole[..len as usize].to_vec()));
    }
    for at in [0, 4, 8, 12, block.bitmap.start - 1] {
        let mut bytes = whole.clone();
        bytes[at as usize] ^= 0xff;
        damages.push((format!("flipped at {at:#x}"), bytes));
    }
    let mut zeroed = whole.clone();
    zeroed[..4096].fill(0);
    damages.push(("a head of zeroes".to_owned(), zeroed));

    // A QEMU that would tell that it was started.
    let marker = dir.path().join("started");
    let program = dir.path().join("qemu");
    fs::write(&program, format!("#!/bin/sh\ntouch {}\n", marker.display())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let target = || Target::Launch { command: vec![program.clone().into()], log: None, foreground: false };
    let broken = dir.path().join("broken.img");
    for (name, bytes) in damages {
        fs::write(&broken, bytes).unwrap();
        let hook = Hook::at("start", || {});
        let (kind, chain, _) = told(restore(&broken, target(), &Cancel::new().unwrap(), &hook));
        assert!(matches!(kind, Kind::Damaged | Kind::Unsupported), "{name}: {kind:?} {chain}");
        assert!(chain.starts_with(&broken.display().to_string()), "{name}: {chain}");
        assert_eq!(hook.phases(), ["check image"], "{name}");
    }
    assert!(!marker.exists());
    // The whole image is not refused, so that the program starts and the marker is there.
    told(restore(&image, target(), &Cancel::new().unwrap(), &Unobserved));
    assert!(marker.exists());
}

#[test]
fn an_image_without_description_is_restored_all_the_same() {
    let dir = images();
    let image = dir.path().join("vm.img");
    drop(image_of(&small(), &image));
    // QEMU writes none where a machine suppresses it, and never reads it.
    let description = MappedRamFile::open(&image).unwrap().layout().vmdesc.unwrap();
    File::options().write(true).open(&image).unwrap().set_len(description.start).unwrap();
    let qemu = QemuSpec { incoming: Incoming::Defer, ..small() }.start().unwrap();
    let target = Target::Waiting(QmpAddress::Unix(qemu.qmp_path()));
    let report = restore(&image, target, &Cancel::new().unwrap(), &Unobserved).unwrap();
    assert_eq!(report.run_state, "running");
}

#[test]
fn a_target_that_does_not_fit_is_refused_and_ended() {
    let dir = images();
    let image = dir.path().join("vm.img");
    let with_vga = QemuSpec { extra: vec!["-device".into(), "VGA".into()], ..small() };
    drop(image_of(&with_vga, &image));
    let devices_hint = "start the target with the devices and memory backends that the guest was saved with";
    for (spec, clause, hint) in [
        (
            QemuSpec { ram_bytes: 32 << 20, ..with_vga.clone() },
            "target has 0x2000000 bytes for `pc.ram`, image has 0x4000000",
            "start the target with -m 64M",
        ),
        (
            QemuSpec { ram_bytes: 128 << 20, ..with_vga.clone() },
            "target has 0x8000000 bytes for `pc.ram`, image has 0x4000000",
            "start the target with -m 64M",
        ),
        (
            QemuSpec { machine_version: Some("pc-q35-9.2".to_owned()), ..with_vga.clone() },
            "target is a `pc-q35-9.2`, image has a `pc-q35-10.0`",
            "start the target with -machine pc-q35-10.0",
        ),
        (
            QemuSpec { machine: MachineKind::Pc, ..with_vga.clone() },
            "target is a `pc-i440fx-10.0`, image has a `pc-q35-10.0`",
            "start the target with -machine pc-q35-10.0",
        ),
        (small(), "target has no RAM block `0000:00:02.0/vga.vram`", devices_hint),
    ] {
        let launch = Launch::new(&spec);
        let (kind, chain, told_hint) = told(launch.restore(&image));
        // What QEMU itself wrote may follow.
        let first = chain.split("; QEMU says: ").next().unwrap();
        assert_eq!((kind, first, told_hint.as_str()), (Kind::Incompatible, clause, hint));
        assert_eq!(launch.processes(), [""; 0].map(PathBuf::from), "{clause}");

        let waiting = QemuSpec { incoming: Incoming::Defer, ..spec }.start().unwrap();
        let target = Target::Waiting(QmpAddress::Unix(waiting.qmp_path()));
        let result = restore(&image, target, &Cancel::new().unwrap(), &Unobserved);
        assert_eq!(told(result), says(Kind::Incompatible, clause, hint));
        // It still waits, for the right guest.
        assert_eq!(client(&waiting).status().unwrap().status, "inmigrate");
    }
}

#[test]
fn a_waiting_qemu_takes_the_right_image_after_a_wrong_one() {
    let dir = images();
    let (right, wrong) = (dir.path().join("right.img"), dir.path().join("wrong.img"));
    drop(image_of(&small(), &right));
    drop(image_of(&QemuSpec { ram_bytes: 128 << 20, ..small() }, &wrong));
    let mut qemu = QemuSpec { incoming: Incoming::Defer, ..small() }.start().unwrap();
    let target = || Target::Waiting(QmpAddress::Unix(qemu.qmp_path()));
    let cancel = Cancel::new().unwrap();
    assert_eq!(told(restore(&wrong, target(), &cancel, &Unobserved)).0, Kind::Incompatible);
    assert_eq!(restore(&right, target(), &cancel, &Unobserved).unwrap().run_state, "running");
    let round = qemu.serial.latest_round().unwrap();
    qemu.wait_for_round(round + 2, DEADLINE).unwrap();
}

#[test]
fn a_qemu_that_does_not_wait_for_a_guest_is_left_alone() {
    let dir = images();
    let image = dir.path().join("vm.img");
    let source = image_of(&small(), &image);
    let target = Target::Waiting(QmpAddress::Unix(source.qmp_path()));
    assert_eq!(
        told(restore(&image, target, &Cancel::new().unwrap(), &Unobserved)),
        says(
            Kind::Incompatible,
            "the target is in state `paused`, it does not wait for a guest",
            "start it with -incoming defer"
        )
    );
    assert_eq!(client(&source).status().unwrap().status, "paused");
}

#[test]
fn devices_without_ram_that_differ_are_told_in_qemus_words() {
    let dir = images();
    let image = dir.path().join("vm.img");
    let with_rng = QemuSpec { extra: vec!["-device".into(), "virtio-rng-pci".into()], ..small() };
    drop(image_of(&with_rng, &image));
    let launch = Launch::new(&small());
    assert_eq!(
        told(launch.restore(&image)),
        says(
            Kind::Incompatible,
            "target has no device `0000:00:02.0/virtio-rng`, image has one",
            "start the target with the devices that the guest was saved with; --force tries all the same"
        )
    );
    // Whoever insists hears it from QEMU.
    let settings = RestoreSettings { force: true, ..settings(&image, launch.target()) };
    let (kind, chain, hint) = told(vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved));
    assert_eq!(kind, Kind::Peer);
    assert!(chain.starts_with("QEMU could not load the image: "), "{chain}");
    assert!(chain.contains("Unknown savevm section or instance '0000:00:02.0/virtio-rng'"), "{chain}");
    assert_eq!(hint, "start it with the machine and devices that the guest was saved with");
    assert_eq!(launch.processes(), [""; 0].map(PathBuf::from));
}

#[test]
fn a_qemu_that_does_not_start_is_told_with_its_words() {
    let dir = images();
    let image = dir.path().join("vm.img");
    drop(image_of(&small(), &image));
    let with = |extra: &[&str]| {
        let mut launch = Launch::new(&small());
        launch.command.extend(extra.iter().map(OsString::from));
        launch
    };
    let (kind, chain, _) = told(with(&["-device", "no-such-device"]).restore(&image));
    assert_eq!(kind, Kind::Peer);
    assert!(chain.contains("'no-such-device' is not a valid device model name"), "{chain}");

    for (option, why) in [
        ("-incoming", "vmstate adds -incoming itself"),
        ("--loadvm", "the guest comes from the image"),
        ("-daemonize", "vmstate leaves QEMU running in the background by itself"),
    ] {
        let clause = format!("{option} among QEMU's arguments");
        let hint = format!("leave it out: {why}");
        assert_eq!(told(with(&[option]).restore(&image)), says(Kind::Misuse, &clause, &hint));
    }

    let mut launch = with(&[]);
    launch.command[0] = "/no/such/qemu".into();
    assert_eq!(
        told(launch.restore(&image)),
        says(
            Kind::Io,
            "cannot start /no/such/qemu: No such file or directory (os error 2)",
            "name the QEMU to start by its path, or install it"
        )
    );
}

#[test]
fn a_disk_that_the_old_guest_still_holds_is_told_with_what_helps() {
    let dir = images();
    let (image, disk) = (dir.path().join("vm.img"), dir.path().join("disk"));
    File::create(&disk).unwrap().write_all_at(&[0; 4096], 0).unwrap();
    let drive = format!("if=none,id=data,format=raw,file={}", disk.display());
    let spec = QemuSpec {
        extra: ["-drive", &drive, "-device", "virtio-blk-pci,drive=data"].map(OsString::from).to_vec(),
        ..small()
    };
    let old = image_of(&spec, &image);
    let launch = Launch::new(&spec);
    let (kind, chain, hint) = told(launch.restore(&image));
    assert_eq!(kind, Kind::Peer, "{chain}");
    assert!(chain.contains("Failed to get \"write\" lock"), "{chain}");
    assert_eq!(
        hint,
        "the guest that was saved may still hold its disks: end it first (vmstate save --then quit)"
    );
    assert_eq!(launch.processes(), [""; 0].map(PathBuf::from));
    // What the hint says helps.
    drop(old);
    let report = launch.restore(&image).unwrap();
    assert_eq!(report.run_state, "running");
    let pid = rustix::process::Pid::from_raw(report.qemu_pid.unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_restore_that_is_cancelled_in_any_phase_ends_the_qemu_that_it_started() {
    let dir = images();
    let image = dir.path().join("vm.img");
    drop(image_of(&small(), &image));
    for phase in ["check image", "start", "compare", "load", "run"] {
        let launch = Launch::new(&small());
        let cancel = Cancel::new().unwrap();
        let hook = Hook::at(phase, || cancel.cancel());
        let result = restore(&image, launch.target(), &cancel, &hook);
        assert!(hook.is_done(), "{phase}");
        assert_eq!(told(result), says(Kind::Interrupted, "interrupted", "no hint"), "{phase}");
        assert_eq!(launch.processes(), [""; 0].map(PathBuf::from), "{phase}");
    }
    assert_eq!(names_in(dir.path()), ["vm.img"]);
}

#[test]
fn a_restore_into_a_waiting_qemu_that_is_cancelled_before_the_load_can_be_repeated() {
    let dir = images();
    let image = dir.path().join("vm.img");
    let (source, _) = booted();
    save_to(&image, &source, Via::Direct, &Unobserved).unwrap();
    drop(source);
    let qemu = QemuSpec { incoming: Incoming::Defer, ..small() }.start().unwrap();
    let target = || Target::Waiting(QmpAddress::Unix(qemu.qmp_path()));
    let cancel = Cancel::new().unwrap();
    let hook = Hook::at("compare", || cancel.cancel());
    assert_eq!(told(restore(&image, target(), &cancel, &hook)).0, Kind::Interrupted);
    let report = restore(&image, target(), &Cancel::new().unwrap(), &Unobserved).unwrap();
    assert_eq!(report.run_state, "running");
}
