//! A QMP client: one connection, typed commands, events kept in order, descriptors passed along.

mod client;
mod commands;

pub(crate) use client::CLOSED_HINT;
pub use client::{Begun, Called, Client, Event, GREETING_TIMEOUT, Moves};
pub use commands::{Capability, MigratedRam, MigrationInfo, RunStatus, Version};
