//! Whether there is room: nothing is worse than a benchmark that fills a disk or has the kernel kill somebody.

use std::fs;
use std::path::Path;

use vmstate::{Error, Kind, Result};

use super::guests::MEMORY_DIRECTORY;
use super::{BenchSettings, Machine};

/// What everything takes beside the guests' memory, in MiB.
const MARGIN_MIB: u64 = 256;
/// What a ceiling's data take beside a guest: [`Data`](vmstate::job::ceiling::Data).
const DATA_MIB: u64 = 512;
/// How many files as large as a guest lie in the directory at once: three images and the ceiling's.
const FILES: u64 = 4;

/// What a file system is called by its number (linux/magic.h).
const FILE_SYSTEMS: [(i64, &str); 9] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0x0102_1994, TMPFS),
    (0x794c_7630, "overlayfs"),
    (0x6969, "nfs"),
    (0x2fc1_2fc1, "zfs"),
    (0xf2f5_2010, "f2fs"),
    (0x6573_5546, "fuse"),
];
const TMPFS: &str = "tmpfs";

/// What there is of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Free on the file system of the images, in MiB.
    pub disk_mib: u64,
    /// What that file system is.
    pub file_system: String,
    /// Free in memory, in MiB.
    pub memory_mib: u64,
    /// Free where memory that is a file lies, in MiB.
    pub shared_mib: u64,
}

impl Room {
    /// Looks.
    ///
    /// # Errors
    /// Where there is no such directory.
    pub fn found(directory: &Path) -> Result<Room> {
        let failed = |error: rustix::io::Errno| {
            Error::io(format!("cannot look at the directory {}", directory.display()), error)
        };
        let kind = rustix::fs::statfs(directory).map_err(failed)?.f_type;
        let name = FILE_SYSTEMS.iter().find(|(number, _)| *number == kind);
        Ok(Room {
            disk_mib: free_mib(directory).map_err(failed)?,
            file_system: name.map_or_else(|| format!("{kind:#x}"), |(_, name)| (*name).to_owned()),
            memory_mib: meminfo_mib("MemAvailable:"),
            shared_mib: free_mib(Path::new(MEMORY_DIRECTORY)).unwrap_or(0),
        })
    }

    /// Whether the images lie in memory.
    pub fn is_in_memory(&self) -> bool {
        self.file_system == TMPFS
    }

    /// Whether guests whose memory is a file find room for it.
    pub fn has_shared(&self, memory_mib: u64) -> bool {
        self.shared_mib >= memory_mib + MARGIN_MIB
    }

    /// Refuses guests that are too large.
    ///
    /// # Errors
    /// [`Kind::Misuse`], with what is there and what is needed.
    pub fn check(&self, settings: &BenchSettings) -> Result<()> {
        let memory_mib = settings.memory_mib;
        let files_mib = FILES * memory_mib + MARGIN_MIB;
        let directory = settings.directory.display();
        if self.disk_mib < files_mib {
            let clause = format!(
                "{directory} has {} MiB left, and images of {memory_mib} MiB take {files_mib}",
                self.disk_mib
            );
            return Err(
                Error::new(Kind::Misuse, clause).hint("give another --directory, or a smaller --memory")
            );
        }
        // A guest, or the memory that a ceiling fills; and the images, where those lie in memory.
        let needed =
            memory_mib + MARGIN_MIB + DATA_MIB + if self.is_in_memory() { files_mib } else { memory_mib / 4 };
        if self.memory_mib < needed {
            let clause =
                format!("this machine has {} MiB of memory left, {needed} are needed", self.memory_mib);
            return Err(Error::new(Kind::Misuse, clause).hint("give a smaller --memory"));
        }
        Ok(())
    }
}

impl Machine {
    /// What the kernel tells of this machine.
    pub fn here(qemu: String, file_system: String) -> Machine {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
        Machine {
            processors,
            processor: model.map_or("unknown", |rest| rest.trim_start_matches([' ', '\t', ':'])).to_owned(),
            memory_mib: meminfo_mib("MemTotal:"),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            qemu,
            vmstate: env!("CARGO_PKG_VERSION").to_owned(),
            file_system,
        }
    }
}

fn free_mib(directory: &Path) -> rustix::io::Result<u64> {
    let found = rustix::fs::statvfs(directory)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize) >> 20)
}

fn meminfo_mib(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
    value.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0) >> 10
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Backend;

    #[test]
    fn guests_that_find_no_room_are_refused_with_numbers() {
        let settings = BenchSettings {
            memory_mib: 1024,
            backends: vec![Backend::Private],
            saves: true,
            restores: true,
            directory: "/images".into(),
            rounds: 9,
            repeats: 3,
            time_limit: None,
        };
        let room = |disk_mib, file_system: &str, memory_mib| Room {
            disk_mib,
            file_system: file_system.to_owned(),
            memory_mib,
            shared_mib: 64,
        };
        let memory =
            |has, needs| Err(format!("this machine has {has} MiB of memory left, {needs} are needed"));
        for (room, expected) in [
            (room(4352, "ext4", 2048), Ok(())),
            (
                room(4351, "ext4", 2048),
                Err("/images has 4351 MiB left, and images of 1024 MiB take 4352".to_owned()),
            ),
            (room(4352, "ext4", 2047), memory(2047, 2048)),
            (room(9999, "tmpfs", 6143), memory(6143, 6144)),
            (room(9999, "tmpfs", 6144), Ok(())),
        ] {
            assert_eq!(room.check(&settings).map_err(|error| error.to_string()), expected, "{room:?}");
            assert!(!room.has_shared(1024), "a container's /dev/shm");
        }
    }

    #[test]
    fn this_machine_is_known() {
        let room = Room::found(Path::new(MEMORY_DIRECTORY)).unwrap();
        assert!(room.is_in_memory(), "{room:?}");
        assert!(room.memory_mib > 0);
        let missing = Room::found(Path::new("/no/such/directory")).unwrap_err();
        assert_eq!(missing.to_string(), "cannot look at the directory /no/such/directory");
    }
}
