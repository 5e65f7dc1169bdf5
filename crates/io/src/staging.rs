//! Pieces whose bytes come out of the caller's hand: gathered in buffers, and given to the lanes one by one.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::supply::{Piece, Scratch, Supplied, Supply, runs};

/// A supply of buffers. A piece's region is the number of the buffer that holds its bytes.
///
/// Buffers are made as they are needed. How many there are is bounded by the queue of the lanes: a piece that
/// cannot be dealt waits with whoever deals it.
#[derive(Debug, Default)]
pub struct Staging {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The buffers that are with the lanes, by their number; empty where there is none.
    handed: Vec<Vec<u8>>,
    /// Numbers without a buffer.
    vacant: Vec<u32>,
    /// Buffers to be used again.
    spare: Vec<Vec<u8>>,
}

impl Staging {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock, so a poisoned one still holds a whole state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer to be filled: empty, or as it was when it was handed the last time.
    pub fn buffer(&self) -> Vec<u8> {
        self.lock().spare.pop().unwrap_or_default()
    }

    /// Takes a buffer and says which region of pieces it is, for exactly one piece.
    pub fn hand(&self, buffer: Vec<u8>) -> u32 {
        let mut state = self.lock();
        match state.vacant.pop() {
            Some(region) => {
                state.handed[region as usize] = buffer;
                region
            }
            None => {
                state.handed.push(buffer);
                (state.handed.len() - 1) as u32
            }
        }
    }

    fn claim(&self, region: u32) -> Option<Vec<u8>> {
        let mut state = self.lock();
        let buffer = std::mem::take(state.handed.get_mut(region as usize)?);
        state.vacant.push(region);
        Some(buffer)
    }

    /// Takes back every buffer that no lane has come for; only right while no lane runs.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.vacant.clear();
        state.handed.clear();
    }
}

// SAFETY: the bytes lie in the lane's own scratch, which the lane keeps until it asks for its next piece, and
// every grain that is named lies within the buffer that was copied there.
unsafe impl Supply for Staging {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        let buffer = self.claim(piece.region).ok_or(io::ErrorKind::InvalidInput)?;
        if buffer.len() < piece.len as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        scratch.reserve(piece.len as usize)?;
        let base = scratch.as_mut_ptr();
        for (first, last) in runs(piece.mask) {
            let (from, to) = piece.bytes_of(first, last);
            // SAFETY: a piece's bytes end at its length, which the buffer was compared with and for which the
            // scratch was reserved above; the two are apart.
            unsafe {
                std::ptr::copy_nonoverlapping(buffer[from..to].as_ptr(), base.wrapping_add(from), to - from);
            }
        }
        self.lock().spare.push(buffer);
        Ok(Supplied { base, write: piece.mask })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(region: u32, len: u32) -> Piece {
        Piece { region, offset: 0, target: 0, grain: 4096, len, mask: [0b101, 0, 0, 0] }
    }

    #[test]
    fn a_buffer_is_supplied_once_and_used_again() {
        let staging = Staging::default();
        let mut scratch = Scratch::new(3 * 4096).unwrap();
        for round in 1..4u8 {
            let mut buffer = staging.buffer();
            assert_eq!(buffer.len(), if round == 1 { 0 } else { 3 * 4096 }, "it is used again");
            buffer.clear();
            buffer.resize(3 * 4096, round);
            let region = staging.hand(buffer);
            assert_eq!(region, 0, "the number is used again");
            let supplied = staging.supply(&piece(region, 3 * 4096), &mut scratch).unwrap();
            assert_eq!(supplied.write, [0b101, 0, 0, 0]);
            for at in [0, 4095, 8192, 3 * 4096 - 1] {
                // SAFETY: the byte lies in a grain that was supplied, in a scratch that this test owns.
                assert_eq!(unsafe { supplied.base.wrapping_add(at).read() }, round);
            }
            let again = staging.supply(&piece(region, 3 * 4096), &mut scratch);
            assert_eq!(again.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        let region = staging.hand(vec![0; 4096]);
        let short = staging.supply(&piece(region, 3 * 4096), &mut scratch).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(
            staging.supply(&piece(7, 4096), &mut scratch).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
