//! Readings and writings of formats whose instructions `cargo xtask callgrind` counts. Without an argument it lists
//! them; with the name of one it does that once.
#![expect(clippy::print_stdout, reason = "a program for another program")]

#[path = "../tests/golden/mod.rs"]
mod golden;

use std::hint::black_box;

use page::{PageCount, PageRange, PageSet, PageSize};
use wire::mapped_ram::{BitmapScanner, decode_bitmap, encode_bitmap};
use wire::qemu::{BlockEntry, BlockListVariant, RamSetup, StreamScanner};
use wire::qemu::{decode_ram_setup, decode_xen_device_state};
use wire::{Fault, IdStr, mapped_ram::format::bitmap_len};

/// The pages of 64 GiB, one in a hundred of which is there: no two side by side, the worst that bits can be.
const PAGES: PageCount = PageCount(16 << 20);
const ONE_IN: u64 = 100;
/// As many blocks as a machine with memory in every slot has.
const BLOCKS: u64 = 256;

/// What is counted begins and ends here: callgrind is told this name.
#[inline(never)]
fn measured<T>(work: impl FnOnce() -> T) -> T {
    black_box(work())
}

fn sparse_set() -> PageSet {
    let mut set = PageSet::new(PAGES);
    (0..PAGES.0).step_by(ONE_IN as usize).for_each(|page| set.insert(PageRange::new(page, page + 1)));
    set
}

fn bitmap() -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_bitmap(&sparse_set(), &mut bytes);
    bytes
}

fn bitmap_encode() {
    let set = sparse_set();
    let mut bytes = Vec::with_capacity(bitmap_len(PAGES.0) as usize);
    measured(|| encode_bitmap(&set, &mut bytes));
}

fn bitmap_decode() {
    let bytes = bitmap();
    let set = measured(|| decode_bitmap(&bytes, 0, PAGES)).expect("a bitmap of ours");
    assert_eq!(set.count().0, PAGES.0.div_ceil(ONE_IN));
}

fn bitmap_scan() {
    let bytes = bitmap();
    let runs = measured(|| {
        let mut runs = 0u64;
        let mut scanner = BitmapScanner::new(0, PAGES);
        scanner.push(&bytes, |_| runs += 1)?;
        scanner.finish(|_| runs += 1).map(|()| runs)
    });
    assert_eq!(runs.expect("a bitmap of ours"), PAGES.0.div_ceil(ONE_IN));
}

fn block_list_decode() {
    let block = |i: u64| BlockEntry {
        name: IdStr::new(&format!("/objects/memory{i}")).expect("a short name"),
        used_length: (i + 1) << 30,
        page_size: None,
        address: None,
    };
    let setup = RamSetup { blocks: (0..BLOCKS).map(block).collect(), multifd_flush: true };
    let mut bytes = Vec::new();
    setup.encode(&mut bytes);
    let read = measured(|| decode_ram_setup(&bytes, 0, BlockListVariant::Plain)).expect("a list of ours");
    assert_eq!(read, (setup, bytes.len()));
}

fn layout_decode() {
    let file = golden::load("q35-10.0-mapped-ram");
    measured(|| golden::layout(&file, 0)).expect("an image of QEMU's");
}

fn stream_scan() {
    let file = golden::load("q35-10.0-stream");
    let records = measured(|| {
        let mut records = 0u64;
        let mut scanner = StreamScanner::new(0, PageSize::X86);
        for piece in file.chunks(1 << 20) {
            scanner.feed::<Fault>(piece, |_| {
                records += 1;
                Ok(())
            })?;
        }
        scanner.finish().map(|()| records)
    });
    assert!(records.expect("a stream of QEMU's") > 100);
}

fn device_split() {
    let blob = golden::load("q35-10.0-xen");
    let state = measured(|| decode_xen_device_state(&blob, 0)).expect("device state of QEMU's");
    assert!(state.sections.len() > 10);
}

const COUNTED: [(&str, fn()); 7] = [
    ("block-list-decode", block_list_decode),
    ("bitmap-encode", bitmap_encode),
    ("bitmap-decode", bitmap_decode),
    ("bitmap-scan", bitmap_scan),
    ("layout-decode", layout_decode),
    ("stream-scan", stream_scan),
    ("device-split", device_split),
];

fn main() {
    match std::env::args().nth(1) {
        None => COUNTED.iter().for_each(|(name, _)| println!("{name}")),
        Some(wanted) => {
            let found = COUNTED.iter().find(|(name, _)| *name == wanted);
            found.unwrap_or_else(|| panic!("nothing is called {wanted}")).1();
        }
    }
}
