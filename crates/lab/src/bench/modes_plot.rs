//! The modes of a restore as a picture: above, how the first instruction grows with the guest's memory; below, guest
//! by guest, what comes when.

use std::fmt::Write;

use super::curves::{Curve, END, Panel, Scale, decade, round_time};
use super::modes::{FROM_READY_MS_MAX, ModeRow, ModesReport};
use super::plot::{HALO, INK, QUIET, RULE, begin, label};
use super::table::{short_size, time};

const WIDTH: f64 = 1200.0;
const MARGIN: f64 = 40.0;
/// Where the planes of the upper panels begin and end.
const TOP: f64 = 190.0;
const BOTTOM: f64 = 410.0;
/// Where the titles of the lower panels stand, below the words of the upper ones.
const LOWER: f64 = BOTTOM + 92.0;
/// From a title to the first guest.
const HEAD: f64 = 24.0;
/// From one mode of a guest to the next, and what is between two guests.
const LINE: f64 = 19.0;
const GAP: f64 = 14.0;
/// What the name of a guest and that of a mode take, and a time before the first mark and behind the last.
const GUEST: f64 = 70.0;
const MODE: f64 = 46.0;
const VALUE: f64 = 56.0;
/// How large the marks are.
const DOT: f64 = 4.2;

/// The modes that are drawn, with their names and colours: QEMU's own is cool, ours are warm.
const MODES: [(&str, &str); 4] =
    [("QEMU", "#5f799c"), ("eager", "#e0a030"), ("map", "#e4572e"), ("lazy", "#8e3b78")];

/// What is drawn of guests of one size, in MiB: a colour and a row for each mode.
type Guest<'a> = (u64, Vec<(&'static str, &'a ModeRow)>);

/// Draws the picture: an SVG file.
pub fn modes_svg(report: &ModesReport) -> String {
    let loads = [false, true].map(|is_dirty| rows(report, is_dirty));
    let lines =
        loads.iter().map(|guests| guests.iter().map(|(_, rows)| rows.len() as f64 * LINE + GAP).sum::<f64>());
    let lower = LOWER + HEAD + lines.fold(0.0, f64::max) - GAP;
    let height = lower + 54.0;
    let mut text = String::new();
    begin(&mut text, WIDTH, height);
    head(&mut text, report);
    let middle = WIDTH / 2.0;
    let places = [(MARGIN, middle - 20.0), (middle + 20.0, WIDTH - MARGIN)];
    for ((is_dirty, guests), place) in [false, true].into_iter().zip(&loads).zip(places) {
        if !guests.is_empty() {
            growth(&mut text, report, guests, is_dirty, place);
            course(&mut text, report, guests, is_dirty, place, lower);
        }
    }
    text.push_str("</svg>\n");
    text
}

/// What is drawn of one load: each size with a row for each mode, in order.
fn rows(report: &ModesReport, is_dirty: bool) -> Vec<Guest<'_>> {
    let of_load = || report.rows.iter().filter(|row| row.is_dirty == is_dirty);
    let mut sizes: Vec<u64> = of_load().map(|row| row.memory_mib).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let found = sizes.into_iter().map(|mib| {
        let modes = MODES.iter().filter_map(|(mode, colour)| {
            let row = of_load().find(|row| row.memory_mib == mib && row.mode == *mode)?;
            row.first_instruction_ms.is_some_and(|ms| ms > 0.0).then_some((*colour, row))
        });
        (mib, modes.collect::<Vec<_>>())
    });
    found.filter(|(_, modes)| !modes.is_empty()).collect()
}

fn head(text: &mut String, report: &ModesReport) {
    let machine = &report.machine;
    let style = format!("font-size=\"24\" font-weight=\"650\" fill=\"{INK}\"");
    label(text, MARGIN, 52.0, "How soon a guest runs again", &style);
    let subtitle = format!(
        "restores from an image that is not in the page cache, medians · QEMU {} · {} × {} · {}",
        machine.qemu, machine.processors, machine.processor, machine.file_system
    );
    label(text, MARGIN, 76.0, &subtitle, &format!("fill=\"{QUIET}\""));
    let words = [
        ("QEMU’s own load", 120.0),
        ("eager: all of it first", 142.0),
        ("map: the image is its memory", 196.0),
        ("lazy: as it is asked for, and then all of it", 280.0),
    ];
    let mut left = MARGIN;
    for ((words, width), (_, colour)) in words.into_iter().zip(MODES) {
        _ = writeln!(
            text,
            "<path d=\"M{left:.1} 106H{:.1}\" stroke=\"{colour}\" stroke-width=\"3\" stroke-linecap=\"round\"/>",
            left + 22.0
        );
        label(text, left + 31.0, 110.5, words, &format!("fill=\"{INK}\" font-size=\"12\""));
        left += 31.0 + width + 18.0;
    }
    budget(text, left, left + 22.0, 106.0);
    label(text, left + 31.0, 110.5, "budget of map and lazy", &format!("fill=\"{INK}\" font-size=\"12\""));
}

/// How the first instruction grows with the memory: both axes are logarithmic, what does not grow is level.
fn growth(
    text: &mut String,
    report: &ModesReport,
    guests: &[Guest<'_>],
    is_dirty: bool,
    (left, right): (f64, f64),
) {
    let gib = |mib: u64| mib as f64 / 1024.0;
    let first = |row: &ModeRow| row.from_ready_ms.filter(|ms| *ms > 0.0);
    let drawn = MODES.iter().map(|(mode, colour)| {
        let all = guests.iter().flat_map(|(mib, rows)| rows.iter().map(|(_, row)| (*mib, *row)));
        let points = all.filter(|(_, row)| row.mode == *mode);
        let points = points.filter_map(|(mib, row)| Some((gib(mib), first(row)?))).collect();
        Curve { points, colour, is_dashed: false, width: 2.5 }
    });
    let curves: Vec<Curve> = drawn.filter(|curve| !curve.points.is_empty()).collect();
    // Both panels have one scale, so that a guest that is full can be compared with one that is not.
    let all = report.rows.iter().filter(|row| MODES.iter().any(|(mode, _)| row.mode == *mode));
    let (least, most) = span(all.filter_map(first).chain([FROM_READY_MS_MAX]));
    let y = Scale { low: decade(least, false), high: decade(most * 1.01, true), is_log: true };
    let sizes = || guests.iter().map(|(mib, _)| *mib);
    let (low, high) = (sizes().min().unwrap_or(1), sizes().max().unwrap_or(2));
    let x = Scale { low: gib(low), high: gib(high.max(low * 2)), is_log: true };
    let ticks: Vec<(f64, String)> = sizes().map(|mib| (gib(mib), short_size(mib << 20))).collect();
    let panel = Panel { left, right, top: TOP, bottom: BOTTOM, x, y };
    let (from, at) = panel.place((x.low, FROM_READY_MS_MAX));
    budget(text, from, right - END, at);
    let style = format!("text-anchor=\"end\" font-size=\"11\" font-weight=\"600\" fill=\"{INK}\"");
    label(text, from - 8.0, at + 4.0, &round_time(FROM_READY_MS_MAX), &style);
    let title = format!("{}: first instruction, after QEMU is ready", load(is_dirty));
    panel.draw(text, &title, "memory of the guest", &ticks, &curves);
}

/// How late a first instruction may be.
fn budget(text: &mut String, from: f64, to: f64, y: f64) {
    _ = writeln!(
        text,
        "<path d=\"M{from:.1} {y:.1}H{to:.1}\" stroke=\"{INK}\" stroke-width=\"1\" stroke-dasharray=\"2 4\"/>"
    );
}

/// When each guest could run, when it was ready and when all of its memory was there, from the call.
fn course(
    text: &mut String,
    report: &ModesReport,
    guests: &[Guest<'_>],
    is_dirty: bool,
    (left, right): (f64, f64),
    bottom: f64,
) {
    let title = format!("{}: what comes when, from the call", load(is_dirty));
    label(text, left, LOWER, &title, &format!("font-size=\"15\" font-weight=\"600\" fill=\"{INK}\""));
    let drawn = [false, true].map(|is_dirty| rows(report, is_dirty));
    let (least, most) =
        span(drawn.iter().flatten().flat_map(|(_, rows)| rows).flat_map(|(_, row)| marks(row)));
    let x = Scale { low: least, high: most.max(least * 1.5), is_log: true };
    let (from, to) = (left + GUEST + MODE + VALUE, right - VALUE);
    let place = |ms: f64| from + x.part(ms) * (to - from);
    for exponent in -1..=6 {
        for (ms, is_named) in [(1.0, true), (2.0, false), (5.0, false)] {
            let ms = ms * 10_f64.powi(exponent);
            if ms < least * 0.8 || ms > most * 1.2 {
                continue;
            }
            let at = place(ms);
            let width = if is_named { 1.5 } else { 0.75 };
            _ = writeln!(
                text,
                "<path d=\"M{at:.1} {:.1}V{bottom:.1}\" stroke=\"{RULE}\" stroke-width=\"{width}\"/>",
                LOWER + HEAD - 10.0
            );
            if is_named || most < least * 30.0 {
                let style = format!("text-anchor=\"middle\" font-size=\"11\" fill=\"{QUIET}\"");
                label(text, at, bottom + 16.0, &round_time(ms), &style);
            }
        }
    }
    let mut y = LOWER + HEAD;
    for (mib, rows) in guests {
        let style = format!("font-size=\"12\" font-weight=\"600\" fill=\"{INK}\"");
        label(text, left, y + 4.0, &short_size(mib << 20), &style);
        for (colour, row) in rows {
            let style = format!("text-anchor=\"end\" font-size=\"12\" fill=\"{QUIET}\"");
            label(text, left + GUEST + MODE - 8.0, y + 4.0, row.mode, &style);
            draw_course(text, row, colour, y, &place);
            y += LINE;
        }
        y += GAP;
    }
    key(text, left + GUEST + MODE, bottom + 36.0);
}

/// One guest in one mode: a line from its first mark to its last, and what they stand for.
fn draw_course(text: &mut String, row: &ModeRow, colour: &str, y: f64, place: &dyn Fn(f64) -> f64) {
    let (least, most) = span(marks(row));
    let (from, to) = (place(least), place(most));
    _ = writeln!(
        text,
        "<path d=\"M{from:.1} {y:.1}H{to:.1}\" stroke=\"{colour}\" stroke-width=\"2\" stroke-opacity=\"0.45\"/>"
    );
    if let Some(ms) = row.resident_ms {
        resident(text, place(ms), y, colour);
    }
    if let Some(ms) = row.guest_ready_ms {
        ready(text, place(ms), y, colour);
    }
    if let Some(ms) = row.first_instruction_ms {
        first(text, place(ms), y, colour);
        let style =
            format!("text-anchor=\"end\" font-size=\"11\" font-weight=\"600\" {HALO} fill=\"{colour}\"");
        label(text, place(ms) - 9.0, y + 4.0, &time(ms), &style);
    }
    if to - from > DOT {
        let style = format!("font-size=\"11\" {HALO} fill=\"{QUIET}\"");
        label(text, to + 9.0, y + 4.0, &time(most), &style);
    }
}

/// Draws a mark at a place in a colour.
type Mark = fn(&mut String, f64, f64, &str);

/// What the marks stand for.
fn key(text: &mut String, left: f64, y: f64) {
    let style = format!("font-size=\"11\" fill=\"{QUIET}\"");
    let marks: [(Mark, &str, f64); 3] = [
        (first, "first instruction", 112.0),
        (ready, "has gone through its memory", 186.0),
        (resident, "all of it is there", 0.0),
    ];
    let mut at = left;
    for (mark, words, width) in marks {
        mark(text, at, y - 4.0, QUIET);
        label(text, at + 9.0, y, words, &style);
        at += width;
    }
}

fn first(text: &mut String, x: f64, y: f64, colour: &str) {
    _ = writeln!(text, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{DOT}\" fill=\"{colour}\"/>");
}

fn ready(text: &mut String, x: f64, y: f64, colour: &str) {
    _ = writeln!(
        text,
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{DOT}\" fill=\"#ffffff\" stroke=\"{colour}\" stroke-width=\"1.8\"/>"
    );
}

fn resident(text: &mut String, x: f64, y: f64, colour: &str) {
    _ = writeln!(
        text,
        "<path class=\"resident\" d=\"M{x:.1} {:.1}V{:.1}\" stroke=\"{colour}\" stroke-width=\"2.5\"/>",
        y - 7.0,
        y + 7.0
    );
}

/// What a row has, in milliseconds from the call.
fn marks(row: &ModeRow) -> impl Iterator<Item = f64> {
    let found = [row.first_instruction_ms, row.guest_ready_ms, row.resident_ms];
    found.into_iter().flatten().filter(|ms| *ms > 0.0)
}

fn span(times: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = times.fold((f64::INFINITY, 0.0_f64), |(low, high), ms| (low.min(ms), high.max(ms)));
    if high > 0.0 { (low, high) } else { (1.0, 1.0) }
}

fn load(is_dirty: bool) -> &'static str {
    if is_dirty { "All memory in use" } else { "8 MiB in use" }
}

#[cfg(test)]
mod tests {
    use super::super::modes::tests::report;
    use super::*;

    fn number(line: &str, name: &str) -> f64 {
        let rest = line.split_once(&format!(" {name}=\"")).expect(name).1;
        rest.split('"').next().and_then(|digits| digits.parse().ok()).expect(name)
    }

    #[test]
    fn every_time_of_every_mode_has_its_mark_within_the_picture() {
        let report = report();
        let text = modes_svg(&report);
        let rows: Vec<_> = report.rows.iter().filter(|r| MODES.iter().any(|m| m.0 == r.mode)).collect();
        let of = |time: fn(&ModeRow) -> Option<f64>| rows.iter().filter_map(|row| time(row)).count();
        // A circle above and one below for the first instruction, one below for a guest that is ready.
        let circles = of(|r| r.from_ready_ms) + of(|r| r.first_instruction_ms) + of(|r| r.guest_ready_ms);
        assert_eq!(text.matches("<circle").count(), circles + 2 * 2, "and two in the key of each panel");
        assert_eq!(text.matches("class=\"resident\"").count(), of(|r| r.resident_ms) + 2);
        let height = number(text.lines().next().expect("a line"), "height");
        for line in text.lines().filter(|line| line.starts_with("<circle")) {
            assert!((MARGIN..WIDTH - MARGIN).contains(&number(line, "cx")), "{line}");
            assert!((TOP - 1.0..height - 8.0).contains(&number(line, "cy")), "{line}");
        }
        assert!(text.contains("Abacus &lt;II&gt;") && text.ends_with("</svg>\n"), "{text}");
        let opened = text.matches("<text").count() + text.matches("<svg").count();
        assert_eq!(text.matches("</").count(), opened);
    }

    #[test]
    fn what_takes_as_long_with_more_memory_is_level() {
        let text = modes_svg(&report());
        let curve = |mode: &str| -> Vec<f64> {
            let colour = MODES.iter().find(|known| known.0 == mode).expect(mode).1;
            let line = format!("fill=\"none\" stroke=\"{colour}\"");
            let path = text.lines().rfind(|found| found.contains(&line)).expect("the dirty panel's");
            let points = path.split('"').nth(1).expect("a path").trim_start_matches('M').split('L');
            points
                .map(|point| point.split(' ').nth(1).and_then(|y| y.parse().ok()).expect("a point"))
                .collect()
        };
        let (map, qemu) = (curve("map"), curve("QEMU"));
        assert!(map.len() > 1 && map.iter().all(|y| *y == map[0]), "{map:?}");
        assert!(qemu.windows(2).all(|pair| pair[1] < pair[0]), "{qemu:?}");
    }

    #[test]
    fn a_report_of_next_to_nothing_is_a_picture_too() {
        let mut report = report();
        report.rows.truncate(1);
        assert!(modes_svg(&report).matches("<circle").count() >= 3);
        report.rows.clear();
        assert!(modes_svg(&report).ends_with("</svg>\n"));
    }
}
