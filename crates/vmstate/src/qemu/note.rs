//! The note that a save leaves in QEMU while it owes it something, for the day that it is killed.
//!
//! It is an object of type `secret` with two lines of JSON. Its `data` is there from the beginning: who saves. What is owed
//! is a property that can be set at any time, the `iv` of a secret that is encrypted, which this one is not: in which
//! state the guest was, and which settings are to be put back. QEMU holds it whatever becomes of the connection, and it ends with QEMU, so it is
//! never about another one. A descriptor set, whose `opaque` text could say the same, is dropped by QEMU as soon as
//! the last client of a running guest leaves (monitor/fds.c:monitor_fdsets_cleanup), which is just when the note is
//! needed. Objects can be added to any QEMU since 2.6, over TCP as well, and have no part in migration.
//!
//! QEMU takes a command in byte by byte, 2 to 5 µs each, so the note is kept short, and what is owed is written once:
//! it costs a millisecond and a half, none of it while the guest is stopped.

use std::fs;
use std::os::unix::fs::MetadataExt;

use mem::{Peer, PeerError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::qmp::{Begun, Client};
use crate::{Error, Kind, Result};

/// What the id of a note begins with.
const PREFIX: &str = "vmstate-note-";
/// What the id of a claim begins with, behind that; its generation follows.
const CLAIM: &str = "claim.";
/// The property that says what is owed.
const OWED: &str = "iv";
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owed {
    /// The state of the guest before it was stopped, where it was or is about to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// The capabilities that were on, where any was changed.
    #[serde(rename = "on", default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Vec<String>>,
    /// The parameters that were changed, with their values before.
    #[serde(rename = "were", default, skip_serializing_if = "Map::is_empty")]
    pub parameters: Map<String, Value>,
}

/// A note: who owes what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Who owes it.
    #[serde(flatten)]
    pub saver: Saver,
    /// Which of its sessions it is.
    #[serde(default, skip_serializing_if = "is_first")]
    pub session: u64,
    /// What is owed, which is not written together with the rest.
    #[serde(skip)]
    pub owed: Owed,
}

fn is_first(session: &u64) -> bool {
    *session == 0
}

impl Note {
    /// Reads one, all of whose words are known: earlier versions wrote here what is owed as well.
    fn of(data: &str) -> Result<Note, serde_json::Error> {
        let fields: Map<String, Value> = serde_json::from_str(data)?;
        if let Some(field) =
            fields.keys().find(|field| !["pid", "start", "host", "session"].contains(&field.as_str()))
        {
            return Err(serde::de::Error::custom(format!("unknown field `{field}`")));
        }
        serde_json::from_value(Value::Object(fields))
    }

    /// The id to change and remove it by, where it is no claim.
    pub(super) fn id(&self) -> String {
        format!("{PREFIX}{}-{}", self.saver.pid, self.session)
    }

    /// Leaves it in QEMU.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn leave(&self, client: &mut Client) -> Result<()> {
        let added = self.begin_adding(client, &self.id())?;
        let written = begin_writing(client, &self.id(), &self.owed)?;
        client.end(added)?;
        client.end(written).map(drop)
    }

    /// Begins to leave it as the claim of a generation, which there can be only one of: QEMU refuses a second object of
    /// an id. Nothing is owed yet.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn begin_claim(&self, client: &mut Client, generation: u64) -> Result<Claiming> {
        let id = format!("{PREFIX}{CLAIM}{generation}");
        let added = self.begin_adding(client, &id)?;
        Ok(Claiming { id, added })
    }

    fn begin_adding(&self, client: &mut Client, id: &str) -> Result<Begun> {
        let data = serde_json::to_string(self).map_err(unwritten)?;
        client.begin("object-add", json!({ "qom-type": "secret", "id": id, "data": data }))
    }
}

/// A claim that is on its way.
#[derive(Debug)]
pub(super) struct Claiming {
    id: String,
    added: Begun,
}

impl Claiming {
    /// Waits for the answer, again if need be.
    ///
    /// # Errors
    /// As every QMP command, refusals excepted.
    pub(super) fn wait(&self, client: &mut Client) -> Result<()> {
        client.wait(&self.added)
    }

    /// The id of the claim; `None` where another saver was faster.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn end(self, client: &mut Client) -> Result<Option<String>> {
        match client.end(self.added) {
            Ok(_) => Ok(Some(self.id)),
            // "attempt to add duplicate property 'ID' to object (type 'container')"
            // (qom/object.c:object_property_try_add, QEMU 7.2 and 10.0).
            Err(error) if error.to_string().contains("duplicate property") => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Begins to write into a note that is there what is owed now. It takes the place of what was owed before: at no moment
/// is there nothing.
///
/// # Errors
/// As every QMP command.
pub(super) fn begin_writing(client: &mut Client, id: &str, owed: &Owed) -> Result<Begun> {
    let text = serde_json::to_string(owed).map_err(unwritten)?;
    client.begin("qom-set", json!({ "path": object(id), "property": OWED, "value": text }))
}

fn unwritten(error: serde_json::Error) -> Error {
    Error::new(Kind::Misuse, "a note cannot be written").because(error)
}

fn object(id: &str) -> String {
    format!("/objects/{id}")
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
    let removed = begin_removing(client, id)?;
    end_removing(client, removed)
}

/// Begins to take a note away.
///
/// # Errors
/// As every QMP command.
pub(super) fn begin_removing(client: &mut Client, id: &str) -> Result<Begun> {
    client.begin("object-del", json!({ "id": id }))
}

/// Waits until a note is away.
///
/// # Errors
/// As [`remove_note`].
pub(super) fn end_removing(client: &mut Client, removed: Begun) -> Result<()> {
    match client.end(removed) {
        // "object 'ID' not found" (qom/object_interfaces.c:user_creatable_del, QEMU 10.0).
        Err(error) if error.to_string().ends_with(" not found") => Ok(()),
        answer => answer.map(drop),
    }
}

/// The question which objects a QEMU has.
///
/// # Errors
/// As every QMP command.
pub(super) fn ask_objects(client: &mut Client) -> Result<Begun> {
    client.begin("qom-list", json!({ "path": "/objects" }))
}

/// Every note among these objects but the one of the id `own`, with its id, claims in the order of their generations.
///
/// # Errors
/// As every QMP command; [`Kind::Peer`] where one cannot be read.
pub(super) fn read_notes(
    client: &mut Client,
    objects: &Value,
    own: Option<&str>,
) -> Result<Vec<(String, Note)>> {
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
        let said = client.qom_string(&object(&id), "data");
        let (data, owed) = match said.and_then(|data| Ok((data, client.qom_string(&object(&id), OWED)?))) {
            Ok(said) => said,
            // Taken away since they were listed. The others stand.
            Err(error) if error.is_refusal() => continue,
            Err(error) => return Err(error),
        };
        let unknown = || {
            Error::new(Kind::Peer, format!("the note `{id}` in QEMU is of an unknown form")).hint(format!(
                "another version of vmstate left it; remove it with the QMP command object-del of {id}"
            ))
        };
        if data.len().max(owed.len()) > NOTE_LEN_MAX {
            return Err(unknown());
        }
        let mut note = Note::of(&data).map_err(|error| unknown().because(error))?;
        // A claim owes nothing before something is changed.
        if !owed.is_empty() {
            note.owed = serde_json::from_str(&owed).map_err(|error| unknown().because(error))?;
        }
        notes.push((id, note));
    }
    notes.sort_by_key(|(id, note)| (generation(id), note.session));
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
        let note = Note { saver, session: 0, owed: Owed::default() };
        let text = serde_json::to_string(&note).unwrap();
        assert_eq!(text, r#"{"pid":123456,"start":12345678,"host":"c0ffee12-4026531836"}"#);
        assert_eq!(serde_json::from_str::<Note>(&text).unwrap(), note);
        let second = Note { session: 1, ..note };
        let text = serde_json::to_string(&second).unwrap();
        assert!(text.ends_with(r#","session":1}"#), "{text}");
        assert_eq!(serde_json::from_str::<Note>(&text).unwrap(), second);
        // A note by who knows whom is none.
        assert!(serde_json::from_str::<Note>("{}").is_err());
        // Earlier versions said here what is owed: not to see it would be to forget it.
        assert_eq!(Note::of(&text).unwrap(), second);
        let earlier = text.replace('}', r#","stopped":"running"}"#);
        assert_eq!(Note::of(&earlier).unwrap_err().to_string(), "unknown field `stopped`");
        assert!(serde_json::from_str::<Owed>(r#"{"later":1}"#).is_err());

        let owed = Owed {
            stopped: Some("running".to_owned()),
            capabilities: Some(vec!["events".to_owned()]),
            parameters,
        };
        let text = serde_json::to_string(&owed).unwrap();
        assert_eq!(text, r#"{"stopped":"running","on":["events"],"were":{"max-bandwidth":134217728}}"#);
        assert_eq!(serde_json::from_str::<Owed>(&text).unwrap(), owed);
        // What is not owed is not said.
        assert_eq!(serde_json::to_string(&Owed::default()).unwrap(), "{}");
    }
}
