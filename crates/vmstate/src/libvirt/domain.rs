//! A domain, and what libvirt says of it.

use std::fmt;

use wire::libvirt_rpc::format::{VIR_DOMAIN_XML_MIGRATABLE, VIR_DOMAIN_XML_SECURE};
use wire::libvirt_rpc::{Arguments, Domain, Procedure, decode_domain};

use super::Connection;
use crate::{Error, Kind, Result};

/// How a user names a domain: by its name, its UUID, or the number of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainName(pub String);

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What libvirt puts before the state of a domain that it saves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedText {
    /// The domain's XML, passwords included, as libvirt itself would store it.
    pub xml: String,
    /// The cookie: the processor as QEMU made it.
    pub cookie: Option<String>,
}

impl Connection {
    /// Finds a domain. As virsh does, a number is tried as that of a run first, then the UUID, then the name.
    ///
    /// # Errors
    /// [`Kind::Peer`] where there is none; [`Kind::Misuse`] where it does not run.
    pub fn find(&mut self, name: &DomainName) -> Result<Domain> {
        let domain = self.look_up(name)?;
        if domain.id < 0 {
            return Err(Error::new(Kind::Misuse, format!("domain `{name}` does not run"))
                .hint(format!("start it: virsh -c {} start {name}", self.name())));
        }
        Ok(domain)
    }

    fn look_up(&mut self, name: &DomainName) -> Result<Domain> {
        let DomainName(text) = name;
        let mut tries = Vec::new();
        if let Ok(id) = text.parse::<u32>() {
            tries.push((Procedure::DomainLookupById, Arguments::new().word(id)));
        }
        if let Some(uuid) = parse_uuid(text) {
            tries.push((Procedure::DomainLookupByUuid, Arguments::new().opaque(&uuid)));
        }
        for (procedure, arguments) in tries {
            match self.call(procedure, &arguments) {
                Ok(answer) => return self.domain(&answer),
                Err(error) if error.is_refusal() => {}
                Err(error) => return Err(error),
            }
        }
        let answer = self.call(Procedure::DomainLookupByName, &Arguments::new().string(text))?;
        self.domain(&answer)
    }

    fn domain(&self, answer: &[u8]) -> Result<Domain> {
        decode_domain(answer, 0).map_err(|error| {
            Error::new(Kind::Peer, format!("what {} sent is not understood", self.name()))
                .because(error.at_end())
        })
    }

    /// What libvirt would put before the domain's state.
    ///
    /// # Errors
    /// As [`Connection::call`]; [`Kind::Peer`] where the XML is none.
    pub fn saved_text(&mut self, domain: &Domain) -> Result<SavedText> {
        let mut describe = |flags: u32| {
            self.call_for_text(Procedure::DomainGetXmlDesc, &Arguments::new().domain(domain).word(flags))
        };
        let xml = describe(VIR_DOMAIN_XML_SECURE | VIR_DOMAIN_XML_MIGRATABLE)?;
        // The processor of the running guest, with every feature that QEMU gave it, is told only without the flag that
        // makes the text one for older versions.
        let live = describe(VIR_DOMAIN_XML_SECURE)?;
        Ok(SavedText { cookie: cookie(&live)?, xml })
    }
}

/// The name of the domain that an XML describes.
///
/// # Errors
/// [`Kind::Damaged`] where it is none.
pub(crate) fn name_of(xml: &str) -> Result<String> {
    let unclear = || Error::new(Kind::Damaged, "the domain's XML is not understood");
    let document = roxmltree::Document::parse(xml).map_err(|error| unclear().because(error))?;
    let name = document.root_element().children().find(|child| child.has_tag_name("name"));
    name.and_then(|name| name.text()).map(str::to_owned).ok_or_else(unclear)
}

/// The cookie as libvirt writes it: the element `cpu` of the running domain. A domain without one has no cookie that
/// says anything.
fn cookie(live: &str) -> Result<Option<String>> {
    let document = roxmltree::Document::parse(live).map_err(|error| {
        Error::new(Kind::Peer, "libvirt's XML of the domain is not understood").because(error)
    })?;
    let cpu = document.root_element().children().find(|child| child.has_tag_name("cpu"));
    Ok(cpu.map(|cpu| {
        let cpu = &live[cpu.range()];
        format!("<cookie>\n  {cpu}\n  <slirpHelper/>\n</cookie>\n")
    }))
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_with_and_without_hyphens() {
        let expected = Some(*b"\x12\x34\x56\x78\x9a\xbc\xde\xf0\x12\x34\x56\x78\x9a\xbc\xde\xf0");
        assert_eq!(parse_uuid("12345678-9abc-def0-1234-56789abcdef0"), expected);
        assert_eq!(parse_uuid("123456789ABCDEF0123456789abcdef0"), expected);
        assert_eq!(parse_uuid("12345678-9abc-def0-1234-56789abcdefg"), None);
        assert_eq!(parse_uuid("fx"), None);
    }

    #[test]
    fn the_cookie_is_the_processor_as_it_stands() {
        let cpu = "<cpu mode='custom' match='exact' check='full'>\n    <model>qemu64</model>\n  </cpu>";
        let live =
            format!("<domain type='qemu' id='1'>\n  <name>fx</name>\n  {cpu}\n  <devices/>\n</domain>\n");
        let expected = format!("<cookie>\n  {cpu}\n  <slirpHelper/>\n</cookie>\n");
        assert_eq!(cookie(&live).unwrap(), Some(expected));
        assert_eq!(cookie("<domain><devices><cpu/></devices></domain>").unwrap(), None);
        assert_eq!(
            cookie("<domain>").unwrap_err().to_string(),
            "libvirt's XML of the domain is not understood"
        );
    }
}
