//! What comes between commands that are sent ahead of the answers to those before them.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::json;
use vmstate::net::QmpAddress;
use vmstate::qmp::Client;
use vmstate::{Cancel, Error, Kind, SaveReport, SaveSettings, Then, Unobserved, Via};
use vmstate_rig::{DEADLINE, Proxy};

use crate::{assert_status, assert_untouched, booted, images, names_in, other};

/// Saves through a proxy that does `act` when it hears a command: told its name, how many of that name came before it, and
/// what waits until all before it are answered.
fn save_hearing(
    qmp: &Path,
    image: &Path,
    cancel: &Cancel,
    mut act: impl FnMut(&str, usize, &dyn Fn()) + Send + 'static,
) -> Result<SaveReport, Error> {
    let home = tempfile::tempdir().unwrap();
    let mut heard = Vec::<String>::new();
    let proxy = Proxy::hearing(home.path(), qmp, move |name, all_answered| {
        let before = heard.iter().filter(|known| *known == name).count();
        heard.push(name.to_owned());
        act(name, before, all_answered);
    });
    let settings = SaveSettings {
        via: Via::Direct,
        then: Then::Resume,
        overwrite: true,
        ..SaveSettings::new(QmpAddress::Unix(proxy.path.clone()), image)
    };
    let result = vmstate::save(&settings, cancel, &Unobserved);
    proxy.finish();
    result
}

fn client(path: &Path) -> Client {
    let mut client = Client::connect(&QmpAddress::Unix(path.to_owned()), &Cancel::new().unwrap()).unwrap();
    client.timeout = Some(DEADLINE);
    client
}

/// Claims were left behind by a save that was interrupted before it knew that the claim was its own.
#[test]
fn a_save_that_is_cancelled_between_any_two_commands_leaves_no_trace() {
    let (qemu, before) = booted();
    let objects = |qemu: &lab::Qemu| other(qemu).execute("qom-list", json!({ "path": "/objects" })).unwrap();
    let objects_before = objects(&qemu);
    let dir = images();
    let image = dir.path().join("vm.img");
    let names = Arc::new(Mutex::new(Vec::new()));
    let all = names.clone();
    save_hearing(&qemu.qmp_path(), &image, &Cancel::new().unwrap(), move |name, _, _| {
        all.lock().unwrap().push(name.to_owned());
    })
    .unwrap();
    let names = names.lock().unwrap().clone();
    std::fs::remove_file(&image).unwrap();
    let mut interrupted = 0;
    for (nth, name) in names.iter().enumerate() {
        for wait in [false, true] {
            let name = format!("{name}, command {nth} of {}, after the answers: {wait}", names.len());
            other(&qemu).cont().unwrap();
            let cancel = Cancel::new().unwrap();
            let (token, mut count) = (cancel.clone(), 0);
            let result = save_hearing(&qemu.qmp_path(), &image, &cancel, move |_, _, all_answered| {
                if count == nth {
                    if wait {
                        all_answered();
                    }
                    token.cancel();
                }
                count += 1;
            });
            match result {
                // It was too late.
                Ok(_) => std::fs::remove_file(&image).unwrap(),
                Err(error) => {
                    interrupted += 1;
                    assert_eq!(error.kind(), Kind::Interrupted, "{name}: {}", error.chain());
                }
            }
            assert_eq!(other(&qemu).status().unwrap().status, "running", "{name}");
            assert_eq!(names_in(dir.path()), [""; 0], "{name}");
            assert_eq!(objects(&qemu), objects_before, "{name}");
            assert_untouched(&qemu, &before);
        }
    }
    assert!(interrupted > names.len(), "{interrupted} of {names:?}");
}

/// QEMU had refused to migrate, and was told to cancel all the same when that answer was not waited for.
#[test]
fn a_migration_that_another_client_began_survives_a_save_that_is_cancelled() {
    let (qemu, _) = booted();
    let dir = images();
    let cancel = Cancel::new().unwrap();
    let (token, second) = (cancel.clone(), qemu.second_qmp_path());
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 4096).unwrap();
    let error =
        save_hearing(&qemu.qmp_path(), &dir.path().join("vm.img"), &cancel, move |name, _, answered| {
            if name == "migrate" {
                answered();
                let mut other = client(&second);
                other.getfd("theirs", theirs.as_fd()).unwrap();
                other.migrate("fd:theirs").unwrap();
                token.cancel();
            }
        })
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted, "{}", error.chain());
    let migration = other(&qemu).migration().unwrap();
    assert!(migration.is_under_way() && migration.status != "cancelling", "{migration:?}");
    other(&qemu).migrate_cancel().unwrap();
    drop(ours);
}

/// The guest counted as running, since it had been so when the save began, and was resumed.
#[test]
fn a_guest_that_another_client_pauses_before_it_is_stopped_stays_so_when_the_save_is_cancelled() {
    let (qemu, before) = booted();
    let dir = images();
    let cancel = Cancel::new().unwrap();
    let (token, second) = (cancel.clone(), qemu.second_qmp_path());
    let error =
        save_hearing(&qemu.qmp_path(), &dir.path().join("vm.img"), &cancel, move |name, nth, answered| {
            // The first is asked when the save begins.
            if (name, nth) == ("query-status", 1) {
                answered();
                client(&second).stop().unwrap();
                token.cancel();
            }
        })
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted, "{}", error.chain());
    assert_status(&qemu, "paused");
    assert_untouched(&qemu, &before);
}

/// The order to resume was given twice, the second time against the will of whoever had paused the guest since.
#[test]
fn a_guest_that_is_paused_as_soon_as_it_runs_again_stays_so_when_the_save_is_cancelled() {
    let (qemu, _) = booted();
    let dir = images();
    let cancel = Cancel::new().unwrap();
    let (token, second) = (cancel.clone(), qemu.second_qmp_path());
    let mut is_paused = false;
    let result =
        save_hearing(&qemu.qmp_path(), &dir.path().join("vm.img"), &cancel, move |name, nth, answered| {
            match (name, nth) {
                ("cont", 0) => token.cancel(),
                // Once: whatever the save does next, it was told that it is interrupted.
                (_, _) if token.is_cancelled() && !std::mem::replace(&mut is_paused, true) => {
                    answered();
                    let mut other = client(&second);
                    assert!(other.status().unwrap().running);
                    other.stop().unwrap();
                }
                _ => {}
            }
        });
    assert_eq!(result.unwrap_err().kind(), Kind::Interrupted);
    assert_status(&qemu, "paused");
}

/// The state of the devices is asked for in one breath with the stop, so that whoever resumes the guest between the two is
/// seen, whatever state it was in before.
#[test]
fn a_guest_that_moves_between_its_stop_and_its_device_state_is_not_saved() {
    for is_paused_before in [false, true] {
        let (qemu, before) = booted();
        let dir = images();
        let second = qemu.second_qmp_path();
        let image = dir.path().join("vm.img");
        let result =
            save_hearing(&qemu.qmp_path(), &image, &Cancel::new().unwrap(), move |name, nth, answered| {
                match (name, nth) {
                    ("query-status", 1) if is_paused_before => client(&second).stop().unwrap(),
                    // The first asks whether QEMU has it.
                    ("xen-save-devices-state", 1) => {
                        answered();
                        let mut other = client(&second);
                        other.cont().unwrap();
                        other.stop().unwrap();
                    }
                    _ => {}
                }
            });
        let error = result.unwrap_err();
        let clause = "the guest did not stand still during the save (event RESUME)";
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Peer, clause), "{is_paused_before}");
        assert_status(&qemu, "paused");
        assert_eq!(names_in(dir.path()), [""; 0]);
        assert_untouched(&qemu, &before);
    }
}
