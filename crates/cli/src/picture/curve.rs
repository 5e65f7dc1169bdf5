//! Which cell of a rectangle is the n-th: in rows, or along a curve that keeps neighbours together.

/// How memory is laid out in a rectangle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row by row, from left to right.
    Rows,
    /// Along a Hilbert curve, for rectangles of any size: what is near in memory is near in the picture.
    Hilbert,
}

/// The cells of a rectangle in the order of the layout, each as column and row.
pub fn cells(layout: Layout, width: u32, height: u32) -> Vec<(u32, u32)> {
    match layout {
        Layout::Rows => (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).collect(),
        Layout::Hilbert => {
            let mut cells = Vec::with_capacity((width * height) as usize);
            let (width, height) = (width as i32, height as i32);
            let (across, down) = (Vector(width, 0), Vector(0, height));
            match width >= height {
                true => walk(Vector(0, 0), across, down, &mut cells),
                false => walk(Vector(0, 0), down, across, &mut cells),
            }
            cells
        }
    }
}

#[derive(Clone, Copy)]
struct Vector(i32, i32);

impl Vector {
    fn plus(self, other: Vector) -> Vector {
        Vector(self.0 + other.0, self.1 + other.1)
    }

    fn minus(self, other: Vector) -> Vector {
        Vector(self.0 - other.0, self.1 - other.1)
    }

    /// One step in its direction; it runs along one axis.
    fn unit(self) -> Vector {
        Vector(self.0.signum(), self.1.signum())
    }

    fn len(self) -> i32 {
        (self.0 + self.1).abs()
    }

    /// Half of it, made even by one step more, so that the curve comes out at the side where the next part begins.
    fn half(self) -> Vector {
        let half = Vector(self.0 >> 1, self.1 >> 1);
        if half.len() % 2 != 0 && self.len() > 2 { half.plus(self.unit()) } else { half }
    }
}

/// Fills the rectangle that `long` and `short` span from `at`, beginning there and ending at the far end of `long`.
///
/// A rectangle that is much longer than wide is cut in two across. Others are three: up along `short`, across, and down
/// again. It goes as deep as the logarithm of the sides.
fn walk(at: Vector, long: Vector, short: Vector, cells: &mut Vec<(u32, u32)>) {
    if long.len() <= 1 || short.len() <= 1 {
        let line = if short.len() <= 1 { long } else { short };
        let mut here = at;
        for _ in 0..line.len() {
            cells.push((here.0 as u32, here.1 as u32));
            here = here.plus(line.unit());
        }
        return;
    }
    if 2 * long.len() > 3 * short.len() {
        let half = long.half();
        walk(at, half, short, cells);
        walk(at.plus(half), long.minus(half), short, cells);
        return;
    }
    let (up, half) = (short.half(), Vector(long.0 >> 1, long.1 >> 1));
    walk(at, up, half, cells);
    walk(at.plus(up), long, short.minus(up), cells);
    let end = at.plus(long.minus(long.unit())).plus(up.minus(up.unit()));
    let back = |vector: Vector| Vector(0, 0).minus(vector);
    walk(end, back(up), back(long.minus(half)), cells);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_cell_is_visited_once_and_neighbours_stay_together() {
        for (width, height) in
            [(2, 2), (8, 8), (552, 238), (96, 43), (16, 9), (4, 30), (6, 1), (1, 5), (552, 1)]
        {
            for layout in [Layout::Rows, Layout::Hilbert] {
                let cells = cells(layout, width, height);
                assert_eq!(cells.len() as u32, width * height);
                let distinct: HashSet<_> = cells.iter().copied().collect();
                assert_eq!(distinct.len(), cells.len(), "{layout:?} {width}×{height}");
                assert!(cells.iter().all(|(x, y)| *x < width && *y < height));
                if layout == Layout::Hilbert {
                    let far = cells.windows(2).filter(|pair| {
                        let ((a, b), (c, d)) = (pair[0], pair[1]);
                        a.abs_diff(c).max(b.abs_diff(d)) > 1
                    });
                    assert_eq!(far.count(), 0, "{width}×{height}");
                }
            }
        }
        assert_eq!(cells(Layout::Hilbert, 2, 2), [(0, 0), (0, 1), (1, 1), (1, 0)]);
    }
}
