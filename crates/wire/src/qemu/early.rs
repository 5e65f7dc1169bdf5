//! FULL sections that a handler writes before the RAM has gone (`early_setup` in QEMU's source): virtio-mem's, since
//! 8.0.
//!
//! They stand among the START sections, where no end mark bounds them. What tells their ends is the vmdescription,
//! if it can be looked at first. Otherwise it is the footer with the section's id behind which a well-formed item
//! follows; a guest chooses bytes of its own device state, so where two places look like that, neither is taken.

use crate::{DecodeError, Fault, IdStr};

use super::devices::is_plausible;
use super::format::*;
use super::vmdesc::VmDescription;
use super::{Command, DeviceSection, Item, SectionHeader, SectionKind, decode_item};

/// The length of the payload that stands at the front of `bytes`, by the first place that can be its end.
///
/// This is for a stream that is still coming in. The answer is as good as the guest is honest: whoever relies on it
/// compares it with the length that the same section has elsewhere. `ram_id` is the section id of RAM, if it was
/// started; `base` is the absolute offset of `bytes`.
///
/// # Errors
/// [`DecodeError::Incomplete`] where no end has come yet; unsupported where the payload is longer than
/// [`EARLY_SECTION_LEN_MAX`].
pub fn early_payload_len(
    bytes: &[u8],
    base: u64,
    header: &SectionHeader,
    ram_id: Option<u32>,
) -> Result<usize, DecodeError> {
    match ends(bytes, header.section_id, ram_id).next() {
        Some(len) if len <= EARLY_SECTION_LEN_MAX => Ok(len),
        None if bytes.len() <= EARLY_SECTION_LEN_MAX + SECTION_FOOTER_LEN => {
            let offset = base.saturating_add(bytes.len() as u64);
            Err(DecodeError::Incomplete { offset, field: "end of an early section", needed: 1 })
        }
        _ => Err(too_long(header, base).into()),
    }
}

/// The length of the payload that stands at the front of `window`, by the only place in it that can be its end.
/// `is_whole` says that nothing comes behind the window.
///
/// # Errors
/// Damaged: there is none, and the window is all there is. Unsupported: there is none within
/// [`EARLY_SECTION_LEN_MAX`], or there are several.
pub(crate) fn only_payload_len(
    window: &[u8],
    base: u64,
    header: &SectionHeader,
    ram_id: Option<u32>,
    is_whole: bool,
) -> Result<usize, Fault> {
    let mut ends = ends(window, header.section_id, ram_id);
    let field = || format!("section `{}`", header.idstr);
    match (ends.next(), ends.next()) {
        (Some(len), None) => Ok(len),
        (Some(one), Some(other)) => {
            let (one, other) = (base.saturating_add(one as u64), base.saturating_add(other as u64));
            let problem = format!("may end at {one:#x} or at {other:#x}, and nothing tells its length");
            Err(Fault::unsupported(base, field(), problem))
        }
        (None, _) if is_whole => Err(Fault::damaged(base, field(), "has no end")),
        (None, _) => Err(too_long(header, base)),
    }
}

fn too_long(header: &SectionHeader, base: u64) -> Fault {
    let problem = format!("has no end within {EARLY_SECTION_LEN_MAX:#x} bytes");
    Fault::unsupported(base, format!("section `{}`", header.idstr), problem)
}

/// Checks early sections that a [`StreamScanner`](super::StreamScanner) took to end at the first place that could be
/// their end, against what the description behind them says.
///
/// # Errors
/// Unsupported: a section that is not described, so that nothing tells its length. Damaged: one that is described
/// with another length.
pub fn check_early(sections: &[DeviceSection], description: Option<&VmDescription>) -> Result<(), Fault> {
    let lengths = description.map(DescribedLengths::of).unwrap_or_default();
    for section in sections {
        let field = format!("section `{}`", section.idstr);
        match lengths.find(&section.idstr, section.instance_id) {
            Some(len) if len == section.payload.len() => {}
            Some(len) => {
                let problem = format!(
                    "seems to have {:#x} bytes, but is described with {len:#x}",
                    section.payload.len()
                );
                return Err(Fault::damaged(section.header_at, field, problem));
            }
            None => {
                let problem = "stands before the RAM, and nothing tells its length";
                return Err(Fault::unsupported(section.header_at, field, problem));
            }
        }
    }
    Ok(())
}

/// What the front of a payload of an early section is, as far as can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Front {
    /// So many bytes belong to it.
    Payload(usize),
    /// Here is its end.
    Footer,
}

/// Tells what `bytes`, which are not empty, begin with: for a scanner that keeps nothing of a payload.
///
/// # Errors
/// Incomplete: a footer stands here, and what follows it has not come yet.
pub(crate) fn front(
    bytes: &[u8],
    base: u64,
    section_id: u32,
    ram_id: Option<u32>,
) -> Result<Front, DecodeError> {
    match bytes.iter().position(|byte| *byte == QEMU_VM_SECTION_FOOTER) {
        Some(0) => {}
        Some(at) => return Ok(Front::Payload(at)),
        None => return Ok(Front::Payload(bytes.len())),
    }
    match decode_item(bytes, base) {
        Ok((Item::Footer { section_id: id }, len)) if id == section_id => {
            let next = bytes.get(len..).unwrap_or_default();
            match decode_item(next, base.saturating_add(len as u64)) {
                Err(error @ DecodeError::Incomplete { .. }) if is_head(next) => Err(error),
                _ if may_follow(next, ram_id) => Ok(Front::Footer),
                _ => Ok(Front::Payload(1)),
            }
        }
        Err(error @ DecodeError::Incomplete { .. }) => Err(error),
        _ => Ok(Front::Payload(1)),
    }
}

/// Whether `bytes` may become an item that follows an early section, the longest of which is a head.
fn is_head(bytes: &[u8]) -> bool {
    let kinds = [
        QEMU_VM_SECTION_START,
        QEMU_VM_SECTION_PART,
        QEMU_VM_SECTION_END,
        QEMU_VM_SECTION_FULL,
        QEMU_VM_COMMAND,
    ];
    // A command that is not empty has no place there, and may be 64 KiB long.
    let is_long = bytes.first() == Some(&QEMU_VM_COMMAND) && bytes.get(3..5).is_some_and(|len| len != [0, 0]);
    !is_long && bytes.first().is_none_or(|kind| kinds.contains(kind))
}

/// Every place in `bytes` where a footer of this id stands with a well-formed item behind it.
fn ends(bytes: &[u8], section_id: u32, ram_id: Option<u32>) -> impl Iterator<Item = usize> {
    let marks = bytes.iter().enumerate().filter(|(_, byte)| **byte == QEMU_VM_SECTION_FOOTER);
    marks.map(|(at, _)| at).filter(move |at| {
        let Some(rest) = bytes.get(*at..) else { return false };
        let Ok((Item::Footer { section_id: id }, len)) = decode_item(rest, 0) else { return false };
        id == section_id && rest.get(len..).is_some_and(|next| may_follow(next, ram_id))
    })
}

/// Whether an item stands here that may follow an early section.
fn may_follow(bytes: &[u8], ram_id: Option<u32>) -> bool {
    match decode_item(bytes, 0) {
        Ok((Item::Part { section_id } | Item::End { section_id }, _)) => Some(section_id) == ram_id,
        Ok((Item::Section(header), _)) if header.kind == SectionKind::Start => {
            let is_new = (header.idstr == RAM_SECTION) == ram_id.is_none();
            is_new && is_plausible(&SectionHeader { kind: SectionKind::Full, ..header })
        }
        Ok((Item::Section(header), _)) => is_plausible(&header),
        Ok((Item::Command(Command::SwitchoverStart), _)) => ram_id.is_some(),
        _ => false,
    }
}

/// The lengths that a description tells, by name and instance. One that is told twice tells nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct DescribedLengths(Vec<(String, u32, u64)>);

impl DescribedLengths {
    pub(crate) fn of(description: &VmDescription) -> DescribedLengths {
        let devices = description.devices.iter();
        DescribedLengths(
            devices
                .filter_map(|device| Some((device.name.clone(), device.instance_id, device.payload_len()?)))
                .collect(),
        )
    }

    pub(crate) fn find(&self, idstr: &IdStr, instance_id: u32) -> Option<u64> {
        let is_it =
            |(name, instance, _): &&(String, u32, u64)| *idstr == name.as_str() && instance_id == *instance;
        let mut found = self.0.iter().filter(is_it);
        let len = found.next()?.2;
        found.next().is_none().then_some(len)
    }
}
