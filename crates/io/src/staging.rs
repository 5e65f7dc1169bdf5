//! Pieces whose bytes come out of the caller's hand: gathered in buffers, and given to the lanes one by one.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::supply::{Piece, Scratch, Supplied, Supply, runs};

/// Some of the bytes of a buffer, others of which may belong to another piece.
#[derive(Clone, Debug)]
pub struct Part {
    buffer: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Part {
    /// The whole of a buffer.
    pub fn whole(buffer: Vec<u8>) -> Part {
        Part { range: 0..buffer.len(), buffer: Arc::new(buffer) }
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Cuts off the first `len` bytes, or all of them where there are fewer.
    #[must_use]
    pub fn split_to(&mut self, len: usize) -> Part {
        let cut = self.range.start + len.min(self.len());
        let first = Part { buffer: self.buffer.clone(), range: self.range.start..cut };
        self.range.start = cut;
        first
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

/// A supply of buffers. A piece's region is the number of what was handed over for it: one buffer, or the parts of
/// several that its bytes are, in order.
///
/// Buffers are made as they are needed. How many there are is bounded by the queue of the lanes: a piece that
/// cannot be dealt waits with whoever deals it.
#[derive(Debug, Default)]
pub struct Staging {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What is with the lanes, by its number; empty where there is nothing.
    handed: Vec<Vec<Part>>,
    /// Numbers behind which there is nothing.
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
        self.hand_parts(vec![Part::whole(buffer)])
    }

    /// The same for a piece whose bytes lie in several buffers.
    pub fn hand_parts(&self, parts: Vec<Part>) -> u32 {
        let mut state = self.lock();
        match state.vacant.pop() {
            Some(region) => {
                state.handed[region as usize] = parts;
                region
            }
            None => {
                state.handed.push(parts);
                (state.handed.len() - 1) as u32
            }
        }
    }

    fn claim(&self, region: u32) -> Option<Vec<Part>> {
        let mut state = self.lock();
        let parts = std::mem::take(state.handed.get_mut(region as usize)?);
        state.vacant.push(region);
        Some(parts)
    }

    /// Keeps the buffers of which these were the last parts.
    fn reclaim(&self, parts: Vec<Part>) {
        let mut state = self.lock();
        state.spare.extend(parts.into_iter().filter_map(|part| Arc::into_inner(part.buffer)));
    }

    /// Takes back every buffer that no lane has come for; only right while no lane runs.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.vacant.clear();
        state.handed.clear();
    }
}

// SAFETY: the bytes lie in the lane's own scratch, which the lane keeps until it asks for its next piece, and
// every grain that is named lies within the parts that were copied there.
unsafe impl Supply for Staging {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        let parts = self.claim(piece.region).ok_or(io::ErrorKind::InvalidInput)?;
        if parts.iter().map(Part::len).sum::<usize>() < piece.len as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        scratch.reserve(piece.len as usize)?;
        let base = scratch.as_mut_ptr();
        for (first, last) in runs(piece.mask) {
            let (from, to) = piece.bytes_of(first, last);
            let mut begin = 0;
            for part in &parts {
                let end = begin + part.len();
                // What of the run lies in this part.
                let (at, until) = (from.max(begin), to.min(end));
                if at < until {
                    let bytes = &part.bytes()[at - begin..until - begin];
                    // SAFETY: a piece's bytes end at its length, for which the scratch was reserved above; the
                    // scratch and the part are apart.
                    unsafe {
                        std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.wrapping_add(at), bytes.len());
                    }
                }
                begin = end;
            }
        }
        self.reclaim(parts);
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

    #[test]
    fn a_piece_is_supplied_from_parts_and_a_buffer_is_used_again_after_its_last() {
        let staging = Staging::default();
        let mut scratch = Scratch::new(3 * 4096).unwrap();
        let byte = |at: usize| (at / 251 + at) as u8;
        let mut first = Part::whole((0..9000).map(byte).collect());
        let mut second = Part::whole((9000..16_000).map(byte).collect());
        let lead = first.split_to(1000);
        assert_eq!((lead.len(), first.len()), (1000, 8000));
        let (rest, over) = (second.split_to(3 * 4096 - 8000), second);
        let region = staging.hand_parts(vec![first, rest]);
        let supplied = staging.supply(&piece(region, 3 * 4096), &mut scratch).unwrap();
        for at in [0, 4095, 8192, 3 * 4096 - 1] {
            // SAFETY: the byte lies in a grain that was supplied, in a scratch that this test owns.
            assert_eq!(unsafe { supplied.base.wrapping_add(at).read() }, byte(1000 + at), "{at}");
        }
        assert!(staging.buffer().is_empty(), "both buffers have parts elsewhere");
        drop(lead);
        let mut over = over;
        let len = over.len() + 1;
        assert_eq!(over.split_to(len).len() + 1, len, "no more than there is");
        assert!(over.is_empty());
        let short = staging.hand_parts(vec![over]);
        let failed = staging.supply(&piece(short, 4096), &mut scratch).unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::InvalidInput);
        let last = Part::whole(vec![7; 3 * 4096]);
        let region = staging.hand_parts(vec![last]);
        staging.supply(&piece(region, 3 * 4096), &mut scratch).unwrap();
        assert_eq!(staging.buffer().len(), 3 * 4096);
    }
}
