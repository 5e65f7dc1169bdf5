//! One job's dealings with one QEMU: what it switches, passes or stops is written down and put back.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use io::Cancel;
use serde_json::{Map, Value};

use super::leftovers::Leftovers;
use super::note::{Note, Saver, remove_note};
use super::standstill::Standstill;
use crate::net::QmpAddress;
use crate::qmp::{Capability, Client, MigratedRam, MigrationInfo, RunStatus, Version};
use crate::{Error, Kind, Result};

/// How long putting things back may take; a QEMU that hangs must not hang its cleaner.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a step still waits when that time is over. Each is asked for all the same: a QEMU that comes
/// round does what it was asked.
const SETTLE_STEP_TIMEOUT: Duration = Duration::from_millis(100);

/// How often a QEMU that migrates is asked how far it is, where somebody wants to know. It answers from its main
/// loop, which has nothing else to do while the guest stands still.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// How long QEMU may take to close the descriptors of a migration that failed.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a QEMU is asked whether it has finished a migration that has ended.
const FINALIZED_INTERVAL: Duration = Duration::from_millis(1);

/// The capability that makes QEMU send `MIGRATION` events; the only one that may stay on for a probe.
const EVENTS: &str = "events";
/// The capabilities that get along with every parameter.
const HARMLESS: [&str; 2] = [EVENTS, "pause-before-switchover"];
/// What QEMU says to a migration while it is not done with one that has failed: it calls that failed before it lets go
/// of it (migration/migration.c:migrate_prepare and util/yank.c:yank_register_instance, QEMU 10.0; `failing` of newer
/// ones is the time between).
const STILL_CLEANING: [&str; 2] = ["There's a migration process in progress", "duplicate yank instance"];
/// How long that may take, and how often it is asked.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(5);
const CLEANUP_INTERVAL: Duration = Duration::from_millis(10);
/// How often a claim is tried while other savers come and go in between.
const CLAIMS_MAX: usize = 8;
/// What the mark of a descriptor begins with; the number of the process, of its session, and the host follow.
pub(super) const MARK: &str = "vmstate ";

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
    migrating: bool,
    /// Our ends of sockets that QEMU may still write into: closed when it was told to stop.
    held: Vec<OwnedFd>,
    /// Set while the guest is stopped by us.
    stopped: bool,
    /// Set from the pause on: from then the guest is to stand still.
    watching: bool,
    /// The state in which it then stood.
    state_stopped: Option<String>,
    /// What tells of itself that it did, where events may be late.
    standstill: Option<Standstill>,
    /// The guest's state before it was stopped, by us or by a save whose debts are ours now.
    state_before: Option<String>,
    /// Whether a note of what is owed is kept in QEMU, and the id of the one that is there.
    keeps_note: bool,
    note: Option<String>,
    /// The id of the claim, which says that nobody else saves this guest.
    claim: Option<String>,
    notes_left: u64,
    settled: bool,
}

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
        refuse_migration(&mut client)?;
        Ok(Session::bare(client, version))
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
            migrating: false,
            held: Vec::new(),
            stopped: false,
            watching: false,
            state_stopped: None,
            standstill: None,
            state_before: None,
            keeps_note: false,
            note: None,
            claim: None,
            notes_left: 0,
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
        self.keeps_note = true;
        // Most guests were never saved, or not by anybody who was killed.
        let mut generation = 0;
        for _ in 0..CLAIMS_MAX {
            let note = Note { serial: 0, ..self.empty_note() };
            match note.claim(&mut self.client, generation) {
                Ok(Some(id)) => {
                    self.claim = Some(id);
                    return Leftovers::find(&mut self.client, force, self.claim.as_deref());
                }
                // Whoever has it is told by the next look.
                Ok(None) => generation = Leftovers::find(&mut self.client, force, None)?.next_generation(),
                // A QEMU without such objects is saved all the same.
                Err(error) if error.is_refusal() => {
                    self.keeps_note = false;
                    return Leftovers::find(&mut self.client, force, None);
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(Kind::Peer, "other saves of this guest begin and end all the time")
            .hint("wait until they are done"))
    }

    /// A note of this session that says nothing.
    fn empty_note(&self) -> Note {
        Note {
            saver: Saver::this(),
            session: self.number,
            serial: self.notes_left,
            stopped: None,
            capabilities: None,
            parameters: Map::new(),
        }
    }

    /// From now on a note in QEMU says what this session owes it, for the day that this process is killed.
    pub fn keep_note(&mut self) {
        self.keeps_note = true;
    }

    /// Writes down what is owed now, before the change that makes it so.
    fn write_down(&mut self) -> Result<()> {
        if !self.keeps_note {
            return Ok(());
        }
        let on = |found: &Vec<Capability>| {
            found.iter().filter(|c| c.state).map(|c| c.name.clone()).collect::<Vec<_>>()
        };
        let note = Note {
            stopped: self.state_before.clone().filter(|_| self.stopped),
            capabilities: self.capabilities_found.as_ref().map(on),
            parameters: self.parameters_found.clone(),
            ..self.empty_note()
        };
        self.notes_left += 1;
        match note.leave(&mut self.client) {
            // The earlier one goes when the later one is there: at no moment is there none.
            Ok(id) => match self.note.replace(id) {
                Some(earlier) => remove_note(&mut self.client, &earlier),
                None => Ok(()),
            },
            // A QEMU without such objects is saved all the same.
            Err(error) if error.is_refusal() => {
                self.keeps_note = false;
                Ok(())
            }
            Err(error) => Err(error),
        }
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

    /// Whether QEMU knows a migration capability.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn knows_capability(&mut self, name: &str) -> Result<bool> {
        Ok(self.client.capabilities()?.iter().any(|capability| capability.name == name))
    }

    /// Switches on exactly the capabilities `on` and `events`, every other one off, and sets `parameters`,
    /// leaving out those that this QEMU does not have.
    ///
    /// Capabilities outlive migrations: one left on by somebody else (mapped-ram after libvirt restored the
    /// guest) would make ours fail. What is found is remembered and put back by [`Session::settle`].
    ///
    /// # Errors
    /// As every QMP command.
    pub fn configure(&mut self, on: &[&str], parameters: &[(&str, Value)]) -> Result<()> {
        let found = self.client.capabilities()?;
        if let Some(missing) = on.iter().find(|name| !found.iter().any(|c| c.name == **name)) {
            return Err(Error::new(
                Kind::Unsupported,
                format!("QEMU {} has no migration capability `{missing}`", self.version),
            ));
        }
        let wanted: Vec<Capability> = found
            .iter()
            .map(|found| {
                let state = found.name == EVENTS || on.contains(&found.name.as_str());
                Capability { state, ..found.clone() }
            })
            .collect();
        self.capabilities_found.get_or_insert_with(|| found.clone());
        self.capabilities_now = Some(found);

        let now = self.client.parameters()?;
        let mut changes = Map::new();
        for (name, value) in parameters {
            match now.get(*name) {
                Some(found) if found != value => {
                    changes.insert((*name).to_owned(), value.clone());
                    // The first value found is the one to go back to.
                    self.parameters_found.entry(*name).or_insert_with(|| found.clone());
                }
                _ => {}
            }
        }
        self.write_down()?;
        self.switch(&wanted, changes)
    }

    /// Brings QEMU's capabilities to `wanted` and changes `parameters`.
    ///
    /// QEMU refuses some of the one beside some of the other (mapped-ram beside compression), so nothing is
    /// on that is not [`HARMLESS`] while parameters change.
    pub(super) fn switch(&mut self, wanted: &[Capability], parameters: Map<String, Value>) -> Result<()> {
        let now = match self.capabilities_now.take() {
            Some(now) => now,
            None => self.client.capabilities()?,
        };
        let keep = |name: &str| {
            let stays = wanted.iter().any(|c| c.name == name && c.state);
            HARMLESS.contains(&name) || stays && parameters.is_empty()
        };
        let off: Vec<_> = now
            .iter()
            .filter(|c| c.state && !keep(&c.name))
            .map(|c| Capability { state: false, ..c.clone() })
            .collect();
        if !off.is_empty() {
            self.client.set_capabilities(&off)?;
        }
        if !parameters.is_empty() {
            self.client.set_parameters(parameters)?;
        }
        let is_on = |name: &str| now.iter().any(|c| c.name == name && c.state);
        let is_off = |name: &str| off.iter().any(|c| c.name == name);
        let changes: Vec<_> =
            wanted.iter().filter(|c| c.state != (is_on(&c.name) && !is_off(&c.name))).cloned().collect();
        if !changes.is_empty() {
            self.client.set_capabilities(&changes)?;
        }
        self.capabilities_now = Some(wanted.to_vec());
        Ok(())
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
        let ours = self.client.fdsets_marked(&self.mark)?;
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

    /// Starts an outgoing migration. A named descriptor in the URI is QEMU's from then on.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        self.await_cleanup()?;
        // Cancelled even if the answer never comes, but not if QEMU refuses: another's may be under way.
        self.migrating = true;
        let deadline = Instant::now() + CLEANUP_TIMEOUT;
        let started = loop {
            let started = self.client.migrate(uri);
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
        if started.as_ref().is_err_and(|error| error.kind() == Kind::Peer) {
            self.migrating = false;
        }
        started?;
        if let Some(name) = uri.strip_prefix("fd:") {
            self.named_fds.retain(|known| known != name);
        }
        Ok(())
    }

    /// Waits until QEMU has let go of a migration that has failed. One that is told to migrate before is left in the state
    /// `setup`, with nothing that would take it out of it.
    fn await_cleanup(&mut self) -> Result<()> {
        let deadline = Instant::now() + CLEANUP_TIMEOUT;
        loop {
            let instances = match self.client.execute("query-yank", Value::Object(Map::new())) {
                // A QEMU without the command has no such instances.
                Err(error) if error.is_refusal() => return Ok(()),
                instances => instances?,
            };
            let is_held =
                instances.as_array().is_some_and(|all| all.iter().any(|one| one["type"] == "migration"));
            if !is_held || Instant::now() >= deadline || self.client.migration()?.is_under_way() {
                return Ok(());
            }
            self.client.next_event(Some(Instant::now() + CLEANUP_INTERVAL))?;
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
                self.migrating = false;
                self.await_finalized()?;
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

    /// Cancels the migration and waits until it is gone.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn cancel_migration(&mut self) -> Result<MigrationInfo> {
        self.client.migrate_cancel()?;
        self.migration_end(Some(self.client.timeout.unwrap_or(SETTLE_TIMEOUT)))
    }

    /// Pauses the guest and forgets the events up to then; returns the state it was in.
    ///
    /// # Errors
    /// As every QMP command; [`Kind::Peer`] where the guest is not paused afterwards.
    pub fn pause(&mut self) -> Result<RunStatus> {
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
        let after = self.client.status()?;
        if after.running {
            return Err(Error::new(Kind::Peer, "the guest runs although it was stopped")
                .hint("another client has resumed it; keep it from doing so during the save"));
        }
        self.client.watch();
        self.watching = true;
        self.state_stopped = Some(after.status);
        Ok(before)
    }

    /// The first event since the pause that says that the guest did not stand still.
    fn moved(&self) -> Option<&'static str> {
        self.client.moves().first.filter(|_| self.watching)
    }

    /// The guest's state now. The answer comes after every event that preceded it.
    fn look(&mut self) -> Result<RunStatus> {
        let status = self.client.status()?;
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
        let status = self.look()?;
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

    /// Resumes the guest if this session stopped it and no other client has decided otherwise since.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn resume(&mut self) -> Result<()> {
        if self.stopped {
            self.look()?;
        }
        if self.stopped {
            // What comes now is ours.
            self.watching = false;
            self.client.cont()?;
            self.stopped = false;
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
            attempt(self, &|session| session.cancel_migration().map(drop));
        }
        self.held.clear();
        let stopped = self.stopped;
        // The guest first: the rest can wait, it cannot.
        attempt(self, &Session::resume);
        for name in std::mem::take(&mut self.named_fds) {
            attempt(self, &|session| session.client.closefd_if_any(&name));
        }
        if self.fdsets_owed > 0 {
            attempt(self, &Session::remove_fdsets);
        }
        let parameters = std::mem::take(&mut self.parameters_found);
        if let Some(found) = self.capabilities_found.take() {
            attempt(self, &|session| session.switch(&found, parameters.clone()));
        }
        if let Some(note) = self.note.take() {
            attempt(self, &|session| remove_note(&mut session.client, &note));
        }
        if let Some(claim) = self.claim.take() {
            attempt(self, &|session| remove_note(&mut session.client, &claim));
        }
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

/// Makes sure that no migration is under way.
///
/// # Errors
/// [`Kind::Peer`] where one is; others as every QMP command.
pub(crate) fn refuse_migration(client: &mut Client) -> Result<()> {
    let migration = client.migration()?;
    if !migration.is_under_way() {
        return Ok(());
    }
    Err(Error::new(Kind::Peer, format!("a migration is under way already (status `{}`)", migration.status))
        .hint("wait for it to end, or cancel it with migrate_cancel"))
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
