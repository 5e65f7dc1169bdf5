//! What is in memory where there is to be nothing, and zeros to be written over it.

use std::io;
use std::sync::Arc;

use ::io::{Piece, Scratch, Supplied, Supply};
use page::Mask;

use crate::guest_ram::GuestRam;
use crate::supply::check_piece;
use crate::zero::nonzero_mask;

/// Memory that is to be zero: of the marked pages, zeros for those that are not.
///
/// A page that is zero already is left as it is, and so is one that is not there. To write zeros over what is there
/// costs less than to give its memory back and find it again, and what somebody has populated on purpose stays so.
#[derive(Debug)]
pub struct Residue(Arc<GuestRam>);

impl Residue {
    /// Of this memory.
    pub fn of(ram: Arc<GuestRam>) -> Residue {
        Residue(ram)
    }
}

// SAFETY: the answer is the scratch, in which every grain named was made zero. It is left alone until the lane asks again.
unsafe impl Supply for Residue {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        check_piece(self.0.region(piece.region)?, piece, scratch)?;
        let marked = Mask(piece.mask);
        let base = self.0.copy_runs(piece, marked, scratch)?;
        // SAFETY: the marked pages were copied to the scratch just now.
        let data = unsafe { nonzero_mask(base, piece.len as usize, piece.grain as usize, marked) };
        for (start, end) in data.runs() {
            let (from, to) = piece.bytes_of(start, end);
            // SAFETY: bytes of the scratch, which holds the whole piece and is ours until we answer.
            unsafe { base.wrapping_add(from).write_bytes(0, to - from) };
        }
        Ok(Supplied { base, write: data.0 })
    }
}
