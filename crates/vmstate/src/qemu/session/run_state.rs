//! The guest is stopped, seen to stand still, and resumed.

use serde_json::json;

use super::{Session, did_not_stand_still};
use crate::qemu::Standstill;
use crate::qmp::{Begun, Client, RunStatus};
use crate::{Error, Kind, Result};

/// An order to stop the guest that is on its way, and the question before it in which state it was.
#[derive(Debug)]
pub(super) struct Stopping {
    before: Begun,
    /// `None` where it could not be sent.
    stop: Option<Begun>,
}

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
        // A guest that is noted to be stopped is stopped without waiting for any answer. Where events may come later than
        // answers, nothing would tell that it moved before what is asked behind that.
        let at_once = !self.stopped && !self.client.has_late_events();
        let Some(expected) = self.to_stop.clone().filter(|_| at_once) else {
            return self.pause_first(ask);
        };
        let before = self.client.begin("query-status", json!({}))?;
        self.stopping = Some(Stopping { before, stop: None });
        // Owed even if the answer never comes: QEMU may have stopped all the same.
        self.stopped = true;
        self.state_before = Some(expected);
        let stop = self.client.begin("stop", json!({}))?;
        self.stopping.as_mut().expect("on its way").stop = Some(stop);
        let asked = ask(&mut self.client)?;
        let before = self.end_stopping()?.expect("on its way");
        self.watching = true;
        self.state_stopped = Some("paused".to_owned());
        if before.status != "running" {
            self.see_paused()?;
        }
        Ok((before, asked))
    }

    /// Waits until the guest is stopped, where that is on its way; returns the state that it was in. From then on it is seen
    /// whether it stays so. When this is cut short it can be called again, and what the guest is owed is known by then.
    fn end_stopping(&mut self) -> Result<Option<RunStatus>> {
        let Some(Stopping { before, .. }) = &self.stopping else { return Ok(None) };
        self.client.wait(before)?;
        let Stopping { before, stop } = self.stopping.take().expect("on its way");
        let before = RunStatus::of(&self.client.end(before)?)?;
        let is_as_noted = self.state_before.as_ref() == Some(&before.status);
        if !is_as_noted {
            // Somebody else was there since.
            self.stopped = before.is_live();
            self.state_before = self.stopped.then(|| before.status.clone());
            self.to_stop = None;
        }
        if let Some(stop) = stop {
            self.client.end(stop)?;
            // Nothing that was asked behind it is heard of yet.
            self.client.watch();
        }
        if !is_as_noted && !self.settled {
            self.write_down()?;
        }
        Ok(Some(before))
    }

    fn pause_first<T>(&mut self, ask: impl FnOnce(&mut Client) -> Result<T>) -> Result<(RunStatus, T)> {
        let mut before = self.client.status()?;
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
        // Nothing is asked of it before.
        self.client.watch();
        self.watching = true;
        let asked = ask(&mut self.client)?;
        Ok((before, asked))
    }

    /// Sees that the guest is paused.
    fn see_paused(&mut self) -> Result<()> {
        let after = self.client.status()?;
        if after.running {
            return Err(Error::new(Kind::Peer, "the guest runs although it was stopped")
                .hint("another client has resumed it; keep it from doing so during the save"));
        }
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
    pub(crate) fn begin_resuming(&mut self) -> Result<()> {
        if self.stopped {
            // What comes now is ours.
            self.watching = false;
            self.resuming = Some(self.client.begin("cont", json!({}))?);
        }
        Ok(())
    }

    /// Waits until it runs, if that is on its way. When this is cut short it can be called again: to resume it twice would
    /// be to resume a guest that somebody else has paused in between.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn end_resuming(&mut self) -> Result<()> {
        if let Some(resuming) = &self.resuming {
            self.client.wait(resuming)?;
        }
        if let Some(resuming) = self.resuming.take() {
            self.client.end(resuming)?;
            self.stopped = false;
        }
        Ok(())
    }

    /// Resumes the guest if this session stopped it and no other client has decided otherwise since.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn resume(&mut self) -> Result<()> {
        match self.end_resuming() {
            // Once more.
            Err(error) if error.is_refusal() => {}
            resumed => resumed?,
        }
        self.end_stopping()?;
        if self.stopped && self.look()?.running {
            // It was not stopped in the end, or is not any more.
            self.stopped = false;
        }
        self.begin_resuming()?;
        self.end_resuming()
    }
}
