//! A connection to libvirt's daemon: calls, their answers, and the events that come between.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use io::Cancel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use wire::libvirt_rpc::format::{
    PROTOCOL_VERSION, REMOTE_AUTH_NONE, REMOTE_AUTH_POLKIT, VIR_ERR_NO_DOMAIN, VIR_NET_MESSAGE_HEADER_MAX,
};
use wire::libvirt_rpc::{
    Arguments, Header, MessageKind, MonitorEvent, Procedure, Status, decode_auth_types, decode_error,
    decode_message_len, decode_monitor_event, decode_string, decode_word, encode_call,
};
use wire::{DecodeError, Fault};

use super::LibvirtUri;
use crate::{Error, Kind, Result};

/// How many events are kept while nobody takes them; the oldest goes first.
const EVENTS_MAX: usize = 1 << 10;
/// How much is read at once of a long message.
const CHUNK_LEN: usize = 64 << 10;

/// What ends waiting for the daemon.
#[derive(Debug)]
pub enum GivingUp {
    /// The switch is thrown.
    Cancelled(Cancel),
    /// The other end of this socket is closed: nobody is left who wants the answer.
    HungUp(UnixStream),
}

impl GivingUp {
    fn poll_fd(&self) -> PollFd<'_> {
        match self {
            GivingUp::Cancelled(cancel) => PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN),
            // A hang-up is told without being asked for, and only that is of interest.
            GivingUp::HungUp(socket) => PollFd::new(socket, PollFlags::empty()),
        }
    }
}

/// An open connection to libvirt's daemon.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    name: String,
    serial: u32,
    events: VecDeque<MonitorEvent>,
    has_lost_events: bool,
    /// How many bytes have been read, for messages about what is wrong with them.
    received: u64,
    giving_up: GivingUp,
    /// The longest that an answer may take; `None` waits for ever.
    pub timeout: Option<Duration>,
}

/// An answer whose call failed, in the daemon's words.
#[derive(Debug)]
pub(super) enum Failure {
    /// The daemon refused: the `VIR_ERR_` number and its words.
    Refused(i32, String),
    /// The connection is of no use any more.
    Broken(Error),
}

impl Connection {
    /// Connects, is authenticated, and opens the driver that the URI names.
    ///
    /// # Errors
    /// [`Kind::Io`] where no daemon listens; [`Kind::Peer`] where it refuses; [`Kind::Unsupported`] where it wants a
    /// password.
    pub fn open(uri: &LibvirtUri, giving_up: GivingUp) -> Result<Connection> {
        Connection::open_within(uri, giving_up, None)
    }

    /// As [`Connection::open`], and no answer may take longer than `timeout`.
    pub(super) fn open_within(
        uri: &LibvirtUri,
        giving_up: GivingUp,
        timeout: Option<Duration>,
    ) -> Result<Connection> {
        let stream = connect(uri.sockets())?;
        let mut connection = Connection {
            stream,
            name: uri.to_string(),
            serial: 0,
            events: VecDeque::new(),
            has_lost_events: false,
            received: 0,
            giving_up,
            timeout,
        };
        connection.authenticate()?;
        let arguments = Arguments::new().optional_string(Some(uri.driver())).word(0);
        connection.call(Procedure::ConnectOpen, &arguments)?;
        Ok(connection)
    }

    /// The URI, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn authenticate(&mut self) -> Result<()> {
        let answer = self.call(Procedure::AuthList, &Arguments::new())?;
        let ways = decode_auth_types(&answer, 0).map_err(|error| self.not_understood(error))?;
        if ways.is_empty() || ways.contains(&REMOTE_AUTH_NONE) {
            return Ok(());
        }
        if ways.contains(&REMOTE_AUTH_POLKIT) {
            let answer = self.call(Procedure::AuthPolkit, &Arguments::new()).map_err(|error| {
                error
                    .hint("run vmstate as root, or as a user whom polkit lets manage libvirt (group libvirt)")
            })?;
            let complete = decode_word(&answer, 0).map_err(|error| self.not_understood(error))?;
            if complete == 1 {
                return Ok(());
            }
        }
        Err(Error::new(Kind::Unsupported, format!("{} wants a password", self.name))
            .hint("run vmstate as root, or as a user whom libvirt's unix socket lets in without one"))
    }

    /// Calls a procedure and returns the answer's payload.
    ///
    /// # Errors
    /// [`Kind::Peer`] with the daemon's own words where it refuses; [`Kind::Interrupted`].
    pub fn call(&mut self, procedure: Procedure, arguments: &Arguments) -> Result<Vec<u8>> {
        self.call_with(procedure, arguments, &[]).map_err(|failure| match failure {
            Failure::Broken(error) => error,
            Failure::Refused(code, words) => {
                let error = Error::refusal(format!("libvirt refused: {words}"));
                if code == VIR_ERR_NO_DOMAIN {
                    error.hint(format!("virsh -c {} list --all shows the domains that there are", self.name))
                } else {
                    error
                }
            }
        })
    }

    /// As [`Connection::call`] for an answer that is a text.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub fn call_for_text(&mut self, procedure: Procedure, arguments: &Arguments) -> Result<String> {
        let answer = self.call(procedure, arguments)?;
        decode_string(&answer, 0).map_err(|error| self.not_understood(error))
    }

    /// Calls a procedure with descriptors.
    pub(super) fn call_with(
        &mut self,
        procedure: Procedure,
        arguments: &Arguments,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, Failure> {
        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        self.serial = self.serial.wrapping_add(1);
        let count = u32::try_from(fds.len()).expect("a handful of descriptors");
        let message = encode_call(procedure, self.serial, arguments, count);
        self.send(&message, None, deadline).map_err(Failure::Broken)?;
        for fd in fds {
            // Each goes behind the message with a byte of its own.
            self.send(&[0], Some(*fd), deadline).map_err(Failure::Broken)?;
        }
        loop {
            let (header, payload) = self.read_message(deadline).map_err(Failure::Broken)?;
            if !matches!(header.kind, MessageKind::Reply | MessageKind::ReplyWithFds) {
                self.queue(header, &payload).map_err(Failure::Broken)?;
                continue;
            }
            if header.serial != self.serial || header.procedure != procedure.number() {
                let clause = format!("{} answered what was not asked", self.name);
                return Err(Failure::Broken(Error::new(Kind::Peer, clause)));
            }
            if header.status == Status::Ok {
                return Ok(payload);
            }
            let error =
                decode_error(&payload, 0).map_err(|error| Failure::Broken(self.not_understood(error)))?;
            let words = error.message.unwrap_or_else(|| "no reason given".to_owned());
            return Err(Failure::Refused(error.code, words));
        }
    }

    /// Reads what has come, where there is no call whose answer is awaited.
    pub(super) fn read_events(&mut self) -> Result<()> {
        let (header, payload) = self.read_message(None)?;
        self.queue(header, &payload)
    }

    /// Takes the events that have come.
    pub(super) fn take_events(&mut self) -> impl Iterator<Item = MonitorEvent> {
        self.events.drain(..)
    }

    /// Whether so many events came that some are not known, since this was asked last.
    pub(super) fn has_lost_events(&mut self) -> bool {
        std::mem::take(&mut self.has_lost_events)
    }

    fn queue(&mut self, header: Header, payload: &[u8]) -> Result<()> {
        // Whatever else a daemon sends unasked was not registered for, and says nothing of the guest.
        if header.is_event(Procedure::QemuMonitorEvent) {
            let event = decode_monitor_event(payload, 0).map_err(|error| self.not_understood(error))?;
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
                self.has_lost_events = true;
            }
            self.events.push_back(event);
        }
        Ok(())
    }

    fn read_message(&mut self, deadline: Option<Instant>) -> Result<(Header, Vec<u8>)> {
        let mut word = [0; 4];
        let base = self.received;
        self.read_exact(&mut word, deadline)?;
        let len = decode_message_len(word, base).map_err(|fault| self.not_understood(fault.into()))?;
        let mut bytes = Vec::new();
        while bytes.len() < len {
            // What is allocated follows what has come, so that a length alone costs nothing.
            let start = bytes.len();
            bytes.resize(len.min(start + CHUNK_LEN), 0);
            self.read_exact(&mut bytes[start..], deadline)?;
        }
        let payload = bytes.split_off(VIR_NET_MESSAGE_HEADER_MAX);
        let header: [u8; VIR_NET_MESSAGE_HEADER_MAX] = bytes.try_into().expect("a message has a header");
        let header = Header::decode(&header, base + 4).map_err(|error| self.not_understood(error))?;
        if header.version != PROTOCOL_VERSION {
            let problem = format!("{} is not {PROTOCOL_VERSION}", header.version);
            let fault = Fault::unsupported(base + 8, "program version", problem);
            return Err(self.not_understood(fault.into()));
        }
        Ok((header, payload))
    }

    fn read_exact(&mut self, mut buffer: &mut [u8], deadline: Option<Instant>) -> Result<()> {
        while !buffer.is_empty() {
            self.wait_for(PollFlags::IN, deadline)?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(self.closed()),
                Ok(len) => {
                    buffer = &mut buffer[len..];
                    self.received += len as u64;
                }
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(self.closed()),
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(error) => return Err(Error::io(format!("the connection to {} broke", self.name), error)),
            }
        }
        Ok(())
    }

    fn send(&self, mut bytes: &[u8], fd: Option<BorrowedFd<'_>>, deadline: Option<Instant>) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.as_slice();
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)), "there is room for one descriptor");
        }
        while !bytes.is_empty() {
            self.wait_for(PollFlags::OUT, deadline)?;
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut ancillary, flags) {
                Ok(len) => {
                    bytes = &bytes[len..];
                    ancillary.clear();
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(self.closed()),
                Err(error) => return Err(Error::io(format!("cannot send to {}", self.name), error)),
            }
        }
        Ok(())
    }

    fn wait_for(&self, wanted: PollFlags, deadline: Option<Instant>) -> Result<()> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [PollFd::new(&self.stream, wanted), self.giving_up.poll_fd()];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => {
                    let within = self.timeout.unwrap_or_default();
                    let clause = format!("{} did not answer within {within:?}", self.name);
                    return Err(Error::new(Kind::Peer, clause));
                }
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(Error::io("poll on the connection to libvirt", error)),
            }
            if !fds[1].revents().is_empty() {
                return Err(Error::interrupted());
            }
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
        }
    }

    fn closed(&self) -> Error {
        Error::new(Kind::Peer, format!("{} closed the connection", self.name))
            .hint("look at the messages of libvirt's daemon: it has probably ended or been restarted")
    }

    fn not_understood(&self, error: DecodeError) -> Error {
        Error::new(Kind::Peer, format!("what {} sent is not understood", self.name)).because(error.at_end())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Connects to the first of the sockets on which somebody listens.
fn connect(sockets: &[PathBuf]) -> Result<UnixStream> {
    let mut first: Option<(&PathBuf, std::io::Error)> = None;
    for path in sockets {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            // One that refuses may be left of a daemon that this host does not use any more. It says more than one
            // that is not there.
            Err(error) => match &first {
                Some((_, known)) if known.kind() != ErrorKind::NotFound => {}
                Some(_) if error.kind() == ErrorKind::NotFound => {}
                _ => first = Some((path, error)),
            },
        }
    }
    let (path, error) = first.expect("a URI has a socket");
    let hint = match error.kind() {
        ErrorKind::PermissionDenied => "run vmstate as root, or as a member of the group libvirt",
        _ => {
            "start libvirt's daemon (systemctl start virtqemud.socket, or libvirtd.socket), or name it by --connect"
        }
    };
    Err(Error::io(format!("cannot connect to libvirt at {}", path.display()), error).hint(hint))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use wire::libvirt_rpc::Domain;

    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (stream, daemon) = UnixStream::pair().unwrap();
        let connection = Connection {
            stream,
            name: "qemu:///test".to_owned(),
            serial: 0,
            events: VecDeque::new(),
            has_lost_events: false,
            received: 0,
            giving_up: GivingUp::Cancelled(Cancel::new().unwrap()),
            timeout: Some(Duration::from_secs(60)),
        };
        (connection, daemon)
    }

    /// A message as the daemon sends it.
    fn message(procedure: Procedure, kind: MessageKind, serial: u32, payload: &Arguments) -> Vec<u8> {
        let header = Header {
            program: procedure.program(),
            version: PROTOCOL_VERSION,
            procedure: procedure.number(),
            kind,
            serial,
            status: Status::Ok,
        };
        let mut body = Vec::new();
        header.encode(&mut body);
        body.extend_from_slice(payload.bytes());
        let mut bytes = u32::try_from(body.len() + 4).unwrap().to_be_bytes().to_vec();
        bytes.extend(body);
        bytes
    }

    fn event(name: &str) -> Vec<u8> {
        let domain = Domain { name: "fx".into(), uuid: [7; 16], id: 1 };
        let payload = Arguments::new().word(1).domain(&domain).string(name).word(0).word(1).word(2);
        message(Procedure::QemuMonitorEvent, MessageKind::Message, 0, &payload.optional_string(None))
    }

    #[test]
    fn events_that_were_too_many_to_keep_are_known_to_be_lost() {
        for (count, is_lost) in [(EVENTS_MAX, false), (EVENTS_MAX + 1, true)] {
            let (mut connection, mut daemon) = pair();
            let flood = std::thread::spawn(move || {
                daemon.write_all(&event("RESUME")).unwrap();
                for _ in 1..count {
                    daemon.write_all(&event("RTC_CHANGE")).unwrap();
                }
                let answer = message(Procedure::DomainSuspend, MessageKind::Reply, 1, &Arguments::new());
                daemon.write_all(&answer).unwrap();
                daemon
            });
            connection.call(Procedure::DomainSuspend, &Arguments::new()).unwrap();
            drop(flood.join().unwrap());
            assert_eq!(connection.has_lost_events(), is_lost, "{count}");
            assert!(!connection.has_lost_events(), "told once");
            let names: Vec<String> = connection.take_events().map(|event| event.name).collect();
            assert_eq!((names.len(), names[0] == "RESUME"), (EVENTS_MAX, !is_lost), "{count}");
        }
    }

    #[test]
    fn a_socket_that_nobody_serves_any_more_is_not_the_last_that_is_tried() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        drop(UnixListener::bind(path("stale")).unwrap());
        let _listener = UnixListener::bind(path("live")).unwrap();
        connect(&[path("missing"), path("stale"), path("live")]).unwrap();
        // Of several that do not answer, the first one that is there is told.
        for sockets in [["missing", "stale"], ["stale", "missing"]] {
            let error = connect(&sockets.map(path)).unwrap_err();
            let expected = format!("cannot connect to libvirt at {}", path("stale").display());
            assert_eq!(error.to_string(), expected, "{sockets:?}");
        }
    }
}
