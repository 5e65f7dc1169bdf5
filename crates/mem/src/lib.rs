//! Where guest memory lives: peer processes, presence, zero scan.
//!
//! A [`Peer`] is the process of a VMM, held so that it cannot be mistaken for another. [`GuestRam`] reaches
//! the memory of its RAM blocks from outside: it says which pages are there without touching any, and
//! supplies their bytes to the lanes of the crate `io`.
//!
//! Law: no `&[u8]` is ever made over guest memory. The guest may write it at any time, so it is read through
//! raw pointers, by vector loads or by the kernel.

mod attach;
mod guest_ram;
mod kind;
mod maps;
mod peer;
mod presence;
mod remote;
mod shared;
mod spawn;
mod supply;
mod windows;
mod zero;

pub use attach::{AttachError, AttachReason, BlockAddress};
pub use guest_ram::{GuestRam, RecheckError};
pub use kind::{Backing, classify};
pub use maps::{Gap, Mapping, Mappings};
pub use peer::{Holders, Peer, PeerError, find_holders};
pub use presence::PagemapMethod;
pub use spawn::{Output, Program};
pub use zero::{ZeroScan, nonzero_mask};
