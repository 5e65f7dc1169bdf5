//! Every kind of guest memory that QEMU has: saved from outside by vmstate, verified, and loaded by stock QEMU
//! into plain memory and into the same kind; saved by stock QEMU from there, and restored by vmstate into the
//! same kind again. What the machine cannot give is said aloud.

#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[path = "../../mem/tests/guest/huge.rs"]
mod huge;

use huge::{HUGE_PAGE, HugePool, free_huge_pages};
use lab::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, Qemu, QemuSpec};
use mem::{Backing, BlockAddress, GuestRam, Medium, Peer};
use serde_json::json;
use vmstate::net::QmpAddress;
use vmstate::source::MappedRamFile;
use vmstate::{
    Cancel, Record, RestoreReport, RestoreSettings, SaveReport, SaveSettings, Target, Unobserved, Via,
};
use vmstate_rig::{
    DEADLINE, HugeMount, StockLoad, client, compare_images, stock_load, stock_save, verify_image,
};

/// What QEMU's own probe may allocate of shared memory in the moment before it is cancelled.
const PROBE_BYTES_MAX: u64 = 4 << 20;

/// A guest that owns 24 MiB of its RAM and fills it once; the rest is never touched.
fn spec(mib: u64, backend: MemoryBackend) -> QemuSpec {
    let settings = GuestSettings { fill_rounds: 1, ..GuestSettings::idle(6000) };
    QemuSpec { backend, guest: Some(Guest::new(settings)), ..QemuSpec::new(MachineKind::Q35, mib << 20) }
}

/// A directory on a disk.
fn disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn save(qemu: &Qemu, image: &Path) -> SaveReport {
    let settings =
        SaveSettings { via: Via::Direct, ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image) };
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()))
}

/// The blocks of a QEMU of which the names are given, as the library sees them.
fn attach(qemu: &Qemu, names: &[&str]) -> GuestRam {
    let blocks = vmstate::qemu::host_blocks(&mut client(qemu)).unwrap();
    let address = |name: &&str| {
        let block =
            blocks.iter().find(|block| block.name == **name).unwrap_or_else(|| panic!("{name}: {blocks:?}"));
        BlockAddress {
            name: block.name.clone(),
            address: block.address.expect("this QEMU tells addresses"),
            length: block.used_length,
            page_size: 4096,
        }
    };
    let blocks: Vec<_> = names.iter().map(address).collect();
    GuestRam::attach(Arc::new(Peer::open(qemu.pid()).unwrap()), &blocks).unwrap()
}

/// What is behind a block: `shared` or `private`, and on what.
fn kind_of(ram: &GuestRam, region: usize) -> (&'static str, Option<Medium>) {
    let mapping = match ram.backing(region) {
        Backing::PrivateAnonymous => "anonymous",
        Backing::SharedFile(_) => "shared",
        Backing::PrivateFile(_) => "private",
        other => panic!("{other:?}"),
    };
    (mapping, ram.medium(region))
}

/// The bytes that the file behind `pc.ram` takes, if it has one that can be looked at.
fn allocated(qemu: &Qemu) -> Option<u64> {
    let ram = attach(qemu, &["pc.ram"]);
    let Backing::SharedFile(part) = *ram.backing(0) else { return None };
    let fds = std::fs::read_dir(format!("/proc/{}/fd", qemu.pid())).unwrap();
    let mut found = fds.filter_map(|entry| std::fs::metadata(entry.unwrap().path()).ok());
    found
        .find(|found| (found.dev(), found.ino()) == (part.device, part.inode))
        .map(|found| found.blocks() * 512)
}

/// A kind of memory, made anew for each QEMU.
struct Case<'a> {
    name: &'a str,
    mib: u64,
    backend: &'a dyn Fn() -> MemoryBackend,
    /// What the library must find behind it.
    expected: (&'static str, Option<Medium>),
}

fn check(case: &Case<'_>) {
    let name = case.name;
    let dir = disk();
    let image = dir.path().join("vm.img");
    let spec = spec(case.mib, (case.backend)());
    let mut source = spec.start().expect(name);
    source.wait_for_round(2, DEADLINE).expect(name);
    assert_eq!(kind_of(&attach(&source, &["pc.ram"]), 0), case.expected, "{name}");
    client(&source).stop().unwrap();
    let before = (allocated(&source), free_huge_pages());
    let report = save(&source, &image);
    let after = (allocated(&source), free_huge_pages());
    assert_eq!((report.via, report.run_state.as_str()), (Via::Direct, "paused"), "{name}");
    if let (Some(before), Some(after)) = (before.0, after.0) {
        assert!(after - before <= PROBE_BYTES_MAX, "{name}: the file grew from {before} to {after} bytes");
    }
    if matches!(case.expected.1, Some(Medium::HugePages { .. })) {
        let taken = (before.1 - after.1) * HUGE_PAGE;
        assert!(taken <= PROBE_BYTES_MAX, "{name}: {taken} bytes of the pool were taken");
    }
    let round = source.serial.latest_round().unwrap();
    drop(source);

    let check = vmstate::check(&image).expect(name);
    assert!(check.report.is_clean(), "{name}: {:?}", check.report);
    let pattern = verify_image(&spec.guest.unwrap(), &spec.layout(), &image);
    assert!((round..=round + 1).contains(&pattern.round), "{name}: {pattern:?} after round {round}");
    // The guest verifies every page in each round, and halts at the first that is not right.
    let goes_on = |qemu: &mut Qemu, round: u32, target: &str| {
        qemu.wait_for_round(round + 2, DEADLINE)
            .unwrap_or_else(|error| panic!("{name} into {target}: {error}"))
    };
    let mut loaded = stock_load(&spec_of(&spec, MemoryBackend::Plain), &image, StockLoad::BEST);
    client(&loaded).cont().unwrap();
    goes_on(&mut loaded, round, "plain memory");
    drop(loaded);

    let mut loaded = stock_load(&spec_of(&spec, (case.backend)()), &image, StockLoad::BEST);
    client(&loaded).cont().unwrap();
    let round = goes_on(&mut loaded, round, "its own kind");
    let theirs = dir.path().join("theirs.img");
    stock_save(&loaded, &theirs, StockLoad::BEST);
    drop(loaded);

    let waiting = QemuSpec { incoming: Incoming::Defer, ..spec_of(&spec, (case.backend)()) };
    let mut restored = waiting.start().expect(name);
    let report = restore(&restored, &theirs);
    // What is shared can be filled from outside.
    let expected = if case.expected.0 == "shared" { Via::Direct } else { Via::Qemu };
    assert_eq!(report.via, expected, "{name}: {:?}", report.reason);
    goes_on(&mut restored, round, "its own kind by vmstate");
}

fn spec_of(spec: &QemuSpec, backend: MemoryBackend) -> QemuSpec {
    QemuSpec { backend, ..spec.clone() }
}

fn restore(qemu: &Qemu, image: &Path) -> RestoreReport {
    let settings = RestoreSettings {
        record: Record::Running,
        ..RestoreSettings::new(image, Target::Waiting(QmpAddress::Unix(qemu.qmp_path())))
    };
    vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()))
}

/// A backend of other properties, and a file of its own for each QEMU.
fn file_in(dir: &Path, properties: &str) -> impl Fn() -> MemoryBackend {
    let (dir, properties) = (dir.to_owned(), properties.to_owned());
    let next = std::cell::Cell::new(0);
    move || {
        next.set(next.get() + 1);
        let path = dir.join(format!("ram-{}", next.get()));
        MemoryBackend::Object(format!("memory-backend-file,{properties},mem-path={}", path.display()))
    }
}

fn object(properties: &str) -> impl Fn() -> MemoryBackend {
    let properties = properties.to_owned();
    move || MemoryBackend::Object(properties.clone())
}

/// What a directory on the disk of this machine is to the library; said aloud if it is none that is known.
fn disk_medium(dir: &Path) -> Medium {
    let found = rustix::fs::statfs(dir).unwrap().f_type as u32;
    match found {
        0xef53 | 0x5846_5342 => Medium::Disk,
        0x0102_1994 => Medium::Shmem,
        magic => {
            println!("NOT TESTED here: memory on ext4 or XFS: {} is of type {magic:#x}", dir.display());
            Medium::Other { magic: magic.into() }
        }
    }
}

#[test]
fn shared_files_go_from_outside() {
    let (on_disk, on_shm) = (disk(), tempfile::tempdir_in("/dev/shm").unwrap());
    let disk_medium = disk_medium(on_disk.path());
    for (name, backend, medium) in [
        ("a file on tmpfs", file_in(on_shm.path(), "share=on"), Medium::Shmem),
        ("a file on a disk", file_in(on_disk.path(), "share=on"), disk_medium),
    ] {
        check(&Case { name, mib: 256, backend: &backend, expected: ("shared", Some(medium)) });
    }
    // Past 5 MiB of something else, and allocated before the guest starts.
    let backend = || {
        let path = tempfile::NamedTempFile::new_in(on_shm.path()).unwrap().into_temp_path().keep().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len((256 + 6) << 20).unwrap();
        file.write_all_at(&[0xa5; 4096], (5 << 20) - 4096).unwrap();
        let properties = "memory-backend-file,share=on,offset=5M,prealloc=on";
        MemoryBackend::Object(format!("{properties},mem-path={}", path.display()))
    };
    let name = "a preallocated part of a file";
    check(&Case { name, mib: 256, backend: &backend, expected: ("shared", Some(Medium::Shmem)) });
}

#[test]
fn shared_memory_without_a_path_goes_from_outside() {
    let memfd = rustix::fs::memfd_create("named", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let named = || {
        // The same memfd again, empty.
        rustix::fs::ftruncate(&memfd, 0).unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), memfd.as_raw_fd());
        MemoryBackend::Object(format!("memory-backend-file,share=on,mem-path={path}"))
    };
    let ram = object("memory-backend-ram,share=on");
    let shm = object("memory-backend-shm");
    let memfd_unsealed = object("memory-backend-memfd,share=on,seal=off,prealloc=on");
    let expected = ("shared", Some(Medium::Shmem));
    for (name, backend) in [
        ("a memfd by its path", &named as &dyn Fn() -> MemoryBackend),
        ("memory-backend-ram,share=on", &ram),
        ("memory-backend-shm", &shm),
        ("a memfd that is not sealed, preallocated", &memfd_unsealed),
    ] {
        check(&Case { name, mib: 256, backend, expected });
    }
}

#[test]
fn private_files_go_from_outside() {
    let (on_disk, on_shm) = (disk(), tempfile::tempdir_in("/dev/shm").unwrap());
    let disk_medium = disk_medium(on_disk.path());
    let file = file_in(on_disk.path(), "share=off");
    check(&Case {
        name: "a private file on a disk",
        mib: 256,
        backend: &file,
        expected: ("private", Some(disk_medium)),
    });
    let file = file_in(on_shm.path(), "share=off");
    let expected = ("private", Some(Medium::Shmem));
    check(&Case { name: "a private file on tmpfs", mib: 256, backend: &file, expected });
    let memfd = object("memory-backend-memfd,share=off");
    check(&Case { name: "a private memfd", mib: 256, backend: &memfd, expected });
}

#[test]
fn huge_pages_go_from_outside() {
    let mib = 128;
    let Some(_pool) = HugePool::reserve(mib / 2 + 8, "guests on huge pages") else { return };
    let medium = Some(Medium::HugePages { page_bytes: HUGE_PAGE });
    let shared = object("memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on");
    check(&Case { name: "a memfd on huge pages", mib, backend: &shared, expected: ("shared", medium) });
    let private = object("memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=off");
    check(&Case {
        name: "a private memfd on huge pages",
        mib,
        backend: &private,
        expected: ("private", medium),
    });

    let dir = tempfile::tempdir().unwrap();
    let Some(_mount) = HugeMount::new(dir.path()) else { return };
    let shared = file_in(dir.path(), "share=on");
    check_unlinking(
        dir.path(),
        &Case { name: "hugetlbfs", mib, backend: &shared, expected: ("shared", medium) },
    );
    let private = file_in(dir.path(), "share=off");
    let expected = ("private", medium);
    check_unlinking(dir.path(), &Case { name: "private hugetlbfs", mib, backend: &private, expected });
}

/// A file on hugetlbfs keeps its pages when its QEMU has ended, and the pool is small.
fn check_unlinking(dir: &Path, case: &Case<'_>) {
    let clear = || {
        for entry in std::fs::read_dir(dir).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
    };
    let backend = || {
        clear();
        (case.backend)()
    };
    check(&Case { backend: &backend, ..*case });
    clear();
}

#[test]
fn a_guest_over_a_file_is_saved_with_what_it_never_touched() {
    // An image with other bytes before the memory, data and holes in it, mapped copy-on-write.
    let dir = disk();
    let (base, image) = (dir.path().join("base"), dir.path().join("vm.img"));
    let (offset, length) = (3u64 << 20, 256u64 << 20);
    let file = File::create_new(&base).unwrap();
    file.set_len(offset + length).unwrap();
    file.write_all_at(&[0xee; 4096], offset - 4096).unwrap();
    let mut expected = vec![0u8; length as usize];
    let mut put = |from: u64, len: u64, step: u64| {
        let bytes = (0..len).map(|i| (((i * step) >> 9) ^ i) as u8 | 1).collect::<Vec<_>>();
        file.write_all_at(&bytes, offset + from).unwrap();
        expected[from as usize..(from + len) as usize].copy_from_slice(&bytes);
    };
    // Under what the guest fills (2 to 26 MiB) and beyond it.
    put(20 << 20, 12 << 20, 3);
    put(100 << 20, 1, 5);
    put((130 << 20) + 4096 * 3, 40 << 20, 7);
    put(200 << 20, 4096, 9);
    let backend = MemoryBackend::Object(format!(
        "memory-backend-file,share=off,readonly=on,rom=off,offset=3M,mem-path={}",
        base.display()
    ));
    let spec = spec(256, backend);
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    let medium = Some(disk_medium(dir.path()));
    assert_eq!(kind_of(&attach(&source, &["pc.ram"]), 0), ("private", medium));
    save(&source, &image);
    let round = source.serial.latest_round().unwrap();
    drop(source);
    verify_image(&spec.guest.unwrap(), &spec.layout(), &image);

    // From the end of what the guest owns to the top of memory, where the firmware keeps tables and buffers.
    let saved = MappedRamFile::open(&image).unwrap();
    let block = main_block(&saved);
    let pages = saved.pages(block).unwrap();
    let (from, to) = (26 << 20, 224 << 20);
    let mut found = vec![0; to - from];
    saved.read_ram(block, &pages, from as u64, &mut found).unwrap();
    let differs = found.iter().zip(&expected[from..to]).position(|(found, expected)| found != expected);
    assert_eq!(differs.map(|at| at + from), None, "the first byte of the file that was not saved");
    // And what is a hole in both is none in the image.
    assert!(!pages.contains(page::PageIndex((60 << 20) >> 12)));

    let plain = QemuSpec { backend: MemoryBackend::Plain, ..spec };
    let mut target = stock_load(&plain, &image, StockLoad::BEST);
    target.wait_for_round(round + 2, DEADLINE).unwrap();
}

/// A copy of an image that lists its main block without a page of it: stock QEMU loads everything else from it,
/// and clears nothing.
fn without_main_memory(image: &Path, copy: &Path) {
    std::fs::copy(image, copy).unwrap();
    let saved = MappedRamFile::open(image).unwrap();
    let bitmap = main_block(&saved).bitmap;
    let zeros = vec![0; (bitmap.end - bitmap.start) as usize];
    File::options().write(true).open(copy).unwrap().write_all_at(&zeros, bitmap.start).unwrap();
}

fn main_block(image: &MappedRamFile) -> &wire::mapped_ram::BlockPlacement {
    image.layout().blocks.iter().find(|block| block.name == "pc.ram").expect("a `pc.ram`")
}

#[test]
fn a_guest_restored_by_mapping_and_saved_again_is_whole() {
    let dir = disk();
    let at = |name: &str| dir.path().join(name);
    let (first, rest, second, third) = (at("first.img"), at("rest.img"), at("second.img"), at("third.img"));
    let mut spec = spec(256, MemoryBackend::Plain);
    // The host's clock goes on while the guest is paused, and the clock chip would tell.
    spec.extra = vec!["-rtc".into(), "clock=vm".into()];
    let mut source = spec.start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    client(&source).stop().unwrap();
    save(&source, &first);
    let round = source.serial.latest_round().unwrap();
    drop(source);

    without_main_memory(&first, &rest);
    let offset = main_block(&MappedRamFile::open(&first).unwrap()).pages.start;
    let backend = MemoryBackend::Object(format!(
        "memory-backend-file,share=off,readonly=on,rom=off,offset={offset},mem-path={}",
        first.display()
    ));
    let mapped = QemuSpec { backend, ..spec.clone() };
    let mut restored = stock_load(&mapped, &rest, StockLoad::BEST);
    assert_eq!(kind_of(&attach(&restored, &["pc.ram"]), 0), ("private", Some(disk_medium(dir.path()))));
    // Nothing was touched yet: all of it is still in the file.
    save(&restored, &second);
    assert_eq!(compare_images(&first, &second), []);

    client(&restored).cont().unwrap();
    let round = restored.wait_for_round(round + 2, DEADLINE).unwrap();
    save(&restored, &third);
    drop(restored);
    let pattern = verify_image(&spec.guest.unwrap(), &spec.layout(), &third);
    assert!(pattern.round >= round, "{pattern:?} after round {round}");
    let mut target = stock_load(&spec, &third, StockLoad::BEST);
    target.wait_for_round(round + 2, DEADLINE).unwrap();
}

/// Like a round of [`check`] for machines whose RAM is in several blocks: saved, loaded into a QEMU of the same
/// description, counting on.
fn saved_and_loaded(mut source: Qemu, target: &QemuSpec, image: &Path) {
    let round = source.wait_for_round(2, DEADLINE).unwrap();
    let report = save(&source, image);
    assert_eq!(report.via, Via::Direct);
    drop(source);
    let check = vmstate::check(image).unwrap();
    assert!(check.report.is_clean(), "{:?}", check.report);
    let mut loaded = stock_load(target, image, StockLoad::BEST);
    loaded.wait_for_round(round + 2, DEADLINE).unwrap();
}

#[test]
fn numa_nodes_of_different_kinds_go_from_outside_together() {
    let dir = disk();
    let backend = |file: &str| {
        let path = dir.path().join(file);
        let objects = [
            "memory-backend-memfd,id=ram0,size=16M,share=on".to_owned(),
            "memory-backend-ram,id=ram1,size=64M".to_owned(),
            format!("memory-backend-file,id=ram2,size=176M,share=on,mem-path={}", path.display()),
        ];
        let nodes = (0..3).map(|node| format!("node,nodeid={node},memdev=ram{node}"));
        let objects = objects.into_iter().flat_map(|object| ["-object".to_owned(), object]);
        let extra = objects.chain(nodes.flat_map(|node| ["-numa".to_owned(), node]));
        // Video memory and its ROM are blocks of their own.
        let extra = extra.chain(["-device".to_owned(), "VGA".to_owned()]).map(Into::into).collect();
        // The guest owns pages of all three nodes.
        let settings = GuestSettings { fill_rounds: 1, ..GuestSettings::idle(30_000) };
        let guest = Some(Guest::new(settings));
        QemuSpec { extra, guest, ..QemuSpec::new(MachineKind::Q35, 256 << 20) }
    };
    let (spec, image) = (backend("ram-1"), dir.path().join("vm.img"));
    let source = spec.start().unwrap();
    let ram = attach(&source, &["ram0", "ram1", "ram2", "0000:00:02.0/vga.vram", "pc.bios"]);
    let kinds: Vec<_> = (0..ram.regions()).map(|region| kind_of(&ram, region)).collect();
    let (shmem, disk) = (Some(Medium::Shmem), Some(disk_medium(dir.path())));
    let anonymous = ("anonymous", None);
    assert_eq!(kinds, [("shared", shmem), anonymous, ("shared", disk), anonymous, anonymous]);
    drop(ram);
    saved_and_loaded(source, &backend("ram-2"), &image);

    // The guest's own check covers what it will touch; this one all of its pages, at one moment.
    let saved = MappedRamFile::open(&image).unwrap();
    let block_of = |name: &str| {
        let block = saved.layout().blocks.iter().find(|block| block.name == name).unwrap();
        (block, saved.pages(block).unwrap())
    };
    let blocks = [(0, block_of("ram0")), (16 << 20, block_of("ram1")), (80 << 20, block_of("ram2"))];
    let read = |offset: u64, bytes: &mut [u8; 4096]| {
        let (start, (block, pages)) = blocks.iter().rev().find(|(start, _)| *start <= offset).unwrap();
        saved.read_ram(block, pages, offset - start, bytes)
    };
    lab::verify(&spec.guest.unwrap(), &spec.layout(), read).unwrap();
}

#[test]
fn a_memory_module_that_was_plugged_in_goes_along() {
    let dir = disk();
    let image = dir.path().join("vm.img");
    let slots = ["-m".into(), "256M,slots=2,maxmem=1G".into()];
    let first = QemuSpec { extra: slots.to_vec(), ..spec(256, MemoryBackend::Plain) };
    let source = first.start().unwrap();
    let memfd =
        json!({ "qom-type": "memory-backend-memfd", "id": "module", "size": 128 << 20, "share": true });
    let mut monitor = client(&source);
    monitor.execute("object-add", memfd).unwrap();
    let dimm = json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "module" });
    monitor.execute("device_add", dimm).unwrap();
    drop(monitor);
    let ram = attach(&source, &["pc.ram", "module"]);
    assert_eq!(kind_of(&ram, 0), ("anonymous", None));
    assert_eq!(kind_of(&ram, 1), ("shared", Some(Medium::Shmem)));
    let Backing::SharedFile(part) = *ram.backing(1) else { unreachable!("asserted above") };
    // The guest does not use the module, so this puts something there.
    let fds = std::fs::read_dir(format!("/proc/{}/fd", source.pid())).unwrap();
    let mut paths = fds.map(|entry| entry.unwrap().path());
    let is_module = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|found| found.ino() == part.inode);
    let path = paths.find(is_module).expect("the module's memfd");
    File::options().write(true).open(path).unwrap().write_all_at(&[0x5a; 9000], 70 << 20).unwrap();
    drop(ram);

    let mut extra = slots.to_vec();
    extra.extend(["-object".into(), "memory-backend-ram,id=module,size=128M".into()]);
    extra.extend(["-device".into(), "pc-dimm,id=dimm0,memdev=module".into()]);
    saved_and_loaded(source, &QemuSpec { extra, ..first }, &image);
    let saved = MappedRamFile::open(&image).unwrap();
    let block = saved.layout().blocks.iter().find(|block| block.name == "module").unwrap();
    let pages = saved.pages(block).unwrap();
    let mut found = vec![0; 3 * 4096];
    saved.read_ram(block, &pages, 70 << 20, &mut found).unwrap();
    assert!(found[..9000].iter().all(|byte| *byte == 0x5a) && found[9000..].iter().all(|byte| *byte == 0));
    assert_eq!(pages.count(), page::PageCount(3));
}
