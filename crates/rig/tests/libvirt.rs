//! Domains of a real libvirtd: what it saves, vmstate restores.

use vmstate::source::Format;
use vmstate::{Cancel, ConvertSettings, Unobserved};
use vmstate_rig::{DomainSpec, Launched, Libvirtd, verify_image};

const KEEPER: &str = env!("CARGO_BIN_EXE_libvirt-keeper");
const MIB: u64 = 1 << 20;

#[test]
fn what_virsh_saves_goes_on_in_a_qemu_without_libvirt() {
    let libvirtd = Libvirtd::start(KEEPER);
    for format in ["raw", "zstd", "gzip", "sparse"] {
        let mut domain = DomainSpec::new(&format!("saved-{format}"), 96 * MIB).start(&libvirtd);
        domain.wait_for_rounds(2);
        let image = domain.dir().join("image");
        let command = domain.command();
        domain.save(&image, format);
        assert_eq!(domain.state(), "shut off", "{format}");
        let saved = domain.serial.latest_round().unwrap();

        assert_eq!(vmstate::check(&image).unwrap().report.faults, [], "{format}");
        let info = vmstate::info(&image).unwrap();
        assert_eq!(info.format, format!("libvirt-{format}"));
        assert_eq!(info.domain.unwrap().name.as_deref(), Some(domain.spec().name.as_str()));
        assert_eq!(info.run_state.as_deref(), Some("running"), "{format}");

        let qemu = Launched::restore(&image, &command, domain.dir());
        domain.wait_for_rounds(2);
        assert!(domain.serial.latest_round().unwrap() >= saved + 2, "{format}");
        qemu.verify(&domain.spec().guest, &domain.spec().layout());
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
