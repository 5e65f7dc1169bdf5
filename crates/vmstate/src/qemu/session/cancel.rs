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
/// How often a migration that is held back is looked at, and for how long it then has to stand still. It goes on every
/// 100 ms (`BUFFER_DELAY`), for 50 ms at the most (`MAX_WAIT` of migration/ram.c).
const QUIET_INTERVAL: Duration = Duration::from_millis(4);
const QUIET_TIME: Duration = Duration::from_millis(30);
/// How long it stands still where it does not go on at all: its disk hangs, and so do its channels.
const STUCK_TIME: Duration = Duration::from_millis(250);

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
            other => other,
        };
        // Cancelled in any case: a guest that goes on is not to be migrated.
        self.client.migrate_cancel()?;
        let ended = self.await_cancelled()?;
        if held_back? {
            self.let_go_on()?;
        }
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

    /// Slows the migration down and waits until its channels have nothing to do, or until it has ended. Returns whether the
    /// limit that it had is to be put back at once; otherwise it was ours, and the one that was found is.
    ///
    /// QEMU frees the bitmap of a mapped-ram image when its migration thread has ended, and ends the channels after that
    /// (migration/migration.c:migration_cleanup, QEMU 9.0 to 10.0). A channel that has yet to mark the pages of its last
    /// order then marks them in no memory, and QEMU dies, and the guest with it. Of an idle guest on a busy host one cancel
    /// in ten came to that.
    fn hold_back(&mut self) -> Result<bool> {
        let is_ours = self.parameters_found.contains_key(BANDWIDTH);
        if !is_ours {
            let Some(found) = self.client.parameters()?.remove(BANDWIDTH) else { return Ok(false) };
            self.parameters_found.insert(BANDWIDTH.to_owned(), found);
            // Whoever is killed meanwhile leaves it to the next to put it back.
            self.write_down()?;
        }
        self.set_bandwidth(json!(HELD_BACK_BANDWIDTH))?;
        let deadline = Instant::now() + self.client.timeout.unwrap_or(SETTLE_TIMEOUT);
        let mut quiet = Quiet::since(Instant::now());
        loop {
            let info = self.client.migration()?;
            let now = Instant::now();
            if !info.is_under_way() || quiet.is_reached(info.ram, now) || now >= deadline {
                return Ok(!is_ours);
            }
            self.client.next_event(Some(now + QUIET_INTERVAL))?;
        }
    }

    /// Puts the limit back that a migration had before it was held back.
    fn let_go_on(&mut self) -> Result<()> {
        if let Some(found) = self.parameters_found.get(BANDWIDTH).cloned() {
            self.set_bandwidth(found)?;
            self.parameters_found.remove(BANDWIDTH);
            self.write_down()?;
        }
        Ok(())
    }

    fn set_bandwidth(&mut self, bytes_per_s: Value) -> Result<()> {
        self.client.set_parameters(Map::from_iter([(BANDWIDTH.to_owned(), bytes_per_s)]))
    }
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
