//! What was sent: exactly, because a page that is sent twice breaks a postcopy.

use page::{PageCount, PageIndex, PageRange, PageSet};

/// How far beyond a fault the background goes on there, in bytes, before it returns to the order of addresses: what a
/// guest touches next is mostly near.
const NEAR_LEN: u64 = 1 << 20;
/// Pages that hold data are read in one piece where no more than this lies between them.
const GAP_LEN: u64 = 64 << 10;

/// One block as the ledger keeps it. *Host pages* are those of the target's backend, in which a guest faults and
/// QEMU places; *target pages* those of the stream and of the image.
#[derive(Debug)]
pub(super) struct Account {
    /// The size of the target's pages in bytes, at least that of the stream's.
    pub host_page: u64,
    /// The size of the stream's pages in bytes.
    pub target_page: u64,
    /// The target pages that the image has; the others are zero.
    pub data: PageSet,
    /// The host pages that were sent.
    sent: PageSet,
    /// The host pages that hold data and were not sent.
    left: PageSet,
}

impl Account {
    /// The account of a block of `length` bytes of which nothing was sent.
    pub(super) fn new(length: u64, host_page: u64, target_page: u64, data: PageSet) -> Account {
        let pages = PageCount(length.div_ceil(host_page));
        let ratio = (host_page / target_page).max(1);
        let mut left = PageSet::new(pages);
        for run in data.runs() {
            left.insert(PageRange::new(run.start.0 / ratio, run.end.0.div_ceil(ratio)));
        }
        Account { host_page, target_page, data, sent: PageSet::new(pages), left }
    }

    /// The target pages that a run of host pages consists of.
    pub(super) fn target_pages(&self, pages: PageRange) -> PageRange {
        let ratio = self.host_page / self.target_page;
        let end = (pages.end.0 * ratio).min(self.data.capacity().0);
        PageRange::new((pages.start.0 * ratio).min(end), end)
    }
}

/// Where in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    block: usize,
    page: u64,
}

/// The accounts of all blocks, and what is to be sent next.
#[derive(Debug)]
pub(super) struct Ledger {
    pub accounts: Vec<Account>,
    /// Where a fault was last, and up to which page the background follows it.
    near: Option<(Place, u64)>,
    cursor: Place,
    /// Up to where it was planned what is read, which is ahead of what is sent.
    planned: Place,
}

impl Ledger {
    pub(super) fn new(accounts: Vec<Account>) -> Ledger {
        let first = Place { block: 0, page: 0 };
        Ledger { accounts, near: None, cursor: first, planned: first }
    }

    /// Marks a host page as sent. Whether it was not before: only then may it be.
    pub(super) fn take(&mut self, block: usize, page: PageIndex) -> bool {
        let account = &mut self.accounts[block];
        if account.sent.contains(page) {
            return false;
        }
        let one = PageRange::new(page.0, page.0 + 1);
        account.sent.insert(one);
        account.left.remove(one);
        let end = page.0.saturating_add((NEAR_LEN / account.host_page).max(1));
        self.near = Some((Place { block, page: page.0 + 1 }, end));
        true
    }

    /// Whether a host page was sent.
    #[cfg(test)]
    pub(super) fn is_sent(&self, block: usize, page: PageIndex) -> bool {
        self.accounts[block].sent.contains(page)
    }

    /// The target has these target pages of a block already, whoever sent them.
    pub(super) fn has_arrived(&mut self, block: usize, pages: &PageSet) {
        let account = &mut self.accounts[block];
        let ratio = account.host_page / account.target_page;
        for run in pages.runs() {
            // A host page arrives as a whole.
            let end = run.end.0.div_ceil(ratio).min(account.sent.capacity().0);
            let run = PageRange::new(run.start.0 / ratio, end);
            account.sent.insert(run);
            account.left.remove(run);
        }
    }

    /// The next run of host pages for the background, of at most `len_max` bytes but at least one page: those behind
    /// the last fault first, then by address. They count as sent.
    pub(super) fn next(&mut self, len_max: u64) -> Option<(usize, PageRange)> {
        let (block, run) = self.peek(len_max)?;
        self.count_as_sent(block, run);
        match &mut self.near {
            Some((place, _)) => place.page = run.end.0,
            None => self.cursor = Place { block, page: run.end.0 },
        }
        Some((block, run))
    }

    /// The same, of those behind the last fault only.
    pub(super) fn next_near(&mut self, len_max: u64) -> Option<(usize, PageRange)> {
        let (block, run) = self.peek_near(len_max)?;
        self.count_as_sent(block, run);
        if let Some((place, _)) = &mut self.near {
            place.page = run.end.0;
        }
        Some((block, run))
    }

    /// The next pages to read ahead, of at most `len_max` bytes but at least one page, by address: a span that begins
    /// and ends with pages that are to be sent yet. They do not count as sent: a fault may come first.
    pub(super) fn plan(&mut self, len_max: u64) -> Option<(usize, PageRange)> {
        loop {
            let Place { block, page } = self.planned;
            let account = self.accounts.get(block)?;
            let Some(run) = account.left.next_run(PageIndex(page)) else {
                self.planned = Place { block: block + 1, page: 0 };
                continue;
            };
            let most = run.start.0 + (len_max / account.host_page).max(1);
            let mut end = run.end.0.min(most);
            while let Some(next) = account.left.next_run(PageIndex(end)).filter(|_| end < most) {
                if (next.start.0 - end) * account.host_page > GAP_LEN || next.start.0 >= most {
                    break;
                }
                end = next.end.0.min(most);
            }
            self.planned.page = end;
            return Some((block, PageRange::new(run.start.0, end)));
        }
    }

    /// The next run of what was planned that was not sent meanwhile. It counts as sent.
    pub(super) fn next_planned(
        &mut self,
        block: usize,
        planned: PageRange,
        len_max: u64,
    ) -> Option<PageRange> {
        let account = &self.accounts[block];
        let run = account.left.next_run(planned.start).filter(|run| run.start < planned.end)?;
        let run = cut(run, planned.end.0, account.host_page, len_max);
        self.count_as_sent(block, run);
        Some(run)
    }

    fn count_as_sent(&mut self, block: usize, run: PageRange) {
        let account = &mut self.accounts[block];
        account.sent.insert(run);
        account.left.remove(run);
    }

    fn peek_near(&mut self, len_max: u64) -> Option<(usize, PageRange)> {
        let (place, end) = self.near?;
        let account = &self.accounts[place.block];
        match account.left.next_run(PageIndex(place.page)).filter(|run| run.start.0 < end) {
            Some(run) => Some((place.block, cut(run, end, account.host_page, len_max))),
            None => {
                self.near = None;
                None
            }
        }
    }

    fn peek(&mut self, len_max: u64) -> Option<(usize, PageRange)> {
        if let Some(near) = self.peek_near(len_max) {
            return Some(near);
        }
        loop {
            let account = self.accounts.get(self.cursor.block)?;
            if let Some(run) = account.left.next_run(PageIndex(self.cursor.page)) {
                return Some((self.cursor.block, cut(run, run.end.0, account.host_page, len_max)));
            }
            // What lies behind the cursor was sent: it only moves over pages that were.
            self.cursor = Place { block: self.cursor.block + 1, page: 0 };
        }
    }

    /// How many bytes of pages that hold data are still to be sent.
    pub(super) fn left_bytes(&self) -> u64 {
        self.accounts.iter().map(|account| account.left.count().0 * account.host_page).sum()
    }
}

fn cut(run: PageRange, end: u64, page: u64, len_max: u64) -> PageRange {
    let most = (len_max / page).max(1);
    PageRange::new(run.start.0, run.end.0.min(end).min(run.start.0 + most))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(pages: u64, host_page: u64, runs: &[(u64, u64)]) -> Account {
        let mut data = PageSet::new(PageCount(pages));
        for &(start, end) in runs {
            data.insert(PageRange::new(start, end));
        }
        Account::new(pages * 4096, host_page, 4096, data)
    }

    fn rest(ledger: &mut Ledger, len_max: u64) -> Vec<(usize, u64, u64)> {
        std::iter::from_fn(|| ledger.next(len_max)).map(|(b, run)| (b, run.start.0, run.end.0)).collect()
    }

    #[test]
    fn every_page_with_data_comes_once_and_no_other() {
        let blocks = vec![account(600, 4096, &[(0, 3), (500, 600)]), account(8, 4096, &[(7, 8)])];
        let mut ledger = Ledger::new(blocks);
        assert_eq!(ledger.left_bytes(), 104 * 4096);
        assert!(ledger.take(0, PageIndex(1)), "a page that was asked for");
        assert!(!ledger.take(0, PageIndex(1)), "and is asked for again");
        assert!(ledger.take(1, PageIndex(0)), "one that is zero is sent when it is asked for");
        assert_eq!(
            rest(&mut ledger, 64 * 4096),
            // Behind the last fault first, then by address.
            [(1, 7, 8), (0, 0, 1), (0, 2, 3), (0, 500, 564), (0, 564, 600)]
        );
        assert_eq!(ledger.left_bytes(), 0);
        assert!(!ledger.take(0, PageIndex(599)), "what the background sent is not sent again");
        assert!(ledger.take(0, PageIndex(100)), "zero");
    }

    #[test]
    fn the_background_follows_a_fault_for_a_while_and_then_returns() {
        let mut ledger = Ledger::new(vec![account(2000, 4096, &[(0, 2000)])]);
        assert_eq!(ledger.next(4096), Some((0, PageRange::new(0, 1))));
        assert!(ledger.take(0, PageIndex(1000)));
        let order = rest(&mut ledger, 128 * 4096);
        assert_eq!(order[..3], [(0, 1001, 1129), (0, 1129, 1256), (0, 1, 129)]);
        assert_eq!(order.iter().map(|(_, start, end)| end - start).sum::<u64>(), 1998);
    }

    #[test]
    fn what_is_planned_is_sent_once_and_not_if_it_was_asked_for_meanwhile() {
        let runs = [(0, 4), (10, 12), (40, 300), (310, 311)];
        let mut ledger = Ledger::new(vec![account(400, 4096, &runs), account(8, 4096, &[(3, 4)])]);
        let plan: Vec<_> = std::iter::from_fn(|| ledger.plan(128 * 4096)).collect();
        let spans = [(0, 0, 12), (0, 40, 168), (0, 168, 296), (0, 296, 311), (1, 3, 4)];
        assert_eq!(plan, spans.map(|(block, start, end)| (block, PageRange::new(start, end))));
        assert!(ledger.take(0, PageIndex(2)) && ledger.take(0, PageIndex(100)));
        let mut sent = 0;
        while let Some((block, run)) = ledger.next_near(8 * 4096) {
            assert_eq!(block, 0);
            sent += run.end.0 - run.start.0;
        }
        assert_eq!(sent, 199 + 1, "behind the last fault to the end of the block");
        for (block, span) in plan {
            let mut rest = span;
            while let Some(run) = ledger.next_planned(block, rest, 64 * 4096) {
                assert!(span.start <= run.start && run.end <= span.end && run.count().0 <= 64);
                sent += run.count().0;
                rest.start = run.end;
            }
        }
        assert_eq!((sent + 2, ledger.left_bytes()), (4 + 2 + 260 + 1 + 1, 0));
    }

    #[test]
    fn a_large_page_counts_as_a_whole() {
        let huge = 2 << 20;
        let mut ledger = Ledger::new(vec![account(2048, huge, &[(600, 601), (1500, 1600)])]);
        assert_eq!(ledger.left_bytes(), 3 * huge);
        assert_eq!(ledger.accounts[0].target_pages(PageRange::new(1, 2)), PageRange::new(512, 1024));
        let mut arrived = PageSet::new(PageCount(2048));
        arrived.insert(PageRange::new(512, 1024));
        ledger.has_arrived(0, &arrived);
        assert!(ledger.is_sent(0, PageIndex(1)) && !ledger.is_sent(0, PageIndex(0)));
        assert_eq!(rest(&mut ledger, 4096), [(0, 2, 3), (0, 3, 4)]);
    }
}
