//! `vmstate restore`.

use std::path::Path;

use serde_json::{Map, json};
use vmstate::{
    DomainRestoreSettings, Error, FaultReport, FaultTimes, Kind, Mode, RestoreReport, RestoreSettings,
    TakeUpSettings, Target, Via,
};

use super::Outcome;
use super::background::{self, Background};
use crate::args::{ModeArg, ReportArgs, Restore, RestoreViaArg};
use crate::monitor::DomainRestoreArgs;
use crate::output::{Reporter, line, ms, print_json, say, size, time};
use crate::progress::Told;
use crate::signals::cancel_on_signals;

/// Lets libvirt restore a domain.
fn by_libvirt(args: Restore) -> vmstate::Result<Outcome> {
    let read = |path: std::path::PathBuf| {
        std::fs::read_to_string(&path)
            .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))
    };
    let settings = DomainRestoreSettings {
        uri: args.domain_args.connect.uri()?,
        image: args.image,
        xml: args.domain_args.xml.map(read).transpose()?,
        record: args.record.choice(),
        direct_io: args.direct_io.choice(),
        channels: args.channels,
        reset_nvram: args.domain_args.reset_nvram,
    };
    let cancel = cancel_on_signals()?;
    let told = Told::start(Reporter { verbose: args.report.verbose }, args.progress.progress)?;
    let report = vmstate::restore_domain(&settings, &cancel, &told)?;
    drop(told);
    if args.report.json {
        print_json(&json!({
            "mode": "eager",
            "via": "libvirt",
            "domain": report.domain,
            "direct_io": report.direct_io,
            "read_bytes": report.read_bytes,
            "resident_ms": ms(report.duration),
            "duration_ms": ms(report.duration),
            // libvirt does not tell.
            "qemu_pid": null,
            "qmp": null,
            "first_instruction_ms": null,
            "guest_ready_ms": null,
        }));
    } else {
        line(format!(
            "restored domain {} from {} by {} in {}",
            report.domain,
            settings.image.display(),
            settings.uri,
            time(report.duration)
        ));
    }
    Ok(Outcome::Done)
}

/// Restores a guest.
pub fn run(args: Restore) -> vmstate::Result<Outcome> {
    if args.domain {
        return by_libvirt(args);
    }
    let DomainRestoreArgs { xml, reset_nvram, .. } = &args.domain_args;
    if xml.is_some() || *reset_nvram {
        // The parser does not ask for --domain where it would contradict what else is given.
        let clause = "--xml and --reset-nvram are libvirt's, which does not restore this guest";
        return Err(Error::new(Kind::Misuse, clause).hint("give --domain, or leave them out"));
    }
    if args.resume {
        return take_up(args);
    }
    if args.background.is_some() && args.background_server.is_none() {
        return background::start();
    }
    let target = match (args.qmp, args.qemu.is_empty()) {
        (Some(address), true) => Target::Waiting(address),
        (None, false) => {
            Target::Launch { command: args.qemu, log: args.qemu_log, foreground: args.foreground }
        }
        // With VMSTATE_QMP in the environment both may be there; the command line is the plainer wish.
        (Some(_), false) if std::env::var_os("VMSTATE_QMP").is_some() => {
            Target::Launch { command: args.qemu, log: args.qemu_log, foreground: args.foreground }
        }
        (Some(_), false) => {
            return Err(Error::new(Kind::Misuse, "both --qmp and a QEMU to start")
                .hint("give the monitor of a QEMU that waits, or the command line of one to start"));
        }
        (None, true) => {
            return Err(Error::new(Kind::Misuse, "no QEMU to restore into").hint(
                "give --qmp of one that waits with -incoming defer, or -- qemu-system-x86_64 ... to start one",
            ));
        }
    };
    let settings = RestoreSettings {
        image: args.image,
        offset: args.offset,
        target,
        mode: match args.mode {
            ModeArg::Auto => Mode::Auto,
            ModeArg::Eager => Mode::Eager,
            ModeArg::Map => Mode::Map,
            ModeArg::Lazy => Mode::Lazy,
        },
        via: match args.via {
            RestoreViaArg::Auto => Via::Auto,
            RestoreViaArg::Direct => Via::Direct,
            RestoreViaArg::Qemu => Via::Qemu,
            RestoreViaArg::Socket => Via::Socket,
        },
        channels: args.channels,
        direct_io: args.direct_io.choice(),
        rate_max: args.max_bandwidth,
        record: args.record.choice(),
        force: args.force,
        ready: args.ready_serial,
        wait: args.wait,
    };
    let cancel = cancel_on_signals()?;
    let reporter = Reporter { verbose: args.report.verbose };
    let told = match args.background_server {
        Some(columns) => Told::start_on(reporter, args.progress.progress, columns)?,
        None => Told::start(reporter, args.progress.progress)?,
    };
    let left_behind = match args.background {
        Some(log) => Some(Background::new(log.as_deref(), &settings.image, args.report, &cancel, &told)?),
        None => None,
    };
    let restored = match &left_behind {
        Some(background) => vmstate::restore(&settings, &cancel, &background.telling(&told)),
        None => vmstate::restore(&settings, &cancel, &told),
    };
    let mut report = restored?;
    drop(told);
    if left_behind.is_some_and(|background| background.has_told()) {
        return Ok(Outcome::Done);
    }
    tell(&report, &settings.image, &args.report, None);
    match report.foreground.take() {
        Some(mut child) => {
            let status = child.wait().map_err(|error| Error::io("cannot wait for QEMU", error))?;
            Ok(Outcome::Exit(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(2)))
        }
        None => Ok(Outcome::Done),
    }
}

/// Says what a restore did. `server` is the process that has more to do, where there is one.
pub fn tell(report: &RestoreReport, image: &Path, wanted: &ReportArgs, server: Option<u32>) {
    if let (true, Some(faults)) = (wanted.verbose, &report.faults) {
        say_faults(faults);
    }
    if wanted.verbose {
        for (name, took) in &report.phases.0 {
            say(format!("  {name:<13} {:>9}", time(*took)));
        }
    }
    if wanted.json {
        print_json(&as_json(report, server));
    } else {
        let pid = report.qemu_pid.map_or_else(String::new, |pid| format!(" in process {pid}"));
        let (image, state) = (image.display(), &report.run_state);
        let (took, read) = (time(report.first_instruction), size(report.read_bytes));
        line(match report.mode {
            Mode::Map => format!("restored {image} mapped: {state}{pid} after {took}, {read} read so far"),
            _ => format!(
                "restored {image} via {}: {state}{pid} after {took}, {read} of data",
                report.via.name()
            ),
        });
        if let (Mode::Map, Some(resident)) = (report.mode, report.resident) {
            line(format!("all of it was in the page cache after {}", time(resident)));
        }
        if let Some(ready) = report.guest_ready {
            line(format!("its console said that it is ready after {}", time(ready)));
        }
        if report.mode == Mode::Map {
            say(
                "note: the image is the guest's memory now: rename it or remove it, but do not write into it",
            );
        }
        match &report.qmp {
            Some(address) => line(format!("its monitor is at {address}")),
            None if report.foreground.is_none() => {
                say("note: no -qmp among QEMU's arguments, so this guest cannot be saved again");
            }
            None => {}
        }
        if let Some(pid) = server {
            line(format!("process {pid} gives it the rest of its memory"));
        }
    }
}

fn as_json(report: &RestoreReport, server: Option<u32>) -> serde_json::Value {
    let phases: Map<_, _> =
        report.phases.0.iter().map(|(name, took)| ((*name).replace(' ', "_") + "_ms", ms(*took))).collect();
    json!({
        "mode": report.mode.name(),
        "mode_reason": report.mode_reason,
        "via": report.via.name(),
        "reason": report.reason,
        "qemu_pid": report.qemu_pid,
        "server_pid": server,
        "qmp": report.qmp,
        "direct_io": report.direct_io,
        "channels": report.channels,
        "run_state": report.run_state,
        "first_instruction_ms": ms(report.first_instruction),
        "first_instruction_from_ready_ms": ms(report.first_instruction_from_ready),
        "guest_ready_ms": report.guest_ready.map(ms),
        "resident_ms": report.resident.map(ms),
        "read_bytes": report.read_bytes,
        "faults": report.faults.map(faults_as_json),
        "phases": phases,
    })
}

fn faults_as_json(faults: FaultReport) -> serde_json::Value {
    json!({
        "requests": faults.requests,
        "served": faults.served.count,
        "median_us": faults.served.median.map(micros),
        "p99_us": faults.served.p99.map(micros),
        "beside_background": times_as_json(faults.beside_background),
        "without_background": times_as_json(faults.without_background),
        "preempt": faults.preempt,
    })
}

fn times_as_json(times: FaultTimes) -> serde_json::Value {
    json!({ "served": times.count, "median_us": times.median.map(micros), "p99_us": times.p99.map(micros) })
}

fn micros(duration: std::time::Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

/// What `-v` says of a guest's own requests.
fn say_faults(faults: &FaultReport) {
    say(format!(
        "  {} requests for pages, {} of them served {}",
        faults.requests,
        faults.served.count,
        if faults.preempt {
            "on a connection of their own"
        } else {
            "on the connection that all pages share"
        },
    ));
    for (when, times) in
        [("beside the background", faults.beside_background), ("without it", faults.without_background)]
    {
        if let FaultTimes { count, median: Some(median), p99: Some(p99) } = times {
            let (median, p99) = (micros(median), micros(p99));
            say(format!("  {count} {when}: half within {median} µs, 99 of 100 within {p99} µs"));
        }
    }
}

/// Takes a lazy restore up again.
fn take_up(args: Restore) -> vmstate::Result<Outcome> {
    let qmp = args.qmp.ok_or_else(|| {
        Error::new(Kind::Misuse, "--resume without --qmp").hint("give the monitor of the QEMU that waits")
    })?;
    let settings = TakeUpSettings {
        image: args.image,
        offset: args.offset,
        qmp,
        force: args.force,
        rate_max: args.max_bandwidth,
    };
    let cancel = cancel_on_signals()?;
    let told = Told::start(Reporter { verbose: args.report.verbose }, args.progress.progress)?;
    let report = vmstate::take_up(&settings, &cancel, &told)?;
    drop(told);
    if args.report.verbose {
        say_faults(&report.faults);
    }
    if args.report.json {
        // What a restore tells: the guest could run, and may have been ready, before this began.
        print_json(&json!({
            "mode": Mode::Lazy.name(),
            "via": Via::Socket.name(),
            "qemu_pid": report.qemu_pid,
            "qmp": settings.qmp.to_string(),
            "run_state": report.run_state,
            "first_instruction_ms": null,
            "first_instruction_from_ready_ms": null,
            "guest_ready_ms": null,
            "arrived_bytes": report.arrived_bytes,
            "read_bytes": report.read_bytes,
            "resident_ms": ms(report.resident),
            "faults": faults_as_json(report.faults),
        }));
    } else {
        line(format!(
            "gave the guest the rest of its memory from {}: {} after {}, {} of data beside {} that it had",
            settings.image.display(),
            report.run_state,
            time(report.resident),
            size(report.read_bytes),
            size(report.arrived_bytes),
        ));
    }
    Ok(Outcome::Done)
}
