//! Every structural fault of an image, with its offset.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use wire::mapped_ram::survey::{LayoutSurvey, SurveyStep};
use wire::mapped_ram::{BitmapScanner, BlockPlacement};
use wire::qemu::format::VMDESCRIPTION_HEADER_LEN;
use wire::qemu::{DeviceSection, check_early, survey, vmdesc};
use wire::{Fault, FileRange, Report};

use crate::source::{Bounds, FileExtents, Format, Payload, open_image, scan_stream, unreadable};
use crate::{Error, Result};

/// How much of a bitmap is read at once.
const BITMAP_CHUNK: usize = 64 << 10;

/// The outcome of a check.
#[derive(Clone, Debug)]
pub struct Check {
    /// The format that the file was read as; `None` where that could not be told.
    pub format: Option<Format>,
    /// The faults, in the order of their offsets, and how many more there are. In a compressed image, offsets behind
    /// libvirt's head are those of what comes out of it.
    pub report: Report,
}

/// Looks for every structural fault of an image, by vmstate or by QEMU, in any format that is read.
///
/// Pages are not looked at: no format has anything to compare them with.
///
/// # Errors
/// Where the file cannot be read, or is no image at all.
pub fn check(path: &Path) -> Result<Check> {
    check_at(path, 0)
}

/// As [`check`], for an image that starts at the offset `start` of its file or device.
///
/// # Errors
/// As there.
pub fn check_at(path: &Path, start: u64) -> Result<Check> {
    let file = open_image(path)?;
    let (payload, mut report) = Payload::survey(&file, path, start)?;
    let Some(payload) = payload else { return Ok(Check { format: None, report }) };
    let format = match Format::survey(&file, path, &payload)? {
        Ok(format) => format,
        Err(fault) => {
            report.push(fault);
            return Ok(Check { format: None, report });
        }
    };
    report.append(match format.has_places() {
        true => mapped_ram(&file, path, payload.at)?,
        false => stream(&file, path, &payload)?,
    });
    report.faults.sort_by_key(|fault| fault.offset);
    Ok(Check { format: Some(format), report })
}

fn mapped_ram(file: &File, path: &Path, start: u64) -> Result<Report> {
    let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
    let whole = Bounds::of(file, path, start)?;
    let (Bounds { end: len, .. }, doubt) = match whole.of_mapped_ram(file).map_err(cannot)? {
        Ok(bounds) => (bounds, None),
        Err(fault) => (whole, Some(fault)),
    };
    let mut survey = LayoutSurvey::new(start, len);
    let mut bytes = Vec::new();
    while let SurveyStep::Need { offset, len } = survey.step() {
        bytes.resize(len, 0);
        file.read_exact_at(&mut bytes, offset).map_err(cannot)?;
        survey.supply(&bytes);
    }
    let found = survey.finish();
    let mut report = found.report;
    if let Some(fault) = doubt {
        // Where the image ends is unknown, and so is what is wrong there.
        report.push(fault);
        return Ok(report);
    }
    for block in &found.blocks {
        if let Some(fault) = bitmap(file, block, len).map_err(cannot)? {
            report.push(fault);
        }
    }
    if let Some(layout) = &found.layout {
        let end = layout.vmdesc.map_or(layout.device_state.end, |vmdesc| vmdesc.end);
        let range = FileRange::new(layout.device_state.start, end);
        match unreadable(file, end, range) {
            Some(fault) => report.push(fault),
            None => {
                let mut blob = vec![0; range.len() as usize];
                file.read_exact_at(&mut blob, range.start).map_err(cannot)?;
                device_state(&blob, range.start, &[], &mut report);
            }
        }
    }
    Ok(report)
}

/// Scans a bitmap; the layout has not vouched for its place, so what lies beyond the file is passed over:
/// that fault is told already.
fn bitmap(file: &File, block: &BlockPlacement, file_len: u64) -> std::io::Result<Option<Fault>> {
    let mut scanner = BitmapScanner::new(block.bitmap.start, block.page_count());
    let mut extents = FileExtents::new(file, file_len);
    let mut chunk = vec![0; BITMAP_CHUNK];
    let mut at = block.bitmap.start;
    let bitmap_end = block.bitmap.end.min(file_len);
    while at < bitmap_end {
        let (end, is_data) = extents.at(at);
        let end = end.min(bitmap_end);
        let scanned = if is_data {
            let len = (end - at).min(BITMAP_CHUNK as u64) as usize;
            file.read_exact_at(&mut chunk[..len], at)?;
            at += len as u64;
            scanner.push(&chunk[..len], |_| {})
        } else {
            let hole = end - at;
            at = end;
            scanner.skip(hole, |_| {})
        };
        if let Err(fault) = scanned {
            return Ok(Some(fault));
        }
    }
    Ok(None)
}

fn stream(file: &File, path: &Path, payload: &Payload) -> Result<Report> {
    let contents = scan_stream(file, path, payload)?;
    let mut report = contents.report;
    if let Some(rest) = contents.tail {
        match rest.bytes(file).map_err(|error| Error::io(format!("cannot read {}", path.display()), error))? {
            Ok(blob) => device_state(&blob, rest.range.start, &contents.early, &mut report),
            Err(fault) => report.push(fault),
        }
    }
    Ok(report)
}

/// Surveys device state, and whether it describes `early`, the sections before it whose lengths are to be confirmed.
fn device_state(blob: &[u8], start: u64, early: &[DeviceSection], report: &mut Report) {
    let (found, state) = survey::device_state(blob, start);
    if !early.is_empty() {
        let vmdesc = state.and_then(|state| state.vmdesc);
        let description = vmdesc.and_then(|vmdesc| {
            let json = blob.get((vmdesc.start - start) as usize + VMDESCRIPTION_HEADER_LEN..)?;
            vmdesc::parse(json, vmdesc.start).ok()
        });
        if let Err(fault) = check_early(early, description.as_ref()) {
            report.push(fault);
        }
    }
    for fault in found.faults {
        // The layout's survey looks at the same end.
        if !report.faults.contains(&fault) {
            report.push(fault);
        }
    }
    report.dropped += found.dropped;
}
