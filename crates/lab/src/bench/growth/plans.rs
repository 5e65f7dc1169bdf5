//! What is planned without a guest, and what is read of an image without its pages.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmstate::job::planning::{Presence, Sparse, plan};
use vmstate::{Error, Kind, Result};

use super::run::middle_and_most;
use crate::bench::clone::available_bytes;

/// One byte in so many is there.
const ONE_IN: u64 = 100;
/// How many bytes lie side by side: single pages, the worst that they can be, and what huge pages are.
const RUNS: [u64; 2] = [4096, 2 << 20];
/// How much memory the page table takes that a page needs which has no neighbour.
const PAGE_TABLE: u64 = 4096;
/// Less than this is not planned for: it takes no time.
const BYTES_MIN: u64 = 1 << 30;

/// A plan for memory of which a hundredth is there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanRow {
    /// The memory.
    pub bytes: u64,
    /// How the pages were found.
    pub by: &'static str,
    /// How many bytes lie side by side.
    pub run_bytes: u64,
    /// How many pages of 4 KiB were found.
    pub pages: u64,
    /// How many windows lanes would be given.
    pub windows: u64,
    /// The median in milliseconds.
    pub median_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// The median scaled to the size that was asked for, which memory did not hold.
    pub scaled_ms: Option<f64>,
    /// What was promised of that size.
    pub budget_ms: Option<f64>,
}

/// `info` of one image, which is in the page cache.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InfoRow {
    /// What the image is of.
    pub what: &'static str,
    /// The guest's memory.
    pub ram_bytes: u64,
    /// The image's length.
    pub file_bytes: u64,
    /// What its blocks take.
    pub disk_bytes: u64,
    /// The call of the library in milliseconds: the median.
    pub library_ms: f64,
    /// The command from its start to its end: the median.
    pub command_ms: Option<f64>,
    /// The longest.
    pub command_max_ms: Option<f64>,
}

/// Plans for so many bytes, or for as many as memory holds.
pub fn plans(bytes: u64, count: usize, note: &mut dyn FnMut(String)) -> Result<Vec<PlanRow>> {
    let mut rows = Vec::new();
    for run_bytes in RUNS {
        for by in [Presence::Scan, Presence::Entries, Presence::Holes] {
            let sparse = |bytes| Sparse { bytes, every_bytes: run_bytes * ONE_IN, run_bytes };
            let mut held = bytes;
            while takes(sparse(held)) > available_bytes() * 3 / 4 && held / 2 >= BYTES_MIN {
                held /= 2;
            }
            let planned = match plan(sparse(held), by, count) {
                Ok(planned) => planned,
                Err(error) => {
                    note(format!("no plan by {}: {}", by.name(), error.chain()));
                    continue;
                }
            };
            let (median_ms, max_ms) = middle_and_most(&planned.took);
            rows.push(PlanRow {
                bytes: held,
                by: by.name(),
                run_bytes,
                pages: planned.pages,
                windows: planned.windows,
                median_ms,
                max_ms,
                scaled_ms: (held < bytes).then(|| median_ms * (bytes as f64 / held as f64)),
                budget_ms: budget_ms(bytes, by),
            });
        }
    }
    Ok(rows)
}

/// What a tebibyte of which a hundredth is there may take.
fn budget_ms(bytes: u64, by: Presence) -> Option<f64> {
    (bytes == 1 << 40).then_some(match by {
        Presence::Scan => 300.0,
        Presence::Entries => 1000.0,
        Presence::Holes => return None,
    })
}

/// The memory that it takes to have this.
fn takes(sparse: Sparse) -> u64 {
    let runs = sparse.bytes / sparse.every_bytes;
    sparse.present_bytes() + runs * PAGE_TABLE
}

/// Asks for `info` so many times; what the image says is in the page cache after the first.
pub fn info(what: &'static str, image: &Path, program: Option<&Path>, count: usize) -> Result<InfoRow> {
    let found = fs::metadata(image)
        .map_err(|error| Error::io(format!("cannot look at {}", image.display()), error))?;
    let ram_bytes = vmstate::info(image)?.ram_bytes;
    let (mut library, mut command) = (Vec::new(), Vec::new());
    for _ in 0..count.max(1) {
        let started = Instant::now();
        vmstate::info(image)?;
        library.push(started.elapsed());
        if let Some(program) = program {
            command.push(call(program, image)?);
        }
    }
    let of_command = program.map(|_| middle_and_most(&command));
    Ok(InfoRow {
        what,
        ram_bytes,
        file_bytes: found.len(),
        disk_bytes: found.blocks() * 512,
        library_ms: middle_and_most(&library).0,
        command_ms: of_command.map(|(median, _)| median),
        command_max_ms: of_command.map(|(_, most)| most),
    })
}

fn call(program: &Path, image: &Path) -> Result<Duration> {
    let started = Instant::now();
    let status = Command::new(program)
        .arg("info")
        .arg(image)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(|error| Error::io(format!("cannot start {}", program.display()), error))?;
    let took = started.elapsed();
    match status.success() {
        true => Ok(took),
        false => Err(Error::new(Kind::Peer, format!("`{} info` ended with {status}", program.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_pages_take_a_page_table_each() {
        let of = |run_bytes| takes(Sparse { bytes: 1 << 40, every_bytes: run_bytes * ONE_IN, run_bytes });
        assert!(of(4096) > 19 * (of(2 << 20) / 10), "{} {}", of(4096), of(2 << 20));
        assert_eq!(budget_ms(1 << 40, Presence::Scan), Some(300.0));
        assert_eq!(budget_ms(1 << 30, Presence::Scan), None, "a smaller one is measured and not judged");
    }

    #[test]
    fn a_plan_has_a_row_for_every_way_and_run() {
        let mut notes = Vec::new();
        let rows = plans(1 << 30, 1, &mut |note| notes.push(note)).unwrap();
        assert_eq!(rows.len() + notes.len(), 6, "{notes:?}");
        for row in &rows {
            assert_eq!(row.bytes, 1 << 30);
            assert!(row.pages >= (1 << 30) / 100 / 4096, "{row:?}");
            assert!(row.windows > 0 && row.scaled_ms.is_none() && row.median_ms <= row.max_ms, "{row:?}");
        }
    }
}
