//! libvirt 9.0 with QEMU 7.2, as Debian 12 has them: no sparse images, no mapped-ram, no addresses told.
//!
//! A part of `make test-full`: `scripts/setup-old-libvirt.sh` unpacks both into a root directory of their own.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lab::{Guest, GuestSettings};
use vmstate::libvirt::{DomainName, PayloadFormat};
use vmstate::net::QmpAddress;
use vmstate::source::Format;
use vmstate::{
    Cancel, ConvertSettings, Observer, SaveFormat, SaveReport, SaveSettings, Then, Unobserved, Via,
};
use vmstate_rig::{Domain, DomainSpec, Launched, Libvirtd, verify_image};

const KEEPER: &str = env!("CARGO_BIN_EXE_libvirt-keeper");
const MIB: u64 = 1 << 20;
/// The newest machine that the old QEMU has; the new one has it, too.
const MACHINE: &str = "pc-q35-7.2";
const RAW: SaveFormat = SaveFormat::Libvirt(PayloadFormat::Raw);

/// The root directory of the old system; `None`, aloud, where it is not to be tested.
fn old() -> Option<PathBuf> {
    let root = lab::assets_dir().join("old-libvirt/root");
    let why = if std::env::var_os("VMSTATE_TEST_FULL").is_none() {
        "it is a part of make test-full (VMSTATE_TEST_FULL is not set)".to_owned()
    } else if root.exists() {
        return Some(root);
    } else {
        format!("there is none at {}; scripts/setup-old-libvirt.sh unpacks it", root.display())
    };
    // Past the test harness, which keeps what a test that passes prints.
    std::io::stderr().write_all(format!("skipped: libvirt 9.0: {why}\n").as_bytes()).unwrap();
    None
}

fn spec(name: &str) -> DomainSpec {
    DomainSpec { machine: MACHINE.to_owned(), ..DomainSpec::new(name, 96 * MIB) }
}

/// Saves as the command line does.
fn save(libvirtd: &Libvirtd, domain: &Domain<'_>, image: &Path, change: SaveSettings) -> SaveReport {
    save_observed(libvirtd, domain, image, change, &Unobserved)
}

fn save_observed(
    libvirtd: &Libvirtd,
    domain: &Domain<'_>,
    image: &Path,
    change: SaveSettings,
    observer: &dyn Observer,
) -> SaveReport {
    let name = DomainName(domain.spec().name.clone());
    let qmp = QmpAddress::Domain { uri: libvirtd.uri().parse().unwrap(), name };
    let settings = SaveSettings { qmp, image: image.to_owned(), ..change };
    vmstate::save(&settings, &Cancel::new().unwrap(), observer)
        .unwrap_or_else(|error| panic!("{}: {}\n{}", domain.spec().name, error.chain(), libvirtd.log()))
}

/// What differs from the defaults is all that matters: address and image are put in later.
fn defaults() -> SaveSettings {
    SaveSettings::new(QmpAddress::Unix(PathBuf::new()), PathBuf::new())
}

/// Looks at every page of a domain that runs, by way of an image of it.
fn verify(libvirtd: &Libvirtd, domain: &Domain<'_>) {
    let image = domain.dir().join("look");
    let look = SaveSettings { format: Some(SaveFormat::MappedRam), then: Then::Resume, ..defaults() };
    save(libvirtd, domain, &image, look);
    verify_image(&domain.spec().guest, &domain.spec().layout(), &image);
    std::fs::remove_file(&image).unwrap();
}

#[test]
fn what_vmstate_saves_of_an_old_domain_its_own_virsh_restores() {
    let Some(root) = old() else { return };
    let libvirtd = Libvirtd::start_within(KEEPER, &root);
    let versions = libvirtd.virsh(&[&"version"]);
    assert!(versions.contains("library: libvirt 9.0.0"), "{versions}");
    assert!(versions.contains("hypervisor: QEMU 7.2."), "{versions}");
    let shared = "<source type='memfd'/><access mode='shared'/>";
    let file = "<source type='file'/><access mode='shared'/>";
    for (name, backing) in [("private", ""), ("memfd", shared), ("file", file)] {
        let mut domain = DomainSpec { memory_backing: backing.to_owned(), ..spec(name) }.start(&libvirtd);
        domain.wait_for_rounds(2);
        let image = domain.dir().join("image");
        // Nobody says which format: this libvirt knows no sparse one.
        let report = save(&libvirtd, &domain, &image, SaveSettings { then: Then::Quit, ..defaults() });
        assert_eq!((report.via, report.format), (Via::Direct, RAW), "{name}: {:?}", report.reason);
        assert_eq!(domain.state(), "shut off", "{name}");
        assert_eq!(vmstate::check(&image).unwrap().report.faults, [], "{name}");
        let before = domain.serial.latest_round().unwrap();
        libvirtd.virsh(&[&"restore", &image]);
        assert_eq!(domain.state(), "running", "{name}");
        domain.wait_for_rounds(2);
        assert!(domain.serial.latest_round().unwrap() >= before + 2, "{name}");
        verify(&libvirtd, &domain);
    }
}

/// Keeps what a user is warned of.
#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Observer for Warnings {
    fn warn(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

#[test]
fn a_format_that_an_old_libvirt_cannot_restore_is_warned_of_and_never_chosen_for_the_user() {
    let Some(root) = old() else { return };
    let libvirtd = Libvirtd::start_within(KEEPER, &root);
    let mut domain = spec("strangers").start(&libvirtd);
    domain.wait_for_rounds(1);
    let image = domain.dir().join("image");
    // As one that was copied from a newer host.
    libvirtd.configure("save_image_format = \"zstd\"");
    for (format, saved, warning) in [
        (
            Some(PayloadFormat::Zstd),
            PayloadFormat::Zstd,
            Some("libvirt 9.0.0 here does not restore libvirt-zstd, which came with 10.4.0"),
        ),
        (
            Some(PayloadFormat::Sparse),
            PayloadFormat::Sparse,
            Some("libvirt 9.0.0 here does not restore libvirt-sparse, which came with 11.2.0"),
        ),
        (
            None,
            PayloadFormat::Raw,
            Some("wants save images as `zstd`, which cannot be had here: it is raw instead"),
        ),
        (Some(PayloadFormat::Gzip), PayloadFormat::Gzip, None),
    ] {
        let warnings = Warnings::default();
        let settings = SaveSettings {
            format: format.map(SaveFormat::Libvirt),
            then: Then::Resume,
            overwrite: true,
            ..defaults()
        };
        let report = save_observed(&libvirtd, &domain, &image, settings, &warnings);
        assert_eq!(report.format, SaveFormat::Libvirt(saved));
        let told = warnings.0.into_inner().unwrap();
        assert_eq!(told.len(), usize::from(warning.is_some()), "{format:?}: {told:?}");
        assert!(told.iter().all(|told| warning.is_some_and(|words| told.contains(words))), "{told:?}");
    }
}

#[test]
fn what_old_libvirt_saves_goes_on_in_old_qemu_without_it() {
    let Some(root) = old() else { return };
    let program = lab::assets_dir().join("qemu72/qemu-system-x86_64");
    assert!(program.exists(), "scripts/setup-qemu72.sh unpacks {}", program.display());
    let libvirtd = Libvirtd::start_within(KEEPER, &root);
    for format in ["raw", "gzip"] {
        // This virsh takes no format.
        libvirtd.configure(&format!("save_image_format = \"{format}\""));
        let mut domain = spec(&format!("saved-{format}")).start(&libvirtd);
        domain.wait_for_rounds(2);
        let image = domain.dir().join("image");
        let mut command = domain.command();
        // The same QEMU, which finds its libraries outside of that root.
        command[0] = OsString::from(&program);
        libvirtd.virsh(&[&"save", &domain.spec().name, &image]);
        let saved = domain.serial.latest_round().unwrap();

        assert_eq!(vmstate::check(&image).unwrap().report.faults, [], "{format}");
        let info = vmstate::info(&image).unwrap();
        assert_eq!(info.format, format!("libvirt-{format}"));
        assert_eq!(info.domain.unwrap().name.as_deref(), Some(domain.spec().name.as_str()));

        let qemu = Launched::restore(&image, &command, domain.dir());
        domain.wait_for_rounds(2);
        assert!(domain.serial.latest_round().unwrap() >= saved + 2, "{format}");
        qemu.verify(&domain.spec().guest, &domain.spec().layout());
    }
}

#[test]
fn a_sparse_image_of_a_new_host_is_converted_for_an_old_one_and_back() {
    let Some(root) = old() else { return };
    let (new, old) = (Libvirtd::start(KEEPER), Libvirtd::start_within(KEEPER, &root));
    let sparse = SaveFormat::Libvirt(PayloadFormat::Sparse);
    let mut domain = spec("moving").start(&new);
    domain.wait_for_rounds(2);
    let image = domain.dir().join("image");
    let report = save(&new, &domain, &image, SaveSettings { then: Then::Quit, ..defaults() });
    assert_eq!(report.format, sparse);

    // The disk and the console are the other host's own.
    let mut there = spec("moving").start(&old);
    old.virsh(&[&"destroy", &"moving"]);
    old.virsh(&[&"undefine", &"moving"]);
    let moved = there.dir().join("image");
    convert(&image, &moved, PayloadFormat::Raw, domain.dir(), there.dir());
    assert_eq!(vmstate::check(&moved).unwrap().report.faults, []);
    old.virsh(&[&"restore", &moved]);
    assert_eq!(there.state(), "running");
    there.wait_for_rounds(2);
    verify(&old, &there);

    let again = there.dir().join("again");
    old.virsh(&[&"save", &"moving", &again]);
    convert(&again, &image, PayloadFormat::Sparse, there.dir(), domain.dir());
    new.virsh(&[&"restore", &image]);
    assert_eq!(domain.state(), "running");
    domain.wait_for_rounds(2);
    verify(&new, &domain);
}

/// Converts an image whose disks lie in `from_dir` to one for another host, where they lie in `to_dir`.
fn convert(from: &Path, to: &Path, format: PayloadFormat, from_dir: &Path, to_dir: &Path) {
    let head = std::fs::read(from).unwrap();
    let head = wire::libvirt::Head::decode(&head, 0, head.len() as u64).unwrap();
    let text = |dir: &Path| dir.to_str().unwrap().to_owned();
    let xml = head.xml.replace(&text(from_dir), &text(to_dir));
    assert_ne!(xml, head.xml);
    let settings = ConvertSettings {
        domain_xml: Some(xml),
        overwrite: true,
        ..ConvertSettings::new(from, to, Format::Libvirt(format))
    };
    vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}: {}", from.display(), error.chain()));
}

#[test]
fn both_ways_of_saving_on_an_old_host_bring_the_domain_back_and_say_how_long_they_took() {
    let Some(root) = old() else { return };
    let libvirtd = Libvirtd::start_within(KEEPER, &root);
    for (name, guest) in [("idle", GuestSettings::idle(2048)), ("dirty", GuestSettings::default())] {
        let memory = "<source type='memfd'/><access mode='shared'/>";
        for (kind, backing) in [("private", ""), ("memfd", memory)] {
            let name = format!("{name}-{kind}");
            let mut spec = DomainSpec { machine: MACHINE.to_owned(), ..DomainSpec::new(&name, 1024 * MIB) };
            (spec.memory_backing, spec.guest) = (backing.to_owned(), Guest::new(guest));
            let mut domain = spec.start(&libvirtd);
            domain.wait_for_rounds(1);
            let image = domain.dir().join("image");
            let (mut took, mut phases) = ([Vec::new(), Vec::new()], String::new());
            // In turn, forwards and backwards.
            for way in [0, 1, 1, 0] {
                let begun = Instant::now();
                if way == 0 {
                    libvirtd.virsh(&[&"save", &name, &image]);
                } else {
                    let settings = SaveSettings { then: Then::Quit, ..defaults() };
                    let report = save(&libvirtd, &domain, &image, settings);
                    let phase = |(name, time): &(&str, Duration)| format!("{name} {}", time.as_millis());
                    phases = report.phases.0.iter().map(phase).collect::<Vec<_>>().join(", ");
                }
                took[way].push(begun.elapsed().as_millis());
                assert_eq!(domain.state(), "shut off", "{name}");
                libvirtd.virsh(&[&"restore", &image]);
                domain.wait_for_rounds(1);
                std::fs::remove_file(&image).unwrap();
            }
            let [theirs, ours] = &took;
            let line = format!(
                "libvirt 9.0, {name} guest of 1 GiB: virsh save {theirs:?} ms, vmstate {ours:?} ms ({phases})\n"
            );
            std::io::stderr().write_all(line.as_bytes()).unwrap();
        }
    }
}
