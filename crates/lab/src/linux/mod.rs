//! The second witness: a real kernel, with real drivers, whose memory and clock must survive.
//!
//! Debian's cloud kernel and its static busybox are unpacked by `scripts/setup.sh`; the initramfs is made here.
//! On its console the guest prints `C COUNTER DIGEST` in a loop, the MD5 digest of a file of random bytes in its
//! RAM (a digest against damage, not against malice, and three times as fast under emulation as SHA-256),
//! `N up` once when the network answers, and `F …` when something of its own fails.

mod cpio;
mod modules;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::assets::asset;
use crate::error::{Error, Result};
use crate::process;

const INIT: &str = include_str!("init.sh");

/// The drivers of what a test may plug in. USB is missing from the cloud kernel: an xHCI works without a driver.
const MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio_rng",
    "virtio_console",
    "virtio_mem",
];

/// The size of the optional disk.
const DISK_BYTES: u64 = 64 << 20;

/// What the Linux guest is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinuxSettings {
    /// The size of the file in RAM whose digest is printed, in MiB.
    pub data_mib: u32,
    /// Adds a virtio disk (a qcow2 overlay) with a file system, to which the counter is written and synced.
    pub disk: bool,
}

impl Default for LinuxSettings {
    fn default() -> LinuxSettings {
        LinuxSettings { data_mib: 32, disk: false }
    }
}

/// One line of the guest's counting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// Which line it is, from 1.
    pub counter: u64,
    /// The MD5 digest of the file in RAM, in hexadecimal.
    pub digest: String,
}

impl Count {
    /// The count on this line, or `None` if it is another line.
    pub fn parse(line: &str) -> Option<Count> {
        let mut words = line.split(' ');
        let (Some("C"), Some(counter), Some(digest), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return None;
        };
        let is_digest = digest.len() == 32 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        Some(Count { counter: counter.parse().ok()?, digest: is_digest.then(|| digest.to_owned())? })
    }
}

/// A Linux guest, ready to be given to QEMU.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    kernel: PathBuf,
    initramfs: PathBuf,
    disk: Option<PathBuf>,
    settings: LinuxSettings,
}

impl LinuxGuest {
    /// Writes the initramfs, and the disk if one is asked for, to `dir`, which must outlive the guest.
    ///
    /// # Errors
    /// [`Error::Asset`] when the set-up script has not been run, [`Error::File`], and [`Error::Program`] when
    /// `qemu-img` fails.
    pub fn build(dir: &Path, settings: LinuxSettings) -> Result<LinuxGuest> {
        let kernel = asset("linux/vmlinuz")?;
        let initramfs = dir.join("initramfs");
        fs::write(&initramfs, archive()?).map_err(Error::file("write", &initramfs))?;
        let disk = if settings.disk { Some(create_disk(dir)?) } else { None };
        Ok(LinuxGuest { kernel, initramfs, disk, settings })
    }

    /// The arguments that boot it: for `QemuSpec::extra`, with `QemuSpec::guest` unset.
    pub fn args(&self) -> Vec<OsString> {
        let mut append = format!(
            "console=ttyS0 quiet panic=-1 memhp_default_state=online lab.mib={}",
            self.settings.data_mib
        );
        if self.disk.is_some() {
            append.push_str(" lab.disk=vda");
        }
        let mut args: Vec<OsString> = vec![
            "-kernel".into(),
            self.kernel.clone().into(),
            "-initrd".into(),
            self.initramfs.clone().into(),
            "-append".into(),
            append.into(),
        ];
        if let Some(disk) = &self.disk {
            let mut drive = OsString::from("if=none,id=disk,format=qcow2,file=");
            drive.push(process::escaped(disk));
            args.extend(["-drive".into(), drive, "-device".into(), "virtio-blk-pci,drive=disk".into()]);
        }
        args
    }
}

/// The initramfs: busybox, the modules in their order, and the script.
fn archive() -> Result<Vec<u8>> {
    let busybox = asset("busybox")?;
    let modules = modules::load_order(&asset("linux/modules")?, &MODULES)?;
    let mut archive = cpio::Archive::default();
    for directory in ["bin", "dev", "disk", "modules", "proc", "ram", "sys"] {
        archive.directory(directory);
    }
    archive.file("bin/busybox", &fs::read(&busybox).map_err(Error::file("read", &busybox))?);
    archive.file("init", INIT.as_bytes());
    let mut order = String::new();
    for module in modules {
        archive.file(&format!("modules/{}", module.file_name), &module.content);
        order.push_str(&module.file_name);
        order.push('\n');
    }
    archive.file("modules/order", order.as_bytes());
    Ok(archive.finish())
}

/// An empty raw disk and a qcow2 overlay on it; gives the overlay.
fn create_disk(dir: &Path) -> Result<PathBuf> {
    let (base, overlay) = (dir.join("disk.raw"), dir.join("disk.qcow2"));
    File::create(&base).and_then(|file| file.set_len(DISK_BYTES)).map_err(Error::file("create", &base))?;
    let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(OsStr::new);
    process::run(Path::new("qemu-img"), &[&args[..], &[base.as_os_str(), overlay.as_os_str()]].concat())?;
    Ok(overlay)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_three_words_and_nothing_else() {
        let digest = "d41d8cd98f00b204e9800998ecf8427e";
        let count = |counter| Some(Count { counter, digest: digest.to_owned() });
        for (line, expected) in [
            (format!("C 7 {digest}"), count(7)),
            (format!("C 7 {digest} "), None),
            (format!("C x {digest}"), None),
            (format!("D 7 {digest}"), None),
            (format!("C 7 {}", &digest[1..]), None),
            (format!("C 7 {}", digest.replace('d', "g")), None),
            ("C 7".to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(Count::parse(&line), expected, "{line}");
        }
    }
}
