//! The body of the fuzz target of ends of images.

use super::ends::{OfMemory, end_of};

/// Where the device state begins, so that an offset is not taken for a length.
const BASE: u64 = 0x1000;

/// No bytes make the search for an image's end panic, an end that is found lies within them, and nothing is read behind it:
/// without what stands there it is the same.
pub fn image_end(data: &[u8]) {
    let find = |bytes: &[u8]| {
        let found = end_of(&OfMemory { bytes, base: BASE }, BASE, BASE + bytes.len() as u64);
        found.expect("memory can be read")
    };
    let Ok(end) = find(data) else { return };
    let len = usize::try_from(end - BASE).expect("a length in memory");
    assert_eq!(find(&data[..len]), Ok(end));
}
