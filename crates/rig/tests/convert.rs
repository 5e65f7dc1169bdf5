//! Images of real guests become others of every format, say the same, and stock QEMU goes on with them.

use std::path::Path;

use lab::{Guest, GuestSettings, MachineKind, MemoryBackend, Qemu, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::source::Format;
use vmstate::{Cancel, ConvertSettings, SaveFormat, SaveSettings, Unobserved, Via};
use vmstate_rig::{DEADLINE, StockLoad, client, compare_images, stock_load, stock_save};

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
    let report =
        vmstate::convert(&ConvertSettings::new(from, to, format), &Cancel::new().unwrap(), &Unobserved)
            .unwrap_or_else(|error| panic!("{}", error.chain()));
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
