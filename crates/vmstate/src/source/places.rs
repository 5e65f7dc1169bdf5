//! Where an image has the pages of a block: in the file, as zero, or not at all.

use std::collections::BTreeMap;

use page::{PageCount, PageIndex, PageRange, PageSet, PageSize};

use super::stream::SentPage;

/// What precedes the bytes of a page in a stream, where its block is the one of the page before: the be64 of
/// offset and flags.
const RECORD_HEAD_LEN: u64 = 8;

/// How a run of pages is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Not at all: they read as zero.
    Absent,
    /// Sent as zero.
    Zero,
    /// The bytes of the first page are at the offset `at` of the file, those of each other `stride` bytes behind.
    Data {
        /// The absolute offset of the first page.
        at: u64,
        /// From one page to the next.
        stride: u64,
    },
}

impl Stored {
    /// How the pages are kept that follow the first `pages`.
    fn behind(self, pages: u64) -> Stored {
        match self {
            Stored::Data { at, stride } => Stored::Data { at: at + pages * stride, stride },
            same => same,
        }
    }
}

/// A run of pages that are kept alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The pages, at least one.
    pub range: PageRange,
    /// How they are kept.
    pub stored: Stored,
}

impl Place {
    /// The part of it that ends before `end`, and the rest.
    pub fn split(self, end: PageIndex) -> (Place, Option<Place>) {
        if end.0 >= self.range.end.0 {
            return (self, None);
        }
        let stored = self.stored.behind(end.0 - self.range.start.0);
        let front = Place { range: PageRange { end, ..self.range }, ..self };
        (front, Some(Place { range: PageRange { start: end, ..self.range }, stored }))
    }
}

/// All pages of a block, run by run, from the first to the last.
#[derive(Debug)]
pub struct Places {
    at: u64,
    pages: u64,
    known: Known,
}

#[derive(Debug)]
enum Known {
    /// One bit a page; present ones are at fixed offsets.
    Set { set: PageSet, start: u64, size: PageSize },
    /// Runs by their first page, which do not overlap.
    Runs(BTreeMap<u64, Place>),
}

impl Places {
    /// Of pages that are at the offset of their number, if they are there.
    pub(super) fn of_set(set: PageSet, start: u64, size: PageSize) -> Places {
        Places { at: 0, pages: set.capacity().0, known: Known::Set { set, start, size } }
    }

    /// Of pages that were sent one after the other; what was sent last counts.
    pub(super) fn of_runs(sent: &[SentRun], pages: PageCount) -> Places {
        let mut runs: BTreeMap<u64, Place> = BTreeMap::new();
        for run in sent {
            let new = Place { range: run.range, stored: run.stored() };
            // Of an older run that overlaps, its front and its back stay.
            while let Some((&start, &old)) =
                runs.range(..new.range.end.0).next_back().filter(|(_, old)| old.range.end > new.range.start)
            {
                runs.remove(&start);
                if let (_, Some(back)) = old.split(new.range.end) {
                    runs.insert(back.range.start.0, back);
                }
                if old.range.start < new.range.start {
                    let (front, _) = old.split(new.range.start);
                    runs.insert(start, front);
                }
            }
            runs.insert(new.range.start.0, new);
        }
        Places { at: 0, pages: pages.0, known: Known::Runs(runs) }
    }
}

impl Iterator for Places {
    type Item = Place;

    fn next(&mut self) -> Option<Place> {
        if self.at >= self.pages {
            return None;
        }
        let (end, stored) = match &self.known {
            Known::Set { set, start, size } => {
                let end = set.run_end(PageIndex(self.at)).0;
                let at = start + self.at * size.bytes();
                let data = Stored::Data { at, stride: size.bytes() };
                (end, if set.contains(PageIndex(self.at)) { data } else { Stored::Absent })
            }
            Known::Runs(runs) => match runs.range(self.at..).next() {
                Some((&start, place)) if start == self.at => (place.range.end.0, place.stored),
                Some((&start, _)) => (start, Stored::Absent),
                None => (self.pages, Stored::Absent),
            },
        };
        // The scanner refuses pages beyond their block.
        let end = end.min(self.pages);
        let range = PageRange::new(self.at, end);
        self.at = end;
        Some(Place { range, stored })
    }
}

/// Pages of a stream that were sent one behind the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct SentRun {
    pub range: PageRange,
    size: PageSize,
    data_at: Option<u64>,
}

impl SentRun {
    /// Adds a page to the runs of its block; returns whether it began a new one.
    pub fn add(runs: &mut Vec<SentRun>, page: &SentPage) -> bool {
        let next = PageIndex(page.page.0 + 1);
        if let Some(last) = runs.last_mut()
            && last.range.end == page.page
        {
            let count = last.range.count().0;
            let follows = last.data_at.map(|at| at + count * (page.size.bytes() + RECORD_HEAD_LEN));
            if follows == page.data_at {
                last.range.end = next;
                return false;
            }
        }
        let range = PageRange { start: page.page, end: next };
        runs.push(SentRun { range, size: page.size, data_at: page.data_at });
        true
    }

    fn stored(&self) -> Stored {
        match self.data_at {
            Some(at) => Stored::Data { at, stride: self.size.bytes() + RECORD_HEAD_LEN },
            None => Stored::Zero,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(pages: &[(u64, Option<u64>)]) -> Vec<Place> {
        let mut runs = Vec::new();
        for (page, data_at) in pages {
            let page = PageIndex(*page);
            SentRun::add(&mut runs, &SentPage { block: 0, page, size: PageSize::X86, data_at: *data_at });
        }
        Places::of_runs(&runs, PageCount(8)).collect()
    }

    fn place(start: u64, end: u64, stored: Stored) -> Place {
        Place { range: PageRange::new(start, end), stored }
    }

    fn data(at: u64) -> Stored {
        Stored::Data { at, stride: 4104 }
    }

    #[test]
    fn pages_of_a_stream_are_where_they_were_sent_last() {
        for (pages, expected) in [
            (vec![], vec![place(0, 8, Stored::Absent)]),
            (
                vec![(1, Some(100)), (2, Some(4204)), (3, None), (4, None), (7, Some(9000))],
                vec![
                    place(0, 1, Stored::Absent),
                    place(1, 3, data(100)),
                    place(3, 5, Stored::Zero),
                    place(5, 7, Stored::Absent),
                    place(7, 8, data(9000)),
                ],
            ),
            // A block's name stands between the two: they are neighbours in memory, not in the file.
            (
                vec![(0, Some(100)), (1, Some(4211))],
                vec![place(0, 1, data(100)), place(1, 2, data(4211)), place(2, 8, Stored::Absent)],
            ),
            // Sent again, in the middle of what was sent before.
            (
                vec![(0, Some(100)), (1, Some(4204)), (2, Some(8308)), (1, None)],
                vec![
                    place(0, 1, data(100)),
                    place(1, 2, Stored::Zero),
                    place(2, 3, data(8308)),
                    place(3, 8, Stored::Absent),
                ],
            ),
            // One long run over several short ones.
            (
                vec![
                    (0, None),
                    (2, Some(50)),
                    (4, None),
                    (1, Some(100)),
                    (2, Some(4204)),
                    (3, Some(8308)),
                    (4, Some(12412)),
                ],
                vec![place(0, 1, Stored::Zero), place(1, 5, data(100)), place(5, 8, Stored::Absent)],
            ),
        ] {
            assert_eq!(sent(&pages), expected, "{pages:?}");
        }
    }

    #[test]
    fn pages_at_fixed_offsets_are_where_their_number_says() {
        let mut set = PageSet::new(PageCount(6));
        set.insert(PageRange::new(1, 3));
        set.insert(PageRange::new(5, 6));
        let at = |page: u64| Stored::Data { at: 0x100000 + page * 4096, stride: 4096 };
        let places: Vec<Place> = Places::of_set(set, 0x100000, PageSize::X86).collect();
        assert_eq!(
            places,
            [
                place(0, 1, Stored::Absent),
                place(1, 3, at(1)),
                place(3, 5, Stored::Absent),
                place(5, 6, at(5)),
            ]
        );
        let (front, rest) = places[1].split(PageIndex(2));
        assert_eq!((front, rest), (place(1, 2, at(1)), Some(place(2, 3, at(2)))));
        assert_eq!(places[1].split(PageIndex(3)), (places[1], None));
    }
}
