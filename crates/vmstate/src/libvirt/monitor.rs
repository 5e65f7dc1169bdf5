//! A domain's monitor, with the looks of one that is our own.
//!
//! A thread serves QMP on one end of a socket pair. What it is told goes through libvirt to the domain's QEMU, with
//! descriptors; events come back the same way. libvirt keeps its own account of a domain, so what changes it goes by
//! libvirt's own calls: `stop` is a suspend, `cont` a resume, `quit` a destroy.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use io::Cancel;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Map, Value, json};
use wire::libvirt_rpc::format::{VIR_ERR_NO_DOMAIN, VIR_ERR_OPERATION_INVALID};
use wire::libvirt_rpc::{Arguments, Domain, MonitorEvent, Procedure, decode_string};

use super::connection::Failure;
use super::lines::Lines;
use super::{Connection, DomainName, GivingUp, LibvirtUri};
use crate::{Error, Kind, Result};

/// The event that says that the daemon was gone for a while, or told more than could be kept: what the guest did
/// meanwhile is not known.
pub const LOST: &str = "VMSTATE_LIBVIRT_RESTARTED";

/// How long a daemon that went away may take to come back. One that is restarted asks every QEMU that it finds who it
/// is before it listens.
const RETURN_TIMEOUT: Duration = Duration::from_secs(15);
/// How often it is looked for.
const RETURN_INTERVAL: Duration = Duration::from_millis(50);
/// The longest line that is taken from our own client.
const LINE_LEN_MAX: usize = 4 << 20;
/// The most descriptors that one command carries: libvirt hands on one.
const FDS_MAX: usize = 2;

/// Opens a monitor of a running domain and returns the end that a QMP client takes, which is greeted at once.
///
/// The monitor lives as long as that end is open, and closes when the domain ends.
///
/// # Errors
/// As [`Connection::open`] and [`Connection::find`].
pub fn open_monitor(uri: &LibvirtUri, name: &DomainName, cancel: &Cancel) -> Result<UnixStream> {
    let mut connection = Connection::open(uri, GivingUp::Cancelled(cancel.clone()))?;
    let domain = connection.find(name)?;
    drop(connection);
    let failed = |error| Error::io("cannot make a pair of sockets", error);
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let mut served = Served::open(uri.clone(), domain, ours)?;
    std::thread::Builder::new()
        .name("libvirt-monitor".to_owned())
        .spawn(move || served.serve())
        .map_err(|error| Error::io("cannot start a thread", error))?;
    Ok(theirs)
}

/// The side of the monitor that answers.
struct Served {
    uri: LibvirtUri,
    domain: Domain,
    /// `None` while the daemon is away.
    connection: Option<Connection>,
    client: UnixStream,
    /// What it has said and is not answered yet.
    lines: Lines,
}

/// The end of a monitor: its client or its domain is gone.
struct Over;

impl Served {
    fn open(uri: LibvirtUri, domain: Domain, client: UnixStream) -> Result<Served> {
        let mut served = Served { uri, domain, connection: None, client, lines: Lines::default() };
        served.connect()?;
        let version = served.ask("query-version")?;
        let greeting = json!({ "QMP": { "version": version, "capabilities": [] } });
        served.say(&greeting).map_err(|Over| Error::new(Kind::Misuse, "the client's end is closed"))?;
        Ok(served)
    }

    /// Connects and registers for every event of the domain.
    fn connect(&mut self) -> Result<()> {
        let failed = |error| Error::io("cannot duplicate a socket", error);
        let client = self.client.try_clone().map_err(failed)?;
        // A socket may take connections for a daemon that does not come up.
        let timeout = Some(RETURN_TIMEOUT);
        let mut connection = Connection::open_within(&self.uri, GivingUp::HungUp(client), timeout)?;
        let arguments = Arguments::new().word(1).domain(&self.domain).optional_string(None).word(0);
        connection.call(Procedure::QemuMonitorEventRegister, &arguments)?;
        // From here on it is our client that knows how long it waits: it hangs up.
        connection.timeout = None;
        self.connection = Some(connection);
        Ok(())
    }

    /// Connects again to a daemon that went away, and says that it was away.
    fn reconnect(&mut self) -> Result<(), Over> {
        let deadline = Instant::now() + RETURN_TIMEOUT;
        loop {
            match self.connect() {
                Ok(()) => return self.say(&json!({ "event": LOST })),
                // The domain is not there any more, or nobody wants to know.
                Err(error) if error.is_refusal() || error.kind() == Kind::Interrupted => return Err(Over),
                Err(_) if Instant::now() >= deadline => return Err(Over),
                Err(_) => {
                    let interval = rustix::event::Timespec::try_from(RETURN_INTERVAL).ok();
                    // A client that hangs up meanwhile is noticed by the next attempt.
                    let _ = poll(&mut [PollFd::new(&self.client, PollFlags::empty())], interval.as_ref());
                }
            }
        }
    }

    /// A command of which nothing but the answer is wanted.
    fn ask(&mut self, command: &str) -> Result<Value> {
        let arguments = command_arguments(&self.domain, &json!({ "execute": command }));
        let connection = self.connection.as_mut().expect("a monitor that was just connected");
        let answer = connection.call_for_text(Procedure::QemuMonitorCommand, &arguments)?;
        let mut answer: Value = serde_json::from_str(&answer).unwrap_or_default();
        Ok(answer["return"].take())
    }

    /// Serves until the client or the domain is gone.
    fn serve(&mut self) {
        while self.turn().is_ok() {}
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self) -> Result<(), Over> {
        let (from_client, from_libvirt) = {
            let mut fds = vec![PollFd::new(&self.client, PollFlags::IN)];
            if let Some(connection) = &self.connection {
                fds.push(PollFd::new(connection, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => return Ok(()),
                Err(_) => return Err(Over),
            }
            (!fds[0].revents().is_empty(), fds.get(1).is_some_and(|fd| !fd.revents().is_empty()))
        };
        if from_libvirt
            && self.connection.as_mut().is_some_and(|connection| connection.read_events().is_err())
        {
            // Whoever waits for an event must hear of it; whoever asks next waits for its return.
            self.connection = None;
            self.reconnect()?;
        }
        self.pass_events()?;
        if from_client {
            self.receive()?;
            while let Some((line, fds)) = self.lines.next() {
                self.answer(&line, fds)?;
            }
        }
        Ok(())
    }

    /// Hands on the events that have come.
    fn pass_events(&mut self) -> Result<(), Over> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let Domain { uuid, id, .. } = self.domain;
        let is_incomplete = connection.has_lost_events();
        let events: Vec<MonitorEvent> =
            connection.take_events().filter(|event| event.domain.uuid == uuid).collect();
        if is_incomplete {
            self.say(&json!({ "event": LOST }))?;
        }
        for event in events {
            // Another run of the domain is another guest, and nothing that is said from here on is meant for it. One
            // that has ended has no number.
            if event.domain.id >= 0 && event.domain.id != id {
                return Err(Over);
            }
            self.say(&json!({
                "event": event.name,
                "timestamp": { "seconds": event.at.0, "microseconds": event.at.1 },
            }))?;
        }
        Ok(())
    }

    /// Takes what the client has sent, with descriptors.
    fn receive(&mut self) -> Result<(), Over> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut chunk = [0; 16 << 10];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.client, &mut [IoSliceMut::new(&mut chunk)], &mut ancillary, flags)
        {
            Ok(received) => received.bytes,
            Err(Errno::INTR) => return Ok(()),
            Err(_) => return Err(Over),
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                fds.extend(passed);
            }
        }
        if received == 0 || self.lines.len() + received > LINE_LEN_MAX {
            return Err(Over);
        }
        self.lines.push(&chunk[..received], fds);
        Ok(())
    }

    /// Carries out one command and answers it.
    fn answer(&mut self, line: &[u8], fds: Vec<OwnedFd>) -> Result<(), Over> {
        let Ok(Value::Object(mut request)) = serde_json::from_slice(line) else { return Err(Over) };
        let id = request.remove("id").unwrap_or_default();
        if self.connection.is_none() {
            self.reconnect()?;
        }
        // libvirt finds a domain by its UUID, and another run of it is another guest: that is none of ours to resume or
        // to end. Questions change nothing, and what
        // follows from their answers asks again; but what is said of the run state counts by itself.
        let command = request.get("execute").and_then(Value::as_str).unwrap_or_default();
        let is_question = command.starts_with("query-") && command != "query-status";
        if !is_question && self.is_another_run() {
            return Err(Over);
        }
        let mut answer = match self.carry_out(request, &fds) {
            Ok(answer) => answer,
            Err(Failure::Refused(code, words)) => {
                if code == VIR_ERR_NO_DOMAIN || code == VIR_ERR_OPERATION_INVALID && !self.is_running() {
                    return Err(Over);
                }
                Map::from_iter([("error".to_owned(), json!({ "class": "GenericError", "desc": words }))])
            }
            Err(Failure::Broken(error)) if error.kind() == Kind::Interrupted => return Err(Over),
            Err(Failure::Broken(error)) => {
                // What became of the command is not known; whoever asked decides what to do about it.
                self.connection = None;
                self.reconnect()?;
                let words = error.chain();
                Map::from_iter([("error".to_owned(), json!({ "class": "GenericError", "desc": words }))])
            }
        };
        // What came before the answer is said before it.
        self.pass_events()?;
        answer.insert("id".to_owned(), id);
        self.say(&Value::Object(answer))
    }

    fn carry_out(
        &mut self,
        request: Map<String, Value>,
        fds: &[OwnedFd],
    ) -> Result<Map<String, Value>, Failure> {
        let done = || Map::from_iter([("return".to_owned(), json!({}))]);
        let domain = &self.domain;
        let Some(connection) = &mut self.connection else {
            return Err(Failure::Broken(Error::new(Kind::Peer, "libvirt's daemon is away")));
        };
        let command = request.get("execute").and_then(Value::as_str).unwrap_or_default();
        let by_libvirt = match command {
            // What libvirt has negotiated with its QEMU stays.
            "qmp_capabilities" => return Ok(done()),
            "stop" => Some(Procedure::DomainSuspend),
            "cont" => Some(Procedure::DomainResume),
            "quit" => Some(Procedure::DomainDestroy),
            _ => None,
        };
        if let Some(procedure) = by_libvirt {
            connection.call_with(procedure, &Arguments::new().domain(domain), &[])?;
            return Ok(done());
        }
        let arguments = command_arguments(domain, &Value::Object(request));
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let procedure = match fds.is_empty() {
            true => Procedure::QemuMonitorCommand,
            false => Procedure::QemuMonitorCommandWithFiles,
        };
        let answer = connection.call_with(procedure, &arguments, &fds)?;
        let broken = |clause: &str| Failure::Broken(Error::new(Kind::Peer, clause));
        let answer = decode_string(&answer, 0).map_err(|_| broken("libvirt's answer is not understood"))?;
        match serde_json::from_str(&answer) {
            Ok(Value::Object(answer)) => Ok(answer),
            _ => Err(broken("libvirt's answer is no answer of QEMU")),
        }
    }

    /// Whether the domain has ended, even if it was started again. A daemon that does not answer has not said so.
    fn is_another_run(&mut self) -> bool {
        let uuid = self.domain.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let id = self.domain.id;
        let Some(connection) = &mut self.connection else { return false };
        match connection.find(&DomainName(uuid)) {
            Ok(found) => found.id != id,
            Err(error) => error.is_refusal() || error.kind() == Kind::Misuse,
        }
    }

    /// Whether libvirt still knows the domain, and as running in the same run.
    fn is_running(&mut self) -> bool {
        let name = DomainName(self.domain.name.clone());
        let id = self.domain.id;
        self.connection
            .as_mut()
            .is_some_and(|connection| connection.find(&name).is_ok_and(|found| found.id == id))
    }

    fn say(&mut self, message: &Value) -> Result<(), Over> {
        let mut line = message.to_string();
        line.push('\n');
        self.client.write_all(line.as_bytes()).map_err(|_| Over)
    }
}

fn command_arguments(domain: &Domain, command: &Value) -> Arguments {
    Arguments::new().domain(domain).string(&command.to_string()).word(0)
}
