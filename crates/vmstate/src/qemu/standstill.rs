//! Whether a guest stood still, told by the guest itself.
//!
//! Events of a monitor of our own come in one order with its answers, so that no resume can hide. Through libvirt they
//! come by another way than answers, and may come later. What cannot be late is the guest's own state: its clocks go on
//! with every moment that it runs, and its processors are set back by a reset.

use wire::qemu::decode_xen_device_state;

use super::Session;
use super::device_state::device_state;
use crate::{Error, Kind, Result};

/// The section with the guest's clocks (QEMU system/cpu-timers.c, `vmstate_timers`).
const TIMERS: &str = "timer";
/// What the names of sections of processors begin with.
const PROCESSOR: &str = "cpu";

/// What a guest's state was when it was first read.
#[derive(Debug)]
pub struct Standstill(
    /// Name, instance and payload of each section that tells.
    Vec<(String, u32, Vec<u8>)>,
);

impl Standstill {
    /// Remembers what tells. `devices` is the output of `xen-save-devices-state`.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where it is not understood, or has no clocks.
    pub fn of(devices: &[u8]) -> Result<Standstill> {
        let state = decode_xen_device_state(devices, 0).map_err(|fault| {
            Error::new(Kind::Unsupported, "QEMU's device state is not understood").because(fault)
        })?;
        let telling = |name: &str| name == TIMERS || name.starts_with(PROCESSOR);
        let sections: Vec<_> = state
            .sections
            .iter()
            .filter(|section| telling(&section.idstr.to_string()))
            .map(|section| {
                let payload = &devices[section.payload.start as usize..section.payload.end as usize];
                (section.idstr.to_string(), section.instance_id, payload.to_vec())
            })
            .collect();
        if !sections.iter().any(|(name, ..)| name == TIMERS) {
            return Err(Error::new(Kind::Unsupported, "the device state has no clocks"));
        }
        Ok(Standstill(sections))
    }

    /// Reads the state again and compares.
    pub(super) fn verify(&self, session: &mut Session) -> Result<()> {
        let now = Standstill::of(&device_state(session)?)?;
        let Some(what) = self.difference(&now) else { return Ok(()) };
        Err(super::session::did_not_stand_still(&format!("its {what} went on")))
    }

    fn difference(&self, now: &Standstill) -> Option<&'static str> {
        if self.0 == now.0 {
            return None;
        }
        let of = |state: &'_ Standstill| state.0.iter().find(|(name, ..)| name == TIMERS).cloned();
        Some(if of(self) == of(now) { "processors" } else { "clock" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_and_a_processor_that_moved_are_told_apart() {
        let state = |clock: u8, processor: u8| {
            Standstill(vec![(TIMERS.into(), 0, vec![clock]), ("cpu".into(), 0, vec![processor])])
        };
        assert_eq!(state(1, 1).difference(&state(1, 1)), None);
        assert_eq!(state(1, 1).difference(&state(2, 2)), Some("clock"));
        assert_eq!(state(1, 1).difference(&state(1, 2)), Some("processors"));
    }
}
