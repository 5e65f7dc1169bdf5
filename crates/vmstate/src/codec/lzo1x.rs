//! Compressing to LZO1X, the fast way: the first match that a small table of places finds is taken.
//!
//! The crate that decompresses compresses too, but looks for the best match and so does 11 MB/s where this does
//! hundreds; lzop is chosen for its speed. Any LZO1X decompressor reads both.
//!
//! LZO1X is a list of instructions. What is used of it, a match being `len` bytes from `distance` back, followed by
//! `after` literal bytes, 0 to 3:
//!
//! | bytes | meaning |
//! |---|---|
//! | `17 + n` as the first byte, literals | n literals, n from 1 to 238 |
//! | `n - 3`, literals | n literals, n from 4 to 18 |
//! | `0`, more of `n - 18`, literals | n literals, n above 18 |
//! | `(len - 1) << 5 \| low 3 bits of d << 2 \| after`, `d >> 3` | d = distance - 1 below 2048, len from 3 to 8 |
//! | `32 \| len - 2`, or `32`, more of `len - 33`; le16 `d << 2 \| after` | d = distance - 1 below 16384 |
//! | `16 \| high bit of d << 3 \| len - 2`, or `0` there, more of `len - 9`; le16 `d << 2 \| after` | d = distance - 16384, from 1 |
//! | `17`, `0`, `0` | the end |
//!
//! "More of n" is a zero for each 255 in n and the rest, 1 to 255.

/// A table of this many places, as a power of two: it stays in the first-level cache.
const TABLE_BITS: u32 = 13;
/// Shorter matches would save nothing.
const MATCH_LEN_MIN: usize = 4;
const SHORT_LEN_MAX: usize = 8;
const SHORT_DISTANCE_MAX: usize = 2048;
const MIDDLE_DISTANCE_MAX: usize = 16384;
const DISTANCE_MAX: usize = MIDDLE_DISTANCE_MAX + 0x7fff;
/// After so many misses, as a power of two, the steps become larger: what does not compress is passed over fast.
const SKIP_BITS: usize = 5;

/// Compresses `input`.
pub(super) fn compress(input: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(input.len() + input.len() / 16 + 64);
    let mut table = [0u32; 1 << TABLE_BITS];
    // What is before it has been written.
    let mut anchor = 0;
    let mut at = 1;
    let mut misses = 0;
    while let Some(word) = word(input, at) {
        let slot = (word.wrapping_mul(0x9e37_79b1) >> (32 - TABLE_BITS)) as usize;
        let candidate = std::mem::replace(&mut table[slot], at as u32) as usize;
        let distance = at - candidate;
        if distance > DISTANCE_MAX || input[candidate..candidate + MATCH_LEN_MIN] != word.to_le_bytes() {
            misses += 1;
            at += 1 + (misses >> SKIP_BITS);
            continue;
        }
        let len = MATCH_LEN_MIN + same(&input[candidate + MATCH_LEN_MIN..], &input[at + MATCH_LEN_MIN..]);
        literals(&mut out, &input[anchor..at]);
        copy(&mut out, distance, len);
        at += len;
        anchor = at;
        misses = 0;
    }
    literals(&mut out, &input[anchor..]);
    out.extend_from_slice(&[17, 0, 0]);
    out
}

fn word(input: &[u8], at: usize) -> Option<u32> {
    input.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// How many bytes the two have in common at their fronts.
fn same(a: &[u8], b: &[u8]) -> usize {
    let (a_words, _) = a.as_chunks::<8>();
    let (b_words, _) = b.as_chunks::<8>();
    let mut len = 0;
    for (a, b) in a_words.iter().zip(b_words) {
        let differ = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        if differ != 0 {
            return len + (differ.trailing_zeros() / 8) as usize;
        }
        len += 8;
    }
    len + a[len..].iter().zip(&b[len..]).take_while(|(a, b)| a == b).count()
}

/// Appends a run of literals; a short one is told in the instruction before it.
fn literals(out: &mut Vec<u8>, run: &[u8]) {
    let len = run.len();
    if out.is_empty() && (1..=238).contains(&len) {
        out.push(17 + len as u8);
    } else if (1..=3).contains(&len) && out.len() >= 2 {
        // The low two bits of the last byte but one are free for it in every match.
        let place = out.len() - 2;
        out[place] |= len as u8;
    } else if len > 18 {
        out.push(0);
        more(out, len - 18);
    } else if len > 3 {
        out.push(len as u8 - 3);
    }
    out.extend_from_slice(run);
}

/// Appends a match.
fn copy(out: &mut Vec<u8>, distance: usize, len: usize) {
    if len <= SHORT_LEN_MAX && distance <= SHORT_DISTANCE_MAX {
        let d = distance - 1;
        out.extend_from_slice(&[((len - 1) << 5 | (d & 7) << 2) as u8, (d >> 3) as u8]);
        return;
    }
    // The instruction, the most that it can hold of the length, and the distance.
    let (instruction, len_max, d) = match distance.checked_sub(MIDDLE_DISTANCE_MAX) {
        None | Some(0) => (32, 31, distance - 1),
        Some(d) => (16 | (d >> 14 << 3) as u8, 7, d & 0x3fff),
    };
    match len - 2 {
        len if len <= len_max => out.push(instruction | len as u8),
        len => {
            out.push(instruction);
            more(out, len - len_max);
        }
    }
    out.extend_from_slice(&((d << 2) as u16).to_le_bytes());
}

fn more(out: &mut Vec<u8>, mut n: usize) {
    while n > 255 {
        out.push(0);
        n -= 255;
    }
    out.push(n as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(input: &[u8], what: &str) {
        let compressed = compress(input);
        let mut out = vec![0; input.len()];
        let len = lzokay::decompress::decompress(&compressed, &mut out);
        assert!(len == Ok(input.len()) && out == input, "{what}: {len:?}");
    }

    /// Bytes that hardly repeat.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 24) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn runs_of_literals_of_every_length_come_out_again() {
        for len in (0..600).chain([10_000]) {
            check(&noise(len), &format!("{len} literals"));
            // The same before, between and behind matches.
            let run = noise(len);
            check(
                &[&[0; 40], &run[..], &[0; 40], &run[..], b"end"].concat(),
                &format!("{len} around matches"),
            );
        }
    }

    #[test]
    fn matches_of_every_length_and_distance_come_out_again() {
        let noise = noise(60_000);
        for distance in [4, 5, 8, 2047, 2048, 2049, 16383, 16384, 16385, 32768, 49150, 49151, 49152] {
            for len in [4, 5, 7, 8, 9, 10, 32, 33, 34, 35, 263, 264, 265, 519, 520, 5000] {
                let mut input = noise[..distance].to_vec();
                for i in 0..len {
                    input.push(input[i]);
                }
                input.extend_from_slice(b"\xff\xfe\xfd");
                check(&input, &format!("{len} bytes from {distance} back"));
            }
        }
        check(&vec![0; 1 << 20], "zero");
    }

    #[test]
    fn what_repeats_becomes_small_and_what_does_not_hardly_grows() {
        assert!(compress(&[0; 4096]).len() < 40);
        let text = "what repeats becomes small, ".repeat(100);
        assert!(compress(text.as_bytes()).len() < 60);
        assert!(compress(&noise(4096)).len() < 4096 + 40);
    }
}
