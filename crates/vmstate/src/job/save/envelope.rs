//! What libvirt puts in front of a guest, and the choice of its format.

use std::path::PathBuf;

use io::{Cancel, TargetKind};
use serde_json::{Value, json};
use wire::libvirt::PayloadFormat;
use wire::libvirt_rpc::{Arguments, Procedure, decode_double_word, decode_word};

use super::{SaveFormat, SaveSettings, writing};
use crate::job::Observer;
use crate::libvirt::{Connection, DomainName, GivingUp, LibvirtUri};
use crate::net::QmpAddress;
use crate::qmp::Version;
use crate::sink::{Domain, Envelope};
use crate::source::require_domain_xml;
use crate::{Error, Kind, Result};

/// The first libvirt that reads `sparse` images: 11.2.
const SPARSE_SINCE: u64 = 11_002_000;
/// The first libvirt that reads images compressed by zstd: 10.4.
const ZSTD_SINCE: u64 = 10_004_000;
/// The first QEMU that loads them as vmstate lays them out: 9.0, of which libvirt asks mapped-ram and multifd.
const MAPPED_RAM_SINCE: (u32, u32) = (9, 0);

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
        return match (format, settings.domain_xml.clone()) {
            (SaveFormat::Libvirt(payload), Some(xml)) => {
                require_domain_xml(&xml)?;
                Ok((format, Some(Envelope::new(payload, Domain { xml, cookie: None })?)))
            }
            (SaveFormat::Libvirt(_), None) => {
                Err(Error::new(Kind::Misuse, "an image of libvirt begins with its description of the domain")
                    .hint("name the domain by --domain instead of --qmp, or give its XML by --xml"))
            }
            (_, Some(_)) => Err(Error::new(
                Kind::Misuse,
                "only an image of libvirt begins with a description of the domain",
            )
            .hint("leave the XML out, or name one of libvirt's formats by --format")),
            (_, None) => Ok((format, None)),
        };
    };
    if settings.domain_xml.is_some() {
        return Err(Error::new(Kind::Misuse, "libvirt describes its domain itself")
            .hint("leave the XML out; virsh save-image-define changes it in the image"));
    }
    let mut libvirt = Connection::open(uri, GivingUp::Cancelled(cancel.clone()))?;
    let domain = libvirt.find(name)?;
    let wanted = match settings.format {
        Some(format) => {
            warn_of_strangers(format, &mut libvirt, observer)?;
            format
        }
        None => SaveFormat::Libvirt(usual(&mut libvirt, uri, &domain, kind, observer)?),
    };
    let format = writing::format_for(Some(wanted), kind)?;
    let SaveFormat::Libvirt(payload) = format else { return Ok((format, None)) };
    let text = libvirt.saved_text(&domain)?;
    let described = Domain { xml: text.xml, cookie: text.cookie };
    Ok((format, Some(Envelope::new(payload, described)?)))
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
    let version = library_version(libvirt)?;
    let qemu = qemu_version(libvirt, domain)?;
    let sparse =
        version >= SPARSE_SINCE && (qemu.major, qemu.minor) >= MAPPED_RAM_SINCE && kind == TargetKind::File;
    let format = if sparse { PayloadFormat::Sparse } else { PayloadFormat::Raw };
    if let Some((path, configured)) = configured_format(libvirt, uri) {
        let known = PayloadFormat::ALL.into_iter().find(|format| format.name() == configured);
        let can = |known: &PayloadFormat| {
            version >= known_since(*known) && (*known != PayloadFormat::Sparse || sparse)
        };
        match known.filter(can) {
            Some(known) => {
                observer.note(&format!("format libvirt-{known}: save_image_format of {}", path.display()));
                return Ok(known);
            }
            None => observer.warn(&format!(
                "{} wants save images as `{configured}`, which cannot be had here: it is {format} instead",
                path.display()
            )),
        }
    }
    observer.note(&format!("format libvirt-{format}: libvirt {}, QEMU {qemu}", dotted(version)));
    Ok(format)
}

/// The first libvirt that reads images of this format; 0 where all of them do.
fn known_since(format: PayloadFormat) -> u64 {
    match format {
        PayloadFormat::Sparse => SPARSE_SINCE,
        PayloadFormat::Zstd => ZSTD_SINCE,
        _ => 0,
    }
}

/// Tells of a format that was asked for and that the domain's own libvirt cannot restore: the image may be meant for
/// another host.
fn warn_of_strangers(format: SaveFormat, libvirt: &mut Connection, observer: &dyn Observer) -> Result<()> {
    let SaveFormat::Libvirt(payload) = format else { return Ok(()) };
    let since = known_since(payload);
    if since == 0 {
        return Ok(());
    }
    let version = library_version(libvirt)?;
    if version < since {
        observer.warn(&format!(
            "libvirt {} here does not restore libvirt-{payload}, which came with {}",
            dotted(version),
            dotted(since)
        ));
    }
    Ok(())
}

/// The daemon's version, as libvirt counts: major × 1,000,000 + minor × 1,000 + release.
fn library_version(libvirt: &mut Connection) -> Result<u64> {
    let answer = libvirt.call(Procedure::ConnectGetLibVersion, &Arguments::new())?;
    decode_double_word(&answer, 0)
        .map_err(|error| Error::new(Kind::Peer, "libvirt's version is not understood").because(error))
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

/// What the daemon's configuration says of the format of save images, and where, if it can be read and says anything.
fn configured_format(libvirt: &Connection, uri: &LibvirtUri) -> Option<(PathBuf, String)> {
    let path = libvirt.path_from_here(&configuration(uri)?);
    let format = std::fs::read_to_string(&path).ok()?.lines().filter_map(save_image_format).next_back()?;
    Some((path, format))
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
/// [`Kind::Misuse`] where the domain's name is none of a file, and for one that libvirt forgets with its end; others as [`Connection::open`].
pub fn managed_image(uri: &LibvirtUri, name: &DomainName, cancel: &Cancel) -> Result<PathBuf> {
    let mut libvirt = Connection::open(uri, GivingUp::Cancelled(cancel.clone()))?;
    let domain = libvirt.find(name)?;
    managed_image_of(&mut libvirt, uri, &domain)
}

/// As [`managed_image`], of this domain.
pub(super) fn managed_image_of(
    libvirt: &mut Connection,
    uri: &LibvirtUri,
    domain: &wire::libvirt_rpc::Domain,
) -> Result<PathBuf> {
    let name = &domain.name;
    let answer = libvirt.call(Procedure::DomainIsPersistent, &Arguments::new().domain(domain))?;
    let is_persistent = decode_word(&answer, 0).map_err(|error| {
        Error::new(Kind::Peer, "whether a domain is persistent is not understood").because(error)
    })?;
    if is_persistent == 0 {
        let clause = format!(
            "domain `{name}` is transient: libvirt forgets it with its end, and `virsh start` knows no such"
        );
        return Err(Error::new(Kind::Misuse, clause).hint(
            "save it into an image of its own, for virsh restore; or make it persistent by virsh define",
        ));
    }
    let folder = match configuration(uri) {
        Some(_) if uri.driver().ends_with("/system") => PathBuf::from("/var/lib/libvirt/qemu"),
        Some(configuration) => configuration.with_file_name("qemu"),
        None => return Err(Error::new(Kind::Misuse, "HOME is not set, so libvirt's folder is not known")),
    };
    if name.contains('/') {
        return Err(Error::new(Kind::Misuse, format!("domain `{name}` has no managed image")));
    }
    Ok(libvirt.path_from_here(&folder.join("save").join(format!("{name}.save"))))
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
