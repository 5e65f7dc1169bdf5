//! What the bytes of QEMU's and libvirt's saved guests mean; no I/O.
//!
//! Every format answers with facts and ranges; whoever holds the file or the socket moves the bytes.
//! Nothing here opens, reads, or allocates by a number that was not checked against a named limit, and
//! no input makes it panic.
//!
//! Each format folder has the same rooms: `format` (constants, offsets, limits), `decode` (stops at the
//! first lie), `encode`, `survey` (lists every lie), `dump` (the metadata as text).
//!
//! - [`qemu`]: the migration stream: preamble, sections, commands, RAM records, device state,
//!   vmdescription.
//! - [`mapped_ram`]: the random-access image that the `mapped-ram` capability makes of that stream.
//! - [`libvirt`]: what libvirt puts in front of either: header, domain XML, cookie.
//! - [`libvirt_rpc`]: the conversation with libvirt's daemon about a domain.
//! - [`postcopy`]: the conversation with a target that runs before its memory has arrived.

// Bytes are hostile: outside of tests nothing is indexed or unwrapped, but where a reason says why it holds.
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::panic, clippy::unreachable)
)]

pub mod cursor;
pub mod dump;
pub mod error;
pub mod findings;
#[doc(hidden)]
pub mod fuzz;
mod idstr;
pub mod libvirt;
pub mod libvirt_rpc;
pub mod mapped_ram;
pub mod postcopy;
pub mod qemu;
mod range;

pub use error::{DecodeError, Fault, FaultKind};
pub use findings::{Findings, Report};
pub use idstr::IdStr;
pub use range::FileRange;
