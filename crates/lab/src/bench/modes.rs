//! The modes of a restore and QEMU's own load beside each other, over guests of several sizes.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmstate::job::ceiling;
use vmstate::qmp::Client;
use vmstate::{
    Cancel, Error, FaultReport, FaultTimes, Mode, Rate, ReadySerial, Record, Result, net::QmpAddress,
};

use super::clone::{Clone, available_bytes, failed, make_image, spec};
use super::measure::leave_cache;
use super::room::Room;
use super::statistics::{interval, median};
use super::stock::{self, Abilities};
use super::table::{Cells, Style, factor, lay_out};
use super::{Machine, Way};
use crate::demo::Narrator;
use crate::{GuestSettings, Incoming, QemuSpec};

/// What an idle guest owns, in pages: 8 MiB.
const IDLE_PAGES: u32 = 2048;
/// How long a guest may take to go through all of its memory once more.
const DEADLINE: Duration = Duration::from_secs(600);
/// What the images take on their disk beside the guest's memory, in MiB.
const MARGIN_MIB: u64 = 256;
/// What an idle guest takes of the time there is, in MiB of a dirty one.
const IDLE_WEIGHT_MIB: u64 = 512;
/// How far the first instructions of guests of all sizes may be apart, and how long after QEMU is ready they may be.
const APART_MS_MAX: f64 = 20.0;
pub const FROM_READY_MS_MAX: f64 = 50.0;
/// What the background of a lazy restore brings in a second that is measured for its faults.
const HELD_BYTES_PER_S: NonZeroU64 = NonZeroU64::new(1 << 20).unwrap();
/// How much of its ceiling a fill is to reach while the guest's processors stand still.
const FILL_AT_LEAST: f64 = 0.8;

/// What to measure.
#[derive(Clone, Debug)]
pub struct ModesSettings {
    /// The sizes of the guests in MiB.
    pub sizes_mib: Vec<u64>,
    /// How often each way is measured, at most.
    pub rounds: usize,
    /// Where the images go.
    pub directory: PathBuf,
    /// How long all of it may take, about: there are fewer rounds then, and one at the least for each guest that
    /// there is time to boot.
    pub time_limit: Option<Duration>,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModesReport {
    /// What the numbers depend on.
    pub machine: Machine,
    /// By load, size and way.
    pub rows: Vec<ModeRow>,
    /// What was left out and why, and what the rows say of the promise that the size does not matter.
    pub notes: Vec<String>,
    /// How long it took.
    pub took_s: f64,
}

/// One way with guests of one size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModeRow {
    /// The guest's memory in MiB.
    pub memory_mib: u64,
    /// Whether it has filled all of it, or 8 MiB.
    pub is_dirty: bool,
    /// `eager`, `map`, `map --wait`, `lazy`, `lazy, stopped` for one whose guest stays paused, `QEMU` for its own load;
    /// or what none of them can be faster than, for nobody: `read ceiling`, in which the lanes read the image past the
    /// page cache, and `lazy ceiling`, in which one thread places as many pages from a unix socket by userfaultfd.
    pub mode: &'static str,
    /// From the call until the guest could run: the median. That of QEMU's own load begins when QEMU is started.
    pub first_instruction_ms: Option<f64>,
    /// From QEMU being ready until then: the median.
    pub from_ready_ms: Option<f64>,
    /// The fastest of them, which the machine's other work disturbed least.
    pub from_ready_ms_min: Option<f64>,
    /// From the call until the guest has gone through all the memory that it owns, and said so.
    pub guest_ready_ms: Option<f64>,
    /// From the call until all memory was there: in the guest, or with `map --wait` in the page cache.
    pub resident_ms: Option<f64>,
    /// Of a lazy restore: from the first instruction until all memory was there, which the pages took.
    pub fill_ms: Option<f64>,
    /// What the restore itself has read of the guest's pages.
    pub read_bytes: u64,
    /// How often it was measured.
    pub rounds: usize,
}

/// What is measured in every round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    Qemu,
    Eager,
    Map,
    MapWait,
    Lazy,
    LazyStopped,
    ReadCeiling,
    LazyCeiling,
    /// Lazy, with a background that brings next to nothing. It is measured once, for its faults.
    LazyHeld,
}

impl Contender {
    const ALL: [Contender; 8] = [
        Contender::Qemu,
        Contender::Eager,
        Contender::Map,
        Contender::MapWait,
        Contender::Lazy,
        Contender::LazyStopped,
        Contender::ReadCeiling,
        Contender::LazyCeiling,
    ];

    /// Whether it is measured with guests that have touched next to nothing: what only moves pages has none to move.
    fn is_for_idle(self) -> bool {
        matches!(
            self,
            Contender::Qemu | Contender::Eager | Contender::Map | Contender::MapWait | Contender::Lazy
        )
    }

    fn name(self) -> &'static str {
        match self {
            Contender::Qemu => "QEMU",
            Contender::Eager => "eager",
            Contender::Map => "map",
            Contender::MapWait => "map --wait",
            Contender::Lazy => "lazy",
            Contender::LazyStopped => "lazy, stopped",
            Contender::ReadCeiling => "read ceiling",
            Contender::LazyCeiling => "lazy ceiling",
            Contender::LazyHeld => "lazy, held back",
        }
    }
}

/// One measurement, in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    first_instruction: Option<f64>,
    from_ready: Option<f64>,
    guest_ready: Option<f64>,
    resident: Option<f64>,
    fill: Option<f64>,
    read_bytes: u64,
    faults: Option<FaultReport>,
}

/// A guest of one size, saved.
struct Saved<'a> {
    spec: QemuSpec,
    image: &'a Path,
    round: u32,
    direct_io: bool,
    data_bytes: u64,
}

/// Restores guests of every size in each mode and by QEMU alone, in turn, from an image that is not in the page cache.
///
/// # Errors
/// Whatever keeps it from succeeding.
pub fn modes(settings: &ModesSettings, cancel: &Cancel, narrator: &dyn Narrator) -> Result<ModesReport> {
    let started = Instant::now();
    let dir = images(&settings.directory)?;
    let image = dir.path().join("vm.img");
    let direct_io = ceiling::takes_direct_io(dir.path())?;
    let machine = machine(&settings.directory, cancel)?;
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    let mut guests: Vec<(bool, u64)> = [false, true]
        .into_iter()
        .flat_map(|is_dirty| settings.sizes_mib.iter().map(move |&memory_mib| (is_dirty, memory_mib)))
        .collect();
    guests.reverse();
    // A user may be refused a userfaultfd, and with it this one ceiling.
    let has_lazy_ceiling = match ceiling::fill_lazily(1 << 20, cancel) {
        Ok(_) => true,
        Err(error) => {
            notes.push(format!("no lazy ceiling: {}", error.chain()));
            false
        }
    };
    while let Some((is_dirty, memory_mib)) = guests.pop() {
        let name = format!("{} guest of {memory_mib} MiB", if is_dirty { "dirty" } else { "idle" });
        if let Some(reason) = lacks_room(is_dirty, memory_mib, &settings.directory)? {
            notes.push(format!("no {name}: {reason}"));
            continue;
        }
        // Whoever is larger gets more of the time that is left.
        let weight = |is_dirty: bool, mib: u64| if is_dirty { mib } else { IDLE_WEIGHT_MIB };
        let all: u64 = guests.iter().map(|&(d, m)| weight(d, m)).sum::<u64>() + weight(is_dirty, memory_mib);
        let begun = Instant::now();
        let share = settings.time_limit.map(|limit| {
            limit.saturating_sub(started.elapsed()).mul_f64(weight(is_dirty, memory_mib) as f64 / all as f64)
        });
        if share.is_some_and(|share| share.is_zero()) {
            notes.push(format!("no {name}: there was no time left"));
            continue;
        }
        narrator.tell(&name);
        let guest = GuestSettings { fill_rounds: 1, ..GuestSettings::default() };
        let guest = match is_dirty {
            true => guest,
            false => GuestSettings { pages_low_max: IDLE_PAGES, pages_high_max: 0, ..guest },
        };
        let spec = spec(memory_mib, guest);
        let round = make_image(&spec, &image, cancel)?;
        let data_bytes = vmstate::info(&image)?.data_bytes;
        let saved = Saved { spec, image: &image, round, direct_io, data_bytes };
        let contenders: Vec<Contender> = Contender::ALL
            .into_iter()
            .filter(|contender| is_dirty || contender.is_for_idle())
            .filter(|contender| has_lazy_ceiling || *contender != Contender::LazyCeiling)
            .collect();
        let mut samples = vec![Vec::new(); contenders.len()];
        for turn in 0..settings.rounds {
            let before = Instant::now();
            let mut order: Vec<usize> = (0..contenders.len()).collect();
            if turn % 2 == 1 {
                order.reverse();
            }
            for index in order {
                samples[index].push(measure(contenders[index], &saved, cancel)?);
            }
            if share.is_some_and(|share| begun.elapsed() + before.elapsed() > share) {
                break;
            }
        }
        rows.extend(contenders.iter().zip(&samples).map(|(c, s)| row(memory_mib, is_dirty, *c, s)));
        let of = |wanted| contenders.iter().zip(&samples).find(|(c, _)| **c == wanted).map(|(_, s)| &s[..]);
        for lazy in [Contender::LazyStopped, Contender::Lazy] {
            if let (Some(ours), Some(ceiling)) = (of(lazy), of(Contender::LazyCeiling)) {
                notes.extend(fill_note(&name, lazy, ours, ceiling));
            }
        }
        if is_dirty && Some(&memory_mib) == settings.sizes_mib.iter().min() {
            let beside = of(Contender::Lazy).and_then(|samples| samples.last()?.faults);
            let alone = measure(Contender::LazyHeld, &saved, cancel)?.faults;
            notes.extend(fault_note(&name, beside, alone));
        }
    }
    notes.extend(flatness(&rows));
    Ok(ModesReport { machine, rows, notes, took_s: started.elapsed().as_secs_f64() })
}

/// What the numbers depend on; QEMU tells its version itself.
fn machine(directory: &Path, cancel: &Cancel) -> Result<Machine> {
    let spec = QemuSpec { incoming: Incoming::Defer, ..spec(64, GuestSettings::default()) };
    let qemu = spec.start().map_err(failed)?;
    let mut client = Client::connect(&QmpAddress::Unix(qemu.qmp_path()), cancel)?;
    Ok(Machine::here(client.version()?.to_string(), Room::found(directory)?.file_system))
}

/// Why such a guest is left out; `None` where there is room.
fn lacks_room(is_dirty: bool, memory_mib: u64, directory: &Path) -> Result<Option<String>> {
    if !is_dirty {
        return Ok(None);
    }
    // It is there twice for a moment, in memory and in the cache.
    let (has, needs) = (available_bytes() >> 20, memory_mib * 3 / 2);
    if has < needs {
        return Ok(Some(format!("this machine has {has} MiB of memory left, it takes {needs}")));
    }
    let (has, needs) = (Room::found(directory)?.disk_mib, memory_mib + MARGIN_MIB);
    Ok((has < needs).then(|| format!("{} has {has} MiB left, it takes {needs}", directory.display())))
}

fn measure(contender: Contender, saved: &Saved<'_>, cancel: &Cancel) -> Result<Sample> {
    leave_cache(saved.image)?;
    let (mode, wait) = match contender {
        Contender::Qemu => return by_qemu(saved, cancel),
        Contender::LazyCeiling => {
            let took = ceiling::fill_lazily(saved.data_bytes, cancel)?;
            return Ok(Sample { fill: Some(ms(took)), ..Sample::default() });
        }
        Contender::ReadCeiling => {
            let took = ceiling::read(saved.image, cancel)?;
            return Ok(Sample { resident: Some(ms(took)), ..Sample::default() });
        }
        Contender::Eager => (Mode::Eager, false),
        Contender::Map => (Mode::Map, false),
        Contender::MapWait => (Mode::Map, true),
        Contender::Lazy | Contender::LazyStopped | Contender::LazyHeld => (Mode::Lazy, false),
    };
    let clone = Clone::start(&saved.spec, saved.image, cancel, |settings, home| {
        (settings.mode, settings.wait) = (mode, wait);
        if contender == Contender::LazyStopped {
            settings.record = Record::Paused;
            return;
        }
        if contender == Contender::LazyHeld {
            settings.rate_max = Some(Rate::from(HELD_BYTES_PER_S));
        }
        // The mark of the round that was under way: it comes when all of the memory was looked at.
        let console = QemuSpec::serial_path(home);
        settings.ready = Some(ReadySerial { console, text: "R0".to_owned() });
    })?;
    let report = &clone.report;
    let fill = report.resident.filter(|_| mode == Mode::Lazy);
    Ok(Sample {
        fill: fill.map(|resident| ms(resident.saturating_sub(report.first_instruction))),
        first_instruction: Some(ms(report.first_instruction)),
        from_ready: Some(ms(report.first_instruction_from_ready)),
        guest_ready: report.guest_ready.map(ms),
        resident: report.resident.map(ms),
        read_bytes: report.read_bytes,
        faults: report.faults,
    })
}

/// QEMU's own load, by the best way that it has.
fn by_qemu(saved: &Saved<'_>, cancel: &Cancel) -> Result<Sample> {
    let called = Instant::now();
    let spec = QemuSpec { incoming: Incoming::Defer, ..saved.spec.clone() };
    let mut qemu = spec.start().map_err(failed)?;
    let mut client = Client::connect(&QmpAddress::Unix(qemu.qmp_path()), cancel)?;
    let abilities = Abilities::of(&mut client, saved.direct_io)?;
    let ways = [Way::QemuDirect, Way::QemuChannels, Way::QemuMapped];
    let way = ways.into_iter().find(|way| abilities.has(*way)).unwrap_or(Way::QemuStream);
    stock::configure(&mut client, way)?;
    let ready = Instant::now();
    stock::load(&mut client, saved.image)?;
    let (from_ready, first_instruction) = (ms(ready.elapsed()), ms(called.elapsed()));
    qemu.wait_for_round(saved.round + 1, DEADLINE).map_err(failed)?;
    Ok(Sample {
        first_instruction: Some(first_instruction),
        from_ready: Some(from_ready),
        guest_ready: Some(ms(called.elapsed())),
        resident: Some(first_instruction),
        ..Sample::default()
    })
}

fn row(memory_mib: u64, is_dirty: bool, contender: Contender, samples: &[Sample]) -> ModeRow {
    let all = |of: fn(&Sample) -> Option<f64>| samples.iter().filter_map(of).collect::<Vec<f64>>();
    let middle = |of| Some(all(of)).filter(|times| !times.is_empty()).map(|times| median(&times));
    ModeRow {
        memory_mib,
        is_dirty,
        mode: contender.name(),
        first_instruction_ms: middle(|sample| sample.first_instruction),
        from_ready_ms: middle(|sample| sample.from_ready),
        from_ready_ms_min: all(|sample| sample.from_ready).into_iter().reduce(f64::min),
        guest_ready_ms: middle(|sample| sample.guest_ready),
        resident_ms: middle(|sample| sample.resident),
        fill_ms: middle(|sample| sample.fill),
        read_bytes: samples.last().map_or(0, |sample| sample.read_bytes),
        rounds: samples.len(),
    }
}

/// How long the guest's requests for pages waited: beside the background, and where that was held back.
fn fault_note(name: &str, beside: Option<FaultReport>, alone: Option<FaultReport>) -> Option<String> {
    let tell = |times: FaultTimes| {
        let (median, p99) = (times.median?.as_micros(), times.p99?.as_micros());
        Some(format!("{} served, half within {median} µs and 99 of 100 within {p99} µs", times.count))
    };
    let beside = beside.and_then(|faults| tell(faults.beside_background));
    let alone = alone.and_then(|faults| tell(faults.without_background));
    let none = || "none served".to_owned();
    (beside.is_some() || alone.is_some()).then(|| {
        format!(
            "lazy, {name}: faults beside the background: {}; with the background held back: {}",
            beside.unwrap_or_else(none),
            alone.unwrap_or_else(none)
        )
    })
}

/// How much of its ceiling a lazy restore reaches, round by round.
fn fill_note(name: &str, contender: Contender, ours: &[Sample], ceiling: &[Sample]) -> Option<String> {
    let ratios: Vec<f64> =
        ours.iter().zip(ceiling).filter_map(|(ours, ceiling)| Some(ceiling.fill? / ours.fill?)).collect();
    let ratio = interval(&ratios).filter(|ratio| ratio.median.is_finite())?;
    let budget = match contender {
        Contender::LazyStopped => {
            let told = match ratio.is_sound() {
                true => verdict(ratio.high >= FILL_AT_LEAST),
                false => TOO_FEW_ROUNDS,
            };
            format!("; at least {} is to be: {told}", factor(FILL_AT_LEAST))
        }
        _ => String::new(),
    };
    Some(format!(
        "{}, {name}: filled at {} of the lazy ceiling ({} – {}, {} rounds){budget}",
        contender.name(),
        factor(ratio.median),
        factor(ratio.low),
        factor(ratio.high),
        ratio.count
    ))
}

/// What is said of a ratio whose interval holds the true one with less than 95 %.
const TOO_FEW_ROUNDS: &str = "too few rounds to tell";

fn verdict(is_kept: bool) -> &'static str {
    if is_kept { "kept" } else { "**missed**" }
}

/// What a guest's size, and what it has in its memory, do to its first instruction.
fn flatness(rows: &[ModeRow]) -> Vec<String> {
    let of = |mode: &str| {
        let times = rows.iter().filter(|row| row.mode == mode);
        let times: Vec<_> = times.filter_map(|row| Some((row, row.from_ready_ms?))).collect();
        let (smallest, least) = times.iter().copied().reduce(|a, b| if b.1 < a.1 { b } else { a })?;
        let (largest, most) = times.iter().copied().reduce(|a, b| if b.1 > a.1 { b } else { a })?;
        (times.len() > 1).then(|| {
            format!(
                "{mode}: first instruction from QEMU ready between {least:.1} ms ({}) and {most:.1} ms ({}); at most \
                 {APART_MS_MAX:.0} ms apart: {}; at most {FROM_READY_MS_MAX:.0} ms: {}",
                guest_name(smallest),
                guest_name(largest),
                verdict(most - least <= APART_MS_MAX),
                verdict(most <= FROM_READY_MS_MAX),
            )
        })
    };
    ["map", "lazy"].into_iter().filter_map(of).collect()
}

fn guest_name(row: &ModeRow) -> String {
    format!("{} MiB {}", row.memory_mib, if row.is_dirty { "dirty" } else { "idle" })
}

/// The report as a table, and what is to be said of it.
pub fn render_modes(report: &ModesReport, style: Style) -> String {
    let time = |ms: Option<f64>, digits: usize| ms.map_or("–".to_owned(), |ms| format!("{ms:.digits$}"));
    let cells = report.rows.iter().map(|row| {
        vec![
            guest_name(row),
            row.mode.to_owned(),
            time(row.first_instruction_ms, 1),
            time(row.from_ready_ms, 1),
            time(row.from_ready_ms_min, 1),
            time(row.guest_ready_ms, 0),
            time(row.resident_ms, 0),
            time(row.fill_ms, 0),
            format!("{:.1}", mib(row.read_bytes)),
            row.rounds.to_string(),
        ]
    });
    let header = vec![
        "guest",
        "mode",
        "first instruction ms",
        "from QEMU ready ms",
        "fastest",
        "guest ready ms",
        "resident ms",
        "fill ms",
        "read MiB",
        "rounds",
    ];
    let mut text = lay_out(&Cells { header, words: 2, rows: cells.collect() }, style);
    text.push('\n');
    for note in &report.notes {
        text.push_str(if style == Style::Markdown { "* " } else { "  " });
        text.push_str(note);
        text.push('\n');
    }
    text
}

/// A directory for images, which is removed in the end.
pub fn images(directory: &Path) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("vmstate-bench-")
        .tempdir_in(directory)
        .map_err(|error| Error::io(format!("cannot create a directory in {}", directory.display()), error))
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A report of a machine that nobody has.
    pub fn report() -> ModesReport {
        let mut rows = Vec::new();
        for is_dirty in [false, true] {
            for memory_mib in [256_u64, 1024, 4096, 8192] {
                let all = if is_dirty { memory_mib as f64 } else { 8.0 };
                for contender in Contender::ALL {
                    if !is_dirty && !contender.is_for_idle() {
                        continue;
                    }
                    let (from_ready, resident) = match contender {
                        Contender::Qemu | Contender::Eager => (20.0 + all, Some(80.0 + all)),
                        Contender::Map => (17.0, None),
                        Contender::MapWait => (17.0, Some(90.0 + all)),
                        Contender::Lazy | Contender::LazyStopped | Contender::LazyHeld => {
                            (14.0, Some(90.0 + all * 1.2))
                        }
                        Contender::ReadCeiling | Contender::LazyCeiling => (0.0, Some(all)),
                    };
                    let is_ours = from_ready > 0.0;
                    let sample = Sample {
                        first_instruction: is_ours.then_some(from_ready + 60.0),
                        from_ready: is_ours.then_some(from_ready),
                        guest_ready: is_ours.then_some(from_ready + 70.0 + all * 1.1),
                        resident,
                        fill: None,
                        read_bytes: 5,
                        faults: None,
                    };
                    rows.push(row(memory_mib, is_dirty, contender, &[sample]));
                }
            }
        }
        let machine = super::super::table::tests::report().machine;
        ModesReport { machine, rows, notes: Vec::new(), took_s: 1.0 }
    }

    fn sample(ms: f64) -> Sample {
        Sample {
            first_instruction: Some(ms + 100.0),
            from_ready: Some(ms),
            read_bytes: 5,
            ..Sample::default()
        }
    }

    #[test]
    fn a_fill_is_compared_with_the_ceiling_of_its_round() {
        let of = |fill| Sample { fill: Some(fill), ..Sample::default() };
        let (ours, ceiling) = ([of(100.0), of(200.0), of(50.0)], [of(80.0), of(100.0), of(45.0)]);
        assert_eq!(
            fill_note("dirty guest of 64 MiB", Contender::LazyStopped, &ours, &ceiling).as_deref(),
            Some(
                "lazy, stopped, dirty guest of 64 MiB: filled at 0.80 of the lazy ceiling (0.50 – 0.90, 3 rounds); \
                 at least 0.80 is to be: too few rounds to tell"
            )
        );
        for (fill, told) in [
            (80.0, "0.80 – 0.80, 6 rounds); at least 0.80 is to be: kept"),
            (79.0, "0.79 – 0.79, 6 rounds); at least 0.80 is to be: **missed**"),
        ] {
            let note = fill_note("", Contender::LazyStopped, &[of(100.0); 6], &[of(fill); 6]).unwrap();
            assert!(note.ends_with(told), "{note}");
        }
        assert_eq!(fill_note("", Contender::Lazy, &[Sample::default()], &ceiling), None);
    }

    #[test]
    fn faults_are_told_with_the_background_and_without() {
        let micros = |n| Some(Duration::from_micros(n));
        let times = |count, n| FaultTimes { count, median: micros(n), p99: micros(9 * n) };
        let none = FaultTimes { count: 0, median: None, p99: None };
        let of = |beside, alone| {
            let (served, preempt) = (none, true);
            Some(FaultReport {
                requests: 1,
                served,
                beside_background: beside,
                without_background: alone,
                preempt,
            })
        };
        let told = fault_note("dirty", of(times(5, 40), none), of(none, times(7, 10))).unwrap();
        let expected = "lazy, dirty: faults beside the background: 5 served, half within 40 µs and 99 of 100 within 360 µs; \
                        with the background held back: 7 served, half within 10 µs and 99 of 100 within 90 µs";
        assert_eq!(told, expected);
        assert_eq!(fault_note("dirty", of(none, none), None), None);
    }

    #[test]
    fn a_row_has_the_median_and_leaves_out_what_was_not_measured() {
        let found = row(256, false, Contender::Map, &[sample(3.0), sample(9.0), sample(4.0)]);
        assert_eq!((found.first_instruction_ms, found.from_ready_ms), (Some(104.0), Some(4.0)));
        assert_eq!((found.from_ready_ms_min, found.resident_ms, found.rounds), (Some(3.0), None, 3));
        let none =
            row(256, true, Contender::ReadCeiling, &[Sample { resident: Some(7.0), ..Sample::default() }]);
        assert_eq!((none.first_instruction_ms, none.resident_ms), (None, Some(7.0)));
    }

    #[test]
    fn the_notes_say_how_flat_it_is() {
        let rows: Vec<_> = [(256, 5.0), (1024, 4.0), (8192, 6.5)]
            .into_iter()
            .map(|(mib, ms)| row(mib, false, Contender::Map, &[sample(ms)]))
            .collect();
        let expected = "map: first instruction from QEMU ready between 4.0 ms (1024 MiB idle) and 6.5 ms \
                        (8192 MiB idle); at most 20 ms apart: kept; at most 50 ms: kept";
        assert_eq!(flatness(&rows), [expected]);
        let late = [&rows[..], &[row(8192, true, Contender::Map, &[sample(51.0)])]].concat();
        assert!(flatness(&late)[0].ends_with("apart: **missed**; at most 50 ms: **missed**"), "{late:?}");
        assert_eq!(flatness(&rows[..1]), Vec::<String>::new(), "one size says nothing");
        let report = ModesReport { rows, notes: vec![expected.to_owned()], ..report() };
        let text = render_modes(&report, Style::Markdown);
        assert!(text.ends_with(&format!("* {expected}\n")), "{text}");
        assert!(text.contains("| 256 MiB idle | map | 105.0 | 5.0 | 5.0 | – | – | – | 0.0 | 1 |"), "{text}");
    }
}
