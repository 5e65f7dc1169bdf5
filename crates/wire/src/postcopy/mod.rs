//! Postcopy: a guest that runs while its memory is still on the way.
//!
//! Two byte streams make the conversation. The *main channel* goes from source to target and is a
//! [stream](crate::qemu) with commands in it: after the list of blocks the device state follows at once,
//! wrapped in a PACKAGED command, and only then the pages. The *return path* goes the other way, over the
//! same socket: it has no magic and no sections, only messages, most of which ask for a page that a virtual
//! processor waits for. Where the preempt channel is on, a second connection carries the pages that were
//! asked for, as bare records.
//!
//! The commands themselves are [`crate::qemu::Command`]s. Here is what only postcopy has: the return path,
//! the opening of the main channel, and the bitmap by which a target tells what has arrived.

mod decode;
pub mod dump;
mod encode;
pub mod format;
pub mod survey;

use page::PageRange;

use crate::{Fault, IdStr};

pub use decode::{Package, decode_message, decode_package, decode_received};
pub use encode::{Opening, encode_received};

/// One message of the return path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The target will send nothing more; zero is success.
    Shut(u32),
    /// The answer to a PING, with its value.
    Pong(u32),
    /// Pages that a virtual processor, or QEMU itself, waits for.
    RequestPages(PageRequest),
    /// The bitmap of what has arrived follows, outside the message: [`decode_received`].
    ReceivedBitmap {
        /// The RAM block.
        block: IdStr,
    },
    /// The target is ready to go on after a recovery; the value is always
    /// [`MIGRATION_RESUME_ACK_VALUE`](format::MIGRATION_RESUME_ACK_VALUE).
    ResumeAck(u32),
    /// The target agrees to the switchover; since 8.1, and never in postcopy.
    SwitchoverAck,
}

/// What a target asks for, as it stands on the wire: nothing of it has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// The RAM block; `None` is the block of the request before.
    pub block: Option<IdStr>,
    /// The offset in the block, in bytes.
    pub start: u64,
    /// The length in bytes: one page of the block's backend.
    pub len: u32,
}

/// A RAM block as requests are judged by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestedBlock {
    /// The block's idstr.
    pub name: IdStr,
    /// The used length in bytes, a multiple of `host_page`.
    pub length: u64,
    /// The page size of the target's backend in bytes, a power of two.
    pub host_page: u64,
}

/// A request that was found to be of pages that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The block's place in the list.
    pub block: usize,
    /// Its pages, in units of the block's own host pages.
    pub pages: PageRange,
}

/// Judges requests: remembers the block of the last one, and lets none pass that is not of whole pages
/// within a block.
#[derive(Clone, Debug)]
pub struct Requests {
    blocks: Vec<RequestedBlock>,
    last: Option<usize>,
}

impl Requests {
    /// A judge of requests for these blocks.
    pub fn new(blocks: Vec<RequestedBlock>) -> Requests {
        Requests { blocks, last: None }
    }

    /// What the request that stands at `at` of the return path asks for.
    ///
    /// # Errors
    /// A damaged fault for an unknown block, for a block that no request has named, for a start or a length
    /// that is no multiple of the block's page, and for a range that reaches beyond the block.
    pub fn judge(&mut self, request: &PageRequest, at: u64) -> Result<Wanted, Fault> {
        let fault = |problem: String| Fault::damaged(at, "page request", problem);
        let index = match &request.block {
            Some(name) => self
                .blocks
                .iter()
                .position(|block| block.name == *name)
                .ok_or_else(|| fault(format!("block `{name}` is unknown")))?,
            None => self.last.ok_or_else(|| fault("names no block, and none was named before".to_owned()))?,
        };
        let Some(block) = self.blocks.get(index) else {
            return Err(fault("names no block".to_owned()));
        };
        let (start, len, page) = (request.start, u64::from(request.len), block.host_page);
        let within = start.checked_add(len).is_some_and(|end| end <= block.length);
        if len == 0 || !start.is_multiple_of(page) || !len.is_multiple_of(page) || !within {
            let problem = format!(
                "{len:#x} bytes from {start:#x} are no pages of `{}`, which has {:#x} bytes in pages of {page:#x}",
                block.name, block.length
            );
            return Err(fault(problem));
        }
        // Only a request that was right changes what the next one refers to, as in QEMU.
        self.last = Some(index);
        Ok(Wanted { block: index, pages: PageRange::new(start / page, (start + len) / page) })
    }

    /// Forgets the block of the last request: a new connection begins with none.
    pub fn reconnect(&mut self) {
        self.last = None;
    }
}
