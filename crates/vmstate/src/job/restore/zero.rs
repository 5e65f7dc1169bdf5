//! What QEMU does not check after a load: that nothing is left in the target's memory that the image has as
//! zero.

use std::sync::Arc;

use mem::{BlockAddress, GuestRam};
use page::{PageRange, PageSet, Window};

use super::Seen;
use crate::qemu::{self, Session};
use crate::source::Image;
use crate::{Error, Kind, Result};

/// How much of a page run is read at once.
const CHUNK: usize = 1 << 20;

/// Whether the target's memory could be looked at.
pub(super) enum Verified {
    /// Everything that the image has as zero is zero.
    Zero,
    /// It could not, for this reason.
    Unseen(String),
}

/// Makes sure that the target's memory is zero wherever the image has no page. A loader skips those pages,
/// so what a memory file held before would stay: silent damage.
///
/// Costs a look at the presence map and at pages that are there without being in the image: of a fresh
/// QEMU, next to none.
///
/// # Errors
/// [`Kind::Incompatible`] where it is not.
pub(super) fn verify_zero(
    image: &Image,
    session: &mut Session,
    seen: &Seen,
    pid: Option<u32>,
) -> Result<Verified> {
    let found = match &seen.peer {
        Some(peer) => Ok(peer.clone()),
        None => qemu::find_process(session, pid).map(Arc::new),
    };
    let peer = match found {
        Ok(peer) => peer,
        Err(error) if error.kind() == Kind::Unsupported => return Ok(Verified::Unseen(error.chain())),
        Err(error) => return Err(error),
    };
    let targets = match qemu::with_addresses(&mut session.client, &peer, &seen.blocks) {
        Ok(targets) => targets,
        Err(error) if error.kind() == Kind::Unsupported => return Ok(Verified::Unseen(error.chain())),
        Err(error) => return Err(error),
    };
    let mut unseen = None;
    for (index, block) in image.blocks().iter().enumerate() {
        let name = block.name.as_str();
        let address = targets.iter().find(|target| target.name == name).and_then(|target| target.address);
        let Some(address) = address.filter(|address| *address != 0) else {
            unseen.get_or_insert(format!("QEMU does not tell where `{name}` is"));
            continue;
        };
        let place = BlockAddress {
            name: name.to_owned(),
            address,
            length: block.length,
            page_size: block.page_size.bytes(),
        };
        // Block by block: one that cannot be reached does not keep the others from being looked at.
        let ram = match GuestRam::attach(peer.clone(), &[place]) {
            Ok(ram) => ram,
            Err(error) => {
                unseen.get_or_insert(Error::new(Kind::Unsupported, name).because(error).chain());
                continue;
            }
        };
        let pages = image.pages(index)?;
        let unreadable = |error| Error::io(format!("cannot read the target's `{name}`"), error);
        for window in ram.windows(0).map_err(unreadable)? {
            // A target that was used before may have gibibytes to look at.
            if session.client.is_cancelled() {
                return Err(Error::interrupted());
            }
            let window = window.map_err(unreadable)?;
            for run in beside(&window, &pages) {
                if let Some(offset) =
                    first_byte_set(&ram, run, block.page_size.bytes()).map_err(unreadable)?
                {
                    let clause = format!(
                        "target's `{name}` holds data at {offset:#x}, where the image has zero and QEMU clears nothing"
                    );
                    return Err(Error::new(Kind::Incompatible, clause).hint(
                        "start the target with fresh memory: a memory file that was used before keeps what was in it",
                    ));
                }
            }
        }
    }
    Ok(unseen.map_or(Verified::Zero, Verified::Unseen))
}

/// The runs of pages that are in the window and not in the set.
pub(super) fn beside(window: &Window, pages: &PageSet) -> Vec<PageRange> {
    let first = window.first.0;
    let there = pages.mask_at(window.first);
    let mask = page::Mask(std::array::from_fn(|word| window.mask.0[word] & !there.0[word]));
    mask.runs().map(|(start, end)| PageRange::new(first + start as u64, first + end as u64)).collect()
}

/// The offset of the first byte in a run that is not zero.
fn first_byte_set(ram: &GuestRam, run: PageRange, page_size: u64) -> std::io::Result<Option<u64>> {
    let end = (run.end.0 * page_size).min(ram.block(0).length);
    let mut at = run.start.0 * page_size;
    let mut bytes = vec![0; CHUNK.min((end - at) as usize)];
    while at < end {
        let len = (end - at).min(CHUNK as u64) as usize;
        ram.read(0, at, &mut bytes[..len])?;
        if let Some(set) = bytes[..len].iter().position(|byte| *byte != 0) {
            return Ok(Some(at + set as u64));
        }
        at += len as u64;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use page::{Mask, PageCount, PageIndex};

    #[test]
    fn only_pages_that_the_image_lacks_are_looked_at() {
        let mut pages = PageSet::new(PageCount(600));
        pages.insert(PageRange::new(260, 270));
        let window = Window { first: PageIndex(256), mask: Mask::range(0, 20) };
        let runs: Vec<_> = beside(&window, &pages).iter().map(|r| (r.start.0, r.end.0)).collect();
        assert_eq!(runs, [(256, 260), (270, 276)]);
    }
}
