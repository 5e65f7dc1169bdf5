//! Two images of one paused guest, compared section by section and page by page.

use std::path::Path;

use vmstate::source::MappedRamFile;

/// How much of a block is compared at once.
const CHUNK: usize = 1 << 20;

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

/// Compares what two mapped-ram images mean, not how they are laid out: a page that is absent equals one
/// of zeroes.
///
/// # Panics
/// When an image cannot be read.
pub fn compare_images(one: &Path, other: &Path) -> Vec<Difference> {
    let open = |path| MappedRamFile::open(path).unwrap_or_else(|error| panic!("{}", error.chain()));
    let (one, other) = (open(one), open(other));
    let mut differences = Vec::new();
    if one.layout().preamble != other.layout().preamble {
        differences.push(Difference::Shape("preamble".to_owned()));
    }
    let list = |image: &MappedRamFile| -> Vec<_> {
        let blocks = image.layout().blocks.iter();
        blocks.map(|block| (block.name.as_str().to_owned(), block.used_length, block.page_size)).collect()
    };
    if list(&one) != list(&other) {
        differences.push(Difference::Shape(format!("blocks: {:?} and {:?}", list(&one), list(&other))));
        return differences;
    }
    compare_sections(&one, &other, &mut differences);
    for (left, right) in one.layout().blocks.iter().zip(&other.layout().blocks) {
        let pages = (one.pages(left).expect("a bitmap"), other.pages(right).expect("a bitmap"));
        let (mut a, mut b) = (vec![0; CHUNK], vec![0; CHUNK]);
        for at in (0..left.used_length).step_by(CHUNK) {
            let len = (left.used_length - at).min(CHUNK as u64) as usize;
            one.read_ram(left, &pages.0, at, &mut a[..len]).expect("pages");
            other.read_ram(right, &pages.1, at, &mut b[..len]).expect("pages");
            if let Some(byte) = (0..len).find(|&i| a[i] != b[i]) {
                let page = (at + byte as u64) / left.page_size.bytes();
                differences.push(Difference::Pages(left.name.as_str().to_owned(), page));
                break;
            }
        }
    }
    differences
}

fn compare_sections(one: &MappedRamFile, other: &MappedRamFile, differences: &mut Vec<Difference>) {
    let sections = |image: &MappedRamFile| {
        let devices = image.devices().unwrap_or_else(|error| panic!("{}", error.chain()));
        let name = |s: &wire::qemu::DeviceSection| (s.idstr.as_str().to_owned(), s.instance_id, s.version_id);
        let named: Vec<_> = devices.sections.iter().map(|s| (name(s), s.section_id, s.payload)).collect();
        named
    };
    let (left, right) = (sections(one), sections(other));
    let heads = |list: &[((String, u32, u32), u32, wire::FileRange)]| -> Vec<_> {
        list.iter().map(|(name, id, _)| (name.clone(), *id)).collect()
    };
    if heads(&left) != heads(&right) {
        differences.push(Difference::Shape(format!("sections: {:?} and {:?}", heads(&left), heads(&right))));
        return;
    }
    for (((name, instance, _), _, a), (_, _, b)) in left.iter().zip(&right) {
        if one.read(*a).expect("a section") != other.read(*b).expect("a section") {
            differences.push(Difference::Section(name.clone(), *instance));
        }
    }
}
