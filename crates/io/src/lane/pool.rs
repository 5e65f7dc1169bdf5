//! The buffers of a lane, and how many of them may be under way.

use std::io;
use std::time::Duration;

use crate::supply::Scratch;

/// How many bytes a lane has under way at most: what keeps an array of fast disks busy.
const UNDER_WAY_MAX: usize = 16 << 20;

/// How many buffers a lane has at most, however small they are.
const BUFFERS_MAX: usize = 64;

/// What all lanes together may take, beside [`PER_LANE`] for each: three quarters of the 64 MiB that a job may
/// have, so that there is room for what is not a lane's.
const SHARED: usize = 48 << 20;

/// What each lane may take in any case.
const PER_LANE: usize = 8 << 20;

/// How many pieces of a lane go through buffers on pages of the usual size, before any is on huge ones.
///
/// An idle guest has a few pieces with a few pages each, and a huge page that is touched for one of them is cleared
/// whole: that took up to 5 ms of an idle save's 25. A dirty guest has done with these in a moment.
const PLAIN: usize = 16;

/// How long a request may be under way. One that was longer had others before it in the queue of a slow disk,
/// where nothing can take them back: who cancels would have to wait for all of them.
const LATENCY_MAX: Duration = Duration::from_millis(50);

/// The buffers of one lane: made when they are needed, and as many as the disk is fast enough for.
pub(super) struct Pool {
    free: Vec<Scratch>,
    /// Those of them that are on pages of the usual size.
    plain: Vec<Scratch>,
    /// How many there are, those in use included.
    made: usize,
    /// How many pieces may still have one on pages of the usual size.
    plain_left: usize,
    /// How many may be in use now.
    allowed: usize,
    /// How many may be in use at most.
    limit: usize,
    /// The length of a buffer.
    len: usize,
}

impl Pool {
    /// A pool of buffers of `len` bytes for one of `lanes` lanes, or of a single one where nothing is ever under
    /// way while the next is filled.
    pub(super) fn new(lanes: usize, len: usize, has_ring: bool) -> Pool {
        let limit = if has_ring { buffers(lanes, len) } else { 1 };
        Pool { free: Vec::new(), plain: Vec::new(), made: 0, plain_left: PLAIN, allowed: limit, limit, len }
    }

    /// A buffer; `None` while as many are in use as may be.
    ///
    /// # Errors
    /// When there is no memory for one.
    pub(super) fn take(&mut self) -> io::Result<Option<Scratch>> {
        if self.made - self.free.len() - self.plain.len() >= self.allowed {
            return Ok(None);
        }
        if self.plain_left > 0 {
            self.plain_left -= 1;
            if let Some(scratch) = self.plain.pop() {
                return Ok(Some(scratch));
            }
            self.made += 1;
            return Scratch::plain(self.len).map(Some);
        }
        self.made -= self.plain.drain(..).count();
        if self.free.is_empty() {
            let more = Scratch::several(self.len)?;
            self.made += more.len();
            self.free.extend(more);
        }
        Ok(self.free.pop())
    }

    /// Takes a buffer back. One on pages of the usual size is used again only while few pieces have come: whoever has
    /// many of them is faster with huge pages.
    pub(super) fn put(&mut self, scratch: Scratch) {
        match (scratch.is_plain(), self.plain_left) {
            (false, _) => self.free.push(scratch),
            (true, 0) => self.made -= 1,
            (true, _) => self.plain.push(scratch),
        }
    }

    /// Learns from how long a request was under way.
    pub(super) fn learn(&mut self, latency: Duration) {
        self.allowed = match latency > LATENCY_MAX {
            true => (self.allowed / 2).max(1),
            false => (self.allowed + 1).min(self.limit),
        };
    }
}

/// How many buffers of `len` bytes each of `lanes` lanes has.
fn buffers(lanes: usize, len: usize) -> usize {
    let bytes = UNDER_WAY_MAX.min(PER_LANE + SHARED / lanes.max(1));
    (bytes / len.max(1)).clamp(1, BUFFERS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn the_buffers_of_all_lanes_keep_to_what_a_job_may_have() {
        for (lanes, len, expected) in [
            (1, MIB, 16),
            (2, MIB, 16),
            (8, MIB, 14),
            (64, MIB, 8),
            (256, MIB, 8),
            (1, 128 << 10, 64),
            (8, 16 * MIB, 1),
            (1, 64 * MIB, 1),
            (2, 0, 64),
        ] {
            let found = buffers(lanes, len);
            assert_eq!(found, expected, "{lanes} lanes, {len:#x} bytes");
            // The largest piece there is needs its buffer in any case.
            if len <= PER_LANE {
                assert!(found * len * lanes <= SHARED + PER_LANE * lanes, "{lanes} lanes, {len:#x} bytes");
            }
        }
    }

    #[test]
    fn no_more_are_in_use_than_may_be() {
        let mut pool = Pool::new(64, MIB, true);
        let taken: Vec<Scratch> = std::iter::from_fn(|| pool.take().expect("memory")).collect();
        assert_eq!(taken.len(), 8);
        taken.into_iter().for_each(|scratch| pool.put(scratch));
        assert!(pool.take().expect("memory").is_some());

        let mut single = Pool::new(64, MIB, false);
        let first = single.take().expect("memory").expect("one");
        assert!(single.take().expect("memory").is_none());
        single.put(first);
        assert!(single.take().expect("memory").is_some());
    }

    #[test]
    fn a_few_pieces_touch_no_huge_page_and_many_come_to_use_them() {
        let mut pool = Pool::new(1, MIB, true);
        for _ in 0..PLAIN {
            let scratch = pool.take().expect("memory").expect("one");
            assert!(scratch.is_plain());
            pool.put(scratch);
            // What was touched for one piece serves the next.
            assert_eq!(pool.made, usize::from(pool.plain_left > 0));
        }
        for _ in 0..3 {
            let scratch = pool.take().expect("memory").expect("one");
            assert!(!scratch.is_plain());
            pool.put(scratch);
        }
        assert_eq!((pool.made, pool.free.len(), pool.plain.len()), (2, 2, 0));
    }

    #[test]
    fn a_slow_disk_gets_less_at_once_and_a_fast_one_gets_it_back() {
        let mut pool = Pool::new(1, MIB, true);
        let (slow, fast) = (LATENCY_MAX + Duration::from_millis(1), LATENCY_MAX);
        for (latency, expected) in
            [(fast, 16), (slow, 8), (slow, 4), (slow, 2), (slow, 1), (slow, 1), (fast, 2), (fast, 3)]
        {
            pool.learn(latency);
            assert_eq!(pool.allowed, expected);
        }
        (0..100).for_each(|_| pool.learn(fast));
        assert_eq!(pool.allowed, 16);
    }
}
