//! The command line as a user meets it, with real QEMUs: exit codes, messages, JSON and signals.
//!
//! The whole suite takes less than a minute on two processors; five seconds of that are the time that a monitor
//! has to greet.

mod answers;
mod background;
mod convert;
mod devices;
mod domains;
// The rig may not be depended on from below; this file of it needs nothing else of it.
#[path = "../../../rig/src/footprint.rs"]
#[allow(missing_docs, unreachable_pub)]
mod footprint;
mod held;
mod inspect;
mod killed;
mod lazy;
mod map;
mod monitors;
mod progress;
mod signals;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use footprint::Footprint;
use lab::{Guest, GuestSettings, MachineKind, Qemu, QemuSpec};
use vmstate::Cancel;
use vmstate::net::QmpAddress;
use vmstate::qmp::Client;

/// Generous: a wait ends as soon as what it waits for has come.
const DEADLINE: Duration = Duration::from_secs(120);

fn small() -> QemuSpec {
    QemuSpec {
        guest: Some(Guest::new(GuestSettings::idle(256))),
        second_qmp: true,
        ..QemuSpec::new(MachineKind::Q35, 64 << 20)
    }
}

/// The small guest past its boot, when QEMU opens no more descriptors by itself.
fn booted() -> Qemu {
    let mut qemu = small().start().unwrap();
    qemu.wait_for_round(1, DEADLINE).unwrap();
    qemu
}

fn images() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

/// A client of the second monitor.
fn other(qemu: &Qemu) -> Client {
    let address = QmpAddress::Unix(qemu.second_qmp_path());
    let mut client = Client::connect(&address, &Cancel::new().unwrap()).unwrap();
    client.timeout = Some(DEADLINE);
    client
}

/// QEMU's footprint with the guest paused: the devices of one that runs hold descriptors of their own.
fn paused_footprint(qemu: &Qemu) -> Footprint {
    // Held until all is counted: QEMU greets it when the connection before it is closed, so that what is counted of
    // this monitor is always one.
    let mut other = other(qemu);
    other.stop().unwrap();
    let footprint = Footprint::of(&qemu.qmp_path(), qemu.pid());
    other.cont().unwrap();
    footprint
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn vmstate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmstate"));
    command.env_remove("VMSTATE_QMP");
    command
}

/// What a command did: exit code, stdout, stderr.
#[derive(Debug, PartialEq)]
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        Said {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Runs vmstate with arguments that are given as one line, split at blanks.
fn run(line: &str) -> Said {
    vmstate().args(line.split_whitespace()).output().unwrap().into()
}
