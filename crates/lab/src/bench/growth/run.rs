//! The guests of the growth, one after the other.

use std::path::Path;
use std::time::{Duration, Instant};

use vmstate::job::ceiling;
use vmstate::{Cancel, Error, Result};

use super::cancels;
use super::plans::{self, InfoRow};
use super::{GrowthReport, GrowthSettings, ShareRow, SizeRow};
use crate::bench::budget::{budget, verdict};
use crate::bench::clone::available_bytes;
use crate::bench::guests::{Guests, IDLE_PAGES, Running, boot};
use crate::bench::measure::{Images, Sample, ceiling_of_save, save};
use crate::bench::modes::{images, ms};
use crate::bench::plan::ROUNDS_MIN;
use crate::bench::room::Room;
use crate::bench::statistics::{interval, median};
use crate::bench::stock::Abilities;
use crate::bench::{Backend, Job, Load, Machine, Rival, Way};
use crate::demo::Narrator;
use crate::{Guest, GuestSettings, MachineKind, MemoryBackend, QemuSpec};

/// How much of the memory is touched, in percent.
const SHARES: [u64; 5] = [0, 1, 10, 50, 100];
/// What has to be left of the memory and of the disk beside a guest.
const MARGIN_MIB: u64 = 1024;
/// Where memory comes from. A file in `/dev/shm` is the same to the kernel as a memfd.
const BACKENDS: [Backend; 2] = [Backend::Private, Backend::Memfd];
/// The guest that is asked what its QEMU can do, and that shows which of its ways is the fastest.
const SMALL_MIB: u64 = 1024;

/// Measures how the cost grows.
///
/// # Errors
/// Whatever keeps it from succeeding.
pub fn growth(settings: &GrowthSettings, cancel: &Cancel, narrator: &dyn Narrator) -> Result<GrowthReport> {
    measure_all(settings, cancel, narrator).map_err(|error| {
        // A terminal's ^C ends the QEMUs as well, and what they say then is not the reason.
        if cancel.is_cancelled() { Error::interrupted() } else { error }
    })
}

fn measure_all(settings: &GrowthSettings, cancel: &Cancel, narrator: &dyn Narrator) -> Result<GrowthReport> {
    let started = Instant::now();
    let room = Room::found(&settings.directory)?;
    let directory = images(&settings.directory)?;
    let mut run = Run::new(settings, cancel, narrator, directory.path(), &room)?;
    for backend in BACKENDS {
        for &memory_mib in &settings.sizes_mib {
            run.size(backend, memory_mib)?;
        }
    }
    for backend in BACKENDS {
        if let Some(memory_mib) = settings.reserved_mib {
            run.reserved(backend, memory_mib)?;
        }
    }
    for backend in BACKENDS {
        run.shares(backend, &room)?;
    }
    let plans = plans::plans(settings.planned_bytes, settings.rounds.min(3), &mut |text| run.note(text))?;
    let Run { machine, sizes, shares, infos, cancels, notes, .. } = run;
    let took_s = started.elapsed().as_secs_f64();
    Ok(GrowthReport { machine, sizes, shares, plans, infos, cancels, notes, took_s })
}

struct Run<'a> {
    settings: &'a GrowthSettings,
    cancel: &'a Cancel,
    narrator: &'a dyn Narrator,
    started: Instant,
    images: Images<'a>,
    machine: Machine,
    ways: Vec<Way>,
    sizes: Vec<SizeRow>,
    shares: Vec<ShareRow>,
    infos: Vec<InfoRow>,
    cancels: Vec<cancels::CancelRow>,
    notes: Vec<String>,
}

impl<'a> Run<'a> {
    fn new(
        settings: &'a GrowthSettings,
        cancel: &'a Cancel,
        narrator: &'a dyn Narrator,
        directory: &'a Path,
        room: &Room,
    ) -> Result<Run<'a>> {
        let small = Guests { memory_mib: 64, backend: Backend::Private, load: Load::Idle }.wait()?;
        let mut client = small.client(cancel)?;
        let abilities = Abilities::of(&mut client, ceiling::takes_direct_io(directory)?)?;
        Ok(Run {
            settings,
            cancel,
            narrator,
            started: Instant::now(),
            images: Images { directory },
            machine: Machine::here(client.version()?.to_string(), room.file_system.clone()),
            ways: Way::QEMUS.into_iter().filter(|way| abilities.has(*way)).collect(),
            sizes: Vec::new(),
            shares: Vec::new(),
            infos: Vec::new(),
            cancels: Vec::new(),
            notes: Vec::new(),
        })
    }

    fn tell(&self, text: &str) {
        self.narrator.tell(&format!("[{:>4.0} s] {text}", self.started.elapsed().as_secs_f64()));
    }

    fn note(&mut self, text: String) {
        self.tell(&text);
        self.notes.push(text);
    }

    fn boot(&self, backend: Backend, memory_mib: u64, percent: Option<u64>) -> Result<Running> {
        if self.cancel.is_cancelled() {
            return Err(Error::interrupted());
        }
        boot(&spec(backend, memory_mib, percent), self.cancel)
    }

    /// A QEMU of its own for every save: a scan for zeros allocates what an idle guest never touched.
    fn save_idle(&self, backend: Backend, memory_mib: u64, way: Way) -> Result<Sample> {
        save(&self.boot(backend, memory_mib, None)?, way, &self.images, self.cancel)
    }

    /// Which of QEMU's ways is the fastest with an idle guest of moderate size.
    fn best(&self, backend: Backend) -> Result<Way> {
        let memory_mib = self.settings.sizes_mib.iter().copied().min().unwrap_or(SMALL_MIB).max(64);
        let mut times = Vec::new();
        for &way in &self.ways {
            let mut samples = Vec::new();
            for _ in 0..self.settings.rounds.min(3) {
                samples.push(ms(self.save_idle(backend, memory_mib, way)?.time));
            }
            times.push((median(&samples), way));
        }
        let best = times.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
        Ok(best.map_or(Way::QemuStream, |(_, way)| way))
    }

    fn size(&mut self, backend: Backend, memory_mib: u64) -> Result<()> {
        let available_mib = available_bytes() >> 20;
        let needs_mib = memory_mib + MARGIN_MIB;
        // QEMU's scan makes all of a memfd; of private memory it makes page tables.
        let is_held = !backend.is_shared() || available_mib >= needs_mib;
        let known = self.sizes.iter().find(|row| row.backend == backend).and_then(|row| row.qemu_way);
        let best = match known.and_then(|name| self.ways.iter().copied().find(|way| way.name() == name)) {
            Some(best) => best,
            None => self.best(backend)?,
        };
        self.tell(&format!(
            "idle guest of {memory_mib} MiB, {} memory, against {}",
            backend.name(),
            best.name()
        ));
        if !is_held {
            self.note(format!(
                "QEMU's own save of an idle memfd guest of {memory_mib} MiB would allocate all of it, and this machine \
                 has {available_mib} MiB left"
            ));
        }
        let begun = Instant::now();
        let (mut ours, mut qemus) = (Vec::new(), Vec::new());
        for round in 0..self.settings.rounds {
            if round >= ROUNDS_MIN && begun.elapsed() > self.settings.time_per_size {
                break;
            }
            for turn in [round % 2 == 0, round % 2 == 1] {
                match turn {
                    true => ours.push(self.save_idle(backend, memory_mib, Way::Vmstate)?),
                    false if is_held => qemus.push(self.save_idle(backend, memory_mib, best)?),
                    false => {}
                }
            }
        }
        self.sizes.push(size_row(backend, memory_mib, &ours, &qemus, best));
        Ok(())
    }

    /// A guest whose memory is an address space, and whose image is as long.
    fn reserved(&mut self, backend: Backend, memory_mib: u64) -> Result<()> {
        self.tell(&format!("idle guest of {memory_mib} MiB, {} memory, reserved", backend.name()));
        let mut ours = Vec::new();
        for _ in 0..self.settings.rounds.min(5) {
            ours.push(self.save_idle(backend, memory_mib, Way::Vmstate)?);
        }
        self.sizes.push(size_row(backend, memory_mib, &ours, &[], Way::Vmstate));
        if backend.is_shared() {
            self.info("idle guest, one bit in a bitmap of holes for each page")?;
        }
        Ok(())
    }

    fn info(&mut self, what: &'static str) -> Result<()> {
        let image = self.images.of(Way::Vmstate);
        let row = plans::info(what, &image, self.settings.program.as_deref(), self.settings.rounds)?;
        self.infos.push(row);
        Ok(())
    }

    fn shares(&mut self, backend: Backend, room: &Room) -> Result<()> {
        let memory_mib = self.settings.shares_mib;
        for percent in SHARES {
            let touched_mib = memory_mib * percent / 100;
            // A guest and its image; the ceiling's file beside it on the disk.
            let (memory, disk) = (available_bytes() >> 20, room.disk_mib);
            if memory < memory_mib + MARGIN_MIB || disk < 3 * touched_mib + MARGIN_MIB {
                self.note(format!(
                    "no guest with {percent} % of {memory_mib} MiB: {memory} MiB of memory and {disk} of disk are left"
                ));
                continue;
            }
            self.tell(&format!("{percent} % of {memory_mib} MiB touched, {} memory", backend.name()));
            let running = self.boot(backend, memory_mib, Some(percent))?;
            let (mut ours, mut ceilings) = (Vec::new(), Vec::new());
            // Each once before: the first of all finds what a disk does more slowly the first time.
            let data_bytes = save(&running, Way::Vmstate, &self.images, self.cancel)?.data_bytes.unwrap_or(0);
            ceiling_of_save(&self.images, data_bytes, self.cancel)?;
            for round in 0..self.settings.rounds.min(ROUNDS_MIN) {
                for turn in [round % 2 == 0, round % 2 == 1] {
                    match turn {
                        true => ours.push(save(&running, Way::Vmstate, &self.images, self.cancel)?),
                        false => ceilings.push(ms(ceiling_of_save(&self.images, data_bytes, self.cancel)?)),
                    }
                }
            }
            let direct = self.ways.last().copied().unwrap_or(Way::QemuStream);
            let is_full = percent == SHARES[SHARES.len() - 1];
            if is_full {
                self.info(match backend {
                    Backend::Private => "full guest, private memory",
                    _ => "full guest, memfd",
                })?;
                let found = cancels::saves(&running, backend, &self.images, self.settings.rounds.min(5))?;
                self.cancels.extend(found);
            }
            // Last, since it allocates what was never touched.
            let qemu = save(&running, direct, &self.images, self.cancel)?;
            let (median_ms, min, max) = spread(&ours);
            self.shares.push(ShareRow {
                memory_mib,
                backend,
                touched_percent: percent,
                data_bytes,
                vmstate_ms: median_ms,
                vmstate_min_ms: min,
                vmstate_max_ms: max,
                ceiling_ms: median(&ceilings),
                qemu_ms: ms(qemu.time),
                vmstate_peak_bytes: peak(&ours),
                rounds: ours.len(),
            });
            drop(running);
            if is_full {
                let guests = Guests { memory_mib, backend, load: Load::Dirty };
                let image = self.images.of(Way::Vmstate);
                self.cancels.extend(cancels::restores(&guests, &image, self.settings.rounds.min(5))?);
            }
        }
        Ok(())
    }
}

/// A guest that fills so many percent of its memory and halts; 8 MiB where it is not said.
fn spec(backend: Backend, memory_mib: u64, percent: Option<u64>) -> QemuSpec {
    let spec = QemuSpec::new(MachineKind::Q35, memory_mib << 20);
    let settings = GuestSettings { fill_rounds: 1, halt_after_round: 1, ..GuestSettings::default() };
    let settings = match percent {
        None => GuestSettings { pages_low_max: IDLE_PAGES, pages_high_max: 0, ..settings },
        Some(percent) => {
            let [low, high] = Guest::new(settings).owned_ranges(&spec.layout());
            let (low, high) = (low.end - low.start, high.end - high.start);
            let pages = (low + high) * percent / 100;
            let count = |pages: u64| u32::try_from(pages).unwrap_or(u32::MAX);
            GuestSettings {
                // The guest wants one at the least.
                pages_low_max: count(pages.min(low).max(1)),
                pages_high_max: count(pages.saturating_sub(low)),
                ..settings
            }
        }
    };
    let backend = match backend {
        // Reserved is what plain memory of a size that the machine has not is refused for.
        Backend::Private if memory_mib << 20 > available_bytes() => {
            MemoryBackend::Object("memory-backend-ram,reserve=off".to_owned())
        }
        Backend::Private => MemoryBackend::Plain,
        Backend::Memfd | Backend::File | Backend::Populated | Backend::Huge => MemoryBackend::Memfd,
    };
    QemuSpec { backend, guest: Some(Guest::new(settings)), second_qmp: percent.is_some(), ..spec }
}

fn size_row(backend: Backend, memory_mib: u64, ours: &[Sample], qemus: &[Sample], best: Way) -> SizeRow {
    let ratios: Vec<f64> = ours
        .iter()
        .zip(qemus)
        .map(|(ours, qemus)| qemus.time.as_secs_f64() / ours.time.as_secs_f64())
        .collect();
    let ratio = interval(&ratios);
    let budget = budget(Job::Save, backend, Load::Idle, Rival::QemuBest);
    let (vmstate_ms, vmstate_min_ms, vmstate_max_ms) = spread(ours);
    let growth = |samples: &[Sample]| {
        let values: Vec<f64> = samples.iter().map(|sample| sample.cost.qemu_growth_bytes as f64).collect();
        median(&values) as i64
    };
    let is_measured = !qemus.is_empty();
    SizeRow {
        memory_mib,
        backend,
        vmstate_ms,
        vmstate_min_ms,
        vmstate_max_ms,
        qemu_ms: is_measured.then(|| spread(qemus).0),
        qemu_way: is_measured.then(|| best.name()),
        qemu_growth_bytes: is_measured.then(|| growth(qemus)),
        vmstate_growth_bytes: growth(ours),
        vmstate_peak_bytes: peak(ours),
        ratio,
        budget,
        verdict: ratio.map_or(super::Verdict::NoBudget, |ratio| verdict(&ratio, budget, memory_mib)),
        data_bytes: ours.iter().find_map(|sample| sample.data_bytes).unwrap_or(0),
        rounds: ours.len(),
    }
}

/// The median, the shortest and the longest in milliseconds.
fn spread(samples: &[Sample]) -> (f64, f64, f64) {
    let times: Vec<f64> = samples.iter().map(|sample| ms(sample.time)).collect();
    (
        median(&times),
        times.iter().copied().reduce(f64::min).unwrap_or(0.0),
        times.iter().copied().reduce(f64::max).unwrap_or(0.0),
    )
}

fn peak(samples: &[Sample]) -> u64 {
    samples.iter().map(|sample| sample.cost.vmstate_peak_bytes).max().unwrap_or(0)
}

/// How long one of a series took in the middle, and at the most.
pub(super) fn middle_and_most(times: &[Duration]) -> (f64, f64) {
    let times: Vec<f64> = times.iter().copied().map(ms).collect();
    (median(&times), times.iter().copied().reduce(f64::max).unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_taken_from_low_memory_first() {
        let pages = |percent| {
            let settings = spec(Backend::Memfd, 4096, percent).guest.expect("a guest").settings;
            (settings.pages_low_max, settings.pages_high_max)
        };
        assert_eq!(pages(None), (IDLE_PAGES, 0));
        assert_eq!(pages(Some(0)), (1, 0));
        let (low, high) = pages(Some(100));
        assert!(low > 500_000 && high == 524_288, "{low} {high}");
        assert_eq!(pages(Some(50)), (low.min((low + high) / 2), ((low + high) / 2).saturating_sub(low)));
        assert!(pages(Some(1)).0 > 10_000);
    }
}
