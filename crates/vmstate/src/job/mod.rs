//! The jobs: each is a composition of sources and sinks, run by [`save()`], [`restore()`] and so on.

pub mod ceiling;
mod compare;
mod convert;
mod inspect;
pub mod planning;
mod presence;
mod progress;
mod restore;
mod resume;
mod save;

use std::time::{Duration, Instant};

pub use compare::{
    BlockDifference, CompareSettings, Compared, Comparison, SectionDifference, TextDifference,
    ValueDifference, compare, compare_files,
};
pub use convert::{ConvertReport, ConvertSettings, convert};
pub use inspect::{BlockSummary, Check, ImageInfo, SectionSummary, check, check_at, info, info_at};
/// What the fields of device state are.
pub use wire::qemu::fields;

pub use inspect::{DescribedBy, DevicesSettings, SectionContent, SectionReport, devices};
pub use inspect::{
    FilePlace, Joiner, MapKind, MapRange, MapRun, MapSettings, MapVisitor, MappedImage, map, map_changes,
};
pub use presence::Presence;
pub use progress::{Estimate, Pace, Progress, ProgressReading};
pub use restore::{Answer, Server, start_server};
pub use restore::{DomainRestoreReport, DomainRestoreSettings, restore_domain};
pub use restore::{
    FaultReport, FaultTimes, Mode, ReadySerial, Record, RestoreReport, RestoreSettings, TakeUpReport,
    TakeUpSettings, Target, restore, take_up,
};
pub use resume::{ResumeReport, ResumeSettings, resume};
pub use save::{
    DeviceStateBy, ManagedSaveReport, ManagedSaveSettings, Rehearsal, SaveFormat, SaveReport, SaveSettings,
    Then, managed_image, rehearse, save, save_managed,
};

/// Who carries the RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// The best way that the guest allows; the report says which it was and why.
    Auto,
    /// vmstate reads the guest's memory from outside; QEMU gives the device state only.
    Direct,
    /// QEMU's own mapped-ram with multifd, into descriptors of ours.
    Qemu,
    /// vmstate at the other end of an ordinary migration: every QEMU has that.
    Socket,
}

impl Via {
    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Via::Auto => "auto",
            Via::Direct => "direct",
            Via::Qemu => "qemu",
            Via::Socket => "socket",
        }
    }
}

/// Whether pages bypass the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectIo {
    /// Where the target takes it.
    Auto,
    /// Always; an error where the target does not.
    On,
    /// Never.
    Off,
}

impl From<DirectIo> for io::DirectChoice {
    fn from(choice: DirectIo) -> io::DirectChoice {
        match choice {
            DirectIo::Auto => io::DirectChoice::Auto,
            DirectIo::On => io::DirectChoice::On,
            DirectIo::Off => io::DirectChoice::Off,
        }
    }
}

/// Who is told how a job goes. The library prints nothing.
pub trait Observer: Sync {
    /// A phase begins.
    fn phase(&self, _name: &'static str) {}
    /// Something worth knowing, such as the way that was chosen and why: one clause.
    fn note(&self, _text: &str) {}
    /// Something the user must know although the job goes on: one clause.
    fn warn(&self, _text: &str) {}
    /// The job begins, and how far it is can be read from `progress` at any time and from any thread. It is handed
    /// out once, before the first phase; a clone may outlive the job.
    fn progress(&self, _progress: &Progress) {}
    /// The guest of a lazy restore runs, and its memory is on its way: what can be said of it by then. Pages are served
    /// meanwhile, whatever this does and however long it takes.
    fn running(&self, _report: &RestoreReport) {}
}

/// An observer that wants to know nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {}

/// How long each phase of a job took, in order.
#[derive(Clone, Debug, Default)]
pub struct Phases(pub Vec<(&'static str, Duration)>);

/// Runs phases one after the other and notes what each took.
struct Stopwatch<'a> {
    observer: &'a dyn Observer,
    started: Instant,
    current: Option<(&'static str, Instant)>,
    phases: Phases,
    progress: Progress,
}

impl<'a> Stopwatch<'a> {
    fn start(observer: &'a dyn Observer) -> Stopwatch<'a> {
        let progress = Progress::start();
        observer.progress(&progress);
        Stopwatch { observer, started: Instant::now(), current: None, phases: Phases::default(), progress }
    }

    fn phase(&mut self, name: &'static str) {
        self.end_phase();
        self.progress.enter(name);
        self.observer.phase(name);
        self.current = Some((name, Instant::now()));
    }

    fn end_phase(&mut self) {
        if let Some((name, since)) = self.current.take() {
            self.phases.0.push((name, since.elapsed()));
        }
    }

    /// The phases that are over, and the one that is not as far as it has come.
    fn so_far(&self) -> Phases {
        let current = self.current.map(|(name, since)| (name, since.elapsed()));
        Phases(self.phases.0.iter().copied().chain(current).collect())
    }

    fn finish(mut self) -> (Phases, Duration) {
        self.end_phase();
        (self.phases, self.started.elapsed())
    }
}

/// Says what the lanes will move bytes with; whoever chose nonsense hears of it before the guest is touched.
fn note_engine(observer: &dyn Observer) -> crate::Result<()> {
    match io::EngineChoice::Auto.engine() {
        Ok(engine) => observer.note(&format!("lanes: {engine}")),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
            return Err(crate::Error::new(crate::Kind::Misuse, error.to_string()));
        }
        Err(error) => return Err(crate::Error::new(crate::Kind::Unsupported, error.to_string())),
    }
    Ok(())
}

/// The error of a look at which pages of a block are there; a look that the cancel has ended is no error of its own.
pub(crate) fn untold_pages(name: &str, error: std::io::Error) -> crate::Error {
    match error.kind() {
        std::io::ErrorKind::Interrupted => crate::Error::interrupted(),
        _ => crate::Error::io(format!("cannot tell which pages of `{name}` are there"), error),
    }
}

/// The resident anonymous memory of this process in bytes: what the job costs beside the guest's own pages,
/// which may be mapped here too. Zero where the kernel does not tell.
fn anonymous_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}
