//! How the cost grows: with the size of the memory, and with what of it was touched.
//!
//! Idle guests of several sizes, up to one that no machine holds; one size of which more and more is touched; the plan
//! for a tebibyte without a guest; `info` of the images that came of it; and how soon a job ends that is cancelled.

mod cancels;
mod plans;
mod plot;
mod run;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

pub use cancels::CancelRow;
pub use plans::{InfoRow, PlanRow};
pub use plot::growth_svg;
pub use run::growth;
pub use table::render_growth;

use super::{Backend, Budget, Interval, Machine, Verdict};

/// What to measure.
#[derive(Clone, Debug)]
pub struct GrowthSettings {
    /// The sizes of idle guests in MiB.
    pub sizes_mib: Vec<u64>,
    /// One more, whose memory is reserved and never there: no QEMU saves it itself, since that would allocate it.
    pub reserved_mib: Option<u64>,
    /// The size of the guest of which more and more is touched, and whose jobs are cancelled, in MiB.
    pub shares_mib: u64,
    /// The memory that is planned for without a guest, in bytes.
    pub planned_bytes: u64,
    /// How many rounds a ratio is measured in.
    pub rounds: usize,
    /// How long one size may take, about, once there are enough rounds for an interval.
    pub time_per_size: Duration,
    /// Where the images go.
    pub directory: PathBuf,
    /// The command line, of which `info` is called as people do; `None` calls the library alone.
    pub program: Option<PathBuf>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct GrowthReport {
    /// The machine.
    pub machine: Machine,
    /// Idle guests, by their size.
    pub sizes: Vec<SizeRow>,
    /// One size, by what is touched.
    pub shares: Vec<ShareRow>,
    /// Plans without a guest.
    pub plans: Vec<PlanRow>,
    /// `info` of images.
    pub infos: Vec<InfoRow>,
    /// Jobs that were cancelled.
    pub cancels: Vec<CancelRow>,
    /// What was left out, and why.
    pub notes: Vec<String>,
    /// How long all of it took, in seconds.
    pub took_s: f64,
}

/// Saves of an idle guest of one size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SizeRow {
    /// Its memory.
    pub memory_mib: u64,
    /// Where that comes from.
    pub backend: Backend,
    /// The median time of vmstate in milliseconds.
    pub vmstate_ms: f64,
    /// The shortest.
    pub vmstate_min_ms: f64,
    /// The longest.
    pub vmstate_max_ms: f64,
    /// The median of QEMU's best way; nothing where it was not measured.
    pub qemu_ms: Option<f64>,
    /// Which way that is.
    pub qemu_way: Option<&'static str>,
    /// By how much QEMU's memory grew when it saved itself.
    pub qemu_growth_bytes: Option<i64>,
    /// By how much it grew when vmstate did.
    pub vmstate_growth_bytes: i64,
    /// The most anonymous memory of vmstate.
    pub vmstate_peak_bytes: u64,
    /// How many times as long QEMU takes.
    pub ratio: Option<Interval>,
    /// What was promised of it.
    pub budget: Option<Budget>,
    /// Whether that is kept.
    pub verdict: Verdict,
    /// Bytes of pages that hold data.
    pub data_bytes: u64,
    /// How many rounds there were.
    pub rounds: usize,
}

/// Saves of a guest that has touched a part of its memory.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ShareRow {
    /// Its memory.
    pub memory_mib: u64,
    /// Where that comes from.
    pub backend: Backend,
    /// How much of it the guest has filled, in percent.
    pub touched_percent: u64,
    /// Bytes of pages that hold data.
    pub data_bytes: u64,
    /// The median time of vmstate in milliseconds.
    pub vmstate_ms: f64,
    /// The shortest.
    pub vmstate_min_ms: f64,
    /// The longest.
    pub vmstate_max_ms: f64,
    /// What the lanes take to write as many bytes, in the same rounds: the median.
    pub ceiling_ms: f64,
    /// QEMU's best way, once.
    pub qemu_ms: f64,
    /// The most anonymous memory of vmstate.
    pub vmstate_peak_bytes: u64,
    /// How many rounds there were.
    pub rounds: usize,
}
