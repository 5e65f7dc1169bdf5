//! Guests whose memory a device plugs in: its state stands early in an image, between the RAM's sections. They are
//! saved by each way and by stock QEMU, looked into, and come back by each way, with the memory plugged that was.

use std::path::Path;

use lab::{
    Count, Guest, GuestSettings, Incoming, LinuxGuest, LinuxSettings, MachineKind, MemoryBackend, Qemu,
    QemuSpec,
};
use serde_json::json;
use vmstate::job::{ImageInfo, SaveFormat};
use vmstate::net::QmpAddress;
use vmstate::{Cancel, Record, RestoreSettings, SaveReport, SaveSettings, Target, Via};
use vmstate_rig::{DEADLINE, Hook, StockLoad, client, stock_load, stock_save, verify_image};

/// What the section is called that stands early.
const EARLY: &str = "/virtio-mem-device-early";

/// A machine of 256 MiB, and a virtio-mem device of 512 MiB that is to plug in 128 MiB.
fn with_virtio_mem(shared: bool) -> QemuSpec {
    let (backend, memory) = match shared {
        true => (MemoryBackend::Memfd, "memory-backend-memfd,share=on"),
        false => (MemoryBackend::Plain, "memory-backend-ram"),
    };
    let memory = format!("{memory},id=vmem0,size=512M");
    let device = "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=128M";
    let extra = ["-m", "256M,slots=2,maxmem=2G", "-object", &memory, "-device", device];
    let extra = extra.map(Into::into).to_vec();
    QemuSpec { backend, extra, ..QemuSpec::new(MachineKind::Q35, 256 << 20) }
}

fn spec(shared: bool) -> QemuSpec {
    let guest = Some(Guest::new(GuestSettings { fill_rounds: 1, ..GuestSettings::idle(6000) }));
    QemuSpec { guest, ..with_virtio_mem(shared) }
}

fn save(qemu: &Qemu, image: &Path, via: Via, format: Option<SaveFormat>) -> SaveReport {
    let address = QmpAddress::Unix(qemu.qmp_path());
    let settings = SaveSettings { via, format, overwrite: true, ..SaveSettings::new(address, image) };
    let seen = Hook::at("publish", || {});
    let report = vmstate::save(&settings, &Cancel::new().unwrap(), &seen)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(seen.warnings(), [""; 0]);
    report
}

/// Looks into an image, which must be sound, and have its early section first.
fn look(image: &Path) -> ImageInfo {
    let check = vmstate::check(image).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert!(check.report.is_clean(), "{:?}", check.report);
    let info = vmstate::info(image).unwrap_or_else(|error| panic!("{}", error.chain()));
    let early: Vec<_> = info.devices.iter().take_while(|device| device.early).collect();
    assert!(matches!(early[..], [device] if device.name.ends_with(EARLY)), "{early:?}");
    assert!(info.devices.iter().skip(1).all(|device| !device.early && !device.name.ends_with(EARLY)));
    info
}

/// Restores an image into a QEMU that waits.
fn restore(spec: &QemuSpec, image: &Path, via: Via) -> (Qemu, Via) {
    let qemu = QemuSpec { incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
    let target = Target::Waiting(QmpAddress::Unix(qemu.qmp_path()));
    let settings = RestoreSettings { via, record: Record::Running, ..RestoreSettings::new(image, target) };
    let seen = Hook::at("run", || {});
    let report = vmstate::restore(&settings, &Cancel::new().unwrap(), &seen)
        .unwrap_or_else(|error| panic!("{via:?}: {}", error.chain()));
    assert_eq!(seen.warnings(), [""; 0], "{via:?}");
    (qemu, report.via)
}

#[test]
fn an_image_with_an_early_section_is_written_and_read_by_every_way() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |name: &str| dir.path().join(name);
    for shared in [false, true] {
        let spec = spec(shared);
        let mut source = spec.start().unwrap();
        source.wait_for_round(2, DEADLINE).unwrap();
        client(&source).stop().unwrap();
        // The very same moment by each way.
        let (ours, stream, theirs) = (at("ours.img"), at("stream.img"), at("theirs.img"));
        let report = save(&source, &ours, Via::Auto, None);
        assert_eq!((report.via, report.reason), (Via::Direct, None));
        let report = save(&source, &stream, Via::Auto, Some(SaveFormat::Stream));
        assert_eq!((report.via, report.reason), (Via::Direct, None));
        let by_qemu = at("by-qemu.img");
        let report = save(&source, &by_qemu, Via::Qemu, None);
        assert_eq!((report.via, report.run_state.as_str()), (Via::Qemu, "paused"));
        client(&source).cont().unwrap();
        client(&source).stop().unwrap();
        let _ = std::fs::remove_file(&theirs);
        stock_save(&source, &theirs, StockLoad::BEST);
        let round = source.serial.latest_round().unwrap();
        drop(source);

        let (a, b) = (look(&ours), look(&by_qemu));
        let names =
            |info: &ImageInfo| info.devices.iter().map(|d| (d.name.clone(), d.bytes)).collect::<Vec<_>>();
        assert_eq!(names(&a), names(&b));
        assert_eq!(a.run_state.as_deref(), Some("paused"));
        look(&stream);
        look(&theirs);
        verify_image(&spec.guest.unwrap(), &spec.layout(), &ours);

        let goes_on = |mut qemu: Qemu, how: &str| {
            qemu.wait_for_round(round + 2, DEADLINE).unwrap_or_else(|error| panic!("{how}: {error}"));
        };
        for (image, name) in [(&ours, "ours"), (&by_qemu, "by qemu"), (&theirs, "theirs")] {
            let loaded = stock_load(&spec, image, StockLoad::BEST);
            client(&loaded).cont().unwrap();
            goes_on(loaded, name);
        }
        let by_auto = if shared { Via::Direct } else { Via::Qemu };
        for (image, via, taken) in [
            (&ours, Via::Auto, by_auto),
            (&ours, Via::Socket, Via::Socket),
            (&theirs, Via::Auto, by_auto),
            (&theirs, Via::Qemu, Via::Qemu),
            (&theirs, Via::Socket, Via::Socket),
            (&stream, Via::Auto, Via::Qemu),
        ] {
            let (qemu, by) = restore(&spec, image, via);
            assert_eq!(by, taken, "{} {via:?}", image.display());
            goes_on(qemu, &format!("{} {via:?}", image.display()));
        }
    }
}

/// How much memory the device has plugged in, in bytes.
fn plugged(qemu: &Qemu) -> u64 {
    let devices = client(qemu).execute("query-memory-devices", json!({})).unwrap();
    devices[0]["data"]["size"].as_u64().unwrap_or_else(|| panic!("{devices}"))
}

/// The guest's next line, which must go on from `last` with the same digest.
fn next(qemu: &mut Qemu, last: Option<&Count>) -> Count {
    let count = qemu.wait_for_line("count", DEADLINE, Count::parse).unwrap();
    if let Some(last) = last {
        assert_eq!(count.digest, last.digest, "the file in the guest's memory has changed");
        assert!(count.counter > last.counter, "{count:?} after {last:?}");
    }
    count
}

#[test]
fn memory_that_a_guest_has_plugged_in_is_plugged_in_again() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // More data than fits into what the machine boots with, so that it lies in what was plugged in, too.
    let linux = LinuxGuest::build(dir.path(), LinuxSettings { data_mib: 176, disk: false }).unwrap();
    let mut spec = QemuSpec { guest: None, ..with_virtio_mem(true) };
    spec.extra.extend(linux.args());
    let mut source = spec.start().unwrap();
    let mut count = next(&mut source, None);
    count = next(&mut source, Some(&count));
    assert_eq!(plugged(&source), 128 << 20);
    let ours = dir.path().join("ours.img");
    assert_eq!(save(&source, &ours, Via::Auto, None).via, Via::Direct);
    drop(source);
    let info = look(&ours);
    let block = info.blocks.iter().find(|block| block.name.ends_with("vmem0")).unwrap();
    assert!(block.data_bytes > 16 << 20, "{block:?}: nothing of what was plugged in is in use");

    let mut second = stock_load(&spec, &ours, StockLoad::BEST);
    assert_eq!(plugged(&second), 128 << 20);
    count = next(&mut second, Some(&count));
    let theirs = dir.path().join("theirs.img");
    stock_save(&second, &theirs, StockLoad::BEST);
    drop(second);

    let (mut third, via) = restore(&spec, &theirs, Via::Auto);
    assert_eq!(via, Via::Direct);
    assert_eq!(plugged(&third), 128 << 20);
    count = next(&mut third, Some(&count));
    next(&mut third, Some(&count));
}
