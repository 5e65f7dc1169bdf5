//! The guest is stopped, seen to stand still, and resumed.

use serde_json::json;

use super::{Session, did_not_stand_still};
use crate::qemu::Standstill;
use crate::qmp::{Begun, Client, RunStatus};
use crate::{Error, Kind, Result};

impl Session {
    /// Pauses the guest and forgets the events up to then; returns the state it was in.
    ///
    /// # Errors
    /// As every QMP command; [`Kind::Peer`] where the guest is not paused afterwards.
    pub fn pause(&mut self) -> Result<RunStatus> {
        self.pause_and(|_| Ok(())).map(|(before, ())| before)
    }

    /// As [`Session::pause`]; `ask` asks behind that, and what it is told is of the guest that stands still.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn pause_and<T>(
        &mut self,
        ask: impl FnOnce(&mut Client) -> Result<T>,
    ) -> Result<(RunStatus, T)> {
        let before = self.client.begin("query-status", json!({}))?;
        // A guest that is noted to be stopped is stopped without waiting for that answer.
        let Some(expected) = self.to_stop.clone().filter(|_| !self.stopped) else {
            return self.pause_first(before, ask);
        };
        // Owed even if the answer never comes: QEMU may have stopped all the same.
        self.stopped = true;
        self.state_before = Some(expected);
        let stop = self.client.begin("stop", json!({}))?;
        let asked = ask(&mut self.client)?;
        let before = RunStatus::of(&self.client.end(before)?)?;
        if self.state_before.as_ref() != Some(&before.status) {
            // Somebody else was there since.
            self.stopped = before.is_live();
            self.state_before = self.stopped.then(|| before.status.clone());
            self.to_stop = None;
            self.write_down()?;
        }
        self.client.end(stop)?;
        if before.status == "running" && !self.client.has_late_events() {
            // What comes behind this answer says if it did not stay so.
            self.client.watch();
            self.watching = true;
            self.state_stopped = Some("paused".to_owned());
        } else {
            self.see_paused()?;
        }
        Ok((before, asked))
    }

    fn pause_first<T>(
        &mut self,
        before: Begun,
        ask: impl FnOnce(&mut Client) -> Result<T>,
    ) -> Result<(RunStatus, T)> {
        let mut before = RunStatus::of(&self.client.end(before)?)?;
        if before.is_live() {
            // Owed even if the answer never comes: QEMU may have stopped all the same.
            self.stopped = true;
            self.state_before = Some(before.status.clone());
            self.write_down()?;
            self.client.stop()?;
        } else if let (true, Some(status)) = (self.stopped, &self.state_before) {
            // A killed save stopped it, and its debt is ours.
            before = RunStatus { running: status != "suspended", status: status.clone() };
        }
        self.see_paused()?;
        let asked = ask(&mut self.client)?;
        Ok((before, asked))
    }

    /// Sees that the guest is paused, and forgets the events up to then.
    fn see_paused(&mut self) -> Result<()> {
        let after = self.client.status()?;
        if after.running {
            return Err(Error::new(Kind::Peer, "the guest runs although it was stopped")
                .hint("another client has resumed it; keep it from doing so during the save"));
        }
        self.client.watch();
        self.watching = true;
        self.state_stopped = Some(after.status);
        Ok(())
    }

    /// The first event since the pause that says that the guest did not stand still.
    pub(super) fn moved(&self) -> Option<&'static str> {
        self.client.moves().first.filter(|_| self.watching)
    }

    /// The guest's state now. The answer comes after every event that preceded it.
    fn look(&mut self) -> Result<RunStatus> {
        let asked = self.begin_looking()?;
        self.end_looking(asked)
    }

    /// Begins to ask for the guest's state now.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn begin_looking(&mut self) -> Result<Begun> {
        self.client.begin("query-status", json!({}))
    }

    fn end_looking(&mut self, asked: Begun) -> Result<RunStatus> {
        let status = RunStatus::of(&self.client.end(asked)?)?;
        // Whoever resumed it, and perhaps stopped it again, has said what it is to do: that is not ours to
        // undo. Only a migration that went through has stopped it against that wish.
        if self.watching && self.client.moves().resumed && status.status != "postmigrate" {
            self.stopped = false;
        }
        Ok(status)
    }

    /// Makes sure that the guest has stood still since [`Session::pause`]. Another client may resume it at
    /// any time, and memory read from a running guest is worth nothing.
    ///
    /// # Errors
    /// [`Kind::Peer`] where it has run, even for a moment.
    pub fn verify_still(&mut self) -> Result<()> {
        let asked = self.begin_looking()?;
        self.verify_still_by(asked)
    }

    /// The same, by the answer to a question that was asked when it had to stand still no longer.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn verify_still_by(&mut self, asked: Begun) -> Result<()> {
        let status = self.end_looking(asked)?;
        match self.moved() {
            Some(event) => Err(did_not_stand_still(&format!("event {event}"))),
            None if status.running => Err(did_not_stand_still("it runs now")),
            // Before QEMU 9.0 a sleeping guest is called that while it stands still, too.
            None if status.is_live() && self.state_stopped.as_ref() != Some(&status.status) => {
                Err(did_not_stand_still(&format!("it is {} now", status.status)))
            }
            None => match self.standstill.take() {
                Some(standstill) => {
                    let verified = standstill.verify(self);
                    self.standstill = Some(standstill);
                    verified
                }
                None => Ok(()),
            },
        }
    }

    /// From now on the guest's own state is compared with what it was, `devices`, where the monitor's events may come
    /// later than its answers.
    ///
    /// # Errors
    /// As [`Standstill::of`].
    pub fn remember_standstill(&mut self, devices: &[u8]) -> Result<()> {
        if self.client.has_late_events() {
            self.standstill = Some(Standstill::of(devices)?);
        }
        Ok(())
    }

    /// The guest's new state is the one wanted: it is no longer owed its old one.
    pub fn keep_paused(&mut self) {
        self.stopped = false;
    }

    /// Begins to resume a guest that was seen to stand still just now, if this session stopped it.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn begin_resuming(&mut self) -> Result<Option<Begun>> {
        if !self.stopped {
            return Ok(None);
        }
        // What comes now is ours.
        self.watching = false;
        self.client.begin("cont", json!({})).map(Some)
    }

    /// Waits until it runs.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn end_resuming(&mut self, begun: Option<Begun>) -> Result<()> {
        if let Some(begun) = begun {
            self.client.end(begun)?;
            self.stopped = false;
        }
        Ok(())
    }

    /// Resumes the guest if this session stopped it and no other client has decided otherwise since.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn resume(&mut self) -> Result<()> {
        if self.stopped {
            self.look()?;
        }
        let begun = self.begin_resuming()?;
        self.end_resuming(begun)
    }
}
