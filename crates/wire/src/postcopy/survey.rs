//! All that is wrong with a recorded return path, not only the first of it.

use page::PageCount;

use crate::{DecodeError, Fault, Report};

use super::{Message, RequestedBlock, Requests, decode_message, decode_received};

/// Surveys the whole return path of a postcopy of these blocks, whose pages on the wire have `target_page`
/// bytes. Its first fault is the one that a reading message by message stops at.
///
/// A message is delimited by its head, so a survey goes on behind one that is wrong in itself; not behind a
/// type or a bitmap that it does not know the length of.
pub fn return_path(bytes: &[u8], base: u64, blocks: &[RequestedBlock], target_page: u64) -> Report {
    let mut report = Report::default();
    let mut requests = Requests::new(blocks.to_vec());
    let mut at = 0;
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        let position = base.saturating_add(at as u64);
        match decode_message(rest, position) {
            Ok((message, len)) => {
                at += len;
                match message {
                    Message::RequestPages(request) => {
                        if let Err(fault) = requests.judge(&request, position) {
                            report.push(fault);
                        }
                    }
                    Message::ReceivedBitmap { block } => {
                        let Some(block) = blocks.iter().find(|known| known.name == block) else {
                            let problem = format!("block `{block}` is unknown");
                            report.push(Fault::damaged(position, "bitmap's block", problem));
                            return report;
                        };
                        let pages = PageCount(block.length.checked_div(target_page).unwrap_or(0));
                        let rest = bytes.get(at..).unwrap_or_default();
                        match decode_received(rest, base.saturating_add(at as u64), pages) {
                            Ok((_, len)) => at += len,
                            Err(error) => {
                                report.push(error.at_end());
                                return report;
                            }
                        }
                    }
                    _ => {}
                }
            }
            Err(error) => {
                let delimited = matches!(error, DecodeError::Fault(_)).then(|| message_len(rest)).flatten();
                report.push(error.at_end());
                match delimited {
                    Some(len) => at += len,
                    None => return report,
                }
            }
        }
    }
    report
}

/// The length of a message that is wrong in itself but has all its bytes, head included.
fn message_len(bytes: &[u8]) -> Option<usize> {
    let (head, rest) = bytes.split_first_chunk::<{ super::format::MESSAGE_HEADER_LEN }>()?;
    let [_, _, high, low] = *head;
    let len = usize::from(u16::from_be_bytes([high, low]));
    (len <= rest.len()).then_some(len + head.len())
}
