//! Stretches of memory on their way to a file, and what stops them.

use std::io;
use std::sync::Arc;

use super::LaneError;

/// Raw memory and the place in the file it goes to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub base: *const u8,
    pub len: usize,
    pub offset: u64,
    pub region: u32,
}

impl Span {
    /// The first `at` bytes, `at` being no more than there are, and the rest.
    pub(super) fn split_at(self, at: usize) -> (Span, Span) {
        let rest = Span {
            base: self.base.wrapping_add(at),
            len: self.len - at,
            offset: self.offset + at as u64,
            region: self.region,
        };
        (Span { len: at, ..self }, rest)
    }
}

/// The lengths of the unaligned head and of the aligned middle of a span; the middle is empty where memory
/// and file do not meet at the same alignment.
pub(super) fn aligned_middle(address: usize, offset: u64, len: usize, align: usize) -> (usize, usize) {
    // The remainder of a division by a usize fits one.
    let past = (offset % align as u64) as usize;
    if address % align != past {
        return (0, 0);
    }
    let head = (align - past) % align;
    match len.checked_sub(head) {
        Some(rest) => (head, rest - rest % align),
        None => (0, 0),
    }
}

/// Why a write call got nowhere.
pub(super) enum Stop {
    Cancelled,
    Failed(io::Error),
}

impl Stop {
    pub(super) fn at(self, span: &Span) -> LaneError {
        match self {
            Stop::Cancelled => LaneError::Cancelled,
            Stop::Failed(source) => LaneError::Write {
                region: span.region,
                offset: span.offset,
                len: span.len,
                source: Arc::new(source),
            },
        }
    }

    pub(super) fn at_direct(self, span: &Span) -> LaneError {
        match self {
            Stop::Failed(source) if source.raw_os_error() == Some(libc::EINVAL) => LaneError::DirectRefused {
                region: span.region,
                offset: span.offset,
                len: span.len,
                source: Arc::new(source),
            },
            other => other.at(span),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_aligned_in_memory_and_file_is_direct() {
        for (address, offset, len, expected) in [
            (0x10000, 0x10000, 0x3000, (0, 0x3000)),
            (0x10000, 0x10000, 0x3005, (0, 0x3000)),
            (0x10200, 0x20200, 0x3000, (0xe00, 0x2000)),
            (0x10200, 0x20200, 0xdff, (0, 0)),
            (0x10200, 0x20200, 0xe00, (0xe00, 0)),
            (0x10000, 0x10200, 0x3000, (0, 0)),
            (0x10000, 0x10000, 0, (0, 0)),
        ] {
            assert_eq!(
                aligned_middle(address, offset, len, 4096),
                expected,
                "{address:#x} {offset:#x} {len:#x}"
            );
        }
    }
}
