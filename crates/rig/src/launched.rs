//! Guests that vmstate restores into a QEMU which it starts itself.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use lab::{Guest, RamLayout};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use vmstate::net::QmpAddress;
use vmstate::{Cancel, RestoreSettings, SaveSettings, Target, Unobserved};

use crate::verify_image;

/// A QEMU that vmstate started for an image. It is killed when this is dropped.
#[derive(Debug)]
pub struct Launched {
    qmp: PathBuf,
    pidfd: OwnedFd,
}

impl Launched {
    /// Restores an image into such a command, in `dir`, and finds the guest running.
    ///
    /// # Panics
    /// When that fails.
    pub fn restore(image: &Path, command: &[OsString], dir: &Path) -> Launched {
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

    /// Its monitor.
    pub fn qmp(&self) -> &Path {
        &self.qmp
    }

    /// Looks at every page of the guest, by way of an image of it.
    ///
    /// # Panics
    /// When it cannot be saved, or a page is not as the guest left it.
    pub fn verify(&self, guest: &Guest, layout: &RamLayout) {
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
