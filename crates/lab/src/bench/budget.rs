//! What vmstate promises of its speed, as ratios, and whether a measurement keeps it.

use serde::Serialize;

use super::statistics::Interval;
use super::{Backend, Job, Load};

/// What a ratio compares vmstate with; each says how many times as long it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rival {
    /// QEMU's fastest own way.
    QemuBest,
    /// The same lanes without a guest.
    Ceiling,
    /// What an idle guest is allowed: 20 ms, and the ceiling's time for as many bytes.
    Allowance,
}

impl Rival {
    /// What it is called in a table.
    pub fn name(self) -> &'static str {
        match self {
            Rival::QemuBest => "QEMU's best",
            Rival::Ceiling => "the ceiling",
            Rival::Allowance => "20 ms + ceiling",
        }
    }
}

/// The least that a ratio shall be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Budget {
    /// The ratio.
    pub at_least: f64,
    /// The size of guest in MiB from which on it is promised.
    pub from_mib: u64,
}

/// The budget of a comparison, where there is one.
pub fn budget(job: Job, backend: Backend, load: Load, rival: Rival) -> Option<Budget> {
    // Where memory is all there, or in pages of 2 MiB, an idle guest has no holes to be left out.
    let has_holes = backend.is_fresh() || !backend.is_shared();
    let (at_least, from_mib) = match (job, load, rival, backend.is_shared()) {
        (Job::Save, Load::Idle, _, _) if !has_holes => return None,
        (Job::Save, Load::Dirty, Rival::Ceiling, _) => (0.95, 0),
        (Job::Save, Load::Dirty, Rival::QemuBest, _) => (1.5, 0),
        (Job::Save, Load::Idle, Rival::Allowance, _) => (1.0, 0),
        (Job::Save, Load::Idle, Rival::QemuBest, false) => (20.0, 16 << 10),
        (Job::Save, Load::Idle, Rival::QemuBest, true) => (200.0, 8 << 10),
        (Job::Restore, Load::Dirty, Rival::Ceiling, true) => (0.95, 0),
        (Job::Restore, Load::Dirty, Rival::QemuBest, true) => (1.2, 0),
        (Job::Restore, Load::Dirty, Rival::QemuBest, false) => (0.95, 0),
        _ => return None,
    };
    Some(Budget { at_least, from_mib })
}

/// Whether a budget is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The interval reaches the budget.
    Met,
    /// It does not.
    Missed,
    /// There are too few rounds for an interval of 95 %.
    TooFewRounds,
    /// The budget is one of larger guests.
    SmallGuest,
    /// There is no budget.
    NoBudget,
}

/// Judges a ratio that was measured with guests of `memory_mib`.
pub fn verdict(ratio: &Interval, budget: Option<Budget>, memory_mib: u64) -> Verdict {
    match budget {
        None => Verdict::NoBudget,
        Some(budget) if memory_mib < budget.from_mib => Verdict::SmallGuest,
        Some(_) if !ratio.is_sound() => Verdict::TooFewRounds,
        Some(budget) if ratio.high >= budget.at_least => Verdict::Met,
        Some(_) => Verdict::Missed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_met_when_the_interval_reaches_it() {
        let ratio = |low, high, coverage| Interval { median: low, low, high, coverage, count: 9 };
        let dirty = budget(Job::Save, Backend::Memfd, Load::Dirty, Rival::QemuBest);
        let idle = budget(Job::Save, Backend::Memfd, Load::Idle, Rival::QemuBest);
        for (ratio, budget, memory_mib, expected) in [
            (ratio(1.6, 1.8, 0.96), dirty, 2048, Verdict::Met),
            (ratio(1.2, 1.5, 0.96), dirty, 2048, Verdict::Met),
            (ratio(1.2, 1.49, 0.96), dirty, 2048, Verdict::Missed),
            (ratio(1.6, 1.8, 0.75), dirty, 2048, Verdict::TooFewRounds),
            (ratio(90.0, 110.0, 0.96), idle, 2048, Verdict::SmallGuest),
            (ratio(190.0, 210.0, 0.96), idle, 8192, Verdict::Met),
            (ratio(1.0, 1.0, 0.96), None, 2048, Verdict::NoBudget),
        ] {
            assert_eq!(verdict(&ratio, budget, memory_mib), expected, "{ratio:?} {memory_mib}");
        }
    }

    #[test]
    fn private_memory_may_be_left_to_qemu_and_shared_may_not() {
        for (job, backend, load, rival, expected) in [
            (Job::Restore, Backend::Private, Load::Dirty, Rival::QemuBest, Some(0.95)),
            (Job::Restore, Backend::Memfd, Load::Dirty, Rival::QemuBest, Some(1.2)),
            (Job::Restore, Backend::File, Load::Dirty, Rival::Ceiling, Some(0.95)),
            (Job::Restore, Backend::Private, Load::Dirty, Rival::Ceiling, None),
            (Job::Restore, Backend::File, Load::Idle, Rival::QemuBest, None),
            (Job::Save, Backend::Private, Load::Idle, Rival::QemuBest, Some(20.0)),
            (Job::Save, Backend::File, Load::Idle, Rival::QemuBest, Some(200.0)),
            (Job::Save, Backend::File, Load::Idle, Rival::Allowance, Some(1.0)),
            (Job::Save, Backend::Populated, Load::Idle, Rival::Allowance, None),
            (Job::Save, Backend::Huge, Load::Idle, Rival::QemuBest, None),
            (Job::Save, Backend::Huge, Load::Dirty, Rival::QemuBest, Some(1.5)),
            (Job::Restore, Backend::Populated, Load::Dirty, Rival::Ceiling, Some(0.95)),
            (Job::Restore, Backend::Huge, Load::Dirty, Rival::QemuBest, Some(1.2)),
        ] {
            let found = budget(job, backend, load, rival).map(|budget| budget.at_least);
            assert_eq!(found, expected, "{job:?} {backend:?} {load:?} {rival:?}");
        }
    }
}
