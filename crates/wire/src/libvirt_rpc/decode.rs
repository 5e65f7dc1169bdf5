//! Reading answers and events.

use super::format::{
    REMOTE_AUTH_TYPE_LIST_MAX, REMOTE_STRING_MAX, VIR_NET_MESSAGE_HEADER_MAX, VIR_NET_MESSAGE_LEN_MAX,
    VIR_NET_MESSAGE_MAX,
};
use crate::cursor::Cursor;
use crate::{DecodeError, Fault};

/// How a daemon names a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// The number of its present run; -1 while it does not run.
    pub id: i32,
}

/// What a QEMU said unasked, as the daemon hands it on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MonitorEvent {
    /// Which registration it is for.
    pub callback: u32,
    /// Whose QEMU it was.
    pub domain: Domain,
    /// The event's name, for example `RESUME`.
    pub name: String,
    /// When it was, by QEMU's clock: seconds and microseconds.
    pub at: (u64, u32),
    /// The event's data as JSON, if it has any.
    pub details: Option<String>,
}

/// Why a call failed, in the daemon's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RpcError {
    /// The `VIR_ERR_` number.
    pub code: i32,
    /// The words.
    pub message: Option<String>,
}

/// How many bytes follow a length word.
///
/// # Errors
/// Damaged: fewer than a header has, or more than any message may have.
pub fn decode_message_len(word: [u8; VIR_NET_MESSAGE_LEN_MAX], base: u64) -> Result<usize, Fault> {
    let all = u32::from_be_bytes(word) as usize;
    match all.checked_sub(VIR_NET_MESSAGE_LEN_MAX) {
        Some(len) if (VIR_NET_MESSAGE_HEADER_MAX..=VIR_NET_MESSAGE_MAX).contains(&len) => Ok(len),
        _ => {
            Err(Fault::damaged(base, "message length", format!("{all:#x} bytes are none that a message has")))
        }
    }
}

/// The error that is a call's answer.
///
/// # Errors
/// Damaged: it is cut short, or a text is too long.
pub fn decode_error(payload: &[u8], base: u64) -> Result<RpcError, DecodeError> {
    let mut cursor = Cursor::new(payload, base);
    let code = cursor.be32("error code")?.cast_signed();
    cursor.be32("error domain")?;
    Ok(RpcError { code, message: optional_string(&mut cursor, "error message")? })
    // Level, further texts and objects follow, of which nothing is needed.
}

/// The domain that is an answer.
///
/// # Errors
/// Damaged: it is cut short, or the name is too long.
pub fn decode_domain(payload: &[u8], base: u64) -> Result<Domain, DecodeError> {
    domain(&mut Cursor::new(payload, base))
}

/// The text that is an answer.
///
/// # Errors
/// Damaged: it is cut short or too long.
pub fn decode_string(payload: &[u8], base: u64) -> Result<String, DecodeError> {
    string(&mut Cursor::new(payload, base), "text")
}

/// The first word of an answer.
///
/// # Errors
/// Damaged: it is cut short.
pub fn decode_word(payload: &[u8], base: u64) -> Result<u32, DecodeError> {
    Cursor::new(payload, base).be32("word")
}

/// The first two words of an answer as one number.
///
/// # Errors
/// Damaged: it is cut short.
pub fn decode_double_word(payload: &[u8], base: u64) -> Result<u64, DecodeError> {
    Cursor::new(payload, base).be64("double word")
}

/// The ways of authentication that a daemon offers.
///
/// # Errors
/// Damaged: the list is cut short or too long.
pub fn decode_auth_types(payload: &[u8], base: u64) -> Result<Vec<u32>, DecodeError> {
    let mut cursor = Cursor::new(payload, base);
    let at = cursor.position();
    let count = cursor.be32("number of ways of authentication")? as usize;
    if count > REMOTE_AUTH_TYPE_LIST_MAX {
        let problem = format!("{count} are more than {REMOTE_AUTH_TYPE_LIST_MAX}");
        return Err(Fault::damaged(at, "number of ways of authentication", problem).into());
    }
    (0..count).map(|_| cursor.be32("way of authentication")).collect()
}

/// An event of a QEMU.
///
/// # Errors
/// Damaged: it is cut short, or a text is too long.
pub fn decode_monitor_event(payload: &[u8], base: u64) -> Result<MonitorEvent, DecodeError> {
    let mut cursor = Cursor::new(payload, base);
    let callback = cursor.be32("callback id")?;
    let domain = domain(&mut cursor)?;
    let name = string(&mut cursor, "event name")?;
    let at = (cursor.be64("seconds")?, cursor.be32("microseconds")?);
    let details = optional_string(&mut cursor, "event details")?;
    Ok(MonitorEvent { callback, domain, name, at, details })
}

fn domain(cursor: &mut Cursor<'_>) -> Result<Domain, DecodeError> {
    let name = string(cursor, "domain name")?;
    let uuid = cursor.array("domain uuid")?;
    Ok(Domain { name, uuid, id: cursor.be32("domain id")?.cast_signed() })
}

fn string(cursor: &mut Cursor<'_>, field: &'static str) -> Result<String, DecodeError> {
    let at = cursor.position();
    let len = cursor.be32(field)? as usize;
    if len > REMOTE_STRING_MAX {
        return Err(Fault::damaged(at, field, format!("{len:#x} bytes are more than any text has")).into());
    }
    let text = cursor.bytes(len, field)?;
    // An answer may end with its last text, and still is padded.
    cursor.bytes(len.next_multiple_of(4) - len, field)?;
    Ok(String::from_utf8_lossy(text).into_owned())
}

fn optional_string(cursor: &mut Cursor<'_>, field: &'static str) -> Result<Option<String>, DecodeError> {
    let at = cursor.position();
    match cursor.be32(field)? {
        0 => Ok(None),
        1 => string(cursor, field).map(Some),
        other => {
            Err(Fault::damaged(at, field, format!("{other} neither says that it is there nor not")).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Arguments, Header, MessageKind, Procedure, Status, encode_call};
    use super::*;

    fn fx() -> Domain {
        Domain { name: "fx".into(), uuid: *b"0123456789abcdef", id: 7 }
    }

    #[test]
    fn a_call_has_the_bytes_that_the_protocol_gives_it() {
        let call = encode_call(Procedure::DomainSuspend, 9, &Arguments::new().domain(&fx()), 0);
        let expected = [
            &[
                0, 0, 0, 0x38, 0x20, 0, 0x80, 0x86, 0, 0, 0, 1, 0, 0, 0, 34, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0,
                0,
            ][..],
            &[0, 0, 0, 2, b'f', b'x', 0, 0],
            b"0123456789abcdef",
            &[0, 0, 0, 7],
        ]
        .concat();
        assert_eq!(call, expected);
    }

    #[test]
    fn the_number_of_descriptors_stands_before_the_arguments() {
        let call = encode_call(Procedure::QemuMonitorCommandWithFiles, 1, &Arguments::new().string("{}"), 2);
        let header = Header::decode(call[4..28].try_into().unwrap(), 4).unwrap();
        assert_eq!(header.kind, MessageKind::CallWithFds);
        assert_eq!((header.program, header.procedure), (0x2000_8087, 7));
        assert_eq!(call[28..], [0, 0, 0, 2, 0, 0, 0, 2, b'{', b'}', 0, 0]);
        assert_eq!(decode_message_len(call[..4].try_into().unwrap(), 0), Ok(call.len() - 4));
    }

    #[test]
    fn what_was_written_is_read() {
        let header = Header {
            program: 1,
            version: 2,
            procedure: 3,
            kind: MessageKind::ReplyWithFds,
            serial: 5,
            status: Status::Error,
        };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        assert_eq!(Header::decode(bytes.as_slice().try_into().unwrap(), 0), Ok(header));

        let arguments = Arguments::new()
            .word(3)
            .domain(&fx())
            .string("RESUME")
            .word(0)
            .word(9)
            .word(8)
            .optional_string(None);
        let event = decode_monitor_event(arguments.bytes(), 0).unwrap();
        let expected =
            MonitorEvent { callback: 3, domain: fx(), name: "RESUME".into(), at: (9, 8), details: None };
        assert_eq!(event, expected);

        let error = Arguments::new().word(42).word(10).optional_string(Some("no domain"));
        let expected = RpcError { code: 42, message: Some("no domain".into()) };
        assert_eq!(decode_error(error.bytes(), 0), Ok(expected));
        assert_eq!(decode_domain(Arguments::new().domain(&fx()).bytes(), 0), Ok(fx()));
        assert_eq!(decode_auth_types(&[0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2], 0), Ok(vec![0, 2]));
    }

    #[test]
    fn lies_are_told_with_their_place() {
        for (bytes, expected) in [
            (&[0, 0x40, 0, 1][..], "text at 0x10: 0x400001 bytes are more than any text has"),
            (&[0, 0, 0, 5, 1, 2], "text at 0x14: the input ends 3 bytes too early"),
            (&[0, 0, 0, 1, 1], "text at 0x15: the input ends 3 bytes too early"),
        ] {
            assert_eq!(decode_string(bytes, 0x10).unwrap_err().at_end().to_string(), expected);
        }
        for word in [0u32, 27, (32 << 20) + 5, u32::MAX] {
            let error = decode_message_len(word.to_be_bytes(), 0).unwrap_err().to_string();
            assert_eq!(error, format!("message length at 0x0: {word:#x} bytes are none that a message has"));
        }
        assert_eq!(
            decode_auth_types(&[0, 0, 0, 21], 0).unwrap_err().to_string(),
            "number of ways of authentication at 0x0: 21 are more than 20"
        );
        let mut header = [0; 24];
        header[15] = 7;
        assert_eq!(
            Header::decode(&header, 0).unwrap_err().to_string(),
            "message type at 0xc: 7 is none that there is"
        );
        header[15] = 1;
        header[23] = 3;
        assert_eq!(
            Header::decode(&header, 0).unwrap_err().to_string(),
            "status at 0x14: 3 is none that there is"
        );
        let error = decode_error(&[0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 9], 0).unwrap_err().to_string();
        assert_eq!(error, "error message at 0x8: 9 neither says that it is there nor not");
    }
}
