//! What is told of a job while it runs.

use std::process::Command;

use lab::{MemoryBackend, QemuSpec};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::held::Held;
use crate::{booted, images, run, small, vmstate};

/// Runs a command to its end: its answer, and each line of its stderr as an object.
fn events(mut command: Command) -> (Value, Vec<Value>) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let events = stderr.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    (serde_json::from_slice(&output.stdout).unwrap(), events)
}

/// Makes sure that a job went through these phases, in order, told how far it was in each, and did all of it.
fn check(events: &[Value], phases: &[&str], what: &str) {
    let told: Vec<&Value> = events.iter().filter(|event| event["event"] == "progress").collect();
    let mut found: Vec<&str> = told.iter().map(|event| event["phase"].as_str().unwrap()).collect();
    found.dedup();
    assert_eq!(found, phases, "{what}");
    let mut done = 0;
    for event in &told {
        let now = event["done_bytes"].as_u64().unwrap();
        assert!(now >= done, "{what}: {event}");
        assert!(event["total_bytes"].as_u64().is_none_or(|total| now <= total), "{what}: {event}");
        assert!(event["moved_bytes"].as_u64().unwrap() <= now, "{what}: {event}");
        done = now;
    }
    let last = told.last().unwrap();
    assert!(done > 0 && last["total_bytes"] == done, "{what}: {last}");
    assert_eq!(last["left_ms"], 0.0, "{what}: {last}");
}

#[test]
fn every_way_tells_a_program_how_far_it_is() {
    let qemu = booted();
    let dir = images();
    let (image, stream) = (dir.path().join("vm.img"), dir.path().join("vm.stream"));
    for (options, image, phases) in [
        (
            &["--via", "direct"][..],
            &image,
            &["connect", "probe", "stop", "device state", "ram", "metadata", "publish", "name", "settle"][..],
        ),
        (
            &["--via", "qemu", "--overwrite"],
            &image,
            &["connect", "stop", "ram", "metadata", "publish", "name", "settle"],
        ),
        (
            &["--format", "stream"],
            &stream,
            &["connect", "probe", "stop", "device state", "ram", "metadata", "publish", "name", "settle"],
        ),
    ] {
        let mut save = vmstate();
        save.args(["save", "--then", "resume", "--json", "--progress", "json", "--qmp"])
            .arg(qemu.qmp_path())
            .args(options)
            .arg(image);
        check(&events(save).1, phases, &format!("save {options:?}"));
    }
    drop(qemu);
    let phases = ["check image", "start", "compare", "load", "verify", "run", "settle"];
    for (options, backend, image) in [
        (&["--via", "qemu"][..], MemoryBackend::Plain, &image),
        (&["--via", "socket"], MemoryBackend::Plain, &image),
        (&["--via", "direct"], MemoryBackend::Memfd, &image),
        (&["--via", "auto"], MemoryBackend::Plain, &stream),
    ] {
        let home = tempfile::tempdir().unwrap();
        let spec = QemuSpec { backend, ..small() };
        let mut restore = vmstate();
        // What stands behind the two dashes is QEMU's.
        restore.args(["restore", "--json", "--progress", "json"]).args(options).arg(image);
        restore.arg("--").arg(&spec.program).args(spec.machine_args(home.path()).unwrap());
        let (answer, events) = events(restore);
        let pid = Pid::from_raw(answer["qemu_pid"].as_i64().unwrap() as i32).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        check(&events, &phases, &format!("restore {options:?}"));
    }
}

#[test]
fn what_is_said_is_an_object_too_where_a_program_listens() {
    let dir = images();
    let image = dir.path().join("no.img");
    let line = format!("save --progress json --qmp /no/such/monitor {}", image.display());
    let said = run(&line);
    assert_eq!(said.code, Some(2));
    let events: Vec<Value> =
        said.stderr.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let kinds: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["progress", "error", "hint"]);
    let told =
        "cannot connect to the QMP monitor at /no/such/monitor: No such file or directory (os error 2)";
    assert_eq!(events[1]["text"], told);
}

#[test]
fn whoever_asks_by_a_signal_gets_a_line_and_the_job_goes_on() {
    let qemu = booted();
    let dir = images();
    let image = dir.path().join("vm.img");
    for via in ["direct", "qemu"] {
        let mut command = vmstate();
        command.args([
            "save",
            "-v",
            "--then",
            "resume",
            "--overwrite",
            "--progress",
            "none",
            "--via",
            via,
            "--qmp",
        ]);
        command.arg(qemu.qmp_path()).arg(&image);
        let mut save = Held::start(command);
        save.hold_at("· metadata");
        save.ask();
        let (status, stderr) = save.finish();
        assert_eq!(status.code(), Some(0), "{via}: {stderr}");
        let answer = stderr.lines().find(|line| line.ends_with(" so far")).expect(&stderr);
        assert!(answer.contains("(100 %)"), "{via}: {answer}");
    }
    let mut quiet = vmstate();
    quiet.args(["save", "--overwrite", "--qmp"]).arg(qemu.qmp_path()).arg(&image);
    let output = quiet.output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "nobody asked, and there is no terminal");
}
