//! Migrations: how they begin, and how they end.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::{FINALIZED_INTERVAL, SETTLE_TIMEOUT, Session, did_not_stand_still};
use crate::qmp::{Client, MigratedRam, MigrationInfo};
use crate::{Error, Kind, Result};

/// How often a QEMU that migrates is asked how far it is, where somebody wants to know. It answers from its main
/// loop, which has nothing else to do while the guest stands still.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// What QEMU says to a migration while it is not done with one that has failed: it calls that failed before it lets go
/// of it (migration/migration.c:migrate_prepare and util/yank.c:yank_register_instance, QEMU 10.0; `failing` of newer
/// ones is the time between).
const STILL_CLEANING: [&str; 2] = ["There's a migration process in progress", "duplicate yank instance"];
/// How long that may take, and how often it is asked.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(5);
const CLEANUP_INTERVAL: Duration = Duration::from_millis(10);
/// What is said of one that QEMU does not let go of.
const HELD: &str = "QEMU does not let go of a migration that has failed";
const HELD_HINT: &str = "its migration thread hangs, as it may when a multifd channel could not write; the guest is not \
    touched by that, but this QEMU migrates no more until it is started anew";

impl Session {
    /// Starts an outgoing migration. A named descriptor in the URI is QEMU's from then on.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        if self.may_be_cleaning {
            await_cleanup(&mut self.client, Instant::now() + CLEANUP_TIMEOUT)?;
        }
        let deadline = Instant::now() + CLEANUP_TIMEOUT;
        let started = loop {
            // Cancelled even if the answer never comes, but not if QEMU refuses: another's may be under way.
            self.migrating = true;
            let started = self.client.migrate(uri);
            self.migrating &= !started.as_ref().is_err_and(Error::is_refusal);
            let is_early = started
                .as_ref()
                .is_err_and(|error| STILL_CLEANING.iter().any(|words| error.to_string().ends_with(words)));
            // Of a migration that is another's, QEMU says that it is under way.
            if !is_early || Instant::now() >= deadline || self.client.migration()?.is_under_way() {
                break started;
            }
            // Nothing tells when it is done, so it is asked again.
            self.client.next_event(Some(Instant::now() + CLEANUP_INTERVAL))?;
        };
        started?;
        if let Some(name) = uri.strip_prefix("fd:") {
            self.named_fds.retain(|known| known != name);
        }
        Ok(())
    }

    /// Begins to start an outgoing migration, unless QEMU may first have to let go of another: then
    /// [`Session::end_migrating`] starts it.
    ///
    /// # Errors
    /// As every QMP command.
    pub(in crate::qemu) fn begin_migrating(&mut self, uri: &str) -> Result<()> {
        if self.may_be_cleaning {
            return Ok(());
        }
        let begun = self.client.begin("migrate", json!({ "uri": uri }));
        // Of what was not sent there is nothing to cancel, and another's may be under way.
        self.migrating = begun.is_ok() || self.client.is_cut_short();
        self.migrate_asked = Some(begun?);
        Ok(())
    }

    /// Whether it has begun, and not waited for yet.
    pub(in crate::qemu) fn has_begun_migrating(&self) -> bool {
        self.migrate_asked.is_some()
    }

    /// Waits until it has started.
    ///
    /// # Errors
    /// As every QMP command.
    pub(in crate::qemu) fn end_migrating(&mut self, uri: &str) -> Result<()> {
        if let Some(asked) = &self.migrate_asked {
            self.client.wait(asked)?;
        }
        let Some(asked) = self.migrate_asked.take() else { return self.migrate(uri) };
        match self.client.end(asked) {
            Ok(_) => {
                self.named_fds.retain(|known| uri.strip_prefix("fd:") != Some(known));
                Ok(())
            }
            Err(error) => {
                self.migrating &= !error.is_refusal();
                if !STILL_CLEANING.iter().any(|words| error.to_string().ends_with(words)) {
                    return Err(error);
                }
                // Somebody has migrated since QEMU was asked.
                self.may_be_cleaning = true;
                self.migrate(uri)
            }
        }
    }

    /// Starts to load a guest from the descriptor `name`, which is QEMU's from then on. Unlike an outgoing
    /// migration this cannot be cancelled.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn incoming(&mut self, name: &str, arguments: Value) -> Result<()> {
        self.client.execute("migrate-incoming", arguments)?;
        self.named_fds.retain(|known| known != name);
        Ok(())
    }

    /// Waits until the migration has ended and returns how: `completed`, `failed` or `cancelled`.
    ///
    /// # Errors
    /// As every QMP command; [`Kind::Peer`] where it takes longer than `timeout`, and as soon as the guest
    /// does not stand still although it was paused for this migration.
    pub fn migration_end(&mut self, timeout: Option<Duration>) -> Result<MigrationInfo> {
        self.follow_migration(timeout, None)
    }

    /// As [`Session::migration_end`] without a timeout; `told` hears every now and then how far QEMU is.
    ///
    /// # Errors
    /// As [`Session::migration_end`].
    pub fn migration_end_told(&mut self, told: &mut dyn FnMut(MigratedRam)) -> Result<MigrationInfo> {
        self.follow_migration(None, Some(told))
    }

    fn follow_migration(
        &mut self,
        timeout: Option<Duration>,
        mut told: Option<&mut dyn FnMut(MigratedRam)>,
    ) -> Result<MigrationInfo> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let info = self.client.migration()?;
            if let (Some(told), Some(ram)) = (&mut told, info.ram) {
                told(ram);
            }
            if !info.is_under_way() {
                self.ended_as(&info)?;
                return Ok(info);
            }
            let look_again = told.is_some().then(|| Instant::now() + PROGRESS_INTERVAL);
            // An event that was queued before the query only costs one more query; one that comes after it
            // ends the wait. Terminal states always send one.
            loop {
                let event = self.client.next_event(deadline.into_iter().chain(look_again).min())?;
                // Nothing of it is worth waiting for, unless it is being given up already.
                if let Some(event) = self.moved().filter(|_| !self.settled) {
                    return Err(did_not_stand_still(&format!("event {event}")));
                }
                // Events that are there already come after the deadline, too.
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return Err(Error::new(
                        Kind::Peer,
                        format!("QEMU's migration is still in state `{}`", info.status),
                    ));
                }
                if event.is_none_or(|event| event.name == "MIGRATION") {
                    break;
                }
            }
        }
    }

    pub(super) fn ended_as(&mut self, info: &MigrationInfo) -> Result<()> {
        self.migrating = false;
        self.may_be_cleaning = info.may_be_held();
        // One that is cancelled is called so when all else is done (migration/migration.c:migration_cleanup, QEMU 10.0).
        if info.status == "cancelled" { Ok(()) } else { self.await_finalized() }
    }

    /// Waits until QEMU has finished a migration that it calls ended already: until then it refuses to resume the guest
    /// ("Migration is not finalized yet"). It says `completed` from a thread that has yet to wait for the main loop to
    /// set the state of the guest (migration/migration.c:migration_iteration_finish, QEMU 10.0), and sends no event
    /// when it has.
    fn await_finalized(&mut self) -> Result<()> {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        while self.client.status()?.status == "finish-migrate" {
            if Instant::now() >= deadline {
                return Err(Error::new(
                    Kind::Peer,
                    "QEMU does not finish a migration that it says has ended",
                ));
            }
            self.client.next_event(Some(Instant::now() + FINALIZED_INTERVAL))?;
        }
        Ok(())
    }

    /// Waits until a guest that is coming in has arrived, or has not: `completed` or `failed`.
    ///
    /// # Errors
    /// As every QMP command; [`Kind::Peer`] where QEMU ends over it, as those before 9.1 do.
    pub fn incoming_end(&mut self) -> Result<MigrationInfo> {
        loop {
            let info = self.client.migration()?;
            // QEMU 7.2 answers before it has begun.
            if !info.is_under_way() && !matches!(info.status.as_str(), "" | "none") {
                return Ok(info);
            }
            while self.client.next_event(None)?.is_some_and(|event| event.name != "MIGRATION") {}
        }
    }
}

/// Waits until QEMU has let go of a migration that has failed. One that is told to migrate before is left in the state
/// `setup`, with nothing that would take it out of it.
///
/// # Errors
/// As every QMP command; [`Kind::Peer`] where it does not let go until `deadline`. QEMU's migration thread may wait for
/// ever then: each channel that ends is to wake it, and one that ends because another has failed does not
/// (migration/multifd.c:multifd_send_sync_main and multifd_send_thread, seen in QEMU 10.0.2).
fn await_cleanup(client: &mut Client, deadline: Instant) -> Result<()> {
    loop {
        let instances = match client.execute("query-yank", Value::Object(Map::new())) {
            // A QEMU without the command has no such instances.
            Err(error) if error.is_refusal() => return Ok(()),
            instances => instances?,
        };
        let is_held =
            instances.as_array().is_some_and(|all| all.iter().any(|one| one["type"] == "migration"));
        if !is_held || client.migration()?.is_under_way() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Error::new(Kind::Peer, HELD).hint(HELD_HINT));
        }
        client.next_event(Some(Instant::now() + CLEANUP_INTERVAL))?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::Cancel;

    /// A client whose peer answers each command by its name.
    fn client(answers: [(&'static str, Value); 3]) -> Client {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let _ = (&theirs).write_all(b"{\"QMP\": {}}\n");
            for line in BufReader::new(&theirs).lines() {
                let asked: Value = serde_json::from_str(&line.unwrap()).unwrap();
                let (_, answer) = answers.iter().find(|(name, _)| asked["execute"] == *name).unwrap();
                let line = json!({ "return": answer, "id": asked["id"] });
                // The client may have gone.
                let _ = (&theirs).write_all(format!("{line}\n").as_bytes());
            }
        });
        Client::from_socket(ours, "the test", &Cancel::new().unwrap()).unwrap()
    }

    #[test]
    fn a_qemu_that_hangs_in_a_failed_migration_is_not_told_to_migrate() {
        for (held, status, outcome) in [
            (json!([{ "type": "migration" }]), "failed", Some(HELD)),
            (json!([{ "type": "chardev", "id": "serial0" }]), "failed", None),
            (json!([]), "failed", None),
            (json!([{ "type": "migration" }]), "setup", None),
        ] {
            let migration = json!({ "status": status });
            let answers =
                [("qmp_capabilities", json!({})), ("query-yank", held.clone()), ("query-migrate", migration)];
            let error = await_cleanup(&mut client(answers), Instant::now()).err();
            assert_eq!(error.map(|error| error.to_string()).as_deref(), outcome, "{held}, {status}");
        }
    }
}
