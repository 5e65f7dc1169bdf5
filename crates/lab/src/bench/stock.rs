//! QEMU on its own: how it saves and loads a guest by nothing but its own commands.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use vmstate::qmp::{Capability, Client};
use vmstate::{Cancel, Error, Kind, Result};

use super::Way;

/// As many channels as libvirt's published table has.
const CHANNELS: u8 = 8;
/// No limit, in bytes per second. The default, 128 MiB/s, throttles files as well.
const BANDWIDTH_MAX: u64 = 1 << 60;

/// What QEMU 10.0 says to `cont` while it cleans up (`qmp_cont` of monitor/qmp-cmds.c), how often it is asked then, and
/// for how long.
const NOT_CLEAN: &str = "not finalized";
const CLEANING_INTERVAL: Duration = Duration::from_millis(1);
const CLEANING_DEADLINE: Duration = Duration::from_secs(30);

/// What a QEMU can do by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    mapped_ram: bool,
    direct_io: bool,
}

impl Abilities {
    /// Asks a QEMU; direct I/O takes a file system that has it as well.
    pub fn of(client: &mut Client, has_direct_io: bool) -> Result<Abilities> {
        let mapped_ram = client.capabilities()?.iter().any(|capability| capability.name == "mapped-ram");
        let knows_direct_io = client.parameters()?.contains_key("direct-io");
        Ok(Abilities { mapped_ram, direct_io: mapped_ram && knows_direct_io && has_direct_io })
    }

    /// Whether it can go that way.
    pub fn has(self, way: Way) -> bool {
        match way {
            Way::QemuStream | Way::Vmstate => true,
            Way::QemuMapped | Way::QemuChannels => self.mapped_ram,
            Way::QemuOneDirect | Way::QemuDirect => self.direct_io,
        }
    }
}

/// Readies QEMU for one of its own ways. A QEMU is not asked to switch off what it does not know.
pub fn configure(client: &mut Client, way: Way) -> Result<()> {
    let known = client.capabilities()?;
    let wanted = |name: &str| match name {
        "events" => true,
        "mapped-ram" => !matches!(way, Way::QemuStream | Way::Vmstate),
        "multifd" => channels(way).is_some(),
        _ => false,
    };
    let switches: Vec<_> = known
        .iter()
        .filter(|capability| matches!(capability.name.as_str(), "events" | "mapped-ram" | "multifd"))
        .map(|capability| Capability { name: capability.name.clone(), state: wanted(&capability.name) })
        .collect();
    client.set_capabilities(&switches)?;
    let mut parameters = Map::new();
    parameters.insert("max-bandwidth".to_owned(), json!(BANDWIDTH_MAX));
    if let Some(channels) = channels(way) {
        parameters.insert("multifd-channels".to_owned(), json!(channels));
    }
    if client.parameters()?.contains_key("direct-io") {
        parameters
            .insert("direct-io".to_owned(), Value::Bool(matches!(way, Way::QemuOneDirect | Way::QemuDirect)));
    }
    client.set_parameters(parameters)
}

/// How many channels multifd has; `None` where it is off.
fn channels(way: Way) -> Option<u8> {
    match way {
        Way::QemuOneDirect => Some(1),
        Way::QemuChannels | Way::QemuDirect => Some(CHANNELS),
        Way::QemuStream | Way::QemuMapped | Way::Vmstate => None,
    }
}

/// Pauses the guest and has QEMU save it into `image`.
pub fn save(client: &mut Client, image: &Path) -> Result<()> {
    client.stop()?;
    client.migrate(&uri(image))?;
    await_end(client)
}

/// Lets the guest of a save that is over run on. QEMU calls a migration completed before it has cleaned up after it, and
/// refuses `cont` until then.
pub fn run_on(client: &mut Client, cancel: &Cancel) -> Result<()> {
    let until = Instant::now() + CLEANING_DEADLINE;
    loop {
        match client.cont() {
            Err(error) if error.to_string().contains(NOT_CLEAN) && Instant::now() < until => {
                if cancel.wait(CLEANING_INTERVAL) {
                    return Err(Error::interrupted());
                }
            }
            done => return done,
        }
    }
}

/// Has QEMU load `image` and run the guest.
pub fn load(client: &mut Client, image: &Path) -> Result<()> {
    client.execute("migrate-incoming", json!({ "uri": uri(image), "exit-on-error": false }))?;
    await_end(client)?;
    client.cont()
}

fn uri(image: &Path) -> String {
    format!("file:{}", image.display())
}

fn await_end(client: &mut Client) -> Result<()> {
    loop {
        let now = client.migration()?;
        match now.status.as_str() {
            "completed" => return Ok(()),
            "failed" | "cancelled" => {
                let reason = now.error.unwrap_or(now.status);
                return Err(Error::new(Kind::Peer, format!("QEMU's own migration: {reason}")));
            }
            _ => drop(client.next_event(None)?),
        }
    }
}
