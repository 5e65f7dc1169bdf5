//! Reading the return path, and the package of the main channel.

use page::{PageCount, PageSet};

use crate::cursor::Cursor;
use crate::mapped_ram::format::bitmap_len;
use crate::qemu::format::QEMU_VM_COMMAND;
use crate::qemu::{Command, Item, decode_item};
use crate::{DecodeError, Fault, FileRange};

use super::format::*;
use super::{Message, PageRequest};

/// Reads one message from `bytes`, whose first stands at offset `base` of the return path.
///
/// Gives the message and its length in bytes; the bitmap that follows a
/// [`Message::ReceivedBitmap`] is not part of it.
///
/// # Errors
/// [`DecodeError::Incomplete`] where bytes lack. Unsupported: a type that is unknown. Damaged: a payload
/// that is not as long as its type has it, a name that is none.
pub fn decode_message(bytes: &[u8], base: u64) -> Result<(Message, usize), DecodeError> {
    let mut cursor = Cursor::new(bytes, base);
    let kind = cursor.be16("message type")?;
    let len = usize::from(cursor.be16("message length")?);
    if !(MIG_RP_MSG_SHUT..=MIG_RP_MSG_SWITCHOVER_ACK).contains(&kind) {
        return Err(Fault::unsupported(base, "message type", format!("{kind} is unknown")).into());
    }
    if len > MESSAGE_PAYLOAD_MAX {
        let problem = format!("{len} bytes are more than {MESSAGE_PAYLOAD_MAX}");
        return Err(Fault::damaged(base, "message length", problem).into());
    }
    let payload_at = cursor.position();
    let payload = cursor.bytes(len, "message payload")?;
    // The payload is complete, so a field that runs out of it lies about the length: never incomplete.
    let mut payload = Cursor::new(payload, payload_at);
    let message = decode_payload(kind, &mut payload).map_err(DecodeError::at_end)?;
    if payload.remaining() != 0 {
        let problem = format!("{} bytes are left over in its payload", payload.remaining());
        return Err(Fault::damaged(base, format!("message {kind}"), problem).into());
    }
    Ok((message, cursor.consumed()))
}

fn decode_payload(kind: u16, payload: &mut Cursor<'_>) -> Result<Message, DecodeError> {
    let at = payload.position();
    Ok(match kind {
        MIG_RP_MSG_SHUT => Message::Shut(payload.be32("shut's error")?),
        MIG_RP_MSG_PONG => Message::Pong(payload.be32("pong")?),
        MIG_RP_MSG_REQ_PAGES_ID | MIG_RP_MSG_REQ_PAGES => {
            let start = payload.be64("requested start")?;
            let len = payload.be32("requested length")?;
            let block = match kind {
                MIG_RP_MSG_REQ_PAGES_ID => Some(payload.counted_string("requested block")?),
                _ => None,
            };
            Message::RequestPages(PageRequest { block, start, len })
        }
        MIG_RP_MSG_RECV_BITMAP => {
            Message::ReceivedBitmap { block: payload.counted_string("bitmap's block")? }
        }
        MIG_RP_MSG_RESUME_ACK => match payload.be32("resume's acknowledgement")? {
            MIGRATION_RESUME_ACK_VALUE => Message::ResumeAck(MIGRATION_RESUME_ACK_VALUE),
            value => {
                let problem = format!("{value} is not {MIGRATION_RESUME_ACK_VALUE}");
                return Err(Fault::damaged(at, "resume's acknowledgement", problem).into());
            }
        },
        _ => Message::SwitchoverAck,
    })
}

/// Reads the bitmap that follows a [`Message::ReceivedBitmap`]: the target pages of a block of `pages` pages
/// that have arrived. Gives the set and how many bytes it took.
///
/// # Errors
/// [`DecodeError::Incomplete`] where bytes lack. Damaged: a length that is not the block's, a bit beyond the
/// block, another end.
pub fn decode_received(bytes: &[u8], base: u64, pages: PageCount) -> Result<(PageSet, usize), DecodeError> {
    let mut cursor = Cursor::new(bytes, base);
    let size = cursor.be64("bitmap's length")?;
    let expected = bitmap_len(pages.0);
    if size != expected {
        let problem = format!("{size:#x} bytes are not the {expected:#x} of {:#x} pages", pages.0);
        return Err(Fault::damaged(base, "bitmap's length", problem).into());
    }
    let bits_at = cursor.position();
    let bits = cursor.bytes(size as usize, "bitmap")?;
    let end_at = cursor.position();
    let end = cursor.be64("bitmap's end")?;
    if end != RAMBLOCK_RECV_BITMAP_ENDING {
        let problem = format!("{end:#x} is not {RAMBLOCK_RECV_BITMAP_ENDING:#x}");
        return Err(Fault::damaged(end_at, "bitmap's end", problem).into());
    }
    let set = crate::mapped_ram::decode_bitmap(bits, bits_at, pages)?;
    Ok((set, cursor.consumed()))
}

/// What is in a PACKAGED command, as far as it can be told without knowing device state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Where the device state is: its sections, without an end mark.
    pub device_state: FileRange,
    /// The value of the ping behind the device state, where there is one.
    pub ping: Option<u32>,
}

/// The length of a command without payload, and of a ping.
const BARE_LEN: usize = 5;
const PING_LEN: usize = BARE_LEN + VALUE_LEN;

/// Reads a whole package, whose first byte stands at `base`: LISTEN, device state, a ping or none, RUN.
///
/// Device state has no length, so it is what stands between the commands: the ping is looked for from the end,
/// where QEMU puts it.
///
/// # Errors
/// A damaged fault where LISTEN is not the first or RUN not the last.
pub fn decode_package(bytes: &[u8], base: u64) -> Result<Package, Fault> {
    let (first, listen_len) = decode_item(bytes, base).map_err(DecodeError::at_end)?;
    if first != Item::Command(Command::PostcopyListen) {
        return Err(Fault::damaged(base, "package", "does not begin with LISTEN"));
    }
    let last_command = |end: usize, len: usize| {
        let at = end.checked_sub(len).filter(|at| *at >= listen_len)?;
        let piece = bytes.get(at..end).filter(|piece| piece.first() == Some(&QEMU_VM_COMMAND))?;
        match decode_item(piece, base.saturating_add(at as u64)) {
            Ok((Item::Command(command), taken)) if taken == len => Some((command, at)),
            _ => None,
        }
    };
    let Some((Command::PostcopyRun, run_at)) = last_command(bytes.len(), BARE_LEN) else {
        let end = base.saturating_add(bytes.len() as u64);
        return Err(Fault::damaged(end, "package", "does not end with RUN"));
    };
    let (ping, end) = match last_command(run_at, PING_LEN) {
        Some((Command::Ping(value), at)) => (Some(value), at),
        _ => (None, run_at),
    };
    let absolute = |at: usize| base.saturating_add(at as u64);
    Ok(Package { device_state: FileRange::new(absolute(listen_len), absolute(end)), ping })
}
