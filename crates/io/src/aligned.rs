//! A buffer that belongs to one thread at a time and is read into past the page cache.

use std::ops::{Deref, DerefMut};

use rustix::mm::{Advice, madvise};

use crate::slab::HUGE_PAGE;

/// Bytes on huge pages, the first at a multiple of 2 MiB: what direct I/O is fastest with.
///
/// It is ordinary memory with one owner, unlike a [`crate::Slab`], so that it may be read through slices.
#[derive(Debug)]
pub struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// A buffer of `len` bytes of zero.
    pub fn new(len: usize) -> AlignedBuffer {
        let mapped = len.max(1).next_multiple_of(HUGE_PAGE);
        let bytes = vec![0; mapped + HUGE_PAGE];
        let start = bytes.as_ptr().addr().next_multiple_of(HUGE_PAGE) - bytes.as_ptr().addr();
        let base = bytes.as_ptr().wrapping_add(start).cast_mut();
        // SAFETY: `start` is less than a huge page, so the `mapped` bytes from `base` on lie within the vector,
        // which is this function's alone; the advice changes how they are backed and not what they hold.
        let advised = unsafe { madvise(base.cast(), mapped, Advice::LinuxHugepage) };
        // A kernel without transparent huge pages refuses: the buffer is slower and just as right.
        let _ = advised;
        AlignedBuffer { bytes, start, len }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_have_their_length() {
        for len in [0, 1, 4096, HUGE_PAGE, HUGE_PAGE + 1] {
            let mut buffer = AlignedBuffer::new(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr().addr() % HUGE_PAGE, 0, "{len}");
            buffer.fill(7);
            assert!(buffer.iter().all(|byte| *byte == 7));
        }
    }
}
