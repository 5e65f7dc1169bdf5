//! Saves and restores that may take so much of the disk and no more.
//!
//! How long a limit holds anybody up is tested with a clock of its own, in `io`. Here a limit of a byte a second
//! stands for one that works: a job that it reaches does not end in the life of a test, unless it is cancelled.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use lab::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, Qemu, QemuSpec};
use serde_json::Value;
use vmstate::net::QmpAddress;
use vmstate::{
    Cancel, Kind, Observer, Progress, Rate, RestoreSettings, SaveFormat, SaveSettings, Target, Then,
    Unobserved, Via,
};
use vmstate_rig::{DEADLINE, Hook, client};

const CRAWL: NonZeroU64 = NonZeroU64::MIN;

fn spec() -> QemuSpec {
    let settings = GuestSettings { pages_low_max: 8192, fill_rounds: 1, ..GuestSettings::default() };
    QemuSpec {
        guest: Some(Guest::new(settings)),
        second_qmp: true,
        ..QemuSpec::new(MachineKind::Q35, 128 << 20)
    }
}

fn booted() -> Qemu {
    let mut qemu = spec().start().unwrap();
    qemu.wait_for_round(2, DEADLINE).unwrap();
    qemu
}

fn images() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn save_settings(qemu: &Qemu, image: &Path) -> SaveSettings {
    let settings = SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image);
    SaveSettings { then: Then::Resume, overwrite: true, ..settings }
}

/// More than what sets out before anybody has to wait: a piece of a lane, or a buffer of a stream and what is gathered
/// for the next.
const FIRST_LEN: u64 = 4 << 20;

/// Cancels a job as soon as the first bytes of pages have moved.
struct CancelsWhenMoving(Cancel, OnceLock<Progress>);

impl CancelsWhenMoving {
    fn new(cancel: &Cancel) -> CancelsWhenMoving {
        CancelsWhenMoving(cancel.clone(), OnceLock::new())
    }

    /// How many bytes had moved when the job had ended.
    fn moved_bytes(&self) -> u64 {
        self.1.get().unwrap().read().moved_bytes
    }
}

impl Observer for CancelsWhenMoving {
    fn progress(&self, progress: &Progress) {
        self.1.set(progress.clone()).unwrap();
        let (progress, cancel) = (progress.clone(), self.0.clone());
        std::thread::spawn(move || {
            while progress.read().moved_bytes == 0 {
                std::thread::yield_now();
            }
            cancel.cancel();
        });
    }
}

fn bandwidth(qemu: &Qemu) -> Value {
    let address = QmpAddress::Unix(qemu.second_qmp_path());
    let mut other = vmstate::qmp::Client::connect(&address, &Cancel::new().unwrap()).unwrap();
    other.parameters().unwrap()["max-bandwidth"].clone()
}

#[test]
fn a_save_at_a_crawl_is_under_way_until_it_is_cancelled() {
    let qemu = booted();
    let dir = images();
    for format in [SaveFormat::MappedRam, SaveFormat::Stream] {
        let cancel = Cancel::new().unwrap();
        let settings = SaveSettings {
            format: Some(format),
            rate_max: Some(CRAWL.into()),
            ..save_settings(&qemu, &dir.path().join("vm.img"))
        };
        let observer = CancelsWhenMoving::new(&cancel);
        let error = vmstate::save(&settings, &cancel, &observer).expect_err("years are owed");
        assert_eq!(error.kind(), Kind::Interrupted, "{format:?}: {}", error.chain());
        assert!(observer.moved_bytes() <= FIRST_LEN, "{format:?}: {:#x}", observer.moved_bytes());
        assert!(client(&qemu).status().unwrap().running, "{format:?}");
    }
}

#[test]
fn qemu_is_given_the_limit_and_gets_its_own_back() {
    let qemu = booted();
    let dir = images();
    let before = bandwidth(&qemu);
    let rate: Rate = "700MiB".parse().unwrap();
    let seen = Mutex::new(Value::Null);
    let hook = Hook::at("ram", || *seen.lock().unwrap() = bandwidth(&qemu));
    let settings = SaveSettings {
        via: Via::Qemu,
        rate_max: Some(rate),
        ..save_settings(&qemu, &dir.path().join("vm.img"))
    };
    vmstate::save(&settings, &Cancel::new().unwrap(), &hook).unwrap();
    drop(hook);
    assert_eq!(seen.into_inner().unwrap(), 700 << 20);
    assert_ne!(before, 700 << 20);
    assert_eq!(bandwidth(&qemu), before);
}

/// An image of the guest.
fn saved(dir: &Path) -> PathBuf {
    let image = dir.join("vm.img");
    vmstate::save(&save_settings(&booted(), &image), &Cancel::new().unwrap(), &Unobserved).unwrap();
    image
}

#[test]
fn a_restore_at_a_crawl_is_under_way_until_it_is_cancelled() {
    let dir = images();
    let image = saved(dir.path());
    for (via, backend) in [(Via::Direct, MemoryBackend::Memfd), (Via::Socket, MemoryBackend::Plain)] {
        let home = tempfile::tempdir().unwrap();
        let spec = QemuSpec { backend, ..spec() };
        let mut command = vec![spec.program.clone().into_os_string()];
        command.extend(spec.machine_args(home.path()).unwrap());
        let target = Target::Launch { command, log: None, foreground: false };
        let cancel = Cancel::new().unwrap();
        let settings =
            RestoreSettings { via, rate_max: Some(CRAWL.into()), ..RestoreSettings::new(&image, target) };
        let observer = CancelsWhenMoving::new(&cancel);
        let error = vmstate::restore(&settings, &cancel, &observer).expect_err("years are owed");
        assert_eq!(error.kind(), Kind::Interrupted, "{via:?}: {}", error.chain());
        assert!(observer.moved_bytes() <= FIRST_LEN, "{via:?}: {:#x}", observer.moved_bytes());
    }
}

#[test]
fn a_qemu_that_would_read_without_a_limit_is_fed_instead() {
    let dir = images();
    let image = saved(dir.path());
    let mut qemu = QemuSpec { incoming: Incoming::Defer, ..spec() }.start().unwrap();
    let target = Target::Waiting(QmpAddress::Unix(qemu.qmp_path()));
    let settings =
        RestoreSettings { rate_max: Some("64G".parse().unwrap()), ..RestoreSettings::new(&image, target) };
    let by_qemu = RestoreSettings { via: Via::Qemu, ..settings.clone() };
    let error = vmstate::restore(&by_qemu, &Cancel::new().unwrap(), &Unobserved).expect_err("refused");
    assert_eq!(error.kind(), Kind::Unsupported);
    assert_eq!(error.to_string(), "QEMU reads an image as fast as it can, it cannot be held to 64 GiB/s");
    assert_eq!(error.hint_text(), Some("leave --max-bandwidth out, or restore with --via socket"));
    let report = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
    assert_eq!(report.via, Via::Socket);
    assert_eq!(
        report.reason.as_deref(),
        Some(
            "QEMU reads an image as fast as it can, whatever the limit; target's `pc.ram` is not shared memory \
             that can be written from outside"
        )
    );
    qemu.wait_for_round(3, DEADLINE).unwrap();
}
