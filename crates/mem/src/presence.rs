//! Which bytes of a block are there, found without touching any.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use ::io::Cancel;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::pagemap::{Walker, Way, has_scan};
use crate::peer::Peer;
use crate::walk_ahead::{Gait, WalkAhead};

/// How the presence of private memory is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PagemapMethod {
    /// The fastest that the kernel has.
    #[default]
    Auto,
    /// The PAGEMAP_SCAN ioctl (Linux 6.7 and later): whole runs at a time, without the zero page.
    Scan,
    /// The entries of `/proc/PID/pagemap`: eight bytes for each page of address space.
    Entries,
}

/// A stretch of a peer's memory; both ends are multiples of the host's page size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch {
    pub address: u64,
    pub length: u64,
}

/// The runs of a stretch that are in the peer's page tables or in swap, as byte offsets in the stretch, in order.
/// What lies side by side may be several runs.
///
/// Private anonymous memory that has never been written has no entry in the page tables, or one of the
/// kernel's zero page after it was read; either way it reads as zero. What other memory has where it has no
/// entry depends on its kind.
///
/// Long stretches are walked by several threads, which begin with the first run that is asked for.
pub(crate) struct PageTableRuns {
    peer: Arc<Peer>,
    pagemap: Arc<File>,
    stretch: Stretch,
    way: Way,
    /// How threads walk ahead, where they do.
    gait: Option<Gait>,
    walk: Walk,
    /// The runs in hand, as addresses, and the first that nobody has seen.
    runs: Vec<Range<u64>>,
    taken: usize,
    cancel: Option<Cancel>,
}

enum Walk {
    /// Nobody has asked for a run yet.
    Due,
    /// This thread walks what is left.
    Alone(Walker, Range<u64>),
    /// Others walk ahead of it.
    Ahead(WalkAhead),
    /// The end, or an error, has been told.
    Over,
}

impl PageTableRuns {
    /// Prepares to walk `stretch` of the peer's memory.
    ///
    /// # Errors
    /// What opening pagemap said; `Unsupported` when the kernel lacks the method demanded.
    pub(crate) fn open(
        peer: Arc<Peer>,
        stretch: Stretch,
        method: PagemapMethod,
    ) -> io::Result<PageTableRuns> {
        let pagemap = peer.open_file("pagemap")?;
        let first = stretch.address..stretch.address + stretch.length.min(rustix::param::page_size() as u64);
        let way = match method {
            PagemapMethod::Entries => Way::Entries,
            PagemapMethod::Auto | PagemapMethod::Scan if has_scan(&pagemap, &first)? => Way::Scan,
            PagemapMethod::Auto => Way::Entries,
            PagemapMethod::Scan => {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel has no PAGEMAP_SCAN"));
            }
        };
        Ok(PageTableRuns {
            peer,
            pagemap: Arc::new(pagemap),
            stretch,
            way,
            gait: Gait::of(way, stretch.length),
            walk: Walk::Due,
            runs: Vec::new(),
            taken: 0,
            cancel: None,
        })
    }

    /// A walk that fails with `Interrupted` soon after the switch is thrown, also where it finds nothing for long.
    pub(crate) fn heeding(self, cancel: Option<Cancel>) -> PageTableRuns {
        PageTableRuns { cancel, ..self }
    }

    fn start(&self) -> Walk {
        let addresses = self.stretch.address..self.stretch.address + self.stretch.length;
        let ahead = self.gait.and_then(|gait| {
            WalkAhead::start(&self.pagemap, self.way, &addresses, gait, self.cancel.as_ref())
        });
        match ahead {
            Some(ahead) => Walk::Ahead(ahead),
            None => Walk::Alone(Walker::new(self.pagemap.clone(), self.way), addresses),
        }
    }

    /// Takes more runs in hand; `false` when there are no more.
    fn refill(&mut self) -> io::Result<bool> {
        self.taken = 0;
        self.runs.clear();
        while self.runs.is_empty() && !matches!(self.walk, Walk::Over) {
            if self.cancel.as_ref().is_some_and(Cancel::is_cancelled) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match &mut self.walk {
                Walk::Due => self.walk = self.start(),
                Walk::Alone(_, rest) if rest.is_empty() => return self.end(),
                Walk::Alone(walker, rest) => walker.step(rest, &mut self.runs)?,
                Walk::Ahead(ahead) => match ahead.take()? {
                    Some(runs) => self.runs = runs,
                    None => return self.end(),
                },
                Walk::Over => {}
            }
        }
        Ok(!self.runs.is_empty())
    }

    /// A process that ended has no pages left, which must not pass for a guest full of zeros. Kernels fail the walk
    /// then; nothing documents that they must.
    fn end(&self) -> io::Result<bool> {
        if self.peer.is_alive() { Ok(false) } else { Err(Errno::SRCH.into()) }
    }
}

impl Iterator for PageTableRuns {
    type Item = io::Result<Range<u64>>;

    #[inline]
    fn next(&mut self) -> Option<io::Result<Range<u64>>> {
        if self.taken == self.runs.len() {
            match self.refill() {
                Ok(true) => {}
                Ok(false) => {
                    self.walk = Walk::Over;
                    return None;
                }
                Err(error) => {
                    self.runs.clear();
                    self.walk = Walk::Over;
                    return Some(Err(error));
                }
            }
        }
        let run = &self.runs[self.taken];
        self.taken += 1;
        Some(Ok(run.start - self.stretch.address..run.end - self.stretch.address))
    }
}

/// The runs of a file that have content, as byte offsets in a part of it.
///
/// The file is asked by SEEK_DATA and SEEK_HOLE, which move the position of the description: it must be our
/// own. A swapped page of a memfd counts as data.
pub(crate) struct FileRuns<'a> {
    file: &'a File,
    start: u64,
    rest: Range<u64>,
}

impl<'a> FileRuns<'a> {
    pub(crate) fn new(file: &'a File, start: u64, length: u64) -> FileRuns<'a> {
        FileRuns { file, start, rest: start..start + length }
    }

    fn advance(&mut self) -> io::Result<Option<Range<u64>>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let data = match rustix::fs::seek(self.file, SeekFrom::Data(self.rest.start)) {
            // No data up to the end of the file.
            Err(Errno::NXIO) => return Ok(None),
            found => found?,
        };
        if data >= self.rest.end {
            return Ok(None);
        }
        let hole = match rustix::fs::seek(self.file, SeekFrom::Hole(data)) {
            Err(Errno::NXIO) => self.rest.end,
            found => found?.min(self.rest.end),
        };
        self.rest.start = hole;
        Ok((data < hole).then(|| data - self.start..hole - self.start))
    }
}

impl Iterator for FileRuns<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<io::Result<Range<u64>>> {
        let next = self.advance().transpose();
        if !matches!(next, Some(Ok(_))) {
            self.rest.start = self.rest.end;
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Child, Command, Stdio};

    use page::{PageCount, PageRange, PageSet};
    use proptest::prelude::*;

    use super::*;
    use crate::Reserved;

    const PAGE: u64 = 4096;

    fn gait(threads: usize, chunk_pages: u64, batch_runs: usize) -> Option<Gait> {
        Some(Gait { threads, chunk_bytes: chunk_pages * PAGE, batch_runs })
    }

    fn ourselves() -> Arc<Peer> {
        Arc::new(Peer::open(std::process::id()).unwrap())
    }

    /// A stretch of `pages` pages of this process, of which some are there.
    fn stretch(pages: u64, there: &PageSet) -> (Reserved, Stretch) {
        let mut reserved = Reserved::private(pages * PAGE).unwrap();
        // Advises against huge pages.
        reserved.touch(pages * PAGE, 0).unwrap();
        for run in there.runs() {
            reserved.write(run.start.0 * PAGE..run.end.0 * PAGE);
        }
        let block = reserved.block();
        (reserved, Stretch { address: block.address, length: block.length })
    }

    /// The walks that this kernel has.
    fn walks(peer: &Arc<Peer>, stretch: Stretch, gait: Option<Gait>) -> Vec<PageTableRuns> {
        let open = |method| match PageTableRuns::open(peer.clone(), stretch, method) {
            Ok(runs) => Some(PageTableRuns { gait, ..runs }),
            Err(error) => {
                assert_eq!((method, error.kind()), (PagemapMethod::Scan, io::ErrorKind::Unsupported));
                None
            }
        };
        [PagemapMethod::Scan, PagemapMethod::Entries].into_iter().filter_map(open).collect()
    }

    /// The pages of runs that must be in order and apart.
    fn pages(runs: PageTableRuns, pages: u64) -> PageSet {
        let mut set = PageSet::new(PageCount(pages));
        let mut end = 0;
        for run in runs {
            let run = run.unwrap();
            assert!(end <= run.start && run.start < run.end, "{run:x?} behind {end:#x}");
            end = run.end;
            set.insert(PageRange::new(run.start / PAGE, run.end / PAGE));
        }
        set
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn threads_find_what_one_finds(
            runs in prop::collection::vec((0u64..300, 1u64..40), 0..60),
            tail in 1u64..300,
            threads in 1usize..6,
            chunk_pages in 1u64..200,
            batch_runs in 1usize..20,
        ) {
            let count = runs.iter().map(|(gap, length)| gap + length).sum::<u64>() + tail;
            let mut there = PageSet::new(PageCount(count));
            let mut at = 0;
            for (gap, length) in runs {
                there.insert(PageRange::new(at + gap, at + gap + length));
                at += gap + length;
            }
            let (_reserved, stretch) = stretch(count, &there);
            let peer = ourselves();
            let gait = gait(threads, chunk_pages, batch_runs);
            for (alone, ahead) in walks(&peer, stretch, None).into_iter().zip(walks(&peer, stretch, gait)) {
                let way = ahead.way;
                prop_assert_eq!(pages(alone, count).runs().collect::<Vec<_>>(), there.runs().collect::<Vec<_>>());
                prop_assert!(pages(ahead, count) == there, "{:?}", way);
            }
        }
    }

    /// 64 Ki pages of which every fourth is there: more than is found ahead of anybody by any of the tests' gaits, more
    /// than one call asks about and more than one call answers.
    fn striped() -> (PageSet, Reserved, Stretch) {
        let mut there = PageSet::new(PageCount(1 << 16));
        for page in (0..1 << 16).step_by(4) {
            there.insert(PageRange::new(page, page + 1));
        }
        let (reserved, stretch) = stretch(1 << 16, &there);
        (there, reserved, stretch)
    }

    #[test]
    fn what_takes_many_calls_is_found_once_and_in_order() {
        let (there, _reserved, stretch) = striped();
        let ahead = [1, 5000, usize::MAX].map(|batch_runs| gait(2, 40_000, batch_runs));
        for gait in [None].into_iter().chain(ahead) {
            for runs in walks(&ourselves(), stretch, gait) {
                let way = runs.way;
                assert!(pages(runs, 1 << 16) == there, "{way:?}, {gait:?}");
            }
        }
    }

    #[test]
    fn the_switch_ends_threads_that_walk_ahead() {
        let (_there, _reserved, stretch) = striped();
        for runs in walks(&ourselves(), stretch, gait(3, 64, 8)) {
            let cancel = Cancel::new().unwrap();
            let mut runs = runs.heeding(Some(cancel.clone()));
            assert_eq!(runs.next().unwrap().unwrap(), 0..PAGE);
            cancel.cancel();
            let error = runs.find_map(Result::err).expect("more was there than is found ahead");
            assert_eq!(error.kind(), io::ErrorKind::Interrupted);
            assert!(runs.next().is_none());
        }
        // And one that looks for itself, where whoever takes the runs does not look.
        let pagemap = Arc::new(ourselves().open_file("pagemap").unwrap());
        let cancel = Cancel::new().unwrap();
        cancel.cancel();
        let addresses = stretch.address..stretch.address + stretch.length;
        let gait = gait(3, 64, 8).unwrap();
        let mut ahead = WalkAhead::start(&pagemap, Way::Entries, &addresses, gait, Some(&cancel)).unwrap();
        assert_eq!(ahead.take().unwrap_err().kind(), io::ErrorKind::Interrupted);
    }

    #[test]
    fn a_walk_that_is_dropped_leaves_no_thread() {
        let (_there, _reserved, stretch) = striped();
        for mut runs in walks(&ourselves(), stretch, gait(3, 64, 8)) {
            let pagemap = Arc::downgrade(&runs.pagemap);
            assert_eq!(pagemap.strong_count(), 1, "nobody walks before a run is asked for");
            assert_eq!(runs.next().unwrap().unwrap(), 0..PAGE);
            assert!(pagemap.strong_count() > 1, "threads have it");
            drop(runs);
            assert_eq!(pagemap.strong_count(), 0, "a thread has it still");
        }
    }

    #[test]
    fn threads_are_for_long_stretches() {
        let processors = std::thread::available_parallelism().unwrap().get();
        for (way, least) in [(Way::Scan, 64u64 << 30), (Way::Entries, 16 << 30)] {
            assert!(Gait::of(way, least - PAGE).is_none());
            let threads = Gait::of(way, least).map_or(1, |gait| gait.threads);
            assert_eq!(threads, processors.min(4), "{way:?}");
        }
    }

    /// A process that has begun and waits for its input to end.
    struct Idle(Child);

    impl Idle {
        fn start() -> Idle {
            let mut command = Command::new("cat");
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("cat");
            child.stdin.as_mut().unwrap().write_all(b"!").unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            Idle(child)
        }
    }

    impl Drop for Idle {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_that_ends_under_threads_is_an_error_and_no_empty_memory() {
        for way in 0..2 {
            for takes_one in [true, false] {
                let idle = Idle::start();
                let peer = Arc::new(Peer::open(idle.0.id()).unwrap());
                // Its program and what follows: many more chunks than are walked ahead.
                let address = peer.mappings().unwrap().as_slice()[0].start;
                let stretch = Stretch { address, length: 1 << 30 };
                let Some(mut runs) = walks(&peer, stretch, gait(3, 64, 8)).into_iter().nth(way) else {
                    continue;
                };
                if takes_one {
                    runs.next().unwrap().unwrap();
                }
                drop(idle);
                let error = runs.find_map(Result::err).expect("the process has ended");
                let is_of_it =
                    error.raw_os_error() == Some(libc::ESRCH) || error.kind() == io::ErrorKind::UnexpectedEof;
                assert!(is_of_it, "{error:?}");
            }
        }
    }
}
