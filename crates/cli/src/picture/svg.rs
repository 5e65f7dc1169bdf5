//! The scene as an SVG. Cells are one embedded PNG a panel, so the file stays small however large the memory is.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::Theme;
use super::colour::Rgba;
use super::png::encode;
use super::scene::{Anchor, Face, Ink, Raster, Scene, Shape};

const LIGHT: &str =
    ".g{fill:#ffffff}.w{fill:#eef1f6}.t{fill:#1c2230}.q{fill:#68718a}.b{stroke:#1c2230}.p{fill:#ffffff}";
const DARK: &str =
    ".g{fill:#10141d}.w{fill:#1b212e}.t{fill:#e8ecf4}.q{fill:#8f9ab3}.b{stroke:#ffffff}.p{fill:#10141d}";

/// Draws it.
pub fn svg(scene: &Scene, theme: Theme) -> String {
    let mut out = String::new();
    let Scene { width, height, shapes } = scene;
    let style = match theme {
        Theme::Light => LIGHT.to_owned(),
        Theme::Dark => DARK.to_owned(),
        Theme::Auto => format!("{LIGHT}@media(prefers-color-scheme:dark){{{DARK}}}"),
    };
    _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\" font-size=\"13\">\n<style>{style}</style>\n"
    );
    for shape in shapes {
        draw(&mut out, shape);
    }
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, shape: &Shape) {
    _ = match shape {
        Shape::Rect(x, y, width, height, ink) => {
            writeln!(out, "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"{}/>", fill(*ink))
        }
        Shape::Text(x, y, text, face, ink, anchor) => {
            let face = match face {
                Face::Title => " font-size=\"24\" font-weight=\"600\"",
                Face::Heading => " font-size=\"16\" font-weight=\"600\"",
                Face::Label => "",
            };
            let anchor = match anchor {
                Anchor::Start => "",
                Anchor::Middle => " text-anchor=\"middle\"",
                Anchor::End => " text-anchor=\"end\"",
            };
            writeln!(out, "<text x=\"{x}\" y=\"{y}\"{face}{}{anchor}>{}</text>", fill(*ink), escaped(text))
        }
        Shape::Tag(x, y, text) => {
            let width = 8 * text.chars().count() as u32 + 10;
            let left = x.saturating_sub(width / 2);
            let top = y.saturating_sub(10);
            writeln!(
                out,
                "<rect x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"20\" rx=\"10\" class=\"p\" opacity=\".82\"/>\
                 <text x=\"{x}\" y=\"{}\" class=\"t\" font-size=\"12\" text-anchor=\"middle\">{}</text>",
                y + 4,
                escaped(text)
            )
        }
        Shape::Cells(x, y, side, raster) => writeln!(
            out,
            "<image x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" style=\"image-rendering:pixelated\" \
             href=\"data:image/png;base64,{}\"/>",
            raster.width * side,
            raster.height * side,
            STANDARD.encode(encode(raster.width * side, raster.height * side, &enlarged(raster, *side)))
        ),
        Shape::Borders(lines) => {
            out.push_str("<path class=\"b\" fill=\"none\" stroke-opacity=\".45\" d=\"");
            for [x1, y1, x2, y2] in lines {
                _ = write!(out, "M{x1} {y1}L{x2} {y2}");
            }
            writeln!(out, "\"/>")
        }
    };
}

fn fill(ink: Ink) -> String {
    match ink {
        Ink::Ground => " class=\"g\"".to_owned(),
        Ink::Well => " class=\"w\"".to_owned(),
        Ink::Text => " class=\"t\"".to_owned(),
        Ink::Quiet => " class=\"q\"".to_owned(),
        Ink::Border => " class=\"b\"".to_owned(),
        Ink::Fixed([r, g, b, a]) => {
            format!(" fill=\"#{r:02x}{g:02x}{b:02x}\" fill-opacity=\"{:.2}\"", f32::from(a) / 255.0)
        }
    }
}

/// Every cell as large as it is shown: not every viewer keeps pixels sharp when it enlarges them.
fn enlarged(raster: &Raster, side: u32) -> Vec<Rgba> {
    let side = side as usize;
    let rows = raster.pixels.chunks(raster.width.max(1) as usize);
    rows.flat_map(|row| {
        let wide: Vec<Rgba> = row.iter().flat_map(|pixel| std::iter::repeat_n(*pixel, side)).collect();
        std::iter::repeat_n(wide, side).flatten()
    })
    .collect()
}

/// Names of files and blocks are anybody's.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
