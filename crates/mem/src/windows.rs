//! From byte runs to windows of pages, in a stream.

use std::io;
use std::ops::Range;

use page::{Mask, PageIndex, PageSize, WINDOW_PAGES, Window};

/// Turns ordered byte runs of a block into the windows that they touch, one at a time.
///
/// The memory it takes does not depend on the block: there is one run and one window in hand.
#[derive(Debug)]
pub struct Windows<R> {
    runs: R,
    page_size: PageSize,
    pages: u64,
    /// Pages of the run in hand that are not in a window yet.
    rest: Range<u64>,
    /// The window in hand, to which the next run may add.
    window: Option<Window>,
    is_over: bool,
}

impl<R: Iterator<Item = io::Result<Range<u64>>>> Windows<R> {
    /// The windows of a block of `length` bytes of which `runs` are there. The runs are byte offsets in the
    /// block, in order and apart; what they say beyond the block is left out.
    pub fn new(runs: R, page_size: PageSize, length: u64) -> Windows<R> {
        let pages = page_size.pages_of(length).0;
        Windows { runs, page_size, pages, rest: 0..0, window: None, is_over: false }
    }

    /// Takes the next run in hand; `false` when there is none.
    fn take_run(&mut self) -> io::Result<bool> {
        match self.runs.next() {
            None => Ok(false),
            Some(run) => {
                let run = run?;
                let start = run.start >> self.page_size.shift();
                self.rest = start.min(self.pages)..self.page_size.pages_of(run.end).0.min(self.pages);
                Ok(true)
            }
        }
    }

    /// Puts as much of the run as fits into the window in hand, which is returned when it is complete.
    fn fill(&mut self) -> Option<Window> {
        let first = self.rest.start - self.rest.start % WINDOW_PAGES;
        if self.window.is_some_and(|window| window.first.0 != first) {
            return self.window.take();
        }
        let window = self.window.get_or_insert(Window { first: PageIndex(first), mask: Mask::EMPTY });
        let end = self.rest.end.min(first + WINDOW_PAGES);
        // Both are within 256 of `first`.
        window.mask.insert_range((self.rest.start - first) as usize, (end - first) as usize);
        self.rest.start = end;
        None
    }
}

impl<R: Iterator<Item = io::Result<Range<u64>>>> Iterator for Windows<R> {
    type Item = io::Result<Window>;

    fn next(&mut self) -> Option<io::Result<Window>> {
        while !self.is_over {
            if !self.rest.is_empty() {
                if let Some(window) = self.fill() {
                    return Some(Ok(window));
                }
                continue;
            }
            match self.take_run() {
                Ok(true) => {}
                Ok(false) => self.is_over = true,
                Err(error) => {
                    // The window in hand is incomplete and must not be taken for the truth.
                    self.is_over = true;
                    self.window = None;
                    return Some(Err(error));
                }
            }
        }
        self.window.take().map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use page::{PageCount, PageRange, PageSet};
    use proptest::prelude::*;

    use super::*;

    fn windows(runs: &[(u64, u64)], length: u64) -> Vec<Window> {
        let runs = runs.iter().map(|&(start, end)| Ok(start..end));
        Windows::new(runs, PageSize::X86, length).map(|window| window.expect("no run failed")).collect()
    }

    #[test]
    fn an_odd_tail_is_a_page_and_nothing_lies_beyond() {
        let found = windows(&[(0x2000, 0x10_0000)], 0x2801);
        assert_eq!(found, [Window { first: PageIndex(0), mask: Mask::range(2, 3) }]);
        assert_eq!(windows(&[(0x4000, 0x5000)], 0x2801), []);
        assert_eq!(windows(&[(0, 0x1000)], 0), []);
    }

    #[test]
    fn a_failed_run_ends_the_stream_without_a_half_window() {
        let runs = [Ok(0..0x1000), Err(io::Error::other("gone")), Ok(0x2000..0x3000)];
        let mut windows = Windows::new(runs.into_iter(), PageSize::X86, 0x10000);
        assert_eq!(windows.next().expect("the error").expect_err("an error").to_string(), "gone");
        assert!(windows.next().is_none());
    }

    proptest! {
        #[test]
        fn windows_say_what_the_runs_said(
            gaps in prop::collection::vec((1u64..700, 1u64..700), 0..20),
            pages in 1u64..5000,
        ) {
            let mut expected = PageSet::new(PageCount(pages));
            let mut runs = Vec::new();
            let mut at = 0;
            for (gap, len) in gaps {
                let (start, end) = (at + gap, at + gap + len);
                at = end;
                expected.insert(PageRange::new(start.min(pages), end.min(pages)));
                runs.push((start * 4096, end * 4096));
            }
            let found = windows(&runs, pages * 4096);
            prop_assert_eq!(found, expected.windows().collect::<Vec<_>>());
        }
    }
}
