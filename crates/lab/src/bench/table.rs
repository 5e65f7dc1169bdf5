//! The report as tables for people: on a terminal, or in a document.

use std::fmt::Write;

use super::{BenchReport, Budget, Ceiling, Comparison, Job, Load, Row, Verdict, Way};

/// How a report is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Columns of a fixed width.
    Text,
    /// Tables of a document.
    Markdown,
}

/// Lays out a report.
pub fn render(report: &BenchReport, style: Style) -> String {
    let mut text = String::new();
    if style == Style::Markdown {
        text.push_str("# What was measured\n\n");
    }
    text.push_str(&machine(report));
    for job in [Job::Save, Job::Restore] {
        for load in [Load::Dirty, Load::Idle] {
            let rows: Vec<&Row> =
                report.rows.iter().filter(|row| row.job == job && row.load == load).collect();
            if rows.is_empty() {
                continue;
            }
            heading(&mut text, style, &group_title(job, load, &rows));
            text.push_str(&lay_out(&row_table(job, &rows), style));
        }
    }
    if !report.ceilings.is_empty() {
        heading(&mut text, style, "Ceilings: the same lanes without a guest");
        text.push_str(&lay_out(&ceiling_table(&report.ceilings), style));
    }
    if !report.comparisons.is_empty() {
        heading(&mut text, style, "Ratios: how many times as long the other takes");
        text.push_str(&lay_out(&comparison_table(&report.comparisons), style));
    }
    legend(&mut text, report, style);
    text
}

/// One line of what a report was measured on.
pub fn machine_line(machine: &super::Machine, took_s: f64) -> String {
    format!(
        "vmstate {} and QEMU {}; {} × {}, {:.0} GiB of memory, Linux {}, images on {}; took {took_s:.0} s.\n",
        machine.vmstate,
        machine.qemu,
        machine.processors,
        machine.processor,
        machine.memory_mib as f64 / 1024.0,
        machine.kernel,
        machine.file_system,
    )
}

fn machine(report: &BenchReport) -> String {
    let machine = &report.machine;
    format!(
        "vmstate {} and QEMU {}; guests of {} MiB; {} × {}, {:.0} GiB of memory, Linux {}, images on {}; took {:.0} s.\n",
        machine.vmstate,
        machine.qemu,
        report.memory_mib,
        machine.processors,
        machine.processor,
        machine.memory_mib as f64 / 1024.0,
        machine.kernel,
        machine.file_system,
        report.took_s,
    )
}

/// A title, as the style has it.
pub fn heading(text: &mut String, style: Style, title: &str) {
    match style {
        Style::Text => _ = write!(text, "\n{title}\n\n"),
        Style::Markdown => _ = write!(text, "\n## {title}\n\n"),
    }
}

fn group_title(job: Job, load: Load, rows: &[&Row]) -> String {
    let data = rows.iter().map(|row| row.data_bytes).max().unwrap_or(0);
    let verb = match job {
        Job::Save => "Save",
        Job::Restore => "Restore",
    };
    format!("{verb} of the {} guest: {} of data", load.name(), size(data))
}

/// A header and rows of as many cells. Of the columns the first ones hold words, the others numbers.
pub struct Cells {
    pub header: Vec<&'static str>,
    pub rows: Vec<Vec<String>>,
    pub words: usize,
}

fn row_table(job: Job, rows: &[&Row]) -> Cells {
    let mut header =
        vec!["memory", "way", "time", "min – max", "n", "GB/s", "of ceiling", "CPU vmstate", "CPU QEMU"];
    header.push("vmstate peak");
    if job == Job::Save {
        header.extend(["QEMU grew", "file", "blocks"]);
    }
    let cells = |row: &&Row| {
        let is_dirty = row.load == Load::Dirty;
        let mut cells = vec![
            row.backend.name().to_owned(),
            way_name(row),
            time(row.time_ms),
            format!("{} – {}", time(row.time_min_ms), time(row.time_max_ms)),
            row.count.to_string(),
            // Next to no data says nothing of a rate.
            if is_dirty { format!("{:.2}", row.rate_bytes_per_s / 1e9) } else { "–".to_owned() },
            row.of_ceiling.map_or("–".to_owned(), |part| format!("{:.0} %", part * 100.0)),
            format!("{:.2} s", row.cpu_vmstate_s),
            format!("{:.2} s", row.cpu_qemu_s),
            if row.way == Way::Vmstate { size(row.vmstate_peak_bytes) } else { "–".to_owned() },
        ];
        if job == Job::Save {
            let growth = u64::try_from(row.qemu_growth_bytes).unwrap_or(0);
            cells.extend([size(growth), size(row.file_bytes), size(row.disk_bytes)]);
        }
        cells
    };
    Cells { header, rows: rows.iter().map(cells).collect(), words: 2 }
}

fn way_name(row: &Row) -> String {
    match row.via {
        Some(via) => format!("{} (via {via})", row.way.name()),
        None => row.way.name().to_owned(),
    }
}

fn ceiling_table(ceilings: &[Ceiling]) -> Cells {
    let cells = |ceiling: &Ceiling| {
        vec![
            ceiling.job.name().to_owned(),
            ceiling.backend.name().to_owned(),
            ceiling.what.to_owned(),
            time(ceiling.time_ms),
            format!("{:.2}", ceiling.rate_bytes_per_s / 1e9),
        ]
    };
    let header = vec!["beside", "memory", "what", "time", "GB/s"];
    Cells { header, rows: ceilings.iter().map(cells).collect(), words: 3 }
}

fn comparison_table(comparisons: &[Comparison]) -> Cells {
    let cells = |comparison: &Comparison| {
        let ratio = &comparison.ratio;
        let against = match comparison.way {
            Some(way) => way.name().to_owned(),
            None => comparison.rival.name().to_owned(),
        };
        vec![
            comparison.job.name().to_owned(),
            comparison.load.name().to_owned(),
            comparison.backend.name().to_owned(),
            against,
            verdict(comparison),
            factor(ratio.median),
            format!("{} – {}", factor(ratio.low), factor(ratio.high)),
            comparison.budget.map_or("–".to_owned(), |budget| format!("≥ {}", factor(budget.at_least))),
        ]
    };
    let header = vec!["job", "guest", "memory", "against", "budget kept", "ratio", "interval", "budget"];
    Cells { header, rows: comparisons.iter().map(cells).collect(), words: 5 }
}

fn verdict(comparison: &Comparison) -> String {
    of_budget(comparison.verdict, comparison.budget)
}

/// A verdict in words.
pub fn of_budget(verdict: Verdict, budget: Option<Budget>) -> String {
    let from_gib = budget.map_or(0, |budget| budget.from_mib >> 10);
    match verdict {
        Verdict::Met => "yes".to_owned(),
        Verdict::Missed => "no".to_owned(),
        Verdict::TooFewRounds => "too few rounds".to_owned(),
        Verdict::SmallGuest => format!("one from {from_gib} GiB on"),
        Verdict::NoBudget => "none is set".to_owned(),
    }
}

pub fn lay_out(cells: &Cells, style: Style) -> String {
    let mut text = String::new();
    let header: Vec<String> = cells.header.iter().map(|&name| name.to_owned()).collect();
    match style {
        Style::Markdown => {
            let line = |text: &mut String, row: &[String]| _ = writeln!(text, "| {} |", row.join(" | "));
            line(&mut text, &header);
            let rule = |i| if i < cells.words { "---" } else { "---:" };
            let rules: Vec<String> = (0..header.len()).map(|i| rule(i).to_owned()).collect();
            line(&mut text, &rules);
            for row in &cells.rows {
                line(&mut text, row);
            }
        }
        Style::Text => {
            let all = || std::iter::once(&header).chain(&cells.rows);
            let width = |i: usize| all().map(|row| row[i].chars().count()).max().unwrap_or(0);
            let widths: Vec<usize> = (0..header.len()).map(width).collect();
            for row in all() {
                let mut line = String::new();
                for (i, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                    match i < cells.words {
                        true => _ = write!(line, "  {cell:<width$}"),
                        false => _ = write!(line, "  {cell:>width$}"),
                    }
                }
                text.push_str(line.trim_end());
                text.push('\n');
            }
        }
    }
    text
}

fn legend(text: &mut String, report: &BenchReport, style: Style) {
    let bullet = match style {
        Style::Text => "  ",
        Style::Markdown => "* ",
    };
    let mut lines = vec![
        "Every save ends with an image that is durable under its name: QEMU does not see to that, so what it \
         wrote is synced after it, and that time is counted."
            .to_owned(),
        "A save is written into a new file; a restore reads an image that is not in the page cache, into a QEMU \
         that waits already, until the guest runs."
            .to_owned(),
        "Multifd is the only way of QEMU's past the page cache and over several channels, and only into mapped-ram: \
         its stream has neither, and mapped-ram past the page cache takes one channel at the least."
            .to_owned(),
        "QEMU's time begins at a monitor that is connected and set up; vmstate's is the whole call.".to_owned(),
        measured(report),
        "QEMU grew: how much memory the save made QEMU allocate. Its scan for zeros fills the holes of shared \
         memory, so each save of an idle guest had a QEMU of its own."
            .to_owned(),
    ];
    lines.extend(report.notes.iter().cloned());
    text.push('\n');
    for line in lines {
        _ = writeln!(text, "{bullet}{line}");
    }
}

/// How the numbers came about, with the interval that so many rounds allow.
fn measured(report: &BenchReport) -> String {
    let least = report.rows.iter().map(|row| row.count).min().unwrap_or(0);
    let times = format!("A time is the median of {least} measurements or more");
    let fewest = report.comparisons.iter().map(|comparison| comparison.ratio).min_by_key(|ratio| ratio.count);
    match fewest {
        None => format!("{times}."),
        Some(ratio) => format!(
            "{times}; a ratio is the median of those of {} rounds or more (A B B A), the interval holds the true one \
             with a probability of {:.0} %, and a budget is kept when the interval reaches it.",
            ratio.count,
            ratio.coverage * 100.0
        ),
    }
}

/// A time in milliseconds as people read it.
pub fn time(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.2} s", ms / 1000.0),
    }
}

/// A length as people read it, in three digits.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A length of whole units, as short as it can be.
pub fn short_size(bytes: u64) -> String {
    match bytes >> 20 {
        mib if mib >= 1024 && mib % 1024 == 0 => format!("{} GiB", mib >> 10),
        mib => format!("{mib} MiB"),
    }
}

/// A ratio as people read it, in three digits.
pub fn factor(ratio: f64) -> String {
    match ratio {
        ratio if ratio >= 20.0 => format!("{ratio:.0}"),
        ratio if ratio >= 10.0 => format!("{ratio:.1}"),
        ratio => format!("{ratio:.2}"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::{Backend, Interval, Machine, Rival};

    /// A report of a machine that nobody has.
    pub fn report() -> BenchReport {
        let row = |job, load, way, backend, time_ms: f64| Row {
            job,
            backend,
            load,
            way,
            via: (way == Way::Vmstate).then_some("direct"),
            count: 3,
            time_ms,
            time_min_ms: time_ms * 0.9,
            time_max_ms: time_ms * 1.1,
            time_without_sync_ms: None,
            data_bytes: if load == Load::Dirty { 1 << 30 } else { 9 << 20 },
            file_bytes: 1 << 30,
            disk_bytes: 9 << 20,
            rate_bytes_per_s: 1e12 / time_ms,
            cpu_vmstate_s: 0.25,
            cpu_qemu_s: 1.5,
            qemu_growth_bytes: if way == Way::Vmstate { -4096 } else { 5 << 20 },
            vmstate_peak_bytes: 7 << 20,
            of_ceiling: (load == Load::Dirty).then_some(0.5),
        };
        let mut rows = Vec::new();
        for (job, load) in [
            (Job::Save, Load::Dirty),
            (Job::Save, Load::Idle),
            (Job::Restore, Load::Dirty),
            (Job::Restore, Load::Idle),
        ] {
            for (i, way) in Way::ALL.into_iter().enumerate() {
                for (j, backend) in Backend::USUAL.into_iter().enumerate() {
                    let base = if load == Load::Dirty { 400.0 } else { 9.0 };
                    rows.push(row(job, load, way, backend, base * (7 - i + j) as f64));
                }
            }
        }
        let ratio = Interval { median: 1.7, low: 1.6, high: 1.8, coverage: 0.96, count: 9 };
        BenchReport {
            machine: Machine {
                processors: 2,
                processor: "Abacus <II>".to_owned(),
                memory_mib: 4096,
                kernel: "6.0".to_owned(),
                qemu: "10.0.2".to_owned(),
                vmstate: "0.1.0".to_owned(),
                file_system: "ext4".to_owned(),
            },
            memory_mib: 1024,
            rounds: 9,
            repeats: 3,
            rows,
            ceilings: vec![Ceiling {
                job: Job::Save,
                backend: Backend::Memfd,
                what: "write a new file",
                bytes: 1 << 30,
                time_ms: 300.0,
                count: 9,
                rate_bytes_per_s: 3.5e9,
            }],
            comparisons: vec![Comparison {
                job: Job::Save,
                backend: Backend::Memfd,
                load: Load::Dirty,
                rival: Rival::QemuBest,
                way: Some(Way::QemuDirect),
                ratio,
                budget: Some(Budget { at_least: 1.5, from_mib: 0 }),
                verdict: Verdict::Met,
            }],
            notes: vec!["nothing was left out".to_owned()],
            took_s: 61.0,
        }
    }

    #[test]
    fn columns_of_text_stand_below_their_headers() {
        let text = render(&report(), Style::Text);
        let lines: Vec<&str> = text.lines().collect();
        let at =
            lines.iter().position(|line| line.trim() == "Save of the dirty guest: 1.00 GiB of data").unwrap();
        let end =
            |line: &str, word: &str| line.split_once(word).unwrap().0.chars().count() + word.chars().count();
        let header = lines[at + 2];
        assert_eq!(end(header, "  time"), end(lines[at + 3], "  2.80 s"));
        assert_eq!(end(header, "of ceiling"), end(lines[at + 3], "50 %"));
        assert_eq!(end(header, "blocks"), end(lines[at + 3], "9.00 MiB"));
        assert!(text.contains("  nothing was left out\n"), "{text}");
        assert!(text.contains("the true one with a probability of 96 %"), "{text}");
        assert!(lines.iter().all(|line| line.trim_end() == *line), "{text}");
    }

    #[test]
    fn every_line_of_a_documents_table_has_as_many_cells() {
        let text = render(&report(), Style::Markdown);
        let mut cells = 0;
        for line in text.lines() {
            if line.starts_with('|') {
                assert!(cells == 0 || line.matches('|').count() == cells, "{line}");
                cells = line.matches('|').count();
            } else {
                cells = 0;
            }
        }
        for wanted in [
            "## Restore of the idle guest: 9.00 MiB of data",
            "| save | dirty | memfd | QEMU mapped-ram, 8 channels, direct I/O | yes | 1.70 | 1.60 – 1.80 | ≥ 1.50 |",
            "| save | memfd | write a new file | 300 ms | 3.50 |",
            "| memfd | vmstate (via direct) | 1.20 s | 1.08 s – 1.32 s | 3 | 0.83 | 50 % | 0.25 s | 1.50 s | 7.00 MiB | 0 B | 1.00 GiB | 9.00 MiB |",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in\n{text}");
        }
    }

    #[test]
    fn a_verdict_says_why_there_is_none() {
        let comparison = report().comparisons[0].clone();
        for (verdict, from_mib, expected) in [
            (Verdict::Met, 0, "yes"),
            (Verdict::Missed, 0, "no"),
            (Verdict::TooFewRounds, 0, "too few rounds"),
            (Verdict::SmallGuest, 8192, "one from 8 GiB on"),
            (Verdict::NoBudget, 0, "none is set"),
        ] {
            let budget = Some(Budget { at_least: 200.0, from_mib });
            assert_eq!(super::verdict(&Comparison { verdict, budget, ..comparison.clone() }), expected);
        }
    }

    #[test]
    fn numbers_have_three_digits() {
        for (bytes, text) in
            [(0, "0 B"), (999, "999 B"), (4096, "4.00 KiB"), (45 << 20, "45.0 MiB"), (1 << 30, "1.00 GiB")]
        {
            assert_eq!(size(bytes), text);
        }
        for (ms, text) in [(0.25, "0.2 ms"), (15.4, "15 ms"), (2500.0, "2.50 s")] {
            assert_eq!(time(ms), text);
        }
        for (ratio, text) in [(0.954, "0.95"), (12.34, "12.3"), (234.5, "234")] {
            assert_eq!(factor(ratio), text);
        }
    }
}
