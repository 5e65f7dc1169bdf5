//! Which pages hold nothing but zeros, by the widest loads that the processor has.

use std::fmt;
use std::sync::OnceLock;

use page::Mask;

/// Whether any of `len` bytes at `base` is not zero.
///
/// # Safety
/// The bytes must be mapped and readable, and the processor must have what the function is compiled for.
type HasNonzero = unsafe fn(base: *const u8, len: usize) -> bool;

/// One way to look for zeros that this processor can take.
#[derive(Clone, Copy)]
pub struct ZeroScan {
    name: &'static str,
    has_nonzero: HasNonzero,
}

impl fmt::Debug for ZeroScan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ZeroScan({})", self.name)
    }
}

impl ZeroScan {
    /// The fastest way.
    pub fn best() -> ZeroScan {
        static BEST: OnceLock<ZeroScan> = OnceLock::new();
        *BEST.get_or_init(|| ZeroScan::available()[0])
    }

    /// All ways that this processor can take, the fastest first; the portable one is always the last.
    pub fn available() -> Vec<ZeroScan> {
        let mut ways = wide();
        ways.push(ZeroScan { name: "portable", has_nonzero: portable });
        ways
    }

    /// What the way is called: `avx512`, `avx2`, `sse2`, `neon` or `portable`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The pages of `mask` that hold a byte other than zero.
    ///
    /// Page `i` is the bytes from `base + i * grain`, cut at `len`; pages that are not in `mask` are not
    /// touched. When the bytes change meanwhile, a page may be found either way.
    ///
    /// # Safety
    /// The bytes of every page in `mask` must be mapped and readable.
    pub unsafe fn nonzero_mask(&self, base: *const u8, len: usize, grain: usize, mask: Mask) -> Mask {
        let mut nonzero = Mask::EMPTY;
        for (start, end) in mask.runs() {
            for page in start..end {
                let (from, to) = ((page * grain).min(len), ((page + 1) * grain).min(len));
                // SAFETY: the bytes are those of a page in the mask, which the caller vouches for; the way
                // is one that `available` found this processor to have.
                if unsafe { (self.has_nonzero)(base.wrapping_add(from), to - from) } {
                    nonzero.insert(page);
                }
            }
        }
        nonzero
    }
}

/// [`ZeroScan::nonzero_mask`] by the fastest way.
///
/// # Safety
/// The bytes of every page in `mask` must be mapped and readable.
pub unsafe fn nonzero_mask(base: *const u8, len: usize, grain: usize, mask: Mask) -> Mask {
    // SAFETY: the caller's promise is the one asked for.
    unsafe { ZeroScan::best().nonzero_mask(base, len, grain, mask) }
}

/// # Safety
/// The bytes must be mapped and readable.
unsafe fn portable(base: *const u8, len: usize) -> bool {
    let head = base.align_offset(align_of::<u64>()).min(len);
    // SAFETY: the first `head` bytes of the caller's.
    if unsafe { has_nonzero_byte(base, head) } {
        return true;
    }
    let words = (len - head) / size_of::<u64>();
    let aligned = base.wrapping_add(head).cast::<u64>();
    for i in 0..words {
        // SAFETY: an aligned word within the caller's bytes. Volatile, because others may write it.
        if unsafe { aligned.wrapping_add(i).read_volatile() } != 0 {
            return true;
        }
    }
    let done = head + words * size_of::<u64>();
    // SAFETY: what is left of the caller's bytes.
    unsafe { has_nonzero_byte(base.wrapping_add(done), len - done) }
}

/// # Safety
/// The bytes must be mapped and readable.
unsafe fn has_nonzero_byte(base: *const u8, len: usize) -> bool {
    // SAFETY: one of the caller's bytes. Volatile, because others may write it.
    (0..len).any(|i| unsafe { base.wrapping_add(i).read_volatile() } != 0)
}

#[cfg(target_arch = "x86_64")]
fn wide() -> Vec<ZeroScan> {
    let mut ways = Vec::new();
    if is_x86_feature_detected!("avx512f") {
        ways.push(ZeroScan { name: "avx512", has_nonzero: x86::avx512 });
    }
    if is_x86_feature_detected!("avx2") {
        ways.push(ZeroScan { name: "avx2", has_nonzero: x86::avx2 });
    }
    ways.push(ZeroScan { name: "sse2", has_nonzero: x86::sse2 });
    ways
}

#[cfg(target_arch = "aarch64")]
fn wide() -> Vec<ZeroScan> {
    vec![ZeroScan { name: "neon", has_nonzero: arm::neon }]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn wide() -> Vec<ZeroScan> {
    Vec::new()
}

/// Each way takes four vectors at a time and leaves what is less to the portable one.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::portable;

    /// # Safety
    /// The bytes must be mapped and readable, and the processor must have AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(base: *const u8, len: usize) -> bool {
        const STEP: usize = 4 * 64;
        let steps = len / STEP;
        for step in 0..steps {
            let at = base.wrapping_add(step * STEP);
            let load = |i: usize| {
                // SAFETY: 64 of the caller's bytes; the load takes any alignment.
                unsafe { _mm512_loadu_si512(at.wrapping_add(i * 64).cast()) }
            };
            let all = _mm512_or_si512(_mm512_or_si512(load(0), load(1)), _mm512_or_si512(load(2), load(3)));
            if _mm512_test_epi64_mask(all, all) != 0 {
                return true;
            }
        }
        // SAFETY: what is left of the caller's bytes.
        unsafe { portable(base.wrapping_add(steps * STEP), len - steps * STEP) }
    }

    /// # Safety
    /// The bytes must be mapped and readable, and the processor must have AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2(base: *const u8, len: usize) -> bool {
        const STEP: usize = 4 * 32;
        let steps = len / STEP;
        for step in 0..steps {
            let at = base.wrapping_add(step * STEP);
            let load = |i: usize| {
                // SAFETY: 32 of the caller's bytes; the load takes any alignment.
                unsafe { _mm256_loadu_si256(at.wrapping_add(i * 32).cast()) }
            };
            let all = _mm256_or_si256(_mm256_or_si256(load(0), load(1)), _mm256_or_si256(load(2), load(3)));
            if _mm256_testz_si256(all, all) == 0 {
                return true;
            }
        }
        // SAFETY: what is left of the caller's bytes.
        unsafe { portable(base.wrapping_add(steps * STEP), len - steps * STEP) }
    }

    /// SSE2 belongs to every x86-64.
    ///
    /// # Safety
    /// The bytes must be mapped and readable.
    #[target_feature(enable = "sse2")]
    pub(super) unsafe fn sse2(base: *const u8, len: usize) -> bool {
        const STEP: usize = 4 * 16;
        let steps = len / STEP;
        for step in 0..steps {
            let at = base.wrapping_add(step * STEP);
            let load = |i: usize| {
                // SAFETY: 16 of the caller's bytes; the load takes any alignment.
                unsafe { _mm_loadu_si128(at.wrapping_add(i * 16).cast()) }
            };
            let all = _mm_or_si128(_mm_or_si128(load(0), load(1)), _mm_or_si128(load(2), load(3)));
            if _mm_movemask_epi8(_mm_cmpeq_epi8(all, _mm_setzero_si128())) != 0xffff {
                return true;
            }
        }
        // SAFETY: what is left of the caller's bytes.
        unsafe { portable(base.wrapping_add(steps * STEP), len - steps * STEP) }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::portable;

    /// NEON belongs to every supported arm64.
    ///
    /// # Safety
    /// The bytes must be mapped and readable.
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn neon(base: *const u8, len: usize) -> bool {
        const STEP: usize = 4 * 16;
        let steps = len / STEP;
        for step in 0..steps {
            let at = base.wrapping_add(step * STEP);
            let load = |i: usize| {
                // SAFETY: 16 of the caller's bytes; the load takes any alignment.
                unsafe { vld1q_u8(at.wrapping_add(i * 16)) }
            };
            let all = vorrq_u8(vorrq_u8(load(0), load(1)), vorrq_u8(load(2), load(3)));
            if vmaxvq_u8(all) != 0 {
                return true;
            }
        }
        // SAFETY: what is left of the caller's bytes.
        unsafe { portable(base.wrapping_add(steps * STEP), len - steps * STEP) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nonzero(way: ZeroScan, bytes: &[u8], grain: usize, mask: Mask) -> Mask {
        // SAFETY: the slice is the test's own and every page is cut at its length.
        unsafe { way.nonzero_mask(bytes.as_ptr(), bytes.len(), grain, mask) }
    }

    #[test]
    fn every_way_agrees_with_the_portable_one_at_every_alignment_and_length() {
        // 1 KiB pages at every offset within two vectors of the widest kind, and tails of every length.
        let mut memory = vec![0u8; 4096];
        for way in ZeroScan::available() {
            for shift in 0..128 {
                for len in [0, 1, 7, 8, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2047] {
                    let range = shift..shift + len;
                    memory.fill(0xff);
                    memory[range.clone()].fill(0);
                    let mask = Mask::range(0, 3);
                    let zero = nonzero(way, &memory[range.clone()], 1024, mask);
                    assert_eq!(zero, Mask::EMPTY, "{way:?} looked beyond {len} bytes at {shift}");
                    for set in [0, len / 3, len / 2, len.saturating_sub(1)] {
                        if len == 0 {
                            continue;
                        }
                        memory[shift + set] = 0x80;
                        let found = nonzero(way, &memory[range.clone()], 1024, mask);
                        let page = set / 1024;
                        assert_eq!(
                            found,
                            Mask::range(page, page + 1),
                            "{way:?}: byte {set} of {len} at {shift}"
                        );
                        memory[shift + set] = 0;
                    }
                }
            }
        }
    }

    #[test]
    fn every_byte_of_a_page_counts() {
        let mut page = vec![0u8; 4096];
        for way in ZeroScan::available() {
            assert_eq!(nonzero(way, &page, 4096, Mask::FULL), Mask::EMPTY, "{way:?}");
            for i in 0..page.len() {
                page[i] = 1;
                assert_eq!(nonzero(way, &page, 4096, Mask::FULL), Mask::range(0, 1), "{way:?}: byte {i}");
                page[i] = 0;
            }
        }
    }

    #[test]
    fn unmarked_pages_are_left_out() {
        let memory = vec![1u8; 256 * 512];
        for way in ZeroScan::available() {
            let mut mask = Mask::range(3, 70);
            mask.insert(255);
            assert_eq!(nonzero(way, &memory, 512, mask), mask, "{way:?}");
        }
    }

    #[test]
    fn the_portable_way_is_always_there_and_last() {
        let ways = ZeroScan::available();
        assert_eq!(ways.last().map(ZeroScan::name), Some("portable"));
        assert_eq!(ZeroScan::best().name(), ways[0].name());
    }
}
