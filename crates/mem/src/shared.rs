//! Shared guest memory, which is a file: read as one, or straight from a mapping of our own.

use std::io;
use std::ptr::NonNull;

use page::Mask;
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::attach::AttachReason;
use crate::file::{BackingFile, Medium};

/// A block of guest memory that is a shared mapping of a file.
#[derive(Debug)]
pub(crate) struct SharedBlock {
    file: BackingFile,
    /// A memfd that is sealed against shrinking is mapped here. Any other file may lose pages under a load, which
    /// kills by SIGBUS, so it is read; that costs one copy within the cache.
    mapping: Option<SealedMapping>,
}

impl SharedBlock {
    /// Maps the block of `length` bytes, if that is safe.
    pub(crate) fn new(file: BackingFile, length: u64) -> Result<SharedBlock, AttachReason> {
        let is_sealed = || fcntl_get_seals(file.file()).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        let mapping = match file.medium() {
            // A sealed memfd on huge pages still loses them by punched holes, and then there may be no other
            // page in the pool.
            Medium::Shmem if is_sealed() => Some(SealedMapping::new(&file, length)?),
            _ => None,
        };
        Ok(SharedBlock { file, mapping })
    }

    pub(crate) fn file(&self) -> &BackingFile {
        &self.file
    }

    pub(crate) fn mapping(&self) -> Option<&SealedMapping> {
        self.mapping.as_ref()
    }
}

/// A block in a memfd that cannot shrink, mapped read-only into this process.
///
/// A page of the mapping must only be touched where the file has data: a read fault in a hole of tmpfs
/// *allocates* the page, so looking at an idle guest would use up the host's memory.
#[derive(Debug)]
pub(crate) struct SealedMapping {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is read-only, belongs to this value alone and is reached through raw pointers; nothing
// of it is tied to a thread.
unsafe impl Send for SealedMapping {}
// SAFETY: as above; all methods only read the fields.
unsafe impl Sync for SealedMapping {}

impl SealedMapping {
    fn new(file: &BackingFile, length: u64) -> Result<SealedMapping, AttachReason> {
        let fail = |source| AttachReason::Io { what: "mapping its file", source };
        let length = usize::try_from(length).map_err(|_| fail(io::ErrorKind::OutOfMemory.into()))?;
        let (protection, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::NORESERVE);
        let offset = file.part().offset;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory in use.
        let base = unsafe { mmap(std::ptr::null_mut(), length, protection, flags, file.file(), offset) };
        let base = base.map_err(|error| fail(error.into()))?;
        let base = NonNull::new(base.cast()).ok_or_else(|| fail(io::ErrorKind::OutOfMemory.into()))?;
        Ok(SealedMapping { base, length })
    }

    /// The address of the block's byte at `offset`. See the type for what may be touched.
    pub(crate) fn address(&self, offset: u64) -> *const u8 {
        // An offset in the mapping, whose length fits an address.
        self.base.as_ptr().wrapping_add(offset as usize)
    }

    /// Makes the pages of `grain` bytes that `mask` marks from `offset` on readable without a fault: a page that
    /// the hardware has lost is an error here and would be a SIGBUS later.
    ///
    /// # Errors
    /// The offset of the first run in which that failed, and what the system said.
    pub(crate) fn populate(&self, offset: u64, grain: u64, mask: Mask) -> Result<(), (u64, io::Error)> {
        let page = rustix::param::page_size() as u64;
        for (start, end) in mask.runs() {
            // A target's page may be smaller than the host's.
            let from = (offset + start as u64 * grain) / page * page;
            let to = (offset + end as u64 * grain).min(self.length as u64);
            let at = self.base.as_ptr().wrapping_add(from as usize);
            // SAFETY: a range of this value's own mapping, the content of which the advice leaves alone.
            match unsafe { madvise(at.cast(), (to - from) as usize, Advice::LinuxPopulateRead) } {
                // Linux has the advice since 5.14.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err((from, error.into())),
            }
        }
        Ok(())
    }
}

impl Drop for SealedMapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`; pointers into it live no longer than the block.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "munmap of a memfd: {unmapped:?}");
    }
}
