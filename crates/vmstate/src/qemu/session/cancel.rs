//! Migrations that are given up: how they are cancelled without harm to the guest.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::{FINALIZED_INTERVAL, SETTLE_TIMEOUT, Session};
use crate::qmp::{Begun, MigratedRam, MigrationInfo};
use crate::{Error, Kind, Result};

/// The parameter that holds a migration back.
const BANDWIDTH: &str = "max-bandwidth";
/// The least of it, in bytes per second, of which a tenth, what QEMU grants itself at a time, is not zero: that would be no
/// limit (migration/migration-stats.c:migration_rate_set, QEMU 10.0).
const HELD_BACK_BANDWIDTH: u64 = 10;
/// The parameter that says who looks for zero pages. Those have no part in the bandwidth: a migration that finds many goes on for
/// 50 ms of each 100 (`MAX_WAIT` of migration/ram.c), and one that looks for none stops after the first it has sent. What it
/// writes is removed.
const ZERO_PAGES: &str = "zero-page-detection";
/// How often a migration that is held back is looked at, and for how long it then has to stand still. It goes on every
/// 100 ms (`BUFFER_DELAY`); what is left of them is the time in which a cancel has to arrive.
const QUIET_INTERVAL: Duration = Duration::from_millis(4);
const QUIET_TIME: Duration = Duration::from_millis(30);
/// How long it stands still where it does not go on at all: its disk hangs, and so do its channels.
const STUCK_TIME: Duration = Duration::from_millis(250);

/// How long threads of QEMU may be busy that are waited for besides, where they can be seen: somebody may have resumed the
/// guest.
const BUSY_TIME_MAX: Duration = Duration::from_secs(2);

impl Session {
    /// Cancels the migration, if QEMU has not refused it: then there may be another's.
    pub(super) fn give_up_migrating(&mut self) -> Result<()> {
        if let Some(asked) = self.migrate_asked.take()
            && self.client.end(asked).is_err_and(|error| error.is_refusal())
        {
            self.migrating = false;
            return Ok(());
        }
        self.cancel_migration().map(drop)
    }

    /// Cancels the migration and waits until it is gone. It may have completed before.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn cancel_migration(&mut self) -> Result<MigrationInfo> {
        let held_back = match self.writes_by_channels() {
            Ok(true) => self.hold_back(),
            other => other.map(|_| Vec::new()),
        };
        // Cancelled in any case: a guest that goes on is not to be migrated.
        self.client.migrate_cancel()?;
        let ended = self.await_cancelled()?;
        self.let_go_on(&held_back?)?;
        Ok(ended)
    }

    /// Waits until a migration that was cancelled is gone. QEMU sends events of that only where it was told to.
    ///
    /// # Errors
    /// As every QMP command.
    pub(in crate::qemu) fn await_cancelled(&mut self) -> Result<MigrationInfo> {
        let asked = self.client.begin("query-migrate", json!({}))?;
        self.await_cancelled_from(asked)
    }

    /// The same, by the answer to a first question.
    ///
    /// # Errors
    /// As there.
    pub(in crate::qemu) fn await_cancelled_from(&mut self, asked: Begun) -> Result<MigrationInfo> {
        let deadline = Instant::now() + self.client.timeout.unwrap_or(SETTLE_TIMEOUT);
        let mut info = MigrationInfo::of(&self.client.end(asked)?);
        while info.is_under_way() {
            if Instant::now() >= deadline {
                let clause = format!("QEMU's migration is still in state `{}`", info.status);
                return Err(Error::new(Kind::Peer, clause));
            }
            self.client.next_event(Some(Instant::now() + FINALIZED_INTERVAL))?;
            info = self.client.migration()?;
        }
        self.ended_as(&info)?;
        Ok(info)
    }

    /// Whether QEMU migrates into a file by several channels.
    fn writes_by_channels(&mut self) -> Result<bool> {
        let capabilities = self.client.capabilities()?;
        let is_on = |name: &str| capabilities.iter().any(|c| c.name == name && c.state);
        Ok(is_on("mapped-ram") && is_on("multifd"))
    }

    /// Slows the migration down and waits until its channels have nothing to do, or until it has ended. Returns the names of
    /// the parameters that are to be put back at once; the others were ours, and the end of the session puts back what it
    /// found.
    ///
    /// QEMU frees the bitmap of a mapped-ram image when its migration thread has ended, and ends the channels after that
    /// (migration/migration.c:migration_cleanup, QEMU 9.0 to 10.0). A channel that has yet to mark the pages of its last
    /// order then marks them in no memory, and QEMU dies, and the guest with it. Of an idle guest on a busy host one cancel
    /// in ten came to that (docs/guide/troubleshoot.md).
    fn hold_back(&mut self) -> Result<Vec<&'static str>> {
        let now = self.client.parameters()?;
        let (mut changes, mut foreign) = (Map::new(), Vec::new());
        for (name, value) in [(BANDWIDTH, json!(HELD_BACK_BANDWIDTH)), (ZERO_PAGES, json!("none"))] {
            let Some(found) = now.get(name) else { continue };
            changes.insert(name.to_owned(), value);
            if !self.parameters_found.contains_key(name) {
                self.parameters_found.insert(name.to_owned(), found.clone());
                foreign.push(name);
            }
        }
        if !foreign.is_empty() {
            // Whoever is killed meanwhile leaves them to the next to put them back.
            self.write_down()?;
        }
        self.client.set_parameters(changes)?;
        let deadline = Instant::now() + self.client.timeout.unwrap_or(SETTLE_TIMEOUT);
        let patience = Instant::now() + BUSY_TIME_MAX;
        let mut quiet = Quiet::since(Instant::now());
        loop {
            let info = self.client.migration()?;
            let now = Instant::now();
            let is_quiet = || now >= patience || !self.process.is_some_and(has_busy_threads);
            if !info.is_under_way() || quiet.is_reached(info.ram, now) && is_quiet() || now >= deadline {
                return Ok(foreign);
            }
            self.client.next_event(Some(now + QUIET_INTERVAL))?;
        }
    }

    /// Puts parameters back that a migration had before it was held back.
    fn let_go_on(&mut self, names: &[&'static str]) -> Result<()> {
        let found = names
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.parameters_found.get(*name)?.clone())));
        let found: Map<String, Value> = found.collect();
        if found.is_empty() {
            return Ok(());
        }
        self.client.set_parameters(found)?;
        for name in names {
            self.parameters_found.remove(*name);
        }
        self.write_down()
    }
}

/// Whether a thread of a process runs, or waits for a processor: one that has been given something to do and has not begun
/// with it, on a busy host, is not told from one that has nothing to do by what QEMU tells. Nothing is known of a process
/// that cannot be looked into.
fn has_busy_threads(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let stats = threads.flatten().filter_map(|thread| std::fs::read(thread.path().join("stat")).ok());
    // The state stands behind the name, which may have any bytes (proc_pid_stat(5)).
    let mut states = stats.filter_map(|stat| {
        let name_end = stat.iter().rposition(|byte| *byte == b')')?;
        stat.get(name_end + 2).copied()
    });
    states.any(|state| state == b'R')
}

/// When a migration that is held back stands still.
struct Quiet {
    ram: Option<MigratedRam>,
    since: Instant,
    has_moved: bool,
}

impl Quiet {
    fn since(now: Instant) -> Quiet {
        Quiet { ram: None, since: now, has_moved: false }
    }

    /// Whether it does, now that it is so far.
    fn is_reached(&mut self, ram: Option<MigratedRam>, now: Instant) -> bool {
        if ram != self.ram {
            self.has_moved |= self.ram.is_some();
            (self.ram, self.since) = (ram, now);
        }
        // What has just moved goes on in the next tenth of a second, and not before.
        let least = if self.has_moved { QUIET_TIME } else { STUCK_TIME };
        now.duration_since(self.since) >= least
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that ends with the test, however the test ends.
    struct Program(std::process::Child);

    impl Program {
        fn start(program: &str, args: &[&str]) -> Program {
            let mut command = std::process::Command::new(program);
            Program(command.args(args).stdin(std::process::Stdio::piped()).spawn().unwrap())
        }

        /// Kills it and waits for its end: whether a thread of it is busy after that.
        fn end(mut self) -> bool {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
            has_busy_threads(self.0.id())
        }
    }

    impl Drop for Program {
        fn drop(&mut self) {
            // It may have ended already.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_thread_that_runs_is_busy_and_one_that_waits_is_not() {
        let deadline = Instant::now() + Duration::from_secs(20);
        let becomes = |program: &Program, busy| {
            while has_busy_threads(program.0.id()) != busy {
                assert!(Instant::now() < deadline, "{busy}");
                std::thread::yield_now();
            }
        };
        let runs = Program::start("sh", &["-c", "while :; do :; done"]);
        let waits = Program::start("cat", &[]);
        // Each has to come so far first.
        becomes(&waits, false);
        becomes(&runs, true);
        assert!(!runs.end(), "it has gone");
        assert!(!waits.end(), "it has gone");
    }

    #[test]
    fn a_migration_that_is_held_back_stands_still_when_it_has_not_moved_for_a_while() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let left = |remaining_bytes| Some(MigratedRam { remaining_bytes, ..MigratedRam::default() });
        // It is seen to move, and then not for 30 ms.
        let mut quiet = Quiet::since(start);
        for (ms, ram, expected) in [
            (0, left(9), false),
            (200, left(9), false),
            (204, left(8), false),
            (233, left(8), false),
            (234, left(8), true),
            (235, left(7), false),
            (265, left(7), true),
        ] {
            assert_eq!(quiet.is_reached(ram, at(ms)), expected, "{ms}");
        }
        // One that never moves, and one that has not begun.
        for ram in [left(9), None] {
            let mut quiet = Quiet::since(start);
            for (ms, expected) in [(0, false), (249, false), (250, true)] {
                assert_eq!(quiet.is_reached(ram, at(ms)), expected, "{ms} {ram:?}");
            }
        }
        // The first that is told is no move.
        let mut quiet = Quiet::since(start);
        for (ms, ram, expected) in
            [(0, None, false), (9, left(9), false), (258, left(9), false), (259, left(9), true)]
        {
            assert_eq!(quiet.is_reached(ram, at(ms)), expected, "{ms}");
        }
    }
}
