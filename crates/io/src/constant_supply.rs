//! Pieces that are all the same and cost nothing to have: what lanes can do is measured with them.

use std::io;

use crate::slab::{HUGE_PAGE, Slab};
use crate::supply::{Piece, Scratch, Supplied, Supply};

/// A supply of numbers that do not compress, written once into huge pages and supplied from there ever after.
///
/// A lane that has it moves nothing but what goes to the file, so its speed is the ceiling of every other
/// supply's. One huge page stays in the processor's cache, where a disk that is a processor's work finds it sooner than
/// what comes from elsewhere; many huge pages do not.
#[derive(Debug)]
pub struct ConstantSupply {
    slab: Slab,
}

/// The first word of the sequence.
const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;

impl ConstantSupply {
    /// Writes one huge page of numbers.
    ///
    /// # Errors
    /// When the memory cannot be mapped.
    pub fn new() -> io::Result<ConstantSupply> {
        ConstantSupply::of(1)
    }

    /// Writes so many huge pages, no two of which are alike.
    ///
    /// # Errors
    /// When the memory cannot be mapped; `InvalidInput` where it is none or more than 1 GiB.
    pub fn of(huge_pages: usize) -> io::Result<ConstantSupply> {
        let slab = Slab::map(huge_pages, HUGE_PAGE)?;
        let words = slab.buffer(0).cast::<u64>();
        let mut state = FIRST;
        for i in 0..huge_pages * (HUGE_PAGE / size_of::<u64>()) {
            // SAFETY: the word lies within the slab, which is aligned and nobody else's.
            unsafe { words.wrapping_add(i).write(state) };
            // xorshift64: never zero, and no two alike within a slab.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        Ok(ConstantSupply { slab })
    }
}

// SAFETY: the answer lies in a buffer of the slab, behind which there are as many bytes of it as the piece has; the slab
// lives as long as the supply, and is never written again.
unsafe impl Supply for ConstantSupply {
    fn supply(&self, piece: &Piece, _scratch: &mut Scratch) -> io::Result<Supplied> {
        let huge_page = piece.offset / HUGE_PAGE as u64 % self.slab.buffers() as u64;
        let within = (piece.offset % HUGE_PAGE as u64) as usize;
        if piece.len as usize > HUGE_PAGE - within {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Supplied { base: self.slab.buffer(huge_page as usize).wrapping_add(within), write: piece.mask })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_the_same_and_none_of_its_grains_is_zero() {
        let mut scratch = Scratch::new(1 << 20).unwrap();
        let piece = Piece { region: 0, offset: 0, target: 0, grain: 4096, len: 1 << 20, mask: [u64::MAX; 4] };
        let supply = ConstantSupply::new().unwrap();
        let first = supply.supply(&piece, &mut scratch).unwrap();
        let copy = |supplied: &Supplied| {
            let mut bytes = vec![0u8; piece.len as usize];
            for (i, byte) in bytes.iter_mut().enumerate() {
                // SAFETY: a byte of the piece, which lies in the supply's slab.
                *byte = unsafe { supplied.base.wrapping_add(i).read() };
            }
            bytes
        };
        let bytes = copy(&first);
        assert!(bytes.chunks(8).all(|word| word != [0; 8]));
        let again = supply.supply(&piece, &mut scratch).unwrap();
        assert!(copy(&again) == bytes);
        assert_eq!(again.write, piece.mask);
        let long = Piece { grain: 16 << 10, len: 4 << 20, ..piece };
        assert_eq!(supply.supply(&long, &mut scratch).unwrap_err().kind(), io::ErrorKind::InvalidInput);

        // Of several huge pages no two are alike, and behind the last comes the first again.
        let supply = ConstantSupply::of(3).unwrap();
        let at = |offset| Piece { offset, ..piece };
        let mut bytes = |offset| copy(&supply.supply(&at(offset), &mut scratch).unwrap());
        let all: Vec<_> = (0..6).map(|nth| bytes(nth << 20)).collect();
        assert!(all.iter().enumerate().all(|(i, one)| all[..i].iter().all(|other| one != other)));
        assert!(all[0] == copy(&first) && bytes(6 << 20) == all[0] && bytes(11 << 20) == all[5]);
        assert!(bytes((1 << 20) - 4096)[..4096] == all[0][(1 << 20) - 4096..]);
        let across = at((1 << 20) + 4096);
        assert_eq!(supply.supply(&across, &mut scratch).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(ConstantSupply::of(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
