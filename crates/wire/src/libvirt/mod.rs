//! What libvirt puts in front of a guest that it saves: a header, the domain's XML, a cookie, padding.
//!
//! Behind it stands QEMU's stream, as it is, compressed as a whole, or as a mapped-ram image whose offsets
//! count from the start of the file. The header says which; everything else about the guest's state is
//! QEMU's. Source: libvirt 11.3 `src/qemu/qemu_saveimage.h`; the same struct as in 9.0, where what is
//! `format` now was called `compressed`.

mod decode;
pub mod dump;
mod encode;
pub mod format;
mod head;
pub mod survey;

pub use format::{ByteOrder, PayloadFormat};
pub use head::Head;
