//! How much can be measured in the time there is.

use std::time::Duration;

/// How long a QEMU takes to start, and to be ended again.
const START_S: f64 = 0.3;
/// How long a guest takes until it halts that fills next to nothing.
const IDLE_BOOT_S: f64 = 0.6;
/// A save or a restore of an idle guest takes this part of one of a dirty guest; many take less.
const IDLE_PART: f64 = 0.3;
/// Rounds are not cut below this: with fewer there is no interval of 95 %.
const ROUNDS_MIN: usize = 6;

/// How often things are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The rounds of a ratio.
    pub rounds: usize,
    /// The rows.
    pub repeats: usize,
}

/// What the first measurements took, and how much there is to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experience {
    /// A guest that fills its memory, from its start until it halts.
    pub boot_s: f64,
    /// One save of a dirty guest by each way, together.
    pub pass_s: f64,
    /// One of them by vmstate, by QEMU's best way, and by the ceiling, together.
    pub round_s: f64,
    /// How many ways there are.
    pub ways: usize,
    /// How many kinds of memory.
    pub backends: usize,
    /// Whether saves are wanted.
    pub saves: bool,
    /// Whether restores are wanted.
    pub restores: bool,
}

impl Experience {
    /// How long it will take, in seconds.
    pub fn estimate_s(&self, plan: Plan) -> f64 {
        let (repeats, rounds, ways) = (plan.repeats as f64, plan.rounds as f64, self.ways as f64);
        let measured = |start_s: f64| repeats * (self.pass_s + ways * start_s);
        let compared = |start_s: f64| rounds * (self.round_s + 2.0 * start_s);
        let idle_pass_s = self.pass_s * IDLE_PART;
        let mut one = self.boot_s;
        if self.saves {
            one += measured(0.0) + compared(0.0);
            one += repeats * (idle_pass_s + ways * IDLE_BOOT_S);
            one += rounds * (idle_pass_s + 2.0 * IDLE_BOOT_S);
        }
        if self.restores {
            one += measured(START_S) + compared(START_S) + repeats * (idle_pass_s + ways * START_S);
        }
        one * self.backends as f64
    }

    /// The plan cut to fit into `limit`, rows before rounds, and what to say of it.
    pub fn fit(&self, plan: Plan, limit: Option<Duration>) -> (Plan, Option<String>) {
        let Some(limit_s) = limit.map(|limit| limit.as_secs_f64()) else { return (plan, None) };
        let fits = |plan: &Plan| self.estimate_s(*plan) <= limit_s;
        let fewer_rows = (1..=plan.repeats).rev().map(|repeats| Plan { repeats, ..plan });
        let least = ROUNDS_MIN.min(plan.rounds);
        let fewer_rounds = (least..plan.rounds).rev().map(|rounds| Plan { repeats: 1, rounds });
        let found = fewer_rows.chain(fewer_rounds).find(fits);
        let cut = found.unwrap_or(Plan { repeats: 1, rounds: least });
        if cut == plan && found.is_some() {
            return (plan, None);
        }
        let minutes = |plan| (self.estimate_s(plan) / 60.0).ceil();
        let Plan { repeats, rounds } = cut;
        let note = if cut == plan {
            format!("this machine is slow: it takes about {} minutes", minutes(cut))
        } else {
            format!(
                "cut to fit: rows are measured {repeats} × instead of {} ×, ratios in {rounds} rounds instead of {}; \
                 that takes about {} minutes instead of {}",
                plan.repeats,
                plan.rounds,
                minutes(cut),
                minutes(plan),
            )
        };
        (cut, Some(note))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_before_rounds_and_rounds_not_below_six() {
        let fast = Experience {
            boot_s: 5.0,
            pass_s: 6.0,
            round_s: 2.0,
            ways: 5,
            backends: 3,
            saves: true,
            restores: true,
        };
        let plan = Plan { rounds: 9, repeats: 3 };
        for (times, expected) in [
            (1.0, Plan { rounds: 9, repeats: 3 }),
            (1.6, Plan { rounds: 9, repeats: 2 }),
            (2.9, Plan { rounds: 7, repeats: 1 }),
            (9.0, Plan { rounds: 6, repeats: 1 }),
        ] {
            let slow = Experience {
                boot_s: fast.boot_s * times,
                pass_s: fast.pass_s * times,
                round_s: fast.round_s * times,
                ..fast
            };
            let (cut, note) = slow.fit(plan, Some(Duration::from_secs(600)));
            assert_eq!(cut, expected, "{times}");
            assert_eq!(note.is_some(), cut != plan, "{times}");
            assert_eq!(slow.fit(plan, None), (plan, None));
        }
    }

    #[test]
    fn a_run_that_cannot_fit_is_told() {
        let slow = Experience {
            boot_s: 600.0,
            pass_s: 60.0,
            round_s: 20.0,
            ways: 5,
            backends: 1,
            saves: true,
            restores: false,
        };
        let plan = Plan { rounds: 3, repeats: 1 };
        let (cut, note) = slow.fit(plan, Some(Duration::from_secs(600)));
        assert_eq!(cut, plan, "a quick run is not cut further");
        assert_eq!(note.as_deref(), Some("this machine is slow: it takes about 14 minutes"));
        let (cut, note) = slow.fit(Plan { rounds: 9, repeats: 2 }, Some(Duration::from_secs(900)));
        assert_eq!(cut, Plan { rounds: 6, repeats: 1 });
        assert_eq!(
            note.as_deref(),
            Some(
                "cut to fit: rows are measured 1 × instead of 2 ×, ratios in 6 rounds instead of 9; that takes about \
                 16 minutes instead of 19"
            )
        );
    }
}
