//! Pages of a supply, copied out one behind the other.

use std::io;

use crate::supply::{Piece, Scratch, Supply};

/// What a page of a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// Bytes: they follow what was appended for them.
    Data,
    /// Nothing but zeros, although it was marked: no bytes follow.
    Zero,
}

/// How many bytes of pages were taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagesTaken {
    /// With their bytes.
    pub data_bytes: u64,
    /// As zero.
    pub zero_bytes: u64,
}

/// Takes pages out of a supply, each behind what stands before it in a stream.
///
/// The memory it keeps is one piece.
#[derive(Debug, Default)]
pub struct PageTaker {
    scratch: Option<Scratch>,
    page: Vec<u8>,
}

impl PageTaker {
    /// Appends the marked pages of a piece to `out`, in order. `head` appends what stands before each page: it is told
    /// what the page is and its offset in the region.
    ///
    /// # Errors
    /// Those of the supply.
    ///
    /// # Panics
    /// When the piece is not as the docs of [`Piece`] demand.
    pub fn take(
        &mut self,
        supply: &dyn Supply,
        piece: &Piece,
        out: &mut Vec<u8>,
        mut head: impl FnMut(PageContent, u64, &mut Vec<u8>),
    ) -> io::Result<PagesTaken> {
        piece.assert_whole();
        let mut scratch = match self.scratch.take() {
            Some(scratch) => scratch,
            None => Scratch::new(piece.len as usize)?,
        };
        scratch.reserve(piece.len as usize)?;
        let supplied = supply.supply(piece, &mut scratch)?;
        assert!(piece.holds(&supplied.write), "the supply names grains beyond the piece");
        let mut done = PagesTaken::default();
        let marked = |mask: &[u64; 4], i: usize| mask[i / 64] >> (i % 64) & 1 == 1;
        for i in (0..piece.grains() as usize).filter(|i| marked(&piece.mask, *i)) {
            let (from, to) = piece.bytes_of(i, i + 1);
            let len = to - from;
            self.page.clear();
            if marked(&supplied.write, i) {
                self.page.reserve(len);
                // SAFETY: the supply named this grain, so its bytes are mapped and readable until the scratch is
                // used again. Others may change them; whatever is copied is taken as it is.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        supplied.base.wrapping_add(from),
                        self.page.as_mut_ptr(),
                        len,
                    );
                }
                // SAFETY: `len` bytes were reserved and have just been written.
                unsafe { self.page.set_len(len) };
            }
            let offset = piece.offset + from as u64;
            // What the supply bridges a gap with is zero, too.
            if is_zero(&self.page) {
                head(PageContent::Zero, offset, out);
                done.zero_bytes += len as u64;
            } else {
                head(PageContent::Data, offset, out);
                out.extend_from_slice(&self.page);
                done.data_bytes += len as u64;
            }
        }
        self.scratch = Some(scratch);
        Ok(done)
    }
}

/// Whether a page, which nobody else changes, is nothing but zeros.
pub fn is_zero(page: &[u8]) -> bool {
    // Nearly every page that is not zero shows it at once.
    page.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Page `i` is full of the byte `i % 3`.
    struct Thirds;

    // SAFETY: every grain named was written to the scratch, which is left alone until the next call.
    unsafe impl Supply for Thirds {
        fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<crate::supply::Supplied> {
            for i in 0..piece.grains() as usize {
                let (from, to) = piece.bytes_of(i, i + 1);
                // SAFETY: the scratch holds the whole piece.
                unsafe { scratch.as_mut_ptr().wrapping_add(from).write_bytes((i % 3) as u8, to - from) };
            }
            // Page 6 is left out by the supply, and every other one is written, marked or not.
            Ok(crate::supply::Supplied { base: scratch.as_mut_ptr(), write: [!(1 << 6), !0, !0, !0] })
        }
    }

    fn piece(mask: [u64; 4]) -> Piece {
        Piece { region: 0, offset: 1 << 20, target: 0, grain: 4096, len: 1 << 20, mask }
    }

    #[test]
    fn marked_pages_come_in_order_and_zeros_without_their_bytes() {
        let mut taker = PageTaker::default();
        let mut out = b"begin".to_vec();
        let done = taker
            .take(&Thirds, &piece([0b111_1001, 0, 0, 0]), &mut out, |content, offset, out| {
                out.extend_from_slice(format!("[{content:?} {offset:#x}]").as_bytes());
            })
            .expect("it supplies everything");
        assert_eq!(done, PagesTaken { data_bytes: 2 * 4096, zero_bytes: 3 * 4096 });
        let mut expected = b"begin[Zero 0x100000][Zero 0x103000][Data 0x104000]".to_vec();
        expected.extend([1; 4096]);
        expected.extend(b"[Data 0x105000]");
        expected.extend([2; 4096]);
        expected.extend(b"[Zero 0x106000]");
        assert_eq!(out, expected);
    }
}
