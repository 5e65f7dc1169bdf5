//! Guests whose RAM is a private mapping of their image: they come back whole, go on, and are saved again.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use lab::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, QemuSpec, Serial};
use vmstate::net::QmpAddress;
use vmstate::source::MappedRamFile;
use vmstate::{
    Cancel, Kind, Mode, Observer, ReadySerial, Record, RestoreReport, RestoreSettings, Result, SaveFormat,
    SaveSettings, Target, Then, Unobserved, Via,
};
use vmstate_rig::{DEADLINE, StockLoad, stock_save};

/// A directory on a disk.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A guest that fills all it owns, which is not all there is.
fn spec(machine: MachineKind, mib: u64, backend: MemoryBackend) -> QemuSpec {
    let settings = GuestSettings { pages_low_max: 20_000, fill_rounds: 1, ..GuestSettings::default() };
    QemuSpec { backend, guest: Some(Guest::new(settings)), ..QemuSpec::new(machine, mib << 20) }
}

fn save(qmp: &Path, image: &Path, change: impl FnOnce(&mut SaveSettings)) -> Result<vmstate::SaveReport> {
    let mut settings = SaveSettings::new(QmpAddress::Unix(qmp.to_owned()), image);
    change(&mut settings);
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
}

/// Boots the guest, lets it count, and saves it with vmstate; the round that it had come to.
fn saved(spec: &QemuSpec, image: &Path) -> u32 {
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    save(&source.qmp_path(), image, |_| {}).unwrap();
    source.serial.latest_round().unwrap()
}

/// A QEMU that a restore has started. It is ended when this is dropped.
struct Restored {
    home: tempfile::TempDir,
    serial: Serial,
    report: RestoreReport,
}

impl Restored {
    fn qmp(&self) -> PathBuf {
        self.home.path().join("qmp.sock")
    }

    /// Lets the guest verify every page `rounds` times more: it halts at the first that is not right.
    fn goes_on_from(&mut self, round: u32, name: &str) -> u32 {
        self.serial.wait_for_round(round + 2, None, DEADLINE).expect(name)
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let address = QmpAddress::Unix(self.qmp());
        let _ = vmstate::qmp::Client::connect(&address, &Cancel::new().unwrap()).and_then(|mut c| c.quit());
    }
}

fn restore_observed(spec: &QemuSpec, image: &Path, mode: Mode, observer: &dyn Observer) -> Result<Restored> {
    restore_changed(spec, image, mode, observer, |_, _| {})
}

/// Restores with settings that are changed once the home of the QEMU to be is known.
fn restore_changed(
    spec: &QemuSpec,
    image: &Path,
    mode: Mode,
    observer: &dyn Observer,
    change: impl FnOnce(&mut RestoreSettings, &Path),
) -> Result<Restored> {
    let home = tempfile::tempdir().unwrap();
    let mut command = vec![spec.program.clone().into_os_string()];
    command.extend(spec.machine_args(home.path()).unwrap());
    let qmp = home.path().join("qmp.sock");
    command.extend(["-qmp".into(), OsString::from(format!("unix:{},server=on,wait=off", qmp.display()))]);
    let serial = Serial::open(&QemuSpec::serial_path(home.path()), &home.path().join("stderr.log")).unwrap();
    let target = Target::Launch { command, log: None, foreground: false };
    // Stock QEMU saves what stands still.
    let mut settings =
        RestoreSettings { mode, record: Record::Running, ..RestoreSettings::new(image, target) };
    change(&mut settings, home.path());
    let report = vmstate::restore(&settings, &Cancel::new().unwrap(), observer)?;
    Ok(Restored { home, serial, report })
}

fn restore(spec: &QemuSpec, image: &Path) -> Restored {
    restore_observed(spec, image, Mode::Map, &Unobserved).unwrap_or_else(|error| panic!("{}", error.chain()))
}

/// The mappings of a process that are of this file: their address ranges, offsets and flags.
fn mappings_of(pid: u32, image: &Path) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let name = image.canonicalize().unwrap();
    maps.lines().filter(|line| line.ends_with(name.to_str().unwrap())).map(str::to_owned).collect()
}

#[test]
fn a_mapped_guest_comes_back_whole_and_is_saved_and_mapped_again() {
    for machine in [MachineKind::Q35, MachineKind::Pc] {
        for backend in [
            MemoryBackend::Plain,
            MemoryBackend::Ram,
            MemoryBackend::Memfd,
            MemoryBackend::Object("memory-backend-memfd,share=off".to_owned()),
        ] {
            let name = format!("{} {backend}", machine.name());
            let dir = directory();
            let (first, second) = (dir.path().join("first.img"), dir.path().join("second.img"));
            let spec = QemuSpec { extra: vec!["-smp".into(), "2".into()], ..spec(machine, 256, backend) };
            let round = saved(&spec, &first);

            let mut restored = restore(&spec, &first);
            assert_eq!(restored.report.mode, Mode::Map, "{name}");
            assert_eq!(restored.report.run_state, "running", "{name}");
            assert_eq!(restored.report.resident, None, "{name}: nobody has read the rest");
            let mapped = mappings_of(restored.report.qemu_pid.unwrap(), &first);
            assert!(mapped.iter().any(|line| line.contains(" rw-p ")), "{name}: {mapped:?}");
            let round = restored.goes_on_from(round, &name);

            // Some pages are the guest's own by now, the others are still the first image's.
            let report = save(&restored.qmp(), &second, |settings| settings.via = Via::Direct).unwrap();
            assert_eq!(report.via, Via::Direct, "{name}");
            drop(restored);
            std::fs::remove_file(&first).unwrap();
            let mut again = restore(&spec, &second);
            again.goes_on_from(round, &name);
        }
    }
}

#[test]
fn an_image_by_stock_qemu_is_mapped() {
    for how in [StockLoad::PLAIN, StockLoad::BEST] {
        let dir = directory();
        let image = dir.path().join("vm.img");
        let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
        let mut source = spec.start().unwrap();
        source.wait_for_round(2, DEADLINE).unwrap();
        stock_save(&source, &image, how);
        let round = source.serial.latest_round().unwrap();
        drop(source);
        let mut restored = restore(&spec, &image);
        restored.goes_on_from(round, "stock");
    }
}

#[test]
fn every_node_of_a_guest_is_mapped_from_its_own_place() {
    let nodes = "-object memory-backend-ram,id=near,size=160M -object memory-backend-memfd,id=far,size=96M \
                 -numa node,nodeid=0,cpus=0,memdev=near -numa node,nodeid=1,cpus=1,memdev=far -smp 2";
    let extra = nodes.split_whitespace().map(OsString::from).collect();
    let spec = QemuSpec { extra, ..spec(MachineKind::Q35, 256, MemoryBackend::Plain) };
    let dir = directory();
    let image = dir.path().join("vm.img");
    let round = saved(&spec, &image);
    let mut restored = restore(&spec, &image);
    assert_eq!(mappings_of(restored.report.qemu_pid.unwrap(), &image).len(), 2);
    restored.goes_on_from(round, "nodes");
}

/// Where in an image the pages of the board's RAM begin.
fn pages_offset(image: &Path) -> u64 {
    let image = MappedRamFile::open(image).unwrap();
    let ram = image.layout().blocks.iter().find(|block| block.name.as_str() == "pc.ram");
    ram.expect("the board's RAM").pages.start
}

/// What a save of a guest that ran leaves behind where a page became zero: the bitmap is right.
#[test]
fn bytes_under_pages_that_the_image_has_as_zero_are_not_the_guests() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
    let round = saved(&spec, &image);
    let offset = pages_offset(&image);
    let file = File::options().write(true).open(&image).unwrap();
    // Far above what the guest owns: one page, a part of one, and a run.
    for (at, len) in [(0xc00_0000, 4096), (0xc80_0ff0, 16), (0xe00_0000, 3 << 20)] {
        file.write_all_at(&vec![0x5a; len], offset + at).unwrap();
    }
    drop(file);
    let mut restored = restore(&spec, &image);
    restored.goes_on_from(round, "stale");
    let again = dir.path().join("again.img");
    save(&restored.qmp(), &again, |_| {}).unwrap();
    let saved = File::open(&again).unwrap();
    let offset = pages_offset(&again);
    for at in [0xc00_0000, 0xc80_0ff0, 0xe00_0000, 0xe2f_fff0] {
        let mut bytes = [0xff; 16];
        saved.read_exact_at(&mut bytes, offset + at).unwrap();
        assert_eq!(bytes, [0; 16], "{at:#x}");
    }
}

#[test]
fn an_image_that_a_guest_lives_from_is_replaced_by_name_and_not_written_in_place() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
    let round = saved(&spec, &image);
    let mut restored = restore(&spec, &image);
    let round = restored.goes_on_from(round, "before");

    let in_place = save(&restored.qmp(), &image, |settings| {
        settings.offset = Some(0);
        settings.overwrite = true;
    });
    let error = in_place.unwrap_err();
    assert_eq!(error.to_string(), format!("`{}` is the memory of a guest that runs", image.display()));
    assert_eq!(error.kind(), Kind::Misuse);
    // The guest was not even stopped.
    let round = restored.goes_on_from(round, "refused");

    // Under the same name, out of the file that has the name so far.
    save(&restored.qmp(), &image, |settings| {
        settings.overwrite = true;
        settings.then = Then::Resume;
    })
    .unwrap();
    let round = restored.goes_on_from(round, "replaced");
    std::fs::write(&image, "no image any more").unwrap();
    restored.goes_on_from(round, "the name is another file's");
}

/// Keeps what is said.
#[derive(Debug, Default)]
struct Notes(Mutex<Vec<String>>);

impl Observer for Notes {
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }

    fn warn(&self, text: &str) {
        self.note(text);
    }
}

/// Has the kernel forget what it has of a file that is durable.
fn forget(image: &Path) {
    rustix::fs::fadvise(File::open(image).unwrap(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn auto_reads_a_small_image_and_says_so() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
    let round = saved(&spec, &image);
    let notes = Notes::default();
    let mut restored = restore_observed(&spec, &image, Mode::Auto, &notes).unwrap();
    assert_eq!(restored.report.mode, Mode::Eager);
    assert_eq!(restored.report.mode_reason.as_deref(), Some("the image is small"));
    assert!(restored.report.resident.is_some());
    assert!(notes.0.lock().unwrap().contains(&"mode eager: the image is small".to_owned()));
    restored.goes_on_from(round, "eager");
}

/// A QEMU that somebody else has started and that waits, with its RAM from where `object` says.
fn restore_into_waiting(
    spec: &QemuSpec,
    image: &Path,
    backend: MemoryBackend,
    mode: Mode,
) -> Result<RestoreReport> {
    let waiting = QemuSpec { backend, incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
    let target = Target::Waiting(QmpAddress::Unix(waiting.qmp_path()));
    let settings = RestoreSettings { mode, ..RestoreSettings::new(image, target) };
    vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
}

#[test]
fn a_waiting_qemu_is_mapped_only_where_its_memory_is_the_image_at_the_right_place() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
    saved(&spec, &image);
    let at = |offset: u64| {
        let name = image.display();
        MemoryBackend::Object(format!(
            "memory-backend-file,mem-path={name},offset={offset},share=off,readonly=on,rom=off"
        ))
    };
    let right = pages_offset(&image);
    let report = restore_into_waiting(&spec, &image, at(right), Mode::Auto).unwrap();
    assert_eq!(report.mode, Mode::Map);
    assert_eq!(report.mode_reason.as_deref(), Some("the target's memory is a mapping of the image"));
    for elsewhere in [at(0), MemoryBackend::Plain] {
        let error = restore_into_waiting(&spec, &image, elsewhere, Mode::Map).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(error.to_string(), format!("target's `pc.ram` is not mapped from {}", image.display()));
    }
}

/// Writes an image of the other file into this file, in place.
fn write_in_place(image: &Path, other: &Path) -> Result<vmstate::ConvertReport> {
    let format = vmstate::source::Format::MappedRam;
    let settings = vmstate::ConvertSettings {
        to_offset: Some(0),
        overwrite: true,
        ..vmstate::ConvertSettings::new(other, image, format)
    };
    vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
}

fn is_refused(image: &Path, written: Result<vmstate::ConvertReport>, name: &str) {
    let error = written.expect_err(name);
    assert_eq!(error.kind(), Kind::Misuse, "{name}");
    assert_eq!(
        error.to_string(),
        format!("`{}` is the memory of a guest that runs", image.display()),
        "{name}"
    );
}

#[test]
fn an_image_that_a_qemu_maps_by_itself_is_not_written_in_place_while_it_lives() {
    let dir = directory();
    let (image, other) = (dir.path().join("vm.img"), dir.path().join("other.img"));
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
    let round = saved(&spec, &image);
    std::fs::copy(&image, &other).unwrap();
    let offset = pages_offset(&image);
    let name = image.display();
    let object = format!("memory-backend-file,mem-path={name},offset={offset},share=off,readonly=on,rom=off");
    let backend = MemoryBackend::Object(object);
    let mut guest = QemuSpec { backend, incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
    let target = Target::Waiting(QmpAddress::Unix(guest.qmp_path()));
    let settings =
        RestoreSettings { mode: Mode::Map, record: Record::Running, ..RestoreSettings::new(&image, target) };
    vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
    is_refused(&image, write_in_place(&image, &other), "it has just begun");
    guest.wait_for_round(round + 2, DEADLINE).unwrap();
    // Its monitor has been somebody else's since, who had a save made.
    let again = dir.path().join("again.img");
    save(&guest.qmp_path(), &again, |settings| settings.then = Then::Resume).unwrap();
    is_refused(&image, write_in_place(&image, &other), "it was saved");
    guest.wait_for_round(round + 4, DEADLINE).unwrap();
    drop(guest);
    write_in_place(&image, &other).unwrap();
}

/// Tries to write the image in place when QEMU loads.
struct Writer<'a> {
    image: &'a Path,
    other: &'a Path,
    written: Mutex<Option<Result<vmstate::ConvertReport>>>,
}

impl Observer for Writer<'_> {
    fn phase(&self, name: &'static str) {
        if name == "load" {
            *self.written.lock().unwrap() = Some(write_in_place(self.image, self.other));
        }
    }
}

#[test]
fn an_image_is_not_written_in_place_while_it_is_read_and_is_afterwards() {
    let dir = directory();
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
    let [image, other, stream] = ["vm.img", "other.img", "vm.stream"].map(|name| dir.path().join(name));
    let round = saved(&spec, &image);
    std::fs::copy(&image, &other).unwrap();
    let format = vmstate::source::Format::Stream;
    let settings = vmstate::ConvertSettings::new(&image, &stream, format);
    vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
    for (image, mode, via, backend) in [
        (&image, Mode::Eager, Via::Direct, MemoryBackend::Memfd),
        (&image, Mode::Eager, Via::Qemu, MemoryBackend::Plain),
        (&image, Mode::Eager, Via::Socket, MemoryBackend::Plain),
        (&image, Mode::Lazy, Via::Auto, MemoryBackend::Plain),
        (&stream, Mode::Eager, Via::Auto, MemoryBackend::Plain),
    ] {
        let name = format!("{} {mode:?} {via:?}", image.display());
        let mut guest = QemuSpec { backend, incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
        let target = Target::Waiting(QmpAddress::Unix(guest.qmp_path()));
        let settings =
            RestoreSettings { mode, via, record: Record::Running, ..RestoreSettings::new(image, target) };
        let writer = Writer { image, other: &other, written: Mutex::default() };
        vmstate::restore(&settings, &Cancel::new().unwrap(), &writer)
            .unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
        is_refused(image, writer.written.into_inner().unwrap().unwrap(), &name);
        // It lives from nothing but its memory now.
        write_in_place(image, &other).unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
        guest.wait_for_round(round + 2, DEADLINE).expect(&name);
    }
}

#[test]
fn an_image_that_is_being_written_is_not_read() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
    saved(&spec, &image);
    // As whoever writes it in place does.
    let writer = File::open(&image).unwrap();
    rustix::fs::flock(&writer, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    for mode in [Mode::Eager, Mode::Lazy, Mode::Map] {
        let error = restore_into_waiting(&spec, &image, MemoryBackend::Plain, mode).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{mode:?}");
        assert_eq!(error.to_string(), format!("{} is being written", image.display()), "{mode:?}");
    }
    drop(writer);
    restore_into_waiting(&spec, &image, MemoryBackend::Plain, Mode::Eager).unwrap();
}

/// The line that the guest writes when it has verified all of its memory once more.
fn says_a_round(settings: &mut RestoreSettings, home: &Path) {
    settings.ready = Some(ReadySerial { console: QemuSpec::serial_path(home), text: "R0".to_owned() });
}

#[test]
fn auto_maps_a_large_image_that_is_not_cached_and_reads_one_that_is() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let settings = GuestSettings { pages_low_max: 80_000, fill_rounds: 1, ..GuestSettings::default() };
    let spec =
        QemuSpec { guest: Some(Guest::new(settings)), ..spec(MachineKind::Q35, 512, MemoryBackend::Plain) };
    let round = saved(&spec, &image);
    forget(&image);
    let notes = Notes::default();
    let mut restored = restore_changed(&spec, &image, Mode::Auto, &notes, |settings, home| {
        says_a_round(settings, home);
        settings.wait = true;
    })
    .unwrap_or_else(|error| panic!("{}", error.chain()));
    let report = &restored.report;
    assert_eq!(report.mode, Mode::Map, "{:?}", report.mode_reason);
    assert_eq!(report.mode_reason.as_deref(), Some("the image is large and not cached"));
    assert!(notes.0.lock().unwrap().contains(&"mode map: the image is large and not cached".to_owned()));
    assert!(report.guest_ready.unwrap() >= report.first_instruction, "{report:?}");
    // All of it was asked to be there, and the kernel says that it is.
    assert!(report.read_bytes > 80_000 * 4096, "{report:?}");
    let resident = report.resident.expect("a page cache that holds 320 MiB");
    assert!(resident >= report.first_instruction, "{report:?}");
    restored.goes_on_from(round, "mapped");
    drop(restored);

    let restored = restore_observed(&spec, &image, Mode::Auto, &notes).unwrap();
    assert_eq!(restored.report.mode, Mode::Eager);
    assert_eq!(restored.report.mode_reason.as_deref(), Some("the image is in the page cache"));
    assert_eq!(restored.report.guest_ready, None, "nobody asked");
}

#[test]
fn auto_brings_on_demand_what_is_large_and_cannot_be_mapped() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let settings = GuestSettings { pages_low_max: 80_000, fill_rounds: 1, ..GuestSettings::default() };
    let spec =
        QemuSpec { guest: Some(Guest::new(settings)), ..spec(MachineKind::Q35, 512, MemoryBackend::Plain) };
    let round = saved(&spec, &image);
    let not_mapped = format!("target's `pc.ram` is not mapped from {}", image.display());
    let large = "the image is large and not cached";

    // One that waits and has memory of its own.
    forget(&image);
    let report = restore_into_waiting(&spec, &image, MemoryBackend::Plain, Mode::Auto).unwrap();
    assert_eq!((report.mode, report.run_state.as_str()), (Mode::Lazy, "running"));
    assert_eq!(report.mode_reason, Some(format!("{large}; {not_mapped}")));

    // One that is started, with memory that it was given by name.
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = MemoryBackend::File(shm.path().join("ram"));
    let named = QemuSpec { backend: file, ..spec.clone() };
    forget(&image);
    let notes = Notes::default();
    let mut restored = restore_observed(&named, &image, Mode::Auto, &notes)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(restored.report.mode, Mode::Lazy, "{:?}", restored.report.mode_reason);
    let said = notes.0.lock().unwrap().iter().any(|note| note.starts_with(&format!("mode lazy: {large}; ")));
    assert!(said, "{notes:?}");
    restored.goes_on_from(round, "on demand");
    drop(restored);

    // What speaks against it: a guest that does not run, memory that nobody can catch faults in, a cached image.
    forget(&image);
    let paused = restore_changed(&named, &image, Mode::Auto, &Unobserved, |settings, _| {
        settings.record = Record::Paused;
    })
    .unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(paused.report.mode, Mode::Eager);
    let reason = paused.report.mode_reason.clone().unwrap();
    assert!(reason.ends_with("; the guest is to stay paused"), "{reason}");
    drop(paused);
    forget(&image);
    let on_disk = MemoryBackend::File(dir.path().join("ram"));
    let report = restore_into_waiting(&spec, &image, on_disk, Mode::Auto).unwrap();
    assert_eq!(report.mode, Mode::Eager);
    let reason = report.mode_reason.unwrap();
    assert!(reason.contains("a file on a disk, in which no fault can be caught"), "{reason}");
    std::io::copy(&mut File::open(&image).unwrap(), &mut std::io::sink()).unwrap();
    let report = restore_into_waiting(&spec, &image, MemoryBackend::Plain, Mode::Auto).unwrap();
    assert_eq!(report.mode, Mode::Eager);
    assert_eq!(report.mode_reason.as_deref(), Some("the image is in the page cache"));
}

#[test]
fn a_guest_says_when_it_is_ready_in_every_mode() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let spec = spec(MachineKind::Pc, 256, MemoryBackend::Plain);
    saved(&spec, &image);
    for mode in [Mode::Eager, Mode::Map, Mode::Lazy] {
        let restored = restore_changed(&spec, &image, mode, &Unobserved, says_a_round)
            .unwrap_or_else(|error| panic!("{}: {}", mode.name(), error.chain()));
        let report = &restored.report;
        assert_eq!(report.mode, mode);
        assert!(report.guest_ready.unwrap() >= report.first_instruction, "{report:?}");
        assert_eq!(report.resident.is_some(), mode != Mode::Map, "{report:?}");
    }
    // Nobody waits for what cannot come.
    let notes = Notes::default();
    let restored = restore_changed(&spec, &image, Mode::Map, &notes, |settings, home| {
        says_a_round(settings, home);
        settings.record = Record::Paused;
    })
    .unwrap();
    assert_eq!((restored.report.run_state.as_str(), restored.report.guest_ready), ("paused", None));
    let warning = "the guest is paused: nobody waited until its console says it is ready".to_owned();
    assert!(notes.0.lock().unwrap().contains(&warning), "{notes:?}");
}

#[test]
fn a_console_that_is_not_there_is_told_before_the_guest_comes() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
    saved(&spec, &image);
    let outcome = restore_changed(&spec, &image, Mode::Map, &Unobserved, |settings, _| {
        settings.ready = Some("/no/such/console:login".parse().unwrap());
    });
    let error = outcome.err().expect("no console");
    assert_eq!(error.kind(), Kind::Misuse);
    assert!(error.chain().starts_with("cannot follow the console /no/such/console"), "{}", error.chain());
}

#[test]
fn a_stream_is_not_mapped() {
    let dir = directory();
    let image = dir.path().join("vm.stream");
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Plain);
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    save(&source.qmp_path(), &image, |settings| settings.format = Some(SaveFormat::Stream)).unwrap();
    let round = source.serial.latest_round().unwrap();
    drop(source);
    let error = restore_observed(&spec, &image, Mode::Map, &Unobserved).err().expect("a refusal");
    assert_eq!(error.kind(), Kind::Unsupported);
    assert_eq!(error.to_string(), "the pages of a stream lie amid its records");
    assert_eq!(error.hint_text(), Some("restore with --mode eager, or save in the format mapped-ram"));
    let mut restored = restore_observed(&spec, &image, Mode::Auto, &Unobserved).unwrap();
    assert_eq!(restored.report.mode, Mode::Eager);
    let reason = restored.report.mode_reason.as_deref();
    assert_eq!(reason, Some("the pages of a stream lie amid its records"));
    restored.goes_on_from(round, "stream");
}

#[test]
fn a_backend_that_is_written_as_json_is_mapped() {
    let dir = directory();
    let image = dir.path().join("vm.img");
    let spec = spec(MachineKind::Q35, 256, MemoryBackend::Memfd);
    let round = saved(&spec, &image);
    let json = r#"{"qom-type":"memory-backend-memfd","id":"pc.ram","size":268435456,"share":true}"#;
    let mut restored = restore_changed(&spec, &image, Mode::Map, &Unobserved, |settings, _| {
        let Target::Launch { command, .. } = &mut settings.target else { unreachable!() };
        let object = command.iter().position(|arg| arg == "-object").unwrap() + 1;
        assert!(command[object].to_str().unwrap().starts_with("memory-backend-memfd,"));
        command[object] = json.into();
    })
    .unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(mappings_of(restored.report.qemu_pid.unwrap(), &image).len(), 1);
    restored.goes_on_from(round, "json");
}
