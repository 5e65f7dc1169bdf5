//! Disks that fail: at a write, a sync, a rename; that take less than they are given; and savers that end right there.

#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lab::Qemu;
use rustix::io::Errno;
use vmstate::net::QmpAddress;
use vmstate::{Cancel, Error, Kind, ResumeSettings, SaveReport, SaveSettings, Unobserved, Via};
use vmstate_rig::faulty::{Fault, FaultyMount, Step};
use vmstate_rig::verify_image;

use crate::{assert_status, assert_untouched, booted, images, names_in, other, paused_footprint, small};

/// What stands under the name before a save.
const OLD: &[u8] = b"the image that was there";
/// What a saver that is to be killed is told: the monitor, the image, the way.
const ORDERS: &str = "VMSTATE_TEST_SAVE_ON_A_FAULTY_DISK";

/// The file system, or, said aloud, none.
fn mount(disk: &Path) -> Option<FaultyMount> {
    match FaultyMount::new(disk) {
        Ok(mount) => Some(mount),
        Err(error) => {
            println!("NOT TESTED here: disks that fail: no FUSE: {error}");
            None
        }
    }
}

fn settings(qmp: PathBuf, image: &Path, via: Via) -> SaveSettings {
    SaveSettings {
        via,
        overwrite: true,
        // The same writes each time, in any case.
        channels: (via == Via::Direct).then_some(2),
        ..SaveSettings::new(QmpAddress::Unix(qmp), image)
    }
}

fn save(qemu: &Qemu, image: &Path, via: Via) -> Result<SaveReport, Error> {
    vmstate::save(&settings(qemu.qmp_path(), image, via), &Cancel::new().unwrap(), &Unobserved)
}

/// Puts the old image under the name.
fn put_old(mount: &FaultyMount, image: &Path) {
    mount.faults.clear();
    std::fs::write(image, OLD).unwrap();
}

/// How often a save that succeeds does each step.
fn counts(qemu: &Qemu, mount: &FaultyMount, image: &Path, via: Via) -> [(Step, u64); 4] {
    put_old(mount, image);
    mount.faults.clear();
    save(qemu, image, via).unwrap_or_else(|error| panic!("{via:?}: {}", error.chain()));
    other(qemu).cont().unwrap();
    let count = |step| (step, mount.faults.count(step));
    [count(Step::Write), count(Step::SyncFile), count(Step::Rename), count(Step::SyncDirectory)]
}

/// The steps of a kind that are made to fail: all where they are few, else the first, the last and some between.
fn chosen(count: u64, few: u64) -> Vec<u64> {
    if count <= few {
        return (0..count).collect();
    }
    (0..few).map(|i| i * (count - 1) / (few - 1)).collect()
}

#[test]
fn a_disk_that_fails_at_any_step_leaves_the_guest_running_and_the_old_image_whole() {
    let disk = images();
    let Some(mount) = mount(disk.path()) else { return };
    let image = mount.path().join("vm.img");
    let (qemu, before) = booted();
    for (via, few) in [(Via::Direct, 24), (Via::Qemu, 6)] {
        for (step, count) in counts(&qemu, &mount, &image, via) {
            assert!(count > 0, "{via:?}: a save has at least one {step:?}");
            for errno in [Errno::IO, Errno::NOSPC] {
                for nth in chosen(count, few) {
                    let name = format!("{via:?}, {step:?} {nth} of {count}, {errno:?}");
                    put_old(&mount, &image);
                    mount.faults.plan(step, nth, Fault::Errno(errno));
                    let outcome = save(&qemu, &image, via);
                    // What a running guest touches differs a little; what the last writes are of does not.
                    assert!(mount.faults.is_met() || nth + 4 > count, "{name}: it has not come to that");
                    if !mount.faults.is_met() {
                        outcome.unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
                        other(&qemu).cont().unwrap();
                        continue;
                    }
                    let error =
                        outcome.err().unwrap_or_else(|| panic!("{name}: the save says that all is well"));
                    let told = format!("{name}: {}", error.chain());
                    let words =
                        if errno == Errno::IO { "Input/output error" } else { "No space left on device" };
                    // QEMU's main thread may come before the channel that failed, and then knows no reason.
                    let lost = via == Via::Qemu && told.contains("Channel error: Operation not permitted");
                    let helped = error.hint_text().is_some_and(|hint| hint.contains("lost the reason"));
                    assert!(error.chain().contains(words) || (lost && helped), "{told}");
                    assert!(matches!(error.kind(), Kind::Io | Kind::Peer), "{told}");
                    assert_status(&qemu, "running");
                    mount.faults.clear();
                    assert_eq!(names_in(mount.path()), ["vm.img"], "{told}");
                    if step == Step::SyncDirectory {
                        // The name is the new one's by then, and all of it was synced.
                        assert!(vmstate::check(&image).unwrap().report.is_clean(), "{told}");
                    } else {
                        assert_eq!(std::fs::read(&image).unwrap(), OLD, "{told}");
                    }
                }
            }
        }
        assert_untouched(&qemu, &before);
        other(&qemu).cont().unwrap();
    }
}

#[test]
fn writes_that_are_cut_short_lose_nothing() {
    let disk = images();
    let Some(mount) = mount(disk.path()) else { return };
    let image = mount.path().join("vm.img");
    let spec = small();
    let (qemu, _) = booted();
    put_old(&mount, &image);
    mount.faults.plan(Step::Write, 1, Fault::Short);
    save(&qemu, &image, Via::Direct).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert!(mount.faults.is_met());
    assert!(vmstate::check(&image).unwrap().report.is_clean());
    verify_image(&spec.guest.unwrap(), &spec.layout(), &image);
}

/// Not a test of its own: the saver that is killed, when one of the tests here starts it.
#[test]
fn a_save_on_a_faulty_disk_with_orders_ends_there() {
    let Some(orders) = std::env::var_os(ORDERS) else { return };
    let orders = orders.into_string().unwrap();
    let [qmp, image, via] = orders.split('\n').collect::<Vec<_>>()[..] else { panic!("{orders}") };
    let via = if via == "qemu" { Via::Qemu } else { Via::Direct };
    let settings = settings(qmp.into(), Path::new(image), via);
    let outcome = vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved);
    panic!("it was to be killed: {outcome:?}");
}

#[test]
fn a_saver_that_is_killed_after_any_write_leaves_the_old_image_or_the_whole_new_one() {
    let disk = images();
    let Some(mount) = mount(disk.path()) else { return };
    let image = mount.path().join("vm.img");
    let (qemu, _) = booted();
    let steps = counts(&qemu, &mount, &image, Via::Direct);
    let mut new = 0;
    for (step, count) in steps {
        for nth in chosen(count, 16) {
            put_old(&mount, &image);
            mount.faults.plan(step, nth, Fault::Kill);
            let name = format!("{step:?} {nth} of {count}");
            let mut saver = Command::new(std::env::current_exe().unwrap());
            saver.args(["--exact", "faults::a_save_on_a_faulty_disk_with_orders_ends_there"]);
            saver.env(ORDERS, format!("{}\n{}\ndirect", qemu.qmp_path().display(), image.display()));
            let status = saver.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
            if !mount.faults.is_met() {
                assert!(nth + 4 > count, "{name}: it has not come to that");
                other(&qemu).cont().unwrap();
                continue;
            }
            assert_eq!(status.signal(), Some(9), "{name}");
            mount.faults.clear();
            if std::fs::read(&image).unwrap() != OLD {
                let check =
                    vmstate::check(&image).unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
                assert!(check.report.is_clean(), "{name}: {:?}", check.report);
                assert!(matches!(step, Step::Rename | Step::SyncDirectory), "{name}");
                new += 1;
            }
            let settings = ResumeSettings { qmp: QmpAddress::Unix(qemu.qmp_path()), force: false };
            let report = vmstate::resume(&settings, &Cancel::new().unwrap(), &Unobserved);
            let report = report.unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
            assert_eq!(report.run_state, "running", "{name}");
        }
    }
    assert_eq!(new, 2, "killed at the rename and at the sync behind it, the new image stands");
    // And what all of them have left goes with the next save.
    put_old(&mount, &image);
    save(&qemu, &image, Via::Direct).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(names_in(mount.path()), ["vm.img"]);
    let _ = paused_footprint(&qemu);
}
