//! Reading the parts of a stream that stand in one piece.

use crate::cursor::Cursor;
use crate::{DecodeError, Fault, Findings, IdStr};

use super::format::*;
use super::{
    BlockEntry, BlockListBuilder, BlockListVariant, Command, Configuration, DiscardRange, Item,
    PostcopyAdvise, Preamble, RamSetup, SectionHeader, SectionKind,
};

/// Reads magic, version and configuration from `bytes`, whose first stands at offset `base`.
///
/// Gives the preamble and its length in bytes. It looks one byte further than it takes, to see whether a
/// configuration or another of its subsections follows; every stream has that byte.
///
/// # Errors
/// [`DecodeError::Incomplete`] where bytes lack. Unsupported: another version of the stream or of a
/// subsection, an unknown subsection. Damaged: anything else.
pub fn decode_preamble(bytes: &[u8], base: u64) -> Result<(Preamble, usize), DecodeError> {
    let mut cursor = Cursor::new(bytes, base);
    let magic = cursor.be32("magic")?;
    if magic != QEMU_VM_FILE_MAGIC {
        let problem = format!("{magic:#010x} is not {QEMU_VM_FILE_MAGIC:#010x} (`QEVM`)");
        return Err(Fault::damaged(base, "magic", problem).into());
    }
    let at = cursor.position();
    match cursor.be32("stream version")? {
        QEMU_VM_FILE_VERSION => {}
        version => {
            let problem = format!("version {version} is not {QEMU_VM_FILE_VERSION}");
            return Err(Fault::unsupported(at, "stream version", problem).into());
        }
    }
    let configuration = match cursor.peek("first section type")? {
        QEMU_VM_CONFIGURATION => Some(decode_configuration(&mut cursor)?),
        _ => None,
    };
    Ok((Preamble { configuration }, cursor.consumed()))
}

fn decode_configuration(cursor: &mut Cursor<'_>) -> Result<Configuration, DecodeError> {
    cursor.u8("configuration")?;
    let at = cursor.position();
    let len = cursor.be32("machine name length")?;
    if len > MACHINE_NAME_LEN_MAX {
        let problem = format!("{len} is more than {MACHINE_NAME_LEN_MAX}");
        return Err(Fault::damaged(at, "machine name length", problem).into());
    }
    let machine = IdStr::from_bytes(cursor.bytes(len as usize, "machine name")?)
        .ok_or_else(|| Fault::damaged(at, "machine name", "is empty or not printable text"))?;

    let mut configuration = Configuration::new(machine);
    // QEMU writes each subsection at most once and in this order; a strictly rising place keeps both.
    let mut place = 0;
    while cursor.peek("type after the configuration")? == QEMU_VM_SUBSECTION {
        let at = cursor.position();
        cursor.u8("configuration subsection")?;
        let name = cursor.counted_string("configuration subsection name")?;
        let version = cursor.be32("configuration subsection version")?;
        let field = || format!("configuration subsection `{name}`");
        let this = match name.as_str() {
            TARGET_PAGE_BITS => 1,
            CAPABILITIES => 2,
            UUID => 3,
            _ => return Err(Fault::unsupported(at, field(), "is unknown and has no length").into()),
        };
        if this <= place {
            return Err(Fault::damaged(at, field(), "is repeated or out of order").into());
        }
        place = this;
        if version != CONFIGURATION_SUBSECTION_VERSION {
            let problem = format!("version {version} is not {CONFIGURATION_SUBSECTION_VERSION}");
            return Err(Fault::unsupported(at, field(), problem).into());
        }
        match this {
            1 => configuration.target_page_bits = Some(decode_page_bits(cursor)?),
            2 => configuration.capabilities = decode_capabilities(cursor)?,
            _ => {
                configuration.uuid = Some(cursor.array("uuid")?);
            }
        }
    }
    Ok(configuration)
}

fn decode_page_bits(cursor: &mut Cursor<'_>) -> Result<u32, DecodeError> {
    let at = cursor.position();
    let bits = cursor.be32("target page bits")?;
    if !TARGET_PAGE_BITS_RANGE.contains(&bits) {
        let problem = format!("{bits} bits make no target page");
        return Err(Fault::damaged(at, "target page bits", problem).into());
    }
    Ok(bits)
}

fn decode_capabilities(cursor: &mut Cursor<'_>) -> Result<Vec<IdStr>, DecodeError> {
    let at = cursor.position();
    let count = cursor.be32("number of capabilities")?;
    if !(1..=CAPABILITIES_MAX).contains(&count) {
        let problem = format!("{count} is not within 1..={CAPABILITIES_MAX}");
        return Err(Fault::damaged(at, "number of capabilities", problem).into());
    }
    let mut capabilities = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let at = cursor.position();
        let name = cursor.counted_string("capability")?;
        if capabilities.contains(&name) {
            return Err(Fault::damaged(at, "capability", format!("`{name}` is listed twice")).into());
        }
        capabilities.push(name);
    }
    Ok(capabilities)
}

/// Reads one element of a stream from `bytes`, whose first stands at offset `base`.
///
/// Gives the item and its length in bytes; the payload of a section and the JSON of a vmdescription are
/// not part of it.
///
/// # Errors
/// [`DecodeError::Incomplete`] where bytes lack; a fault where the byte is no type that may stand here,
/// or a command is unknown or has the wrong length.
pub fn decode_item(bytes: &[u8], base: u64) -> Result<(Item, usize), DecodeError> {
    let mut cursor = Cursor::new(bytes, base);
    let item = match cursor.u8("section type")? {
        QEMU_VM_EOF => Item::Eof,
        QEMU_VM_SECTION_START => Item::Section(decode_section(&mut cursor, SectionKind::Start)?),
        QEMU_VM_SECTION_FULL => Item::Section(decode_section(&mut cursor, SectionKind::Full)?),
        QEMU_VM_SECTION_PART => Item::Part { section_id: cursor.be32("section id")? },
        QEMU_VM_SECTION_END => Item::End { section_id: cursor.be32("section id")? },
        QEMU_VM_SECTION_FOOTER => Item::Footer { section_id: cursor.be32("section id of a footer")? },
        QEMU_VM_VMDESCRIPTION => Item::VmDescription { len: cursor.be32("vmdescription length")? },
        QEMU_VM_COMMAND => Item::Command(decode_command(&mut cursor, base)?),
        other => {
            let problem = format!("{other:#04x} is no type that may stand here");
            return Err(Fault::damaged(base, "section type", problem).into());
        }
    };
    Ok((item, cursor.consumed()))
}

fn decode_section(cursor: &mut Cursor<'_>, kind: SectionKind) -> Result<SectionHeader, DecodeError> {
    Ok(SectionHeader {
        kind,
        section_id: cursor.be32("section id")?,
        idstr: cursor.counted_string("section name")?,
        instance_id: cursor.be32("section instance id")?,
        version_id: cursor.be32("section version")?,
    })
}

fn decode_command(cursor: &mut Cursor<'_>, base: u64) -> Result<Command, DecodeError> {
    let number = cursor.be16("command")?;
    let len = cursor.be16("command length")?;
    let payload_at = cursor.position();
    let payload = cursor.bytes(usize::from(len), "command payload")?;
    // The payload is complete, so a field that runs out of it lies about the length: never incomplete.
    let mut payload = Cursor::new(payload, payload_at);
    let command = decode_command_payload(number, &mut payload, base).map_err(DecodeError::at_end)?;
    if payload.remaining() != 0 {
        let problem = format!("{} bytes are left over in its payload", payload.remaining());
        return Err(Fault::damaged(base, format!("command {number}"), problem).into());
    }
    Ok(command)
}

fn decode_command_payload(number: u16, payload: &mut Cursor<'_>, base: u64) -> Result<Command, DecodeError> {
    Ok(match number {
        MIG_CMD_OPEN_RETURN_PATH => Command::OpenReturnPath,
        MIG_CMD_PING => Command::Ping(payload.be32("ping value")?),
        MIG_CMD_POSTCOPY_ADVISE if payload.remaining() == 0 => Command::PostcopyAdvise(None),
        MIG_CMD_POSTCOPY_ADVISE => Command::PostcopyAdvise(Some(PostcopyAdvise {
            page_size_summary: payload.be64("postcopy page size summary")?,
            target_page_size: payload.be64("postcopy target page size")?,
        })),
        MIG_CMD_POSTCOPY_LISTEN => Command::PostcopyListen,
        MIG_CMD_POSTCOPY_RUN => Command::PostcopyRun,
        MIG_CMD_POSTCOPY_RAM_DISCARD => decode_discard(payload)?,
        MIG_CMD_PACKAGED => Command::Packaged { len: payload.be32("packaged length")? },
        MIG_CMD_ENABLE_COLO => Command::EnableColo,
        MIG_CMD_POSTCOPY_RESUME => Command::PostcopyResume,
        MIG_CMD_RECV_BITMAP => Command::RecvBitmap { block: payload.counted_string("bitmap's block")? },
        MIG_CMD_SWITCHOVER_START => Command::SwitchoverStart,
        other => return Err(Fault::unsupported(base, "command", format!("{other} is unknown")).into()),
    })
}

fn decode_discard(payload: &mut Cursor<'_>) -> Result<Command, DecodeError> {
    let at = payload.position();
    let version = payload.u8("discard version")?;
    if version != POSTCOPY_RAM_DISCARD_VERSION {
        let problem = format!("{version} is not {POSTCOPY_RAM_DISCARD_VERSION}");
        return Err(Fault::unsupported(at, "discard version", problem).into());
    }
    let block = payload.counted_string("discarded block")?;
    let at = payload.position();
    if payload.u8("end of the discarded block's name")? != 0 {
        return Err(Fault::damaged(at, "end of the discarded block's name", "is not zero").into());
    }
    // The payload has at most 65,535 bytes, which bounds the ranges.
    let mut ranges = Vec::with_capacity(payload.remaining() / 16);
    while payload.remaining() > 0 || ranges.is_empty() {
        let at = payload.position();
        let range =
            DiscardRange { start: payload.be64("discard start")?, len: payload.be64("discard length")? };
        if range.len == 0 || range.start.checked_add(range.len).is_none() {
            let problem = format!("{:#x} bytes from {:#x} are no range", range.len, range.start);
            return Err(Fault::damaged(at, "discard range", problem).into());
        }
        ranges.push(range);
    }
    Ok(Command::PostcopyRamDiscard { block, ranges })
}

/// Reads one entry of a block list.
pub(crate) fn decode_block_entry(
    cursor: &mut Cursor<'_>,
    variant: BlockListVariant,
) -> Result<BlockEntry, DecodeError> {
    let name = cursor.counted_string("RAM block name")?;
    let used_length = cursor.be64("RAM block length")?;
    let (mut page_size, mut address) = (None, None);
    match variant {
        BlockListVariant::Plain => {}
        BlockListVariant::Postcopy => page_size = decode_block_page_size(cursor)?,
        BlockListVariant::IgnoreShared => address = Some(cursor.be64("RAM block address")?),
    }
    Ok(BlockEntry { name, used_length, page_size, address })
}

/// Reads the page size of a block, if it is there.
///
/// The sender writes it only for blocks whose pages differ from its host's, which the stream does not
/// tell. What may stand here otherwise is the length byte of the next name, which is not zero, a flush
/// word, 0x200, or an end word, 0x10: none of them begins with a zero byte and reads as a page size of
/// at least 1 KiB.
fn decode_block_page_size(cursor: &mut Cursor<'_>) -> Result<Option<u64>, DecodeError> {
    if cursor.peek("RAM block page size or next name")? != 0 {
        return Ok(None);
    }
    let word = cursor.clone().be64("RAM block page size or end")?;
    if word <= RAM_FLAGS_MASK {
        return Ok(None);
    }
    if !word.is_power_of_two() {
        let problem = format!("{word:#x} is no page size");
        return Err(Fault::damaged(cursor.position(), "RAM block page size", problem).into());
    }
    cursor.be64("RAM block page size").map(Some)
}

/// Reads the payload of the START section of RAM from `bytes`, whose first stands at offset `base`: the
/// total, the list of blocks, the end mark.
///
/// Gives the list and the payload's length in bytes. It is not for mapped-ram, whose list is scattered
/// over the file.
///
/// # Errors
/// [`DecodeError::Incomplete`] where bytes lack. Damaged: no such payload, a length that is no number of
/// pages, a block listed twice, blocks that do not add up to the total, more than
/// [`RAM_BLOCKS_MAX`] of them.
pub fn decode_ram_setup(
    bytes: &[u8],
    base: u64,
    variant: BlockListVariant,
) -> Result<(RamSetup, usize), DecodeError> {
    let mut cursor = Cursor::new(bytes, base);
    let mut findings = Findings::strict();
    let mut list = decode_total(&mut cursor)?;
    while !list.is_complete() {
        let at = cursor.position();
        let entry = decode_block_entry(&mut cursor, variant)?;
        list.push(entry, at, &mut findings)?;
    }
    let mut multifd_flush = false;
    loop {
        let at = cursor.position();
        match cursor.be64("end of the RAM setup")? {
            RAM_SAVE_FLAG_MULTIFD_FLUSH if !multifd_flush => multifd_flush = true,
            RAM_SAVE_FLAG_EOS => return Ok((list.finish(multifd_flush), cursor.consumed())),
            word => {
                let problem = format!("{word:#x} is neither a flush nor an end");
                return Err(Fault::damaged(at, "end of the RAM setup", problem).into());
            }
        }
    }
}

/// Reads the word that announces a block list.
pub(crate) fn decode_total(cursor: &mut Cursor<'_>) -> Result<BlockListBuilder, DecodeError> {
    let at = cursor.position();
    let word = cursor.be64("total RAM size")?;
    if word & RAM_FLAGS_MASK != RAM_SAVE_FLAG_MEM_SIZE {
        let problem = format!("{word:#x} announces no list of blocks");
        return Err(Fault::damaged(at, "total RAM size", problem).into());
    }
    Ok(BlockListBuilder::new(word & !RAM_FLAGS_MASK, at)?)
}
