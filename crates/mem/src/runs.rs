//! Which bytes of a block are there, by the rule of each kind of memory.

use std::io;
use std::iter::Peekable;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::fstat;

use crate::file::{BackingFile, Medium};
use crate::peer::{Peer, PeerError};
use crate::presence::{FileRuns, PageTableRuns, PagemapMethod, Stretch};

/// Ordered runs of bytes in a block.
pub(crate) type Runs<'a> = Box<dyn Iterator<Item = io::Result<Range<u64>>> + Send + 'a>;

/// The unit of `st_blocks`, in bytes.
const STAT_BLOCK: u64 = 512;

/// The runs of a block of `length` bytes that is a shared mapping of `file`.
pub(crate) fn shared_runs<'a>(
    peer: &Arc<Peer>,
    file: &'a BackingFile,
    length: u64,
    method: PagemapMethod,
) -> io::Result<Runs<'a>> {
    match file.medium() {
        Medium::HugePages { page_bytes } => match huge_pages(peer, file, page_bytes, method)? {
            Some(pages) => {
                let start = file.part().offset;
                let run = move |page: u64| {
                    let (from, to) = (page * page_bytes, (page + 1) * page_bytes);
                    (to > start && from < start + length)
                        .then(|| Ok(from.max(start) - start..to.min(start + length) - start))
                };
                Ok(Box::new(pages.into_iter().filter_map(run)))
            }
            None => Ok(whole(length)),
        },
        Medium::Shmem | Medium::Disk | Medium::Other { .. } => unmapped_runs(file, length),
    }
}

/// The runs of a block of `length` bytes that the file itself has, as far as the file tells without the page
/// tables of anybody.
pub(crate) fn unmapped_runs(file: &BackingFile, length: u64) -> io::Result<Runs<'_>> {
    match file.medium() {
        Medium::Shmem | Medium::Disk => Ok(Box::new(FileRuns::new(file.file(), file.part().offset, length))),
        // Nobody has ever written to a file without pages.
        Medium::HugePages { .. } if allocated_bytes(file)? == 0 => Ok(Box::new(std::iter::empty())),
        // SEEK_DATA says that all of a hugetlbfs file is data. Of other file systems it is not known whether they
        // count a page that was written through a mapping. To read a hole of a file allocates nothing.
        Medium::HugePages { .. } | Medium::Other { .. } => Ok(whole(length)),
    }
}

fn whole(length: u64) -> Runs<'static> {
    Box::new(std::iter::once(Ok(0..length)))
}

/// The pages of a file on hugetlbfs, ordered, as multiples of their size in the file; `None` if they cannot be
/// told.
///
/// The page tables of the peer may lack pages that another process put into the file (mincore on a mapping of our
/// own sees only what we touched ourselves, and cachestat refuses). But the kernel counts the pages of the file
/// in `st_blocks`: when the peer's page tables have as many, they have all of them. The count is read last, so a
/// page added meanwhile makes it larger.
fn huge_pages(
    peer: &Arc<Peer>,
    file: &BackingFile,
    page_bytes: u64,
    method: PagemapMethod,
) -> io::Result<Option<Vec<u64>>> {
    let part = file.part();
    let mappings = peer.mappings().map_err(into_io)?;
    let mut pages = Vec::new();
    for mapping in mappings.as_slice() {
        if !mapping.is_shared || (mapping.device, mapping.inode) != (part.device, part.inode) {
            continue;
        }
        let stretch = Stretch { address: mapping.start, length: mapping.end - mapping.start };
        for run in PageTableRuns::open(peer.clone(), stretch, method)? {
            let run = run?;
            let (from, to) = (mapping.offset + run.start, mapping.offset + run.end);
            pages.extend(from / page_bytes..to.div_ceil(page_bytes));
        }
    }
    // A part of the file may be mapped more than once.
    pages.sort_unstable();
    pages.dedup();
    let is_all = allocated_bytes(file)? == pages.len() as u64 * page_bytes;
    Ok(is_all.then_some(pages))
}

fn allocated_bytes(file: &BackingFile) -> io::Result<u64> {
    Ok(u64::try_from(fstat(file.file())?.st_blocks).unwrap_or(0) * STAT_BLOCK)
}

fn into_io(error: PeerError) -> io::Error {
    match error {
        PeerError::Io { source, .. } => source,
        error => io::Error::other(error),
    }
}

/// Two ordered streams of runs as one, in which what overlaps or touches is one run.
pub(crate) struct Union<A: Iterator, B: Iterator> {
    one: Peekable<A>,
    other: Peekable<B>,
}

impl<A, B> Union<A, B>
where
    A: Iterator<Item = io::Result<Range<u64>>>,
    B: Iterator<Item = io::Result<Range<u64>>>,
{
    pub(crate) fn new(one: A, other: B) -> Union<A, B> {
        Union { one: one.peekable(), other: other.peekable() }
    }

    /// The run that starts first, if it starts at `limit` or before.
    fn take_before(&mut self, limit: u64) -> Option<io::Result<Range<u64>>> {
        // An error comes before everything.
        let start = |next: Option<&io::Result<Range<u64>>>| match next {
            Some(Ok(run)) => Some(run.start),
            Some(Err(_)) => Some(0),
            None => None,
        };
        match (start(self.one.peek()), start(self.other.peek())) {
            (Some(one), other) if one <= limit && other.is_none_or(|other| one <= other) => self.one.next(),
            (_, Some(other)) if other <= limit => self.other.next(),
            _ => None,
        }
    }
}

impl<A, B> Iterator for Union<A, B>
where
    A: Iterator<Item = io::Result<Range<u64>>>,
    B: Iterator<Item = io::Result<Range<u64>>>,
{
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<io::Result<Range<u64>>> {
        let mut run = match self.take_before(u64::MAX)? {
            Ok(run) => run,
            Err(error) => return Some(Err(error)),
        };
        while let Some(more) = self.take_before(run.end) {
            match more {
                Ok(more) => run.end = run.end.max(more.end),
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(run))
    }
}

#[cfg(test)]
mod tests {
    use page::{PageCount, PageRange, PageSet};
    use proptest::prelude::*;

    use super::*;

    fn runs(pairs: &[(u64, u64)]) -> impl Iterator<Item = io::Result<Range<u64>>> {
        pairs.iter().map(|&(start, end)| Ok(start..end))
    }

    fn union(one: &[(u64, u64)], other: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let run = |run: io::Result<Range<u64>>| run.map(|run| (run.start, run.end)).expect("no run failed");
        Union::new(runs(one), runs(other)).map(run).collect()
    }

    #[test]
    fn runs_that_overlap_or_touch_are_one() {
        for (one, other, expected) in [
            (vec![], vec![], vec![]),
            (vec![(1, 2)], vec![], vec![(1, 2)]),
            (vec![], vec![(0, 2), (3, 4)], vec![(0, 2), (3, 4)]),
            (vec![(0, 4), (8, 9)], vec![(2, 8)], vec![(0, 9)]),
            (vec![(0, 100)], vec![(1, 2), (5, 6), (101, 102)], vec![(0, 100), (101, 102)]),
            (vec![(4, 5)], vec![(1, 2)], vec![(1, 2), (4, 5)]),
        ] {
            assert_eq!(union(&one, &other), expected, "{one:?} and {other:?}");
            assert_eq!(union(&other, &one), expected, "{other:?} and {one:?}");
        }
    }

    #[test]
    fn an_error_of_either_stream_is_never_swallowed() {
        for fails_first in [true, false] {
            let failing = [Ok(0..1), Err(io::Error::other("gone"))];
            let sound = [Ok(0..9), Ok(20..30)];
            let (one, other) = if fails_first { (failing, sound) } else { (sound, failing) };
            let mut union = Union::new(one.into_iter(), other.into_iter());
            let error = union.find_map(Result::err).expect("the error");
            assert_eq!(error.to_string(), "gone");
        }
    }

    proptest! {
        #[test]
        fn a_union_has_the_bytes_of_both(
            one in prop::collection::vec((0u64..20, 1u64..20), 0..20),
            other in prop::collection::vec((0u64..20, 1u64..20), 0..20),
        ) {
            let lay = |gaps: Vec<(u64, u64)>| {
                let mut at = 0;
                let lay = |(gap, len)| {
                    let run = (at + gap, at + gap + len);
                    at = run.1;
                    run
                };
                gaps.into_iter().map(lay).collect::<Vec<_>>()
            };
            let (one, other) = (lay(one), lay(other));
            let mut expected = PageSet::new(PageCount(1000));
            for &(start, end) in one.iter().chain(&other) {
                expected.insert(PageRange::new(start, end));
            }
            let expected: Vec<_> = expected.runs().map(|run| (run.start.0, run.end.0)).collect();
            prop_assert_eq!(union(&one, &other), expected);
        }
    }
}
