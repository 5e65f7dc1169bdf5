//! Guest memory that is filled from outside: the pages of a file come to their places, and what is left beside them is
//! made zero.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use io::{
    Cancel, Counters, CountersReading, DirectChoice, EngineChoice, FileSupply, LaneError, LaneOptions,
    LaneSettings, LaneTarget, Piece, ReadPair, Supply, WriteLanes,
};
use page::{Mask, PageSet};
use vmstate_mem::{Fillable, GuestRam, Residue};

use crate::huge::{HUGE_PAGE, HugePool, free_huge_pages};
use crate::process::{Memory, Process, block};
use crate::{MIB, PAGE, page_set};

const LENGTH: u64 = 16 * MIB;
/// Pages that are another's: an image has them.
const TAKEN: [(u64, u64); 5] = [(0, 1), (100, 300), (511, 513), (2000, 3000), (4095, 4096)];

/// Both engines; one that is not to be had here is left out, aloud.
fn engines() -> Vec<EngineChoice> {
    let mut engines = vec![EngineChoice::Threads];
    match EngineChoice::IoUring.engine() {
        Ok(_) => engines.push(EngineChoice::IoUring),
        Err(error) => println!("NOT TESTED here: io_uring: {error}"),
    }
    engines
}

/// A shared block of the child's, and the path by which its file is open.
struct Shared {
    process: Process,
    memory: Memory,
    path: String,
}

impl Shared {
    fn new(kind: &str) -> Shared {
        let mut process = Process::start();
        let answer =
            process.tell(&format!("{kind} {LENGTH} {}", if kind == "memfd" { "0" } else { "shared" }));
        let address = answer[0].parse().expect("an address");
        let path = format!("/proc/{}/fd/{}", process.pid(), answer[1]);
        Shared { process, memory: Memory { address, length: LENGTH }, path }
    }

    fn attach(&self) -> (Arc<GuestRam>, Fillable) {
        let ram = GuestRam::attach(self.process.peer(), &[block("ram", self.memory)]).expect("shared memory");
        let fillable = ram.open_for_filling(0).expect("its file").expect("memory that can be filled");
        (Arc::new(ram), fillable)
    }

    /// How many bytes its file has.
    fn allocated(&self) -> u64 {
        std::fs::metadata(&self.path).expect("the file").blocks() * 512
    }
}

fn content(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0xff; LENGTH as usize];
    ram.read(0, 0, &mut bytes).expect("its bytes");
    bytes
}

fn run(
    target: LaneTarget,
    supply: Arc<dyn Supply>,
    engine: EngineChoice,
    pieces: &[Piece],
) -> (Result<(), LaneError>, CountersReading) {
    let counters = Arc::new(Counters::default());
    let settings = LaneSettings { lanes: 2, align: 4096 };
    let options = LaneOptions { engine, ..LaneOptions::default() };
    let cancel = Cancel::new().expect("an eventfd");
    let lanes = WriteLanes::start_with(target, supply, settings, options, counters.clone(), cancel);
    let lanes = lanes.expect("threads");
    let _ = pieces.iter().take_while(|piece| lanes.deal(**piece).is_ok()).count();
    (lanes.finish(), counters.read())
}

fn target_of(fillable: &Fillable) -> LaneTarget {
    fillable.lane_target().expect("what lanes write to")
}

fn is_in(pages: &PageSet, page: usize) -> bool {
    pages.contains(page::PageIndex(page as u64))
}

/// What is there beside the pages of a set, as pieces.
fn beside(ram: &GuestRam, taken: &PageSet, start: u64) -> Vec<Piece> {
    let pieces = ram.windows(0).expect("presence").map(|window| {
        let window = window.expect("a window");
        let there = taken.mask_at(window.first);
        let mask = Mask(std::array::from_fn(|word| window.mask.0[word] & !there.0[word]));
        ram.piece(0, &page::Window { mask, ..window }, start)
    });
    pieces.filter(|piece| piece.mask != [0; 4]).collect()
}

/// Checks that all that is there beside the taken pages becomes zero, and nothing else changes. `fills` are what is in the
/// memory, of which everything from `populated` on is there.
fn check_residue(kind: &str, fills: &[(u64, u64, u8)], engine: EngineChoice) {
    let mut shared = Shared::new(kind);
    for &(from, to, byte) in fills {
        shared.process.fill(shared.memory, from, to, byte);
    }
    let (ram, fillable) = shared.attach();
    let taken = page_set(LENGTH / PAGE, &TAKEN);
    let (before, allocated, free) = (content(&ram), shared.allocated(), free_huge_pages());
    let pieces = beside(&ram, &taken, fillable.offset);
    let (ended, counters) = run(target_of(&fillable), Arc::new(Residue::of(ram.clone())), engine, &pieces);
    ended.expect("nothing fails");
    let mut left = 0;
    for (page, (now, then)) in
        content(&ram).chunks(PAGE as usize).zip(before.chunks(PAGE as usize)).enumerate()
    {
        if is_in(&taken, page) {
            assert!(now == then, "{kind}, {engine:?}: page {page:#x} of the image has changed");
        } else {
            assert!(now.iter().all(|byte| *byte == 0), "{kind}, {engine:?}: page {page:#x} is not zero");
            left += u64::from(then.iter().any(|byte| *byte != 0)) * PAGE;
        }
    }
    assert!(left > 0, "{kind}: nothing was left, and so nothing is tried");
    // Zeros are not written over zeros, nothing is given back, and holes stay holes.
    assert_eq!(counters.bytes_written, left, "{kind}, {engine:?}");
    assert_eq!((shared.allocated(), free_huge_pages()), (allocated, free), "{kind}, {engine:?}");
}

#[test]
fn what_is_left_beside_an_image_is_made_zero_and_nothing_is_given_back() {
    // All of it is there, and most of it zero; then with holes between.
    let populated = [
        (0, LENGTH, 0),
        (0, 3 * PAGE, 1),
        (99 * PAGE + 4095, 100 * PAGE + 1, 2),
        (600 * PAGE + 17, 600 * PAGE + 18, 3),
        (LENGTH - 2 * PAGE, LENGTH, 4),
    ];
    let sparse = [
        (PAGE, 2 * PAGE, 1),
        (700 * PAGE, 900 * PAGE, 2),
        (LENGTH - 1, LENGTH, 3),
        (512 * PAGE, 514 * PAGE, 4),
    ];
    let pool = HugePool::reserve(16, "huge pages with something left on them");
    for engine in engines() {
        for kind in ["memfd", "huge-memfd"] {
            if kind == "memfd" || pool.is_some() {
                check_residue(kind, &populated, engine);
                check_residue(kind, &sparse, engine);
            }
        }
    }
}

/// A file on a disk with the bytes of a block, its start at some offset.
fn image(bytes: &[u8], start: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file on a disk");
    let mut out = file.as_file();
    out.set_len(start).expect("a length");
    std::io::Seek::seek(&mut out, std::io::SeekFrom::End(0)).expect("its end");
    out.write_all(bytes).expect("its bytes");
    file
}

/// The file as a supply, and whether it is read past the page cache.
fn supply(file: &tempfile::NamedTempFile, start: u64, direct: DirectChoice) -> (Arc<dyn Supply>, bool) {
    let pair = ReadPair::open(file.path(), direct).expect("it was made");
    let (is_direct, align) = (pair.direct.is_some(), pair.direct_io.alignment());
    (Arc::new(FileSupply::new(pair.direct, pair.buffered, align, vec![start])), is_direct)
}

fn pieces_of(ram: &GuestRam, pages: &PageSet, start: u64) -> Vec<Piece> {
    pages.windows().map(|window| ram.piece(0, &window, start)).collect()
}

#[test]
fn huge_pages_are_read_in_place_and_only_where_the_image_has_pages() {
    let Some(_pool) = HugePool::reserve(16, "huge pages that are read in place") else { return };
    let bytes: Vec<u8> = (0..LENGTH as usize).map(|i| (i / 4096 * 3 + i) as u8 | 1).collect();
    let taken = page_set(LENGTH / PAGE, &TAKEN);
    // The second one is amid a unit of direct I/O.
    for start in [MIB, 512] {
        let file = image(&bytes, start);
        for (engine, direct) in engines()
            .into_iter()
            .flat_map(|engine| [DirectChoice::Auto, DirectChoice::Off].map(|d| (engine, d)))
        {
            let name = format!("{engine:?} {direct:?} {start:#x}");
            let mut shared = Shared::new("huge-memfd");
            // One page is there before, and keeps what it has under pages that the image has not.
            shared.process.fill(shared.memory, 0, HUGE_PAGE, 0x5a);
            let (ram, fillable) = shared.attach();
            let (supply, is_direct) = supply(&file, start, direct);
            let pieces = pieces_of(&ram, &taken, fillable.offset);
            let (ended, counters) = run(target_of(&fillable), supply, engine, &pieces);
            ended.unwrap_or_else(|error| panic!("{name}: {error}"));
            for (page, now) in content(&ram).chunks(PAGE as usize).enumerate() {
                let is_right = match (is_in(&taken, page), page as u64 * PAGE < HUGE_PAGE) {
                    (true, _) => now == &bytes[page * PAGE as usize..][..PAGE as usize],
                    (false, was_there) => now.iter().all(|byte| *byte == if was_there { 0x5a } else { 0 }),
                };
                assert!(is_right, "{name}: page {page:#x}");
            }
            let taken_bytes: u64 = taken.runs().map(|run| (run.end.0 - run.start.0) * PAGE).sum();
            assert_eq!((counters.write_calls, counters.bytes_written), (0, taken_bytes), "{name}");
            let by_ring = engine == EngineChoice::IoUring && is_direct && start != 512;
            assert_eq!(counters.ring_reads > 0, by_ring, "{name}");
        }
    }
}

#[test]
fn huge_pages_that_are_cut_off_are_an_error_and_no_signal() {
    let Some(_pool) = HugePool::reserve(16, "huge pages that are cut off") else { return };
    let file = image(&vec![7; LENGTH as usize], 0);
    for engine in engines() {
        for direct in [DirectChoice::Auto, DirectChoice::Off] {
            let shared = Shared::new("huge-memfd");
            let (ram, fillable) = shared.attach();
            // To map more than there is would make the file longer: it is cut afterwards.
            let target = target_of(&fillable);
            let cut = File::options().write(true).open(&shared.path).expect("the file");
            cut.set_len(4 * HUGE_PAGE).expect("a length");
            let whole = page_set(LENGTH / PAGE, &[(0, LENGTH / PAGE)]);
            let pieces = pieces_of(&ram, &whole, fillable.offset);
            let (ended, _) = run(target, supply(&file, 0, direct).0, engine, &pieces);
            let error = ended.expect_err("nothing is there");
            let LaneError::Write { offset, source, .. } = &error else {
                panic!("{engine:?} {direct:?}: {error:?}")
            };
            assert_eq!(source.raw_os_error(), Some(libc::EFAULT), "{engine:?} {direct:?}");
            assert!(*offset >= 4 * HUGE_PAGE, "{engine:?} {direct:?}: {offset:#x}");
        }
    }
}

/// Has the file of a block refuse writes from now on; what was mapped before can still be written.
fn seal(shared: &Shared) {
    let file = File::options().write(true).open(&shared.path).expect("the file");
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE).expect("a memfd");
}

/// Checks that the taken pages are those of the image, and that the others are what they were: something up to `there`,
/// and nothing behind it.
fn check_filled(ram: &GuestRam, bytes: &[u8], there: u64, name: &str) {
    let taken = page_set(LENGTH / PAGE, &TAKEN);
    for (page, now) in content(ram).chunks(PAGE as usize).enumerate() {
        let at = page * PAGE as usize;
        let before = if at as u64 >= there { 0 } else { 0x5a };
        let is_right = match is_in(&taken, page) {
            true => now == &bytes[at..][..PAGE as usize],
            false => now.iter().all(|byte| *byte == before),
        };
        assert!(is_right, "{name}: page {page:#x}");
    }
}

#[test]
fn pages_that_the_process_has_are_written_through_it_and_others_through_the_file() {
    let bytes: Vec<u8> = (0..LENGTH as usize).map(|i| (i / 4096 * 3 + i) as u8 | 1).collect();
    let taken = page_set(LENGTH / PAGE, &TAKEN);
    let file = image(&bytes, MIB);
    // Where no more than a part is there, the file is used, which refuses.
    for (there, is_through_process) in
        [(LENGTH, true), (LENGTH - MIB, true), (LENGTH / 2, false), (PAGE, false)]
    {
        for engine in engines() {
            let name = format!("{engine:?}, {there:#x} bytes are there");
            let mut shared = Shared::new("memfd");
            shared.process.fill(shared.memory, 0, there, 0x5a);
            let (ram, fillable) = shared.attach();
            seal(&shared);
            let pieces = pieces_of(&ram, &taken, fillable.offset);
            let (supply, _) = supply(&file, MIB, DirectChoice::Auto);
            let (ended, counters) = run(target_of(&fillable), supply, engine, &pieces);
            if is_through_process {
                ended.unwrap_or_else(|error| panic!("{name}: {error}"));
                check_filled(&ram, &bytes, there, &name);
                let taken_bytes: u64 = taken.runs().map(|run| (run.end.0 - run.start.0) * PAGE).sum();
                assert_eq!(counters.bytes_written, taken_bytes, "{name}");
            } else {
                let Err(LaneError::Write { source, .. }) = &ended else { panic!("{name}: {ended:?}") };
                assert_eq!(source.raw_os_error(), Some(libc::EPERM), "{name}");
            }
        }
    }
}

#[test]
fn where_the_process_cannot_be_written_its_file_is() {
    let bytes: Vec<u8> = (0..LENGTH as usize).map(|i| (i / 4096 * 3 + i) as u8 | 1).collect();
    let taken = page_set(LENGTH / PAGE, &TAKEN);
    let file = image(&bytes, MIB);
    for engine in engines() {
        for hindrance in ["protect", "unmap", "ended"] {
            let name = format!("{engine:?}, {hindrance}");
            let mut shared = Shared::new("memfd");
            shared.process.fill(shared.memory, 0, LENGTH, 0x5a);
            let (ram, fillable) = shared.attach();
            let pieces = pieces_of(&ram, &taken, fillable.offset);
            let target = target_of(&fillable);
            let Memory { address, length } = shared.memory;
            match hindrance {
                "ended" => shared.process.end(),
                "protect" => {
                    drop(shared.process.tell(&format!("protect {} {} 1", address + MIB, length - MIB)))
                }
                _ => drop(shared.process.tell(&format!("unmap {} {MIB}", address + MIB))),
            }
            let (supply, _) = supply(&file, MIB, DirectChoice::Auto);
            let (ended, _) = run(target, supply, engine, &pieces);
            ended.unwrap_or_else(|error| panic!("{name}: {error}"));
            // It is read by its file.
            check_filled(&ram, &bytes, LENGTH, &name);
        }
    }
}
