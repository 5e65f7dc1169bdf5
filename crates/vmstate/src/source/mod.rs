//! Where guests come from: images of every format, each answering with ranges and facts.

mod extents;
mod format;
mod mapped_ram;
mod stream;

pub use extents::FileExtents;
pub use format::Format;
pub use mapped_ram::{BlockUse, MappedRamFile, Use};
pub use stream::{StreamBlock, StreamContents, read_stream, scan_stream};

pub(crate) use mapped_ram::faulty;
