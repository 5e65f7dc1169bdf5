//! Guest memory as the lanes want it.

use std::io;
use std::sync::atomic::Ordering;

use ::io::{Piece, Scratch, Supplied, Supply};
use page::{Mask, WINDOW_PAGES};

use crate::guest_ram::{GuestRam, Part, Region};
use crate::zero::nonzero_mask;

/// How many bytes a disk writes in the time that another request costs it. Zeros between data that are fewer are
/// written along; as many or more stay a hole.
///
/// Measured into a new file on ext4, 512 MiB of which data and gaps took turns: apart took 2.3 times as long as
/// written along with gaps of 64 KiB between data of 16 KiB, as long between data of 128 KiB, and half as long with
/// gaps of 128 KiB.
pub(crate) const UNIT: usize = 96 << 10;

// SAFETY: the answer is the scratch, into which every grain named was copied or zeroed. It is left alone until
// the lane asks again.
unsafe impl Supply for GuestRam {
    /// Finds the data among the marked pages. The pages that are not marked are taken to be absent, as they
    /// are in the pieces that [`GuestRam::piece`] makes of [`GuestRam::windows`]: short gaps of them are
    /// supplied as zeros. To mark a page that is absent is sound, but where memory is read from the process it
    /// allocates the page.
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        let region = self.region(piece.region)?;
        check_piece(region, piece, scratch)?;
        let supplied = self.supply_copied(piece, scratch)?;
        region.record(piece, supplied.write);
        Ok(supplied)
    }
}

impl GuestRam {
    /// Copies the marked pages and looks for zeros in the copy, which the cache still holds.
    ///
    /// Shared memory could be written straight from a mapping of ours, without the copy. That was slower: what
    /// is saved on the copy is paid for mapping and pinning every page of 4 KiB (1.3 times the time, 2 GiB in
    /// a memfd, five pairs in turn).
    fn supply_copied(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        let marked = Mask(piece.mask);
        let base = self.copy_runs(piece, marked, scratch)?;
        // SAFETY: the marked pages were copied to the scratch just now.
        let data = unsafe { nonzero_mask(base, piece.len as usize, piece.grain as usize, marked) };
        let write = bridge(data, piece.grain, self.gap_bytes_min.load(Ordering::Relaxed));
        for (start, end) in minus(write, marked).runs() {
            let (from, to) = piece.bytes_of(start, end);
            // SAFETY: bytes of the scratch, which holds the whole piece and is ours until we answer.
            unsafe { base.wrapping_add(from).write_bytes(0, to - from) };
        }
        Ok(Supplied { base, write: write.0 })
    }

    /// Copies runs of a piece to where they are in the scratch, the start of which it returns.
    pub(crate) fn copy_runs(&self, piece: &Piece, mask: Mask, scratch: &mut Scratch) -> io::Result<*mut u8> {
        let base = scratch.as_mut_ptr();
        let part = |(start, end)| {
            let (from, to) = piece.bytes_of(start, end);
            Part { offset: piece.offset + from as u64, local: base.wrapping_add(from), len: to - from }
        };
        let parts: Vec<Part> = mask.runs().map(part).filter(|part| part.len > 0).collect();
        // SAFETY: every part lies in the scratch, which holds the whole piece and is ours until we answer.
        unsafe { self.copy(piece.region as usize, &parts) }?;
        Ok(base)
    }
}

impl Region {
    fn record(&self, piece: &Piece, write: [u64; 4]) {
        // The piece was found to start at a window and to lie within the region.
        self.data.add((piece.offset / u64::from(piece.grain) / 64) as usize, write);
    }
}

/// Refuses a piece that is not a window of its region, or that marks pages beyond its end.
pub(crate) fn check_piece(region: &Region, piece: &Piece, scratch: &Scratch) -> io::Result<()> {
    let is_window = u64::from(piece.grain) == region.page_size.bytes()
        && piece.offset.is_multiple_of(u64::from(piece.grain) * WINDOW_PAGES)
        && piece.offset.checked_add(piece.len.into()).is_some_and(|end| end <= region.block.length)
        && piece.grains() as u64 <= WINDOW_PAGES
        && minus(Mask(piece.mask), Mask::range(0, piece.grains() as usize)).is_empty();
    if is_window && scratch.len() >= piece.len as usize {
        return Ok(());
    }
    let text = format!(
        "piece of {:#x} bytes at {:#x} is no window of block `{}`",
        piece.len, piece.offset, region.block.name
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// The mask with its gaps filled where they are shorter than a unit.
fn bridge(mask: Mask, grain: u32, unit: usize) -> Mask {
    let mut bridged = mask;
    let mut previous_end = None;
    for (start, end) in mask.runs() {
        if let Some(gap_start) = previous_end
            && (start - gap_start) * (grain as usize) < unit
        {
            bridged.insert_range(gap_start, start);
        }
        previous_end = Some(end);
    }
    bridged
}

fn minus(mask: Mask, without: Mask) -> Mask {
    Mask(std::array::from_fn(|i| mask.0[i] & !without.0[i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(ranges: &[(usize, usize)]) -> Mask {
        ranges.iter().fold(Mask::EMPTY, |all, &(start, end)| all.or(Mask::range(start, end)))
    }

    #[test]
    fn gaps_shorter_than_a_unit_are_bridged() {
        for (data, expected) in [
            (mask(&[]), mask(&[])),
            (mask(&[(0, 1), (24, 25)]), mask(&[(0, 25)])),
            (mask(&[(0, 1), (25, 26)]), mask(&[(0, 1), (25, 26)])),
            (mask(&[(5, 6), (250, 251), (255, 256)]), mask(&[(5, 6), (250, 256)])),
        ] {
            assert_eq!(bridge(data, 4096, UNIT), expected, "{:?}", data.runs().collect::<Vec<_>>());
        }
    }

    #[test]
    fn it_is_bytes_that_count_and_not_grains() {
        let crumbs = mask(&[(0, 1), (2, 3), (5, 6)]);
        assert_eq!(bridge(crumbs, 64 << 10, UNIT), mask(&[(0, 3), (5, 6)]));
        assert_eq!(bridge(crumbs, 64 << 10, 1 << 20), mask(&[(0, 6)]), "a disk that seeks for longer");
    }
}
