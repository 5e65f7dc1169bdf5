//! The start of a stream: magic, version, configuration.

use page::PageSize;

use crate::IdStr;

use super::format::{MAPPED_RAM, VALIDATED_CAPABILITIES, X_IGNORE_SHARED};

/// What a stream starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The configuration section; absent in the output of `xen-save-devices-state` and where
    /// `migration.send-configuration` is off.
    pub configuration: Option<Configuration>,
}

/// The configuration section: what must agree between the two machines before anything else is read.
///
/// The subsections appear in the order of the fields here. Others than these cannot be skipped, for they
/// carry no length: a stream with an unknown one is refused as unsupported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// The machine type, for example `pc-q35-10.0`.
    pub machine: IdStr,
    /// The binary logarithm of the target's page size; written only where it is above the target's least.
    pub target_page_bits: Option<u32>,
    /// The capabilities that must be on at both ends and, of those QEMU records, no others.
    pub capabilities: Vec<IdStr>,
    /// The UUID, where `validate-uuid` is on.
    pub uuid: Option<[u8; 16]>,
}

impl Configuration {
    /// A configuration that names the machine and nothing else.
    pub fn new(machine: IdStr) -> Configuration {
        Configuration { machine, target_page_bits: None, capabilities: Vec::new(), uuid: None }
    }

    /// Whether the capability is recorded.
    pub fn has_capability(&self, name: &str) -> bool {
        self.capabilities.iter().any(|capability| *capability == name)
    }

    /// Whether the stream has pages at fixed offsets of its file.
    pub fn is_mapped_ram(&self) -> bool {
        self.has_capability(MAPPED_RAM)
    }

    /// Whether the stream lists shared blocks without their pages.
    pub fn ignores_shared(&self) -> bool {
        self.has_capability(X_IGNORE_SHARED)
    }

    /// The same configuration with a capability added, in the place where QEMU writes it.
    ///
    /// One that is there already is not added twice; one that QEMU does not record goes last.
    pub fn with_capability(mut self, name: IdStr) -> Configuration {
        if !self.has_capability(&name) {
            let rank = rank(&name);
            let place = self.capabilities.iter().position(|other| self::rank(other) > rank);
            self.capabilities.insert(place.unwrap_or(self.capabilities.len()), name);
        }
        self
    }

    /// The same configuration without a capability.
    pub fn without_capability(mut self, name: &str) -> Configuration {
        self.capabilities.retain(|capability| *capability != name);
        self
    }

    /// The target's page size, where the configuration tells it.
    pub fn page_size(&self) -> Option<PageSize> {
        self.target_page_bits.and_then(|bits| PageSize::new(1u64.checked_shl(bits)?))
    }
}

fn rank(capability: &str) -> usize {
    VALIDATED_CAPABILITIES.iter().position(|name| *name == capability).unwrap_or(VALIDATED_CAPABILITIES.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> IdStr {
        IdStr::new(text).unwrap()
    }

    #[test]
    fn capabilities_stand_in_qemus_order() {
        for (added, expected) in [
            (vec!["mapped-ram"], vec!["mapped-ram"]),
            (vec!["mapped-ram", "x-ignore-shared"], vec!["x-ignore-shared", "mapped-ram"]),
            (vec!["other", "mapped-ram"], vec!["mapped-ram", "other"]),
            (vec!["mapped-ram", "mapped-ram"], vec!["mapped-ram"]),
        ] {
            let configuration = added
                .iter()
                .fold(Configuration::new(name("pc")), |c, capability| c.with_capability(name(capability)));
            assert_eq!(configuration.capabilities, expected, "{added:?}");
            assert!(!configuration.without_capability("mapped-ram").is_mapped_ram());
        }
    }
}
