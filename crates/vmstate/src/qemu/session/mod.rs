//! One job's dealings with one QEMU: what it switches, passes or stops is written down and put back.

mod cancel;
mod migration;
mod run_state;
mod settings;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use io::Cancel;
use serde_json::{Map, Value, json};

use self::run_state::Stopping;
pub(super) use self::settings::Changing;
use super::leftovers::{AskedLeftovers, Leftovers};
use super::note::{Claiming, Note, Owed, Saver, begin_removing, begin_writing, end_removing, remove_note};
use super::standstill::Standstill;
use crate::net::QmpAddress;
use crate::qmp::{Begun, Capability, Client, MigrationInfo, RunStatus, Version};
use crate::{Error, Kind, Result};

/// How long putting things back may take; a QEMU that hangs must not hang its cleaner.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a step still waits when that time is over. Each is asked for all the same: a QEMU that comes
/// round does what it was asked.
const SETTLE_STEP_TIMEOUT: Duration = Duration::from_millis(100);

/// How long QEMU may take to close the descriptors of a migration that failed.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a QEMU is asked whether it has finished a migration that has ended.
const FINALIZED_INTERVAL: Duration = Duration::from_millis(1);

/// How often a claim is tried while other savers come and go in between.
const CLAIMS_MAX: usize = 8;
/// What the mark of a descriptor begins with; the number of the process, of its session, and the host follow.
pub(super) const MARK: &str = "vmstate ";
/// What the mark of a descriptor ends with into which QEMU writes the state of the devices: it has no part in a migration.
pub(super) const DEVICES: &str = " devices";

/// A connection to QEMU together with everything that the job has changed there.
///
/// Whoever opens a session ends it with [`Session::settle`]; dropping it does the same, but cannot tell
/// what went wrong.
pub struct Session {
    /// The connection.
    pub client: Client,
    /// QEMU's version.
    pub version: Version,
    /// Capabilities as they were found, where any was changed.
    capabilities_found: Option<Vec<Capability>>,
    /// Capabilities as this session has left them, where it knows.
    capabilities_now: Option<Vec<Capability>>,
    /// The parameters that were changed, with the values found.
    parameters_found: Map<String, Value>,
    /// Which session of this process it is.
    number: u64,
    /// The mark of every descriptor that this session adds to a set.
    mark: String,
    /// How many calls have added such descriptors and were not undone: the answer that names a set can be cut short.
    fdsets_owed: usize,
    named_fds: Vec<String>,
    /// QEMU's process, where it is known and of this host.
    pub(crate) process: Option<u32>,
    migrating: bool,
    /// The question to migrate, until it is known whether QEMU does.
    migrate_asked: Option<Begun>,
    /// Our ends of sockets that QEMU may still write into: closed when it was told to stop.
    held: Vec<OwnedFd>,
    /// Set while the guest is stopped by us.
    stopped: bool,
    /// What tells whether it is, until that is known, and the order to resume it, until it runs.
    stopping: Option<Stopping>,
    resuming: Option<Begun>,
    /// Set from the pause on: from then the guest is to stand still.
    watching: bool,
    /// The state in which it then stood.
    state_stopped: Option<String>,
    /// What tells of itself that it did, where events may be late.
    standstill: Option<Standstill>,
    /// The guest's state before it was stopped, by us or by a save whose debts are ours now.
    state_before: Option<String>,
    /// The state in which a guest is that is about to be stopped.
    to_stop: Option<String>,
    /// Whether a note of what is owed is kept in QEMU, and the id of the one that is there.
    keeps_note: bool,
    note: Option<String>,
    /// What it says.
    noted: Option<Owed>,
    /// The id of the claim, which says that nobody else saves this guest. It is a note as well.
    claim: Option<String>,
    /// The claim that is on its way: whether it is ours is known by the answer alone.
    claiming: Option<Claiming>,
    /// The questions for all settings, where they were asked ahead.
    settings_asked: Option<(Begun, Begun)>,
    /// Whether QEMU may not have let go of a migration that has ended.
    may_be_cleaning: bool,
    /// Descriptor sets that are being taken back, and the claim that is being given up.
    removals: Vec<Begun>,
    releasing: Option<Begun>,
    settled: bool,
}

/// The questions behind a claim that is on its way.
#[derive(Debug)]
pub(crate) struct BegunClaim {
    left: AskedLeftovers,
}

/// A set of descriptors that is on its way.
#[derive(Debug)]
pub(super) struct Lending(Begun);

impl Session {
    /// Connects and makes sure that no migration is under way.
    ///
    /// # Errors
    /// As [`Client::connect`]; [`Kind::Peer`] where a migration is under way already.
    pub fn open(address: &QmpAddress, cancel: &Cancel) -> Result<Session> {
        Session::over(Client::connect(address, cancel)?)
    }

    /// As [`Session::open`], over a connection that is there already.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub fn over(mut client: Client) -> Result<Session> {
        let version = client.version()?;
        let asked = client.begin("query-migrate", json!({}))?;
        let mut session = Session::bare(client, version);
        session.refuse_migration(asked)?;
        Ok(session)
    }

    /// Makes sure that no migration is under way, by the answer to that question.
    ///
    /// # Errors
    /// [`Kind::Peer`] where one is; others as every QMP command.
    pub(crate) fn refuse_migration(&mut self, asked: Begun) -> Result<()> {
        let migration = MigrationInfo::of(&self.client.end(asked)?);
        self.may_be_cleaning = migration.may_be_held();
        if !migration.is_under_way() {
            return Ok(());
        }
        let clause = format!("a migration is under way already (status `{}`)", migration.status);
        Err(Error::new(Kind::Peer, clause).hint("wait for it to end, or cancel it with migrate_cancel"))
    }

    /// As [`Session::over`], whether a migration is under way or not.
    pub(crate) fn bare(client: Client, version: Version) -> Session {
        static SESSIONS: AtomicU64 = AtomicU64::new(0);
        let number = SESSIONS.fetch_add(1, Ordering::Relaxed);
        Session {
            client,
            version,
            number,
            capabilities_found: None,
            capabilities_now: None,
            parameters_found: Map::new(),
            mark: mark(&Saver::this(), number),
            fdsets_owed: 0,
            named_fds: Vec::new(),
            process: None,
            migrating: false,
            migrate_asked: None,
            held: Vec::new(),
            stopped: false,
            stopping: None,
            resuming: None,
            watching: false,
            state_stopped: None,
            standstill: None,
            state_before: None,
            to_stop: None,
            keeps_note: false,
            note: None,
            noted: None,
            claim: None,
            claiming: None,
            settings_asked: None,
            may_be_cleaning: true,
            removals: Vec::new(),
            releasing: None,
            settled: false,
        }
    }

    /// Makes this session the only one that saves this guest or clears what is left of a save, among all that ask for
    /// the same, and keeps a note from now on. Returns what killed savers have left.
    ///
    /// Looking first and writing a note after would let two of them see nobody. So the claim is an object of an id
    /// that both would take, and QEMU gives it to one of them. Claims of the dead stay until they are cleared; the next
    /// one has the next id. One may come to an id that nobody has any more while somebody else stands at the next: all
    /// look behind their claims, and of two that stand there at most one goes on.
    ///
    /// # Errors
    /// As [`Leftovers::find`]. A claim that was made is given up by [`Session::settle`].
    pub fn claim(&mut self, force: bool) -> Result<Leftovers> {
        let begun = self.begin_claim()?;
        self.end_claim(begun, force)
    }

    /// Begins a claim: what is asked in between is answered behind it.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn begin_claim(&mut self) -> Result<BegunClaim> {
        self.keeps_note = true;
        // Most guests were never saved, or not by anybody who was killed.
        self.try_claim(0)
    }

    fn try_claim(&mut self, generation: u64) -> Result<BegunClaim> {
        let claiming = self.empty_note().begin_claim(&mut self.client, generation)?;
        self.claiming = Some(claiming);
        Ok(BegunClaim { left: Leftovers::ask(&mut self.client)? })
    }

    /// Waits for the answer to a claim; `false` where another saver was faster.
    fn end_claiming(&mut self) -> Result<bool> {
        if let Some(claiming) = &self.claiming {
            claiming.wait(&mut self.client)?;
        }
        if let Some(claiming) = self.claiming.take() {
            self.claim = claiming.end(&mut self.client)?;
        }
        Ok(self.claim.is_some())
    }

    /// Ends a claim as [`Session::claim`] says it.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn end_claim(&mut self, begun: BegunClaim, force: bool) -> Result<Leftovers> {
        let BegunClaim { mut left } = begun;
        for _ in 0..CLAIMS_MAX {
            match self.end_claiming() {
                Ok(true) => return left.answered(&mut self.client, force, self.claim.as_deref()),
                // Whoever has it is told by the look behind it.
                Ok(false) => {
                    let generation = left.answered(&mut self.client, force, None)?.next_generation();
                    BegunClaim { left } = self.try_claim(generation)?;
                }
                // A QEMU without such objects is saved all the same.
                Err(error) if error.is_refusal() => {
                    self.keeps_note = false;
                    return left.answered(&mut self.client, force, None);
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(Kind::Peer, "other saves of this guest begin and end all the time")
            .hint("wait until they are done"))
    }

    /// A note of this session that says nothing.
    fn empty_note(&self) -> Note {
        Note { saver: Saver::this(), session: self.number, owed: Owed::default() }
    }

    /// From now on a note in QEMU says what this session owes it, for the day that this process is killed.
    pub fn keep_note(&mut self) {
        self.keeps_note = true;
    }

    /// What is owed now, or will be soon.
    fn owed(&self) -> Owed {
        let on = |found: &Vec<Capability>| {
            found.iter().filter(|c| c.state).map(|c| c.name.clone()).collect::<Vec<_>>()
        };
        let stopped = if self.stopped { &self.state_before } else { &self.to_stop };
        Owed {
            stopped: stopped.clone(),
            capabilities: self.capabilities_found.as_ref().map(on),
            parameters: self.parameters_found.clone(),
        }
    }

    /// Writes down what is owed, before the change that makes it so.
    fn write_down(&mut self) -> Result<()> {
        let begun = self.begin_writing_down()?;
        self.end_writing_down(begun)
    }

    /// Begins to write down what is owed, where that is not what is written already. QEMU carries out commands in their
    /// order, so a change may follow at once.
    fn begin_writing_down(&mut self) -> Result<Option<Begun>> {
        let owed = self.owed();
        if !self.keeps_note || self.noted.as_ref() == Some(&owed) {
            return Ok(None);
        }
        self.noted = Some(owed.clone());
        match self.claim.as_ref().or(self.note.as_ref()) {
            Some(id) => begin_writing(&mut self.client, id, &owed).map(Some),
            None => {
                let note = Note { owed, ..self.empty_note() };
                // Taken away even if the answer never comes: nobody else has this id.
                self.note = Some(note.id());
                match note.leave(&mut self.client) {
                    // A QEMU without such objects is saved all the same.
                    Err(error) if error.is_refusal() => self.keeps_note = false,
                    left => left?,
                }
                Ok(None)
            }
        }
    }

    fn end_writing_down(&mut self, begun: Option<Begun>) -> Result<()> {
        match begun.map(|begun| self.client.end(begun)) {
            Some(Err(error)) if error.is_refusal() => {
                self.keeps_note = false;
                Ok(())
            }
            Some(answer) => answer.map(drop),
            None => Ok(()),
        }
    }

    /// The guest is about to be stopped, in this state as far as is known, and that is written down.
    ///
    /// Not before the very moment: whoever is killed earlier has not stopped it, and where it is found paused then,
    /// somebody else has paused it.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn will_stop(&mut self, status: &RunStatus) -> Result<()> {
        if self.stopped {
            return Ok(());
        }
        self.to_stop = status.is_live().then(|| status.status.clone());
        self.write_down()
    }

    /// Takes over what a killed save owes to the guest: it counts as one in the state `before` that this session
    /// has stopped.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn owe(&mut self, before: Option<String>) -> Result<()> {
        self.stopped = before.is_some();
        self.state_before = before;
        if self.stopped { self.write_down() } else { Ok(()) }
    }

    /// Whether the guest is stopped and is to be resumed by this session.
    pub fn owes(&self) -> bool {
        self.stopped
    }

    /// Gives QEMU a new set of descriptors and returns the set's number.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn add_fdset(&mut self, fds: &[BorrowedFd<'_>]) -> Result<u64> {
        self.require_descriptors()?;
        let mut fdset = None;
        self.fdsets_owed += 1;
        for fd in fds {
            fdset = Some(self.client.add_fd(fdset, &self.mark, *fd)?);
        }
        fdset.ok_or_else(|| Error::new(Kind::Misuse, "a descriptor set without descriptors"))
    }

    /// Begins to give QEMU a new set of one descriptor, for the state of the devices.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn begin_lending(&mut self, fd: BorrowedFd<'_>) -> Result<Lending> {
        self.require_descriptors()?;
        self.fdsets_owed += 1;
        let arguments = json!({ "opaque": format!("{}{DEVICES}", self.mark) });
        self.client.begin_with("add-fd", arguments, &[fd]).map(Lending)
    }

    /// The number of that set.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn end_lending(&mut self, lending: Lending) -> Result<u64> {
        let answer = self.client.end(lending.0)?;
        answer["fdset-id"]
            .as_u64()
            .ok_or_else(|| Error::new(Kind::Peer, "QEMU answered add-fd in an unknown form"))
    }

    /// Begins to take a set back; [`Session::settle`] waits for it.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn begin_taking_back(&mut self, fdset: u64) -> Result<()> {
        let begun = self.client.begin("remove-fd", json!({ "fdset-id": fdset }))?;
        self.removals.push(begun);
        Ok(())
    }

    /// Waits until sets are taken back that are on their way.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn end_taking_back(&mut self) -> Result<()> {
        for begun in std::mem::take(&mut self.removals) {
            self.client.end(begun)?;
            self.fdsets_owed -= 1;
        }
        Ok(())
    }

    /// Takes a set of descriptors back.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn remove_fdset(&mut self, fdset: u64) -> Result<()> {
        self.client.remove_fdset(fdset)?;
        self.fdsets_owed -= 1;
        Ok(())
    }

    /// Takes every set back that this session has made, whether it knows of it or not.
    fn remove_fdsets(&mut self) -> Result<()> {
        let ours = self.client.fdsets_marked(&[&self.mark, &format!("{}{DEVICES}", self.mark)])?;
        for fdset in &ours {
            self.client.remove_fdset(*fdset)?;
        }
        // A migration that failed is over before QEMU's channels have closed what they made of these descriptors. Until
        // then a file that is deleted takes its room, and whoever saves next may lack it.
        let deadline = Instant::now() + LET_GO_TIMEOUT;
        while !ours.is_empty() && Instant::now() < deadline {
            let left = self.client.fdsets()?;
            if !ours.iter().any(|fdset| left.contains(fdset)) {
                break;
            }
            self.client.next_event(Some(Instant::now() + FINALIZED_INTERVAL))?;
        }
        Ok(())
    }

    /// Gives QEMU a descriptor under a name.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn give_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        self.require_descriptors()?;
        // Taken back even if the answer never comes.
        self.named_fds.push(name.to_owned());
        self.client.getfd(name, fd)
    }

    /// Gives QEMU a descriptor under a name that it keeps to its end, or until another is given under that name.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn leave_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        self.require_descriptors()?;
        self.client.getfd(name, fd)
    }

    /// Begins to give QEMU a descriptor under a name.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn begin_giving(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<Begun> {
        self.require_descriptors()?;
        // Taken back even if the answer never comes.
        self.named_fds.push(name.to_owned());
        self.client.begin_with("getfd", json!({ "fdname": name }), &[fd])
    }

    /// Takes a named descriptor back.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn take_fd_back(&mut self, name: &str) -> Result<()> {
        self.client.closefd(name)?;
        self.named_fds.retain(|known| known != name);
        Ok(())
    }

    /// Makes sure that descriptors can be passed to this monitor.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where it is no unix socket.
    pub fn require_descriptors(&self) -> Result<()> {
        if self.client.passes_descriptors() {
            return Ok(());
        }
        Err(Error::new(
            Kind::Unsupported,
            format!("descriptors cannot be passed to the QMP monitor at {}", self.client.name()),
        )
        .hint("give QEMU a second monitor on a unix socket: -qmp unix:PATH,server=on,wait=off"))
    }

    /// Begins to give the claim up, where nothing is owed any more; [`Session::settle`] waits for that.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn begin_releasing(&mut self) -> Result<()> {
        self.end_taking_back()?;
        let owes = self.stopped
            || self.migrating
            || self.fdsets_owed > 0
            || self.capabilities_found.is_some()
            || !self.parameters_found.is_empty();
        if let (false, Some(claim)) = (owes, &self.claim) {
            self.releasing = Some(begin_removing(&mut self.client, claim)?);
        }
        Ok(())
    }

    /// Whether the guest is still to stand still: it was paused, and not resumed by this session.
    pub fn is_watching(&self) -> bool {
        self.watching
    }

    /// From now on no wait is cut short by an interrupt: what is done cannot be taken back.
    pub fn ignore_cancel(&mut self) {
        self.client.ignore_cancel(SETTLE_TIMEOUT);
    }

    /// Keeps our end of a socket open until QEMU was told to stop writing into it.
    pub(super) fn hold(&mut self, socket: OwnedFd) {
        self.held.push(socket);
    }

    /// Lets go of such sockets: QEMU writes into them no more.
    pub(super) fn let_go(&mut self) {
        self.held.clear();
    }

    /// QEMU has taken a named descriptor for itself.
    pub(crate) fn has_taken(&mut self, name: &str) {
        self.named_fds.retain(|known| known != name);
    }

    /// Puts nothing back, neither now nor later: another session will.
    pub(crate) fn leave_as_it_is(&mut self) {
        self.settled = true;
    }

    /// Ends the session without putting anything back: for a QEMU that is about to be ended itself.
    pub fn abandon(mut self) {
        self.settled = true;
    }

    /// Puts everything back: ends a migration, resumes a guest that is still owed that, takes back
    /// descriptors, parameters and capabilities. Every step is tried even if one before it failed, and all
    /// of them together wait for QEMU no longer than half a minute.
    ///
    /// # Errors
    /// The first failure, with a hint what to do by hand.
    pub fn settle(mut self) -> Result<()> {
        self.put_back()
    }

    /// Gives the claim up, or waits until it is.
    fn release(&mut self) -> Result<()> {
        // One that was cut short may be ours all the same.
        match self.end_claiming() {
            Err(error) if error.is_refusal() => {}
            claimed => drop(claimed?),
        }
        let Some(claim) = self.claim.take() else { return Ok(()) };
        match self.releasing.take() {
            Some(begun) => end_removing(&mut self.client, begun),
            None => remove_note(&mut self.client, &claim),
        }
    }

    fn put_back(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.settled, true) {
            return Ok(());
        }
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let mut first = None;
        let mut attempt = |session: &mut Session, step: &dyn Fn(&mut Session) -> Result<()>| {
            let left = deadline.saturating_duration_since(Instant::now());
            session.client.ignore_cancel(left.max(SETTLE_STEP_TIMEOUT));
            if let Err(error) = step(session) {
                first.get_or_insert(error);
            }
        };
        if self.migrating {
            attempt(self, &Session::give_up_migrating);
        }
        self.held.clear();
        let stopped = self.stopped;
        // The guest first: the rest can wait, it cannot.
        attempt(self, &Session::resume);
        for name in std::mem::take(&mut self.named_fds) {
            attempt(self, &|session| session.client.closefd_if_any(&name));
        }
        if !self.removals.is_empty() {
            attempt(self, &Session::end_taking_back);
        }
        if self.fdsets_owed > 0 {
            attempt(self, &Session::remove_fdsets);
        }
        attempt(self, &Session::settings_back);
        if let Some(note) = self.note.take() {
            attempt(self, &|session| remove_note(&mut session.client, &note));
        }
        attempt(self, &Session::release);
        match first {
            None => Ok(()),
            // Where it is known what became of QEMU, the error says so itself.
            Some(error) if stopped && self.stopped && error.hint_text().is_none() => {
                Err(error.hint("the guest may still be paused: resume it with the QMP command cont"))
            }
            Some(error) => Err(error),
        }
    }
}

/// A mark that no other session has.
pub(super) fn mark(saver: &Saver, session: u64) -> String {
    format!("{MARK}{} {session} {}", saver.pid, saver.host)
}

/// The error for a guest that another client has moved.
pub(super) fn did_not_stand_still(what: &str) -> Error {
    Error::new(Kind::Peer, format!("the guest did not stand still during the save ({what})"))
        .hint("another client resumed or reset it; the image was given up, save again")
}

impl Drop for Session {
    fn drop(&mut self) {
        // The caller is on its way out with an error or a panic of its own, which says more than ours would.
        drop(self.put_back());
    }
}
