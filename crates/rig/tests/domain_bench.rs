//! The benchmark of domains: that it measures what it says and brings the guest back, never how fast anything is.

use std::path::Path;
use std::sync::Mutex;

use lab::bench::{DomainBenchSettings, DomainRow, Job, domain};
use lab::demo::Narrator;
use lab::{Guest, GuestSettings};
use vmstate::libvirt::DomainName;
use vmstate::{Cancel, Kind};
use vmstate_rig::{Domain, DomainSpec, Libvirtd};

const KEEPER: &str = env!("CARGO_BIN_EXE_libvirt-keeper");
const MIB: u64 = 1 << 20;
const MEMORY: u64 = 256 * MIB;

/// An idle guest whose memory is a memfd: what touches its holes shows.
fn spec(name: &str) -> DomainSpec {
    let mut spec = DomainSpec::new(name, MEMORY);
    spec.memory_backing = "<source type='memfd'/><access mode='shared'/>".to_owned();
    spec.guest = Guest::new(GuestSettings::idle(512));
    spec
}

fn settings(libvirtd: &Libvirtd, domain: &Domain<'_>) -> DomainBenchSettings {
    let directory = domain.dir().join("images");
    std::fs::create_dir_all(&directory).unwrap();
    DomainBenchSettings {
        uri: libvirtd.uri().parse().unwrap(),
        name: DomainName(domain.spec().name.clone()),
        command: domain.command(),
        channels: 2,
        directory,
        rounds: 1,
    }
}

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).unwrap().next().is_none()
}

/// Gives up as soon as something was said that holds these words, or never.
struct Listener<'a> {
    words: Option<(&'static str, &'a Cancel)>,
    said: Mutex<Vec<String>>,
}

impl Narrator for Listener<'_> {
    fn tell(&self, sentence: &str) {
        self.said.lock().unwrap().push(sentence.to_owned());
        if let Some((words, cancel)) = self.words
            && sentence.contains(words)
        {
            cancel.cancel();
        }
    }
}

#[test]
fn every_way_has_its_row_and_the_domain_goes_on() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut running = spec("measured").start(&libvirtd);
    running.wait_for_rounds(1);
    let settings = settings(&libvirtd, &running);
    let listener = Listener { words: None, said: Mutex::default() };
    let rows = domain(&settings, &Cancel::new().unwrap(), &listener)
        .unwrap_or_else(|error| panic!("{}\n{}", error.chain(), libvirtd.log()));
    let ways =
        |job| -> Vec<&str> { rows.iter().filter(|row| row.job == job).map(|row| row.way.as_str()).collect() };
    assert_eq!(
        ways(Job::Save),
        [
            "virsh save, raw",
            "virsh save, sparse",
            "virsh save, sparse, 2 channels",
            "virsh save, sparse, 2 channels, bypass-cache",
            "vmstate save --domain",
        ]
    );
    assert_eq!(
        ways(Job::Restore),
        [
            "virsh restore, raw",
            "virsh restore, sparse",
            "virsh restore, sparse, 2 channels",
            "virsh restore, sparse, 2 channels, bypass-cache",
            "vmstate restore --domain",
            "vmstate restore -- QEMU",
        ]
    );
    rows.iter().for_each(is_plausible);
    assert_eq!(running.state(), "running");
    running.wait_for_rounds(1);
    assert!(is_empty(&settings.directory), "images were left");
}

fn is_plausible(row: &DomainRow) {
    assert!(row.count == 1 && row.time_ms > 0.0 && row.file_bytes >= row.disk_bytes.min(MIB), "{row:?}");
    assert!(row.qemu_bytes > 2 * MIB, "{row:?}");
    let Some(growth) = row.qemu_growth_bytes else { return };
    assert!(row.durable_ms.is_some_and(|ms| ms >= row.time_ms), "{row:?}");
    // What QEMU's own scan for zeros costs, and ours does not.
    match row.way.as_str() {
        "vmstate save --domain" => assert!(growth < 32 * MIB, "{row:?}"),
        _ => assert!(growth > MEMORY / 2, "{row:?}"),
    }
}

#[test]
fn a_run_that_is_interrupted_leaves_the_domain_as_it_was() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut running = spec("interrupted").start(&libvirtd);
    running.wait_for_rounds(1);
    let settings = settings(&libvirtd, &running);
    for (words, state) in [("suspended", "running"), ("virsh save, sparse", "running"), ("vmstate", "paused")]
    {
        if state == "paused" {
            libvirtd.virsh(&[&"suspend", &"interrupted"]);
        }
        let cancel = Cancel::new().unwrap();
        let listener = Listener { words: Some((words, &cancel)), said: Mutex::default() };
        let error = domain(&settings, &cancel, &listener).unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted, "{words}: {}", error.chain());
        let said = listener.said.lock().unwrap();
        assert!(said.last().is_some_and(|last| last.contains(words)), "{said:?}");
        assert_eq!(running.state(), state, "{words}");
        assert!(is_empty(&settings.directory), "{words}: images were left");
    }
    libvirtd.virsh(&[&"resume", &"interrupted"]);
    running.wait_for_rounds(1);
}
