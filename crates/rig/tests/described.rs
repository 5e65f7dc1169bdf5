//! Device state by a migration with `x-ignore-shared`: QEMU's own description of every field beside RAM that vmstate
//! has taken from outside.

use std::os::fd::AsRawFd;
use std::path::Path;

use lab::{Guest, GuestSettings, MachineKind, MemoryBackend, Qemu, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::{Cancel, DeviceStateBy, Error, Kind, SaveReport, SaveSettings, Then, Via};
use vmstate_rig::{DEADLINE, Hook, Proxy, StockLoad, client, compare_images, stock_load, verify_image};

fn spec(backend: MemoryBackend, extra: &[&str]) -> QemuSpec {
    let guest = Some(Guest::new(GuestSettings { fill_rounds: 1, ..GuestSettings::idle(6000) }));
    let extra = extra.iter().map(Into::into).collect();
    QemuSpec { backend, guest, extra, ..QemuSpec::new(MachineKind::Q35, 256 << 20) }
}

fn settings(qmp: &Path, image: &Path, by: DeviceStateBy) -> SaveSettings {
    SaveSettings {
        via: Via::Direct,
        device_state: by,
        overwrite: true,
        ..SaveSettings::new(QmpAddress::Unix(qmp.to_owned()), image)
    }
}

fn save(settings: &SaveSettings) -> Result<SaveReport, Error> {
    vmstate::save(settings, &Cancel::new().unwrap(), &vmstate::Unobserved)
}

fn saved(settings: &SaveSettings) -> SaveReport {
    save(settings).unwrap_or_else(|error| panic!("{}", error.chain()))
}

fn status(qemu: &Qemu) -> String {
    client(qemu).status().unwrap().status
}

#[test]
fn a_described_image_is_the_other_one_with_qemus_own_description() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let memfd = rustix::fs::memfd_create("named", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let by_its_path = format!("/proc/{}/fd/{}", std::process::id(), memfd.as_raw_fd());
    let ram = dir.path().join("ram");
    // virtio-mem in shared memory with a name: its early section comes in this stream, too.
    let vmem = format!(
        "memory-backend-file,id=vmem0,size=512M,share=on,mem-path={}",
        dir.path().join("vmem").display()
    );
    // A clock that goes by the host's goes on in a paused guest.
    let rtc = ["-rtc", "clock=vm"];
    let plugged = [
        &["-m", "256M,slots=2,maxmem=2G", "-object", &vmem, "-device", "virtio-mem-pci,memdev=vmem0"][..],
        &rtc,
    ]
    .concat();
    for (name, backend, extra) in [
        ("a file", MemoryBackend::File(ram), &rtc[..]),
        ("a memfd by its path", MemoryBackend::File(by_its_path.into()), &plugged),
    ] {
        let spec = spec(backend, extra);
        let mut source = spec.start().unwrap();
        source.wait_for_round(2, DEADLINE).unwrap();
        client(&source).stop().unwrap();
        let (plain, described) = (dir.path().join("plain.img"), dir.path().join("described.img"));
        saved(&settings(&source.qmp_path(), &plain, DeviceStateBy::Command));
        assert_eq!(status(&source), "paused", "{name}");
        let report = saved(&settings(&source.qmp_path(), &described, DeviceStateBy::Migration));
        assert_eq!((report.via, report.run_state.as_str()), (Via::Direct, "paused"), "{name}");
        assert_eq!(status(&source), "postmigrate", "{name}");

        let info = |image: &Path| vmstate::info(image).unwrap_or_else(|error| panic!("{}", error.chain()));
        let (a, b) = (info(&plain), info(&described));
        assert!(!a.described && b.described, "{name}");
        assert_eq!((a.capabilities, a.run_state), (b.capabilities, b.run_state), "{name}");
        assert_eq!(compare_images(&plain, &described), [], "{name}: pages and device sections");
        assert!(vmstate::check(&described).unwrap().report.is_clean(), "{name}");
        verify_image(&spec.guest.unwrap(), &spec.layout(), &described);

        // The source goes on, and the next save is as good as the first.
        let round = source.serial.latest_round().unwrap();
        client(&source).cont().unwrap();
        let resumed = SaveSettings {
            then: Then::Resume,
            ..settings(&source.qmp_path(), &described, DeviceStateBy::Migration)
        };
        assert_eq!(saved(&resumed).run_state, "running", "{name}");
        assert_eq!(status(&source), "running", "{name}");
        let round = source.wait_for_round(round + 1, DEADLINE).unwrap();
        drop(source);
        let mut loaded = stock_load(
            &QemuSpec { backend: MemoryBackend::Memfd, ..spec_without_names(&spec) },
            &described,
            StockLoad::BEST,
        );
        loaded.wait_for_round(round + 1, DEADLINE).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// The same machine, its plugged memory without a file: the files are full of the source's memory.
fn spec_without_names(spec: &QemuSpec) -> QemuSpec {
    let plain = |arg: &std::ffi::OsString| match arg.to_str() {
        Some(arg) if arg.starts_with("memory-backend-file") => "memory-backend-ram,id=vmem0,size=512M".into(),
        _ => arg.clone(),
    };
    QemuSpec { extra: spec.extra.iter().map(plain).collect(), ..spec.clone() }
}

#[test]
fn memory_without_a_name_is_refused_before_the_guest_is_stopped() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("vm.img");
    for backend in [MemoryBackend::Plain, MemoryBackend::Memfd] {
        let mut source = spec(backend.clone(), &[]).start().unwrap();
        source.wait_for_round(1, DEADLINE).unwrap();
        let error = save(&settings(&source.qmp_path(), &image, DeviceStateBy::Migration)).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{backend:?}");
        let clause = "`pc.ram` is not shared memory with a name, so QEMU would send all of it";
        assert_eq!(error.to_string(), clause, "{backend:?}");
        assert_eq!(status(&source), "running", "{backend:?}");
    }
}

#[test]
fn a_qemu_without_the_command_gives_its_devices_by_a_migration_where_the_memory_has_a_name() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("vm.img");
    let mut source = spec(MemoryBackend::File(dir.path().join("ram")), &[]).start().unwrap();
    source.wait_for_round(1, DEADLINE).unwrap();
    let proxy = Proxy::start(dir.path(), &source.qmp_path(), &["xen-save-devices-state"]);
    let settings = SaveSettings {
        via: Via::Auto,
        then: Then::Resume,
        ..settings(&proxy.path, &image, DeviceStateBy::Auto)
    };
    let seen = Hook::at("ram", || {});
    let report = vmstate::save(&settings, &Cancel::new().unwrap(), &seen)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    proxy.finish();
    assert_eq!((report.via, report.reason), (Via::Direct, None));
    assert_eq!(status(&source), "running");
    assert!(vmstate::info(&image).unwrap().described);
}

#[test]
fn a_described_save_that_fails_brings_a_running_guest_back() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("vm.img");
    let mut source = spec(MemoryBackend::File(dir.path().join("ram")), &[]).start().unwrap();
    source.wait_for_round(1, DEADLINE).unwrap();
    for phase in ["device state", "ram", "metadata", "publish"] {
        let cancel = Cancel::new().unwrap();
        let hook = Hook::at(phase, || cancel.cancel());
        let settings = settings(&source.qmp_path(), &image, DeviceStateBy::Migration);
        let error = vmstate::save(&settings, &cancel, &hook).unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted, "{phase}: {}", error.chain());
        assert_eq!(hook.warnings(), [""; 0], "{phase}");
        assert_eq!(status(&source), "running", "{phase}");
        assert!(!image.exists(), "{phase}");
    }
    let round = source.serial.latest_round().unwrap();
    source.wait_for_round(round + 1, DEADLINE).unwrap();
}
