//! What drafts promise.
#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, fcntl_getfl, mknodat};
use vmstate_io::{DirectChoice, DirectIo, Draft, DraftError, DraftOptions, DraftStep, ReadPair};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn create(path: &Path) -> Result<Draft, DraftError> {
    Draft::create(path, DraftOptions::default())
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("the directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_draft_shows_under_its_final_name_only_when_published() {
    let directory = directory();
    let path = directory.path().join("vm.img");
    let mut draft = create(&path).expect("a draft");
    draft.buffered().write_all_at(b"state", 0).expect("five bytes");
    let found = names(directory.path());
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with(".vm.img.vmstate-") && found[0].ends_with(".partial"), "{found:?}");
    assert_eq!(draft.partial_path(), directory.path().join(&found[0]));

    let mut text = String::new();
    draft.open_for_reading().expect("the draft").read_to_string(&mut text).expect("five bytes");
    assert_eq!(text, "state");

    draft.publish().expect("a free name");
    assert_eq!(names(directory.path()), ["vm.img"]);
    assert_eq!(fs::read(&path).expect("the file"), b"state");
}

#[test]
fn a_dropped_draft_leaves_nothing() {
    let directory = directory();
    drop(create(&directory.path().join("vm.img")).expect("a draft"));
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn a_new_file_belongs_to_whom_it_is_given() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root may give files away");
        return;
    }
    let directory = directory();
    for (owner, user, group, mode) in [("1234:5678", 1234, 5678, 0o640), (":5678", 0, 5678, 0o600)] {
        let path = directory.path().join(mode.to_string());
        let owner = owner.parse().expect("an owner");
        let mut draft =
            Draft::create(&path, DraftOptions { owner, mode, ..DraftOptions::default() }).expect("a draft");
        draft.publish().expect("a free name");
        let found = fs::metadata(&path).expect("the file");
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (user, group, mode));
    }
}

#[test]
fn a_draft_that_was_measured_is_empty_again() {
    let directory = directory();
    let draft = create(&directory.path().join("vm.img")).expect("a draft");
    let rates = draft.measure().expect("room for a few megabytes");
    assert_eq!(rates.is_some(), draft.direct().is_some(), "{rates:?}");
    assert_eq!(draft.buffered().metadata().expect("the file").len(), 0);
}

#[test]
fn direct_io_that_is_left_is_gone_with_its_reason() {
    let directory = directory();
    let mut draft = create(&directory.path().join("vm.img")).expect("a draft");
    draft.leave_direct("slow");
    assert!(draft.direct().is_none());
    assert_eq!(*draft.direct_io(), DirectIo::Unsupported { reason: "slow".to_owned() });
    assert_eq!(draft.measure().expect("nothing to do"), None);
}

#[test]
fn the_mode_is_exactly_the_one_asked_for() {
    let directory = directory();
    for mode in [0o600, 0o640, 0o666] {
        let path = directory.path().join(format!("{mode:o}"));
        let options = DraftOptions { mode, ..DraftOptions::default() };
        Draft::create(&path, options).expect("a draft").publish().expect("a free name");
        assert_eq!(fs::metadata(&path).expect("the file").permissions().mode() & 0o7777, mode);
    }
}

#[test]
fn the_descriptors_have_the_flags_that_qemu_accepts() {
    let directory = directory();
    let draft = create(&directory.path().join("vm.img")).expect("a draft");
    let access = |flags: OFlags| flags & (OFlags::RWMODE | OFlags::DIRECT);
    assert_eq!(access(fcntl_getfl(draft.buffered()).expect("flags")), OFlags::WRONLY);
    let Some(direct) = draft.direct() else {
        println!("direct I/O not tested here: {:?}", draft.direct_io());
        return;
    };
    assert_eq!(access(fcntl_getfl(direct).expect("flags")), OFlags::WRONLY | OFlags::DIRECT);
    let inode = |file: &fs::File| file.metadata().expect("the file").ino();
    assert_eq!(inode(direct), inode(draft.buffered()));
    assert_eq!(draft.buffered().metadata().expect("the file").len(), 0, "the probe leaves no bytes");
}

#[test]
fn a_taken_name_is_refused_at_once_and_kept() {
    let directory = directory();
    let path = directory.path().join("vm.img");
    fs::write(&path, "old").expect("a file");
    let refused = create(&path).expect_err("the name is taken");
    assert_eq!(refused.to_string(), format!("`{}` exists", path.display()));
    assert_eq!(names(directory.path()), ["vm.img"]);
    assert_eq!(fs::read(&path).expect("the file"), b"old");
}

#[test]
fn a_name_taken_meanwhile_is_refused_and_kept() {
    let directory = directory();
    let path = directory.path().join("vm.img");
    let mut draft = create(&path).expect("a draft");
    fs::write(&path, "somebody else's").expect("a file");
    let refused = draft.publish().expect_err("the name is taken");
    drop(draft);
    assert!(matches!(refused, DraftError::Exists { .. }), "{refused}");
    assert_eq!(names(directory.path()), ["vm.img"]);
    assert_eq!(fs::read(&path).expect("the file"), b"somebody else's");
}

#[test]
fn overwriting_replaces_the_old_file_whole() {
    let directory = directory();
    let path = directory.path().join("vm.img");
    fs::write(&path, "old and longer").expect("a file");
    let options = DraftOptions { overwrite: true, sync: false, ..DraftOptions::default() };
    let mut draft = Draft::create(&path, options).expect("a draft");
    draft.buffered().write_all_at(b"new", 0).expect("three bytes");
    assert_eq!(fs::read(&path).expect("the file"), b"old and longer");
    draft.publish().expect("a file to replace");
    assert_eq!(fs::read(&path).expect("the file"), b"new");
    assert_eq!(names(directory.path()), ["vm.img"]);
}

#[test]
fn a_changeling_under_the_temporary_name_is_not_published() {
    let directory = directory();
    let path = directory.path().join("vm.img");
    let mut draft = create(&path).expect("a draft");
    let partial = draft.partial_path().to_owned();
    fs::remove_file(&partial).expect("the draft");
    fs::write(&partial, "not ours").expect("a file");
    let refused = draft.publish().expect_err("another file");
    assert!(matches!(refused, DraftError::Io { step: DraftStep::Rename, .. }), "{refused}");
    assert!(!path.exists());
}

#[test]
fn names_that_are_no_files_are_refused_with_what_they_are() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("dir")).expect("a directory");
    symlink("elsewhere", at("link")).expect("a link");
    let overwrite = DraftOptions { overwrite: true, ..DraftOptions::default() };
    let check = |path: &Path, text: &str| {
        let refused = Draft::create(path, overwrite).expect_err(text);
        assert_eq!(refused.to_string(), format!("`{}` is {text}", path.display()));
    };
    check(&at("dir"), "a directory");
    check(&at("dir/"), "not the name of a file");
    check(&at("new/"), "not the name of a file");
    check(&at("dir/."), "not the name of a file");
    check(&at("dir/.."), "not the name of a file");
    check(Path::new(""), "not the name of a file");
    check(Path::new("/"), "not the name of a file");
    check(&at("link"), "a symbolic link");
    check(Path::new("/dev/null"), "a character device: writing to one is not supported");
    mknodat(CWD, at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("a FIFO");
    check(&at("fifo"), "a FIFO: writing to one is not supported");
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("a socket");
    check(&at("socket"), "a socket: writing to one is not supported");
    match mknodat(
        CWD,
        at("disk"),
        FileType::BlockDevice,
        Mode::from_raw_mode(0o600),
        rustix::fs::makedev(7, 99),
    ) {
        Ok(()) => check(&at("disk"), "a block device: writing to one is not supported"),
        Err(error) => println!("block devices not tested here: making a node needs root ({error})"),
    }
}

#[test]
fn directories_that_take_no_file_say_so_with_the_step() {
    let directory = directory();
    fs::write(directory.path().join("file"), "").expect("a file");
    for (path, step, kind) in [
        (directory.path().join("missing/vm.img"), DraftStep::OpenDirectory, io::ErrorKind::NotFound),
        (directory.path().join("file/vm.img"), DraftStep::OpenDirectory, io::ErrorKind::NotADirectory),
        // Even root cannot create files in sysfs.
        ("/sys/kernel/vm.img".into(), DraftStep::CreatePartial, io::ErrorKind::PermissionDenied),
    ] {
        let refused = create(&path).expect_err("no place for a file");
        let DraftError::Io { step: failed, source, .. } = &refused else { panic!("{refused}") };
        assert_eq!((*failed, source.kind()), (step, kind), "{}", path.display());
    }
}

#[test]
fn a_bare_name_goes_to_the_working_directory() {
    let name = format!("vmstate-bare-name-{}", std::process::id());
    let draft = create(Path::new(&name)).expect("a writable working directory");
    assert_eq!(draft.partial_path().parent(), Some(Path::new(".")));
}

#[test]
fn length_and_space_can_be_set_and_asked() {
    let directory = directory();
    let draft = create(&directory.path().join("vm.img")).expect("a draft");
    draft.set_len(1 << 40).expect("a sparse file of 1 TiB");
    assert_eq!(draft.buffered().metadata().expect("the file").len(), 1 << 40);
    assert!(draft.free_bytes().expect("a number") > 0);
    let refused = draft.set_len(u64::MAX).expect_err("no file is as long");
    assert!(matches!(refused, DraftError::Io { step: DraftStep::SetLength, .. }), "{refused}");
}

#[test]
fn direct_io_that_cannot_be_had_is_an_error_only_when_demanded() {
    // procfs refuses O_DIRECT on every kernel, but takes no files; its own ones serve for reading.
    let path = Path::new("/proc/self/status");
    let auto = ReadPair::open(path, DirectChoice::Auto).expect("the file without direct I/O");
    assert!(auto.direct.is_none());
    assert!(matches!(auto.direct_io, DirectIo::Unsupported { .. }), "{:?}", auto.direct_io);
    let refused = ReadPair::open(path, DirectChoice::On).expect_err("no direct I/O");
    assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
    let off = ReadPair::open(path, DirectChoice::Off).expect("the file");
    assert_eq!(off.direct_io, DirectIo::Unsupported { reason: "switched off".to_owned() });
}

#[test]
fn the_probe_agrees_with_a_direct_read() {
    let directory = directory();
    let path = directory.path().join("vm.img");
    let mut file = fs::File::create(&path).expect("a file");
    file.write_all(&[7; 8192]).expect("two pages");
    let pair = ReadPair::open(&path, DirectChoice::Auto).expect("the file");
    match (&pair.direct, &pair.direct_io) {
        (Some(_), DirectIo::Supported { memory_align, offset_align }) => {
            assert!(memory_align.is_power_of_two() && offset_align.is_power_of_two());
            assert!(pair.direct_io.alignment() >= 4096);
        }
        (None, DirectIo::Unsupported { reason }) => println!("direct I/O not tested here: {reason}"),
        other => panic!("{other:?}"),
    }
}
