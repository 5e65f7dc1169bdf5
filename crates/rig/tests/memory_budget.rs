//! What a job takes of memory for itself, whatever the guest's size. A program of its own: nobody else's memory is in it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lab::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::{Cancel, Mode, RestoreSettings, SaveSettings, Target, Then, Unobserved, Via};
use vmstate_rig::DEADLINE;

const MIB: u64 = 1 << 20;
/// What a job may have, and each of its lanes.
const JOB_BYTES: u64 = 64 * MIB;
const LANE_BYTES: u64 = 8 * MIB;

/// The anonymous memory of this process, which files that are mapped are no part of.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the kernel tells");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Runs a job and looks at this process all the while: the most that it had more than before.
fn most_during<T>(job: impl FnOnce() -> T) -> (T, u64) {
    let (is_over, most) = (AtomicBool::new(false), AtomicU64::new(0));
    let before = anonymous_bytes();
    let done = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                most.fetch_max(anonymous_bytes(), Ordering::Relaxed);
                std::thread::yield_now();
            }
        });
        let done = job();
        is_over.store(true, Ordering::Relaxed);
        done
    });
    (done, most.into_inner().saturating_sub(before))
}

#[test]
fn a_job_has_so_much_memory_for_itself_and_a_lane_whatever_the_guest_has() {
    let idle =
        GuestSettings { fill_rounds: 1, pages_low_max: 2048, pages_high_max: 0, ..GuestSettings::default() };
    let dirty = GuestSettings { pages_low_max: u32::MAX, ..idle };
    for (mib, settings, channels) in [(256, idle, 2), (4096, idle, 2), (1024, dirty, 2), (1024, dirty, 8)] {
        for backend in [MemoryBackend::Plain, MemoryBackend::Memfd] {
            let name = format!("{mib} MiB, {} pages, {backend}, {channels} channels", settings.pages_low_max);
            let guest = Some(Guest::new(GuestSettings { halt_after_round: 1, ..settings }));
            let spec = QemuSpec { backend, guest, ..QemuSpec::new(MachineKind::Q35, mib << 20) };
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
            check(&name, &spec, &dir.path().join("vm.img"), channels);
        }
    }
}

fn check(name: &str, spec: &QemuSpec, image: &Path, channels: u16) {
    let limit = JOB_BYTES + u64::from(channels) * LANE_BYTES;
    let cancel = Cancel::new().expect("an eventfd");
    let mut source = spec.start().expect(name);
    source.wait_for_round(1, DEADLINE).expect(name);
    let settings = SaveSettings {
        via: Via::Direct,
        then: Then::Quit,
        channels: Some(channels),
        ..SaveSettings::new(QmpAddress::Unix(source.qmp_path()), image)
    };
    let (saved, most) = most_during(|| vmstate::save(&settings, &cancel, &Unobserved));
    let saved = saved.unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
    assert!(most <= limit, "{name}: a save had {} KiB", most >> 10);
    // The report looks when the lanes have all that they ever have, so no moment between two looks is missed.
    assert!(saved.peak_memory_bytes <= limit, "{name}: {saved:?}");
    drop(source);

    for mode in [Mode::Eager, Mode::Lazy] {
        let waiting = QemuSpec { incoming: Incoming::Defer, ..spec.clone() }.start().expect(name);
        let target = Target::Waiting(QmpAddress::Unix(waiting.qmp_path()));
        let settings =
            RestoreSettings { mode, channels: Some(channels), ..RestoreSettings::new(image, target) };
        let (restored, most) = most_during(|| vmstate::restore(&settings, &cancel, &Unobserved));
        restored.unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
        assert!(most <= limit, "{name}: a restore ({}) had {} KiB", mode.name(), most >> 10);
    }
}
