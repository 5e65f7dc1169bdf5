//! What lanes promise, whatever the file under them does.
#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmstate_io::{
    Cancel, Counters, CountersReading, Draft, DraftOptions, EngineChoice, LaneError, LaneOptions,
    LaneSettings, LaneTarget, Piece, PositionedWrite, RateLimit, RingWrite, Scratch, Supplied, Supply,
    WriteLanes,
};

const GRAIN: u32 = 4096;
const ALIGN: usize = 4096;

/// What a scripted file answers to a write of so many bytes.
enum Answer {
    Take(usize),
    Refuse(i32),
}

/// A file in memory that does what a script says. Two openings of one file share its bytes, as descriptors do.
struct Scripted<F> {
    file: Arc<File>,
    calls: AtomicUsize,
    /// Direct I/O refuses what is misaligned, as a disk does.
    is_direct: bool,
    /// The answer to call number so much (from 0) of so many bytes.
    script: F,
}

impl<F: Fn(usize, usize) -> Answer> Scripted<F> {
    /// How many bytes of a write are taken.
    fn admit(&self, base: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        assert!(len > 0, "a write of nothing at {offset:#x}");
        if self.is_direct && !(base.addr() | len | offset as usize).is_multiple_of(ALIGN) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        match (self.script)(self.calls.fetch_add(1, Ordering::SeqCst), len) {
            Answer::Refuse(errno) => Err(io::Error::from_raw_os_error(errno)),
            Answer::Take(taken) => Ok(taken),
        }
    }
}

impl<F: Fn(usize, usize) -> Answer + Send + Sync> PositionedWrite for Scripted<F> {
    unsafe fn write_span_at(&self, base: *const u8, len: usize, offset: u64) -> io::Result<usize> {
        let taken = self.admit(base, len, offset)?;
        // SAFETY: the caller's span has at least `taken` bytes.
        unsafe { self.file.write_span_at(base, taken, offset) }
    }

    fn ring_write(&self, base: *const u8, len: usize, offset: u64) -> RingWrite<'_> {
        match self.admit(base, len, offset) {
            Ok(len) => RingWrite::Ring { descriptor: self.file.as_fd(), len },
            Err(error) => RingWrite::Refused(error),
        }
    }
}

fn scripted(
    file: &Arc<File>,
    is_direct: bool,
    script: impl Fn(usize, usize) -> Answer + Send + Sync + 'static,
) -> Box<dyn PositionedWrite> {
    Box::new(Scripted { file: file.clone(), calls: AtomicUsize::new(0), is_direct, script })
}

/// A file in memory.
fn memory() -> Arc<File> {
    Arc::new(tempfile::tempfile_in("/dev/shm").expect("a file in memory"))
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().expect("its length").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("its bytes");
    bytes
}

/// An engine, and whether the file takes direct I/O: without that a ring has nothing to do.
#[derive(Clone, Copy, Debug)]
struct Way {
    engine: EngineChoice,
    has_direct: bool,
}

impl Way {
    fn target<S>(self, file: &Arc<File>, script: S) -> LaneTarget
    where
        S: Fn(usize, usize) -> Answer + Clone + Send + Sync + 'static,
    {
        let direct = self.has_direct.then(|| scripted(file, true, script.clone()));
        LaneTarget { direct, buffered: scripted(file, false, script), memory: None }
    }
}

fn ways() -> impl Iterator<Item = Way> {
    let both = |engine| [false, true].map(|has_direct| Way { engine, has_direct });
    engines().into_iter().flat_map(both)
}

/// Both engines; one that is not to be had here is left out, aloud.
fn engines() -> Vec<EngineChoice> {
    let mut engines = vec![EngineChoice::Threads];
    match EngineChoice::IoUring.engine() {
        Ok(_) => engines.push(EngineChoice::IoUring),
        Err(error) => println!("io_uring is not tested here: {error}"),
    }
    engines
}

/// The byte of a region at an offset: never zero, except in every fifth grain, which is nothing but zeros.
fn pattern(region: u32, offset: u64) -> u8 {
    let grain = offset / u64::from(GRAIN);
    if grain % 5 == 4 { 0 } else { (offset % 251) as u8 ^ (grain % 127) as u8 ^ region as u8 | 0x80 }
}

/// Supplies the pattern by copying it to the scratch, and leaves the zeros out.
struct Pattern;

// SAFETY: every grain named was filled in the scratch, which is left alone until the next piece.
unsafe impl Supply for Pattern {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        assert!(scratch.len() >= piece.len as usize);
        let base = scratch.as_mut_ptr();
        let mut write = piece.mask;
        for grain in 0..piece.grains() as usize {
            let (from, to) = piece.bytes_of(grain, grain + 1);
            for i in from..to {
                // SAFETY: a byte of the scratch, which holds the whole piece.
                unsafe { base.wrapping_add(i).write(pattern(piece.region, piece.offset + i as u64)) };
            }
            if pattern(piece.region, piece.offset + from as u64) == 0 {
                write[grain / 64] &= !(1 << (grain % 64));
            }
        }
        Ok(Supplied { base, write })
    }
}

/// A supply that answers by a function.
struct Answering<F>(F);

// SAFETY: the tests' functions answer with the scratch or with an error; those that answer with more than
// the piece has are there to be caught before a byte is read.
unsafe impl<F: Fn(&Piece, *mut u8) -> io::Result<Supplied> + Send + Sync> Supply for Answering<F> {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        (self.0)(piece, scratch.as_mut_ptr())
    }
}

fn ones(piece: &Piece, base: *mut u8) -> io::Result<Supplied> {
    // SAFETY: the scratch holds the whole piece.
    unsafe { base.write_bytes(1, piece.len as usize) };
    Ok(Supplied { base: base.cast_const(), write: piece.mask })
}

/// The pieces of a region of `len` bytes which starts at the file offset `target`: full but for every
/// seventh grain.
fn pieces(region: u32, len: u64, target: u64) -> Vec<Piece> {
    let step = u64::from(GRAIN) * 256;
    let piece_at = |offset: u64| {
        let len = (len - offset).min(step) as u32;
        let mut mask = [0u64; 4];
        for grain in (0..len.div_ceil(GRAIN) as usize).filter(|grain| grain % 7 != 6) {
            mask[grain / 64] |= 1 << (grain % 64);
        }
        Piece { region, offset, target: target + offset, grain: GRAIN, len, mask }
    };
    (0..len.div_ceil(step)).map(|i| piece_at(i * step)).collect()
}

/// The file that the pieces make.
fn expected(pieces: &[Piece]) -> Vec<u8> {
    let mut file = Vec::new();
    for piece in pieces {
        for i in 0..piece.len as usize {
            let grain = i / GRAIN as usize;
            let byte = pattern(piece.region, piece.offset + i as u64);
            if piece.mask[grain / 64] >> (grain % 64) & 1 == 1 && byte != 0 {
                let at = piece.target as usize + i;
                file.resize(file.len().max(at + 1), 0);
                file[at] = byte;
            }
        }
    }
    file
}

struct Run {
    target: LaneTarget,
    supply: Arc<dyn Supply>,
    cancel: Cancel,
    lanes: usize,
    limit: Option<Arc<RateLimit>>,
    engine: EngineChoice,
}

impl Run {
    fn new(engine: EngineChoice, target: LaneTarget) -> Run {
        let cancel = Cancel::new().expect("eventfd");
        Run { target, supply: Arc::new(Pattern), cancel, lanes: 2, limit: None, engine }
    }

    /// Deals all the pieces unless a deal fails; gives how many were dealt, how it ended, and the counters.
    fn go(self, pieces: &[Piece]) -> (usize, Result<(), LaneError>, CountersReading) {
        let counters = Arc::new(Counters::default());
        let settings = LaneSettings { lanes: self.lanes, align: ALIGN };
        let options = LaneOptions { limit: self.limit, engine: self.engine };
        let (target, supply, cancel) = (self.target, self.supply, self.cancel);
        let lanes = WriteLanes::start_with(target, supply, settings, options, counters.clone(), cancel)
            .expect("a few threads");
        let dealt = pieces.iter().take_while(|piece| lanes.deal(**piece).is_ok()).count();
        let ended = lanes.finish();
        (dealt, ended, counters.read())
    }
}

/// Two regions, the second at an odd file offset, both with an odd tail.
fn two_regions() -> Vec<Piece> {
    let mut all = pieces(0, 3 * 256 * 4096 + 5 * 4096 + 1234, 1 << 20);
    all.extend(pieces(1, 40 * 4096 + 77, (8 << 20) + 0x200));
    all
}

#[test]
fn short_and_interrupted_writes_lose_nothing() {
    type Script = fn(usize, usize) -> Answer;
    let scripts: [(&str, Script); 6] = [
        ("whole writes", |_, len| Answer::Take(len)),
        ("half of each", |_, len| Answer::Take(len.div_ceil(2))),
        ("odd counts", |_, len| Answer::Take(len.min(5000))),
        ("less than a unit", |_, len| Answer::Take(len.min(100 << (len % 3)))),
        ("every other interrupted", |call, len| {
            if call % 2 == 0 { Answer::Refuse(libc::EINTR) } else { Answer::Take(len) }
        }),
        ("interrupted and short", |call, len| {
            if call % 3 == 0 { Answer::Refuse(libc::EINTR) } else { Answer::Take(len.min(70_001)) }
        }),
    ];
    let pieces = two_regions();
    let whole = expected(&pieces);
    for (name, script) in scripts {
        for way in ways() {
            let file = memory();
            let run = Run::new(way.engine, way.target(&file, script));
            let (dealt, ended, counters) = run.go(&pieces);
            ended.unwrap_or_else(|error| panic!("{name}, {way:?}: {error}"));
            assert_eq!(dealt, pieces.len());
            assert!(content(&file) == whole, "{name}, {way:?}: bytes differ");
            let data = whole.iter().filter(|byte| **byte != 0).count() as u64;
            assert_eq!(counters.bytes_written, data, "{name}, {way:?}");
            assert_eq!(counters.pieces, pieces.len() as u64, "{name}, {way:?}");
            let marked: u64 = pieces.iter().map(|piece| piece.bytes_in(&piece.mask)).sum();
            assert_eq!(counters.bytes_zero, marked - data, "{name}, {way:?}");
        }
    }
}

#[test]
fn aligned_runs_are_direct_and_the_rest_is_buffered() {
    for engine in engines() {
        let file = memory();
        let (direct_lens, buffered_lens) =
            (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let log = |lens: &Arc<Mutex<Vec<usize>>>| {
            let lens = lens.clone();
            move |_, len| {
                lens.lock().expect("log").push(len);
                Answer::Take(len)
            }
        };
        let target = LaneTarget {
            direct: Some(scripted(&file, true, log(&direct_lens))),
            buffered: scripted(&file, false, log(&buffered_lens)),
            memory: None,
        };
        let mut run = Run::new(engine, target);
        run.lanes = 1;
        let piece =
            |target, len| Piece { region: 0, offset: 0, target, grain: GRAIN, len, mask: [0b11, 0, 0, 0] };
        let pieces = [piece(0, 8192), piece(0x10000, 4096 + 77), piece(0x20200, 8192), piece(0x30000, 0)];
        let pieces = pieces.map(|p| Piece { mask: [(1 << p.grains()) - 1, 0, 0, 0], ..p });
        let (_, ended, counters) = run.go(&pieces);
        ended.expect("nothing fails");
        assert_eq!(*direct_lens.lock().expect("log"), [8192, 4096], "{engine:?}");
        // A piece whose memory and file offsets do not meet is buffered whole; one of no bytes writes nothing.
        assert_eq!(*buffered_lens.lock().expect("log"), [77, 8192], "{engine:?}");
        assert_eq!(counters.write_calls, 4, "{engine:?}");
        assert_eq!(counters.pieces, 4, "{engine:?}");
    }
}

#[test]
fn an_error_at_any_write_is_reported_with_its_place() {
    let pieces = two_regions();
    let whole = expected(&pieces);
    for errno in [libc::ENOSPC, libc::EIO, libc::EDQUOT] {
        for (k, way) in [0, 1, 2, 7, 20].into_iter().flat_map(|k| ways().map(move |way| (k, way))) {
            let file = memory();
            let script = move |call, len| if call == k { Answer::Refuse(errno) } else { Answer::Take(len) };
            let mut run = Run::new(way.engine, way.target(&file, script));
            run.lanes = 1;
            let (_, ended, _) = run.go(&pieces);
            let error = ended.expect_err("the file refused");
            let LaneError::Write { region, offset, len, source } = &error else { panic!("{error:?}") };
            assert_eq!(source.raw_os_error(), Some(errno), "write {k}, {way:?}");
            let text = format!("write of {len:#x} bytes at file offset {offset:#x} (region {region})");
            assert_eq!(error.to_string(), text);
            let written = content(&file);
            if way.engine == EngineChoice::Threads && !way.has_direct {
                // One lane writes in order, so everything before the place is there and nothing after it.
                assert!(written.len() as u64 <= *offset, "write {k}: bytes after the failure");
                assert!(written == whole[..written.len()], "write {k}: bytes differ before the failure");
            } else {
                // What was under way beside it is there or not, and nothing else ever is.
                let differs = |(at, byte): (usize, &u8)| *byte != 0 && *byte != whole[at];
                assert!(!written.iter().enumerate().any(differs), "write {k}, {way:?}: bytes differ");
                let refused = *offset as usize..*offset as usize + *len;
                let there = written.get(refused).unwrap_or_default();
                assert!(there.iter().all(|byte| *byte == 0), "write {k}, {way:?}: refused and there");
            }
        }
    }
}

#[test]
fn a_refused_direct_write_is_told_apart() {
    for engine in engines() {
        let file = memory();
        let target = LaneTarget {
            direct: Some(scripted(&file, true, |_, _| Answer::Refuse(libc::EINVAL))),
            buffered: scripted(&file, false, |_, len| Answer::Take(len)),
            memory: None,
        };
        let (_, ended, _) = Run::new(engine, target).go(&pieces(3, 4096, 0x2000));
        let error = ended.expect_err("the file refused");
        assert!(
            matches!(error, LaneError::DirectRefused { region: 3, offset: 0x2000, len: 4096, .. }),
            "{engine:?}: {error:?}"
        );
        let text = "direct write of 0x1000 bytes at file offset 0x2000 (region 3) refused as misaligned";
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn a_write_that_takes_nothing_is_an_error_and_no_loop() {
    for way in ways() {
        let run = Run::new(way.engine, way.target(&memory(), |_, _| Answer::Take(0)));
        let (_, ended, _) = run.go(&pieces(0, 4096, 0));
        let error = ended.expect_err("nothing was written");
        let LaneError::Write { source, .. } = &error else { panic!("{error:?}") };
        assert_eq!(source.kind(), io::ErrorKind::WriteZero, "{way:?}");
    }
}

#[test]
fn a_failed_lane_stops_the_dealing() {
    for way in ways() {
        let run = Run::new(way.engine, way.target(&memory(), |_, _| Answer::Refuse(libc::ENOSPC)));
        // Far more than the queue holds: without the early return this would block for ever.
        let many = vec![pieces(0, 4096, 0)[0]; 10_000];
        let (dealt, ended, _) = run.go(&many);
        assert!(dealt < many.len(), "{way:?}: all {dealt} pieces were taken by lanes that had failed");
        assert!(matches!(ended, Err(LaneError::Write { offset: 0, .. })), "{way:?}: {ended:?}");
    }
}

#[test]
fn the_first_error_wins_in_deal_and_in_finish() {
    for way in ways() {
        let supply = Answering(|_: &Piece, _| Err(io::Error::other("guest memory is gone")));
        let target = way.target(&memory(), |_, len| Answer::Take(len));
        let cancel = Cancel::new().expect("eventfd");
        let settings = LaneSettings { lanes: 1, align: ALIGN };
        let options = LaneOptions { engine: way.engine, ..LaneOptions::default() };
        let (supply, counters) = (Arc::new(supply), Arc::default());
        let lanes = WriteLanes::start_with(target, supply, settings, options, counters, cancel.clone())
            .expect("a thread");
        let piece = Piece { region: 9, offset: 0x5000, ..pieces(0, 4096, 0)[0] };
        let dealt = std::iter::repeat_with(|| lanes.deal(piece)).find_map(Result::err).expect("a failure");
        assert_eq!(dealt.to_string(), "memory of region 9 at 0x5000", "{way:?}");
        cancel.cancel();
        let ended = lanes.finish().expect_err("the same failure");
        assert_eq!(ended.to_string(), dealt.to_string(), "{way:?}");
        let source = std::error::Error::source(&ended).expect("what the supply said");
        assert_eq!(source.to_string(), "guest memory is gone");
    }
}

#[test]
fn cancelling_at_any_write_ends_everything() {
    let pieces = two_regions();
    for (k, way) in (0..12).flat_map(|k| ways().map(move |way| (k, way))) {
        let cancel = Cancel::new().expect("eventfd");
        let switch = cancel.clone();
        let script = move |call, len| {
            if call == k {
                switch.cancel();
            }
            // Interrupted for ever after: only the switch ends it.
            if call >= k { Answer::Refuse(libc::EINTR) } else { Answer::Take(len) }
        };
        let mut run = Run::new(way.engine, way.target(&memory(), script));
        run.cancel = cancel;
        let (_, ended, _) = run.go(&pieces);
        assert!(matches!(ended, Err(LaneError::Cancelled)), "write {k}, {way:?}: {ended:?}");
    }
}

#[test]
fn a_limit_holds_up_what_follows_and_nobody_who_cancels() {
    for way in ways() {
        let cancel = Cancel::new().expect("eventfd");
        let switch = cancel.clone();
        // The switch is thrown by the first write; what is owed for it would take a day.
        let script = move |_, len| {
            switch.cancel();
            Answer::Take(len)
        };
        let mut run = Run::new(way.engine, way.target(&memory(), script));
        run.limit = Some(Arc::new(RateLimit::new(NonZeroU64::MIN)));
        (run.lanes, run.cancel) = (1, cancel);
        let (_, ended, counters) = run.go(&two_regions());
        assert!(matches!(ended, Err(LaneError::Cancelled)), "{way:?}: {ended:?}");
        assert_eq!(counters.write_calls, 1, "{way:?}");
    }
}

#[test]
fn what_all_lanes_write_counts_against_one_limit() {
    for way in ways() {
        // A terabyte a second: far more than there is, so nobody waits for long.
        let limit = Arc::new(RateLimit::new(NonZeroU64::new(1 << 40).expect("a rate")));
        let begun = Instant::now();
        limit.reserve(0, begun);
        let mut run = Run::new(way.engine, way.target(&memory(), |_, len| Answer::Take(len)));
        run.limit = Some(limit.clone());
        let (_, ended, counters) = run.go(&two_regions());
        ended.expect("nothing fails");
        // Each reservation is rounded down to a nanosecond, and there is one for each piece.
        let owed_ns = limit.reserve(0, begun).as_nanos() + u128::from(counters.pieces);
        let earned_ns = (u128::from(counters.bytes_written) * 1_000_000_000) >> 40;
        assert!(owed_ns >= earned_ns, "{way:?}: {owed_ns} {counters:?}");
    }
}

#[test]
fn zeros_that_are_left_out_cost_nothing_of_a_limit() {
    for way in ways() {
        let none = |_: &Piece, base: *mut u8| Ok(Supplied { base: base.cast_const(), write: [0; 4] });
        let mut run = Run::new(way.engine, way.target(&memory(), |_, _| Answer::Refuse(libc::EIO)));
        // At a byte a second the pieces' own length would take years.
        run.limit = Some(Arc::new(RateLimit::new(NonZeroU64::MIN)));
        run.supply = Arc::new(Answering(none));
        let (dealt, ended, _) = run.go(&two_regions());
        ended.expect("nothing is written");
        assert_eq!(dealt, two_regions().len());
    }
}

#[test]
fn lanes_cancelled_before_the_first_piece_write_nothing() {
    for way in ways() {
        let run = Run::new(way.engine, way.target(&memory(), |_, len| Answer::Take(len)));
        run.cancel.cancel();
        let (dealt, ended, counters) = run.go(&two_regions());
        assert_eq!(dealt, 0);
        assert!(matches!(ended, Err(LaneError::Cancelled)), "{way:?}: {ended:?}");
        assert_eq!(counters, CountersReading::default());
    }
}

#[test]
fn lanes_cancelled_while_they_wait_end_as_cancelled() {
    for way in ways() {
        let run = Run::new(way.engine, way.target(&memory(), |_, len| Answer::Take(len)));
        run.cancel.cancel();
        // Nothing is dealt, so no lane ever looks at the switch.
        let (_, ended, _) = run.go(&[]);
        assert!(matches!(ended, Err(LaneError::Cancelled)), "{way:?}: {ended:?}");
    }
}

#[test]
fn panics_in_a_lane_become_errors() {
    let beyond = |_: &Piece, base: *mut u8| Ok(Supplied { base: base.cast_const(), write: [0b10, 0, 0, 0] });
    let panicking = |piece: &Piece, _: *mut u8| -> io::Result<Supplied> { panic!("at {:#x}", piece.offset) };
    let supplies: [(Arc<dyn Supply>, &str); 2] = [
        (Arc::new(Answering(panicking)), "lane 0 panicked: at 0x0"),
        (Arc::new(Answering(beyond)), "lane 0 panicked: the supply names grains beyond the piece at 0x0"),
    ];
    for (supply, text) in supplies {
        for way in ways() {
            let file = memory();
            let mut run = Run::new(way.engine, way.target(&file, |_, len| Answer::Take(len)));
            (run.supply, run.lanes) = (supply.clone(), 1);
            let (_, ended, _) = run.go(&pieces(0, 4096, 0));
            assert_eq!(ended.expect_err("a panic").to_string(), text);
            assert!(content(&file).is_empty());
        }
    }
}

#[test]
fn a_panic_waits_for_what_is_under_way() {
    for way in ways() {
        let file = memory();
        // Four pieces are written; the fifth brings the lane down.
        let supply = |piece: &Piece, base: *mut u8| {
            assert!(piece.offset < 4 << 20, "at {:#x}", piece.offset);
            ones(piece, base)
        };
        let mut run = Run::new(way.engine, way.target(&file, |_, len| Answer::Take(len)));
        (run.supply, run.lanes) = (Arc::new(Answering(supply)), 1);
        let full = |piece: Piece| Piece { mask: [u64::MAX; 4], ..piece };
        let pieces: Vec<Piece> = pieces(0, 8 << 20, 0).into_iter().map(full).collect();
        let (_, ended, _) = run.go(&pieces);
        assert_eq!(ended.expect_err("a panic").to_string(), "lane 0 panicked: at 0x400000");
        assert!(content(&file) == vec![1; 4 << 20], "{way:?}");
    }
}

#[test]
fn dropped_lanes_end_their_threads() {
    for way in ways() {
        let supply: Arc<dyn Supply> = Arc::new(Pattern);
        let file = memory();
        let target = way.target(&file, |_, len| Answer::Take(len));
        let settings = LaneSettings { lanes: 3, align: ALIGN };
        let options = LaneOptions { engine: way.engine, ..LaneOptions::default() };
        let cancel = Cancel::new().expect("eventfd");
        let lanes = WriteLanes::start_with(target, supply.clone(), settings, options, Arc::default(), cancel)
            .expect("threads");
        for piece in two_regions() {
            lanes.deal(piece).expect("room");
        }
        drop(lanes);
        assert_eq!(Arc::strong_count(&supply), 1, "{way:?}: a lane still holds the supply");
        assert_eq!(Arc::strong_count(&file), 1, "{way:?}: a lane still holds the file");
    }
}

#[test]
fn settings_out_of_bounds_are_programmer_errors() {
    for (lanes, align) in [(0, ALIGN), (257, ALIGN), (1, 0), (1, 512), (1, 4097)] {
        let started = catch_unwind(|| {
            let target = ways().next().expect("threads").target(&memory(), |_, len| Answer::Take(len));
            let settings = LaneSettings { lanes, align };
            let cancel = Cancel::new().expect("eventfd");
            WriteLanes::start(target, Arc::new(Pattern), settings, Arc::default(), cancel).map(drop)
        });
        assert!(started.is_err(), "{lanes} lanes aligned to {align} were started");
    }
}

#[test]
fn a_real_file_gets_the_same_bytes_with_and_without_direct_io() {
    let pieces = two_regions();
    let whole = expected(&pieces);
    for engine in engines() {
        // A file system with direct I/O of its own, and one in memory.
        for place in [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"] {
            let directory = tempfile::tempdir_in(place).expect("a temporary directory");
            for direct in [vmstate_io::DirectChoice::Off, vmstate_io::DirectChoice::Auto] {
                let path = directory.path().join(format!("{direct:?}.img"));
                let mut draft = Draft::create(&path, DraftOptions { direct, ..DraftOptions::default() })
                    .expect("a draft");
                draft.set_len(whole.len() as u64).expect("a length");
                if direct == vmstate_io::DirectChoice::Auto && draft.direct().is_none() {
                    println!("direct I/O not tested in {place}: {:?}", draft.direct_io());
                }
                let target = draft.lane_target().expect("two descriptors");
                let (_, ended, _) = Run::new(engine, target).go(&pieces);
                ended.expect("nothing fails");
                draft.publish().expect("a free name");
                assert!(std::fs::read(&path).expect("the file") == whole, "{engine:?} {direct:?} {place}");
            }
        }
    }
}

/// The kernel's own refusals, where no script stands between.
#[test]
fn a_full_device_is_enospc_with_its_place() {
    for way in ways() {
        let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let target = LaneTarget::files(way.has_direct.then(full), full());
        let (_, ended, _) = Run::new(way.engine, target).go(&pieces(0, 4096, 0));
        let error = ended.expect_err("the device is full");
        let LaneError::Write { source, .. } = &error else { panic!("{error:?}") };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull, "{way:?}");
    }
}

/// Our own memory as a file: a mapping of more than a file has is a disk that breaks after a short write.
#[test]
fn a_file_that_breaks_amid_a_write_is_eio_with_its_place() {
    const THERE: usize = (2 << 20) + 8192;
    const MAPPED: usize = 4 << 20;
    for way in ways() {
        let file = memory();
        file.set_len(THERE as u64).expect("a length");
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; no reference to its bytes is made.
        let mapped = unsafe { mmap(std::ptr::null_mut(), MAPPED, protection, MapFlags::SHARED, &file, 0) };
        let mapped = mapped.expect("address space");
        let start = mapped.addr() as u64;
        let open = || File::options().write(true).open("/proc/self/mem").expect("our memory");
        let mut run = Run::new(way.engine, LaneTarget::files(way.has_direct.then(open), open()));
        (run.lanes, run.supply) = (1, Arc::new(Answering(ones)));
        let full = |piece: Piece| Piece { mask: [u64::MAX; 4], ..piece };
        // The third piece begins in what is there and ends beyond it.
        let all: Vec<Piece> = pieces(0, 3 << 20, start).into_iter().map(full).collect();
        let (_, ended, _) = run.go(&all);
        let error = ended.expect_err("nothing is there");
        let LaneError::Write { source, offset, .. } = &error else { panic!("{error:?}") };
        assert_eq!(source.raw_os_error(), Some(libc::EIO), "{way:?}");
        assert_eq!(*offset, start + THERE as u64, "{way:?}");
        assert!(content(&file) == vec![1; THERE], "{way:?}");
        // SAFETY: the mapping made above, which nobody writes to any more.
        unsafe { munmap(mapped, MAPPED) }.expect("it was mapped");
    }
}
