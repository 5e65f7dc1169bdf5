//! Shared memory whose pages its process has in hand already, filled through that process.

use std::fs::File;
use std::io;
use std::sync::Arc;

use ::io::PositionedWrite;

use crate::attach::BlockAddress;
use crate::peer::Peer;
use crate::presence::{PageTableRuns, PagemapMethod, Stretch};
use crate::remote::write_span;

/// How many eighths of a block's pages its process must have for the block to be filled through it.
const EIGHTHS_MIN: u64 = 7;

/// A block most of whose pages are in the page tables of its process.
///
/// A write to a file in memory has the lock of its inode for as long as it copies, so that lanes which fill one block take
/// turns; a copy into a process has no such lock (`generic_perform_write` under `inode_lock` of `shmem_file_write_iter` in
/// mm/shmem.c, `process_vm_rw_core` of mm/process_vm_access.c). But where the process has no page, the kernel finds one
/// at a time for such a copy, which takes longer than the file does.
#[derive(Clone, Debug)]
pub(crate) struct Populated {
    peer: Arc<Peer>,
    address: u64,
    length: u64,
}

impl Populated {
    /// The block, which is a shared mapping, if its process has most of its pages.
    pub(crate) fn find(peer: &Arc<Peer>, block: &BlockAddress) -> Option<Populated> {
        // Who cannot be asked has the file, as before: nothing but time depends on the answer.
        let is_populated = Populated::has_most(peer, block).unwrap_or(false);
        let (address, length) = (block.address, block.length);
        is_populated.then(|| Populated { peer: peer.clone(), address, length })
    }

    fn has_most(peer: &Arc<Peer>, block: &BlockAddress) -> io::Result<bool> {
        // Attaching has checked that the end, rounded up, is an address.
        let length = block.length.next_multiple_of(rustix::param::page_size() as u64);
        let enough = u128::from(length) * u128::from(EIGHTHS_MIN) / 8;
        let stretch = Stretch { address: block.address, length };
        let mut there = 0;
        for run in PageTableRuns::open(peer.clone(), stretch, PagemapMethod::Auto)? {
            let run = run?;
            there += u128::from(run.end - run.start);
            if there >= enough {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The block as what lanes write to, by offsets in its file, in which it begins at `start`.
    pub(crate) fn over(self, file: File, start: u64) -> impl PositionedWrite {
        Through { place: self, file, start }
    }
}

/// Writes into the process, or else into the file, which is the same memory.
struct Through {
    place: Populated,
    file: File,
    /// The offset in the file at which the block begins.
    start: u64,
}

impl Through {
    /// The address in the process of `len` bytes at an offset of the file, if all of them are in the block.
    fn address_of(&self, offset: u64, len: usize) -> Option<u64> {
        let at = offset.checked_sub(self.start)?;
        let is_within = at.checked_add(len as u64).is_some_and(|end| end <= self.place.length);
        is_within.then(|| self.place.address + at)
    }
}

impl PositionedWrite for Through {
    unsafe fn write_span_at(&self, base: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        if let Some(address) = self.address_of(offset, len) {
            // SAFETY: the caller's promise is the one asked for.
            if let Ok(copied @ 1..) = unsafe { write_span(&self.place.peer, base, address, len) } {
                return Ok(copied);
            }
        }
        // Whatever keeps us from the process (it has ended, we may not, it has no such page): the file takes the bytes, or
        // says what is wrong.
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.file.write_span_at(base, len, offset) }
    }
}
