//! Images amid files: what stands behind one is no part of it, whoever wrote it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use lab::{Guest, GuestSettings, Incoming, MachineKind, Qemu, QemuSpec};
use vmstate::job::ImageInfo;
use vmstate::net::QmpAddress;
use vmstate::source::Format;
use vmstate::{
    Cancel, CompareSettings, Compared, ConvertSettings, Kind, RestoreSettings, Target, Unobserved,
};
use vmstate_rig::{DEADLINE, StockLoad, client, stock_load, stock_save, unpack_golden, unpack_wire_golden};

const MIB: u64 = 1 << 20;

fn images() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

/// Bytes that look like nothing, or like the end of an image over and over.
fn junk(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        match state >> 62 {
            0 => out.extend([0x7e, 0, 0, 0, 9, 0, 6, 0, 0, 0, 2, b'{', b'}']),
            _ => out.extend(state.to_le_bytes()),
        }
    }
    out
}

/// The golden images of both families, the format of each and where it starts in its file.
fn goldens(dir: &Path) -> Vec<(PathBuf, Format, u64)> {
    let libvirts = |payload| Format::Libvirt(payload);
    let mut found = Vec::new();
    for (name, format, start) in [
        ("q35-10.0-mapped-ram", Format::MappedRam, 0),
        ("q35-10.0-mapped-ram-offset", Format::MappedRam, 0x1234),
        ("q35-10.0-mapped-ram-virtio-mem", Format::MappedRam, 0),
        ("q35-10.0-stream", Format::Stream, 0),
        ("q35-10.0-stream-virtio-mem", Format::Stream, 0),
        ("q35-7.2-stream", Format::Stream, 0),
        ("pc-7.2-stream", Format::Stream, 0),
        ("libvirt-11.3-raw-image", libvirts(wire::libvirt::PayloadFormat::Raw), 0),
        ("libvirt-11.3-sparse-image", libvirts(wire::libvirt::PayloadFormat::Sparse), 0),
    ] {
        let path = dir.join(name);
        match name.starts_with("libvirt") {
            true => unpack_golden(name, &path),
            false => unpack_wire_golden(name, &path),
        }
        found.push((path, format, start));
    }
    found
}

fn append(path: &Path, bytes: &[u8]) {
    File::options().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

/// What `vmstate info` says but of the file and its holes, which a copy may not have.
fn told(path: &Path, start: u64) -> ImageInfo {
    let info = vmstate::info_at(path, start).unwrap_or_else(|error| panic!("{}", error.chain()));
    let mut info = ImageInfo { file_bytes: 0, disk_bytes: 0, zero_bytes: 0, ..info };
    info.blocks.iter_mut().for_each(|block| (block.zero_bytes, block.stale_bytes) = (0, 0));
    info
}

fn converted(from: &Path, start: u64, to: &Path) -> Vec<u8> {
    let settings = ConvertSettings {
        from_offset: start,
        overwrite: true,
        sync: false,
        ..ConvertSettings::new(from, to, Format::Stream)
    };
    vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}: {}", from.display(), error.chain()));
    std::fs::read(to).unwrap()
}

#[test]
fn what_is_behind_an_image_is_no_part_of_it() {
    let dir = images();
    let (at, to) = (dir.path().join("at"), dir.path().join("to"));
    let goldens = goldens(dir.path());
    for (path, format, start) in &goldens {
        let is_whole = |title: &str| {
            let title = format!("{} with {title}", path.display());
            let check = vmstate::check_at(&at, *start).unwrap();
            assert_eq!((check.format, &check.report.faults[..]), (Some(*format), &[][..]), "{title}");
            assert_eq!(told(&at, *start), told(path, *start), "{title}");
            // A stream with shared memory left out would be refused; these are whole guests.
            let expected = converted(path, *start, &to);
            assert!(converted(&at, *start, &to) == expected, "{title}");
            let sides = [&at, path].map(|path| Compared { offset: *start, ..Compared::new(path) });
            let [one, other] = sides;
            let settings = CompareSettings::new(one, other);
            let compared = vmstate::compare(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
            assert!(compared.same, "{title}: {compared:?}");
        };
        for (title, hole, follows) in [
            ("nothing", 0, vec![]),
            ("a few zeros", 0, vec![0; 4097]),
            ("a large hole", 300 * MIB, vec![]),
            ("junk", 0, junk(3 << 20)),
            ("junk behind a hole", 40 * MIB, junk(1 << 20)),
        ] {
            std::fs::copy(path, &at).unwrap();
            let file = File::options().append(true).open(&at).unwrap();
            file.set_len(file.metadata().unwrap().len() + hole).unwrap();
            append(&at, &follows);
            is_whole(title);
        }
        for (other, ..) in &goldens[..5] {
            std::fs::copy(path, &at).unwrap();
            append(&at, &std::fs::read(other).unwrap());
            is_whole(&format!("{} behind it", other.display()));
        }
    }
}

#[test]
fn an_image_that_ends_early_is_damaged_whatever_is_behind_it() {
    let dir = images();
    let at = dir.path().join("at");
    for (path, _, start) in goldens(dir.path()) {
        let whole = std::fs::read(&path).unwrap();
        let info = told(&path, start);
        let last = info.devices.last().unwrap();
        // Amid the last section, amid the description, and a byte before the end of it.
        let described = (last.offset + last.bytes) as usize + 5 + 1;
        let cuts = [last.offset as usize, described + 3, (described + whole.len()) / 2, whole.len() - 1];
        for cut in cuts {
            for follows in [vec![0; 5000], junk(100_000), whole.clone()] {
                std::fs::write(&at, [&whole[..cut], &follows].concat()).unwrap();
                let check = vmstate::check_at(&at, start).unwrap();
                let title = format!("{} cut at {cut:#x}", path.display());
                assert!(!check.report.is_clean(), "{title}");
                let error = vmstate::info_at(&at, start).expect_err(&title);
                assert!(matches!(error.kind(), Kind::Damaged | Kind::Unsupported), "{title}: {error}");
            }
        }
    }
}

#[test]
fn a_compressed_image_may_have_zeros_behind_it_and_nothing_else() {
    let dir = images();
    let (at, to) = (dir.path().join("at"), dir.path().join("to"));
    for codec in ["gzip", "bzip2", "xz", "lzop", "zstd"] {
        let path = dir.path().join(codec);
        unpack_golden(&format!("libvirt-11.3-{codec}-image"), &path);
        let expected = converted(&path, 0, &to);
        let len = std::fs::metadata(&path).unwrap().len();
        for zeros in [4096, 1 << 20, 1 << 40] {
            std::fs::copy(&path, &at).unwrap();
            File::options().append(true).open(&at).unwrap().set_len(len + zeros).unwrap();
            let check = vmstate::check(&at).unwrap();
            assert_eq!(check.report.faults, [], "{codec} and {zeros} zeros");
            assert_eq!(told(&at, 0), told(&path, 0), "{codec} and {zeros} zeros");
            assert!(converted(&at, 0, &to) == expected, "{codec} and {zeros} zeros");
        }
        std::fs::copy(&path, &at).unwrap();
        append(&at, b"\0\0junk");
        let error = vmstate::check(&at).expect_err(codec);
        let place = format!("something else stands behind the payload, at {:#x}", len + 2);
        assert_eq!(
            (error.kind(), error.chain().ends_with(&place)),
            (Kind::Damaged, true),
            "{}",
            error.chain()
        );
    }
}

fn restored(image: &Path, offset: u64, spec: &QemuSpec) -> Qemu {
    let target = QemuSpec { incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
    let waiting = Target::Waiting(QmpAddress::Unix(target.qmp_path()));
    let settings = RestoreSettings { offset, ..RestoreSettings::new(image, waiting) };
    vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    target
}

/// QEMU's own images record that the guest was stopped for them.
fn going_on(qemu: Qemu) -> Qemu {
    let mut client = client(&qemu);
    if !client.status().unwrap().running {
        client.cont().unwrap();
    }
    qemu
}

#[test]
fn an_image_amid_a_file_is_loaded_by_stock_qemu_and_by_vmstate() {
    let guest = GuestSettings { fill_rounds: 1, ..GuestSettings::default() };
    let spec = QemuSpec { guest: Some(Guest::new(guest)), ..QemuSpec::new(MachineKind::Q35, 64 << 20) };
    let dir = images();
    let path = |name: &str| dir.path().join(name);
    let mut source = spec.start().unwrap();
    source.wait_for_round(1, DEADLINE).unwrap();
    stock_save(&source, &path("first"), StockLoad::BEST);
    let first_round = source.serial.latest_round().unwrap();
    drop(source);
    let mut source = going_on(stock_load(&spec, &path("first"), StockLoad::BEST));
    source.wait_for_round(first_round + 3, DEADLINE).unwrap();
    stock_save(&source, &path("stream"), StockLoad::STREAM);
    let round = source.serial.latest_round().unwrap();
    drop(source);

    // Two images one behind the other, and what is neither before, between and behind them.
    let (disk, offset) = (path("disk"), 64 << 10);
    std::fs::write(&disk, junk(offset as usize)).unwrap();
    for (from, to_offset) in [("first", offset), ("stream", 200 * MIB)] {
        let file = File::options().write(true).open(&disk).unwrap();
        if file.metadata().unwrap().len() < to_offset {
            file.set_len(to_offset).unwrap();
        }
        let settings = ConvertSettings {
            to_offset: Some(to_offset),
            overwrite: true,
            sync: false,
            ..ConvertSettings::new(path(from), &disk, Format::MappedRam)
        };
        vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{}", error.chain()));
    }
    append(&disk, &junk(1 << 20));
    append(&path("stream"), &vec![0; MIB as usize]);

    for (image, offset, how, round) in [
        (&disk, offset, StockLoad::BEST, first_round),
        (&disk, 200 * MIB, StockLoad::BEST, round),
        (&path("stream"), 0, StockLoad::STREAM, round),
    ] {
        let title = format!("{} at {offset:#x}", image.display());
        let check = vmstate::check_at(image, offset).unwrap();
        assert_eq!(check.report.faults, [], "{title}");
        let name = match offset {
            0 => image.to_owned(),
            offset => format!("{},offset={offset}", image.display()).into(),
        };
        let out = path("out");
        converted(image, offset, &out);
        let loaded = [
            ("stock", stock_load(&spec, &name, how)),
            ("restored", restored(image, offset, &spec)),
            ("converted", stock_load(&spec, &out, StockLoad::STREAM)),
        ];
        for (way, target) in loaded {
            let mut target = going_on(target);
            // The guest verifies every page of itself, and halts at the first that is not right.
            let went_on = target.wait_for_round(round + 2, DEADLINE);
            went_on.unwrap_or_else(|error| panic!("{title}, {way}: {error}"));
        }
    }
}
