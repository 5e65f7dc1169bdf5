//! The built-in guest, a driver that starts real QEMUs, and the Linux guest that is the second witness; the demo,
//! the benchmark and the tests of the other crates stand on it.
//!
//! - [`Guest`] is a boot image of ours whose memory is a known pattern and whose serial console counts.
//! - [`RamLayout`] says where a machine puts its RAM; [`verify`] judges the pattern, page by page.
//! - [`QemuSpec`] describes a QEMU, [`Qemu`] is one that runs, [`Serial`] follows its console.
//! - [`LinuxGuest`] is a kernel and an initramfs that keep printing the digest of a file in RAM.
//!
//! - [`mod@demo`] shows the main job on the built-in guest, [`mod@bench`] measures it.
//!
//! But for these two, nothing here issues a QMP command: that is the caller's business.

mod assets;
pub mod bench;
pub mod demo;
mod error;
mod guest;
mod layout;
mod linux;
mod pattern;
mod process;
mod qemu;
mod serial;

pub use assets::assets_dir;
pub use error::{Error, Result};
pub use guest::{Guest, GuestSettings, SCATTERED};
pub use layout::{GuestRange, MachineKind, RamLayout};
pub use linux::{Count, LinuxGuest, LinuxSettings};
pub use pattern::{Fault, Pattern, VerifyError, check_page, verify};
pub use qemu::{Incoming, MemoryBackend, Qemu, QemuSpec};
pub use serial::{Mark, Serial};
