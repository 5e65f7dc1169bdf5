//! Memory that is filled from outside before its guest runs: shared blocks, by the file that they are.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use page::PageRange;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};

use crate::file::Medium;
use crate::guest_ram::{GuestRam, Reach};

/// The file of a shared block, open for writing. What is written there is the guest's memory at once.
#[derive(Debug)]
pub struct Fillable {
    /// The file.
    pub file: File,
    /// Where in the file the block begins.
    pub offset: u64,
    page_bytes: u64,
    length: u64,
}

impl Fillable {
    /// Makes pages zero again by giving their memory back.
    ///
    /// # Errors
    /// What the system said.
    pub fn clear(&self, range: PageRange) -> io::Result<()> {
        let start = range.start.0.saturating_mul(self.page_bytes).min(self.length);
        let end = range.end.0.saturating_mul(self.page_bytes).min(self.length);
        if start < end {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, self.offset + start, end - start)?;
        }
        Ok(())
    }
}

impl GuestRam {
    /// Opens the memory of a region for filling; `None` where it cannot be filled through a file: private
    /// memory, memory that its own process may not write, and huge pages, whose file system takes no writes.
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
        if !matches!(backing.medium(), Medium::Shmem | Medium::Disk) {
            return Ok(None);
        }
        // The file is open for reading, by a descriptor that is surely the block's: its twin for writing is
        // found through that and no name.
        let path = format!("/proc/self/fd/{}", backing.file().as_raw_fd());
        let file = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        let block = self.block(region);
        Ok(Some(Fillable {
            file: File::from(file),
            offset: backing.part().offset,
            page_bytes: block.page_size,
            length: block.length,
        }))
    }
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
