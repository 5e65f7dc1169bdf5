//! No descriptor is left behind. This test counts those of its process, so it is alone in it.

use std::io;
use std::sync::Arc;

use vmstate_io::{
    Cancel, DirectChoice, Draft, DraftOptions, LaneSettings, Piece, ReadPair, Scratch, Supplied, Supply,
    WriteLanes,
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

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("our descriptors").count()
}

#[test]
fn successes_and_failures_leave_as_many_descriptors_as_before() {
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
