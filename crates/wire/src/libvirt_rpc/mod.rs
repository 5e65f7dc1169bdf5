//! What a client of libvirt's daemon says and hears: the few calls that saving and restoring a domain takes.
//!
//! A message is a length, a header of six words and a payload in XDR (RFC 4506): big-endian words, everything
//! padded to four bytes. Sources: libvirt 11.3 `src/rpc/virnetprotocol.x`, `src/remote/remote_protocol.x`,
//! `src/remote/qemu_protocol.x`; procedure numbers and argument layouts have been the same since 0.9 (1.2 for
//! events of the monitor, 8.2 for commands that carry descriptors), since every client has to get along with
//! every daemon.
//!
//! It is a conversation and not a file: there is nothing to survey or to dump.

mod decode;
mod encode;
pub mod format;

pub use decode::{
    Domain, MonitorEvent, RpcError, decode_auth_types, decode_domain, decode_double_word, decode_error,
    decode_message_len, decode_monitor_event, decode_string, decode_word,
};
pub use encode::{Arguments, encode_call};
pub use format::{Header, MessageKind, Procedure, Status};
