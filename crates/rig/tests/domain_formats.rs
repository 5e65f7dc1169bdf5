//! Domains of a real libvirtd, saved in every format that libvirt knows, and to where libvirt looks by itself.

use std::path::Path;

use vmstate::libvirt::{DomainName, PayloadFormat};
use vmstate::net::QmpAddress;
use vmstate::{
    Cancel, DirectIo, Kind, ManagedSaveSettings, Observer, Record, SaveFormat, SaveReport, SaveSettings,
    Then, Unobserved, Via, managed_image, save_managed,
};
use vmstate_rig::{Domain, DomainSpec, Hook, Launched, Libvirtd};
use wire::libvirt::Head;

const KEEPER: &str = env!("CARGO_BIN_EXE_libvirt-keeper");
const MIB: u64 = 1 << 20;

fn saved(settings: &SaveSettings, observer: &dyn Observer) -> SaveReport {
    vmstate::save(settings, &Cancel::new().unwrap(), observer)
        .unwrap_or_else(|error| panic!("{}: {error:?}", error.chain()))
}

fn head(image: &Path) -> Head {
    let bytes = std::fs::read(image).unwrap();
    Head::decode(&bytes, 0, bytes.len() as u64).unwrap()
}

/// Has the guest go on from what was saved, and looks at every page of it.
fn goes_on(domain: &mut Domain<'_>, from: u32) {
    assert_eq!(domain.state(), "running");
    assert!(domain.wait_for_rounds(2) >= from + 2);
    domain.verify();
}

#[test]
fn a_domain_is_saved_compressed_at_once_and_virsh_restores_it() {
    let libvirtd = Libvirtd::start(KEEPER);
    let memfd = "<source type='memfd'/><access mode='shared'/>";
    let file = "<source type='file'/><access mode='shared'/>";
    for (payload, backing) in [
        (PayloadFormat::Zstd, ""),
        (PayloadFormat::Gzip, ""),
        (PayloadFormat::Lzop, ""),
        (PayloadFormat::Bzip2, ""),
        (PayloadFormat::Xz, ""),
        (PayloadFormat::Zstd, memfd),
        (PayloadFormat::Gzip, file),
    ] {
        let what = format!("{payload}-{}", backing.len());
        let mut spec = DomainSpec::new(&what, 96 * MIB);
        spec.memory_backing = backing.to_owned();
        let mut domain = spec.start(&libvirtd);
        domain.wait_for_rounds(2);
        let image = domain.dir().join("image");
        let format = SaveFormat::Libvirt(payload);
        let report = saved(&SaveSettings { format: Some(format), ..domain.settings(&image) }, &Unobserved);
        assert_eq!((report.via, report.format), (Via::Direct, format), "{what}: {:?}", report.reason);
        assert_eq!(domain.state(), "shut off", "{what}");
        assert_eq!(vmstate::check(&image).unwrap().report.faults, [], "{what}");
        assert_eq!(vmstate::info(&image).unwrap().format, format!("libvirt-{payload}"));
        assert!(image.metadata().unwrap().len() < report.data_bytes, "{what}: it is not compressed");
        // Beside the image there is nothing, and never was.
        let before = domain.serial.latest_round().unwrap();
        libvirtd.virsh(&[&"restore", &image]);
        goes_on(&mut domain, before);
    }
}

#[test]
fn a_paused_domain_that_is_saved_compressed_is_paused_again() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("still", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    libvirtd.virsh(&[&"suspend", &"still"]);
    let image = domain.dir().join("image");
    let format = Some(SaveFormat::Libvirt(PayloadFormat::Zstd));
    saved(&SaveSettings { format, ..domain.settings(&image) }, &Unobserved);
    assert!(!head(&image).was_running);
    libvirtd.virsh(&[&"restore", &image]);
    assert_eq!(domain.state(), "paused");
    libvirtd.virsh(&[&"resume", &"still"]);
    domain.wait_for_rounds(1);
}

#[test]
fn the_format_that_qemu_conf_names_is_taken_where_nobody_says_another() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("configured", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    let image = domain.dir().join("image");
    let sparse = Some(SaveFormat::Libvirt(PayloadFormat::Sparse));
    for (line, wanted, expected) in [
        ("", None, "libvirt-sparse"),
        ("save_image_format = \"zstd\"", None, "libvirt-zstd"),
        ("save_image_format = \"raw\"", None, "libvirt-raw"),
        ("save_image_format = \"zstd\"", sparse, "libvirt-sparse"),
        ("save_image_format = \"sparse\"", None, "libvirt-sparse"),
    ] {
        libvirtd.configure(line);
        let settings =
            SaveSettings { format: wanted, then: Then::Resume, overwrite: true, ..domain.settings(&image) };
        assert_eq!(saved(&settings, &Unobserved).format.name(), expected, "{line}");
    }
}

#[test]
fn what_is_saved_to_libvirts_own_place_virsh_start_takes() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("managed", 96 * MIB).start(&libvirtd);
    domain.wait_for_rounds(2);
    let QmpAddress::Domain { uri, name } = domain.settings(Path::new("")).qmp else { unreachable!() };
    let is_listed = || libvirtd.virsh(&[&"dominfo", &"managed"]).contains("Managed save:   yes");
    for is_restarted in [false, true] {
        let image = managed_image(&uri, &name, &Cancel::new().unwrap()).unwrap();
        assert!(image.ends_with("var/lib/libvirt/qemu/save/managed.save"), "{}", image.display());
        saved(&domain.settings(&image), &Unobserved);
        let before = domain.serial.latest_round().unwrap();
        assert_eq!(domain.state(), "shut off");
        // What the guide says of it: libvirt goes by what it noted when it started or saved it itself.
        assert!(!is_listed());
        assert_eq!(libvirtd.virsh(&[&"domstate", &"managed", &"--reason"]).trim(), "shut off (destroyed)");
        libvirtd.virsh(&[&"managedsave-remove", &"managed"]);
        assert!(image.exists(), "virsh believes that there is none");
        let refusal = libvirtd.try_virsh(&[&"undefine", &"managed"]).unwrap_err();
        assert!(refusal.contains("while domain managed save image exists"), "{refusal}");
        if is_restarted {
            libvirtd.restart();
            assert!(is_listed());
        }
        libvirtd.virsh(&[&"start", &"managed"]);
        goes_on(&mut domain, before);
        assert!(!image.exists(), "it is used up");
    }
}

#[test]
fn a_domain_that_libvirt_forgets_with_its_end_is_not_saved_to_where_nothing_starts_it() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("transient", 64 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    libvirtd.virsh(&[&"undefine", &"transient"]);
    let settings = managed(&domain, Record::AsItWas);
    let cancel = Cancel::new().unwrap();
    let clause =
        "domain `transient` is transient: libvirt forgets it with its end, and `virsh start` knows no such";
    for refused in [
        managed_image(&settings.uri, &settings.name, &cancel).map(drop),
        save_managed(&settings, &cancel, &Unobserved).map(drop),
    ] {
        let error = refused.unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Misuse, clause));
    }
    assert_eq!(domain.state(), "running");
    domain.wait_for_rounds(1);
}

fn managed(domain: &Domain<'_>, record: Record) -> ManagedSaveSettings {
    let QmpAddress::Domain { uri, name } = domain.settings(Path::new("")).qmp else { unreachable!() };
    ManagedSaveSettings { uri, name, record, bypass_cache: false }
}

#[test]
fn libvirt_makes_a_managed_save_for_us_and_knows_of_it() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("theirs", 96 * MIB).start(&libvirtd);
    domain.wait_for_rounds(2);
    for (record, state) in [(Record::AsItWas, "running"), (Record::Paused, "paused")] {
        let settings = managed(&domain, record);
        let report = save_managed(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
        assert_eq!(report.domain, "theirs");
        assert!(vmstate::check(&report.image).unwrap().report.faults.is_empty());
        let before = domain.serial.latest_round().unwrap();
        assert_eq!(domain.state(), "shut off");
        assert!(libvirtd.virsh(&[&"dominfo", &"theirs"]).contains("Managed save:   yes"));
        libvirtd.virsh(&[&"start", &"theirs"]);
        assert_eq!(domain.state(), state);
        if state == "paused" {
            libvirtd.virsh(&[&"resume", &"theirs"]);
        }
        goes_on(&mut domain, before);
    }
    let unknown =
        ManagedSaveSettings { name: DomainName("lost".into()), ..managed(&domain, Record::AsItWas) };
    let error = save_managed(&unknown, &Cancel::new().unwrap(), &Unobserved).unwrap_err();
    assert_eq!(error.to_string(), "libvirt refused: Domain not found: no domain with matching name 'lost'");
}

#[test]
fn a_managed_save_by_libvirt_that_is_cancelled_leaves_the_domain_running() {
    let libvirtd = Libvirtd::start(KEEPER);
    // What takes libvirt longer than anybody needs to give up.
    libvirtd.configure("save_image_format = \"gzip\"");
    let mut domain = DomainSpec::new("given-up", 96 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    let cancel = Cancel::new().unwrap();
    let hook = Hook::at("save", || cancel.cancel());
    let error = save_managed(&managed(&domain, Record::AsItWas), &cancel, &hook).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted, "{}", error.chain());
    assert_eq!(domain.state(), "running");
    domain.wait_for_rounds(1);
    assert!(libvirtd.virsh(&[&"dominfo", &"given-up"]).contains("Managed save:   no"));
}

#[test]
fn a_guest_that_is_no_domain_yet_becomes_one_by_the_xml_that_is_given() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = DomainSpec::new("adopted", 96 * MIB).start(&libvirtd);
    domain.wait_for_rounds(1);
    let command = domain.command();
    let (first, image) = (domain.dir().join("first"), domain.dir().join("image"));
    saved(&domain.settings(&first), &Unobserved);
    let xml = head(&first).xml;
    let qemu = Launched::restore(&first, &command, domain.dir());
    domain.wait_for_rounds(1);
    let settings = SaveSettings {
        format: Some(SaveFormat::Libvirt(PayloadFormat::Zstd)),
        domain_xml: Some(xml.clone()),
        then: Then::Quit,
        direct_io: DirectIo::Off,
        ..SaveSettings::new(QmpAddress::Unix(qemu.qmp().to_owned()), &image)
    };
    saved(&settings, &Unobserved);
    drop(qemu);
    assert_eq!((head(&image).xml, head(&image).cookie), (xml, None));
    let before = domain.serial.latest_round().unwrap();
    libvirtd.virsh(&[&"restore", &image]);
    goes_on(&mut domain, before);
}

#[test]
fn an_xml_that_no_image_would_have_is_refused() {
    let libvirtd = Libvirtd::start(KEEPER);
    let domain = DomainSpec::new("described", 64 * MIB).start(&libvirtd);
    let image = domain.dir().join("image");
    let refused = |settings: SaveSettings| {
        let error = vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap_err();
        assert_eq!(error.kind(), Kind::Misuse);
        error.to_string()
    };
    let domain_xml = Some("<domain/>".to_owned());
    let by_libvirt = SaveSettings { domain_xml: domain_xml.clone(), ..domain.settings(&image) };
    assert_eq!(refused(by_libvirt), "libvirt describes its domain itself");
    let address = QmpAddress::Unix("/nonexistent/monitor".into());
    let without = SaveSettings { domain_xml, ..SaveSettings::new(address, &image) };
    assert_eq!(refused(without), "only an image of libvirt begins with a description of the domain");
}
