//! How soon a job ends that is cancelled, in every phase.

use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmstate::net::QmpAddress;
use vmstate::qmp::Client;
use vmstate::{
    Cancel, Error, Kind, Mode, Observer, Progress, Record, RestoreSettings, Result, SaveSettings, Target,
    Then, Via,
};

use super::run::middle_and_most;
use crate::bench::guests::{Guests, Running};
use crate::bench::measure::{Images, leave_cache};
use crate::bench::{Backend, Job};

/// How often it is looked how far a job is.
const LOOK_INTERVAL: Duration = Duration::from_micros(100);
/// How long is listened on when the job may be over.
const LISTEN_INTERVAL: Duration = Duration::from_millis(5);

/// A job that was cancelled at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CancelRow {
    /// The job
    pub job: Job,
    /// of a guest with this memory.
    pub backend: Backend,
    /// When it was cancelled: as a phase began, or when so much of the RAM had been moved.
    pub when: &'static str,
    /// From then until the guest of a save ran again, in milliseconds: the median; nothing where it had not been stopped.
    pub runs_ms: Option<f64>,
    /// The longest.
    pub runs_max_ms: Option<f64>,
    /// From then until the call was over: the median. What was written is removed by then, which takes the file system
    /// its time, and the guest of a save runs.
    pub median_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// How often it ended by that.
    pub count: usize,
    /// How often the job had been faster.
    pub too_late: usize,
}

/// A moment of a job.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// As this phase begins.
    Phase(&'static str),
    /// When this part of the RAM is done.
    Part(f64),
}

const SAVES: [(&str, Moment); 8] = [
    ("connect", Moment::Phase("connect")),
    ("probe", Moment::Phase("probe")),
    ("stop", Moment::Phase("stop")),
    ("device state", Moment::Phase("device state")),
    ("RAM, a tenth", Moment::Part(0.1)),
    ("RAM, half", Moment::Part(0.5)),
    ("RAM, nine tenths", Moment::Part(0.9)),
    ("metadata", Moment::Phase("metadata")),
];

const RESTORES: [(&str, Moment); 4] = [
    ("compare", Moment::Phase("compare")),
    ("RAM, a tenth", Moment::Part(0.1)),
    ("RAM, half", Moment::Part(0.5)),
    ("RAM, nine tenths", Moment::Part(0.9)),
];

/// Throws the switch of a job at its moment, and remembers when.
struct Trigger {
    moment: Moment,
    cancel: Cancel,
    thrown: OnceLock<Instant>,
    progress: Mutex<Option<Progress>>,
    /// Thrown when the job is over, however it ended.
    over: Cancel,
}

impl Trigger {
    fn new(moment: Moment) -> Result<Trigger> {
        let cancel = || Cancel::new().map_err(|error| Error::io("cannot create an eventfd", error));
        Ok(Trigger {
            moment,
            cancel: cancel()?,
            thrown: OnceLock::new(),
            progress: Mutex::default(),
            over: cancel()?,
        })
    }

    fn throw(&self) {
        self.thrown.get_or_init(Instant::now);
        self.cancel.cancel();
    }

    fn watch(&self, part: f64) {
        while !self.over.wait(LOOK_INTERVAL) {
            let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(reading) = progress.as_ref().map(Progress::read) else { continue };
            let wanted = reading.total_bytes.map(|total| total as f64 * part);
            if wanted.is_some_and(|wanted| reading.done_bytes as f64 >= wanted && reading.done_bytes > 0) {
                return self.throw();
            }
        }
    }

    /// Runs the job; how long it went on after the switch, or `None` where it was done before that counted.
    fn of<T>(&self, job: impl FnOnce(&Cancel, &Trigger) -> Result<T>) -> Result<Option<Duration>> {
        std::thread::scope(|scope| {
            if let Moment::Part(part) = self.moment {
                scope.spawn(move || self.watch(part));
            }
            let result = job(&self.cancel, self);
            let ended = Instant::now();
            self.over.cancel();
            match result {
                Ok(_) => Ok(None),
                Err(error) if error.kind() == Kind::Interrupted => {
                    Ok(self.thrown.get().map(|thrown| ended.saturating_duration_since(*thrown)))
                }
                Err(error) => Err(error),
            }
        })
    }
}

impl Observer for Trigger {
    fn phase(&self, name: &'static str) {
        if matches!(self.moment, Moment::Phase(wanted) if wanted == name) {
            self.throw();
        }
    }

    fn progress(&self, progress: &Progress) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress.clone());
    }
}

/// Cancels saves of a guest that runs, and sees that it runs again.
pub fn saves(
    running: &Running,
    backend: Backend,
    images: &Images<'_>,
    count: usize,
) -> Result<Vec<CancelRow>> {
    let image = images.directory.join("cancelled.img");
    let mut rows = Vec::new();
    let unheeded = Cancel::new().map_err(|error| Error::io("cannot create an eventfd", error))?;
    // One client asks for the save, the other hears of what the guest does.
    let listener = QmpAddress::Unix(running.qemu.second_qmp_path());
    let mut listener = Client::connect(&listener, &unheeded)?;
    for (when, moment) in SAVES {
        let (mut times, mut resumed) = (Vec::new(), Vec::new());
        for _ in 0..count {
            images.remove(&image)?;
            let trigger = Trigger::new(moment)?;
            let settings = SaveSettings {
                via: Via::Direct,
                then: Then::Resume,
                ..SaveSettings::new(running.address(), &image)
            };
            let over = trigger.over.clone();
            listener.take_events();
            let (took, heard) = std::thread::scope(|scope| {
                let heard = scope.spawn(|| last_resume(&mut listener, &over));
                let took = trigger.of(|cancel, observer| vmstate::save(&settings, cancel, observer));
                let lost = |_| Err(Error::new(Kind::Io, "the thread that listens panicked"));
                (took, heard.join().unwrap_or_else(lost))
            });
            let took = took?;
            if let (Some(_), Some(thrown), Some(heard)) = (took, trigger.thrown.get(), heard?) {
                resumed.push(heard.saturating_duration_since(*thrown));
            }
            times.push(took);
            if !listener.status()?.running {
                let clause = format!("a save that was cancelled ({when}) has left its guest paused");
                return Err(Error::new(Kind::Peer, clause));
            }
        }
        rows.push(row((Job::Save, backend, when), &times, &resumed));
    }
    images.remove(&image)?;
    Ok(rows)
}

/// Cancels restores into QEMUs that wait.
pub fn restores(guests: &Guests, image: &Path, count: usize) -> Result<Vec<CancelRow>> {
    let mut rows = Vec::new();
    for (when, moment) in RESTORES {
        let mut times = Vec::new();
        for _ in 0..count {
            let waiting = guests.wait()?;
            leave_cache(image)?;
            let settings = RestoreSettings {
                mode: Mode::Eager,
                record: Record::Running,
                ..RestoreSettings::new(image, Target::Waiting(waiting.address()))
            };
            let trigger = Trigger::new(moment)?;
            times.push(trigger.of(|cancel, observer| vmstate::restore(&settings, cancel, observer))?);
        }
        rows.push(row((Job::Restore, guests.backend, when), &times, &[]));
    }
    Ok(rows)
}

/// When the guest was last resumed before the job was over.
fn last_resume(listener: &mut Client, over: &Cancel) -> Result<Option<Instant>> {
    let mut last = None;
    loop {
        match listener.next_event(Some(Instant::now() + LISTEN_INTERVAL))? {
            Some(event) if event.name == "RESUME" => last = Some(Instant::now()),
            Some(_) => {}
            None if over.is_cancelled() => return Ok(last),
            None => {}
        }
    }
}

fn row(
    (job, backend, when): (Job, Backend, &'static str),
    times: &[Option<Duration>],
    resumed: &[Duration],
) -> CancelRow {
    let ended: Vec<Duration> = times.iter().copied().flatten().collect();
    let runs = (!resumed.is_empty()).then(|| middle_and_most(resumed));
    let (median_ms, max_ms) = middle_and_most(&ended);
    CancelRow {
        job,
        backend,
        when,
        runs_ms: runs.map(|(median_ms, _)| median_ms),
        runs_max_ms: runs.map(|(_, max_ms)| max_ms),
        median_ms,
        max_ms,
        count: ended.len(),
        too_late: times.len() - ended.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switch_is_thrown_when_its_phase_begins_and_at_no_other() {
        let trigger = Trigger::new(Moment::Phase("ram")).unwrap();
        let job = |wanted: &'static str| {
            move |cancel: &Cancel, observer: &Trigger| {
                observer.phase(wanted);
                if cancel.is_cancelled() { Err(Error::interrupted()) } else { Ok(()) }
            }
        };
        assert_eq!(trigger.of(job("probe")).unwrap(), None, "it was done before");
        let trigger = Trigger::new(Moment::Phase("ram")).unwrap();
        assert!(trigger.of(job("ram")).unwrap().is_some());
        let trigger = Trigger::new(Moment::Part(0.5)).unwrap();
        let failed = trigger.of(|_, _| Err::<(), _>(Error::new(Kind::Peer, "gone"))).unwrap_err();
        assert_eq!(failed.to_string(), "gone");
    }

    #[test]
    fn what_was_too_late_has_no_time() {
        let ms = |ms| Some(Duration::from_millis(ms));
        let resumed = [Duration::from_millis(2)];
        let row = row((Job::Save, Backend::Memfd, "probe"), &[ms(3), None, ms(9), ms(4)], &resumed);
        assert_eq!((row.runs_ms, row.runs_max_ms), (Some(2.0), Some(2.0)));
        assert_eq!((row.median_ms, row.max_ms, row.count, row.too_late), (4.0, 9.0, 3, 1));
    }
}
