//! The growth as tables for people.

use super::{CancelRow, GrowthReport, InfoRow, PlanRow, ShareRow, SizeRow};
use crate::bench::table::{Cells, Style, factor, heading, lay_out, machine_line, of_budget, size, time};

/// The most that a job may go on after it was cancelled, in milliseconds.
const CANCEL_BUDGET_MS: f64 = 100.0;
/// The most that `info` may take, in milliseconds.
const INFO_BUDGET_MS: f64 = 10.0;

/// Lays out a report.
pub fn render_growth(report: &GrowthReport, style: Style) -> String {
    let mut text = String::new();
    if style == Style::Markdown {
        text.push_str("# How the cost grows\n\n");
    }
    text.push_str(&machine_line(&report.machine, report.took_s));
    let mut section = |title: &str, cells: Cells| {
        if !cells.rows.is_empty() {
            heading(&mut text, style, title);
            text.push_str(&lay_out(&cells, style));
        }
    };
    section("Saves of idle guests, by the size of their memory", sizes(&report.sizes));
    let memory = report.shares.first().map_or(0, |row| row.memory_mib);
    section(
        &format!("Saves of a guest of {}, by what it has touched", size(memory << 20)),
        shares(&report.shares),
    );
    section("Plans for memory of which a hundredth is there, without a guest", plans(&report.plans));
    section("vmstate info of an image in the page cache", infos(&report.infos));
    section("From a cancel until the guest runs and the call is over", cancels(&report.cancels));
    if !report.notes.is_empty() {
        text.push('\n');
    }
    for note in &report.notes {
        text.push_str(if style == Style::Markdown { "* " } else { "  " });
        text.push_str(note);
        text.push('\n');
    }
    text
}

fn range(min_ms: f64, max_ms: f64) -> String {
    format!("{} – {}", time(min_ms), time(max_ms))
}

fn or_dash(value: Option<String>) -> String {
    value.unwrap_or_else(|| "–".to_owned())
}

fn kept(is_kept: bool) -> String {
    if is_kept { "yes" } else { "no" }.to_owned()
}

fn sizes(rows: &[SizeRow]) -> Cells {
    let cells = |row: &SizeRow| {
        let grew = |bytes: i64| size(u64::try_from(bytes).unwrap_or(0));
        vec![
            row.backend.name().to_owned(),
            or_dash(row.qemu_way.map(str::to_owned)),
            of_budget(row.verdict, row.budget),
            size(row.memory_mib << 20),
            time(row.vmstate_ms),
            range(row.vmstate_min_ms, row.vmstate_max_ms),
            or_dash(row.qemu_ms.map(time)),
            or_dash(row.ratio.map(|ratio| factor(ratio.median))),
            or_dash(row.ratio.map(|ratio| format!("{} – {}", factor(ratio.low), factor(ratio.high)))),
            grew(row.vmstate_growth_bytes),
            or_dash(row.qemu_growth_bytes.map(grew)),
            size(row.vmstate_peak_bytes),
            row.rounds.to_string(),
        ]
    };
    let header = vec![
        "memory",
        "QEMU's best",
        "budget kept",
        "size",
        "vmstate",
        "min – max",
        "QEMU",
        "ratio",
        "interval",
        "grew by vmstate",
        "by QEMU",
        "vmstate peak",
        "n",
    ];
    Cells { header, rows: rows.iter().map(cells).collect(), words: 3 }
}

fn shares(rows: &[ShareRow]) -> Cells {
    let cells = |row: &ShareRow| {
        vec![
            row.backend.name().to_owned(),
            format!("{} %", row.touched_percent),
            size(row.data_bytes),
            time(row.vmstate_ms),
            range(row.vmstate_min_ms, row.vmstate_max_ms),
            time(row.ceiling_ms),
            time(row.qemu_ms),
            size(row.vmstate_peak_bytes),
            row.rounds.to_string(),
        ]
    };
    let header = vec![
        "memory",
        "touched",
        "data",
        "vmstate",
        "min – max",
        "ceiling",
        "QEMU, once",
        "vmstate peak",
        "n",
    ];
    Cells { header, rows: rows.iter().map(cells).collect(), words: 1 }
}

fn plans(rows: &[PlanRow]) -> Cells {
    let cells = |row: &PlanRow| {
        let whole_ms = row.scaled_ms.unwrap_or(row.median_ms);
        vec![
            row.by.to_owned(),
            or_dash(row.budget_ms.map(|budget| kept(whole_ms <= budget))),
            size(row.bytes),
            size(row.run_bytes),
            row.pages.to_string(),
            row.windows.to_string(),
            time(row.median_ms),
            time(row.max_ms),
            or_dash(row.scaled_ms.map(time)),
            or_dash(row.budget_ms.map(|budget| format!("≤ {}", time(budget)))),
        ]
    };
    let header = vec![
        "memory, found by",
        "budget kept",
        "size",
        "side by side",
        "pages",
        "windows",
        "time",
        "longest",
        "scaled to all",
        "budget",
    ];
    Cells { header, rows: rows.iter().map(cells).collect(), words: 2 }
}

fn infos(rows: &[InfoRow]) -> Cells {
    let cells = |row: &InfoRow| {
        let took_ms = row.command_ms.unwrap_or(row.library_ms);
        vec![
            row.what.to_owned(),
            kept(took_ms <= INFO_BUDGET_MS),
            size(row.ram_bytes),
            size(row.file_bytes),
            size(row.disk_bytes),
            time(row.library_ms),
            or_dash(row.command_ms.map(time)),
            or_dash(row.command_max_ms.map(time)),
        ]
    };
    let header = vec!["image of", "≤ 10 ms", "memory", "file", "blocks", "library", "command", "longest"];
    Cells { header, rows: rows.iter().map(cells).collect(), words: 2 }
}

fn cancels(rows: &[CancelRow]) -> Cells {
    let cells = |row: &CancelRow| {
        let has_time = row.count > 0;
        vec![
            row.job.name().to_owned(),
            row.backend.name().to_owned(),
            row.when.to_owned(),
            if has_time { kept(row.max_ms <= CANCEL_BUDGET_MS) } else { "too late".to_owned() },
            or_dash(row.runs_ms.map(time)),
            or_dash(row.runs_max_ms.map(time)),
            or_dash(has_time.then(|| time(row.median_ms))),
            or_dash(has_time.then(|| time(row.max_ms))),
            row.count.to_string(),
            row.too_late.to_string(),
        ]
    };
    let header = vec![
        "job",
        "memory",
        "cancelled at",
        "≤ 100 ms",
        "guest runs",
        "longest",
        "call ends",
        "longest",
        "n",
        "too late",
    ];
    Cells { header, rows: rows.iter().map(cells).collect(), words: 4 }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::{Backend, Budget, Interval, Job, Machine, Verdict};

    /// A report of a machine that nobody has.
    pub fn report() -> GrowthReport {
        let mut sizes = Vec::new();
        let mut shares = Vec::new();
        for backend in [Backend::Private, Backend::Memfd] {
            for memory_mib in [1024_u64, 4096, 16_384, 983_040] {
                let has_qemu = memory_mib <= 16_384;
                let qemu_ms = memory_mib as f64 * if backend.is_shared() { 0.7 } else { 0.08 };
                sizes.push(SizeRow {
                    memory_mib,
                    backend,
                    vmstate_ms: 22.0,
                    vmstate_min_ms: 20.0,
                    vmstate_max_ms: 31.0,
                    qemu_ms: has_qemu.then_some(qemu_ms),
                    qemu_way: has_qemu.then_some("QEMU mapped-ram"),
                    qemu_growth_bytes: has_qemu.then_some(5 << 20),
                    vmstate_growth_bytes: -1,
                    vmstate_peak_bytes: 5 << 20,
                    ratio: has_qemu.then_some(Interval {
                        median: 30.0,
                        low: 28.0,
                        high: 33.0,
                        coverage: 0.96,
                        count: 9,
                    }),
                    budget: Some(Budget { at_least: 20.0, from_mib: 16 << 10 }),
                    verdict: if has_qemu { Verdict::SmallGuest } else { Verdict::NoBudget },
                    data_bytes: 9 << 20,
                    rounds: 9,
                });
            }
            for touched_percent in [0, 1, 10, 50, 100] {
                let ms = 20.0 + 14.0 * touched_percent as f64;
                shares.push(ShareRow {
                    memory_mib: 4096,
                    backend,
                    touched_percent,
                    data_bytes: touched_percent * (4096 << 20) / 100,
                    vmstate_ms: ms,
                    vmstate_min_ms: ms * 0.9,
                    vmstate_max_ms: ms * 1.2,
                    ceiling_ms: ms * 0.8,
                    qemu_ms: 2000.0 + ms,
                    vmstate_peak_bytes: 9 << 20,
                    rounds: 6,
                });
            }
        }
        GrowthReport {
            machine: Machine {
                processors: 2,
                processor: "Abacus <II>".to_owned(),
                memory_mib: 4096,
                kernel: "6.0".to_owned(),
                qemu: "10.0.2".to_owned(),
                vmstate: "0.1.0".to_owned(),
                file_system: "ext4".to_owned(),
            },
            sizes,
            shares,
            plans: vec![PlanRow {
                bytes: 1 << 38,
                by: "private, PAGEMAP_SCAN",
                run_bytes: 4096,
                pages: 7,
                windows: 7,
                median_ms: 80.0,
                max_ms: 90.0,
                scaled_ms: Some(320.0),
                budget_ms: Some(300.0),
            }],
            infos: vec![InfoRow {
                what: "idle guest",
                ram_bytes: 960 << 30,
                file_bytes: 960 << 30,
                disk_bytes: 9 << 20,
                library_ms: 2.0,
                command_ms: Some(4.0),
                command_max_ms: Some(11.0),
            }],
            cancels: vec![CancelRow {
                job: Job::Save,
                backend: Backend::Memfd,
                when: "probe",
                runs_ms: Some(2.0),
                runs_max_ms: Some(2.5),
                median_ms: 3.0,
                max_ms: 101.0,
                count: 4,
                too_late: 1,
            }],
            notes: vec!["nothing was left out".to_owned()],
            took_s: 61.0,
        }
    }

    #[test]
    fn a_budget_is_judged_by_what_it_is_of() {
        let text = render_growth(&report(), Style::Markdown);
        for wanted in [
            "| memfd | QEMU mapped-ram | one from 16 GiB on | 16.0 GiB | 22 ms | 20 ms – 31 ms | 11.47 s | 30 | 28 – 33 | 0 B |",
            "| private | – | none is set | 960 GiB | 22 ms | 20 ms – 31 ms | – | – | – | 0 B | – |",
            "| private | 10 % | 410 MiB | 160 ms | 144 ms – 192 ms | 128 ms | 2.16 s | 9.00 MiB | 6 |",
            // The median of the whole counts, scaled, and the longest of the cancels.
            "| private, PAGEMAP_SCAN | no | 256 GiB | 4.00 KiB | 7 | 7 | 80 ms | 90 ms | 320 ms | ≤ 300 ms |",
            "| idle guest | yes | 960 GiB | 960 GiB | 9.00 MiB | 2.0 ms | 4.0 ms | 11 ms |",
            "| save | memfd | probe | no | 2.0 ms | 2.5 ms | 3.0 ms | 101 ms | 4 | 1 |",
            "* nothing was left out",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in\n{text}");
        }
        let empty = GrowthReport { sizes: Vec::new(), plans: Vec::new(), ..report() };
        let text = render_growth(&empty, Style::Text);
        assert!(!text.contains("Plans for") && text.contains("From a cancel until"), "{text}");
    }
}
