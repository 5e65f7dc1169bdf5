//! The main job: saved by vmstate and loaded by stock QEMU, saved by stock QEMU and restored by vmstate, for
//! every machine and kind of memory of this version. Stock QEMU is the oracle.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lab::{Guest, GuestSettings, MachineKind, MemoryBackend, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::{
    Cancel, Record, RestoreReport, RestoreSettings, SaveReport, SaveSettings, Target, Then, Unobserved, Via,
};
use vmstate_rig::{
    DEADLINE, Difference, StockLoad, client, compare_images, stock_load, stock_save, verify_image,
};

fn spec(machine: MachineKind, mib: u64, backend: MemoryBackend, settings: GuestSettings) -> QemuSpec {
    QemuSpec { backend, guest: Some(Guest::new(settings)), ..QemuSpec::new(machine, mib << 20) }
}

/// A directory for images: on a disk, where direct I/O is the real thing.
fn images() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

fn save(qmp: PathBuf, image: &Path, change: impl FnOnce(&mut SaveSettings)) -> SaveReport {
    let mut settings = SaveSettings::new(QmpAddress::Unix(qmp), image);
    change(&mut settings);
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()))
}

fn restore(image: &Path, target: Target) -> RestoreReport {
    let settings = RestoreSettings::new(image, target);
    vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()))
}

/// Small guests are touched everywhere; of the large ones a part on each side of 4 GiB is.
fn matrix() -> Vec<QemuSpec> {
    let all = GuestSettings { fill_rounds: 1, ..GuestSettings::default() };
    let some = GuestSettings { pages_low_max: 30_000, pages_high_max: 20_000, fill_rounds: 1, ..all };
    let mut specs = Vec::new();
    for machine in [MachineKind::Q35, MachineKind::Pc] {
        for backend in [MemoryBackend::Plain, MemoryBackend::Ram, MemoryBackend::Memfd] {
            specs.push(spec(machine, 1024, backend, all));
        }
        specs.push(spec(machine, 5120, MemoryBackend::Plain, some));
    }
    specs.push(spec(MachineKind::Q35, 5120, MemoryBackend::Memfd, some));
    specs
}

#[test]
fn what_vmstate_saves_stock_qemu_loads_and_the_guest_counts_on() {
    for spec in matrix() {
        let name = format!("{} {} MiB {:?}", spec.machine.name(), spec.ram_bytes >> 20, spec.backend);
        let dir = images();
        let image = dir.path().join("vm.img");
        let mut source = spec.start().expect(&name);
        source.wait_for_round(2, DEADLINE).expect(&name);
        let report = save(source.qmp_path(), &image, |settings| settings.via = Via::Direct);
        assert_eq!((report.via, report.run_state.as_str()), (Via::Direct, "running"), "{name}");
        assert_eq!(client(&source).status().unwrap().status, "paused", "{name}");
        let round = source.serial.latest_round().unwrap();
        drop(source);

        let check = vmstate::check(&image).expect(&name);
        assert!(check.report.is_clean(), "{name}: {:?}", check.report);
        let pattern = verify_image(&spec.guest.unwrap(), &spec.layout(), &image);
        assert!((round..=round + 1).contains(&pattern.round), "{name}: {pattern:?} after round {round}");

        let mut target = stock_load(&spec, &image, StockLoad::BEST);
        assert!(client(&target).status().unwrap().running, "{name}");
        // The guest itself verifies every page in each round, and halts at the first that is not right.
        target.wait_for_round(round + 2, DEADLINE).expect(&name);
    }
}

#[test]
fn what_stock_qemu_saves_vmstate_restores_and_the_guest_counts_on() {
    let settings = GuestSettings { fill_rounds: 1, ..GuestSettings::default() };
    for (machine, backend, how) in [
        (MachineKind::Q35, MemoryBackend::Plain, StockLoad::BEST),
        (MachineKind::Pc, MemoryBackend::Plain, StockLoad::PLAIN),
        (MachineKind::Q35, MemoryBackend::Memfd, StockLoad::PLAIN),
        (MachineKind::Pc, MemoryBackend::Ram, StockLoad::BEST),
    ] {
        let spec = spec(machine, 512, backend, settings);
        let name = format!("{} {:?} {how:?}", machine.name(), spec.backend);
        let dir = images();
        let image = dir.path().join("vm.img");
        let mut source = spec.start().expect(&name);
        source.wait_for_round(2, DEADLINE).expect(&name);
        stock_save(&source, &image, how);
        let round = source.serial.latest_round().unwrap();
        drop(source);
        verify_image(&spec.guest.unwrap(), &spec.layout(), &image);

        let spec = QemuSpec { incoming: lab::Incoming::Defer, ..spec };
        let mut target = spec.start().expect(&name);
        let report = restore(&image, Target::Waiting(QmpAddress::Unix(target.qmp_path())));
        // QEMU was asked to save a guest that had been stopped, and recorded just that.
        assert_eq!(report.run_state, "paused", "{name}");
        client(&target).cont().unwrap();
        target.wait_for_round(round + 2, DEADLINE).expect(&name);
    }
}

#[test]
fn a_qemu_that_restore_starts_goes_on_by_itself() {
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain, GuestSettings::default());
    let dir = images();
    let image = dir.path().join("vm.img");
    let mut source = spec.start().unwrap();
    source.wait_for_round(3, DEADLINE).unwrap();
    let saved = save(source.qmp_path(), &image, |settings| settings.then = Then::Quit);
    assert_eq!(saved.via, Via::Direct);
    assert!(source.wait(DEADLINE).unwrap().success(), "--then quit ends QEMU");
    let round = source.serial.latest_round().unwrap();

    let home = tempfile::tempdir().unwrap();
    let qmp = home.path().join("qmp");
    let mut command = vec![spec.program.clone().into_os_string()];
    command.extend(spec.machine_args(home.path()).unwrap());
    command.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", qmp.display()).into()]);
    let mut serial =
        lab::Serial::open(&home.path().join("serial.log"), &home.path().join("stderr.log")).unwrap();
    let report = restore(&image, Target::Launch { command, log: None, foreground: false });
    assert_eq!(report.run_state, "running");
    assert_eq!(report.qmp.as_deref(), qmp.to_str());
    serial.wait_for_round(round + 2, None, DEADLINE).unwrap();

    // The user's own monitor answers, and ends what nobody else would.
    let mut user = vmstate::qmp::Client::connect(&QmpAddress::Unix(qmp), &Cancel::new().unwrap()).unwrap();
    assert!(user.status().unwrap().running);
    let capabilities = user.capabilities().unwrap();
    assert!(capabilities.iter().all(|c| !c.state || c.name == "events"), "{capabilities:?}");
    user.quit().unwrap();
}

#[test]
fn both_ways_give_the_same_image_of_one_paused_guest() {
    for (machine, backend) in
        [(MachineKind::Q35, MemoryBackend::Plain), (MachineKind::Pc, MemoryBackend::Memfd)]
    {
        let settings = GuestSettings { fill_rounds: 1, ..GuestSettings::default() };
        let mut spec = spec(machine, 256, backend, settings);
        // The host's clock goes on while the guest is paused, and the clock chip would tell.
        spec.extra = vec!["-rtc".into(), "clock=vm".into()];
        let dir = images();
        let (direct, qemu) = (dir.path().join("direct.img"), dir.path().join("qemu.img"));
        let mut source = spec.start().unwrap();
        source.wait_for_round(2, DEADLINE).unwrap();
        client(&source).stop().unwrap();
        let report = save(source.qmp_path(), &direct, |settings| settings.via = Via::Direct);
        assert_eq!(report.run_state, "paused");
        save(source.qmp_path(), &qemu, |settings| settings.via = Via::Qemu);
        assert_eq!(compare_images(&direct, &qemu), [], "{}", machine.name());
    }
}

#[test]
fn the_comparison_sees_a_page_and_a_section_that_differ() {
    let spec = spec(MachineKind::Q35, 64, MemoryBackend::Plain, GuestSettings::default());
    let dir = images();
    let (one, other) = (dir.path().join("one.img"), dir.path().join("other.img"));
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    save(source.qmp_path(), &one, |settings| settings.then = Then::Resume);
    let round = source.serial.latest_round().unwrap();
    source.wait_for_round(round + 2, DEADLINE).unwrap();
    save(source.qmp_path(), &other, |_| {});
    let differences = compare_images(&one, &other);
    assert!(
        differences.iter().any(|d| matches!(d, Difference::Pages(name, _) if name == "pc.ram")),
        "{differences:?}"
    );
    assert!(differences.contains(&Difference::Section("cpu".to_owned(), 0)), "{differences:?}");
}

#[test]
fn the_state_asked_for_is_the_state_stock_qemu_lands_in() {
    let spec = spec(MachineKind::Q35, 64, MemoryBackend::Plain, GuestSettings::default());
    let dir = images();
    for via in [Via::Direct, Via::Qemu] {
        for (stopped, record, expected) in [
            (false, Record::AsItWas, "running"),
            (true, Record::AsItWas, "paused"),
            (false, Record::Paused, "paused"),
            (true, Record::Running, "running"),
        ] {
            let name = format!("{via:?}, stopped: {stopped}, {record:?}");
            let image = dir.path().join("vm.img");
            let mut source = spec.start().unwrap();
            source.wait_for_round(2, DEADLINE).unwrap();
            if stopped {
                client(&source).stop().unwrap();
            }
            let report = save(source.qmp_path(), &image, |settings| {
                settings.via = via;
                settings.record = record;
                settings.overwrite = true;
            });
            assert_eq!(report.run_state, expected, "{name}");
            let target = stock_load(&spec, &image, StockLoad::BEST);
            assert_eq!(client(&target).status().unwrap().status, expected, "{name}");
        }
    }
}

#[test]
fn a_target_whose_memory_is_not_zero_where_the_image_is_gets_refused() {
    let idle = GuestSettings::idle(1000);
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Memfd, idle);
    let dir = images();
    let image = dir.path().join("vm.img");
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    save(source.qmp_path(), &image, |_| {});
    drop(source);

    // A byte far above what the guest owns: the image has no page there, so QEMU's loader, which clears
    // nothing, would leave it in the guest's memory.
    let spec = QemuSpec { incoming: lab::Incoming::Defer, ..spec };
    let target = spec.start().unwrap();
    memfd_of(target.pid()).write_all_at(&[0x5a], 0x8001fff).unwrap();
    let settings = RestoreSettings {
        // vmstate's own way would clear it.
        via: Via::Qemu,
        ..RestoreSettings::new(&image, Target::Waiting(QmpAddress::Unix(target.qmp_path())))
    };
    let error = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap_err();
    assert_eq!(error.kind(), vmstate::Kind::Incompatible);
    assert_eq!(
        error.to_string(),
        "target's `pc.ram` holds data at 0x8001fff, where the image has zero and QEMU clears nothing"
    );
    assert!(!client(&target).status().unwrap().running, "the guest must not run on damaged memory");

    let clean = spec.start().unwrap();
    let report = restore(&image, Target::Waiting(QmpAddress::Unix(clean.qmp_path())));
    assert_eq!(report.run_state, "running");
}

/// The memory of a QEMU that has it in a memfd, opened for writing.
fn memfd_of(pid: u32) -> File {
    let mut fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let is_memory = |path: &PathBuf| {
        std::fs::read_link(path)
            .is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:memory-backend-memfd"))
    };
    let path = fds.find(is_memory).expect("a memfd");
    File::options().read(true).write(true).open(path).unwrap()
}
