//! What a QEMU tells of its guest beside the guest's state, for the manifest and for comparing a target.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::Result;
use crate::manifest::{Disk, FileState, GuestFacts, MemoryBackend};
use crate::qmp::{Begun, Client};

/// What a QEMU was asked for and has not answered yet.
#[derive(Debug)]
pub struct AskedFacts {
    kvm: Begun,
    cpus: Begun,
    backends: Begun,
    disks: Begun,
}

/// Asks for everything but the state of the disks' files, which counts only once the guest stands still:
/// see [`stat_disks`]. QEMU has a millisecond to do meanwhile.
///
/// # Errors
/// As every QMP command.
pub fn ask_guest_facts(client: &mut Client) -> Result<AskedFacts> {
    let mut ask = |command| client.begin(command, json!({}));
    Ok(AskedFacts {
        kvm: ask("query-kvm")?,
        cpus: ask("query-hotpluggable-cpus")?,
        backends: ask("query-memdev")?,
        disks: ask("query-block")?,
    })
}

impl AskedFacts {
    /// What it has answered.
    ///
    /// # Errors
    /// As every QMP command; a command that this QEMU lacks leaves its fact empty.
    pub fn answered(self, client: &mut Client) -> Result<GuestFacts> {
        let mut answer = |asked| refused(client.end(asked)).map(|answer| answer.unwrap_or(Value::Null));
        let kvm = answer(self.kvm)?;
        let cpus = answer(self.cpus)?;
        let backends = answer(self.backends)?;
        let disks = answer(self.disks)?;
        let (cpus, cpu_model) = match plugged(&cpus) {
            Some(told) => told,
            None => ask_processors(client)?,
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(GuestFacts {
            accelerator: if kvm["enabled"].as_bool() == Some(true) { "kvm" } else { "tcg" }.to_owned(),
            cpu_model,
            cpus,
            memory_backends: list(&backends)
                .map(|backend| MemoryBackend {
                    id: text(&backend["id"]),
                    size: backend["size"].as_u64().unwrap_or_default(),
                    share: backend["share"].as_bool().unwrap_or_default(),
                })
                .collect(),
            disks: list(&disks).filter_map(disk).collect(),
        })
    }
}

/// How many processors there are and of which model, as `query-hotpluggable-cpus` tells it of those that are plugged in;
/// `None` where it tells of none, as of a machine whose processors are there for good.
fn plugged(answer: &Value) -> Option<(u32, String)> {
    let plugged: Vec<_> = list(answer).filter(|slot| slot["qom-path"].is_string()).collect();
    let model = plugged.first()?["type"].as_str()?.to_owned();
    let processors = |slot: &&Value| slot["vcpus-count"].as_u64().unwrap_or(1);
    Some((u32::try_from(plugged.iter().map(processors).sum::<u64>()).ok()?, model))
}

/// The same in two questions, which every machine answers.
fn ask_processors(client: &mut Client) -> Result<(u32, String)> {
    let cpus = refused(client.execute("query-cpus-fast", json!({})))?.unwrap_or_default();
    let model = match cpus[0]["qom-path"].as_str() {
        Some(path) => refused(client.qom_string(path, "type"))?.unwrap_or_default(),
        None => String::new(),
    };
    Ok((cpus.as_array().map_or(0, Vec::len) as u32, model))
}

/// Asks for the same and waits for the answers.
///
/// # Errors
/// As [`ask_guest_facts`] and [`AskedFacts::answered`].
pub fn guest_facts(client: &mut Client) -> Result<GuestFacts> {
    ask_guest_facts(client)?.answered(client)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn disk(entry: &Value) -> Option<Disk> {
    let inserted = entry.get("inserted")?;
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    Some(Disk {
        // The drive's id is the user's own or counts disks; a path without an id counts all devices.
        device: text(&entry["device"]).or_else(|| text(&entry["qdev"])).unwrap_or_default(),
        file: text(&inserted["file"]).unwrap_or_default(),
        format: text(&inserted["drv"]).unwrap_or_default(),
        virtual_bytes: inserted["image"]["virtual-size"].as_u64().unwrap_or_default(),
        read_only: inserted["ro"].as_bool().unwrap_or_default(),
        written_at_close: written_at_close(&inserted["image"]),
        state: None,
    })
}

/// Whether QEMU writes the file once more when it closes it: a qcow2 with lazy reference counts is marked
/// clean then, and one with persistent bitmaps gets them.
fn written_at_close(image: &Value) -> bool {
    let data = &image["format-specific"]["data"];
    data["lazy-refcounts"].as_bool() == Some(true)
        || data["bitmaps"].as_array().is_some_and(|bitmaps| !bitmaps.is_empty())
}

/// Facts are worth having, not worth failing for: a refusal is `None`, a lost connection an error.
fn refused<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_refusal() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Looks at the disks' files. A relative name is QEMU's, so its working directory is needed: that of `pid`.
pub fn stat_disks(facts: &mut GuestFacts, pid: Option<u32>) {
    for disk in &mut facts.disks {
        disk.state = local_path(&disk.file, pid).and_then(|path| FileState::of(&path));
    }
}

/// The path of a disk that is a local file, as seen from here; `None` for network disks and the like.
fn local_path(file: &str, pid: Option<u32>) -> Option<PathBuf> {
    let path = Path::new(file);
    if path.is_absolute() {
        return Some(path.to_owned());
    }
    // `nbd://`, `json:{...}`, `rbd:pool/image` and their like name no file.
    if file.is_empty() || file.split('/').next().is_some_and(|first| first.contains(':')) {
        return None;
    }
    Some(PathBuf::from(format!("/proc/{}/cwd", pid?)).join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_local_files_have_a_path() {
        for (file, pid, expected) in [
            ("/images/a.qcow2", None, Some("/images/a.qcow2")),
            ("a.qcow2", Some(7), Some("/proc/7/cwd/a.qcow2")),
            ("dir/a.qcow2", Some(7), Some("/proc/7/cwd/dir/a.qcow2")),
            ("a.qcow2", None, None),
            ("nbd://host/x", Some(7), None),
            ("json:{\"driver\":\"raw\"}", Some(7), None),
            ("rbd:pool/image", Some(7), None),
            ("", Some(7), None),
        ] {
            assert_eq!(local_path(file, pid).as_deref(), expected.map(Path::new), "{file}");
        }
    }

    #[test]
    fn processors_are_those_that_are_plugged_in() {
        let slot =
            |path: Option<&str>, count| json!({ "type": "a-cpu", "vcpus-count": count, "qom-path": path });
        for (answer, expected) in [
            (json!([slot(None, 1), slot(Some("/b"), 1), slot(Some("/a"), 1)]), Some(2)),
            (json!([slot(Some("/core"), 4)]), Some(4)),
            (json!([slot(None, 1)]), None),
            (json!(null), None),
        ] {
            let told = plugged(&answer);
            assert_eq!(told, expected.map(|count| (count, "a-cpu".to_owned())), "{answer}");
        }
    }

    #[test]
    fn disks_are_told_apart_and_empty_drives_left_out() {
        let answer = json!([
            { "device": "cd", "qdev": "/machine/unattached/device[9]" },
            { "device": "", "qdev": "disk0", "inserted": {
                "file": "/a.qcow2", "drv": "qcow2", "ro": false, "image": { "virtual-size": 4096,
                    "format-specific": { "type": "qcow2", "data": { "lazy-refcounts": true } } } } },
            { "device": "boot", "inserted": { "file": "b.raw", "drv": "raw", "ro": true, "image": {} } },
        ]);
        let disks: Vec<_> = list(&answer).filter_map(disk).collect();
        let rows: Vec<_> = disks
            .iter()
            .map(|d| (d.device.as_str(), d.virtual_bytes, d.read_only, d.written_at_close))
            .collect();
        assert_eq!(rows, [("disk0", 4096, false, true), ("boot", 0, true, false)]);
    }
}
