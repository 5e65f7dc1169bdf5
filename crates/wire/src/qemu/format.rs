//! The constants of QEMU's stream, in QEMU's spelling, and the limits that this crate sets.
//!
//! Sources: QEMU 10.0 `migration/savevm.h`, `migration/savevm.c`, `migration/ram.c`,
//! `include/migration/qemu-file-types.h`; the values are the same from 2.6 to 11.1 unless said.

/// The first four bytes: "QEVM" (savevm.h, 10.0).
pub const QEMU_VM_FILE_MAGIC: u32 = 0x5145_564d;
/// The obsolete version 2, which QEMU itself refuses (savevm.h, 10.0).
pub const QEMU_VM_FILE_VERSION_COMPAT: u32 = 2;
/// The version of the stream (savevm.h, 10.0).
pub const QEMU_VM_FILE_VERSION: u32 = 3;

/// The length of magic and version together.
pub const FILE_HEADER_LEN: usize = 8;

/// The end of the sections (savevm.h, 10.0).
pub const QEMU_VM_EOF: u8 = 0x00;
/// The first section of a handler that iterates (savevm.h, 10.0).
pub const QEMU_VM_SECTION_START: u8 = 0x01;
/// A further section of a handler that iterates (savevm.h, 10.0).
pub const QEMU_VM_SECTION_PART: u8 = 0x02;
/// The last section of a handler that iterates (savevm.h, 10.0).
pub const QEMU_VM_SECTION_END: u8 = 0x03;
/// The only section of a handler that does not iterate (savevm.h, 10.0).
pub const QEMU_VM_SECTION_FULL: u8 = 0x04;
/// An optional part of a section's fields (savevm.h, 10.0).
pub const QEMU_VM_SUBSECTION: u8 = 0x05;
/// The description of the device state (savevm.h, 10.0).
pub const QEMU_VM_VMDESCRIPTION: u8 = 0x06;
/// The configuration section (savevm.h, 10.0).
pub const QEMU_VM_CONFIGURATION: u8 = 0x07;
/// A command (savevm.h, 10.0).
pub const QEMU_VM_COMMAND: u8 = 0x08;
/// The footer of a section (savevm.h, 10.0).
pub const QEMU_VM_SECTION_FOOTER: u8 = 0x7e;

/// The length of a footer: its type byte and a section id.
pub const SECTION_FOOTER_LEN: usize = 5;
/// The length of the longest head of a section: its type byte, its id, a counted name, instance and version.
pub const SECTION_HEADER_LEN_MAX: usize = 1 + 4 + 1 + 255 + 4 + 4;
/// The length of a vmdescription's header: its type byte and a length.
pub const VMDESCRIPTION_HEADER_LEN: usize = 5;

/// Opens the return path (savevm.c, `enum qemu_vm_cmd`, 10.0).
pub const MIG_CMD_OPEN_RETURN_PATH: u16 = 1;
/// Asks for a pong (savevm.c, 10.0).
pub const MIG_CMD_PING: u16 = 2;
/// Announces postcopy (savevm.c, 10.0).
pub const MIG_CMD_POSTCOPY_ADVISE: u16 = 3;
/// Lets the target listen for pages (savevm.c, 10.0).
pub const MIG_CMD_POSTCOPY_LISTEN: u16 = 4;
/// Lets the target run (savevm.c, 10.0).
pub const MIG_CMD_POSTCOPY_RUN: u16 = 5;
/// Lists pages to throw away (savevm.c, 10.0).
pub const MIG_CMD_POSTCOPY_RAM_DISCARD: u16 = 6;
/// Wraps a stream of known length (savevm.c, 10.0).
pub const MIG_CMD_PACKAGED: u16 = 7;
/// Enables COLO (savevm.c, 10.0).
pub const MIG_CMD_ENABLE_COLO: u16 = 8;
/// Resumes a postcopy that broke off (savevm.c, 10.0).
pub const MIG_CMD_POSTCOPY_RESUME: u16 = 9;
/// Asks which pages of a block arrived (savevm.c, 10.0).
pub const MIG_CMD_RECV_BITMAP: u16 = 10;
/// Tells that the source has stopped; since 10.0, and only of machine types since 10.0 (savevm.c, 10.0).
pub const MIG_CMD_SWITCHOVER_START: u16 = 11;

/// The version byte of a RAM discard command (postcopy-ram.c, `postcopy_ram_discard_version`, 10.0).
pub const POSTCOPY_RAM_DISCARD_VERSION: u8 = 0;
/// The length of an advise command's payload when RAM takes part (savevm.c, 10.0).
pub const POSTCOPY_ADVISE_LEN: usize = 16;

/// The idstr of the RAM section.
pub const RAM_SECTION: &str = "ram";
/// The version of the RAM section; QEMU refuses others (ram.c `ram_load`, 2.6 to 11.1).
pub const RAM_SECTION_VERSION: u32 = 4;

/// Obsolete since 2009 (ram.c, 10.0).
pub const RAM_SAVE_FLAG_FULL: u64 = 0x01;
/// A page of zeroes (ram.c, 10.0).
pub const RAM_SAVE_FLAG_ZERO: u64 = 0x02;
/// The total size of RAM and the list of blocks (ram.c, 10.0).
pub const RAM_SAVE_FLAG_MEM_SIZE: u64 = 0x04;
/// A page of data (ram.c, 10.0).
pub const RAM_SAVE_FLAG_PAGE: u64 = 0x08;
/// The end of the section's payload (ram.c, 10.0).
pub const RAM_SAVE_FLAG_EOS: u64 = 0x10;
/// The block is the one of the record before (ram.c, 10.0).
pub const RAM_SAVE_FLAG_CONTINUE: u64 = 0x20;
/// A page as a difference to the one sent before (ram.c, 10.0).
pub const RAM_SAVE_FLAG_XBZRLE: u64 = 0x40;
/// RDMA's (ram.c, 10.0).
pub const RAM_SAVE_FLAG_HOOK: u64 = 0x80;
/// A compressed page, until 9.0 (ram.c, 7.2).
pub const RAM_SAVE_FLAG_COMPRESS_PAGE: u64 = 0x100;
/// The other channels synchronise here; since 8.1 (ram.c, 10.0).
pub const RAM_SAVE_FLAG_MULTIFD_FLUSH: u64 = 0x200;

/// The bits of a record's word that are flags: pages have at least 1 KiB (ram.c, 10.0).
pub const RAM_FLAGS_MASK: u64 = 0x3ff;

/// The subsection that names the target's page size (savevm.c `vmstate_target_page_bits`, 10.0).
pub const TARGET_PAGE_BITS: &str = "configuration/target-page-bits";
/// The subsection that lists capabilities (savevm.c `vmstate_capabilites`, 10.0).
pub const CAPABILITIES: &str = "configuration/capabilities";
/// The subsection that holds the machine's UUID (savevm.c `vmstate_uuid`, 10.0).
pub const UUID: &str = "configuration/uuid";
/// The version of each of these subsections (savevm.c, 10.0).
pub const CONFIGURATION_SUBSECTION_VERSION: u32 = 1;

/// The capability of images with pages at fixed offsets; since 9.0 (qapi/migration.json, 10.0).
pub const MAPPED_RAM: &str = "mapped-ram";
/// The capability that leaves shared memory out; since 4.0 (qapi/migration.json, 10.0).
pub const X_IGNORE_SHARED: &str = "x-ignore-shared";
/// The capabilities that QEMU records, in the order in which it writes them
/// (savevm.c `should_validate_capability` and the order of `MigrationCapability`, 10.0).
pub const VALIDATED_CAPABILITIES: [&str; 2] = [X_IGNORE_SHARED, MAPPED_RAM];

/// Limit: the length of a machine's name in bytes. QEMU's are class names of some twenty.
pub const MACHINE_NAME_LEN_MAX: u32 = 255;
/// Limit: how many capabilities are recorded. QEMU 11.1 has 25 in all and records two.
pub const CAPABILITIES_MAX: u32 = 64;
/// Limit: the least and the greatest number of bits of a target page; QEMU's targets have 10 to 16.
pub const TARGET_PAGE_BITS_RANGE: std::ops::RangeInclusive<u32> = 10..=16;
/// Limit: how many RAM blocks a guest has. A machine has 256 memory slots and a ROM or two a device.
pub const RAM_BLOCKS_MAX: usize = 4096;
/// Limit: the length of all RAM in bytes, 4 PiB: x86's 52 bits of physical address.
pub const RAM_LEN_MAX: u64 = 1 << 52;
/// Limit: how many ranges fit into one discard command, whose payload has 16 bits of length.
pub const RAM_DISCARD_RANGES_MAX: usize = (u16::MAX as usize - 3 - 255) / 16;
/// Limit: how many ranges QEMU itself puts into one discard command
/// (postcopy-ram.c `MAX_DISCARDS_PER_COMMAND`, 10.0).
pub const MAX_DISCARDS_PER_COMMAND: usize = 12;
/// Limit: the length of a vmdescription in bytes. QEMU's own script looks at the last 10 MiB.
pub const VMDESCRIPTION_LEN_MAX: u32 = 16 << 20;
/// Limit: how many places of a device-state blob may look like the end of a section.
pub const SECTION_ENDS_MAX: usize = 1 << 16;
/// Limit: how many ways through an ambiguous device-state blob are tried.
pub const SECTION_PATHS_MAX: usize = 10_000;
/// Limit: how many bytes of a section that stands before the device state are searched for its end. virtio-mem's has a
/// bit a block, of 2 MiB and more: one of 16 TiB fits.
pub const EARLY_SECTION_LEN_MAX: usize = 1 << 20;
/// Limit: how many sections stand before the device state and are not RAM's; a machine has 256 memory slots.
pub const EARLY_SECTIONS_MAX: usize = 256;
/// Limit: a section id is a registration counter; one above this is not plausible.
pub const SECTION_ID_MAX: u32 = 1 << 24;
/// Limit: a section version above this is not plausible.
pub const SECTION_VERSION_MAX: u32 = 1 << 16;

// The masks hold every flag, and a footer and a vmdescription header are what their fields add up to.
const _: () = assert!(RAM_SAVE_FLAG_MULTIFD_FLUSH | RAM_SAVE_FLAG_COMPRESS_PAGE < RAM_FLAGS_MASK);
const _: () = assert!(SECTION_FOOTER_LEN == size_of::<u8>() + size_of::<u32>());
const _: () = assert!(VMDESCRIPTION_HEADER_LEN == size_of::<u8>() + size_of::<u32>());
const _: () = assert!(FILE_HEADER_LEN == 2 * size_of::<u32>());
const _: () = assert!(3 + 255 + 16 * RAM_DISCARD_RANGES_MAX <= u16::MAX as usize);
const _: () = assert!(MAX_DISCARDS_PER_COMMAND <= RAM_DISCARD_RANGES_MAX);
