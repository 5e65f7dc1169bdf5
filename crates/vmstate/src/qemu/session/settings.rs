//! Capabilities and parameters: what is found is remembered and put back.

use serde_json::{Map, Value, json};

use super::Session;
use crate::qmp::{Begun, Capability, Client};
use crate::{Error, Kind, Result};

/// The capability that makes QEMU send `MIGRATION` events; the only one that may stay on for a probe.
const EVENTS: &str = "events";
/// The capabilities that get along with every parameter.
const HARMLESS: [&str; 2] = [EVENTS, PAUSE];
/// The capability that stops a migration before the guest is given up.
const PAUSE: &str = "pause-before-switchover";
/// A guest with so many bytes of RAM cannot come to the end of a probe: see [`cannot_complete`].
const ENDLESS_RAM_MIN: u64 = 64 << 20;
/// The longest downtime, in ms, for which that is so.
const ENDLESS_DOWNTIME_MAX: u64 = 10_000;
/// Changes of settings that are on their way.
#[derive(Debug)]
pub(in crate::qemu) struct Changing(Vec<Begun>);

impl Session {
    /// Whether QEMU knows a migration capability.
    ///
    /// # Errors
    /// As every QMP command.
    pub fn knows_capability(&mut self, name: &str) -> Result<bool> {
        Ok(self.client.capabilities()?.iter().any(|capability| capability.name == name))
    }

    /// Switches on exactly the capabilities `on` and `events`, every other one off, and sets `parameters`,
    /// leaving out those that this QEMU does not have.
    ///
    /// Capabilities outlive migrations: one left on by somebody else (mapped-ram after libvirt restored the
    /// guest) would make ours fail. What is found is remembered and put back by [`Session::settle`].
    ///
    /// # Errors
    /// As every QMP command.
    pub fn configure(&mut self, on: &[&str], parameters: &[(&str, Value)]) -> Result<()> {
        let (found, now) = self.settings()?;
        self.configure_from(found, &now, on, parameters)
    }

    fn configure_from(
        &mut self,
        found: Vec<Capability>,
        now: &Map<String, Value>,
        on: &[&str],
        parameters: &[(&str, Value)],
    ) -> Result<()> {
        if let Some(missing) = on.iter().find(|name| !found.iter().any(|c| c.name == **name)) {
            return Err(Error::new(
                Kind::Unsupported,
                format!("QEMU {} has no migration capability `{missing}`", self.version),
            ));
        }
        let wanted: Vec<Capability> = found
            .iter()
            .map(|found| {
                let state = found.name == EVENTS || on.contains(&found.name.as_str());
                Capability { state, ..found.clone() }
            })
            .collect();
        self.capabilities_found.get_or_insert_with(|| found.clone());
        self.capabilities_now = Some(found);
        let changes = self.changes(now, parameters);
        self.write_down()?;
        self.switch(&wanted, changes)
    }

    /// Of the parameters those that are not as they are to be, and that this QEMU has. What they were is remembered.
    fn changes(&mut self, now: &Map<String, Value>, parameters: &[(&str, Value)]) -> Map<String, Value> {
        let mut changes = Map::new();
        for (name, value) in parameters {
            match now.get(*name) {
                Some(found) if found != value => {
                    changes.insert((*name).to_owned(), value.clone());
                    // The first value found is the one to go back to.
                    self.parameters_found.entry(*name).or_insert_with(|| found.clone());
                }
                _ => {}
            }
        }
        changes
    }

    /// Asks for all settings, for [`Session::configure`] to take the answers.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn ask_settings(&mut self) -> Result<()> {
        let capabilities = self.client.begin("query-migrate-capabilities", json!({}))?;
        let parameters = self.client.begin("query-migrate-parameters", json!({}))?;
        self.settings_asked = Some((capabilities, parameters));
        Ok(())
    }

    /// All settings as they are now, or as they were when they were asked for.
    fn settings(&mut self) -> Result<(Vec<Capability>, Map<String, Value>)> {
        if self.settings_asked.is_none() {
            self.ask_settings()?;
        }
        let (capabilities, parameters) = self.settings_asked.take().expect("asked for just now");
        let capabilities = self.client.end(capabilities)?;
        let parameters = self.client.end(parameters)?;
        Ok((Capability::list(&capabilities)?, Client::parameters_of(parameters)?))
    }

    /// What was asked for is out of date.
    ///
    /// # Errors
    /// As every QMP command.
    pub(crate) fn forget_settings(&mut self) -> Result<()> {
        if self.settings_asked.is_some() {
            self.settings()?;
        }
        Ok(())
    }

    /// Begins to make the settings those of a probe of a guest with so many bytes of RAM. Capabilities are left alone where
    /// none is on that would make it fail, and the guest cannot come to its end.
    ///
    /// # Errors
    /// As [`Session::configure`].
    pub(in crate::qemu) fn begin_configuring_probe(
        &mut self,
        ram_bytes: u64,
        parameters: &[(&str, Value)],
    ) -> Result<Changing> {
        let (found, now) = self.settings()?;
        let is_plain = found.iter().all(|c| !c.state || HARMLESS.contains(&c.name.as_str()));
        let is_paused = found.iter().any(|c| c.state && c.name == PAUSE);
        if !is_plain || !(is_paused || cannot_complete(ram_bytes, &now)) {
            self.configure_from(found, &now, &[PAUSE], parameters)?;
            return Ok(Changing(Vec::new()));
        }
        let changes = self.changes(&now, parameters);
        let mut begun: Vec<_> = self.begin_writing_down()?.into_iter().collect();
        if !changes.is_empty() {
            begun.push(self.client.begin("migrate-set-parameters", Value::Object(changes))?);
        }
        Ok(Changing(begun))
    }

    /// Waits until settings have changed.
    ///
    /// # Errors
    /// As every QMP command.
    pub(in crate::qemu) fn end_changing(&mut self, changing: Changing) -> Result<()> {
        changing.0.into_iter().try_for_each(|begun| self.client.end(begun).map(drop))
    }

    /// Begins to put the parameters back, where nothing else was changed.
    ///
    /// # Errors
    /// As every QMP command.
    pub(in crate::qemu) fn begin_settings_back(&mut self) -> Result<Option<Begun>> {
        if self.capabilities_found.is_some() || self.parameters_found.is_empty() {
            return Ok(None);
        }
        let found = Value::Object(self.parameters_found.clone());
        self.client.begin("migrate-set-parameters", found).map(Some)
    }

    /// Puts all settings back, or waits until they are.
    ///
    /// # Errors
    /// As every QMP command.
    pub(in crate::qemu) fn end_settings_back(&mut self, begun: Option<Begun>) -> Result<()> {
        match begun {
            Some(begun) => {
                self.client.end(begun)?;
                self.parameters_found.clear();
                Ok(())
            }
            None => self.settings_back(),
        }
    }

    pub(super) fn settings_back(&mut self) -> Result<()> {
        let parameters = self.parameters_found.clone();
        match self.capabilities_found.clone() {
            Some(found) => self.switch(&found, parameters)?,
            None if parameters.is_empty() => {}
            None => self.client.set_parameters(parameters)?,
        }
        self.capabilities_found = None;
        self.parameters_found.clear();
        Ok(())
    }

    /// Brings QEMU's capabilities to `wanted` and changes `parameters`.
    ///
    /// QEMU refuses some of the one beside some of the other (mapped-ram beside compression), so nothing is
    /// on that is not [`HARMLESS`] while parameters change.
    pub(in crate::qemu) fn switch(
        &mut self,
        wanted: &[Capability],
        parameters: Map<String, Value>,
    ) -> Result<()> {
        let now = match self.capabilities_now.take() {
            Some(now) => now,
            None => self.client.capabilities()?,
        };
        let keep = |name: &str| {
            let stays = wanted.iter().any(|c| c.name == name && c.state);
            HARMLESS.contains(&name) || stays && parameters.is_empty()
        };
        let off: Vec<_> = now
            .iter()
            .filter(|c| c.state && !keep(&c.name))
            .map(|c| Capability { state: false, ..c.clone() })
            .collect();
        if !off.is_empty() {
            self.client.set_capabilities(&off)?;
        }
        if !parameters.is_empty() {
            self.client.set_parameters(parameters)?;
        }
        let is_on = |name: &str| now.iter().any(|c| c.name == name && c.state);
        let is_off = |name: &str| off.iter().any(|c| c.name == name);
        let changes: Vec<_> =
            wanted.iter().filter(|c| c.state != (is_on(&c.name) && !is_off(&c.name))).cloned().collect();
        if !changes.is_empty() {
            self.client.set_capabilities(&changes)?;
        }
        self.capabilities_now = Some(wanted.to_vec());
        Ok(())
    }
}

/// Whether a guest with so many bytes of RAM cannot come to the end of a probe, so that nothing need keep it from
/// completing.
///
/// What QEMU may send is what the socket and its own buffer hold, 40 KiB, until we read on. A page that is zero takes nine
/// bytes of that, so it comes no further than 20 MiB. It would give the guest up where what is left could be sent
/// within the downtime, at a rate that it measures (16 KiB in each tenth of a second, at the most) or is told.
fn cannot_complete(ram_bytes: u64, parameters: &Map<String, Value>) -> bool {
    let number = |name: &str| parameters.get(name).and_then(Value::as_u64);
    ram_bytes >= ENDLESS_RAM_MIN
        && number("downtime-limit").is_some_and(|limit| limit <= ENDLESS_DOWNTIME_MAX)
        && number("avail-switchover-bandwidth").unwrap_or(0) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_probe_that_cannot_come_to_an_end_goes_without_a_brake() {
        let parameters = |downtime: Value, bandwidth: Value| {
            let all = json!({ "downtime-limit": downtime, "avail-switchover-bandwidth": bandwidth });
            all.as_object().unwrap().clone()
        };
        let usual = parameters(json!(300), json!(0));
        for (ram_bytes, parameters, expected) in [
            (ENDLESS_RAM_MIN, usual.clone(), true),
            (ENDLESS_RAM_MIN - 1, usual, false),
            (1 << 40, parameters(json!(ENDLESS_DOWNTIME_MAX + 1), json!(0)), false),
            (1 << 40, parameters(json!(300), json!(1 << 30)), false),
            // A QEMU that does not know the one, or does not tell the other.
            (1 << 40, parameters(json!(300), Value::Null), true),
            (1 << 40, Map::new(), false),
        ] {
            assert_eq!(cannot_complete(ram_bytes, &parameters), expected, "{ram_bytes:#x} {parameters:?}");
        }
    }
}
