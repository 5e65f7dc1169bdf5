//! Addresses and sockets.

mod address;

pub use address::QmpAddress;
