//! Disks that are full, and targets that cannot be written.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::{Guest, GuestSettings, Qemu, QemuSpec};
use vmstate::{Kind, SaveSettings, Unobserved, Via, net::QmpAddress};
use vmstate_rig::{DEADLINE, Hook};

use crate::{
    assert_status, assert_untouched, images, names_in, other, paused_footprint, save_to, says, small, told,
};

const FULL: &str = "the file system is full: free some space, or save to another one";

/// A small file system of its own, unmounted at the end.
struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    /// In memory.
    fn tmpfs() -> Mount {
        Mount::new(&["-t", "tmpfs", "-o", "size=16m", "tmpfs"])
    }

    /// On a disk, in a file: with direct I/O. The file is gone when nobody has it open any more.
    fn ext4(home: &Path) -> Mount {
        let file = home.join("ext4");
        std::fs::File::create(&file).unwrap().set_len(16 << 20).unwrap();
        run("mkfs.ext4", &["-q", file.to_str().unwrap()]);
        Mount::new(&["-o", "loop", file.to_str().unwrap()])
    }

    fn new(args: &[&str]) -> Mount {
        let dir = tempfile::tempdir().unwrap();
        run("mount", &[args, &[dir.path().to_str().unwrap()]].concat());
        Mount { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Free blocks.
    fn free(&self) -> u64 {
        rustix::fs::statvfs(self.path()).unwrap().f_bfree
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: what other threads start has our descriptors until its program begins, and keeps the mount busy.
        run("umount", &["-l", self.path().to_str().unwrap()]);
    }
}

/// Runs a program that only root may run. There is no other way to a disk that is really full, so that a machine
/// which forbids it fails this test and says why.
fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {stderr}; this test needs to be root");
}

/// A guest that has touched all of its memory.
fn filled() -> Qemu {
    let guest = Guest::new(GuestSettings { pause_ticks: 1, ..GuestSettings::default() });
    let mut qemu = QemuSpec { guest: Some(guest), ..small() }.start().unwrap();
    qemu.wait_for_round(1, DEADLINE).unwrap();
    qemu
}

#[test]
fn a_full_disk_fails_the_save_and_leaves_nothing_of_it() {
    let home = images();
    for (kind, mount) in [("tmpfs", Mount::tmpfs()), ("ext4", Mount::ext4(home.path()))] {
        for via in [Via::Direct, Via::Qemu] {
            let name = format!("{kind}, {via:?}");
            let qemu = filled();
            let before = paused_footprint(&qemu);
            other(&qemu).cont().unwrap();
            let (names, free) = (names_in(mount.path()), mount.free());
            let (_, chain, hint) = told(save_to(&mount.path().join("vm.img"), &qemu, via, &Unobserved));
            assert!(chain.contains("No space left on device"), "{name}: {chain}");
            assert_eq!(hint, FULL, "{name}: {chain}");
            assert_status(&qemu, "running");
            assert_eq!(names_in(mount.path()), names, "{name}");
            assert_untouched(&qemu, &before);
            // A deleted file that somebody has open still takes its room.
            assert_eq!(mount.free(), free, "{name}");
            other(&qemu).cont().unwrap();

            let image = home.path().join(format!("{kind}-{}.img", via.name()));
            save_to(&image, &qemu, via, &Unobserved).unwrap();
            assert!(vmstate::check(&image).unwrap().report.is_clean(), "{name}");
        }
    }
}

#[test]
fn an_image_that_exists_is_left_alone_and_so_is_the_guest() {
    let qemu = small().start().unwrap();
    let dir = images();
    let image = dir.path().join("vm.img");
    std::fs::write(&image, "precious").unwrap();
    let mut observer = other(&qemu);
    let hook = Hook::at("probe", || {});
    let hint = "give another name, or --overwrite";
    let clause = format!("`{}` exists", image.display());
    assert_eq!(told(save_to(&image, &qemu, Via::Direct, &hook)), says(Kind::Misuse, &clause, hint));
    // QEMU was not even asked.
    assert_eq!(hook.phases(), ["connect"]);
    assert!(observer.status().unwrap().running);
    assert_eq!(observer.take_events(), []);
    assert_eq!(std::fs::read(&image).unwrap(), b"precious");
    assert_eq!(names_in(dir.path()), ["vm.img"]);
}

#[test]
fn an_image_that_appears_during_the_save_is_left_alone() {
    let qemu = small().start().unwrap();
    let dir = images();
    let image = dir.path().join("vm.img");
    let hook = Hook::at("publish", || std::fs::write(&image, "precious").unwrap());
    let result = save_to(&image, &qemu, Via::Direct, &hook);
    let clause = format!("`{}` exists", image.display());
    assert_eq!(told(result), says(Kind::Misuse, &clause, "give another name, or --overwrite"));
    assert_eq!(std::fs::read(&image).unwrap(), b"precious");
    assert_eq!(names_in(dir.path()), ["vm.img"]);
    assert_status(&qemu, "running");
}

#[test]
fn an_image_to_be_overwritten_stays_whole_until_the_new_one_is() {
    let qemu = filled();
    let dir = images();
    let mount = Mount::tmpfs();
    let settings = |image: PathBuf| SaveSettings {
        overwrite: true,
        via: Via::Direct,
        ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image)
    };
    let cancel = vmstate::Cancel::new().unwrap();

    // A save that fails leaves it as it was.
    let image = mount.path().join("vm.img");
    std::fs::write(&image, "precious").unwrap();
    let (_, _, hint) = told(vmstate::save(&settings(image.clone()), &cancel, &Unobserved));
    assert_eq!(hint, FULL);
    assert_eq!(std::fs::read(&image).unwrap(), b"precious");
    assert_eq!(names_in(mount.path()), ["vm.img"]);

    // One that succeeds replaces it at the very end.
    let image = dir.path().join("vm.img");
    std::fs::write(&image, "precious").unwrap();
    let inode = std::fs::metadata(&image).unwrap().ino();
    let hook = Hook::at("publish", || assert_eq!(std::fs::read(&image).unwrap(), b"precious"));
    vmstate::save(&settings(image.clone()), &cancel, &hook).unwrap();
    assert!(hook.is_done());
    assert_ne!(std::fs::metadata(&image).unwrap().ino(), inode);
    assert!(vmstate::check(&image).unwrap().report.is_clean());
    assert_eq!(names_in(dir.path()), ["vm.img"]);
}

#[test]
fn a_target_that_cannot_be_written_is_refused_before_qemu_hears_of_it() {
    let qemu = small().start().unwrap();
    let mut observer = other(&qemu);
    let dir = images();
    let at = |name: &str| dir.path().join(name);
    let read_only = Mount::tmpfs();
    run("mount", &["-o", "remount,ro", read_only.path().to_str().unwrap()]);
    std::fs::create_dir(at("directory")).unwrap();
    std::fs::write(at("file"), "precious").unwrap();
    std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("block"),
        rustix::fs::FileType::BlockDevice,
        rustix::fs::Mode::RUSR,
        rustix::fs::makedev(7, 200),
    )
    .unwrap();
    let names = names_in(dir.path());
    let file = "give the name of a file that is not there yet";
    for (target, kind, clause, hint) in [
        (
            at("no/such/vm.img"),
            Kind::Io,
            format!(
                "`{}`: opening the directory: No such file or directory (os error 2)",
                at("no/such").display()
            ),
            "create the directory first, or save to another one",
        ),
        (
            read_only.path().join("vm.img"),
            Kind::Io,
            format!(
                "`{}`: creating the temporary file: Read-only file system (os error 30)",
                read_only.path().join("vm.img").display()
            ),
            "save to a file system that can be written",
        ),
        (at("directory"), Kind::Misuse, format!("`{}` is a directory", at("directory").display()), file),
        (at("link"), Kind::Misuse, format!("`{}` is a symbolic link", at("link").display()), file),
        (at("file/"), Kind::Misuse, format!("`{}` is not the name of a file", at("file/").display()), file),
        (
            "/dev/null".into(),
            Kind::Unsupported,
            "`/dev/null` is a character device: writing to one is not supported".to_owned(),
            file,
        ),
    ] {
        for overwrite in [false, true] {
            let settings =
                SaveSettings { overwrite, ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), &target) };
            let result = vmstate::save(&settings, &vmstate::Cancel::new().unwrap(), &Unobserved);
            assert_eq!(told(result), says(kind, &clause, hint));
        }
    }
    assert!(observer.status().unwrap().running);
    assert_eq!(observer.take_events(), []);
    assert_eq!(names_in(dir.path()), names);
    assert_eq!(names_in(read_only.path()), [""; 0]);
    assert_eq!(std::fs::read(at("file")).unwrap(), b"precious");
}
