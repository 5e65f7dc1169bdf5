//! How much of the time there is each part of a run gets.
//!
//! Nothing is foretold: each part gets its share of what is left when it begins, and what it does not use is there for
//! those behind it. Within a part the ratios come first, since a budget hangs on them; rows that no ratio needs are
//! measured again only in time that is left over.

use std::time::{Duration, Instant};

use super::{Backend, Job, Load};

/// Rounds are not cut below this: with fewer there is no interval of 95 %.
pub const ROUNDS_MIN: usize = 6;
/// A way that took more than so many times as long as QEMU's best is not going to be it.
pub const CONTENDER_TIMES: f64 = 1.6;

/// One part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Saves or restores
    pub job: Job,
    /// of the guest with this memory
    pub backend: Backend,
    /// and this load.
    pub load: Load,
}

impl Part {
    /// All of a run, in order.
    pub fn all(backends: &[Backend], jobs: &[Job]) -> Vec<Part> {
        let mut parts = Vec::new();
        for &backend in backends {
            for load in [Load::Dirty, Load::Idle] {
                parts.extend(jobs.iter().map(|&job| Part { job, backend, load }));
            }
        }
        parts
    }

    /// What it takes of the time, against the others: about seconds for 1 GiB on two processors.
    fn weight(self) -> f64 {
        match (self.job, self.load, self.backend.is_shared()) {
            (Job::Save, Load::Dirty, _) => 35.0,
            (Job::Save, Load::Idle, false) => 25.0,
            (Job::Save, Load::Idle, true) => 40.0,
            (Job::Restore, Load::Dirty, _) => 45.0,
            (Job::Restore, Load::Idle, _) => 12.0,
        }
    }
}

/// The time of a run.
#[derive(Clone, Debug)]
pub struct Timetable {
    ends: Option<Instant>,
    parts: Vec<Part>,
}

impl Timetable {
    /// Of these parts, in order, within `limit` from now; without one there is all the time.
    pub fn start(parts: Vec<Part>, limit: Option<Duration>) -> Timetable {
        Timetable { ends: limit.map(|limit| Instant::now() + limit), parts }
    }

    /// The part begins; until when it may take, or `None` where it takes as long as it takes.
    pub fn begin(&mut self, part: Part) -> Option<Instant> {
        let left = self.ends?.saturating_duration_since(Instant::now());
        let share = share(left, part, &self.parts);
        self.parts.retain(|other| *other != part);
        Some(Instant::now() + share)
    }
}

/// What a part gets of the time that it and all others have together.
fn share(left: Duration, part: Part, parts: &[Part]) -> Duration {
    let others: f64 = parts.iter().filter(|other| **other != part).map(|other| other.weight()).sum();
    left.mul_f64(part.weight() / (part.weight() + others))
}

/// Whether something that takes so long may begin.
pub fn has_time(until: Option<Instant>, takes: Duration) -> bool {
    until.is_none_or(|until| Instant::now() + takes <= until)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARTS: [Part; 3] = [
        Part { job: Job::Save, backend: Backend::Private, load: Load::Dirty },
        Part { job: Job::Restore, backend: Backend::Private, load: Load::Dirty },
        Part { job: Job::Restore, backend: Backend::Private, load: Load::Idle },
    ];

    #[test]
    fn a_part_gets_its_share_of_what_is_left_and_the_last_one_all_of_it() {
        let left = Duration::from_secs(92);
        assert_eq!(share(left, PARTS[0], &PARTS), Duration::from_secs(35));
        assert_eq!(share(left, PARTS[0], &PARTS[..1]), left);
        assert_eq!(share(left, PARTS[0], &[]), left, "one that was not announced");
        let mut timetable = Timetable::start(PARTS.to_vec(), Some(Duration::from_secs(3600)));
        let shares = PARTS.map(|part| timetable.begin(part).expect("a limit"));
        // Nobody has used a moment of his share, so each following one may take longer.
        assert!(shares.is_sorted(), "{shares:?}");
        assert_eq!(Timetable::start(PARTS.to_vec(), None).begin(PARTS[0]), None);
    }

    #[test]
    fn nothing_begins_that_would_not_end_in_time() {
        let until = Some(Instant::now() + Duration::from_secs(3600));
        assert!(has_time(until, Duration::from_secs(60)));
        assert!(!has_time(until, Duration::from_secs(7200)));
        assert!(has_time(None, Duration::from_secs(1 << 40)));
    }

    #[test]
    fn a_run_has_a_part_for_every_job_with_every_guest() {
        let parts = Part::all(&Backend::USUAL, &[Job::Save, Job::Restore]);
        assert_eq!(parts.len(), 12);
        assert_eq!(Part::all(&[Backend::Private], &[Job::Restore]), [PARTS[1], PARTS[2]]);
    }
}
