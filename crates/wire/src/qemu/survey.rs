//! All that is wrong with the parts of a stream, not only the first of it.
//!
//! The RAM part of a stream is surveyed by [`StreamScanner::surveying`](super::StreamScanner::surveying);
//! this is for what follows.

use std::collections::HashSet;

use crate::{DecodeError, Fault, Report};

use super::devices::Splitter;
use super::format::VMDESCRIPTION_HEADER_LEN;
use super::global_state::{GLOBAL_STATE_SECTION, run_state};
use super::{DeviceState, decode_preamble, split_sections, vmdesc};

/// Surveys a blob of device state, as [`split_sections`] reads it.
///
/// Beyond what stops that: a vmdescription that is no JSON or disagrees with the sections, two sections
/// of one id or one name, a run state that no QEMU knows.
pub fn device_state(blob: &[u8], base: u64) -> (Report, Option<DeviceState>) {
    let mut report = Report::default();
    let state = match split_sections(blob, base) {
        Ok(state) => Some(state),
        Err(fault) => {
            report.push(fault);
            None
        }
    };
    if let Ok(splitter) = Splitter::new(blob, base)
        && let Some(range) = splitter.vmdesc()
        && range.len() > VMDESCRIPTION_HEADER_LEN as u64
    {
        let json_at = range.start + VMDESCRIPTION_HEADER_LEN as u64;
        let json = slice(blob, base, json_at, range.end);
        let described = vmdesc::parse(json, json_at).and_then(|known| splitter.by_sizes(&known));
        if let Err(fault) = described {
            report.push(fault);
        }
    }
    if let Some(state) = &state {
        check_sections(state, blob, base, &mut report);
    }
    (report, state)
}

fn check_sections(state: &DeviceState, blob: &[u8], base: u64, report: &mut Report) {
    let mut ids = HashSet::new();
    let mut names = HashSet::new();
    for section in &state.sections {
        let field = || format!("section `{}`", section.idstr);
        if !ids.insert(section.section_id) {
            let problem = format!("has the id {} of another", section.section_id);
            report.push(Fault::damaged(section.header_at, field(), problem));
        }
        if !names.insert((&section.idstr, section.instance_id)) {
            let problem = format!("has the name and instance {:#x} of another", section.instance_id);
            report.push(Fault::damaged(section.header_at, field(), problem));
        }
        if section.idstr == GLOBAL_STATE_SECTION {
            let payload = slice(blob, base, section.payload.start, section.payload.end);
            if let Err(mut fault) = run_state(payload) {
                fault.offset = fault.offset.saturating_add(section.payload.start);
                report.push(fault);
            }
        }
    }
}

fn slice(blob: &[u8], base: u64, start: u64, end: u64) -> &[u8] {
    let range = start.checked_sub(base).zip(end.checked_sub(base));
    range.and_then(|(start, end)| blob.get(start as usize..end as usize)).unwrap_or_default()
}

/// Surveys the output of `xen-save-devices-state`.
pub fn xen_device_state(bytes: &[u8], base: u64) -> (Report, Option<DeviceState>) {
    match decode_preamble(bytes, base).map_err(DecodeError::at_end) {
        Ok((preamble, len)) => {
            let at = base.saturating_add(len as u64);
            let (mut report, state) = device_state(bytes.get(len..).unwrap_or_default(), at);
            if preamble.configuration.is_some() {
                let problem = "a configuration stands where device state alone was expected";
                report.push(Fault::damaged(at, "device state", problem));
            }
            (report, state)
        }
        Err(fault) => {
            let mut report = Report::default();
            report.push(fault);
            (report, None)
        }
    }
}
