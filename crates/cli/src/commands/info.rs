//! `vmstate info`.

use vmstate::job::ImageInfo;
use vmstate::source::readable_again;

use super::Outcome;
use crate::args::Inspect;
use crate::output::{line, print_json, size, utc};

/// Shows what an image holds.
pub fn run(args: &Inspect) -> vmstate::Result<Outcome> {
    let info = vmstate::info_at(&readable_again(&args.image)?, args.offset)?;
    if args.json {
        let value = serde_json::to_value(&info)
            .map_err(|error| vmstate::Error::new(vmstate::Kind::Io, "no JSON").because(error))?;
        print_json(&value);
    } else {
        page(&args.image.display().to_string(), &info);
    }
    Ok(Outcome::Done)
}

fn page(path: &str, info: &ImageInfo) {
    line(path);
    line(format!("  format      {}{}", info.format, capabilities(info)));
    if let Some(domain) = &info.domain {
        let uuid = domain.uuid.as_deref().map_or_else(String::new, |uuid| format!(" ({uuid})"));
        line(format!(
            "  domain      {}{uuid}, XML of {}, {}",
            domain.name.as_deref().unwrap_or("without a name"),
            size(domain.xml_bytes),
            if domain.cookie_bytes.is_some() { "a cookie" } else { "no cookie" },
        ));
    }
    line(format!("  machine     {}", info.machine.as_deref().unwrap_or("not recorded")));
    line(format!(
        "  run state   {}",
        info.run_state.as_deref().unwrap_or("not recorded: comes back running")
    ));
    match &info.saved {
        Some(saved) => line(format!(
            "  saved       {} by vmstate {} via {}, from QEMU {}{}",
            utc(saved.saved_unix_s),
            saved.vmstate_version,
            saved.via,
            saved.qemu_version,
            if saved.qemu_package.is_empty() { String::new() } else { format!(" ({})", saved.qemu_package) },
        )),
        None if info.domain.is_some() => line("  saved       by libvirt, or in its format"),
        None => line("  saved       by QEMU itself"),
    }
    line(format!("  file        {}, {} on disk", size(info.file_bytes), size(info.disk_bytes)));
    line(format!(
        "  memory      {}: {} data, {} zero, {} hole, pages of {}",
        size(info.ram_bytes),
        size(info.data_bytes - zero_within(info)),
        size(info.zero_bytes),
        size(info.hole_bytes),
        size(info.page_size),
    ));
    line(format!(
        "  devices     {} sections, {}{}",
        info.devices.len(),
        size(info.device_bytes),
        if info.described { ", described field by field" } else { "" }
    ));
    line("");
    blocks(info);
    line("");
    devices(info);
}

/// In a mapped-ram image zero pages are part of the data, in a stream they are records of their own.
fn zero_within(info: &ImageInfo) -> u64 {
    if has_places(info) { info.zero_bytes } else { 0 }
}

/// Whether every page has a place of its own in the file.
fn has_places(info: &ImageInfo) -> bool {
    matches!(info.format, "mapped-ram" | "libvirt-sparse")
}

fn capabilities(info: &ImageInfo) -> String {
    let others: Vec<_> = info.capabilities.iter().filter(|name| *name != "mapped-ram").cloned().collect();
    if others.is_empty() { String::new() } else { format!(", with {}", others.join(", ")) }
}

fn blocks(info: &ImageInfo) {
    let width = info.blocks.iter().map(|block| block.name.chars().count()).max().unwrap_or(0).max(9);
    line(format!("  {:<width$} {:>10} {:>10} {:>10} {:>10}", "RAM block", "size", "data", "zero", "hole"));
    for block in &info.blocks {
        let zero = if has_places(info) { block.zero_bytes } else { 0 };
        let stale = match block.stale_bytes {
            0 => String::new(),
            bytes => format!("  ({} stale)", size(bytes)),
        };
        line(format!(
            "  {:<width$} {:>10} {:>10} {:>10} {:>10}{stale}",
            block.name,
            size(block.ram_bytes),
            size(block.data_bytes - zero),
            size(block.zero_bytes),
            size(block.hole_bytes),
        ));
    }
}

fn devices(info: &ImageInfo) {
    let width = info.devices.iter().map(|device| device.name.chars().count()).max().unwrap_or(0).max(14);
    line(format!(
        "  {:<width$} {:>8} {:>7} {:>12} {:>14}",
        "device section", "instance", "version", "bytes", "offset"
    ));
    for device in &info.devices {
        line(format!(
            "  {:<width$} {:>8} {:>7} {:>12} {:>14}{}",
            device.name,
            device.instance_id,
            device.version,
            device.bytes,
            format!("{:#x}", device.offset),
            if device.early { "  early" } else { "" },
        ));
    }
}
