//! What libvirt puts in front of a guest, and the choice of its format.

use std::path::{Path, PathBuf};

use io::{Cancel, TargetKind};
use serde_json::{Value, json};
use wire::libvirt::{Head, PayloadFormat};
use wire::libvirt_rpc::{Arguments, Procedure, decode_double_word};

use super::{SaveFormat, SaveSettings, writing};
use crate::job::Observer;
use crate::libvirt::{Connection, DomainName, GivingUp, LibvirtUri};
use crate::net::QmpAddress;
use crate::qmp::Version;
use crate::{Error, Kind, Result};

/// The first libvirt that reads `sparse` images: 11.2.
const SPARSE_SINCE: u64 = 11_002_000;
/// The first QEMU that loads them as vmstate lays them out: 9.0, of which libvirt asks mapped-ram and multifd.
const MAPPED_RAM_SINCE: (u32, u32) = (9, 0);

/// The head of an image of libvirt, but for whether the guest ran.
#[derive(Clone, Debug)]
pub(super) struct Envelope {
    head: Head,
}

impl Envelope {
    /// How many bytes it takes.
    pub(super) fn len(&self) -> u64 {
        self.head.len()
    }

    /// Its bytes, for a guest that comes back in the state `run_state`.
    pub(super) fn bytes(&self, run_state: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        Head { was_running: run_state == "running", ..self.head.clone() }.encode(&mut bytes);
        bytes
    }
}

/// The format that the image gets, and what is put in front of it.
///
/// # Errors
/// As [`writing::format_for`]; [`Kind::Misuse`] where the format needs a domain and there is none; others as
/// [`Connection::open`].
pub(super) fn choose(
    settings: &SaveSettings,
    kind: TargetKind,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Result<(SaveFormat, Option<Envelope>)> {
    let QmpAddress::Domain { uri, name } = &settings.qmp else {
        let format = writing::format_for(settings.format, kind)?;
        return match format {
            SaveFormat::Libvirt(_) => {
                Err(Error::new(Kind::Misuse, "an image of libvirt begins with its description of the domain")
                    .hint("name the domain by --domain instead of --qmp, or convert the image afterwards"))
            }
            SaveFormat::MappedRam | SaveFormat::Stream => Ok((format, None)),
        };
    };
    let mut libvirt = Connection::open(uri, GivingUp::Cancelled(cancel.clone()))?;
    let domain = libvirt.find(name)?;
    let wanted = match settings.format {
        Some(format) => format,
        None => SaveFormat::Libvirt(usual(&mut libvirt, uri, &domain, kind, observer)?),
    };
    let format = writing::format_for(Some(wanted), kind)?;
    let SaveFormat::Libvirt(payload) = format else { return Ok((format, None)) };
    let text = libvirt.saved_text(&domain)?;
    let head = Head::new(payload, true, text.xml, text.cookie).map_err(|fault| {
        Error::new(Kind::Unsupported, "libvirt's description of the domain fits no image").because(fault)
    })?;
    Ok((format, Some(Envelope { head })))
}

/// The format that a user of this libvirt expects: the one that its configuration names, else the one that is written
/// and read in parallel where libvirt and QEMU know it, else the one that all of them know.
fn usual(
    libvirt: &mut Connection,
    uri: &LibvirtUri,
    domain: &wire::libvirt_rpc::Domain,
    kind: TargetKind,
    observer: &dyn Observer,
) -> Result<PayloadFormat> {
    let answer = libvirt.call(Procedure::ConnectGetLibVersion, &Arguments::new())?;
    let version = decode_double_word(&answer, 0)
        .map_err(|error| Error::new(Kind::Peer, "libvirt's version is not understood").because(error))?;
    let qemu = qemu_version(libvirt, domain)?;
    let sparse =
        version >= SPARSE_SINCE && (qemu.major, qemu.minor) >= MAPPED_RAM_SINCE && kind == TargetKind::File;
    let format = if sparse { PayloadFormat::Sparse } else { PayloadFormat::Raw };
    let configured = configuration(uri).and_then(|path| configured_format(&path));
    match configured.as_deref() {
        Some("raw") => Ok(PayloadFormat::Raw),
        Some("sparse") | None => {
            observer.note(&format!("format libvirt-{format}: libvirt {}, QEMU {qemu}", dotted(version)));
            Ok(format)
        }
        Some(other) => {
            observer.warn(&format!(
                "qemu.conf wants save images as {other}: a guest is saved as {format} and can be converted afterwards"
            ));
            Ok(format)
        }
    }
}

fn qemu_version(libvirt: &mut Connection, domain: &wire::libvirt_rpc::Domain) -> Result<Version> {
    let command = json!({ "execute": "query-version" }).to_string();
    let arguments = Arguments::new().domain(domain).string(&command).word(0);
    let answer = libvirt.call_for_text(Procedure::QemuMonitorCommand, &arguments)?;
    let mut answer: Value = serde_json::from_str(&answer).unwrap_or_default();
    Version::from_answer(&answer["return"].take())
}

/// libvirt's number of a version, as people write it.
fn dotted(version: u64) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000)
}

/// Where the configuration of this daemon's QEMU driver is.
fn configuration(uri: &LibvirtUri) -> Option<PathBuf> {
    if uri.driver().ends_with("/system") {
        return Some(PathBuf::from("/etc/libvirt/qemu.conf"));
    }
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config"));
    let folder = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).or_else(home)?;
    Some(folder.join("libvirt/qemu.conf"))
}

/// What the configuration says of the format of save images, if it can be read and says anything.
fn configured_format(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()?.lines().filter_map(save_image_format).next_back()
}

fn save_image_format(line: &str) -> Option<String> {
    let value = line.trim().strip_prefix("save_image_format")?.trim_start().strip_prefix('=')?.trim_start();
    let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let (format, _) = value[1..].split_once(quote)?;
    Some(format.to_owned())
}

/// Where libvirt keeps the image from which it starts this domain the next time.
///
/// # Errors
/// [`Kind::Misuse`] where the domain's name is none of a file; others as [`Connection::open`].
pub fn managed_image(uri: &LibvirtUri, name: &DomainName, cancel: &Cancel) -> Result<PathBuf> {
    let mut libvirt = Connection::open(uri, GivingUp::Cancelled(cancel.clone()))?;
    let domain = libvirt.find(name)?;
    let folder = match configuration(uri) {
        Some(_) if uri.driver().ends_with("/system") => PathBuf::from("/var/lib/libvirt/qemu"),
        Some(configuration) => configuration.with_file_name("qemu"),
        None => return Err(Error::new(Kind::Misuse, "HOME is not set, so libvirt's folder is not known")),
    };
    if domain.name.contains('/') {
        return Err(Error::new(Kind::Misuse, format!("domain `{}` has no managed image", domain.name)));
    }
    Ok(folder.join("save").join(format!("{}.save", domain.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_of_a_configuration_is_found() {
        for (line, expected) in [
            ("save_image_format = \"zstd\"", Some("zstd")),
            ("  save_image_format='raw' # here", Some("raw")),
            ("#save_image_format = \"raw\"", None),
            ("save_image_format_other = \"raw\"", None),
            ("save_image_format = raw", None),
            ("dump_image_format = \"raw\"", None),
        ] {
            assert_eq!(save_image_format(line).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn a_version_is_written_as_people_do() {
        assert_eq!(dotted(SPARSE_SINCE), "11.2.0");
        assert_eq!(dotted(9_000_001), "9.0.1");
    }
}
