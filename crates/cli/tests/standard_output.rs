//! `vmstate save -`: the standard output is the image's alone. And `--dry-run`, whose answer is data.

use std::fs::File;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use lab::{Guest, GuestSettings, MachineKind, Qemu, QemuSpec};

fn booted() -> Qemu {
    let guest = Some(Guest::new(GuestSettings::idle(256)));
    let spec = QemuSpec { guest, ..QemuSpec::new(MachineKind::Q35, 64 << 20) };
    let mut qemu = spec.start().unwrap();
    qemu.wait_for_round(1, Duration::from_secs(120)).unwrap();
    qemu
}

fn save(qemu: &Qemu, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmstate"));
    command.env_remove("VMSTATE_QMP").arg("save").arg("--qmp").arg(qemu.qmp_path()).args(args);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_standard_output_has_the_stream_and_stderr_the_report() {
    let qemu = booted();
    let dir = tempfile::tempdir().unwrap();
    for (name, is_pipe) in [("-", true), ("/dev/stdout", true), ("-", false)] {
        let image = dir.path().join("stream");
        let mut command = save(&qemu, &["--json", name]);
        let output: Output = if is_pipe {
            let output = command.output().unwrap();
            std::fs::write(&image, &output.stdout).unwrap();
            output
        } else {
            let file = File::create(&image).unwrap();
            command.stdout(file).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap()
        };
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{name}: {said}");
        let report: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&report["format"], &report["via"]), (&"stream".into(), &"direct".into()), "{name}");
        let check = vmstate::check(&image).unwrap();
        assert_eq!(check.format.map(vmstate::source::Format::name), Some("stream"));
        assert!(check.report.is_clean(), "{name}: {:?}", check.report);
    }
}

#[test]
fn a_failure_leaves_the_standard_output_empty() {
    let qemu = booted();
    let output = save(&qemu, &["--json", "--via", "qemu", "-"]).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(2), ""));
    let said = text(&output.stderr);
    let end = "error: a stream is written by the direct way only\n\
               hint: leave --via at auto, or save to a new file\n";
    assert!(said.ends_with(end), "{said}");
    let report: serde_json::Value = serde_json::from_str(said.strip_suffix(end).unwrap()).unwrap();
    assert_eq!(report["kind"], "unsupported");
}

#[test]
fn a_dry_run_answers_on_the_standard_output() {
    let qemu = booted();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("vm.img");
    let name = image.to_str().unwrap();
    let output = save(&qemu, &["--dry-run", name]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let said = text(&output.stdout);
    assert!(said.starts_with(&format!("{name} would be saved via direct as mapped-ram\n")), "{said}");
    assert!(said.contains(": it fits\n"), "{said}");

    let output = save(&qemu, &["--dry-run", "--json", name]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut keys: Vec<_> = report.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    let expected = [
        "bytes_max",
        "direct_io",
        "direct_io_reason",
        "expected_ms",
        "fits",
        "format",
        "ram_bytes",
        "reason",
        "room_bytes",
        "via",
    ];
    assert_eq!((keys.as_slice(), &report["fits"]), (&expected[..], &true.into()));
    assert!(!image.exists());
}
