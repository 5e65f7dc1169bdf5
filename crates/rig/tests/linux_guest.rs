//! The second witness: a Linux guest with two processors, disk, network, graphics, USB, balloon and random
//! numbers goes from vmstate's image into stock QEMU, from stock QEMU's image through vmstate into a third
//! QEMU, and keeps counting with the same digest of its memory.

use std::path::Path;

use lab::{Count, Incoming, LinuxGuest, LinuxSettings, MachineKind, MemoryBackend, Qemu, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::source::{Format, MappedRamFile};
use vmstate::{
    Cancel, ConvertSettings, Mode, Record, RestoreSettings, SaveSettings, Target, Then, Unobserved, Via,
};
use vmstate_rig::{DEADLINE, StockLoad, client, stock_load, stock_migrate, stock_save};

/// Every device that the issue of ordinary guests is about.
const DEVICES: &str = "-smp 2 -device VGA -device qemu-xhci -device usb-tablet -device virtio-balloon-pci \
                       -device virtio-rng-pci -netdev user,id=net -device virtio-net-pci,netdev=net";

fn spec(machine: MachineKind, backend: MemoryBackend, dir: &Path) -> QemuSpec {
    let linux = LinuxGuest::build(dir, LinuxSettings { disk: true, ..LinuxSettings::default() }).unwrap();
    let mut extra = linux.args();
    extra.extend(DEVICES.split_whitespace().map(Into::into));
    QemuSpec { backend, guest: None, extra, ..QemuSpec::new(machine, 512 << 20) }
}

/// The guest's next line, which must go on from `last` with the same digest.
fn next(qemu: &mut Qemu, last: Option<&Count>) -> Count {
    let mut failures = Vec::new();
    let count = qemu
        .wait_for_line("count", DEADLINE, |line| {
            failures.extend(line.starts_with("F ").then(|| line.to_owned()));
            Count::parse(line)
        })
        .unwrap();
    assert_eq!(failures, Vec::<String>::new());
    if let Some(last) = last {
        assert_eq!(count.digest, last.digest, "the file in the guest's memory has changed");
        assert!(count.counter > last.counter, "{count:?} after {last:?}");
        assert!(count.counter <= last.counter + 2, "{count:?} after {last:?}: lines were lost");
    }
    count
}

fn check(machine: MachineKind, backend: MemoryBackend) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let spec = spec(machine, backend, dir.path());
    let (ours, theirs) = (dir.path().join("ours.img"), dir.path().join("theirs.img"));

    let mut first = spec.start().unwrap();
    let mut count = next(&mut first, None);
    count = next(&mut first, Some(&count));
    let settings = SaveSettings {
        via: Via::Direct,
        then: Then::Quit,
        ..SaveSettings::new(QmpAddress::Unix(first.qmp_path()), &ours)
    };
    let saved = vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved);
    saved.unwrap_or_else(|error| panic!("{}", error.chain()));
    first.wait(DEADLINE).unwrap();
    assert!(vmstate::check(&ours).unwrap().report.is_clean());

    let mut second = stock_load(&spec, &ours, StockLoad::BEST);
    count = next(&mut second, Some(&count));
    count = next(&mut second, Some(&count));
    stock_save(&second, &theirs, StockLoad::BEST);
    drop(second);

    let mut third = QemuSpec { incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
    let settings = RestoreSettings {
        channels: Some(3),
        record: Record::Running,
        ..RestoreSettings::new(theirs, Target::Waiting(QmpAddress::Unix(third.qmp_path())))
    };
    let restored = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved);
    let restored = restored.unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(restored.run_state, "running");
    count = next(&mut third, Some(&count));
    count = next(&mut third, Some(&count));
    assert!(client(&third).status().unwrap().running);

    let settings = SaveSettings {
        then: Then::Quit,
        ..SaveSettings::new(QmpAddress::Unix(third.qmp_path()), dir.path().join("last.img"))
    };
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    third.wait(DEADLINE).unwrap();
    let (mut fourth, last) = mapped(&spec, &settings.image, count);

    // Out of memory that is an image into another, from which it comes on demand; then the same from stock QEMU's.
    let again = dir.path().join("again.img");
    let settings =
        SaveSettings { then: Then::Quit, ..SaveSettings::new(QmpAddress::Unix(fourth.qmp_path()), &again) };
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    fourth.wait(DEADLINE).unwrap();
    let (fifth, last) = on_demand(&spec, &again, last);
    let stock = dir.path().join("stock.img");
    stock_save(&fifth, &stock, StockLoad::BEST);
    drop(fifth);
    on_demand(&spec, &stock, last.clone());
    mapped(&spec, &stock, last);
}

/// Restores an image by mapping it into a QEMU that somebody has started on memory that is the image, and has the guest
/// go on from `last`.
fn mapped(spec: &QemuSpec, image: &Path, last: Count) -> (Qemu, Count) {
    let offset = ram_offset(image);
    let memory = format!(
        "memory-backend-file,mem-path={},offset={offset},share=off,readonly=on,rom=off",
        image.display()
    );
    let backend = MemoryBackend::Object(memory);
    let mut target = QemuSpec { backend, incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
    let waiting = Target::Waiting(QmpAddress::Unix(target.qmp_path()));
    let settings =
        RestoreSettings { mode: Mode::Map, record: Record::Running, ..RestoreSettings::new(image, waiting) };
    let restored = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved);
    let restored = restored.unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!((restored.mode, restored.run_state.as_str()), (Mode::Map, "running"));
    let count = next(&mut target, Some(&last));
    let count = next(&mut target, Some(&count));
    (target, count)
}

/// Restores an image on demand into a QEMU that waits, and has the guest go on from `last`.
fn on_demand(spec: &QemuSpec, image: &Path, last: Count) -> (Qemu, Count) {
    let mut target = QemuSpec { incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
    let waiting = Target::Waiting(QmpAddress::Unix(target.qmp_path()));
    let settings =
        RestoreSettings { mode: Mode::Lazy, record: Record::Running, ..RestoreSettings::new(image, waiting) };
    let restored = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved);
    let restored = restored.unwrap_or_else(|error| panic!("{}; {}", error.chain(), target.stderr()));
    assert_eq!((restored.mode, restored.run_state.as_str()), (Mode::Lazy, "running"));
    let count = next(&mut target, Some(&last));
    let count = next(&mut target, Some(&count));
    (target, count)
}

/// Where in an image the pages of the board's RAM begin.
fn ram_offset(image: &Path) -> u64 {
    let image = MappedRamFile::open(image).unwrap();
    let ram = image.layout().blocks.iter().find(|block| block.name.as_str() == "pc.ram");
    ram.expect("the board's RAM").pages.start
}

/// A Linux guest that runs in QEMU 7.2 and is saved by it, as a stream, which is converted.
#[test]
fn a_linux_guest_of_qemu_7_2_goes_on_in_either_qemu_before_its_memory_has_come() {
    let program = lab::assets_dir().join("qemu72/qemu-system-x86_64");
    assert!(program.exists(), "QEMU 7.2 is not at {}: run `make setup`", program.display());
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let machine_version = Some("pc-q35-7.2".to_owned());
    let new = QemuSpec { machine_version, ..spec(MachineKind::Q35, MemoryBackend::Plain, dir.path()) };
    let old = QemuSpec { program, ..new.clone() };
    let (stream, image) = (dir.path().join("stream"), dir.path().join("vm.img"));
    let mut source = old.start().unwrap();
    let count = next(&mut source, None);
    client(&source).stop().unwrap();
    stock_migrate(&source, "migrate", &format!("exec:cat > {}", stream.display()));
    drop(source);
    let settings = ConvertSettings::new(&stream, &image, Format::MappedRam);
    vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    for spec in [&old, &new] {
        on_demand(spec, &image, count.clone());
    }
}

#[test]
fn a_linux_guest_on_q35_with_private_memory_survives_both_ways() {
    check(MachineKind::Q35, MemoryBackend::Plain);
}

#[test]
fn a_linux_guest_on_pc_with_a_memfd_survives_both_ways() {
    check(MachineKind::Pc, MemoryBackend::Memfd);
}
