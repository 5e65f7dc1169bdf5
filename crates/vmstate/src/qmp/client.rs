//! The connection: lines of JSON, answers matched by id, events queued in the order they came.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use io::Cancel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Map, Value, json};

use crate::net::QmpAddress;
use crate::{Error, Kind, Result};

/// The longest line accepted from a monitor. `query-machines` and `info mtree` of large guests stay
/// far below it.
const LINE_LEN_MAX: usize = 64 << 20;
/// How many events are kept while nobody looks; a guest cannot make us hoard more.
const EVENTS_MAX: usize = 16 << 10;
/// The most descriptors one command carries; ours carry one.
const FDS_MAX: usize = 2;

/// How long a monitor may take to greet. QEMU greets at once; one that is busy (a mapped-ram load blocks
/// its main loop) takes longer, and one that serves another client never does.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// The hint of every error that says that the connection was closed.
pub(crate) const CLOSED_HINT: &str = "look at QEMU's own messages: it has probably exited";

/// The hint of every error that says that something else listens.
const ADDRESS_HINT: &str = "give the path of QEMU's own QMP socket: -qmp unix:PATH,server=on,wait=off";

/// An event that QEMU sent by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// For example `RESUME` or `MIGRATION`.
    pub name: String,
    /// Its data, `Null` where it has none.
    pub data: Value,
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read(buffer),
            Stream::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// A QMP connection in command mode.
///
/// Waiting ends early, with [`Kind::Interrupted`], when the cancel token given to [`Client::connect`] is
/// triggered, until [`Client::ignore_cancel`]. An answer whose wait was cut short is dropped when it
/// comes, so the connection stays usable for cleaning up.
pub struct Client {
    stream: Stream,
    name: String,
    buffer: Vec<u8>,
    /// How much of `buffer` is known to hold no line end.
    searched: usize,
    events: VecDeque<Event>,
    next_id: u64,
    cancel: Option<Cancel>,
    /// The longest that an answer may take; `None` waits for ever.
    pub timeout: Option<Duration>,
    greeting: Value,
}

impl Client {
    /// Connects to a monitor, waits for its greeting and enters command mode.
    ///
    /// # Errors
    /// [`Kind::Io`] where nobody listens, [`Kind::Peer`] where no greeting comes within
    /// [`GREETING_TIMEOUT`]: a monitor's socket serves one client at a time, and a second one connects
    /// and hears nothing.
    pub fn connect(address: &QmpAddress, cancel: &Cancel) -> Result<Client> {
        let refused = |error: std::io::Error| {
            let hint = match error.kind() {
                ErrorKind::NotFound => "start QEMU with -qmp unix:PATH,server=on,wait=off",
                ErrorKind::ConnectionRefused => "no QEMU listens there; is the guest still running?",
                ErrorKind::PermissionDenied => "run vmstate as the user that QEMU runs as, or as root",
                _ => "give the path of QEMU's own QMP socket",
            };
            Error::io(format!("cannot connect to the QMP monitor at {address}"), error).hint(hint)
        };
        let stream = match address {
            QmpAddress::Unix(path) => Stream::Unix(UnixStream::connect(path).map_err(refused)?),
            QmpAddress::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).map_err(refused)?;
                stream.set_nodelay(true).map_err(refused)?;
                Stream::Tcp(stream)
            }
        };
        Client::greet(stream, address.to_string(), cancel)
    }

    /// Takes a connected socket whose other end is a monitor.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn from_socket(socket: UnixStream, name: &str, cancel: &Cancel) -> Result<Client> {
        Client::greet(Stream::Unix(socket), name.to_owned(), cancel)
    }

    fn greet(stream: Stream, name: String, cancel: &Cancel) -> Result<Client> {
        let mut client = Client {
            stream,
            name,
            buffer: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
            next_id: 0,
            cancel: Some(cancel.clone()),
            timeout: None,
            greeting: Value::Null,
        };
        let greeting = client.read_message(Some(Instant::now() + GREETING_TIMEOUT))?.ok_or_else(|| {
            Error::new(
                Kind::Peer,
                format!("the QMP monitor at {} sent no greeting within {GREETING_TIMEOUT:?}", client.name),
            )
            .hint("another client holds this socket: close it, or give QEMU a second -qmp socket for vmstate")
        })?;
        if greeting.get("QMP").is_none() {
            return Err(Error::new(Kind::Peer, format!("what listens at {} is no QMP monitor", client.name))
                .hint(ADDRESS_HINT));
        }
        client.greeting = greeting;
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// The greeting's `QMP` object: version and capabilities.
    pub fn greeting(&self) -> &Value {
        &self.greeting["QMP"]
    }

    /// The address that was connected to, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process at the other end of a unix socket, as the kernel remembers it from `listen`: whoever
    /// made the socket, so it proposes a candidate and proves nothing. `None` over TCP.
    pub fn listener_pid(&self) -> Option<u32> {
        match &self.stream {
            Stream::Unix(stream) => {
                let peer = rustix::net::sockopt::socket_peercred(stream).ok()?;
                u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
            }
            Stream::Tcp(_) => None,
        }
    }

    /// Whether descriptors can be passed: only through unix sockets.
    pub fn passes_descriptors(&self) -> bool {
        matches!(self.stream, Stream::Unix(_))
    }

    /// The token that cuts waiting short, until [`Client::ignore_cancel`].
    pub fn cancel(&self) -> Option<&Cancel> {
        self.cancel.as_ref()
    }

    /// Whether waiting is to end now.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(Cancel::is_cancelled)
    }

    /// From now on waiting is not cut short: the time for cleaning up. An answer still may take no longer
    /// than `timeout`.
    pub fn ignore_cancel(&mut self, timeout: Duration) {
        self.cancel = None;
        self.timeout = Some(timeout);
    }

    /// Runs a command and returns its answer.
    ///
    /// # Errors
    /// [`Kind::Peer`] with QEMU's own words where it refuses.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.execute_with(command, arguments, &[])
    }

    /// Runs a command that carries descriptors.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub fn execute_with(&mut self, command: &str, arguments: Value, fds: &[BorrowedFd<'_>]) -> Result<Value> {
        self.next_id += 1;
        let id = self.next_id;
        let mut request = Map::new();
        request.insert("execute".into(), command.into());
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            request.insert("arguments".into(), arguments);
        }
        request.insert("id".into(), id.into());
        let mut line = Value::Object(request).to_string();
        line.push('\n');
        self.send(line.as_bytes(), fds).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => self.closed(),
            _ => Error::io(format!("QMP command {command} could not be sent"), error),
        })?;

        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let Some(mut message) = self.read_message(deadline)? else {
                return Err(Error::new(
                    Kind::Peer,
                    format!("QEMU did not answer {command} within {:?}", self.timeout.unwrap_or_default()),
                ));
            };
            if message.get("id").and_then(Value::as_u64) != Some(id) {
                self.queue(message);
                continue;
            }
            if let Some(error) = message.get("error") {
                let words = error["desc"].as_str().unwrap_or("no reason given").trim_end_matches('.');
                return Err(Error::refusal(format!("QEMU refused {command}: {words}")));
            }
            return Ok(message["return"].take());
        }
    }

    /// Waits for the next event, those that are queued already first; `None` at the deadline.
    ///
    /// # Errors
    /// [`Kind::Interrupted`], or [`Kind::Peer`] where QEMU closed the connection.
    pub fn next_event(&mut self, deadline: Option<Instant>) -> Result<Option<Event>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.read_message(deadline)? {
                Some(message) => self.queue(message),
                None => return Ok(None),
            }
        }
    }

    /// Takes every event that has come so far.
    ///
    /// Events and answers come in one order: after an answer, every event that preceded it is here.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    fn queue(&mut self, message: Value) {
        // Anything else is the answer to a command whose wait was cut short.
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            self.events.push_back(Event { name: name.to_owned(), data: message["data"].clone() });
        }
    }

    fn send(&mut self, mut bytes: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        assert!(fds.len() <= FDS_MAX, "descriptors of one command");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(std::io::Error::other("too many descriptors for one command"));
        }
        while !bytes.is_empty() {
            match sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    // The descriptors went with the first byte.
                    ancillary.clear();
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next line as JSON; `None` at the deadline.
    fn read_message(&mut self, deadline: Option<Instant>) -> Result<Option<Value>> {
        loop {
            if let Some(at) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let end = self.searched + at;
                let message = serde_json::from_slice(&self.buffer[..end]);
                self.buffer.drain(..=end);
                self.searched = 0;
                return message.map(Some).map_err(|error| {
                    Error::new(Kind::Peer, format!("what listens at {} does not speak QMP", self.name))
                        .because(error)
                        .hint(ADDRESS_HINT)
                });
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > LINE_LEN_MAX {
                return Err(Error::new(
                    Kind::Peer,
                    format!("a QMP line is longer than {LINE_LEN_MAX} bytes"),
                ));
            }
            if !self.wait_readable(deadline)? {
                return Ok(None);
            }
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(self.closed()),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(self.closed()),
                Ok(len) => self.buffer.extend_from_slice(&chunk[..len]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::io(format!("the QMP connection at {} broke", self.name), error));
                }
            }
        }
    }

    fn closed(&self) -> Error {
        Error::new(Kind::Peer, format!("QEMU closed the QMP connection at {}", self.name)).hint(CLOSED_HINT)
    }

    fn wait_readable(&self, deadline: Option<Instant>) -> Result<bool> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map(|left| Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            });
            let mut fds = vec![PollFd::new(&self.stream, PollFlags::IN)];
            if let Some(cancel) = &self.cancel {
                fds.push(PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN));
            }
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(Error::io("poll on the QMP connection", error)),
            }
            if self.is_cancelled() {
                return Err(Error::interrupted());
            }
            if !fds[0].revents().is_empty() {
                return Ok(true);
            }
        }
    }
}
