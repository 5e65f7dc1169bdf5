//! Guests in odd states, and settings that somebody else has left behind.

use lab::{MachineKind, QemuSpec};
use serde_json::json;
use vmstate::qmp::{Capability, Client};
use vmstate::{Kind, Unobserved, Via};
use vmstate_rig::{DEADLINE, Footprint, StockLoad, client, stock_load, stock_save};

use crate::{
    assert_status, assert_untouched, booted, images, names_in, other, paused_footprint, save_to, says, small,
    told,
};

fn switch(client: &mut Client, name: &str) {
    client.set_capabilities(&[Capability { name: name.to_owned(), state: true }]).unwrap();
}

#[test]
fn a_guest_that_qemu_has_handed_over_is_refused() {
    let qemu = small().start().unwrap();
    let dir = images();
    stock_save(&qemu, &dir.path().join("stock.img"), StockLoad::PLAIN);
    for via in [Via::Auto, Via::Direct, Via::Qemu] {
        assert_eq!(
            told(save_to(&dir.path().join("vm.img"), &qemu, via, &Unobserved)),
            says(
                Kind::Peer,
                "a guest in state `postmigrate` cannot be saved",
                "QEMU has handed this guest over already: resume it with the QMP command cont, then save"
            )
        );
    }
    assert_status(&qemu, "postmigrate");
    assert_eq!(names_in(dir.path()), ["stock.img"]);
    // What the hint says helps.
    other(&qemu).cont().unwrap();
    save_to(&dir.path().join("vm.img"), &qemu, Via::Direct, &Unobserved).unwrap();
}

#[test]
fn a_guest_that_waits_to_be_restored_is_refused() {
    let qemu = QemuSpec { incoming: lab::Incoming::Defer, ..small() }.start().unwrap();
    let dir = images();
    assert_eq!(
        told(save_to(&dir.path().join("vm.img"), &qemu, Via::Auto, &Unobserved)),
        says(
            Kind::Peer,
            "a guest in state `inmigrate` cannot be saved",
            "this QEMU waits for a guest or is loading one: restore into it first"
        )
    );
    assert_eq!(names_in(dir.path()), [""; 0]);
}

#[test]
fn a_guest_that_has_never_run_is_saved_and_boots_after_the_restore() {
    let spec = QemuSpec { paused: true, ..small() };
    let dir = images();
    for via in [Via::Direct, Via::Qemu] {
        let image = dir.path().join(format!("{}.img", via.name()));
        let qemu = spec.start().unwrap();
        let report = save_to(&image, &qemu, via, &Unobserved).unwrap();
        assert_eq!(report.run_state, "prelaunch", "{via:?}");
        drop(qemu);
        let mut target = stock_load(&QemuSpec { paused: false, ..spec.clone() }, &image, StockLoad::BEST);
        assert_eq!(client(&target).status().unwrap().status, "prelaunch", "{via:?}");
        client(&target).cont().unwrap();
        target.wait_for_round(1, DEADLINE).unwrap();
    }
}

#[test]
fn a_migration_under_way_is_refused_and_left_alone() {
    let qemu = small().start().unwrap();
    let dir = images();
    // Nobody reads at the other end, so this migration is under way for as long as it is looked at.
    let socket = dir.path().join("nobody");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut client = other(&qemu);
    client.set_parameters(json!({ "max-bandwidth": 4096 }).as_object().unwrap().clone()).unwrap();
    client.migrate(&format!("unix:{}", socket.display())).unwrap();
    drop(client);
    for via in [Via::Direct, Via::Qemu] {
        let (kind, chain, hint) = told(save_to(&dir.path().join("vm.img"), &qemu, via, &Unobserved));
        assert_eq!(kind, Kind::Peer);
        assert!(
            [
                "a migration is under way already (status `setup`)",
                "a migration is under way already (status `active`)"
            ]
            .contains(&chain.as_str()),
            "{chain}"
        );
        assert_eq!(hint, "wait for it to end, or cancel it with migrate_cancel");
    }
    assert_eq!(names_in(dir.path()), ["nobody"]);
    assert!(other(&qemu).migration().unwrap().is_under_way());
    assert_status(&qemu, "running");
}

#[test]
fn settings_that_somebody_left_behind_do_not_matter_and_are_put_back() {
    for via in [Via::Direct, Via::Qemu] {
        let (qemu, _) = booted();
        let dir = images();
        let mut client = other(&qemu);
        let parameters = json!({
            "direct-io": true, "max-bandwidth": 12_345_678, "multifd-channels": 3, "multifd-compression": "zlib",
        });
        client.set_parameters(parameters.as_object().unwrap().clone()).unwrap();
        // In this order: QEMU lets mapped-ram stand beside compression only if that was there before.
        for name in ["mapped-ram", "multifd"] {
            switch(&mut client, name);
        }
        drop(client);
        let before = paused_footprint(&qemu);
        other(&qemu).cont().unwrap();
        assert_eq!(before.parameters["max-bandwidth"], 12_345_678);
        let report = save_to(&dir.path().join("vm.img"), &qemu, via, &Unobserved).unwrap();
        assert_eq!(report.via, via);
        assert_untouched(&qemu, &before);
        drop(qemu);
        let loaded = stock_load(&small(), &dir.path().join("vm.img"), StockLoad::BEST);
        assert_status(&loaded, "running");
    }
}

#[test]
fn the_footprint_sees_what_is_left_behind() {
    let qemu = QemuSpec::new(MachineKind::Q35, 64 << 20).start().unwrap();
    let of = || Footprint::of(&qemu.qmp_path(), qemu.pid());
    let before = of();
    assert_eq!(of(), before);

    let mut client = client(&qemu);
    switch(&mut client, "multifd");
    client.set_parameters(json!({ "max-bandwidth": 1 }).as_object().unwrap().clone()).unwrap();
    client.add_fd(None, "left behind", std::os::fd::AsFd::as_fd(&std::io::stdin())).unwrap();
    drop(client);
    let changes = before.changes(&of());
    for part in
        ["\"multifd\", state: false } became", "max-bandwidth: ", "fdsets: [] became", " descriptors became "]
    {
        assert!(changes.iter().any(|change| change.contains(part)), "{part}: {changes:?}");
    }
    assert_eq!(changes.len(), 4, "{changes:?}");
}

/// The first sector of a disk, whose code puts the machine to sleep (ACPI S3) and idles when it is woken.
fn sleeper(path: &std::path::Path) {
    #[rustfmt::skip]
    let code = [
        0xfa,             // cli
        0xb0, 0x02,       // mov al, 2
        0xe6, 0xb2,       // out 0xb2, al: ACPI is to have its way
        0xba, 0x04, 0x06, // mov dx, 0x604: PM1a control
        0xb8, 0x01, 0x24, // mov ax, 0x2401: sleep now, as S3
        0xef,             // out dx, ax
        0xf4,             // hlt
        0xeb, 0xfd,       // jmp back to it
    ];
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(path, sector).unwrap();
}

/// QEMU refuses this to a guest that does not sleep.
fn wake(qemu: &lab::Qemu) {
    let mut client = other(qemu);
    client.execute("system_wakeup", json!({})).unwrap();
    let deadline = Some(std::time::Instant::now() + DEADLINE);
    while client.next_event(deadline).unwrap().expect("the event").name != "WAKEUP" {}
}

/// A save left a sleeping guest in the state `save-vm`, out of which nobody could wake it: QEMU takes `suspended`
/// for a state in which a guest is live, although it does not run.
#[test]
fn a_guest_that_sleeps_sleeps_on_after_a_save_and_can_be_woken() {
    let dir = images();
    let disk = dir.path().join("disk");
    sleeper(&disk);
    let spec = QemuSpec {
        guest: None,
        second_qmp: true,
        extra: vec!["-drive".into(), format!("if=ide,format=raw,file={}", disk.display()).into()],
        ..QemuSpec::new(MachineKind::Pc, 64 << 20)
    };
    let qemu = spec.start().unwrap();
    let mut client = other(&qemu);
    while client.status().unwrap().status != "suspended" {
        let deadline = Some(std::time::Instant::now() + DEADLINE);
        assert!(client.next_event(deadline).unwrap().is_some(), "it falls asleep");
    }
    drop(client);
    let image = dir.path().join("vm.img");
    // QEMU itself would be aborted by the `cont` behind its own save.
    assert_eq!(
        told(save_to(&image, &qemu, Via::Qemu, &Unobserved)),
        says(
            Kind::Unsupported,
            "QEMU cannot resume a sleeping guest that it has saved itself",
            "wake it first, with the QMP command system_wakeup"
        )
    );
    assert_status(&qemu, "suspended");

    // One that fails, and one that succeeds.
    let cancel = vmstate::Cancel::new().unwrap();
    let hook = vmstate_rig::Hook::at("ram", || {
        assert_status(&qemu, "paused");
        cancel.cancel();
    });
    let settings = vmstate::SaveSettings {
        via: Via::Direct,
        then: vmstate::Then::Resume,
        ..vmstate::SaveSettings::new(vmstate::net::QmpAddress::Unix(qemu.qmp_path()), &image)
    };
    assert_eq!(told(vmstate::save(&settings, &cancel, &hook)).0, Kind::Interrupted);
    drop(hook);
    assert_status(&qemu, "suspended");
    let report = vmstate::save(&settings, &vmstate::Cancel::new().unwrap(), &Unobserved).unwrap();
    assert_eq!(report.run_state, "suspended");
    assert_status(&qemu, "suspended");
    wake(&qemu);
    drop(qemu);

    let target = stock_load(&spec, &image, StockLoad::BEST);
    other(&target).cont().unwrap();
    assert_status(&target, "suspended");
    wake(&target);
}
