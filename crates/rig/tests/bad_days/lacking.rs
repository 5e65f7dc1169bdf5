//! QEMUs that lack a command, callers that lack a permission, images that are replaced while they are read.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use lab::{Incoming, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::{Cancel, Kind, Record, RestoreSettings, SaveReport, SaveSettings, Target, Unobserved, Via};
use vmstate_rig::{DEADLINE, Hook, Proxy, StockLoad, stock_load};

use crate::{assert_untouched, booted, images, names_in, other, save_to, says, small, told};

fn save_through(proxy: &Proxy, dir: &std::path::Path, via: Via) -> vmstate::Result<SaveReport> {
    let settings =
        SaveSettings { via, ..SaveSettings::new(QmpAddress::Unix(proxy.path.clone()), dir.join("vm.img")) };
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
}

#[test]
fn a_qemu_without_the_device_state_command_carries_the_ram_itself() {
    let (qemu, before) = booted();
    let dir = images();
    let lacking = || Proxy::start(dir.path(), &qemu.qmp_path(), &["xen-save-devices-state"]);
    let home = tempfile::tempdir().unwrap();

    let proxy = lacking();
    let error = save_through(&proxy, home.path(), Via::Direct).unwrap_err();
    proxy.finish();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert_eq!(error.to_string(), "this QEMU has no command xen-save-devices-state");
    assert_untouched(&qemu, &before);
    assert_eq!(names_in(home.path()), [""; 0]);

    // Looking at what is left behind has paused it.
    other(&qemu).cont().unwrap();
    let proxy = lacking();
    let report = save_through(&proxy, home.path(), Via::Auto).unwrap();
    proxy.finish();
    assert_eq!(report.via, Via::Qemu);
    assert_eq!(report.reason.as_deref(), Some("this QEMU has no command xen-save-devices-state"));
    let mut loaded = stock_load(&small(), &home.path().join("vm.img"), StockLoad::BEST);
    loaded.wait_for_round(2, DEADLINE).unwrap();
}

#[test]
fn a_qemu_that_lacks_any_other_command_is_told_and_the_guest_goes_on() {
    let (qemu, before) = booted();
    let dir = images();
    let home = tempfile::tempdir().unwrap();
    for (missing, command) in [
        (&["getfd"] as &[&str], "getfd"),
        // The one asks for what the other, which is shorter, is not there to tell.
        (&["x-query-ramblock", "human-monitor-command"], "human-monitor-command"),
        (&["migrate"], "migrate"),
        (&["stop"], "stop"),
        (&["add-fd"], "add-fd"),
    ] {
        other(&qemu).cont().unwrap();
        let proxy = Proxy::start(dir.path(), &qemu.qmp_path(), missing);
        let error = save_through(&proxy, home.path(), Via::Direct).unwrap_err();
        proxy.finish();
        let text = format!("QEMU refused {command}: The command {command} has not been found");
        assert!(error.chain().contains(&text), "{}", error.chain());
        assert_untouched(&qemu, &before);
        assert_eq!(names_in(home.path()), [""; 0], "{command}");
    }
}

#[test]
fn a_process_of_another_user_is_not_looked_into_and_the_hint_says_so() {
    let (qemu, _) = booted();
    let home = images();
    // Nobody may reach the socket and write the image, and nothing else.
    for (path, mode) in
        [(qemu.dir().to_owned(), 0o755), (qemu.qmp_path(), 0o777), (home.path().to_owned(), 0o777)]
    {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    // This test is its own program for that: it saves, as nobody.
    let image = home.path().join("vm.img");
    let program = std::env::temp_dir().join(format!("vmstate-nobody-{}", std::process::id()));
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args(["--exact", "lacking::as_nobody", "--nocapture"])
        .env("VMSTATE_TEST_NOBODY", format!("{}\n{}", qemu.qmp_path().display(), image.display()))
        .output()
        .unwrap();
    std::fs::remove_file(program).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("kind: Unsupported"), "{said}");
    assert!(said.contains("hint: ") && said.contains("root"), "{said}");
    assert!(said.contains("auto: Qemu"), "{said}");
    assert_eq!(other(&qemu).status().unwrap().status, "postmigrate", "saved by auto, through QEMU");
}

/// The part of the test above that runs as nobody.
#[test]
#[allow(clippy::print_stdout, reason = "another process reads it")]
fn as_nobody() {
    let Ok(paths) = std::env::var("VMSTATE_TEST_NOBODY") else { return };
    let (qmp, image) = paths.split_once('\n').unwrap();
    let save = |via| {
        let settings = SaveSettings { via, ..SaveSettings::new(QmpAddress::Unix(qmp.into()), image) };
        vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
    };
    let error = save(Via::Direct).unwrap_err();
    println!("kind: {:?}\n{}\nhint: {}", error.kind(), error.chain(), error.hint_text().unwrap_or("none"));
    println!("auto: {:?}", save(Via::Auto).unwrap().via);
}

#[test]
fn an_image_that_is_replaced_while_it_is_read_is_still_the_one_that_was_checked() {
    let (qemu, _) = booted();
    let home = images();
    let image = home.path().join("vm.img");
    save_to(&image, &qemu, Via::Direct, &Unobserved).unwrap();
    drop(qemu);
    for backend in [lab::MemoryBackend::Plain, lab::MemoryBackend::Memfd] {
        let mut target = QemuSpec { backend, incoming: Incoming::Defer, ..small() }.start().unwrap();
        let kept = home.path().join("kept.img");
        std::fs::copy(&image, &kept).unwrap();
        let replaced = Hook::at("load", || {
            let other = home.path().join("other.img");
            std::fs::write(&other, b"no image at all").unwrap();
            std::fs::rename(&other, &image).unwrap();
        });
        let settings = RestoreSettings {
            record: Record::Running,
            ..RestoreSettings::new(&image, Target::Waiting(QmpAddress::Unix(target.qmp_path())))
        };
        let report = vmstate::restore(&settings, &Cancel::new().unwrap(), &replaced).unwrap();
        assert!(replaced.is_done());
        assert_eq!(report.run_state, "running");
        target.wait_for_round(3, DEADLINE).unwrap();
        std::fs::rename(&kept, &image).unwrap();
    }
}

/// The guest was stopped first, and only then was it seen that this monitor takes no descriptors.
#[test]
fn a_monitor_that_takes_no_descriptors_is_refused_while_the_guest_runs() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let mut spec = small();
    spec.extra.extend(["-qmp".into(), format!("tcp:127.0.0.1:{port},server=on,wait=off").into()]);
    let qemu = spec.start().unwrap();
    let dir = images();
    let mut client = other(&qemu);
    for via in [Via::Auto, Via::Qemu] {
        let address = QmpAddress::Tcp { host: "127.0.0.1".to_owned(), port };
        let settings = SaveSettings { via, ..SaveSettings::new(address, dir.path().join("vm.img")) };
        let result = vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved);
        let clause = format!("descriptors cannot be passed to the QMP monitor at tcp:127.0.0.1:{port}");
        let hint = "give QEMU a second monitor on a unix socket: -qmp unix:PATH,server=on,wait=off";
        assert_eq!(told(result), says(Kind::Unsupported, &clause, hint), "{via:?}");
        assert!(client.status().unwrap().running, "{via:?}");
        assert!(client.take_events().iter().all(|event| event.name != "STOP"), "{via:?}");
    }
}
