//! Where an x86 machine of QEMU puts its RAM in guest-physical space.

/// The two families of x86 machines; every `pc-q35-N.M` is a [`MachineKind::Q35`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MachineKind {
    /// The i440FX board, `pc`.
    Pc,
    /// The Q35 board, `q35`.
    Q35,
}

impl MachineKind {
    /// The name for `-machine`: the newest version the QEMU at hand has.
    pub const fn name(self) -> &'static str {
        match self {
            MachineKind::Pc => "pc",
            MachineKind::Q35 => "q35",
        }
    }
}

/// Where RAM continues that does not fit below the PCI hole.
const ABOVE_4G: u64 = 1 << 32;

/// How a machine's one RAM block (`pc.ram`) is laid out in guest-physical space: its first `below_4g` bytes from
/// address 0, the rest from 4 GiB. Offsets of the block and guest-physical addresses agree below the split only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamLayout {
    /// How many bytes lie below the PCI hole.
    pub below_4g: u64,
    /// How many bytes lie from 4 GiB on.
    pub above_4g: u64,
}

/// A half-open range of guest-physical pages of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// The first page: a guest-physical address >> 12.
    pub start: u64,
    /// The page after the last.
    pub end: u64,
}

impl RamLayout {
    /// The layout of `ram_bytes` of RAM without `max-ram-below-4g`.
    ///
    /// Source: `lowmem` in QEMU 10.0's hw/i386/pc_q35.c and pc_piix.c. A guest that fits below the larger limit
    /// is not split; one that does not is split at the smaller, a whole number of GiB.
    pub const fn new(machine: MachineKind, ram_bytes: u64) -> RamLayout {
        let (unsplit_below, split_at) = match machine {
            MachineKind::Q35 => (0xb000_0000, 0x8000_0000),
            MachineKind::Pc => (0xe000_0000, 0xc000_0000),
        };
        if ram_bytes < unsplit_below {
            RamLayout { below_4g: ram_bytes, above_4g: 0 }
        } else {
            RamLayout { below_4g: split_at, above_4g: ram_bytes - split_at }
        }
    }

    /// The size of the block.
    pub const fn ram_bytes(&self) -> u64 {
        self.below_4g + self.above_4g
    }

    /// The offset within `pc.ram` of a guest-physical address, or `None` where no RAM lies.
    pub const fn block_offset(&self, address: u64) -> Option<u64> {
        if address < self.below_4g {
            Some(address)
        } else if address >= ABOVE_4G && address - ABOVE_4G < self.above_4g {
            Some(address - ABOVE_4G + self.below_4g)
        } else {
            None
        }
    }

    /// The guest-physical address of an offset within `pc.ram`, or `None` beyond its end.
    pub const fn address(&self, block_offset: u64) -> Option<u64> {
        if block_offset < self.below_4g {
            Some(block_offset)
        } else if block_offset < self.ram_bytes() {
            Some(block_offset - self.below_4g + ABOVE_4G)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_is_split_where_the_boards_split_it() {
        for (machine, ram, below) in [
            (MachineKind::Q35, 64 << 20, 64 << 20),
            (MachineKind::Q35, 0xb000_0000 - 1, 0xb000_0000 - 1),
            (MachineKind::Q35, 0xb000_0000, 2 * GIB),
            (MachineKind::Q35, 5 * GIB, 2 * GIB),
            (MachineKind::Pc, 3 * GIB, 3 * GIB),
            (MachineKind::Pc, 0xe000_0000, 3 * GIB),
            (MachineKind::Pc, 5 * GIB, 3 * GIB),
        ] {
            let layout = RamLayout::new(machine, ram);
            assert_eq!((layout.below_4g, layout.above_4g), (below, ram - below), "{machine:?} {ram:#x}");
        }
    }

    #[test]
    fn offsets_and_addresses_are_inverse_and_end_with_the_ram() {
        let layout = RamLayout::new(MachineKind::Q35, 5 * GIB);
        for (offset, address) in [
            (0, Some(0)),
            (2 * GIB - 1, Some(2 * GIB - 1)),
            (2 * GIB, Some(4 * GIB)),
            (5 * GIB - 1, Some(7 * GIB - 1)),
            (5 * GIB, None),
        ] {
            assert_eq!(layout.address(offset), address, "{offset:#x}");
            if let Some(address) = address {
                assert_eq!(layout.block_offset(address), Some(offset), "{address:#x}");
            }
        }
        for hole in [2 * GIB, 3 * GIB, 4 * GIB - 1, 7 * GIB, u64::MAX] {
            assert_eq!(layout.block_offset(hole), None, "{hole:#x}");
        }
    }
}
