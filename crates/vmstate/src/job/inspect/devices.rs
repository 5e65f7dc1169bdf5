//! The device state of an image, field by field.

use std::path::{Path, PathBuf};

use wire::qemu::DeviceSection;
use wire::qemu::fields::{FieldDecoder, Fields, schema};
use wire::qemu::vmdesc::{Device, VmDescription};

use crate::manifest::Manifest;
use crate::source::{Format, Image, Tail, open_image};
use crate::{Error, Kind, Result};

/// Which sections are read, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DevicesSettings {
    /// Where in its file the image starts.
    pub offset: u64,
    /// Only sections of this name, or whose name ends in it behind a slash; all instances.
    pub name: Option<String>,
    /// An image of the same machine by QEMU itself, whose description serves for sections that have none.
    pub describe_by: Option<PathBuf>,
}

/// What told the fields of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DescribedBy {
    /// The image's own vmdescription.
    Image,
    /// That of another image.
    Other,
    /// A schema of vmstate's.
    Schema,
}

impl DescribedBy {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            DescribedBy::Image => "image",
            DescribedBy::Other => "other",
            DescribedBy::Schema => "schema",
        }
    }
}

/// A section of device state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionReport<'a> {
    /// The section's idstr.
    pub name: &'a str,
    /// Which of that name.
    pub instance_id: u32,
    /// The version of the payload.
    pub version: u32,
    /// The absolute offset of the payload.
    pub offset: u64,
    /// The length of the payload.
    pub bytes: u64,
    /// The payload.
    pub content: SectionContent<'a>,
    /// Why a description that there is could not be used.
    pub problem: Option<String>,
}

/// What is in a section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SectionContent<'a> {
    /// Fields, and what told them.
    Fields(DescribedBy, Fields<'a>),
    /// Bytes, since nothing tells what they are.
    Bytes(&'a [u8]),
}

/// Reads the device state of an image, by vmstate or by QEMU, in any format that is read, and hands each section to
/// `on_section`, in the order of the image: those before the RAM too.
///
/// A description that does not fit its section is no error: the section is bytes then, and its problem says why.
///
/// # Errors
/// [`Kind::Damaged`] and [`Kind::Unsupported`] where the image, or the one that describes it, cannot be taken apart;
/// [`Kind::Misuse`] where no section has the name; [`Kind::Io`].
pub fn devices(
    path: &Path,
    settings: &DevicesSettings,
    on_section: &mut dyn FnMut(&SectionReport<'_>),
) -> Result<Format> {
    let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
    let file = open_image(path)?;
    let image = Image::from_file(file.try_clone().map_err(cannot)?, path, settings.offset)?;
    let other = match &settings.describe_by {
        Some(path) => Some(described(path)?),
        None => None,
    };
    let state = image.devices()?;
    let wanted = |section: &&DeviceSection| match &settings.name {
        Some(name) => section.idstr == name.as_str() || ends_in(&section.idstr, name),
        None => true,
    };
    let mut sections = image.early().iter().chain(&state.sections).filter(wanted).peekable();
    if let (None, Some(name)) = (sections.peek(), &settings.name) {
        let clause = format!("{} has no device section `{name}`", path.display());
        return Err(Error::new(Kind::Misuse, clause).hint("`vmstate info` lists them"));
    }
    let mut reader = SectionReader {
        own: image.vmdescription()?,
        other,
        qemu: image.manifest()?.and_then(|manifest| major_minor(&manifest.qemu_version)),
        decoder: FieldDecoder::default(),
    };
    for section in sections {
        // All of them together were read when the image was, so the length of one is nothing new.
        let payload = image.read(&file, section.payload)?;
        reader.section(section, &payload, on_section);
    }
    Ok(image.format())
}

/// The description of an image that shall describe another.
fn described(path: &Path) -> Result<VmDescription> {
    let image = Image::from_file(open_image(path)?, path, 0)?;
    let description = image.vmdescription()?.unwrap_or_default();
    if description.devices.iter().all(Device::is_opaque) {
        let clause = format!("{} does not describe its device state field by field", path.display());
        return Err(Error::new(Kind::Misuse, clause).hint(
            "give an image that QEMU itself wrote: `migrate file:IMAGE`, or `vmstate save --via qemu`",
        ));
    }
    Ok(description)
}

fn ends_in(idstr: &str, name: &str) -> bool {
    idstr.strip_suffix(name).is_some_and(|front| front.ends_with('/'))
}

/// The first two numbers of a version such as `10.0.2`.
fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.').map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

/// Reads sections by what describes them.
pub(in crate::job) struct SectionReader {
    own: Option<VmDescription>,
    other: Option<VmDescription>,
    qemu: Option<(u32, u32)>,
    decoder: FieldDecoder,
}

impl SectionReader {
    /// A reader of the sections of a tail, which has been taken apart; `path` is for messages.
    pub(in crate::job) fn of_tail(tail: &Tail, path: &Path) -> Result<SectionReader> {
        let own = tail.vmdescription(path)?;
        let manifest = Manifest::of(own.clone(), path)?;
        let qemu = manifest.and_then(|manifest| major_minor(&manifest.qemu_version));
        Ok(SectionReader { own, other: None, qemu, decoder: FieldDecoder::default() })
    }

    /// Lets the description of another image serve where the image's own does not tell.
    pub(in crate::job) fn describe_by(&mut self, other: VmDescription) {
        self.other = Some(other);
    }

    pub(in crate::job) fn section(
        &mut self,
        section: &DeviceSection,
        payload: &[u8],
        on_section: &mut dyn FnMut(&SectionReport<'_>),
    ) {
        let base = section.payload.start;
        let mut report = SectionReport {
            name: section.idstr.as_str(),
            instance_id: section.instance_id,
            version: section.version_id,
            offset: base,
            bytes: section.payload.len(),
            content: SectionContent::Bytes(payload),
            problem: None,
        };
        let own = self.own.as_ref().and_then(|description| named(description, section));
        let templates = [
            (DescribedBy::Other, self.other.as_ref().and_then(|other| alike(other, section)).cloned()),
            (DescribedBy::Schema, schema::template(&section.idstr, section.version_id, self.qemu)),
        ];
        // What describes another section must be made to fit this one; the image's own does, or it lies.
        let fitted: Vec<_> = templates
            .into_iter()
            .filter_map(|(by, template)| Some((by, self.decoder.fit(&template?, payload, base))))
            .collect();
        let own = own.into_iter().map(|device| (DescribedBy::Image, Ok(device)));
        let fitted = fitted.iter().map(|(by, device)| (*by, device.as_ref().map_err(Clone::clone)));
        for (by, device) in own.chain(fitted) {
            match device.and_then(|device| self.decoder.decode(device, payload, base)) {
                Ok(fields) => {
                    report.content = SectionContent::Fields(by, fields);
                    break;
                }
                Err(fault) => report.problem = report.problem.or(Some(fault.to_string())),
            }
        }
        on_section(&report);
    }
}

/// What a description says of this very section.
fn named<'a>(description: &'a VmDescription, section: &DeviceSection) -> Option<&'a Device> {
    let is_it =
        |device: &&Device| section.idstr == device.name.as_str() && section.instance_id == device.instance_id;
    description.devices.iter().find(is_it).filter(|device| !device.is_opaque())
}

/// What the description of another image says of a section of that name and version; the same instance if it can be,
/// or else any: all processors of a guest are alike.
fn alike<'a>(description: &'a VmDescription, section: &DeviceSection) -> Option<&'a Device> {
    let is_alike = |device: &&Device| {
        section.idstr == device.name.as_str()
            && device.version == Some(i64::from(section.version_id))
            && !device.is_opaque()
    };
    let same = named(description, section).filter(is_alike);
    same.or_else(|| description.devices.iter().find(is_alike))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_named_whole_or_behind_its_last_slash() {
        for (idstr, name, expected) in [
            ("0000:00:02.0/virtio-net", "virtio-net", true),
            ("0000:00:02.0/virtio-net", "net", false),
            ("cpu", "cpu", false),
            ("a/b/c", "b/c", true),
        ] {
            assert_eq!(ends_in(idstr, name), expected, "{idstr}");
        }
    }

    #[test]
    fn versions_have_two_numbers() {
        for (text, expected) in
            [("10.0.2", Some((10, 0))), ("7.2", Some((7, 2))), ("7", None), ("", None), ("x.y", None)]
        {
            assert_eq!(major_minor(text), expected, "{text}");
        }
    }
}
