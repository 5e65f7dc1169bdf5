//! Images converted from one format into another, beside what reading and writing them takes without a conversion.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmstate::job::ceiling::{self, Data};
use vmstate::source::Format;
use vmstate::{Cancel, ConvertSettings, Error, Result, SaveSettings, Then, Unobserved, Via};

use super::clone::{available_bytes, failed};
use super::guests::Guests;
use super::measure::leave_cache;
use super::modes::{images, ms};
use super::plan::ROUNDS_MIN;
use super::room::Room;
use super::statistics::{interval, median};
use super::table::{Cells, Style, factor, lay_out, of_budget, size, time};
use super::{Backend, Budget, Interval, Load, Verdict, budget};
use crate::demo::Narrator;

/// The least that a conversion shall be of the slower of the two ceilings.
const BUDGET: Budget = Budget { at_least: 0.9, from_mib: 0 };
/// What mapped-ram is converted into, and back.
const OTHERS: [&str; 3] = ["stream", "libvirt-raw", "libvirt-sparse"];
/// As many files as large as the guest lie on the disk at once: two in mapped-ram, one in the other format, and one that
/// is written for nobody.
const FILES: u64 = 4;
const MARGIN_MIB: u64 = 1024;
/// libvirt keeps what it finds here and nobody starts it.
const DOMAIN_XML: &str = "<domain type='qemu'><name>bench</name></domain>";

/// What to convert.
#[derive(Clone, Debug)]
pub struct ConversionsSettings {
    /// The guest's memory in MiB, all of which it has filled.
    pub memory_mib: u64,
    /// How many rounds a ratio is measured in.
    pub rounds: usize,
    /// How long all of it may take, about, once there are enough rounds for an interval.
    pub time_limit: Option<Duration>,
    /// Where the images go.
    pub directory: PathBuf,
    /// Where those in mapped-ram go, if that is elsewhere: each conversion then reads from one and writes to the other.
    pub second_directory: Option<PathBuf>,
}

/// One conversion.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConversionRow {
    /// The guest's memory.
    pub memory_mib: u64,
    /// The image's format.
    pub from: &'static str,
    /// The format that it was converted into.
    pub to: &'static str,
    /// The median time in milliseconds, to an image that is durable under its name.
    pub time_ms: f64,
    /// The shortest.
    pub time_min_ms: f64,
    /// The longest.
    pub time_max_ms: f64,
    /// What the lanes take to read as many bytes, past the page cache and for nobody: the median.
    pub read_ms: f64,
    /// What they take to write as many into a new file, out of memory that is in no cache: the median.
    pub write_ms: f64,
    /// What they take to write a constant so often, which stays in the cache: the median.
    pub constant_ms: f64,
    /// What both take when they are done at the same time, as a conversion does them: the median.
    pub both_ms: f64,
    /// The slower of reading and writing alone in a round over the conversion's time in that round.
    pub ratio: Interval,
    /// The slower of reading and writing the constant over the conversion's time.
    pub ratio_of_constant: Interval,
    /// Both at the same time over the conversion's time.
    pub ratio_of_both: Interval,
    /// Whether the budget is kept.
    pub verdict: Verdict,
    /// Bytes of pages that were moved.
    pub data_bytes: u64,
    /// The most anonymous memory of vmstate.
    pub peak_bytes: u64,
}

/// Converts the image of a guest that has filled its memory, there and back.
///
/// # Errors
/// Whatever keeps it from succeeding.
pub fn conversions(
    settings: &ConversionsSettings,
    cancel: &Cancel,
    narrator: &dyn Narrator,
) -> Result<Vec<ConversionRow>> {
    let memory_mib = settings.memory_mib;
    check_room(settings)?;
    let started = Instant::now();
    let directory = images(&settings.directory)?;
    let second = images(settings.second_directory.as_ref().unwrap_or(&settings.directory))?;
    let path = |name: &str| directory.path().join(name);
    let mapped_path = |name: &str| second.path().join(name);
    narrator.tell(&format!("the image of a dirty guest of {memory_mib} MiB"));
    let whole = mapped_path("mapped-ram.img");
    save(memory_mib, &whole, cancel)?;
    let data = Data::new()?;
    let mut rows = Vec::new();
    let pairs = OTHERS.len() * 2;
    for name in OTHERS {
        let (other, back) = (path("other.img"), mapped_path("back.img"));
        for (from, to, target) in [(&whole, name, &other), (&other, "mapped-ram", &back)] {
            narrator.tell(&format!("into {to}, from {}", if to == name { "mapped-ram" } else { name }));
            let left = settings.time_limit.map(|limit| limit.saturating_sub(started.elapsed()));
            let share = left.map(|left| left / u32::try_from(pairs - rows.len()).unwrap_or(1));
            let ceiling = target.with_file_name("ceiling.img");
            let pair = Pair { from, to: format_of(to)?, target, ceiling: &ceiling, data: &data };
            let samples = pair.measure(settings.rounds, share, cancel)?;
            let from = if to == name { "mapped-ram" } else { name };
            rows.extend(row(memory_mib, from, to, &samples));
        }
        remove(&back)?;
        remove(&other)?;
    }
    Ok(rows)
}

fn check_room(settings: &ConversionsSettings) -> Result<()> {
    let memory_mib = settings.memory_mib;
    let (memory, needed) = (available_bytes() >> 20, memory_mib + MARGIN_MIB);
    let parts = match &settings.second_directory {
        None => vec![(&settings.directory, FILES)],
        Some(second) => vec![(&settings.directory, FILES / 2), (second, FILES - 1)],
    };
    for (directory, files) in parts {
        let (disk, wanted) = (Room::found(directory)?.disk_mib, files * memory_mib + MARGIN_MIB);
        if disk < wanted || memory < needed {
            let clause = format!(
                "a guest of {memory_mib} MiB takes {wanted} MiB of disk and {needed} of memory; {} has {disk}, this \
                 machine {memory}",
                directory.display()
            );
            return Err(Error::new(vmstate::Kind::Misuse, clause)
                .hint("give another --directory, or a smaller --memory"));
        }
    }
    Ok(())
}

fn format_of(name: &str) -> Result<Format> {
    let all = Format::ALL.into_iter().chain(Format::LIBVIRT);
    all.into_iter()
        .find(|format| format.name() == name)
        .ok_or_else(|| Error::new(vmstate::Kind::Misuse, format!("no format is called {name}")))
}

fn save(memory_mib: u64, image: &Path, cancel: &Cancel) -> Result<()> {
    let running = Guests { memory_mib, backend: Backend::Private, load: Load::Dirty }.boot(cancel)?;
    let settings =
        SaveSettings { via: Via::Direct, then: Then::Quit, ..SaveSettings::new(running.address(), image) };
    vmstate::save(&settings, cancel, &Unobserved)?;
    let mut running = running;
    running.qemu.wait(Duration::from_secs(60)).map(drop).map_err(failed)
}

/// A conversion and its ceilings.
struct Pair<'a> {
    from: &'a Path,
    to: Format,
    target: &'a Path,
    ceiling: &'a Path,
    data: &'a Data,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    convert: Duration,
    read: Duration,
    write: Duration,
    constant: Duration,
    both: Duration,
    data_bytes: u64,
    peak_bytes: u64,
}

impl Pair<'_> {
    /// In turn, forwards and backwards. The first round of all is not counted: in it a disk finds what it does more
    /// slowly the first time.
    fn measure(&self, rounds: usize, share: Option<Duration>, cancel: &Cancel) -> Result<Vec<Sample>> {
        let started = Instant::now();
        let bytes = std::fs::metadata(self.from)
            .map_err(|error| Error::io(format!("cannot look at {}", self.from.display()), error))?
            .len();
        let mut samples = Vec::new();
        for round in 0..=rounds {
            let begun = Instant::now();
            let mut sample = Sample::default();
            let order = if round % 2 == 0 { [0, 1, 2, 3, 4] } else { [4, 3, 2, 1, 0] };
            for who in order {
                match who {
                    0 => self.convert(&mut sample, cancel)?,
                    1 => sample.read = self.read(cancel)?,
                    2 => sample.write = self.write(bytes, cancel)?,
                    3 => sample.constant = self.write_constant(bytes, cancel)?,
                    _ => {
                        let (read, written) = std::thread::scope(|scope| {
                            let writing = scope.spawn(|| self.write(bytes, cancel));
                            (self.read(cancel), writing.join().expect("lanes that do not panic"))
                        });
                        sample.both = read?.max(written?);
                    }
                }
            }
            if round > 0 || rounds == 1 {
                samples.push(sample);
            }
            let is_late = share.is_some_and(|share| started.elapsed() + begun.elapsed() > share);
            if samples.len() >= rounds || samples.len() >= ROUNDS_MIN && is_late {
                break;
            }
        }
        Ok(samples)
    }

    fn read(&self, cancel: &Cancel) -> Result<Duration> {
        leave_cache(self.from)?;
        ceiling::read(self.from, cancel)
    }

    fn write(&self, bytes: u64, cancel: &Cancel) -> Result<Duration> {
        let took = ceiling::write_data(self.ceiling, bytes, self.data, cancel)?;
        remove(self.ceiling)?;
        Ok(took)
    }

    fn write_constant(&self, bytes: u64, cancel: &Cancel) -> Result<Duration> {
        let took = ceiling::write_fresh(self.ceiling, bytes, cancel)?;
        remove(self.ceiling)?;
        Ok(took)
    }

    fn convert(&self, sample: &mut Sample, cancel: &Cancel) -> Result<()> {
        remove(self.target)?;
        leave_cache(self.from)?;
        let mut settings = ConvertSettings::new(self.from, self.target, self.to);
        if Format::LIBVIRT.contains(&self.to) {
            settings.domain_xml = Some(DOMAIN_XML.to_owned());
        }
        let report = vmstate::convert(&settings, cancel, &Unobserved)?;
        sample.convert = report.duration;
        sample.data_bytes = report.data_bytes;
        sample.peak_bytes = report.peak_memory_bytes.saturating_sub(self.data.memory_bytes());
        Ok(())
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

fn row(memory_mib: u64, from: &'static str, to: &'static str, samples: &[Sample]) -> Option<ConversionRow> {
    let all = |of: fn(&Sample) -> Duration| samples.iter().map(|sample| ms(of(sample))).collect::<Vec<f64>>();
    let over = |of: fn(&Sample) -> Duration| {
        let ratio = |sample: &Sample| of(sample).as_secs_f64() / sample.convert.as_secs_f64();
        interval(&samples.iter().map(ratio).collect::<Vec<f64>>())
    };
    let (times, ratio) = (all(|sample| sample.convert), over(|sample| sample.read.max(sample.write))?);
    Some(ConversionRow {
        memory_mib,
        from,
        to,
        time_ms: median(&times),
        time_min_ms: times.iter().copied().fold(f64::INFINITY, f64::min),
        time_max_ms: times.iter().copied().fold(0.0, f64::max),
        read_ms: median(&all(|sample| sample.read)),
        write_ms: median(&all(|sample| sample.write)),
        constant_ms: median(&all(|sample| sample.constant)),
        both_ms: median(&all(|sample| sample.both)),
        ratio,
        ratio_of_constant: over(|sample| sample.read.max(sample.constant))?,
        ratio_of_both: over(|sample| sample.both)?,
        verdict: budget::verdict(&ratio, Some(BUDGET), memory_mib),
        data_bytes: samples.iter().map(|sample| sample.data_bytes).max().unwrap_or(0),
        peak_bytes: samples.iter().map(|sample| sample.peak_bytes).max().unwrap_or(0),
    })
}

/// The conversions as a table.
pub fn render_conversions(rows: &[ConversionRow], style: Style) -> String {
    let range = |ratio: &Interval| format!("{} – {}", factor(ratio.low), factor(ratio.high));
    let cells = |row: &ConversionRow| {
        vec![
            row.from.to_owned(),
            row.to.to_owned(),
            of_budget(row.verdict, Some(BUDGET)),
            size(row.data_bytes),
            time(row.time_ms),
            format!("{} – {}", time(row.time_min_ms), time(row.time_max_ms)),
            time(row.read_ms),
            time(row.write_ms),
            factor(row.ratio.median),
            range(&row.ratio),
            time(row.constant_ms),
            factor(row.ratio_of_constant.median),
            range(&row.ratio_of_constant),
            time(row.both_ms),
            factor(row.ratio_of_both.median),
            range(&row.ratio_of_both),
            row.ratio.count.to_string(),
            size(row.peak_bytes),
        ]
    };
    let header = vec![
        "from",
        "to",
        "≥ 0.90",
        "data",
        "time",
        "min – max",
        "read",
        "write",
        "of the slower",
        "interval",
        "a constant",
        "of that",
        "interval",
        "both at once",
        "of both",
        "interval",
        "n",
        "vmstate peak",
    ];
    lay_out(&Cells { header, rows: rows.iter().map(cells).collect(), words: 3 }, style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversion_is_compared_with_the_slower_of_reading_and_writing() {
        let sample = |convert, read, write, constant, both| Sample {
            convert: Duration::from_millis(convert),
            read: Duration::from_millis(read),
            write: Duration::from_millis(write),
            constant: Duration::from_millis(constant),
            both: Duration::from_millis(both),
            data_bytes: 4 << 30,
            peak_bytes: 9 << 20,
        };
        let samples = [
            sample(1000, 500, 950, 700, 980),
            sample(1000, 900, 100, 90, 990),
            sample(500, 400, 100, 80, 500),
        ];
        let row = row(4096, "stream", "mapped-ram", &samples).unwrap();
        assert_eq!((row.ratio.median, row.ratio.low, row.ratio.high), (0.9, 0.8, 0.95));
        assert_eq!((row.ratio_of_constant.median, row.ratio_of_constant.low), (0.8, 0.7));
        assert_eq!(row.ratio_of_both.median, 0.99);
        assert_eq!(row.verdict, Verdict::TooFewRounds);
        let text = render_conversions(&[row], Style::Markdown);
        let expected = "| stream | mapped-ram | too few rounds | 4.00 GiB | 1.00 s | 500 ms – 1.00 s | 500 ms | 100 ms | \
                        0.90 | 0.80 – 0.95 | 90 ms | 0.80 | 0.70 – 0.90 | 980 ms | 0.99 | 0.98 – 1.00 | 3 | 9.00 MiB |";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn every_format_of_the_table_is_known() {
        for name in OTHERS {
            assert_eq!(format_of(name).unwrap().name(), name);
        }
        assert!(format_of("cartoon").is_err());
    }
}
