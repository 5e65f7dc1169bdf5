//! What lanes promise where the target is memory of this process: what comes from a file is read to its place there.
#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmstate_io::{
    Cancel, Counters, CountersReading, DirectChoice, EngineChoice, FileSupply, LaneError, LaneMemory,
    LaneOptions, LaneSettings, LaneTarget, Piece, PositionedWrite, RateLimit, ReadPair, Scratch, Supplied,
    Supply, WriteLanes,
};

const GRAIN: usize = 4096;
const MIB: usize = 1 << 20;
/// Where the memory begins in its file.
const START: u64 = 3 * MIB as u64;
/// What is there before.
const BEFORE: u8 = 0x5a;

/// A file of which a part is mapped, which takes writes as well and counts nothing.
struct Mapped {
    base: *mut u8,
    len: usize,
    file: File,
}

// SAFETY: the mapping is this value's own; the kernel alone writes there.
unsafe impl Send for Mapped {}

// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Memory of `len` bytes, full of [`BEFORE`], behind [`START`] bytes of something else.
    fn new(len: usize) -> Arc<Mapped> {
        let file = tempfile::tempfile_in("/dev/shm").expect("a file in memory");
        file.write_all_at(&vec![BEFORE; len], START).expect("its bytes");
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; no reference to its bytes is made.
        let base = unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, &file, START) };
        Arc::new(Mapped { base: base.expect("address space").cast(), len, file })
    }

    fn target(self: &Arc<Mapped>) -> LaneTarget {
        LaneTarget { direct: None, buffered: Box::new(self.clone()), memory: Some(Box::new(self.clone())) }
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.file.metadata().expect("its length").len() as usize - START as usize];
        self.file.read_exact_at(&mut bytes, START).expect("its bytes");
        bytes
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, which nobody writes to any more.
        unsafe { munmap(self.base.cast(), self.len) }.expect("it was mapped");
    }
}

impl PositionedWrite for Mapped {
    unsafe fn write_span_at(&self, base: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.file.write_span_at(base, len, offset) }
    }
}

// SAFETY: mapped until the value is dropped, and only named to the kernel.
unsafe impl LaneMemory for Mapped {
    fn place_of(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let at = usize::try_from(offset.checked_sub(START)?).ok()?;
        (at + len <= self.len).then(|| self.base.wrapping_add(at))
    }
}

/// Both engines, past the page cache and through it; what is not to be had here is left out, aloud.
fn ways() -> Vec<(EngineChoice, DirectChoice)> {
    let mut engines = vec![EngineChoice::Threads];
    match EngineChoice::IoUring.engine() {
        Ok(_) => engines.push(EngineChoice::IoUring),
        Err(error) => println!("io_uring is not tested here: {error}"),
    }
    engines
        .into_iter()
        .flat_map(|engine| [(engine, DirectChoice::Auto), (engine, DirectChoice::Off)])
        .collect()
}

/// A file to read from, with bytes that differ from page to page behind the offset `start`.
struct Source {
    file: tempfile::NamedTempFile,
    bytes: Vec<u8>,
    start: u64,
}

impl Source {
    fn new(len: usize, start: u64) -> Source {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file on a disk");
        let bytes: Vec<u8> = (0..len).map(|i| (i / GRAIN * 7 + i) as u8).collect();
        file.as_file().write_all_at(&bytes, start).expect("its bytes");
        Source { file, bytes, start }
    }

    /// The source as a supply, and whether it is read past the page cache.
    fn supply(&self, direct: DirectChoice) -> (Arc<dyn Supply>, bool) {
        let pair = ReadPair::open(self.file.path(), direct).expect("it was made");
        let (is_direct, align) = (pair.direct.is_some(), pair.direct_io.alignment());
        (Arc::new(FileSupply::new(pair.direct, pair.buffered, align, vec![self.start])), is_direct)
    }
}

/// Pieces of all of `len` bytes of memory, full but for every seventh grain.
fn pieces(len: usize) -> Vec<Piece> {
    let piece = |offset: usize| {
        let len = (len - offset).min(MIB);
        let mut mask = [0u64; 4];
        for grain in (0..len.div_ceil(GRAIN)).filter(|grain| grain % 7 != 6) {
            mask[grain / 64] |= 1 << (grain % 64);
        }
        let (offset, len, grain) = (offset as u64, len as u32, GRAIN as u32);
        Piece { region: 0, offset, target: START + offset, grain, len, mask }
    };
    (0..len).step_by(MIB).map(piece).collect()
}

fn is_marked(at: usize) -> bool {
    at % MIB / GRAIN % 7 != 6
}

fn run(
    target: LaneTarget,
    supply: Arc<dyn Supply>,
    lanes: usize,
    options: LaneOptions,
    pieces: &[Piece],
) -> (Result<(), LaneError>, CountersReading) {
    let counters = Arc::new(Counters::default());
    let settings = LaneSettings { lanes, align: GRAIN };
    let cancel = Cancel::new().expect("an eventfd");
    let started = WriteLanes::start_with(target, supply, settings, options, counters.clone(), cancel);
    let lanes = started.expect("threads");
    let _ = pieces.iter().take_while(|piece| lanes.deal(**piece).is_ok()).count();
    (lanes.finish(), counters.read())
}

fn with(engine: EngineChoice) -> LaneOptions {
    LaneOptions { engine, ..LaneOptions::default() }
}

#[test]
fn what_is_read_goes_to_its_place_and_nothing_else_is_touched() {
    // The last one is amid a unit of direct I/O, so that nothing of it can be read past the page cache.
    for start in [0, 1 << 20, 512] {
        // An odd tail, and more pieces than the lanes have buffers on pages of the usual size.
        let len = 48 * MIB + 5 * GRAIN + 100;
        let source = Source::new(len, start);
        for (engine, direct) in ways() {
            let name = format!("{engine:?} {direct:?} {start:#x}");
            let memory = Mapped::new(len);
            let (supply, is_direct) = source.supply(direct);
            let (ended, counters) = run(memory.target(), supply, 2, with(engine), &pieces(len));
            ended.unwrap_or_else(|error| panic!("{name}: {error}"));
            let expected: Vec<u8> =
                (0..len).map(|at| if is_marked(at) { source.bytes[at] } else { BEFORE }).collect();
            assert!(memory.content() == expected, "{name}: bytes differ");
            let marked = (0..len).filter(|at| is_marked(*at)).count() as u64;
            assert_eq!((counters.bytes_written, counters.bytes_zero), (marked, 0), "{name}");
            assert_eq!((counters.write_calls, counters.pieces), (0, pieces(len).len() as u64), "{name}");
            let by_ring = engine == EngineChoice::IoUring && is_direct && start != 512;
            assert_eq!(counters.ring_reads > 0, by_ring, "{name}: {counters:?}");
        }
    }
}

#[test]
fn memory_that_cannot_be_had_is_an_error_with_its_place() {
    let len = 3 * MIB;
    let there = 2 * MIB + 8 * GRAIN;
    let source = Source::new(len, 0);
    for (engine, direct) in ways() {
        let name = format!("{engine:?} {direct:?}");
        let memory = Mapped::new(len);
        // The mapping goes on where the file ends now: a store there would be the end of this process.
        memory.file.set_len(START + there as u64).expect("a length");
        let full = |piece: Piece| Piece { mask: [u64::MAX; 4], ..piece };
        let pieces: Vec<Piece> = pieces(len).into_iter().map(full).collect();
        let (ended, _) = run(memory.target(), source.supply(direct).0, 1, with(engine), &pieces);
        let error = ended.expect_err("nothing is there");
        let LaneError::Write { region: 0, offset, len, source: fault } = &error else {
            panic!("{name}: {error:?}")
        };
        assert_eq!(fault.raw_os_error(), Some(libc::EFAULT), "{name}");
        let (from, to) = ((offset - START) as usize, (offset - START) as usize + len);
        assert!(from <= there && there < to && from >= 2 * MIB, "{name}: {from:#x} to {to:#x}");
        // What was under way beside it is there or not, and nothing else ever is.
        let content = memory.content();
        for (page, bytes) in content.chunks(GRAIN).enumerate() {
            let is_read = bytes == &source.bytes[page * GRAIN..][..GRAIN];
            assert!(is_read || bytes.iter().all(|byte| *byte == BEFORE), "{name}: page {page:#x}");
        }
    }
}

#[test]
fn a_source_that_ends_early_is_told_as_the_source() {
    for (engine, direct) in ways() {
        let source = Source::new(MIB + MIB / 2, 0);
        let memory = Mapped::new(2 * MIB);
        let full = |piece: Piece| Piece { mask: [u64::MAX; 4], ..piece };
        let pieces: Vec<Piece> = pieces(2 * MIB).into_iter().map(full).collect();
        let (ended, _) = run(memory.target(), source.supply(direct).0, 1, with(engine), &pieces);
        let error = ended.expect_err("there is no more");
        let LaneError::Supply { region: 0, offset, source } = &error else { panic!("{engine:?}: {error:?}") };
        assert_eq!((*offset, source.kind()), (MIB as u64, io::ErrorKind::UnexpectedEof), "{engine:?}");
    }
}

#[test]
fn a_limit_counts_what_is_read_to_its_place() {
    let source = Source::new(2 * MIB, 0);
    for (engine, direct) in ways() {
        // A terabyte a second: far more than there is, so nobody waits for long.
        let limit = Arc::new(RateLimit::new(NonZeroU64::new(1 << 40).expect("a rate")));
        let begun = Instant::now();
        limit.reserve(0, begun);
        let options = LaneOptions { limit: Some(limit.clone()), engine };
        let memory = Mapped::new(2 * MIB);
        let (ended, counters) = run(memory.target(), source.supply(direct).0, 2, options, &pieces(2 * MIB));
        ended.expect("nothing fails");
        let owed_ns = limit.reserve(0, begun).as_nanos() + u128::from(counters.pieces);
        let earned_ns = (u128::from(counters.bytes_written) * 1_000_000_000) >> 40;
        assert!(owed_ns >= earned_ns && earned_ns > 0, "{engine:?} {direct:?}: {owed_ns} {counters:?}");
    }
}

/// Supplies zeros for the pages of a piece that have an even number.
struct Zeros;

// SAFETY: every grain named was written to the scratch, which is left alone until the next piece.
unsafe impl Supply for Zeros {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        // SAFETY: the scratch holds the whole piece.
        unsafe { scratch.as_mut_ptr().write_bytes(0, piece.len as usize) };
        Ok(Supplied {
            base: scratch.as_mut_ptr(),
            write: piece.mask.map(|word| word & 0x5555_5555_5555_5555),
        })
    }
}

#[test]
fn what_comes_from_no_file_is_written_as_ever() {
    let len = 2 * MIB;
    for (engine, _) in ways() {
        let memory = Mapped::new(len);
        let (ended, counters) = run(memory.target(), Arc::new(Zeros), 2, with(engine), &pieces(len));
        ended.expect("nothing fails");
        for (page, bytes) in memory.content().chunks(GRAIN).enumerate() {
            let is_written = is_marked(page * GRAIN) && page % 2 == 0;
            let expected = if is_written { 0 } else { BEFORE };
            assert!(bytes.iter().all(|byte| *byte == expected), "{engine:?}: page {page:#x}");
        }
        assert!(counters.write_calls > 0, "{engine:?}");
    }
}
