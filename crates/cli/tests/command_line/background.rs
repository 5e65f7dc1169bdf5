//! `vmstate restore --background`: the caller has its answer, and a process of its own gives the guest its memory.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Instant;

use lab::{Incoming, QemuSpec, Serial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getsid, kill_process, pidfd_open};
use vmstate::Cancel;
use vmstate::net::QmpAddress;
use vmstate::qmp::Client;

use crate::lazy::{self, spec};
use crate::{DEADLINE, Said, images, run, small, vmstate};

/// Saves a guest that has filled its memory, and says which round it had finished.
fn save(image: &Path) -> u32 {
    lazy::save(&mut spec().start().unwrap(), image)
}

fn pid_of(report: &serde_json::Value, key: &str) -> Pid {
    Pid::from_raw(i32::try_from(report[key].as_u64().unwrap()).unwrap()).unwrap()
}

/// A process that can be waited for although it is no child; `None` where it has ended.
fn held(pid: Pid) -> Option<OwnedFd> {
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

fn wait_for_the_end(process: &OwnedFd) {
    let limit = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit)).unwrap(), 1, "it goes on");
}

#[test]
fn the_caller_is_let_go_while_pages_come_and_a_killed_server_can_be_taken_up_again() {
    let dir = images();
    let image = dir.path().join("vm.img");
    let round = save(&image);
    let mut target = QemuSpec { incoming: Incoming::Defer, ..spec() }.start().unwrap();
    let (qmp, log) = (target.qmp_path(), dir.path().join("server.log"));
    // At this rate it takes hours. That this returns says that nobody holds the pipes that our own is read by.
    let said = run(&format!(
        "restore --mode lazy --background={} --json --max-bandwidth 64K --qmp {} {}",
        log.display(),
        qmp.display(),
        image.display()
    ));
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{said:?}");
    let report: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!((report["mode"].as_str(), report["run_state"].as_str()), (Some("lazy"), Some("running")));
    assert!(report["resident_ms"].is_null() && report["faults"].is_null(), "{report}");
    let server = pid_of(&report, "server_pid");
    let process = held(server).unwrap();
    assert_eq!(getsid(Some(server)).unwrap(), server, "a session of its own");
    let streams = [0, 1, 2]
        .map(|number| std::fs::read_link(format!("/proc/{}/fd/{number}", server.as_raw_nonzero())).unwrap());
    assert_eq!(streams, [PathBuf::from("/dev/null"), log.clone(), log.clone()]);
    target.wait_for_round(round + 1, DEADLINE).unwrap();
    assert_eq!(crate::other(&target).migration().unwrap().status, "postcopy-active");

    kill_process(server, Signal::KILL).unwrap();
    wait_for_the_end(&process);
    let said = run(&format!("restore --json --resume {} --qmp {}", image.display(), qmp.display()));
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{said:?}");
    // The guest verifies every page in each round, and halts at the first that is not right.
    target.wait_for_round(round + 3, DEADLINE).unwrap();
}

#[test]
fn the_server_ends_when_the_memory_is_there_and_the_guest_goes_on() {
    let dir = images();
    let (image, home) = (dir.path().join("vm.img"), tempfile::tempdir().unwrap());
    let round = save(&image);
    let (spec, qmp) = (spec(), home.path().join("qmp.sock"));
    let said: Said = vmstate()
        .args(["restore", "--mode", "lazy", "--background", "--json", "--max-bandwidth", "100M"])
        .arg(&image)
        .arg("--")
        .arg(&spec.program)
        .args(spec.machine_args(home.path()).unwrap())
        .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
        .output()
        .unwrap()
        .into();
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{said:?}");
    let report: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert!(report["resident_ms"].is_null(), "{report}");
    // It may have ended by now.
    if let Some(server) = held(pid_of(&report, "server_pid")) {
        wait_for_the_end(&server);
    }
    let mut client = Client::connect(&QmpAddress::Unix(qmp), &Cancel::new().unwrap()).unwrap();
    client.timeout = Some(DEADLINE);
    assert_eq!(client.migration().unwrap().status, "completed");
    let left_on = client.capabilities().unwrap();
    assert!(left_on.iter().all(|c| !c.state || c.name == "events"), "{left_on:?}");
    let qemu = held(pid_of(&report, "qemu_pid")).unwrap();
    let serial = QemuSpec::serial_path(home.path());
    let mut serial = Serial::open(&serial, &serial).unwrap();
    serial.wait_for_round(round + 2, None, DEADLINE).unwrap();
    client.execute("quit", serde_json::json!({})).unwrap();
    wait_for_the_end(&qemu);
}

#[test]
fn what_fails_before_the_guest_runs_is_told_as_without_a_server() {
    let dir = images();
    let image = dir.path().join("vm.img");
    let source = crate::booted();
    let said = run(&format!("save --qmp {} {}", source.qmp_path().display(), image.display()));
    assert_eq!(said.code, Some(0), "{said:?}");
    drop(source);
    let home = tempfile::tempdir().unwrap();
    let larger = QemuSpec { ram_bytes: 128 << 20, ..small() };
    let answer = |words: &[&str], image: &Path| -> Said {
        vmstate()
            .args(["restore", "--mode", "lazy"])
            .args(words)
            .arg(image)
            .arg("--")
            .arg(&larger.program)
            .args(larger.machine_args(home.path()).unwrap())
            .output()
            .unwrap()
            .into()
    };
    for (image, code, words) in [
        (image, 2, "error: target has 0x8000000 bytes for `pc.ram`, image has 0x4000000"),
        (dir.path().join("none.img"), 2, "No such file or directory"),
    ] {
        for json in [&["--json"][..], &[]] {
            let plain = answer(json, &image);
            let words_found = plain.stderr.contains(words) && plain.code == Some(code);
            assert!(words_found, "{plain:?}");
            assert_eq!(answer(&[json, &["--background"]].concat(), &image), plain);
        }
    }
    let log = answer(&["--background=/no/such/log"], &dir.path().join("none.img"));
    assert!(log.stderr.starts_with("error: cannot open /no/such/log"), "{log:?}");
}

/// A restore in the background whose QEMU greets and then says nothing more, for which there is no limit of time; and
/// that process.
fn silent(dir: &Path) -> (Child, OwnedFd) {
    let (image, program, fifo) = (dir.join("vm.img"), dir.join("silent"), dir.join("started"));
    if !image.exists() {
        let source = crate::booted();
        let said = run(&format!("save --qmp {} {}", source.qmp_path().display(), image.display()));
        assert_eq!(said.code, Some(0), "{said:?}");
        let greet = r#"[[ "$*" =~ vmstate-qmp,fd=([0-9]+) ]] && echo '{"QMP": {"version": {}}}' >&${BASH_REMATCH[1]}"#;
        let script = format!("#!/bin/bash\n{greet}\necho $$ > {}\nexec sleep 1000\n", fifo.display());
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    }
    let child = vmstate()
        .args(["restore", "--mode", "lazy", "--background"])
        .arg(&image)
        .arg("--")
        .arg(&program)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid: i32 = std::fs::read_to_string(&fifo).unwrap().trim().parse().unwrap();
    (child, held(Pid::from_raw(pid).unwrap()).unwrap())
}

#[test]
fn a_signal_before_the_guest_runs_ends_the_restore_and_so_does_the_end_of_the_caller() {
    let dir = images();
    let (child, qemu) = silent(dir.path());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let said: Said = child.wait_with_output().unwrap().into();
    let expected = Said { code: Some(130), stdout: String::new(), stderr: "error: interrupted\n".to_owned() };
    assert_eq!(said, expected);
    wait_for_the_end(&qemu);

    let (mut child, qemu) = silent(dir.path());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for_the_end(&qemu);
}

/// A restore in the background in a terminal of 60 columns, its stdout in a file; and its process.
fn in_a_terminal(words: &str, stdout: &Path) -> (Child, Pid) {
    let pid_file = stdout.with_extension("pid");
    let line = format!(
        "stty cols 60; echo $$ > {0}.new; mv {0}.new {0}; exec {1} restore --background{words} > {2}",
        pid_file.display(),
        env!("CARGO_BIN_EXE_vmstate"),
        stdout.display()
    );
    let child = std::process::Command::new("script")
        .args(["-qefc", &line, "/dev/null"])
        .env("TERM", "vt100")
        .env("SHELL", "/bin/sh")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script, which every Debian has");
    let end = Instant::now() + DEADLINE;
    let pid = loop {
        if let Ok(text) = std::fs::read_to_string(&pid_file) {
            break text.trim().parse().unwrap();
        }
        assert!(Instant::now() < end, "it has not started");
        std::thread::yield_now();
    };
    (child, Pid::from_raw(pid).unwrap())
}

/// Reads on until `words` stand there.
fn read_until(words: &str, from: &mut (impl Read + AsFd), text: &mut String) {
    // A bar goes on for ever, so the time counts and not whether something comes.
    let end = Instant::now() + DEADLINE;
    while !text.contains(words) {
        let left = end.saturating_duration_since(Instant::now());
        let limit = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let come = poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&limit)).unwrap();
        assert!(come == 1 && !left.is_zero(), "it does not say `{words}`: {text:?}");
        let mut bytes = [0; 4096];
        let len = from.read(&mut bytes).unwrap();
        assert_ne!(len, 0, "it ended without `{words}`: {text:?}");
        text.push_str(&String::from_utf8_lossy(&bytes[..len]));
    }
}

#[test]
fn the_caller_has_the_bar_and_the_answer_to_a_signal_until_it_is_let_go() {
    let dir = images();
    let image = dir.path().join("vm.img");
    let round = save(&image);
    let waiting = || QemuSpec { incoming: Incoming::Defer, ..spec() }.start().unwrap();
    let target = waiting();
    // At this rate it takes hours.
    let words = |mode: &str, target: &lab::Qemu| {
        let (qmp, image) = (target.qmp_path(), image.display());
        format!(" --mode {mode} --via socket --json --max-bandwidth 64K --qmp {} {image}", qmp.display())
    };
    let (mut child, pid) = in_a_terminal(&words("eager", &target), &dir.path().join("eager"));
    let (mut terminal, mut text) = (child.stdout.take().unwrap(), String::new());
    read_until("\r\x1b[Kload", &mut terminal, &mut text);
    kill_process(pid, Signal::USR1).unwrap();
    read_until(" so far\r\n", &mut terminal, &mut text);
    kill_process(pid, Signal::INT).unwrap();
    terminal.read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{text:?}");
    let mut lines = text.split("\r\n").map(|line| line.rsplit("\r\x1b[K").next().unwrap());
    assert!(lines.next().unwrap().starts_with("load: "), "{text:?}");
    assert_eq!(lines.collect::<Vec<_>>(), ["error: interrupted", ""], "no bar is left: {text:?}");
    let bars = text.split("\r\x1b[K").filter(|part| !part.contains('\n'));
    assert!(bars.map(|bar| bar.chars().count()).max().unwrap() < 60, "{text:?}");

    let (mut target, log) = (waiting(), dir.path().join("log"));
    let words = format!("={}{}", log.display(), words("lazy", &target).replace("--via socket ", ""));
    let (child, _) = in_a_terminal(&words, &dir.path().join("lazy"));
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text:?}");
    assert!(text.is_empty() || text.ends_with("\x1b[K"), "a bar is left: {text:?}");
    let report = std::fs::read_to_string(dir.path().join("lazy")).unwrap();
    let server = pid_of(&serde_json::from_str(&report).unwrap(), "server_pid");
    let process = held(server).unwrap();
    target.wait_for_round(round + 1, DEADLINE).unwrap();
    kill_process(server, Signal::USR1).unwrap();
    let end = Instant::now() + DEADLINE;
    let said = loop {
        match std::fs::read_to_string(&log) {
            Ok(said) if said.ends_with(" so far\n") => break said,
            said => assert!(Instant::now() < end, "no answer: {said:?}"),
        }
        std::thread::yield_now();
    };
    assert!(said.lines().count() == 1 && !said.contains('\x1b'), "the bar was the caller's: {said:?}");
    kill_process(server, Signal::KILL).unwrap();
    wait_for_the_end(&process);
}
