//! From what the VMM says of its RAM blocks to memory that can be read.

use std::io;

use page::PageSize;

use crate::file::BackingFile;
use crate::guest_ram::{Reach, Region};
use crate::kind::{Backing, classify};
use crate::maps::{Gap, Mapping, Mappings};
use crate::outlook::Outlook;
use crate::peer::{Peer, PeerError};
use crate::private_file::PrivateFileBlock;
use crate::remote::{RemoteSpan, read_spans};

/// A RAM block as the VMM describes it. Nothing of it is believed unchecked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockAddress {
    /// The block's name, for example `pc.ram`.
    pub name: String,
    /// The address of its first byte in the VMM's process.
    pub address: u64,
    /// Its used length in bytes; the last page may be cut short.
    pub length: u64,
    /// The page size that its pages are counted in, in bytes.
    pub page_size: u64,
}

/// Why guest memory cannot be attached to.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The process cannot be looked into.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// One block cannot be reached; the others were not looked at.
    #[error("block `{block}`")]
    Block {
        /// The name of the block.
        block: String,
        /// Why not.
        #[source]
        reason: AttachReason,
    },
}

/// Why a block cannot be attached to.
#[derive(Debug, thiserror::Error)]
pub enum AttachReason {
    /// What the VMM said of it cannot be: the VMM's fault, or that of whoever asked it.
    #[error("{text}")]
    Implausible {
        /// In what way.
        text: String,
    },
    /// Not all of it is mapped where the VMM said.
    #[error("{0}")]
    Unmapped(Gap),
    /// It is memory of a kind that this version does not reach.
    #[error("cannot be reached from outside: {reason}")]
    Unreachable {
        /// Which kind, in words for the user.
        reason: String,
    },
    /// The process does not let us.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The system refused.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl AttachReason {
    pub(crate) fn unreachable(reason: &str) -> AttachReason {
        AttachReason::Unreachable { reason: reason.to_owned() }
    }

    pub(crate) fn io(what: &'static str, source: impl Into<io::Error>) -> AttachReason {
        AttachReason::Io { what, source: source.into() }
    }

    fn implausible(text: String) -> AttachReason {
        AttachReason::Implausible { text }
    }
}

/// Looks at one block and opens what is needed to read it.
pub(crate) fn attach_block(outlook: &Outlook, block: &BlockAddress) -> Result<Region, AttachReason> {
    let page_size = check_block(block)?;
    let range = block.address..block.address + block.length;
    let covering = outlook.mappings().covering(block.address, block.length);
    let covering = covering.map_err(AttachReason::Unmapped)?;
    let backing = classify(covering, block.address);
    if let Some(reason) = outlook.obstacles().reason(&range) {
        return Err(AttachReason::unreachable(reason));
    }
    let open = |part| BackingFile::open(outlook, covering, part, block.length);
    let reach = match &backing {
        Backing::PrivateAnonymous => Reach::Process,
        &Backing::SharedFile(part) => Reach::Shared(open(part)?),
        &Backing::PrivateFile(part) => {
            Reach::PrivateFile(PrivateFileBlock::open(outlook.peer(), open(part)?)?)
        }
        Backing::Unreachable { reason } => return Err(AttachReason::unreachable(reason)),
    };
    let is_writable = covering.iter().all(|mapping| mapping.is_writable);
    Ok(Region::new(block.clone(), page_size, backing, reach, is_writable))
}

/// Checks what the VMM said against what can be, before anything is computed from it.
fn check_block(block: &BlockAddress) -> Result<PageSize, AttachReason> {
    let &BlockAddress { address, length, page_size, .. } = block;
    let host = rustix::param::page_size() as u64;
    let size = PageSize::new(page_size)
        .ok_or_else(|| AttachReason::implausible(format!("a page size of {page_size:#x} bytes")))?;
    // A page of the image would be there only in part.
    if !host.is_multiple_of(page_size) {
        let text = format!("pages of {page_size:#x} bytes do not divide the host's of {host:#x}");
        return Err(AttachReason::implausible(text));
    }
    if length == 0 {
        return Err(AttachReason::implausible("it is empty".to_owned()));
    }
    if !address.is_multiple_of(host) {
        return Err(AttachReason::implausible(format!("it starts at {address:#x}, amid a page")));
    }
    match address.checked_add(length).and_then(|end| end.checked_next_multiple_of(host)) {
        Some(_) => Ok(size),
        None => Err(AttachReason::implausible(format!("{length:#x} bytes at {address:#x} wrap"))),
    }
}

/// Reads one byte of the process, to learn now and not in the middle of a save that it is forbidden.
///
/// Looking into `/proc/PID` takes less permission than reading memory does (ptrace_scope, for one). The byte
/// is one of a private file mapping, in practice the program's first, and none of the guest's memory: looking
/// there could allocate.
pub(crate) fn try_reading(
    peer: &Peer,
    mappings: &Mappings,
    blocks: &[BlockAddress],
) -> Result<(), PeerError> {
    let has_block = |mapping: &Mapping| {
        let overlaps = |block: &BlockAddress| {
            mapping.start < block.address.saturating_add(block.length) && block.address < mapping.end
        };
        blocks.iter().any(overlaps)
    };
    let is_file = |mapping: &&Mapping| {
        mapping.is_readable && !mapping.is_shared && mapping.inode != 0 && !has_block(mapping)
    };
    let Some(file) = mappings.as_slice().iter().find(is_file) else { return Ok(()) };
    let mut byte = 0u8;
    let span = RemoteSpan { remote: file.start, local: &raw mut byte, len: 1 };
    // SAFETY: the one local byte is this function's own.
    let read = unsafe { read_spans(peer, &[span]) };
    match read {
        Err(fault) if matches!(fault.source.raw_os_error(), Some(libc::EPERM | libc::ESRCH)) => {
            Err(peer.error("reading the memory", fault.source))
        }
        // A fault there says nothing of the guest's memory.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_before_anything_is_computed() {
        let host = rustix::param::page_size() as u64;
        let block = |address, length, page_size| BlockAddress {
            name: "pc.ram".to_owned(),
            address,
            length,
            page_size,
        };
        for (block, expected) in [
            (block(host, host, 0), "a page size of 0x0 bytes".to_owned()),
            (block(host, host, 3 << 10), "a page size of 0xc00 bytes".to_owned()),
            (
                block(host, host, host * 2),
                format!("pages of {:#x} bytes do not divide the host's of {host:#x}", host * 2),
            ),
            (block(host, 0, host), "it is empty".to_owned()),
            (block(host + 1, host, host), format!("it starts at {:#x}, amid a page", host + 1)),
            (
                block(u64::MAX - host + 1, host, host),
                format!("{host:#x} bytes at {:#x} wrap", u64::MAX - host + 1),
            ),
        ] {
            let refused = check_block(&block).expect_err("an impossible block");
            assert_eq!(refused.to_string(), expected);
        }
    }
}
