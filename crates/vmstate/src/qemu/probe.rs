//! The probe: a migration into a socket of ours, given up as soon as it has told what a save must know.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use mem::Peer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Stat, fstat};
use serde_json::json;
use wire::DecodeError;
use wire::qemu::format::SECTION_FOOTER_LEN;
use wire::qemu::{
    BlockListVariant, Command, Configuration, Item, Preamble, RamSetup, SectionHeader, SectionKind,
    decode_item, decode_preamble, decode_ram_setup, early_payload_len,
};

use super::Session;
use super::process::search;
use super::session::Changing;
use crate::qmp::{Begun, Version};
use crate::{Error, Kind, Result};

/// The name under which QEMU receives the socket.
pub(super) const PROBE: &str = "vmstate-probe";
/// How long QEMU may take to send what the probe reads: setting up a migration clears a bitmap per RAM
/// block, milliseconds on a guest of a TiB.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);
/// What the probe reads is a few hundred bytes; a block list of 4096 blocks with the longest names stays
/// below this.
const PROBE_LEN_MAX: usize = 2 << 20;
/// The send buffer: as small as the kernel allows, so that QEMU blocks after a few pages instead of
/// scanning on. Every page of shared memory that it looks at gets allocated.
const PROBE_SEND_BUFFER: usize = 4096;
/// The least bandwidth, in bytes per second, that is a limit: 0 means none.
const PROBE_BANDWIDTH: u64 = 4096;
/// The same for a QEMU before 8.0. With less it sleeps behind the setup until its tenth of a second is over, and sees a
/// cancel only then; with 8 KiB in each of them it goes on to where the socket is full, which a cancel ends at once. It
/// looks at some two data pages for that, or at a thousand empty ones at the most.
const OLD_PROBE_BANDWIDTH: u64 = 80 << 10;

/// How a probe is held back in this QEMU, in bytes per second.
fn bandwidth(version: &Version) -> u64 {
    if version.major < 8 { OLD_PROBE_BANDWIDTH } else { PROBE_BANDWIDTH }
}

/// Whether a migration with this limit is a probe.
pub(super) fn is_probe_bandwidth(bytes_per_s: u64) -> bool {
    [PROBE_BANDWIDTH, OLD_PROBE_BANDWIDTH].contains(&bytes_per_s)
}

/// What the probe tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The machine's configuration section, as this QEMU writes it without capabilities.
    pub configuration: Configuration,
    /// The head of the RAM section.
    pub ram: SectionHeader,
    /// The RAM blocks: the exact list, order and sizes of what migrates.
    pub setup: RamSetup,
    /// The sections that QEMU writes between the RAM's list and its pages, in order. They are in the output of
    /// `xen-save-devices-state`, too, but at another place.
    pub early: Vec<EarlySection>,
}

/// A section that a QEMU which loads it is to find before the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EarlySection {
    /// Its head.
    pub header: SectionHeader,
    /// The length of its payload in bytes, which nothing in the stream tells for certain.
    pub payload_len: usize,
}

/// Whether the guest's state is RAM and sections that are written in one go, so that it can be lifted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probed {
    /// It is.
    Plain(Probe),
    /// It is not, for this reason: another handler iterates, whose state is not in the output of
    /// `xen-save-devices-state`, or only in part.
    Obstacle(String),
}

/// The socket of a probe, of which QEMU holds the other end: whoever else holds that is QEMU's process.
struct ProbeSocket {
    ours: UnixStream,
    theirs: Stat,
    given: Begun,
}

impl ProbeSocket {
    /// Begins to give QEMU its end.
    ///
    /// # Errors
    /// As every QMP command; [`Kind::Unsupported`] where the monitor takes no descriptors.
    fn begin_giving(session: &mut Session) -> Result<ProbeSocket> {
        let (ours, theirs) =
            UnixStream::pair().map_err(|error| Error::io("cannot create a socket pair", error))?;
        rustix::net::sockopt::set_socket_send_buffer_size(&theirs, PROBE_SEND_BUFFER)
            .map_err(|error| Error::io("cannot shrink a socket's buffer", error))?;
        let stat = fstat(&theirs).map_err(|error| Error::io("cannot stat a socket", error))?;
        // Closed only when QEMU was told to stop writing into it: it is never left with a broken pipe.
        session.hold(ours.try_clone().map_err(|error| Error::io("cannot duplicate a socket", error))?.into());
        let given = session.begin_giving(PROBE, theirs.as_fd())?;
        Ok(ProbeSocket { ours, theirs: stat, given })
    }
}

/// A probe whose migration starts.
pub struct Probing {
    ours: UnixStream,
    changing: Changing,
}

/// A probe that has told all, and whose migration is being cancelled.
pub struct Cancelling {
    ours: UnixStream,
    cancelled: Begun,
    back: Option<Begun>,
    asked: Option<Begun>,
}

/// What is sent to QEMU to migrate into the socket.
fn uri() -> String {
    format!("fd:{PROBE}")
}

impl Probing {
    /// Begins to probe a guest with so many bytes of RAM, running or paused, and finds QEMU's process, as
    /// [`find_process`](super::find_process) does: whoever else has the other end of the probe's socket is QEMU.
    ///
    /// # Errors
    /// As there; as every QMP command. QEMU is as it was then, or will be with the end of the session.
    pub fn begin(session: &mut Session, ram_bytes: u64, pid: Option<u32>) -> Result<(Probing, Peer)> {
        let ProbeSocket { mut ours, theirs, given } = ProbeSocket::begin_giving(session)?;
        let bandwidth = bandwidth(&session.version);
        let parameters =
            [("max-bandwidth", json!(bandwidth)), ("mode", json!("normal")), ("tls-creds", json!(""))];
        let changing = session.begin_configuring_probe(ram_bytes, &parameters)?;
        session.begin_migrating(&uri())?;
        session.client.end(given)?;
        match search(session, pid, &theirs) {
            Ok(peer) => Ok((Probing { ours, changing }, peer)),
            Err(error) => {
                session.end_changing(changing)?;
                if session.has_begun_migrating() {
                    session.end_migrating(&uri())?;
                    session.cancel_migration()?;
                    drain(&mut ours);
                } else {
                    session.take_fd_back(PROBE)?;
                }
                session.let_go();
                session.end_settings_back(None)?;
                Err(error)
            }
        }
    }

    /// Waits for what QEMU tells, and begins to cancel its migration and to put its settings back.
    ///
    /// # Errors
    /// [`Kind::Peer`] where QEMU refuses to migrate this guest, with its reason, or sends what is no stream. What is under
    /// way then ends with the session.
    pub fn listen(self, session: &mut Session) -> Result<(Probed, Cancelling)> {
        let Probing { mut ours, changing } = self;
        session.end_changing(changing)?;
        session.end_migrating(&uri())?;
        let told = listen(session, &mut ours)?;
        let cancelled = session.client.begin("migrate_cancel", json!({}))?;
        // A limit that is lifted behind the cancel lets nothing more through: the migration looks for the error that the
        // cancel has left in its file before each page (migration/ram.c:ram_save_iterate, QEMU 7.2 and 10.0).
        let back = session.begin_settings_back()?;
        Ok((told, Cancelling { ours, cancelled, back, asked: None }))
    }
}

impl Cancelling {
    /// Asks whether it is cancelled. Whatever QEMU is asked before gives it time for that.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn ask(&mut self, session: &mut Session) -> Result<()> {
        self.asked = Some(session.client.begin("query-migrate", json!({}))?);
        Ok(())
    }

    /// Waits until the migration is gone and QEMU has its settings back.
    ///
    /// # Errors
    /// As every QMP command; [`Kind::Peer`] where it ended otherwise.
    pub fn end(self, session: &mut Session) -> Result<()> {
        let Cancelling { mut ours, cancelled, back, asked } = self;
        session.client.end(cancelled)?;
        let ended = match asked {
            Some(asked) => session.await_cancelled_from(asked)?,
            None => session.await_cancelled()?,
        };
        drain(&mut ours);
        session.let_go();
        session.end_settings_back(back)?;
        if ended.status != "cancelled" {
            let clause = format!("the probe migration ended as `{}`", ended.status);
            return Err(Error::new(Kind::Peer, clause));
        }
        Ok(())
    }
}

/// Reads from the socket until the RAM section's setup and one more item are there.
fn listen(session: &mut Session, socket: &mut UnixStream) -> Result<Probed> {
    let deadline = Instant::now() + PROBE_TIMEOUT;
    let mut bytes = Vec::new();
    loop {
        match decode(&bytes) {
            Ok(probed) => return Ok(probed),
            Err(DecodeError::Fault(fault)) => {
                return Err(Error::new(Kind::Peer, "QEMU's stream is not understood").because(fault));
            }
            Err(DecodeError::Incomplete { .. }) => {}
        }
        if bytes.len() > PROBE_LEN_MAX {
            return Err(Error::new(Kind::Peer, "QEMU's stream sets up more than a guest can have"));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = vec![PollFd::new(&*socket, PollFlags::IN)];
        if let Some(cancel) = session.client.cancel() {
            fds.push(PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Err(Error::new(Kind::Peer, "QEMU sends nothing into the probe's socket")),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("poll on the probe's socket", error)),
        }
        if session.client.is_cancelled() {
            return Err(Error::interrupted());
        }
        if fds[0].revents().is_empty() {
            continue;
        }
        let mut chunk = [0; 4096];
        match socket.read(&mut chunk) {
            Ok(0) => {
                let reason = session.client.migration()?.error;
                return Err(Error::new(
                    Kind::Peer,
                    format!("QEMU gave up the probe migration: {}", reason.as_deref().unwrap_or("no reason")),
                ));
            }
            Ok(len) => bytes.extend_from_slice(&chunk[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read from the probe's socket", error)),
        }
    }
}

/// Reads until QEMU has closed its end, which a migration does before it counts as cancelled.
fn drain(socket: &mut UnixStream) {
    let mut chunk = [0; 64 << 10];
    // Nothing that comes here is of use, so neither is an error; QEMU has ended the migration already.
    while matches!(socket.read(&mut chunk), Ok(len) if len > 0) {}
}

fn decode(bytes: &[u8]) -> Result<Probed, DecodeError> {
    let (Preamble { configuration }, mut at) = decode_preamble(bytes, 0)?;
    let Some(configuration) = configuration else {
        return Ok(Probed::Obstacle("its machine writes no configuration section".to_owned()));
    };
    let (ram, setup) = loop {
        let (item, len) = decode_item(&bytes[at..], at as u64)?;
        at += len;
        match item {
            Item::Section(header) if header.kind == SectionKind::Start && header.idstr == "ram" => {
                let (setup, len) = decode_ram_setup(&bytes[at..], at as u64, BlockListVariant::default())?;
                at += len;
                break (header, setup);
            }
            // Its payload has no length, so what follows cannot be read; nor need it be. No QEMU is known to write
            // a FULL section here.
            Item::Section(header) => return Ok(Probed::Obstacle(obstacle(&header))),
            Item::Command(Command::OpenReturnPath | Command::Ping(_)) => {}
            other => {
                let problem = format!("{other:?} stands before the RAM section");
                return Err(wire::Fault::damaged(at as u64, "stream", problem).into());
            }
        }
    };
    // The first part tells that the setup is over: every handler that iterates has had its START by then.
    let mut early = Vec::new();
    loop {
        let (item, len) = decode_item(&bytes[at..], at as u64)?;
        at += len;
        match item {
            Item::Footer { section_id } if section_id == ram.section_id => {}
            Item::Part { section_id } | Item::End { section_id } if section_id == ram.section_id => {
                return Ok(Probed::Plain(Probe { configuration, ram, setup, early }));
            }
            Item::Section(header) if header.kind == SectionKind::Full => {
                // The composition sees to it that this is the length that the very section has elsewhere.
                let payload = &bytes[at..];
                let payload_len = early_payload_len(payload, at as u64, &header, Some(ram.section_id))?;
                at += payload_len + SECTION_FOOTER_LEN;
                early.push(EarlySection { header, payload_len });
            }
            Item::Section(header) => return Ok(Probed::Obstacle(obstacle(&header))),
            other => return Ok(Probed::Obstacle(format!("its stream goes on with {other:?}"))),
        }
    }
}

fn obstacle(header: &SectionHeader) -> String {
    let how = match header.kind {
        SectionKind::Start => "hands its state over piece by piece",
        SectionKind::Full => "hands its state over before the RAM",
    };
    format!("`{}` {how}, which QEMU alone can carry", header.idstr)
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::IdStr;

    fn header(kind: SectionKind, section_id: u32, name: &str) -> SectionHeader {
        SectionHeader { kind, section_id, idstr: IdStr::new(name).unwrap(), instance_id: 0, version_id: 4 }
    }

    fn preamble() -> Vec<u8> {
        let configuration = Some(Configuration::new(IdStr::new("pc-q35-10.0").unwrap()));
        let mut bytes = Vec::new();
        Preamble { configuration }.encode(&mut bytes);
        bytes
    }

    fn setup() -> RamSetup {
        let name = IdStr::new("pc.ram").unwrap();
        let block = wire::qemu::BlockEntry { name, used_length: 1 << 30, page_size: None, address: None };
        RamSetup { blocks: vec![block], multifd_flush: false }
    }

    fn with_ram(extra: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = preamble();
        Item::Section(header(SectionKind::Start, 2, "ram")).encode(&mut bytes);
        setup().encode(&mut bytes);
        Item::Footer { section_id: 2 }.encode(&mut bytes);
        extra(&mut bytes);
        bytes
    }

    #[test]
    fn a_plain_guest_is_told_by_the_first_part() {
        let bytes = with_ram(|bytes| Item::Part { section_id: 2 }.encode(bytes));
        let Ok(Probed::Plain(probe)) = decode(&bytes) else { panic!("not plain") };
        assert_eq!(probe.ram.section_id, 2);
        assert_eq!(probe.setup.total(), 1 << 30);
        // No prefix is enough, and none is refused.
        for len in 0..bytes.len() {
            assert!(matches!(decode(&bytes[..len]), Err(DecodeError::Incomplete { .. })), "{len} bytes");
        }
    }

    #[test]
    fn early_sections_are_told_with_their_lengths() {
        let early = |id| header(SectionKind::Full, id, "virtio-mem-device-early");
        let bytes = with_ram(|bytes| {
            for (id, payload) in [(9, &b"\x7e\0\0\0\x09, plugged"[..]), (10, b"")] {
                Item::Section(early(id)).encode(bytes);
                bytes.extend_from_slice(payload);
                Item::Footer { section_id: id }.encode(bytes);
            }
            Item::Part { section_id: 2 }.encode(bytes);
        });
        let Ok(Probed::Plain(probe)) = decode(&bytes) else { panic!("not plain") };
        let expected =
            [(9, 14), (10, 0)].map(|(id, payload_len)| EarlySection { header: early(id), payload_len });
        assert_eq!(probe.early, expected);
        for len in 0..bytes.len() {
            assert!(matches!(decode(&bytes[..len]), Err(DecodeError::Incomplete { .. })), "{len} bytes");
        }
    }

    #[test]
    fn other_iterating_handlers_are_obstacles() {
        let vfio =
            with_ram(|bytes| Item::Section(header(SectionKind::Start, 3, "0000:00:03.0/vfio")).encode(bytes));
        let mut early = preamble();
        Item::Section(header(SectionKind::Full, 9, "virtio-mem-early")).encode(&mut early);
        for (bytes, reason) in [
            (vfio, "`0000:00:03.0/vfio` hands its state over piece by piece, which QEMU alone can carry"),
            (early, "`virtio-mem-early` hands its state over before the RAM, which QEMU alone can carry"),
        ] {
            assert_eq!(decode(&bytes), Ok(Probed::Obstacle(reason.to_owned())));
        }
    }
}
