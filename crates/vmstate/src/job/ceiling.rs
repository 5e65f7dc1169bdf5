//! What the lanes and the disk do without a guest: the ceilings that a save and a restore are measured by.
//!
//! The lanes are those of the jobs. What they write is a constant in a huge page, written again and again: nothing is read
//! and nothing copied. That stays in the processor's cache, which matters where the disk is the work of a processor, on the
//! host of a virtual machine for example; [`Data`] does not.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io::{
    Cancel, ConstantSupply, Counters, DirectChoice, Draft, DraftOptions, FileSupply, HUGE_PAGE, LaneSettings,
    LaneTarget,
};
use io::{Piece, ReadPair, Supply, WriteLanes};
use rustix::fs::{MemfdFlags, Mode, OFlags};

use super::save::default_channels;
use crate::{Error, Result};

/// The bytes of a piece: as many as the lanes of a guest with pages of 4 KiB move at once.
const PIECE: usize = 1 << 20;
/// The grain of a piece.
const GRAIN: usize = 4096;
/// More than any cache of a processor holds, by far.
const DATA_HUGE_PAGES: usize = 256;

/// Whether files in `directory` take direct I/O: QEMU crashes where it is told to use it and they do not.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io) where no file can be made there.
pub fn takes_direct_io(directory: &Path) -> Result<bool> {
    let options = DraftOptions { overwrite: true, sync: false, ..DraftOptions::default() };
    Ok(Draft::create(&directory.join("direct-io"), options)?.direct().is_some())
}

/// Writes a constant of `bytes` into a new file at `path` as a save writes an image, durable and with its name at
/// the end, and says how long that took. A file that is there is replaced.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io), [`Kind::Interrupted`](crate::Kind::Interrupted).
pub fn write_fresh(path: &Path, bytes: u64, cancel: &Cancel) -> Result<Duration> {
    write_supply(path, bytes, constant()?, |_| 0, cancel)
}

/// Data that lie in memory and, most of them, in no cache of a processor: 512 MiB on huge pages, no two of which are alike.
#[derive(Debug)]
pub struct Data(Arc<ConstantSupply>);

impl Data {
    /// Makes them.
    ///
    /// # Errors
    /// [`Kind::Io`](crate::Kind::Io) where the memory cannot be mapped.
    pub fn new() -> Result<Data> {
        let supply = ConstantSupply::of(DATA_HUGE_PAGES)
            .map_err(|error| Error::io("cannot map half a GiB of huge pages", error))?;
        Ok(Data(Arc::new(supply)))
    }

    /// How much memory they take, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        (DATA_HUGE_PAGES * HUGE_PAGE) as u64
    }
}

/// As [`write_fresh`], of data that come out of the memory.
///
/// # Errors
/// As there.
pub fn write_data(path: &Path, bytes: u64, data: &Data, cancel: &Cancel) -> Result<Duration> {
    write_supply(path, bytes, data.0.clone(), |at| at, cancel)
}

fn write_supply(
    path: &Path,
    bytes: u64,
    supply: Arc<ConstantSupply>,
    source: impl Fn(u64) -> u64,
    cancel: &Cancel,
) -> Result<Duration> {
    let started = Instant::now();
    let options = DraftOptions { overwrite: true, direct: DirectChoice::Auto, ..DraftOptions::default() };
    let mut draft = Draft::create(path, options)?;
    draft.set_len(bytes)?;
    let align = draft.direct_io().alignment();
    run(draft.lane_target()?, supply, align, bytes, source, cancel)?;
    draft.publish()?;
    Ok(started.elapsed())
}

/// Writes a constant over the whole file at `path`, whose blocks exist, durably, and says how long that took.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io), [`Kind::Interrupted`](crate::Kind::Interrupted).
pub fn overwrite(path: &Path, cancel: &Cancel) -> Result<Duration> {
    let failed = |error: rustix::io::Errno| Error::io(format!("cannot write {}", path.display()), error);
    let open = |flags| rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC | flags, Mode::empty());
    // What takes no direct I/O was written without it when it was made, too.
    let direct = open(OFlags::DIRECT).ok().map(File::from);
    let buffered = File::from(open(OFlags::empty()).map_err(failed)?);
    let failed = |error: std::io::Error| Error::io(format!("cannot write {}", path.display()), error);
    let bytes = buffered.metadata().map_err(failed)?.len();
    let durable = buffered.try_clone().map_err(failed)?;
    let constant = constant()?;
    let started = Instant::now();
    run(LaneTarget::files(direct, buffered), constant, GRAIN, bytes, |_| 0, cancel)?;
    durable.sync_all().map_err(failed)?;
    Ok(started.elapsed())
}

/// Reads the whole file at `path` into the slabs of the lanes, past the page cache where that is possible, and says
/// how long that took.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io), [`Kind::Interrupted`](crate::Kind::Interrupted).
pub fn read(path: &Path, cancel: &Cancel) -> Result<Duration> {
    let failed = |error: std::io::Error| Error::io(format!("cannot read {}", path.display()), error);
    let pair = ReadPair::open(path, DirectChoice::Auto).map_err(failed)?;
    let bytes = pair.buffered.metadata().map_err(failed)?.len();
    let align = pair.direct_io.alignment();
    // A device that takes everything and does nothing with it.
    let nowhere = File::options().write(true).open("/dev/null").map_err(failed)?;
    let supply = Arc::new(FileSupply::new(pair.direct, pair.buffered, align, vec![0]));
    let started = Instant::now();
    run(LaneTarget::files(None, nowhere), supply, GRAIN, bytes, |at| at, cancel)?;
    Ok(started.elapsed())
}

/// Fills `bytes` of fresh memory through a userfaultfd from a unix socket, page by page in one thread, as QEMU does in a
/// lazy restore, and says how long that took.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io) where this user may have no userfaultfd, [`Kind::Interrupted`](crate::Kind::Interrupted).
pub fn fill_lazily(bytes: u64, cancel: &Cancel) -> Result<Duration> {
    mem::fill_by_userfaultfd(bytes, cancel).map_err(|error| match error.kind() {
        std::io::ErrorKind::Interrupted => Error::interrupted(),
        _ => Error::io("cannot fill memory through a userfaultfd", error),
    })
}

/// Writes a constant into `bytes` of fresh shared memory, as a restore fills it, and says how long that took: the
/// pages have to be found, and be charged to somebody.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io), [`Kind::Interrupted`](crate::Kind::Interrupted).
pub fn populate(bytes: u64, cancel: &Cancel) -> Result<Duration> {
    let failed = |error: rustix::io::Errno| Error::io("cannot make shared memory", error);
    let memory = rustix::fs::memfd_create("vmstate-ceiling", MemfdFlags::CLOEXEC).map_err(failed)?;
    rustix::fs::ftruncate(&memory, bytes).map_err(failed)?;
    let memory = File::from(memory);
    // To give the memory back takes its time, too; that begins with the last descriptor.
    let target = memory.try_clone().map_err(|error| Error::io("cannot make shared memory", error))?;
    let constant = constant()?;
    let started = Instant::now();
    run(LaneTarget::files(None, target), constant, GRAIN, bytes, |_| 0, cancel)?;
    let took = started.elapsed();
    drop(memory);
    Ok(took)
}

fn constant() -> Result<Arc<ConstantSupply>> {
    let supply = ConstantSupply::new().map_err(|error| Error::io("cannot map a huge page", error))?;
    Ok(Arc::new(supply))
}

/// Has as many lanes as a job has by default move `bytes`, in order; `source` says where in the supply the piece for
/// a place in the target lies.
fn run(
    target: LaneTarget,
    supply: Arc<dyn Supply>,
    align: usize,
    bytes: u64,
    source: impl Fn(u64) -> u64,
    cancel: &Cancel,
) -> Result<()> {
    let settings = LaneSettings { lanes: usize::from(default_channels()), align };
    let lanes = WriteLanes::start(target, supply, settings, Arc::new(Counters::default()), cancel.clone())?;
    for at in (0..bytes).step_by(PIECE) {
        let len = (bytes - at).min(PIECE as u64) as u32;
        let mut mask = [0u64; 4];
        for grain in 0..len.div_ceil(GRAIN as u32) as usize {
            mask[grain / 64] |= 1 << (grain % 64);
        }
        lanes.deal(Piece { region: 0, offset: source(at), target: at, grain: GRAIN as u32, len, mask })?;
    }
    lanes.finish().map_err(Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ODD: u64 = (5 << 20) + 4096 + 77;

    #[test]
    fn a_ceiling_moves_every_byte_it_is_asked_for() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("ceiling");
        let cancel = Cancel::new().unwrap();
        let took = write_fresh(&path, ODD, &cancel).unwrap();
        assert!(took > Duration::ZERO);
        let written = std::fs::read(&path).unwrap();
        assert_eq!(written.len() as u64, ODD);
        // Every piece is the same, and none of its pages is zero.
        for (i, page) in written.chunks(GRAIN).enumerate() {
            assert!(page.iter().any(|byte| *byte != 0), "page {i:#x}");
            let first = (i % (PIECE / GRAIN)) * GRAIN;
            assert_eq!(page, &written[first..first + page.len()], "page {i:#x}");
        }

        write_data(&path, ODD, &Data::new().unwrap(), &cancel).unwrap();
        let written = std::fs::read(&path).unwrap();
        assert_eq!(written.len() as u64, ODD);
        let mut pages: Vec<_> = written.chunks(GRAIN).collect();
        pages.sort_unstable();
        assert!(pages.windows(2).all(|two| two[0] != two[1]), "no two pages are alike");

        std::fs::write(&path, vec![0; ODD as usize]).unwrap();
        overwrite(&path, &cancel).unwrap();
        assert_eq!(std::fs::read(&path).unwrap().len() as u64, ODD);
        assert!(std::fs::read(&path).unwrap()[ODD as usize - 77..].iter().any(|byte| *byte != 0));
        read(&path, &cancel).unwrap();
        populate(ODD, &cancel).unwrap();
        takes_direct_io(directory.path()).unwrap();
        let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn a_ceiling_that_is_cancelled_leaves_no_file() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let cancel = Cancel::new().unwrap();
        cancel.cancel();
        let path = directory.path().join("ceiling");
        assert_eq!(write_fresh(&path, 64 << 20, &cancel).unwrap_err().kind(), crate::Kind::Interrupted);
        assert_eq!(populate(64 << 20, &cancel).unwrap_err().kind(), crate::Kind::Interrupted);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
