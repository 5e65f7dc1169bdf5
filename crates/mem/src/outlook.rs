//! What is looked at once of a process, for all of its blocks.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;

use crate::attach::{AttachError, AttachReason, BlockAddress, attach_block, try_reading};
use crate::guest_ram::GuestRam;
use crate::maps::Mappings;
use crate::obstacles::Obstacles;
use crate::peer::{Held, Peer, PeerError};
use crate::supply::UNIT;

/// A process as it was at one moment: its mappings, its descriptors, and what of its memory is out of reach.
///
/// Blocks may be attached to one by one, so that one that cannot be reached keeps nobody from the others. What the
/// process does with its address space afterwards does not show: whoever lets it go on in between takes another look,
/// and [`GuestRam::recheck`] tells in the end.
#[derive(Debug)]
pub struct Outlook {
    peer: Arc<Peer>,
    mappings: Mappings,
    obstacles: Obstacles,
    /// Read when the first block is found to be a file.
    descriptors: OnceLock<Vec<Held>>,
}

impl Outlook {
    /// Takes a look at a process. No page of its memory is touched.
    ///
    /// # Errors
    /// What keeps us from looking into it.
    pub fn of(peer: Arc<Peer>) -> Result<Outlook, PeerError> {
        let mappings = peer.mappings()?;
        let obstacles = Obstacles::of(&peer)?;
        Ok(Outlook { peer, mappings, obstacles, descriptors: OnceLock::new() })
    }

    /// Finds the blocks in the address space and opens what is needed to read them. Region `i` is block `i`.
    ///
    /// No page of the guest is touched.
    ///
    /// # Errors
    /// The first block that cannot be reached, and why; or what keeps us from looking into the process.
    pub fn attach(&self, blocks: &[BlockAddress]) -> Result<GuestRam, AttachError> {
        try_reading(&self.peer, &self.mappings, blocks)?;
        let attach = |block: &BlockAddress| {
            attach_block(self, block).map_err(|reason| match reason {
                AttachReason::Peer(gone @ PeerError::Gone { .. }) => AttachError::Peer(gone),
                reason => AttachError::Block { block: block.name.clone(), reason },
            })
        };
        let regions = blocks.iter().map(attach).collect::<Result<_, _>>()?;
        Ok(GuestRam { peer: self.peer.clone(), regions, cancel: None, gap_bytes_min: AtomicUsize::new(UNIT) })
    }

    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    pub(crate) fn mappings(&self) -> &Mappings {
        &self.mappings
    }

    pub(crate) fn obstacles(&self) -> &Obstacles {
        &self.obstacles
    }

    /// The descriptor numbers under which the process had regular files with this inode number, whatever their device.
    /// A number may be another file's by now.
    pub(crate) fn descriptors_of(&self, inode: u64) -> Result<impl Iterator<Item = u32>, PeerError> {
        let held = match self.descriptors.get() {
            Some(held) => held,
            None => {
                let held = self.peer.regular_files()?;
                self.descriptors.get_or_init(|| held)
            }
        };
        Ok(held.iter().filter(move |held| held.inode == inode).map(|held| held.number))
    }
}
