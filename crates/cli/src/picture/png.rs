//! The scene as a PNG, with the fixed fonts of X11.

use std::convert::Infallible;

use embedded_graphics::mono_font::iso_8859_1::{FONT_7X13, FONT_9X15_BOLD, FONT_10X20};
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::{DrawTarget, Drawable, OriginDimensions, Pixel, Point, RgbColor, Size};
use embedded_graphics::text::{Alignment, Text};

use super::Theme;
use super::colour::Rgba;
use super::scene::{Anchor, Face, Ink, Scene, Shape};

/// Draws it.
pub fn png(scene: &Scene, theme: Theme) -> Vec<u8> {
    let pixels = vec![[0, 0, 0, 255]; (scene.width * scene.height) as usize];
    let mut canvas = Canvas { width: scene.width, height: scene.height, dark: theme == Theme::Dark, pixels };
    for shape in &scene.shapes {
        canvas.shape(shape);
    }
    encode(scene.width, scene.height, &canvas.pixels)
}

/// Pixels as a PNG file.
pub fn encode(width: u32, height: u32, pixels: &[Rgba]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut out, width, height);
    encoder.set_color(::png::ColorType::Rgba);
    encoder.set_depth(::png::BitDepth::Eight);
    encoder.set_compression(::png::Compression::High);
    // Cells are flat: the pixel above or before is mostly the same, and a difference would only hide that.
    encoder.set_filter(::png::Filter::NoFilter);
    let written = encoder.write_header().and_then(|mut writer| {
        writer.write_image_data(pixels.as_flattened())?;
        writer.finish()
    });
    // A vector takes all that is written, and the pixels are as many as the header says.
    debug_assert!(written.is_ok(), "{written:?}");
    out
}

struct Canvas {
    width: u32,
    height: u32,
    dark: bool,
    pixels: Vec<Rgba>,
}

impl Canvas {
    fn colour(&self, ink: Ink) -> Rgba {
        let [r, g, b] = match (ink, self.dark) {
            (Ink::Fixed(colour), _) => return colour,
            (Ink::Ground, false) => [0xff, 0xff, 0xff],
            (Ink::Well, false) => [0xee, 0xf1, 0xf6],
            (Ink::Text, false) => [0x1c, 0x22, 0x30],
            (Ink::Quiet, false) => [0x68, 0x71, 0x8a],
            (Ink::Border, false) => return [0x1c, 0x22, 0x30, 115],
            (Ink::Ground, true) => [0x10, 0x14, 0x1d],
            (Ink::Well, true) => [0x1b, 0x21, 0x2e],
            (Ink::Text, true) => [0xe8, 0xec, 0xf4],
            (Ink::Quiet, true) => [0x8f, 0x9a, 0xb3],
            (Ink::Border, true) => return [0xff, 0xff, 0xff, 115],
        };
        [r, g, b, 255]
    }

    fn blend(&mut self, x: u32, y: u32, [r, g, b, a]: Rgba) {
        if x >= self.width || y >= self.height {
            return;
        }
        let under = &mut self.pixels[(y * self.width + x) as usize];
        for (under, over) in under.iter_mut().zip([r, g, b]) {
            let mixed = u32::from(*under) * u32::from(255 - a) + u32::from(over) * u32::from(a);
            *under = (mixed / 255) as u8;
        }
    }

    fn fill(&mut self, x: u32, y: u32, width: u32, height: u32, colour: Rgba) {
        for row in y..y + height {
            for column in x..x + width {
                self.blend(column, row, colour);
            }
        }
    }

    fn shape(&mut self, shape: &Shape) {
        match shape {
            Shape::Rect(x, y, width, height, ink) => self.fill(*x, *y, *width, *height, self.colour(*ink)),
            Shape::Text(x, y, text, face, ink, anchor) => {
                let font = match face {
                    Face::Title => &FONT_10X20,
                    Face::Heading => &FONT_9X15_BOLD,
                    Face::Label => &FONT_7X13,
                };
                let alignment = match anchor {
                    Anchor::Start => Alignment::Left,
                    Anchor::Middle => Alignment::Center,
                    Anchor::End => Alignment::Right,
                };
                self.text(*x, *y, text, font, *ink, alignment);
            }
            Shape::Tag(x, y, text) => {
                let width = 7 * text.chars().count() as u32 + 10;
                let [r, g, b, _] = self.colour(Ink::Ground);
                self.fill(x.saturating_sub(width / 2), y.saturating_sub(9), width, 18, [r, g, b, 210]);
                self.text(*x, y + 4, text, &FONT_7X13, Ink::Text, Alignment::Center);
            }
            Shape::Cells(x, y, side, raster) => {
                for (i, colour) in raster.pixels.iter().enumerate() {
                    let (column, row) = (i as u32 % raster.width, i as u32 / raster.width);
                    self.fill(x + column * side, y + row * side, *side, *side, *colour);
                }
            }
            Shape::Borders(lines) => {
                let colour = self.colour(Ink::Border);
                for [x1, y1, x2, y2] in lines {
                    self.fill(*x1, *y1, (x2 - x1).max(1), (y2 - y1).max(1), colour);
                }
            }
        }
    }

    fn text(&mut self, x: u32, y: u32, text: &str, font: &MonoFont<'_>, ink: Ink, alignment: Alignment) {
        let [r, g, b, _] = self.colour(ink);
        let style = MonoTextStyle::new(font, Rgb888::new(r, g, b));
        // The fonts have the letters of Latin-1; what is none shows as a question mark.
        let text: String = text.chars().map(|c| if c == '…' { '.' } else { c }).collect();
        let place = Point::new(x as i32, y as i32);
        let Ok(_) = Text::with_alignment(&text, place, style, alignment).draw(self);
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(at, colour) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y)) {
                self.blend(x, y, [colour.r(), colour.g(), colour.b(), 255]);
            }
        }
        Ok(())
    }
}
