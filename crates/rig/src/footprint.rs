//! What a QEMU shows of those who dealt with it: everything that a job must leave as it found it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};
use vmstate::Cancel;
use vmstate::net::QmpAddress;
use vmstate::qmp::{Capability, Client};

use crate::DEADLINE;

/// A QEMU's settings, descriptor sets and open descriptors at one moment.
///
/// Two that were taken of a QEMU that nobody has changed are equal.
#[derive(Clone, Debug, PartialEq)]
pub struct Footprint {
    /// Every migration capability.
    pub capabilities: Vec<Capability>,
    /// Every migration parameter.
    pub parameters: Map<String, Value>,
    /// The answer of `query-fdsets`.
    pub fdsets: Value,
    /// How many descriptors there are of each file, or of each kind where they have no name.
    pub descriptors: BTreeMap<String, usize>,
}

impl Footprint {
    /// In what the later one differs, a line each.
    pub fn changes(&self, later: &Footprint) -> Vec<String> {
        let mut changes = Vec::new();
        for (before, after) in self.capabilities.iter().zip(&later.capabilities) {
            if before != after {
                changes.push(format!("{before:?} became {after:?}"));
            }
        }
        for (name, before) in &self.parameters {
            if later.parameters.get(name) != Some(before) {
                changes.push(format!("{name}: {before} became {:?}", later.parameters.get(name)));
            }
        }
        if self.fdsets != later.fdsets {
            changes.push(format!("fdsets: {} became {}", self.fdsets, later.fdsets));
        }
        for name in self.descriptors.keys().chain(later.descriptors.keys()).collect::<BTreeSet<_>>() {
            let count = |footprint: &Footprint| footprint.descriptors.get(name).copied().unwrap_or(0);
            if count(self) != count(later) {
                changes.push(format!("{name}: {} descriptors became {}", count(self), count(later)));
            }
        }
        changes
    }

    /// Takes it, through the monitor at `qmp` of process `pid`.
    ///
    /// A monitor greets the next client when it has closed the connection of the one before, so that one's
    /// descriptors do not count any more.
    ///
    /// # Panics
    /// When QEMU does not answer.
    pub fn of(qmp: &Path, pid: u32) -> Footprint {
        let mut client =
            Client::connect(&QmpAddress::Unix(qmp.to_owned()), &Cancel::new().expect("an eventfd"))
                .unwrap_or_else(|error| panic!("{}", error.chain()));
        client.timeout = Some(DEADLINE);
        Footprint {
            capabilities: client.capabilities().expect("capabilities"),
            parameters: client.parameters().expect("parameters"),
            fdsets: client.execute("query-fdsets", json!({})).expect("fdsets"),
            descriptors: descriptors(pid),
        }
    }
}

fn descriptors(pid: u32) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("QEMU's descriptors") {
        // One that was closed while the directory was read is not there.
        let Ok(target) = std::fs::read_link(entry.expect("an entry").path()) else { continue };
        let name = target.to_string_lossy().into_owned();
        // `socket:[12345]`: the number is another each time.
        let name = name.split_once(":[").map_or(name.clone(), |(kind, _)| kind.to_owned());
        *counts.entry(name).or_insert(0) += 1;
    }
    counts
}
