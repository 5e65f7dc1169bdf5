//! Every way for RAM into a target: filled from outside, read by QEMU, fed through a stream.

#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

#[path = "../../mem/tests/guest/huge.rs"]
mod huge;

use huge::HugePool;
use lab::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, Qemu, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::{
    Cancel, DirectIo, Kind, Record, RestoreReport, RestoreSettings, Result, SaveSettings, Target, Unobserved,
    Via,
};
use vmstate_rig::{DEADLINE, HugeMount, client};

struct Saved {
    _dir: tempfile::TempDir,
    image: PathBuf,
    spec: QemuSpec,
    round: u32,
}

/// A guest that fills all it owns, which is not all there is, saved while it ran.
fn saved(machine: MachineKind) -> Saved {
    saved_with(machine, GuestSettings { pages_low_max: 40_000, fill_rounds: 1, ..GuestSettings::default() })
}

fn saved_with(machine: MachineKind, settings: GuestSettings) -> Saved {
    let spec = QemuSpec { guest: Some(Guest::new(settings)), ..QemuSpec::new(machine, 256 << 20) };
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("vm.img");
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    let settings = SaveSettings::new(QmpAddress::Unix(source.qmp_path()), &image);
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
    let round = source.serial.latest_round().unwrap();
    Saved { _dir: dir, image, spec, round }
}

fn waiting(saved: &Saved, backend: MemoryBackend) -> Qemu {
    QemuSpec { backend, incoming: Incoming::Defer, ..saved.spec.clone() }.start().unwrap()
}

fn restore(image: &Path, target: &Qemu, via: Via, direct_io: DirectIo) -> Result<RestoreReport> {
    let settings = RestoreSettings {
        via,
        channels: Some(3),
        direct_io,
        ..RestoreSettings::new(image, Target::Waiting(QmpAddress::Unix(target.qmp_path())))
    };
    vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
}

#[test]
fn a_guest_comes_back_whole_by_every_way() {
    let (auto, off) = (DirectIo::Auto, DirectIo::Off);
    for machine in [MachineKind::Q35, MachineKind::Pc] {
        let saved = saved(machine);
        for (backend, via, direct_io, expected) in [
            (MemoryBackend::Memfd, Via::Auto, auto, Via::Direct),
            (MemoryBackend::Memfd, Via::Direct, DirectIo::On, Via::Direct),
            (MemoryBackend::Memfd, Via::Qemu, off, Via::Qemu),
            (MemoryBackend::Memfd, Via::Socket, off, Via::Socket),
            (MemoryBackend::Plain, Via::Auto, auto, Via::Qemu),
            (MemoryBackend::Plain, Via::Socket, off, Via::Socket),
            (MemoryBackend::Ram, Via::Qemu, DirectIo::On, Via::Qemu),
        ] {
            let name = format!("{} {backend:?} {via:?} {direct_io:?}", machine.name());
            let mut target = waiting(&saved, backend);
            let report = restore(&saved.image, &target, via, direct_io);
            let report = report.unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
            assert_eq!((report.via, report.run_state.as_str()), (expected, "running"), "{name}");
            // The guest verifies every page in each round, and halts at the first that is not right.
            target.wait_for_round(saved.round + 2, DEADLINE).expect(&name);
            let left_on = client(&target).capabilities().unwrap();
            assert!(left_on.iter().all(|c| !c.state || c.name == "events"), "{name}: {left_on:?}");
        }
    }
}

#[test]
fn a_target_that_was_used_before_is_cleared_where_the_image_is_zero() {
    let saved = saved(MachineKind::Q35);
    let target = waiting(&saved, MemoryBackend::Memfd);
    let memory = memfd_of(target.pid());
    // Beside the guest's pages, and on one of them.
    for offset in [0xf00_0000, 0xf00_1fff, 0x50_0010] {
        memory.write_all_at(&[0x5a; 16], offset).unwrap();
    }
    restore(&saved.image, &target, Via::Direct, DirectIo::Auto).unwrap();
    let mut bytes = [0xff; 0x2010];
    memory.read_exact_at(&mut bytes, 0xf00_0000).unwrap();
    assert_eq!(bytes, [0; 0x2010], "what was there before is gone");
    let mut target = target;
    target.wait_for_round(saved.round + 2, DEADLINE).unwrap();
}

#[test]
fn private_memory_is_not_filled_from_outside() {
    let saved = saved(MachineKind::Q35);
    let target = waiting(&saved, MemoryBackend::Plain);
    let error = restore(&saved.image, &target, Via::Direct, DirectIo::Auto).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert_eq!(error.to_string(), "target's `pc.ram` is not shared memory that can be written from outside");
    // Nothing has begun: the same target takes the guest another way.
    let report = restore(&saved.image, &target, Via::Auto, DirectIo::Auto).unwrap();
    assert_eq!(report.reason.as_deref(), Some(error.to_string().as_str()));
}

/// A guest that owns little of its memory, in a file that another guest filled before it.
fn check_used_file(directory: &Path, properties: &str, reference: &[u8], saved: &Saved) {
    let path = directory.join("ram");
    let backend = || {
        MemoryBackend::Object(format!(
            "memory-backend-file,share=on,{properties},mem-path={}",
            path.display()
        ))
    };
    let former = GuestSettings { fill_rounds: 1, ..GuestSettings::default() };
    let former = QemuSpec { guest: Some(Guest::new(former)), backend: backend(), ..saved.spec.clone() };
    let mut former = former.start().unwrap();
    former.wait_for_round(2, DEADLINE).unwrap();
    drop(former);
    let is_page_used = |page: &[u8]| page.iter().any(|byte| *byte != 0);
    let used = std::fs::read(&path).unwrap().chunks(4096).filter(|page| is_page_used(page)).count();
    assert!(used > 40_000, "{properties}: {used} pages were used before");

    let mut target = waiting(saved, backend());
    let settings = RestoreSettings {
        via: Via::Direct,
        record: Record::Paused,
        ..RestoreSettings::new(&saved.image, Target::Waiting(QmpAddress::Unix(target.qmp_path())))
    };
    let report = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
    assert_eq!(report.run_state, "paused", "{properties}");
    let memory = std::fs::read(&path).unwrap();
    let differs = memory.chunks(4096).zip(reference.chunks(4096)).position(|(ours, theirs)| ours != theirs);
    assert_eq!((memory.len(), differs), (reference.len(), None), "{properties}: the first page that differs");
    client(&target).cont().unwrap();
    target.wait_for_round(saved.round + 2, DEADLINE).expect(properties);
    drop(target);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_file_that_another_guest_filled_has_every_byte_of_the_image_and_no_other() {
    let idle = GuestSettings { fill_rounds: 1, ..GuestSettings::idle(6000) };
    let saved = saved_with(MachineKind::Q35, idle);
    // What QEMU itself makes of the image in memory that is new.
    let fresh = waiting(&saved, MemoryBackend::Memfd);
    let settings = RestoreSettings {
        via: Via::Qemu,
        record: Record::Paused,
        ..RestoreSettings::new(&saved.image, Target::Waiting(QmpAddress::Unix(fresh.qmp_path())))
    };
    vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
    let mut reference = vec![0; 256 << 20];
    memfd_of(fresh.pid()).read_exact_at(&mut reference, 0).unwrap();
    drop(fresh);

    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    for properties in ["prealloc=off", "prealloc=on"] {
        check_used_file(directory.path(), properties, &reference, &saved);
    }
    let Some(_pool) = HugePool::reserve(256 / 2 + 8, "a used file on huge pages") else { return };
    let directory = tempfile::tempdir().unwrap();
    let Some(_mount) = HugeMount::new(directory.path()) else { return };
    for properties in ["prealloc=off", "prealloc=on"] {
        check_used_file(directory.path(), properties, &reference, &saved);
    }
}

/// The memory of a QEMU that has it in a memfd, opened for writing.
fn memfd_of(pid: u32) -> File {
    let mut fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let is_memory = |path: &PathBuf| {
        let link = std::fs::read_link(path);
        link.is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:memory-backend-memfd"))
    };
    let path = fds.find(is_memory).expect("a memfd");
    File::options().read(true).write(true).open(path).unwrap()
}
