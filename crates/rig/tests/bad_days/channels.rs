//! QEMU's own channels, whose end may be the end of QEMU and of the guest.

use std::sync::{Arc, Mutex};

use lab::{Guest, GuestSettings, MachineKind, MemoryBackend, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::{Cancel, Kind, SaveSettings, Then, Via};
use vmstate_rig::{DEADLINE, Hook, Proxy};

use crate::{assert_status, assert_untouched, booted, images, names_in, other, paused_footprint};

/// How often a save is cancelled while QEMU's channels are busy. Of those that are cancelled without more ado, several are
/// the end of QEMU.
const CANCELS: usize = 24;

fn by_qemu(qmp: std::path::PathBuf, image: &std::path::Path) -> SaveSettings {
    SaveSettings { via: Via::Qemu, then: Then::Resume, ..SaveSettings::new(QmpAddress::Unix(qmp), image) }
}

#[test]
fn a_guest_whose_save_by_qemu_is_cancelled_in_the_middle_survives() {
    let spec = QemuSpec {
        guest: Some(Guest::new(GuestSettings::idle(256))),
        second_qmp: true,
        backend: MemoryBackend::Memfd,
        ..QemuSpec::new(MachineKind::Q35, 256 << 20)
    };
    let mut qemu = spec.start().unwrap();
    qemu.wait_for_round(1, DEADLINE).unwrap();
    let before = paused_footprint(&qemu);
    other(&qemu).cont().unwrap();
    let (dir, home) = (images(), tempfile::tempdir().unwrap());
    let image = dir.path().join("vm.img");
    let mut interrupted = 0;
    for nth in 0..CANCELS {
        let cancel = Cancel::new().unwrap();
        let (token, mut asked) = (cancel.clone(), 0);
        let mut is_migrating = false;
        let proxy = Proxy::hearing(home.path(), &qemu.qmp_path(), move |command, _| {
            is_migrating |= command == "migrate";
            asked += usize::from(is_migrating);
            if asked == 2 + nth % 2 {
                token.cancel();
            }
        });
        let settings = SaveSettings { channels: Some(8), ..by_qemu(proxy.path.clone(), &image) };
        let result = vmstate::save(&settings, &cancel, &vmstate::Unobserved);
        proxy.finish();
        match result {
            // It was too late.
            Ok(_) => std::fs::remove_file(&image).unwrap(),
            Err(error) => {
                interrupted += 1;
                assert_eq!(error.kind(), Kind::Interrupted, "{nth}: {}", error.chain());
            }
        }
        assert_status(&qemu, "running");
        assert_eq!(names_in(dir.path()), [""; 0], "{nth}");
    }
    assert!(interrupted > CANCELS / 2, "{interrupted}");
    assert_untouched(&qemu, &before);
}

/// The same, by what QEMU hears: it is told to go slowly, and looked at, before it is told to stop.
#[test]
fn a_migration_into_a_file_is_held_back_before_it_is_cancelled() {
    let (qemu, before) = booted();
    let (dir, home) = (images(), tempfile::tempdir().unwrap());
    let cancel = Cancel::new().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (all, token) = (heard.clone(), cancel.clone());
    let proxy = Proxy::hearing(home.path(), &qemu.qmp_path(), move |command, _| {
        all.lock().unwrap().push(command.to_owned());
        if command == "migrate" {
            token.cancel();
        }
    });
    let settings = by_qemu(proxy.path.clone(), &dir.path().join("vm.img"));
    vmstate::save(&settings, &cancel, &vmstate::Unobserved).unwrap_err();
    proxy.finish();
    let heard = heard.lock().unwrap();
    let behind = heard.iter().skip_while(|command| *command != "migrate").skip(1);
    let until: Vec<_> = behind.take_while(|command| *command != "migrate_cancel").collect();
    assert!(heard.len() > until.len() + 1, "it was cancelled: {heard:?}");
    let slowed = until.iter().position(|command| *command == "migrate-set-parameters");
    let looked = until.iter().rposition(|command| *command == "query-migrate");
    assert!(slowed.is_some() && slowed < looked, "{until:?}");
    assert_status(&qemu, "running");
    assert_untouched(&qemu, &before);
}

#[test]
fn who_asks_for_several_channels_of_qemu_is_told_what_they_may_cost() {
    let (qemu, _) = booted();
    let dir = images();
    for (channels, expected) in [(None, false), (Some(1), false), (Some(2), true)] {
        let image = dir.path().join(format!("{channels:?}.img"));
        let settings = SaveSettings { channels, ..by_qemu(qemu.qmp_path(), &image) };
        let hook = Hook::at("never", || {});
        let report = vmstate::save(&settings, &Cancel::new().unwrap(), &hook).unwrap();
        assert_eq!(report.channels, channels.unwrap_or(1));
        let warned = hook.warnings().iter().any(|warning| warning.contains("QEMU may crash"));
        assert_eq!(warned, expected, "{channels:?}: {:?}", hook.warnings());
    }
}
