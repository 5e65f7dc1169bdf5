//! Domains of a real libvirtd: what it saves, vmstate restores.

#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::path::Path;

use vmstate::libvirt::DomainName;
use vmstate::net::QmpAddress;
use vmstate::source::{Format, MappedRamFile};
use vmstate::{Cancel, ConvertSettings, SaveFormat, SaveSettings, Then, Unobserved};
use vmstate_rig::{DomainSpec, Launched, Libvirtd, unpack_golden, verify_image};
use wire::libvirt::Head;

#[path = "../../mem/tests/guest/huge.rs"]
mod huge;

const KEEPER: &str = env!("CARGO_BIN_EXE_libvirt-keeper");
const MIB: u64 = 1 << 20;

/// Has virsh save a domain, looks at the image, and restores it without libvirt.
fn check(libvirtd: &Libvirtd, backing: (&str, &str), format: &str) {
    let (kind, xml) = backing;
    let what = format!("{kind}-{format}");
    let mut spec = DomainSpec::new(&what, 96 * MIB);
    spec.memory_backing = xml.to_owned();
    let mut domain = spec.start(libvirtd);
    domain.wait_for_rounds(2);
    let image = domain.dir().join("image");
    let command = domain.command();
    domain.save(&image, format);
    assert_eq!(domain.state(), "shut off", "{what}");
    let saved = domain.serial.latest_round().unwrap();

    assert_eq!(vmstate::check(&image).unwrap().report.faults, [], "{what}");
    let info = vmstate::info(&image).unwrap();
    assert_eq!(info.format, format!("libvirt-{format}"));
    assert_eq!(info.domain.unwrap().name.as_deref(), Some(domain.spec().name.as_str()));
    assert_eq!(info.run_state.as_deref(), Some("running"), "{what}");

    let qemu = Launched::restore(&image, &command, domain.dir());
    domain.wait_for_rounds(2);
    assert!(domain.serial.latest_round().unwrap() >= saved + 2, "{what}");
    qemu.verify(&domain.spec().guest, &domain.spec().layout());
}

const PRIVATE: (&str, &str) = ("private", "");
const MEMFD: (&str, &str) = ("memfd", "<source type='memfd'/><access mode='shared'/>");
const FILE: (&str, &str) = ("file", "<source type='file'/><access mode='shared'/>");
const HUGE: (&str, &str) = ("huge", "<hugepages/><source type='memfd'/>");

#[test]
fn what_virsh_saves_goes_on_in_a_qemu_without_libvirt() {
    let libvirtd = Libvirtd::start(KEEPER);
    for format in ["raw", "zstd", "gzip", "sparse"] {
        check(&libvirtd, PRIVATE, format);
    }
}

#[test]
fn what_virsh_saves_of_shared_memory_goes_on_in_a_qemu_without_libvirt() {
    let libvirtd = Libvirtd::start(KEEPER);
    for (backing, format) in
        [(MEMFD, "raw"), (MEMFD, "zstd"), (MEMFD, "sparse"), (FILE, "gzip"), (FILE, "sparse")]
    {
        check(&libvirtd, backing, format);
    }
}

#[test]
fn what_virsh_saves_of_huge_pages_goes_on_in_a_qemu_without_libvirt() {
    let Some(_pool) = huge::HugePool::reserve(96 / 2 + 8, "domains on huge pages") else { return };
    let libvirtd = Libvirtd::start(KEEPER);
    for format in ["raw", "sparse"] {
        check(&libvirtd, HUGE, format);
    }
}

/// The memory of the golden images' guest in an image whose pages have places.
fn memory_of(image: &Path) -> Vec<u8> {
    let image = MappedRamFile::open(image).unwrap();
    let block = image.layout().blocks.iter().find(|block| block.name == "pc.ram").unwrap();
    let mut bytes = vec![0; 64 << 20];
    image.read_ram(block, &image.pages(block).unwrap(), 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn every_golden_image_is_written_anew_so_that_virsh_restores_the_same_memory() {
    let goldens = [
        "raw",
        "gzip",
        "bzip2",
        "xz",
        "lzop",
        "zstd",
        "sparse",
        "raw-direct",
        "sparse-direct-pc4",
        "external-align1m",
    ];
    let libvirtd = Libvirtd::start(KEEPER);
    let at = |name: &str| libvirtd.dir().join(name);
    unpack_golden("libvirt-11.3-ram", &at("ram"));
    let ram = std::fs::read(at("ram")).unwrap();
    for (i, golden) in goldens.into_iter().enumerate() {
        let (theirs, ours) = (at("theirs"), at("ours"));
        unpack_golden(&format!("libvirt-11.3-{golden}-image"), &theirs);
        assert_eq!(vmstate::check(&theirs).unwrap().report.faults, [], "{golden}");
        // The console of its domain was in a directory of another machine.
        let head = std::fs::read(&theirs).unwrap();
        let head = Head::decode(&head, 0, head.len() as u64).unwrap();
        let xml = head.xml.replace("/tmp/lv/", &format!("{}/", libvirtd.dir().display()));
        assert_ne!(xml, head.xml, "{golden}");
        // Each becomes the format of the one behind it, so that each is written once at least.
        let format = Format::LIBVIRT[(i + 1) % Format::LIBVIRT.len()];
        let settings = ConvertSettings {
            domain_xml: Some(xml),
            overwrite: true,
            ..ConvertSettings::new(&theirs, &ours, format)
        };
        let what = format!("{golden} to {}", format.name());
        vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{what}: {}", error.chain()));
        libvirtd.virsh(&[&"restore", &ours, &"--paused"]);
        let look = at("look");
        let address =
            QmpAddress::Domain { uri: libvirtd.uri().parse().unwrap(), name: DomainName("fxbios".into()) };
        let settings = SaveSettings {
            format: Some(SaveFormat::MappedRam),
            then: Then::Quit,
            overwrite: true,
            ..SaveSettings::new(address, &look)
        };
        vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{what}: {}", error.chain()));
        assert!(memory_of(&look) == ram, "{what}: another memory");
    }
}

#[test]
fn what_vmstate_converts_virsh_restores_in_every_format() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("converted", 96 * MIB).start(&libvirtd);
    domain.wait_for_rounds(2);
    let (saved, converted) = (domain.dir().join("saved"), domain.dir().join("converted"));
    // Each is made of what libvirt saved as the one before it.
    let formats = ["raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"];
    for (i, format) in formats.into_iter().enumerate() {
        domain.save(&saved, formats[(i + formats.len() - 1) % formats.len()]);
        let round = domain.serial.latest_round().unwrap();
        let target = Format::LIBVIRT[i];
        assert_eq!(target.name(), format!("libvirt-{format}"));
        let settings =
            ConvertSettings { overwrite: true, ..ConvertSettings::new(&saved, &converted, target) };
        vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{format}: {}", error.chain()));
        libvirtd.virsh(&[&"restore", &converted]);
        assert_eq!(domain.state(), "running", "{format}");
        assert!(domain.wait_for_rounds(2) >= round + 2, "{format}");
    }
    domain.save(&saved, "sparse");
    verify_image(&domain.spec().guest, &domain.spec().layout(), &saved);
}
