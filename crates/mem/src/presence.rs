//! Which bytes of a block are there, found without touching any.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ::io::Cancel;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::peer::Peer;

/// How the presence of private memory is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PagemapMethod {
    /// The fastest that the kernel has.
    #[default]
    Auto,
    /// The PAGEMAP_SCAN ioctl (Linux 6.7 and later): whole runs at a time, without the zero page.
    Scan,
    /// The entries of `/proc/PID/pagemap`: eight bytes for each page of address space.
    Entries,
}

/// Runs per PAGEMAP_SCAN call: 96 KiB of answers.
const SCAN_RUNS: usize = 4096;

/// Entries per read of pagemap: 512 KiB of them, for 256 MiB of address space with 4 KiB pages.
const ENTRIES_PER_READ: usize = 64 << 10;

/// Bit 63 of a pagemap entry: the page is in memory (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY_PRESENT: u64 = 1 << 63;
/// Bit 62: the page is in swap. It has content as much as one in memory.
const ENTRY_SWAPPED: u64 = 1 << 62;

// linux/fs.h, since 6.7.
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// How much address space one PAGEMAP_SCAN call walks at the most, in bytes: a call cannot be interrupted, and one
/// over a tebibyte that is all there would take a second.
const SCAN_LEN: u64 = 64 << 30;

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<PageRegion>() == 24);
const _: () = assert!(size_of::<ScanArgument>() == 96);

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<ScanArgument>(b'f', 16);

/// A stretch of a peer's memory; both ends are multiples of the host's page size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch {
    pub address: u64,
    pub length: u64,
}

/// The runs of a stretch that are in the peer's page tables or in swap, as byte offsets in the stretch.
///
/// Private anonymous memory that has never been written has no entry in the page tables, or one of the
/// kernel's zero page after it was read; either way it reads as zero. What other memory has where it has no
/// entry depends on its kind.
pub(crate) struct PageTableRuns {
    peer: Arc<Peer>,
    stretch: Stretch,
    walk: Walk,
    is_over: bool,
    cancel: Option<Cancel>,
}

enum Walk {
    Scan(ScanWalk),
    Entries(EntryWalk),
}

impl PageTableRuns {
    /// Starts to walk `stretch` of the peer's memory.
    ///
    /// # Errors
    /// What opening pagemap said; `Unsupported` when the kernel lacks the method demanded.
    pub(crate) fn open(
        peer: Arc<Peer>,
        stretch: Stretch,
        method: PagemapMethod,
    ) -> io::Result<PageTableRuns> {
        let pagemap = peer.open_file("pagemap")?;
        let walk = match method {
            PagemapMethod::Entries => Walk::Entries(EntryWalk::new(pagemap, stretch)),
            PagemapMethod::Auto if !has_scan(&pagemap, stretch)? => {
                Walk::Entries(EntryWalk::new(pagemap, stretch))
            }
            PagemapMethod::Scan if !has_scan(&pagemap, stretch)? => {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel has no PAGEMAP_SCAN"));
            }
            PagemapMethod::Auto | PagemapMethod::Scan => Walk::Scan(ScanWalk::new(pagemap, stretch)),
        };
        Ok(PageTableRuns { peer, stretch, walk, is_over: false, cancel: None })
    }

    /// A walk that fails with `Interrupted` soon after the switch is thrown, also where it finds nothing for long.
    pub(crate) fn heeding(self, cancel: Option<Cancel>) -> PageTableRuns {
        PageTableRuns { cancel, ..self }
    }

    fn advance(&mut self) -> io::Result<Option<Range<u64>>> {
        let go_on = || match &self.cancel {
            Some(cancel) if cancel.is_cancelled() => Err(io::Error::from(io::ErrorKind::Interrupted)),
            _ => Ok(()),
        };
        let found = match &mut self.walk {
            Walk::Scan(walk) => walk.next_run(go_on)?,
            Walk::Entries(walk) => walk.next_run(go_on)?,
        };
        // A process that ended has no pages left, which must not pass for a guest full of zeros. Kernels
        // fail the walk then; nothing documents that they must.
        if found.is_none() && !self.peer.is_alive() {
            return Err(Errno::SRCH.into());
        }
        Ok(found.map(|run| run.start - self.stretch.address..run.end - self.stretch.address))
    }
}

impl Iterator for PageTableRuns {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<io::Result<Range<u64>>> {
        if self.is_over {
            return None;
        }
        let next = self.advance().transpose();
        self.is_over = !matches!(next, Some(Ok(_)));
        next
    }
}

/// Whether the kernel knows PAGEMAP_SCAN, found by asking for the stretch's first page.
fn has_scan(pagemap: &File, stretch: Stretch) -> io::Result<bool> {
    let mut runs = [PageRegion::default()];
    let end = stretch.address + stretch.length.min(rustix::param::page_size() as u64);
    match scan(pagemap, stretch.address..end, &mut runs) {
        Ok(_) => Ok(true),
        Err(Errno::NOTTY | Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// One PAGEMAP_SCAN call: how many runs it found, and the address it came to.
fn scan(pagemap: &File, range: Range<u64>, runs: &mut [PageRegion]) -> Result<(usize, u64), Errno> {
    let mut argument = ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        start: range.start,
        end: range.end,
        vec: runs.as_mut_ptr().expose_provenance() as u64,
        vec_len: runs.len() as u64,
        // Inverted and demanded: pages that are not the zero page.
        category_inverted: PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..ScanArgument::default()
    };
    loop {
        // SAFETY: the argument is laid out as the kernel's and says its own size; `vec` and `vec_len` are the
        // caller's slice, exclusively borrowed, which the kernel fills with plain numbers.
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut argument) };
        match usize::try_from(found) {
            Ok(found) => return Ok((found.min(runs.len()), argument.walk_end)),
            Err(_) => match Errno::from_io_error(&io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                error => return Err(error.unwrap_or(Errno::IO)),
            },
        }
    }
}

struct ScanWalk {
    pagemap: File,
    /// What has not been asked for yet.
    rest: Range<u64>,
    runs: Vec<PageRegion>,
    found: usize,
    taken: usize,
}

impl ScanWalk {
    fn new(pagemap: File, stretch: Stretch) -> ScanWalk {
        let rest = stretch.address..stretch.address + stretch.length;
        ScanWalk { pagemap, rest, runs: vec![PageRegion::default(); SCAN_RUNS], found: 0, taken: 0 }
    }

    fn next_run(&mut self, go_on: impl Fn() -> io::Result<()>) -> io::Result<Option<Range<u64>>> {
        while self.taken == self.found {
            if self.rest.is_empty() {
                return Ok(None);
            }
            go_on()?;
            let end = self.rest.end.min(self.rest.start.saturating_add(SCAN_LEN));
            let (found, reached) = scan(&self.pagemap, self.rest.start..end, &mut self.runs)?;
            if reached <= self.rest.start || reached > end {
                return Err(io::Error::other(format!("PAGEMAP_SCAN stopped at {reached:#x}")));
            }
            self.rest.start = reached;
            (self.found, self.taken) = (found, 0);
        }
        let run = self.runs[self.taken];
        self.taken += 1;
        Ok(Some(run.start..run.end))
    }
}

/// Whether the page of a pagemap entry is in memory or in swap.
pub(crate) fn is_there(entry: [u8; 8]) -> bool {
    u64::from_ne_bytes(entry) & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0
}

struct EntryWalk {
    pagemap: File,
    page: u64,
    /// Addresses whose entries have not been read yet.
    rest: Range<u64>,
    buffer: Vec<u8>,
    /// The entries in hand: how many bytes of the buffer they fill and the first not looked at.
    filled: usize,
    taken: usize,
    /// The address of the entry at `taken`.
    address: u64,
}

impl EntryWalk {
    fn new(pagemap: File, stretch: Stretch) -> EntryWalk {
        EntryWalk {
            pagemap,
            page: rustix::param::page_size() as u64,
            rest: stretch.address..stretch.address + stretch.length,
            buffer: vec![0; ENTRIES_PER_READ * 8],
            filled: 0,
            taken: 0,
            address: stretch.address,
        }
    }

    fn next_run(&mut self, go_on: impl Fn() -> io::Result<()>) -> io::Result<Option<Range<u64>>> {
        let mut start = None;
        while self.taken < self.filled || go_on().and_then(|()| self.refill())? {
            let wanted = start.is_none();
            let skipped = self.skip_until(wanted);
            match start {
                None if skipped => start = Some(self.address),
                Some(start) if skipped => return Ok(Some(start..self.address)),
                _ => {}
            }
        }
        Ok(start.map(|start| start..self.address))
    }

    /// Goes on to the next entry in hand that is there (or is not); says whether there is one.
    fn skip_until(&mut self, wanted: bool) -> bool {
        let entries = self.buffer[self.taken..self.filled].as_chunks::<8>().0;
        let found = entries.iter().position(|entry| is_there(*entry) == wanted);
        let skipped = found.unwrap_or(entries.len());
        self.taken += skipped * 8;
        self.address += skipped as u64 * self.page;
        found.is_some()
    }

    /// Reads more entries; says whether there were any.
    fn refill(&mut self) -> io::Result<bool> {
        let wanted = (self.rest.end - self.rest.start) / self.page;
        let bytes = wanted.min(ENTRIES_PER_READ as u64) as usize * 8;
        if bytes == 0 {
            return Ok(false);
        }
        // A process that has ended gives no entries, and the error of a short read.
        self.pagemap.read_exact_at(&mut self.buffer[..bytes], self.rest.start / self.page * 8)?;
        self.rest.start += bytes as u64 / 8 * self.page;
        (self.filled, self.taken) = (bytes, 0);
        Ok(true)
    }
}

/// The runs of a file that have content, as byte offsets in a part of it.
///
/// The file is asked by SEEK_DATA and SEEK_HOLE, which move the position of the description: it must be our
/// own. A swapped page of a memfd counts as data.
pub(crate) struct FileRuns<'a> {
    file: &'a File,
    start: u64,
    rest: Range<u64>,
}

impl<'a> FileRuns<'a> {
    pub(crate) fn new(file: &'a File, start: u64, length: u64) -> FileRuns<'a> {
        FileRuns { file, start, rest: start..start + length }
    }

    fn advance(&mut self) -> io::Result<Option<Range<u64>>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let data = match rustix::fs::seek(self.file, SeekFrom::Data(self.rest.start)) {
            // No data up to the end of the file.
            Err(Errno::NXIO) => return Ok(None),
            found => found?,
        };
        if data >= self.rest.end {
            return Ok(None);
        }
        let hole = match rustix::fs::seek(self.file, SeekFrom::Hole(data)) {
            Err(Errno::NXIO) => self.rest.end,
            found => found?.min(self.rest.end),
        };
        self.rest.start = hole;
        Ok((data < hole).then(|| data - self.start..hole - self.start))
    }
}

impl Iterator for FileRuns<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<io::Result<Range<u64>>> {
        let next = self.advance().transpose();
        if !matches!(next, Some(Ok(_))) {
            self.rest.start = self.rest.end;
        }
        next
    }
}
