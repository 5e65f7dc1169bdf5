//! A save that nothing can clean up after, and `vmstate resume`.

use rustix::process::Signal;

use crate::held::Held;
use crate::{Said, booted, images, names_in, other, paused_footprint, run, vmstate};

#[test]
fn a_guest_whose_save_was_killed_in_any_phase_is_resumed_in_so_many_words() {
    let qemu = booted();
    let before = paused_footprint(&qemu);
    let dir = images();
    let image = dir.path().join("vm.img");
    let resume = format!("resume --qmp {}", qemu.qmp_path().display());
    for (via, phase, done) in [
        // The settings of the probe are back by then.
        ("direct", "stop", "a descriptor taken back"),
        ("direct", "ram", "the guest resumed"),
        (
            "qemu",
            "ram",
            "settings put back (events, multifd, mapped-ram, direct-io, max-bandwidth, multifd-channels), the guest resumed",
        ),
        (
            "qemu",
            "publish",
            "settings put back (events, multifd, mapped-ram, direct-io, max-bandwidth, multifd-channels), the guest resumed",
        ),
    ] {
        let name = format!("{via}, {phase}");
        let mut command = vmstate();
        command
            .args(["save", "-v", "--channels", "3", "--via", via, "--qmp"])
            .arg(qemu.qmp_path())
            .arg(&image);
        let mut save = Held::start(command);
        save.hold_at(&format!("· {phase}"));
        let pid = save.pid();
        let status = save.kill();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(Signal::KILL.as_raw()),
            "{name}"
        );
        assert!(!image.exists(), "{name}");
        let stdout = format!("process {pid} was killed while it saved: {done}; the guest is running\n");
        assert_eq!(run(&resume), Said { code: Some(0), stdout, stderr: String::new() }, "{name}");
        assert!(other(&qemu).status().unwrap().running, "{name}");
        assert_eq!(before.changes(&paused_footprint(&qemu)), [""; 0], "{name}");
    }
    let stdout = "nothing to do: no killed save has left anything; the guest is running\n".to_owned();
    assert_eq!(run(&resume), Said { code: Some(0), stdout, stderr: String::new() });
    let said = run(&format!("{resume} --json"));
    assert_eq!(said.code, Some(0), "{said:?}");
    for line in [
        "\"had_leftovers\": false",
        "\"resumed\": false",
        "\"run_state\": \"running\"",
        "\"saver_pid\": null",
    ] {
        assert!(said.stdout.contains(line), "{line}: {said:?}");
    }
    let strays = names_in(dir.path());
    let [stray] = &strays[..] else { panic!("{strays:?}") };
    let said = run(&format!("save --qmp {} {}", qemu.qmp_path().display(), image.display()));
    let warning =
        format!("warning: removed {}, which a killed save had left\n", dir.path().join(stray).display());
    assert_eq!((said.code, said.stderr), (Some(0), warning));
}

#[test]
fn a_save_that_is_under_way_is_not_resumed() {
    let qemu = booted();
    let dir = images();
    let image = dir.path().join("vm.img");
    let mut command = vmstate();
    command.args(["save", "-v", "--qmp"]).arg(qemu.qmp_path()).arg(&image);
    let mut save = Held::start(command);
    save.hold_at("· ram");
    let stderr = format!(
        "error: process {} is saving this guest\n\
         hint: wait until it is done, or end it with SIGINT, which brings the guest back\n",
        save.pid()
    );
    let said = run(&format!("resume --qmp {}", qemu.second_qmp_path().display()));
    assert_eq!(said, Said { code: Some(2), stdout: String::new(), stderr });
    let (status, stderr) = save.finish();
    assert!(status.success(), "{stderr}");
    assert_eq!(names_in(dir.path()), ["vm.img"]);
}
