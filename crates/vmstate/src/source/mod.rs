//! Where guests come from: images of every format, each answering with ranges and facts.

mod bounds;
mod extents;
mod format;
mod image;
mod mapped_ram;
mod stream;
mod stream_file;

pub use bounds::{Bounds, open_image};
pub use extents::FileExtents;
pub(crate) use extents::unreadable;
pub use format::Format;
pub use image::Image;
pub use mapped_ram::{BlockUse, MappedRamFile, Use};
pub use stream::{StreamBlock, StreamContents, scan_stream};
pub use stream_file::StreamFile;
