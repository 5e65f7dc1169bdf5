//! Where images go beside new files: into a part of a file, onto a device, through a pipe. Stock QEMU loads what
//! comes out of each, and the guest counts on.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use lab::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, Qemu, QemuSpec};
use rustix::process::{Pid, Signal, kill_process};
use vmstate::net::QmpAddress;
use vmstate::source::Format;
use vmstate::{
    Cancel, ConvertSettings, DirectIo, Error, Kind, Observer, Record, Rehearsal, RestoreReport,
    RestoreSettings, SaveFormat, SaveReport, SaveSettings, Target, Unobserved, Via,
};
use vmstate_rig::{DEADLINE, Hook, StockLoad, client, stock_load, verify_image};

const MIB: u64 = 1 << 20;

fn spec(mib: u64, backend: MemoryBackend) -> QemuSpec {
    let guest = Guest::new(GuestSettings { fill_rounds: 1, ..GuestSettings::default() });
    QemuSpec { backend, guest: Some(guest), second_qmp: true, ..QemuSpec::new(MachineKind::Q35, mib * MIB) }
}

fn small() -> QemuSpec {
    spec(64, MemoryBackend::Plain)
}

fn booted(spec: &QemuSpec) -> Qemu {
    let mut qemu = spec.start().unwrap();
    qemu.wait_for_round(2, DEADLINE).unwrap();
    qemu
}

fn images() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

fn settings(qemu: &Qemu, image: impl Into<PathBuf>) -> SaveSettings {
    SaveSettings { via: Via::Direct, ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image) }
}

fn save(settings: &SaveSettings) -> Result<SaveReport, Error> {
    vmstate::save(settings, &Cancel::new().unwrap(), &Unobserved)
}

#[track_caller]
fn saved(settings: &SaveSettings) -> SaveReport {
    save(settings).unwrap_or_else(|error| panic!("{}", error.chain()))
}

fn rehearse(settings: &SaveSettings) -> Rehearsal {
    vmstate::rehearse(settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()))
}

fn restore(image: &Path, offset: u64, qemu: &Qemu) -> Result<RestoreReport, Error> {
    let settings = RestoreSettings {
        offset,
        ..RestoreSettings::new(image, Target::Waiting(QmpAddress::Unix(qemu.qmp_path())))
    };
    vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
}

/// What an error says: its kind, its chain of clauses, its hint.
fn told<T: std::fmt::Debug>(result: Result<T, Error>) -> (Kind, String, String) {
    let error = result.expect_err("it was to fail");
    (error.kind(), error.chain(), error.hint_text().unwrap_or("no hint").to_owned())
}

fn is_running(qemu: &Qemu) -> bool {
    let address = QmpAddress::Unix(qemu.second_qmp_path());
    let mut client = vmstate::qmp::Client::connect(&address, &Cancel::new().unwrap()).unwrap();
    client.timeout = Some(DEADLINE);
    client.status().unwrap().running
}

/// Runs a program that only root may run; a machine that forbids it fails the test and says why.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {stderr}; this test needs to be root");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A block device of so many MiB, full of ones.
struct Loop {
    path: PathBuf,
    _backing: tempfile::TempDir,
}

impl Loop {
    fn new(mib: u64) -> Loop {
        let backing = images();
        let file = backing.path().join("device");
        let mut bytes = File::create(&file).unwrap();
        (0..mib).for_each(|_| bytes.write_all(&[0xff; MIB as usize]).unwrap());
        drop(bytes);
        let path = run("losetup", &["--find", "--show", file.to_str().unwrap()]);
        Loop { path: path.into(), _backing: backing }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach", self.path.to_str().unwrap()]);
    }
}

/// Stock QEMU loads it, vmstate restores it, and in both the guest, which verifies its memory, goes on.
#[track_caller]
fn is_loaded_by_stock_qemu_and_by_vmstate(
    spec: &QemuSpec,
    image: &Path,
    offset: u64,
    how: StockLoad,
    round: u32,
) {
    let name = match offset {
        0 => image.to_owned(),
        offset => format!("{},offset={offset}", image.display()).into(),
    };
    let mut target = stock_load(spec, &name, how);
    assert!(client(&target).status().unwrap().running);
    target.wait_for_round(round + 2, DEADLINE).unwrap();
    drop(target);
    let mut target = QemuSpec { incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
    let report = restore(image, offset, &target).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(report.run_state, "running");
    target.wait_for_round(round + 2, DEADLINE).unwrap();
}

#[test]
fn an_image_in_a_part_of_a_file_leaves_what_is_before_it_and_is_loaded_from_there() {
    for (via, offset, backend) in [
        (Via::Direct, MIB, MemoryBackend::Plain),
        (Via::Direct, 0x1_0203, MemoryBackend::Memfd),
        (Via::Qemu, 0x3000, MemoryBackend::Plain),
    ] {
        let name = format!("{via:?} {offset:#x}");
        let spec = spec(64, backend);
        let dir = images();
        let image = dir.path().join("disk");
        let before: Vec<u8> = (0..offset).map(|i| (i * 7) as u8).collect();
        // What stood behind is longer than the new image, and must not show through its holes.
        let old = [&before[..], &vec![0xff; 100 << 20]].concat();
        fs::write(&image, &old).unwrap();
        let inode = fs::metadata(&image).unwrap().ino();
        let mut qemu = booted(&spec);
        let settings = SaveSettings { via, offset: Some(offset), ..settings(&qemu, &image) };
        let (kind, chain, hint) = told(save(&settings));
        let clause = format!(
            "`{}` has {:#x} bytes from {offset:#x} on, which would be overwritten",
            image.display(),
            100 << 20
        );
        assert_eq!((kind, chain), (Kind::Misuse, clause), "{name}");
        assert_eq!(hint, "give --overwrite if what is there may go, or another place", "{name}");
        assert!(fs::read(&image).unwrap() == old, "{name}: a refusal changes nothing");

        let report = saved(&SaveSettings { overwrite: true, ..settings });
        assert_eq!((report.via, report.format), (via, SaveFormat::MappedRam), "{name}");
        let round = qemu.serial.latest_round().unwrap();
        drop(qemu);
        let mut head = vec![0; offset as usize + 4];
        File::open(&image).unwrap().read_exact(&mut head).unwrap();
        assert!(head[..offset as usize] == before, "{name}");
        assert_eq!(&head[offset as usize..], b"QEVM", "{name}");
        assert_eq!(fs::metadata(&image).unwrap().ino(), inode, "{name}");
        let check = vmstate::check_at(&image, offset).unwrap();
        assert!(check.report.is_clean(), "{name}: {:?}", check.report);
        let info = vmstate::info_at(&image, offset).unwrap();
        assert_eq!((info.format, info.run_state.as_deref()), ("mapped-ram", Some("running")), "{name}");
        assert!(vmstate::check(&image).is_err(), "{name}: no image starts at 0");
        is_loaded_by_stock_qemu_and_by_vmstate(&spec, &image, offset, StockLoad::BEST, round);
    }
}

#[test]
fn a_save_in_place_that_fails_leaves_nothing_that_looks_like_an_image() {
    let dir = images();
    let image = dir.path().join("disk");
    let qemu = booted(&small());
    for via in [Via::Direct, Via::Qemu] {
        fs::write(&image, b"before  ").unwrap();
        let settings = SaveSettings { via, offset: Some(8), overwrite: true, ..settings(&qemu, &image) };
        saved(&settings);
        assert_eq!(&fs::read(&image).unwrap()[..12], b"before  QEVM");
        client(&qemu).cont().unwrap();
        for phase in ["metadata", "publish"] {
            let cancel = Cancel::new().unwrap();
            let hook = Hook::at(phase, || {
                cancel.cancel();
                let head = fs::read(&image).unwrap()[..12].to_vec();
                // QEMU writes its head first, as ever.
                assert!(via == Via::Qemu || head == *b"before  \0\0\0\0", "{phase}");
            });
            let result = vmstate::save(&settings, &cancel, &hook);
            assert!(hook.is_done(), "{via:?} {phase}");
            assert_eq!(told(result).0, Kind::Interrupted, "{via:?} {phase}");
            assert_eq!(&fs::read(&image).unwrap()[..16], b"before  \0\0\0\0\0\0\0\0", "{via:?} {phase}");
            assert!(is_running(&qemu));
        }
    }
}

#[test]
fn a_file_that_is_not_there_has_no_offsets_and_neither_has_a_pipe() {
    let qemu = small().start().unwrap();
    let dir = images();
    let at = |name: &str| dir.path().join(name);
    let none = "an offset is one of a file that is there, and this one is not";
    for (image, clause) in [
        (at("none"), format!("`{}`: {none}", at("none").display())),
        (
            dir.path().to_owned(),
            format!("`{}`: only a regular file or a block device has offsets", dir.path().display()),
        ),
        ("-".into(), "`-`: a pipe has no offsets".to_owned()),
    ] {
        let settings = SaveSettings { offset: Some(4096), ..settings(&qemu, image) };
        assert_eq!(told(save(&settings)), (Kind::Misuse, clause, "no hint".to_owned()));
    }
}

#[test]
fn an_image_on_a_block_device_is_whole_whatever_was_there() {
    for (backend, offset) in [(MemoryBackend::Plain, None), (MemoryBackend::Memfd, Some(3 * MIB))] {
        let spec = spec(64, backend);
        let device = Loop::new(80);
        let mut qemu = booted(&spec);
        let settings = SaveSettings { offset, ..settings(&qemu, &device.path) };
        let (kind, chain, _) = told(save(&settings));
        assert_eq!(kind, Kind::Misuse, "{chain}");
        assert!(chain.ends_with("on, which would be overwritten"), "{chain}");
        // Twice, so that the second finds the first.
        for _ in 0..2 {
            let report = saved(&SaveSettings { overwrite: true, ..settings.clone() });
            assert_eq!(report.via, Via::Direct);
            client(&qemu).cont().unwrap();
        }
        saved(&SaveSettings { overwrite: true, ..settings.clone() });
        let round = qemu.serial.latest_round().unwrap();
        drop(qemu);
        let start = offset.unwrap_or(0);
        let check = vmstate::check_at(&device.path, start).unwrap();
        assert!(check.report.is_clean(), "{:?}", check.report);
        let info = vmstate::info_at(&device.path, start).unwrap();
        assert_eq!((info.format, info.file_bytes, info.ram_bytes > 64 * MIB), ("mapped-ram", 80 * MIB, true));
        assert!(info.saved.is_some(), "the manifest is found, although the device goes on behind it");
        if start == 0 {
            let pattern = verify_image(&spec.guest.unwrap(), &spec.layout(), &device.path);
            assert!((round..=round + 1).contains(&pattern.round), "{pattern:?} after round {round}");
        }
        is_loaded_by_stock_qemu_and_by_vmstate(&spec, &device.path, start, StockLoad::BEST, round);

        // Before there is a QEMU: this one is nowhere.
        let target = Target::Launch { command: vec!["/no/such/qemu".into()], log: None, foreground: false };
        let settings = RestoreSettings {
            mode: vmstate::Mode::Map,
            offset: start,
            ..RestoreSettings::new(&device.path, target)
        };
        let error = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap_err();
        let clause = format!("{} is a device, which QEMU does not map", device.path.display());
        assert_eq!((error.kind(), error.to_string()), (Kind::Unsupported, clause));
    }
}

#[test]
fn a_device_that_is_too_small_or_in_use_is_refused_before_the_guest_stops() {
    let qemu = booted(&small());
    let device = Loop::new(32);
    let hook = Hook::at("never", || {});
    let settings = SaveSettings { overwrite: true, ..settings(&qemu, &device.path) };
    let (kind, chain, hint) = told(vmstate::save(&settings, &Cancel::new().unwrap(), &hook));
    assert_eq!(kind, Kind::Misuse, "{chain}");
    assert!(
        chain.starts_with(&format!(
            "`{}` has 0x2000000 bytes from 0x0 on, the image takes ",
            device.path.display()
        )),
        "{chain}"
    );
    assert_eq!(hint, "give a larger one, or save to a file");
    assert_eq!(hook.phases(), ["connect", "probe", "settle"]);
    let mut head = [0; 8];
    File::open(&device.path).unwrap().read_exact_at(&mut head, 0).unwrap();
    assert_eq!(head, [0xff; 8], "a refusal changes nothing");
    assert!(!rehearse(&settings).fits);

    let (kind, chain, _) = told(save(&SaveSettings { via: Via::Qemu, ..settings.clone() }));
    let clause = "QEMU cannot write to a block device: it cuts its target to length first";
    assert_eq!((kind, chain.as_str()), (Kind::Unsupported, clause));

    run("mkfs.ext4", &["-q", "-F", device.path.to_str().unwrap()]);
    let mount = tempfile::tempdir().unwrap();
    run("mount", &[device.path.to_str().unwrap(), mount.path().to_str().unwrap()]);
    let refused = told(save(&settings));
    run("umount", &[mount.path().to_str().unwrap()]);
    let clause =
        format!("`{}`: opening for writing: Device or resource busy (os error 16)", device.path.display());
    let hint = "it is mounted or used otherwise: give one that is not";
    assert_eq!(refused, (Kind::Io, clause, hint.to_owned()));
    assert!(is_running(&qemu));
}

#[test]
fn a_stream_through_a_fifo_or_into_a_file_is_loaded_by_stock_qemu() {
    for backend in [MemoryBackend::Plain, MemoryBackend::Memfd] {
        let spec = spec(64, backend);
        let dir = images();
        let (fifo, piped, file) =
            (dir.path().join("fifo"), dir.path().join("piped"), dir.path().join("file"));
        run("mkfifo", &[fifo.to_str().unwrap()]);
        let mut qemu = booted(&spec);
        // The FIFO has no reader when the save begins: it is waited for.
        let report = std::thread::scope(|scope| {
            let saving = scope.spawn(|| saved(&settings(&qemu, &fifo)));
            std::io::copy(&mut File::open(&fifo).unwrap(), &mut File::create(&piped).unwrap()).unwrap();
            saving.join().unwrap()
        });
        assert_eq!((report.via, report.format, report.direct_io), (Via::Direct, SaveFormat::Stream, false));
        assert!(report.data_bytes > 60 * MIB && report.hole_bytes > 0, "{report:?}");
        let into_file = SaveSettings { format: Some(SaveFormat::Stream), ..settings(&qemu, &file) };
        saved(&SaveSettings { record: Record::Running, ..into_file });
        let round = qemu.serial.latest_round().unwrap();
        drop(qemu);
        for image in [&piped, &file] {
            let check = vmstate::check(image).unwrap();
            assert!(check.report.is_clean(), "{:?}", check.report);
            let info = vmstate::info(image).unwrap();
            assert_eq!((info.format, info.saved.is_some()), ("stream", true));
            is_loaded_by_stock_qemu_and_by_vmstate(&spec, image, 0, StockLoad::STREAM, round);
        }
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_save_and_the_guest_runs_on() {
    let dir = images();
    let fifo = dir.path().join("fifo");
    run("mkfifo", &[fifo.to_str().unwrap()]);
    let qemu = booted(&small());
    let refused = std::thread::scope(|scope| {
        let saving = scope.spawn(|| told(save(&settings(&qemu, &fifo))));
        let mut reader = File::open(&fifo).unwrap();
        reader.read_exact(&mut [0; 100_000]).unwrap();
        drop(reader);
        saving.join().unwrap()
    });
    let hint = "the stream that it has is incomplete: throw it away, and look why the reader ended";
    assert_eq!(refused, (Kind::Io, format!("the reader of `{}` has gone", fifo.display()), hint.to_owned()));
    assert!(is_running(&qemu));
}

#[test]
fn a_stream_that_is_damaged_is_refused_before_qemu_sees_it() {
    let dir = images();
    let image = dir.path().join("vm.stream");
    let qemu = booted(&small());
    saved(&SaveSettings { format: Some(SaveFormat::Stream), ..settings(&qemu, &image) });
    drop(qemu);
    let whole = fs::read(&image).unwrap();
    let waiting = QemuSpec { incoming: Incoming::Defer, ..small() }.start().unwrap();
    for len in [0, 7, 100, whole.len() / 2, whole.len() - 200_000] {
        fs::write(&image, &whole[..len.min(whole.len())]).unwrap();
        let (kind, chain, _) = told(restore(&image, 0, &waiting));
        assert_eq!(kind, Kind::Damaged, "cut at {len}: {chain}");
    }
    // It still waits, and takes the whole one.
    fs::write(&image, &whole).unwrap();
    assert_eq!(restore(&image, 0, &waiting).unwrap().run_state, "running");
}

#[test]
fn a_new_file_has_the_mode_and_the_owner_asked_for_whatever_the_umask() {
    let dir = images();
    let qemu = booted(&small());
    // The umask is the whole process's; the other tests can do with either of these.
    for (umask, mode) in [(0o000, 0o600), (0o077, 0o644)] {
        let image = dir.path().join(format!("{umask:o}"));
        let owner = "1234:5678".parse().unwrap();
        let old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask));
        let result = save(&SaveSettings { mode, owner, ..settings(&qemu, &image) });
        rustix::process::umask(old);
        result.unwrap_or_else(|error| panic!("{}", error.chain()));
        let found = fs::metadata(&image).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (1234, 5678, mode));
    }
}

#[test]
fn a_rehearsal_tells_what_would_be_done_and_leaves_no_trace() {
    let dir = images();
    let image = dir.path().join("vm.img");
    let qemu = booted(&small());
    let mut other =
        vmstate::qmp::Client::connect(&QmpAddress::Unix(qemu.second_qmp_path()), &Cancel::new().unwrap())
            .unwrap();
    let found = rehearse(&settings(&qemu, &image));
    assert_eq!(
        (found.via, found.format, found.fits),
        (Via::Direct, SaveFormat::MappedRam, true),
        "{found:?}"
    );
    assert!(found.ram_bytes > 64 * MIB && found.expected.is_none(), "{found:?}");
    let fifo = dir.path().join("fifo");
    run("mkfifo", &[fifo.to_str().unwrap()]);
    // Nobody reads, and nobody has to.
    let piped = rehearse(&settings(&qemu, &fifo));
    assert_eq!((piped.format, piped.room_bytes, piped.fits), (SaveFormat::Stream, None, true));
    let by_qemu = rehearse(&SaveSettings { via: Via::Qemu, ..settings(&qemu, &image) });
    assert_eq!((by_qemu.via, by_qemu.bytes_max), (Via::Qemu, by_qemu.ram_bytes));
    assert!(other.status().unwrap().running);
    assert_eq!(other.take_events().iter().filter(|event| event.name == "STOP").count(), 0);
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["fifo"]);

    let report = saved(&settings(&qemu, &image));
    assert!(report.data_bytes <= found.bytes_max, "{report:?} {found:?}");
}

#[test]
fn a_guest_of_some_size_is_rehearsed_with_a_short_trial() {
    let dir = images();
    let qemu = booted(&spec(320, MemoryBackend::Plain));
    let found = rehearse(&settings(&qemu, dir.path().join("vm.img")));
    let wanted =
        rehearse(&SaveSettings { direct_io: DirectIo::Off, ..settings(&qemu, dir.path().join("vm.img")) });
    assert!(found.expected.is_some_and(|time| !time.is_zero()), "{found:?}");
    assert_eq!(wanted.expected, None, "what is not ours to choose is not tried");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_stream_onto_a_device_is_refused_with_what_a_device_takes() {
    let (device, directory) = (Loop::new(1), images());
    let image = directory.path().join("image");
    vmstate_rig::unpack_wire_golden("q35-10.0-stream", &image);
    let settings = ConvertSettings::new(&image, &device.path, Format::Stream);
    let settings = ConvertSettings { overwrite: true, ..settings };
    let place = directory.path().join("place");
    fs::write(&place, "mine").unwrap();
    let in_place = ConvertSettings { to: place, to_offset: Some(4), ..settings.clone() };
    for (settings, hint) in [
        (settings, "give a new file; a device takes a mapped-ram or libvirt-sparse image"),
        (in_place, "leave --offset out, or give another place"),
    ] {
        let (kind, chain, said) = told(vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved));
        assert_eq!((kind, said.as_str()), (Kind::Misuse, hint), "{chain}");
    }
}

/// A file system of 48 MiB in memory, unmounted at the end.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new() -> Tmpfs {
        let dir = tempfile::tempdir().unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=48m", "tmpfs", dir.path().to_str().unwrap()]);
        Tmpfs(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: what other threads start has our descriptors until its program begins, and keeps the mount busy.
        run("umount", &["-l", self.0.path().to_str().unwrap()]);
    }
}

#[test]
fn a_guest_that_does_not_fit_is_refused_before_it_stops() {
    let mount = Tmpfs::new();
    let image = mount.0.path().join("vm.img");
    let qemu = booted(&small());
    let hook = Hook::at("never", || {});
    let (kind, chain, hint) = told(vmstate::save(&settings(&qemu, &image), &Cancel::new().unwrap(), &hook));
    assert_eq!(kind, Kind::Io, "{chain}");
    let begin = format!("the file system of {} has 48 MiB left, the guest's memory takes ", image.display());
    assert!(chain.starts_with(&begin) && chain.ends_with("No space left on device (os error 28)"), "{chain}");
    assert_eq!(hint, "the file system is full: free some space, or save to another one");
    assert_eq!(hook.phases(), ["connect", "probe", "settle"]);
    assert_eq!(fs::read_dir(mount.0.path()).unwrap().count(), 0);
    let found = rehearse(&settings(&qemu, &image));
    assert!(!found.fits && found.bytes_max > found.room_bytes.unwrap(), "{found:?}");
    assert!(is_running(&qemu));
}

#[test]
fn a_guest_that_fits_without_its_zeros_is_saved() {
    let mount = Tmpfs::new();
    let image = mount.0.path().join("vm.img");
    // All of its memory is there, and next to nothing is in it.
    let memory = "memory-backend-memfd,share=on,prealloc=on";
    let guest = Some(Guest::new(GuestSettings::idle(256)));
    let qemu = booted(&QemuSpec { guest, ..spec(64, MemoryBackend::Object(memory.to_owned())) });
    let found = rehearse(&settings(&qemu, &image));
    assert!(found.fits && found.bytes_max > found.room_bytes.unwrap(), "{found:?}");
    let report = saved(&settings(&qemu, &image));
    assert!(report.zero_bytes > 48 * MIB, "{report:?}");
    assert!(vmstate::check(&image).unwrap().report.is_clean());
}

#[test]
fn a_disk_that_fills_up_during_the_save_fails_it_and_keeps_the_guest() {
    let mount = Tmpfs::new();
    let image = mount.0.path().join("vm.img");
    let qemu = booted(&spec(32, MemoryBackend::Plain));
    for phase in ["device state", "ram"] {
        let filler = mount.0.path().join("filler");
        let hook = Hook::at(phase, || fs::write(&filler, vec![1; 40 << 20]).unwrap());
        let (kind, chain, hint) =
            told(vmstate::save(&settings(&qemu, &image), &Cancel::new().unwrap(), &hook));
        assert_eq!(kind, Kind::Io, "{chain}");
        assert!(chain.starts_with("the guest's memory could not be written: write of "), "{chain}");
        assert_eq!(hint, "the file system is full: free some space, or save to another one");
        assert!(is_running(&qemu));
        fs::remove_file(&filler).unwrap();
        assert_eq!(fs::read_dir(mount.0.path()).unwrap().count(), 0);
    }
    saved(&settings(&qemu, &image));
}

/// Hangs QEMU while a save is in one phase and lets it go in the last.
struct Hang {
    pid: Pid,
    phase: &'static str,
    done: Mutex<bool>,
}

impl Observer for Hang {
    fn phase(&self, name: &'static str) {
        if name == self.phase {
            *self.done.lock().unwrap() = true;
            kill_process(self.pid, Signal::STOP).unwrap();
        } else if name == "settle" {
            kill_process(self.pid, Signal::CONT).unwrap();
        }
    }
}

#[test]
fn a_qemu_that_does_not_answer_in_time_ends_a_save_with_a_time_limit() {
    let dir = images();
    let qemu = booted(&small());
    let pid = Pid::from_raw(qemu.pid().try_into().unwrap()).unwrap();
    for phase in ["probe", "stop"] {
        let hang = Hang { pid, phase, done: Mutex::new(false) };
        let settings = SaveSettings {
            timeout: Some(Duration::from_millis(300)),
            ..settings(&qemu, dir.path().join("vm.img"))
        };
        let (kind, chain, _) = told(vmstate::save(&settings, &Cancel::new().unwrap(), &hang));
        assert!(*hang.done.lock().unwrap());
        assert_eq!(kind, Kind::Peer, "{chain}");
        assert!(chain.starts_with("QEMU did not answer ") && chain.ends_with(" within 300ms"), "{chain}");
        assert!(is_running(&qemu), "{phase}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{phase}");
    }
}
