//! Numbers of libvirt's protocol, in its own spelling, and the header of a message.

use crate::cursor::{Cursor, Encoder};
use crate::{DecodeError, Fault};

/// The program of all that libvirt's public functions do.
pub const REMOTE_PROGRAM: u32 = 0x2000_8086;
/// The program of what is particular to QEMU.
pub const QEMU_PROGRAM: u32 = 0x2000_8087;
/// The version of both.
pub const PROTOCOL_VERSION: u32 = 1;

/// The length of the word that gives a message's length, itself included.
pub const VIR_NET_MESSAGE_LEN_MAX: usize = 4;
/// The length of a header.
pub const VIR_NET_MESSAGE_HEADER_MAX: usize = 24;
/// The longest message, without its length word.
pub const VIR_NET_MESSAGE_MAX: usize = 32 << 20;
/// The longest string.
pub const REMOTE_STRING_MAX: usize = 4 << 20;
/// The most ways of authentication that a daemon may offer.
pub const REMOTE_AUTH_TYPE_LIST_MAX: usize = 20;

/// No authentication: the socket's permissions are enough, or the client is root.
pub const REMOTE_AUTH_NONE: u32 = 0;
/// A name and a password.
pub const REMOTE_AUTH_SASL: u32 = 1;
/// The daemon asks polkit whether this process may.
pub const REMOTE_AUTH_POLKIT: u32 = 2;

/// `VIR_DOMAIN_XML_SECURE`: with passwords.
pub const VIR_DOMAIN_XML_SECURE: u32 = 1;
/// `VIR_DOMAIN_XML_MIGRATABLE`: what older versions understand too; with the flag above the text that libvirt puts
/// into its own images.
pub const VIR_DOMAIN_XML_MIGRATABLE: u32 = 8;
/// `VIR_DOMAIN_SAVE_BYPASS_CACHE`.
pub const VIR_DOMAIN_SAVE_BYPASS_CACHE: u32 = 1;
/// `VIR_DOMAIN_SAVE_RUNNING`.
pub const VIR_DOMAIN_SAVE_RUNNING: u32 = 2;
/// `VIR_DOMAIN_SAVE_PAUSED`.
pub const VIR_DOMAIN_SAVE_PAUSED: u32 = 4;
/// `VIR_DOMAIN_SAVE_RESET_NVRAM`.
pub const VIR_DOMAIN_SAVE_RESET_NVRAM: u32 = 8;

/// `VIR_TYPED_PARAM_INT`.
pub const VIR_TYPED_PARAM_INT: u32 = 1;
/// `VIR_TYPED_PARAM_STRING`.
pub const VIR_TYPED_PARAM_STRING: u32 = 7;
/// The parameter that names an image, a text.
pub const VIR_DOMAIN_SAVE_PARAM_FILE: &str = "file";
/// The parameter that has the XML to use instead of the image's, a text.
pub const VIR_DOMAIN_SAVE_PARAM_DXML: &str = "dxml";
/// The parameter that says how many channels read, a number; since libvirt 11.2.
pub const VIR_DOMAIN_SAVE_PARAM_PARALLEL_CHANNELS: &str = "parallel.channels";

/// `VIR_ERR_NO_DOMAIN`: there is no such domain.
pub const VIR_ERR_NO_DOMAIN: i32 = 42;
/// `VIR_ERR_OPERATION_INVALID`: for example, the domain does not run.
pub const VIR_ERR_OPERATION_INVALID: i32 = 55;
/// `VIR_ERR_NO_SUPPORT`: a daemon that does not know the procedure.
pub const VIR_ERR_NO_SUPPORT: i32 = 3;

/// A call that this crate knows: program, number, and what follows in its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are those of the protocol, in its own order")]
pub enum Procedure {
    ConnectOpen = 1,
    ConnectClose = 2,
    ConnectGetVersion = 4,
    DomainDestroy = 12,
    DomainGetXmlDesc = 14,
    DomainLookupById = 22,
    DomainLookupByName = 23,
    DomainLookupByUuid = 24,
    DomainResume = 28,
    DomainSuspend = 34,
    AuthList = 66,
    AuthPolkit = 70,
    DomainIsPersistent = 151,
    ConnectGetLibVersion = 157,
    DomainAbortJob = 164,
    DomainManagedSave = 182,
    DomainGetState = 212,
    DomainRestoreFlags = 233,
    DomainRestoreParams = 441,
    /// Of [`QEMU_PROGRAM`]: [`Procedure::number`] takes the mark off.
    QemuMonitorCommand = QEMU_MARK | 1,
    QemuMonitorEventRegister = QEMU_MARK | 4,
    /// What a daemon sends by itself.
    QemuMonitorEvent = QEMU_MARK | 6,
    QemuMonitorCommandWithFiles = QEMU_MARK | 7,
}

/// Tells procedures of the one program from those of the other, which have the same numbers.
const QEMU_MARK: u32 = 1 << 16;

impl Procedure {
    /// The program that it belongs to.
    pub fn program(self) -> u32 {
        if self as u32 & QEMU_MARK == 0 { REMOTE_PROGRAM } else { QEMU_PROGRAM }
    }

    /// Its number there.
    pub fn number(self) -> u32 {
        self as u32 & !QEMU_MARK
    }
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are those of the protocol")]
pub enum MessageKind {
    Call = 0,
    Reply = 1,
    /// What one side sends unasked.
    Message = 2,
    Stream = 3,
    CallWithFds = 4,
    ReplyWithFds = 5,
    StreamHole = 6,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are those of the protocol")]
pub enum Status {
    Ok = 0,
    Error = 1,
    Continue = 2,
}

/// The header of a message, as it stands behind the length word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose procedures these are.
    pub program: u32,
    /// The program's version.
    pub version: u32,
    /// The procedure's number there.
    pub procedure: u32,
    /// What the message is.
    pub kind: MessageKind,
    /// Which call it is, or answers; zero in what is sent unasked.
    pub serial: u32,
    /// How the call ended.
    pub status: Status,
}

impl Header {
    /// Whether this is the event `procedure`.
    pub fn is_event(&self, procedure: Procedure) -> bool {
        self.kind == MessageKind::Message
            && self.program == procedure.program()
            && self.procedure == procedure.number()
    }

    /// Reads a header; `base` is its place among the bytes of the connection, for messages.
    ///
    /// # Errors
    /// Damaged: a kind or status that there is not.
    pub fn decode(bytes: &[u8; VIR_NET_MESSAGE_HEADER_MAX], base: u64) -> Result<Header, DecodeError> {
        let mut cursor = Cursor::new(bytes, base);
        let program = cursor.be32("program")?;
        let version = cursor.be32("program version")?;
        let procedure = cursor.be32("procedure")?;
        let at = cursor.position();
        let kind = match cursor.be32("message type")? {
            0 => MessageKind::Call,
            1 => MessageKind::Reply,
            2 => MessageKind::Message,
            3 => MessageKind::Stream,
            4 => MessageKind::CallWithFds,
            5 => MessageKind::ReplyWithFds,
            6 => MessageKind::StreamHole,
            other => {
                return Err(
                    Fault::damaged(at, "message type", format!("{other} is none that there is")).into()
                );
            }
        };
        let serial = cursor.be32("serial")?;
        let at = cursor.position();
        let status = match cursor.be32("status")? {
            0 => Status::Ok,
            1 => Status::Error,
            2 => Status::Continue,
            other => {
                return Err(Fault::damaged(at, "status", format!("{other} is none that there is")).into());
            }
        };
        Ok(Header { program, version, procedure, kind, serial, status })
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(out);
        for word in
            [self.program, self.version, self.procedure, self.kind as u32, self.serial, self.status as u32]
        {
            encoder.be32(word);
        }
    }
}

/// The header as it lies in memory, for its offsets.
#[repr(C)]
struct Layout {
    program: [u8; 4],
    version: [u8; 4],
    procedure: [u8; 4],
    kind: [u8; 4],
    serial: [u8; 4],
    status: [u8; 4],
}

const _: () = {
    assert!(std::mem::offset_of!(Layout, program) == 0);
    assert!(std::mem::offset_of!(Layout, version) == 4);
    assert!(std::mem::offset_of!(Layout, procedure) == 8);
    assert!(std::mem::offset_of!(Layout, kind) == 12);
    assert!(std::mem::offset_of!(Layout, serial) == 16);
    assert!(std::mem::offset_of!(Layout, status) == 20);
    assert!(size_of::<Layout>() == VIR_NET_MESSAGE_HEADER_MAX);
};
