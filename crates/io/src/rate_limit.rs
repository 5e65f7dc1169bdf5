//! A limit of bandwidth that everybody who writes shares.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::cancel::Cancel;

/// How much of an unused allowance is kept: whoever was held up elsewhere catches up on so much and no more.
const SAVED_UP_MAX: Duration = Duration::from_millis(100);

/// The longest single wait that is computed: a switch ends every wait, so it need not be exact beyond.
const WAIT_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// So many bytes a second and no more, all lanes taken together.
///
/// A bucket of tokens: every byte is paid for when it sets out, and whoever comes before the last one has been
/// paid for waits for that. A piece of any size may thus set out, and the next waits the longer.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_s: NonZeroU64,
    /// When everything that has set out will have been paid for; `None` before the first.
    paid_at: Mutex<Option<Instant>>,
}

impl RateLimit {
    /// A limit in bytes per second.
    pub fn new(bytes_per_s: NonZeroU64) -> RateLimit {
        RateLimit { bytes_per_s, paid_at: Mutex::new(None) }
    }

    /// The limit, in bytes per second.
    pub fn bytes_per_s(&self) -> NonZeroU64 {
        self.bytes_per_s
    }

    /// Takes `bytes` of the allowance at the time `now`, and says how long to wait before they may set out.
    ///
    /// They are taken whether the caller waits or not.
    pub fn reserve(&self, bytes: u64, now: Instant) -> Duration {
        // Nothing that can panic runs under the lock, so a poisoned one still holds a whole state.
        let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(SAVED_UP_MAX).unwrap_or(now);
        // Nothing is saved up before the first byte: a limit that begins with a burst would be none for what
        // is short.
        let begin = paid_at.map_or(now, |paid_at| paid_at.max(earliest));
        let end = begin.checked_add(self.cost(bytes)).unwrap_or(begin);
        *paid_at = Some(end);
        begin.saturating_duration_since(now).min(WAIT_MAX)
    }

    /// Takes `bytes` of the allowance and waits until they may set out, or until the switch is thrown.
    pub fn wait(&self, bytes: u64, cancel: &Cancel) {
        let wait = self.reserve(bytes, Instant::now());
        if !wait.is_zero() {
            cancel.wait(wait);
        }
    }

    fn cost(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_s.get());
        u64::try_from(nanos).map_or(WAIT_MAX, Duration::from_nanos).min(WAIT_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limit(bytes_per_s: u64) -> RateLimit {
        RateLimit::new(NonZeroU64::new(bytes_per_s).expect("a rate"))
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn each_piece_waits_until_those_before_it_are_paid_for() {
        let limit = limit(10 * MIB);
        let start = Instant::now();
        // When a lane comes, what it takes, how long it has to wait: at 10 MiB/s a MiB takes 100 ms.
        for (at, bytes, wait) in [
            (ms(0), MIB, ms(0)),
            (ms(0), MIB, ms(100)),
            (ms(50), 2 * MIB, ms(150)),
            (ms(400), MIB, ms(0)),
            (ms(400), 0, ms(100)),
        ] {
            assert_eq!(limit.reserve(bytes, start + at), wait, "{bytes:#x} bytes at {at:?}");
        }
    }

    #[test]
    fn a_pause_is_caught_up_on_for_a_tenth_of_a_second_only() {
        let limit = limit(10 * MIB);
        let start = Instant::now();
        assert_eq!(limit.reserve(MIB, start), ms(0));
        // An hour later one MiB is owed and not thirty-six thousand.
        let late = start + Duration::from_secs(3600);
        assert_eq!(limit.reserve(MIB, late), ms(0));
        assert_eq!(limit.reserve(MIB, late), ms(0));
        assert_eq!(limit.reserve(MIB, late), ms(100));
    }

    #[test]
    fn what_is_moved_in_any_stretch_of_time_is_the_rate_and_what_was_saved_up() {
        let limit = limit(64 * MIB);
        let start = Instant::now();
        let mut moved = 0;
        let mut now = start;
        for step in 0..1000u64 {
            let bytes = (step * 7919 % 1024 + 1) << 10;
            now += limit.reserve(bytes, now);
            let allowed = 64 * MIB * (now - start).as_millis() as u64 / 1000;
            assert!(moved <= allowed + 64 * MIB / 1000, "{moved} bytes after {:?}", now - start);
            moved += bytes;
        }
        assert!(now - start > Duration::from_secs(7), "{:?}", now - start);
    }

    #[test]
    fn absurd_numbers_wait_long_and_do_not_wrap() {
        let limit = limit(1);
        let start = Instant::now();
        assert_eq!(limit.reserve(u64::MAX, start), Duration::ZERO);
        for _ in 0..3 {
            assert_eq!(limit.reserve(u64::MAX, start), WAIT_MAX);
        }
        let endless = RateLimit::new(NonZeroU64::MAX);
        assert_eq!(endless.reserve(MIB, start), Duration::ZERO);
        assert_eq!(endless.reserve(MIB, start), Duration::ZERO);
    }

    #[test]
    fn a_thrown_switch_ends_the_wait() {
        let cancel = Cancel::new().expect("eventfd");
        cancel.cancel();
        let limit = limit(1);
        limit.wait(u64::MAX, &cancel);
        // Without the switch this would take a year.
        limit.wait(1, &cancel);
    }
}
