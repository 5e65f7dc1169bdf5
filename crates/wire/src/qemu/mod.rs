//! QEMU's migration stream: the bytes that `migrate` writes and that an incoming QEMU reads.
//!
//! A stream is a preamble, then items: sections in four kinds, commands, an end mark, and a description
//! of the device state in JSON. Most sections carry no length, so a stranger can walk a stream only as
//! far as it knows the payloads. This module knows that of RAM, and lifts the device state whole.

mod decode;
pub mod devices;
pub mod dump;
pub(crate) mod early;
mod encode;
pub mod fields;
pub mod format;
pub mod global_state;
mod item;
mod preamble;
mod ram;
mod records;
mod scan;
pub mod survey;
pub mod vmdesc;

pub use decode::{decode_item, decode_preamble, decode_ram_setup};
pub use devices::{DeviceSection, DeviceState, Witness, decode_xen_device_state, split_sections};
pub use early::{check_early, early_payload_len};
pub use item::{Command, DiscardRange, Item, PostcopyAdvise, SectionHeader, SectionKind};
pub use preamble::{Configuration, Preamble};
pub use ram::{BlockEntry, BlockListVariant, RamSetup};
pub use records::RecordEncoder;
pub use scan::{Event, ScanStep, StreamScanner};

pub(crate) use decode::{decode_block_entry, decode_total};
pub(crate) use ram::BlockListBuilder;
pub(crate) use scan::refused_record;
