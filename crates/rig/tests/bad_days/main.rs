//! The bad days of the main job, each with a real QEMU: whatever happens, the guest is not worse off, no image
//! stands that is not whole, and the user is told one thing that helps.
//!
//! What happens does so inside a phase of the job itself, by a [`Hook`], so each run is the same. The whole
//! suite takes less than a minute and a half on two processors.

mod ahead;
mod channels;
mod disks;
mod ends;
mod faults;
mod fits;
mod lacking;
mod late;
mod others;
mod states;
mod targets;

use std::path::Path;

use lab::{Guest, GuestSettings, MachineKind, Qemu, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::qmp::Client;
use vmstate::{Cancel, Error, Kind, Observer, SaveReport, SaveSettings, Via};
use vmstate_rig::{DEADLINE, Footprint};

/// A small guest, and a second monitor for whoever interferes.
fn small() -> QemuSpec {
    QemuSpec {
        guest: Some(Guest::new(GuestSettings::idle(256))),
        second_qmp: true,
        ..QemuSpec::new(MachineKind::Q35, 64 << 20)
    }
}

/// The small guest, past its boot, and QEMU's footprint.
fn booted() -> (Qemu, Footprint) {
    let mut qemu = small().start().unwrap();
    qemu.wait_for_round(1, DEADLINE).unwrap();
    let before = paused_footprint(&qemu);
    other(&qemu).cont().unwrap();
    (qemu, before)
}

/// The devices of a guest that runs hold descriptors of their own, so it is paused for this.
fn paused_footprint(qemu: &Qemu) -> Footprint {
    // Held until all is counted: QEMU greets it when the connection before it is closed, so that what is counted of
    // this monitor is always one.
    let mut other = other(qemu);
    other.stop().unwrap();
    Footprint::of(&qemu.qmp_path(), qemu.pid())
}

/// A directory on a disk.
fn images() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

/// The other client.
fn other(qemu: &Qemu) -> Client {
    let address = QmpAddress::Unix(qemu.second_qmp_path());
    let mut client = Client::connect(&address, &Cancel::new().unwrap()).unwrap();
    client.timeout = Some(DEADLINE);
    client
}

fn save_to(image: &Path, qemu: &Qemu, via: Via, observer: &dyn Observer) -> Result<SaveReport, Error> {
    let settings = SaveSettings { via, ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image) };
    vmstate::save(&settings, &Cancel::new().unwrap(), observer)
}

/// What an error says: its kind, its chain of clauses, its hint.
fn told<T: std::fmt::Debug>(result: Result<T, Error>) -> (Kind, String, String) {
    let error = result.expect_err("it was to fail");
    (error.kind(), error.chain(), error.hint_text().unwrap_or("no hint").to_owned())
}

/// The same, as it is to be.
fn says(kind: Kind, chain: &str, hint: &str) -> (Kind, String, String) {
    (kind, chain.to_owned(), hint.to_owned())
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[track_caller]
fn assert_status(qemu: &Qemu, expected: &str) {
    assert_eq!(other(qemu).status().unwrap().status, expected);
}

/// QEMU's settings and descriptors are what they were. Pauses the guest.
#[track_caller]
fn assert_untouched(qemu: &Qemu, before: &Footprint) {
    assert_eq!(before.changes(&paused_footprint(qemu)), [""; 0]);
}
