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
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Map, Value, json};

use crate::libvirt;
use crate::net::QmpAddress;
use crate::{Error, Kind, Result};

/// The longest line accepted from a monitor. `query-machines` and `info mtree` of large guests stay
/// far below it.
const LINE_LEN_MAX: usize = 64 << 20;
/// How many events are kept while nobody looks; a guest cannot make us hoard more. The oldest goes first, but
/// what it said of a guest that is to stand still is kept apart.
const EVENTS_MAX: usize = 1 << 10;
/// The longest name of an event that is kept whole; QEMU's own have half of that at the most.
const EVENT_NAME_LEN_MAX: usize = 64;
/// The events after which a guest is not what it was when it was stopped.
const MOVES: [&str; 7] =
    ["RESUME", "RESET", "SHUTDOWN", "POWERDOWN", "WAKEUP", "GUEST_PANICKED", libvirt::LOST];
/// How many commands may be begun and not ended.
const BEGUN_MAX: usize = 32;
/// The most descriptors one command carries; ours carry one.
const FDS_MAX: usize = 2;

/// How long a monitor may take to greet. QEMU greets at once; one that is busy (a mapped-ram load blocks
/// its main loop) takes longer, and one that serves another client never does.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// The hint of every error that says that the connection was closed.
pub(crate) const CLOSED_HINT: &str = "look at QEMU's own messages: it has probably exited";

/// The hint of every error that says that something else listens.
const ADDRESS_HINT: &str = "give the path of QEMU's own QMP socket: -qmp unix:PATH,server=on,wait=off";

/// An event that QEMU sent by itself. What it is about is asked for: the data would be as long as a guest likes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// For example `RESUME` or `MIGRATION`.
    pub name: String,
}

/// What the events since [`Client::watch`] say of a guest that is to stand still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// The first one that says that it did not.
    pub first: Option<&'static str>,
    /// Whether another client has resumed it.
    pub resumed: bool,
}

/// A monitor that was called and has not greeted yet.
pub struct Called {
    stream: Stream,
    name: String,
    has_late_events: bool,
}

/// A command on its way.
#[derive(Debug)]
#[must_use = "its answer is kept until it is asked for"]
pub struct Begun {
    id: u64,
    command: &'static str,
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
    /// What is left of a command whose sending was cut short: without it the next one would not be understood.
    unsent: Vec<u8>,
    events: VecDeque<Event>,
    moves: Moves,
    next_id: u64,
    /// Commands that were begun and not ended, with their answers where these have come already.
    begun: Vec<(u64, Option<Value>)>,
    /// The latest command that carried descriptors, until it is answered.
    carrying: Option<u64>,
    cancel: Option<Cancel>,
    has_late_events: bool,
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
        Client::greeted(Client::call(address, cancel)?, cancel)
    }

    /// Connects to a monitor, which takes its time to greet: [`Client::greeted`] waits for that.
    ///
    /// # Errors
    /// [`Kind::Io`] where nobody listens.
    pub fn call(address: &QmpAddress, cancel: &Cancel) -> Result<Called> {
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
            QmpAddress::Domain { uri, name } => Stream::Unix(libvirt::open_monitor(uri, name, cancel)?),
        };
        let has_late_events = matches!(address, QmpAddress::Domain { .. });
        Ok(Called { stream, name: address.to_string(), has_late_events })
    }

    /// Waits for the greeting of a monitor that was called, and enters command mode.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn greeted(called: Called, cancel: &Cancel) -> Result<Client> {
        let mut client = Client::greet(called.stream, called.name, cancel)?;
        client.has_late_events = called.has_late_events;
        Ok(client)
    }

    /// Whether events may come later than answers that were given after them: they do through libvirt.
    pub fn has_late_events(&self) -> bool {
        self.has_late_events
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
            unsent: Vec::new(),
            events: VecDeque::new(),
            moves: Moves::default(),
            next_id: 0,
            begun: Vec::new(),
            carrying: None,
            cancel: Some(cancel.clone()),
            has_late_events: false,
            timeout: None,
            greeting: Value::Null,
        };
        let deadline = Some(Instant::now() + GREETING_TIMEOUT);
        let silent = |name: &str| {
            let clause = format!("the QMP monitor at {name} sent no greeting within {GREETING_TIMEOUT:?}");
            Error::new(Kind::Peer, clause).hint(
                "another client holds this socket: close it, or give QEMU a second -qmp socket for vmstate",
            )
        };
        let greeting = loop {
            let message = client.read_message(deadline)?.ok_or_else(|| silent(&client.name))?;
            // QEMU carries a command out whose client has gone meanwhile, and gives its answer to the next one. None comes
            // behind the answer to our first command (monitor/qmp.c:monitor_qmp_dispatcher_co, QEMU 10.0).
            let is_late = ["return", "error", "event"].iter().any(|key| message.get(key).is_some());
            if message.get("QMP").is_some() {
                break message;
            }
            if !is_late {
                let clause = format!("what listens at {} is no QMP monitor", client.name);
                return Err(Error::new(Kind::Peer, clause).hint(ADDRESS_HINT));
            }
            if is_over(deadline) {
                return Err(silent(&client.name));
            }
        };
        client.greeting = greeting;
        // QEMU offers to read one command while it carries out another (`oob`). It is not asked to: its socket's descriptors
        // are handled by two threads then, without a lock (chardev/char-socket.c:tcp_chr_recv and tcp_get_msgfds), and QEMU
        // 7.2 has crashed there.
        // Whatever is asked next need not wait for the answer.
        let entered = client.begin("qmp_capabilities", json!({}))?;
        client.end(entered)?;
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
    /// made the socket, so it proposes a candidate and proves nothing. `None` over TCP, and for a process that has
    /// no number here.
    pub fn listener_pid(&self) -> Option<u32> {
        match &self.stream {
            Stream::Unix(stream) => mem::socket_peer_pid(stream),
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
        let deadline = self.deadline();
        let id = self.dispatch(command, arguments, fds, deadline)?;
        self.answer(id, command, deadline)
    }

    /// Sends a command, of which [`Client::end`] has the answer later: QEMU works on it while the caller does something
    /// else. Commands that are run in between are answered behind it.
    ///
    /// # Errors
    /// As [`Client::execute`], QEMU's refusals excepted.
    ///
    /// # Panics
    /// When there are too many.
    pub fn begin(&mut self, command: &'static str, arguments: Value) -> Result<Begun> {
        self.begin_with(command, arguments, &[])
    }

    /// As [`Client::begin`], for a command that carries descriptors.
    ///
    /// # Errors
    /// As [`Client::begin`].
    ///
    /// # Panics
    /// As [`Client::begin`].
    pub fn begin_with(
        &mut self,
        command: &'static str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Begun> {
        assert!(self.begun.len() < BEGUN_MAX, "commands begun and not ended");
        let id = self.dispatch(command, arguments, fds, self.deadline())?;
        self.begun.push((id, None));
        Ok(Begun { id, command })
    }

    /// Waits until [`Client::end`] need not wait for the answer of a command. When this is cut short nothing is lost: one
    /// can wait again.
    ///
    /// # Errors
    /// As [`Client::begin`].
    pub fn wait(&mut self, begun: &Begun) -> Result<()> {
        let deadline = self.deadline();
        while self.is_awaited(begun) {
            let Some(message) = self.read_message(deadline)? else {
                return Err(self.unanswered(begun.command));
            };
            self.queue(message);
            // Whoever sends without a pause must not hold us up for ever.
            if self.is_awaited(begun) && is_over(deadline) {
                return Err(self.unanswered(begun.command));
            }
        }
        Ok(())
    }

    fn is_awaited(&self, begun: &Begun) -> bool {
        self.begun.iter().any(|(id, answer)| *id == begun.id && answer.is_none())
    }

    /// Whether a command has gone in part, the rest of which the next one will send.
    pub fn is_cut_short(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Waits for the answer of a command that was begun.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub fn end(&mut self, begun: Begun) -> Result<Value> {
        let place = self.begun.iter().position(|(id, _)| *id == begun.id);
        match place.and_then(|place| self.begun.swap_remove(place).1) {
            Some(message) => outcome(begun.command, message),
            None => self.answer(begun.id, begun.command, self.deadline()),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.timeout.map(|timeout| Instant::now() + timeout)
    }

    fn unanswered(&self, command: &str) -> Error {
        let within = self.timeout.unwrap_or_default();
        Error::new(Kind::Peer, format!("QEMU did not answer {command} within {within:?}"))
    }

    /// Sends a command and returns the number that its answer will have.
    fn dispatch(
        &mut self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<u64> {
        // QEMU keeps the descriptors that came last, whichever command they came with
        // (chardev/char-socket.c:tcp_chr_recv, QEMU 10.0).
        while let (false, Some(_)) = (fds.is_empty(), self.carrying) {
            let Some(message) = self.read_message(deadline)? else { return Err(self.unanswered(command)) };
            self.queue(message);
        }
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
        if self.send(command, line.as_bytes(), fds, deadline)? {
            Ok(id)
        } else {
            Err(self.unanswered(command))
        }
    }

    /// Waits for the answer of this number.
    fn answer(&mut self, id: u64, command: &str, deadline: Option<Instant>) -> Result<Value> {
        loop {
            let Some(message) = self.read_message(deadline)? else { return Err(self.unanswered(command)) };
            if message.get("id").and_then(Value::as_u64) == Some(id) {
                self.carrying = self.carrying.filter(|carrying| *carrying != id);
                return outcome(command, message);
            }
            self.queue(message);
            // Whoever sends without a pause must not hold us up for ever.
            if is_over(deadline) {
                return Err(self.unanswered(command));
            }
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
            if self.events.is_empty() && is_over(deadline) {
                return Ok(None);
            }
        }
    }

    /// Forgets every event so far: what comes from now on tells whether the guest stands still.
    pub fn watch(&mut self) {
        self.events.clear();
        self.moves = Moves::default();
    }

    /// What has been heard of the guest's moves since [`Client::watch`], however many other events came.
    ///
    /// After an answer, every event that preceded it has been heard.
    pub fn moves(&self) -> Moves {
        self.moves
    }

    /// Takes every event that has come so far.
    ///
    /// Events and answers come in one order: after an answer, every event that preceded it is here.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    /// Keeps an event, or the answer to a command that was begun. Anything else is the answer to a command whose wait
    /// was cut short.
    fn queue(&mut self, message: Value) {
        let id = message.get("id").and_then(Value::as_u64);
        self.carrying = self.carrying.filter(|carrying| Some(*carrying) != id);
        if let Some((_, answer)) = self.begun.iter_mut().find(|(begun, _)| Some(*begun) == id) {
            *answer = Some(message);
            return;
        }
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            if let Some(known) = MOVES.iter().find(|known| **known == name) {
                self.moves.first.get_or_insert(known);
                self.moves.resumed |= *known == "RESUME";
            }
            self.events.push_back(Event { name: name.chars().take(EVENT_NAME_LEN_MAX).collect() });
        }
    }

    /// Sends a command behind what is left of the one before; whether it went before the deadline.
    fn send(
        &mut self,
        command: &str,
        line: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<bool> {
        assert!(fds.len() <= FDS_MAX, "descriptors of one command");
        let rest = std::mem::take(&mut self.unsent);
        let (sent, outcome) = self.send_some(command, &rest, &[], deadline);
        self.unsent = rest[sent..].to_vec();
        if !matches!(outcome, Ok(true)) {
            return outcome;
        }
        let (sent, outcome) = self.send_some(command, line, fds, deadline);
        // One of which QEMU has not seen a byte is as if it had never been.
        if sent > 0 {
            self.unsent = line[sent..].to_vec();
            if !fds.is_empty() {
                self.carrying = Some(self.next_id);
            }
        }
        outcome
    }

    /// Sends bytes until the deadline; how many went, and whether they were all.
    fn send_some(
        &self,
        command: &str,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> (usize, Result<bool>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return (0, Err(Error::new(Kind::Misuse, "too many descriptors for one command")));
        }
        let mut sent = 0;
        while sent < bytes.len() {
            // A QEMU that hangs leaves the socket full, and must not hang us.
            match self.wait_for(PollFlags::OUT, deadline) {
                Ok(true) => {}
                waited => return (sent, waited),
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.stream, &[IoSlice::new(&bytes[sent..])], &mut ancillary, flags) {
                Ok(len) => {
                    sent += len;
                    // The descriptors went with the first byte.
                    ancillary.clear();
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return (sent, Err(self.closed())),
                Err(error) => {
                    return (sent, Err(Error::io(format!("QMP command {command} could not be sent"), error)));
                }
            }
        }
        (sent, Ok(true))
    }

    /// The next line as JSON; `None` at the deadline.
    fn read_message(&mut self, deadline: Option<Instant>) -> Result<Option<Value>> {
        loop {
            // Not only while waiting: a peer that keeps sending never lets us wait.
            if self.is_cancelled() {
                return Err(Error::interrupted());
            }
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
            if !self.wait_for(PollFlags::IN, deadline)? {
                return Ok(None);
            }
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(self.closed()),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(self.closed()),
                // The end of a line that came in time counts, its beginning does not.
                Ok(len) if !chunk[..len].contains(&b'\n') && is_over(deadline) => {
                    self.buffer.extend_from_slice(&chunk[..len]);
                    return Ok(None);
                }
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

    /// Waits until the connection can be read or written, as `wanted`; whether it can before the deadline.
    fn wait_for(&self, wanted: PollFlags, deadline: Option<Instant>) -> Result<bool> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map(|left| Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            });
            let mut fds = vec![PollFd::new(&self.stream, wanted)];
            if let Some(cancel) = &self.cancel {
                fds.push(PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN));
            }
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
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

/// What an answer says.
fn outcome(command: &str, mut message: Value) -> Result<Value> {
    if let Some(error) = message.get("error") {
        let words = error["desc"].as_str().unwrap_or("no reason given").trim_end_matches('.');
        return Err(Error::refusal(format!("QEMU refused {command}: {words}")));
    }
    Ok(message["return"].take())
}

fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};

    use super::*;

    /// A client of a peer that greets, accepts the first command and then does as it is told.
    fn client(cancel: &Cancel, peer: impl FnOnce(UnixStream) + Send + 'static) -> Client {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut to = &theirs;
            to.write_all(b"{\"QMP\": {}}\n").unwrap();
            let mut line = String::new();
            // One byte at a time, so that nothing of what comes next is lost with the buffer.
            BufReader::with_capacity(1, &theirs).read_line(&mut line).unwrap();
            to.write_all(b"{\"return\": {}, \"id\": 1}\n").unwrap();
            peer(theirs);
        });
        Client::from_socket(ours, "the test", cancel).unwrap()
    }

    /// The peer waits for the next command, so that what it does then is not done before.
    fn await_command(stream: &UnixStream) {
        BufReader::with_capacity(1, stream).read_line(&mut String::new()).unwrap();
    }

    fn flood(stream: UnixStream, line: &[u8]) {
        let lines = line.repeat(512);
        // Until the client has gone.
        while (&stream).write_all(&lines).is_ok() {}
    }

    #[test]
    fn a_peer_that_never_stops_sending_cannot_hold_up_a_deadline() {
        let within = Duration::from_millis(50);
        for line in ["{\"event\": \"RTC_CHANGE\"}\n", "{\"return\": {}, \"id\": 1000}\n", "no end of a line "]
        {
            let mut client = client(&Cancel::new().unwrap(), move |stream| flood(stream, line.as_bytes()));
            client.timeout = Some(within);
            let error = client.status().unwrap_err();
            assert_eq!(error.to_string(), "QEMU did not answer query-status within 50ms", "{line}");
            assert!(client.events.len() <= EVENTS_MAX);
        }
    }

    #[test]
    fn a_peer_that_never_stops_sending_cannot_hold_up_an_interrupt() {
        let cancel = Cancel::new().unwrap();
        let token = cancel.clone();
        let mut client = client(&cancel, move |stream| {
            await_command(&stream);
            (&stream).write_all(&b"{\"event\": \"RTC_CHANGE\"}\n".repeat(512)).unwrap();
            token.cancel();
            flood(stream, b"{\"event\": \"RTC_CHANGE\"}\n");
        });
        assert_eq!(client.status().unwrap_err().kind(), Kind::Interrupted);
    }

    #[test]
    fn a_flood_of_events_hides_no_move_of_the_guest() {
        let mut client = client(&Cancel::new().unwrap(), |stream| {
            await_command(&stream);
            let event = |name: &str| format!("{{\"event\": \"{name}\", \"data\": {{\"long\": true}}}}\n");
            let mut bytes = event("WAKEUP") + &event("RESUME");
            bytes.push_str(&event("RTC_CHANGE").repeat(2 * EVENTS_MAX));
            bytes.push_str(&event(&"X".repeat(4096)));
            bytes.push_str("{\"return\": {\"running\": false, \"status\": \"paused\"}, \"id\": 2}\n");
            (&stream).write_all(bytes.as_bytes()).unwrap();
        });
        client.watch();
        client.status().unwrap();
        assert_eq!(client.moves(), Moves { first: Some("WAKEUP"), resumed: true });
        assert_eq!(client.events.len(), EVENTS_MAX);
        assert!(client.take_events().iter().all(|event| event.name.len() <= EVENT_NAME_LEN_MAX));
        client.watch();
        assert_eq!(client.moves(), Moves::default());
    }

    #[test]
    fn what_was_begun_is_answered_whenever_it_is_asked_for() {
        let mut client = client(&Cancel::new().unwrap(), |stream| {
            let status = |name| format!("{{\"return\": {{\"running\": false, \"status\": \"{name}\"}}, ");
            let refused = "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no.\"}, ";
            await_command(&stream);
            await_command(&stream);
            await_command(&stream);
            for (id, answer) in [(2, "{\"return\": 2, "), (3, refused), (4, &status("paused"))] {
                (&stream).write_all(format!("{answer}\"id\": {id}}}\n").as_bytes()).unwrap();
            }
        });
        let first = client.begin("query-first", json!({})).unwrap();
        let second = client.begin("query-second", json!({})).unwrap();
        assert_eq!(client.status().unwrap().status, "paused");
        let error = client.end(second).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.is_refusal()), ("QEMU refused query-second: no", true));
        assert_eq!(client.end(first).unwrap(), json!(2));
        assert!(client.begun.is_empty());
    }

    /// A save that was killed was brought back by nobody who came at once: "what listens at … is no QMP monitor".
    #[test]
    fn answers_for_a_client_that_has_gone_are_nobodys() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stale = "{\"return\": {\"running\": true, \"status\": \"stale\"}, \"id\": 2}\n";
        std::thread::spawn(move || {
            let mut to = &theirs;
            to.write_all(format!("{stale}{{\"QMP\": {{}}}}\n{stale}").as_bytes()).unwrap();
            await_command(&theirs);
            to.write_all(b"{\"return\": {}, \"id\": 1}\n").unwrap();
            await_command(&theirs);
            to.write_all(b"{\"return\": {\"running\": false, \"status\": \"paused\"}, \"id\": 2}\n").unwrap();
            // Not closed before it was read.
            await_command(&theirs);
        });
        let mut client = Client::from_socket(ours, "the test", &Cancel::new().unwrap()).unwrap();
        assert_eq!(client.status().unwrap().status, "paused");
    }

    /// The wait for the answer to what was never sent had no end.
    #[test]
    fn descriptors_that_were_not_sent_are_not_waited_for() {
        let (go, wait) = std::sync::mpsc::channel();
        let mut client = client(&Cancel::new().unwrap(), move |stream| {
            wait.recv().unwrap();
            for line in BufReader::new(&stream).lines().map_while(Result::ok) {
                let command: Value = serde_json::from_str(&line).unwrap();
                (&stream)
                    .write_all(format!("{}\n", json!({ "return": 1, "id": command["id"] })).as_bytes())
                    .unwrap();
            }
        });
        let null = std::fs::File::open("/dev/null").unwrap();
        client.timeout = Some(Duration::from_millis(50));
        // Far more than the socket holds while nobody reads.
        client.execute("long", json!({ "text": "x".repeat(8 << 20) })).unwrap_err();
        client.begin_with("getfd", json!({}), &[null.as_fd()]).unwrap_err();
        go.send(()).unwrap();
        client.timeout = Some(Duration::from_secs(60));
        assert_eq!(client.execute_with("getfd", json!({}), &[null.as_fd()]).unwrap(), json!(1));
    }

    #[test]
    fn a_wait_that_is_cut_short_loses_no_answer() {
        let (go, wait) = std::sync::mpsc::channel();
        let mut client = client(&Cancel::new().unwrap(), move |stream| {
            wait.recv().unwrap();
            (&stream).write_all(b"{\"return\": 7, \"id\": 2}\n").unwrap();
            await_command(&stream);
            await_command(&stream);
        });
        client.timeout = Some(Duration::from_millis(50));
        let begun = client.begin("query-first", json!({})).unwrap();
        let error = client.wait(&begun).unwrap_err();
        assert_eq!(error.to_string(), "QEMU did not answer query-first within 50ms");
        go.send(()).unwrap();
        client.timeout = Some(Duration::from_secs(60));
        client.wait(&begun).unwrap();
        client.timeout = Some(Duration::ZERO);
        assert_eq!(client.end(begun).unwrap(), json!(7));
    }

    #[test]
    fn a_monitor_that_offers_it_is_not_told_to_read_ahead() {
        for offered in [json!(["oob"]), json!([]), Value::Null] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let greeting = format!("{}\n", json!({ "QMP": { "capabilities": offered } }));
            let peer = std::thread::spawn(move || {
                (&theirs).write_all(greeting.as_bytes()).unwrap();
                let mut line = String::new();
                BufReader::new(&theirs).read_line(&mut line).unwrap();
                (&theirs).write_all(b"{\"return\": {}, \"id\": 1}\n").unwrap();
                serde_json::from_str::<Value>(&line).unwrap()
            });
            Client::from_socket(ours, "the test", &Cancel::new().unwrap()).unwrap();
            assert_eq!(peer.join().unwrap()["arguments"], Value::Null);
        }
    }

    /// QEMU would take the descriptors of the one for those of the other.
    #[test]
    fn descriptors_are_sent_when_those_before_them_have_arrived() {
        let (go, wait) = std::sync::mpsc::channel();
        let mut client = client(&Cancel::new().unwrap(), move |stream| {
            wait.recv().unwrap();
            (&stream).write_all(b"{\"return\": {\"fdset-id\": 1}, \"id\": 2}\n").unwrap();
            await_command(&stream);
            await_command(&stream);
            (&stream).write_all(b"{\"return\": {\"fdset-id\": 2}, \"id\": 3}\n").unwrap();
        });
        let null = std::fs::File::open("/dev/null").unwrap();
        client.timeout = Some(Duration::from_millis(50));
        let first = client.begin_with("add-fd", json!({}), &[null.as_fd()]).unwrap();
        let error = client.begin_with("getfd", json!({}), &[null.as_fd()]).unwrap_err();
        assert_eq!(error.to_string(), "QEMU did not answer getfd within 50ms");
        go.send(()).unwrap();
        client.timeout = Some(Duration::from_secs(60));
        let second = client.begin_with("add-fd", json!({}), &[null.as_fd()]).unwrap();
        assert_eq!(client.end(second).unwrap()["fdset-id"], 2);
        assert_eq!(client.end(first).unwrap()["fdset-id"], 1);
    }

    #[test]
    fn a_command_that_was_cut_short_is_completed_before_the_next() {
        let (go, wait) = std::sync::mpsc::channel();
        let mut client = client(&Cancel::new().unwrap(), move |stream| {
            wait.recv().unwrap();
            for (id, line) in (2u64..).zip(BufReader::new(&stream).lines()) {
                let Ok(line) = line else { break };
                let command: Value = serde_json::from_str(&line).unwrap();
                assert_eq!(command["id"], id);
                (&stream).write_all(format!("{{\"return\": {id}, \"id\": {id}}}\n").as_bytes()).unwrap();
            }
        });
        // Far more than the socket holds while nobody reads.
        client.timeout = Some(Duration::from_millis(50));
        let error = client.execute("human-monitor-command", json!({ "command-line": "x".repeat(8 << 20) }));
        assert_eq!(error.unwrap_err().to_string(), "QEMU did not answer human-monitor-command within 50ms");
        assert!(!client.unsent.is_empty());
        go.send(()).unwrap();
        client.timeout = Some(Duration::from_secs(60));
        assert_eq!(client.execute("query-status", json!({})).unwrap(), json!(3));
    }
}
