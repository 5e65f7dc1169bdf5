//! `vmstate resume`.

use serde_json::json;
use vmstate::{ResumeReport, ResumeSettings};

use super::Outcome;
use crate::args::Resume;
use crate::output::{Reporter, line, print_json};
use crate::signals::cancel_on_signals;

/// Brings back a guest that a killed save left paused.
pub fn run(args: Resume) -> vmstate::Result<Outcome> {
    let settings = ResumeSettings { qmp: args.monitor.address()?, force: args.force };
    let cancel = cancel_on_signals()?;
    let report = vmstate::resume(&settings, &cancel, &Reporter { verbose: args.report.verbose })?;
    if args.report.json {
        print_json(&as_json(&report));
    } else {
        line(in_words(&report));
    }
    Ok(Outcome::Done)
}

fn in_words(report: &ResumeReport) -> String {
    if !report.had_leftovers() {
        return format!("nothing to do: no killed save has left anything; the guest is {}", report.run_state);
    }
    let cleared = &report.cleared;
    let mut done = Vec::new();
    if cleared.migration_cancelled {
        done.push("its migration cancelled".to_owned());
    }
    match cleared.descriptors {
        0 => {}
        1 => done.push("a descriptor taken back".to_owned()),
        n => done.push(format!("{n} descriptors taken back")),
    }
    let settings: Vec<_> =
        cleared.capabilities.iter().chain(&cleared.parameters).map(String::as_str).collect();
    if !settings.is_empty() {
        done.push(format!("settings put back ({})", settings.join(", ")));
    }
    if report.resumed {
        done.push("the guest resumed".to_owned());
    }
    if done.is_empty() {
        done.push("its note removed".to_owned());
    }
    let saver = cleared.saver_pid.map_or_else(|| "a process".to_owned(), |pid| format!("process {pid}"));
    format!("{saver} was killed while it saved: {}; the guest is {}", done.join(", "), report.run_state)
}

fn as_json(report: &ResumeReport) -> serde_json::Value {
    let cleared = &report.cleared;
    json!({
        "had_leftovers": report.had_leftovers(),
        "resumed": report.resumed,
        "run_state": report.run_state,
        "saver_pid": cleared.saver_pid,
        "migration_cancelled": cleared.migration_cancelled,
        "descriptors": cleared.descriptors,
        "capabilities": cleared.capabilities,
        "parameters": cleared.parameters,
    })
}
