//! Writing what [`super::decode`](super) reads.

use crate::IdStr;
use crate::cursor::Encoder;

use super::format::*;
use super::{BlockEntry, Command, Configuration, Item, Preamble, RamSetup, SectionHeader, SectionKind};

impl Preamble {
    /// Appends magic, version and, if there is one, the configuration.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(out);
        encoder.be32(QEMU_VM_FILE_MAGIC);
        encoder.be32(QEMU_VM_FILE_VERSION);
        if let Some(configuration) = &self.configuration {
            configuration.encode(out);
        }
    }
}

impl Configuration {
    /// Appends the section with its type byte.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(out);
        encoder.u8(QEMU_VM_CONFIGURATION);
        encoder.be32(self.machine.len() as u32);
        encoder.bytes(self.machine.as_bytes());
        if let Some(bits) = self.target_page_bits {
            subsection(&mut encoder, TARGET_PAGE_BITS);
            encoder.be32(bits);
        }
        if !self.capabilities.is_empty() {
            subsection(&mut encoder, CAPABILITIES);
            encoder.be32(self.capabilities.len() as u32);
            for capability in &self.capabilities {
                encoder.counted_string(capability);
            }
        }
        if let Some(uuid) = &self.uuid {
            subsection(&mut encoder, UUID);
            encoder.bytes(uuid);
        }
    }
}

fn subsection(encoder: &mut Encoder<'_>, name: &str) {
    encoder.u8(QEMU_VM_SUBSECTION);
    // The three names are constants of less than 256 bytes.
    encoder.u8(name.len() as u8);
    encoder.bytes(name.as_bytes());
    encoder.be32(CONFIGURATION_SUBSECTION_VERSION);
}

impl Item {
    /// Appends the item; of a section the head, of a vmdescription the head.
    ///
    /// # Panics
    /// As [`Command::encode`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Item::Eof => out.push(QEMU_VM_EOF),
            Item::Section(header) => header.encode(out),
            Item::Part { section_id } => short_head(out, QEMU_VM_SECTION_PART, *section_id),
            Item::End { section_id } => short_head(out, QEMU_VM_SECTION_END, *section_id),
            Item::Footer { section_id } => short_head(out, QEMU_VM_SECTION_FOOTER, *section_id),
            Item::Command(command) => command.encode(out),
            Item::VmDescription { len } => short_head(out, QEMU_VM_VMDESCRIPTION, *len),
        }
    }
}

fn short_head(out: &mut Vec<u8>, kind: u8, value: u32) {
    let mut encoder = Encoder::new(out);
    encoder.u8(kind);
    encoder.be32(value);
}

impl SectionHeader {
    /// The head of the START section of RAM, as every QEMU writes it but for the id.
    pub fn ram(section_id: u32) -> SectionHeader {
        let idstr = IdStr::new(RAM_SECTION).expect("the section's name is a constant");
        let kind = SectionKind::Start;
        SectionHeader { kind, section_id, idstr, instance_id: 0, version_id: RAM_SECTION_VERSION }
    }

    /// Appends the head with its type byte.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(out);
        encoder.u8(match self.kind {
            SectionKind::Start => QEMU_VM_SECTION_START,
            SectionKind::Full => QEMU_VM_SECTION_FULL,
        });
        encoder.be32(self.section_id);
        encoder.counted_string(&self.idstr);
        encoder.be32(self.instance_id);
        encoder.be32(self.version_id);
    }
}

impl Command {
    /// Appends the command with its type byte; what a PACKAGED command announces is not part of it.
    ///
    /// # Panics
    /// When a discard command has no range or more than [`RAM_DISCARD_RANGES_MAX`]: its length has 16
    /// bits, and the caller deals ranges out, [`MAX_DISCARDS_PER_COMMAND`] at a time as QEMU does.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut payload = Vec::new();
        let mut encoder = Encoder::new(&mut payload);
        let number = match self {
            Command::OpenReturnPath => MIG_CMD_OPEN_RETURN_PATH,
            Command::Ping(value) => {
                encoder.be32(*value);
                MIG_CMD_PING
            }
            Command::PostcopyAdvise(advise) => {
                if let Some(advise) = advise {
                    encoder.be64(advise.page_size_summary);
                    encoder.be64(advise.target_page_size);
                }
                MIG_CMD_POSTCOPY_ADVISE
            }
            Command::PostcopyListen => MIG_CMD_POSTCOPY_LISTEN,
            Command::PostcopyRun => MIG_CMD_POSTCOPY_RUN,
            Command::PostcopyRamDiscard { block, ranges } => {
                let count = ranges.len();
                assert!((1..=RAM_DISCARD_RANGES_MAX).contains(&count), "{count} ranges to discard");
                encoder.u8(POSTCOPY_RAM_DISCARD_VERSION);
                encoder.counted_string(block);
                encoder.u8(0);
                for range in ranges {
                    encoder.be64(range.start);
                    encoder.be64(range.len);
                }
                MIG_CMD_POSTCOPY_RAM_DISCARD
            }
            Command::Packaged { len } => {
                encoder.be32(*len);
                MIG_CMD_PACKAGED
            }
            Command::EnableColo => MIG_CMD_ENABLE_COLO,
            Command::PostcopyResume => MIG_CMD_POSTCOPY_RESUME,
            Command::RecvBitmap { block } => {
                encoder.counted_string(block);
                MIG_CMD_RECV_BITMAP
            }
            Command::SwitchoverStart => MIG_CMD_SWITCHOVER_START,
        };
        let mut encoder = Encoder::new(out);
        encoder.u8(QEMU_VM_COMMAND);
        encoder.be16(number);
        encoder.be16(payload.len() as u16);
        encoder.bytes(&payload);
    }
}

impl BlockEntry {
    /// Appends the entry, with the optional fields that it has.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(out);
        encoder.counted_string(&self.name);
        encoder.be64(self.used_length);
        if let Some(page_size) = self.page_size {
            encoder.be64(page_size);
        }
        if let Some(address) = self.address {
            encoder.be64(address);
        }
    }
}

impl RamSetup {
    /// Appends the payload of the START section: total, blocks, end mark.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Encoder::new(out).be64(self.total() | RAM_SAVE_FLAG_MEM_SIZE);
        for block in &self.blocks {
            block.encode(out);
        }
        let mut encoder = Encoder::new(out);
        if self.multifd_flush {
            encoder.be64(RAM_SAVE_FLAG_MULTIFD_FLUSH);
        }
        encoder.be64(RAM_SAVE_FLAG_EOS);
    }

    /// Appends a whole START section: head, payload, footer.
    ///
    /// `section_id` is the sender's number of the RAM handler; a restored stream may use any, since all
    /// later references are in the same stream.
    pub fn encode_section(&self, section_id: u32, out: &mut Vec<u8>) {
        SectionHeader::ram(section_id).encode(out);
        self.encode(out);
        Item::Footer { section_id }.encode(out);
    }
}
