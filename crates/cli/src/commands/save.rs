//! `vmstate save`.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, json};
use vmstate::libvirt::PayloadFormat;
use vmstate::net::QmpAddress;
use vmstate::{
    DeviceStateBy, DirectIo, Error, Kind, ManagedSaveSettings, Rehearsal, SaveFormat, SaveReport,
    SaveSettings, Then, Via,
};

use super::Outcome;
use crate::args::{DeviceStateArg, FormatArg, Save, ThenArg, ViaArg};
use crate::output::{Reporter, leave_stdout, line, ms, print_json, say, size, time};
use crate::progress::Told;
use crate::signals::cancel_on_signals;

/// Saves a guest.
pub fn run(args: Save) -> vmstate::Result<Outcome> {
    if args.takes_stdout() {
        leave_stdout();
    }
    if args.via == ViaArg::Libvirt {
        return by_libvirt(args);
    }
    let then = then_of(&args);
    let domain_xml = args.xml.map(read_xml).transpose()?;
    let cancel = cancel_on_signals()?;
    let monitor = args.monitor.address()?;
    let image = match (args.image, &monitor) {
        (Some(image), _) => image,
        (None, QmpAddress::Domain { uri, name }) => vmstate::managed_image(uri, name, &cancel)?,
        (None, _) => return Err(Error::new(Kind::Misuse, "no image is named")),
    };
    let settings = SaveSettings {
        via: match args.via {
            ViaArg::Auto => Via::Auto,
            ViaArg::Direct => Via::Direct,
            ViaArg::Qemu => Via::Qemu,
            ViaArg::Libvirt => unreachable!("libvirt's own save was made above"),
        },
        device_state: match args.device_state {
            DeviceStateArg::Auto => DeviceStateBy::Auto,
            DeviceStateArg::Command => DeviceStateBy::Command,
            DeviceStateArg::Migration => DeviceStateBy::Migration,
        },
        format: args.format.map(|format| match format {
            FormatArg::MappedRam => SaveFormat::MappedRam,
            FormatArg::Stream => SaveFormat::Stream,
            FormatArg::LibvirtRaw => SaveFormat::Libvirt(PayloadFormat::Raw),
            FormatArg::LibvirtGzip => SaveFormat::Libvirt(PayloadFormat::Gzip),
            FormatArg::LibvirtBzip2 => SaveFormat::Libvirt(PayloadFormat::Bzip2),
            FormatArg::LibvirtXz => SaveFormat::Libvirt(PayloadFormat::Xz),
            FormatArg::LibvirtLzop => SaveFormat::Libvirt(PayloadFormat::Lzop),
            FormatArg::LibvirtZstd => SaveFormat::Libvirt(PayloadFormat::Zstd),
            FormatArg::LibvirtSparse => SaveFormat::Libvirt(PayloadFormat::Sparse),
        }),
        offset: args.offset,
        channels: args.channels,
        direct_io: args.direct_io.choice(),
        rate_max: args.max_bandwidth,
        then,
        record: args.record.choice(),
        overwrite: args.overwrite,
        sync: !args.no_sync,
        mode: args.mode,
        owner: args.owner.unwrap_or_default(),
        timeout: args.timeout.map(Duration::from_secs),
        pid: args.pid,
        domain_xml,
        ..SaveSettings::new(monitor, image)
    };
    let reporter = Reporter { verbose: args.report.verbose };
    let told = Told::start(reporter, args.progress.progress)?;
    if args.dry_run {
        let rehearsal = vmstate::rehearse(&settings, &cancel, &told)?;
        drop(told);
        match args.report.json {
            true => print_json(&rehearsal_as_json(&rehearsal)),
            false => tell(&settings, &rehearsal),
        }
        return Ok(if rehearsal.fits { Outcome::Done } else { Outcome::No });
    }
    let report = vmstate::save(&settings, &cancel, &told)?;
    drop(told);
    if args.report.verbose {
        phases(&report);
    }
    if args.report.json {
        print_json(&as_json(&report));
    } else {
        // libvirt's configuration may have chosen it.
        let format = match settings.qmp {
            QmpAddress::Domain { .. } => format!(" as {}", report.format.name()),
            _ => String::new(),
        };
        line(format!(
            "saved {}{format} via {} in {}: {} of data, {} zero, {} never touched; downtime {}, {}/s",
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
    // Whoever waits for the answer has it, and whoever waits for the end finds the replaced image's room free.
    drop(report);
    Ok(Outcome::Done)
}

/// What becomes of the guest.
fn then_of(args: &Save) -> Then {
    match args.then {
        Some(ThenArg::Pause) => Then::Pause,
        Some(ThenArg::Resume) => Then::Resume,
        Some(ThenArg::Quit) => Then::Quit,
        // As virsh does.
        None if args.monitor.domain.is_some() => Then::Quit,
        None => Then::Pause,
    }
}

fn read_xml(path: PathBuf) -> vmstate::Result<String> {
    std::fs::read_to_string(&path)
        .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))
}

/// Lets libvirt save a domain to where it looks when it starts it the next time.
fn by_libvirt(args: Save) -> vmstate::Result<Outcome> {
    let misuse = |clause: &str, hint: &str| Err(Error::new(Kind::Misuse, clause).hint(hint.to_owned()));
    if !args.managed {
        return misuse(
            "only a managed save is made via libvirt",
            "give --managed instead of an image, or leave --via out",
        );
    }
    let not_libvirts = [
        ("--format", args.format.is_some()),
        ("--channels", args.channels.is_some() || args.parallel),
        ("--max-bandwidth", args.max_bandwidth.is_some()),
        ("--then", !matches!(args.then, None | Some(ThenArg::Quit))),
        ("--offset", args.offset.is_some()),
        ("--no-sync", args.no_sync),
        ("--owner", args.owner.is_some()),
        ("--dry-run", args.dry_run),
        ("--timeout", args.timeout.is_some()),
        ("--overwrite", args.overwrite),
        ("--mode", args.mode != 0o600),
        ("--pid", args.pid.is_some()),
        ("--device-state", !matches!(args.device_state, DeviceStateArg::Auto)),
    ];
    if let Some((name, _)) = not_libvirts.iter().find(|(_, is_given)| *is_given) {
        return misuse(
            &format!("libvirt's managed save knows no {name}"),
            "leave it out, or leave --via libvirt out; qemu.conf names the format of libvirt's saves",
        );
    }
    let QmpAddress::Domain { uri, name } = args.monitor.address()? else {
        return misuse("a managed save is one of a domain", "name it by --domain");
    };
    let settings = ManagedSaveSettings {
        uri,
        name,
        record: args.record.choice(),
        bypass_cache: args.direct_io.choice() == DirectIo::On,
    };
    let cancel = cancel_on_signals()?;
    let told = Told::start(Reporter { verbose: args.report.verbose }, args.progress.progress)?;
    let report = vmstate::save_managed(&settings, &cancel, &told)?;
    drop(told);
    if args.report.json {
        print_json(&json!({
            "via": "libvirt",
            "domain": report.domain,
            "image": report.image,
            "duration_ms": ms(report.duration),
            // libvirt does not tell.
            "data_bytes": null,
            "zero_bytes": null,
            "hole_bytes": null,
            "downtime_ms": null,
            "rate_bytes_per_s": null,
            "peak_memory_bytes": null,
        }));
    } else {
        let (domain, image) = (&report.domain, report.image.display());
        line(format!("libvirt saved domain {domain} to {image} in {}", time(report.duration)));
    }
    Ok(Outcome::Done)
}

/// Says what a save would do.
fn tell(settings: &SaveSettings, rehearsal: &Rehearsal) {
    let because = rehearsal.reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
    line(format!(
        "{} would be saved via {}{because} as {}",
        settings.image.display(),
        rehearsal.via.name(),
        rehearsal.format.name()
    ));
    line(format!("  memory      {}", size(rehearsal.ram_bytes)));
    line(format!("  to write    {} at the most", size(rehearsal.bytes_max)));
    match rehearsal.room_bytes {
        Some(room) => line(format!(
            "  room        {}: {}",
            size(room),
            match (rehearsal.fits, rehearsal.bytes_max <= room) {
                (true, false) if rehearsal.format.is_compressed() => "it fits if it compresses well enough",
                (true, _) => "it fits",
                (false, _) => "it does not fit",
            }
        )),
        None => line("  room        not limited"),
    }
    match &rehearsal.direct_io_reason {
        Some(reason) => line(format!("  direct I/O  no: {reason}")),
        None => line("  direct I/O  yes"),
    }
    if let Some(expected) = rehearsal.expected {
        line(format!("  time        {} at the most, by a short trial", time(expected)));
    }
}

fn rehearsal_as_json(rehearsal: &Rehearsal) -> serde_json::Value {
    json!({
        "via": rehearsal.via.name(),
        "reason": rehearsal.reason,
        "format": rehearsal.format.name(),
        "ram_bytes": rehearsal.ram_bytes,
        "bytes_max": rehearsal.bytes_max,
        "room_bytes": rehearsal.room_bytes,
        "fits": rehearsal.fits,
        "direct_io": rehearsal.direct_io,
        "direct_io_reason": rehearsal.direct_io_reason,
        "expected_ms": rehearsal.expected.map(ms),
    })
}

fn phases(report: &SaveReport) {
    for (name, took) in &report.phases.0 {
        say(format!("  {name:<13} {:>9}", time(*took)));
        if let ("ram", Some(presence)) = (*name, report.presence) {
            say(format!("    presence    {:>9}", time(presence)));
        }
    }
}

fn as_json(report: &SaveReport) -> serde_json::Value {
    let mut phases: Map<_, _> =
        report.phases.0.iter().map(|(name, took)| ((*name).replace(' ', "_") + "_ms", ms(*took))).collect();
    if let Some(presence) = report.presence {
        phases.insert("presence_ms".to_owned(), ms(presence));
    }
    json!({
        "via": report.via.name(),
        "reason": report.reason,
        "format": report.format.name(),
        "direct_io": report.direct_io,
        "direct_io_reason": report.direct_io_reason,
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

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Args, Command};

    #[test]
    fn a_domain_ends_with_its_save_as_with_virsh_and_another_guest_stays() {
        for (line, expected) in [
            ("--domain web1 i", Then::Quit),
            ("--domain web1 --managed", Then::Quit),
            ("--domain web1 --then resume i", Then::Resume),
            ("--domain web1 --then pause i", Then::Pause),
            ("--qmp q i", Then::Pause),
            ("--qmp q --then quit i", Then::Quit),
        ] {
            let line_whole = ["vmstate", "save"].into_iter().chain(line.split_whitespace());
            let Command::Save(save) = Args::parse_from(line_whole).command else { panic!("{line}") };
            assert_eq!(then_of(&save), expected, "{line}");
        }
    }
}
