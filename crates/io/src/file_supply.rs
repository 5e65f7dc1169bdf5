//! Pieces whose bytes come from a file: the way back, from an image into memory that has a file of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::supply::{Piece, Scratch, Supplied, Supply, runs};

/// A file of which every region is a part. What is read goes through the lane's scratch.
#[derive(Debug)]
pub struct FileSupply {
    direct: Option<File>,
    buffered: File,
    align: usize,
    /// Where in the file each region begins.
    starts: Vec<u64>,
}

impl FileSupply {
    /// The regions that begin at `starts` of a file that was opened with O_DIRECT, if that is wanted, and
    /// without. Direct reads are aligned to `align`, a power of two, as [`crate::DirectIo::alignment`] has it.
    ///
    /// # Panics
    /// When `align` is no power of two.
    pub fn new(direct: Option<File>, buffered: File, align: usize, starts: Vec<u64>) -> FileSupply {
        assert!(align.is_power_of_two(), "reads aligned to {align:#x} bytes");
        FileSupply { direct, buffered, align, starts }
    }

    /// Whether it is read past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// What is read past the page cache.
    pub(crate) fn direct(&self) -> Option<BorrowedFd<'_>> {
        self.direct.as_ref().map(AsFd::as_fd)
    }

    /// Whether such a read can be direct.
    pub(crate) fn is_aligned(&self, local: *const u8, len: usize, offset: u64) -> bool {
        // A length is a usize, and so is an address; no shipped target has one of more than 64 bits.
        (local.addr() | len).is_multiple_of(self.align) && offset.is_multiple_of(self.align as u64)
    }

    /// Where in the file the byte `from` of a piece is.
    ///
    /// # Errors
    /// `InvalidInput` when there is no such region, or no such offset in any file.
    pub(crate) fn offset_of(&self, piece: &Piece, from: usize) -> io::Result<u64> {
        let start = self.starts.get(piece.region as usize).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = start.checked_add(piece.offset).and_then(|at| at.checked_add(from as u64));
        offset.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Fills `len` bytes at `local` from the file offset `offset`.
    ///
    /// # Safety
    /// `local..local + len` must be mapped, writable and this call's alone.
    pub(crate) unsafe fn read(&self, local: *mut u8, len: usize, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let (at, rest) = (offset + done as u64, len - done);
            let target = local.wrapping_add(done);
            // What is misaligned, an odd end or what follows a short read, goes through the page cache.
            let file = match &self.direct {
                Some(direct) if self.is_aligned(target, rest, at) => direct,
                _ => &self.buffered,
            };
            let position =
                libc::off_t::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            // SAFETY: `target` is what is left of the range that the caller gave up to this call.
            let read = unsafe { libc::pread(file.as_raw_fd(), target.cast(), rest, position) };
            match usize::try_from(read) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }
}

// SAFETY: the bytes lie in the lane's own scratch, which the lane keeps until it asks for its next piece, and
// every grain that is named was filled by then.
unsafe impl Supply for FileSupply {
    fn supply(&self, piece: &Piece, scratch: &mut Scratch) -> io::Result<Supplied> {
        scratch.reserve(piece.len as usize)?;
        let base = scratch.as_mut_ptr();
        for (first, last) in runs(piece.mask) {
            let (from, to) = piece.bytes_of(first, last);
            let offset = self.offset_of(piece, from)?;
            // SAFETY: a piece's bytes end at its length, for which the scratch was reserved above.
            unsafe { self.read(base.wrapping_add(from), to - from, offset) }?;
        }
        Ok(Supplied { base, write: piece.mask })
    }

    fn as_file(&self) -> Option<&FileSupply> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use crate::{
        Cancel, Counters, DirectChoice, EngineChoice, LaneError, LaneOptions, LaneSettings, LaneTarget,
        ReadPair, WriteLanes,
    };

    const GRAIN: usize = 4096;

    #[test]
    fn marked_grains_arrive_and_others_stay_holes() {
        let both = [EngineChoice::Auto, EngineChoice::Threads];
        let directs = [DirectChoice::Auto, DirectChoice::Off];
        for (direct, engine) in directs.into_iter().flat_map(|direct| both.map(|engine| (direct, engine))) {
            let source = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let bytes: Vec<u8> = (0..64 * GRAIN + 100).map(|i| (i / GRAIN + i) as u8).collect();
            // The region begins amid a unit of direct I/O, so that some reads cannot be direct.
            for start in [0u64, 1 << 20, 512] {
                source.as_file().write_all_at(&bytes, start).unwrap();
                let pair = ReadPair::open(source.path(), direct).unwrap();
                let align = pair.direct_io.alignment();
                let supply = FileSupply::new(pair.direct, pair.buffered, align, vec![start]);
                let target = tempfile::tempfile().unwrap();
                target.set_len(bytes.len() as u64).unwrap();
                let lanes = WriteLanes::start_with(
                    LaneTarget::files(None, target.try_clone().unwrap()),
                    Arc::new(supply),
                    LaneSettings { lanes: 2, align: 4096 },
                    LaneOptions { engine, ..LaneOptions::default() },
                    Arc::new(Counters::default()),
                    Cancel::new().unwrap(),
                )
                .unwrap();
                let mask = [0b1011 | 1 << 63, 1, 0, 0];
                lanes
                    .deal(Piece {
                        region: 0,
                        offset: 0,
                        target: 0,
                        grain: GRAIN as u32,
                        len: bytes.len() as u32,
                        mask,
                    })
                    .unwrap();
                lanes.finish().unwrap();
                let mut arrived = vec![0; bytes.len()];
                target.read_exact_at(&mut arrived, 0).unwrap();
                for (i, byte) in arrived.iter().enumerate() {
                    let wanted = mask[i / GRAIN / 64] >> (i / GRAIN % 64) & 1 == 1;
                    let wanted = if wanted { bytes[i] } else { 0 };
                    assert_eq!(*byte, wanted, "byte {i:#x}, start {start:#x}, {direct:?} {engine:?}");
                }
            }
        }
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let source = tempfile::tempfile().unwrap();
        source.set_len(100).unwrap();
        let supply = FileSupply::new(None, source, 4096, vec![0]);
        let piece =
            Piece { region: 0, offset: 0, target: 0, grain: GRAIN as u32, len: 4096, mask: [1, 0, 0, 0] };
        let mut scratch = Scratch::new(4096).unwrap();
        assert_eq!(supply.supply(&piece, &mut scratch).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let beyond = Piece { region: 1, ..piece };
        assert_eq!(supply.supply(&beyond, &mut scratch).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_file_that_ends_amid_a_read_fails_the_lanes_with_the_place() {
        for engine in [EngineChoice::Auto, EngineChoice::Threads] {
            let source = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            source.as_file().set_len((1 << 20) + (512 << 10)).unwrap();
            let pair = ReadPair::open(source.path(), DirectChoice::Auto).unwrap();
            let align = pair.direct_io.alignment();
            let supply = FileSupply::new(pair.direct, pair.buffered, align, vec![0]);
            let lanes = WriteLanes::start_with(
                LaneTarget::files(None, tempfile::tempfile().unwrap()),
                Arc::new(supply),
                LaneSettings { lanes: 1, align: 4096 },
                LaneOptions { engine, ..LaneOptions::default() },
                Arc::new(Counters::default()),
                Cancel::new().unwrap(),
            )
            .unwrap();
            let piece = |offset| Piece {
                region: 0,
                offset,
                target: offset,
                grain: GRAIN as u32,
                len: 1 << 20,
                mask: [u64::MAX; 4],
            };
            lanes.deal(piece(0)).unwrap();
            lanes.deal(piece(1 << 20)).unwrap();
            let LaneError::Supply { region: 0, offset, source } = lanes.finish().unwrap_err() else {
                panic!("{engine:?}")
            };
            assert_eq!((offset, source.kind()), (1 << 20, io::ErrorKind::UnexpectedEof), "{engine:?}");
        }
    }
}
