//! A guest whose memory was on its way when vmstate was killed or the image became unreadable, and `--resume`.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Child, Stdio};

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
pub fn save(source: &mut Qemu, image: &Path) -> u32 {
    source.wait_for_round(2, DEADLINE).unwrap();
    let said = run(&format!("save --qmp {} {}", source.qmp_path().display(), image.display()));
    assert_eq!(said.code, Some(0), "{said:?}");
    source.serial.latest_round().unwrap()
}

/// Begins a lazy restore, and returns when the guest runs.
fn restore_slowly(target: &Qemu, image: &Path) -> Child {
    let mut watcher = crate::other(target);
    // The background takes hours at this rate; what the guest asks for comes at once.
    let child = vmstate()
        .args(["restore", "--mode", "lazy", "--max-bandwidth", "64K", "--qmp"])
        .args([&target.qmp_path(), image])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while watcher.next_event(None).unwrap().is_none_or(|event| event.name != "RESUME") {}
    child
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
        let mut child = restore_slowly(&target, &image);
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
        let expected = serde_json::json!(["lazy", "socket", target.pid(), qmp]);
        let known: serde_json::Value =
            ["mode", "via", "qemu_pid", "qmp"].into_iter().map(|key| report[key].clone()).collect();
        assert_eq!(known, expected, "{report}");
        assert!(report["resident_ms"].as_f64().unwrap() > 0.0, "{report}");
        for key in ["first_instruction_ms", "first_instruction_from_ready_ms", "guest_ready_ms"] {
            assert_eq!(report.get(key), Some(&serde_json::Value::Null), "{key}: {report}");
        }
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

#[test]
fn a_guest_whose_image_could_not_be_read_any_more_is_given_the_rest_when_it_can_and_is_whole() {
    let dir = images();
    let (image, whole) = (dir.path().join("vm.img"), dir.path().join("whole.img"));
    let mut source = spec().start().unwrap();
    let round = save(&mut source, &image);
    drop(source);
    fs::copy(&image, &whole).unwrap();
    let mut target = QemuSpec { incoming: Incoming::Defer, ..spec() }.start().unwrap();
    let mut child = restore_slowly(&target, &image);
    // The guest goes on up to the first page that lay behind this.
    File::options().write(true).open(&image).unwrap().set_len(64 << 20).unwrap();
    while child.try_wait().unwrap().is_none() {
        // Of a page that was made up the guest would tell, and halt.
        if let Err(error) = target.serial.latest_round() {
            child.kill().unwrap();
            panic!("{error}");
        }
        std::thread::yield_now();
    }
    let said = Said::from(child.wait_with_output().unwrap());
    // Whether it is the guest's own request or the background that meets the end decides about the words.
    let hint = "\nhint: the guest waits for the rest of its memory: vmstate restore --resume IMAGE --qmp ADDR gives it \
                that\n";
    let is_told = said.stderr.contains(&*image.to_string_lossy()) && said.stderr.ends_with(hint);
    assert!(said.code == Some(2) && is_told, "{said:?}");
    let resume = format!("restore --json --resume {} --qmp {}", image.display(), target.qmp_path().display());
    let early = run(&resume);
    assert_eq!(early.code, Some(2), "{early:?}");
    assert!(early.stderr.ends_with("go beyond the end of the file at 0x4000000\n"), "{early:?}");

    let mut file = File::options().write(true).open(&image).unwrap();
    io::copy(&mut File::open(&whole).unwrap(), &mut file).unwrap();
    let said = run(&resume);
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{said:?}");
    let report: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    let bytes = |key: &str| report[key].as_u64().unwrap();
    assert_eq!(report["run_state"], "running", "{report}");
    assert!(bytes("arrived_bytes") > 0 && bytes("read_bytes") > 0, "{report}");
    // The guest verifies every page in each round, and halts at the first that is not right.
    target.wait_for_round(round + 3, DEADLINE).unwrap();
}
