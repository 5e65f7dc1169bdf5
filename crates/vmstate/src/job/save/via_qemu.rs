//! QEMU's own way: mapped-ram with multifd, into two descriptors of ours.

use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

use io::Target;
use serde_json::json;
use wire::qemu::format::QEMU_VM_SECTION_FOOTER;
use wire::qemu::global_state;

use super::{Carried, Observer, QEMU_SAVE_CHANNELS, SaveSettings, Stopwatch, anonymous_memory_bytes};
use crate::error::FULL_HINT;
use crate::manifest::Manifest;
use crate::qemu::{self, Session};
use crate::qmp::RunStatus;
use crate::source::MappedRamFile;
use crate::{Error, Kind, Rate, Result};

/// No limit, in bytes per second: the greatest that every QEMU takes. The default, 128 MiB/s, throttles
/// files as well.
pub(crate) const BANDWIDTH_MAX: u64 = 1 << 60;

/// A file system with fewer bytes than these was full when QEMU could not write to it.
const FULL_LEN: u64 = 64 << 10;

/// What QEMU says of a multifd channel that failed when its main thread comes first: the -1 of a function is taken for
/// an error number, and the channel's own reason is lost (migration/ram.c, ram_save_iterate; QEMU 10.0).
const CHANNEL_FAILED: &str = "Channel error: Operation not permitted";
/// What helps where these words are all there is.
const CHANNEL_HINT: &str = "nothing was forbidden, QEMU has lost the reason of a channel that could not write: see \
     whether the disk is full, and what the kernel's log says of it";

/// What is said where QEMU is to write by several.
const CHANNELS_WARNING: &str = "QEMU writes by several channels, as --channels says: where one of them cannot write, on a full \
    disk for example, QEMU may crash and take the guest with it; with one channel it does not";

/// A rate as a value of QEMU's `max-bandwidth`.
fn as_qemu_takes_it(rate: Rate) -> u64 {
    rate.bytes_per_s().get().min(BANDWIDTH_MAX)
}

/// Stops the guest and lets QEMU write everything of it to the target, all but what makes it an image. It has
/// `ram_bytes` of RAM, touched or not, which go through so many channels.
pub(super) fn carry(
    settings: &SaveSettings,
    session: &mut Session,
    target: &Target,
    (ram_bytes, channels): (u64, u16),
    watch: &mut Stopwatch<'_>,
) -> Result<Carried> {
    if channels > QEMU_SAVE_CHANNELS {
        watch.observer.warn(CHANNELS_WARNING);
    }
    // Found out before anything is changed, and above all before the guest is stopped.
    session.require_descriptors()?;
    let direct = target.direct();
    session
        .configure(
            &["mapped-ram", "multifd"],
            &[
                ("multifd-channels", json!(channels)),
                ("multifd-compression", json!("none")),
                ("direct-io", json!(direct.is_some())),
                ("max-bandwidth", json!(settings.rate_max.map_or(BANDWIDTH_MAX, as_qemu_takes_it))),
                ("mode", json!("normal")),
                ("tls-creds", json!("")),
            ],
        )
        .map_err(|error| match error.kind() {
            Kind::Unsupported => error.hint("mapped-ram needs QEMU 9.1 or later"),
            _ => error,
        })?;

    let mut facts = qemu::guest_facts(&mut session.client)?;
    let peer = match qemu::find_process(session, settings.pid) {
        Ok(peer) => Some(peer),
        // Only for looking at disks with relative names.
        Err(error) if error.kind() == Kind::Unsupported => None,
        Err(error) => return Err(error),
    };
    session.process = peer.as_ref().map(|peer| peer.pid());

    watch.phase("stop");
    let stopped_at = Instant::now();
    // A guest that runs writes pages twice, and a page that became zero keeps its old bytes in the file.
    let before = session.pause()?;
    // It may have fallen asleep since it was first looked at.
    refuse_sleeping(&before)?;

    watch.phase("ram");
    // Whichever of the two flags QEMU asks for must be there: a channel that it cannot open crashes it,
    // and the guest with it. The target has tried direct I/O on this very file.
    let start = target.start();
    target.begin(start)?;
    let mut fds: Vec<_> = target.buffered().map(|file| file.as_fd()).into_iter().collect();
    fds.extend(direct.map(|file| file.as_fd()));
    let fdset = session.add_fdset(&fds)?;
    // QEMU pauses a guest that was resumed meanwhile by itself, and nobody could tell afterwards.
    session.verify_still()?;
    session.migrate(&format!("file:/dev/fdset/{fdset},offset={start}"))?;
    // How much of its memory QEMU looks at is known, how much it finds to be zero is not.
    let progress = &watch.progress;
    progress.expect(ram_bytes);
    let end = session.migration_end_told(&mut |ram| {
        progress.told(ram.total_bytes.saturating_sub(ram.remaining_bytes), ram.normal_bytes);
    })?;
    if end.status != "completed" {
        let reason = end.error.unwrap_or_else(|| format!("status `{}`", end.status));
        return Err(failure(&reason, || target.room_bytes().ok().flatten()));
    }
    watch.progress.complete();
    session.remove_fdset(fdset)?;
    session.verify_still()?;
    let read_at = Instant::now();

    watch.phase("metadata");
    let run_state = super::recorded_state(settings.record, &before);
    // By now QEMU has given the disks up, after which it does not write them.
    qemu::stat_disks(&mut facts, peer.map(|peer| peer.pid()));
    let manifest = Manifest::now(&session.version, "qemu", &run_state, facts);
    let data_bytes = complete(target, &before, &run_state, &manifest, watch.observer)?;
    Ok(Carried {
        run_state,
        direct_io: direct.is_some(),
        data_bytes: data_bytes.0,
        zero_bytes: 0,
        hole_bytes: data_bytes.1,
        stopped_at,
        read_at,
        memory_bytes: anonymous_memory_bytes(),
        presence: None,
    })
}

/// A save that QEMU gave up for `reason`, on a file system with `room` bytes left where that is known.
fn failure(reason: &str, room: impl FnOnce() -> Option<u64>) -> Error {
    let error = Error::new(Kind::Peer, format!("QEMU could not save the guest: {reason}"));
    // QEMU gives its reasons in the words of the C library, which has two for this; of the first bytes of all it
    // knows nothing but that they could not be written.
    let full = ["No space left on device", "Disk quota exceeded"].iter().any(|words| reason.contains(words))
        || room().is_some_and(|room| room < FULL_LEN);
    if full {
        error.hint(FULL_HINT)
    } else if reason.contains(CHANNEL_FAILED) {
        error.hint(CHANNEL_HINT)
    } else {
        error
    }
}

/// Refuses a guest that sleeps (ACPI S3). QEMU has no way from `postmigrate` back to `suspended`: the `cont` that is
/// to bring the guest back would abort QEMU (system/runstate.c:runstate_transitions_def, QEMU 10.0).
pub(super) fn refuse_sleeping(status: &RunStatus) -> Result<()> {
    if status.status != "suspended" {
        return Ok(());
    }
    Err(Error::new(Kind::Unsupported, "QEMU cannot resume a sleeping guest that it has saved itself")
        .hint("wake it first, with the QMP command system_wakeup"))
}

/// Checks what QEMU wrote, records the run state and adds the manifest. Returns the bytes of pages that
/// are in the image and of those that are not.
fn complete(
    target: &Target,
    before: &RunStatus,
    run_state: &str,
    manifest: &Manifest,
    observer: &dyn Observer,
) -> Result<(u64, u64)> {
    let opened = MappedRamFile::from_file(target.open_for_reading()?, target.path(), target.start())
        .and_then(|image| image.verify().map(|()| image));
    let image = match opened {
        Ok(image) => image,
        // QEMU knows what it wrote: state that comes in pieces has no length for anybody else.
        Err(error) if error.kind() == Kind::Unsupported => {
            let told =
                format!("vmstate cannot look into this image, only QEMU can load it: {}", error.chain());
            observer.warn(&told);
            return Ok((complete_unseen(target, run_state)?, 0));
        }
        Err(error) => return Err(error),
    };
    let failed = |error| Error::io(format!("cannot complete {}", target.path().display()), error);
    if before.status != run_state || before.running {
        // QEMU saw a guest that we had stopped.
        let devices = image.devices()?;
        if let Some(section) = devices.section(global_state::GLOBAL_STATE_SECTION, 0) {
            let mut payload = image.read(section.payload)?;
            global_state::patch_run_state(&mut payload, run_state)
                .map_err(|fault| Error::new(Kind::Peer, "the run state cannot be recorded").because(fault))?;
            target.write_all_at(&payload, section.payload.start).map_err(failed)?;
        }
    }
    if let Some((offset, bytes)) = image.vmdescription_with(manifest)? {
        target.write_all_at(&bytes, offset).map_err(failed)?;
        target.set_end(offset + bytes.len() as u64)?;
    }
    let summary = image.summary()?;
    Ok((summary.data_bytes, summary.ram_bytes - summary.data_bytes))
}

/// How much of the end of an image is searched for the run state: behind it come a few small sections and the
/// vmdescription.
const TAIL_LEN: u64 = 16 << 20;
/// The length of a section's footer.
const FOOTER_LEN: usize = 5;

/// Records the run state in an image that cannot be taken apart, by the head, the length and the footer of the
/// one section that has it. Returns the bytes that the image takes on the disk.
fn complete_unseen(target: &Target, run_state: &str) -> Result<u64> {
    let cannot = |error| Error::io(format!("cannot complete {}", target.path().display()), error);
    let file = target.open_for_reading()?;
    let metadata = file.metadata().map_err(cannot)?;
    let start = metadata.len().saturating_sub(TAIL_LEN).max(target.start());
    let mut tail = vec![0; metadata.len().saturating_sub(start) as usize];
    file.read_exact_at(&mut tail, start).map_err(cannot)?;
    let unclear = || Error::new(Kind::Unsupported, "the run state cannot be recorded in this image");
    let at = find_run_state(&tail).ok_or_else(unclear)?;
    let payload = &mut tail[at..at + global_state::PAYLOAD_LEN];
    global_state::patch_run_state(payload, run_state).map_err(|fault| unclear().because(fault))?;
    target.write_all_at(payload, start + at as u64).map_err(cannot)?;
    Ok(metadata.blocks() * 512)
}

/// Where the payload of the `globalstate` section is in the end of a stream; `None` where that is not the one
/// place that looks like it.
fn find_run_state(tail: &[u8]) -> Option<usize> {
    let name = global_state::GLOBAL_STATE_SECTION.as_bytes();
    // The length of the name in front of it; instance 0 and version 1 behind it.
    let mut pattern = vec![name.len() as u8];
    pattern.extend_from_slice(name);
    pattern.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1]);
    let mut found = None;
    for at in tail.windows(pattern.len()).enumerate().filter(|(_, part)| *part == pattern).map(|(at, _)| at) {
        let payload = at + pattern.len();
        let id = at.checked_sub(4).and_then(|from| tail.get(from..at))?;
        let footer = tail.get(payload + global_state::PAYLOAD_LEN..)?.get(..FOOTER_LEN)?;
        let is_section = footer[0] == QEMU_VM_SECTION_FOOTER && footer[1..] == *id;
        let bytes = tail.get(payload..payload + global_state::PAYLOAD_LEN)?;
        if is_section && global_state::run_state(bytes).is_ok() && found.replace(payload).is_some() {
            return None;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(id: u8, state: &str) -> Vec<u8> {
        let mut bytes = vec![4, 0, 0, 0, id, 11];
        bytes.extend_from_slice(b"globalstate\0\0\0\0\0\0\0\x01");
        let at = bytes.len();
        bytes.resize(at + global_state::PAYLOAD_LEN, 0);
        global_state::patch_run_state(&mut bytes[at..], state).unwrap();
        bytes.extend_from_slice(&[QEMU_VM_SECTION_FOOTER, 0, 0, 0, id]);
        bytes
    }

    #[test]
    fn what_qemu_says_of_a_channel_is_not_taken_for_a_matter_of_permission() {
        let hint = |reason: &str, room| failure(reason, || room).hint_text().map(str::to_owned);
        assert_eq!(hint(CHANNEL_FAILED, Some(1 << 30)).as_deref(), Some(CHANNEL_HINT));
        assert_eq!(hint(CHANNEL_FAILED, None).as_deref(), Some(CHANNEL_HINT));
        assert_eq!(hint(CHANNEL_FAILED, Some(0)).as_deref(), Some(FULL_HINT));
        assert_eq!(hint("Unable to write: No space left on device", None).as_deref(), Some(FULL_HINT));
        assert_eq!(hint("Unable to write: Input/output error", Some(1 << 30)), None);
    }

    #[test]
    fn the_run_state_is_found_where_only_one_place_looks_like_it() {
        let one = section(7, "paused");
        let before = [b"junk globalstate".as_slice(), &one, b"\0\x06rest"].concat();
        assert_eq!(find_run_state(&before), Some(16 + 25));
        assert_eq!(find_run_state(&[one.clone(), section(8, "running")].concat()), None, "two of them");
        let mut torn = one.clone();
        *torn.last_mut().unwrap() = 9;
        assert_eq!(find_run_state(&torn), None, "a footer of another section");
        assert_eq!(find_run_state(&one[..one.len() - 1]), None, "cut short");
    }
}
