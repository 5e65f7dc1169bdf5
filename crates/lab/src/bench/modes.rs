//! The modes of a restore beside each other, over guests of several sizes; and many clones of one guest.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use vmstate::{Cancel, Error, Mode, Result};

use super::clone::{Clone, Memory, available_bytes, make_image, spec};
use super::measure::leave_cache;
use super::statistics::median;
use super::table::{Cells, Style, lay_out};
use crate::GuestSettings;
use crate::demo::Narrator;

/// What an idle guest owns, in pages: 8 MiB.
const IDLE_PAGES: u32 = 2048;

/// One mode with guests of one size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModeRow {
    /// The guest's memory in MiB.
    pub memory_mib: u64,
    /// Whether it has filled all of it, or 8 MiB.
    pub is_dirty: bool,
    /// `eager` or `map`.
    pub mode: &'static str,
    /// From the call until the guest could run: the median.
    pub first_instruction_ms: f64,
    /// From QEMU being ready until then: the median.
    pub from_ready_ms: f64,
    /// The fastest of them, which the machine's other work disturbed least.
    pub from_ready_ms_min: f64,
    /// From the call until the guest has gone through all the memory that it owns.
    pub all_seen_ms: f64,
    /// What the restore itself has read of the guest's pages.
    pub read_bytes: u64,
    /// How many restores.
    pub rounds: usize,
}

/// A number of clones of one guest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CloneRow {
    /// How many.
    pub clones: usize,
    /// `eager`, `map`, or `map, all read`: after each of them has read all of its memory.
    pub mode: &'static str,
    /// From the first call until all of them could run, one started after the other.
    pub all_run_ms: f64,
    /// From a clone's call until it could run: the median.
    pub first_instruction_ms: f64,
    /// The resident memory of all, each page counted for everyone who has it.
    pub resident_bytes: u64,
    /// The memory that they take together.
    pub together_bytes: u64,
    /// What of it is each one's own.
    pub own_bytes: u64,
}

/// Restores guests of every size, `rounds` times in each mode and in turn, from an image that is not in the page
/// cache.
///
/// # Errors
/// Whatever keeps it from succeeding.
pub fn modes(
    sizes_mib: &[u64],
    rounds: usize,
    directory: &Path,
    cancel: &Cancel,
    narrator: &dyn Narrator,
) -> Result<Vec<ModeRow>> {
    let dir = images(directory)?;
    let image = dir.path().join("vm.img");
    let mut rows = Vec::new();
    for is_dirty in [false, true] {
        for &memory_mib in sizes_mib {
            let load = if is_dirty { "dirty" } else { "idle" };
            // A dirty guest is there twice for a moment, in memory and in the cache.
            if is_dirty && available_bytes() >> 20 < memory_mib * 3 / 2 {
                narrator.tell(&format!("a dirty guest of {memory_mib} MiB does not fit into this machine"));
                continue;
            }
            narrator.tell(&format!("{load} guest of {memory_mib} MiB"));
            let all = GuestSettings { fill_rounds: 1, ..GuestSettings::default() };
            let settings = match is_dirty {
                true => all,
                false => GuestSettings { pages_low_max: IDLE_PAGES, pages_high_max: 0, ..all },
            };
            let spec = spec(memory_mib, settings);
            let round = make_image(&spec, &image, cancel)?;
            let ways = [Mode::Eager, Mode::Map];
            let mut samples = [const { Vec::new() }; 2];
            let mut read_bytes = [0; 2];
            for turn in 0..rounds {
                let order = if turn % 2 == 0 { [0, 1] } else { [1, 0] };
                for way in order {
                    leave_cache(&image)?;
                    let mut clone = Clone::start(&spec, &image, ways[way], cancel)?;
                    let seen = clone.goes_on_from(round)?;
                    let report = &clone.report;
                    samples[way].push([report.first_instruction, report.first_instruction_from_ready, seen]);
                    read_bytes[way] = report.read_bytes;
                }
            }
            for (way, mode) in ways.iter().enumerate() {
                let all = |i: usize| -> Vec<f64> {
                    samples[way].iter().map(|times: &[Duration; 3]| ms(times[i])).collect()
                };
                let of = |i| median(&all(i));
                rows.push(ModeRow {
                    memory_mib,
                    is_dirty,
                    mode: mode.name(),
                    first_instruction_ms: of(0),
                    from_ready_ms: of(1),
                    from_ready_ms_min: all(1).into_iter().fold(f64::INFINITY, f64::min),
                    all_seen_ms: of(2),
                    read_bytes: read_bytes[way],
                    rounds,
                });
            }
        }
    }
    Ok(rows)
}

/// Starts clones of one guest that has filled its memory and halted, by each mode, and looks at what they cost.
///
/// # Errors
/// Whatever keeps it from succeeding.
pub fn clones(
    counts: &[usize],
    memory_mib: u64,
    directory: &Path,
    cancel: &Cancel,
    narrator: &dyn Narrator,
) -> Result<Vec<CloneRow>> {
    let dir = images(directory)?;
    let image = dir.path().join("vm.img");
    let settings = GuestSettings { fill_rounds: 1, halt_after_round: 1, ..GuestSettings::default() };
    let spec = spec(memory_mib, settings);
    make_image(&spec, &image, cancel)?;
    let mut rows = Vec::new();
    for &count in counts {
        for mode in [Mode::Eager, Mode::Map] {
            // Eager clones have all of their memory each; half of what is left shall stay for others.
            if mode == Mode::Eager && (count as u64 * memory_mib) << 20 > available_bytes() / 2 {
                narrator.tell(&format!("{count} eager clones would take too much of this machine's memory"));
                continue;
            }
            narrator.tell(&format!("{count} clones, {}", mode.name()));
            leave_cache(&image)?;
            let start = Instant::now();
            let mut fleet = Vec::with_capacity(count);
            for _ in 0..count {
                fleet.push(Clone::start(&spec, &image, mode, cancel)?);
            }
            let all_run_ms = ms(start.elapsed());
            let times: Vec<f64> = fleet.iter().map(|clone| ms(clone.report.first_instruction)).collect();
            let row = |mode, memory: Memory| CloneRow {
                clones: count,
                mode,
                all_run_ms,
                first_instruction_ms: median(&times),
                resident_bytes: memory.resident,
                together_bytes: memory.proportional,
                own_bytes: memory.own,
            };
            let memory = || fleet.iter().fold(Memory::default(), |sum, clone| sum.plus(clone.memory()));
            rows.push(row(mode.name(), memory()));
            if mode == Mode::Map {
                for clone in &fleet {
                    clone.read_all(memory_mib, cancel)?;
                }
                rows.push(row("map, all read", memory()));
            }
        }
    }
    Ok(rows)
}

/// The modes as a table.
pub fn render_modes(rows: &[ModeRow], style: Style) -> String {
    let cells = rows.iter().map(|row| {
        vec![
            format!("{} MiB {}", row.memory_mib, if row.is_dirty { "dirty" } else { "idle" }),
            row.mode.to_owned(),
            format!("{:.1}", row.first_instruction_ms),
            format!("{:.1}", row.from_ready_ms),
            format!("{:.1}", row.from_ready_ms_min),
            format!("{:.0}", row.all_seen_ms),
            format!("{:.1}", mib(row.read_bytes)),
        ]
    });
    let header = vec![
        "guest",
        "mode",
        "first instruction ms",
        "from QEMU ready ms",
        "fastest",
        "all seen ms",
        "read MiB",
    ];
    lay_out(&Cells { header, words: 2, rows: cells.collect() }, style)
}

/// The clones as a table.
pub fn render_clones(rows: &[CloneRow], style: Style) -> String {
    let cells = rows.iter().map(|row| {
        vec![
            row.mode.to_owned(),
            row.clones.to_string(),
            format!("{:.2}", row.all_run_ms / 1000.0),
            format!("{:.1}", row.first_instruction_ms),
            format!("{:.0}", mib(row.together_bytes)),
            format!("{:.0}", mib(row.own_bytes)),
            format!("{:.0}", mib(row.resident_bytes)),
        ]
    });
    let header = vec![
        "mode",
        "clones",
        "all run s",
        "first instruction ms",
        "together MiB (PSS)",
        "own MiB",
        "resident MiB (RSS)",
    ];
    lay_out(&Cells { header, words: 1, rows: cells.collect() }, style)
}

fn images(directory: &Path) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("vmstate-bench-")
        .tempdir_in(directory)
        .map_err(|error| Error::io(format!("cannot create a directory in {}", directory.display()), error))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
