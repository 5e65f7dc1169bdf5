//! What the commands answer: JSON keys that scripts rely on, and pages that people read.

use std::fs;
use std::path::Path;

use serde_json::Value;
use vmstate::qmp::{Capability, Client};

use crate::{Said, booted, images, other, run};

pub fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

pub fn json(said: &Said) -> Value {
    serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

/// An image by QEMU itself.
pub fn stock(client: &mut Client, image: &Path) {
    let on = |name: &str| Capability { name: name.to_owned(), state: true };
    client.set_capabilities(&[on("events"), on("mapped-ram")]).unwrap();
    client.migrate(&format!("file:{}", image.display())).unwrap();
    while client.migration().unwrap().is_under_way() {
        client.next_event(None).unwrap();
    }
    assert_eq!(client.migration().unwrap().status, "completed");
}

/// Volatile parts become a word each: runs of digits, and what stands for a moment or a version.
fn masked(text: &str, path: &Path) -> String {
    let text = text.replace(path.to_str().unwrap(), "IMAGE");
    let mut lines = Vec::new();
    for line in text.lines() {
        let line = match line.split_once("  saved       20") {
            Some(_) if line.contains(" UTC by vmstate ") => {
                let (_, rest) = line.split_once(" via ").unwrap();
                format!(
                    "  saved       DATE by vmstate VERSION via {}",
                    rest.split_once(", from QEMU ").unwrap().0
                )
            }
            _ => line.to_owned(),
        };
        let mut out = String::new();
        for word in line.split_inclusive(' ') {
            let (word, blank) = word.strip_suffix(' ').map_or((word, ""), |word| (word, " "));
            let is_number = word.starts_with(|c: char| c.is_ascii_digit())
                && word.chars().all(|c| c.is_ascii_hexdigit() || "x.,".contains(c));
            let tail = if word.ends_with(',') { "," } else { "" };
            out += &if is_number { format!("N{tail}{blank}") } else { format!("{word}{blank}") };
        }
        // Columns are as wide as their numbers.
        lines.push(out.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    lines.join("\n") + "\n"
}

#[test]
fn what_a_verbose_save_tells_of_its_phases_has_how_long_presence_was_waited_for() {
    let qemu = booted();
    let dir = images();
    for (via, expected) in [("direct", vec!["presence"]), ("qemu", vec![])] {
        let image = dir.path().join(via);
        let options = format!("save -v --via {via} --then resume");
        let said = run(&format!("{options} --qmp {} {}", qemu.qmp_path().display(), image.display()));
        assert_eq!(said.code, Some(0), "{said:?}");
        // What is a part of a phase stands below it, further in.
        let lines = said.stderr.lines().skip_while(|line| !line.starts_with("  ram  ")).skip(1);
        let parts = lines.map_while(|line| line.strip_prefix("    "));
        let names: Vec<_> = parts.filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(names, expected, "{said:?}");
    }
}

#[test]
fn answers_have_the_keys_and_exit_codes_that_are_promised() {
    let qemu = booted();
    let dir = images();
    let image = dir.path().join("vm.img");
    let path = image.display();

    let save = run(&format!("save --json --then resume --qmp {} {path}", qemu.qmp_path().display()));
    assert_eq!((save.code, save.stderr.as_str()), (Some(0), ""));
    assert_eq!(
        keys(&json(&save)),
        [
            "channels",
            "data_bytes",
            "direct_io",
            "direct_io_reason",
            "downtime_ms",
            "duration_ms",
            "format",
            "hole_bytes",
            "peak_memory_bytes",
            "phases",
            "rate_bytes_per_s",
            "reason",
            "run_state",
            "via",
            "zero_bytes",
        ]
    );
    assert_eq!(
        keys(&json(&save)["phases"]),
        [
            "connect_ms",
            "device_state_ms",
            "metadata_ms",
            "name_ms",
            "presence_ms",
            "probe_ms",
            "publish_ms",
            "ram_ms",
            "settle_ms",
            "stop_ms",
        ]
    );
    let phase_ms = |name: &str| json(&save)["phases"][name].as_f64().unwrap();
    assert!(phase_ms("presence_ms") > 0.0, "{save:?}");
    assert!(phase_ms("presence_ms") <= phase_ms("ram_ms"), "{save:?}");

    // An error is one object as well, and two lines for people.
    let again = run(&format!("save --json --qmp {} {path}", qemu.qmp_path().display()));
    assert_eq!(again.code, Some(2));
    let hint = "give another name, or --overwrite";
    assert_eq!(again.stderr, format!("error: `{path}` exists\nhint: {hint}\n"));
    let expected = serde_json::json!({ "error": format!("`{path}` exists"), "kind": "misuse", "hint": hint });
    assert_eq!(json(&again), expected);

    let info = run(&format!("info --json {path}"));
    assert_eq!((info.code, info.stderr.as_str()), (Some(0), ""));
    assert_eq!(
        keys(&json(&info)),
        [
            "blocks",
            "capabilities",
            "data_bytes",
            "described",
            "device_bytes",
            "devices",
            "disk_bytes",
            "domain",
            "file_bytes",
            "format",
            "hole_bytes",
            "machine",
            "page_size",
            "ram_bytes",
            "run_state",
            "saved",
            "zero_bytes",
        ]
    );

    let check = run(&format!("check --json {path}"));
    assert_eq!((check.code, check.stderr.as_str()), (Some(0), ""));
    let expected =
        serde_json::json!({ "format": "mapped-ram", "sound": true, "faults": [], "more_faults": 0 });
    assert_eq!(json(&check), expected);

    // The answer is no.
    let broken = dir.path().join("broken.img");
    let bytes = fs::read(&image).unwrap();
    fs::write(&broken, &bytes[..bytes.len() - 1]).unwrap();
    let check = run(&format!("check --json {}", broken.display()));
    assert_eq!((check.code, check.stderr.as_str()), (Some(1), ""));
    assert_eq!(json(&check)["sound"], false);
    assert_eq!(keys(&json(&check)["faults"][0]), ["field", "offset", "problem"]);
    fs::write(&broken, "no image").unwrap();
    assert_eq!(run(&format!("check {}", broken.display())).code, Some(1));
    // `info` cannot do it, nor can either without a file.
    assert_eq!(run(&format!("info {}", broken.display())).code, Some(2));
    assert_eq!(run("check /no/such/image").code, Some(2));
    assert_eq!(run("save --no-such-option").code, Some(2));

    // One QEMU was saved and goes on; another becomes the same guest.
    let home = tempfile::tempdir().unwrap();
    let spec = crate::small();
    let mut restore = crate::vmstate();
    restore.args(["restore", "--json"]).arg(&image).arg("--").arg(&spec.program);
    restore.args(spec.machine_args(home.path()).unwrap());
    let restore: Said = restore.output().unwrap().into();
    assert_eq!(restore.code, Some(0), "{restore:?}");
    let answer = json(&restore);
    let pid = rustix::process::Pid::from_raw(answer["qemu_pid"].as_i64().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(
        keys(&answer),
        [
            "channels",
            "direct_io",
            "faults",
            "first_instruction_from_ready_ms",
            "first_instruction_ms",
            "guest_ready_ms",
            "mode",
            "mode_reason",
            "phases",
            "qemu_pid",
            "qmp",
            "read_bytes",
            "reason",
            "resident_ms",
            "run_state",
            "server_pid",
            "via",
        ]
    );
    assert!(other(&qemu).status().unwrap().running);
}

#[test]
fn damage_that_is_found_before_the_format_is_known_is_a_fault_with_its_place() {
    let dir = images();
    let image = dir.path().join("image");
    let head = |version: u8| [&b"QEVM\0\0\0"[..], &[version]].concat();
    let configuration = |name: &[u8], version: u8| {
        let part =
            [&[5, name.len() as u8][..], name, &[0, 0, 0, version], &[0, 0, 0, 1, 4], b"none"].concat();
        [head(3), vec![7, 0, 0, 0, 4], b"pc-1".to_vec(), part, vec![1; 100]].concat()
    };
    for (bytes, offset, field, problem) in [
        ([head(26), vec![7; 100]].concat(), 4, "stream version", "version 26 is not 3"),
        (
            configuration(b"configuration/capabilities", 9),
            17,
            "configuration subsection `configuration/capabilities`",
            "version 9 is not 1",
        ),
        (
            configuration(b"configuration/future", 1),
            17,
            "configuration subsection `configuration/future`",
            "is unknown and has no length",
        ),
        (head(3)[..6].to_vec(), 4, "stream version", "the input ends 2 bytes too early"),
    ] {
        fs::write(&image, bytes).unwrap();
        let check = run(&format!("check --json {}", image.display()));
        assert_eq!((check.code, check.stderr.as_str()), (Some(1), ""), "{problem}");
        let fault = serde_json::json!({ "field": field, "offset": offset, "problem": problem });
        let expected =
            serde_json::json!({ "format": null, "sound": false, "faults": [fault], "more_faults": 0 });
        assert_eq!(json(&check), expected);
        let check = run(&format!("check {}", image.display()));
        let path = image.display();
        let stdout = format!("{path}: {field} at {offset:#x}: {problem}\n{path}: 1 fault found\n");
        assert_eq!(check, Said { code: Some(1), stdout, stderr: String::new() });
        assert_eq!(run(&format!("info {path}")).code, Some(2));
    }
    // What is no image at all has one line.
    fs::write(&image, "no image").unwrap();
    let check = run(&format!("check {}", image.display()));
    let stdout = format!("{}: magic at 0x0: 0x6e6f2069 is not 0x5145564d (`QEVM`)\n", image.display());
    assert_eq!(check, Said { code: Some(1), stdout, stderr: String::new() });
}

#[test]
fn pages_for_people_read_well() {
    let qemu = booted();
    let dir = images();
    let (ours, qemus) = (dir.path().join("ours.img"), dir.path().join("qemus.img"));
    let said = run(&format!("save --via direct --qmp {} {}", qemu.qmp_path().display(), ours.display()));
    assert_eq!(said.code, Some(0), "{said:?}");
    stock(&mut other(&qemu), &qemus);
    for (name, image) in [("ours", &ours), ("qemus", &qemus)] {
        let info = run(&format!("info {}", image.display()));
        assert_eq!((info.code, info.stderr.as_str()), (Some(0), ""));
        let golden =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/command_line/golden/info-{name}.txt"));
        let page = masked(&info.stdout, image);
        if std::env::var_os("VMSTATE_GOLDEN_WRITE").is_some() {
            fs::write(&golden, &page).unwrap();
        }
        assert_eq!(page, fs::read_to_string(&golden).unwrap(), "{}", info.stdout);
        let check = run(&format!("check {}", image.display()));
        let stdout = format!("{}: mapped-ram, no fault found\n", image.display());
        assert_eq!(check, Said { code: Some(0), stdout, stderr: String::new() });
    }
    fs::OpenOptions::new().write(true).open(&qemus).unwrap().set_len(4096).unwrap();
    let check = run(&format!("check {}", qemus.display()));
    assert_eq!(check.code, Some(1));
    assert!(check.stdout.ends_with("fault found\n") || check.stdout.ends_with("faults found\n"), "{check:?}");
}
