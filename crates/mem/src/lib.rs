//! Where guest memory lives: peer processes, presence, zero scan.
//!
//! A [`Peer`] is the process of a VMM, held so that it cannot be mistaken for another. [`GuestRam`] reaches
//! the memory of its RAM blocks from outside: it says which pages are there without touching any, and
//! supplies their bytes to the lanes of the crate `io`.
//!
//! # Kinds of memory
//!
//! What is behind a block is told by `/proc/PID/maps` ([`Backing`]); what a file lies on, by fstatfs(2) of the
//! file once it is open ([`Medium`]). Neither looking nor reading puts a page anywhere.
//!
//! | memory | as QEMU is told | how it is reached | which pages are there | how bytes are read |
//! |---|---|---|---|---|
//! | private, without a file | `-m`, memory-backend-ram, ROMs, video memory | the process | page tables: present or swapped, but for the zero page | process_vm_readv |
//! | the same on huge pages | `MAP_HUGETLB` without a file | the process | page tables | process_vm_readv |
//! | shared file on tmpfs | memory-backend-memfd, -file, -shm, `mem-path=/proc/PID/fd/N` | its descriptor | SEEK_DATA | pread |
//! | shared, without a name | memory-backend-ram,share=on of older QEMUs | `map_files` (root) | SEEK_DATA | pread |
//! | shared file on ext4 or XFS | memory-backend-file,share=on | its descriptor | SEEK_DATA | pread |
//! | shared file elsewhere | the same | its descriptor | all of it | pread |
//! | shared file on huge pages | memory-backend-memfd,hugetlb=on; -file on hugetlbfs | its descriptor | page tables if they have as many pages as the file; else all of it | pread |
//! | private mapping of a file | `share=off`; a guest restored by mapping its image | its descriptor and the process | page tables, and what the file has by its own row (on huge pages: all of it, unless it is empty) | process_vm_readv where the page tables have a page, pread elsewhere |
//!
//! A file is opened by a descriptor that the process has of it, or else by `/proc/PID/map_files`, never by the
//! path in its mapping. Not reached, each with its reason: secretmem, mappings of devices (VFIO, DAX, /dev/mem)
//! and of KVM, guests with guest_memfd, memory that a userfaultfd still fills. A page that the hardware has lost
//! is an error with its address. What a page table of a private mapping leaves out is the file's: that is also why
//! the guest must be stopped, and why the map is read anew for each save.
//!
//! Where the facts come from: page tables, Documentation/admin-guide/mm/pagemap.rst; holes of tmpfs,
//! `shmem_file_llseek` and `shmem_file_read_iter` of mm/shmem.c (swapped pages are data; reading a hole gives zeros
//! and no page); of ext4 and XFS, `iomap_seek_data` of fs/iomap/seek.c (a page written and not yet on the disk is
//! data, preallocated extents are not until then); hugetlbfs, `hugetlbfs_read_iter` and `default_llseek` of
//! fs/hugetlbfs/inode.c, and `hugetlb_add_to_page_cache` of mm/hugetlb.c, which counts pages in `i_blocks`. The
//! tests try them again on the kernel at hand (6.18 when this was written), but for XFS, swap, guest_memfd and
//! memory that the hardware has lost: for those the kernel's source is the only witness.
//!
//! Law: no `&[u8]` is ever made over guest memory. The guest may write it at any time, so it is read through
//! raw pointers, by vector loads or by the kernel.

mod attach;
mod credentials;
mod file;
mod fill;
mod guest_ram;
mod kind;
mod maps;
mod obstacles;
mod outlook;
mod pagemap;
mod peer;
mod populated;
mod presence;
mod private_file;
mod recorded;
mod remote;
mod reserved;
mod residue;
mod runs;
mod spawn;
mod supply;
mod uffd_ceiling;
mod walk_ahead;
mod windows;
mod zero;

pub use attach::{AttachError, AttachReason, BlockAddress};
pub use credentials::socket_peer_pid;
pub use file::Medium;
pub use fill::Fillable;
pub use guest_ram::{GuestRam, RecheckError};
pub use kind::{Backing, FilePart, classify};
pub use maps::{Gap, Mapping, Mappings};
pub use outlook::Outlook;
pub use peer::{Holders, Peer, PeerError, find_holders};
pub use presence::PagemapMethod;
pub use reserved::Reserved;
pub use residue::Residue;
pub use spawn::{Output, Program};
pub use uffd_ceiling::fill_by_userfaultfd;
pub use windows::Windows;
pub use zero::{ZeroScan, nonzero_mask};
