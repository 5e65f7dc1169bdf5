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
