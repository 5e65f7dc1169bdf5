//! The note that a save leaves in QEMU while it owes it something, for the day that it is killed.
//!
//! It is an object of type `secret` whose data is a line of JSON: who saves, in which state the guest was, and which
//! settings are to be put back. QEMU holds it whatever becomes of the connection, and it ends with QEMU, so it is
//! never about another one. A descriptor set, whose `opaque` text could say the same, is dropped by QEMU as soon as
//! the last client of a running guest leaves (monitor/fds.c:monitor_fdsets_cleanup), which is just when the note is
//! needed. Objects can be added to any QEMU since 2.6, over TCP as well, and have no part in migration.
//!
//! QEMU takes a command in byte by byte, 2 to 3 µs each, so the note is kept short: it costs less than a millisecond,
//! none of it while the guest is stopped.

use std::fs;
use std::os::unix::fs::MetadataExt;

use mem::{Peer, PeerError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::qmp::Client;
use crate::{Error, Kind, Result};

/// What the id of a note begins with.
const PREFIX: &str = "vmstate-note-";
/// What the id of a claim begins with, behind that; its generation follows.
const CLAIM: &str = "claim.";
/// The longest note that is read; ours have a few hundred bytes.
const NOTE_LEN_MAX: usize = 64 << 10;

/// The process that saves, named so that it cannot be mistaken for another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saver {
    /// Its number, in its own namespace.
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    #[serde(rename = "start")]
    start_time: u64,
    /// The boot that this counts from, and the namespace that numbers its processes.
    pub(super) host: String,
}

/// What has become of a saver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It runs, or may.
    Alive,
    /// It has ended.
    Gone,
    /// Its processes are not visible from here.
    Unknown,
}

impl Saver {
    /// This process.
    pub(super) fn this() -> Saver {
        let pid = std::process::id();
        let start_time = Peer::open(pid).map(|peer| peer.start_time()).unwrap_or_default();
        Saver { pid, start_time, host: host() }
    }

    /// What has become of it.
    pub fn fate(&self) -> Fate {
        if self.host != host() {
            return Fate::Unknown;
        }
        match Peer::open(self.pid) {
            Ok(peer) if peer.start_time() == self.start_time => Fate::Alive,
            // The number is another process's by now.
            Ok(_) | Err(PeerError::Gone { .. }) => Fate::Gone,
            Err(_) => Fate::Alive,
        }
    }
}

/// This boot of this host, and the namespace that numbers its processes.
pub(super) fn host() -> String {
    // Where the one cannot be read, the other tells hosts apart.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::metadata("/proc/self/ns/pid").map(|stat| stat.ino()).unwrap_or_default();
    // The beginning will do: what is told apart is the hosts and containers that one guest is ever saved from.
    format!("{}-{namespace}", boot.get(..8).unwrap_or_default())
}

/// What a save owes to QEMU at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Who owes it.
    #[serde(flatten)]
    pub saver: Saver,
    /// Which of its sessions it is, and which of that session's notes: each says all that those before it said.
    pub session: u64,
    /// See there.
    pub serial: u64,
    /// The state of the guest before it was stopped, where it was stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// The capabilities that were on, where any was changed.
    #[serde(rename = "on", default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Vec<String>>,
    /// The parameters that were changed, with their values before.
    #[serde(rename = "were", default, skip_serializing_if = "Map::is_empty")]
    pub parameters: Map<String, Value>,
}

impl Note {
    /// Leaves it in QEMU and returns the id to remove it by.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn leave(&self, client: &mut Client) -> Result<String> {
        let id = format!("{PREFIX}{}-{}.{}", self.saver.pid, self.session, self.serial);
        self.add(client, &id)?;
        Ok(id)
    }

    /// Leaves it as the claim of a generation, which there can be only one of: QEMU refuses a second object of an id.
    /// `None` where another saver was faster.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn claim(&self, client: &mut Client, generation: u64) -> Result<Option<String>> {
        let id = format!("{PREFIX}{CLAIM}{generation}");
        match self.add(client, &id) {
            Ok(()) => Ok(Some(id)),
            // "attempt to add duplicate property 'ID' to object (type 'container')"
            // (qom/object.c:object_property_try_add, QEMU 7.2 and 10.0).
            Err(error) if error.to_string().contains("duplicate property") => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn add(&self, client: &mut Client, id: &str) -> Result<()> {
        let data = serde_json::to_string(self)
            .map_err(|error| Error::new(Kind::Misuse, "a note cannot be written").because(error))?;
        client.execute("object-add", json!({ "qom-type": "secret", "id": id, "data": data })).map(drop)
    }
}

/// The generation of the claim of this id; `None` for another note.
pub(super) fn generation(id: &str) -> Option<u64> {
    id.strip_prefix(PREFIX)?.strip_prefix(CLAIM)?.parse().ok()
}

/// Takes a note away; it is no error if there is none (any more).
///
/// # Errors
/// As every QMP command.
pub(super) fn remove_note(client: &mut Client, id: &str) -> Result<()> {
    match client.execute("object-del", json!({ "id": id })) {
        // "object 'ID' not found" (qom/object_interfaces.c:user_creatable_del, QEMU 10.0).
        Err(error) if error.to_string().ends_with(" not found") => Ok(()),
        answer => answer.map(drop),
    }
}

/// Every note in QEMU but the one of the id `own`, with its id, a save's later ones behind its earlier ones.
///
/// # Errors
/// As every QMP command; [`Kind::Peer`] where one cannot be read.
pub(super) fn read_notes(client: &mut Client, own: Option<&str>) -> Result<Vec<(String, Note)>> {
    let objects = client.execute("qom-list", json!({ "path": "/objects" }))?;
    let names: Vec<String> = objects
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|object| object["name"].as_str())
        .filter(|name| name.starts_with(PREFIX) && own != Some(*name))
        .map(str::to_owned)
        .collect();
    let mut notes = Vec::new();
    for id in names {
        let data = client.qom_string(&format!("/objects/{id}"), "data")?;
        let unknown = || {
            Error::new(Kind::Peer, format!("the note `{id}` in QEMU is of an unknown form")).hint(format!(
                "another version of vmstate left it; remove it with the QMP command object-del of {id}"
            ))
        };
        if data.len() > NOTE_LEN_MAX {
            return Err(unknown());
        }
        let note: Note = serde_json::from_str(&data).map_err(|error| unknown().because(error))?;
        notes.push((id, note));
    }
    notes.sort_by_key(|(_, note)| note.serial);
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_one_that_has_its_number() {
        let this = Saver::this();
        assert_eq!(this.fate(), Fate::Alive);
        assert_eq!(Saver { start_time: this.start_time - 1, ..this.clone() }.fate(), Fate::Gone);
        // No kernel gives this number away: it is above the limit of pid_max.
        assert_eq!(Saver { pid: 1 << 30, ..this.clone() }.fate(), Fate::Gone);
        assert_eq!(Saver { host: "elsewhere-1".to_owned(), ..this }.fate(), Fate::Unknown);
    }

    #[test]
    fn a_note_is_short_and_says_all_it_is_given() {
        let mut parameters = Map::new();
        parameters.insert("max-bandwidth".to_owned(), json!(134_217_728));
        let saver = Saver { pid: 123_456, start_time: 12_345_678, host: "c0ffee12-4026531836".to_owned() };
        let note = Note {
            saver,
            session: 0,
            serial: 1,
            stopped: Some("running".to_owned()),
            capabilities: Some(vec!["events".to_owned()]),
            parameters,
        };
        let text = serde_json::to_string(&note).unwrap();
        assert_eq!(
            text,
            r#"{"pid":123456,"start":12345678,"host":"c0ffee12-4026531836","session":0,"serial":1,"stopped":"running","on":["events"],"were":{"max-bandwidth":134217728}}"#
        );
        assert_eq!(serde_json::from_str::<Note>(&text).unwrap(), note);
        // What is not owed is not said, and a note by who knows whom is none.
        let empty = Note { stopped: None, capabilities: None, parameters: Map::new(), ..note };
        let text = serde_json::to_string(&empty).unwrap();
        assert!(text.ends_with(r#""serial":1}"#), "{text}");
        assert_eq!(serde_json::from_str::<Note>(&text).unwrap(), empty);
        assert!(serde_json::from_str::<Note>("{}").is_err());
    }
}
