//! Guest memory in a real process: presence, supply, holes, and everything that can be wrong with it.

#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

mod fill;
mod huge;
mod kinds;
mod process;
mod save;
mod wrong;

use std::collections::BTreeSet;
use std::io;

use page::{PageCount, PageIndex, PageRange, PageSet};
use vmstate_mem::{Backing, FilePart, GuestRam, Medium, PagemapMethod, find_holders};

use process::{Memory, Process, block};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// Pages of a 64 MiB block: its ends, both sides of windows and of words, a run over many windows, one alone.
const TOUCHED: [(u64, u64); 7] =
    [(0, 1), (63, 66), (255, 257), (1000, 1001), (2048, 5000), (9999, 10_016), (16_383, 16_384)];

fn page_set(pages: u64, ranges: &[(u64, u64)]) -> PageSet {
    let mut set = PageSet::new(PageCount(pages));
    for &(start, end) in ranges {
        set.insert(PageRange::new(start, end));
    }
    set
}

fn touch(process: &mut Process, memory: Memory, ranges: &[(u64, u64)]) {
    for (i, &(start, end)) in ranges.iter().enumerate() {
        process.fill(memory, start * PAGE, end * PAGE, i as u8 + 1);
    }
}

fn presence(ram: &GuestRam, region: usize, method: PagemapMethod) -> io::Result<PageSet> {
    let block = ram.block(region);
    let mut set = PageSet::new(PageCount(block.length.div_ceil(block.page_size)));
    for window in ram.windows_by(region, method)? {
        let window = window?;
        assert!(!window.mask.is_empty(), "a window without pages at {}", window.first);
        set.insert_window(&window);
    }
    Ok(set)
}

/// The methods that this kernel has.
fn methods(ram: &GuestRam, region: usize) -> Vec<PagemapMethod> {
    match ram.windows_by(region, PagemapMethod::Scan).map(drop) {
        Ok(()) => vec![PagemapMethod::Auto, PagemapMethod::Scan, PagemapMethod::Entries],
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            println!("PAGEMAP_SCAN not tested here: {error}");
            vec![PagemapMethod::Auto, PagemapMethod::Entries]
        }
    }
}

#[test]
fn private_pages_are_present_where_they_were_touched() {
    let mut process = Process::start();
    let memory = process.anonymous(64 * MIB);
    touch(&mut process, memory, &TOUCHED);
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("private memory");
    assert_eq!(*ram.backing(0), Backing::PrivateAnonymous);
    for method in methods(&ram, 0) {
        let found = presence(&ram, 0, method).expect("pagemap");
        assert!(found == page_set(64 * MIB / PAGE, &TOUCHED), "{method:?}: {:?}", found.runs());
    }
    ram.recheck().expect("nothing has changed");
}

#[test]
fn a_walk_ends_with_the_switch_also_where_nothing_is_found() {
    let mut process = Process::start();
    let memory = process.anonymous(64 * MIB);
    let cancel = ::io::Cancel::new().expect("an eventfd");
    let mut ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("private memory");
    ram.heed(&cancel);
    for method in methods(&ram, 0) {
        presence(&ram, 0, method).expect("nobody has thrown the switch");
    }
    let methods = methods(&ram, 0);
    cancel.cancel();
    for method in methods {
        let error = presence(&ram, 0, method).expect_err("the switch is thrown");
        assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{method:?}");
    }
}

#[test]
fn more_scattered_pages_than_one_call_reports_are_all_found() {
    // Every other page of 128 MiB: 16384 runs, four times what one PAGEMAP_SCAN call gives back.
    let mut process = Process::start();
    let memory = process.anonymous(128 * MIB);
    let mut expected = PageSet::new(PageCount(128 * MIB / PAGE));
    for page in (1..128 * MIB / PAGE).step_by(2) {
        expected.insert(PageRange::new(page, page + 1));
        process.fill(memory, page * PAGE, page * PAGE + 1, 1);
    }
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("private memory");
    for method in methods(&ram, 0) {
        assert!(presence(&ram, 0, method).expect("pagemap") == expected, "{method:?}");
    }
}

#[test]
fn a_run_across_reads_of_pagemap_is_found_whole() {
    // The entries of 256 MiB are read at a time; this run has its middle at their end.
    let mut process = Process::start();
    let memory = process.anonymous(300 * MIB);
    let run = [(65_530, 65_550)];
    touch(&mut process, memory, &run);
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("private memory");
    for method in methods(&ram, 0) {
        assert!(
            presence(&ram, 0, method).expect("pagemap") == page_set(300 * MIB / PAGE, &run),
            "{method:?}"
        );
    }
}

#[test]
fn pages_that_were_only_read_are_left_out_by_the_scan() {
    let mut process = Process::start();
    let memory = process.anonymous(4 * MIB);
    process.tell(&format!("read {} {}", memory.address, MIB));
    process.fill(memory, 10 * PAGE, 11 * PAGE, 1);
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("private memory");
    let pages = 4 * MIB / PAGE;
    for method in methods(&ram, 0) {
        // Entries do not tell the zero page from others; the supply finds it to be zero.
        let expected = match method {
            PagemapMethod::Entries => page_set(pages, &[(0, 256)]),
            PagemapMethod::Auto | PagemapMethod::Scan => page_set(pages, &[(10, 11)]),
        };
        let found = presence(&ram, 0, method).expect("pagemap");
        let has_scan = methods(&ram, 0).contains(&PagemapMethod::Scan);
        assert!(found == expected || !has_scan, "{method:?}: {:?}", found.runs());
    }
}

#[test]
fn a_memfd_has_pages_where_they_were_touched() {
    for sealed in [false, true] {
        let mut process = Process::start();
        let memfd = process.memfd(64 * MIB, sealed);
        touch(&mut process, memfd.memory, &TOUCHED);
        let ram = GuestRam::attach(process.peer(), &[block("ram", memfd.memory)]).expect("a memfd");
        let (device, inode) = (memfd.device, memfd.inode);
        assert_eq!(*ram.backing(0), Backing::SharedFile(FilePart { device, inode, offset: 0 }));
        assert_eq!(ram.medium(0), Some(Medium::Shmem));
        let found = presence(&ram, 0, PagemapMethod::Auto).expect("SEEK_DATA");
        assert!(found == page_set(64 * MIB / PAGE, &TOUCHED), "sealed {sealed}: {:?}", found.runs());
        ram.recheck().expect("nothing has changed");
    }
}

#[test]
fn a_block_amid_a_memfd_has_its_own_part_of_it() {
    let mut process = Process::start();
    let memfd = process.memfd(16 * MIB, true);
    touch(&mut process, memfd.memory, &[(0, 10), (1020, 1030), (2040, 2060), (3000, 3001)]);
    let part = Memory { address: memfd.memory.address + 4 * MIB, length: 4 * MIB };
    let ram = GuestRam::attach(process.peer(), &[block("part", part)]).expect("a memfd");
    let found = presence(&ram, 0, PagemapMethod::Auto).expect("SEEK_DATA");
    let runs: Vec<PageRange> = found.runs().collect();
    assert_eq!(runs, [PageRange::new(0, 6), PageRange::new(1016, 1024)]);
}

#[test]
fn a_memfd_whose_descriptor_was_closed_is_found_by_its_mapping() {
    let mut process = Process::start();
    let memfd = process.memfd(MIB, true);
    process.fill(memfd.memory, 0, PAGE, 9);
    process.tell("close-files");
    if !rustix::process::geteuid().is_root() {
        println!("map_files not tested here: opening it needs root");
        return;
    }
    let ram = GuestRam::attach(process.peer(), &[block("ram", memfd.memory)]).expect("a memfd");
    let mut byte = [0];
    ram.read(0, PAGE - 1, &mut byte).expect("a byte");
    assert_eq!(byte, [9]);
}

#[test]
fn a_block_may_lie_in_several_mappings() {
    let mut process = Process::start();
    let memory = process.anonymous(4 * MIB);
    process.fill(memory, 0, 4 * MIB, 5);
    // A read-only page in the middle splits the mapping in three.
    process.tell(&format!("protect {} {PAGE} 1", memory.address + MIB));
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("private memory");
    assert_eq!(presence(&ram, 0, PagemapMethod::Auto).expect("pagemap").count(), PageCount(1024));
    // Splits that come later change nothing behind the block either.
    process.tell(&format!("protect {} {PAGE} 1", memory.address + 2 * MIB));
    ram.recheck().expect("the same memory");
}

#[test]
fn any_bytes_can_be_read_and_nothing_beyond() {
    let mut process = Process::start();
    let memory = process.anonymous(MIB);
    let memfd = process.memfd(MIB, true);
    let blocks = [block("private", memory), block("shared", memfd.memory)];
    for memory in [memory, memfd.memory] {
        process.fill(memory, 3 * PAGE, 4 * PAGE, 7);
    }
    let ram = GuestRam::attach(process.peer(), &blocks).expect("two blocks");
    assert_eq!(ram.regions(), 2);
    for (region, name) in [(0, "private"), (1, "shared")] {
        let mut bytes = [1; 6];
        ram.read(region, 3 * PAGE - 3, &mut bytes).expect("six bytes");
        assert_eq!(bytes, [0, 0, 0, 7, 7, 7], "{name}");
        for offset in [MIB - 5, MIB, u64::MAX] {
            let refused = ram.read(region, offset, &mut bytes).expect_err("beyond the block");
            assert_eq!(refused.to_string(), format!("0x6 bytes at {offset:#x} of block `{name}`"));
        }
    }
}

#[test]
fn the_holder_of_a_fresh_memfd_is_found_by_its_inode() {
    let mut process = Process::start();
    let memfd = process.memfd(PAGE, false);
    let peer = process.peer();
    assert!(peer.holds(memfd.device, memfd.inode).expect("its descriptors"));
    assert!(!peer.holds(memfd.device, u64::MAX).expect("its descriptors"));
    let holders = find_holders(memfd.device, memfd.inode).expect("/proc");
    assert_eq!(holders.pids, [process.pid()]);
}

#[test]
fn windows_come_in_order_and_are_aligned() {
    let mut process = Process::start();
    let memory = process.anonymous(64 * MIB);
    touch(&mut process, memory, &TOUCHED);
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("private memory");
    let firsts: Vec<PageIndex> =
        ram.windows(0).expect("pagemap").map(|window| window.expect("a window").first).collect();
    assert!(firsts.iter().all(|first| first.0 % page::WINDOW_PAGES == 0));
    let sorted: BTreeSet<PageIndex> = firsts.iter().copied().collect();
    assert_eq!(firsts, sorted.into_iter().collect::<Vec<_>>());
}
