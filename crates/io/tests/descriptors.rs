//! No descriptor is left behind. These tests count those of their process, so they are alone in it.
#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmstate_io::{
    Cancel, Counters, DirectChoice, Draft, DraftOptions, EngineChoice, LaneError, LaneOptions, LaneSettings,
    Piece, ReadPair, Scratch, Supplied, Supply, WriteLanes,
};

struct Zeros {
    is_failing: bool,
}

// SAFETY: the scratch is a fresh mapping, readable throughout, and is left alone until the next piece.
unsafe impl Supply for Zeros {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        match self.is_failing {
            true => Err(io::Error::other("told to")),
            false => Ok(Supplied { base: scratch.as_mut_ptr(), write: piece.mask }),
        }
    }
}

/// The tests here count the descriptors of their process: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("our descriptors").count()
}

#[test]
fn successes_and_failures_leave_as_many_descriptors_as_before() {
    let _alone = alone();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("vm.img");
    let piece = Piece { region: 0, offset: 0, target: 0, grain: 4096, len: 8192, mask: [3, 0, 0, 0] };
    let settings = LaneSettings { lanes: 4, align: 4096 };
    let before = descriptors();
    for is_failing in [true, false] {
        let mut draft = Draft::create(&path, DraftOptions::default()).expect("a draft");
        let cancel = Cancel::new().expect("eventfd");
        let target = draft.lane_target().expect("two descriptors");
        let supply = Arc::new(Zeros { is_failing });
        let lanes = WriteLanes::start(target, supply, settings, Arc::default(), cancel).expect("threads");
        assert!(descriptors() > before);
        lanes.deal(piece).expect("room");
        assert_eq!(lanes.finish().is_err(), is_failing);
        if !is_failing {
            draft.publish().expect("a free name");
        }
        drop(draft);
        assert_eq!(descriptors(), before, "failing: {is_failing}");
    }

    Draft::create(&path, DraftOptions::default()).expect_err("the name is taken");
    drop(ReadPair::open(&path, DirectChoice::Auto).expect("the file"));
    assert_eq!(descriptors(), before);
    assert_eq!(std::fs::read_dir(directory.path()).expect("the directory").count(), 1);
}

/// A supply that both lanes have to come to before either gets an answer, so that each takes a piece.
#[derive(Default)]
struct Meeting {
    present: Mutex<usize>,
    changed: Condvar,
}

impl Meeting {
    /// Ends the meeting when both have come, or at once.
    fn adjourn(&self, is_whole: bool) {
        let mut present = self.present.lock().expect("nobody panics here");
        while is_whole && *present < 2 {
            present = self.changed.wait(present).expect("nobody panics here");
        }
        *present = 2;
        self.changed.notify_all();
    }
}

// SAFETY: the scratch is a fresh mapping, readable throughout, and is left alone until the next piece.
unsafe impl Supply for Meeting {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        let mut present = self.present.lock().expect("nobody panics here");
        *present += 1;
        self.changed.notify_all();
        while *present < 2 {
            present = self.changed.wait(present).expect("nobody panics here");
        }
        Ok(Supplied { base: scratch.as_mut_ptr(), write: piece.mask })
    }
}

/// Lowers the limit so that so many descriptors more can be opened, and gives what it was.
fn leave_descriptors(more: usize) -> Rlimit {
    let open = std::fs::read_dir("/proc/self/fd").expect("our descriptors");
    let name = |entry: io::Result<std::fs::DirEntry>| entry.expect("a descriptor").file_name();
    let numbers: Vec<u64> = open.filter_map(|entry| name(entry).to_str()?.parse().ok()).collect();
    // One of them was the directory's and is free again; it is not found by a look.
    let taken = |number: &u64| std::fs::read_link(format!("/proc/self/fd/{number}")).is_ok();
    let numbers: Vec<u64> = numbers.into_iter().filter(taken).collect();
    let limit = (0..).filter(|number| !numbers.contains(number)).nth(more).expect("a number");
    let usual = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), ..usual }).expect("a lower limit");
    usual
}

/// Lanes for which no descriptor is left, from the start on or from the second lane on.
#[test]
fn lanes_that_get_no_ring_do_without_unless_it_was_demanded() {
    let _alone = alone();
    if let Err(error) = EngineChoice::IoUring.engine() {
        println!("not tested here: {error}");
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory");
    let before = descriptors();
    for (engine, rings, is_whole) in [
        (EngineChoice::Auto, 0, true),
        (EngineChoice::Auto, 1, true),
        (EngineChoice::IoUring, 0, false),
        (EngineChoice::IoUring, 1, false),
        (EngineChoice::IoUring, 2, true),
    ] {
        let path = directory.path().join(format!("{engine:?}-{rings}"));
        let draft = Draft::create(&path, DraftOptions::default()).expect("a draft");
        if draft.direct().is_none() {
            println!("not tested here: {:?}", draft.direct_io());
            return;
        }
        let target = draft.lane_target().expect("two descriptors");
        let (cancel, counters) = (Cancel::new().expect("eventfd"), Arc::new(Counters::default()));
        let supply = Arc::new(Meeting::default());
        let settings = LaneSettings { lanes: 2, align: 4096 };
        let options = LaneOptions { engine, ..LaneOptions::default() };
        let lanes =
            WriteLanes::start_with(target, supply.clone(), settings, options, counters.clone(), cancel)
                .expect("threads");
        let usual = leave_descriptors(rings);
        let piece = |i: u64| Piece {
            region: 0,
            offset: 0,
            target: i << 20,
            grain: 4096,
            len: 8192,
            mask: [3, 0, 0, 0],
        };
        match is_whole {
            true => (0..2).for_each(|i| lanes.deal(piece(i)).expect("room")),
            // A lane without its ring fails, which ends the dealing; the other waits for it in vain.
            false => while lanes.deal(piece(0)).is_ok() {},
        }
        supply.adjourn(is_whole);
        let ended = lanes.finish();
        setrlimit(Resource::Nofile, usual).expect("what it was");
        match ended {
            Ok(()) => assert_eq!(counters.read().bytes_written, 2 * 8192),
            Err(LaneError::Start { source, .. }) if !is_whole => {
                assert_eq!(source.raw_os_error(), Some(libc::EMFILE));
            }
            Err(error) => panic!("{engine:?} {rings}: {error}"),
        }
        drop(draft);
        assert_eq!(descriptors(), before, "{engine:?} {rings}");
    }
}
