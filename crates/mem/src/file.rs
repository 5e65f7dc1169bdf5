//! The file behind a block of guest memory, opened with a description of our own.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{FileType, fstat, fstatfs};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::attach::AttachReason;
use crate::kind::FilePart;
use crate::maps::{Mapping, Mappings};
use crate::outlook::Outlook;
use crate::peer::{Peer, PeerError};

/// What a file lies on, as far as it matters to who reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Medium {
    /// tmpfs: memfds, `/dev/shm`, shared memory without a name. To *read through a mapping* where there is no
    /// page allocates one; to read the file does not.
    Shmem,
    /// hugetlbfs. As tmpfs, but it has no way to ask for holes, and the pool of pages may run out.
    HugePages {
        /// The size of its pages in bytes.
        page_bytes: u64,
    },
    /// A file system whose SEEK_DATA is known to count what was written through a mapping and not yet put on
    /// the disk.
    Disk,
    /// Another file system, by the magic number of linux/magic.h. It is asked for nothing but bytes.
    Other {
        /// The number, as statfs(2) gives it.
        magic: u64,
    },
}

// linux/magic.h.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// ext2, ext3 and ext4. Delayed allocations are in ext4's extent status tree, and preallocated extents are looked
/// up in the page cache (`iomap_seek_data` of fs/iomap/seek.c), so a page written but not yet on the disk is data.
const EXT4_SUPER_MAGIC: u64 = 0xef53;
/// XFS answers by the same `iomap_seek_data`.
const XFS_SUPER_MAGIC: u64 = 0x5846_5342;

impl Medium {
    fn of(file: &File) -> Result<Medium, AttachReason> {
        let found = fstatfs(file).map_err(|error| AttachReason::io("asking for the file system", error))?;
        // The types differ between architectures, and a negative number is one that was sign-extended.
        #[allow(clippy::unnecessary_cast)]
        let (magic, block_size) = (found.f_type as u32 as u64, found.f_bsize as u64);
        match magic {
            TMPFS_MAGIC => Ok(Medium::Shmem),
            HUGETLBFS_MAGIC if block_size.is_power_of_two() => {
                Ok(Medium::HugePages { page_bytes: block_size })
            }
            HUGETLBFS_MAGIC => {
                let text = format!("a hugetlbfs with pages of {block_size:#x} bytes");
                Err(AttachReason::unreachable(&text))
            }
            EXT4_SUPER_MAGIC | XFS_SUPER_MAGIC => Ok(Medium::Disk),
            magic => Ok(Medium::Other { magic }),
        }
    }
}

/// The file of a block. Reading it leaves its holes as they are and cannot fault.
#[derive(Debug)]
pub(crate) struct BackingFile {
    file: File,
    part: FilePart,
    medium: Medium,
}

impl BackingFile {
    /// Opens the file of the peer. `mappings` are those that hold the block of `length` bytes.
    pub(crate) fn open(
        outlook: &Outlook,
        mappings: &[Mapping],
        part: FilePart,
        length: u64,
    ) -> Result<BackingFile, AttachReason> {
        let file = find(outlook, mappings, part)?;
        let medium = Medium::of(&file)?;
        let size = fstat(&file).map_err(|error| AttachReason::io("asking for the size", error))?.st_size;
        let end = part.offset.checked_add(length);
        if end.is_none_or(|end| u64::try_from(size).map_or(true, |size| size < end)) {
            return Err(AttachReason::unreachable(&format!("its file ends at {size:#x}, amid the block")));
        }
        Ok(BackingFile { file, part, medium })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn part(&self) -> FilePart {
        self.part
    }

    pub(crate) fn medium(&self) -> Medium {
        self.medium
    }

    /// Copies bytes of the block, the first of which is at `offset` in it.
    ///
    /// # Errors
    /// What the system said; `UnexpectedEof` when the file has shrunk.
    ///
    /// # Safety
    /// `local..local + len` must be mapped, writable and this call's alone.
    pub(crate) unsafe fn read(&self, offset: u64, local: *mut u8, len: usize) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let at = libc::off_t::try_from(self.part.offset + offset + done as u64)
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

/// Opens the file with a description of our own, by a descriptor of the peer or else by its mapping. The path in
/// the mapping is never followed: it may be another file's by now.
///
/// The second way needs privileges (CAP_CHECKPOINT_RESTORE or root); VMMs keep the descriptor open, so the
/// first serves an ordinary user as well.
fn find(outlook: &Outlook, mappings: &[Mapping], part: FilePart) -> Result<File, AttachReason> {
    let peer = outlook.peer();
    let candidates: Vec<String> = match outlook.descriptors_of(part.inode) {
        Ok(found) => found.map(|number| format!("fd/{number}")).collect(),
        Err(PeerError::Denied { .. }) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let by_mapping = mappings.first().map(|first| format!("map_files/{:x}-{:x}", first.start, first.end));
    let mut failure = None;
    for path in candidates.into_iter().chain(by_mapping) {
        match open_regular(peer, &path) {
            Ok(Opened::Regular(file)) if is_file_of(&file, part) => return Ok(file),
            // The number was given to another file since it was found, or the inode is another device's.
            Ok(Opened::Regular(_)) => {}
            Ok(Opened::Special) => {
                let name = mappings.first().map(|first| first.path.to_string_lossy()).unwrap_or_default();
                return Err(AttachReason::unreachable(&format!("memory of the device `{name}`")));
            }
            Err(error) => failure = Some(peer.error("the file of its memory", error)),
        }
    }
    match failure {
        Some(error) => Err(error.into()),
        None => Err(AttachReason::unreachable("its file is not open in the process")),
    }
}

enum Opened {
    Regular(File),
    /// Something that must not even be opened: opening a device may do something.
    Special,
}

fn open_regular(peer: &Peer, path: &str) -> io::Result<Opened> {
    match peer.file_type(path)? {
        FileType::RegularFile => peer.open_file(path).map(Opened::Regular),
        _ => Ok(Opened::Special),
    }
}

/// Whether this is the file that `/proc/PID/maps` means.
///
/// Where `st_dev` is not what maps say, the file is mapped here and looked up in our own maps.
fn is_file_of(file: &File, part: FilePart) -> bool {
    let Ok(found) = fstat(file) else { return false };
    (found.st_dev, found.st_ino) == (part.device, part.inode)
        || identity_in_maps(file).is_ok_and(|found| found == (part.device, part.inode))
}

/// Device and inode of the file as maps have them.
fn identity_in_maps(file: &File) -> io::Result<(u64, u64)> {
    // Whole pages of the file's own size: nothing less of a hugetlbfs can be unmapped.
    let page = rustix::param::page_size();
    let length = usize::try_from(fstat(file)?.st_blksize).unwrap_or(page).max(page).next_multiple_of(page);
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory in use.
    let base = unsafe { mmap(std::ptr::null_mut(), length, ProtFlags::empty(), flags, file, 0) }?;
    let ours = File::open("/proc/self/maps").and_then(|maps| Mappings::read(io::BufReader::new(maps)));
    // SAFETY: the range mapped above, to which nothing points.
    unsafe { munmap(base, length) }?;
    let ours = ours?;
    match ours.covering(base.addr() as u64, length as u64) {
        Ok([mapping]) => Ok((mapping.device, mapping.inode)),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}
