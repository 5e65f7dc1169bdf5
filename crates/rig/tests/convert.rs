//! Images of real guests become others of every format, say the same, and stock QEMU goes on with them.

use std::path::{Path, PathBuf};

use lab::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, Qemu, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::source::Format;
use vmstate::{
    Cancel, ConvertSettings, Record, RestoreSettings, SaveFormat, SaveSettings, Target, Unobserved, Via,
};
use vmstate_rig::{
    DEADLINE, StockLoad, client, compare_images, stock_load, stock_migrate, stock_save, verify_image,
};
use wire::libvirt::PayloadFormat;

/// A directory for images: on a disk, where direct I/O is the real thing.
fn images() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

fn save(qemu: &Qemu, image: &Path, format: SaveFormat) {
    let settings = SaveSettings {
        via: Via::Direct,
        format: Some(format),
        ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), image)
    };
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
}

fn convert(from: &Path, to: &Path, format: Format) {
    // QEMU's own images have no XML, and an image of libvirt has to have one.
    let domain_xml = matches!(format, Format::Libvirt(_)).then(|| "<domain/>\n".to_owned());
    let settings = ConvertSettings {
        domain_xml,
        overwrite: true,
        sync: false,
        ..ConvertSettings::new(from, to, format)
    };
    let report = vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{} to {}: {}", from.display(), format.name(), error.chain()));
    assert!(report.data_bytes > 1 << 20, "{report:?}");
}

fn how(format: Format) -> StockLoad {
    match format {
        Format::MappedRam => StockLoad::BEST,
        _ => StockLoad::STREAM,
    }
}

#[test]
fn what_was_converted_says_the_same_and_goes_on_in_stock_qemu() {
    for (machine, backend) in
        [(MachineKind::Q35, MemoryBackend::Plain), (MachineKind::Pc, MemoryBackend::Memfd)]
    {
        let guest = GuestSettings { fill_rounds: 1, ..GuestSettings::default() };
        let spec = QemuSpec { backend, guest: Some(Guest::new(guest)), ..QemuSpec::new(machine, 256 << 20) };
        let dir = images();
        let at = |name: &str| dir.path().join(name);
        let mut source = spec.start().unwrap();
        source.wait_for_round(2, DEADLINE).unwrap();
        // One guest that stands still, four times: by us and by QEMU itself.
        save(&source, &at("ours-mapped"), SaveFormat::MappedRam);
        save(&source, &at("ours-stream"), SaveFormat::Stream);
        stock_save(&source, &at("stock-mapped"), StockLoad::BEST);
        let round = source.serial.latest_round().unwrap();
        drop(source);
        let mut source = stock_load(&spec, &at("ours-mapped"), StockLoad::BEST);
        source.wait_for_round(round + 1, DEADLINE).unwrap();
        stock_save(&source, &at("stock-stream"), StockLoad::STREAM);
        let later = source.serial.latest_round().unwrap();
        drop(source);

        for (name, to, round) in [
            ("ours-mapped", Format::Stream, round),
            ("ours-stream", Format::MappedRam, round),
            ("stock-mapped", Format::Stream, round),
            ("stock-stream", Format::MappedRam, later),
        ] {
            let title = format!("{} {:?} {name}", machine.name(), spec.backend);
            let (there, back) = (at(&format!("{name}-there")), at(&format!("{name}-back")));
            convert(&at(name), &there, to);
            let from = if to == Format::Stream { Format::MappedRam } else { Format::Stream };
            convert(&there, &back, from);
            for image in [&there, &back] {
                assert_eq!(compare_images(&at(name), image), [], "{title}");
                assert!(vmstate::check(image).unwrap().report.is_clean(), "{title}");
            }
            let mut target = stock_load(&spec, &there, how(to));
            let mut client = client(&target);
            // QEMU's own record of a guest that was paused first.
            if !client.status().unwrap().running {
                client.cont().unwrap();
            }
            drop(client);
            // The guest itself verifies every page in each round, and halts at the first that is not right.
            target.wait_for_round(round + 2, DEADLINE).unwrap_or_else(|error| panic!("{title}: {error}"));
        }
    }
}

/// A guest of a machine that both QEMUs have: small, and most of it is not there.
fn old_machine() -> QemuSpec {
    let guest = GuestSettings { fill_rounds: 1, pages_low_max: 500, ..GuestSettings::default() };
    QemuSpec {
        machine_version: Some("pc-q35-7.2".to_owned()),
        guest: Some(Guest::new(guest)),
        ..QemuSpec::new(MachineKind::Q35, 64 << 20)
    }
}

/// The same in QEMU 7.2.
fn in_qemu_7_2() -> QemuSpec {
    let program = lab::assets_dir().join("qemu72/qemu-system-x86_64");
    assert!(program.exists(), "QEMU 7.2 is not at {}: run `make setup`", program.display());
    QemuSpec { program, ..old_machine() }
}

/// An image of a guest that went on to that round.
struct Made {
    path: PathBuf,
    round: u32,
}

impl Made {
    /// The guest goes on in a QEMU that waits: by QEMU's own loader where it takes the format, else by ours.
    fn goes_on(&self, image: &Path, format: Format, title: &str) {
        let spec = old_machine();
        let mut target = match format {
            Format::Libvirt(_) => {
                let target = QemuSpec { incoming: Incoming::Defer, ..spec.clone() }.start().unwrap();
                let waiting = Target::Waiting(QmpAddress::Unix(target.qmp_path()));
                let settings =
                    RestoreSettings { record: Record::Running, ..RestoreSettings::new(image, waiting) };
                vmstate::restore(&settings, &Cancel::new().unwrap(), &Unobserved)
                    .unwrap_or_else(|error| panic!("{title}: {}", error.chain()));
                target
            }
            _ => stock_load(&spec, image, how(format)),
        };
        lives_on(&mut target, self.round, title);
    }
}

/// The guest verifies every page in each round, and halts at the first that is not right.
fn lives_on(target: &mut Qemu, round: u32, title: &str) {
    let mut client = client(target);
    if !client.status().unwrap().running {
        client.cont().unwrap();
    }
    drop(client);
    target.wait_for_round(round + 2, DEADLINE).unwrap_or_else(|error| panic!("{title}: {error}"));
}

fn every_format() -> impl Iterator<Item = Format> {
    Format::ALL.into_iter().chain(Format::LIBVIRT)
}

/// An image becomes one of every format by way of mapped-ram, and mapped-ram again, and each is the same guest.
/// What is restored of libvirt's formats is `dealt`, so that every one is by one test or another; `make test-full`
/// restores all, and has the full square.
fn goes_there_and_back(dir: &Path, made: &Made, dealt: &[PayloadFormat]) {
    let full = std::env::var_os("VMSTATE_TEST_FULL").is_some();
    let (base, there, back) = (dir.join("base"), dir.join("there"), dir.join("back"));
    let is_same = |image: &Path, title: &str| {
        assert_eq!(compare_images(&made.path, image), [], "{title}");
        let check = vmstate::check(image).unwrap();
        assert!(check.report.is_clean(), "{title}: {:?}", check.report);
    };
    let name = made.path.file_name().unwrap().to_string_lossy();
    convert(&made.path, &base, Format::MappedRam);
    is_same(&base, &name);
    verify_image(&old_machine().guest.unwrap(), &old_machine().layout(), &base);
    for format in every_format() {
        let title = format!("{name} to {}", format.name());
        convert(&base, &there, format);
        assert_eq!(vmstate::info(&there).unwrap().format, format.name(), "{title}");
        is_same(&there, &title);
        for again in every_format().filter(|again| full || *again == Format::MappedRam) {
            let title = format!("{title} to {}", again.name());
            convert(&there, &back, again);
            is_same(&back, &title);
            if format == Format::Libvirt(PayloadFormat::Sparse) && again == Format::MappedRam {
                made.goes_on(&back, again, &title);
            }
        }
        if !matches!(format, Format::Libvirt(format) if !full && !dealt.contains(&format)) {
            made.goes_on(&there, format, &title);
        }
    }
}

#[test]
fn an_image_by_qemu_7_2_becomes_every_format_and_goes_on() {
    let dir = images();
    let mut source = in_qemu_7_2().start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    let path = dir.path().join("stream by 7.2");
    client(&source).stop().unwrap();
    stock_migrate(&source, "migrate", &format!("exec:cat > '{}'", path.display()));
    let made = Made { path, round: source.serial.latest_round().unwrap() };
    drop(source);
    goes_there_and_back(dir.path(), &made, &[PayloadFormat::Gzip, PayloadFormat::Zstd]);
}

/// One guest that stands still for an image, and goes on for the next.
fn by_qemu_10(images_by: &[(&str, StockLoad, PayloadFormat)]) {
    let dir = images();
    let mut source = old_machine().start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    for (name, how, dealt) in images_by {
        let path = dir.path().join(name);
        stock_save(&source, &path, *how);
        let made = Made { path, round: source.serial.latest_round().unwrap() };
        goes_there_and_back(dir.path(), &made, &[*dealt]);
        lives_on(&mut source, made.round, name);
    }
}

#[test]
fn images_by_qemu_10_become_every_format_and_go_on() {
    by_qemu_10(&[
        ("mapped-ram by 10", StockLoad::PLAIN, PayloadFormat::Raw),
        ("stream by 10", StockLoad::STREAM, PayloadFormat::Bzip2),
    ]);
}

#[test]
fn an_image_by_qemu_10_with_multifd_becomes_every_format_and_goes_on() {
    by_qemu_10(&[("multifd by 10", StockLoad::BEST, PayloadFormat::Sparse)]);
}

#[test]
fn images_by_vmstate_become_every_format_and_go_on() {
    let dir = images();
    let mut source = old_machine().start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    for (name, format, dealt) in [
        ("mapped-ram by vmstate", SaveFormat::MappedRam, PayloadFormat::Xz),
        ("stream by vmstate", SaveFormat::Stream, PayloadFormat::Lzop),
    ] {
        let path = dir.path().join(name);
        save(&source, &path, format);
        let made = Made { path, round: source.serial.latest_round().unwrap() };
        goes_there_and_back(dir.path(), &made, &[dealt]);
    }
}

#[test]
fn a_machine_of_7_2_that_qemu_10_saved_goes_back_to_qemu_7_2() {
    let dir = images();
    let (image, stream) = (dir.path().join("image"), dir.path().join("stream"));
    let mut source = old_machine().start().unwrap();
    source.wait_for_round(2, DEADLINE).unwrap();
    stock_save(&source, &image, StockLoad::BEST);
    let round = source.serial.latest_round().unwrap();
    drop(source);
    convert(&image, &stream, Format::Stream);
    let mut target = QemuSpec { incoming: Incoming::Defer, ..in_qemu_7_2() }.start().unwrap();
    stock_migrate(&target, "migrate-incoming", &format!("exec:cat '{}'", stream.display()));
    lives_on(&mut target, round, "in QEMU 7.2");
}
