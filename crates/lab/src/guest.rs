//! The boot image of the built-in guest: what it does is told in `guest/guest.S`.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::layout::{GuestRange, RamLayout};

/// The two sectors, as assembled from `guest/guest.S`; a test assembles them again.
const CODE: &[u8; 1024] = include_bytes!("../guest/guest.bin");

/// Firmware takes a disk of a megabyte seriously; one of two sectors has no geometry.
const IMAGE_BYTES: usize = 1 << 20;

// Where guest.S keeps its parameters, each a little-endian u32.
const PAGES_LOW_MAX: usize = 0x1e8;
const PAGES_HIGH_MAX: usize = 0x1ec;
const HALT_AFTER_ROUND: usize = 0x1f0;
const FILL_ROUNDS: usize = 0x1f4;
const PAUSE_TICKS: usize = 0x1f8;
const STRIDE: usize = 0x3fc;

/// A stride that scatters: the odd number nearest to 2^32 divided by the golden ratio.
pub const SCATTERED: u32 = 0x9e37_79b1;

/// The first page that the guest owns in low RAM: 2 MiB.
const LOW_FIRST: u64 = 0x200;
/// How many pages the guest leaves to the firmware's tables at the end of low RAM: 2 MiB.
const LOW_MARGIN: u64 = 0x200;
/// The first page of high RAM: 4 GiB.
const HIGH_FIRST: u64 = 0x10_0000;
/// The page after the last that the guest maps: 64 GiB.
const MAPPED_END: u64 = 64 << 18;

/// What the guest is told to do. The default owns all the RAM it can, touches the first and last 8 bytes of each
/// page, and never rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSettings {
    /// At most this many pages of 4 KiB are owned below the PCI hole, from 2 MiB up.
    pub pages_low_max: u32,
    /// At most this many pages of 4 KiB are owned from 4 GiB up.
    pub pages_high_max: u32,
    /// Halts for good after this round, so that the memory stands still; 0 is never.
    pub halt_after_round: u32,
    /// Up to and including this round the whole page is filled with numbers that do not compress; later rounds
    /// leave all but the first and last 8 bytes of the page alone. `u32::MAX` fills in every round.
    pub fill_rounds: u32,
    /// How many ticks of the timer (55 ms each) the guest sleeps after each round.
    pub pause_ticks: u32,
    /// How many pages the guest goes on by, modulo the power of two that holds a range, leaving out what lies beyond
    /// its end. Odd, so that it comes by all of them: 1 is ascending order, [`SCATTERED`] none that one sees.
    pub stride: u32,
}

impl Default for GuestSettings {
    fn default() -> GuestSettings {
        GuestSettings {
            pages_low_max: u32::MAX,
            pages_high_max: u32::MAX,
            halt_after_round: 0,
            fill_rounds: 0,
            pause_ticks: 0,
            stride: 1,
        }
    }
}

impl GuestSettings {
    /// A guest that owns little of its RAM, whatever there is, and sleeps one tick after each round: it counts on
    /// without burning a processor.
    pub fn idle(pages_low_max: u32) -> GuestSettings {
        GuestSettings { pages_low_max, pages_high_max: 0, pause_ticks: 1, ..GuestSettings::default() }
    }
}

/// The built-in guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    /// What it is told to do.
    pub settings: GuestSettings,
}

impl Guest {
    /// A guest with these settings.
    ///
    /// # Panics
    /// Where the stride is even: the guest would never see half of its pages.
    pub const fn new(settings: GuestSettings) -> Guest {
        assert!(settings.stride % 2 == 1, "an even stride leaves pages out");
        Guest { settings }
    }

    /// The disk image: boot it as the first disk, read-only.
    pub fn image_bytes(&self) -> Vec<u8> {
        let mut image = vec![0; IMAGE_BYTES];
        image[..CODE.len()].copy_from_slice(CODE);
        for (offset, value) in [
            (PAGES_LOW_MAX, self.settings.pages_low_max),
            (PAGES_HIGH_MAX, self.settings.pages_high_max),
            (HALT_AFTER_ROUND, self.settings.halt_after_round),
            (FILL_ROUNDS, self.settings.fill_rounds),
            (PAUSE_TICKS, self.settings.pause_ticks),
            (STRIDE, self.settings.stride),
        ] {
            image[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        }
        image
    }

    /// Writes the disk image to `path`.
    ///
    /// # Errors
    /// [`Error::File`] when the file cannot be written.
    pub fn write_image(&self, path: &Path) -> Result<()> {
        fs::write(path, self.image_bytes()).map_err(Error::file("write", path))
    }

    /// The guest-physical pages that the guest owns in this machine. It visits the one range, then the other.
    ///
    /// The guest learns the same from CMOS 0x34-0x35 and 0x5b-0x5d, in units of 64 KiB.
    pub fn owned_ranges(&self, layout: &RamLayout) -> [GuestRange; 2] {
        let low_pages = (layout.below_4g >> 16 << 4).saturating_sub(LOW_FIRST + LOW_MARGIN);
        let high_pages = (layout.above_4g >> 16 << 4).min(MAPPED_END - HIGH_FIRST);
        [
            GuestRange {
                start: LOW_FIRST,
                end: LOW_FIRST + low_pages.min(self.settings.pages_low_max.into()),
            },
            GuestRange {
                start: HIGH_FIRST,
                end: HIGH_FIRST + high_pages.min(self.settings.pages_high_max.into()),
            },
        ]
    }

    /// The same pages in the order in which it visits them.
    pub fn visited_pages(&self, layout: &RamLayout) -> impl Iterator<Item = u64> + use<> {
        let stride = u64::from(self.settings.stride);
        self.owned_ranges(layout).into_iter().flat_map(move |range| {
            let count = range.end - range.start;
            let mask = u64::MAX >> (count.saturating_sub(1) | 1).leading_zeros();
            let offsets = (0..=mask).map(move |i| i.wrapping_mul(stride) & mask);
            offsets.filter(move |offset| *offset < count).map(move |offset| range.start + offset)
        })
    }

    /// How many pages the guest owns in this machine; what it prints after `P`.
    pub fn owned_pages(&self, layout: &RamLayout) -> u64 {
        self.owned_ranges(layout).iter().map(|range| range.end - range.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MachineKind;

    #[test]
    fn parameters_are_patched_where_the_source_keeps_them() {
        // The committed bytes carry the defaults, so an offset that is off by a field shows here.
        let defaults = Guest::default().image_bytes();
        assert_eq!(defaults[..CODE.len()], CODE[..]);

        let settings = GuestSettings {
            pages_low_max: 0x0403_0201,
            pages_high_max: 0x0807_0605,
            halt_after_round: 0x0c0b_0a09,
            fill_rounds: 0x100f_0e0d,
            pause_ticks: 0x1413_1211,
            stride: 0x1817_1615,
        };
        let patched = Guest::new(settings).image_bytes();
        assert_eq!(patched[0x1e8..0x1fc], (1..=20).collect::<Vec<u8>>()[..]);
        assert_eq!(patched[0x1fc..0x200], [0, 0, 0x55, 0xaa]);
        assert_eq!(patched[..0x1e8], defaults[..0x1e8]);
        assert_eq!(patched[0x200..0x3fc], defaults[0x200..0x3fc]);
        assert_eq!(patched[0x3fc..0x400], (21..=24).collect::<Vec<u8>>()[..]);
        assert_eq!(patched[0x400..], defaults[0x400..]);
    }

    #[test]
    fn every_owned_page_is_visited_once_whatever_the_stride() {
        let layout = RamLayout::new(MachineKind::Pc, 5120 << 20);
        for (low, high) in [(0, 0), (1, 0), (2, 1), (3, 4), (3000, 1000), (4096, 4097)] {
            for stride in [1, 3, SCATTERED, u32::MAX] {
                let limits = GuestSettings { pages_low_max: low, pages_high_max: high, ..Default::default() };
                let guest = Guest::new(GuestSettings { stride, ..limits });
                let mut visited: Vec<_> = guest.visited_pages(&layout).collect();
                let name = format!("{low} and {high} pages, stride {stride:#x}");
                if stride == SCATTERED && low == 3000 {
                    let near = visited.windows(2).filter(|two| two[0].abs_diff(two[1]) < 64).count();
                    assert_eq!(near, 0, "{name}");
                }
                if stride != 1 {
                    visited.sort();
                }
                let ascending: Vec<_> = guest
                    .owned_ranges(&layout)
                    .into_iter()
                    .flat_map(|range| range.start..range.end)
                    .collect();
                assert_eq!(visited, ascending, "{name}");
            }
        }
    }

    #[test]
    fn owned_ranges_follow_the_layout_and_the_limits() {
        let all = GuestSettings::default();
        let few = GuestSettings { pages_low_max: 16, pages_high_max: 4, ..all };
        for (machine, ram_mib, settings, low_end, high_end) in [
            (MachineKind::Q35, 64, all, 0x3e00, HIGH_FIRST),
            (MachineKind::Pc, 5120, all, 0xbfe00, HIGH_FIRST + 0x80000),
            (MachineKind::Q35, 5120, all, 0x7fe00, HIGH_FIRST + 0xc0000),
            (MachineKind::Q35, 128 << 10, all, 0x7fe00, MAPPED_END),
            (MachineKind::Q35, 5120, few, 0x210, HIGH_FIRST + 4),
        ] {
            let layout = RamLayout::new(machine, ram_mib << 20);
            let [low, high] = Guest::new(settings).owned_ranges(&layout);
            assert_eq!((low.start, low.end), (0x200, low_end), "{machine:?} {ram_mib} MiB");
            assert_eq!((high.start, high.end), (HIGH_FIRST, high_end), "{machine:?} {ram_mib} MiB");
        }
    }
}
