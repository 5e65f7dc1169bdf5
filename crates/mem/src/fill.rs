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
    /// memory, and huge pages, whose file system takes no writes.
    ///
    /// # Errors
    /// When the file may not be written.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn open_for_filling(&self, region: usize) -> io::Result<Option<Fillable>> {
        let Reach::Shared(backing) = self.reach(region) else { return Ok(None) };
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
