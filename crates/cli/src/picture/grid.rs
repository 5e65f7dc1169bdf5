//! Memory counted into cells: as many as a picture shows, however large the memory is.

use vmstate::job::{MapKind, MapRun, MapVisitor};
use vmstate::page::RamBlock;

/// How many pages of a cell are looked at for their entropy: their bytes are counted, which takes some microseconds.
const SAMPLES_MAX: u64 = 8;

/// The kinds in the order of their counts.
pub const KINDS: [MapKind; 8] = [
    MapKind::Data,
    MapKind::Zero,
    MapKind::Hole,
    MapKind::Same,
    MapKind::Changed,
    MapKind::Appeared,
    MapKind::Vanished,
    MapKind::Empty,
];

/// Some pages that follow one another.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cell {
    /// How many of each kind, in the order of [`KINDS`].
    pub counts: [u64; 8],
    entropy_sum: f32,
    samples: u32,
}

impl Cell {
    /// The share of a kind.
    pub fn share(&self, kind: MapKind) -> f32 {
        let all: u64 = self.counts.iter().sum();
        let place = KINDS.iter().position(|known| *known == kind).unwrap_or(0);
        if all == 0 { 0.0 } else { self.counts[place] as f32 / all as f32 }
    }

    /// The mean entropy of the pages that were looked at, in bits a byte.
    pub fn entropy(&self) -> Option<f32> {
        (self.samples > 0).then(|| self.entropy_sum / self.samples as f32)
    }

    /// Both together.
    pub fn add(&mut self, other: &Cell) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        self.entropy_sum += other.entropy_sum;
        self.samples += other.samples;
    }
}

/// A block of memory in cells.
#[derive(Clone, Debug)]
pub struct Grid {
    /// The block.
    pub block: RamBlock,
    /// How many pages a cell has.
    pub pages_per_cell: u64,
    /// The cells; the last may be there in part.
    pub cells: Vec<Cell>,
}

impl Grid {
    /// A grid of at most `cells_max` cells.
    pub fn new(block: RamBlock, cells_max: u64) -> Grid {
        let pages = block.pages().0;
        let mut pages_per_cell = 1;
        while pages.div_ceil(pages_per_cell) > cells_max.max(1) {
            pages_per_cell *= 2;
        }
        let cells = vec![Cell::default(); pages.div_ceil(pages_per_cell) as usize];
        Grid { block, pages_per_cell, cells }
    }

    fn run(&mut self, run: &MapRun<'_>) {
        let Some(kind) = KINDS.iter().position(|kind| *kind == run.kind) else { return };
        let mut page = run.range.start.0;
        while page < run.range.end.0 {
            let index = page / self.pages_per_cell;
            let end = ((index + 1) * self.pages_per_cell).min(run.range.end.0);
            let Some(cell) = self.cells.get_mut(index as usize) else { return };
            cell.counts[kind] += end - page;
            if run.kind == MapKind::Data {
                // The pages of a cell that are looked at are spread over it.
                let step = self.pages_per_cell.div_ceil(SAMPLES_MAX);
                for sample in (page.next_multiple_of(step)..end).step_by(step as usize) {
                    if let Some(bytes) = run.page(sample - run.range.start.0) {
                        cell.entropy_sum += entropy(bytes);
                        cell.samples += 1;
                    }
                }
            }
            page = end;
        }
    }
}

/// Shannon's entropy of the bytes, in bits a byte: 0 where all are the same, 8 where all values are equally frequent.
fn entropy(bytes: &[u8]) -> f32 {
    let mut counts = [0u32; 256];
    for byte in bytes {
        counts[usize::from(*byte)] += 1;
    }
    let len = bytes.len() as f32;
    let part = |count: &u32| {
        let share = *count as f32 / len;
        -share * share.log2()
    };
    counts.iter().filter(|count| **count > 0).map(part).sum()
}

/// All blocks of a picture, and what is told to whoever follows the map.
#[derive(Debug, Default)]
pub struct Grids {
    /// The blocks, in the order of the image.
    pub grids: Vec<Grid>,
    at: Option<usize>,
}

impl Grids {
    /// Counts into these grids.
    pub fn new(grids: Vec<Grid>) -> Grids {
        Grids { grids, at: None }
    }
}

impl MapVisitor for Grids {
    fn block(&mut self, block: &RamBlock) {
        self.at = self.grids.iter().position(|grid| grid.block.name == block.name);
    }

    fn run(&mut self, run: &MapRun<'_>) {
        if let Some(grid) = self.at.and_then(|at| self.grids.get_mut(at)) {
            grid.run(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_that_of_shannon() {
        let all: Vec<u8> = (0..4096).map(|i| i as u8).collect();
        let two: Vec<u8> = (0..4096).map(|i| i as u8 & 1).collect();
        for (bytes, expected) in [(vec![7; 4096], 0.0), (all, 8.0), (two, 1.0), (vec![], 0.0)] {
            assert!((entropy(&bytes) - expected).abs() < 1e-4, "{expected}");
        }
    }

    #[test]
    fn a_grid_has_no_more_cells_than_it_may() {
        let page_size = vmstate::page::PageSize::X86;
        for (length, cells, per_cell) in [(0, 0, 1), (4096, 1, 1), (400 << 12, 50, 8), (401 << 12, 51, 8)] {
            let block = RamBlock { name: "ram".into(), length, page_size };
            let grid = Grid::new(block, 64);
            assert_eq!((grid.cells.len(), grid.pages_per_cell), (cells, per_cell), "{length:#x}");
        }
    }
}
