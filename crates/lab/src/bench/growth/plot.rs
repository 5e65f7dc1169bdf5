//! The growth as a picture: on the left the size of the memory, on the right what of it was touched.

use std::fmt::Write;

use super::GrowthReport;
use crate::bench::Backend;
use crate::bench::curves::{Curve, Panel, Scale, decade};
use crate::bench::plot::{INK, QUIET, begin, label};

const WIDTH: f64 = 1200.0;
const HEIGHT: f64 = 576.0;
const MARGIN: f64 = 40.0;
const TOP: f64 = 172.0;
const BOTTOM: f64 = HEIGHT - 74.0;

const OURS: &str = "#e4572e";
const QEMUS: &str = "#5f799c";
const CEILING: &str = "#9aa3af";

/// Draws the picture: an SVG file.
pub fn growth_svg(report: &GrowthReport) -> String {
    let mut text = String::new();
    begin(&mut text, WIDTH, HEIGHT);
    head(&mut text, report);
    let middle = WIDTH / 2.0;
    if !report.sizes.is_empty() {
        sizes(&mut text, report, (MARGIN, middle - 4.0));
    }
    if !report.shares.is_empty() {
        shares(&mut text, report, (middle + 24.0, WIDTH - MARGIN + 20.0));
    }
    text.push_str("</svg>\n");
    text
}

fn head(text: &mut String, report: &GrowthReport) {
    let machine = &report.machine;
    let style = format!("font-size=\"24\" font-weight=\"650\" fill=\"{INK}\"");
    label(text, MARGIN, 52.0, "How the time of a save grows", &style);
    let subtitle = format!(
        "lower is better · QEMU {} · {} × {} · {}",
        machine.qemu, machine.processors, machine.processor, machine.file_system
    );
    label(text, MARGIN, 76.0, &subtitle, &format!("fill=\"{QUIET}\""));
    let mut left = MARGIN;
    for (words, colour, is_dashed, width) in [
        ("vmstate, private memory", OURS, true, 170.0),
        ("vmstate, memfd", OURS, false, 118.0),
        ("QEMU's best, private memory", QEMUS, true, 198.0),
        ("QEMU's best, memfd", QEMUS, false, 146.0),
        ("ceiling: the same bytes without a guest", CEILING, false, 240.0),
    ] {
        let dashes = if is_dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        _ = writeln!(
            text,
            "<path d=\"M{left:.1} 100H{:.1}\" stroke=\"{colour}\" stroke-width=\"2.5\"{dashes}/>",
            left + 24.0
        );
        label(text, left + 31.0, 104.5, words, &format!("fill=\"{INK}\" font-size=\"12\""));
        left += width + 42.0;
    }
}

fn of_backend(backend: Backend, colour: &'static str, points: Vec<(f64, f64)>) -> Curve {
    let width = if colour == OURS { 2.5 } else { 2.0 };
    Curve { points, colour, is_dashed: !backend.is_shared(), width }
}

/// Both axes are logarithmic: what grows with the memory is a slope, what does not is level.
fn sizes(text: &mut String, report: &GrowthReport, (left, right): (f64, f64)) {
    let gib = |mib: u64| mib as f64 / 1024.0;
    let mut curves = Vec::new();
    let mut all: Vec<u64> = report.sizes.iter().map(|row| row.memory_mib).collect();
    all.sort_unstable();
    all.dedup();
    for backend in [Backend::Private, Backend::Memfd] {
        let rows = || report.sizes.iter().filter(|row| row.backend == backend);
        let qemus = rows().filter_map(|row| Some((gib(row.memory_mib), row.qemu_ms?)));
        curves.push(of_backend(backend, QEMUS, qemus.collect()));
        let ours = rows().map(|row| (gib(row.memory_mib), row.vmstate_ms));
        curves.push(of_backend(backend, OURS, ours.collect()));
    }
    curves.retain(|curve| !curve.points.is_empty());
    let values = || curves.iter().flat_map(|curve| &curve.points).map(|(_, ms)| *ms);
    let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(1.0, f64::max));
    let y = Scale { low: decade(least, false), high: decade(most * 1.01, true), is_log: true };
    let (first, last) = (all.first().copied().unwrap_or(1), all.last().copied().unwrap_or(2));
    let x = Scale { low: gib(first), high: gib(last.max(first * 2)), is_log: true };
    let ticks: Vec<(f64, String)> =
        all.iter().map(|&mib| (gib(mib), crate::bench::table::short_size(mib << 20))).collect();
    let panel = Panel { left, right, top: TOP, bottom: BOTTOM, x, y };
    panel.draw(text, "An idle guest: the more memory it has", "memory, 8 MiB of it in use", &ticks, &curves);
}

fn shares(text: &mut String, report: &GrowthReport, (left, right): (f64, f64)) {
    let mut curves = Vec::new();
    for backend in [Backend::Private, Backend::Memfd] {
        let rows = || report.shares.iter().filter(|row| row.backend == backend);
        let points = |of: fn(&super::ShareRow) -> f64| -> Vec<(f64, f64)> {
            rows().map(|row| (row.touched_percent as f64, of(row))).collect()
        };
        if backend.is_shared() {
            curves.push(of_backend(backend, CEILING, points(|row| row.ceiling_ms)));
        }
        curves.push(of_backend(backend, QEMUS, points(|row| row.qemu_ms)));
        curves.push(of_backend(backend, OURS, points(|row| row.vmstate_ms)));
    }
    curves.retain(|curve| !curve.points.is_empty());
    let most = curves.iter().flat_map(|curve| &curve.points).map(|(_, ms)| *ms).fold(1.0, f64::max);
    // Four steps of a round number.
    let unit = 10_f64.powf((most / 4.0).log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|f| f * unit).find(|step| step * 4.0 >= most);
    let y = Scale { low: 0.0, high: step.unwrap_or(unit * 10.0) * 4.0, is_log: false };
    let x = Scale { low: 0.0, high: 100.0, is_log: false };
    let ticks: Vec<(f64, String)> =
        [0, 10, 50, 100].iter().map(|&percent| (f64::from(percent), format!("{percent} %"))).collect();
    let size = report.shares.first().map_or(0, |row| row.memory_mib);
    let title =
        format!("A guest of {}: the more of it is touched", crate::bench::table::short_size(size << 20));
    let panel = Panel { left, right, top: TOP, bottom: BOTTOM, x, y };
    panel.draw(text, &title, "memory that the guest has filled", &ticks, &curves);
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::report;
    use super::*;

    #[test]
    fn every_row_has_its_point_within_the_picture() {
        let report = report();
        let text = growth_svg(&report);
        let points = text.matches("<circle").count();
        let ceilings = report.shares.iter().filter(|row| row.backend.is_shared()).count();
        let qemus = report.sizes.iter().filter(|row| row.qemu_ms.is_some()).count();
        assert_eq!(points, report.sizes.len() + qemus + 2 * report.shares.len() + ceilings);
        let number = |line: &str, name: &str| -> f64 {
            let rest = line.split_once(&format!(" {name}=\"")).expect(name).1;
            rest.split('"').next().and_then(|digits| digits.parse().ok()).expect(name)
        };
        for line in text.lines().filter(|line| line.starts_with("<circle")) {
            assert!((MARGIN..WIDTH - MARGIN).contains(&number(line, "cx")), "{line}");
            assert!((TOP - 1.0..BOTTOM + 1.0).contains(&number(line, "cy")), "{line}");
        }
        assert!(text.contains("Abacus &lt;II&gt;") && text.ends_with("</svg>\n"), "{text}");
        let opened = text.matches("<text").count() + text.matches("<svg").count();
        assert_eq!(text.matches("</").count(), opened);
    }

    #[test]
    fn a_report_of_next_to_nothing_is_a_picture_too() {
        let mut report = report();
        report.sizes.truncate(1);
        report.shares.clear();
        assert!(growth_svg(&report).matches("<circle").count() == 2);
        report.sizes.clear();
        assert!(growth_svg(&report).ends_with("</svg>\n"));
    }
}
