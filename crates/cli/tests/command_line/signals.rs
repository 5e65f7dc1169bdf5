//! Signals at every boundary between two phases.

use rustix::process::Signal;

use crate::held::Held;
use crate::{booted, images, names_in, other, paused_footprint, run, small, vmstate};

#[test]
fn a_signal_in_any_phase_of_a_save_leaves_no_trace() {
    let qemu = booted();
    let before = paused_footprint(&qemu);
    let dir = images();
    let image = dir.path().join("vm.img");
    for (via, phases) in [
        ("direct", &["probe", "stop", "device state", "ram", "metadata", "publish"][..]),
        ("qemu", &["stop", "ram", "metadata", "publish"]),
    ] {
        for phase in phases {
            for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
                let name = format!("{via}, {phase}, {signal:?}");
                let mut command = vmstate();
                command.args(["save", "-v", "--via", via, "--qmp"]).arg(qemu.qmp_path()).arg(&image);
                let mut save = Held::start(command);
                save.hold_at(&format!("· {phase}"));
                assert_eq!(names_in(dir.path()).len(), 1, "{name}: the file in the making");
                save.interrupt(signal);
                let (status, stderr) = save.finish();
                assert_eq!(status.code(), Some(130), "{name}: {stderr}");
                assert!(stderr.ends_with("\nerror: interrupted\n"), "{name}: {stderr}");
                assert!(!stderr.contains("warning"), "{name}: {stderr}");
                assert_eq!(names_in(dir.path()), [""; 0], "{name}");
                assert!(other(&qemu).status().unwrap().running, "{name}");
                assert_eq!(before.changes(&paused_footprint(&qemu)), [""; 0], "{name}");
            }
        }
    }
    let said = run(&format!("save --qmp {} {}", qemu.qmp_path().display(), image.display()));
    assert_eq!(said.code, Some(0), "{said:?}");
}

#[test]
fn a_signal_in_any_phase_of_a_restore_ends_the_qemu_that_it_started() {
    let qemu = booted();
    let dir = images();
    let image = dir.path().join("vm.img");
    let said = run(&format!("save --qmp {} {}", qemu.qmp_path().display(), image.display()));
    assert_eq!(said.code, Some(0), "{said:?}");
    drop(qemu);
    for phase in ["check image", "start", "compare", "load", "run"] {
        let home = tempfile::tempdir().unwrap();
        let spec = small();
        let mut command = vmstate();
        command.args(["restore", "-v"]).arg(&image).arg("--").arg(&spec.program);
        command.args(spec.machine_args(home.path()).unwrap());
        let mut restore = Held::start(command);
        restore.hold_at(&format!("· {phase}"));
        restore.interrupt(Signal::INT);
        let (status, stderr) = restore.finish();
        assert_eq!(status.code(), Some(130), "{phase}: {stderr}");
        assert!(stderr.ends_with("\nerror: interrupted\n"), "{phase}: {stderr}");
        let path = home.path().to_str().unwrap();
        let lines = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path().join("cmdline"));
        let left = lines
            .filter(|line| String::from_utf8_lossy(&std::fs::read(line).unwrap_or_default()).contains(path));
        assert_eq!(left.count(), 0, "{phase}");
    }
}

/// The signal that comes with it would end vmstate, and leave the guest paused.
#[test]
fn a_limit_of_the_size_of_files_fails_the_save_and_the_guest_runs_on() {
    let qemu = booted();
    let before = paused_footprint(&qemu);
    let dir = images();
    for via in ["direct", "qemu"] {
        let mut command = std::process::Command::new("sh");
        command.args([
            "-c",
            "ulimit -f 1000; exec \"$@\"",
            "sh",
            env!("CARGO_BIN_EXE_vmstate"),
            "save",
            "--via",
            via,
            "--qmp",
        ]);
        let said: crate::Said =
            command.arg(qemu.qmp_path()).arg(dir.path().join("vm.img")).output().unwrap().into();
        assert_eq!(said.code, Some(2), "{via}: {said:?}");
        assert!(
            said.stderr.contains("File too large (os error 27)\nhint: files may not be so large here"),
            "{said:?}"
        );
        assert_eq!(names_in(dir.path()), [""; 0], "{via}");
        assert!(other(&qemu).status().unwrap().running, "{via}");
        assert_eq!(before.changes(&paused_footprint(&qemu)), [""; 0], "{via}");
    }
}
