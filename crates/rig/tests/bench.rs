//! The benchmark on real QEMUs: that it measures what it says, never how fast anything is.

#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

#[path = "../../mem/tests/guest/huge.rs"]
mod huge;

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use lab::bench::{
    Backend, BenchReport, BenchSettings, ConversionsSettings, GrowthSettings, Job, Load, ModesSettings,
    Rival, Style, Verdict, Way, bench, clones, conversions, growth, growth_svg, modes, render, render_clones,
    render_conversions, render_growth, render_modes, svg,
};
use lab::demo::Narrator;
use vmstate::{Cancel, Kind};

const MEMORY_MIB: u64 = 256;
const MIB: u64 = 1 << 20;

/// Where the images of this test lie: on the disk that the tree lies on.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

fn settings(directory: &Path) -> BenchSettings {
    BenchSettings {
        memory_mib: MEMORY_MIB,
        backends: vec![Backend::Memfd],
        saves: true,
        restores: true,
        directory: directory.to_owned(),
        rounds: 1,
        repeats: 1,
        time_limit: None,
    }
}

struct Silent;

impl Narrator for Silent {
    fn tell(&self, _sentence: &str) {}
}

/// Gives up as soon as something was said that holds these words.
struct Interrupter {
    words: &'static str,
    cancel: Cancel,
    said: Mutex<Vec<String>>,
}

impl Narrator for Interrupter {
    fn tell(&self, sentence: &str) {
        self.said.lock().expect("a lock").push(sentence.to_owned());
        if sentence.contains(self.words) {
            self.cancel.cancel();
        }
    }
}

#[test]
fn every_way_has_its_row_and_the_sizes_are_plausible() {
    let directory = directory();
    let cancel = Cancel::new().expect("an eventfd");
    let report = bench(&settings(directory.path()), &cancel, &Silent)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(std::fs::read_dir(directory.path()).expect("the directory").count(), 0, "images were left");

    for job in [Job::Save, Job::Restore] {
        for load in [Load::Dirty, Load::Idle] {
            rows_are_plausible(&report, job, load);
        }
    }
    let whats: Vec<_> = report.ceilings.iter().map(|ceiling| ceiling.what).collect();
    let saves = ["write a new file", "write over a file", "write data out of memory"];
    assert_eq!(whats, [&saves[..], &["read a file", "fill fresh shared memory"]].concat());
    let compared: Vec<_> =
        report.comparisons.iter().map(|found| (found.job, found.load, found.rival)).collect();
    assert_eq!(
        compared,
        [
            (Job::Save, Load::Dirty, Rival::QemuBest),
            (Job::Save, Load::Dirty, Rival::Ceiling),
            (Job::Restore, Load::Dirty, Rival::QemuBest),
            (Job::Restore, Load::Dirty, Rival::Ceiling),
            (Job::Save, Load::Idle, Rival::QemuBest),
            (Job::Save, Load::Idle, Rival::Allowance),
        ]
    );
    // One round says nothing, and a small guest nothing of a large one.
    for comparison in &report.comparisons {
        let is_open = matches!(comparison.verdict, Verdict::TooFewRounds | Verdict::SmallGuest);
        assert!(is_open, "{comparison:?}");
    }
    assert!(render(&report, Style::Text).contains("Restore of the idle guest"));
    assert!(svg(&report).ends_with("</svg>\n"));
}

#[test]
fn memory_that_is_there_and_huge_pages_are_measured_against_reading_and_the_pool_is_as_before() {
    let pool = || std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    // The pool is one for all: nobody else changes it meanwhile.
    let _lock = huge::HugePool::reserve(0, "a pool that the benchmark makes larger");
    let before = pool();
    let directory = directory();
    let cancel = Cancel::new().expect("an eventfd");
    let backends = vec![Backend::Populated, Backend::Huge];
    let settings = BenchSettings { memory_mib: 64, backends, saves: false, ..settings(directory.path()) };
    let report = bench(&settings, &cancel, &Silent).unwrap_or_else(|error| panic!("{}", error.chain()));
    for backend in [Backend::Populated, Backend::Huge] {
        let whats: Vec<_> =
            report.ceilings.iter().filter(|found| found.backend == backend).map(|found| found.what).collect();
        let ours = report.rows.iter().filter(|row| row.backend == backend && row.way == Way::Vmstate);
        let vias: Vec<_> = ours.map(|row| row.via).collect();
        let left_out = report.notes.iter().find(|note| note.starts_with("no guest on huge pages"));
        if let Some(note) = left_out.filter(|_| backend == Backend::Huge) {
            println!("NOT TESTED here: {note}");
            assert!(vias.is_empty(), "{note}");
            continue;
        }
        assert_eq!(whats, ["read a file"], "{backend:?}");
        assert_eq!(vias, [Some("direct"); 2], "{backend:?}");
    }
    assert_eq!(pool(), before);
}

fn rows_are_plausible(report: &BenchReport, job: Job, load: Load) {
    let rows: Vec<_> = report.rows.iter().filter(|row| row.job == job && row.load == load).collect();
    let left_out = report.notes.iter().filter(|note| note.starts_with("no QEMU")).count();
    assert_eq!(rows.len(), Way::ALL.len() - left_out, "{:?}", report.notes);
    for row in rows {
        assert!(row.count > 0 && row.time_ms > 0.0 && row.time_min_ms <= row.time_max_ms, "{row:?}");
        // The guest leaves a few MiB to the firmware, which touches some pages itself.
        let (least, most) = match load {
            Load::Dirty => ((MEMORY_MIB - 8) * MIB, (MEMORY_MIB + 8) * MIB),
            Load::Idle => (8 * MIB, 24 * MIB),
        };
        assert!((least..=most).contains(&row.data_bytes), "{row:?}");
        assert!((least..=most + 8 * MIB).contains(&row.disk_bytes), "{row:?}");
        assert!(row.file_bytes >= least, "{row:?}");
        assert_eq!(row.via.is_some(), row.way == Way::Vmstate, "{row:?}");
        if row.way == Way::Vmstate && job == Job::Save {
            // What QEMU's own scan for zeros costs, and ours does not.
            assert!(row.qemu_growth_bytes < 32 << 20, "{row:?}");
        }
    }
}

#[test]
fn a_run_that_is_interrupted_leaves_nothing() {
    for words in ["save of the dirty", "rounds against"] {
        let directory = directory();
        let cancel = Cancel::new().expect("an eventfd");
        let narrator = Interrupter { words, cancel: cancel.clone(), said: Mutex::default() };
        let error = bench(&settings(directory.path()), &cancel, &narrator).expect_err("an interruption");
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Interrupted, "interrupted"));
        let said = narrator.said.lock().expect("a lock");
        assert!(said.last().is_some_and(|last| last.contains(words)), "{said:?}");
        assert_eq!(std::fs::read_dir(directory.path()).expect("the directory").count(), 0, "{words}");
    }
}

#[test]
fn every_mode_of_a_restore_has_its_row() {
    let directory = directory();
    let settings = ModesSettings {
        sizes_mib: vec![64, 96],
        rounds: 1,
        directory: directory.path().to_owned(),
        time_limit: None,
    };
    let cancel = Cancel::new().expect("an eventfd");
    let report = modes(&settings, &cancel, &Silent).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(std::fs::read_dir(directory.path()).expect("the directory").count(), 0, "images were left");
    let found: Vec<_> = report.rows.iter().map(|row| (row.is_dirty, row.memory_mib, row.mode)).collect();
    let mut modes = vec!["QEMU", "eager", "map", "map --wait", "lazy", "lazy, stopped", "read ceiling"];
    // Whoever may have no userfaultfd is told so.
    if !report.notes.iter().any(|note| note.starts_with("no lazy ceiling")) {
        modes.push("lazy ceiling");
    }
    let mut expected = Vec::new();
    for is_dirty in [false, true] {
        for &mib in &settings.sizes_mib {
            let modes = if is_dirty { &modes[..] } else { &modes[..5] };
            expected.extend(modes.iter().map(|mode| (is_dirty, mib, *mode)));
        }
    }
    assert_eq!(found, expected);
    for row in &report.rows {
        assert_eq!(row.rounds, 1);
        let is_ceiling = row.mode.ends_with("ceiling");
        let is_stopped = row.mode == "lazy, stopped";
        assert_eq!(row.first_instruction_ms.is_none(), is_ceiling, "{row:?}");
        assert_eq!(row.guest_ready_ms.is_none(), is_ceiling || is_stopped, "{row:?}");
        assert!(row.from_ready_ms <= row.first_instruction_ms, "{row:?}");
        assert!(row.guest_ready_ms.is_none_or(|ready| row.first_instruction_ms <= Some(ready)), "{row:?}");
        assert_eq!(row.resident_ms.is_none(), matches!(row.mode, "map" | "lazy ceiling"), "{row:?}");
        assert_eq!(row.fill_ms.is_some(), row.mode.starts_with("lazy"), "{row:?}");
        // What is mapped was not read, and what is waited for was.
        let reads_all = matches!(row.mode, "eager" | "map --wait" | "lazy" | "lazy, stopped");
        let least = if row.is_dirty { (row.memory_mib - 8) * MIB } else { 8 * MIB };
        assert_eq!(row.read_bytes >= least, reads_all, "{row:?}");
    }
    let says = |mode: &str| report.notes.iter().any(|note| note.starts_with(&format!("{mode}: first instr")));
    assert!(says("map") && says("lazy"), "{:?}", report.notes);
    let text = render_modes(&report, Style::Markdown);
    assert_eq!(text.lines().filter(|line| line.starts_with("| ")).count(), 2 + report.rows.len(), "{text}");
}

#[test]
fn what_clones_cost_is_counted_once_for_all_and_for_each() {
    let directory = directory();
    let cancel = Cancel::new().expect("an eventfd");
    let rows = clones(&[1, 2], 64, directory.path(), &cancel, &Silent)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(std::fs::read_dir(directory.path()).expect("the directory").count(), 0, "images were left");
    let found: Vec<_> = rows.iter().map(|row| (row.clones, row.mode)).collect();
    let modes = ["eager", "map", "map, all read"];
    assert_eq!(found, [1, 2].map(|count| modes.map(|mode| (count, mode))).concat());
    let of = |clones, mode| rows.iter().find(|row| (row.clones, row.mode) == (clones, mode)).expect(mode);
    // Two that were read into memory of their own take the guest's twice, two that share an image once.
    let guest = 48 * MIB;
    assert!(of(2, "eager").own_bytes >= 2 * guest, "{rows:?}");
    assert!(of(2, "map, all read").own_bytes < 2 * guest, "{rows:?}");
    assert!(of(2, "map, all read").resident_bytes >= 2 * guest, "{rows:?}");
    assert!(of(2, "map, all read").together_bytes < of(2, "eager").together_bytes, "{rows:?}");
    assert_eq!(render_clones(&rows, Style::Text).lines().count(), 1 + rows.len());
}

#[test]
fn the_growth_has_a_row_for_every_size_and_share_and_cancelled_guests_run_again() {
    let directory = directory();
    let settings = GrowthSettings {
        sizes_mib: vec![64, 96],
        reserved_mib: Some(512 << 10),
        shares_mib: MEMORY_MIB,
        planned_bytes: 1 << 30,
        rounds: 1,
        time_per_size: Duration::ZERO,
        directory: directory.path().to_owned(),
        program: None,
    };
    let cancel = Cancel::new().expect("an eventfd");
    // It is an error of the run when a guest does not run again behind a cancel.
    let report = growth(&settings, &cancel, &Silent).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(std::fs::read_dir(directory.path()).expect("the directory").count(), 0, "images were left");

    let backends = [Backend::Private, Backend::Memfd];
    let mut expected: Vec<_> =
        backends.iter().flat_map(|backend| [64, 96].map(|mib| (*backend, mib, true))).collect();
    expected.extend(backends.map(|backend| (backend, 512 << 10, false)));
    let found: Vec<_> =
        report.sizes.iter().map(|row| (row.backend, row.memory_mib, row.qemu_ms.is_some())).collect();
    assert_eq!(found, expected, "{:?}", report.notes);
    for row in &report.sizes {
        assert!((8 * MIB..24 * MIB).contains(&row.data_bytes), "{row:?}");
        assert_eq!(row.ratio.is_some(), row.qemu_ms.is_some(), "{row:?}");
        assert!(row.vmstate_peak_bytes < 256 * MIB, "{row:?}");
        // The bits of 512 GiB that QEMU keeps of a migration are 16 MiB each, and no memory of the guest.
        assert!(row.vmstate_growth_bytes < 200 << 20, "{row:?}");
    }
    let shares: Vec<_> = report.shares.iter().map(|row| (row.backend, row.touched_percent)).collect();
    assert_eq!(shares, backends.map(|backend| [0, 1, 10, 50, 100].map(|share| (backend, share))).concat());
    for row in &report.shares {
        let touched = MEMORY_MIB * MIB * row.touched_percent / 100;
        let most = touched + 16 * MIB;
        assert!((touched.saturating_sub(8 * MIB)..most).contains(&row.data_bytes), "{row:?}");
    }
    assert_eq!(report.plans.len() + report.notes.len(), 6, "{:?}", report.notes);
    let whats: Vec<_> = report.infos.iter().map(|row| row.ram_bytes >> 30).collect();
    assert_eq!(whats, [512, 0, 0], "{:?}", report.infos);
    // Twelve moments for each kind of memory; at some of them a job as short as this may be over.
    assert_eq!(report.cancels.len(), 24);
    for row in &report.cancels {
        assert_eq!(row.count + row.too_late, 1, "{row:?}");
        let is_sure = matches!(row.when, "connect" | "probe" | "stop" | "device state" | "compare");
        assert!(!is_sure || row.count == 1, "{row:?}");
    }
    let text = render_growth(&report, Style::Markdown);
    assert!(text.contains("512 GiB") && text.contains("From a cancel until the guest runs"), "{text}");
    assert!(growth_svg(&report).ends_with("</svg>\n"));
}

#[test]
fn every_conversion_has_its_row_and_its_ceilings() {
    let (directory, second) = (directory(), directory());
    for second in [None, Some(second.path())] {
        let settings = ConversionsSettings {
            memory_mib: 128,
            rounds: 1,
            time_limit: None,
            directory: directory.path().to_owned(),
            second_directory: second.map(Into::into),
        };
        let cancel = Cancel::new().expect("an eventfd");
        let rows =
            conversions(&settings, &cancel, &Silent).unwrap_or_else(|error| panic!("{}", error.chain()));
        for left in [Some(directory.path()), second].into_iter().flatten() {
            assert_eq!(std::fs::read_dir(left).expect("the directory").count(), 0, "images were left");
        }
        let found: Vec<_> = rows.iter().map(|row| (row.from, row.to)).collect();
        let others = ["stream", "libvirt-raw", "libvirt-sparse"];
        assert_eq!(found, others.map(|other| [("mapped-ram", other), (other, "mapped-ram")]).concat());
        for row in &rows {
            assert!((120 * MIB..136 * MIB).contains(&row.data_bytes), "{row:?}");
            assert!(
                [row.time_ms, row.read_ms, row.write_ms, row.both_ms].iter().all(|ms| *ms > 0.0),
                "{row:?}"
            );
            assert_eq!(row.verdict, Verdict::TooFewRounds);
        }
        assert_eq!(render_conversions(&rows, Style::Text).lines().count(), 1 + rows.len());
    }
}
