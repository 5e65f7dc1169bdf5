//! Many clones of one guest, and what they cost.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use vmstate::{Cancel, Mode, Result};

use super::clone::{Clone, Memory, available_bytes, make_image, spec};
use super::measure::leave_cache;
use super::modes::{images, mib, ms};
use super::statistics::median;
use super::table::{Cells, Style, lay_out};
use crate::GuestSettings;
use crate::demo::Narrator;

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
                fleet.push(Clone::start(&spec, &image, cancel, |settings, _| settings.mode = mode)?);
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
