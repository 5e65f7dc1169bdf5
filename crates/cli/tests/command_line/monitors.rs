//! Addresses that are no monitor of QEMU's, or one that somebody else holds.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use lab::QemuSpec;

use crate::{Said, images, names_in, other, run, small};

fn save(qmp: &Path, dir: &Path) -> Said {
    run(&format!("save --qmp {} {}", qmp.display(), dir.join("vm.img").display()))
}

#[track_caller]
fn assert_refused(said: &Said, dir: &Path, error: &str, hint: &str) {
    let stderr = format!("error: {error}\nhint: {hint}\n");
    assert_eq!(said, &Said { code: Some(2), stdout: String::new(), stderr });
    assert_eq!(names_in(dir), [""; 0]);
}

#[test]
fn a_monitor_that_another_client_holds_is_told() {
    let qemu = small().start().unwrap();
    let dir = images();
    let holder = UnixStream::connect(qemu.qmp_path()).unwrap();
    let said = save(&qemu.qmp_path(), dir.path());
    assert_refused(
        &said,
        dir.path(),
        &format!("the QMP monitor at {} sent no greeting within 5s", qemu.qmp_path().display()),
        "another client holds this socket: close it, or give QEMU a second -qmp socket for vmstate",
    );
    assert!(other(&qemu).status().unwrap().running);
    drop(holder);
    assert_eq!(save(&qemu.qmp_path(), dir.path()).code, Some(0));
}

#[test]
fn an_address_where_no_monitor_is_gets_told() {
    let dir = images();
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let cannot =
        |name: &str, why: &str| format!("cannot connect to the QMP monitor at {}: {why}", at(name).display());

    assert_refused(
        &save(&at("missing"), dir.path()),
        dir.path(),
        &cannot("missing", "No such file or directory (os error 2)"),
        "start QEMU with -qmp unix:PATH,server=on,wait=off",
    );
    // What a QEMU that was killed leaves.
    drop(UnixListener::bind(at("stale")).unwrap());
    assert_refused(
        &save(&at("stale"), dir.path()),
        dir.path(),
        &cannot("stale", "Connection refused (os error 111)"),
        "no QEMU listens there; is the guest still running?",
    );
    std::fs::write(at("file"), "").unwrap();
    assert_refused(
        &save(&at("file"), dir.path()),
        dir.path(),
        &cannot("file", "Connection refused (os error 111)"),
        "no QEMU listens there; is the guest still running?",
    );
}

#[test]
fn whoever_does_not_speak_qmp_is_told_so() {
    let dir = images();
    let home = tempfile::tempdir().unwrap();
    let hint = "give the path of QEMU's own QMP socket: -qmp unix:PATH,server=on,wait=off";
    for (name, words, error) in [
        ("garbage", &b"\x00\xff\x13garbage\n"[..], "what listens at PATH does not speak QMP"),
        ("json", b"{\"hello\": 1}\n", "what listens at PATH is no QMP monitor"),
        ("list", b"[]\n", "what listens at PATH is no QMP monitor"),
    ] {
        let path = home.path().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        let said = std::thread::scope(|scope| {
            let save = scope.spawn(|| save(&path, dir.path()));
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(words).unwrap();
            save.join().unwrap()
        });
        let stderr = said.stderr.split(": expected").next().unwrap().replace(path.to_str().unwrap(), "PATH");
        assert_eq!(said.code, Some(2), "{name}");
        assert!(stderr.starts_with(&format!("error: {error}")), "{name}: {stderr}");
        assert!(said.stderr.ends_with(&format!("\nhint: {hint}\n")), "{name}: {}", said.stderr);
    }

    // Something that closes at once, as a QEMU does that is about to end.
    let path = home.path().join("closes");
    let listener = UnixListener::bind(&path).unwrap();
    let said = std::thread::scope(|scope| {
        let save = scope.spawn(|| save(&path, dir.path()));
        drop(listener.accept().unwrap());
        save.join().unwrap()
    });
    assert_refused(
        &said,
        dir.path(),
        &format!("QEMU closed the QMP connection at {}", path.display()),
        "look at QEMU's own messages: it has probably exited",
    );
}

#[test]
fn the_monitor_for_people_is_told_from_the_one_for_programs() {
    let dir = images();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("hmp");
    let monitor = format!("unix:{},server=on,wait=off", path.display());
    let spec = QemuSpec { extra: vec!["-monitor".into(), monitor.into()], ..small() };
    let _qemu = spec.start().unwrap();
    let said = save(&path, dir.path());
    assert_eq!(said.code, Some(2));
    let error = format!("error: what listens at {} does not speak QMP", path.display());
    assert!(said.stderr.starts_with(&error), "{}", said.stderr);
    let hint = "hint: give the path of QEMU's own QMP socket: -qmp unix:PATH,server=on,wait=off\n";
    assert!(said.stderr.ends_with(hint), "{}", said.stderr);
    assert_eq!(names_in(dir.path()), [""; 0]);
}
