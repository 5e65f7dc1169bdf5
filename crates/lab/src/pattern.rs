//! Judges the memory of the built-in guest, wherever a copy of it lies.
//!
//! The guest writes pages in an order that is known, so whenever it is stopped its memory looks like this, in that
//! order: pages of the current round, at most one page in the middle of being written, pages of the round before.
//! Everything else was lost, came late, or was mixed from two moments.

use std::convert::Infallible;
use std::error::Error;
use std::fmt;

use crate::guest::Guest;
use crate::layout::RamLayout;

/// The guest's pages are 4 KiB.
pub(crate) const PAGE_BYTES: usize = 4096;

/// The word at both ends of a page is `index | round << ROUND_SHIFT`.
const ROUND_SHIFT: u32 = 40;
const INDEX_MASK: u64 = (1 << ROUND_SHIFT) - 1;

/// The step of the sequence that fills a page: Knuth's MMIX multiplier, and an increment of one.
const MULTIPLIER: u64 = 6_364_136_223_846_793_005;

/// What a page that is not as the guest left it looks like. Pages are guest-physical addresses >> 12.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A word that the guest never writes at this page: lost, or of another page.
    #[error("page {page:#x} holds {first:#018x} … {last:#018x}, which is not its own")]
    Wrong {
        /// The page.
        page: u64,
        /// Its first 8 bytes, little-endian.
        first: u64,
        /// Its last 8 bytes, little-endian.
        last: u64,
    },
    /// The two ends of a page are of different rounds and the page is not the one being written.
    #[error("page {page:#x} begins with round {first_round} and ends with round {last_round}")]
    Torn {
        /// The page.
        page: u64,
        /// The round of its first 8 bytes.
        first_round: u32,
        /// The round of its last 8 bytes.
        last_round: u32,
    },
    /// A page of an old round where a page that the guest visits later is newer.
    #[error("page {page:#x} holds round {round}, where round {expected} belongs")]
    Stale {
        /// The page.
        page: u64,
        /// What it holds.
        round: u32,
        /// What it should hold.
        expected: u32,
    },
    /// Both ends are right, but what the guest filled in between is not.
    #[error("page {page:#x} of round {round} differs at offset {offset:#x}")]
    Middle {
        /// The page.
        page: u64,
        /// The round whose filling was expected.
        round: u32,
        /// The offset within the page of the first 8 bytes that differ.
        offset: usize,
    },
}

/// Why a verification did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VerifyError<E = Infallible> {
    /// The memory is not as the guest left it.
    Fault(Fault),
    /// A page could not be read.
    Read {
        /// The page, a guest-physical address >> 12.
        page: u64,
        /// What the reader said.
        source: E,
    },
}

impl<E> From<Fault> for VerifyError<E> {
    fn from(fault: Fault) -> VerifyError<E> {
        VerifyError::Fault(fault)
    }
}

impl<E> fmt::Display for VerifyError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VerifyError::Fault(fault) => fault.fmt(f),
            VerifyError::Read { page, .. } => write!(f, "cannot read page {page:#x}"),
        }
    }
}

impl<E: Error + 'static> Error for VerifyError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            VerifyError::Fault(_) => None,
            VerifyError::Read { source, .. } => Some(source),
        }
    }
}

/// Memory that is whole: where the guest stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// The round that the guest was in, or had just finished; 0 if it owns no page.
    pub round: u32,
    /// How many pages hold that round.
    pub pages_at_round: u64,
    /// How many pages were still to be visited. In round 1 their content is not defined and was not looked at.
    pub pages_before: u64,
    /// The page that was being written, if the guest was stopped right there.
    pub in_progress: Option<u64>,
}

/// The word that page `index` carries at both ends in `round`.
pub(crate) const fn word(index: u64, round: u32) -> u64 {
    index | (round as u64) << ROUND_SHIFT
}

/// The round of the page `index` whose first and last 8 bytes these are.
///
/// # Errors
/// [`Fault::Wrong`] when one of them is not this page's, [`Fault::Torn`] when their rounds differ.
pub fn check_page(first8: [u8; 8], last8: [u8; 8], index: u64) -> Result<u32, Fault> {
    let (first, last) = (u64::from_le_bytes(first8), u64::from_le_bytes(last8));
    match (round_of(first, index), round_of(last, index)) {
        (Some(round), Some(same)) if round == same => Ok(round),
        (Some(first_round), Some(last_round)) => Err(Fault::Torn { page: index, first_round, last_round }),
        _ => Err(Fault::Wrong { page: index, first, last }),
    }
}

fn round_of(word: u64, index: u64) -> Option<u32> {
    // The guest counts rounds from 1, so a round of 0 was not written by it.
    let round = (word >> ROUND_SHIFT) as u32;
    (word & INDEX_MASK == index && round > 0).then_some(round)
}

/// Verifies the memory of a `guest` that is not running, page by page in the order in which it writes them.
///
/// `read_page` is given an offset within `pc.ram`, a multiple of 4096, and fills the page; what is absent from an
/// image reads as zero. Every owned page must hold the current round or, behind the one place where the guest
/// stood, the round before.
///
/// # Errors
/// The first fault in the guest's own order, or the reader's first error.
pub fn verify<E>(
    guest: &Guest,
    layout: &RamLayout,
    mut read_page: impl FnMut(u64, &mut [u8; PAGE_BYTES]) -> Result<(), E>,
) -> Result<Pattern, VerifyError<E>> {
    let mut judge = Judge::new(guest.settings.fill_rounds);
    let mut bytes = [0; PAGE_BYTES];
    for page in guest.visited_pages(layout) {
        let offset = layout.block_offset(page << 12).expect("a guest owns nothing but RAM");
        read_page(offset, &mut bytes).map_err(|source| VerifyError::Read { page, source })?;
        judge.see(page, &bytes)?;
    }
    Ok(judge.pattern)
}

/// What was learnt from the pages seen so far.
struct Judge {
    fill_rounds: u32,
    first_page: u64,
    /// The first page that did not hold the current round.
    cursor: Option<u64>,
    pattern: Pattern,
}

impl Judge {
    fn new(fill_rounds: u32) -> Judge {
        let pattern = Pattern { round: 0, pages_at_round: 0, pages_before: 0, in_progress: None };
        Judge { fill_rounds, first_page: 0, cursor: None, pattern }
    }

    fn see(&mut self, page: u64, bytes: &[u8; PAGE_BYTES]) -> Result<(), Fault> {
        let checked = check_page(word_at(bytes, 0), word_at(bytes, PAGE_BYTES - 8), page);
        if self.pattern.round == 0 {
            self.start(page, bytes, checked)?;
        }
        let current = self.pattern.round;
        match checked {
            Ok(round) if round == current && self.cursor.is_none() => {
                self.pattern.pages_at_round += 1;
                self.check_middle(page, bytes, round)
            }
            Ok(round) if round + 1 == current => {
                self.cursor.get_or_insert(page);
                self.pattern.pages_before += 1;
                self.check_middle(page, bytes, round)
            }
            // A page of a newer round behind an older one: the older is the one that went wrong.
            Ok(round) if round == current => {
                let page = self.cursor.unwrap_or(page);
                Err(Fault::Stale { page, round: current - 1, expected: current })
            }
            Ok(round) if round == current + 1 => {
                Err(Fault::Stale { page: self.first_page, round: current, expected: round })
            }
            Ok(round) => Err(Fault::Stale { page, round, expected: current }),
            Err(_) if self.cursor.is_none() && self.is_in_progress(page, bytes) => {
                self.cursor = Some(page);
                self.pattern.in_progress = Some(page);
                Ok(())
            }
            // Ahead of the guest in its first round lies what the firmware left.
            Err(_) if current == 1 => {
                self.cursor.get_or_insert(page);
                self.pattern.pages_before += 1;
                Ok(())
            }
            Err(fault) => Err(fault),
        }
    }

    /// The first page names the round: it is the first that a round writes.
    fn start(
        &mut self,
        page: u64,
        bytes: &[u8; PAGE_BYTES],
        checked: Result<u32, Fault>,
    ) -> Result<(), Fault> {
        self.first_page = page;
        self.pattern.round = match checked {
            Ok(round) => round,
            Err(fault) => round_of(u64::from_le_bytes(word_at(bytes, 0)), page).ok_or(fault)?,
        };
        Ok(())
    }

    /// Whether this page was begun in the current round and still ends as the round before left it.
    fn is_in_progress(&self, page: u64, bytes: &[u8; PAGE_BYTES]) -> bool {
        let current = self.pattern.round;
        let last = u64::from_le_bytes(word_at(bytes, PAGE_BYTES - 8));
        u64::from_le_bytes(word_at(bytes, 0)) == word(page, current)
            && (current == 1 || last == word(page, current - 1))
    }

    fn check_middle(&self, page: u64, bytes: &[u8; PAGE_BYTES], round: u32) -> Result<(), Fault> {
        let round = round.min(self.fill_rounds);
        if round == 0 {
            return Ok(());
        }
        let mut expected = word(page, round);
        for offset in (8..PAGE_BYTES - 8).step_by(8) {
            expected = expected.wrapping_mul(MULTIPLIER).wrapping_add(1);
            if word_at(bytes, offset) != expected.to_le_bytes() {
                return Err(Fault::Middle { page, round, offset });
            }
        }
        Ok(())
    }
}

fn word_at(bytes: &[u8; PAGE_BYTES], offset: usize) -> [u8; 8] {
    bytes[offset..offset + 8].try_into().expect("a range of 8 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::GuestSettings;
    use crate::layout::MachineKind;

    const LAYOUT: RamLayout = RamLayout::new(MachineKind::Q35, 64 << 20);

    /// The memory of a guest of eight pages that was stopped after it had written `written` pages of `round`.
    struct Memory {
        guest: Guest,
        pages: Vec<[u8; PAGE_BYTES]>,
    }

    impl Memory {
        fn new(fill_rounds: u32, round: u32, written: u64) -> Memory {
            Memory::in_steps_of(1, fill_rounds, round, written)
        }

        fn in_steps_of(stride: u32, fill_rounds: u32, round: u32, written: u64) -> Memory {
            let settings =
                GuestSettings { pages_low_max: 8, fill_rounds, stride, ..GuestSettings::default() };
            let mut memory = Memory { guest: Guest::new(settings), pages: vec![[0; PAGE_BYTES]; 8] };
            for i in 0..8 {
                for past in 1..round + u32::from(i < written) {
                    memory.write(i * u64::from(stride) % 8, past);
                }
            }
            memory
        }

        fn write(&mut self, page: u64, round: u32) {
            let seed = word(0x200 + page, round);
            let bytes = &mut self.pages[page as usize];
            if round <= self.guest.settings.fill_rounds {
                let mut next = seed;
                for chunk in bytes.chunks_exact_mut(8) {
                    chunk.copy_from_slice(&next.to_le_bytes());
                    next = next.wrapping_mul(MULTIPLIER).wrapping_add(1);
                }
            }
            bytes[..8].copy_from_slice(&seed.to_le_bytes());
            bytes[4088..].copy_from_slice(&seed.to_le_bytes());
        }

        fn begin(&mut self, page: u64, round: u32) {
            self.pages[page as usize][..8].copy_from_slice(&word(0x200 + page, round).to_le_bytes());
        }

        fn verify(&self) -> Result<Pattern, VerifyError> {
            verify(&self.guest, &LAYOUT, |offset, bytes| {
                *bytes = self.pages[(offset >> 12) as usize - 0x200];
                Ok(())
            })
        }
    }

    #[test]
    fn a_guest_stopped_anywhere_is_whole() {
        for fill_rounds in [0, 1, u32::MAX] {
            for (round, written) in [(1, 1), (1, 8), (2, 1), (2, 5), (7, 3), (7, 8)] {
                let pattern = Memory::new(fill_rounds, round, written).verify();
                let expected =
                    Pattern { round, pages_at_round: written, pages_before: 8 - written, in_progress: None };
                assert_eq!(pattern, Ok(expected), "fill {fill_rounds}, round {round}, {written} pages");
            }
        }
    }

    #[test]
    fn a_guest_that_scatters_is_judged_in_its_own_order() {
        let pattern = Memory::in_steps_of(5, 1, 7, 3).verify();
        let expected = Pattern { round: 7, pages_at_round: 3, pages_before: 5, in_progress: None };
        assert_eq!(pattern, Ok(expected));
        let mut memory = Memory::in_steps_of(5, 1, 7, 3);
        // 0, 5, 2, and then this one.
        memory.write(4, 7);
        let expected = Fault::Stale { page: 0x207, round: 6, expected: 7 };
        assert_eq!(memory.verify(), Err(VerifyError::Fault(expected)));
    }

    #[test]
    fn a_guest_stopped_between_two_writes_of_a_page_is_whole() {
        for (round, page) in [(1, 0), (1, 4), (2, 0), (5, 7)] {
            let mut memory = Memory::new(0, round, page);
            memory.begin(page, round);
            let expected = Pattern {
                round,
                pages_at_round: page,
                pages_before: 7 - page,
                in_progress: Some(0x200 + page),
            };
            assert_eq!(memory.verify(), Ok(expected), "round {round}, page {page}");
        }
    }

    #[test]
    fn every_kind_of_damage_names_its_page() {
        type Damage = fn(&mut Memory);
        let wrong = |page, first, last| Fault::Wrong { page, first, last };
        let cases: [(&str, Damage, Fault); 9] = [
            ("a lost page", |memory| memory.pages[2] = [0; PAGE_BYTES], wrong(0x202, 0, 0)),
            ("a lost first page", |memory| memory.pages[0] = [0; PAGE_BYTES], wrong(0x200, 0, 0)),
            (
                "another page's content",
                |memory| memory.pages[3] = memory.pages[2],
                wrong(0x203, word(0x202, 5), word(0x202, 5)),
            ),
            (
                "one stale page among new ones",
                |memory| memory.write(1, 4),
                Fault::Stale { page: 0x201, round: 4, expected: 5 },
            ),
            (
                "a stale first page",
                |memory| memory.write(0, 4),
                Fault::Stale { page: 0x200, round: 4, expected: 5 },
            ),
            (
                "a page two rounds old",
                |memory| memory.write(6, 3),
                Fault::Stale { page: 0x206, round: 3, expected: 5 },
            ),
            (
                "a torn page behind the cursor",
                |memory| memory.begin(6, 5),
                Fault::Torn { page: 0x206, first_round: 5, last_round: 4 },
            ),
            (
                "a page begun at the cursor that ends two rounds old",
                |memory| {
                    memory.write(5, 3);
                    memory.begin(5, 5);
                },
                Fault::Torn { page: 0x205, first_round: 5, last_round: 3 },
            ),
            (
                "a flipped byte in the middle",
                |memory| memory.pages[7][0x123] ^= 1,
                Fault::Middle { page: 0x207, round: 4, offset: 0x120 },
            ),
        ];
        for (name, damage, expected) in cases {
            let mut memory = Memory::new(u32::MAX, 5, 5);
            damage(&mut memory);
            assert_eq!(memory.verify(), Err(VerifyError::Fault(expected)), "{name}");
        }
    }

    #[test]
    fn a_page_lost_in_the_first_round_shows_by_the_pages_after_it() {
        let mut memory = Memory::new(0, 1, 5);
        memory.pages[2] = [0; PAGE_BYTES];
        assert_eq!(
            memory.verify(),
            Err(VerifyError::Fault(Fault::Stale { page: 0x202, round: 0, expected: 1 }))
        );
    }

    #[test]
    fn a_reader_that_fails_is_named_with_its_page() {
        let result = verify(&Guest::default(), &LAYOUT, |_, _| Err("torn cable"));
        assert_eq!(result, Err(VerifyError::Read { page: 0x200, source: "torn cable" }));
    }

    #[test]
    fn both_ends_must_agree_and_belong_to_the_page() {
        let bytes = |index, round| word(index, round).to_le_bytes();
        assert_eq!(check_page(bytes(7, 3), bytes(7, 3), 7), Ok(3));
        assert_eq!(
            check_page(bytes(7, 3), bytes(7, 2), 7),
            Err(Fault::Torn { page: 7, first_round: 3, last_round: 2 })
        );
        assert_eq!(check_page(bytes(7, 0), bytes(7, 0), 7), Err(Fault::Wrong { page: 7, first: 7, last: 7 }));
        assert_eq!(
            check_page(bytes(8, 1), bytes(7, 1), 7),
            Err(Fault::Wrong { page: 7, first: word(8, 1), last: word(7, 1) })
        );
    }
}
