//! Other clients that meddle with the guest while it is saved.

use std::time::Instant;

use serde_json::json;
use vmstate::net::QmpAddress;
use vmstate::qmp::Client;
use vmstate::{Cancel, Kind, SaveSettings, Then, Via};
use vmstate_rig::{DEADLINE, Hook};

use crate::{assert_status, assert_untouched, booted, images, names_in, other, save_to, says, small, told};

const HINT: &str = "another client resumed or reset it; the image was given up, save again";

fn wait_for(client: &mut Client, accept: impl Fn(&vmstate::qmp::Event) -> bool) {
    let deadline = Some(Instant::now() + DEADLINE);
    while !accept(&client.next_event(deadline).unwrap().expect("the event")) {}
}

#[test]
fn a_guest_that_another_client_resumes_in_mid_copy_is_not_saved() {
    for (via, phase) in [
        (Via::Direct, "device state"),
        (Via::Direct, "ram"),
        // Before QEMU's own migration starts; in the middle of it is the next test.
        (Via::Qemu, "ram"),
    ] {
        for left_running in [false, true] {
            let name = format!("{via:?} at {phase}, left running: {left_running}");
            let (qemu, before) = booted();
            let dir = images();
            let hook = Hook::at(phase, || {
                let mut client = other(&qemu);
                client.cont().unwrap();
                if !left_running {
                    client.stop().unwrap();
                }
            });
            let result = save_to(&dir.path().join("vm.img"), &qemu, via, &hook);
            assert!(hook.is_done(), "{name}");
            let clause = "the guest did not stand still during the save (event RESUME)";
            assert_eq!(told(result), says(Kind::Peer, clause, HINT), "{name}");
            assert!(!hook.phases().contains(&"publish"), "{name}: {:?}", hook.phases());
            assert_eq!(names_in(dir.path()), [""; 0], "{name}");
            // Its state is the other client's wish, not what it was before.
            assert_status(&qemu, if left_running { "running" } else { "paused" });
            assert_untouched(&qemu, &before);
        }
    }
}

#[test]
fn a_guest_that_is_resumed_while_qemu_copies_it_is_not_saved() {
    for left_running in [false, true] {
        let (qemu, before) = booted();
        let dir = images();
        std::thread::scope(|scope| {
            let qemu = &qemu;
            let hook = Hook::at("ram", || {
                let mut client = other(qemu);
                // So slow that the copy does not end by itself.
                let slow = json!({ "max-bandwidth": 4096 });
                client.set_parameters(slow.as_object().unwrap().clone()).unwrap();
                scope.spawn(move || {
                    while client.migration().unwrap().status != "active" {
                        wait_for(&mut client, |event| event.name == "MIGRATION");
                    }
                    client.cont().unwrap();
                    if !left_running {
                        client.stop().unwrap();
                    }
                });
            });
            let result = save_to(&dir.path().join("vm.img"), qemu, Via::Qemu, &hook);
            let clause = "the guest did not stand still during the save (event RESUME)";
            assert_eq!(told(result), says(Kind::Peer, clause, HINT));
        });
        assert_eq!(names_in(dir.path()), [""; 0]);
        assert_status(&qemu, if left_running { "running" } else { "paused" });
        assert_untouched(&qemu, &before);
    }
}

#[test]
fn a_guest_that_another_client_resets_in_mid_copy_is_not_saved() {
    for via in [Via::Direct, Via::Qemu] {
        let qemu = small().start().unwrap();
        let dir = images();
        let hook = Hook::at("ram", || {
            let mut client = other(&qemu);
            // The lab starts QEMU with -no-reboot, which makes an end of it.
            client.execute("set-action", json!({ "reboot": "reset" })).unwrap();
            client.execute("system_reset", json!({})).unwrap();
            wait_for(&mut client, |event| event.name == "RESET");
        });
        let result = save_to(&dir.path().join("vm.img"), &qemu, via, &hook);
        let clause = "the guest did not stand still during the save (event RESET)";
        assert_eq!(told(result), says(Kind::Peer, clause, HINT), "{via:?}");
        assert_eq!(names_in(dir.path()), [""; 0], "{via:?}");
        // It ran before, and nobody has stopped it but the save.
        assert_status(&qemu, "running");
    }
}

#[test]
fn an_end_of_qemu_that_another_client_asks_for_ends_the_save() {
    for via in [Via::Direct, Via::Qemu] {
        let mut qemu = small().start().unwrap();
        let dir = images();
        let hook = Hook::at("ram", || {
            // The answer comes before QEMU is gone.
            other(&qemu).quit().unwrap();
        });
        let (kind, ..) = told(save_to(&dir.path().join("vm.img"), &qemu, via, &hook));
        assert!(matches!(kind, Kind::Peer | Kind::Io), "{kind:?}");
        assert_eq!(names_in(dir.path()), [""; 0], "{via:?}");
        drop(hook);
        assert!(qemu.wait(DEADLINE).unwrap().success());
    }
}

/// What is long behind the copy, the sync above all, was not watched: an image of a guest that ran again got its
/// name, and `quit` ended that guest.
#[test]
fn a_guest_that_is_resumed_before_the_image_has_its_name_is_not_saved_and_not_ended() {
    for (via, phase, then) in [
        (Via::Direct, "metadata", Then::Quit),
        (Via::Direct, "publish", Then::Pause),
        (Via::Direct, "name", Then::Quit),
        (Via::Qemu, "name", Then::Quit),
    ] {
        let name = format!("{via:?} {phase} {then:?}");
        let (qemu, before) = booted();
        let dir = images();
        let hook = Hook::at(phase, || other(&qemu).cont().unwrap());
        let settings = SaveSettings {
            via,
            then,
            ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), dir.path().join("vm.img"))
        };
        let result = vmstate::save(&settings, &Cancel::new().unwrap(), &hook);
        let clause = "the guest did not stand still during the save (event RESUME)";
        assert_eq!(told(result), says(Kind::Peer, clause, HINT), "{name}");
        assert_eq!(names_in(dir.path()), [""; 0], "{name}");
        assert_status(&qemu, "running");
        assert_untouched(&qemu, &before);
    }
}

#[test]
fn a_guest_that_is_resumed_when_the_image_has_its_name_is_not_ended() {
    let (qemu, before) = booted();
    let dir = images();
    let hook = Hook::at("settle", || other(&qemu).cont().unwrap());
    let settings = SaveSettings {
        then: Then::Quit,
        ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), dir.path().join("vm.img"))
    };
    let (kind, chain, _) = told(vmstate::save(&settings, &Cancel::new().unwrap(), &hook));
    assert_eq!(kind, Kind::Peer);
    assert_eq!(
        chain,
        "the image is saved, but QEMU was not left as it was: the guest did not stand still during the save (event \
         RESUME)"
    );
    assert_eq!(names_in(dir.path()), ["vm.img"]);
    assert_status(&qemu, "running");
    assert_untouched(&qemu, &before);
}
