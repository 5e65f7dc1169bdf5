//! The benchmark: QEMU's own ways of saving and restoring a guest beside ours, in one run on one machine.
//!
//! Real QEMUs run the built-in guest, whose memory stands still. Rows are medians; what a promise is about is
//! measured in rounds, each way once in each, forwards and backwards in turn (A B B A), so that a machine whose
//! speed drifts treats all alike. A ratio is the median of the rounds' own ratios, with an interval.

mod budget;
mod clone;
mod conversions;
mod curves;
mod domain;
mod fleet;
mod growth;
mod guests;
mod measure;
mod meter;
mod modes;
mod modes_plot;
mod plan;
mod plot;
mod pool;
mod room;
mod run;
mod statistics;
mod stock;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

pub use budget::{Budget, Rival, Verdict};
pub use conversions::{ConversionRow, ConversionsSettings, conversions, render_conversions};
pub use domain::{DomainBenchSettings, DomainRow, domain, render_domain};
pub use fleet::{CloneRow, clones, render_clones};
pub use growth::{
    CancelRow, GrowthReport, GrowthSettings, InfoRow, PlanRow, ShareRow, SizeRow, growth, growth_svg,
    render_growth,
};
pub use modes::{ModeRow, ModesReport, ModesSettings, modes, render_modes};
pub use modes_plot::modes_svg;
pub use plot::svg;
pub use run::bench;
pub use statistics::Interval;
pub use table::{Style, render};

/// What to measure, and how often.
#[derive(Clone, Debug)]
pub struct BenchSettings {
    /// The size of the guests in MiB.
    pub memory_mib: u64,
    /// Where the guests' memory comes from; at least one.
    pub backends: Vec<Backend>,
    /// Whether saves are in the table.
    pub saves: bool,
    /// Whether restores are in the table.
    pub restores: bool,
    /// The directory for the images.
    pub directory: PathBuf,
    /// How many rounds a ratio is measured in.
    pub rounds: usize,
    /// How often every row is measured, at the least where there is time.
    pub repeats: usize,
    /// How long the whole may take, about: rows and then rounds are cut to fit. `None` cuts nothing.
    pub time_limit: Option<Duration>,
}

/// Where a guest's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Plain `-m`: anonymous memory.
    Private,
    /// A shared `memory-backend-memfd`.
    Memfd,
    /// A shared `memory-backend-file` in `/dev/shm`.
    File,
    /// A shared `memory-backend-memfd` whose pages are all there before a guest is (`prealloc=on`).
    Populated,
    /// A shared `memory-backend-memfd` on pages of 2 MiB.
    Huge,
}

impl Backend {
    /// All of them.
    pub const ALL: [Backend; 5] =
        [Backend::Private, Backend::Memfd, Backend::File, Backend::Populated, Backend::Huge];

    /// Those that are measured unless others are asked for.
    pub const USUAL: [Backend; 3] = [Backend::Private, Backend::Memfd, Backend::File];

    /// Its name in tables and options.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Private => "private",
            Backend::Memfd => "memfd",
            Backend::File => "file",
            Backend::Populated => "populated",
            Backend::Huge => "huge",
        }
    }

    /// Whether others can have the memory mapped.
    pub fn is_shared(self) -> bool {
        self != Backend::Private
    }

    /// Whether it is shared memory of small pages that nobody has touched yet: whoever fills it has to find each of them,
    /// so that a restore cannot be as fast as the disk is read.
    pub fn is_fresh(self) -> bool {
        matches!(self, Backend::Memfd | Backend::File)
    }
}

/// What a guest has done with its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// It has filled all of it with numbers that do not compress.
    Dirty,
    /// It has filled 8 MiB; the rest was never touched.
    Idle,
}

impl Load {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Load::Dirty => "dirty",
            Load::Idle => "idle",
        }
    }
}

/// Which direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// From a paused guest to a durable image.
    Save,
    /// From an image that is not in the page cache to a guest that runs.
    Restore,
}

impl Job {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Job::Save => "save",
            Job::Restore => "restore",
        }
    }
}

/// Who saves or restores, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// QEMU: a stream.
    QemuStream,
    /// QEMU: mapped-ram, in one thread.
    QemuMapped,
    /// QEMU: mapped-ram with multifd of one channel, past the page cache: it knows no other way past it with less.
    QemuOneDirect,
    /// QEMU: mapped-ram with multifd.
    QemuChannels,
    /// QEMU: mapped-ram with multifd, past the page cache.
    QemuDirect,
    /// Ours: the direct way of saving, and whatever is best for restoring.
    Vmstate,
}

impl Way {
    /// All of them, ours last.
    pub const ALL: [Way; 6] = [
        Way::QemuStream,
        Way::QemuMapped,
        Way::QemuOneDirect,
        Way::QemuChannels,
        Way::QemuDirect,
        Way::Vmstate,
    ];

    /// QEMU's own.
    pub const QEMUS: [Way; 5] =
        [Way::QemuStream, Way::QemuMapped, Way::QemuOneDirect, Way::QemuChannels, Way::QemuDirect];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Way::QemuStream => "QEMU stream",
            Way::QemuMapped => "QEMU mapped-ram",
            Way::QemuOneDirect => "QEMU mapped-ram, 1 channel, direct I/O",
            Way::QemuChannels => "QEMU mapped-ram, 8 channels",
            Way::QemuDirect => "QEMU mapped-ram, 8 channels, direct I/O",
            Way::Vmstate => "vmstate",
        }
    }
}

/// What was measured, where, and what became of the promises.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// The machine.
    pub machine: Machine,
    /// The size of the guests in MiB.
    pub memory_mib: u64,
    /// How many rounds each ratio was to have; it says itself how many it has.
    pub rounds: usize,
    /// How often every row was to be measured; it says itself how often it was.
    pub repeats: usize,
    /// The table.
    pub rows: Vec<Row>,
    /// What the lanes do without a guest.
    pub ceilings: Vec<Ceiling>,
    /// The ratios.
    pub comparisons: Vec<Comparison>,
    /// What was left out or cut, and why.
    pub notes: Vec<String>,
    /// How long all of it took, in seconds.
    pub took_s: f64,
}

/// What the numbers depend on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// How many processors this process may use.
    pub processors: usize,
    /// What the kernel calls them.
    pub processor: String,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// QEMU's version.
    pub qemu: String,
    /// vmstate's version.
    pub vmstate: String,
    /// The file system that the images lie on.
    pub file_system: String,
}

/// A row of the table: one way of one job with one kind of guest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Which job.
    pub job: Job,
    /// Of a guest with this memory,
    pub backend: Backend,
    /// and this load.
    pub load: Load,
    /// Who did it.
    pub way: Way,
    /// Which of vmstate's ways it was.
    pub via: Option<&'static str>,
    /// How many measurements there are.
    pub count: usize,
    /// The median time in milliseconds.
    pub time_ms: f64,
    /// The shortest.
    pub time_min_ms: f64,
    /// The longest.
    pub time_max_ms: f64,
    /// The median without the wait for the disk; of a restore, which has none, nothing.
    pub time_without_sync_ms: Option<f64>,
    /// Bytes of pages that the guest has written.
    pub data_bytes: u64,
    /// The length of the image.
    pub file_bytes: u64,
    /// The bytes that its blocks take.
    pub disk_bytes: u64,
    /// Data per second.
    pub rate_bytes_per_s: f64,
    /// Processor seconds of vmstate; where QEMU does it, of whoever gives it commands.
    pub cpu_vmstate_s: f64,
    /// Processor seconds of QEMU.
    pub cpu_qemu_s: f64,
    /// By how much QEMU's memory grew.
    pub qemu_growth_bytes: i64,
    /// The most anonymous memory that vmstate was seen to have.
    pub vmstate_peak_bytes: u64,
    /// The ceiling's time over this one.
    pub of_ceiling: Option<f64>,
}

/// What the lanes do with as many bytes when there is no guest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ceiling {
    /// Beside which job,
    pub job: Job,
    /// of which guest.
    pub backend: Backend,
    /// What they do.
    pub what: &'static str,
    /// How many bytes.
    pub bytes: u64,
    /// The median time in milliseconds.
    pub time_ms: f64,
    /// How many measurements there are.
    pub count: usize,
    /// Bytes per second.
    pub rate_bytes_per_s: f64,
}

/// vmstate compared with something else, round by round.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Which job.
    pub job: Job,
    /// Of which guest,
    pub backend: Backend,
    /// with this load.
    pub load: Load,
    /// With what.
    pub rival: Rival,
    /// Which of QEMU's ways was its best, where that is the rival.
    pub way: Option<Way>,
    /// How many times as long the rival takes.
    pub ratio: Interval,
    /// What was promised.
    pub budget: Option<Budget>,
    /// Whether it is kept.
    pub verdict: Verdict,
}
