//! A half-open range of bytes of a file.

use std::fmt;

/// The bytes `start..end` of a file, by absolute offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct FileRange {
    /// The offset of the first byte.
    pub start: u64,
    /// The offset after the last byte; never below `start`.
    pub end: u64,
}

impl FileRange {
    /// The range `start..end`.
    ///
    /// # Panics
    /// When `end` lies before `start`.
    pub const fn new(start: u64, end: u64) -> FileRange {
        assert!(start <= end, "a file range ends before it starts");
        FileRange { start, end }
    }

    /// The `len` bytes from `start`, or `None` where the end is no file offset (beyond `i64::MAX`).
    pub const fn of_len(start: u64, len: u64) -> Option<FileRange> {
        match start.checked_add(len) {
            Some(end) if end <= i64::MAX as u64 => Some(FileRange { start, end }),
            _ => None,
        }
    }

    /// How many bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether it holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether the two share a byte.
    pub const fn overlaps(self, other: FileRange) -> bool {
        !self.is_empty() && !other.is_empty() && self.start < other.end && other.start < self.end
    }

    /// Whether every byte of `other` is in it.
    pub const fn contains(self, other: FileRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

impl fmt::Display for FileRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_only_touch_do_not_overlap() {
        for (a, b, expected) in [
            ((0, 4), (4, 8), false),
            ((0, 5), (4, 8), true),
            ((4, 8), (0, 5), true),
            ((2, 3), (0, 8), true),
            ((3, 3), (0, 8), false),
        ] {
            let (left, right) = (FileRange::new(a.0, a.1), FileRange::new(b.0, b.1));
            assert_eq!(left.overlaps(right), expected, "{left} {right}");
            assert_eq!(right.overlaps(left), expected, "{right} {left}");
        }
    }

    #[test]
    fn a_range_ends_at_a_file_offset_or_is_none() {
        let last = i64::MAX as u64;
        assert_eq!(FileRange::of_len(last - 1, 1), Some(FileRange::new(last - 1, last)));
        assert_eq!(FileRange::of_len(last, 1), None);
        assert_eq!(FileRange::of_len(u64::MAX, 1), None);
    }
}
