//! Domains of a real libvirtd: what it saves, vmstate restores.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use lab::{Guest, RamLayout};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use vmstate::net::QmpAddress;
use vmstate::source::Format;
use vmstate::{Cancel, ConvertSettings, RestoreSettings, SaveSettings, Target, Unobserved};
use vmstate_rig::{DomainSpec, Libvirtd, verify_image};

const KEEPER: &str = env!("CARGO_BIN_EXE_libvirt-keeper");
const MIB: u64 = 1 << 20;

#[test]
fn what_virsh_saves_goes_on_in_a_qemu_without_libvirt() {
    let libvirtd = Libvirtd::start(KEEPER);
    for format in ["raw", "zstd", "gzip", "sparse"] {
        let mut domain = DomainSpec::new(&format!("saved-{format}"), 96 * MIB).start(&libvirtd);
        domain.wait_for_rounds(2);
        let image = domain.dir().join("image");
        let command = domain.command();
        domain.save(&image, format);
        assert_eq!(domain.state(), "shut off", "{format}");
        let saved = domain.serial.latest_round().unwrap();

        assert_eq!(vmstate::check(&image).unwrap().report.faults, [], "{format}");
        let info = vmstate::info(&image).unwrap();
        assert_eq!(info.format, format!("libvirt-{format}"));
        assert_eq!(info.domain.unwrap().name.as_deref(), Some(domain.spec().name.as_str()));
        assert_eq!(info.run_state.as_deref(), Some("running"), "{format}");

        let qemu = Launched::restore(&image, &command, domain.dir());
        domain.wait_for_rounds(2);
        assert!(domain.serial.latest_round().unwrap() >= saved + 2, "{format}");
        qemu.verify(&domain.spec().guest, &domain.spec().layout());
    }
}

#[test]
fn what_vmstate_converts_virsh_restores_in_every_format() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("converted", 96 * MIB).start(&libvirtd);
    domain.wait_for_rounds(2);
    let (saved, converted) = (domain.dir().join("saved"), domain.dir().join("converted"));
    // Each is made of what libvirt saved as the one before it.
    let formats = ["raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"];
    for (i, format) in formats.into_iter().enumerate() {
        domain.save(&saved, formats[(i + formats.len() - 1) % formats.len()]);
        let round = domain.serial.latest_round().unwrap();
        let target = Format::LIBVIRT[i];
        assert_eq!(target.name(), format!("libvirt-{format}"));
        let settings =
            ConvertSettings { overwrite: true, ..ConvertSettings::new(&saved, &converted, target) };
        vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{format}: {}", error.chain()));
        libvirtd.virsh(&[&"restore", &converted]);
        assert_eq!(domain.state(), "running", "{format}");
        assert!(domain.wait_for_rounds(2) >= round + 2, "{format}");
    }
    domain.save(&saved, "sparse");
    verify_image(&domain.spec().guest, &domain.spec().layout(), &saved);
}

/// A QEMU that vmstate started for an image. It is killed when this is dropped.
struct Launched {
    qmp: PathBuf,
    pidfd: OwnedFd,
}

impl Launched {
    fn restore(image: &Path, command: &[OsString], dir: &Path) -> Launched {
        let qmp = dir.join("qmp");
        let mut command = command.to_vec();
        command.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", qmp.display()).into()]);
        let target = Target::Launch { command, log: Some(dir.join("qemu.log")), foreground: false };
        let settings = RestoreSettings::new(image, target);
        let report = vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{}: {}", image.display(), error.chain()));
        assert_eq!(report.run_state, "running", "{}", image.display());
        let pid = Pid::from_raw(report.qemu_pid.unwrap() as i32).unwrap();
        Launched { qmp, pidfd: pidfd_open(pid, PidfdFlags::empty()).unwrap() }
    }

    /// Looks at every page of the guest, by way of an image of it.
    fn verify(&self, guest: &Guest, layout: &RamLayout) {
        let image = self.qmp.with_extension("image");
        let settings = SaveSettings::new(QmpAddress::Unix(self.qmp.clone()), &image);
        vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{}", error.chain()));
        verify_image(guest, layout, &image);
        std::fs::remove_file(&image).unwrap();
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}
