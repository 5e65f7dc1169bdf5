//! Domains of a real libvirtd, saved and restored by name.

#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::path::Path;
use std::process::Command;

use rustix::fs::statvfs;
use vmstate::libvirt::{Connection, DomainName, GivingUp, LibvirtUri, PayloadFormat};
use vmstate::net::QmpAddress;
use vmstate::{
    Cancel, DirectIo, DomainRestoreSettings, Error, Kind, Observer, Record, ResumeSettings, SaveFormat,
    SaveReport, SaveSettings, Then, Unobserved, Via,
};
use vmstate_rig::{DomainSpec, Hook, Libvirtd};
use wire::libvirt::Head;

#[path = "../../mem/tests/guest/huge.rs"]
mod huge;

const KEEPER: &str = env!("CARGO_BIN_EXE_libvirt-keeper");
const MIB: u64 = 1 << 20;
const SPARSE: SaveFormat = SaveFormat::Libvirt(PayloadFormat::Sparse);
const RAW: SaveFormat = SaveFormat::Libvirt(PayloadFormat::Raw);

fn uri(libvirtd: &Libvirtd) -> LibvirtUri {
    libvirtd.uri().parse().unwrap()
}

fn save(settings: &SaveSettings, observer: &dyn Observer) -> Result<SaveReport, Error> {
    vmstate::save(settings, &Cancel::new().unwrap(), observer)
}

fn saved(settings: &SaveSettings) -> SaveReport {
    save(settings, &Unobserved).unwrap_or_else(|error| panic!("{}: {error:?}", error.chain()))
}

fn head(image: &Path) -> Head {
    let bytes = std::fs::read(image).unwrap();
    Head::decode(&bytes, 0, bytes.len() as u64).unwrap()
}

/// Saves a domain by vmstate, restores it by virsh, and looks at every page.
fn check(libvirtd: &Libvirtd, name: &str, backing: &str, format: Option<SaveFormat>, expected: SaveFormat) {
    let mut spec = DomainSpec::new(name, 96 * MIB);
    spec.memory_backing = backing.to_owned();
    let mut domain = spec.start(libvirtd);
    domain.wait_for_rounds(2);
    let image = domain.dir().join("image");
    let report = saved(&SaveSettings { format, ..domain.settings(&image) });
    assert_eq!((report.via, report.format), (Via::Direct, expected), "{name}: {:?}", report.reason);
    assert_eq!(domain.state(), "shut off", "{name}");
    assert_eq!(vmstate::check(&image).unwrap().report.faults, [], "{name}");
    let before = domain.serial.latest_round().unwrap();
    libvirtd.virsh(&[&"restore", &image]);
    assert_eq!(domain.state(), "running", "{name}");
    domain.wait_for_rounds(2);
    assert!(domain.serial.latest_round().unwrap() >= before + 2, "{name}");
    domain.verify();
}

#[test]
fn what_vmstate_saves_of_a_domain_virsh_restores() {
    let libvirtd = Libvirtd::start(KEEPER);
    let memfd = "<source type='memfd'/><access mode='shared'/>";
    let file = "<source type='file'/><access mode='shared'/>";
    check(&libvirtd, "private", "", None, SPARSE);
    check(&libvirtd, "private-raw", "", Some(RAW), RAW);
    check(&libvirtd, "memfd", memfd, None, SPARSE);
    check(&libvirtd, "memfd-raw", memfd, Some(RAW), RAW);
    check(&libvirtd, "file", file, None, SPARSE);
    check(&libvirtd, "file-raw", file, Some(RAW), RAW);
}

#[test]
fn a_domain_on_huge_pages_is_saved_and_virsh_restores_it() {
    let Some(_pool) = huge::HugePool::reserve(96 / 2 + 8, "domains on huge pages") else { return };
    let libvirtd = Libvirtd::start(KEEPER);
    check(&libvirtd, "huge", "<hugepages/><source type='memfd'/>", None, SPARSE);
    check(&libvirtd, "huge-raw", "<hugepages/><source type='memfd'/>", Some(RAW), RAW);
    check(&libvirtd, "huge-file", "<hugepages/>", None, SPARSE);
}

#[test]
fn what_stands_before_the_guest_is_what_libvirt_itself_writes() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("text", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    let ours = domain.dir().join("ours");
    saved(&SaveSettings { then: Then::Resume, ..domain.settings(&ours) });
    let theirs = domain.dir().join("theirs");
    domain.save(&theirs, "sparse");
    let (ours, theirs) = (head(&ours), head(&theirs));
    assert_eq!(ours, theirs);
    assert!(theirs.cookie.is_some() && theirs.was_running);
}

#[test]
fn a_domain_is_found_by_name_number_and_uuid() {
    let libvirtd = Libvirtd::start(KEEPER);
    let domain = DomainSpec::new("found", 64 * MIB).start(&libvirtd);
    let mut connection =
        Connection::open(&uri(&libvirtd), GivingUp::Cancelled(Cancel::new().unwrap())).unwrap();
    let id = libvirtd.virsh(&[&"domid", &"found"]).trim().to_owned();
    let uuid = libvirtd.virsh(&[&"domuuid", &"found"]).trim().to_owned();
    for name in ["found", &id, &uuid] {
        assert_eq!(connection.find(&DomainName(name.to_owned())).unwrap().name, "found", "{name}");
    }
    let lost = connection.find(&DomainName("lost".into())).unwrap_err();
    assert_eq!(lost.to_string(), "libvirt refused: Domain not found: no domain with matching name 'lost'");
    libvirtd.virsh(&[&"destroy", &"found"]);
    let off = connection.find(&DomainName("found".into())).unwrap_err();
    assert_eq!((off.kind(), off.to_string().as_str()), (Kind::Misuse, "domain `found` does not run"));
    drop(domain);
}

#[test]
fn libvirt_restores_a_domain_for_us_in_the_state_that_is_asked_for() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("back", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    let image = domain.dir().join("image");
    saved(&domain.settings(&image));
    let restore = |record, channels| DomainRestoreSettings {
        uri: uri(&libvirtd),
        image: image.clone(),
        xml: None,
        record,
        direct_io: DirectIo::Auto,
        channels,
        reset_nvram: false,
    };
    for (record, channels, state) in [
        (Record::AsItWas, None, "running"),
        (Record::Paused, Some(2), "paused"),
        (Record::Running, Some(1), "running"),
    ] {
        let report =
            vmstate::restore_domain(&restore(record, channels), &Cancel::new().unwrap(), &Unobserved)
                .unwrap();
        assert_eq!(report.domain, "back");
        assert_eq!(domain.state(), state);
        if state == "running" {
            domain.wait_for_rounds(1);
        }
        libvirtd.virsh(&[&"destroy", &"back"]);
    }
    std::fs::write(&image, b"no image").unwrap();
    let error =
        vmstate::restore_domain(&restore(Record::AsItWas, None), &Cancel::new().unwrap(), &Unobserved)
            .unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
}

#[test]
fn libvirt_restores_a_domain_for_us_by_another_xml_and_with_every_flag() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("other", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    let image = domain.dir().join("image");
    saved(&domain.settings(&image));
    for (channels, described) in [(None, "described once"), (Some(2), "described again")] {
        let description = format!("<description>{described}</description>\n  <memory ");
        let xml = head(&image).xml.replacen("<memory ", &description, 1);
        let settings = DomainRestoreSettings {
            uri: uri(&libvirtd),
            image: image.clone(),
            xml: Some(xml),
            record: Record::AsItWas,
            direct_io: DirectIo::On,
            channels,
            reset_nvram: true,
        };
        vmstate::restore_domain(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{described}: {}", error.chain()));
        assert!(libvirtd.virsh(&[&"dumpxml", &"other"]).contains(described));
        domain.wait_for_rounds(1);
        libvirtd.virsh(&[&"destroy", &"other"]);
    }
}

#[test]
fn a_domain_that_somebody_resumes_in_mid_copy_is_not_saved() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("moved", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    let image = domain.dir().join("image");
    std::fs::write(&image, b"the old one").unwrap();
    let settings = SaveSettings { overwrite: true, ..domain.settings(&image) };
    // Resumed and suspended again: only events and the guest's own clock can tell.
    let hook = Hook::at("metadata", || {
        libvirtd.virsh(&[&"resume", &"moved"]);
        libvirtd.virsh(&[&"suspend", &"moved"]);
    });
    let error = save(&settings, &hook).unwrap_err();
    assert!(hook.is_done());
    assert!(error.to_string().starts_with("the guest did not stand still during the save ("), "{error}");
    assert_eq!(std::fs::read(&image).unwrap(), b"the old one");
    // Whoever suspended it has said what it is to do.
    assert_eq!(domain.state(), "paused");
    libvirtd.virsh(&[&"resume", &"moved"]);
    domain.wait_for_rounds(1);
}

#[test]
fn a_domain_that_is_ended_and_started_again_in_mid_copy_is_another_guest_and_left_alone() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("another", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    for phase in ["device state", "ram", "metadata"] {
        let image = domain.dir().join("image");
        std::fs::write(&image, b"the old one").unwrap();
        let settings = SaveSettings { overwrite: true, ..domain.settings(&image) };
        let hook = Hook::at(phase, || {
            libvirtd.virsh(&[&"destroy", &"another"]);
            libvirtd.virsh(&[&"start", &"another", &"--paused"]);
        });
        let error = save(&settings, &hook).unwrap_err();
        assert!(hook.is_done(), "{phase}: {}", error.chain());
        assert_eq!(std::fs::read(&image).unwrap(), b"the old one", "{phase}");
        // Nobody but whoever started it may say that it is to run, or that it is to end.
        assert_eq!(domain.state(), "paused", "{phase}: {}", error.chain());
        libvirtd.virsh(&[&"resume", &"another"]);
        domain.wait_for_rounds(1);
    }
}

#[test]
fn a_save_that_is_cancelled_leaves_the_domain_running_and_libvirt_saves_it_afterwards() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("cancelled", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    for phase in ["probe", "stop", "device state", "ram", "metadata", "publish"] {
        let image = domain.dir().join("image");
        let cancel = Cancel::new().unwrap();
        let hook = Hook::at(phase, || cancel.cancel());
        let error = vmstate::save(&domain.settings(&image), &cancel, &hook).unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted, "{phase}: {}", error.chain());
        assert!(!image.exists(), "{phase}");
        assert_eq!(domain.state(), "running", "{phase}");
        domain.wait_for_rounds(1);
    }
    // What an aborted save of libvirt's own leaves in QEMU crashes the next one, and the guest with it.
    for (format, bypass) in [("raw", false), ("sparse", true), ("sparse", false)] {
        let image = domain.dir().join("theirs");
        match bypass {
            true => drop(libvirtd.virsh(&[
                &"save",
                &"cancelled",
                &image,
                &"--image-format",
                &format,
                &"--bypass-cache",
            ])),
            false => domain.save(&image, format),
        }
        libvirtd.virsh(&[&"restore", &image]);
        // A restore of libvirt's that bypasses the cache leaves traps, too: ours clears its way around them.
        let ours = domain.dir().join("ours");
        saved(&SaveSettings { then: Then::Resume, overwrite: true, ..domain.settings(&ours) });
        domain.wait_for_rounds(1);
    }
}

#[test]
fn a_full_disk_leaves_the_domain_running_and_the_disk_as_it_was() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("full", 96 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    let place = domain.dir().join("small");
    std::fs::create_dir(&place).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(&place).status();
    assert!(mounted.unwrap().success(), "this test needs root, for a disk that is really full");
    let free = || statvfs(&place).unwrap().f_bfree;
    let before = free();
    for via in [Via::Direct, Via::Qemu] {
        let image = place.join("image");
        let error = save(&SaveSettings { via, ..domain.settings(&image) }, &Unobserved).unwrap_err();
        let hint = error.hint_text().unwrap_or_default().to_owned();
        assert!(hint.starts_with("the file system is full"), "{via:?}: {}: {hint}", error.chain());
        assert_eq!(domain.state(), "running", "{via:?}");
        assert_eq!(free(), before, "{via:?}: QEMU still holds what was deleted");
        domain.wait_for_rounds(1);
    }
    assert!(Command::new("umount").arg("-l").arg(&place).status().unwrap().success());
}

#[test]
fn qemu_itself_saves_a_domain_through_libvirt_where_that_is_asked_for() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("qemus", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    let image = domain.dir().join("image");
    let report = saved(&SaveSettings { via: Via::Qemu, ..domain.settings(&image) });
    assert_eq!((report.via, report.format), (Via::Qemu, SPARSE));
    libvirtd.virsh(&[&"restore", &image]);
    domain.wait_for_rounds(1);
    domain.verify();
}

#[test]
fn a_daemon_that_is_killed_and_restarted_in_the_middle_costs_the_save_and_not_the_guest() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("restarted", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    for phase in ["device state", "ram", "metadata"] {
        let image = domain.dir().join("image");
        std::fs::write(&image, b"the old one").unwrap();
        let settings = SaveSettings { overwrite: true, ..domain.settings(&image) };
        let hook = Hook::at(phase, || libvirtd.restart());
        let error = save(&settings, &hook).unwrap_err();
        assert!(hook.is_done(), "{phase}: {}", error.chain());
        assert_eq!(std::fs::read(&image).unwrap(), b"the old one", "{phase}");
        assert_eq!(domain.state(), "running", "{phase}: {}", error.chain());
        domain.wait_for_rounds(1);
    }
    // Nothing is left in QEMU that would be in the way of libvirt's own save.
    let image = domain.dir().join("theirs");
    domain.save(&image, "sparse");
    libvirtd.virsh(&[&"restore", &image]);
    domain.wait_for_rounds(1);
}

#[test]
fn a_domain_without_a_killed_save_needs_no_resume() {
    let libvirtd = Libvirtd::start(KEEPER);
    let domain = DomainSpec::new("left", 64 * MIB).start(&libvirtd);
    let qmp = QmpAddress::Domain { uri: uri(&libvirtd), name: DomainName("left".into()) };
    let report =
        vmstate::resume(&ResumeSettings { qmp, force: false }, &Cancel::new().unwrap(), &Unobserved).unwrap();
    assert!(!report.had_leftovers() && report.run_state == "running");
    drop(domain);
}

#[test]
fn a_format_of_libvirt_needs_a_domain_and_a_file() {
    let cancel = Cancel::new().unwrap();
    let address = QmpAddress::Unix("/nonexistent/monitor".into());
    let settings = SaveSettings { format: Some(SPARSE), ..SaveSettings::new(address, "/nonexistent/image") };
    let error = vmstate::save(&settings, &cancel, &Unobserved).unwrap_err();
    assert_eq!(error.to_string(), "an image of libvirt begins with its description of the domain");
}
