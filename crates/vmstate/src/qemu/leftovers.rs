//! What a save that was killed has left in QEMU, and how it is cleared.

use serde_json::{Value, json};

use super::note::{Fate, Note, ask_objects, generation, host, read_notes, remove_note};
use super::probe::{PROBE, is_probe_bandwidth};
use super::process::PROOF;
use super::session::{DEVICES, MARK, Session, mark as mark_of};
use crate::qmp::{Begun, Capability, Client};
use crate::{Error, Kind, Result};

/// What savers have left in a QEMU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Notes with their ids.
    notes: Vec<(String, Note)>,
    /// Descriptor sets whose maker is gone.
    fdsets: Vec<u64>,
    /// Whether one of them is of an image: only a migration is given such a set.
    has_image: bool,
}

/// What was cleared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleared {
    /// The process that had been killed, where it left a note.
    pub saver_pid: Option<u32>,
    /// The state that the guest had before that save stopped it, where it was still stopped.
    pub stopped: Option<String>,
    /// Whether a migration was cancelled.
    pub migration_cancelled: bool,
    /// How many descriptors, under a name or in a set, were taken back.
    pub descriptors: u64,
    /// The capabilities that were switched back.
    pub capabilities: Vec<String>,
    /// The parameters that were set back.
    pub parameters: Vec<String>,
}

/// The questions that tell of them.
#[derive(Debug)]
pub(super) struct AskedLeftovers {
    objects: Begun,
    fdsets: Begun,
}

impl AskedLeftovers {
    /// What was found, as [`Leftovers::find`] says it.
    pub(super) fn answered(self, client: &mut Client, force: bool, own: Option<&str>) -> Result<Leftovers> {
        let objects = client.end(self.objects);
        let fdsets = client.end(self.fdsets)?;
        let notes = match objects.and_then(|objects| read_notes(client, &objects, own)) {
            // A QEMU so old that it has no such objects has no notes.
            Err(error) if error.is_refusal() => Vec::new(),
            notes => notes?,
        };
        Leftovers::of(notes, &fdsets, force)
    }
}

impl Leftovers {
    /// Looks for them, passing over the note `own`. Nothing is changed.
    ///
    /// # Errors
    /// [`Kind::Peer`] where a save is under way by a process that lives, or that cannot be seen from here unless
    /// `force` says that it is gone; others as every QMP command.
    pub fn find(client: &mut Client, force: bool, own: Option<&str>) -> Result<Leftovers> {
        Leftovers::ask(client)?.answered(client, force, own)
    }

    /// Asks for them.
    pub(super) fn ask(client: &mut Client) -> Result<AskedLeftovers> {
        Ok(AskedLeftovers { objects: ask_objects(client)?, fdsets: client.begin("query-fdsets", json!({}))? })
    }

    fn of(notes: Vec<(String, Note)>, fdsets: &Value, force: bool) -> Result<Leftovers> {
        for (_, note) in &notes {
            let pid = note.saver.pid;
            match note.saver.fate() {
                Fate::Gone => {}
                Fate::Alive => {
                    return Err(Error::new(Kind::Peer, format!("process {pid} is saving this guest"))
                        .hint("wait until it is done, or end it with SIGINT, which brings the guest back"));
                }
                Fate::Unknown if force => {}
                Fate::Unknown => {
                    return Err(Error::new(
                        Kind::Peer,
                        format!("process {pid} of another host or container has begun to save this guest"),
                    )
                    .hint("if it is gone, clear what it left: vmstate resume --force"));
                }
            }
        }
        let mut left = Leftovers::default();
        for set in fdsets.as_array().into_iter().flatten() {
            let fds = set["fds"].as_array().map(Vec::as_slice).unwrap_or_default();
            let marks = fds.iter().filter_map(|fd| fd["opaque"].as_str());
            let ours = marks.filter(|mark| {
                let session = mark.strip_suffix(DEVICES).unwrap_or(mark);
                notes.iter().any(|(_, note)| mark_of(&note.saver, note.session) == session)
                    || is_of_the_dead(session)
            });
            let of_image: Vec<bool> = ours.map(|mark| !mark.ends_with(DEVICES)).collect();
            if let (false, Some(fdset)) = (of_image.is_empty(), set["fdset-id"].as_u64()) {
                left.fdsets.push(fdset);
                left.has_image |= of_image.contains(&true);
            }
        }
        Ok(Leftovers { notes, ..left })
    }

    /// The generation of a claim behind all that are there.
    pub(super) fn next_generation(&self) -> u64 {
        let claims = self.notes.iter().filter_map(|(id, _)| generation(id));
        claims.max().map_or(0, |latest| latest.saturating_add(1))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.notes.is_empty() && self.fdsets.is_empty()
    }

    /// Clears them: cancels the migration of the killed save, takes its descriptors back, and puts capabilities and
    /// parameters back. The guest is left as it is; `stopped` of the answer and [`Session::owes`] say whether it is
    /// to be resumed.
    ///
    /// The notes go last, so that whoever is killed in the middle leaves them for the next.
    ///
    /// # Errors
    /// [`Kind::Peer`] where a migration is under way that is not the killed save's; others as every QMP command.
    pub fn clear(self, session: &mut Session) -> Result<Cleared> {
        let mut cleared = Cleared {
            saver_pid: self.notes.first().map(|(_, note)| note.saver.pid),
            migration_cancelled: self.cancel_migration(session)?,
            ..Cleared::default()
        };
        let noted = self.notes.iter().filter_map(|(_, note)| note.owed.stopped.clone()).next_back();
        let status = session.client.status()?;
        // Any other state is not that of a guest which a save has stopped: somebody has dealt with it since.
        if matches!(status.status.as_str(), "paused" | "postmigrate" | "finish-migrate" | "save-vm") {
            cleared.stopped = noted;
        }
        session.owe(cleared.stopped.clone())?;
        for fdset in &self.fdsets {
            session.client.remove_fdset(*fdset)?;
            cleared.descriptors += 1;
        }
        for name in [PROBE, PROOF] {
            match session.client.closefd(name) {
                Ok(()) => cleared.descriptors += 1,
                // There is none; nor is there one where this monitor is not the one that it was given to.
                Err(error) if error.is_refusal() => {}
                Err(error) => return Err(error),
            }
        }
        self.put_settings_back(session, &mut cleared)?;
        for (id, _) in &self.notes {
            remove_note(&mut session.client, id)?;
        }
        Ok(cleared)
    }

    fn cancel_migration(&self, session: &mut Session) -> Result<bool> {
        let migration = session.client.migration()?;
        if !migration.is_under_way() {
            return Ok(false);
        }
        if migration.status == "cancelling" {
            // Whoever cancelled it is done with it; the settings of a probe are put back by then.
            session.await_cancelled()?;
            return Ok(true);
        }
        // Nobody else migrates into our descriptors, and nobody else chokes a migration as the probe does.
        let bandwidth = session.client.parameters()?.get("max-bandwidth").and_then(Value::as_u64);
        if !self.has_image && !bandwidth.is_some_and(is_probe_bandwidth) {
            return Err(Error::new(
                Kind::Peer,
                format!(
                    "a migration is under way (status `{}`) that is not the killed save's",
                    migration.status
                ),
            )
            .hint("wait for it to end, or cancel it with migrate_cancel"));
        }
        session.cancel_migration()?;
        Ok(true)
    }

    fn put_settings_back(&self, session: &mut Session, cleared: &mut Cleared) -> Result<()> {
        // The first note knows the settings that were found; later ones may know of more.
        let on = self.notes.iter().find_map(|(_, note)| note.owed.capabilities.as_ref());
        let now = session.client.capabilities()?;
        let wanted: Vec<Capability> = match on {
            None => now.clone(),
            Some(on) => now.iter().map(|c| Capability { state: on.contains(&c.name), ..c.clone() }).collect(),
        };
        let differ = now.iter().zip(&wanted).filter(|(now, wanted)| now != wanted);
        cleared.capabilities = differ.map(|(now, _)| now.name.clone()).collect();
        let now = session.client.parameters()?;
        let mut changes = serde_json::Map::new();
        for (_, note) in self.notes.iter().rev() {
            changes.extend(note.owed.parameters.clone());
        }
        changes.retain(|name, value| now.get(name).is_some_and(|now| now != value));
        cleared.parameters = changes.keys().cloned().collect();
        session.switch(&wanted, changes)
    }
}

/// Whether a mark names a process that is gone. One that counts its processes elsewhere may live, whatever has that
/// number here.
fn is_of_the_dead(mark: &str) -> bool {
    let mut words = mark.strip_prefix(MARK).into_iter().flat_map(|rest| rest.split(' '));
    let (pid, _session, home) = (words.next().and_then(|pid| pid.parse().ok()), words.next(), words.next());
    let is_gone = |pid: u32| matches!(mem::Peer::open(pid), Err(mem::PeerError::Gone { .. }));
    home.is_some_and(|home| home == host()) && pid.is_some_and(is_gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_is_counted_here_can_be_told_to_be_dead() {
        // No kernel gives this number away: it is above the limit of pid_max.
        let (dead, alive) = (1 << 30, std::process::id());
        let home = host();
        for (mark, expected) in [
            (format!("{MARK}{dead} 0 {home}"), true),
            (format!("{MARK}{alive} 0 {home}"), false),
            (format!("{MARK}{dead} 0 c0ffee12-1"), false),
            (format!("{MARK}{dead} 0"), false),
            (format!("{dead} 0 {home}"), false),
            (format!("{MARK}x 0 {home}"), false),
            (String::new(), false),
        ] {
            assert_eq!(is_of_the_dead(&mark), expected, "{mark}");
        }
    }
}
