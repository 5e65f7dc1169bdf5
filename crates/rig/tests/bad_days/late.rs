//! What comes too late, what never comes, and what looks like an image.

use std::os::unix::fs::FileExt;
use std::path::Path;

use lab::{Incoming, QemuSpec, Serial};
use vmstate::net::QmpAddress;
use vmstate::qmp::Client;
use vmstate::source::MappedRamFile;
use vmstate::{Cancel, Kind, RestoreSettings, Target, Unobserved, Via};
use vmstate_rig::{DEADLINE, Hook};

use crate::{booted, images, save_to, says, small, told};

fn saved(dir: &Path) -> std::path::PathBuf {
    let image = dir.join("vm.img");
    let (qemu, _) = booted();
    save_to(&image, &qemu, Via::Direct, &Unobserved).unwrap();
    image
}

#[test]
fn a_guest_that_was_let_go_is_not_ended_by_a_signal_that_comes_late() {
    let dir = images();
    let image = saved(dir.path());
    let (home, qmp) = (tempfile::tempdir().unwrap(), dir.path().join("qmp"));
    let spec = QemuSpec { second_qmp: false, ..small() };
    let mut command = vec![spec.program.clone().into_os_string()];
    command.extend(spec.machine_args(home.path()).unwrap());
    command.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", qmp.display()).into()]);
    let mut serial = Serial::open(&QemuSpec::serial_path(home.path()), &home.path().join("none")).unwrap();
    let cancel = Cancel::new().unwrap();
    // The first phase after the guest runs.
    let late = Hook::at("settle", || cancel.cancel());
    let target = Target::Launch { command, log: None, foreground: false };
    let report = vmstate::restore(&RestoreSettings::new(&image, target), &cancel, &late).unwrap();
    assert!(late.is_done());
    assert_eq!(report.run_state, "running");
    serial.wait_for_round(2, None, DEADLINE).unwrap();
    Client::connect(&QmpAddress::Unix(qmp), &Cancel::new().unwrap()).unwrap().quit().unwrap();
}

#[test]
fn a_fifo_is_no_image_and_nobody_waits_for_its_writer() {
    let dir = images();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let expected = says(
        Kind::Misuse,
        &format!("{} is neither a regular file nor a block device", fifo.display()),
        "no hint",
    );
    assert_eq!(told(vmstate::info(&fifo)), expected);
    assert_eq!(told(vmstate::check(&fifo)), expected);
    let nowhere = Target::Waiting(QmpAddress::Unix(dir.path().join("nowhere")));
    let settings = RestoreSettings::new(&fifo, nowhere);
    assert_eq!(told(vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)), expected);
}

#[test]
fn a_run_state_that_would_end_qemu_is_refused_before_the_load() {
    let dir = images();
    let image = saved(dir.path());
    let opened = MappedRamFile::open(&image).unwrap();
    let devices = opened.devices().unwrap();
    let section = devices.section("globalstate", 0).unwrap();
    let target = QemuSpec { incoming: Incoming::Defer, ..small() }.start().unwrap();
    for state in ["save-vm", "restore-vm", "debug", "inmigrate"] {
        let mut payload = opened.read(section.payload).unwrap();
        wire::qemu::global_state::patch_run_state(&mut payload, state).unwrap();
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        file.write_all_at(&payload, section.payload.start).unwrap();
        let settings = RestoreSettings::new(&image, Target::Waiting(QmpAddress::Unix(target.qmp_path())));
        assert_eq!(
            told(vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)),
            says(
                Kind::Unsupported,
                &format!("the image records the run state `{state}`, in which no QEMU takes a guest"),
                "save the guest again, in another state"
            )
        );
    }
    assert_eq!(vmstate_rig::client(&target).status().unwrap().status, "inmigrate", "it still waits");
}

/// How many bytes this thread has read so far.
fn bytes_read() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn a_file_that_was_made_longer_by_a_hole_costs_no_memory() {
    let dir = images();
    let image = saved(dir.path());
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    let len = file.metadata().unwrap().len();
    let info = vmstate::info(&image).unwrap();
    // Behind the image it is passed over. Where the image's own end is cut off, nothing else can be its end.
    for (cut, is_whole) in [(0, true), (1000, false)] {
        file.set_len(len - cut).unwrap();
        file.set_len(len + (900 << 20)).unwrap();
        let before = bytes_read();
        let (found, check) = (vmstate::info(&image), vmstate::check(&image).unwrap());
        let read = bytes_read() - before;
        assert!(read < 16 << 20, "{cut:#x} cut: {read:#x} bytes were read");
        if is_whole {
            assert_eq!(found.unwrap().devices, info.devices);
            assert_eq!(check.report.faults, []);
            continue;
        }
        let error = found.unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged);
        assert!(error.to_string().ends_with("bytes are a hole of the file"), "{error}");
        assert!(check.report.faults.iter().any(|fault| fault.problem.ends_with("are a hole of the file")));
    }
}
