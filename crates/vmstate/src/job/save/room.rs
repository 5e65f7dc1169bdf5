//! Whether a guest fits where it is to go, and how fast that place is, found out before the guest is stopped.

use io::{Rates, Target};
use mem::GuestRam;

use super::{SaveFormat, SaveSettings};
use crate::job::{DirectIo, Observer, untold_pages};
use crate::qemu::Probe;
use crate::sink::MappedRamComposition;
use crate::{Error, Result};

/// What an image has beside pages and bitmaps, generously: device state and its description.
const TAIL_LEN: u64 = 1 << 20;
/// What a block has beside its pages and bits: its entry in the list, its header, the ends of blocks on the disk.
const HEAD_LEN: u64 = 16 << 10;
/// A guest of fewer bytes is not worth trying how fast the target is.
const MEASURED_LEN_MIN: u64 = 256 << 20;

/// How many bytes the pages have that are there: the most that a save can write of them.
pub(super) fn present_bytes(ram: &GuestRam) -> Result<u64> {
    let mut sum = 0;
    for region in 0..ram.regions() {
        let name = &ram.block(region).name;
        let untold = |error| untold_pages(name, error);
        for window in ram.windows(region).map_err(untold)? {
            let piece = ram.piece(region, &window.map_err(untold)?, 0);
            sum += piece.bytes_in(&piece.mask);
        }
    }
    Ok(sum)
}

/// How many bytes the pages have that would be written now: those that are there and not zero.
///
/// They are read like any memory, not supplied as to lanes: what was supplied once counts as part of the image.
fn data_bytes(ram: &GuestRam) -> Result<u64> {
    let mut sum = 0;
    let mut bytes = Vec::new();
    for region in 0..ram.regions() {
        let block = ram.block(region);
        let untold = |error| untold_pages(&block.name, error);
        let unread = |error| Error::io(format!("cannot read `{}`", block.name), error);
        for window in ram.windows(region).map_err(untold)? {
            let window = window.map_err(untold)?;
            for (start, end) in window.mask.runs() {
                let at = |page: usize| ((window.first.0 + page as u64) * block.page_size).min(block.length);
                // A window at the most.
                bytes.resize((at(end) - at(start)) as usize, 0);
                ram.read(region, at(start), &mut bytes).map_err(unread)?;
                let pages = bytes.chunks(block.page_size as usize);
                sum += pages
                    .filter(|page| page.iter().any(|byte| *byte != 0))
                    .map(|page| page.len() as u64)
                    .sum::<u64>();
            }
        }
    }
    Ok(sum)
}

/// The bytes that an image takes beside its pages, at the most.
pub(super) fn metadata_bytes(ram: &GuestRam, format: SaveFormat) -> u64 {
    let of_block = |region| {
        let pages = ram.block(region).length / ram.block(region).page_size;
        match format.has_places() {
            // A bit in the bitmap, and the ends of it and of the block's header.
            true => pages / 8 + HEAD_LEN,
            // A word and perhaps a byte.
            false => pages * 9 + HEAD_LEN,
        }
    };
    (0..ram.regions()).map(of_block).sum::<u64>() + TAIL_LEN
}

/// Refuses a target that has too little room for the guest as it is now.
///
/// A device must hold the whole layout. Elsewhere only pages that are there take room; where those that are
/// there seem too many, it is looked which of them are zero, while the guest runs on.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io), as of a disk that is full; [`Kind::Misuse`](crate::Kind::Misuse) for a
/// device that is too small.
pub(super) fn require(
    probe: &Probe,
    ram: &GuestRam,
    present: u64,
    target: &Target,
    format: SaveFormat,
) -> Result<()> {
    let Some(room) = target.room_bytes()? else { return Ok(()) };
    if target.is_device() {
        let needs = MappedRamComposition::pages_end(probe, target.start())? - target.start() + TAIL_LEN;
        if needs > room {
            let (path, start) = (target.path().to_owned(), target.start());
            return Err(io::DraftError::TooSmall { path, start, has: room, needs }.into());
        }
        return Ok(());
    }
    // How much of it compression leaves is found out by compressing; a disk that is full by then costs the save only.
    if format.is_compressed() || present.saturating_add(metadata_bytes(ram, format)) <= room {
        return Ok(());
    }
    // What is beside the pages is only an estimate, and must not be what refuses a guest.
    let data = data_bytes(ram)?;
    if data <= room {
        return Ok(());
    }
    let clause = format!(
        "the file system of {} has {} MiB left, the guest's memory takes {} MiB",
        target.path().display(),
        room >> 20,
        data.div_ceil(1 << 20)
    );
    Err(Error::io(clause, std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error())))
}

/// Tries how fast the target is, where the choice is ours and there is enough to be written, and leaves direct
/// I/O where it is a trap.
///
/// # Errors
/// What makes any write fail.
pub(super) fn settle_direct_io(
    settings: &SaveSettings,
    target: &mut Target,
    bytes: u64,
    observer: &dyn Observer,
) -> Result<Option<Rates>> {
    if !is_worth_measuring(settings.direct_io, bytes) {
        return Ok(None);
    }
    let rates = target.measure()?;
    if let Some(reason) = rates.and_then(why_not_direct) {
        observer.note(&format!("direct I/O is left: {reason}"));
        target.leave_direct(&reason);
    }
    Ok(rates)
}

fn is_worth_measuring(choice: DirectIo, bytes: u64) -> bool {
    choice == DirectIo::Auto && bytes >= MEASURED_LEN_MIN
}

/// A target that takes fewer bytes a second, by either way, is taken for one that seeks.
const SEEKS_BELOW_BYTES_PER_S: u64 = 250_000_000;

/// What such a target writes in the time of a short seek: 4 ms at 125 MB/s.
pub(super) const SEEK_BYTES: usize = 512 << 10;

/// Whether a target of these rates wants fewer, larger writes in order.
pub(super) fn wants_order(rates: Rates) -> bool {
    rates.best_bytes_per_s() < SEEKS_BELOW_BYTES_PER_S
}

/// Why direct I/O is left at these rates, if it is.
pub(in crate::job) fn why_not_direct(rates: Rates) -> Option<String> {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    rates.is_trap().then(|| {
        format!(
            "a short trial wrote {:.1} MB/s with it and {:.1} MB/s without",
            mb(rates.direct_bytes_per_s),
            mb(rates.buffered_bytes_per_s)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_ours_to_choose_and_large_is_measured() {
        for (choice, bytes, expected) in [
            (DirectIo::Auto, 256 << 20, true),
            (DirectIo::Auto, (256 << 20) - 1, false),
            (DirectIo::On, 1 << 40, false),
            (DirectIo::Off, 1 << 40, false),
        ] {
            assert_eq!(is_worth_measuring(choice, bytes), expected, "{choice:?} {bytes}");
        }
    }

    #[test]
    fn a_disk_that_seeks_is_written_in_order() {
        for (direct_bytes_per_s, buffered_bytes_per_s, expected) in [
            (180_000_000, 120_000_000, true),
            (3_600_000, 2_000_000_000, false),
            (250_000_000, 250_000_000, false),
        ] {
            let rates = Rates { direct_bytes_per_s, buffered_bytes_per_s };
            assert_eq!(wants_order(rates), expected, "{rates:?}");
        }
    }

    #[test]
    fn a_trap_is_told_with_both_rates() {
        let rates =
            |direct_bytes_per_s, buffered_bytes_per_s| Rates { direct_bytes_per_s, buffered_bytes_per_s };
        assert_eq!(
            why_not_direct(rates(3_600_000, 4_000_000_000)).as_deref(),
            Some("a short trial wrote 3.6 MB/s with it and 4000.0 MB/s without")
        );
        assert_eq!(why_not_direct(rates(2_000_000_000, 900_000_000)), None);
    }
}
