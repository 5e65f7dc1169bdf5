//! Where guests come from: images of every format, each answering with ranges and facts.

mod bounds;
mod ends;
mod extents;
mod flow;
mod format;
#[doc(hidden)]
pub mod fuzz;
mod image;
mod libvirt;
mod libvirt_source;
mod mapped_ram;
mod mapped_ram_pages;
mod open;
mod places;
mod spill;
mod stream;
mod stream_bytes;
mod stream_file;
mod stream_index;
mod stream_pages;

pub use bounds::{Bounds, open_image};
pub use extents::FileExtents;
pub(crate) use extents::unreadable;
pub use flow::{
    FlowingPage, FlowingPages, GuestShape, Input, InputBytes, KnownWindow, LiftedSection, Pages, PlacedPages,
    Source, Tail,
};
pub use format::Format;
pub use image::Image;
pub use libvirt::{DomainInfo, Payload};
pub(crate) use libvirt::{decompress, decompress_once, require_domain_xml};
pub use libvirt_source::LibvirtSource;
pub use mapped_ram::{BlockUse, MappedRamFile, Use};
pub use mapped_ram_pages::MappedRamSource;
pub use open::{OpenedPlaced, open_placed, open_source, readable_again};
pub use places::{Place, Places, Stored};
pub(crate) use spill::decompressed;
pub use stream::{StreamBlock, StreamContents, scan_stream};
pub use stream_bytes::Rest;
pub use stream_file::StreamFile;
pub use stream_index::StreamIndex;
pub use stream_pages::{Origin, StreamSource};
