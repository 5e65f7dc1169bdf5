//! What is behind a block of guest memory.

use crate::maps::{Mapping, path_starts_with};

/// What is behind a block of guest memory, and so how it can be reached from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory (`-m 1G`, memory-backend-ram): `pagemap` tells what is there,
    /// `process_vm_readv` copies it. A page that is not there reads as zero.
    PrivateAnonymous,
    /// A shared mapping of a memfd (memory-backend-memfd): the file can be opened and mapped, and its holes
    /// are the pages that are not there.
    SharedMemfd {
        /// The device of the memfd, as `st_dev` has it.
        device: u64,
        /// The inode of the memfd.
        inode: u64,
        /// The offset in the memfd of the block's first byte.
        file_offset: u64,
    },
    /// Memory that this version does not reach.
    Unreachable {
        /// Why, in words for the user.
        reason: String,
    },
}

/// Says what is behind `address`, given the adjacent `mappings` that hold the block which starts there.
///
/// Mappings that differ in kind make the block unreachable: no RAM block of a VMM is a patchwork, so the
/// address must be wrong. A memfd on huge pages looks like any other here; opening it tells.
pub fn classify(mappings: &[Mapping], address: u64) -> Backing {
    let mut kinds = mappings.iter().map(|mapping| classify_one(mapping, address));
    let Some(first) = kinds.next() else { return unreachable("no mapping") };
    match kinds.find(|kind| *kind != first) {
        None => first,
        Some(other @ Backing::Unreachable { .. }) => other,
        Some(_) => unreachable("the block lies across mappings of different kinds"),
    }
}

fn classify_one(mapping: &Mapping, address: u64) -> Backing {
    let path = mapping.path.to_string_lossy();
    if !mapping.is_readable {
        return unreachable(&format!("the mapping at {:#x} is not readable", mapping.start));
    }
    match (mapping.is_shared, mapping.inode) {
        (false, 0) if is_anonymous_name(&path) => Backing::PrivateAnonymous,
        (_, 0) => unreachable(&format!("a special mapping `{path}`")),
        _ if path_starts_with(mapping, "/anon_hugepage") => unreachable("anonymous huge pages (hugetlb)"),
        (true, inode) if path_starts_with(mapping, "/memfd:") => Backing::SharedMemfd {
            device: mapping.device,
            inode,
            // The block may start amid its first mapping; later ones only continue it. Wrapping, because the
            // difference of the two is what all the mappings of a block agree on.
            file_offset: mapping.offset.wrapping_add(address).wrapping_sub(mapping.start),
        },
        (true, _) if path_starts_with(mapping, "/dev/zero") => unreachable("shared anonymous memory"),
        (true, _) => unreachable(&format!("a shared mapping of the file `{path}`")),
        (false, _) => unreachable(&format!("a private mapping of the file `{path}`")),
    }
}

/// Whether the kernel gives such a name to private anonymous memory.
fn is_anonymous_name(path: &str) -> bool {
    matches!(path, "" | "[heap]" | "[stack]") || path.starts_with("[anon:")
}

fn unreachable(reason: &str) -> Backing {
    Backing::Unreachable { reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::Mappings;

    fn check(text: &str, address: u64, expected: Backing) {
        let mappings = Mappings::read(text.as_bytes()).expect("maps as the kernel writes them");
        assert_eq!(classify(mappings.as_slice(), address), expected, "{text}");
    }

    #[test]
    fn private_anonymous_memory_goes_by_several_names() {
        for name in ["", "[heap]", "[anon:guest ram]", "[stack]"] {
            check(&format!("1000-2000 rw-p 00000000 00:00 0   {name}\n"), 0x1000, Backing::PrivateAnonymous);
        }
    }

    #[test]
    fn split_mappings_of_one_memfd_are_one_block() {
        let memfd = |file_offset| Backing::SharedMemfd { device: 1, inode: 7, file_offset };
        let text = "10000-20000 rw-s 00010000 00:01 7 /memfd:ram (deleted)\n\
                    20000-30000 rw-s 00020000 00:01 7 /memfd:ram (deleted)\n";
        check(text, 0x10000, memfd(0x10000));
        check(text, 0x11000, memfd(0x11000));
    }

    #[test]
    fn a_patchwork_is_refused() {
        let mixed = unreachable("the block lies across mappings of different kinds");
        let text = "10000-20000 rw-s 00010000 00:01 7 /memfd:ram (deleted)\n\
                    20000-30000 rw-s 00030000 00:01 7 /memfd:ram (deleted)\n";
        check(text, 0x10000, mixed.clone());
        let text = "10000-20000 rw-p 00000000 00:00 0 \n\
                    20000-30000 rw-s 00000000 00:01 7 /memfd:ram (deleted)\n";
        check(text, 0x10000, mixed);
        let text = "10000-20000 rw-p 00000000 00:00 0 \n20000-30000 ---p 00000000 00:00 0 \n";
        check(text, 0x10000, unreachable("the mapping at 0x20000 is not readable"));
    }

    #[test]
    fn other_kinds_say_what_they_are() {
        for (line, reason) in [
            ("rw-p 0 00:0f 9 /anon_hugepage (deleted)", "anonymous huge pages (hugetlb)"),
            ("rw-s 0 00:0f 9 /anon_hugepage (deleted)", "anonymous huge pages (hugetlb)"),
            ("rw-s 0 00:01 9 /dev/zero (deleted)", "shared anonymous memory"),
            ("rw-s 0 00:19 9 /dev/shm/ram", "a shared mapping of the file `/dev/shm/ram`"),
            ("rw-p 0 00:19 9 /dev/shm/ram", "a private mapping of the file `/dev/shm/ram`"),
            ("rw-p 0 00:01 9 /memfd:ram (deleted)", "a private mapping of the file `/memfd:ram (deleted)`"),
            ("r-xp 0 00:00 0 [vdso]", "a special mapping `[vdso]`"),
            ("rw-s 0 00:00 0 ", "a special mapping ``"),
        ] {
            check(&format!("1000-2000 {line}\n"), 0x1000, unreachable(reason));
        }
    }
}
