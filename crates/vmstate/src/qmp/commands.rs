//! The commands that vmstate uses, typed as far as it reads their answers.

use std::os::fd::BorrowedFd;

use serde_json::{Map, Value, json};

use super::client::CLOSED_HINT;
use super::{Begun, Client};
use crate::{Error, Kind, Result};

/// QEMU's version, as `query-version` tells it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub micro: u32,
    /// The packager's addition, for example ` (Debian 1:10.0.2+ds-2)`.
    pub package: String,
}

impl Version {
    /// Reads the answer of `query-version`, which is in the greeting, too.
    ///
    /// # Errors
    /// [`Kind::Peer`] where it is none.
    pub(crate) fn from_answer(answer: &Value) -> Result<Version> {
        let number = |key: &str| {
            answer["qemu"][key]
                .as_u64()
                .and_then(|n| u32::try_from(n).ok())
                .ok_or_else(|| Error::new(Kind::Peer, "QEMU tells its version in an unknown form"))
        };
        Ok(Version {
            major: number("major")?,
            minor: number("minor")?,
            micro: number("micro")?,
            package: answer["package"].as_str().unwrap_or_default().trim().to_owned(),
        })
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// The answer of `query-status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunStatus {
    /// Whether the virtual CPUs run.
    pub running: bool,
    /// The run state, for example `paused`.
    pub status: String,
}

impl RunStatus {
    /// Reads the answer.
    ///
    /// # Errors
    /// [`Kind::Peer`] where it is none.
    pub(crate) fn of(answer: &Value) -> Result<RunStatus> {
        match (answer["running"].as_bool(), answer["status"].as_str()) {
            (Some(running), Some(status)) => Ok(RunStatus { running, status: status.to_owned() }),
            _ => Err(unexpected("query-status")),
        }
    }

    /// Whether the guest goes on by itself: it runs, or it sleeps (ACPI S3) and can be woken.
    ///
    /// Since QEMU 9.0 `stop` takes a sleeping guest out of that state and `cont` puts it back; for earlier ones
    /// neither does anything to it.
    pub fn is_live(&self) -> bool {
        self.running || self.status == "suspended"
    }
}

/// A migration capability and whether it is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// For example `mapped-ram`.
    pub name: String,
    /// Whether it is on.
    pub state: bool,
}

impl Capability {
    /// Reads the answer of `query-migrate-capabilities`.
    ///
    /// # Errors
    /// [`Kind::Peer`] where it is none.
    pub(crate) fn list(answer: &Value) -> Result<Vec<Capability>> {
        let list = answer.as_array().ok_or_else(|| unexpected("query-migrate-capabilities"))?;
        list.iter()
            .map(|item| match (item["capability"].as_str(), item["state"].as_bool()) {
                (Some(name), Some(state)) => Ok(Capability { name: name.to_owned(), state }),
                _ => Err(unexpected("query-migrate-capabilities")),
            })
            .collect()
    }
}

/// What vmstate reads of `query-migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct MigrationInfo {
    /// For example `active`; empty where no migration has been tried.
    pub status: String,
    /// QEMU's own words where it failed.
    pub error: Option<String>,
    /// How far it is, where it says so: it does for outgoing migrations only.
    pub ram: Option<MigratedRam>,
}

/// How far an outgoing migration is: `ram` of `query-migrate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigratedRam {
    /// The length of all RAM in bytes, of pages that were never touched, too.
    pub total_bytes: u64,
    /// Bytes of pages that have not been looked at yet.
    pub remaining_bytes: u64,
    /// Bytes of pages that were written, those that are zero left out.
    pub normal_bytes: u64,
    /// Bytes that were sent, by every channel.
    pub transferred_bytes: u64,
}

impl MigrationInfo {
    /// Reads the answer.
    pub(crate) fn of(answer: &Value) -> MigrationInfo {
        MigrationInfo {
            status: answer["status"].as_str().unwrap_or_default().to_owned(),
            error: answer["error-desc"].as_str().map(str::to_owned),
            ram: answer.get("ram").map(|ram| {
                let number = |key: &str| ram[key].as_u64().unwrap_or(0);
                MigratedRam {
                    total_bytes: number("total"),
                    remaining_bytes: number("remaining"),
                    normal_bytes: number("normal-bytes"),
                    transferred_bytes: number("transferred"),
                }
            }),
        }
    }

    /// Whether QEMU may have more to do for a migration that has ended: one is called completed or failed before it is let
    /// go of, and cancelled when it is (migration/migration.c:migration_cleanup, QEMU 10.0).
    pub(crate) fn may_be_held(&self) -> bool {
        !matches!(self.status.as_str(), "" | "none" | "cancelled")
    }

    /// Whether a migration is under way, so that another may not begin.
    pub fn is_under_way(&self) -> bool {
        !matches!(self.status.as_str(), "" | "none" | "completed" | "failed" | "cancelled")
    }
}

fn unexpected(command: &str) -> Error {
    Error::new(Kind::Peer, format!("QEMU answered {command} in an unknown form"))
}

impl Client {
    /// QEMU's version, which its greeting has told already.
    ///
    /// # Errors
    /// [`Kind::Peer`] where it has not.
    pub fn version(&mut self) -> Result<Version> {
        Version::from_answer(&self.greeting()["version"])
    }

    /// `query-status`.
    ///
    /// # Errors
    /// As every command here: [`Kind::Peer`], [`Kind::Io`] or [`Kind::Interrupted`].
    pub fn status(&mut self) -> Result<RunStatus> {
        RunStatus::of(&self.execute("query-status", json!({}))?)
    }

    /// `stop`: pauses the virtual CPUs and flushes the disks. It may take as long as the disks do.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn stop(&mut self) -> Result<()> {
        self.execute("stop", json!({})).map(drop)
    }

    /// `cont`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn cont(&mut self) -> Result<()> {
        self.execute("cont", json!({})).map(drop)
    }

    /// `quit`. QEMU may close the connection before it answers; that counts as done.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn quit(&mut self) -> Result<()> {
        match self.execute("quit", json!({})) {
            Err(error) if error.hint_text() == Some(CLOSED_HINT) => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// `query-migrate-capabilities`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn capabilities(&mut self) -> Result<Vec<Capability>> {
        Capability::list(&self.execute("query-migrate-capabilities", json!({}))?)
    }

    /// `migrate-set-capabilities`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn set_capabilities(&mut self, capabilities: &[Capability]) -> Result<()> {
        let list: Vec<_> =
            capabilities.iter().map(|c| json!({"capability": c.name, "state": c.state})).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
    }

    /// `query-migrate-parameters`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn parameters(&mut self) -> Result<Map<String, Value>> {
        Client::parameters_of(self.execute("query-migrate-parameters", json!({}))?)
    }

    /// Reads the answer of `query-migrate-parameters`.
    ///
    /// # Errors
    /// [`Kind::Peer`] where it is none.
    pub(crate) fn parameters_of(answer: Value) -> Result<Map<String, Value>> {
        match answer {
            Value::Object(map) => Ok(map),
            _ => Err(unexpected("query-migrate-parameters")),
        }
    }

    /// `migrate-set-parameters`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn set_parameters(&mut self, parameters: Map<String, Value>) -> Result<()> {
        self.execute("migrate-set-parameters", Value::Object(parameters)).map(drop)
    }

    /// `query-migrate`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn migration(&mut self) -> Result<MigrationInfo> {
        Ok(MigrationInfo::of(&self.execute("query-migrate", json!({}))?))
    }

    /// `migrate` to a URI.
    ///
    /// # Errors
    /// As [`Client::status`]; a target that cannot be opened or truncated fails here, not by an event.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        self.execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// `migrate_cancel`; it only asks, the status tells when it is done.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn migrate_cancel(&mut self) -> Result<()> {
        self.execute("migrate_cancel", json!({})).map(drop)
    }

    /// `getfd`: gives QEMU a descriptor under a name.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn getfd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        self.execute_with("getfd", json!({ "fdname": name }), &[fd]).map(drop)
    }

    /// `closefd`: takes a named descriptor back. `fd:NAME` of a migration has consumed it already.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn closefd(&mut self, name: &str) -> Result<()> {
        self.execute("closefd", json!({ "fdname": name })).map(drop)
    }

    /// As [`Client::closefd`], but it is no error if QEMU has no such descriptor (any more).
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn closefd_if_any(&mut self, name: &str) -> Result<()> {
        match self.closefd(name) {
            // "File descriptor named 'NAME' not found" (monitor/fds.c:qmp_closefd, QEMU 10.0).
            Err(error) if error.to_string().ends_with(" not found") => Ok(()),
            closed => closed,
        }
    }

    /// The sets of `query-fdsets` that hold a descriptor which was added with one of these as `opaque`.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn fdsets_marked(&mut self, opaque: &[&str]) -> Result<Vec<u64>> {
        let answer = self.execute("query-fdsets", json!({}))?;
        let sets = answer.as_array().ok_or_else(|| unexpected("query-fdsets"))?;
        let is_marked = |set: &&Value| {
            set["fds"]
                .as_array()
                .is_some_and(|fds| fds.iter().any(|fd| opaque.iter().any(|mark| fd["opaque"] == *mark)))
        };
        sets.iter()
            .filter(is_marked)
            .map(|set| set["fdset-id"].as_u64().ok_or_else(|| unexpected("query-fdsets")))
            .collect()
    }

    /// The numbers of all sets of `query-fdsets`, those included whose descriptors have been removed and that QEMU has
    /// still duplicates of in use.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn fdsets(&mut self) -> Result<Vec<u64>> {
        let answer = self.execute("query-fdsets", json!({}))?;
        let sets = answer.as_array().ok_or_else(|| unexpected("query-fdsets"))?;
        sets.iter().map(|set| set["fdset-id"].as_u64().ok_or_else(|| unexpected("query-fdsets"))).collect()
    }

    /// `add-fd` into the set `fdset`, or into a new one; returns the set's number.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn add_fd(&mut self, fdset: Option<u64>, opaque: &str, fd: BorrowedFd<'_>) -> Result<u64> {
        let mut arguments = json!({ "opaque": opaque });
        if let Some(fdset) = fdset {
            arguments["fdset-id"] = fdset.into();
        }
        let answer = self.execute_with("add-fd", arguments, &[fd])?;
        answer["fdset-id"].as_u64().ok_or_else(|| unexpected("add-fd"))
    }

    /// `remove-fd` of a whole set.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn remove_fdset(&mut self, fdset: u64) -> Result<()> {
        self.execute("remove-fd", json!({ "fdset-id": fdset })).map(drop)
    }

    /// A command of the human monitor; its answer is text.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn human(&mut self, command: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": command }))?;
        answer.as_str().map(str::to_owned).ok_or_else(|| unexpected("human-monitor-command"))
    }

    /// Whether QEMU has a command that it cannot run without arguments: it is called without, and the refusal tells.
    /// The list of all commands would tell as well; to write it takes QEMU a millisecond.
    ///
    /// # Errors
    /// As [`Client::status`]; [`Kind::Peer`] where it went through, so that there is no telling what it has done.
    pub fn knows_command_with_arguments(&mut self, name: &'static str) -> Result<bool> {
        let asked = self.begin(name, json!({}))?;
        self.knows_command_by(asked, name)
    }

    /// The same, by the answer to the command without arguments.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn knows_command_by(&mut self, asked: Begun, name: &str) -> Result<bool> {
        match self.end(asked) {
            // "The command NAME has not been found", "Command NAME has been disabled" (qapi/qmp-dispatch.c:qmp_dispatch,
            // QEMU 10.0).
            Err(error) if error.is_refusal() => {
                let words = error.to_string();
                Ok(!["has not been found", "has been disabled"].iter().any(|known| words.contains(known)))
            }
            Err(error) => Err(error),
            Ok(_) => Err(unexpected(name)),
        }
    }

    /// The names of the children of a QOM object that are of a type.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn qom_children(&mut self, path: &str, kind: &str) -> Result<Vec<String>> {
        let answer = self.execute("qom-list", json!({ "path": path }))?;
        let list = answer.as_array().ok_or_else(|| unexpected("qom-list"))?;
        let is_wanted = |item: &&Value| item["type"].as_str() == Some(&format!("child<{kind}>"));
        let name = |item: &Value| item["name"].as_str().map(str::to_owned);
        Ok(list.iter().filter(is_wanted).filter_map(name).collect())
    }

    /// A QOM property that is a truth value.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn qom_bool(&mut self, path: &str, property: &str) -> Result<bool> {
        let answer = self.execute("qom-get", json!({ "path": path, "property": property }))?;
        answer.as_bool().ok_or_else(|| unexpected("qom-get"))
    }

    /// A QOM property that is a string.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn qom_string(&mut self, path: &str, property: &str) -> Result<String> {
        let answer = self.execute("qom-get", json!({ "path": path, "property": property }))?;
        answer.as_str().map(str::to_owned).ok_or_else(|| unexpected("qom-get"))
    }
}
