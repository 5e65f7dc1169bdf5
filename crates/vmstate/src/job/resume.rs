//! Resume: what a killed save left of a guest and its QEMU becomes again what it was before that save.

use std::path::Path;

use io::Cancel;
use serde_json::json;

use super::Observer;
use crate::Result;
use crate::net::QmpAddress;
use crate::qemu::{Cleared, Leftovers, Session};
use crate::qmp::{Called, Client, RunStatus};

/// Which guest to bring back.
#[derive(Clone, Debug)]
pub struct ResumeSettings {
    /// The guest's monitor. Descriptors that QEMU holds under a name belong to the monitor that they came through,
    /// so it should be the one that the save used.
    pub qmp: QmpAddress,
    /// Whether a save by a process that cannot be seen from here counts as killed.
    pub force: bool,
}

/// What was found and done.
#[derive(Clone, Debug)]
pub struct ResumeReport {
    /// What the killed save had left and is cleared now.
    pub cleared: Cleared,
    /// Whether the guest was resumed.
    pub resumed: bool,
    /// The guest's state now.
    pub run_state: String,
}

impl ResumeReport {
    /// Whether a killed save had left anything.
    pub fn had_leftovers(&self) -> bool {
        self.cleared != Cleared::default()
    }
}

/// Brings a guest back that a killed save left paused, and clears what that save left in QEMU. Where there is
/// nothing to do, nothing is done.
///
/// A guest that was paused before that save, or that somebody has dealt with since, stays as it is.
///
/// # Errors
/// [`Kind::Peer`](crate::Kind::Peer) where a save is under way, or a migration that is not the killed save's;
/// others as every QMP command.
pub fn resume(settings: &ResumeSettings, cancel: &Cancel, observer: &dyn Observer) -> Result<ResumeReport> {
    observer.phase("connect");
    let mut client = Client::connect(&settings.qmp, cancel)?;
    let version = client.version()?;
    let mut session = Session::bare(client, version);
    // Whoever is killed while clearing leaves the next one no less to go by.
    let left = session.claim(settings.force)?;
    observer.phase("clear");
    let cleared = if left.is_empty() { Cleared::default() } else { left.clear(&mut session)? };
    let resumed = session.owes();
    session.resume()?;
    let run_state = session.client.status()?.status;
    session.settle()?;
    Ok(ResumeReport { cleared, resumed, run_state })
}

/// Begins a save into `image` with a monitor that was called; returns the guest's state and the answers to what `ask` asks
/// ahead. Where a killed one has left something, in QEMU or beside the image, that is
/// cleared first and said, and what it owed to the guest is owed by this one: the guest counts as running if it ran
/// before the killed save.
///
/// # Errors
/// As [`resume()`] and [`Session::over`].
pub(super) fn open_for_save<T>(
    called: Called,
    image: &Path,
    cancel: &Cancel,
    observer: &dyn Observer,
    ask: impl FnOnce(&mut Session) -> Result<T>,
) -> Result<(Session, RunStatus, T)> {
    let mut client = Client::greeted(called, cancel)?;
    let version = client.version()?;
    let mut session = Session::bare(client, version);
    let claim = session.begin_claim()?;
    let migration = session.client.begin("query-migrate", json!({}))?;
    let looked = session.begin_looking()?;
    let asked = ask(&mut session)?;
    let left = session.end_claim(claim, false)?;
    let status = if left.is_empty() {
        session.refuse_migration(migration)?;
        RunStatus::of(&session.client.end(looked)?)?
    } else {
        // What was asked ahead is out of date when that is done.
        session.client.end(migration)?;
        session.client.end(looked)?;
        session.forget_settings()?;
        take_over(&mut session, left, observer)?;
        session.client.status()?
    };
    // Now that the killed save's descriptors are taken back, QEMU holds none of its files either.
    for stray in io::remove_strays(image) {
        observer.warn(&format!("removed {}, which a killed save had left", stray.display()));
    }
    Ok((session, status, asked))
}

/// Connects for finding out what a save would do: refused where a save is under way, and nothing that a killed one
/// has left is touched.
///
/// # Errors
/// As [`open_for_save`].
pub(super) fn open_for_rehearsal(
    address: &QmpAddress,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Result<Session> {
    let mut client = Client::connect(address, cancel)?;
    if !Leftovers::find(&mut client, false, None)?.is_empty() {
        observer.warn(
            "a save of this guest was killed; the next one clears what it left, as does vmstate resume",
        );
    }
    let mut session = Session::over(client)?;
    session.keep_note();
    Ok(session)
}

/// Clears what a killed save has left and takes its debts over.
fn take_over(session: &mut Session, left: Leftovers, observer: &dyn Observer) -> Result<()> {
    let cleared = left.clear(session)?;
    let saver = cleared.saver_pid.map_or_else(|| "a process".to_owned(), |pid| format!("process {pid}"));
    observer.warn(&match &cleared.stopped {
        Some(state) => format!(
            "{saver} was killed while it saved this guest and left it paused: what it left is cleared, and the guest \
             counts as {state}; vmstate resume brings such a guest back without saving it"
        ),
        None => format!("{saver} was killed while it saved this guest: what it left in QEMU is cleared"),
    });
    if session.client.status()?.status == "postmigrate" {
        // QEMU has finished what the killed save had asked for and given the disks up. Only a guest that is resumed
        // gets them back.
        session.resume()?;
    }
    Ok(())
}
