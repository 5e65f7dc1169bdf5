//! The colours of cells: what a page is, how much is in it, what became of it.

use vmstate::job::MapKind;

use super::grid::Cell;

/// Red, green, blue, opacity.
pub type Rgba = [u8; 4];

/// Entropy from 0 to 8 bits a byte, in equal steps: blue is regular, red is random.
const ENTROPY: [Rgba; 9] = [
    [0x2b, 0x59, 0xc3, 255],
    [0x2f, 0x7d, 0xe1, 255],
    [0x1f, 0xa2, 0xd6, 255],
    [0x18, 0xb8, 0xa6, 255],
    [0x3f, 0xc1, 0x6b, 255],
    [0xa4, 0xc6, 0x39, 255],
    [0xf2, 0xc1, 0x2e, 255],
    [0xf5, 0x86, 0x2a, 255],
    [0xe0, 0x33, 0x55, 255],
];

/// What no picture of one image shows: the colour of data whose pages were not looked at.
const PLAIN_DATA: Rgba = [0x3f, 0x8f, 0xd2, 255];

/// The colour of a kind, as in the legend. What is not there lets the ground through, and so it is right on light and on
/// dark ground.
pub fn of_kind(kind: MapKind) -> Rgba {
    match kind {
        MapKind::Data => PLAIN_DATA,
        MapKind::Zero => [0x8a, 0x94, 0xad, 0x8c],
        MapKind::Hole | MapKind::Empty => [0, 0, 0, 0],
        MapKind::Same => [0x7b, 0x92, 0xb5, 0x96],
        MapKind::Changed => [0xf5, 0x86, 0x2a, 255],
        MapKind::Appeared => [0x2f, 0xb8, 0x6a, 255],
        MapKind::Vanished => [0xd6, 0x33, 0x8a, 255],
    }
}

/// The colour of an entropy in bits a byte.
pub fn of_entropy(bits: f32) -> Rgba {
    let place = bits.clamp(0.0, 8.0);
    let low = (place.floor() as usize).min(7);
    let part = place - low as f32;
    std::array::from_fn(|i| {
        let (a, b) = (f32::from(ENTROPY[low][i]), f32::from(ENTROPY[low + 1][i]));
        (a + (b - a) * part).round() as u8
    })
}

/// The colour of a cell: those of its kinds, mixed by their shares. What there is little of counts for more than its
/// share, so that a page of data in a sea of nothing is seen.
pub fn of_cell(cell: &Cell) -> Rgba {
    let mut sum = [0f32; 4];
    let mut weights = 0.0;
    for kind in super::grid::KINDS {
        let share = cell.share(kind);
        if share == 0.0 {
            continue;
        }
        let is_quiet = matches!(kind, MapKind::Zero | MapKind::Hole | MapKind::Same | MapKind::Empty);
        let weight = if is_quiet { share } else { share.sqrt() };
        let [r, g, b, a] = match (kind, cell.entropy()) {
            // An eighth of a bit is more than the eye tells, and fewer colours make a smaller file.
            (MapKind::Data, Some(bits)) => of_entropy((bits * 8.0).round() / 8.0),
            _ => of_kind(kind),
        };
        let opacity = f32::from(a) / 255.0 * weight;
        for (sum, part) in sum.iter_mut().zip([r, g, b]) {
            *sum += f32::from(part) * opacity;
        }
        sum[3] += opacity;
        weights += weight;
    }
    if sum[3] == 0.0 {
        return [0, 0, 0, 0];
    }
    let colour = |i: usize| (sum[i] / sum[3]).round() as u8;
    [colour(0), colour(1), colour(2), (sum[3] / weights * 255.0).round() as u8]
}
