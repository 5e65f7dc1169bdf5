//! QEMU 7.2, which tells no host addresses and has no mapped-ram: what vmstate takes from outside is what that QEMU
//! writes itself, byte for byte, and the newer QEMU goes on with it.
//!
//! A part of `make test-full`: `scripts/setup-qemu72.sh` unpacks the old QEMU.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use lab::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, Qemu, QemuSpec, Serial};
use page::PageSize;
use serde_json::{Map, json};
use vmstate::net::QmpAddress;
use vmstate::qmp::Client;
use vmstate::source::{Format, MappedRamFile};
use vmstate::{
    Cancel, ConvertSettings, Kind, Mode, Record, RestoreSettings, SaveSettings, TakeUpSettings, Target,
    Unobserved, Via,
};
use vmstate_rig::{
    DEADLINE, StockLoad, client, compare_images, stock_load, stock_migrate, stock_save, verify_image,
};
use wire::qemu::{Event, StreamScanner};

/// The old QEMU as a user has it who never heard of the new one; `None`, aloud, where it is not to be tested.
fn old(machine: MachineKind, backend: MemoryBackend, mib: u64) -> Option<QemuSpec> {
    let program = lab::assets_dir().join("qemu72/qemu-system-x86_64");
    if std::env::var_os("VMSTATE_TEST_FULL").is_none() {
        return skipped("it is a part of make test-full (VMSTATE_TEST_FULL is not set)");
    }
    if !program.exists() {
        return skipped(&format!(
            "there is none at {}; scripts/setup-qemu72.sh unpacks it",
            program.display()
        ));
    }
    let version = match machine {
        MachineKind::Q35 => "pc-q35-7.2",
        MachineKind::Pc => "pc-i440fx-7.2",
    };
    let guest = GuestSettings {
        fill_rounds: 1,
        pages_low_max: 30_000,
        pages_high_max: 20_000,
        ..GuestSettings::default()
    };
    Some(QemuSpec {
        program,
        machine_version: Some(version.to_owned()),
        backend,
        guest: Some(Guest::new(guest)),
        ..QemuSpec::new(machine, mib << 20)
    })
}

/// Says so past the test harness, which keeps what a test that passes prints.
fn skipped(why: &str) -> Option<QemuSpec> {
    std::io::stderr().write_all(format!("skipped: QEMU 7.2: {why}\n").as_bytes()).unwrap();
    None
}

fn images() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

fn save(qemu: &Qemu, image: &Path) {
    let settings =
        SaveSettings { via: Via::Direct, ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image) };
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
}

#[test]
fn what_is_saved_from_qemu_7_2_goes_on_in_stock_qemu() {
    for machine in [MachineKind::Q35, MachineKind::Pc] {
        for (backend, mib) in
            [(MemoryBackend::Plain, 1024), (MemoryBackend::Memfd, 1024), (MemoryBackend::Plain, 5120)]
        {
            let name = format!("{} {backend:?} {mib} MiB", machine.name());
            let Some(spec) = old(machine, backend, mib) else { return };
            let dir = images();
            let image = dir.path().join("vm.img");
            let mut source = spec.start().expect(&name);
            source.wait_for_round(2, DEADLINE).expect(&name);
            save(&source, &image);
            let round = source.serial.latest_round().unwrap();
            drop(source);

            let check = vmstate::check(&image).expect(&name);
            assert!(check.report.is_clean(), "{name}: {:?}", check.report);
            verify_image(&spec.guest.unwrap(), &spec.layout(), &image);
            let new = QemuSpec { program: QemuSpec::new(machine, mib << 20).program, ..spec };
            let mut target = stock_load(&new, &image, StockLoad::BEST);
            assert!(client(&target).status().unwrap().running, "{name}");
            target.wait_for_round(round + 2, DEADLINE).expect(&name);
        }
    }
}

#[test]
fn what_is_saved_from_either_qemu_comes_back_in_qemu_7_2() {
    for (machine, backend) in
        [(MachineKind::Q35, MemoryBackend::Plain), (MachineKind::Pc, MemoryBackend::Memfd)]
    {
        let name = format!("{} {backend:?}", machine.name());
        let Some(old) = old(machine, backend, 1024) else { return };
        let new = QemuSpec { program: QemuSpec::new(machine, 0).program, ..old.clone() };
        for (from, spec) in [("7.2", &old), ("10", &new)] {
            let dir = images();
            let image = dir.path().join("vm.img");
            let mut source = spec.start().expect(&name);
            source.wait_for_round(2, DEADLINE).expect(&name);
            save(&source, &image);
            let round = source.serial.latest_round().unwrap();
            drop(source);
            let mut target = QemuSpec { incoming: Incoming::Defer, ..old.clone() }.start().expect(&name);
            let waiting = Target::Waiting(QmpAddress::Unix(target.qmp_path()));
            let settings = RestoreSettings::new(&image, waiting);
            let report = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
                .unwrap_or_else(|error| panic!("{name} from {from}: {}", error.chain()));
            assert_eq!(report.run_state, "running", "{name} from {from}");
            // Shared memory is found, and filled, in a QEMU that does not tell where it is, too.
            let expected = if spec.backend == MemoryBackend::Memfd { Via::Direct } else { Via::Socket };
            assert_eq!(report.via, expected, "{name} from {from}: {report:?}");
            target
                .wait_for_round(round + 2, DEADLINE)
                .unwrap_or_else(|error| panic!("{name} from {from}: {error}"));
        }
    }
}

#[test]
fn qemu_7_2_says_that_it_maps_no_image_and_gets_all_of_it_instead() {
    let Some(mut spec) = old(MachineKind::Q35, MemoryBackend::Plain, 512) else { return };
    // More than what is read as a whole for being small.
    let guest = GuestSettings { fill_rounds: 1, pages_low_max: 80_000, ..GuestSettings::default() };
    spec.guest = Some(Guest::new(guest));
    let dir = images();
    let image = dir.path().join("vm.img");
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    save(&source, &image);
    let round = source.serial.latest_round().unwrap();
    drop(source);
    let clause = "this QEMU cannot map an image: 8.2 is the first that can";
    for mode in [Mode::Map, Mode::Auto] {
        rustix::fs::fadvise(File::open(&image).unwrap(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let home = tempfile::tempdir().unwrap();
        let mut command = vec![spec.program.clone().into_os_string()];
        command.extend(spec.machine_args(home.path()).unwrap());
        let stderr = home.path().join("stderr.log");
        let mut serial = Serial::open(&QemuSpec::serial_path(home.path()), &stderr).unwrap();
        let target = Target::Launch { command, log: None, foreground: false };
        let settings =
            RestoreSettings { mode, record: Record::Running, ..RestoreSettings::new(&image, target) };
        match vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved) {
            Err(error) => {
                assert_eq!(mode, Mode::Map, "{}", error.chain());
                assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Unsupported, clause));
                assert_eq!(error.hint_text(), Some("restore with --mode eager"));
            }
            Ok(report) => {
                assert_eq!((mode, report.mode), (Mode::Auto, Mode::Eager));
                let lost = "without -qmp among QEMU's arguments it would be lost if vmstate were killed";
                assert_eq!(report.mode_reason, Some(format!("{clause}; {lost}")));
                serial.wait_for_round(round + 2, None, DEADLINE).unwrap();
                let pid = report.qemu_pid.and_then(|pid| rustix::process::Pid::from_raw(pid as i32));
                rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::KILL).unwrap();
            }
        }
    }
}

/// It has no connection of its own for pages that are asked for, so it is given one descriptor.
#[test]
fn a_lazy_restore_into_qemu_7_2_that_broke_off_is_taken_up_again() {
    let Some(spec) = old(MachineKind::Q35, MemoryBackend::Plain, 256) else { return };
    let dir = images();
    let (image, whole) = (dir.path().join("vm.img"), dir.path().join("whole.img"));
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    save(&source, &image);
    let round = source.serial.latest_round().unwrap();
    drop(source);
    std::fs::copy(&image, &whole).unwrap();

    let mut target =
        QemuSpec { incoming: Incoming::Defer, second_qmp: true, ..spec.clone() }.start().unwrap();
    let never = Cancel::new().unwrap();
    let mut watcher = Client::connect(&QmpAddress::Unix(target.second_qmp_path()), &never).unwrap();
    let qmp = QmpAddress::Unix(target.qmp_path());
    // The background takes an hour at this rate; what the guest asks for comes at once.
    let settings = RestoreSettings {
        mode: Mode::Lazy,
        rate_max: Some("64K".parse().unwrap()),
        ..RestoreSettings::new(&image, Target::Waiting(qmp.clone()))
    };
    let error = std::thread::scope(|scope| {
        let restored = scope.spawn(|| vmstate::restore(&settings, &never, &Unobserved));
        while watcher.next_event(None).unwrap().is_none_or(|event| event.name != "RESUME") {}
        // The guest goes on up to the first page that lay behind this.
        File::options().write(true).open(&image).unwrap().set_len(64 << 20).unwrap();
        while !restored.is_finished() {
            // Of a page that was made up the guest would tell, and halt.
            if let Err(error) = target.serial.latest_round() {
                target.kill().unwrap();
                panic!("{error}");
            }
            std::thread::yield_now();
        }
        restored.join().unwrap().unwrap_err()
    });
    assert!(error.hint_text().is_some_and(|hint| hint.contains("restore --resume")), "{}", error.chain());

    let mut file = File::options().write(true).open(&image).unwrap();
    std::io::copy(&mut File::open(&whole).unwrap(), &mut file).unwrap();
    let settings = TakeUpSettings { image, offset: 0, qmp, force: false, rate_max: None };
    let report = vmstate::take_up(&settings, &never, &Unobserved)
        .unwrap_or_else(|error| panic!("{}; {}", error.chain(), target.stderr()));
    assert_eq!((report.run_state.as_str(), report.faults.preempt), ("running", false), "{report:?}");
    assert!(report.arrived_bytes > 0 && report.read_bytes > 0, "{report:?}");
    // The guest verifies every page in each round, and halts at the first that is not right.
    target.wait_for_round(round + 3, DEADLINE).unwrap();
    let left_on = watcher.capabilities().unwrap();
    assert!(left_on.iter().all(|c| !c.state || c.name == "events"), "{left_on:?}");
}

fn convert(from: &Path, to: &Path, format: Format) {
    vmstate::convert(&ConvertSettings::new(from, to, format), &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(compare_images(from, to), []);
}

#[test]
fn what_was_converted_goes_on_in_the_other_qemu() {
    for (machine, backend) in
        [(MachineKind::Q35, MemoryBackend::Plain), (MachineKind::Pc, MemoryBackend::Memfd)]
    {
        let name = format!("{} {backend:?}", machine.name());
        let Some(old) = old(machine, backend, 512) else { return };
        let new = QemuSpec { program: QemuSpec::new(machine, 0).program, ..old.clone() };
        let dir = images();
        let at = |name: &str| dir.path().join(name);

        // A stream by QEMU 7.2, which has no other format, into QEMU 10 by its best loader.
        let mut source = old.start().expect(&name);
        source.wait_for_round(2, DEADLINE).expect(&name);
        client(&source).stop().expect(&name);
        stock_migrate(&source, "migrate", &format!("exec:cat > {}", at("old").display()));
        let round = source.serial.latest_round().unwrap();
        drop(source);
        convert(&at("old"), &at("old-mapped"), Format::MappedRam);
        let mut target = stock_load(&new, &at("old-mapped"), StockLoad::BEST);
        client(&target).cont().expect(&name);
        target.wait_for_round(round + 2, DEADLINE).unwrap_or_else(|error| panic!("{name} to 10: {error}"));

        // And back: what QEMU 10 saved of a machine of that age.
        stock_save(&target, &at("new"), StockLoad::BEST);
        let round = target.serial.latest_round().unwrap();
        drop(target);
        convert(&at("new"), &at("new-stream"), Format::Stream);
        let mut target = QemuSpec { incoming: Incoming::Defer, ..old.clone() }.start().expect(&name);
        stock_migrate(&target, "migrate-incoming", &format!("exec:cat {}", at("new-stream").display()));
        client(&target).cont().expect(&name);
        target.wait_for_round(round + 2, DEADLINE).unwrap_or_else(|error| panic!("{name} to 7.2: {error}"));
    }
}

/// Displays and network cards, two of a kind: memory that is mapped under one name twice, and ROMs that are not mapped
/// at all and have the same length.
const DEVICES: &str = "-device VGA -device secondary-vga -device virtio-gpu-pci -device virtio-balloon-pci \
                       -netdev user,id=one -device virtio-net-pci,netdev=one -netdev user,id=two \
                       -device virtio-net-pci,netdev=two -netdev user,id=three -device e1000,netdev=three";

#[test]
fn every_block_of_qemu_7_2_is_found_and_holds_what_qemu_sends_of_it() {
    for (machine, backend) in [
        (MachineKind::Q35, MemoryBackend::Plain),
        (MachineKind::Pc, MemoryBackend::Plain),
        (MachineKind::Q35, MemoryBackend::Ram),
        (MachineKind::Pc, MemoryBackend::Memfd),
    ] {
        let name = format!("{} {backend:?}", machine.name());
        let Some(mut spec) = old(machine, backend, 256) else { return };
        spec.extra = DEVICES.split_whitespace().map(Into::into).collect();
        let dir = images();
        let (image, stream) = (dir.path().join("vm.img"), dir.path().join("stream"));
        let mut source = spec.start().expect(&name);
        source.wait_for_round(1, DEADLINE).expect(&name);
        save(&source, &image);
        write_stream(&source, &stream);
        let blocks = compare(&image, &stream, &name);
        for block in
            ["pc.ram", "pc.bios", "/rom@etc/acpi/tables", "/rom@etc/table-loader", "/rom@etc/acpi/rsdp"]
        {
            assert!(blocks.iter().any(|known| known == block), "{name}: no `{block}` among {blocks:?}");
        }
        // Some of each, and not only the first.
        let count = |end: &str| blocks.iter().filter(|block| block.ends_with(end)).count();
        assert_eq!((count("/vga.vram"), count("/virtio-net-pci.rom")), (2, 2), "{name}: {blocks:?}");
    }
}

/// Has QEMU write a stream of the guest, which vmstate has paused, by nothing but its own commands.
fn write_stream(qemu: &Qemu, path: &Path) {
    let mut client = client(qemu);
    let file = File::create(path).unwrap();
    let mut bandwidth = Map::new();
    bandwidth.insert("max-bandwidth".to_owned(), json!(1u64 << 60));
    client.set_parameters(bandwidth).unwrap();
    client.getfd("stream", file.as_fd()).unwrap();
    client.migrate("fd:stream").unwrap();
    let end = std::time::Instant::now() + DEADLINE;
    while client.migration().unwrap().status != "completed" {
        assert!(std::time::Instant::now() < end, "{:?}", client.migration());
        std::thread::yield_now();
    }
}

/// Compares every page of a stream with the image's; returns the names of the blocks.
fn compare(image: &Path, stream: &Path, name: &str) -> Vec<String> {
    let image = MappedRamFile::open(image).unwrap();
    let blocks = &image.layout().blocks;
    let pages: Vec<_> = blocks.iter().map(|block| image.pages(block).unwrap()).collect();
    let mut names = Vec::new();
    let mut seen = vec![0; blocks.len()];
    let mut page = [0; 4096];
    let mut differs = |index: usize, offset: u64, data: &[u8]| {
        seen[index] += 1;
        image.read_ram(&blocks[index], &pages[index], offset, &mut page).unwrap();
        assert!(page == data, "{name}: `{}` at {offset:#x} is not what QEMU sends", blocks[index].name);
    };
    let file = File::open(stream).unwrap();
    let mut scanner = StreamScanner::new(0, PageSize::X86);
    let mut window = vec![0; 1 << 20];
    let (mut at, mut is_over) = (0, false);
    while !is_over {
        let len = file.read_at(&mut window, at).unwrap();
        assert_ne!(len, 0, "{name}: the stream ends amid the RAM");
        scanner
            .feed(&window[..len], |event| {
                match event {
                    Event::Blocks(setup) => {
                        names = setup.blocks.iter().map(|block| block.name.as_str().to_owned()).collect();
                    }
                    Event::Page { block, offset, data, .. } => differs(block, offset, data),
                    Event::Zero { block, offset } => differs(block, offset, &[0; 4096]),
                    Event::DeviceState { .. } => is_over = true,
                    _ => {}
                }
                Ok::<_, wire::Fault>(())
            })
            .unwrap();
        at += len as u64;
    }
    let ours: Vec<_> = blocks.iter().map(|block| block.name.as_str().to_owned()).collect();
    assert_eq!(ours, names, "{name}");
    let all: Vec<_> = blocks.iter().map(|block| block.page_count().0).collect();
    assert_eq!(seen, all, "{name}: QEMU sends each page of a guest that stands still once");
    names
}
