//! The run state that a stream records: the payload of the `globalstate` section.
//!
//! Source: QEMU 10.0 `migration/global_state.c`. The payload has 104 bytes in 7.2 and in 10.0: what are
//! four fields now was one buffer of 100 bytes, zero behind the name.

use crate::Fault;

/// The name of the section.
pub const GLOBAL_STATE_SECTION: &str = "globalstate";
/// The length of the payload in bytes.
pub const PAYLOAD_LEN: usize = 104;
/// The offset of the be32 that holds the length of the name with its NUL.
pub const SIZE_AT: usize = 0;
/// The offset of the name.
pub const RUN_STATE_AT: usize = 4;
/// The length of the name's buffer; 100 in 7.2, of which the names never used more than 32.
pub const RUN_STATE_LEN: usize = 32;
/// The offset of the byte that says whether the next one counts; not in 7.2.
pub const HAS_VM_WAS_SUSPENDED_AT: usize = 36;
/// The offset of the byte that says whether the guest was suspended when it was stopped; not in 7.2.
pub const VM_WAS_SUSPENDED_AT: usize = 37;

const _: () = assert!(RUN_STATE_AT == SIZE_AT + size_of::<u32>());
const _: () = assert!(HAS_VM_WAS_SUSPENDED_AT == RUN_STATE_AT + RUN_STATE_LEN);
const _: () = assert!(VM_WAS_SUSPENDED_AT + 1 + 66 == PAYLOAD_LEN);

/// The run states that a QEMU can record (qapi/run-state.json `RunState`, 10.0).
pub const RUN_STATES: [&str; 16] = [
    "debug",
    "inmigrate",
    "internal-error",
    "io-error",
    "paused",
    "postmigrate",
    "prelaunch",
    "finish-migrate",
    "restore-vm",
    "running",
    "save-vm",
    "shutdown",
    "suspended",
    "watchdog",
    "guest-panicked",
    "colo",
];

/// The run state in the payload of a `globalstate` section.
///
/// # Errors
/// A damaged fault, its offset counted from the start of the payload: another length, a name that is not
/// terminated, or none that a QEMU knows.
pub fn run_state(payload: &[u8]) -> Result<&'static str, Fault> {
    let buffer = check_len(payload)?;
    let len = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
    let name = buffer.get(..len).unwrap_or_default();
    RUN_STATES.iter().find(|state| state.as_bytes() == name).copied().ok_or_else(|| {
        let name = String::from_utf8_lossy(name).escape_debug().to_string();
        Fault::damaged(RUN_STATE_AT as u64, "run state", format!("`{name}` is unknown"))
    })
}

/// Records another run state in the payload of a `globalstate` section.
///
/// `xen-save-devices-state` always records `running`; a restore takes the recorded state, so an image of
/// a paused guest needs `paused` here. Everything but the name and its length stays as it was.
///
/// # Errors
/// A damaged fault as [`run_state`]; the payload is untouched then.
pub fn patch_run_state(payload: &mut [u8], state: &str) -> Result<(), Fault> {
    check_len(payload)?;
    let Some(state) = RUN_STATES.iter().find(|known| **known == state) else {
        let problem = format!("`{}` is unknown", state.escape_debug());
        return Err(Fault::damaged(RUN_STATE_AT as u64, "run state", problem));
    };
    // QEMU counts the NUL too. The names have at most 14 bytes.
    let size = (state.len() as u32 + 1).to_be_bytes();
    let name = state.bytes().chain(std::iter::repeat(0)).take(RUN_STATE_LEN);
    for (target, byte) in payload.iter_mut().zip(size.into_iter().chain(name)) {
        *target = byte;
    }
    Ok(())
}

fn check_len(payload: &[u8]) -> Result<&[u8], Fault> {
    match payload.get(RUN_STATE_AT..RUN_STATE_AT + RUN_STATE_LEN) {
        Some(buffer) if payload.len() == PAYLOAD_LEN => Ok(buffer),
        _ => {
            let problem = format!("has {} bytes instead of {PAYLOAD_LEN}", payload.len());
            Err(Fault::damaged(0, "globalstate payload", problem))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(state: &str) -> Vec<u8> {
        let mut payload = vec![0; PAYLOAD_LEN];
        patch_run_state(&mut payload, state).unwrap();
        payload
    }

    #[test]
    fn every_run_state_is_read_as_it_was_patched() {
        for state in RUN_STATES {
            let payload = payload(state);
            assert_eq!(run_state(&payload), Ok(state));
            assert_eq!(payload[..4], (state.len() as u32 + 1).to_be_bytes());
        }
    }

    #[test]
    fn a_shorter_name_leaves_nothing_of_the_longer_one() {
        let mut patched = payload("finish-migrate");
        patched[VM_WAS_SUSPENDED_AT] = 1;
        patch_run_state(&mut patched, "paused").unwrap();
        let mut expected = payload("paused");
        expected[VM_WAS_SUSPENDED_AT] = 1;
        assert_eq!(patched, expected);
    }

    #[test]
    fn other_lengths_and_names_are_refused() {
        assert_eq!(
            run_state(&[0; 103]).unwrap_err().to_string(),
            "globalstate payload at 0x0: has 103 bytes instead of 104"
        );
        assert_eq!(run_state(&[0; 104]).unwrap_err().to_string(), "run state at 0x4: `` is unknown");
        let mut payload = payload("paused");
        assert_eq!(
            patch_run_state(&mut payload, "flying").unwrap_err().to_string(),
            "run state at 0x4: `flying` is unknown"
        );
        assert_eq!(run_state(&payload), Ok("paused"), "a refused patch changes nothing");
    }
}
