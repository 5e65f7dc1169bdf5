//! The memory of a guest, block by block.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ::io::Cancel;
use page::{PageCount, PageSet, PageSize, Window};
use rustix::fs::fstat;

use crate::attach::{AttachError, BlockAddress};
use crate::file::{BackingFile, Medium};
use crate::kind::{Backing, classify};
use crate::outlook::Outlook;
use crate::peer::{Peer, PeerError};
use crate::presence::{PageTableRuns, PagemapMethod, Stretch};
use crate::private_file::PrivateFileBlock;
use crate::recorded::Recorded;
use crate::remote::{RemoteSpan, read_spans};
use crate::runs::{Runs, Union, shared_runs, unmapped_runs};
use crate::windows::Windows;

/// The RAM blocks of a guest in another process, readable from here. Region `i` is block `i` of those given.
///
/// The guest must be stopped while it is read: nothing here is atomic. [`GuestRam::recheck`] tells at the end
/// whether it was the same memory all along.
#[derive(Debug)]
pub struct GuestRam {
    pub(crate) peer: Arc<Peer>,
    pub(crate) regions: Vec<Region>,
    pub(crate) cancel: Option<Cancel>,
    /// The shortest run of zeros that is left out between data, in bytes.
    pub(crate) gap_bytes_min: AtomicUsize,
}

/// One block and the way to its bytes.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) block: BlockAddress,
    pub(crate) page_size: PageSize,
    pub(crate) backing: Backing,
    pub(crate) reach: Reach,
    /// Whether the process itself may write all of it.
    pub(crate) is_writable: bool,
    /// The pages that were supplied as data.
    pub(crate) data: Recorded,
}

/// How the bytes of a region are read.
#[derive(Debug)]
pub(crate) enum Reach {
    /// From the process.
    Process,
    /// From its file.
    Shared(BackingFile),
    /// From the process where it has pages of its own, from its file elsewhere.
    PrivateFile(PrivateFileBlock),
}

impl Region {
    pub(crate) fn new(
        block: BlockAddress,
        page_size: PageSize,
        backing: Backing,
        reach: Reach,
        is_writable: bool,
    ) -> Region {
        // The length was found mapped in a process, so there is room for a few bytes for each 128 MiB of it.
        let data = Recorded::new(page_size.pages_of(block.length));
        Region { block, page_size, backing, reach, is_writable, data }
    }

    fn pages(&self) -> PageCount {
        self.page_size.pages_of(self.block.length)
    }
}

/// What has changed since the memory was attached to.
#[derive(Debug, thiserror::Error)]
pub enum RecheckError {
    /// The process cannot be looked into any more, or has ended.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// A block lies in other memory than it did.
    #[error("block `{block}` at {address:#x} was mapped anew while it was read")]
    Moved {
        /// The name of the block.
        block: String,
        /// Its address.
        address: u64,
    },
}

impl GuestRam {
    /// Finds the blocks in the address space of the peer and opens what is needed to read them.
    ///
    /// No page of the guest is touched.
    ///
    /// # Errors
    /// The first block that cannot be reached, and why; or what keeps us from looking into the process.
    pub fn attach(peer: Arc<Peer>, blocks: &[BlockAddress]) -> Result<GuestRam, AttachError> {
        Outlook::of(peer)?.attach(blocks)
    }

    /// From now on a walk over page tables fails with `Interrupted` soon after the switch is thrown. Where little is
    /// there, nobody else would look at the switch for as long as that takes: a second for a tebibyte.
    pub fn heed(&mut self, cancel: &Cancel) {
        self.cancel = Some(cancel.clone());
    }

    /// From now on runs of zeros shorter than so many bytes are written along: what the target writes in the time that
    /// it takes to begin anew behind them. Only gaps within a window are.
    pub fn write_gaps_below(&self, bytes: usize) {
        self.gap_bytes_min.store(bytes, Ordering::Relaxed);
    }

    /// The process.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// How many regions there are.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// The block that a region is.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn block(&self, region: usize) -> &BlockAddress {
        &self.regions[region].block
    }

    /// What is behind a region.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn backing(&self, region: usize) -> &Backing {
        &self.regions[region].backing
    }

    /// What the file of a region lies on, if there is one behind it.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn medium(&self, region: usize) -> Option<Medium> {
        match &self.regions[region].reach {
            Reach::Process => None,
            Reach::Shared(shared) => Some(shared.medium()),
            Reach::PrivateFile(private) => Some(private.file().medium()),
        }
    }

    /// Whether a region is a private mapping of this very file, and if so, where in it the region begins.
    ///
    /// # Errors
    /// What asking for the files' identities said.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn private_offset_in(&self, region: usize, file: &File) -> io::Result<Option<u64>> {
        let Reach::PrivateFile(private) = &self.regions[region].reach else { return Ok(None) };
        let (mapped, asked) = (fstat(private.file().file())?, fstat(file)?);
        let is_same = (mapped.st_dev, mapped.st_ino) == (asked.st_dev, asked.st_ino);
        Ok(is_same.then(|| private.file().part().offset))
    }

    pub(crate) fn reach(&self, region: usize) -> (&Reach, bool) {
        let region = &self.regions[region];
        (&region.reach, region.is_writable)
    }

    /// The windows of a region that have pages, in order, with those pages marked. None is touched.
    ///
    /// A page that is not marked reads as zero; a marked one may do so too. The stream takes the same little
    /// memory whatever the region's size (on hugetlbfs eight bytes for each of its pages). An error in it is
    /// the last item.
    ///
    /// # Errors
    /// When the presence of pages cannot be asked for.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn windows(
        &self,
        region: usize,
    ) -> io::Result<impl Iterator<Item = io::Result<Window>> + Send + use<'_>> {
        self.windows_by(region, PagemapMethod::Auto)
    }

    /// [`GuestRam::windows`] with the method for page tables chosen by the caller.
    ///
    /// # Errors
    /// As there; `Unsupported` when the kernel lacks the method.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn windows_by(
        &self,
        region: usize,
        method: PagemapMethod,
    ) -> io::Result<impl Iterator<Item = io::Result<Window>> + Send + use<'_>> {
        let Region { block, page_size, reach, .. } = &self.regions[region];
        let of_process = || {
            let host = rustix::param::page_size() as u64;
            // Attaching has checked that the end, rounded up, is an address.
            let length = block.length.next_multiple_of(host);
            let stretch = Stretch { address: block.address, length };
            PageTableRuns::open(self.peer.clone(), stretch, method)
                .map(|runs| runs.heeding(self.cancel.clone()))
        };
        let runs: Runs<'_> = match reach {
            Reach::Process => Box::new(of_process()?),
            Reach::Shared(shared) => shared_runs(&self.peer, shared, block.length, method)?,
            Reach::PrivateFile(private) => {
                Box::new(Union::new(of_process()?, unmapped_runs(private.file(), block.length)?))
            }
        };
        Ok(Windows::new(runs, *page_size, block.length))
    }

    /// The windows of all of a region, in order, whether its pages are there or not.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn whole(&self, region: usize) -> impl Iterator<Item = io::Result<Window>> + Send + use<> {
        let Region { block, page_size, .. } = &self.regions[region];
        Windows::new(std::iter::once(Ok(0..block.length)), *page_size, block.length)
    }

    /// The piece for a lane that a window of a region is, where the region's page 0 goes to the file offset
    /// `pages_offset`.
    ///
    /// # Panics
    /// When there is no such region, the window lies beyond its end, or the file offset wraps.
    pub fn piece(&self, region: usize, window: &Window, pages_offset: u64) -> ::io::Piece {
        let Region { block, page_size, .. } = &self.regions[region];
        let offset = window.first.0 << page_size.shift();
        assert!(offset < block.length, "a window at {offset:#x} of `{}`", block.name);
        let grain = page_size.bytes();
        let len = (block.length - offset).min(page::WINDOW_PAGES * grain);
        ::io::Piece {
            region: u32::try_from(region).expect("as many regions as blocks were given"),
            offset,
            target: pages_offset.checked_add(offset).expect("a file offset that wraps"),
            // A page divides the host's, so both fit.
            grain: grain as u32,
            len: len as u32,
            mask: window.mask.0,
        }
    }

    /// The pages of a region that were supplied as data so far: exact once the lanes have finished.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn data_pages(&self, region: usize) -> PageSet {
        let region = &self.regions[region];
        PageSet::from_words(region.data.all(), region.pages())
    }

    /// The same as 64-bit words, of those stretches that have any: where each begins, in words, and its words. It takes
    /// the time and the memory that the data asks for, and not the length of the block.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn data_parts(&self, region: usize) -> impl Iterator<Item = (usize, Vec<u64>)> {
        self.regions[region].data.parts()
    }

    /// Checks that the process is the same and that every block still lies in the same memory.
    ///
    /// # Errors
    /// What has changed. What was read since attaching is then worth nothing.
    pub fn recheck(&self) -> Result<(), RecheckError> {
        let mappings = self.peer.mappings()?;
        for Region { block, backing, .. } in &self.regions {
            // Mappings may have been split or joined, which changes nothing behind them.
            let now = mappings.covering(block.address, block.length);
            if now.is_ok_and(|now| classify(now, block.address) == *backing) {
                continue;
            }
            return Err(RecheckError::Moved { block: block.name.clone(), address: block.address });
        }
        match self.peer.is_same() {
            true => Ok(()),
            false => Err(PeerError::Gone { pid: self.peer.pid() }.into()),
        }
    }

    /// Reads bytes of a region, wherever they are; for verification, not for speed.
    ///
    /// Anonymous pages that are not there become present by it (as the kernel's zero page, or on huge pages one
    /// of the pool); holes of a file stay holes.
    ///
    /// # Errors
    /// `InvalidInput` when the range is not within the region; otherwise an error that names the block and
    /// the address.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn read(&self, region: usize, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let block = &self.regions[region].block;
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > block.length) {
            let text = format!("{:#x} bytes at {offset:#x} of block `{}`", buffer.len(), block.name);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let (local, len) = (buffer.as_mut_ptr(), buffer.len());
        // SAFETY: the buffer is exclusively borrowed for this call, and the range was checked above.
        unsafe { self.copy(region, &[Part { offset, local, len }]) }
    }

    pub(crate) fn region(&self, region: u32) -> io::Result<&Region> {
        self.regions.get(region as usize).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("no region {region} among {}", self.regions.len()),
            )
        })
    }

    /// Copies parts of a region, which must lie within it.
    ///
    /// No page of a file is touched: holes stay holes.
    ///
    /// # Errors
    /// Names the block and the address.
    ///
    /// # Safety
    /// The local range of every part must be mapped, writable and this call's alone.
    pub(crate) unsafe fn copy(&self, region: usize, parts: &[Part]) -> io::Result<()> {
        let Region { block, reach, .. } = &self.regions[region];
        let fail = |source, address| block_fault(block, address, source);
        let mut spans: Vec<RemoteSpan> = Vec::with_capacity(parts.len());
        for part in parts {
            let whole = block.address + part.offset..block.address + part.offset + part.len as u64;
            let (file, stretches) = match reach {
                Reach::Process => (None, vec![(whole.clone(), true)]),
                Reach::Shared(shared) => (Some(shared), vec![(whole.clone(), false)]),
                Reach::PrivateFile(private) => {
                    let split = private.split(whole.clone()).map_err(|source| fail(source, whole.start))?;
                    (Some(private.file()), split)
                }
            };
            for (stretch, is_of_process) in stretches {
                let local = part.local.wrapping_add((stretch.start - whole.start) as usize);
                let len = (stretch.end - stretch.start) as usize;
                match file {
                    Some(file) if !is_of_process => {
                        // SAFETY: a piece of the part's local range, which is the caller's.
                        unsafe { file.read(stretch.start - block.address, local, len) }
                            .map_err(|source| fail(source, stretch.start))?;
                    }
                    _ => spans.push(RemoteSpan { remote: stretch.start, local, len }),
                }
            }
        }
        // SAFETY: the spans have pieces of the parts' local ranges.
        unsafe { read_spans(&self.peer, &spans) }.map_err(|fault| fail(fault.source, fault.address))
    }
}

/// Bytes of a region and where they go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub offset: u64,
    pub local: *mut u8,
    pub len: usize,
}

/// Guest memory that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("block `{block}` at address {address:#x}")]
struct BlockFault {
    block: String,
    address: u64,
    source: io::Error,
}

pub(crate) fn block_fault(block: &BlockAddress, address: u64, source: io::Error) -> io::Error {
    io::Error::new(source.kind(), BlockFault { block: block.name.clone(), address, source })
}
