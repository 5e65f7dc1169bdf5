//! Saves of a domain that came to nothing: the domain is as it was, the old image is whole, nothing is left in QEMU, and
//! whatever libvirt does next with the domain works. What libvirt's own failed saves leave behind crashes the next one.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::{Guest, GuestSettings};
use rustix::fs::statvfs;
use vmstate::libvirt::PayloadFormat;
use vmstate::{Cancel, Error, Kind, SaveFormat, SaveSettings, Via};
use vmstate_rig::{Domain, DomainSpec, Hook, Libvirtd};

const KEEPER: &str = env!("CARGO_BIN_EXE_libvirt-keeper");
const MIB: u64 = 1 << 20;
const SPARSE: SaveFormat = SaveFormat::Libvirt(PayloadFormat::Sparse);
const ZSTD: SaveFormat = SaveFormat::Libvirt(PayloadFormat::Zstd);
const OLD: &[u8] = b"the old one";

/// Every mode of `virsh save` that has state of its own in QEMU.
const MODES: [&[&str]; 7] = [
    &["raw"],
    &["raw", "--bypass-cache"],
    &["zstd"],
    &["sparse"],
    &["sparse", "--parallel-channels", "4"],
    &["sparse", "--bypass-cache"],
    &["sparse", "--parallel-channels", "4", "--bypass-cache"],
];

fn start<'a>(libvirtd: &'a Libvirtd, name: &str) -> Domain<'a> {
    let mut spec = DomainSpec::new(name, 64 * MIB);
    spec.guest =
        Guest::new(GuestSettings { pages_low_max: 512, pages_high_max: 0, ..GuestSettings::default() });
    let mut domain = spec.start(libvirtd);
    domain.wait_for_rounds(1);
    domain
}

/// Fails to save the domain over an old image, with something done when a phase begins.
fn fail(
    domain: &Domain<'_>,
    (via, format, image): (Via, SaveFormat, &Path),
    (phase, act): (&'static str, impl FnOnce() + Send),
    cancel: &Cancel,
) -> Error {
    std::fs::write(image, OLD).unwrap();
    let settings = SaveSettings { via, format: Some(format), overwrite: true, ..domain.settings(image) };
    let hook = Hook::at(phase, act);
    let error = vmstate::save(&settings, cancel, &hook).unwrap_err();
    assert!(hook.is_done(), "{via:?} {phase}: {}", error.chain());
    assert_eq!(std::fs::read(image).unwrap(), OLD, "{via:?} {phase}");
    let folder = image.parent().unwrap();
    let drafts = std::fs::read_dir(folder).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().contains("image") && name != "image"
    });
    assert_eq!(drafts.count(), 0, "{via:?} {phase}: a draft is left");
    assert_eq!(held(domain), Vec::<PathBuf>::new(), "{via:?} {phase}: QEMU holds what was deleted");
    error
}

/// What QEMU has open of the domain's directory that has no name any more: its blocks are taken until it ends.
fn held(domain: &Domain<'_>) -> Vec<PathBuf> {
    let open = std::fs::read_dir(format!("/proc/{}/fd", domain.pid())).unwrap();
    let targets = open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    targets
        .filter(|target| target.starts_with(domain.dir()) && target.to_string_lossy().ends_with("(deleted)"))
        .collect()
}

/// Has libvirt save the domain and bring it back. What restores it is a QEMU of its own, in which nothing is left.
fn virsh_saves(libvirtd: &Libvirtd, domain: &mut Domain<'_>, mode: &[&str]) {
    assert_eq!(domain.state(), "running", "{mode:?}");
    let image = domain.dir().join("theirs");
    let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> =
        vec![&"save", &domain.spec().name, &image, &"--image-format"];
    words.extend(mode.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
    let saved = libvirtd.try_virsh(&words);
    saved.unwrap_or_else(|error| panic!("virsh save as {mode:?}: {error}\n{}", libvirtd.log()));
    libvirtd.virsh(&[&"restore", &image]);
    domain.wait_for_rounds(1);
}

#[test]
fn after_an_interrupt_virsh_saves_the_domain_in_every_mode() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = start(&libvirtd, "interrupted");
    let image = domain.dir().join("image");
    for mode in MODES {
        for (via, format) in [(Via::Direct, SPARSE), (Via::Direct, ZSTD), (Via::Qemu, SPARSE)] {
            let cancel = Cancel::new().unwrap();
            let error = fail(&domain, (via, format, &image), ("ram", || cancel.cancel()), &cancel);
            assert_eq!(error.kind(), Kind::Interrupted, "{via:?}: {}", error.chain());
        }
        virsh_saves(&libvirtd, &mut domain, mode);
    }
}

#[test]
fn after_a_resume_by_somebody_else_virsh_saves_the_domain_in_every_mode() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = start(&libvirtd, "resumed");
    let image = domain.dir().join("image");
    for mode in MODES {
        for (via, format) in [(Via::Direct, SPARSE), (Via::Direct, ZSTD), (Via::Qemu, SPARSE)] {
            let cancel = Cancel::new().unwrap();
            let resume = || drop(libvirtd.virsh(&[&"resume", &"resumed"]));
            let error = fail(&domain, (via, format, &image), ("metadata", resume), &cancel);
            let expected = "the guest did not stand still during the save (";
            assert!(error.to_string().starts_with(expected), "{via:?}: {}", error.chain());
        }
        virsh_saves(&libvirtd, &mut domain, mode);
    }
}

#[test]
fn after_a_daemon_that_was_killed_virsh_saves_the_domain_in_every_mode() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = start(&libvirtd, "orphaned");
    let image = domain.dir().join("image");
    for mode in MODES {
        for via in [Via::Direct, Via::Qemu] {
            let cancel = Cancel::new().unwrap();
            fail(&domain, (via, SPARSE, &image), ("ram", || libvirtd.restart()), &cancel);
        }
        virsh_saves(&libvirtd, &mut domain, mode);
    }
}

/// A small file system in the domain's directory.
struct Disk(PathBuf);

impl Disk {
    fn mount(place: PathBuf) -> Disk {
        std::fs::create_dir(&place).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=32m", "tmpfs"]).arg(&place).status();
        assert!(mounted.unwrap().success(), "this test needs root, for a disk that is really full");
        Disk(place)
    }

    fn free(&self) -> u64 {
        statvfs(&self.0).unwrap().f_bfree
    }

    /// Leaves room for nothing.
    fn fill(&self) {
        let mut file = File::create(self.0.join("filler")).unwrap();
        let page = [1; 4096];
        while file.write_all(&page).is_ok() {}
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn after_a_disk_that_became_full_virsh_saves_the_domain_in_every_mode() {
    let libvirtd = Libvirtd::start(KEEPER);
    let mut domain = start(&libvirtd, "full");
    let disk = Disk::mount(domain.dir().join("small"));
    let image = disk.0.join("image");
    for mode in MODES {
        for (via, format) in [(Via::Direct, SPARSE), (Via::Direct, ZSTD), (Via::Qemu, SPARSE)] {
            std::fs::write(&image, OLD).unwrap();
            let before = disk.free();
            let cancel = Cancel::new().unwrap();
            let error = fail(&domain, (via, format, &image), ("ram", || disk.fill()), &cancel);
            let hint = error.hint_text().unwrap_or_default();
            assert!(hint.starts_with("the file system is full"), "{via:?} {format:?}: {}", error.chain());
            std::fs::remove_file(disk.0.join("filler")).unwrap();
            assert_eq!(disk.free(), before, "{via:?} {format:?}: room is still taken");
        }
        virsh_saves(&libvirtd, &mut domain, mode);
    }
    drop(disk);
}
