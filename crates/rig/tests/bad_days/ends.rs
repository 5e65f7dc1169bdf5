//! Saves that are interrupted, and QEMUs that end or hang in the middle of one.

use std::sync::Mutex;

use lab::Qemu;
use rustix::process::{Pid, Signal, kill_process};
use vmstate::net::QmpAddress;
use vmstate::{Cancel, Kind, SaveSettings, Then, Via};
use vmstate_rig::Hook;

use crate::{assert_status, assert_untouched, booted, images, names_in, other, save_to, says, small, told};

/// The phases of each way in which something can still happen to a save.
const BOUNDARIES: [(Via, &[&str]); 2] = [
    (Via::Direct, &["connect", "probe", "stop", "device state", "ram", "metadata", "publish", "name"]),
    (Via::Qemu, &["connect", "stop", "ram", "metadata", "publish", "name"]),
];

#[test]
fn a_save_that_is_cancelled_in_any_phase_leaves_no_trace() {
    let (qemu, before) = booted();
    let dir = images();
    for (via, phases) in BOUNDARIES {
        for phase in phases {
            let cancel = Cancel::new().unwrap();
            let hook = Hook::at(phase, || cancel.cancel());
            let settings = SaveSettings {
                via,
                ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), dir.path().join("vm.img"))
            };
            let (kind, chain, hint) = told(vmstate::save(&settings, &cancel, &hook));
            assert_eq!(kind, Kind::Interrupted, "{via:?} in {phase}: {chain}, {hint}");
            assert_eq!(names_in(dir.path()), [""; 0], "{via:?} in {phase}");
            assert_eq!(hook.warnings(), [""; 0], "{via:?} in {phase}");
            assert_status(&qemu, "running");
            assert_untouched(&qemu, &before);
            other(&qemu).cont().unwrap();
        }
    }
    // The guest is as good as before.
    save_to(&dir.path().join("vm.img"), &qemu, Via::Direct, &vmstate::Unobserved).unwrap();
}

#[test]
fn a_save_that_is_cancelled_leaves_a_paused_guest_paused() {
    let (qemu, _) = booted();
    other(&qemu).stop().unwrap();
    let dir = images();
    for (via, phase) in [(Via::Direct, "device state"), (Via::Direct, "publish"), (Via::Qemu, "ram")] {
        let cancel = Cancel::new().unwrap();
        let hook = Hook::at(phase, || cancel.cancel());
        let settings = SaveSettings {
            via,
            ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), dir.path().join("vm.img"))
        };
        assert_eq!(told(vmstate::save(&settings, &cancel, &hook)).0, Kind::Interrupted, "{via:?} in {phase}");
        assert_status(&qemu, "paused");
    }
}

#[test]
fn a_qemu_that_is_killed_ends_the_save_with_one_clear_message() {
    for (via, phases) in BOUNDARIES {
        // Later it is not needed any more.
        for phase in phases.iter().take_while(|phase| **phase != "metadata") {
            let qemu = Mutex::new(small().start().unwrap());
            let (address, dir) = (QmpAddress::Unix(qemu.lock().unwrap().qmp_path()), images());
            let hook = Hook::at(phase, || {
                qemu.lock().unwrap().kill().unwrap();
            });
            let settings = SaveSettings { via, ..SaveSettings::new(address, dir.path().join("vm.img")) };
            let (kind, chain, hint) = told(vmstate::save(&settings, &Cancel::new().unwrap(), &hook));
            let name = format!("{via:?} in {phase}: {chain}; {hint}");
            assert!(hook.is_done(), "{name}");
            assert_eq!(names_in(dir.path()), [""; 0], "{name}");
            if *phase == "connect" {
                assert_eq!(hint, "no QEMU listens there; is the guest still running?", "{name}");
            } else {
                assert_eq!(hook.warnings(), [""; 0], "{name}");
                assert_eq!(kind, Kind::Peer, "{name}");
                assert_eq!(hint, "look at QEMU's own messages: it has probably exited", "{name}");
            }
        }
    }
}

/// A QEMU that hangs: it goes on when this is dropped.
struct Frozen(Pid);

impl Frozen {
    fn new(qemu: &Qemu) -> Frozen {
        let pid = Pid::from_raw(qemu.pid().try_into().unwrap()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        Frozen(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).unwrap();
    }
}

#[test]
fn a_qemu_that_hangs_holds_up_an_interrupted_save_for_less_than_half_a_minute() {
    let dir = images();
    let results: Vec<_> = std::thread::scope(|scope| {
        let runs = [(Via::Direct, "probe"), (Via::Direct, "ram"), (Via::Qemu, "ram")].map(|(via, phase)| {
            let image = dir.path().join("vm.img");
            scope.spawn(move || {
                let (qemu, _) = booted();
                let cancel = Cancel::new().unwrap();
                let frozen = Mutex::new(None);
                let hook = Hook::at(phase, || {
                    *frozen.lock().unwrap() = Some(Frozen::new(&qemu));
                    cancel.cancel();
                });
                let settings =
                    SaveSettings { via, ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image) };
                let result = told(vmstate::save(&settings, &cancel, &hook));
                let warnings = hook.warnings();
                drop(hook);
                drop(frozen);
                (via, phase, result, warnings)
            })
        });
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    for (via, phase, told, warnings) in results {
        let hint = match phase {
            "probe" => "no hint",
            _ => "the guest may still be paused: resume it with the QMP command cont",
        };
        let name = format!("{via:?} in {phase}, {warnings:?}");
        assert_eq!(told, says(Kind::Interrupted, "interrupted", hint), "{name}");
        // At the start of the probe QEMU has nothing but the claim of the save.
        assert_eq!(warnings.len(), 1, "{name}");
        for warning in &warnings {
            assert!(warning.starts_with("cleaning up failed as well: QEMU did not answer "), "{name}");
            // QEMU hangs until the save has ended: it is what the save waits for, and for no longer than it says.
            let limit_s = warning.rsplit_once(" within ").and_then(|(_, limit)| limit.strip_suffix('s'));
            assert!(limit_s.is_some_and(|limit| limit.parse::<f64>().unwrap() < 30.0), "{name}");
        }
    }
    assert_eq!(names_in(dir.path()), [""; 0]);
}

/// Removing what was written took its time on a slow disk, and the guest stood still meanwhile.
#[test]
fn a_failed_save_removes_its_file_when_the_guest_has_been_resumed() {
    for via in [Via::Direct, Via::Qemu] {
        let (qemu, _) = booted();
        let dir = images();
        let cancel = Cancel::new().unwrap();
        let partial = Mutex::new(Vec::new());
        let hook = Twice {
            first: Hook::at("ram", || cancel.cancel()),
            second: Hook::at("settle", || *partial.lock().unwrap() = names_in(dir.path())),
        };
        let settings = SaveSettings {
            via,
            ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), dir.path().join("vm.img"))
        };
        assert_eq!(told(vmstate::save(&settings, &cancel, &hook)).0, Kind::Interrupted, "{via:?}");
        drop(hook);
        let partial = partial.into_inner().unwrap();
        assert!(matches!(&partial[..], [name] if name.ends_with(".partial")), "{via:?}: {partial:?}");
        assert_eq!(names_in(dir.path()), [""; 0], "{via:?}");
        assert_status(&qemu, "running");
    }
}

/// So is that of a save which fails at the very last step: it was removed first, and the guest waited for that.
#[test]
fn a_save_whose_name_was_taken_removes_its_file_when_the_guest_has_been_resumed() {
    for via in [Via::Direct, Via::Qemu] {
        let (qemu, _) = booted();
        let dir = images();
        let image = dir.path().join("vm.img");
        let partial = Mutex::new(Vec::new());
        let hook = Twice {
            first: Hook::at("name", || std::fs::write(&image, "precious").unwrap()),
            second: Hook::at("settle", || *partial.lock().unwrap() = names_in(dir.path())),
        };
        let settings = SaveSettings { via, ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), &image) };
        let (kind, chain, _) = told(vmstate::save(&settings, &Cancel::new().unwrap(), &hook));
        assert_eq!((kind, chain), (Kind::Misuse, format!("`{}` exists", image.display())), "{via:?}");
        drop(hook);
        let partial = partial.into_inner().unwrap();
        assert!(matches!(&partial[..], [name, _] if name.ends_with(".partial")), "{via:?}: {partial:?}");
        assert_eq!(names_in(dir.path()), ["vm.img"], "{via:?}");
        assert_eq!(std::fs::read(&image).unwrap(), b"precious", "{via:?}");
        assert_status(&qemu, "running");
    }
}

/// Two things that happen to one save.
struct Twice<'a> {
    first: Hook<'a>,
    second: Hook<'a>,
}

impl vmstate::Observer for Twice<'_> {
    fn phase(&self, name: &'static str) {
        self.first.phase(name);
        self.second.phase(name);
    }
}

/// An interrupt behind the rename ended with the exit code of a save that was interrupted, and perhaps without the
/// end of QEMU, although the image stood.
#[test]
fn an_interrupt_comes_too_late_when_the_image_has_its_name() {
    for then in [Then::Pause, Then::Resume, Then::Quit] {
        let (mut qemu, _) = booted();
        let dir = images();
        let cancel = Cancel::new().unwrap();
        let hook = Hook::at("settle", || cancel.cancel());
        let settings = SaveSettings {
            then,
            ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), dir.path().join("vm.img"))
        };
        vmstate::save(&settings, &cancel, &hook)
            .unwrap_or_else(|error| panic!("{then:?}: {}", error.chain()));
        assert_eq!(names_in(dir.path()), ["vm.img"]);
        match then {
            Then::Pause => assert_status(&qemu, "paused"),
            Then::Resume => assert_status(&qemu, "running"),
            Then::Quit => assert!(qemu.wait(vmstate_rig::DEADLINE).unwrap().success()),
        }
    }
}
