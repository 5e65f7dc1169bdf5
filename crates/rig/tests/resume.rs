//! Saves that are killed, and what brings their guests back.
//!
//! The save runs in a process of its own, this very program, which kills itself by SIGKILL when a phase begins: so each
//! run is the same, and nothing of it can clean up.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Instant;

use lab::{Guest, GuestSettings, MachineKind, Qemu, QemuSpec};
use rustix::process::{Signal, getpid, kill_process};
use serde_json::{Map, Value, json};
use vmstate::net::QmpAddress;
use vmstate::qemu::Session;
use vmstate::qmp::Client;
use vmstate::{Cancel, Error, Kind, ResumeReport, ResumeSettings, SaveReport, SaveSettings, Then, Via};
use vmstate_rig::{DEADLINE, Footprint, Hook, Proxy};

/// The phases that a save of each way begins until its image has its name.
const PHASES: [(Via, &[&str]); 2] = [
    (Via::Direct, &["connect", "probe", "stop", "device state", "ram", "metadata", "publish"]),
    (Via::Qemu, &["connect", "stop", "ram", "metadata", "publish"]),
];
/// No phase: somebody else kills it.
const NEVER: &str = "never";
/// What a killed save is told: the monitor, the image, the way, the phase.
const ORDERS: &str = "VMSTATE_TEST_KILLED_SAVE";

fn booted() -> Qemu {
    let spec = QemuSpec {
        guest: Some(Guest::new(GuestSettings::idle(256))),
        second_qmp: true,
        ..QemuSpec::new(MachineKind::Q35, 64 << 20)
    };
    let mut qemu = spec.start().unwrap();
    qemu.wait_for_round(1, DEADLINE).unwrap();
    qemu
}

fn images() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

fn client(path: PathBuf) -> Client {
    let mut client = Client::connect(&QmpAddress::Unix(path), &Cancel::new().unwrap()).unwrap();
    client.timeout = Some(DEADLINE);
    client
}

fn other(qemu: &Qemu) -> Client {
    client(qemu.second_qmp_path())
}

fn status(qemu: &Qemu) -> String {
    other(qemu).status().unwrap().status
}

/// QEMU's settings and descriptors, with the guest paused, and the ids of its objects.
fn footprint(qemu: &Qemu) -> (Footprint, Value) {
    // Held until all is counted: QEMU greets it when the connection before it is closed, so that what is counted of
    // this monitor is always one.
    let mut other = other(qemu);
    other.stop().unwrap();
    let footprint = Footprint::of(&qemu.qmp_path(), qemu.pid());
    let objects = other.execute("qom-list", json!({ "path": "/objects" })).unwrap();
    (footprint, objects)
}

#[track_caller]
fn assert_untouched(qemu: &Qemu, before: &(Footprint, Value), name: &str) {
    let after = footprint(qemu);
    assert_eq!(before.0.changes(&after.0), [""; 0], "{name}");
    assert_eq!(before.1, after.1, "{name}");
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

fn settings(qemu: &Qemu, image: &Path, via: Via) -> SaveSettings {
    SaveSettings { via, ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image) }
}

fn save(settings: &SaveSettings, hook: &Hook<'_>) -> SaveReport {
    vmstate::save(settings, &Cancel::new().unwrap(), hook).unwrap_or_else(|error| panic!("{}", error.chain()))
}

fn resume_at(qmp: PathBuf) -> Result<ResumeReport, Error> {
    let settings = ResumeSettings { qmp: QmpAddress::Unix(qmp), force: false };
    vmstate::resume(&settings, &Cancel::new().unwrap(), &vmstate::Unobserved)
}

fn resume(qemu: &Qemu) -> ResumeReport {
    resume_at(qemu.qmp_path()).unwrap_or_else(|error| panic!("{}", error.chain()))
}

fn save_with_orders(qmp: &Path, image: &Path, via: Via, phase: &str) -> Child {
    let orders = format!("{}|{}|{}|{phase}", qmp.display(), image.display(), via.name());
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_save_with_orders_kills_itself"])
        .env(ORDERS, orders)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Has a save of this guest killed when `phase` begins; returns the number of its process.
fn killed_save(qemu: &Qemu, image: &Path, via: Via, phase: &str) -> u32 {
    let mut child = save_with_orders(&qemu.qmp_path(), image, via, phase);
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(Signal::KILL.as_raw()), "{via:?} in {phase}: {status}");
    assert!(!image.exists(), "{via:?} in {phase}");
    child.id()
}

/// Not a test of its own: the other side of [`killed_save`].
#[test]
fn a_save_with_orders_kills_itself() {
    let Ok(orders) = std::env::var(ORDERS) else { return };
    let orders: Vec<_> = orders.split('|').collect();
    let [qmp, image, via, phase] = orders[..] else { panic!("{orders:?}") };
    let phases = PHASES.iter().flat_map(|(_, phases)| phases.iter());
    let phase = phases.copied().chain([NEVER]).find(|known| *known == phase).unwrap();
    let settings = SaveSettings {
        via: if via == "direct" { Via::Direct } else { Via::Qemu },
        ..SaveSettings::new(QmpAddress::Unix(qmp.into()), image)
    };
    let hook = Hook::at(phase, || kill_process(getpid(), Signal::KILL).unwrap());
    let ended = vmstate::save(&settings, &Cancel::new().unwrap(), &hook);
    panic!("it came to its end: {ended:?}");
}

#[test]
fn a_guest_whose_save_was_killed_in_any_phase_is_brought_back() {
    let qemu = booted();
    let before = footprint(&qemu);
    let dir = images();
    let image = dir.path().join("vm.img");
    for (via, phases) in PHASES {
        for phase in phases {
            let name = format!("{via:?} in {phase}");
            other(&qemu).cont().unwrap();
            let pid = killed_save(&qemu, &image, via, phase);
            let left = status(&qemu);
            let report = resume(&qemu);
            // When it connects there is no claim yet; before the probe nothing but that, and before `stop` the guest
            // runs on.
            let is_known = *phase != "connect";
            let is_stopped = is_known && !matches!(*phase, "probe" | "stop");
            assert_eq!(left == "running", !is_stopped, "{name}: {left}");
            assert_eq!(report.cleared.saver_pid, is_known.then_some(pid), "{name}: {report:?}");
            assert_eq!(report.resumed, is_stopped, "{name}: {report:?}");
            assert_eq!(report.run_state, "running", "{name}: {report:?}");
            assert_eq!(status(&qemu), "running", "{name}");
            assert_untouched(&qemu, &before, &name);
            // Done once, there is nothing to do.
            let again = resume(&qemu);
            assert!(!again.had_leftovers() && !again.resumed, "{name}: {again:?}");
            assert_eq!(again.run_state, "paused", "{name}");
        }
    }
    // A guest that came back so often is as good as before, and each save has removed what the one before it left.
    other(&qemu).cont().unwrap();
    let strays = names_in(dir.path());
    let [stray] = &strays[..] else { panic!("{strays:?}") };
    let hook = Hook::at("never", || {});
    save(&settings(&qemu, &image, Via::Direct), &hook);
    assert_eq!(names_in(dir.path()), ["vm.img"]);
    let removed = dir.path().join(stray);
    assert_eq!(hook.warnings(), [format!("removed {}, which a killed save had left", removed.display())]);
}

/// Between any two commands, those included that are sent ahead.
#[test]
fn a_guest_whose_save_was_killed_at_any_command_is_brought_back() {
    let qemu = booted();
    let before = footprint(&qemu);
    let (dir, home) = (images(), tempfile::tempdir().unwrap());
    let image = dir.path().join("vm.img");
    for via in [Via::Direct, Via::Qemu] {
        // Until one is not killed, since it has no more commands.
        for nth in 0.. {
            other(&qemu).cont().unwrap();
            let victim = Arc::new(Mutex::new(None::<Child>));
            let (named, name) = (victim.clone(), Arc::new(Mutex::new(String::new())));
            let (mut count, killed_at) = (0, name.clone());
            let proxy = Proxy::hearing(home.path(), &qemu.qmp_path(), move |command, _| {
                if count == nth {
                    *killed_at.lock().unwrap() = command.to_owned();
                    named.lock().unwrap().as_mut().unwrap().kill().unwrap();
                }
                count += 1;
            });
            let mut locked = victim.lock().unwrap();
            *locked = Some(save_with_orders(&proxy.path, &image, via, NEVER));
            drop(locked);
            proxy.finish();
            let child = victim.lock().unwrap().take().unwrap().wait().unwrap();
            let name = format!("{via:?}, {} ({nth})", name.lock().unwrap());
            if child.signal() != Some(Signal::KILL.as_raw()) {
                assert!(nth > 20, "{name}");
                assert!(image.exists(), "{name}");
                std::fs::remove_file(&image).unwrap();
                other(&qemu).cont().unwrap();
                break;
            }
            let report = resume(&qemu);
            // A save that has its image leaves the guest paused, as it was told to.
            if !image.exists() {
                assert_eq!(report.run_state, "running", "{name}: {report:?}");
                assert_eq!(status(&qemu), "running", "{name}");
            }
            assert_untouched(&qemu, &before, &name);
            let again = resume(&qemu);
            assert!(!again.had_leftovers() && !again.resumed, "{name}: {again:?}");
            let _ = std::fs::remove_file(&image);
        }
    }
}

/// What a save owes is written down when it owes it, and no earlier: the guest was paused by whoever came then, and the
/// parameters are whosever they were since.
#[test]
fn a_guest_that_somebody_pauses_after_a_save_was_killed_before_its_stop_stays_paused() {
    let qemu = booted();
    let dir = images();
    killed_save(&qemu, &dir.path().join("vm.img"), Via::Direct, "stop");
    other(&qemu).stop().unwrap();
    let report = resume(&qemu);
    assert!(report.had_leftovers(), "{report:?}");
    assert_eq!((report.resumed, report.run_state.as_str()), (false, "paused"), "{report:?}");

    other(&qemu).cont().unwrap();
    killed_save(&qemu, &dir.path().join("vm.img"), Via::Direct, "ram");
    let mut parameters = Map::new();
    parameters.insert("max-bandwidth".to_owned(), json!(1 << 20));
    other(&qemu).set_parameters(parameters).unwrap();
    let report = resume(&qemu);
    assert_eq!((report.resumed, report.cleared.parameters.as_slice()), (true, &[][..]), "{report:?}");
    assert_eq!(other(&qemu).parameters().unwrap()["max-bandwidth"], 1 << 20);
}

#[test]
fn the_next_save_clears_what_a_killed_one_left_and_says_so() {
    let qemu = booted();
    let before = footprint(&qemu);
    let dir = images();
    let image = dir.path().join("vm.img");
    for (killed_via, phase, via, then) in [
        (Via::Direct, "ram", Via::Direct, Then::Pause),
        (Via::Direct, "device state", Via::Qemu, Then::Resume),
        (Via::Qemu, "ram", Via::Direct, Then::Resume),
        // QEMU has done all that it was asked for by then, and given its disks up.
        (Via::Qemu, "metadata", Via::Direct, Then::Pause),
    ] {
        let name = format!("{killed_via:?} in {phase}");
        other(&qemu).cont().unwrap();
        let pid = killed_save(&qemu, &image, killed_via, phase);
        let hook = Hook::at("never", || {});
        let report = save(&SaveSettings { then, overwrite: true, ..settings(&qemu, &image, via) }, &hook);
        assert_eq!(report.run_state, "running", "{name}");
        let warnings = hook.warnings();
        let warning = format!(
            "process {pid} was killed while it saved this guest and left it paused: what it left is cleared, and the \
             guest counts as running; vmstate resume brings such a guest back without saving it"
        );
        assert_eq!(warnings.first(), Some(&warning), "{name}");
        assert_eq!(status(&qemu), if then == Then::Pause { "paused" } else { "running" }, "{name}");
        assert_untouched(&qemu, &before, &name);
        std::fs::remove_file(&image).unwrap();
    }
}

#[test]
fn a_save_that_fails_after_a_killed_one_brings_the_guest_back() {
    let qemu = booted();
    let before = footprint(&qemu);
    other(&qemu).cont().unwrap();
    let dir = images();
    let image = dir.path().join("vm.img");
    killed_save(&qemu, &image, Via::Direct, "ram");
    for phase in ["probe", "ram"] {
        let cancel = Cancel::new().unwrap();
        let hook = Hook::at(phase, || cancel.cancel());
        let error = vmstate::save(&settings(&qemu, &image, Via::Direct), &cancel, &hook).unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted, "{phase}");
        assert_eq!(status(&qemu), "running", "{phase}");
    }
    assert_untouched(&qemu, &before, "cancelled");
}

#[test]
fn a_guest_that_was_paused_before_or_resumed_since_stays_as_it_is() {
    let qemu = booted();
    let dir = images();
    let image = dir.path().join("vm.img");
    other(&qemu).stop().unwrap();
    let pid = killed_save(&qemu, &image, Via::Direct, "ram");
    let report = resume(&qemu);
    assert_eq!(
        (report.cleared.saver_pid, report.resumed, report.run_state.as_str()),
        (Some(pid), false, "paused")
    );
    other(&qemu).cont().unwrap();
    killed_save(&qemu, &image, Via::Direct, "ram");
    other(&qemu).cont().unwrap();
    let report = resume(&qemu);
    assert_eq!((report.resumed, report.run_state.as_str()), (false, "running"));
    assert!(report.had_leftovers());
}

#[test]
fn a_save_that_is_under_way_is_neither_resumed_nor_joined() {
    let qemu = booted();
    let dir = images();
    let pid = std::process::id();
    for (via, phase) in [(Via::Direct, "stop"), (Via::Direct, "ram"), (Via::Qemu, "metadata")] {
        let (image, second) = (dir.path().join("vm.img"), dir.path().join("second.img"));
        let refused = |error: Error| {
            assert_eq!(error.kind(), Kind::Peer, "{via:?} in {phase}");
            assert_eq!(error.chain(), format!("process {pid} is saving this guest"), "{via:?} in {phase}");
        };
        let hook = Hook::at(phase, || {
            refused(resume_at(qemu.second_qmp_path()).unwrap_err());
            let settings = SaveSettings {
                qmp: QmpAddress::Unix(qemu.second_qmp_path()),
                ..settings(&qemu, &second, via)
            };
            let cancel = Cancel::new().unwrap();
            refused(vmstate::save(&settings, &cancel, &vmstate::Unobserved).unwrap_err());
        });
        let report = save(
            &SaveSettings { then: Then::Resume, overwrite: true, ..settings(&qemu, &image, via) },
            &hook,
        );
        assert!(hook.is_done(), "{via:?} in {phase}");
        assert_eq!(report.run_state, "running", "{via:?} in {phase}");
        assert_eq!(names_in(dir.path()), ["vm.img"], "{via:?} in {phase}");
    }
}

/// Two saves that began at one moment both looked before either had written its note, and stopped the guest twice.
#[test]
fn of_two_saves_that_begin_at_one_moment_one_goes_on() {
    let qemu = booted();
    let before = footprint(&qemu);
    // With nothing there, and with what a save has left that was killed: a claim of a process that never was.
    let dead = json!({ "pid": 1 << 30, "start": 1, "host": own_host() }).to_string();
    for leftover in [None, Some(&dead)].into_iter().cycle().take(12) {
        if let Some(note) = leftover {
            let claim = json!({ "qom-type": "secret", "id": "vmstate-note-claim.3", "data": note });
            other(&qemu).execute("object-add", claim).unwrap();
        }
        let start = Barrier::new(2);
        let claim = |qmp: PathBuf| {
            let mut session = Session::open(&QmpAddress::Unix(qmp), &Cancel::new().unwrap()).unwrap();
            start.wait();
            let claimed = session.claim(false);
            // Nobody gives anything up before both have asked.
            start.wait();
            match claimed {
                Ok(left) => {
                    assert_eq!(left.is_empty(), leftover.is_none());
                    left.clear(&mut session).unwrap();
                    session.settle().unwrap();
                    None
                }
                Err(error) => Some(error.to_string()),
            }
        };
        let (first, second) = std::thread::scope(|scope| {
            let first = scope.spawn(|| claim(qemu.qmp_path()));
            let second = scope.spawn(|| claim(qemu.second_qmp_path()));
            (first.join().unwrap(), second.join().unwrap())
        });
        let refused: Vec<_> = first.into_iter().chain(second).collect();
        assert_eq!(refused, [format!("process {} is saving this guest", std::process::id())]);
    }
    assert_untouched(&qemu, &before, "claims");
}

/// How notes name this boot of this host and the namespace of this process.
fn own_host() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let namespace = std::fs::metadata("/proc/self/ns/pid").unwrap().ino();
    format!("{}-{namespace}", &boot[..8])
}

/// Starts a migration that goes on for hours.
fn migrate_slowly(qemu: &Qemu, bytes_per_s: u64) -> UnixStream {
    let mut client = client(qemu.qmp_path());
    let mut parameters = Map::new();
    parameters.insert("max-bandwidth".to_owned(), json!(bytes_per_s));
    client.set_parameters(parameters).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 4096).unwrap();
    client.getfd("slow", theirs.as_fd()).unwrap();
    client.migrate("fd:slow").unwrap();
    let end = Instant::now() + DEADLINE;
    while client.migration().unwrap().status != "active" {
        assert!(Instant::now() < end, "{:?}", client.migration());
        std::thread::yield_now();
    }
    ours
}

#[test]
fn the_migration_of_a_killed_save_is_cancelled_and_another_is_not() {
    let qemu = booted();
    let before = footprint(&qemu);
    other(&qemu).cont().unwrap();
    let dir = images();
    let image = dir.path().join("vm.img");
    // As the probe is when it is killed: choked, and nobody reads.
    killed_save(&qemu, &image, Via::Direct, "stop");
    let socket = migrate_slowly(&qemu, 4096);
    let report = resume(&qemu);
    assert!(report.cleared.migration_cancelled, "{report:?}");
    assert_eq!(other(&qemu).migration().unwrap().status, "cancelled");
    drop(socket);
    assert_untouched(&qemu, &before, "cancelled");

    other(&qemu).cont().unwrap();
    killed_save(&qemu, &image, Via::Direct, "stop");
    let socket = migrate_slowly(&qemu, 1 << 20);
    let error = resume_at(qemu.qmp_path()).unwrap_err();
    assert_eq!(error.to_string(), "a migration is under way (status `active`) that is not the killed save's");
    assert!(other(&qemu).migration().unwrap().is_under_way());
    drop(socket);
}

/// Leaves a note as a save does.
fn leave_note(qemu: &Qemu, note: &str, owed: &str) {
    let arguments = json!({ "qom-type": "secret", "id": "vmstate-note-77-0", "data": note, "iv": owed });
    other(qemu).execute("object-add", arguments).unwrap();
}

#[test]
fn a_save_of_another_host_counts_as_killed_only_by_force() {
    let qemu = booted();
    let before = footprint(&qemu);
    let note = json!({ "pid": 77, "start": 1, "host": "c0ffee12-1" });
    leave_note(&qemu, &note.to_string(), r#"{"stopped":"running"}"#);
    let dir = images();
    let cancel = Cancel::new().unwrap();
    for error in [
        resume_at(qemu.qmp_path()).unwrap_err(),
        vmstate::save(&settings(&qemu, &dir.path().join("vm.img"), Via::Auto), &cancel, &vmstate::Unobserved)
            .unwrap_err(),
    ] {
        assert_eq!(error.kind(), Kind::Peer);
        assert_eq!(error.to_string(), "process 77 of another host or container has begun to save this guest");
        assert_eq!(error.hint_text(), Some("if it is gone, clear what it left: vmstate resume --force"));
    }
    assert_eq!(status(&qemu), "paused");
    assert_eq!(names_in(dir.path()), [""; 0]);
    let forced = ResumeSettings { qmp: QmpAddress::Unix(qemu.qmp_path()), force: true };
    let report = vmstate::resume(&forced, &cancel, &vmstate::Unobserved).unwrap();
    assert_eq!(
        (report.cleared.saver_pid, report.resumed, report.run_state.as_str()),
        (Some(77), true, "running")
    );
    assert_untouched(&qemu, &before, "forced");
}

#[test]
fn a_note_that_cannot_be_read_is_named_and_left() {
    let qemu = booted();
    let whole = json!({ "pid": 77, "start": 1, "host": own_host() }).to_string();
    let long = "[".repeat(70_000);
    for (note, owed) in [("{}", ""), ("not JSON", ""), (&long, ""), (&whole, "not JSON"), (&whole, &long)] {
        leave_note(&qemu, note, owed);
        let error = resume_at(qemu.qmp_path()).unwrap_err();
        assert_eq!(error.to_string(), "the note `vmstate-note-77-0` in QEMU is of an unknown form");
        let hint = "another version of vmstate left it; remove it with the QMP command object-del of vmstate-note-77-0";
        assert_eq!(error.hint_text(), Some(hint));
        other(&qemu).execute("object-del", json!({ "id": "vmstate-note-77-0" })).unwrap();
    }
    assert_eq!(status(&qemu), "running");
}

#[test]
fn a_qemu_that_no_save_was_killed_on_is_left_alone() {
    let qemu = booted();
    let before = footprint(&qemu);
    // Paused by somebody, and with a descriptor set that is not ours.
    let null = std::fs::File::open("/dev/null").unwrap();
    other(&qemu).add_fd(None, "somebody else's", null.as_fd()).unwrap();
    let report = resume(&qemu);
    assert!(!report.had_leftovers(), "{report:?}");
    assert_eq!((report.resumed, report.run_state.as_str()), (false, "paused"));
    let after = footprint(&qemu);
    assert_eq!(after.0.fdsets.as_array().map(Vec::len), Some(1));
    assert_eq!(before.1, after.1);
}

/// What the probe needs is undone behind it, and nothing else is touched: a guest may be stopped for long.
#[test]
fn the_settings_are_those_of_the_user_when_the_guest_is_stopped() {
    let qemu = booted();
    let dir = images();
    let image = dir.path().join("vm.img");
    for on in [None, Some("auto-converge")] {
        let mut client = other(&qemu);
        let mut wanted = client.capabilities().unwrap();
        wanted.iter_mut().for_each(|one| one.state = Some(one.name.as_str()) == on);
        client.set_capabilities(&wanted).unwrap();
        let before = (client.capabilities().unwrap(), client.parameters().unwrap());
        drop(client);
        let hook = Hook::at("stop", || {
            let mut client = other(&qemu);
            assert_eq!((client.capabilities().unwrap(), client.parameters().unwrap()), before, "{on:?}");
            assert_eq!(client.migration().unwrap().status, "cancelled", "{on:?}");
        });
        let settings =
            SaveSettings { then: Then::Resume, overwrite: true, ..settings(&qemu, &image, Via::Direct) };
        save(&settings, &hook);
        assert!(hook.is_done(), "{on:?}");
    }
}

/// The guest's state is asked for long before it is stopped, and noted.
#[test]
fn a_guest_that_another_client_pauses_during_the_probe_stays_paused() {
    let qemu = booted();
    let dir = images();
    let image = dir.path().join("vm.img");
    let hook = Hook::at("stop", || other(&qemu).stop().unwrap());
    let settings = SaveSettings { then: Then::Resume, ..settings(&qemu, &image, Via::Direct) };
    assert_eq!(save(&settings, &hook).run_state, "paused");
    assert_eq!(status(&qemu), "paused");
}

/// A dry run knew nothing of saves under way or killed, and would have left a killed save's mess twice.
#[test]
fn a_dry_run_says_that_a_save_was_killed_and_touches_nothing_of_it() {
    let qemu = booted();
    let dir = images();
    let image = dir.path().join("vm.img");
    killed_save(&qemu, &image, Via::Direct, "ram");
    let before = footprint(&qemu);
    let names = names_in(dir.path());
    let hook = Hook::at("settle", || {});
    vmstate::rehearse(&settings(&qemu, &image, Via::Direct), &Cancel::new().unwrap(), &hook)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(
        hook.warnings(),
        ["a save of this guest was killed; the next one clears what it left, as does vmstate resume"]
    );
    assert_untouched(&qemu, &before, "dry run");
    assert_eq!(names_in(dir.path()), names);
    let report = resume(&qemu);
    assert!(report.resumed && report.had_leftovers(), "{report:?}");
}
