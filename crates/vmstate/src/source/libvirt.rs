//! Where QEMU's bytes are in an image: at its start, or behind a head of libvirt's.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;
use wire::libvirt::survey::{HeadReport, head as survey_head};
use wire::libvirt::{Head, PayloadFormat};
use wire::{DecodeError, Report};

use super::Bounds;
use super::mapped_ram::faulty;
use crate::{Error, Kind, Result};

/// What both magics of libvirt's have in common.
const MAGIC: &[u8] = b"LibvirtQemud";
/// As many bytes as the longest magic of a payload has.
pub(super) const FIRST_LEN: u64 = 16;

/// Where the payload of an image is, and what stands before it.
#[derive(Clone, Debug)]
pub struct Payload {
    /// libvirt's head, where there is one.
    pub head: Option<Head>,
    /// The offset of QEMU's bytes, or of what they were compressed to.
    pub at: u64,
}

impl Payload {
    /// The payload of an image that starts at the offset `start` of a file.
    ///
    /// # Errors
    /// [`Kind::Damaged`] and [`Kind::Unsupported`] at the first fault of a head, with file, offset and field;
    /// [`Kind::Io`].
    pub fn of(file: &File, path: &Path, start: u64) -> Result<Payload> {
        let bounds = Bounds::of(file, path, start)?;
        if !is_libvirts(file, path, bounds)? {
            return Ok(Payload { head: None, at: start });
        }
        let mut bytes = Vec::new();
        let head = loop {
            match Head::decode(&bytes, start, bounds.end) {
                Ok(head) => break head,
                Err(DecodeError::Incomplete { needed, .. }) => more(file, path, start, &mut bytes, needed)?,
                Err(DecodeError::Fault(fault)) if bytes.starts_with(MAGIC) && is_cut_short(&bytes) => {
                    return Err(faulty(path, fault).hint(
                        "libvirt was stopped while it wrote it, or still writes it; what there is of it is told by \
                         `vmstate check`",
                    ));
                }
                Err(DecodeError::Fault(fault)) => return Err(faulty(path, fault)),
            }
        };
        let at = start + head.len();
        let first = first(file, path, at, bounds.end)?;
        head.check_payload(&first, at).map_err(|fault| faulty(path, fault))?;
        Ok(Payload { head: Some(head), at })
    }

    /// The compressed format, where it is one.
    pub fn compressed(&self) -> Option<PayloadFormat> {
        self.head.as_ref().map(|head| head.format).filter(|format| format.is_compressed())
    }

    /// The run state that a restore brings the guest to, where QEMU's bytes record the one given. libvirt stops a guest
    /// before it has QEMU save it, so QEMU records `paused`, and libvirt's head what the guest was before.
    pub(crate) fn run_state(&self, recorded: Option<&'static str>) -> Option<&'static str> {
        effective_run_state(self.head.as_ref().map(|head| head.was_running), recorded)
    }

    /// All that is wrong with a head, and where the payload is all the same; no faults where there is no head.
    ///
    /// # Errors
    /// [`Kind::Io`]; where nothing behind the head can be found, [`Kind::Damaged`] with its first fault.
    pub(crate) fn survey(file: &File, path: &Path, start: u64) -> Result<(Option<Payload>, Report)> {
        let bounds = Bounds::of(file, path, start)?;
        if !is_libvirts(file, path, bounds)? {
            return Ok((Some(Payload { head: None, at: start }), Report::default()));
        }
        let mut bytes = Vec::new();
        let HeadReport { mut report, payload_at, head } = loop {
            match survey_head(&bytes, start, bounds.end) {
                Ok(report) => break report,
                Err(needed) => more(file, path, start, &mut bytes, needed)?,
            }
        };
        let (Some(head), Some(at)) = (head, payload_at) else { return Ok((None, report)) };
        if let Err(fault) = head.check_payload(&first(file, path, at, bounds.end)?, at) {
            report.push(fault);
            return Ok((None, report));
        }
        Ok((Some(Payload { head: Some(head), at }), report))
    }
}

/// The run state that counts where libvirt's head, if there is one, says whether the guest ran and QEMU recorded
/// another, or none.
pub(super) fn effective_run_state(
    was_running: Option<bool>,
    recorded: Option<&'static str>,
) -> Option<&'static str> {
    match was_running {
        Some(true) => Some("running"),
        Some(false) => Some(recorded.filter(|state| *state != "running").unwrap_or("paused")),
        None => recorded,
    }
}

/// Refuses an XML that libvirt would not take for the description of a domain, before it goes into an image.
///
/// # Errors
/// [`Kind::Misuse`] for what is no XML, or the XML of something else.
pub(crate) fn require_domain_xml(xml: &str) -> Result<()> {
    let hint = "give what `virsh dumpxml --migratable --security-info DOMAIN` prints";
    let document = roxmltree::Document::parse_with_options(xml, parsing_options()).map_err(|error| {
        Error::new(Kind::Misuse, "the description of the domain is no XML").because(error).hint(hint)
    })?;
    let name = document.root_element().tag_name().name();
    if name != ROOT_ELEMENT {
        let clause = format!(
            "the description of the domain is a <{}>, and not a <{ROOT_ELEMENT}>",
            name.escape_debug()
        );
        return Err(Error::new(Kind::Misuse, clause).hint(hint));
    }
    Ok(())
}

/// Whether bytes begin as a head does.
pub(super) fn is_head(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

fn is_libvirts(file: &File, path: &Path, bounds: Bounds) -> Result<bool> {
    Ok(is_head(&first(file, path, bounds.start, bounds.end)?))
}

fn is_cut_short(bytes: &[u8]) -> bool {
    bytes.starts_with(&wire::libvirt::format::QEMU_SAVE_PARTIAL)
}

fn first(file: &File, path: &Path, at: u64, end: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; end.saturating_sub(at).min(FIRST_LEN) as usize];
    file.read_exact_at(&mut bytes, at)
        .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))?;
    Ok(bytes)
}

/// Reads as many bytes more as a head asks for: it asks within the file and within its limits.
fn more(file: &File, path: &Path, start: u64, bytes: &mut Vec<u8>, needed: u64) -> Result<()> {
    let had = bytes.len();
    bytes.resize(had + needed as usize, 0);
    file.read_exact_at(&mut bytes[had..], start + had as u64)
        .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))
}

/// What a head tells of its domain. The fields are keys of `vmstate info --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DomainInfo {
    /// `raw`, `gzip`, `bzip2`, `xz`, `lzop`, `zstd` or `sparse`.
    pub format: &'static str,
    /// The domain's name.
    pub name: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// Whether a restore by libvirt lets it run.
    pub was_running: bool,
    /// The length of its XML.
    pub xml_bytes: u64,
    /// The length of libvirt's cookie, if there is one.
    pub cookie_bytes: Option<u64>,
    /// The offset of what libvirt had QEMU write.
    pub payload_offset: u64,
}

impl DomainInfo {
    /// What the head of a payload tells; `None` where it has none.
    pub fn of(payload: &Payload) -> Option<DomainInfo> {
        let head = payload.head.as_ref()?;
        let text = |element| child_text(&head.xml, element);
        Some(DomainInfo {
            format: head.format.name(),
            name: text("name"),
            uuid: text("uuid"),
            was_running: head.was_running,
            xml_bytes: head.xml.len() as u64,
            cookie_bytes: head.cookie.as_ref().map(|cookie| cookie.len() as u64),
            payload_offset: payload.at,
        })
    }
}

/// The most elements that an XML of a domain may have.
const NODES_MAX: u32 = 1 << 20;
/// The element that libvirt wants an image's XML to be: `virDomainDefParse` of src/conf/domain_conf.c, 11.3.
const ROOT_ELEMENT: &str = "domain";

fn parsing_options<'a>() -> roxmltree::ParsingOptions<'a> {
    roxmltree::ParsingOptions { nodes_limit: NODES_MAX, ..Default::default() }
}

/// The text of a child of the document's element; `None` where there is none, or the text is no XML.
fn child_text(xml: &str, element: &str) -> Option<String> {
    let document = roxmltree::Document::parse_with_options(xml, parsing_options()).ok()?;
    let found = document.root_element().children().find(|child| child.has_tag_name(element))?;
    found.text().map(|text| text.trim().to_owned())
}

/// Refuses a compressed payload in a build without codecs.
#[cfg(not(feature = "codecs"))]
pub(super) fn no_codec(path: &Path, format: PayloadFormat) -> Error {
    let clause = format!("{} is compressed by {format}, which this build does not read", path.display());
    Error::new(Kind::Unsupported, clause).hint("use a vmstate that was built with the feature `codecs`")
}

/// Opens what stands in a file from `at` to `end` for decompression.
///
/// # Errors
/// [`Kind::Io`]; [`Kind::Unsupported`] in a build without codecs.
#[cfg(feature = "codecs")]
pub(crate) fn decompress(
    file: &File,
    path: &Path,
    format: PayloadFormat,
    at: u64,
    end: u64,
) -> Result<crate::codec::Decompressor> {
    let Some(codec) = crate::codec::Codec::of(format) else {
        return Err(Error::new(Kind::Misuse, format!("a {format} image is not compressed")));
    };
    let cannot = |error| Error::io(format!("cannot read {}", path.display()), error);
    let file = file.try_clone().map_err(cannot)?;
    crate::codec::Decompressor::new(codec, file, at, end).map_err(cannot)
}

/// Decompresses what follows of what can be read once only, from the offset `at` on.
///
/// # Errors
/// As [`decompress`].
#[cfg(feature = "codecs")]
pub(crate) fn decompress_once(
    from: impl Read + Send + 'static,
    path: &Path,
    format: PayloadFormat,
    at: u64,
) -> Result<Box<dyn Read + Send>> {
    let Some(codec) = crate::codec::Codec::of(format) else {
        return Err(Error::new(Kind::Misuse, format!("a {format} image is not compressed")));
    };
    crate::codec::decompress_once(codec, from, at)
        .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))
}

/// As in a build with codecs: never a value.
#[cfg(not(feature = "codecs"))]
pub(crate) fn decompress_once(
    _from: impl Read + Send + 'static,
    path: &Path,
    format: PayloadFormat,
    _at: u64,
) -> Result<std::io::Empty> {
    Err(no_codec(path, format))
}

/// As in a build with codecs: never a value.
#[cfg(not(feature = "codecs"))]
pub(crate) fn decompress(
    _file: &File,
    path: &Path,
    format: PayloadFormat,
    _at: u64,
    _end: u64,
) -> Result<std::io::Empty> {
    Err(no_codec(path, format))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_domain_is_named_by_its_own_children_only() {
        let xml = "<domain><metadata><name>other</name></metadata><name> fx &amp; fy\n</name></domain>";
        assert_eq!(child_text(xml, "name").as_deref(), Some("fx & fy"));
        for none in ["", "<domain", "<domain/>", "<domain><name/></domain>"] {
            assert_eq!(child_text(none, "name"), None, "{none}");
        }
        let deep = "<a>".repeat(1 << 18);
        assert_eq!(child_text(&deep, "name"), None);
    }

    #[test]
    fn only_the_xml_of_a_domain_describes_one() {
        for good in [
            "<domain/>\n",
            "<?xml version='1.0'?>\n<!-- by hand -->\n<domain type='kvm'><name>a</name></domain>",
        ] {
            require_domain_xml(good).unwrap_or_else(|error| panic!("{good}: {}", error.chain()));
        }
        let no_xml = "the description of the domain is no XML";
        for (bad, expected) in [
            ("root:x:0:0:root:/root:/bin/bash\n", no_xml),
            ("", no_xml),
            ("<domain>", no_xml),
            ("<domain/><domain/>", no_xml),
            ("<network/>", "the description of the domain is a <network>, and not a <domain>"),
            ("<cookie><domain/></cookie>", "the description of the domain is a <cookie>, and not a <domain>"),
        ] {
            let error = require_domain_xml(bad).expect_err(bad);
            assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Misuse, expected), "{bad}");
        }
    }
}
