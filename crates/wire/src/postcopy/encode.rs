//! Writing the opening of the main channel, and what [`super::decode`](super) reads.

use page::PageSet;

use crate::cursor::Encoder;
use crate::qemu::format::MAX_DISCARDS_PER_COMMAND;
use crate::qemu::{Command, DiscardRange, Item, PostcopyAdvise, Preamble, RamSetup};

use super::format::*;
use super::{Message, PageRequest};

impl Message {
    /// Appends the message; the bitmap that follows a [`Message::ReceivedBitmap`] is not part of it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut payload = Vec::new();
        let mut encoder = Encoder::new(&mut payload);
        let kind = match self {
            Message::Shut(error) => {
                encoder.be32(*error);
                MIG_RP_MSG_SHUT
            }
            Message::Pong(value) => {
                encoder.be32(*value);
                MIG_RP_MSG_PONG
            }
            Message::RequestPages(PageRequest { block, start, len }) => {
                encoder.be64(*start);
                encoder.be32(*len);
                match block {
                    Some(name) => {
                        encoder.counted_string(name);
                        MIG_RP_MSG_REQ_PAGES_ID
                    }
                    None => MIG_RP_MSG_REQ_PAGES,
                }
            }
            Message::ReceivedBitmap { block } => {
                encoder.counted_string(block);
                MIG_RP_MSG_RECV_BITMAP
            }
            Message::ResumeAck(value) => {
                encoder.be32(*value);
                MIG_RP_MSG_RESUME_ACK
            }
            Message::SwitchoverAck => MIG_RP_MSG_SWITCHOVER_ACK,
        };
        let mut encoder = Encoder::new(out);
        encoder.be16(kind);
        // The longest payload is a request with a name of 255 bytes.
        encoder.be16(payload.len() as u16);
        encoder.bytes(&payload);
    }
}

/// Appends the bitmap that follows a [`Message::ReceivedBitmap`].
pub fn encode_received(pages: &PageSet, out: &mut Vec<u8>) {
    let mut bits = Vec::new();
    crate::mapped_ram::encode_bitmap(pages, &mut bits);
    let mut encoder = Encoder::new(out);
    encoder.be64(bits.len() as u64);
    encoder.bytes(&bits);
    encoder.be64(RAMBLOCK_RECV_BITMAP_ENDING);
}

/// All that a source sends before the first page, so that the target runs without any.
///
/// The order is QEMU's own but for the pages of a precopy phase, of which there are none: return path,
/// ADVISE, the list of blocks, discards, and one package with LISTEN, the device state and RUN.
#[derive(Clone, Debug)]
pub struct Opening<'a> {
    /// Magic and configuration.
    pub preamble: Preamble,
    /// The sender's number for the RAM section.
    pub section_id: u32,
    /// The blocks. Those whose pages are not the host's own tell their page size.
    pub setup: RamSetup,
    /// The page sizes of both ends.
    pub advise: PostcopyAdvise,
    /// The discards. There must be at least one before LISTEN, or every QEMU from 7.2 to 11.1 takes the pages
    /// that follow for precopy and waits for itself.
    pub discards: Vec<(crate::IdStr, Vec<DiscardRange>)>,
    /// The sections of the devices, without an end mark.
    pub device_state: &'a [u8],
}

impl Opening<'_> {
    /// Appends the opening, or `None` where the device state is too long for a package.
    ///
    /// # Panics
    /// When there is nothing to discard: the caller's mistake, and a target that hangs.
    pub fn encode(&self, out: &mut Vec<u8>) -> Option<()> {
        assert!(self.discards.iter().any(|(_, ranges)| !ranges.is_empty()), "a page to discard");
        let mut package = Vec::with_capacity(self.device_state.len() + 64);
        Command::PostcopyListen.encode(&mut package);
        package.extend_from_slice(self.device_state);
        Command::Ping(PING_PACKAGED).encode(&mut package);
        Command::PostcopyRun.encode(&mut package);
        let len = u32::try_from(package.len()).ok()?;

        self.preamble.encode(out);
        let mut command = |command: Command| Item::Command(command).encode(out);
        command(Command::OpenReturnPath);
        command(Command::Ping(PING_OPENING));
        command(Command::PostcopyAdvise(Some(self.advise)));
        self.setup.encode_section(self.section_id, out);
        for (block, ranges) in &self.discards {
            for ranges in ranges.chunks(MAX_DISCARDS_PER_COMMAND) {
                let (block, ranges) = (block.clone(), ranges.to_vec());
                Command::PostcopyRamDiscard { block, ranges }.encode(out);
            }
        }
        Command::Packaged { len }.encode(out);
        out.extend_from_slice(&package);
        Some(())
    }
}
