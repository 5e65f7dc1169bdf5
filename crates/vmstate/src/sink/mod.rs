//! Where guests go: images of every format, planned before a byte is written.

mod create;
mod devices;
mod flow;
mod libvirt;
mod mapped_ram;
mod mapped_ram_image;
mod records;
mod stream;
mod stream_image;

pub use create::create_sink;
pub use devices::DeviceState;
pub use flow::{ByteSink, Means, Sink, byte_sink};
pub use libvirt::{Domain, LibvirtSink};
pub(crate) use libvirt::{Envelope, payload_sink, require_codec};
pub use mapped_ram::{MappedRamComposition, bitmap_pieces};
pub use mapped_ram_image::MappedRamSink;
pub use records::PagesSent;
pub use stream::StreamComposition;
pub use stream_image::StreamSink;
