//! What many measurements say together: medians, and between which bounds a median lies.

use serde::Serialize;

/// The least probability with which an interval shall hold the true median.
const COVERAGE: f64 = 0.95;

/// A median, and the bounds between which the true one lies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// The median of what was measured.
    pub median: f64,
    /// The lower bound: one of the values measured.
    pub low: f64,
    /// The upper bound: one of the values measured.
    pub high: f64,
    /// The probability that the true median lies between the bounds, whatever the values' distribution.
    pub coverage: f64,
    /// How many values there are.
    pub count: usize,
}

impl Interval {
    /// Whether there are enough values for a probability of 95 %: six are the least.
    pub fn is_sound(&self) -> bool {
        self.coverage >= COVERAGE
    }
}

/// The median; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The median with the narrowest interval of order statistics that holds the true one with a probability of at least
/// 95 %; the widest where there are too few values for that. `None` of nothing.
///
/// Each value lies below the true median with a probability of one half, so the number of those that do is
/// binomial: the interval from the k-th smallest to the k-th largest misses when fewer than k lie on one side.
pub fn interval(values: &[f64]) -> Option<Interval> {
    let sorted = sorted(values);
    let count = sorted.len();
    let (low, high) = (*sorted.first()?, *sorted.last()?);
    let mut found = Interval { median: median(values), low, high, coverage: coverage(count, 1), count };
    for k in 2..=count.div_ceil(2) {
        let narrower = coverage(count, k);
        if narrower < COVERAGE {
            break;
        }
        found = Interval { low: sorted[k - 1], high: sorted[count - k], coverage: narrower, ..found };
    }
    Some(found)
}

/// The probability that the true median lies between the k-th smallest and the k-th largest of `count` values.
fn coverage(count: usize, k: usize) -> f64 {
    let mut term = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut below = 0.0;
    for i in 0..k {
        below += term;
        term *= (count - i) as f64 / (i + 1) as f64;
    }
    (1.0 - 2.0 * below).max(0.0)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        for (values, expected) in
            [(vec![], 0.0), (vec![3.0], 3.0), (vec![9.0, 1.0, 5.0], 5.0), (vec![9.0, 1.0, 5.0, 6.0], 5.5)]
        {
            assert_eq!(median(&values), expected, "{values:?}");
        }
    }

    #[test]
    fn the_interval_has_the_ranks_of_the_tables() {
        // The ranks and probabilities are those of the tables for the sign test.
        for (count, low, high, coverage) in [
            (1, 1.0, 1.0, 0.0),
            (3, 1.0, 3.0, 0.75),
            (5, 1.0, 5.0, 0.9375),
            (6, 1.0, 6.0, 0.96875),
            (8, 1.0, 8.0, 0.9921875),
            (9, 2.0, 8.0, 0.9609375),
            (12, 3.0, 10.0, 0.961425781),
            (20, 6.0, 15.0, 0.958610535),
        ] {
            let mut values: Vec<f64> = (1..=count).map(|i| f64::from(i as u32)).collect();
            values.reverse();
            let found = interval(&values).unwrap();
            assert_eq!((found.low, found.high, found.count), (low, high, count), "{count}");
            assert!((found.coverage - coverage).abs() < 1e-6, "{count}: {}", found.coverage);
            assert_eq!(found.is_sound(), count >= 6, "{count}");
        }
        assert_eq!(interval(&[]), None);
    }

    #[test]
    fn one_outlier_moves_nothing() {
        let quiet = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8];
        let mut loud = quiet;
        loud[8] = 1000.0;
        assert_eq!(interval(&quiet), interval(&loud));
    }
}
