//! Reading a head.

use crate::cursor::Cursor;
use crate::{DecodeError, Fault, Findings};

use super::format::*;
use super::head::Head;

/// How much of a text is asked for at first: most are whole in it.
const READ_LEN: usize = 4096;

/// The header as it stands in the file; its numbers are not checked against each other.
struct Header {
    is_complete: bool,
    byte_order: ByteOrder,
    version: u32,
    data_len: u32,
    was_running: u32,
    format: u32,
    cookie_offset: u32,
}

impl Header {
    fn decode(cursor: &mut Cursor<'_>, file_len: u64) -> Result<Header, DecodeError> {
        let at = cursor.position();
        // Compared as far as it goes, so that what is no image is not first asked for more bytes.
        let found = cursor.rest().get(..QEMU_SAVE_MAGIC.len()).unwrap_or(cursor.rest());
        let is_complete = QEMU_SAVE_MAGIC.starts_with(found);
        if !is_complete && !QEMU_SAVE_PARTIAL.starts_with(found) {
            return Err(Fault::damaged(at, "magic", "is not libvirt's").into());
        }
        let room = file_len.saturating_sub(at);
        if room < HEADER_LEN as u64 {
            // What there is of it is asked for all the same: bytes that are no image's are told as that, however many of
            // them were given at first.
            let needed = room.saturating_sub(cursor.remaining() as u64);
            if needed > 0 {
                return Err(DecodeError::Incomplete { offset: at, field: "header", needed });
            }
            let problem =
                format!("the file ends at {file_len:#x}, {} bytes too early", HEADER_LEN as u64 - room);
            return Err(Fault::damaged(at, "header", problem).into());
        }
        if cursor.remaining() < HEADER_LEN {
            let needed = (HEADER_LEN - cursor.remaining()) as u64;
            return Err(DecodeError::Incomplete { offset: at, field: "header", needed });
        }
        cursor.bytes(QEMU_SAVE_MAGIC.len(), "magic")?;
        let mut words = [[0; 4]; 5];
        for word in &mut words {
            *word = cursor.array("header")?;
        }
        cursor.bytes(UNUSED_LEN, "header")?;
        let [version, ..] = words;
        // As libvirt does: a version that is too high is one of the other byte order.
        let little = ByteOrder::Little.value(version) <= QEMU_SAVE_VERSION;
        let byte_order = if little { ByteOrder::Little } else { ByteOrder::Big };
        let [version, data_len, was_running, format, cookie_offset] =
            words.map(|word| byte_order.value(word));
        Ok(Header { is_complete, byte_order, version, data_len, was_running, format, cookie_offset })
    }
}

/// What could be made of a head.
pub(super) struct Found {
    /// Where the payload begins.
    pub(super) payload_at: u64,
    /// All of it, or the fault that was in the way.
    pub(super) head: Result<Head, Fault>,
}

impl Head {
    /// Reads the head of an image that stands at the offset `base` of a file of `file_len` bytes.
    ///
    /// `bytes` are the file's from `base` on: at first none, then as many more as
    /// [`DecodeError::Incomplete`] asked for, which is never beyond the end of the file nor more than
    /// [`TEXT_LEN_MAX`] for each text. The padding is hardly read.
    ///
    /// # Errors
    /// [`DecodeError::Incomplete`] where more bytes are needed; the first fault otherwise: another magic, an
    /// image that was not written to its end, a version or format that is not known, lengths that lie, texts
    /// that do not end or are no text.
    pub fn decode(bytes: &[u8], base: u64, file_len: u64) -> Result<Head, DecodeError> {
        Ok(find(bytes, base, file_len, &mut Findings::strict())?.head?)
    }
}

/// Reads a head as far as it can be read.
///
/// # Errors
/// As [`Head::decode`]; of collecting findings, a fault only where nothing can be read behind it.
pub(super) fn find(
    bytes: &[u8],
    base: u64,
    file_len: u64,
    findings: &mut Findings,
) -> Result<Found, DecodeError> {
    let mut cursor = Cursor::new(bytes, base);
    let header = Header::decode(&mut cursor, file_len)?;
    let at = |field: usize| base.saturating_add(field as u64);
    if !header.is_complete {
        let problem = "says that the image was not written to its end";
        findings.note(Fault::damaged(at(MAGIC_AT), "magic", problem))?;
    }
    if !(1..=QEMU_SAVE_VERSION).contains(&header.version) {
        let problem = format!("{} is not within 1..={QEMU_SAVE_VERSION}", header.version);
        return Err(Fault::unsupported(at(VERSION_AT), "version", problem).into());
    }
    let unknown = || {
        let problem = format!("{} is none that is known", header.format);
        Fault::unsupported(at(FORMAT_AT), "format", problem)
    };
    let format = PayloadFormat::from_number(header.format).ok_or_else(unknown);
    if let Err(fault) = &format {
        findings.note(fault.clone())?;
    }
    let (data_len, cookie_offset) = (u64::from(header.data_len), u64::from(header.cookie_offset));
    let texts_at = cursor.position();
    if data_len == 0 {
        return Err(Fault::damaged(at(DATA_LEN_AT), "data length", "is zero, but there is an XML").into());
    }
    if data_len > file_len.saturating_sub(texts_at) {
        let problem = format!("{data_len:#x} bytes reach beyond the file, which ends at {file_len:#x}");
        return Err(Fault::damaged(at(DATA_LEN_AT), "data length", problem).into());
    }
    let payload_at = texts_at.saturating_add(data_len);
    let texts = texts(&cursor, data_len, cookie_offset, at(COOKIE_OFFSET_AT));
    let texts = match texts {
        Err(DecodeError::Fault(fault)) => {
            findings.note(fault.clone())?;
            return Ok(Found { payload_at, head: Err(fault) });
        }
        texts => texts?,
    };
    let head = format.map(|format| Head {
        is_complete: header.is_complete,
        byte_order: header.byte_order,
        version: header.version,
        was_running: header.was_running != 0,
        format,
        xml: texts.xml,
        cookie: texts.cookie,
        gap_len: texts.gap_len,
        padding_len: texts.padding_len,
    });
    Ok(Found { payload_at, head })
}

struct Texts {
    xml: String,
    cookie: Option<String>,
    gap_len: u64,
    padding_len: u64,
}

/// Takes XML and cookie, which share `data_len` bytes with the padding.
fn texts(
    cursor: &Cursor<'_>,
    data_len: u64,
    cookie_offset: u64,
    offset_at: u64,
) -> Result<Texts, DecodeError> {
    // libvirt subtracts the one from the other without a look.
    if cookie_offset >= data_len {
        let problem = format!("{cookie_offset:#x} lies behind the data, which has {data_len:#x} bytes");
        return Err(Fault::damaged(offset_at, "cookie offset", problem).into());
    }
    if cookie_offset > TEXT_LEN_MAX {
        let problem = format!("{cookie_offset:#x} leaves room for more XML than {TEXT_LEN_MAX:#x} bytes");
        return Err(Fault::unsupported(offset_at, "cookie offset", problem).into());
    }
    let room = if cookie_offset == 0 { data_len } else { cookie_offset };
    let xml = text(cursor, 0, room, "domain XML")?;
    if xml.is_empty() {
        return Err(Fault::damaged(cursor.position(), "domain XML", "is empty").into());
    }
    let behind_xml = xml.len() as u64 + 1;
    if cookie_offset == 0 {
        return Ok(Texts { xml, cookie: None, gap_len: 0, padding_len: data_len - behind_xml });
    }
    let cookie = text(cursor, cookie_offset, data_len - cookie_offset, "cookie")?;
    let padding_len = data_len - cookie_offset - (cookie.len() as u64 + 1);
    Ok(Texts { xml, cookie: Some(cookie), gap_len: cookie_offset - behind_xml, padding_len })
}

/// The text that begins `offset` bytes behind the cursor and has to end within `room` bytes.
fn text(cursor: &Cursor<'_>, offset: u64, room: u64, field: &'static str) -> Result<String, DecodeError> {
    let at = cursor.position().saturating_add(offset);
    let limit = usize::try_from(room.min(TEXT_LEN_MAX)).unwrap_or(usize::MAX);
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let bytes = cursor.rest().get(start..).unwrap_or_default();
    let bytes = bytes.get(..limit).unwrap_or(bytes);
    let Some(len) = bytes.iter().position(|byte| *byte == 0) else {
        if bytes.len() < limit {
            // How long it is nobody says: twice as much each time, so that little of the padding is read.
            let missing = offset.saturating_sub(cursor.rest().len() as u64);
            let more = (limit - bytes.len()).min(bytes.len().max(READ_LEN)) as u64;
            return Err(DecodeError::Incomplete { offset: at, field, needed: missing + more });
        }
        return Err(match room > TEXT_LEN_MAX {
            true => Fault::unsupported(at, field, format!("is longer than {TEXT_LEN_MAX:#x} bytes")),
            false => Fault::damaged(at, field, format!("has no end within its {room:#x} bytes")),
        }
        .into());
    };
    let text = bytes.get(..len).unwrap_or_default();
    match std::str::from_utf8(text) {
        Ok(text) => Ok(text.to_owned()),
        Err(error) => {
            let at = at.saturating_add(error.valid_up_to() as u64);
            Err(Fault::damaged(at, field, "is not UTF-8").into())
        }
    }
}
