//! What a process has that makes memory unreachable although it is mapped: pages that are elsewhere.

use std::io::{self, BufRead, BufReader};
use std::ops::Range;

use crate::maps::Mapping;
use crate::peer::{Peer, PeerError};

/// What stands between the mappings of a process and the guest's memory.
#[derive(Debug, Default)]
pub(crate) struct Obstacles {
    /// The process has guest_memfd files: what the guest keeps private is in them, and nobody can read it.
    has_guest_memfd: bool,
    /// Addresses whose missing pages a user of userfaultfd brings when they are touched.
    awaited: Vec<Range<u64>>,
}

impl Obstacles {
    /// Looks for them.
    pub(crate) fn of(peer: &Peer) -> Result<Obstacles, PeerError> {
        // smaps walks the page tables of everything, which takes seconds for a large guest: only a process that
        // has a userfaultfd is asked.
        let [has_userfaultfd, has_guest_memfd] = peer.holds_special(["[userfaultfd]", "[kvm-gmem]"])?;
        let awaited = match has_userfaultfd {
            true => peer
                .open_file("smaps")
                .and_then(|file| read_awaited(BufReader::new(file)))
                .map_err(|error| peer.error("the memory map", error))?,
            false => Vec::new(),
        };
        Ok(Obstacles { has_guest_memfd, awaited })
    }

    /// Why memory in this range of addresses cannot be trusted, if it cannot.
    pub(crate) fn reason(&self, range: &Range<u64>) -> Option<&'static str> {
        if self.has_guest_memfd {
            return Some("the guest keeps memory private (guest_memfd)");
        }
        let overlaps = |awaited: &Range<u64>| awaited.start < range.end && range.start < awaited.end;
        let is_awaited = self.awaited.iter().any(overlaps);
        is_awaited.then_some("its missing pages are still to come (userfaultfd: a postcopy is under way)")
    }
}

/// The mappings of which `/proc/PID/smaps` says that userfaultfd reports missing (`um`) or unmapped (`ui`) pages.
/// The write-protection of a background snapshot (`uw`) hides nothing.
fn read_awaited(text: impl BufRead) -> io::Result<Vec<Range<u64>>> {
    let mut awaited = Vec::new();
    let mut current = None;
    for line in text.split(b'\n') {
        let line = line?;
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let is_awaited = flags.split(u8::is_ascii_whitespace).any(|flag| matches!(flag, b"um" | b"ui"));
            awaited.extend(current.take().filter(|_| is_awaited));
        } else if let Some(mapping) = Mapping::parse(&line) {
            current = Some(mapping.start..mapping.end);
        }
    }
    Ok(awaited)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0 
Size:               2048 kB
VmFlags: rd wr mr mw me ac sd um
7f0000200000-7f0000300000 rw-s 00000000 00:01 7                          /memfd:pc.ram (deleted)
Rss:                   0 kB
VmFlags: rd wr sh mr mw me ms ui
7f0000300000-7f0000400000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me ac uw
";

    #[test]
    fn pages_still_to_come_are_told_by_the_flags_of_their_mapping() {
        let awaited = read_awaited(SMAPS.as_bytes()).expect("smaps as the kernel writes them");
        let base = 0x7f00_0000_0000u64;
        assert_eq!(awaited, [base..base + 0x20_0000, base + 0x20_0000..base + 0x30_0000]);
        let obstacles = Obstacles { has_guest_memfd: false, awaited };
        let text = Some("its missing pages are still to come (userfaultfd: a postcopy is under way)");
        assert_eq!(obstacles.reason(&(base + 0x1000..base + 0x2000)), text);
        assert_eq!(obstacles.reason(&(base + 0x30_0000..base + 0x40_0000)), None);
    }

    #[test]
    fn no_block_of_a_guest_with_private_memory_is_trusted() {
        let obstacles = Obstacles { has_guest_memfd: true, ..Obstacles::default() };
        assert_eq!(obstacles.reason(&(0..1)), Some("the guest keeps memory private (guest_memfd)"));
        assert_eq!(Obstacles::default().reason(&(0..u64::MAX)), None);
    }
}
