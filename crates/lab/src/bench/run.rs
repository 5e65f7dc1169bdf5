//! The run: which guests, in which order, and what becomes of the measurements.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use vmstate::job::ceiling::{self, Data};
use vmstate::{Cancel, Error, Result};

use super::budget::{budget, verdict};
use super::guests::Guests;
use super::measure::{Images, Sample, ceiling_of_save, restore, save};
use super::plan::{CONTENDER_TIMES, Part, ROUNDS_MIN, Timetable, has_time};
use super::pool::HugePool;
use super::room::Room;
use super::statistics::{interval, median};
use super::stock::Abilities;
use super::{Backend, BenchReport, BenchSettings, Ceiling, Comparison, Job, Load, Machine, Rival, Row, Way};
use crate::demo::Narrator;

/// What an idle guest's save may take beside the ceiling's time for its data.
const IDLE_ALLOWANCE: Duration = Duration::from_millis(20);
/// The guest that is asked what its QEMU can do.
const SMALL_MIB: u64 = 64;

/// Runs the benchmark; the images lie in a directory of their own, which is removed.
///
/// # Errors
/// [`vmstate::Kind::Misuse`] where there is no room; whatever keeps a save or a restore from succeeding;
/// [`vmstate::Kind::Interrupted`], with every QEMU ended and every file removed.
pub fn bench(settings: &BenchSettings, cancel: &Cancel, narrator: &dyn Narrator) -> Result<BenchReport> {
    measure_all(settings, cancel, narrator).map_err(|error| {
        // A terminal's ^C ends the QEMUs as well, and what they say then is not the reason.
        if cancel.is_cancelled() { Error::interrupted() } else { error }
    })
}

fn measure_all(settings: &BenchSettings, cancel: &Cancel, narrator: &dyn Narrator) -> Result<BenchReport> {
    let started = Instant::now();
    let room = Room::found(&settings.directory)?;
    room.check(settings)?;
    let directory = tempfile::Builder::new()
        .prefix("vmstate-bench-")
        .tempdir_in(&settings.directory)
        .map_err(|error| {
            Error::io(format!("cannot create a directory in {}", settings.directory.display()), error)
        })?;
    let mut run = Run::new(settings, cancel, narrator, directory.path(), &room)?;
    for &backend in &settings.backends {
        if backend == Backend::File && !room.has_shared(settings.memory_mib) {
            let left = room.shared_mib;
            run.note(format!("no guest whose memory is a file: /dev/shm has {left} MiB left"));
            continue;
        }
        // Held until the last of these guests is gone.
        let _pool = match backend {
            Backend::Huge => match HugePool::reserve(settings.memory_mib) {
                Ok(pool) => Some(pool),
                Err(why) => {
                    run.note(format!("no guest on huge pages: {why}"));
                    continue;
                }
            },
            _ => None,
        };
        for load in [Load::Dirty, Load::Idle] {
            run.guest(Guests { memory_mib: settings.memory_mib, backend, load })?;
        }
    }
    let Run { machine, rows, ceilings, comparisons, notes, .. } = run;
    Ok(BenchReport {
        machine,
        memory_mib: settings.memory_mib,
        rounds: settings.rounds,
        repeats: settings.repeats,
        rows,
        ceilings,
        comparisons,
        notes,
        took_s: started.elapsed().as_secs_f64(),
    })
}

struct Run<'a> {
    settings: &'a BenchSettings,
    cancel: &'a Cancel,
    narrator: &'a dyn Narrator,
    images: Images<'a>,
    machine: Machine,
    ways: Vec<Way>,
    timetable: Timetable,
    started: Instant,
    rows: Vec<Row>,
    ceilings: Vec<Ceiling>,
    comparisons: Vec<Comparison>,
    notes: Vec<String>,
}

/// What was measured of one job with one kind of guest.
#[derive(Default)]
struct Field {
    samples: HashMap<Way, Vec<Sample>>,
    /// A round each: vmstate, QEMU's best, the ceiling.
    rounds: Vec<[Duration; 3]>,
    best: Option<Way>,
}

impl Field {
    fn times(&self, way: Way) -> Vec<f64> {
        self.samples.get(&way).into_iter().flatten().map(|sample| sample.time.as_secs_f64()).collect()
    }

    fn ceilings(&self) -> Vec<f64> {
        self.rounds.iter().map(|[_, _, ceiling]| ceiling.as_secs_f64()).collect()
    }

    fn data_bytes(&self) -> Option<u64> {
        self.samples.get(&Way::Vmstate)?.iter().find_map(|sample| sample.data_bytes)
    }

    /// vmstate, and those of QEMU's ways that may be its best.
    fn contenders(&self, ways: &[Way]) -> Vec<Way> {
        let time = |way| median(&self.times(way));
        let most = self.qemus_best(ways).map_or(0.0, |best| time(best) * CONTENDER_TIMES);
        ways.iter().copied().filter(|way| *way == Way::Vmstate || time(*way) <= most).collect()
    }

    /// About how long a round takes; beside what is measured there is a start of a QEMU.
    fn round(&self, each: Duration) -> Duration {
        let best =
            self.samples.keys().filter(|way| **way != Way::Vmstate).map(|way| median(&self.times(*way)));
        let (ours, best) = (median(&self.times(Way::Vmstate)), best.fold(f64::INFINITY, f64::min));
        let measured: f64 = self.samples.keys().map(|way| median(&self.times(*way))).sum();
        let beside = each.as_secs_f64() - measured / self.samples.len() as f64;
        // The ceiling is not known yet; it is no slower than we are.
        Duration::try_from_secs_f64(2.0 * ours + best + 2.0 * beside.max(0.0)).unwrap_or(Duration::ZERO)
    }

    /// Whichever of QEMU's ways was the fastest so far.
    fn qemus_best(&self, ways: &[Way]) -> Option<Way> {
        let qemus = ways.iter().copied().filter(|way| *way != Way::Vmstate);
        qemus.min_by(|a, b| median(&self.times(*a)).total_cmp(&median(&self.times(*b))))
    }
}

impl<'a> Run<'a> {
    fn new(
        settings: &'a BenchSettings,
        cancel: &'a Cancel,
        narrator: &'a dyn Narrator,
        directory: &'a Path,
        room: &Room,
    ) -> Result<Run<'a>> {
        let small = Guests { memory_mib: SMALL_MIB, backend: Backend::Private, load: Load::Idle };
        let waiting = small.wait()?;
        let mut client = waiting.client(cancel)?;
        let has_direct_io = ceiling::takes_direct_io(directory)?;
        let abilities = Abilities::of(&mut client, has_direct_io)?;
        let jobs = [(Job::Save, settings.saves), (Job::Restore, settings.restores)];
        let jobs: Vec<Job> =
            jobs.into_iter().filter_map(|(job, is_wanted)| is_wanted.then_some(job)).collect();
        let machine = Machine::here(client.version()?.to_string(), room.file_system.clone());
        let mut run = Run {
            settings,
            cancel,
            narrator,
            images: Images { directory },
            machine,
            ways: Way::ALL.into_iter().filter(|way| abilities.has(*way)).collect(),
            timetable: Timetable::start(Part::all(&settings.backends, &jobs), settings.time_limit),
            started: Instant::now(),
            rows: Vec::new(),
            ceilings: Vec::new(),
            comparisons: Vec::new(),
            notes: Vec::new(),
        };
        if room.is_in_memory() {
            let name = settings.directory.display();
            run.note(format!("{name} is a tmpfs: the images lie in memory, and no disk is measured"));
        }
        for way in Way::ALL.into_iter().filter(|way| !abilities.has(*way)) {
            let reason =
                if has_direct_io { "this QEMU has not got it" } else { "the directory takes no direct I/O" };
            run.note(format!("no {}: {reason}", way.name()));
        }
        Ok(run)
    }

    fn note(&mut self, text: String) {
        self.tell(&text);
        self.notes.push(text);
    }

    fn tell(&self, text: &str) {
        self.narrator.tell(&format!("[{:>4.0} s] {text}", self.started.elapsed().as_secs_f64()));
    }

    /// Until when a part may take.
    fn begin(&mut self, job: Job, guests: &Guests) -> Option<Instant> {
        self.timetable.begin(Part { job, backend: guests.backend, load: guests.load })
    }

    /// Everything about one kind of guest.
    fn guest(&mut self, guests: Guests) -> Result<()> {
        if self.settings.saves {
            self.saves(&guests)?;
        } else {
            self.make_images(&guests)?;
        }
        if self.settings.restores {
            self.restores(&guests)?;
        }
        Ok(())
    }

    fn saves(&mut self, guests: &Guests) -> Result<()> {
        self.tell(&title(Job::Save, guests));
        let until = self.begin(Job::Save, guests);
        // A dirty guest has no memory that a save could add, so one serves for all.
        let dirty = match guests.load {
            Load::Dirty => Some(guests.boot(self.cancel)?),
            Load::Idle => None,
        };
        let (images, cancel) = (Images { directory: self.images.directory }, self.cancel);
        let measure = |way| match &dirty {
            Some(running) => save(running, way, &images, cancel),
            // QEMU's scan for zeros allocates what the guest never touched: no idle guest is saved twice.
            None => save(&guests.boot(cancel)?, way, &images, cancel),
        };
        let mut field = Field::default();
        self.rows(&mut field, until, true, &measure)?;
        let data_bytes = field.data_bytes().unwrap_or(0);
        let ceiling = || ceiling_of_save(&images, data_bytes, cancel);
        self.compare(&mut field, until, (Job::Save, guests), &measure, ceiling)?;
        self.rest(&mut field, until, &measure)?;
        self.add_rows(&field, Job::Save, guests, data_bytes);
        if guests.load == Load::Dirty {
            let fresh = field.ceilings();
            let mut again = Vec::new();
            for _ in 0..self.settings.repeats {
                again.push(ceiling::overwrite(&images.ceiling(), cancel)?.as_secs_f64());
            }
            // Not kept until the next saves: the most memory that this process takes is theirs.
            let data = Data::new()?;
            let mut cold = Vec::new();
            for _ in 0..self.settings.repeats {
                images.remove(&images.ceiling())?;
                let took = ceiling::write_data(&images.ceiling(), data_bytes, &data, cancel)?;
                cold.push(took.as_secs_f64());
            }
            drop(data);
            self.add_ceiling(Job::Save, guests.backend, "write a new file", data_bytes, &fresh);
            self.add_ceiling(Job::Save, guests.backend, "write over a file", data_bytes, &again);
            self.add_ceiling(Job::Save, guests.backend, "write data out of memory", data_bytes, &cold);
        }
        Ok(())
    }

    /// One save each, for the restores alone.
    fn make_images(&mut self, guests: &Guests) -> Result<()> {
        self.tell(&format!("images of the {} guest, {} memory", guests.load.name(), guests.backend.name()));
        let running = guests.boot(self.cancel)?;
        // Ours first, before QEMU's scan for zeros makes pages that the guest never touched.
        for way in self.ways.clone().into_iter().rev() {
            save(&running, way, &self.images, self.cancel)?;
        }
        Ok(())
    }

    fn restores(&mut self, guests: &Guests) -> Result<()> {
        self.tell(&title(Job::Restore, guests));
        let until = self.begin(Job::Restore, guests);
        let (images, cancel) = (Images { directory: self.images.directory }, self.cancel);
        let measure = |way| restore(guests, way, &images, cancel);
        let mut field = Field::default();
        self.rows(&mut field, until, guests.load == Load::Dirty, &measure)?;
        let data_bytes = field.data_bytes().unwrap_or(0);
        let (mut reads, mut fills) = (Vec::new(), Vec::new());
        if guests.load == Load::Dirty {
            ceiling_of_save(&images, data_bytes, cancel)?;
            let ceiling = || {
                let read = ceiling::read(&images.ceiling(), cancel)?;
                reads.push(read.as_secs_f64());
                if !guests.backend.is_fresh() {
                    return Ok(read);
                }
                let fill = ceiling::populate(data_bytes, cancel)?;
                fills.push(fill.as_secs_f64());
                Ok(read + fill)
            };
            self.compare(&mut field, until, (Job::Restore, guests), &measure, ceiling)?;
        }
        self.rest(&mut field, until, &measure)?;
        self.add_rows(&field, Job::Restore, guests, data_bytes);
        self.add_ceiling(Job::Restore, guests.backend, "read a file", data_bytes, &reads);
        self.add_ceiling(Job::Restore, guests.backend, "fill fresh shared memory", data_bytes, &fills);
        Ok(())
    }

    /// Every way once, and those again that may be QEMU's best, while that leaves time for the rounds.
    fn rows(
        &self,
        field: &mut Field,
        until: Option<Instant>,
        has_rounds: bool,
        measure: &impl Fn(Way) -> Result<Sample>,
    ) -> Result<()> {
        let started = Instant::now();
        self.pass(field, &self.ways, measure)?;
        let pass = started.elapsed();
        for _ in 1..self.settings.repeats {
            let contenders = field.contenders(&self.ways);
            let part = contenders.len() as f64 / self.ways.len() as f64;
            let rounds = if has_rounds {
                field.round(pass / self.ways.len() as u32) * self.rounds()
            } else {
                Duration::ZERO
            };
            // A pass of the fastest takes no longer than their part of a pass of all.
            if !has_time(until, pass.mul_f64(part) + rounds) {
                break;
            }
            self.pass(field, &contenders, measure)?;
        }
        field.best = field.qemus_best(&self.ways);
        Ok(())
    }

    /// Whoever was measured less often than rows are, in time that is left.
    fn rest(
        &self,
        field: &mut Field,
        until: Option<Instant>,
        measure: &impl Fn(Way) -> Result<Sample>,
    ) -> Result<()> {
        let mut longest = Duration::ZERO;
        loop {
            let count = |way: &Way| field.samples.get(way).map_or(0, Vec::len);
            let few = self.ways.iter().copied().filter(|way| count(way) < self.settings.repeats);
            let Some(way) = few.min_by_key(count) else { return Ok(()) };
            let takes = Duration::from_secs_f64(median(&field.times(way)));
            if !has_time(until, longest.max(takes)) {
                return Ok(());
            }
            let started = Instant::now();
            self.pass(field, &[way], measure)?;
            longest = longest.max(started.elapsed());
        }
    }

    fn pass(&self, field: &mut Field, ways: &[Way], measure: &impl Fn(Way) -> Result<Sample>) -> Result<()> {
        for &way in ways {
            self.check()?;
            field.samples.entry(way).or_default().push(measure(way)?);
        }
        Ok(())
    }

    fn rounds(&self) -> u32 {
        u32::try_from(self.settings.rounds).unwrap_or(u32::MAX)
    }

    /// vmstate, QEMU's best and the ceiling once each in every round, forwards and backwards in turn.
    fn compare(
        &mut self,
        field: &mut Field,
        until: Option<Instant>,
        (job, guests): (Job, &Guests),
        measure: &impl Fn(Way) -> Result<Sample>,
        mut ceiling: impl FnMut() -> Result<Duration>,
    ) -> Result<()> {
        let Some(best) = field.best else { return Ok(()) };
        self.tell(&format!("{} rounds against {} and the ceiling", self.settings.rounds, best.name()));
        // The others have been there before, and found by then what a disk does more slowly the first time.
        self.check()?;
        ceiling()?;
        let mut longest = Duration::ZERO;
        for round in 0..self.settings.rounds {
            if round >= ROUNDS_MIN && !has_time(until, longest) {
                break;
            }
            let started = Instant::now();
            let mut times = [Duration::ZERO; 3];
            let order = if round % 2 == 0 { [0, 1, 2] } else { [2, 1, 0] };
            for who in order {
                self.check()?;
                times[who] = match who {
                    2 => ceiling()?,
                    _ => {
                        let way = if who == 0 { Way::Vmstate } else { best };
                        let sample = measure(way)?;
                        field.samples.entry(way).or_default().push(sample);
                        sample.time
                    }
                };
            }
            field.rounds.push(times);
            longest = longest.max(started.elapsed());
        }
        let (done, wanted) = (field.rounds.len(), self.settings.rounds);
        if done < wanted {
            self.note(format!("cut to fit: {} in {done} rounds instead of {wanted}", title(job, guests)));
        }
        self.add_comparisons(field, job, guests, best);
        Ok(())
    }

    fn add_comparisons(&mut self, field: &Field, job: Job, guests: &Guests, best: Way) {
        let &Guests { memory_mib, backend, load } = guests;
        let against = if load == Load::Idle { Rival::Allowance } else { Rival::Ceiling };
        for rival in [Rival::QemuBest, against] {
            let of_round = |[ours, qemus, ceiling]: &[Duration; 3]| {
                let rivals = match rival {
                    Rival::QemuBest => *qemus,
                    Rival::Ceiling => *ceiling,
                    Rival::Allowance => IDLE_ALLOWANCE + *ceiling,
                };
                rivals.as_secs_f64() / ours.as_secs_f64()
            };
            let ratios: Vec<f64> = field.rounds.iter().map(of_round).collect();
            let Some(ratio) = interval(&ratios) else { continue };
            let budget = budget(job, backend, load, rival);
            self.comparisons.push(Comparison {
                job,
                backend,
                load,
                rival,
                way: (rival == Rival::QemuBest).then_some(best),
                ratio,
                budget,
                verdict: verdict(&ratio, budget, memory_mib),
            });
        }
    }

    fn add_rows(&mut self, field: &Field, job: Job, guests: &Guests, data_bytes: u64) {
        let ceiling_s = median(&field.ceilings());
        for &way in &self.ways {
            let Some(samples) = field.samples.get(&way) else { continue };
            let mut row = row(job, guests, way, samples, data_bytes);
            if guests.load == Load::Dirty && ceiling_s > 0.0 && row.time_ms > 0.0 {
                row.of_ceiling = Some(ceiling_s * 1000.0 / row.time_ms);
            }
            self.rows.push(row);
        }
    }

    fn add_ceiling(&mut self, job: Job, backend: Backend, what: &'static str, bytes: u64, times: &[f64]) {
        let time_s = median(times);
        if time_s > 0.0 {
            let rate_bytes_per_s = bytes as f64 / time_s;
            let (time_ms, count) = (time_s * 1000.0, times.len());
            self.ceilings.push(Ceiling { job, backend, what, bytes, time_ms, count, rate_bytes_per_s });
        }
    }

    fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(Error::interrupted()) } else { Ok(()) }
    }
}

fn title(job: Job, guests: &Guests) -> String {
    format!("{} of the {} guest, {} memory", job.name(), guests.load.name(), guests.backend.name())
}

/// The row of all measurements of one way.
fn row(job: Job, guests: &Guests, way: Way, samples: &[Sample], data_bytes: u64) -> Row {
    let of = |value: &dyn Fn(&Sample) -> f64| median(&samples.iter().map(value).collect::<Vec<_>>());
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let times: Vec<f64> = samples.iter().map(|sample| ms(sample.time)).collect();
    let unsynced: Vec<f64> = samples.iter().filter_map(|sample| sample.time_without_sync.map(ms)).collect();
    let time_ms = median(&times);
    let last = samples.last().copied().unwrap_or_default();
    Row {
        job,
        backend: guests.backend,
        load: guests.load,
        way,
        via: last.via,
        count: samples.len(),
        time_ms,
        time_min_ms: times.iter().copied().reduce(f64::min).unwrap_or(0.0),
        time_max_ms: times.iter().copied().reduce(f64::max).unwrap_or(0.0),
        time_without_sync_ms: (!unsynced.is_empty()).then(|| median(&unsynced)),
        data_bytes,
        file_bytes: last.file_bytes,
        disk_bytes: last.disk_bytes,
        rate_bytes_per_s: if time_ms > 0.0 { data_bytes as f64 * 1000.0 / time_ms } else { 0.0 },
        cpu_vmstate_s: hundredths(of(&|sample| sample.cost.cpu_vmstate_s)),
        cpu_qemu_s: hundredths(of(&|sample| sample.cost.cpu_qemu_s)),
        qemu_growth_bytes: of(&|sample| sample.cost.qemu_growth_bytes as f64) as i64,
        vmstate_peak_bytes: of(&|sample| sample.cost.vmstate_peak_bytes as f64) as u64,
        of_ceiling: None,
    }
}

/// The kernel counts in ticks of a hundredth; what lies below comes from subtracting.
fn hundredths(seconds: f64) -> f64 {
    (seconds * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUESTS: Guests = Guests { memory_mib: 1024, backend: Backend::Memfd, load: Load::Dirty };

    fn sample(ms: u64) -> Sample {
        let time = Duration::from_millis(ms);
        Sample { time, time_without_sync: Some(time / 2), file_bytes: ms, ..Sample::default() }
    }

    #[test]
    fn a_row_has_medians_and_bounds() {
        let samples = [sample(400), sample(100), sample(200)];
        let row = row(Job::Save, &GUESTS, Way::Vmstate, &samples, 1 << 30);
        assert_eq!((row.time_ms, row.time_min_ms, row.time_max_ms), (200.0, 100.0, 400.0));
        assert_eq!((row.time_without_sync_ms, row.count), (Some(100.0), 3));
        assert_eq!(row.rate_bytes_per_s, (5_u64 << 30) as f64);
    }

    #[test]
    fn the_best_of_qemus_ways_is_the_fastest_and_never_ours() {
        let mut field = Field::default();
        for (way, times) in [
            (Way::QemuStream, [50, 900, 900]),
            (Way::QemuDirect, [300, 310, 2000]),
            (Way::Vmstate, [10, 10, 10]),
        ] {
            field.samples.insert(way, times.into_iter().map(sample).collect());
        }
        let ways = [Way::QemuStream, Way::QemuDirect, Way::Vmstate];
        assert_eq!(field.qemus_best(&ways), Some(Way::QemuDirect));
        assert_eq!(field.qemus_best(&[Way::Vmstate]), None);
    }
}
