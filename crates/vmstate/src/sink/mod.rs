//! Where guests go: images of every format, planned before a byte is written.

mod devices;
mod mapped_ram;
mod stream;

pub use mapped_ram::{MappedRamComposition, bitmap_pieces};
pub use stream::{PagesSent, StreamComposition};
