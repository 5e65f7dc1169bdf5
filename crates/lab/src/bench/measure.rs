//! One measurement: a guest saved or restored once, by one way.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Advice;
use vmstate::job::ceiling;
use vmstate::{Cancel, Error, Record, RestoreSettings, Result, SaveSettings, Target, Then, Unobserved, Via};

use super::guests::{Guests, Running};
use super::meter::{Cost, Meter};
use super::{Way, stock};

/// What one measurement tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// How long it took.
    pub time: Duration,
    /// How long it took but for making the image durable.
    pub time_without_sync: Option<Duration>,
    /// Processor time and memory.
    pub cost: Cost,
    /// The image's length.
    pub file_bytes: u64,
    /// What its blocks take.
    pub disk_bytes: u64,
    /// Bytes of pages that hold data, where vmstate has counted them.
    pub data_bytes: Option<u64>,
    /// Which of vmstate's ways it was.
    pub via: Option<&'static str>,
}

impl Sample {
    /// With what the image takes.
    fn with_lengths(self, image: &Path) -> Result<Sample> {
        let found = fs::metadata(image)
            .map_err(|error| Error::io(format!("cannot look at {}", image.display()), error))?;
        Ok(Sample { file_bytes: found.len(), disk_bytes: found.blocks() * 512, ..self })
    }
}

/// The images of a run, one for each kind: they lie in a directory that is removed in the end.
pub struct Images<'a> {
    /// The directory.
    pub directory: &'a Path,
}

impl Images<'_> {
    /// The image that this way writes, and reads.
    pub fn of(&self, way: Way) -> PathBuf {
        self.directory.join(match way {
            Way::QemuStream => "stream.img",
            // The channels leave no trace in the image.
            Way::QemuMapped | Way::QemuOneDirect | Way::QemuChannels | Way::QemuDirect => "mapped-ram.img",
            Way::Vmstate => "vmstate.img",
        })
    }

    /// The file of the ceilings.
    pub fn ceiling(&self) -> PathBuf {
        self.directory.join("ceiling.img")
    }

    /// Makes room: every image is written into a new file.
    pub fn remove(&self, path: &Path) -> Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(format!("cannot remove {}", path.display()), error))
            }
            _ => Ok(()),
        }
    }
}

/// Saves a guest; it runs on afterwards, which a guest that has halted does not notice.
///
/// QEMU's time begins with `stop`, at a monitor that is connected and set up; ours is the whole call. Both end with
/// an image that is durable under its name.
pub fn save(running: &Running, way: Way, images: &Images<'_>, cancel: &Cancel) -> Result<Sample> {
    let image = images.of(way);
    images.remove(&image)?;
    let sample = match way {
        Way::Vmstate => save_ours(running, &image, cancel)?,
        _ => save_qemus(running, way, &image, cancel)?,
    };
    sample.with_lengths(&image)
}

fn save_ours(running: &Running, image: &Path, cancel: &Cancel) -> Result<Sample> {
    let settings =
        SaveSettings { via: Via::Direct, then: Then::Resume, ..SaveSettings::new(running.address(), image) };
    let meter = Meter::start(running.qemu.pid());
    let report = vmstate::save(&settings, cancel, &Unobserved)?;
    let mut cost = meter.stop();
    cost.vmstate_peak_bytes = cost.vmstate_peak_bytes.max(report.peak_memory_bytes);
    let published = report.phases.0.iter().find(|(name, _)| *name == "publish");
    Ok(Sample {
        time: report.duration,
        time_without_sync: published.map(|(_, took)| report.duration.saturating_sub(*took)),
        cost,
        data_bytes: Some(report.data_bytes),
        via: Some(report.via.name()),
        ..Sample::default()
    })
}

fn save_qemus(running: &Running, way: Way, image: &Path, cancel: &Cancel) -> Result<Sample> {
    let mut client = running.client(cancel)?;
    stock::configure(&mut client, way)?;
    let meter = Meter::start(running.qemu.pid());
    let started = Instant::now();
    stock::save(&mut client, image)?;
    let time_without_sync = Some(started.elapsed());
    make_durable(image)?;
    let time = started.elapsed();
    let cost = meter.stop();
    stock::run_on(&mut client, cancel)?;
    Ok(Sample { time, time_without_sync, cost, ..Sample::default() })
}

/// What QEMU leaves to its caller: the image and its name are to survive a loss of power.
fn make_durable(image: &Path) -> Result<()> {
    let directory = image.parent().unwrap_or(Path::new("."));
    let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all());
    sync(image)
        .and_then(|()| sync(directory))
        .map_err(|error| Error::io(format!("cannot make {} durable", image.display()), error))
}

/// Restores a guest into a QEMU that waits already, from an image that is not in the page cache.
pub fn restore(guests: &Guests, way: Way, images: &Images<'_>, cancel: &Cancel) -> Result<Sample> {
    let image = images.of(way);
    let running = guests.wait()?;
    leave_cache(&image)?;
    let sample = match way {
        Way::Vmstate => restore_ours(&running, &image, cancel)?,
        _ => restore_qemus(&running, way, &image, cancel)?,
    };
    sample.with_lengths(&image)
}

fn restore_qemus(running: &Running, way: Way, image: &Path, cancel: &Cancel) -> Result<Sample> {
    let mut client = running.client(cancel)?;
    stock::configure(&mut client, way)?;
    let meter = Meter::start(running.qemu.pid());
    let started = Instant::now();
    stock::load(&mut client, image)?;
    let time = started.elapsed();
    Ok(Sample { time, cost: meter.stop(), ..Sample::default() })
}

fn restore_ours(running: &Running, image: &Path, cancel: &Cancel) -> Result<Sample> {
    let settings = RestoreSettings {
        mode: vmstate::Mode::Eager,
        record: Record::Running,
        ..RestoreSettings::new(image, Target::Waiting(running.address()))
    };
    let meter = Meter::start(running.qemu.pid());
    let report = vmstate::restore(&settings, cancel, &Unobserved)?;
    Ok(Sample {
        time: report.first_instruction,
        cost: meter.stop(),
        data_bytes: Some(report.read_bytes),
        via: Some(report.via.name()),
        ..Sample::default()
    })
}

/// Has the kernel forget what it has of a file; it is durable, so nothing is lost.
pub fn leave_cache(image: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io(format!("cannot open {}", image.display()), error);
    let file = File::open(image).map_err(failed)?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).map_err(|error| failed(error.into()))
}

/// What the lanes take to write `bytes` into a new file, which is left there.
pub fn ceiling_of_save(images: &Images<'_>, bytes: u64, cancel: &Cancel) -> Result<Duration> {
    images.remove(&images.ceiling())?;
    ceiling::write_fresh(&images.ceiling(), bytes, cancel)
}
