//! The constants of the return path, in QEMU's spelling, and the limits that this crate sets.
//!
//! Sources: QEMU 10.0 `migration/migration.c` (`enum mig_rp_message_type`, `rp_cmd_args`,
//! `migrate_send_rp_message_req_pages`), `migration/migration.h`, `migration/ram.c`; the values are the same
//! in 7.2. The commands of the main channel are in [`crate::qemu::format`].

/// The target will send nothing more; be32 error (migration.c, 10.0).
pub const MIG_RP_MSG_SHUT: u16 = 1;
/// The answer to a ping; be32 value (migration.c, 10.0).
pub const MIG_RP_MSG_PONG: u16 = 2;
/// Pages of a named block; be64 start, be32 length, counted name (migration.c, 10.0).
pub const MIG_RP_MSG_REQ_PAGES_ID: u16 = 3;
/// Pages of the block named last; be64 start, be32 length (migration.c, 10.0).
pub const MIG_RP_MSG_REQ_PAGES: u16 = 4;
/// The bitmap of a block follows; counted name (migration.c, 10.0).
pub const MIG_RP_MSG_RECV_BITMAP: u16 = 5;
/// The target is ready to go on; be32 1 (migration.c, 10.0).
pub const MIG_RP_MSG_RESUME_ACK: u16 = 6;
/// The target agrees to the switchover; since 8.1 (migration.c, 10.0).
pub const MIG_RP_MSG_SWITCHOVER_ACK: u16 = 7;

/// The value of a resume's acknowledgement (migration.h, 10.0).
pub const MIGRATION_RESUME_ACK_VALUE: u32 = 1;
/// What ends a bitmap of received pages (ram.c, 10.0).
pub const RAMBLOCK_RECV_BITMAP_ENDING: u64 = 0x0123_4567_89ab_cdef;

/// The length of a message's head.
pub const MESSAGE_HEADER_LEN: usize = 4;
/// Where the type of a message is: be16.
pub const MESSAGE_TYPE_AT: usize = 0;
/// Where the length of its payload is: be16.
pub const MESSAGE_LEN_AT: usize = 2;

/// Where a request's start is in the payload: be64.
pub const REQUEST_START_AT: usize = 0;
/// Where its length is: be32.
pub const REQUEST_LEN_AT: usize = 8;
/// The length of a request that names no block.
pub const REQUEST_LEN: usize = 12;
/// Where the length of the block's name is: u8; the name follows.
pub const REQUEST_NAME_AT: usize = 12;
/// The length of the payload of SHUT, PONG and RESUME_ACK.
pub const VALUE_LEN: usize = 4;

/// Where a bitmap's length in bytes is: be64, behind the RECV_BITMAP message.
pub const BITMAP_SIZE_AT: usize = 0;
/// Where its bytes are: bit `i % 8` of byte `i / 8` is target page `i`, whatever the hosts are.
pub const BITMAP_AT: usize = 8;

/// The value of the ping that QEMU's source sends first (migration.c `migration_thread`, 10.0).
pub const PING_OPENING: u32 = 1;
/// The value of the ping within the package, behind the device state (migration.c `postcopy_start`, 10.0).
pub const PING_PACKAGED: u32 = 3;

/// Limit: the payload of a message in bytes. QEMU's own source takes no more (migration.c
/// `source_return_path_thread`, 10.0).
pub const MESSAGE_PAYLOAD_MAX: usize = 512;
/// Limit: how much is put into one package, in bytes. QEMU takes what 32 bits can tell.
pub const PACKAGE_LEN_MAX: u64 = u32::MAX as u64;

// Each field begins where the one before it ends, and the longest message fits the limit.
const _: () = assert!(MESSAGE_LEN_AT == MESSAGE_TYPE_AT + size_of::<u16>());
const _: () = assert!(MESSAGE_HEADER_LEN == MESSAGE_LEN_AT + size_of::<u16>());
const _: () = assert!(REQUEST_LEN_AT == REQUEST_START_AT + size_of::<u64>());
const _: () = assert!(REQUEST_LEN == REQUEST_LEN_AT + size_of::<u32>());
const _: () = assert!(REQUEST_NAME_AT == REQUEST_LEN);
const _: () = assert!(BITMAP_AT == BITMAP_SIZE_AT + size_of::<u64>());
const _: () = assert!(VALUE_LEN == size_of::<u32>());
const _: () = assert!(REQUEST_NAME_AT + 1 + 255 <= MESSAGE_PAYLOAD_MAX);
