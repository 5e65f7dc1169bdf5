//! All that is wrong with a head, not only the first of it.

use crate::{DecodeError, Findings, Report};

use super::decode::find;
use super::head::Head;

/// What a survey of a head found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadReport {
    /// The faults, in the order in which they were met: the first is what [`Head::decode`] refuses.
    pub report: Report,
    /// Where the payload begins, where that could be told.
    pub payload_at: Option<u64>,
    /// The head, where all of it could be read. With faults, it is that of an image that was not written to
    /// its end.
    pub head: Option<Head>,
}

/// Reads a head to its end, whatever is wrong with it. Takes what [`Head::decode`] takes.
///
/// # Errors
/// How many more bytes are needed: never a fault.
pub fn head(bytes: &[u8], base: u64, file_len: u64) -> Result<HeadReport, u64> {
    let mut findings = Findings::collecting();
    let found = match find(bytes, base, file_len, &mut findings) {
        Ok(found) => Some(found),
        Err(DecodeError::Incomplete { needed, .. }) => return Err(needed),
        Err(DecodeError::Fault(fault)) => {
            // Collecting findings take every fault.
            let _ = findings.note(fault);
            None
        }
    };
    let payload_at = found.as_ref().map(|found| found.payload_at);
    let head = found.and_then(|found| found.head.ok());
    Ok(HeadReport { report: findings.into_report(), payload_at, head })
}
