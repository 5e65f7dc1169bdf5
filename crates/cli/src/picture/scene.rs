//! What is where in the picture: panels for large blocks, small ones side by side, scales and a legend.

use vmstate::job::MapKind;
use vmstate::page::RamBlock;

use super::colour::{Rgba, of_cell, of_entropy, of_kind};
use super::curve::{self, Layout};
use super::grid::{Cell, Grid};
use crate::output::size;

const WIDTH: u32 = 1200;
const MARGIN: u32 = 48;
/// The width of a panel; divided by every size of a cell.
const PANEL_WIDTH: u32 = WIDTH - 2 * MARGIN;
/// The sizes of a cell in pixels.
const CELL_SIZES: [u32; 8] = [16, 12, 8, 6, 4, 3, 2, 1];
/// The height of one panel, and of each where there are several.
const PANEL_HEIGHT: u32 = 552;
const PANEL_HEIGHT_OF_MANY: u32 = 276;
/// Blocks with no less than this share of the largest have a panel of their own.
const PANEL_SHARE: u64 = 8;
const PANELS_MAX: usize = 8;
/// Small blocks: how many, how many beside one another, the side of one.
const MINIS_MAX: usize = 24;
const MINIS_ACROSS: u32 = 8;
const MINI_SIDE: u32 = 84;
/// The strip that shows a block from its first to its last address.
const STRIP_HEIGHT: u32 = 14;

/// The parts of a colour scheme.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ink {
    /// Behind everything.
    Ground,
    /// Behind cells.
    Well,
    /// Words.
    Text,
    /// Words of less weight.
    Quiet,
    /// Borders of parts.
    Border,
    /// A colour that is the same in every scheme.
    Fixed(Rgba),
}

/// The sizes of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Face {
    /// Of the whole.
    Title,
    /// Of a panel.
    Heading,
    /// Everything else.
    Label,
}

/// Where words begin, or end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// At their place.
    Start,
    /// Around it.
    Middle,
    /// Before it.
    End,
}

/// Pixels, row by row.
#[derive(Clone, Debug)]
pub struct Raster {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// One colour each.
    pub pixels: Vec<Rgba>,
}

/// A piece of the picture, in pixels from its upper left corner.
#[derive(Clone, Debug)]
pub enum Shape {
    /// A filled rectangle: left, top, width, height.
    Rect(u32, u32, u32, u32, Ink),
    /// Words on a line: left, base line.
    Text(u32, u32, String, Face, Ink, Anchor),
    /// An address on cells, around a point.
    Tag(u32, u32, String),
    /// Cells: left, top, the side of a cell.
    Cells(u32, u32, u32, Raster),
    /// Borders: from and to, along one axis.
    Borders(Vec<[u32; 4]>),
}

/// A picture.
#[derive(Clone, Debug)]
pub struct Scene {
    /// Its width.
    pub width: u32,
    /// Its height.
    pub height: u32,
    /// What is in it, from the back to the front.
    pub shapes: Vec<Shape>,
}

/// The words above the picture.
#[derive(Clone, Debug)]
pub struct Caption {
    /// The first line.
    pub title: String,
    /// The second.
    pub facts: String,
}

/// The places of the blocks that have a panel, by their share of the largest.
fn panels(blocks: &[RamBlock]) -> Vec<usize> {
    let largest = blocks.iter().map(|block| block.length).max().unwrap_or(0);
    let is_large = |block: &RamBlock| block.length > 0 && block.length >= largest / PANEL_SHARE;
    (0..blocks.len()).filter(|i| is_large(&blocks[*i])).take(PANELS_MAX).collect()
}

fn panel_height(panels: usize) -> u32 {
    if panels > 1 { PANEL_HEIGHT_OF_MANY } else { PANEL_HEIGHT }
}

/// Empty grids for these blocks, as fine as the picture can show them.
pub fn grids(blocks: Vec<RamBlock>) -> Vec<Grid> {
    let large = panels(&blocks);
    let finest = CELL_SIZES.iter().rev().find(|size| **size > 1).copied().unwrap_or(1);
    let of_panel = u64::from(PANEL_WIDTH / finest) * u64::from(panel_height(large.len()) / finest);
    let of_mini = u64::from((MINI_SIDE / finest) * (MINI_SIDE / finest));
    let mut minis = 0..MINIS_MAX;
    let mut cells_max = |i: usize| match large.contains(&i) {
        true => of_panel,
        // Those that are only counted need no more than their sums.
        false => minis.next().map_or(1, |_| of_mini),
    };
    blocks.into_iter().enumerate().map(|(i, block)| Grid::new(block, cells_max(i))).collect()
}

/// Draws counted memory.
pub fn scene(caption: &Caption, grids: &[Grid], layout: Layout) -> Scene {
    let blocks: Vec<RamBlock> = grids.iter().map(|grid| grid.block.clone()).collect();
    let large = panels(&blocks);
    let mut page = Page { shapes: Vec::new(), y: MARGIN, layout };
    page.text(MARGIN, 18, &caption.title, Face::Title, Ink::Text, Anchor::Start);
    page.text(MARGIN, 44, &caption.facts, Face::Label, Ink::Quiet, Anchor::Start);
    page.y += 60;
    page.legend(grids);
    for index in &large {
        page.panel(&grids[*index], panel_height(large.len()));
    }
    let small: Vec<&Grid> = (0..grids.len())
        .filter(|i| !large.contains(i) && !grids[*i].cells.is_empty())
        .map(|i| &grids[i])
        .collect();
    if !small.is_empty() {
        page.minis(&small);
    }
    page.scale_note(grids, &large);
    let height = page.y + MARGIN - 12;
    let mut shapes = vec![Shape::Rect(0, 0, WIDTH, height, Ink::Ground)];
    shapes.extend(page.shapes);
    Scene { width: WIDTH, height, shapes }
}

struct Page {
    shapes: Vec<Shape>,
    /// How far down it is filled.
    y: u32,
    layout: Layout,
}

impl Page {
    fn text(&mut self, x: u32, below: u32, text: &str, face: Face, ink: Ink, anchor: Anchor) {
        self.shapes.push(Shape::Text(x, self.y + below, text.to_owned(), face, ink, anchor));
    }

    fn swatch(&mut self, x: u32, ink: Ink) {
        self.shapes.push(Shape::Rect(x, self.y, 14, 14, Ink::Well));
        self.shapes.push(Shape::Rect(x, self.y, 14, 14, ink));
    }

    fn legend(&mut self, grids: &[Grid]) {
        let total = |kind| grids.iter().map(|grid| bytes_of(grid, kind)).sum::<u64>();
        let shows_data = total(MapKind::Data) > 0 || total(MapKind::Hole) > 0 || total(MapKind::Zero) > 0;
        let kinds: &[(MapKind, &str)] = match shows_data {
            true => &[(MapKind::Hole, "not in the image"), (MapKind::Zero, "zero")],
            false => &[
                (MapKind::Same, "same"),
                (MapKind::Changed, "changed"),
                (MapKind::Appeared, "appeared"),
                (MapKind::Vanished, "vanished"),
                (MapKind::Empty, "zero in both"),
            ],
        };
        let mut x = MARGIN;
        if shows_data {
            let text = format!("data {}", size(total(MapKind::Data)));
            self.text(x, 12, &text, Face::Label, Ink::Text, Anchor::Start);
            x += 8 * text.chars().count() as u32 + 20;
            self.text(x, 12, "regular", Face::Label, Ink::Quiet, Anchor::Start);
            x += 56;
            let steps = 96;
            let pixels = (0..steps).map(|i| of_entropy(8.0 * i as f32 / (steps - 1) as f32)).collect();
            let bar = Raster {
                width: steps,
                height: 7,
                pixels: [(); 7].iter().flat_map(|()| Vec::clone(&pixels)).collect(),
            };
            self.shapes.push(Shape::Cells(x, self.y, 2, bar));
            x += 2 * steps + 8;
            self.text(x, 12, "random", Face::Label, Ink::Quiet, Anchor::Start);
            x += 90;
        }
        for (kind, name) in kinds {
            self.swatch(x, Ink::Fixed(of_kind(*kind)));
            let text = format!("{name} {}", size(total(*kind)));
            self.text(x + 22, 12, &text, Face::Label, Ink::Text, Anchor::Start);
            x += 22 + 7 * text.chars().count() as u32 + 34;
        }
        self.y += 38;
    }

    fn panel(&mut self, grid: &Grid, height_max: u32) {
        self.text(MARGIN, 16, &grid.block.name, Face::Heading, Ink::Text, Anchor::Start);
        self.text(MARGIN + PANEL_WIDTH, 16, &shares(grid), Face::Label, Ink::Quiet, Anchor::End);
        self.y += 28;
        let cells = grid.cells.len() as u32;
        let rows = |side: u32| cells.div_ceil(PANEL_WIDTH / side);
        let side = CELL_SIZES.into_iter().find(|side| rows(*side) * side <= height_max).unwrap_or(1);
        let (width, height) = (PANEL_WIDTH / side, rows(side));
        // Full rows in the panel's frame: where memory ends before it does, the ground shows.
        self.shapes.push(Shape::Rect(MARGIN, self.y, PANEL_WIDTH, height * side, Ink::Well));
        let order = curve::cells(self.layout, width, height);
        self.shapes.push(Shape::Cells(MARGIN, self.y, side, raster(grid, &order, width, height)));
        let parts = Parts::of(grid);
        self.parts(&parts, &order, cells, width, height, side);
        self.y += height * side + 10;
        self.strip(grid, &parts);
        self.y += 28;
    }

    /// Borders between parts of equal length, each with the address at which it begins.
    fn parts(&mut self, parts: &Parts, order: &[(u32, u32)], cells: u32, width: u32, height: u32, side: u32) {
        let mut part_of = vec![u32::MAX; (width * height) as usize];
        let mut sums = vec![(0u64, 0u64, 0u64); parts.count as usize];
        for (i, (x, y)) in order.iter().take(cells as usize).enumerate() {
            let part = parts.of_cell(i as u64);
            part_of[(y * width + x) as usize] = part;
            if let Some((sum_x, sum_y, count)) = sums.get_mut(part as usize) {
                (*sum_x, *sum_y, *count) = (*sum_x + u64::from(*x), *sum_y + u64::from(*y), *count + 1);
            }
        }
        let at = |x: u32, y: u32| part_of[(y * width + x) as usize];
        let (left, top) = (MARGIN, self.y);
        let mut lines = Vec::new();
        for y in 1..height {
            runs(
                width,
                |x| at(x, y - 1) != at(x, y),
                |start, end| {
                    lines.push([left + start * side, top + y * side, left + end * side, top + y * side]);
                },
            );
        }
        for x in 1..width {
            runs(
                height,
                |y| at(x - 1, y) != at(x, y),
                |start, end| {
                    lines.push([left + x * side, top + start * side, left + x * side, top + end * side]);
                },
            );
        }
        self.shapes.push(Shape::Borders(lines));
        for (part, (x, y, count)) in sums.into_iter().enumerate() {
            // A part that is a sliver has no room for words.
            if count >= u64::from(cells / (2 * parts.count)).max(1) && parts.count > 1 {
                let centre = |sum: u64| ((sum / count) as u32) * side + side / 2;
                let text = address(part as u64 * parts.bytes);
                self.shapes.push(Shape::Tag(left + centre(x), top + centre(y), text));
            }
        }
    }

    /// The block as a line from its first address to its last.
    fn strip(&mut self, grid: &Grid, parts: &Parts) {
        let cells = grid.cells.len();
        let column = |x: usize| {
            let (start, end) = (x * cells / PANEL_WIDTH as usize, (x + 1) * cells / PANEL_WIDTH as usize);
            let mut sum = Cell::default();
            grid.cells[start..end.max(start + 1)].iter().for_each(|cell| sum.add(cell));
            of_cell(&sum)
        };
        let row: Vec<Rgba> = (0..PANEL_WIDTH as usize).map(column).collect();
        let pixels = (0..STRIP_HEIGHT).flat_map(|_| row.iter().copied()).collect();
        self.shapes.push(Shape::Rect(MARGIN, self.y, PANEL_WIDTH, STRIP_HEIGHT, Ink::Well));
        let raster = Raster { width: PANEL_WIDTH, height: STRIP_HEIGHT, pixels };
        self.shapes.push(Shape::Cells(MARGIN, self.y, 1, raster));
        self.y += STRIP_HEIGHT;
        for part in 0..=u64::from(parts.count) {
            let at = (part * parts.bytes).min(grid.block.length);
            let x = (u128::from(at) * u128::from(PANEL_WIDTH) / u128::from(grid.block.length.max(1))) as u32;
            let anchor = match x {
                0 => Anchor::Start,
                x if x + 40 > PANEL_WIDTH => Anchor::End,
                _ => Anchor::Middle,
            };
            // The last part may be too short for its words and those of the end.
            if part > 0 && anchor != Anchor::End && x + 90 > PANEL_WIDTH && at < grid.block.length {
                continue;
            }
            self.shapes.push(Shape::Rect(
                (MARGIN + x).min(MARGIN + PANEL_WIDTH - 1),
                self.y,
                1,
                4,
                Ink::Quiet,
            ));
            self.text(MARGIN + x, 17, &address(at), Face::Label, Ink::Quiet, anchor);
        }
        self.y += 20;
    }

    fn minis(&mut self, small: &[&Grid]) {
        let shown = &small[..small.len().min(MINIS_MAX)];
        let more = small.len() - shown.len();
        let text =
            if more > 0 { format!("Small blocks, and {more} more") } else { "Small blocks".to_owned() };
        self.text(MARGIN, 16, &text, Face::Heading, Ink::Text, Anchor::Start);
        self.y += 30;
        let pitch = PANEL_WIDTH / MINIS_ACROSS;
        for row in shown.chunks(MINIS_ACROSS as usize) {
            for (i, grid) in row.iter().enumerate() {
                self.mini(grid, MARGIN + i as u32 * pitch);
            }
            self.y += MINI_SIDE + 48;
        }
    }

    fn mini(&mut self, grid: &Grid, x: u32) {
        let cells = grid.cells.len() as u32;
        let across = |side: u32| (MINI_SIDE / side).min(mini_width(cells));
        let fits = |side: &u32| cells.div_ceil(across(*side)) * side <= MINI_SIDE;
        let side = CELL_SIZES.into_iter().find(fits).unwrap_or(1);
        let (width, height) = (across(side), cells.div_ceil(across(side)));
        let order = curve::cells(self.layout, width, height);
        self.shapes.push(Shape::Rect(x, self.y, width * side, height * side, Ink::Well));
        self.shapes.push(Shape::Cells(x, self.y, side, raster(grid, &order, width, height)));
        let name = grid.block.name.rsplit('/').next().unwrap_or_default();
        let name = shortened(name, 17);
        self.text(x, MINI_SIDE + 16, &name, Face::Label, Ink::Text, Anchor::Start);
        self.text(x, MINI_SIDE + 32, &size(grid.block.length), Face::Label, Ink::Quiet, Anchor::Start);
    }

    fn scale_note(&mut self, grids: &[Grid], large: &[usize]) {
        let Some(largest) = large.first().and_then(|i| grids.get(*i)) else { return };
        let cell = size(largest.pages_per_cell * largest.block.page_size.bytes());
        let way = match self.layout {
            Layout::Hilbert => "memory runs along a Hilbert curve, neighbours stay together",
            Layout::Rows => "memory runs in rows",
        };
        let mut text = format!("A cell of {} is {cell}; {way}.", largest.block.name);
        if grids.iter().any(|grid| grid.cells.iter().any(|cell| cell.entropy().is_some())) {
            text += " Data is coloured by its entropy: 0 to 8 bits a byte.";
        }
        self.text(MARGIN, 14, &text, Face::Label, Ink::Quiet, Anchor::Start);
        self.y += 18;
    }
}

/// A block in four to eight parts of equal length.
struct Parts {
    bytes: u64,
    cells: u64,
    count: u32,
}

impl Parts {
    fn of(grid: &Grid) -> Parts {
        let cell = grid.pages_per_cell * grid.block.page_size.bytes();
        let mut cells = 1;
        while grid.block.length.div_ceil(cell * cells) > 8 {
            cells *= 2;
        }
        Parts { bytes: cell * cells, cells, count: grid.block.length.div_ceil(cell * cells) as u32 }
    }

    fn of_cell(&self, cell: u64) -> u32 {
        (cell / self.cells) as u32
    }
}

/// Hands stretches in which `is_marked` holds to `on_run`.
fn runs(len: u32, is_marked: impl Fn(u32) -> bool, mut on_run: impl FnMut(u32, u32)) {
    let mut start = None;
    for i in 0..=len {
        match (i < len && is_marked(i), start) {
            (true, None) => start = Some(i),
            (false, Some(from)) => {
                on_run(from, i);
                start = None;
            }
            _ => {}
        }
    }
}

fn raster(grid: &Grid, order: &[(u32, u32)], width: u32, height: u32) -> Raster {
    let mut pixels = vec![[0; 4]; (width * height) as usize];
    for (cell, (x, y)) in grid.cells.iter().zip(order) {
        pixels[(y * width + x) as usize] = of_cell(cell);
    }
    Raster { width, height, pixels }
}

fn bytes_of(grid: &Grid, kind: MapKind) -> u64 {
    let place = super::KINDS.iter().position(|known| *known == kind).unwrap_or(0);
    let pages: u64 = grid.cells.iter().map(|cell| cell.counts[place]).sum();
    (pages * grid.block.page_size.bytes()).min(grid.block.length)
}

/// An offset in a block as people read it.
fn address(offset: u64) -> String {
    if offset == 0 { "0".to_owned() } else { size(offset) }
}

/// The length of a block and what there is of each kind.
fn shares(grid: &Grid) -> String {
    let mut text = size(grid.block.length);
    for kind in super::KINDS {
        let bytes = bytes_of(grid, kind);
        if bytes > 0 {
            text += &format!(" · {} {}", size(bytes), kind.name());
        }
    }
    text
}

/// How many cells of a small block stand beside one another: about as many as below, and an even number for the curve.
fn mini_width(cells: u32) -> u32 {
    if cells < 2 { 1 } else { cells.isqrt().next_multiple_of(2) }
}

fn shortened(name: &str, len: usize) -> String {
    match name.chars().count() > len {
        true => name.chars().take(len - 1).chain(['…']).collect(),
        false => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmstate::page::PageSize;

    fn blocks(lengths: &[u64]) -> Vec<RamBlock> {
        let block = |(i, length): (usize, &u64)| RamBlock {
            name: format!("<block & {i}>"),
            length: *length,
            page_size: PageSize::X86,
        };
        lengths.iter().enumerate().map(block).collect()
    }

    /// A scene of memory that is nowhere.
    fn drawn(lengths: &[u64], layout: Layout) -> (Scene, usize) {
        let grids = grids(blocks(lengths));
        let cells = grids.iter().map(|grid| grid.cells.len()).sum();
        let caption = Caption { title: "<title>".into(), facts: "a & b".into() };
        (scene(&caption, &grids, layout), cells)
    }

    #[test]
    fn everything_stands_within_the_picture_whatever_the_blocks() {
        for lengths in [
            &[][..],
            &[0],
            &[4096],
            &[4097],
            &[1 << 20, 0x40000, 4096],
            &[512 << 20, 16 << 20, 4096],
            &[1 << 42, 1 << 42, 1 << 30],
            &[1 << 30; 40],
            &[1 << 30; 4096],
        ] {
            for layout in [Layout::Hilbert, Layout::Rows] {
                let (scene, cells) = drawn(lengths, layout);
                assert!(cells <= 700_000, "{} blocks: {cells}", lengths.len());
                assert!((100..6000).contains(&scene.height), "{lengths:x?}: {}", scene.height);
                for shape in &scene.shapes {
                    let (right, bottom) = match shape {
                        Shape::Rect(x, y, width, height, _) => (x + width, y + height),
                        Shape::Text(x, y, ..) | Shape::Tag(x, y, _) => (*x, *y),
                        Shape::Cells(x, y, side, raster) => {
                            assert_eq!(raster.pixels.len() as u32, raster.width * raster.height);
                            (x + side * raster.width, y + side * raster.height)
                        }
                        Shape::Borders(lines) => lines
                            .iter()
                            .fold((0, 0), |(right, bottom), [.., x, y]| (right.max(*x), bottom.max(*y))),
                    };
                    assert!(right <= scene.width && bottom <= scene.height, "{lengths:x?}: {shape:?}");
                }
            }
        }
    }

    #[test]
    fn a_picture_is_small_and_whole_however_large_the_memory() {
        let (scene, _) = drawn(&[1 << 42, 16 << 20], Layout::Hilbert);
        let svg = super::super::svg(&scene, super::super::Theme::Auto);
        assert!(svg.len() < 100_000, "{}", svg.len());
        assert!(
            svg.contains("&lt;title&gt;") && svg.contains("a &amp; b") && !svg.contains("<title>"),
            "{svg}"
        );
        let png = super::super::png(&scene, super::super::Theme::Dark);
        assert!(png.len() < 100_000, "{}", png.len());
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let frame = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((frame.width, frame.height), (scene.width, scene.height));
        assert_eq!(pixels[..4], [0x10, 0x14, 0x1d, 255], "the ground is dark");
    }
}
