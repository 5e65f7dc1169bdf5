//! Restore on demand: the guest runs before its memory has come, and is whole when it has.

#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::io::Write;
use std::path::{Path, PathBuf};

#[path = "../../mem/tests/guest/huge.rs"]
mod huge;

use huge::HugePool;

use lab::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, Qemu, QemuSpec, SCATTERED};
use vmstate::net::QmpAddress;
use vmstate::source::{Format, MappedRamFile};
use vmstate::{
    Cancel, ConvertSettings, Kind, Mode, Rate, Record, RestoreReport, RestoreSettings, Result, SaveSettings,
    Target, Unobserved, Via,
};
use vmstate_rig::{DEADLINE, Difference, HugeMount, StockLoad, client, stock_migrate, stock_save};

struct Saved {
    _dir: tempfile::TempDir,
    image: PathBuf,
    spec: QemuSpec,
    round: u32,
}

/// A guest that fills what it owns and then keeps writing to it, saved while it ran.
fn saved(spec: QemuSpec, pages: u32) -> Saved {
    saved_with(spec, GuestSettings { pages_low_max: pages, fill_rounds: 1, ..GuestSettings::default() })
}

fn saved_with(spec: QemuSpec, settings: GuestSettings) -> Saved {
    let spec = QemuSpec { guest: Some(Guest::new(settings)), ..spec };
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("vm.img");
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    let round = save(&mut source, &image);
    Saved { _dir: dir, image, spec, round }
}

/// Saves a guest and says which round it had finished.
fn save(qemu: &mut Qemu, image: &Path) -> u32 {
    let settings = SaveSettings {
        overwrite: true,
        via: Via::Direct,
        ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image)
    };
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    qemu.serial.latest_round().unwrap()
}

fn waiting(saved: &Saved, backend: MemoryBackend) -> Qemu {
    QemuSpec { backend, incoming: Incoming::Defer, ..saved.spec.clone() }.start().unwrap()
}

fn restore(image: &Path, target: &Qemu, record: Record) -> Result<RestoreReport> {
    restore_limited(image, target, record, None)
}

fn restore_limited(
    image: &Path,
    target: &Qemu,
    record: Record,
    rate_max: Option<Rate>,
) -> Result<RestoreReport> {
    let address = Target::Waiting(QmpAddress::Unix(target.qmp_path()));
    let settings =
        RestoreSettings { mode: Mode::Lazy, record, rate_max, ..RestoreSettings::new(image, address) };
    vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
}

#[test]
fn a_guest_runs_before_its_memory_has_come_and_is_whole_when_it_has() {
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    for machine in [MachineKind::Q35, MachineKind::Pc] {
        let saved = saved(QemuSpec::new(machine, 256 << 20), 40_000);
        for backend in [
            MemoryBackend::Plain,
            MemoryBackend::Memfd,
            MemoryBackend::Object("memory-backend-memfd,share=off".to_owned()),
            MemoryBackend::Ram,
            MemoryBackend::Object("memory-backend-ram,share=on".to_owned()),
            MemoryBackend::File(shm.path().join(machine.name())),
        ] {
            let name = format!("{} {backend}", machine.name());
            // Where the background brings next to nothing, what comes is what the guest asks for, which has to run for it.
            let rate_max = (backend == MemoryBackend::Plain).then(|| "8MiB".parse().unwrap());
            let mut target = waiting(&saved, backend);
            let report = restore_limited(&saved.image, &target, Record::AsItWas, rate_max)
                .unwrap_or_else(|error| panic!("{name}: {}; {}", error.chain(), target.stderr()));
            assert_eq!(report.run_state, "running", "{name}");
            let faults = report.faults.unwrap();
            assert!(faults.served.count > 0 && faults.preempt, "{name}: {faults:?}");
            if rate_max.is_some() {
                assert!(Some(report.first_instruction) < report.resident, "{name}: {report:?}");
                assert!(
                    faults.without_background.count > faults.beside_background.count,
                    "{name}: {faults:?}"
                );
            } else {
                assert_eq!(faults.beside_background, faults.served, "{name}: {faults:?}");
            }
            // The guest verifies every page in each round, and halts at the first that is not right.
            target.wait_for_round(saved.round + 2, DEADLINE).expect(&name);
            let left_on = client(&target).capabilities().unwrap();
            assert!(left_on.iter().all(|c| !c.state || c.name == "events"), "{name}: {left_on:?}");
        }
    }
}

#[test]
fn pages_of_2_mib_come_whole() {
    let mib = 128;
    let saved = saved(QemuSpec::new(MachineKind::Q35, mib << 20), 20_000);
    let Some(_pool) = HugePool::reserve(mib / 2 + 8, "restores on demand into huge pages") else { return };
    let check = |backend: &str| {
        let mut target = waiting(&saved, MemoryBackend::Object(backend.to_owned()));
        let report = restore(&saved.image, &target, Record::AsItWas)
            .unwrap_or_else(|error| panic!("{backend}: {}; {}", error.chain(), target.stderr()));
        let faults = report.faults.unwrap();
        assert!(faults.served.count > 0 && faults.preempt, "{backend}: {faults:?}");
        assert_eq!(report.run_state, "running", "{backend}");
        target.wait_for_round(saved.round + 2, DEADLINE).expect(backend);
    };
    check("memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on");
    check("memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=off");
    let dir = tempfile::tempdir().unwrap();
    let Some(_mount) = HugeMount::new(dir.path()) else { return };
    let path = dir.path().join("ram");
    check(&format!("memory-backend-file,share=on,mem-path={}", path.display()));
    std::fs::remove_file(path).unwrap();
}

#[test]
fn images_by_stock_qemu_come_on_demand() {
    for how in [StockLoad::PLAIN, StockLoad::BEST] {
        let mut saved = saved(QemuSpec::new(MachineKind::Q35, 128 << 20), 20_000);
        let mut source = waiting(&saved, MemoryBackend::Plain);
        restore(&saved.image, &source, Record::AsItWas).unwrap_or_else(|error| panic!("{}", error.chain()));
        saved.round = source.wait_for_round(saved.round + 1, DEADLINE).unwrap();
        let image = saved.image.with_extension("stock");
        stock_save(&source, &image, how);
        saved.round = source.serial.latest_round().unwrap();
        drop(source);
        let written = std::fs::File::open(&image).unwrap();
        written.sync_all().unwrap();
        rustix::fs::fadvise(&written, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut target = waiting(&saved, MemoryBackend::Plain);
        let report =
            restore(&image, &target, Record::Running).unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!((report.mode, report.run_state.as_str()), (Mode::Lazy, "running"), "{how:?}");
        // It is not in the page cache, and is read past that where the file system lets it be; by two readers.
        let has_direct_io = io::ReadPair::open(&image, io::DirectChoice::Auto).unwrap().direct.is_some();
        assert_eq!((report.direct_io, report.channels), (has_direct_io, 2), "{how:?}");
        target.wait_for_round(saved.round + 2, DEADLINE).unwrap();
    }
}

/// What QEMU 7.2 itself has saved is a stream, whose pages stand amid its records.
#[test]
fn a_stream_by_qemu_7_2_comes_on_demand_and_mapped_when_it_was_converted() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (golden, machine, version) in [
        ("q35-7.2-stream", MachineKind::Q35, "pc-q35-7.2"),
        ("pc-7.2-stream", MachineKind::Pc, "pc-i440fx-7.2"),
    ] {
        let (stream, image) = (dir.path().join(golden), dir.path().join("vm.img"));
        vmstate_rig::unpack_wire_golden(golden, &stream);
        let settings =
            ConvertSettings { overwrite: true, ..ConvertSettings::new(&stream, &image, Format::MappedRam) };
        vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{golden}: {}", error.chain()));
        let opened = MappedRamFile::open(&image).unwrap();
        let ram = opened.layout().blocks.iter().find(|block| block.name == "pc.ram").unwrap();
        let offset = ram.pages.start;
        let mapped = format!(
            "memory-backend-file,mem-path={},offset={offset},share=off,readonly=on,rom=off",
            image.display()
        );
        for (mode, backend) in
            [(Mode::Lazy, MemoryBackend::Plain), (Mode::Map, MemoryBackend::Object(mapped))]
        {
            let spec = QemuSpec {
                guest: None,
                machine_version: Some(version.to_owned()),
                backend,
                incoming: Incoming::Defer,
                ..QemuSpec::new(machine, 1 << 20)
            };
            let target = spec.start().unwrap();
            let address = Target::Waiting(QmpAddress::Unix(target.qmp_path()));
            let settings =
                RestoreSettings { mode, record: Record::Paused, ..RestoreSettings::new(&image, address) };
            let report = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
                .unwrap_or_else(|error| panic!("{golden} {}: {}", mode.name(), error.chain()));
            assert_eq!(report.mode, mode, "{golden}");
            let again = dir.path().join("again.img");
            let settings = SaveSettings {
                overwrite: true,
                ..SaveSettings::new(QmpAddress::Unix(target.qmp_path()), &again)
            };
            vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
                .unwrap_or_else(|error| panic!("{}", error.chain()));
            for difference in vmstate_rig::compare_images(&image, &again) {
                // The lab's QEMUs have a console, which the golden guest has not.
                let is_console = format!("{difference:?}").contains(r#"name: \"serial\""#);
                assert!(
                    is_console || matches!(difference, Difference::Section(..)),
                    "{golden}: {difference:?}"
                );
            }
        }
    }
}

/// A guest that runs in QEMU 7.2 and is saved by it: its stream is converted, and the guest goes on before its memory
/// has come, in the QEMU that it is from and in the new one.
#[test]
fn a_guest_of_qemu_7_2_goes_on_in_either_qemu_before_its_memory_has_come() {
    let program = lab::assets_dir().join("qemu72/qemu-system-x86_64");
    assert!(program.exists(), "QEMU 7.2 is not at {}: run `make setup`", program.display());
    for (machine, version) in [(MachineKind::Q35, "pc-q35-7.2"), (MachineKind::Pc, "pc-i440fx-7.2")] {
        let settings = GuestSettings { pages_low_max: 20_000, fill_rounds: 1, ..GuestSettings::default() };
        let new = QemuSpec {
            machine_version: Some(version.to_owned()),
            guest: Some(Guest::new(settings)),
            ..QemuSpec::new(machine, 128 << 20)
        };
        let old = QemuSpec { program: program.clone(), ..new.clone() };
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (stream, image) = (dir.path().join("stream"), dir.path().join("vm.img"));
        let mut source = old.start().unwrap();
        source.wait_for_round(2, DEADLINE).unwrap();
        client(&source).stop().unwrap();
        stock_migrate(&source, "migrate", &format!("exec:cat > {}", stream.display()));
        let round = source.serial.latest_round().unwrap();
        drop(source);
        let settings = ConvertSettings::new(&stream, &image, Format::MappedRam);
        vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{version}: {}", error.chain()));
        for (name, spec) in [("7.2", &old), ("10", &new)] {
            let mut target = QemuSpec { incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
            let rate_max = Some("8MiB".parse().unwrap());
            let report =
                restore_limited(&image, &target, Record::Running, rate_max).unwrap_or_else(|error| {
                    panic!("{version} in QEMU {name}: {}; {}", error.chain(), target.stderr())
                });
            assert_eq!((report.mode, report.run_state.as_str()), (Mode::Lazy, "running"), "{version} {name}");
            assert!(Some(report.first_instruction) < report.resident, "{version} {name}: {report:?}");
            // The guest verifies every page in each round, and halts at the first that is not right.
            target
                .wait_for_round(round + 2, DEADLINE)
                .unwrap_or_else(|error| panic!("{version} in QEMU {name}: {error}"));
        }
    }
}

/// Many guests, each saved at another moment and restored on demand, the next one from the one before. They write
/// their pages all over the place, and the background does not.
fn rounds(spec: QemuSpec, count: u32) {
    let mut saved = saved_with(
        spec,
        GuestSettings { pages_low_max: 3000, fill_rounds: 1, stride: SCATTERED, ..Default::default() },
    );
    let next = saved.image.with_extension("next");
    for round in 0..count {
        let mut target = waiting(&saved, MemoryBackend::Plain);
        let report = restore(&saved.image, &target, Record::AsItWas)
            .unwrap_or_else(|error| panic!("round {round}: {}; {}", error.chain(), target.stderr()));
        assert_eq!(report.run_state, "running", "round {round}");
        target
            .wait_for_round(saved.round + 2, DEADLINE)
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        saved.round = save(&mut target, &next);
        std::fs::rename(&next, &saved.image).unwrap();
    }
}

fn is_full() -> bool {
    std::env::var_os("VMSTATE_TEST_FULL").is_some()
}

#[test]
fn guests_go_from_restore_to_restore() {
    rounds(QemuSpec::new(MachineKind::Q35, 64 << 20), if is_full() { 500 } else { 24 });
}

#[test]
fn guests_go_from_restore_to_restore_in_qemu_7_2() {
    let program = lab::assets_dir().join("qemu72/qemu-system-x86_64");
    if !is_full() || !program.exists() {
        let why = "skipped: QEMU 7.2: it is a part of make test-full (VMSTATE_TEST_FULL is not set)\n";
        std::io::stderr().write_all(why.as_bytes()).unwrap();
        return;
    }
    let spec = QemuSpec {
        program,
        machine_version: Some("pc-q35-7.2".to_owned()),
        ..QemuSpec::new(MachineKind::Q35, 64 << 20)
    };
    rounds(spec, 500);
}

#[test]
fn a_guest_that_is_to_stay_paused_has_all_its_memory() {
    let saved = saved(QemuSpec::new(MachineKind::Q35, 128 << 20), 20_000);
    let mut target = waiting(&saved, MemoryBackend::Plain);
    let report = restore(&saved.image, &target, Record::Paused).unwrap();
    assert_eq!(report.run_state, "paused");
    let again = saved.image.with_extension("again");
    save(&mut target, &again);
    // The clock goes on and the state was recorded; not a byte of RAM differs.
    for difference in vmstate_rig::compare_images(&saved.image, &again) {
        assert!(matches!(difference, Difference::Section(..)), "{difference:?}");
    }
    client(&target).cont().unwrap();
    target.wait_for_round(saved.round + 2, DEADLINE).unwrap();
}

#[test]
fn memory_that_is_somebodys_file_is_refused_and_left_alone() {
    let saved = saved(QemuSpec::new(MachineKind::Q35, 64 << 20), 1000);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let hint = "give the target plain memory, a memory-backend-memfd, or a file on tmpfs with share=on";
    for (path, share, why) in [
        (dir.path().join("ram"), "on", "a file on a disk, in which no fault can be caught"),
        (shm.path().join("ram"), "off", "a private file (share=off), into which QEMU would punch holes"),
    ] {
        std::fs::write(&path, vec![0x5a; 64 << 20]).unwrap();
        let object = format!("memory-backend-file,share={share},mem-path={}", path.display());
        let target = waiting(&saved, MemoryBackend::Object(object));
        let error = restore(&saved.image, &target, Record::AsItWas).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(error.to_string(), format!("target's memory `pc.ram` is {why}: {}", path.display()));
        assert_eq!(error.hint_text(), Some(hint));
        assert!(std::fs::read(&path).unwrap()[1 << 20..].iter().all(|byte| *byte == 0x5a), "{why}");
    }
}
