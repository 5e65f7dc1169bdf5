//! Guest memory through lanes into a file, byte for byte.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use io::{Cancel, Counters, Draft, DraftOptions, LaneSettings, Scratch, Supply, WriteLanes};
use page::{Mask, PageCount, PageIndex, PageRange, PageSet};
use vmstate_mem::GuestRam;

use crate::process::{Memfd, Memory, Process, block};
use crate::{MIB, PAGE, TOUCHED};

/// Writes region 0 into a file whose page 0 is at `pages_offset`; gives the file and the pages of data.
pub fn save(process: &Process, memory: Memory, pages_offset: u64) -> (Vec<u8>, PageSet) {
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("a block");
    let ram = Arc::new(ram);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("vm.img");
    let mut draft =
        Draft::create(&path, DraftOptions { sync: false, ..DraftOptions::default() }).expect("a draft");
    draft.set_len(pages_offset + memory.length).expect("a length");
    let settings = LaneSettings { lanes: 2, align: draft.direct_io().alignment() };
    let counters = Arc::new(Counters::default());
    let cancel = Cancel::new().expect("eventfd");
    let target = draft.lane_target().expect("two descriptors");
    let lanes = WriteLanes::start(target, ram.clone(), settings, counters.clone(), cancel).expect("threads");
    for window in ram.windows(0).expect("presence") {
        lanes.deal(ram.piece(0, &window.expect("a window"), pages_offset)).expect("room");
    }
    lanes.finish().expect("nothing fails");
    ram.recheck().expect("nothing has changed");
    draft.publish().expect("a free name");
    let data = ram.data_pages(0);
    let data_bytes: u64 =
        data.runs().map(|run| (run.end.0 * PAGE).min(memory.length) - run.start.0 * PAGE).sum();
    assert_eq!(counters.read().bytes_written, data_bytes, "what was written is what counts as data");
    (std::fs::read(&path).expect("the file"), data)
}

/// What the block holds after [`fill`].
pub fn model(memory: Memory, fills: &[(u64, u64, u8)]) -> Vec<u8> {
    let mut bytes = vec![0; memory.length as usize];
    for &(from, to, byte) in fills {
        bytes[from as usize..to as usize].fill(byte);
    }
    bytes
}

pub fn fill(process: &mut Process, memory: Memory, fills: &[(u64, u64, u8)]) {
    for &(from, to, byte) in fills {
        process.fill(memory, from, to, byte);
    }
}

/// The pages that must count as data, and those that may: gaps shorter than 96 KiB within a window.
fn must_and_may(bytes: &[u8]) -> (PageSet, PageSet) {
    let pages = (bytes.len() as u64).div_ceil(PAGE);
    let mut must = PageSet::new(PageCount(pages));
    for (i, page) in bytes.chunks(PAGE as usize).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            must.insert(PageRange::new(i as u64, i as u64 + 1));
        }
    }
    let mut may = must.clone();
    let runs: Vec<PageRange> = must.runs().collect();
    for pair in runs.windows(2) {
        let (gap_start, gap_end) = (pair[0].end.0, pair[1].start.0);
        if gap_end - gap_start < 24 && (gap_start - 1) / 256 == gap_end / 256 {
            may.insert(PageRange::new(gap_start, gap_end));
        }
    }
    (must, may)
}

/// Data, zeros that were written, crumbs, and bytes at both ends of pages.
pub fn fills(length: u64) -> Vec<(u64, u64, u8)> {
    let mut fills: Vec<(u64, u64, u8)> = TOUCHED
        .iter()
        .enumerate()
        .filter(|(_, (_, end))| end * PAGE <= length)
        .map(|(i, &(start, end))| (start * PAGE, end * PAGE, i as u8 + 1))
        .collect();
    // Present pages of zeros: alone, and amid data where they are bridged.
    fills.extend([(600 * PAGE, 640 * PAGE, 0), (2100 * PAGE, 2110 * PAGE, 0), (3000 * PAGE, 3100 * PAGE, 0)]);
    // Crumbs with holes between them: near enough to be joined, and not.
    for page in [700, 703, 710, 725, 742, 767] {
        fills.push((page * PAGE + 4095, page * PAGE + 4096, 0x55));
    }
    fills.push((length - 1, length, 0x77));
    fills
}

pub fn check_saved(saved: &(Vec<u8>, PageSet), model: &[u8], pages_offset: u64, name: &str) {
    let (file, data) = saved;
    assert!(file[pages_offset as usize..] == *model, "{name}: the file differs from the memory");
    assert!(file[..pages_offset as usize].iter().all(|byte| *byte == 0));
    let (must, may) = must_and_may(model);
    for page in 0..must.capacity().0 {
        let index = PageIndex(page);
        assert!(!must.contains(index) || data.contains(index), "{name}: page {page:#x} is not data");
        assert!(!data.contains(index) || may.contains(index), "{name}: page {page:#x} is data");
    }
}

#[test]
fn private_memory_arrives_whole_with_an_odd_tail_at_any_offset() {
    for (length, pages_offset) in [(64 * MIB, MIB), (32 * MIB - 1000, MIB), (32 * MIB + 1, 0x1200)] {
        let mut process = Process::start();
        let memory = Memory { length, ..process.anonymous(length.next_multiple_of(PAGE)) };
        let fills = fills(length);
        fill(&mut process, memory, &fills);
        let saved = save(&process, memory, pages_offset);
        check_saved(&saved, &model(memory, &fills), pages_offset, &format!("{length:#x}"));
        // Copied memory has every short gap joined.
        let (_, may) = must_and_may(&model(memory, &fills));
        assert!(saved.1 == may, "{length:#x}: the data pages are not the joined ones");
    }
}

#[test]
fn a_memfd_arrives_whole_and_its_holes_stay_holes() {
    for sealed in [true, false] {
        for (length, pages_offset) in [(64 * MIB, MIB), (32 * MIB - 1000, MIB), (32 * MIB + 1, 0x1200)] {
            let mut process = Process::start();
            let memfd = process.memfd(length.next_multiple_of(PAGE), sealed);
            let memory = Memory { length, ..memfd.memory };
            let fills = fills(length);
            fill(&mut process, memory, &fills);
            let before = blocks(&process, memfd);
            let saved = save(&process, memory, pages_offset);
            assert_eq!(blocks(&process, memfd), before, "a hole was allocated: sealed {sealed}");
            let name = format!("{length:#x}, sealed {sealed}");
            check_saved(&saved, &model(memory, &fills), pages_offset, &name);
        }
    }
}

#[test]
fn untouched_memory_is_saved_by_writing_nothing() {
    let mut process = Process::start();
    let memfd = process.memfd(256 * MIB, true);
    let anonymous = process.anonymous(256 * MIB);
    for memory in [memfd.memory, anonymous] {
        let (file, data) = save(&process, memory, 0);
        assert!(file.iter().all(|byte| *byte == 0));
        assert_eq!(data.count(), PageCount(0));
    }
    assert_eq!(blocks(&process, memfd), 0);
}

/// Supplies the one window of a block of 1 MiB out of a scratch full of ones; gives the pages to write and
/// their bytes.
fn supply_once(process: &Process, memory: Memory) -> (Mask, Vec<u8>) {
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("a block");
    let window = ram.windows(0).expect("presence").next().expect("a window").expect("a window");
    let mut scratch = Scratch::new(MIB as usize).expect("a slab");
    // SAFETY: the scratch is this test's own and holds a piece.
    unsafe { scratch.as_mut_ptr().write_bytes(0xff, MIB as usize) };
    let supplied = ram.supply(&ram.piece(0, &window, 0), &mut scratch).expect("the window");
    let write = Mask(supplied.write);
    let mut bytes = Vec::new();
    for (start, end) in write.runs() {
        for i in start * PAGE as usize..end * PAGE as usize {
            // SAFETY: a byte of a page that was supplied; the scratch and the memory are still there.
            bytes.push(unsafe { supplied.base.wrapping_add(i).read_volatile() });
        }
    }
    assert_eq!(ram.data_pages(0).words(), write.0);
    (write, bytes)
}

fn pages(ranges: &[(usize, usize)]) -> Mask {
    ranges.iter().fold(Mask::EMPTY, |all, &(start, end)| all.or(Mask::range(start, end)))
}

#[test]
fn crumbs_are_joined_by_zeros_whatever_the_scratch_held() {
    let mut process = Process::start();
    let memories =
        [process.anonymous(MIB), process.memfd(MIB, true).memory, process.memfd(MIB, false).memory];
    for memory in memories {
        for (from, to, byte) in [(3, 4, 1), (7, 8, 2), (9, 12, 0), (40, 41, 3)] {
            process.fill(memory, from * PAGE, to * PAGE, byte);
        }
        let (write, bytes) = supply_once(&process, memory);
        // Pages 4 to 6 were never touched; 9 to 12 are there and zero; 40 is too far away to be joined.
        assert_eq!(write, pages(&[(3, 8), (40, 41)]));
        let expected: Vec<u8> = [1, 0, 0, 0, 2, 3].iter().flat_map(|byte| [*byte; PAGE as usize]).collect();
        assert!(bytes == expected, "the gap between the crumbs is not zero");
    }
}

#[test]
fn large_runs_of_a_memfd_are_joined_by_zeros_and_its_holes_stay() {
    let mut process = Process::start();
    let memory = process.memfd(MIB, true).memory;
    process.fill(memory, 0, 32 * PAGE, 1);
    process.fill(memory, 34 * PAGE, 60 * PAGE, 2);
    let (write, _) = supply_once(&process, memory);
    // The hole of two pages between them is written as zeros, and not touched in the memfd: see the test of
    // whole saves, which counts its blocks.
    assert_eq!(write, pages(&[(0, 60)]));
}

#[test]
fn zeros_that_are_there_join_runs() {
    let mut process = Process::start();
    let memory = process.memfd(MIB, true).memory;
    process.fill(memory, 0, 40 * PAGE, 1);
    process.fill(memory, 20 * PAGE, 23 * PAGE, 0);
    let (write, _) = supply_once(&process, memory);
    assert_eq!(write, pages(&[(0, 40)]));
}

/// How many blocks of 512 bytes the memfd takes.
fn blocks(process: &Process, memfd: Memfd) -> u64 {
    let path = format!("/proc/{}/fd/{}", process.pid(), memfd.number);
    let found = std::fs::metadata(Path::new(&path)).expect("the child's memfd");
    assert_eq!(found.ino(), memfd.inode);
    found.blocks()
}
