//! A running QEMU as vmstate meets it: a session over QMP that owes back whatever it changes.

mod addresses;
mod blocks;
mod described;
mod device_state;
mod facts;
mod launch;
mod leftovers;
mod map_arguments;
mod note;
mod probe;
mod process;
mod session;
mod standstill;

pub use addresses::with_addresses;
pub use blocks::{HostBlock, host_blocks};
pub use described::{described_state, require_ignorable};
pub use device_state::device_state;
pub use facts::{AskedFacts, ask_guest_facts, guest_facts, stat_disks};
pub(crate) use launch::lock_hint;
pub use launch::{LaunchSettings, Launched, launch};
pub use leftovers::{Cleared, Leftovers};
pub use map_arguments::{ImageBlock, MapArguments, is_too_old_to_map, map_arguments};
pub use probe::{EarlySection, Probe, ProbeSocket, Probed, probe};
pub use process::find_process;
pub use session::Session;
pub(crate) use session::refuse_migration;
pub use standstill::Standstill;
