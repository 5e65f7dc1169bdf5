//! The report as a picture: one panel for each job and load, a bar for each way, grouped by the guest's memory.

use std::fmt::Write;

use super::table::time;
use super::{Backend, BenchReport, Job, Load, Row, Way};

const WIDTH: f64 = 1200.0;
const MARGIN: f64 = 40.0;
/// Where the panels begin, below the title.
const PANELS_TOP: f64 = 158.0;
/// From one line of the legend to the next.
const LEGEND_LINE: f64 = 22.0;
const PANEL_GAP: f64 = 48.0;
const BAR: f64 = 13.0;
const BAR_GAP: f64 = 3.0;
const GROUP_GAP: f64 = 14.0;
/// What the title of a panel takes above its first bar.
const PANEL_HEAD: f64 = 34.0;
/// What the name of a group takes left of its bars.
const LABEL: f64 = 62.0;
/// What the time takes right of the longest bar.
const VALUE: f64 = 58.0;

pub const INK: &str = "#1f2430";
pub const QUIET: &str = "#6b7280";
/// What keeps words readable where a line runs behind them.
pub const HALO: &str = "paint-order=\"stroke\" stroke=\"#ffffff\" stroke-width=\"3\"";
pub const RULE: &str = "#e5e7eb";

/// A colour for each way: QEMU's are cool and grow darker the faster they should be, ours is warm.
fn colour(way: Way) -> &'static str {
    match way {
        Way::QemuStream => "#d3dbe6",
        Way::QemuMapped => "#bcc9da",
        Way::QemuOneDirect => "#a3b4ca",
        Way::QemuChannels => "#849ab8",
        Way::QemuDirect => "#5f799c",
        Way::Vmstate => "#e4572e",
    }
}

/// Draws the picture: an SVG file.
pub fn svg(report: &BenchReport) -> String {
    let panel_width = (WIDTH - 2.0 * MARGIN - PANEL_GAP) / 2.0;
    let mut body = String::new();
    let mut top = PANELS_TOP;
    for load in [Load::Dirty, Load::Idle] {
        let mut height: f64 = 0.0;
        for (column, job) in [Job::Save, Job::Restore].into_iter().enumerate() {
            let rows: Vec<&Row> =
                report.rows.iter().filter(|row| row.job == job && row.load == load).collect();
            if rows.is_empty() {
                continue;
            }
            let left = MARGIN + column as f64 * (panel_width + PANEL_GAP);
            height = height.max(panel(&mut body, job, load, &rows, (left, top), panel_width));
        }
        if height > 0.0 {
            top += height + PANEL_GAP * 0.75;
        }
    }
    let height = top - PANEL_GAP * 0.75 + MARGIN;
    let mut text = String::new();
    begin(&mut text, WIDTH, height);
    head(&mut text, report);
    text.push_str(&body);
    text.push_str("</svg>\n");
    text
}

/// Begins a picture of this size: its page, on which everything else is drawn.
pub fn begin(text: &mut String, width: f64, height: f64) {
    _ = write!(
        text,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         height=\"{height:.0}\" font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\" font-size=\"13\">\n\
         <rect width=\"{width:.0}\" height=\"{height:.0}\" rx=\"14\" fill=\"#ffffff\"/>\n"
    );
}

fn head(text: &mut String, report: &BenchReport) {
    let machine = &report.machine;
    label(
        text,
        MARGIN,
        52.0,
        "Time to save and to restore a guest",
        &format!("font-size=\"24\" font-weight=\"650\" fill=\"{INK}\""),
    );
    let subtitle = format!(
        "guests of {} · shorter is better · QEMU {} · {} × {} · {}",
        super::table::size(report.memory_mib << 20),
        machine.qemu,
        machine.processors,
        machine.processor,
        machine.file_system,
    );
    label(text, MARGIN, 76.0, &subtitle, &format!("fill=\"{QUIET}\""));
    let mut left = MARGIN;
    let mut top = 94.0;
    for way in Way::ALL {
        let width = 19.0 + width_of(way.name()) + 20.0;
        if left + width > WIDTH - MARGIN {
            (left, top) = (MARGIN, top + LEGEND_LINE);
        }
        bar(text, (left, top), 13.0, colour(way));
        label(text, left + 19.0, top + 11.0, way.name(), &format!("fill=\"{INK}\""));
        left += width;
    }
    if report.rows.iter().any(|row| row.of_ceiling.is_some()) {
        mark(text, left + 3.0, (top, top + BAR));
        label(text, left + 12.0, top + 11.0, "ceiling", &format!("fill=\"{INK}\""));
    }
}

/// About how wide words are: which font a reader has is not known.
fn width_of(words: &str) -> f64 {
    let letter = |letter: char| match letter {
        'm' | 'w' => 12.0,
        letter if letter.is_uppercase() => 9.5,
        letter if letter.is_alphanumeric() => 7.2,
        _ => 4.5,
    };
    words.chars().map(letter).sum()
}

/// Draws a panel and says how high it is.
fn panel(text: &mut String, job: Job, load: Load, rows: &[&Row], (left, top): (f64, f64), width: f64) -> f64 {
    let verb = match job {
        Job::Save => "Save",
        Job::Restore => "Restore",
    };
    let guest = match load {
        Load::Dirty => "all of its memory in use",
        Load::Idle => "next to nothing in use",
    };
    let title = format!("{verb}: {guest}");
    label(text, left, top + 12.0, &title, &format!("font-size=\"15\" font-weight=\"600\" fill=\"{INK}\""));
    let longest = rows.iter().map(|row| row.time_ms).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (width - LABEL - VALUE) / longest;
    let mut y = top + PANEL_HEAD;
    for backend in Backend::ALL {
        let group: Vec<&&Row> = rows.iter().filter(|row| row.backend == backend).collect();
        if group.is_empty() {
            continue;
        }
        let height = group.len() as f64 * (BAR + BAR_GAP) - BAR_GAP;
        let ceiling = group.iter().find_map(|row| Some(row.of_ceiling? * row.time_ms));
        label(
            text,
            left + LABEL - 10.0,
            y + height / 2.0 + 4.5,
            backend.name(),
            &format!("text-anchor=\"end\" fill=\"{QUIET}\""),
        );
        let places = || group.iter().zip(0..).map(|(row, i)| (row, y + f64::from(i) * (BAR + BAR_GAP)));
        let length = |row: &Row| (row.time_ms * scale).max(1.5);
        for (row, y) in places() {
            bar(text, (left + LABEL, y), length(row), colour(row.way));
        }
        // Between bars and times: what is written stays readable.
        if let Some(ceiling_ms) = ceiling {
            mark(text, left + LABEL + ceiling_ms * scale, (y - 2.0, y + height + 2.0));
        }
        for (row, y) in places() {
            let style = match row.way {
                Way::Vmstate => format!("font-weight=\"650\" fill=\"{}\"", colour(Way::Vmstate)),
                _ => format!("fill=\"{QUIET}\""),
            };
            let style = format!("font-size=\"11\" {HALO} {style}");
            label(text, left + LABEL + length(row) + 6.0, y + 10.5, &time(row.time_ms), &style);
        }
        y += height + BAR_GAP;
        y += GROUP_GAP - BAR_GAP;
    }
    let (from, to) = (top + PANEL_HEAD - 5.0, y - GROUP_GAP + 5.0);
    _ = writeln!(
        text,
        "<path d=\"M{0:.1} {from:.1}V{to:.1}\" stroke=\"{RULE}\" stroke-width=\"1.5\"/>",
        left + LABEL - 1.0
    );
    y - GROUP_GAP - top
}

fn bar(text: &mut String, (x, y): (f64, f64), width: f64, fill: &str) {
    _ = writeln!(
        text,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR:.0}\" rx=\"2\" fill=\"{fill}\"/>"
    );
}

/// Where the ceiling is.
fn mark(text: &mut String, x: f64, (from, to): (f64, f64)) {
    _ = writeln!(
        text,
        "<path d=\"M{x:.1} {from:.1}V{to:.1}\" stroke=\"{INK}\" stroke-width=\"1.5\" stroke-dasharray=\"3 2\"/>"
    );
}

/// Words at a place.
pub fn label(text: &mut String, x: f64, y: f64, words: &str, style: &str) {
    _ = writeln!(text, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{}</text>", escaped(words));
}

/// Words as XML has them; what it cannot hold is left out.
fn escaped(words: &str) -> String {
    let mut escaped = String::new();
    for letter in words.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            letter if letter.is_control() => {}
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::report;
    use super::*;

    /// The elements of a document that is well-formed as far as ours go: each that is opened is closed in its place,
    /// and every attribute is quoted.
    fn elements(text: &str) -> Vec<String> {
        let (mut open, mut found) = (Vec::new(), Vec::new());
        for part in text.split('<').skip(1) {
            let (tag, words) = part.split_once('>').expect("a tag that ends");
            assert!(!words.contains('>'), "{words}");
            for entity in words.split('&').skip(1) {
                assert!(["amp;", "lt;", "gt;"].iter().any(|known| entity.starts_with(known)), "{words}");
            }
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name), "{tag}");
                continue;
            }
            let name = tag.split([' ', '/']).next().expect("a name").to_owned();
            if !tag.ends_with('/') {
                open.push(name.clone());
            }
            found.push(name);
        }
        assert_eq!(open, Vec::<String>::new());
        found
    }

    #[test]
    fn the_picture_is_well_formed_and_has_a_bar_for_every_row() {
        let report = report();
        let text = svg(&report);
        let found = elements(&text);
        let bars = found.iter().filter(|name| *name == "rect").count();
        assert_eq!(bars, report.rows.len() + Way::ALL.len() + 1, "and the legend's, and the page");
        assert!(text.contains("Abacus &lt;II&gt;"), "{text}");
        assert!(text.len() < 50 << 10, "{}", text.len());
    }

    #[test]
    fn nothing_is_drawn_outside_of_the_picture() {
        for keep in [60, 5, 1] {
            let mut report = report();
            report.rows.truncate(keep);
            let text = svg(&report);
            let number = |line: &str, name: &str| -> f64 {
                let rest = line.split_once(&format!(" {name}=\"")).expect(name).1;
                rest.split('"').next().and_then(|digits| digits.parse().ok()).expect(name)
            };
            let height = number(text.lines().next().expect("a line"), "height");
            for line in text.lines().filter(|line| line.starts_with("<rect x")) {
                assert!(number(line, "x") + number(line, "width") <= WIDTH - MARGIN, "{line}");
                assert!(number(line, "y") + BAR <= height - MARGIN + 1.0, "{line}");
            }
        }
    }

    #[test]
    fn words_cannot_end_their_element() {
        assert_eq!(escaped("a<b>&\u{7}c"), "a&lt;b&gt;&amp;c");
    }
}
