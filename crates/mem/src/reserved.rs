//! Address space of this process that holds next to nothing, to measure with what a guest of such a size costs.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::attach::BlockAddress;

/// What a page of the host has, on everything that this runs on.
const PAGE: u64 = 4096;
/// Runs of this length are what huge pages are.
const HUGE_PAGE: u64 = 2 << 20;

/// Memory that is reserved and not there, but for what [`Reserved::touch`] puts there.
#[derive(Debug)]
pub struct Reserved {
    base: *mut c_void,
    length: usize,
    /// The file that it is, which is found by its descriptor.
    _file: Option<OwnedFd>,
}

impl Reserved {
    /// Anonymous memory.
    ///
    /// # Errors
    /// Where there is not so much address space.
    pub fn private(length: u64) -> io::Result<Reserved> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nobody's memory.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, flags)
        }?;
        Ok(Reserved { base, length, _file: None })
    }

    /// A memfd, which is a sparse file.
    ///
    /// # Errors
    /// Where there is not so much address space.
    pub fn shared(length: u64) -> io::Result<Reserved> {
        let file = memfd_create("vmstate-reserved", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, length)?;
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nobody's memory.
        let base = unsafe { mmap(std::ptr::null_mut(), length, access, flags, file.as_fd(), 0) }?;
        Ok(Reserved { base, length, _file: Some(file) })
    }

    /// Writes to the first `run` bytes of each `every` bytes. Runs of whole huge pages are huge pages where the
    /// kernel gives some, all others are not.
    ///
    /// # Errors
    /// Where the kernel refuses its advice; what is there then is not what was asked for.
    pub fn touch(&mut self, every: u64, run: u64) -> io::Result<()> {
        let advice = if run > 0 && run.is_multiple_of(HUGE_PAGE) {
            Advice::LinuxHugepage
        } else {
            Advice::LinuxNoHugepage
        };
        // SAFETY: the mapping is this value's own, and the advice changes nobody's bytes.
        unsafe { madvise(self.base, self.length, advice) }?;
        let length = self.length as u64;
        for start in (0..length).step_by(usize::try_from(every).map_err(io::Error::other)?) {
            self.write(start..length.min(start + run));
        }
        Ok(())
    }

    /// Writes to each page of some bytes of it.
    pub(crate) fn write(&mut self, bytes: Range<u64>) {
        for at in bytes.step_by(PAGE as usize) {
            assert!(at < self.length as u64, "a byte at {at:#x} of {:#x}", self.length);
            // Below the length, which is a usize.
            let byte = self.base.cast::<u8>().wrapping_add(at as usize);
            // SAFETY: the byte lies in the mapping, which is writable; it is borrowed exclusively, and nobody else
            // has its address.
            unsafe { byte.write_volatile(1) };
        }
    }

    /// The block that it is, for [`GuestRam::attach`](crate::GuestRam::attach) to this process.
    pub fn block(&self) -> BlockAddress {
        BlockAddress {
            name: "reserved".into(),
            address: self.base.addr() as u64,
            length: self.length as u64,
            page_size: PAGE,
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the mapping made above; nothing that was handed out refers to it.
        let _ = unsafe { munmap(self.base, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{GuestRam, Peer};

    #[test]
    fn what_was_touched_is_there_and_nothing_else() {
        for make in [Reserved::private as fn(u64) -> io::Result<Reserved>, Reserved::shared] {
            let mut reserved = make(1 << 30).unwrap();
            reserved.touch(100 << 20, 2 * PAGE).unwrap();
            let peer = Arc::new(Peer::open(std::process::id()).unwrap());
            let ram = GuestRam::attach(peer, &[reserved.block()]).unwrap();
            let windows = ram.windows(0).unwrap().map(Result::unwrap);
            let pages: Vec<_> = windows.map(|window| (window.first.0, window.mask.count())).collect();
            let expected: Vec<_> = (0..11).map(|i| (i * 25600, 2)).collect();
            assert_eq!(pages, expected);
        }
    }
}
