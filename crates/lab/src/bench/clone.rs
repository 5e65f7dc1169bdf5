//! A guest that a restore has started, as the benchmarks of restores look at it.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, WaitOptions, waitpid};
use tempfile::TempDir;
use vmstate::net::QmpAddress;
use vmstate::qmp::Client;
use vmstate::{
    Cancel, Error, Kind, Record, RestoreReport, RestoreSettings, Result, SaveSettings, Target, Then,
    Unobserved, Via,
};

use crate::{Guest, GuestSettings, MachineKind, QemuSpec};

/// How long a guest may take to fill its memory, or to go through all of it once more.
const DEADLINE: Duration = Duration::from_secs(600);

/// A guest of q35 with private memory.
pub fn spec(memory_mib: u64, settings: GuestSettings) -> QemuSpec {
    QemuSpec { guest: Some(Guest::new(settings)), ..QemuSpec::new(MachineKind::Q35, memory_mib << 20) }
}

/// Boots the guest, saves it when it has finished its first round, and ends it; the round that it had come to.
pub fn make_image(spec: &QemuSpec, image: &Path, cancel: &Cancel) -> Result<u32> {
    let mut qemu = spec.start().map_err(failed)?;
    qemu.wait_for_round(1, DEADLINE).map_err(failed)?;
    let settings = SaveSettings {
        via: Via::Direct,
        then: Then::Quit,
        overwrite: true,
        ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image)
    };
    vmstate::save(&settings, cancel, &Unobserved)?;
    qemu.wait(DEADLINE).map_err(failed)?;
    qemu.serial.latest_round().map_err(failed)
}

/// A clone that runs. It is ended when this is dropped.
pub struct Clone {
    /// What its restore said.
    pub report: RestoreReport,
    home: TempDir,
}

impl Clone {
    /// Starts one with a console, a monitor and a directory of its own, which `change` is told.
    pub fn start(
        spec: &QemuSpec,
        image: &Path,
        cancel: &Cancel,
        change: impl FnOnce(&mut RestoreSettings, &Path),
    ) -> Result<Clone> {
        let home = tempfile::Builder::new()
            .prefix("vmstate-clone-")
            .tempdir()
            .map_err(|error| Error::io("cannot create a directory", error))?;
        let mut command = vec![spec.program.clone().into_os_string()];
        command.extend(spec.machine_args(home.path()).map_err(failed)?);
        let qmp = format!("unix:{},server=on,wait=off", home.path().join(QMP).display());
        command.extend(["-qmp", &qmp].map(OsString::from));
        let target = Target::Launch { command, log: None, foreground: false };
        let mut settings = RestoreSettings { record: Record::Running, ..RestoreSettings::new(image, target) };
        change(&mut settings, home.path());
        let report = vmstate::restore(&settings, cancel, &Unobserved)?;
        Ok(Clone { report, home })
    }

    /// Has QEMU read all of the guest's memory once, which changes none of it.
    pub fn read_all(&self, memory_mib: u64, cancel: &Cancel) -> Result<()> {
        let arguments = serde_json::json!({ "val": 0, "size": memory_mib << 20, "filename": "/dev/null" });
        self.client(cancel)?.execute("pmemsave", arguments).map(drop)
    }

    /// What the kernel says of its memory.
    pub fn memory(&self) -> Memory {
        let pid = self.report.qemu_pid.unwrap_or_default();
        Memory::of(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default())
    }

    fn client(&self, cancel: &Cancel) -> Result<Client> {
        Client::connect(&QmpAddress::Unix(self.home.path().join(QMP)), cancel)
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        // It has no disk to lose anything of. The image can be put out of the page cache only once it is gone.
        let pid = self.report.qemu_pid.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid
            && rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok()
        {
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

const QMP: &str = "qmp.sock";

/// The memory of a process in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// What it has mapped and present.
    pub resident: u64,
    /// The same, where a page that several processes have counts as a part for each: the sum over all of them is
    /// what they take together.
    pub proportional: u64,
    /// What of it is nobody else's and no file's.
    pub own: u64,
}

impl Memory {
    fn of(rollup: &str) -> Memory {
        let field = |name: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10
        };
        Memory { resident: field("Rss:"), proportional: field("Pss:"), own: field("Pss_Anon:") }
    }

    /// Both together.
    pub fn plus(self, other: Memory) -> Memory {
        Memory {
            resident: self.resident + other.resident,
            proportional: self.proportional + other.proportional,
            own: self.own + other.own,
        }
    }
}

/// The memory that this machine has left, in bytes.
pub fn available_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10
}

pub fn failed(error: crate::Error) -> Error {
    Error::new(Kind::Io, "the benchmark's guest").because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_sums_are_read() {
        let rollup = "55d0-7fff ---p 00000000 00:00 0 [rollup]\nRss:               1000 kB\nPss:                600 kB\n\
                      Pss_Dirty:          100 kB\nPss_Anon:           400 kB\nPss_File:           200 kB\n";
        let memory = Memory::of(rollup);
        assert_eq!(memory, Memory { resident: 1000 << 10, proportional: 600 << 10, own: 400 << 10 });
        assert_eq!(memory.plus(memory).resident, 2000 << 10);
        assert_eq!(Memory::of(""), Memory::default());
        assert!(available_bytes() > 0);
    }
}
