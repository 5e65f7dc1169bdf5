//! What is behind a block of guest memory.

use crate::maps::{Mapping, path_starts_with};

/// What is behind a block of guest memory, and so how it can be reached from outside. The table in the docs of
/// the crate says how each is.
///
/// It is told from `/proc/PID/maps` alone, and says nothing that changes while the block stays where it is:
/// that a file was renamed or unlinked does not show.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backing {
    /// Private memory without a file (`-m 1G`, memory-backend-ram, ROMs, video memory): a page that is not in
    /// the page tables reads as zero.
    PrivateAnonymous,
    /// A shared mapping of a file (memory-backend-memfd, -file and -shm with `share=on`): the memory is the
    /// file. Shared memory without a name is a file as well.
    SharedFile(FilePart),
    /// A private mapping of a file (`share=off`, a guest restored by mapping its image): a page that is not in
    /// the page tables still has the content of the file.
    PrivateFile(FilePart),
    /// Memory that cannot be reached.
    Unreachable {
        /// Why, in words for the user.
        reason: String,
    },
}

/// The part of a file that a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilePart {
    /// The device of the file as `/proc/PID/maps` has it. On some file systems (btrfs, overlayfs) that is not
    /// the `st_dev` of the same file.
    pub device: u64,
    /// The inode of the file.
    pub inode: u64,
    /// The offset in the file of the block's first byte.
    pub offset: u64,
}

/// Says what is behind `address`, given the adjacent `mappings` that hold the block which starts there.
///
/// Mappings that differ in kind make the block unreachable: no RAM block of a VMM is a patchwork, so the
/// address must be wrong. What a file lies on is not told by its mapping; opening it tells.
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
    let part = FilePart {
        device: mapping.device,
        inode: mapping.inode,
        // The block may start amid its first mapping; later ones only continue it. Wrapping, because the
        // difference of the two is what all the mappings of a block agree on.
        offset: mapping.offset.wrapping_add(address).wrapping_sub(mapping.start),
    };
    match mapping.is_shared {
        false if mapping.inode == 0 && is_anonymous_name(&path) => Backing::PrivateAnonymous,
        _ if mapping.inode == 0 => unreachable(&format!("a special mapping `{path}`")),
        _ if path_starts_with(mapping, "/secretmem") => unreachable("secret memory (memfd_secret)"),
        // Where guest_memfd has a file system of its own, its files are no anonymous inodes.
        _ if path_starts_with(mapping, "anon_inode:") || path.contains("[kvm-gmem]") => {
            unreachable(&format!("memory of a device or of the hypervisor (`{path}`)"))
        }
        // Private huge pages without a file: the kernel gives them one, into which nobody writes.
        false if path_starts_with(mapping, "/anon_hugepage") => Backing::PrivateAnonymous,
        true => Backing::SharedFile(part),
        false => Backing::PrivateFile(part),
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
        let huge = "200000-400000 rw-p 00000000 00:11 9   /anon_hugepage (deleted)\n";
        check(huge, 0x20_0000, Backing::PrivateAnonymous);
    }

    #[test]
    fn split_mappings_of_one_file_are_one_block() {
        let part = |offset| FilePart { device: 1, inode: 7, offset };
        for (sharing, of) in
            [('s', Backing::SharedFile as fn(FilePart) -> Backing), ('p', Backing::PrivateFile)]
        {
            let text = format!(
                "10000-20000 rw-{sharing} 00010000 00:01 7 /memfd:ram (deleted)\n\
                 20000-30000 rw-{sharing} 00020000 00:01 7 /memfd:ram (deleted)\n"
            );
            check(&text, 0x10000, of(part(0x10000)));
            check(&text, 0x11000, of(part(0x11000)));
        }
    }

    #[test]
    fn a_patchwork_is_refused() {
        let mixed = unreachable("the block lies across mappings of different kinds");
        let text = "10000-20000 rw-s 00010000 00:01 7 /memfd:ram (deleted)\n\
                    20000-30000 rw-s 00030000 00:01 7 /memfd:ram (deleted)\n";
        check(text, 0x10000, mixed.clone());
        let text = "10000-20000 rw-s 00010000 00:01 7 /memfd:ram (deleted)\n\
                    20000-30000 rw-p 00020000 00:01 7 /memfd:ram (deleted)\n";
        check(text, 0x10000, mixed.clone());
        let text = "10000-20000 rw-p 00000000 00:00 0 \n\
                    20000-30000 rw-s 00000000 00:01 7 /memfd:ram (deleted)\n";
        check(text, 0x10000, mixed);
        let text = "10000-20000 rw-p 00000000 00:00 0 \n20000-30000 ---p 00000000 00:00 0 \n";
        check(text, 0x10000, unreachable("the mapping at 0x20000 is not readable"));
    }

    #[test]
    fn files_are_told_by_inode_whatever_their_name() {
        let part = FilePart { device: 0x19, inode: 9, offset: 0 };
        for path in
            ["/dev/zero (deleted)", "/dev/shm/ram", "/dev/hugepages/ram", "/memfd:ram (deleted)", "/a b"]
        {
            check(&format!("1000-2000 rw-s 0 00:19 9 {path}\n"), 0x1000, Backing::SharedFile(part));
            check(&format!("1000-2000 rw-p 0 00:19 9 {path}\n"), 0x1000, Backing::PrivateFile(part));
        }
        let shared = "200000-400000 rw-s 00000000 00:19 9   /anon_hugepage (deleted)\n";
        check(shared, 0x20_0000, Backing::SharedFile(part));
    }

    #[test]
    fn kinds_that_cannot_be_reached_say_what_they_are() {
        for (line, reason) in [
            ("rw-s 0 00:08 9 /secretmem (deleted)", "secret memory (memfd_secret)"),
            (
                "rw-s 0 00:08 9 anon_inode:[vfio-device]",
                "memory of a device or of the hypervisor (`anon_inode:[vfio-device]`)",
            ),
            (
                "rw-s 0 00:08 9 anon_inode:kvm-vcpu:0",
                "memory of a device or of the hypervisor (`anon_inode:kvm-vcpu:0`)",
            ),
            ("rw-s 0 00:08 9 /[kvm-gmem]", "memory of a device or of the hypervisor (`/[kvm-gmem]`)"),
            ("r-xp 0 00:00 0 [vdso]", "a special mapping `[vdso]`"),
            ("rw-s 0 00:00 0 ", "a special mapping ``"),
        ] {
            check(&format!("1000-2000 {line}\n"), 0x1000, unreachable(reason));
        }
    }
}
