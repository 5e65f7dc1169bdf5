//! What the tests that need real QEMUs share: stock QEMU on its own, and images compared with each other.

mod compare;
pub mod faulty;
mod footprint;
mod golden;
mod hook;
mod huge_mount;
mod launched;
mod libvirtd;
mod proxy;
mod stock;

use std::path::Path;
use std::time::Duration;

use lab::{Guest, Pattern, RamLayout};
use page::PageSet;
use vmstate::source::MappedRamFile;

pub use compare::{Difference, compare_images};
pub use footprint::Footprint;
pub use golden::{unpack_golden, unpack_wire_golden};
pub use hook::Hook;
pub use huge_mount::HugeMount;
pub use launched::Launched;
pub use libvirtd::{Domain, DomainSpec, Libvirtd};
pub use proxy::Proxy;
pub use stock::{StockLoad, client, stock_load, stock_migrate, stock_save};

/// Generous: a wait ends as soon as what it waits for has come.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Verifies the memory of the built-in guest in an image, page by page.
///
/// # Panics
/// When the image cannot be read, or its memory is not as the guest left it.
pub fn verify_image(guest: &Guest, layout: &RamLayout, image: &Path) -> Pattern {
    let image = MappedRamFile::open(image).unwrap_or_else(|error| panic!("{}", error.chain()));
    let block = image.layout().blocks.iter().find(|block| block.name == "pc.ram");
    let block = block.expect("the image has a `pc.ram`");
    let pages: PageSet = image.pages(block).unwrap_or_else(|error| panic!("{}", error.chain()));
    lab::verify(guest, layout, |offset, bytes| image.read_ram(block, &pages, offset, bytes))
        .unwrap_or_else(|error| panic!("{}: {error}", image.path().display()))
}
