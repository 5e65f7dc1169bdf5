//! The image that the `mapped-ram` capability makes of a stream: every page has a place of its own.
//!
//! The stream is QEMU's, with two differences. Each entry of the block list is followed by a header that
//! says where in the file the block's bitmap and pages are, and the stream goes on behind the pages; and
//! no page is ever in a PART or END. A set bit means that the page is in the file; a clear one, that it
//! is zero, whatever the file holds there.

mod bitmap;
mod decode;
pub mod dump;
mod encode;
pub mod format;
mod layout;
pub mod survey;

pub use bitmap::{BitmapScanner, decode_bitmap, encode_bitmap};
pub use decode::{LayoutDecoder, Step};
pub use encode::{ImagePlan, PlannedBlock, Sections, encode_ram_end, encode_tail};
pub use format::Header;
pub use layout::{BlockPlacement, Layout};
