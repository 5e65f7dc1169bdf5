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
pub use blocks::{AskedBlocks, HostBlock, ask_host_blocks, host_blocks};
pub use described::{described_state, require_ignorable};
pub use device_state::{DeviceStateFile, LentDeviceStateFile, device_state};
pub use facts::{AskedFacts, ask_guest_facts, guest_facts, stat_disks};
pub(crate) use launch::lock_hint;
pub use launch::{LaunchSettings, Launched, launch};
pub use leftovers::{Cleared, Leftovers};
pub use map_arguments::{ImageBlock, MapArguments, is_too_old_to_map, map_arguments};
pub use probe::{Cancelling, EarlySection, Probe, Probed, Probing};
pub use process::find_process;
pub use session::Session;
pub use standstill::Standstill;
