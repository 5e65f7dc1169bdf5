//! Pieces that are all the same and cost nothing to have: what lanes can do is measured with them.

use std::io;

use crate::supply::{Piece, Scratch, Supplied, Supply};

/// A supply of numbers that do not compress, written into a lane's slab once and supplied from there ever after.
///
/// A lane that has it moves nothing but what goes to the file, so its speed is the ceiling of every other
/// supply's.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConstantSupply;

/// The first word of the sequence, by which a slab that was filled is known again.
const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;

// SAFETY: the answer is the scratch, all of whose words were written; it is left alone until the lane asks
// again.
unsafe impl Supply for ConstantSupply {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        scratch.reserve(piece.len as usize)?;
        let base = scratch.as_mut_ptr();
        let words = base.cast::<u64>();
        let count = scratch.len() / size_of::<u64>();
        let last = words.wrapping_add(count - 1);
        // SAFETY: a scratch is at least a huge page long, aligned to that, and a lane's own; memory that was
        // never written reads as zero.
        let begun = unsafe { words.read() };
        // SAFETY: as above.
        let ended = unsafe { last.read() };
        // A scratch that has grown is new.
        if begun != FIRST || ended == 0 {
            let mut state = FIRST;
            for i in 0..count {
                // SAFETY: the word lies within the scratch, as above.
                unsafe { words.wrapping_add(i).write(state) };
                // xorshift64: never zero, and no two alike within a slab.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
            }
        }
        Ok(Supplied { base, write: piece.mask })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_the_same_and_none_of_its_grains_is_zero() {
        let mut scratch = Scratch::new(1 << 20).unwrap();
        let piece = Piece { region: 0, offset: 0, target: 0, grain: 4096, len: 1 << 20, mask: [u64::MAX; 4] };
        let first = ConstantSupply.supply(&piece, &mut scratch).unwrap();
        let copy = |supplied: &Supplied| {
            let mut bytes = vec![0u8; piece.len as usize];
            for (i, byte) in bytes.iter_mut().enumerate() {
                // SAFETY: a byte of the piece, which lies in the scratch.
                *byte = unsafe { supplied.base.wrapping_add(i).read() };
            }
            bytes
        };
        let bytes = copy(&first);
        assert!(bytes.chunks(8).all(|word| word != [0; 8]));
        let again = ConstantSupply.supply(&piece, &mut scratch).unwrap();
        assert!(copy(&again) == bytes);
        assert_eq!(again.write, piece.mask);
    }
}
