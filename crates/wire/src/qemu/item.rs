//! What a stream consists of after its preamble: section heads, footers, commands, the end.

use crate::IdStr;

/// The two kinds of section that name themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// The first of a handler that iterates.
    Start,
    /// The only one of a handler that does not.
    Full,
}

/// The head of a START or FULL section; the payload follows, without a length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionHeader {
    /// START or FULL.
    pub kind: SectionKind,
    /// The sender's number for the handler: a registration counter, which differs between command lines
    /// and versions. PARTs, ENDs and footers refer to it.
    pub section_id: u32,
    /// The handler's name, for example `ram` or `0000:00:02.0/vga`.
    pub idstr: IdStr,
    /// Which of the handlers of that name.
    pub instance_id: u32,
    /// The version of the payload.
    pub version_id: u32,
}

/// One element of a stream, as far as it can be told without knowing payloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// The end of the sections.
    Eof,
    /// A START or FULL head; a payload follows.
    Section(SectionHeader),
    /// A PART head; a payload follows.
    Part {
        /// The section id of the START it belongs to.
        section_id: u32,
    },
    /// An END head; a payload follows.
    End {
        /// The section id of the START it belongs to.
        section_id: u32,
    },
    /// The footer of any section.
    Footer {
        /// The section id of the section it closes.
        section_id: u32,
    },
    /// A command.
    Command(Command),
    /// The head of a vmdescription; the JSON follows.
    VmDescription {
        /// The length of the JSON in bytes, not yet checked against anything.
        len: u32,
    },
}

/// What the source tells the target beside the sections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Opens the return path.
    OpenReturnPath,
    /// Asks for a pong with this value.
    Ping(u32),
    /// Announces postcopy; `None` where only dirty bitmaps take part.
    PostcopyAdvise(Option<PostcopyAdvise>),
    /// Lets the target listen for pages.
    PostcopyListen,
    /// Lets the target run.
    PostcopyRun,
    /// Pages that the target must throw away.
    PostcopyRamDiscard {
        /// The RAM block.
        block: IdStr,
        /// At least one range.
        ranges: Vec<DiscardRange>,
    },
    /// A stream of this many bytes follows, outside the command.
    Packaged {
        /// Its length in bytes.
        len: u32,
    },
    /// Enables COLO.
    EnableColo,
    /// Resumes a postcopy that broke off.
    PostcopyResume,
    /// Asks which pages of a block arrived.
    RecvBitmap {
        /// The RAM block.
        block: IdStr,
    },
    /// The source has stopped; since QEMU 10.0.
    SwitchoverStart,
}

/// The page sizes that both ends of a postcopy must agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostcopyAdvise {
    /// The page sizes of all blocks in bytes, combined by or.
    pub page_size_summary: u64,
    /// The target's page size in bytes.
    pub target_page_size: u64,
}

/// A range of one block in a discard command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardRange {
    /// The offset in the block, in bytes.
    pub start: u64,
    /// The length in bytes.
    pub len: u64,
}
