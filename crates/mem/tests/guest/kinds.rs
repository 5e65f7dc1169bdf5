//! Every kind of memory: what is there is found, all of it arrives, and looking at it allocates nothing.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use page::{PageIndex, PageSet};
use rustix::fs::{FallocateFlags, fallocate};
use vmstate_mem::{Backing, GuestRam, Medium};

use crate::huge::{HUGE_PAGE, HugePool, free_huge_pages};
use crate::process::{Memory, Process, block};
use crate::save::{check_saved, fill, fills, model, save};
use crate::{MIB, PAGE, methods, page_set, presence};

/// What looking at memory could change.
#[derive(Debug, PartialEq, Eq)]
struct Footprint {
    file_blocks: Option<u64>,
    huge_pages_free: Option<u64>,
    resident: Vec<String>,
}

impl Footprint {
    fn of(process: &Process, known: &Known<'_>) -> Footprint {
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid()));
        let is_size = |line: &&str| {
            ["Rss:", "Private_Hugetlb:", "Shared_Hugetlb:"].iter().any(|name| line.starts_with(name))
        };
        Footprint {
            file_blocks: known.file.as_ref().map(|path| std::fs::metadata(path).expect("the file").blocks()),
            huge_pages_free: known.pool.map(|_| free_huge_pages()),
            resident: rollup.expect("the child's sizes").lines().filter(is_size).map(str::to_owned).collect(),
        }
    }
}

/// Memory of which everything is known.
struct Known<'a> {
    name: &'a str,
    memory: Memory,
    /// Its bytes.
    bytes: Vec<u8>,
    /// The file whose allocation must not change. A file on a disk has none that would stand still: writing it
    /// back may take blocks of its own, while reading a hole never takes any.
    file: Option<PathBuf>,
    /// The huge pages that must stay free.
    pool: Option<&'a HugePool>,
    /// The pages that must be found present, if they are known exactly.
    present: Option<PageSet>,
}

fn check(process: &Process, known: &Known<'_>) -> GuestRam {
    let Known { name, memory, bytes, present, .. } = known;
    let before = Footprint::of(process, known);
    let ram = GuestRam::attach(process.peer(), &[block("ram", *memory)])
        .unwrap_or_else(|error| panic!("{name}: {error}: {:?}", std::error::Error::source(&error)));
    let mut answers = Vec::new();
    for method in methods(&ram, 0) {
        let found = presence(&ram, 0, method).expect(name);
        for (page, content) in bytes.chunks(PAGE as usize).enumerate() {
            let is_there = found.contains(PageIndex(page as u64));
            assert!(
                is_there || content.iter().all(|byte| *byte == 0),
                "{name}: {method:?} misses page {page:#x}"
            );
        }
        if let Some(present) = present {
            assert!(found == *present, "{name}: {method:?}: {:?}", found.runs().collect::<Vec<_>>());
        }
        answers.push(found);
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{name}: the methods do not agree");
    check_saved(&save(process, *memory, MIB), bytes, MIB, name);
    // Any bytes at all, holes included.
    let mut read = vec![0xff; memory.length as usize];
    if !matches!(ram.backing(0), Backing::PrivateAnonymous) {
        ram.read(0, 0, &mut read).expect(name);
        assert!(read == *bytes, "{name}: bytes read one by one differ");
    }
    assert_eq!(Footprint::of(process, known), before, "{name}: looking has changed something");
    ram.recheck().expect(name);
    ram
}

/// A directory on a disk, not on tmpfs.
fn disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

fn shm() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory in /dev/shm")
}

fn sparse(path: &Path, length: u64) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(path).expect("a new file");
    file.set_len(length).expect("a length");
    file
}

#[test]
fn a_file_mapped_shared_is_found_by_its_holes_wherever_it_lies() {
    for (name, directory, medium) in [("tmpfs", shm(), Medium::Shmem), ("disk", disk(), Medium::Disk)] {
        for (length, offset) in [(64 * MIB, 0), (32 * MIB - 1000, 3 * MIB)] {
            let path = directory.path().join(format!("ram-{offset}"));
            drop(sparse(&path, offset + length.next_multiple_of(PAGE) + MIB));
            let mut process = Process::start();
            let kind = format!("file shared {offset} {}", path.display());
            let memory = Memory { length, ..process.map(&kind, length.next_multiple_of(PAGE)) };
            let fills = fills(length);
            // None of it was written to the disk when it is looked at.
            fill(&mut process, memory, &fills);
            let bytes = model(memory, &fills);
            let name = format!("{name} at {offset:#x}");
            let file = (medium == Medium::Shmem).then_some(path);
            let known = Known { name: &name, memory, bytes, file, pool: None, present: None };
            let ram = check(&process, &known);
            assert!(matches!(ram.backing(0), Backing::SharedFile(part) if part.offset == offset), "{name}");
            if ram.medium(0) != Some(medium) {
                println!("NOT TESTED here: {medium:?}: the directory for {name} is {:?}", ram.medium(0));
            }
        }
    }
}

#[test]
fn preallocated_pages_of_a_disk_file_are_holes_until_they_are_written() {
    let directory = disk();
    let path = directory.path().join("ram");
    let file = sparse(&path, 16 * MIB);
    if let Err(error) = fallocate(&file, FallocateFlags::empty(), 0, 16 * MIB) {
        println!("NOT TESTED here: preallocated files: {error}");
        return;
    }
    let mut process = Process::start();
    let memory = process.map(&format!("file shared 0 {}", path.display()), 16 * MIB);
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("a file");
    if ram.medium(0) == Some(Medium::Disk) {
        assert_eq!(presence(&ram, 0, methods(&ram, 0)[0]).expect("SEEK_DATA").runs().count(), 0);
    }
    let fills = [(5 * MIB, 5 * MIB + 1, 9), (9 * MIB - 1, 9 * MIB + 1, 8)];
    fill(&mut process, memory, &fills);
    let bytes = model(memory, &fills);
    check(&process, &Known { name: "preallocated", memory, bytes, file: None, pool: None, present: None });
}

#[test]
fn a_file_on_a_file_system_that_may_not_know_its_holes_is_read_whole() {
    // With layers on two file systems, overlayfs gives files another `st_dev` than their mappings have.
    for (name, lower, upper) in [("one", disk(), disk()), ("two", disk(), shm())] {
        let at = |name: &str| upper.path().join(name);
        for name in ["upper", "work", "merged"] {
            std::fs::create_dir(at(name)).expect("a directory");
        }
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.path().display(),
            at("upper").display(),
            at("work").display()
        );
        let Some(_mount) = Mount::new("overlay", &layers, &at("merged")) else { return };
        let path = at("merged").join("ram");
        drop(sparse(&path, 8 * MIB));
        let mut process = Process::start();
        for sharing in ["shared", "private"] {
            let name = format!("{name}, {sharing}");
            let memory = process.map(&format!("file {sharing} 0 {}", path.display()), 8 * MIB);
            let fills = [(MIB, 2 * MIB, 1), (8 * MIB - 1, 8 * MIB, 2)];
            fill(&mut process, memory, &fills);
            let bytes = model(memory, &fills);
            let present = Some(page_set(2048, &[(0, 2048)]));
            let known = Known { name: &name, memory, bytes, file: None, pool: None, present };
            let ram = check(&process, &known);
            assert_eq!(ram.medium(0), Some(Medium::Other { magic: 0x794c_7630 }), "{name}");
        }
    }
}

#[test]
fn a_file_mapped_privately_shows_where_the_process_has_no_page() {
    for (name, directory) in [("tmpfs", shm()), ("disk", disk())] {
        for offset in [0, 5 * MIB] {
            let path = directory.path().join(format!("image-{offset}"));
            let file = sparse(&path, offset + 32 * MIB);
            let mut bytes = vec![0; 32 * MIB as usize];
            let mut put = |from: u64, len: u64, byte: u8| {
                let content = vec![byte; len as usize];
                file.write_all_at(&content, offset + from).expect("a write");
                bytes[from as usize..(from + len) as usize].copy_from_slice(&content);
            };
            put(0, 3 * MIB, 0x11);
            put(8 * MIB, PAGE, 0x22);
            put(16 * MIB + 10 * PAGE, 100 * PAGE, 0x33);
            put(32 * MIB - PAGE, PAGE, 0x44);
            let mut process = Process::start();
            let memory = process.map(&format!("file private {offset} {}", path.display()), 32 * MIB);
            // Over data and over holes, and zeros over data: a page that the process has cleared.
            let fills = [
                (MIB, MIB + 1, 0x55),
                (2 * MIB, 2 * MIB + 2 * PAGE, 0),
                (8 * MIB + PAGE, 8 * MIB + 3 * PAGE, 0x66),
                (20 * MIB, 20 * MIB + 1, 0x77),
            ];
            fill(&mut process, memory, &fills);
            for (from, to, byte) in fills {
                bytes[from as usize..to as usize].fill(byte);
            }
            // Data that was only read is in the page tables as the file's own page.
            process.tell(&format!("read {} {MIB}", memory.address + 16 * MIB));
            let name = format!("{name} at {offset:#x}");
            let known = Known { name: &name, memory, bytes, file: Some(path), pool: None, present: None };
            let ram = check(&process, &known);
            assert!(matches!(ram.backing(0), Backing::PrivateFile(part) if part.offset == offset), "{name}");
        }
    }
}

#[test]
fn a_private_file_that_was_never_touched_is_present_where_it_has_data() {
    let directory = shm();
    let path = directory.path().join("image");
    let file = sparse(&path, 8 * MIB);
    let mut bytes = vec![0; 8 * MIB as usize];
    file.write_all_at(&[7; 4 * PAGE as usize], 2 * MIB).expect("a write");
    bytes[2 * MIB as usize..2 * MIB as usize + 4 * PAGE as usize].fill(7);
    let mut process = Process::start();
    let memory = process.map(&format!("file private 0 {}", path.display()), 8 * MIB);
    let present = Some(page_set(2048, &[(512, 516)]));
    check(
        &process,
        &Known { name: "untouched", memory, bytes, file: Some(path.clone()), pool: None, present },
    );
    // A page of its own beside them.
    process.fill(memory, 7 * MIB, 7 * MIB + 1, 1);
    let ram = GuestRam::attach(process.peer(), &[block("ram", memory)]).expect("a file");
    for method in methods(&ram, 0) {
        let found = presence(&ram, 0, method).expect("both");
        assert!(found == page_set(2048, &[(512, 516), (1792, 1793)]), "{method:?}");
    }
}

#[test]
fn shared_memory_without_a_name_is_a_file_as_well() {
    let mut process = Process::start();
    let memory = process.map("shared-anonymous", 64 * MIB);
    if !rustix::process::geteuid().is_root() {
        println!("NOT TESTED here: shared anonymous memory: opening map_files needs root");
        return;
    }
    let fills = fills(memory.length);
    fill(&mut process, memory, &fills);
    let bytes = model(memory, &fills);
    let ram = check(
        &process,
        &Known { name: "shared anonymous", memory, bytes, file: None, pool: None, present: None },
    );
    assert_eq!(ram.medium(0), Some(Medium::Shmem));
}

#[test]
fn a_file_that_was_unlinked_or_replaced_is_still_the_one_that_is_mapped() {
    let directory = shm();
    let path = directory.path().join("ram");
    drop(sparse(&path, 2 * MIB));
    let mut process = Process::start();
    let memory = process.map(&format!("file shared 0 {}", path.display()), 2 * MIB);
    let fills = [(MIB, MIB + 5, 3)];
    fill(&mut process, memory, &fills);
    std::fs::remove_file(&path).expect("the file");
    sparse(&path, 2 * MIB).write_all(b"another file").expect("a write");
    let bytes = model(memory, &fills);
    check(&process, &Known { name: "replaced", memory, bytes, file: Some(path), pool: None, present: None });
}

/// Pages of `length` bytes, of which those of the given huge pages are present.
fn huge_set(length: u64, huge: &[u64]) -> PageSet {
    let per = HUGE_PAGE / PAGE;
    page_set(length / PAGE, &huge.iter().map(|page| (page * per, (page + 1) * per)).collect::<Vec<_>>())
}

#[test]
fn huge_pages_are_present_whole_and_holes_stay_in_the_pool() {
    let Some(pool) = HugePool::reserve(64, "memory on huge pages") else { return };
    let length = 16 * MIB;
    for kind in ["huge-memfd shared", "huge-memfd private", "huge-anonymous private", "huge-anonymous shared"]
    {
        if kind == "huge-anonymous shared" && !rustix::process::geteuid().is_root() {
            println!("NOT TESTED here: {kind}: opening map_files needs root");
            continue;
        }
        let mut process = Process::start();
        let memory = process.map(kind, length);
        let fills = [(0, 1, 1), (3 * MIB, 4 * MIB, 2), (length - 1, length, 3), (8 * MIB, 9 * MIB, 0)];
        fill(&mut process, memory, &fills);
        let bytes = model(memory, &fills);
        let present = Some(huge_set(length, &[0, 1, 4, 7]));
        check(&process, &Known { name: kind, memory, bytes, file: None, pool: Some(&pool), present });
    }
}

#[test]
fn huge_pages_that_another_process_brought_are_found_too() {
    let Some(pool) = HugePool::reserve(32, "huge pages of another process") else { return };
    let length = 16 * MIB;
    for sharing in ["shared", "private"] {
        let mut process = Process::start();
        let answer = process.tell(&format!("huge-memfd {length} {sharing}"));
        let address = answer[0].parse().expect("an address");
        let memory = Memory { address, length };
        let path = format!("/proc/{}/fd/{}", process.pid(), answer[1]);
        let mut other = Process::start();
        let theirs = other.map(&format!("file shared 0 {path}"), length);
        // The other one brings pages 1 and 5, ours has page 1 (or a copy of it) and page 3.
        other.fill(theirs, 2 * MIB, 4 * MIB, 1);
        other.fill(theirs, 11 * MIB, 11 * MIB + 1, 2);
        process.fill(memory, 3 * MIB, 3 * MIB + 1, 3);
        process.fill(memory, 6 * MIB, 6 * MIB + 1, 4);
        let fills = [
            (2 * MIB, 4 * MIB, 1),
            (11 * MIB, 11 * MIB + 1, 2),
            (3 * MIB, 3 * MIB + 1, 3),
            (6 * MIB, 6 * MIB + 1, 4),
        ];
        let bytes = model(memory, &fills);
        // It cannot be told which they are, so any may be.
        let present = Some(page_set(length / PAGE, &[(0, length / PAGE)]));
        check(
            &process,
            &Known { name: sharing, memory, bytes, file: Some(path.into()), pool: Some(&pool), present },
        );
    }
}

#[test]
fn private_copies_do_not_count_as_pages_of_a_file_of_huge_pages() {
    let Some(pool) = HugePool::reserve(32, "private copies of huge pages") else { return };
    let length = 16 * MIB;
    let mut process = Process::start();
    let answer = process.tell(&format!("huge-memfd {length} shared"));
    let memory = Memory { address: answer[0].parse().expect("an address"), length };
    let path = format!("/proc/{}/fd/{}", process.pid(), answer[1]);
    let mut other = Process::start();
    let theirs = other.map(&format!("file shared 0 {path}"), length);
    other.fill(theirs, 10 * MIB, 10 * MIB + 1, 5);
    // One page in the file that the process has not mapped, and one in its page tables that is not in the file:
    // the numbers agree, the pages do not.
    let copy = process.map(&format!("file private 0 {path}"), length);
    process.fill(copy, 2 * MIB, 2 * MIB + 1, 9);
    let bytes = model(memory, &[(10 * MIB, 10 * MIB + 1, 5)]);
    let present = Some(page_set(length / PAGE, &[(0, length / PAGE)]));
    check(
        &process,
        &Known { name: "copies", memory, bytes, file: Some(path.into()), pool: Some(&pool), present },
    );
}

#[test]
fn blocks_that_share_a_file_of_huge_pages_each_have_their_own() {
    let Some(pool) = HugePool::reserve(32, "blocks that share a file of huge pages") else { return };
    let mut process = Process::start();
    let whole = process.map("huge-memfd shared", 16 * MIB);
    for huge in [1, 2, 6] {
        process.fill(whole, huge * HUGE_PAGE, huge * HUGE_PAGE + 1, huge as u8);
    }
    for (from, length, expected) in [(0, 4 * MIB, vec![1]), (4 * MIB, 12 * MIB, vec![0, 4])] {
        let memory = Memory { address: whole.address + from, length };
        let fills: Vec<_> = expected
            .iter()
            .map(|huge| (huge * HUGE_PAGE, huge * HUGE_PAGE + 1, ((from / HUGE_PAGE) + huge) as u8))
            .collect();
        let bytes = model(memory, &fills);
        let present = Some(huge_set(length, &expected));
        check(&process, &Known { name: "part", memory, bytes, file: None, pool: Some(&pool), present });
    }
}

/// A file system that is mounted for a test; it is unmounted when this is dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(kind: &str, options: &str, at: &Path) -> Option<Mount> {
        let mounted = Command::new("mount").args(["-t", kind, kind, "-o", options]).arg(at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Mount(at.to_owned())),
            Ok(output) => {
                println!("NOT TESTED here: {kind}: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                println!("NOT TESTED here: {kind}: mount: {error}");
                None
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: the test's child may still be ending. A mount that stays is seen by whoever removes its directory.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
