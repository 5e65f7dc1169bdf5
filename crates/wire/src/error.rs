//! What can be wrong with bytes: too few of them, or a lie.

use std::borrow::Cow;

use thiserror::Error;

/// Whose fault a [`Fault`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The bytes contradict the format, the file, or each other.
    Damaged,
    /// The bytes may well be right, but this crate does not know how to read them.
    Unsupported,
}

/// One thing that is wrong, and where.
///
/// It reads as one clause: ``mapped-ram header of block `pc.ram` at 0x1f000: bitmap offset 0x12345 lies
/// outside the file``.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{field} at {offset:#x}: {problem}")]
pub struct Fault {
    /// Damaged or unsupported.
    pub kind: FaultKind,
    /// The absolute offset of the field.
    pub offset: u64,
    /// The field, as a noun.
    pub field: Cow<'static, str>,
    /// What is wrong with it.
    pub problem: Cow<'static, str>,
}

impl Fault {
    /// A fault of kind [`FaultKind::Damaged`].
    pub fn damaged(
        offset: u64,
        field: impl Into<Cow<'static, str>>,
        problem: impl Into<Cow<'static, str>>,
    ) -> Fault {
        Fault { kind: FaultKind::Damaged, offset, field: field.into(), problem: problem.into() }
    }

    /// A fault of kind [`FaultKind::Unsupported`].
    pub fn unsupported(
        offset: u64,
        field: impl Into<Cow<'static, str>>,
        problem: impl Into<Cow<'static, str>>,
    ) -> Fault {
        Fault { kind: FaultKind::Unsupported, offset, field: field.into(), problem: problem.into() }
    }
}

/// Why a decoder gave no value.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The bytes are right so far, but there are too few of them.
    ///
    /// A caller that reads from a socket reads on and tries again with more bytes; one that holds the
    /// whole file turns it into a fault with [`DecodeError::at_end`].
    #[error("{field} at {offset:#x}: {needed} more bytes are needed")]
    Incomplete {
        /// The absolute offset of the field that is cut short.
        offset: u64,
        /// The field.
        field: &'static str,
        /// At least this many more bytes are needed; never zero.
        needed: u64,
    },
    /// The bytes are wrong, and more of them will not help.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl DecodeError {
    /// The fault that this error is where the input ends for good.
    pub fn at_end(self) -> Fault {
        match self {
            DecodeError::Incomplete { offset, field, needed } => {
                Fault::damaged(offset, field, format!("the input ends {needed} bytes too early"))
            }
            DecodeError::Fault(fault) => fault,
        }
    }
}
