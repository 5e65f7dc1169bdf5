//! A domain of a real libvirt: `virsh save` and `virsh restore` beside ours.
//!
//! The domain is suspended and saved once in the beginning. Each measurement starts from that image, which is restored
//! paused, and none lets the guest run: so its memory stands still, its disks stay what the image knows of them, and in
//! the end it goes on where it was.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde::Serialize;
use vmstate::libvirt::{Connection, DomainName, GivingUp, LibvirtUri};
use vmstate::net::QmpAddress;
use vmstate::{
    Cancel, DirectIo, DomainRestoreSettings, Error, Kind, Mode, Record, RestoreSettings, Result, SaveReport,
    SaveSettings, Target, Then, Unobserved,
};

use super::Job;
use super::measure::leave_cache;
use super::meter::Usage;
use super::statistics::median;
use super::table::{Cells, Style, lay_out};
use crate::demo::Narrator;

/// How often QEMU's memory is looked at while it is saved.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Which domain, and how often.
#[derive(Clone, Debug)]
pub struct DomainBenchSettings {
    /// The daemon.
    pub uri: LibvirtUri,
    /// The domain: it runs, and whoever owns it allows that it is saved and restored again and again.
    pub name: DomainName,
    /// A QEMU command that the domain's images can be restored into without libvirt; empty leaves that out.
    pub command: Vec<OsString>,
    /// How many channels `virsh` is told to use, where it uses several.
    pub channels: u16,
    /// The directory for the images, which libvirt's QEMU can read.
    pub directory: PathBuf,
    /// How often each way is measured.
    pub rounds: usize,
}

/// One way of one job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DomainRow {
    /// Which job.
    pub job: Job,
    /// Who did it, and how: the words of the command.
    pub way: String,
    /// How many measurements there are.
    pub count: usize,
    /// The median time of the whole command in milliseconds.
    pub time_ms: f64,
    /// The shortest.
    pub time_min_ms: f64,
    /// The longest.
    pub time_max_ms: f64,
    /// The median until the image was durable in milliseconds; of a save.
    pub durable_ms: Option<f64>,
    /// The most that QEMU's resident memory, anonymous and shared, was seen to grow in a save.
    pub qemu_growth_bytes: Option<u64>,
    /// QEMU's resident memory, anonymous and shared, before a save and after a restore: the median.
    pub qemu_bytes: u64,
    /// The length of the image.
    pub file_bytes: u64,
    /// What its blocks take.
    pub disk_bytes: u64,
}

/// Who saves and restores, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Raw,
    Sparse,
    SparseChannels,
    SparseDirect,
    Ours,
    OursAlone,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    time_ms: f64,
    durable_ms: Option<f64>,
    growth: Option<u64>,
    resident: u64,
}

/// Saves and restores a domain by libvirt's ways and by ours, in turn.
///
/// # Errors
/// Whatever keeps it from succeeding. Where the domain could not be brought back, the error says where its image is.
pub fn domain(
    settings: &DomainBenchSettings,
    cancel: &Cancel,
    narrator: &dyn Narrator,
) -> Result<Vec<DomainRow>> {
    let mut connection = Connection::open(&settings.uri, GivingUp::Cancelled(cancel.clone()))?;
    let found = connection.find(&settings.name)?;
    drop(connection);
    let bench = Bench { settings, name: found.name, uuid: found.uuid, cancel, narrator };
    let directory = tempfile::Builder::new()
        .prefix("vmstate-bench-")
        .tempdir_in(&settings.directory)
        .map_err(|error| {
            Error::io(format!("cannot create a directory in {}", settings.directory.display()), error)
        })?;
    let base = directory.path().join("base.sav");
    let was_running = bench.virsh(&["domstate", &bench.name])?.trim() == "running";
    narrator.tell(&format!("domain {}: suspended and saved to {}", bench.name, base.display()));
    if was_running {
        bench.virsh(&["suspend", &bench.name])?;
    }
    let outcome = bench.save_ours(&base, Then::Quit).and_then(|_| bench.measure(directory.path(), &base));
    let back = bench.bring_back(&base, was_running);
    if let Err(error) = back {
        // The image is all that is left of the guest.
        let kept = directory.keep();
        return Err(
            error.hint(format!("its image was kept: virsh restore {}", kept.join("base.sav").display()))
        );
    }
    outcome
}

struct Bench<'a> {
    settings: &'a DomainBenchSettings,
    name: String,
    uuid: [u8; 16],
    cancel: &'a Cancel,
    narrator: &'a dyn Narrator,
}

impl Bench<'_> {
    fn measure(&self, directory: &Path, base: &Path) -> Result<Vec<DomainRow>> {
        let ways = self.ways();
        let mut saves: Vec<Vec<Sample>> = ways.iter().map(|_| Vec::new()).collect();
        let mut restores = saves.clone();
        let mut lengths = vec![(0, 0); ways.len()];
        let image = directory.join("image.sav");
        for round in 0..self.settings.rounds {
            let mut order: Vec<usize> = (0..ways.len()).filter(|i| ways[*i] != Way::OursAlone).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for i in order {
                if self.cancel.is_cancelled() {
                    return Err(Error::interrupted());
                }
                let way = ways[i];
                self.narrator.tell(&format!("round {}: {}", round + 1, self.words(way, Job::Save)));
                // Each save has a QEMU of its own: what one made it allocate is there for the next.
                self.restore_base(base)?;
                saves[i].push(self.save(way, &image)?);
                let found = fs::metadata(&image)
                    .map_err(|error| Error::io(format!("cannot look at {}", image.display()), error))?;
                // What vmstate saved is restored without libvirt, too.
                let alone = ways.iter().position(|other| way == Way::Ours && *other == Way::OursAlone);
                for restored in [Some(i), alone].into_iter().flatten() {
                    lengths[restored] = (found.len(), found.blocks() * 512);
                    leave_cache(&image)?;
                    restores[restored].push(self.restore(ways[restored], &image)?);
                }
                fs::remove_file(&image)
                    .map_err(|error| Error::io(format!("cannot remove {}", image.display()), error))?;
            }
        }
        let mut rows = Vec::new();
        for (job, samples) in [(Job::Save, &saves), (Job::Restore, &restores)] {
            for (i, way) in ways.iter().enumerate() {
                // Its image is that of the way above.
                if job == Job::Restore || *way != Way::OursAlone {
                    rows.push(row(job, self.words(*way, job), &samples[i], lengths[i]));
                }
            }
        }
        Ok(rows)
    }

    fn ways(&self) -> Vec<Way> {
        let mut ways = vec![Way::Raw, Way::Sparse, Way::SparseChannels, Way::SparseDirect, Way::Ours];
        if !self.settings.command.is_empty() {
            ways.push(Way::OursAlone);
        }
        ways
    }

    fn words(&self, way: Way, job: Job) -> String {
        let channels = self.settings.channels;
        let all = match (job, way) {
            (Job::Save, Way::Raw) => "virsh save, raw",
            (Job::Save, Way::Sparse) => "virsh save, sparse",
            (Job::Save, Way::SparseChannels) => &format!("virsh save, sparse, {channels} channels"),
            (Job::Save, Way::SparseDirect) => {
                &format!("virsh save, sparse, {channels} channels, bypass-cache")
            }
            (Job::Save, Way::Ours | Way::OursAlone) => "vmstate save --domain",
            (Job::Restore, Way::Raw) => "virsh restore, raw",
            (Job::Restore, Way::Sparse) => "virsh restore, sparse",
            (Job::Restore, Way::SparseChannels) => &format!("virsh restore, sparse, {channels} channels"),
            (Job::Restore, Way::SparseDirect) => {
                &format!("virsh restore, sparse, {channels} channels, bypass-cache")
            }
            (Job::Restore, Way::Ours) => "vmstate restore --domain",
            (Job::Restore, Way::OursAlone) => "vmstate restore -- QEMU",
        };
        all.to_owned()
    }

    fn save(&self, way: Way, image: &Path) -> Result<Sample> {
        let pid = self.pid()?;
        let resident = Usage::of(pid).memory_bytes;
        let (end, ended) = mpsc::channel::<()>();
        let watch = thread::spawn(move || {
            let mut peak = 0;
            loop {
                peak = Usage::of(pid).memory_bytes.max(peak);
                if ended.recv_timeout(LOOK_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return peak;
                }
            }
        });
        let started = Instant::now();
        let outcome = self.save_by(way, image);
        let time_ms = ms(started.elapsed());
        drop(end);
        let peak = watch.join().unwrap_or(0);
        outcome?;
        // What the command has made durable costs nothing here.
        let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all());
        sync(image)
            .and_then(|()| sync(image.parent().unwrap_or(Path::new("."))))
            .map_err(|error| Error::io(format!("cannot make {} durable", image.display()), error))?;
        let durable_ms = Some(ms(started.elapsed()));
        Ok(Sample { time_ms, durable_ms, growth: Some(peak.saturating_sub(resident)), resident })
    }

    fn save_by(&self, way: Way, image: &Path) -> Result<()> {
        let (name, image_text) = (self.name.as_str(), text(image)?);
        let channels = self.settings.channels.to_string();
        let plain = ["save", name, image_text, "--image-format"];
        let several = ["sparse", "--parallel-channels", &channels];
        match way {
            Way::Raw => self.virsh(&[&plain[..], &["raw"]].concat()).map(drop),
            Way::Sparse => self.virsh(&[&plain[..], &["sparse"]].concat()).map(drop),
            Way::SparseChannels => self.virsh(&[&plain[..], &several].concat()).map(drop),
            Way::SparseDirect => self.virsh(&[&plain[..], &several, &["--bypass-cache"]].concat()).map(drop),
            Way::Ours | Way::OursAlone => {
                self.save_ours(image, Then::Quit).map(|report| self.tell_phases(&report))
            }
        }
    }

    /// Where the time of a save of ours went.
    fn tell_phases(&self, report: &SaveReport) {
        let phases = report.phases.0.iter().map(|(name, took)| format!("{name} {:.0}", ms(*took)));
        let direct = if report.direct_io { "direct I/O" } else { "through the page cache" };
        self.narrator.tell(&format!("  ms: {}; {direct}", phases.collect::<Vec<_>>().join(", ")));
    }

    fn save_ours(&self, image: &Path, then: Then) -> Result<SaveReport> {
        let name = DomainName(self.name.clone());
        let qmp = QmpAddress::Domain { uri: self.settings.uri.clone(), name };
        let settings = SaveSettings { then, ..SaveSettings::new(qmp, image) };
        vmstate::save(&settings, self.cancel, &Unobserved)
    }

    /// Restores the image, paused, looks at what QEMU has, and ends it.
    fn restore(&self, way: Way, image: &Path) -> Result<Sample> {
        let started = Instant::now();
        let pid = match way {
            Way::OursAlone => {
                let target =
                    Target::Launch { command: self.settings.command.clone(), log: None, foreground: false };
                let settings = RestoreSettings {
                    record: Record::Paused,
                    mode: Mode::Eager,
                    ..RestoreSettings::new(image, target)
                };
                let report = vmstate::restore(&settings, self.cancel, &Unobserved)?;
                report.qemu_pid
            }
            _ => {
                self.restore_by(way, image)?;
                None
            }
        };
        let time_ms = ms(started.elapsed());
        let resident = Usage::of(pid.map_or_else(|| self.pid(), Ok)?).memory_bytes;
        match pid {
            None => drop(self.virsh(&["destroy", &self.name])?),
            Some(pid) => end(pid),
        }
        Ok(Sample { time_ms, durable_ms: None, growth: None, resident })
    }

    fn restore_by(&self, way: Way, image: &Path) -> Result<()> {
        let channels = self.settings.channels.to_string();
        let plain = ["restore", text(image)?, "--paused"];
        let several = ["--parallel-channels", &channels];
        match way {
            Way::Raw | Way::Sparse => self.virsh(&plain).map(drop),
            Way::SparseChannels => self.virsh(&[&plain[..], &several].concat()).map(drop),
            Way::SparseDirect => self.virsh(&[&plain[..], &several, &["--bypass-cache"]].concat()).map(drop),
            Way::Ours | Way::OursAlone => {
                let settings = DomainRestoreSettings {
                    uri: self.settings.uri.clone(),
                    image: image.to_owned(),
                    xml: None,
                    record: Record::Paused,
                    direct_io: DirectIo::Auto,
                    channels: None,
                    reset_nvram: false,
                };
                vmstate::restore_domain(&settings, self.cancel, &Unobserved).map(drop)
            }
        }
    }

    fn restore_base(&self, base: &Path) -> Result<()> {
        self.virsh(&["restore", text(base)?, "--paused"]).map(drop)
    }

    /// The domain as it was before all this, whatever became of it.
    fn bring_back(&self, base: &Path, was_running: bool) -> Result<()> {
        // One that was never defined is gone when it does not run.
        let state = self.virsh(&["domstate", &self.name]).unwrap_or_default();
        if matches!(state.trim(), "" | "shut off" | "crashed") {
            self.restore_base(base)?;
        }
        // Whatever restore it was, the guest has not run since the base was made.
        if was_running { self.virsh(&["resume", &self.name]).map(drop) } else { Ok(()) }
    }

    fn virsh(&self, words: &[&str]) -> Result<String> {
        let output = Command::new("virsh")
            .args(["--quiet", "--connect"])
            .arg(self.settings.uri.to_string())
            .args(words)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| {
                Error::io("cannot start virsh", error).hint("it is in the package libvirt-clients")
            })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        Err(Error::new(Kind::Peer, format!("virsh {}: {said}", words[0])))
    }

    /// The process of the domain's QEMU: libvirt starts it with the domain's UUID.
    fn pid(&self) -> Result<u32> {
        let uuid = hyphenated(&self.uuid);
        let processes = fs::read_dir("/proc").map_err(|error| Error::io("cannot read /proc", error))?;
        let found = processes.flatten().find_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let mut words = line.split(|byte| *byte == 0).skip_while(|word| *word != b"-uuid");
            (words.nth(1)? == uuid.as_bytes()).then_some(pid)
        });
        found
            .ok_or_else(|| Error::new(Kind::Peer, format!("the QEMU of domain `{}` is not found", self.name)))
    }
}

fn row(job: Job, way: String, samples: &[Sample], (file_bytes, disk_bytes): (u64, u64)) -> DomainRow {
    let times: Vec<f64> = samples.iter().map(|sample| sample.time_ms).collect();
    let durable: Vec<f64> = samples.iter().filter_map(|sample| sample.durable_ms).collect();
    let resident: Vec<f64> = samples.iter().map(|sample| sample.resident as f64).collect();
    DomainRow {
        job,
        way,
        count: samples.len(),
        time_ms: median(&times),
        time_min_ms: times.iter().copied().fold(f64::INFINITY, f64::min),
        time_max_ms: times.iter().copied().fold(0.0, f64::max),
        durable_ms: (job == Job::Save).then(|| median(&durable)),
        qemu_growth_bytes: samples.iter().filter_map(|sample| sample.growth).max(),
        qemu_bytes: median(&resident) as u64,
        file_bytes,
        disk_bytes,
    }
}

/// The rows as two tables, and what they mean.
pub fn render_domain(rows: &[DomainRow], style: Style) -> String {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    let table = |job: Job| {
        let of_job = rows.iter().filter(|row| row.job == job);
        let cells = of_job.map(|row| {
            let mut cells = vec![
                row.way.clone(),
                format!("{:.0}", row.time_ms),
                format!("{:.0} – {:.0}", row.time_min_ms, row.time_max_ms),
            ];
            if job == Job::Save {
                cells.push(row.durable_ms.map_or_else(String::new, |ms| format!("{ms:.0}")));
                cells.push(row.qemu_growth_bytes.map_or_else(String::new, mib));
                cells.push(mib(row.file_bytes));
                cells.push(mib(row.disk_bytes));
            }
            cells.push(mib(row.qemu_bytes));
            cells
        });
        let mut header = vec![job.name(), "ms", "least – most"];
        match job {
            Job::Save => {
                header.extend(["durable ms", "QEMU grew MiB", "image MiB", "on disk MiB", "QEMU before MiB"])
            }
            Job::Restore => header.push("QEMU after MiB"),
        }
        lay_out(&Cells { header, words: 1, rows: cells.collect() }, style)
    };
    let count = rows.first().map_or(0, |row| row.count);
    format!(
        "{}\n{}\nMedians of {count}. Each save begins with a QEMU of its own, restored from one image and never run; each \
         restore reads an image that is not in the page cache and leaves the guest paused. Times are of the whole \
         command, of virsh with its start. Durable: until an fsync after the command was done, too. QEMU grew: the most \
         that its resident memory, anonymous and shared, was seen to grow during a save.\n",
        table(Job::Save),
        table(Job::Restore),
    )
}

/// Ends a QEMU that we have started. It has not run, so there is nothing to lose.
fn end(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid
        && kill_process(pid, Signal::KILL).is_ok()
    {
        let _ = waitpid(Some(pid), WaitOptions::empty());
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(Kind::Misuse, format!("{} is a name that libvirt does not take", path.display()))
            .hint("give a directory whose name is UTF-8")
    })
}

fn hyphenated(uuid: &[u8; 16]) -> String {
    let mut text = String::new();
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_on_qemus_command_line() {
        let uuid = *b"\x12\x34\x56\x78\x9a\xbc\xde\xf0\x02\x34\x56\x78\x9a\xbc\xde\xf1";
        assert_eq!(hyphenated(&uuid), "12345678-9abc-def0-0234-56789abcdef1");
    }

    #[test]
    fn a_row_has_medians_and_the_worst_growth() {
        let sample = |time_ms, growth| Sample {
            time_ms,
            durable_ms: Some(time_ms + 1.0),
            growth: Some(growth),
            resident: 5 << 20,
        };
        let samples = [sample(30.0, 1 << 20), sample(10.0, 7 << 20), sample(20.0, 0)];
        let found = row(Job::Save, "virsh save, raw".to_owned(), &samples, (9 << 20, 3 << 20));
        assert_eq!((found.time_ms, found.time_min_ms, found.time_max_ms), (20.0, 10.0, 30.0));
        assert_eq!((found.durable_ms, found.qemu_growth_bytes), (Some(21.0), Some(7 << 20)));
        let table = render_domain(&[found], Style::Markdown);
        let line = "| virsh save, raw | 20 | 10 – 30 | 21 | 7.0 | 9.0 | 3.0 | 5.0 |";
        assert!(table.lines().any(|other| other == line), "{table}");
    }
}
