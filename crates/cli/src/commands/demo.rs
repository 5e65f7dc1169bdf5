//! `vmstate demo`.

use lab::demo::{DemoReport, Narrator, Row};
use serde_json::json;

use super::Outcome;
use crate::args::Demo;
use crate::output::{line, ms, print_json, say, time};
use crate::signals::cancel_on_signals;

/// Tells on stdout, or on stderr where stdout is for JSON.
struct Teller {
    json: bool,
}

impl Narrator for Teller {
    fn tell(&self, sentence: &str) {
        if self.json { say(sentence) } else { line(sentence) }
    }
}

/// Shows the main job on a real guest.
pub fn run(args: &Demo) -> vmstate::Result<Outcome> {
    let cancel = cancel_on_signals()?;
    let directory = match &args.directory {
        Some(directory) => directory.clone(),
        // Not the directory for temporary files: that one often is in memory.
        None => std::env::current_dir()
            .map_err(|error| vmstate::Error::io("there is no current directory", error))?,
    };
    let report = lab::demo::demo(args.memory, &directory, &cancel, &Teller { json: args.json })?;
    if args.json {
        print_json(&as_json(&report));
    } else {
        table(args.memory, &report);
    }
    Ok(Outcome::Done)
}

fn table(memory_mib: u64, report: &DemoReport) {
    line("");
    line(format!("  {:<28} {:>16} {:>10} {:>8}", "save", "QEMU's own best", "vmstate", "ratio"));
    for row in &report.rows {
        let guest = format!("{memory_mib} MiB {}", row.guest);
        line(format!("  {guest:<28} {:>16} {:>10} {:>7.1}×", time(row.qemu), time(row.vmstate), row.ratio()));
    }
    line("");
    line("QEMU's own best: mapped-ram, multifd, direct I/O. Whole saves, durable on disk when they end;");
    line(format!(
        "medians of {} saves each, in turn, of the busy guest; one save each of the idle one.",
        saves(report)
    ));
}

fn saves(report: &DemoReport) -> usize {
    report.rows.iter().map(|row| row.saves).max().unwrap_or(0)
}

fn as_json(report: &DemoReport) -> serde_json::Value {
    let row = |row: &Row| {
        json!({
            "guest": row.guest,
            "qemu_ms": ms(row.qemu),
            "vmstate_ms": ms(row.vmstate),
            "ratio": (row.ratio() * 100.0).round() / 100.0,
            "saves": row.saves,
        })
    };
    json!({
        "round_saved": report.round_saved,
        "pages_verified": report.pages_verified,
        "restored_ms": ms(report.restored),
        "round_reached": report.round_reached,
        "rows": report.rows.iter().map(row).collect::<Vec<_>>(),
    })
}
