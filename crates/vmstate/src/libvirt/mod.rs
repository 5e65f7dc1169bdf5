//! Domains of a libvirt on this host: its daemon is spoken to directly, in its own protocol.
//!
//! Neither `virsh` nor libvirt's C library is needed, so that one binary does on every host; what is said are the
//! dozen calls of [`wire::libvirt_rpc`], which every daemon has answered alike for years. Only daemons of this host
//! are of use, since a guest's memory is read where it is: through a unix socket, that is.
//!
//! A domain's monitor belongs to libvirt. [`open_monitor`] gives it the looks of one of our own: commands go through
//! libvirt, those that libvirt has to know of (`stop`, `cont`, `quit`) as what libvirt calls them, so that it is at no
//! time mistaken about the domain.

mod connection;
mod domain;
mod lines;
mod monitor;
mod place;
mod uri;

pub use connection::{Connection, GivingUp};
pub(crate) use domain::name_of;
pub use domain::{DomainName, SavedText};
pub use monitor::{LOST, open_monitor};
pub use uri::LibvirtUri;
pub use wire::libvirt::PayloadFormat;
