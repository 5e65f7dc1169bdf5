//! The rest of a mapped guest's memory: read into the page cache, where its mapping finds it.

use std::sync::atomic::Ordering;

use io::{Cancel, Counters};
use rustix::fs::Advice;

use crate::job::Observer;
use crate::source::MappedRamFile;
use crate::{Error, Result};

/// How much is read at once.
const WINDOW: u64 = 1 << 20;
/// How many windows the kernel is told of before they are read: what keeps a disk busy.
const AHEAD: usize = 16;
/// Gaps between pages that are no longer than this are read along: that is cheaper than a request more.
const GAP: u64 = 96 << 10;

/// Reads all pages of the image through the page cache. `false`, with a warning, where it does not hold them
/// afterwards: it is the kernel's to say what stays, and the guest would wait for the disk after all.
///
/// The guest's own faults find them there. To touch them in QEMU's own mapping is nobody else's to do.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io) where the image cannot be read, [`Kind::Interrupted`](crate::Kind::Interrupted).
pub(super) fn prefetch(
    image: &MappedRamFile,
    data_bytes: u64,
    counters: &Counters,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<bool> {
    let windows = windows(image)?;
    let mut buffer = vec![0; WINDOW as usize];
    for index in 0..windows.len() {
        if cancel.is_cancelled() {
            return Err(Error::interrupted());
        }
        let told = if index == 0 { 0..AHEAD } else { index + AHEAD - 1..index + AHEAD };
        for (start, end) in windows.get(told.start..told.end.min(windows.len())).unwrap_or_default() {
            // Advice: a file system that takes none is read all the same.
            let _ = rustix::fs::fadvise(
                image.file(),
                *start,
                std::num::NonZeroU64::new(end - start),
                Advice::WillNeed,
            );
        }
        let (start, end) = windows[index];
        image.read_at(&mut buffer[..(end - start) as usize], start)?;
        counters.bytes_written.fetch_add(end - start, Ordering::Relaxed);
    }
    // A kernel that does not tell what it holds was seen to read everything.
    let Ok(cached) = io::cached_bytes(image.file(), 0, image.layout().file_len) else { return Ok(true) };
    let is_held = cached >= data_bytes - data_bytes / 32;
    if !is_held {
        observer.warn(&format!(
            "the page cache holds {} of the image's {} MiB: the rest has to be read again",
            cached >> 20,
            data_bytes >> 20
        ));
    }
    Ok(is_held)
}

/// Where the image's pages lie, in pieces that are read at once, by block and address.
fn windows(image: &MappedRamFile) -> Result<Vec<(u64, u64)>> {
    let mut windows = Vec::new();
    for block in image.layout().blocks.iter().filter(|block| !block.is_ignored()) {
        let page = block.page_size.bytes();
        let mut open: Option<(u64, u64)> = None;
        image.runs(block, |run| {
            let (start, end) = (block.pages.start + run.start.0 * page, block.pages.start + run.end.0 * page);
            match &mut open {
                Some(extent) if start - extent.1 <= GAP => extent.1 = end,
                _ => {
                    cut(open.take(), &mut windows);
                    open = Some((start, end));
                }
            }
        })?;
        cut(open, &mut windows);
    }
    Ok(windows)
}

/// Cuts an extent into windows.
fn cut(extent: Option<(u64, u64)>, windows: &mut Vec<(u64, u64)>) {
    let Some((start, end)) = extent else { return };
    windows.extend((start..end).step_by(WINDOW as usize).map(|at| (at, (at + WINDOW).min(end))));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_cut_without_a_gap() {
        let mut windows = vec![(0, 7)];
        cut(Some((4096, 4096 + 2 * WINDOW + 5)), &mut windows);
        cut(None, &mut windows);
        let ends = [4096, 4096 + WINDOW, 4096 + 2 * WINDOW, 4096 + 2 * WINDOW + 5];
        assert_eq!(windows, [(0, 7), (ends[0], ends[1]), (ends[1], ends[2]), (ends[2], ends[3])]);
    }
}
