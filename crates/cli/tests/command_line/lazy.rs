//! A guest whose memory was on its way when vmstate was killed, and `vmstate restore --resume`.

use std::process::Stdio;

use lab::{Guest, GuestSettings, Incoming, MachineKind, Qemu, QemuSpec};

use crate::{DEADLINE, Said, images, run, vmstate};

/// A guest that takes a while to be given its memory, with a monitor for us and one for vmstate.
pub fn spec() -> QemuSpec {
    let settings = GuestSettings { pages_low_max: 40_000, fill_rounds: 1, ..GuestSettings::default() };
    QemuSpec {
        guest: Some(Guest::new(settings)),
        second_qmp: true,
        ..QemuSpec::new(MachineKind::Q35, 256 << 20)
    }
}

/// Saves the guest while it runs, and says which round it had finished.
pub fn save(source: &mut Qemu, image: &std::path::Path) -> u32 {
    source.wait_for_round(2, DEADLINE).unwrap();
    let said = run(&format!("save --qmp {} {}", source.qmp_path().display(), image.display()));
    assert_eq!(said.code, Some(0), "{said:?}");
    source.serial.latest_round().unwrap()
}

#[test]
fn a_guest_whose_lazy_restore_was_killed_is_given_the_rest_and_is_whole() {
    let dir = images();
    let (image, other) = (dir.path().join("vm.img"), dir.path().join("other.img"));
    let mut source = spec().start().unwrap();
    let round = save(&mut source, &image);
    save(&mut source, &other);
    drop(source);
    // Killed as soon as the guest runs, and when it has been all over its memory or over half of it.
    for at_once in [true, false] {
        let mut target = QemuSpec { incoming: Incoming::Defer, ..spec() }.start().unwrap();
        let (qmp, second) = (target.qmp_path(), target.second_qmp_path());
        let mut watcher = crate::other(&target);
        // The background takes hours at this rate; what the guest asks for comes at once.
        let mut child = vmstate()
            .args(["restore", "--mode", "lazy", "--max-bandwidth", "64K", "--qmp"])
            .args([&qmp, &image])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while watcher.next_event(None).unwrap().is_none_or(|event| event.name != "RESUME") {}
        drop(watcher);
        if !at_once {
            target.wait_for_round(round + 1, DEADLINE).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let wrong = run(&format!("restore --resume {} --qmp {}", other.display(), second.display()));
        let stderr = format!(
            "error: the guest's memory does not come from {}\nhint: give the image that its restore began with\n",
            other.display()
        );
        assert_eq!(wrong, Said { code: Some(2), stdout: String::new(), stderr });
        let resume = format!("restore --json --resume {} --qmp {}", image.display(), qmp.display());
        let said = run(&resume);
        assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{said:?}");
        let report: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
        assert_eq!(report["run_state"], "running", "{report}");
        let bytes = |key: &str| report[key].as_u64().unwrap();
        assert!(bytes("arrived_bytes") > 0 && bytes("read_bytes") > 0, "{report}");
        // The guest verifies every page in each round, and halts at the first that is not right.
        target.wait_for_round(round + 3, DEADLINE).unwrap();
        let left_on = crate::other(&target).capabilities().unwrap();
        assert!(left_on.iter().all(|c| !c.state || c.name == "events"), "{left_on:?}");
        let again = run(&resume);
        assert_eq!(again.code, Some(2));
        let text = "this guest waits for no memory (migration status `completed`)";
        assert!(again.stdout.contains(text), "{again:?}");
    }
}
