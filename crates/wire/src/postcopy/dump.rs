//! The return path as text.

use crate::dump::Dump;

use super::{Message, decode_message};

/// The messages of a return path that begins at `base`, up to the first that cannot be read and up to a bitmap,
/// which is no message.
pub fn return_path(bytes: &[u8], base: u64) -> Dump {
    let mut dump = Dump::default();
    let mut at = 0;
    while let Ok((message, len)) =
        decode_message(bytes.get(at..).unwrap_or_default(), base.saturating_add(at as u64))
    {
        line(&mut dump, base.saturating_add(at as u64), &message);
        at += len;
        if matches!(message, Message::ReceivedBitmap { .. }) {
            break;
        }
    }
    dump
}

/// One message that stands at `at`.
pub fn line(dump: &mut Dump, at: u64, message: &Message) {
    match message {
        Message::Shut(error) => dump.line(at, "shut", error),
        Message::Pong(value) => dump.line(at, "pong", format_args!("{value:#x}")),
        Message::RequestPages(request) => {
            let block = request.block.as_ref().map_or("(as before)", |name| name.as_str());
            dump.line(
                at,
                "request",
                format_args!(
                    "{block} {:#x}..{:#x}",
                    request.start,
                    request.start.saturating_add(request.len.into())
                ),
            );
        }
        Message::ReceivedBitmap { block } => dump.line(at, "received", block),
        Message::ResumeAck(value) => dump.line(at, "resume", value),
        Message::SwitchoverAck => dump.line(at, "switchover", "agreed"),
    }
}
