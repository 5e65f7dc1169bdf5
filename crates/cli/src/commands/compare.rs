//! `vmstate compare`.

use vmstate::job::{BlockDifference, SectionDifference, TextDifference, ValueDifference};
use vmstate::{CompareSettings, Compared, Comparison};

use super::Outcome;
use super::convert::format;
use crate::args::Compare;
use crate::buffer;
use crate::output::{Reporter, line, print_json, size};
use crate::progress::Told;
use crate::signals::cancel_on_signals;

/// How many ranges of a block and fields of a section are shown to people; JSON has more.
const SHOWN_MAX: usize = 8;

/// Says in what two images differ.
pub fn run(args: Compare) -> vmstate::Result<Outcome> {
    let one = Compared { offset: args.offset, format: args.format.map(format), ..Compared::new(&args.one) };
    let other =
        Compared { offset: args.other_offset, format: args.format.map(format), ..Compared::new(&args.other) };
    let settings = CompareSettings {
        ram: !args.devices_only,
        devices: !args.ram_only,
        ignore: args.ignore,
        direct_io: args.direct_io.choice(),
        ..CompareSettings::new(one, other)
    };
    let cancel = cancel_on_signals()?;
    let told = Told::start(Reporter { verbose: args.report.verbose }, args.progress.progress)?;
    let found = vmstate::compare(&settings, &cancel, &told)?;
    drop(told);
    if args.report.json {
        let value = serde_json::to_value(&found)
            .map_err(|error| vmstate::Error::new(vmstate::Kind::Io, "no JSON").because(error))?;
        print_json(&value);
    } else {
        page(&settings, &found);
    }
    Ok(if found.same { Outcome::Done } else { Outcome::No })
}

fn page(settings: &CompareSettings, found: &Comparison) {
    let (one, other) = (settings.one.path.display(), settings.other.path.display());
    let [first, second] = found.formats;
    if found.same {
        line(format!(
            "{one} ({first}) and {other} ({second}) are the same: {} compared",
            size(found.compared_bytes)
        ));
        return;
    }
    line(format!("{one} ({first}) and {other} ({second}) differ"));
    found.machine.iter().for_each(|difference| value("  ", difference));
    found.domain.iter().for_each(text);
    found.blocks.iter().for_each(block);
    found.sections.iter().for_each(section);
}

fn text(TextDifference { name, bytes, first }: &TextDifference) {
    line(match bytes {
        [Some(_), None] => format!("  libvirt's {name}: only in the first"),
        [None, _] => format!("  libvirt's {name}: only in the second"),
        [Some(_), Some(_)] => format!("  libvirt's {name}: first at byte {:#x}", first.unwrap_or(0)),
    });
}

fn value(indent: &str, ValueDifference { name, one, other, is_bytes }: &ValueDifference) {
    let bytes = |value: &Option<String>| value.as_deref().filter(|_| *is_bytes).and_then(undigested);
    if let (Some(one), Some(other)) = (bytes(one), bytes(other)) {
        return line(format!("{indent}{name}: {}", buffer::apart(&one, &other)));
    }
    let or_none = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
    line(format!("{indent}{name}: {} and {}", or_none(one), or_none(other)));
}

/// The bytes that hexadecimal digits stand for.
fn undigested(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

fn block(block: &BlockDifference) {
    match block.bytes {
        [Some(one), Some(other)] if one != other => {
            line(format!("  block `{}`: {} and {}", block.name, size(one), size(other)));
        }
        [Some(_), Some(_)] => {
            let first =
                block.first.map_or_else(String::new, |first| format!(", the first byte at {first:#x}"));
            let verb = if block.pages == 1 { "differs" } else { "differ" };
            line(format!("  block `{}`: {} {verb}{first}", block.name, count(block.pages, "page")));
        }
        [Some(_), None] => line(format!("  block `{}`: only in the first", block.name)),
        [None, _] => line(format!("  block `{}`: only in the second", block.name)),
    }
    for [start, end] in block.ranges.iter().take(SHOWN_MAX) {
        line(format!("    {start:#x}..{end:#x}  {}", count((end - start) / block.page_size, "page")));
    }
    let more = block.ranges.len().saturating_sub(SHOWN_MAX) as u64 + block.more_ranges;
    if more > 0 {
        line(format!("    and {} more", count(more, "range")));
    }
}

fn section(section: &SectionDifference) {
    let name = format!("  device `{}` {}", section.name, section.instance_id);
    match (section.versions, section.bytes) {
        ([Some(_), None], _) => return line(format!("{name}: only in the first")),
        ([None, _], _) => return line(format!("{name}: only in the second")),
        ([Some(one), Some(other)], _) if one != other => line(format!("{name}: version {one} and {other}")),
        (_, [Some(one), Some(other)]) if one != other => line(format!("{name}: {one} and {other} bytes")),
        _ => line(format!("{name}: first at byte {:#x}", section.first.unwrap_or(0))),
    }
    section.fields.iter().take(SHOWN_MAX).for_each(|field| value("    ", field));
    let more = section.fields.len().saturating_sub(SHOWN_MAX) as u64 + section.more_fields;
    if more > 0 {
        line(format!("    and {} more", count(more, "field")));
    }
}

/// A number of things: `1 page`, `2 pages`.
fn count(n: u64, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}
