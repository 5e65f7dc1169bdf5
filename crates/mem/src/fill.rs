//! Memory that is filled from outside before its guest runs: shared blocks, by the file that they are.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use ::io::{LaneMemory, LaneTarget, PositionedWrite};
use rustix::fs::{Mode, OFlags, open};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::file::Medium;
use crate::guest_ram::{GuestRam, Reach};
use crate::populated::Populated;
use crate::remote::write_by_kernel;

/// The file of a shared block, open for writing. What is written there is the guest's memory at once.
#[derive(Debug)]
pub struct Fillable {
    /// The file.
    pub file: File,
    /// Where in the file the block begins.
    pub offset: u64,
    length: u64,
    /// The size of its huge pages, if it is on such.
    huge_bytes: Option<u64>,
    /// Its process, if that has most of the pages already.
    populated: Option<Populated>,
}

impl Fillable {
    /// Whether its process has most of its pages already, none of them huge.
    pub fn is_populated(&self) -> bool {
        self.populated.is_some()
    }

    /// The block as what lanes write to, by offsets in its file. Huge pages are memory of ours as well, into which
    /// lanes read at once what comes from a file; pages that the process has already are written through it.
    ///
    /// # Errors
    /// What the system said.
    pub fn lane_target(&self) -> io::Result<LaneTarget> {
        match (self.huge_bytes, &self.populated) {
            (None, None) => Ok(LaneTarget::files(None, self.file.try_clone()?)),
            (None, Some(populated)) => {
                let through = populated.clone().over(self.file.try_clone()?, self.offset);
                Ok(LaneTarget { direct: None, buffered: Box::new(through), memory: None })
            }
            (Some(huge_bytes), _) => {
                let mapped = Mapped::new(&self.file, self.offset, self.length.next_multiple_of(huge_bytes))?;
                let mapped = Arc::new(mapped);
                let memory: Box<dyn LaneMemory> = Box::new(mapped.clone());
                Ok(LaneTarget { direct: None, buffered: Box::new(mapped), memory: Some(memory) })
            }
        }
    }
}

impl GuestRam {
    /// Opens the memory of a region for filling; `None` where it cannot be filled through a file: private
    /// memory, and memory that its own process may not write.
    ///
    /// # Errors
    /// When the file may not be written.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn open_for_filling(&self, region: usize) -> io::Result<Option<Fillable>> {
        // A process that may not write its own mapping would have us write a file for it that it may only
        // read: we may be root.
        let (Reach::Shared(backing), true) = self.reach(region) else { return Ok(None) };
        let offset = backing.part().offset;
        let huge_bytes = match backing.medium() {
            Medium::Shmem | Medium::Disk => None,
            Medium::HugePages { page_bytes } if offset.is_multiple_of(page_bytes) && may_copy() => {
                Some(page_bytes)
            }
            Medium::HugePages { .. } | Medium::Other { .. } => return Ok(None),
        };
        // The file is open for reading, by a descriptor that is surely the block's: its twin for writing is
        // found through that and no name.
        let path = format!("/proc/self/fd/{}", backing.file().as_raw_fd());
        // What is mapped to be written has to be open for reading as well.
        let mode = if huge_bytes.is_some() { OFlags::RDWR } else { OFlags::WRONLY };
        let file = open(path, mode | OFlags::CLOEXEC, Mode::empty())?;
        let block = self.block(region);
        let populated = match backing.medium() {
            Medium::Shmem => Populated::find(self.peer(), block),
            // A disk's pages come and go, and those of huge pages are mapped here.
            Medium::Disk | Medium::HugePages { .. } | Medium::Other { .. } => None,
        };
        Ok(Some(Fillable { file: File::from(file), offset, length: block.length, huge_bytes, populated }))
    }
}

/// Memory on huge pages, whose file system takes no writes: a mapping of ours, written by the kernel, which reads into it
/// or copies.
///
/// A store of our own would be ended by SIGBUS where the pool of pages has run out, or where somebody cuts the file; the
/// kernel has an error for both (EFAULT).
struct Mapped {
    base: NonNull<u8>,
    length: usize,
    /// The offset in the file at which it begins.
    start: u64,
}

// SAFETY: the mapping belongs to this value alone; its addresses go to lanes only, which have the kernel write there.
unsafe impl Send for Mapped {}

// SAFETY: as above. Copies of several threads go to ranges of their callers' choice, as writes to a file would.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(file: &File, start: u64, length: u64) -> io::Result<Mapped> {
        let length = usize::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory in use.
        let base = unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, file, start) }?;
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Mapped { base, length, start })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the range that `new` mapped, whose address nobody else has.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "munmap of huge pages: {unmapped:?}");
    }
}

impl PositionedWrite for Mapped {
    unsafe fn write_span_at(&self, base: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        let Some(place) = self.place_of(offset, len) else { return Err(io::ErrorKind::InvalidInput.into()) };
        // SAFETY: the source is the caller's promise; the target lies within the mapping, as was just found.
        unsafe { copy_by_kernel(base, place, len) }
    }
}

// SAFETY: the range is mapped writable until the value is dropped, also where the file has been cut; nobody makes a
// reference to its bytes.
unsafe impl LaneMemory for Mapped {
    fn place_of(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let at = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        let is_mapped = at.checked_add(len).is_some_and(|end| end <= self.length);
        is_mapped.then(|| self.base.as_ptr().wrapping_add(at))
    }
}

/// Whether the kernel makes such copies for this process: a filter of system calls may forbid it.
fn may_copy() -> bool {
    // SAFETY: nothing is copied.
    unsafe { copy_by_kernel(std::ptr::null(), std::ptr::null_mut(), 0) }.is_ok()
}

/// Has the kernel copy bytes within this process; how many it has copied.
///
/// # Safety
/// As of [`write_by_kernel`].
unsafe fn copy_by_kernel(source: *const u8, target: *mut u8, len: usize) -> io::Result<usize> {
    // SAFETY: the caller's promise is the one asked for.
    unsafe { write_by_kernel(std::process::id(), source, target, len) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use crate::{BlockAddress, GuestRam, Peer};

    const LENGTH: usize = 1 << 20;

    #[test]
    fn memory_that_its_process_may_only_read_is_not_filled() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(LENGTH as u64).unwrap();
        for (protection, fillable) in [(ProtFlags::READ, false), (ProtFlags::READ | ProtFlags::WRITE, true)] {
            // SAFETY: a new mapping at an address of the kernel's choice; nothing is made over its bytes.
            let mapped =
                unsafe { mmap(std::ptr::null_mut(), LENGTH, protection, MapFlags::SHARED, &file, 0) }
                    .unwrap();
            let block = BlockAddress {
                name: "pc.ram".to_owned(),
                address: mapped.addr() as u64,
                length: LENGTH as u64,
                page_size: 4096,
            };
            let peer = Arc::new(Peer::open(std::process::id()).unwrap());
            let ram = GuestRam::attach(peer, &[block]).unwrap();
            let found = ram.open_for_filling(0).unwrap();
            assert_eq!(found.is_some(), fillable, "{protection:?}");
            if let Some(found) = found {
                found.file.write_all_at(b"guest", found.offset + 4096).unwrap();
                let mut bytes = [0; 5];
                ram.read(0, 4096, &mut bytes).unwrap();
                assert_eq!(&bytes, b"guest");
            }
            // SAFETY: the mapping made above, of which nothing is left.
            unsafe { munmap(mapped, LENGTH) }.unwrap();
        }
    }
}
