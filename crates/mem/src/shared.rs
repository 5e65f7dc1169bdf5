//! A memfd of another process, opened and mapped here.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::attach::AttachReason;
use crate::maps::Mapping;
use crate::peer::{Peer, PeerError};

/// `TMPFS_MAGIC` of linux/magic.h: memfds on ordinary pages are tmpfs files.
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// `HUGETLBFS_MAGIC`: memfds on huge pages.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What the maps of the peer say of a memfd.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub device: u64,
    pub inode: u64,
    pub file_offset: u64,
    pub length: u64,
}

/// A block of guest memory in a memfd, mapped read-only into this process.
///
/// A page of the mapping must only be touched where the file has data: a read fault in a hole of tmpfs
/// *allocates* the page, so looking at an idle guest would use up the host's memory.
#[derive(Debug)]
pub(crate) struct SharedBlock {
    file: File,
    base: NonNull<u8>,
    identity: Identity,
    is_sealed: bool,
}

// SAFETY: the mapping is read-only, belongs to this value alone and is reached through raw pointers; nothing
// of it is tied to a thread.
unsafe impl Send for SharedBlock {}
// SAFETY: as above; all methods only read the fields.
unsafe impl Sync for SharedBlock {}

impl SharedBlock {
    /// Opens the memfd of the peer and maps the block. `mappings` are those that hold the block.
    pub(crate) fn open(
        peer: &Peer,
        mappings: &[Mapping],
        identity: Identity,
    ) -> Result<SharedBlock, AttachReason> {
        let fail = |what| move |source: io::Error| AttachReason::Io { what, source };
        let file = open_memfd(peer, mappings, identity)?;
        let kind = fstatfs(&file).map_err(|error| fail("asking for the file system")(error.into()))?;
        // The type differs between architectures; the magic fits any of them.
        #[allow(clippy::unnecessary_cast)]
        match kind.f_type as i64 {
            TMPFS_MAGIC => {}
            HUGETLBFS_MAGIC => return Err(AttachReason::unreachable("a memfd on huge pages (hugetlb)")),
            other => {
                return Err(AttachReason::unreachable(&format!("a memfd on file system {other:#x}")));
            }
        }
        let size = fstat(&file).map_err(|error| fail("asking for the size")(error.into()))?.st_size;
        let end = identity.file_offset.checked_add(identity.length);
        if end.is_none_or(|end| u64::try_from(size).is_ok_and(|size| size < end)) {
            return Err(AttachReason::unreachable(&format!("its memfd ends at {size:#x}, amid the block")));
        }
        // A memfd that may shrink can take pages away under a load, which kills by SIGBUS.
        let is_sealed = fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        let base = map(&file, identity).map_err(fail("mapping its memfd"))?;
        Ok(SharedBlock { file, base, identity, is_sealed })
    }

    /// Whether the file cannot shrink, so that its data may be read through the mapping.
    pub(crate) fn is_sealed(&self) -> bool {
        self.is_sealed
    }

    /// The address of the block's byte at `offset`. See the type for what may be touched.
    pub(crate) fn address(&self, offset: u64) -> *const u8 {
        // An offset in the mapping, whose length fits an address.
        self.base.as_ptr().wrapping_add(offset as usize)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn file_offset(&self) -> u64 {
        self.identity.file_offset
    }

    /// Copies bytes of the block by reading the file, which leaves holes as they are and cannot fault.
    ///
    /// # Errors
    /// What the system said; `UnexpectedEof` when the file has shrunk.
    ///
    /// # Safety
    /// `local..local + len` must be mapped, writable and this call's alone.
    pub(crate) unsafe fn read(&self, offset: u64, local: *mut u8, len: usize) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let at = libc::off_t::try_from(self.identity.file_offset + offset + done as u64)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            let rest = local.wrapping_add(done).cast();
            // SAFETY: `rest` is what is left of the range that the caller gave up to this call.
            let read = unsafe { libc::pread(self.file.as_raw_fd(), rest, len - done, at) };
            match usize::try_from(read) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }
}

impl Drop for SharedBlock {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `open`; pointers into it live no longer than the block.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.identity.length as usize) };
        debug_assert!(unmapped.is_ok(), "munmap of a memfd: {unmapped:?}");
    }
}

fn map(file: &File, identity: Identity) -> io::Result<NonNull<u8>> {
    let length = usize::try_from(identity.length).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let (protection, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::NORESERVE);
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory in use.
    let base = unsafe { mmap(std::ptr::null_mut(), length, protection, flags, file, identity.file_offset) }?;
    NonNull::new(base.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Opens the memfd with a description of our own, by a descriptor of the peer or else by its mapping.
///
/// The second way needs privileges (CAP_CHECKPOINT_RESTORE or root); VMMs keep the descriptor open, so the
/// first serves an ordinary user as well.
fn open_memfd(peer: &Peer, mappings: &[Mapping], identity: Identity) -> Result<File, AttachReason> {
    let mut paths = Vec::new();
    match peer.find_descriptor(identity.device, identity.inode) {
        Ok(found) => paths.extend(found.map(|number| format!("fd/{number}"))),
        Err(PeerError::Denied { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    paths.extend(mappings.first().map(|first| format!("map_files/{:x}-{:x}", first.start, first.end)));
    let mut failure = None;
    for path in paths {
        let opened = peer.open_file(&path).and_then(|file| Ok((fstat(&file)?, file)));
        match opened {
            Ok((found, file)) if (found.st_dev, found.st_ino) == (identity.device, identity.inode) => {
                return Ok(file);
            }
            // The number was given to another file since it was found.
            Ok(_) => {}
            Err(error) => failure = Some(peer.error("the memfd", error)),
        }
    }
    match failure {
        Some(error) => Err(error.into()),
        None => Err(AttachReason::unreachable("its memfd is not open in the process")),
    }
}
