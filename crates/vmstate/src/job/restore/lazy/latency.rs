//! How long faults waited for their page, in memory that does not grow with their number.

use std::time::Duration;

/// Buckets to a doubling: a quantile is at most an eighth too high.
const FINE: u32 = 8;
/// Doublings from a microsecond on; the last bucket holds all that took longer than an hour.
const DOUBLINGS: u32 = 32;

/// A histogram of durations.
#[derive(Clone, Debug)]
pub(super) struct Latencies {
    buckets: Vec<u64>,
    count: u64,
    longest: Duration,
}

impl Latencies {
    pub(super) fn new() -> Latencies {
        Latencies { buckets: vec![0; (FINE * DOUBLINGS) as usize], count: 0, longest: Duration::ZERO }
    }

    pub(super) fn add(&mut self, took: Duration) {
        let last = self.buckets.len() - 1;
        self.buckets[bucket(took).min(last)] += 1;
        self.count += 1;
        self.longest = self.longest.max(took);
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Those of both.
    pub(super) fn with(&self, other: &Latencies) -> Latencies {
        let buckets = self.buckets.iter().zip(&other.buckets).map(|(one, other)| one + other).collect();
        Latencies { buckets, count: self.count + other.count, longest: self.longest.max(other.longest) }
    }

    /// The duration that the part `share` of all did not exceed; `None` where there is none.
    pub(super) fn quantile(&self, share: f64) -> Option<Duration> {
        let wanted = ((self.count as f64 * share).ceil() as u64).max(1);
        let mut sum = 0;
        let index = self.buckets.iter().position(|count| {
            sum += count;
            sum >= wanted
        })?;
        Some(upper_end(index).min(self.longest))
    }
}

/// The bucket of a duration: its whole doublings of a microsecond, and in which eighth of the next it is.
fn bucket(took: Duration) -> usize {
    // Far beyond the last bucket, and far from where the sums below would overflow.
    let micros = took.as_micros().min(1 << 40) as u64;
    let doubling = (micros + 1).ilog2();
    let within = ((micros + 1 - (1 << doubling)) * u64::from(FINE)) >> doubling;
    (doubling * FINE) as usize + within as usize
}

fn upper_end(bucket: usize) -> Duration {
    let (doubling, within) = (bucket as u64 / u64::from(FINE), bucket as u64 % u64::from(FINE));
    let begin = 1u64 << doubling;
    Duration::from_micros(begin + (begin * (within + 1)).div_ceil(u64::from(FINE)) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_at_most_an_eighth_too_high() {
        let mut latencies = Latencies::new();
        assert_eq!(latencies.quantile(0.5), None);
        for micros in 1..=1000 {
            latencies.add(Duration::from_micros(micros));
        }
        assert_eq!(latencies.count(), 1000);
        let mut longer = Latencies::new();
        longer.add(Duration::from_secs(1));
        let both = latencies.with(&longer);
        assert_eq!((both.count(), both.quantile(0.5)), (1001, latencies.quantile(0.5)));
        assert_eq!(both.quantile(1.0), Some(Duration::from_secs(1)));
        for (share, exact) in [(0.5, 500), (0.99, 990), (1.0, 1000)] {
            let found = latencies.quantile(share).unwrap().as_micros();
            assert!((exact..=exact * 9 / 8 + 1).contains(&found), "{share}: {found}");
        }
    }

    #[test]
    fn no_duration_is_too_long() {
        let mut latencies = Latencies::new();
        latencies.add(Duration::MAX);
        latencies.add(Duration::ZERO);
        assert_eq!(latencies.quantile(0.5), Some(Duration::from_micros(1)));
        assert!(latencies.quantile(1.0).is_some());
    }
}
