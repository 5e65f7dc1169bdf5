//! vmstate as the source of a migration: a stream that lists every block, carries the pages of those that
//! are not filled already, and ends in the image's device state. Every QEMU reads it.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use io::{Cancel, Counters, RateLimit};
use page::{PageIndex, PageSet};
use serde_json::json;
use wire::FileRange;
use wire::mapped_ram::BlockPlacement;
use wire::qemu::{Configuration, DeviceSection, Item, Preamble, RamSetup, RecordEncoder};

use super::load_failed;
use super::map::Share;
use crate::qemu::Session;
use crate::source::{MappedRamFile, StreamFile};
use crate::{Error, Kind, Result};

/// The name under which QEMU receives the socket.
const FEED: &str = "vmstate-feed";
/// How much is sent at once.
const CHUNK: u64 = 1 << 20;
/// Blocks up to this length have their absent pages sent as zero, for a target that is not zero there: its
/// firmware's ROMs are. Of larger ones it is verified afterwards.
const ZEROED_LEN_MAX: u64 = 16 << 20;
/// The first QEMU whose `migrate-incoming` can be told not to exit when the load fails.
pub(super) const EXIT_ON_ERROR_SINCE: (u32, u32) = (9, 1);

/// Has QEMU load the guest from a stream of ours, and counts the pages that went into it. `shares` says of each
/// block what is to be in it.
///
/// # Errors
/// [`Kind::Peer`] with QEMU's own words; [`Kind::Unsupported`] for images that leave blocks out.
pub(super) fn feed(
    image: &MappedRamFile,
    shares: &[Share],
    session: &mut Session,
    limit: Option<&RateLimit>,
    counters: &Counters,
    cancel: &Cancel,
) -> Result<()> {
    let layout = image.layout();
    if let Some(ignored) = layout.blocks.iter().find(|block| block.is_ignored()) {
        let clause = format!("the image leaves `{}` out (x-ignore-shared)", ignored.name);
        return Err(Error::new(Kind::Unsupported, clause).hint("restore with --via qemu"));
    }
    fed(session, |socket| {
        write_stream(image, shares, socket, counters, |bytes| {
            limit.inspect(|limit| limit.wait(bytes, cancel));
            if cancel.is_cancelled() { Err(Error::interrupted()) } else { Ok(()) }
        })
    })
}

/// Has QEMU load a stream that was compressed; `file` is its image.
///
/// # Errors
/// [`Kind::Peer`] with QEMU's own words; [`Kind::Damaged`] where it cannot be decompressed.
pub(super) fn feed_decompressed(
    stream: &StreamFile,
    file: &File,
    session: &mut Session,
    limit: Option<&RateLimit>,
    counters: &Counters,
    cancel: &Cancel,
) -> Result<()> {
    fed(session, |mut socket| {
        let mut bytes = vec![0; CHUNK as usize];
        let mut stream = stream.bytes(file)?;
        loop {
            match stream.read(&mut bytes)? {
                0 => return Ok(()),
                len => {
                    limit.inspect(|limit| limit.wait(len as u64, cancel));
                    if cancel.is_cancelled() {
                        return Err(Error::interrupted());
                    }
                    socket.write_all(&bytes[..len]).map_err(gone)?;
                    counters.bytes_written.fetch_add(len as u64, Ordering::Relaxed);
                }
            }
        }
    })
}

fn gone(error: std::io::Error) -> Error {
    Error::new(Kind::Peer, "QEMU stopped reading").because(error)
}

/// Has QEMU load what `write` writes into a socket.
fn fed(session: &mut Session, write: impl FnOnce(&UnixStream) -> Result<()> + Send) -> Result<()> {
    let (ours, theirs) =
        UnixStream::pair().map_err(|error| Error::io("cannot create a socket pair", error))?;
    session.give_fd(FEED, theirs.as_fd())?;
    drop(theirs);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let written = write(&ours);
            // A stream that breaks off must end, or QEMU waits for the rest and we for QEMU.
            let _ = ours.shutdown(std::net::Shutdown::Write);
            written
        });
        let outcome = load(session);
        // Whatever became of QEMU: the writer must not wait for it.
        let _ = ours.shutdown(std::net::Shutdown::Both);
        let written = writer
            .join()
            .unwrap_or_else(|_| Err(Error::new(Kind::Io, "the thread that feeds QEMU panicked")));
        match (outcome, written) {
            (Ok(()), Ok(())) => Ok(()),
            // An image that cannot be read is why QEMU's load broke off; a broken pipe is the echo of that.
            (Err(_), Err(error)) if error.kind() != Kind::Peer => Err(error),
            (Err(error), _) | (Ok(()), Err(error)) => Err(error),
        }
    })
}

fn load(session: &mut Session) -> Result<()> {
    let mut arguments = json!({ "uri": format!("fd:{FEED}") });
    if (session.version.major, session.version.minor) >= EXIT_ON_ERROR_SINCE {
        arguments["exit-on-error"] = false.into();
    }
    super::hold(session)?;
    session.incoming(FEED, arguments)?;
    let end = session.incoming_end()?;
    if end.status == "completed" { Ok(()) } else { Err(load_failed(&end)) }
}

/// Writes the whole stream. Before pages are sent, `hold_up` is asked whether and when that may be.
fn write_stream(
    image: &MappedRamFile,
    shares: &[Share],
    mut socket: &UnixStream,
    counters: &Counters,
    hold_up: impl Fn(u64) -> Result<()>,
) -> Result<()> {
    let layout = image.layout();
    let section_id = layout.ram.section_id;
    let setup =
        RamSetup { blocks: layout.blocks.iter().map(|block| block.entry()).collect(), multifd_flush: false };
    let mut send = |bytes: &mut Vec<u8>| {
        let sent = socket.write_all(bytes);
        bytes.clear();
        sent.map_err(gone)
    };
    let mut out = Vec::with_capacity(2 * CHUNK as usize);
    Preamble { configuration: layout.preamble.configuration.clone().map(plain) }.encode(&mut out);
    // A handler's place is beside the RAM's: before its list or behind it.
    let ram_at = layout.blocks.first().map_or(0, |block| block.header_at);
    let (before, behind): (Vec<_>, Vec<_>) = layout.early.iter().partition(|early| early.header_at < ram_at);
    let read = |section: &DeviceSection| image.read(FileRange::new(section.header_at, section.end));
    for section in before {
        out.extend_from_slice(&read(section)?);
    }
    setup.encode_section(section_id, &mut out);
    for section in behind {
        out.extend_from_slice(&read(section)?);
    }

    let mut records = RecordEncoder::new(&setup);
    for (index, block) in layout.blocks.iter().enumerate() {
        match shares.get(index) {
            Some(Share::Nothing) => continue,
            Some(Share::Zero(pages)) => {
                write_zeroes(section_id, index, block, pages, &mut records, &mut out, &mut send)?;
                continue;
            }
            Some(Share::Whole) | None => {}
        }
        let pages = image.pages(block)?;
        let page = block.page_size.bytes();
        let mut bytes = vec![0; CHUNK as usize];
        for at in (0..block.used_length).step_by(CHUNK as usize) {
            let len = (block.used_length - at).min(CHUNK);
            let first = at / page;
            let count = len / page;
            let is_there = |i: u64| pages.contains(PageIndex(first + i));
            let zeroes = block.used_length <= ZEROED_LEN_MAX;
            if !zeroes && !(0..count).any(is_there) {
                continue;
            }
            let bytes = &mut bytes[..len as usize];
            image.read_ram(block, &pages, at, bytes)?;
            let mut sent = 0;
            Item::Part { section_id }.encode(&mut out);
            for i in 0..count {
                let offset = at + i * page;
                if is_there(i) {
                    records.page_head(index, offset, &mut out);
                    out.extend_from_slice(&bytes[(i * page) as usize..((i + 1) * page) as usize]);
                    sent += page;
                } else if zeroes {
                    records.zero(index, offset, &mut out);
                }
            }
            records.eos(&mut out);
            Item::Footer { section_id }.encode(&mut out);
            hold_up(sent)?;
            send(&mut out)?;
            counters.bytes_written.fetch_add(sent, Ordering::Relaxed);
        }
    }
    Item::End { section_id }.encode(&mut out);
    records.eos(&mut out);
    Item::Footer { section_id }.encode(&mut out);
    out.extend_from_slice(&image.read(layout.device_state)?);
    if let Some(vmdesc) = layout.vmdesc {
        out.extend_from_slice(&image.read(vmdesc)?);
    }
    send(&mut out)
}

/// Writes pages of one block, all of them as zero.
fn write_zeroes(
    section_id: u32,
    index: usize,
    block: &BlockPlacement,
    pages: &PageSet,
    records: &mut RecordEncoder,
    out: &mut Vec<u8>,
    send: &mut impl FnMut(&mut Vec<u8>) -> Result<()>,
) -> Result<()> {
    for window in pages.windows() {
        Item::Part { section_id }.encode(out);
        for (start, end) in window.mask.runs() {
            for page in start..end {
                records.zero(index, (window.first.0 + page as u64) * block.page_size.bytes(), out);
            }
        }
        records.eos(out);
        Item::Footer { section_id }.encode(out);
        send(out)?;
    }
    Ok(())
}

/// The configuration of a stream whose pages are in it.
pub(super) fn plain(configuration: Configuration) -> Configuration {
    configuration.without_capability(wire::qemu::format::MAPPED_RAM)
}
