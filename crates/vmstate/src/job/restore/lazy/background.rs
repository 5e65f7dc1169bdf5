//! What the background sends, read ahead of it: the server never waits for a disk but where a guest does.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use io::{AlignedBuffer, DirectIo, Filled, ReadAhead, ReadPair};
use page::PageRange;
use rustix::event::{EventfdFlags, eventfd};

use super::ledger::Ledger;
use crate::source::MappedRamFile;
use crate::{Error, Result};

/// How much is read at once.
const JOB_LEN: u64 = 1 << 20;
/// The largest pages of a target that are read ahead.
const HOST_PAGE_MAX: u64 = 2 << 20;
/// How many reads are under way at once: one fills the disk's queue while the other's bytes are taken.
pub(in crate::job::restore) const READERS: u16 = 2;
/// How many buffers there are: what was read and waits for the socket is among them.
const BUFFERS: usize = 6;

/// A part of a block to be read.
#[derive(Clone, Copy, Debug)]
struct Job {
    block: usize,
    /// In host pages.
    pages: PageRange,
    /// Where in the image's file.
    at: u64,
    len: usize,
}

/// What there is to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Host pages of a block, which count as sent, from this byte of [`Background::bytes`] on.
    Pages {
        /// The block.
        block: usize,
        /// The pages.
        run: PageRange,
        /// Where their bytes are.
        from: usize,
    },
    /// Nothing before [`Background::ready`] says so.
    NotYet,
    /// Nothing any more.
    Nothing,
}

pub(super) struct Background {
    ahead: ReadAhead<Job>,
    spare: Vec<AlignedBuffer>,
    /// What is sent from, and what of it was not looked at yet.
    current: Option<(Filled<Job>, PageRange)>,
    ready: OwnedFd,
}

impl Background {
    /// Readers for the pages that the ledger has left; `None` where the target's pages are too large to be read
    /// ahead.
    ///
    /// # Errors
    /// Where the system has no threads or descriptors left.
    pub(super) fn start(pair: &ReadPair, ledger: &Ledger) -> Result<Option<Background>> {
        let largest = ledger.accounts.iter().map(|account| account.host_page).max().unwrap_or(0);
        if largest > HOST_PAGE_MAX {
            return Ok(None);
        }
        let cannot = |error| Error::io("cannot read the image ahead", error);
        let pair = own(pair).map_err(cannot)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let ready = eventfd(0, flags).map_err(|error| cannot(error.into()))?;
        let bell = ready.try_clone().map_err(cannot)?;
        let ahead = ReadAhead::start_waking(
            usize::from(READERS),
            move |job: &Job, buffer| pair.read_exact_at(&mut buffer[..job.len], job.at),
            // It fails only where it is rung beyond all counting, and then it has been heard.
            move || {
                let _ = rustix::io::write(&bell, &1u64.to_ne_bytes());
            },
        );
        let len = JOB_LEN.max(largest) as usize;
        let spare = (0..BUFFERS).map(|_| AlignedBuffer::new(len)).collect();
        Ok(Some(Background { ahead: ahead.map_err(cannot)?, spare, current: None, ready }))
    }

    /// Becomes readable when what was [`Next::NotYet`] may be there.
    pub(super) fn ready(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// The bytes that [`Next::Pages`] speaks of, until the next call of [`Background::next`].
    pub(super) fn bytes(&self) -> &[u8] {
        self.current.as_ref().map_or(&[], |(filled, _)| &filled.buffer)
    }

    /// What is to be sent next, of at most `len_max` bytes but at least one page.
    ///
    /// # Errors
    /// [`Kind::Io`](crate::Kind::Io) where the image cannot be read.
    pub(super) fn next(&mut self, image: &MappedRamFile, ledger: &mut Ledger, len_max: u64) -> Result<Next> {
        loop {
            self.ask(image, ledger);
            if let Some((filled, rest)) = &mut self.current {
                let Job { block, pages, .. } = filled.job;
                if let Some(run) = ledger.next_planned(block, *rest, len_max) {
                    rest.start = run.end;
                    let from = (run.start.0 - pages.start.0) * ledger.accounts[block].host_page;
                    return Ok(Next::Pages { block, run, from: from as usize });
                }
            }
            if let Some((filled, _)) = self.current.take() {
                self.spare.push(filled.buffer);
                continue;
            }
            if self.ahead.pending() == 0 {
                return Ok(Next::Nothing);
            }
            // Before the look, so that what is done after it rings again.
            let _ = rustix::io::read(&self.ready, &mut [0; 8]);
            let Some(filled) = self.ahead.try_take() else { return Ok(Next::NotYet) };
            if let Err(error) = filled.result {
                let at = filled.job.at;
                return Err(Error::io(format!("cannot read {} at {at:#x}", image.path().display()), error));
            }
            let pages = filled.job.pages;
            self.current = Some((filled, pages));
        }
    }

    /// Has the readers fill what is spare.
    fn ask(&mut self, image: &MappedRamFile, ledger: &mut Ledger) {
        let len_max = self.spare.first().map_or(0, |buffer| buffer.len() as u64);
        while let Some(buffer) = self.spare.pop() {
            let Some((block, pages)) = ledger.plan(len_max) else {
                self.spare.push(buffer);
                return;
            };
            let host_page = ledger.accounts[block].host_page;
            let at = image.layout().blocks[block].pages.start + pages.start.0 * host_page;
            let len = (pages.count().0 * host_page) as usize;
            self.ahead.push(Job { block, pages, at, len }, buffer);
        }
    }
}

/// The same files for threads that may outlive a borrow.
fn own(pair: &ReadPair) -> std::io::Result<ReadPair> {
    let direct_io = match &pair.direct {
        Some(_) => pair.direct_io.clone(),
        None => DirectIo::Unsupported { reason: "not wanted".to_owned() },
    };
    Ok(ReadPair {
        buffered: pair.buffered.try_clone()?,
        direct: pair.direct.as_ref().map(File::try_clone).transpose()?,
        direct_io,
    })
}
