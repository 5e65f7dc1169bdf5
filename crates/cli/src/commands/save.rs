//! `vmstate save`.

use serde_json::{Map, json};
use vmstate::{SaveReport, SaveSettings, Then, Via};

use super::Outcome;
use crate::args::{FormatArg, Save, ThenArg, ViaArg};
use crate::output::{Reporter, line, ms, print_json, say, size, time};
use crate::signals::cancel_on_signals;

/// Saves a guest.
pub fn run(args: Save) -> vmstate::Result<Outcome> {
    let FormatArg::MappedRam = args.format;
    let settings = SaveSettings {
        via: match args.via {
            ViaArg::Auto => Via::Auto,
            ViaArg::Direct => Via::Direct,
            ViaArg::Qemu => Via::Qemu,
        },
        channels: args.channels,
        direct_io: args.direct_io.choice(),
        then: match args.then {
            ThenArg::Pause => Then::Pause,
            ThenArg::Resume => Then::Resume,
            ThenArg::Quit => Then::Quit,
        },
        record: args.record.choice(),
        overwrite: args.overwrite,
        sync: !args.no_sync,
        mode: args.mode,
        pid: args.pid,
        ..SaveSettings::new(args.qmp, args.image)
    };
    let cancel = cancel_on_signals()?;
    let report = vmstate::save(&settings, &cancel, &Reporter { verbose: args.report.verbose })?;
    if args.report.verbose {
        phases(&report);
    }
    if args.report.json {
        print_json(&as_json(&report));
    } else {
        line(format!(
            "saved {} via {} in {}: {} of data, {} zero, {} never touched; downtime {}, {}/s",
            settings.image.display(),
            report.via.name(),
            time(report.duration),
            size(report.data_bytes),
            size(report.zero_bytes),
            size(report.hole_bytes),
            time(report.downtime),
            size(report.rate_bytes_per_s()),
        ));
        if let Some(reason) = &report.reason {
            say(format!("QEMU carried the RAM: {reason}"));
        }
    }
    Ok(Outcome::Done)
}

fn phases(report: &SaveReport) {
    for (name, took) in &report.phases.0 {
        say(format!("  {name:<13} {:>9}", time(*took)));
    }
}

fn as_json(report: &SaveReport) -> serde_json::Value {
    let phases: Map<_, _> =
        report.phases.0.iter().map(|(name, took)| ((*name).replace(' ', "_") + "_ms", ms(*took))).collect();
    json!({
        "via": report.via.name(),
        "reason": report.reason,
        "direct_io": report.direct_io,
        "channels": report.channels,
        "run_state": report.run_state,
        "data_bytes": report.data_bytes,
        "zero_bytes": report.zero_bytes,
        "hole_bytes": report.hole_bytes,
        "duration_ms": ms(report.duration),
        "downtime_ms": ms(report.downtime),
        "rate_bytes_per_s": report.rate_bytes_per_s(),
        "peak_memory_bytes": report.peak_memory_bytes,
        "phases": phases,
    })
}
