//! Two images of one paused guest, compared section by section and page by page.

use std::path::Path;

use vmstate::{Cancel, compare_files};

/// Something in which two images differ.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// The configuration, or the list of blocks, or of device sections.
    Shape(String),
    /// The payload of a device section, by name and instance.
    Section(String, u32),
    /// Pages of a block: name and the first page that differs.
    Pages(String, u64),
}

/// Compares what two images mean, whatever their formats: a page that is absent equals one of zeroes.
///
/// # Panics
/// When an image cannot be read.
pub fn compare_images(one: &Path, other: &Path) -> Vec<Difference> {
    let cancel = Cancel::new().expect("an eventfd");
    let found = compare_files(one, other, &cancel).unwrap_or_else(|error| panic!("{}", error.chain()));
    let machine = found.machine.iter().map(|difference| Difference::Shape(format!("{difference:?}")));
    let sections = found.sections.iter().map(|section| match (section.versions, section.bytes) {
        ([Some(one), Some(other)], _) if one == other => {
            Difference::Section(section.name.clone(), section.instance_id)
        }
        _ => Difference::Shape(format!("{section:?}")),
    });
    let blocks = found.blocks.iter().map(|block| match (block.bytes, block.first) {
        ([Some(_), Some(_)], Some(first)) => Difference::Pages(block.name.clone(), first / block.page_size),
        _ => Difference::Shape(format!("{block:?}")),
    });
    machine.chain(sections).chain(blocks).collect()
}
