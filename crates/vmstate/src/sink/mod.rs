//! Where guests go: images of every format, planned before a byte is written.

mod mapped_ram;

pub use mapped_ram::{MappedRamComposition, bitmap_pieces};
