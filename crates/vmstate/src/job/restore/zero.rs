//! What QEMU does not check after a load: that nothing is left in the target's memory that the image has as
//! zero.

use io::is_zero;
use mem::{GuestRam, Outlook};
use page::{PageRange, PageSet, Window};

use super::Seen;
use crate::qemu::Session;
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
/// QEMU, next to none. The blocks in `zeroed` are left out: whoever filled them has made them zero there.
///
/// # Errors
/// [`Kind::Incompatible`] where it is not.
pub(super) fn verify_zero(
    image: &Image,
    session: &mut Session,
    seen: &mut Seen,
    zeroed: &[String],
    pid: Option<u32>,
) -> Result<Verified> {
    let outlook = seen.process(session, pid).and_then(|peer| {
        seen.find_addresses(session, &peer)?;
        let forbidden =
            |error| Error::new(Kind::Unsupported, "QEMU's process cannot be looked into").because(error);
        Outlook::of(peer).map_err(forbidden)
    });
    let outlook = match outlook {
        Ok(outlook) => outlook,
        Err(error) if error.kind() == Kind::Unsupported => return Ok(Verified::Unseen(error.chain())),
        Err(error) => return Err(error),
    };
    let mut unseen = None;
    for (index, block) in image.blocks().iter().enumerate() {
        let name = block.name.as_str();
        if zeroed.iter().any(|zeroed| zeroed == name) {
            continue;
        }
        let Some(place) = seen.place_of(name, block.length, block.page_size) else {
            unseen.get_or_insert(format!("QEMU does not tell where `{name}` is"));
            continue;
        };
        // Block by block: one that cannot be reached does not keep the others from being looked at.
        let ram = match outlook.attach(&[place]) {
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
            for run in runs_of(&beside(&window, &pages)) {
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

/// What of the window is not in the set.
pub(super) fn beside(window: &Window, pages: &PageSet) -> Window {
    let there = pages.mask_at(window.first);
    let mask = page::Mask(std::array::from_fn(|word| window.mask.0[word] & !there.0[word]));
    Window { mask, ..*window }
}

/// The pages of a window, as runs.
fn runs_of(window: &Window) -> impl Iterator<Item = PageRange> {
    let first = window.first.0;
    window.mask.runs().map(move |(start, end)| PageRange::new(first + start as u64, first + end as u64))
}

/// The offset of the first byte in a run that is not zero.
fn first_byte_set(ram: &GuestRam, run: PageRange, page_size: u64) -> std::io::Result<Option<u64>> {
    let end = (run.end.0 * page_size).min(ram.block(0).length);
    let mut at = run.start.0 * page_size;
    let mut bytes = vec![0; CHUNK.min((end - at) as usize)];
    while at < end {
        let len = (end - at).min(CHUNK as u64) as usize;
        ram.read(0, at, &mut bytes[..len])?;
        if !is_zero(&bytes[..len]) {
            let set = bytes[..len].iter().position(|byte| *byte != 0);
            return Ok(set.map(|set| at + set as u64));
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
        let runs: Vec<_> = runs_of(&beside(&window, &pages)).map(|r| (r.start.0, r.end.0)).collect();
        assert_eq!(runs, [(256, 260), (270, 276)]);
    }
}
