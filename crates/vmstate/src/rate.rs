//! A limit of bandwidth as people write it.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::sync::Arc;

use io::RateLimit;

use crate::{Error, Kind};

/// Bytes per second, more than none: `500M`, `1.5GiB`, `100MB/s`, `1048576`.
///
/// K, M, G and T are powers of 1024, with or without `iB` behind them; KB, MB, GB and TB are powers of 1000. Case does
/// not matter, and `/s` may follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(NonZeroU64);

impl Rate {
    /// The rate in bytes per second.
    pub fn bytes_per_s(self) -> NonZeroU64 {
        self.0
    }

    /// A limit that everything that moves bytes for one job shares.
    pub(crate) fn limit(self) -> Arc<RateLimit> {
        Arc::new(RateLimit::new(self.0))
    }
}

impl From<NonZeroU64> for Rate {
    fn from(bytes_per_s: NonZeroU64) -> Rate {
        Rate(bytes_per_s)
    }
}

impl FromStr for Rate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Rate, Error> {
        let misuse = |what: &str| {
            Error::new(Kind::Misuse, format!("rate `{text}`: {what}"))
                .hint("give bytes per second, for example 500M, 1.5G, 100MiB or 100MB")
        };
        let bare = text.strip_suffix("/s").unwrap_or(text);
        let digits_len = bare.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(bare.len());
        let (number, unit) = bare.split_at(digits_len);
        let unit: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1000,
            "mb" => 1000 * 1000,
            "gb" => 1000 * 1000 * 1000,
            "tb" => 1000 * 1000 * 1000 * 1000,
            _ => return Err(misuse("the unit is not known")),
        };
        // Exactly, without a detour through floating point: the whole part, and what is behind the point.
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
            return Err(misuse("that is no number"));
        }
        let too_much = || misuse("that is more than can be counted");
        // Digits that no unit has room for are not worth reading.
        let fraction = fraction.get(..fraction.len().min(12)).unwrap_or_default();
        let whole: u64 = whole.parse().map_err(|_| too_much())?;
        let part: u64 = fraction.parse().map_err(|_| misuse("that is no number"))?;
        let scale = 10u128.pow(fraction.len() as u32);
        let bytes = u128::from(whole) * u128::from(unit) + u128::from(part) * u128::from(unit) / scale;
        let bytes = u64::try_from(bytes).map_err(|_| too_much())?;
        NonZeroU64::new(bytes).map(Rate).ok_or_else(|| misuse("at that rate nothing would ever move"))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.get();
        let units =
            [(1 << 40, "TiB/s"), (1 << 30, "GiB/s"), (1 << 20, "MiB/s"), (1 << 10, "KiB/s"), (1, "B/s")];
        let (unit, name) =
            units.into_iter().find(|(unit, _)| bytes.is_multiple_of(*unit)).unwrap_or((1, "B/s"));
        write!(f, "{} {name}", bytes / unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_bytes_per_second_in_units_of_1024_or_1000() {
        for (text, bytes, shown) in [
            ("1", 1, "1 B/s"),
            ("4096", 4096, "4 KiB/s"),
            ("500M", 500 << 20, "500 MiB/s"),
            ("500m", 500 << 20, "500 MiB/s"),
            ("500M/s", 500 << 20, "500 MiB/s"),
            ("100MiB", 100 << 20, "100 MiB/s"),
            ("100mib/s", 100 << 20, "100 MiB/s"),
            ("100MB", 100_000_000, "100000000 B/s"),
            ("1G", 1 << 30, "1 GiB/s"),
            ("1.5G", 3 << 29, "1536 MiB/s"),
            ("0.5KiB", 512, "512 B/s"),
            ("2T", 2 << 40, "2 TiB/s"),
            ("1tb", 1_000_000_000_000, "976562500 KiB/s"),
            ("12B", 12, "12 B/s"),
            ("0.000000001T", 1099, "1099 B/s"),
            ("18446744073709551615", u64::MAX, "18446744073709551615 B/s"),
        ] {
            let rate: Rate = text.parse().expect(text);
            assert_eq!(rate.bytes_per_s().get(), bytes, "{text}");
            assert_eq!(rate.to_string(), shown, "{text}");
        }
    }

    #[test]
    fn a_rate_that_is_none_names_its_fault() {
        for (text, fault) in [
            ("", "that is no number"),
            ("M", "that is no number"),
            (".5M", "that is no number"),
            ("1.M", "that is no number"),
            ("1.2.3M", "that is no number"),
            ("-1M", "the unit is not known"),
            ("1 M", "the unit is not known"),
            ("1MiB/min", "the unit is not known"),
            ("1Mbit", "the unit is not known"),
            ("0", "at that rate nothing would ever move"),
            ("0.1", "at that rate nothing would ever move"),
            ("0.0M", "at that rate nothing would ever move"),
            ("18446744073709551616", "that is more than can be counted"),
            ("99999999T", "that is more than can be counted"),
        ] {
            let error = text.parse::<Rate>().expect_err(text);
            assert_eq!(error.to_string(), format!("rate `{text}`: {fault}"));
            assert_eq!(
                error.hint_text(),
                Some("give bytes per second, for example 500M, 1.5G, 100MiB or 100MB")
            );
        }
    }
}
