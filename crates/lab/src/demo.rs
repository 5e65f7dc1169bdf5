//! The demonstration: a guest in a real QEMU is saved and restored, and QEMU's own best way beside ours.

use std::path::Path;
use std::time::Duration;

use vmstate::net::QmpAddress;
use vmstate::source::MappedRamFile;
use vmstate::{
    Cancel, Error, Kind, RestoreSettings, Result, SaveReport, SaveSettings, Target, Then, Unobserved, Via,
};

use crate::{Guest, GuestSettings, MachineKind, MemoryBackend, Qemu, QemuSpec, Serial};

/// Generous: a wait ends as soon as what it waits for has come.
const DEADLINE: Duration = Duration::from_secs(120);
/// How many saves of each way the busy guest gets: interleaved, so that a machine whose speed drifts treats
/// both alike.
const PAIRS: usize = 4;
/// What the idle guest owns: 4 MiB.
const IDLE_PAGES: u32 = 1024;

/// What the demonstration says while it goes on.
pub trait Narrator {
    /// Something that was seen: one sentence.
    fn tell(&self, sentence: &str);
}

/// A row of the demonstration's table.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Which guest.
    pub guest: String,
    /// How long QEMU's own best way took: the median.
    pub qemu: Duration,
    /// How long vmstate took: the median.
    pub vmstate: Duration,
    /// How many saves each.
    pub saves: usize,
}

impl Row {
    /// How many times as long QEMU takes.
    pub fn ratio(&self) -> f64 {
        self.qemu.as_secs_f64() / self.vmstate.as_secs_f64()
    }
}

/// What was demonstrated.
#[derive(Clone, Debug, PartialEq)]
pub struct DemoReport {
    /// The round that the guest was in when it was saved.
    pub round_saved: u32,
    /// How many pages of the image hold what the guest wrote there.
    pub pages_verified: u64,
    /// From the call to a guest that runs again.
    pub restored: Duration,
    /// The round that the guest reached after it was restored.
    pub round_reached: u32,
    /// The comparison.
    pub rows: Vec<Row>,
}

/// Runs the demonstration with guests of `memory_mib`; images go to `directory` and are removed.
///
/// # Errors
/// Whatever keeps it from succeeding; [`Kind::Damaged`] where the guest's memory was not whole.
pub fn demo(
    memory_mib: u64,
    directory: &Path,
    cancel: &Cancel,
    narrator: &dyn Narrator,
) -> Result<DemoReport> {
    let dir = tempfile::Builder::new()
        .prefix("vmstate-demo-")
        .tempdir_in(directory)
        .map_err(|error| Error::io(format!("cannot create a directory in {}", directory.display()), error))?;
    let image = dir.path().join("vm.img");

    let settings = GuestSettings { fill_rounds: 1, ..GuestSettings::default() };
    let spec = guest(memory_mib, MemoryBackend::Plain, settings);
    let mut qemu = spec.start().map_err(lab)?;
    let round = qemu.wait_for_round(2, DEADLINE).map_err(lab)?;
    narrator.tell(&format!(
        "A guest of {memory_mib} MiB runs in a real QEMU. It fills all of its memory and counts its rounds: {round} so far."
    ));

    let busy = busy_row(&qemu, &image, cancel)?;
    let saved = save(&qemu, &image, Via::Direct, Then::Quit, cancel)?;
    qemu.wait(DEADLINE).map_err(lab)?;
    let round_saved = qemu.serial.latest_round().map_err(lab)?;
    narrator.tell(&format!(
        "Saved in {:.2} s, RAM read from outside QEMU and written past the page cache; that QEMU has ended.",
        saved.duration.as_secs_f64()
    ));

    let pages_verified = verify(&spec, &image)?;
    narrator.tell(&format!("Every one of its {pages_verified} pages is in the image as the guest wrote it."));

    let (restored, round_reached) = restore(&spec, &image, dir.path(), round_saved, cancel)?;
    narrator.tell(&format!(
        "Restored in {:.2} s into a new QEMU; the guest went on from round {round_saved} to {round_reached}, and found \
         every page as it had left it.",
        restored.as_secs_f64()
    ));
    drop(qemu);

    // To replace the busy guest's image would be to give its room back, which some file systems take their time for.
    let idle = idle_row(memory_mib, &image.with_file_name("idle"), cancel)?;
    Ok(DemoReport { round_saved, pages_verified, restored, round_reached, rows: vec![busy, idle] })
}

fn guest(memory_mib: u64, backend: MemoryBackend, settings: GuestSettings) -> QemuSpec {
    let guest = Some(Guest::new(settings));
    QemuSpec { backend, guest, ..QemuSpec::new(MachineKind::Q35, memory_mib << 20) }
}

/// Both ways in turn, A B B A, on one guest whose memory is all in use.
fn busy_row(qemu: &Qemu, image: &Path, cancel: &Cancel) -> Result<Row> {
    let mut times = (Vec::new(), Vec::new());
    // The first save of each pays for what is touched for the first time; it is not counted.
    for via in [Via::Qemu, Via::Direct] {
        save(qemu, image, via, Then::Resume, cancel)?;
    }
    for pair in 0..PAIRS {
        let order = if pair % 2 == 0 { [Via::Qemu, Via::Direct] } else { [Via::Direct, Via::Qemu] };
        for via in order {
            let took = save(qemu, image, via, Then::Resume, cancel)?.duration;
            if via == Via::Qemu { times.0.push(took) } else { times.1.push(took) }
        }
    }
    Ok(Row {
        guest: "busy, private memory".to_owned(),
        qemu: median(times.0),
        vmstate: median(times.1),
        saves: PAIRS,
    })
}

/// One save each of two guests alike: QEMU's way allocates memory that the guest never touched, so no
/// guest can be used for both.
fn idle_row(memory_mib: u64, image: &Path, cancel: &Cancel) -> Result<Row> {
    let spec = guest(memory_mib, MemoryBackend::Memfd, GuestSettings::idle(IDLE_PAGES));
    let one = |via| -> Result<Duration> {
        let mut qemu = spec.start().map_err(lab)?;
        qemu.wait_for_round(2, DEADLINE).map_err(lab)?;
        Ok(save(&qemu, image, via, Then::Pause, cancel)?.duration)
    };
    let (ours, theirs) = (one(Via::Direct)?, one(Via::Qemu)?);
    Ok(Row { guest: "idle, shared memory".to_owned(), qemu: theirs, vmstate: ours, saves: 1 })
}

fn save(qemu: &Qemu, image: &Path, via: Via, then: Then, cancel: &Cancel) -> Result<SaveReport> {
    let settings = SaveSettings {
        via,
        then,
        overwrite: true,
        ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image)
    };
    vmstate::save(&settings, cancel, &Unobserved)
}

fn verify(spec: &QemuSpec, image: &Path) -> Result<u64> {
    let image = MappedRamFile::open(image)?;
    let damaged = |clause: String| Error::new(Kind::Damaged, clause);
    let block = image.layout().blocks.iter().find(|block| block.name == "pc.ram");
    let block = block.ok_or_else(|| damaged("the image has no `pc.ram`".to_owned()))?;
    let pages = image.pages(block)?;
    let guest = spec.guest.unwrap_or_default();
    let layout = spec.layout();
    crate::verify(&guest, &layout, |offset, bytes| image.read_ram(block, &pages, offset, bytes))
        .map_err(|error| damaged(format!("the guest's memory is not whole: {error}")))?;
    Ok(guest.owned_pages(&layout))
}

/// Restores into a QEMU on the same command line and lets it count two rounds.
fn restore(
    spec: &QemuSpec,
    image: &Path,
    home: &Path,
    round: u32,
    cancel: &Cancel,
) -> Result<(Duration, u32)> {
    let qmp = home.join("qmp.sock");
    let mut command = vec![spec.program.clone().into_os_string()];
    command.extend(spec.machine_args(home).map_err(lab)?);
    command.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", qmp.display()).into()]);
    let mut serial = Serial::open(&home.join("serial.log"), &home.join("stderr.log")).map_err(lab)?;
    let settings = RestoreSettings {
        mode: vmstate::Mode::Eager,
        ..RestoreSettings::new(image, Target::Launch { command, log: None, foreground: false })
    };
    let report = vmstate::restore(&settings, cancel, &Unobserved)?;
    let reached = serial.wait_for_round(round + 2, None, DEADLINE).map_err(lab);
    vmstate::qmp::Client::connect(&QmpAddress::Unix(qmp), cancel)?.quit()?;
    Ok((report.first_instruction, reached?))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    let middle = times.len() / 2;
    if times.len() % 2 == 1 { times[middle] } else { (times[middle - 1] + times[middle]) / 2 }
}

/// The library's error for one of the lab.
fn lab(error: crate::Error) -> Error {
    Error::new(Kind::Io, "the demonstration's guest").because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let ms = |list: &[u64]| list.iter().map(|ms| Duration::from_millis(*ms)).collect::<Vec<_>>();
        assert_eq!(median(ms(&[9, 1, 5])), Duration::from_millis(5));
        assert_eq!(median(ms(&[9, 1, 5, 6])), Duration::from_micros(5500));
    }
}
