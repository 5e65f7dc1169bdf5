//! Which parts of a file have blocks on the disk, asked of the file system and never read.

use std::fs::File;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use wire::{Fault, FileRange};

/// The most device state and vmdescription together that is read into memory.
pub(crate) const TAIL_LEN_MAX: u64 = 1 << 30;
/// To find the end of an extent of this length takes tmpfs half a millisecond: it looks at every page.
const LONG: u64 = 64 << 20;
/// How many long extents are remembered.
const LONG_MAX: usize = 64;
/// Above this, metadata must be on the disk to be read: a hole costs whoever made the file nothing, and
/// would cost us memory.
pub(super) const DENSE_ABOVE: u64 = 16 << 20;

/// Says why a range of metadata is not to be read into memory: it is longer than any device state that vmstate
/// handles, or it is mostly a hole, as no writer leaves it.
pub(crate) fn unreadable(file: &File, file_len: u64, range: FileRange) -> Option<Fault> {
    let len = range.len();
    if len > TAIL_LEN_MAX {
        let problem = format!("{len:#x} bytes are more than {TAIL_LEN_MAX:#x}");
        return Some(Fault::unsupported(range.start, "device state", problem));
    }
    if len > DENSE_ABOVE && FileExtents::new(file, file_len).data_bytes(range) < len / 2 {
        let problem = format!("most of its {len:#x} bytes are a hole of the file");
        return Some(Fault::damaged(range.start, "device state", problem));
    }
    None
}

/// The data and holes of a file, remembered an extent at a time so that neighbouring questions cost one
/// system call together.
#[derive(Debug)]
pub struct FileExtents<'a> {
    file: &'a File,
    len: u64,
    /// The extent asked about last: `start..end`, and whether it is data.
    last: (u64, u64, bool),
    long: LongExtents,
}

/// Where long extents of data are, for whoever goes through a file twice.
#[derive(Clone, Debug, Default)]
pub struct LongExtents(Vec<Range<u64>>);

impl<'a> FileExtents<'a> {
    /// The extents of `file`, which has `len` bytes.
    pub fn new(file: &'a File, len: u64) -> FileExtents<'a> {
        FileExtents { file, len, last: (0, 0, false), long: LongExtents::default() }
    }

    /// The same of a file that has not changed since these were found.
    pub fn again(file: &'a File, len: u64, long: LongExtents) -> FileExtents<'a> {
        FileExtents { long, ..FileExtents::new(file, len) }
    }

    /// What need not be asked again.
    pub fn into_long(self) -> LongExtents {
        self.long
    }

    /// The extent that `offset` lies in: where it ends, and whether it is data. A file system that does not
    /// tell has data everywhere.
    pub fn at(&mut self, offset: u64) -> (u64, bool) {
        let (start, end, _) = self.last;
        if !(start..end).contains(&offset) {
            self.last = match self.long.0.iter().find(|extent| extent.contains(&offset)) {
                Some(extent) => (extent.start, extent.end, true),
                None => self.ask(offset),
            };
            let (start, end, is_data) = self.last;
            if is_data && end - start >= LONG && self.long.0.len() < LONG_MAX {
                self.long.0.push(start..end);
            }
        }
        (self.last.1, self.last.2)
    }

    fn ask(&self, offset: u64) -> (u64, u64, bool) {
        match seek(self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => (offset, data, false),
            Ok(_) => {
                // Every file has a hole at its end, at the latest.
                let end = seek(self.file, SeekFrom::Hole(offset)).unwrap_or(self.len);
                (offset, end.max(offset + 1), true)
            }
            Err(Errno::NXIO) => (offset, self.len.max(offset + 1), false),
            Err(_) => (offset, self.len.max(offset + 1), true),
        }
    }

    /// How many bytes of `range` are data.
    pub fn data_bytes(&mut self, range: FileRange) -> u64 {
        let mut at = range.start;
        let mut sum = 0;
        while at < range.end {
            let (end, is_data) = self.at(at);
            let end = end.min(range.end);
            if is_data {
                sum += end - at;
            }
            at = end;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_long_hole_is_not_read_and_what_is_written_is() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let len = 64 << 20;
        file.set_len(len).unwrap();
        file.write_all_at(&vec![1; 20 << 20], 0).unwrap();
        let why =
            |start, end| unreadable(&file, len, FileRange { start, end }).map(|fault| fault.to_string());
        assert_eq!(why(0, 20 << 20), None);
        assert_eq!(why(60 << 20, 64 << 20), None, "short ones cost little");
        assert_eq!(
            why(0, 64 << 20).as_deref(),
            Some("device state at 0x0: most of its 0x4000000 bytes are a hole of the file")
        );
        let beyond = FileRange { start: 0, end: TAIL_LEN_MAX + 1 };
        assert!(unreadable(&file, len, beyond).is_some());
    }

    #[test]
    fn a_long_extent_is_not_asked_for_again() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (len, end) = (LONG + (8 << 20), LONG + (1 << 20));
        file.set_len(len).unwrap();
        file.write_all_at(&vec![1; end as usize], 0).unwrap();
        let mut extents = FileExtents::new(&file, len);
        assert_eq!([extents.at(0), extents.at(end)], [(end, true), (len, false)]);
        // Nothing would be told of an empty file any more.
        let empty = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut again = FileExtents::again(&empty, len, extents.into_long());
        assert_eq!([again.at(end - 1), again.at(end), again.at(0)], [(end, true), (len, false), (end, true)]);
    }

    #[test]
    fn holes_are_told_from_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 8 << 20).unwrap();
        let mut extents = FileExtents::new(&file, 16 << 20);
        let mut data = |start: u64, end: u64| extents.data_bytes(FileRange { start, end });
        assert_eq!(data(0, 16 << 20), 8192);
        assert_eq!(data(1 << 20, (1 << 20) + 4096), 4096);
        assert_eq!(data(2 << 20, 8 << 20), 0);
        assert_eq!(data(8 << 20, 16 << 20), 4096);
    }
}
