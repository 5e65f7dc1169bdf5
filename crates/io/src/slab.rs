//! The memory of a lane: one aligned anonymous mapping on huge pages, cut into equal buffers.

use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// The size and alignment that a transparent huge page takes: 2 MiB.
///
/// Direct I/O out of one huge page is one physically contiguous request; out of 4 KiB pages it is hundreds
/// of segments, and measured a third slower.
pub const HUGE_PAGE: usize = 2 << 20;

/// The most that one slab may take. A lane's budget is a few MiB; this only catches absurd settings.
const SLAB_MAX: usize = 1 << 30;

/// A 2 MiB-aligned anonymous mapping, cut into equal buffers that are handed out as raw pointers.
///
/// The kernel fills and drains the buffers, and the guest's memory is copied into them, so no reference to
/// their bytes is ever made.
#[derive(Debug)]
pub struct Slab {
    base: NonNull<u8>,
    mapped: usize,
    buffer_len: usize,
    buffers: usize,
    is_plain: bool,
}

// SAFETY: the mapping belongs to the slab alone and is reached through raw pointers whose users answer for
// their own accesses; nothing in it is tied to the thread that made it.
unsafe impl Send for Slab {}

// SAFETY: a shared slab gives out addresses and numbers that never change; whoever uses an address answers for
// that.
unsafe impl Sync for Slab {}

impl Slab {
    /// Maps `buffers` buffers of `buffer_len` bytes. No memory is used until it is touched.
    ///
    /// # Errors
    /// `InvalidInput` when a size is zero or the whole exceeds 1 GiB; otherwise what `mmap` said.
    pub fn map(buffers: usize, buffer_len: usize) -> io::Result<Slab> {
        let mut slab = Slab::map_plain(buffers, buffer_len)?;
        slab.is_plain = false;
        // SAFETY: the range is this slab's own mapping; the advice changes how it is backed and not what it holds.
        let advised = unsafe { madvise(slab.base.as_ptr().cast(), slab.mapped, Advice::LinuxHugepage) };
        // A kernel without transparent huge pages refuses the advice: the slab is slower and just as right.
        let _ = advised;
        Ok(slab)
    }

    /// The same without huge pages: for what is short-lived and hardly filled, of which each page is paid for when
    /// it is touched, and not 512 at a time.
    ///
    /// # Errors
    /// As [`Slab::map`].
    pub fn map_plain(buffers: usize, buffer_len: usize) -> io::Result<Slab> {
        let mapped = buffers
            .checked_mul(buffer_len)
            .filter(|&bytes| bytes > 0 && bytes <= SLAB_MAX)
            .map(|bytes| bytes.next_multiple_of(HUGE_PAGE))
            .ok_or_else(|| {
                let text = format!("a slab of {buffers} buffers of {buffer_len:#x} bytes");
                io::Error::new(io::ErrorKind::InvalidInput, text)
            })?;
        Ok(Slab { base: map_aligned(mapped)?, mapped, buffer_len, buffers, is_plain: true })
    }

    /// Brings in the memory of the whole slab, so that the first use does not pay for page faults.
    ///
    /// Whoever uses the slab calls it, on the thread that will: memory is taken near the one that touches it.
    pub fn touch(&self) {
        // SAFETY: the range is this slab's own mapping; populating it for writing keeps its content.
        let populated =
            unsafe { madvise(self.base.as_ptr().cast(), self.mapped, Advice::LinuxPopulateWrite) };
        // Kernels before 5.14 do not know the advice; there the first use faults the pages in.
        let _ = populated;
    }

    /// Whether it was mapped by [`Slab::map_plain`].
    pub(crate) fn is_plain(&self) -> bool {
        self.is_plain
    }

    /// How many buffers there are.
    pub fn buffers(&self) -> usize {
        self.buffers
    }

    /// How long each buffer is, in bytes.
    pub fn buffer_len(&self) -> usize {
        self.buffer_len
    }

    /// The start of a buffer, which stays mapped, readable and writable as long as the slab lives.
    ///
    /// # Panics
    /// When there is no such buffer.
    pub fn buffer(&self, index: usize) -> *mut u8 {
        assert!(index < self.buffers, "buffer {index} of a slab of {}", self.buffers);
        self.base.as_ptr().wrapping_add(index * self.buffer_len)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` and is unmapped only here; the contract of `buffer` ends the
        // use of its pointers with the slab.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.mapped) };
        debug_assert!(unmapped.is_ok(), "munmap of a slab: {unmapped:?}");
    }
}

/// Maps `len` bytes, a multiple of [`HUGE_PAGE`], at a multiple of [`HUGE_PAGE`].
///
/// The kernel aligns to 4 KiB only, so a huge page more is mapped and the excess at both ends returned.
fn map_aligned(len: usize) -> io::Result<NonNull<u8>> {
    let padded = len + HUGE_PAGE;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory in use.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), padded, protection, MapFlags::PRIVATE) }?;
    let head = start.addr().next_multiple_of(HUGE_PAGE) - start.addr();
    let base = start.wrapping_byte_add(head);
    if head > 0 {
        // SAFETY: these are the first `head` bytes of the mapping made above; nobody has seen them.
        unsafe { munmap(start, head) }?;
    }
    // SAFETY: `head` is less than a huge page, so a tail of at least one byte lies within the mapping made
    // above, after the `len` bytes that are kept; both ends are multiples of the page size.
    unsafe { munmap(base.wrapping_byte_add(len), HUGE_PAGE - head) }?;
    NonNull::new(base.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_apart() {
        for (buffers, len) in [(1, 1 << 20), (4, 1 << 20), (3, 4096), (1, 5 << 20)] {
            let slab = Slab::map(buffers, len).expect("a small slab");
            slab.touch();
            assert_eq!(slab.buffer(0).addr() % HUGE_PAGE, 0);
            for i in 0..buffers {
                assert_eq!(slab.buffer(i).addr() - slab.buffer(0).addr(), i * len);
                let last = slab.buffer(i).wrapping_add(len - 1);
                // SAFETY: the last byte of a buffer lies in the slab, which this test owns alone.
                unsafe { last.write_volatile(i as u8 + 1) };
                // SAFETY: as above.
                assert_eq!(unsafe { last.read_volatile() }, i as u8 + 1);
            }
        }
    }

    #[test]
    fn absurd_slabs_are_refused() {
        for (buffers, len) in [(0, 4096), (1, 0), (usize::MAX, 2), (1025, 1 << 20)] {
            let refused = Slab::map(buffers, len).expect_err("no such slab");
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{buffers} x {len}");
        }
    }
}
