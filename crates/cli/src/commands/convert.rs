//! `vmstate convert`.

use std::path::Path;

use serde_json::{Map, json};
use vmstate::libvirt::PayloadFormat;
use vmstate::source::Format;
use vmstate::{ConvertReport, ConvertSettings, Error};

use super::Outcome;
use crate::args::{Convert, ImageFormatArg};
use crate::output::{Reporter, leave_stdout, line, ms, print_json, say, size, time};
use crate::progress::Told;
use crate::signals::cancel_on_signals;

/// Makes an image of another format.
pub fn run(args: Convert) -> vmstate::Result<Outcome> {
    if args.takes_stdout() {
        leave_stdout();
    }
    let settings = ConvertSettings {
        from_format: args.from_format.map(format),
        from_offset: args.in_offset,
        to_offset: args.offset,
        channels: args.channels,
        direct_io: args.direct_io.choice(),
        domain_xml: args.xml.as_deref().map(domain_xml).transpose()?,
        overwrite: args.overwrite,
        sync: !args.no_sync,
        mode: args.mode,
        owner: args.owner.unwrap_or_default(),
        ..ConvertSettings::new(args.input, args.output, format(args.to_format))
    };
    let cancel = cancel_on_signals()?;
    let told = Told::start(Reporter { verbose: args.report.verbose }, args.progress.progress)?;
    let report = vmstate::convert(&settings, &cancel, &told)?;
    drop(told);
    if args.report.verbose {
        report.phases.0.iter().for_each(|(name, took)| say(format!("  {name:<13} {:>9}", time(*took))));
    }
    if args.report.json {
        print_json(&as_json(&report));
    } else {
        line(format!(
            "converted {} ({}) into {} ({}) in {}: {} of data, {} zero, {}/s",
            settings.from.display(),
            report.from_format.name(),
            settings.to.display(),
            report.to_format.name(),
            time(report.duration),
            size(report.data_bytes),
            size(report.zero_bytes),
            size(report.rate_bytes_per_s()),
        ));
    }
    Ok(Outcome::Done)
}

/// The format that a word stands for.
pub fn format(arg: ImageFormatArg) -> Format {
    match arg {
        ImageFormatArg::MappedRam => Format::MappedRam,
        ImageFormatArg::Stream => Format::Stream,
        ImageFormatArg::LibvirtRaw => Format::Libvirt(PayloadFormat::Raw),
        ImageFormatArg::LibvirtGzip => Format::Libvirt(PayloadFormat::Gzip),
        ImageFormatArg::LibvirtBzip2 => Format::Libvirt(PayloadFormat::Bzip2),
        ImageFormatArg::LibvirtXz => Format::Libvirt(PayloadFormat::Xz),
        ImageFormatArg::LibvirtLzop => Format::Libvirt(PayloadFormat::Lzop),
        ImageFormatArg::LibvirtZstd => Format::Libvirt(PayloadFormat::Zstd),
        ImageFormatArg::LibvirtSparse => Format::Libvirt(PayloadFormat::Sparse),
    }
}

/// The XML in a file.
fn domain_xml(path: &Path) -> vmstate::Result<String> {
    std::fs::read_to_string(path).map_err(|error| Error::io(format!("cannot read {}", path.display()), error))
}

fn as_json(report: &ConvertReport) -> serde_json::Value {
    let phases: Map<_, _> =
        report.phases.0.iter().map(|(name, took)| ((*name).replace(' ', "_") + "_ms", ms(*took))).collect();
    json!({
        "from_format": report.from_format.name(),
        "to_format": report.to_format.name(),
        "direct_io": report.direct_io,
        "direct_io_reason": report.direct_io_reason,
        "channels": report.channels,
        "ram_bytes": report.ram_bytes,
        "data_bytes": report.data_bytes,
        "zero_bytes": report.zero_bytes,
        "device_bytes": report.device_bytes,
        "duration_ms": ms(report.duration),
        "rate_bytes_per_s": report.rate_bytes_per_s(),
        "peak_memory_bytes": report.peak_memory_bytes,
        "phases": phases,
    })
}
