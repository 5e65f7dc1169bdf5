//! Curves in a plane: what the pictures of what grows have in common.

use std::fmt::Write;

use super::plot::{INK, QUIET, RULE, label};
use super::table::time;

/// What the words of the vertical axis take.
pub const AXIS: f64 = 54.0;
/// What the words at the end of a curve take.
pub const END: f64 = 78.0;

/// A curve: where its points are, how it is drawn, and what is said at its end.
pub struct Curve {
    pub points: Vec<(f64, f64)>,
    pub colour: &'static str,
    pub is_dashed: bool,
    pub width: f64,
}

/// A panel, and how its numbers become places.
pub struct Panel {
    pub left: f64,
    pub right: f64,
    /// Where the plane begins and ends; its title and its ticks lie outside.
    pub top: f64,
    pub bottom: f64,
    pub x: Scale,
    pub y: Scale,
}

/// Numbers on an axis.
#[derive(Clone, Copy)]
pub struct Scale {
    pub low: f64,
    pub high: f64,
    pub is_log: bool,
}

impl Scale {
    /// From 0 to 1.
    pub fn part(self, value: f64) -> f64 {
        match self.is_log {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        }
    }
}

impl Panel {
    /// Where a value is.
    pub fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let (from, to) = (self.left + AXIS, self.right - END);
        (from + self.x.part(x) * (to - from), self.bottom - self.y.part(y) * (self.bottom - self.top))
    }

    /// Draws title, axes and curves.
    pub fn draw(
        &self,
        text: &mut String,
        title: &str,
        below: &str,
        ticks: &[(f64, String)],
        curves: &[Curve],
    ) {
        let style = format!("font-size=\"15\" font-weight=\"600\" fill=\"{INK}\"");
        label(text, self.left, self.top - 24.0, title, &style);
        let mut step = self.y.low;
        while step <= self.y.high * 1.0001 {
            let (_, y) = self.place((self.x.low, step));
            let (from, to) = (self.left + AXIS, self.right - END);
            _ = writeln!(
                text,
                "<path d=\"M{from:.1} {y:.1}H{to:.1}\" stroke=\"{RULE}\" stroke-width=\"1\"/>"
            );
            let style = format!("text-anchor=\"end\" font-size=\"11\" fill=\"{QUIET}\"");
            label(text, from - 8.0, y + 4.0, &round_time(step), &style);
            step = if self.y.is_log { step * 10.0 } else { step + (self.y.high - self.y.low) / 4.0 };
        }
        for (x, words) in ticks {
            let (x, _) = self.place((*x, self.y.low));
            let style = format!("text-anchor=\"middle\" font-size=\"11\" fill=\"{QUIET}\"");
            label(text, x, self.bottom + 20.0, words, &style);
        }
        let style = format!("text-anchor=\"middle\" font-size=\"12\" fill=\"{QUIET}\"");
        label(text, (self.left + AXIS + self.right - END) / 2.0, self.bottom + 42.0, below, &style);
        for curve in curves {
            self.curve(text, curve);
        }
        self.ends(text, curves);
    }

    fn curve(&self, text: &mut String, curve: &Curve) {
        let places: Vec<(f64, f64)> = curve.points.iter().map(|point| self.place(*point)).collect();
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        let dashes = if curve.is_dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let (colour, width) = (curve.colour, curve.width);
        _ = writeln!(
            text,
            "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" stroke-linejoin=\"round\" \
             stroke-linecap=\"round\"{dashes}/>",
            path.join("L")
        );
        for (x, y) in places {
            _ = writeln!(
                text,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{:.1}\" fill=\"#ffffff\" stroke=\"{colour}\" \
                 stroke-width=\"{width}\"/>",
                width + 1.2
            );
        }
    }

    /// What each curve comes to, right of its end; those that end close to each other are moved apart.
    fn ends(&self, text: &mut String, curves: &[Curve]) {
        let mut ends: Vec<(f64, f64, f64, &str)> = curves
            .iter()
            .filter_map(|curve| {
                let last = *curve.points.last()?;
                let (x, y) = self.place(last);
                Some((x, y, last.1, curve.colour))
            })
            .collect();
        ends.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut above = f64::NEG_INFINITY;
        for (x, y, ms, colour) in ends {
            let y = y.max(above + 14.0);
            above = y;
            let style = format!("font-size=\"11\" font-weight=\"600\" fill=\"{colour}\"");
            label(text, x + 9.0, y + 4.0, &time(ms), &style);
        }
    }
}

/// A time on an axis: a round number.
pub fn round_time(ms: f64) -> String {
    match ms {
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{} s", (ms / 100.0).round() / 10.0),
    }
}

/// The power of ten at or below a time, or at or above it.
pub fn decade(ms: f64, up: bool) -> f64 {
    let exponent = ms.max(0.1).log10();
    10_f64.powf(if up { exponent.ceil() } else { exponent.floor() })
}
