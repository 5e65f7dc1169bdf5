//! The contract between a lane and whoever knows where the bytes are.

use std::io;
use std::sync::Arc;

use crate::file_supply::FileSupply;
use crate::slab::{HUGE_PAGE, Slab};

/// The number of grains that a piece has at most: the bits of its mask.
pub const PIECE_GRAINS: u32 = 256;

/// The smallest grain, in bytes: a sector.
pub const GRAIN_MIN: u32 = 512;

/// The largest grain, in bytes: the largest base page of a supported processor (64 KiB on arm64).
pub const GRAIN_MAX: u32 = 64 << 10;

/// One piece of work of a lane: up to 256 grains (pages) of one region, of which the marked ones matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which region, in the numbering of the supply.
    pub region: u32,
    /// Where the piece starts in its region, in bytes: a multiple of `grain`.
    pub offset: u64,
    /// The file offset of the piece's first byte.
    pub target: u64,
    /// The size of a grain in bytes: a power of two from [`GRAIN_MIN`] to [`GRAIN_MAX`].
    pub grain: u32,
    /// The bytes of the piece; the last grain may be cut short (an odd tail).
    pub len: u32,
    /// The grains that matter: bit `i % 64` of word `i / 64` is grain `i`.
    pub mask: [u64; 4],
}

impl Piece {
    /// How many grains the piece has, the last one possibly in part.
    pub fn grains(&self) -> u32 {
        self.len.div_ceil(self.grain)
    }

    /// The half-open byte range, within the piece, of the grains `start..end`.
    pub fn bytes_of(&self, start: usize, end: usize) -> (usize, usize) {
        let (grain, len) = (self.grain as usize, self.len as usize);
        ((start * grain).min(len), (end * grain).min(len))
    }

    /// How many bytes the grains in `mask` have.
    pub fn bytes_in(&self, mask: &[u64; 4]) -> u64 {
        runs(*mask).map(|(start, end)| self.bytes_of(start, end)).map(|(from, to)| (to - from) as u64).sum()
    }

    /// # Panics
    /// When the piece is not as its fields' docs demand: pieces are made by planners, never read from a file.
    pub(crate) fn assert_whole(&self) {
        let grain = self.grain;
        assert!(
            grain.is_power_of_two() && (GRAIN_MIN..=GRAIN_MAX).contains(&grain),
            "a piece with grains of {grain:#x} bytes"
        );
        assert!(self.offset.is_multiple_of(grain.into()), "a piece at {:#x} amid a grain", self.offset);
        assert!(self.grains() <= PIECE_GRAINS, "a piece of {} grains", self.grains());
        let end = self.target.checked_add(self.len.into());
        assert!(end.is_some_and(|end| i64::try_from(end).is_ok()), "a piece at {:#x}", self.target);
        assert!(self.holds(&self.mask), "a piece of {} grains marks some beyond its end", self.grains());
    }

    /// Whether every grain in `mask` is one of the piece's.
    pub(crate) fn holds(&self, mask: &[u64; 4]) -> bool {
        runs(*mask).all(|(_, end)| end <= self.grains() as usize)
    }
}

/// Where the bytes of a piece are, and which of its grains must be written.
#[derive(Clone, Copy, Debug)]
pub struct Supplied {
    /// The address of the piece's first byte. Grains that are not in `write` need not be mapped.
    pub base: *const u8,
    /// The grains to write. More than the piece marked is allowed (bridged gaps), and so is less (zeros).
    pub write: [u64; 4],
}

/// Says where the bytes of a piece are.
///
/// A lane calls [`Supply::supply`] from its own thread, then writes the grains of the answer straight from
/// memory. It has several pieces under way, each with a scratch of its own, and asks for another piece with the
/// same scratch only when the first is written. A supply may block on memory (page faults), never on the lanes.
/// After an error the lane stops and the whole job fails.
///
/// # Safety
/// For every grain in [`Supplied::write`] the bytes at `base + i * grain`, cut at the piece's length, must
/// stay mapped and readable until the lane asks for another piece with the same scratch or drops that scratch.
/// Others may change them meanwhile: the lane and the kernel read them without assuming anything of their values.
pub unsafe trait Supply: Send + Sync {
    /// Finds the bytes of `piece`; those that have to be copied go to `scratch`, which holds the whole piece.
    ///
    /// # Errors
    /// Whatever makes the bytes unreachable, naming the region and the address.
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied>;

    /// The file that the pieces are parts of, where they are: a lane with a ring reads it by that, many requests at
    /// a time, and does not call [`Supply::supply`].
    fn as_file(&self) -> Option<&FileSupply> {
        None
    }
}

/// A lane's buffer for the bytes that cannot be written from where they are.
#[derive(Debug)]
pub struct Scratch {
    slab: Arc<Slab>,
    /// Which of the slab's buffers; nobody else has it.
    buffer: usize,
}

impl Scratch {
    /// A buffer of at least `len` bytes, rounded up to whole huge pages.
    ///
    /// # Errors
    /// When the memory cannot be mapped.
    pub fn new(len: usize) -> io::Result<Scratch> {
        let slab = Slab::map(1, len.max(1).next_multiple_of(HUGE_PAGE))?;
        Ok(Scratch { slab: Arc::new(slab), buffer: 0 })
    }

    /// As many buffers of `len` bytes as share a huge page; where not even two do, one as by [`Scratch::new`].
    ///
    /// # Errors
    /// When the memory cannot be mapped.
    pub(crate) fn several(len: usize) -> io::Result<Vec<Scratch>> {
        let len = len.max(GRAIN_MIN as usize).next_power_of_two();
        let buffers = HUGE_PAGE / len;
        if buffers < 2 {
            return Ok(vec![Scratch::new(len)?]);
        }
        let slab = Arc::new(Slab::map(buffers, len)?);
        Ok((0..buffers).map(|buffer| Scratch { slab: slab.clone(), buffer }).collect())
    }

    /// A buffer of `len` bytes on pages of the usual size.
    ///
    /// # Errors
    /// When the memory cannot be mapped.
    pub(crate) fn plain(len: usize) -> io::Result<Scratch> {
        Ok(Scratch { slab: Arc::new(Slab::map_plain(1, len.max(GRAIN_MIN as usize))?), buffer: 0 })
    }

    /// Whether it was made by [`Scratch::plain`].
    pub(crate) fn is_plain(&self) -> bool {
        self.slab.is_plain()
    }

    /// Makes the buffer hold at least `len` bytes; what it held before is lost if it has to grow.
    ///
    /// # Errors
    /// When the memory cannot be mapped; the buffer is then as it was.
    pub fn reserve(&mut self, len: usize) -> io::Result<()> {
        if len > self.len() {
            *self = Scratch::new(len)?;
        }
        Ok(())
    }

    /// The start of the buffer, aligned to its length or to 2 MiB, whichever is less; valid until the scratch grows
    /// or is dropped.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.base()
    }

    /// The same for a lane that shares the scratch among its requests.
    pub(crate) fn base(&self) -> *mut u8 {
        self.slab.buffer(self.buffer)
    }

    /// The length of the buffer in bytes.
    pub fn len(&self) -> usize {
        self.slab.buffer_len()
    }

    /// Never true: a scratch has at least a sector.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The runs of set bits of a mask, in order, as half-open pairs of grain numbers.
pub(crate) fn runs(mask: [u64; 4]) -> impl Iterator<Item = (usize, usize)> {
    let bit = move |i: usize| mask[i / 64] >> (i % 64) & 1 == 1;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < PIECE_GRAINS as usize && !bit(at) {
            // A word without bits is skipped whole: most masks are sparse or full.
            at = if at.is_multiple_of(64) && mask[at / 64] == 0 { at + 64 } else { at + 1 };
        }
        if at >= PIECE_GRAINS as usize {
            return None;
        }
        let start = at;
        while at < PIECE_GRAINS as usize && bit(at) {
            at = if at.is_multiple_of(64) && mask[at / 64] == u64::MAX { at + 64 } else { at + 1 };
        }
        Some((start, at))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(grain: u32, len: u32, mask: [u64; 4]) -> Piece {
        Piece { region: 0, offset: 0, target: 0, grain, len, mask }
    }

    #[test]
    fn runs_cross_words() {
        for (mask, expected) in [
            ([0; 4], vec![]),
            ([u64::MAX; 4], vec![(0, 256)]),
            ([1 << 63, 1, 0, 1 << 63], vec![(63, 65), (255, 256)]),
            ([0, 0, u64::MAX, 0], vec![(128, 192)]),
            ([0b1011, 0, 0, 0], vec![(0, 2), (3, 4)]),
        ] {
            assert_eq!(runs(mask).collect::<Vec<_>>(), expected, "{mask:x?}");
        }
    }

    #[test]
    fn an_odd_tail_is_cut_at_the_length() {
        let odd = piece(4096, 4096 * 2 + 5, [0b111, 0, 0, 0]);
        assert_eq!(odd.grains(), 3);
        assert_eq!(odd.bytes_of(1, 3), (4096, 8197));
        assert_eq!(odd.bytes_in(&[0b101, 0, 0, 0]), 4096 + 5);
    }

    #[test]
    fn misshapen_pieces_are_programmer_errors() {
        for (name, bad) in [
            ("no grain", piece(0, 0, [0; 4])),
            ("odd grain", piece(4097, 4097, [0; 4])),
            ("huge grain", piece(GRAIN_MAX * 2, 1, [0; 4])),
            ("too many grains", piece(512, 512 * 256 + 1, [0; 4])),
            ("mark beyond the end", piece(4096, 4096, [0b10, 0, 0, 0])),
            ("amid a grain", Piece { offset: 100, ..piece(4096, 4096, [1, 0, 0, 0]) }),
            ("beyond any file", Piece { target: i64::MAX as u64, ..piece(4096, 4096, [1, 0, 0, 0]) }),
        ] {
            let caught = std::panic::catch_unwind(|| bad.assert_whole());
            assert!(caught.is_err(), "{name} was accepted");
        }
        piece(GRAIN_MAX, GRAIN_MAX * 256, [u64::MAX; 4]).assert_whole();
        piece(GRAIN_MIN, 0, [0; 4]).assert_whole();
    }

    #[test]
    fn a_scratch_grows_and_never_shrinks() {
        let mut scratch = Scratch::new(1).expect("a huge page");
        assert_eq!(scratch.len(), HUGE_PAGE);
        scratch.reserve(HUGE_PAGE + 1).expect("two huge pages");
        assert_eq!(scratch.len(), 2 * HUGE_PAGE);
        scratch.reserve(1).expect("nothing to do");
        assert_eq!(scratch.len(), 2 * HUGE_PAGE);
    }

    #[test]
    fn buffers_that_fit_share_a_huge_page() {
        for (len, buffers, each) in [
            (0, 4096, 512),
            (1 << 20, 2, 1 << 20),
            ((1 << 20) - 1, 2, 1 << 20),
            ((1 << 20) + 1, 1, HUGE_PAGE),
            (16 << 20, 1, 16 << 20),
        ] {
            let several = Scratch::several(len).expect("memory");
            assert_eq!(several.len(), buffers, "{len:#x}");
            for (i, scratch) in several.iter().enumerate() {
                assert_eq!(scratch.len(), each, "{len:#x}");
                assert_eq!(scratch.base().addr(), several[0].base().addr() + i * each, "{len:#x}");
            }
        }
    }
}
