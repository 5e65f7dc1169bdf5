//! What is damaged, does not fit or is cancelled gives an error, and leaves no image behind.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmstate::libvirt::PayloadFormat;
use vmstate::source::Format;
use vmstate::{Cancel, CompareSettings, Compared, ConvertSettings, Kind, Unobserved};

use super::images::{Guest, Page, read_mapped_ram, read_stream};
use super::{directory, run, settings};

fn small_guest() -> Guest {
    let pages = [Page::Data(5), Page::Zero, Page::Absent, Page::Data(9)];
    Guest {
        is_described: true,
        blocks: vec![("pc.ram".into(), pages.repeat(5)), ("rom".into(), vec![Page::Data(7)])],
        ..Guest::default()
    }
}

/// Settings for many conversions of little.
fn quick(from: &Path, to: &Path, format: Format) -> ConvertSettings {
    ConvertSettings { channels: Some(1), direct_io: vmstate::DirectIo::Off, ..settings(from, to, format) }
}

/// What is in a directory beside what was put there.
fn others(directory: &Path, known: &[&str]) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| known.iter().all(|name| !path.ends_with(name))).collect()
}

#[test]
fn an_image_that_ends_early_is_refused_wherever_it_ends() {
    let directory = directory();
    let (image, to) = (directory.path().join("image"), directory.path().join("to"));
    let guest = small_guest();
    guest.write_mapped_ram(&image, 0);
    let mapped = std::fs::read(&image).unwrap();
    let stream = guest.stream(&[]);
    for whole in [&mapped, &stream] {
        // Every place in the metadata at both ends, and some between.
        let places = (0..400).chain((400..whole.len()).step_by(99_991)).chain(whole.len() - 400..whole.len());
        std::fs::write(&image, whole).unwrap();
        let file = File::options().write(true).open(&image).unwrap();
        // From behind, so that each is a part of the one before.
        for len in places.collect::<std::collections::BTreeSet<_>>().into_iter().rev() {
            file.set_len(len as u64).unwrap();
            for format in Format::ALL {
                match run(&quick(&image, &to, format)) {
                    Err(error) => {
                        let kind = error.kind();
                        assert!(
                            matches!(kind, Kind::Damaged | Kind::Unsupported),
                            "{len:#x} to {format:?}: {kind:?} {}",
                            error.chain()
                        );
                        assert_eq!(others(directory.path(), &["image"]), Vec::<PathBuf>::new(), "{len:#x}");
                    }
                    // Where only the description lacks, which not every QEMU writes, it is an image still.
                    Ok(_) => {
                        let memory = match format {
                            Format::MappedRam => read_mapped_ram(&to, 0).memory,
                            Format::Stream => read_stream(&to).memory,
                            Format::Libvirt(_) => panic!("{format:?} is none of QEMU's own"),
                        };
                        assert_eq!(memory, guest.memory(), "{len:#x} to {format:?}");
                        std::fs::remove_file(&to).unwrap();
                    }
                }
            }
        }
    }
}

#[test]
fn no_damage_to_metadata_panics_or_leaves_anything() {
    let directory = directory();
    let (image, to) = (directory.path().join("image"), directory.path().join("to"));
    let guest = small_guest();
    guest.write_mapped_ram(&image, 0);
    let mapped = std::fs::read(&image).unwrap();
    let stream = guest.stream(&[]);
    let mut refused = 0;
    for whole in [&mapped, &stream] {
        std::fs::write(&image, whole).unwrap();
        let file = File::options().write(true).open(&image).unwrap();
        for (i, at) in (0..300).chain(whole.len() - 1100..whole.len()).enumerate() {
            let flip = [0x01, 0x80, 0xff][i % 3];
            file.write_all_at(&[whole[at] ^ flip], at as u64).unwrap();
            for format in Format::ALL {
                if run(&quick(&image, &to, format)).is_err() {
                    refused += 1;
                } else {
                    std::fs::remove_file(&to).unwrap();
                }
                assert_eq!(others(directory.path(), &["image"]), Vec::<PathBuf>::new(), "{at:#x}");
            }
            file.write_all_at(&[whole[at]], at as u64).unwrap();
        }
    }
    assert!(refused > 1000, "only {refused} damages were refused");
}

/// A conversion that must fail, with these words.
fn check(settings: &ConvertSettings, kind: Kind, words: &str) {
    let error = run(settings).expect_err(words);
    assert_eq!((error.kind(), error.chain().contains(words)), (kind, true), "{}", error.chain());
}

#[test]
fn what_cannot_be_is_said_before_anything_is_written() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let guest = small_guest();
    guest.write_mapped_ram(&at("mapped"), 0);
    guest.write_stream(&at("stream"), &[]);
    std::fs::write(at("there"), "mine").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    let (mapped, stream) = (at("mapped"), at("stream"));
    let to = |from: &Path, name: &str, format| settings(from, &at(name), format);
    check(&to(&mapped, "there", Format::Stream), Kind::Misuse, "exists");
    check(&to(&at("none"), "to", Format::Stream), Kind::Io, "none");
    check(
        &to(directory.path(), "to", Format::Stream),
        Kind::Misuse,
        "neither a regular file nor a block device",
    );
    check(
        &ConvertSettings { channels: Some(0), ..to(&mapped, "to", Format::Stream) },
        Kind::Misuse,
        "channels must be between 1 and 255",
    );
    check(
        &ConvertSettings { to_offset: Some(0), overwrite: true, ..to(&mapped, "there", Format::Stream) },
        Kind::Misuse,
        "a stream image can only be a file of its own or go into a pipe",
    );
    check(
        &ConvertSettings { to_offset: Some(0), overwrite: true, ..to(&mapped, "mapped", Format::MappedRam) },
        Kind::Misuse,
        "would be written over while it is read",
    );
    check(
        &ConvertSettings { from_offset: 1 << 40, ..to(&mapped, "to", Format::MappedRam) },
        Kind::Damaged,
        "before the offset 0x10000000000",
    );
    check(
        &ConvertSettings { from_offset: 4096, ..to(&at("fifo"), "to", Format::MappedRam) },
        Kind::Misuse,
        "a pipe has no offsets",
    );
    check(
        &ConvertSettings { from_format: Some(Format::MappedRam), ..to(&at("fifo"), "to", Format::Stream) },
        Kind::Misuse,
        "read at offsets, which a pipe has not",
    );
    check(
        &ConvertSettings { from_format: Some(Format::Stream), ..to(&mapped, "to", Format::MappedRam) },
        Kind::Unsupported,
        "read it as a mapped-ram image",
    );
    check(
        &ConvertSettings { from_format: Some(Format::MappedRam), ..to(&stream, "to", Format::Stream) },
        Kind::Unsupported,
        "mapped-ram",
    );
    let libvirts = |payload| Format::Libvirt(payload);
    let raw = libvirts(PayloadFormat::Raw);
    let with = |xml: &str, settings| ConvertSettings { domain_xml: Some(xml.to_owned()), ..settings };
    run(&with("<domain/>", to(&stream, "raw", raw))).unwrap_or_else(|error| panic!("{}", error.chain()));
    for said in [PayloadFormat::Zstd, PayloadFormat::Sparse] {
        let words = format!("raw is a libvirt-raw image, and not libvirt-{said}");
        let format = libvirts(said);
        check(
            &ConvertSettings { from_format: Some(format), ..to(&at("raw"), "to", Format::Stream) },
            Kind::Misuse,
            &words,
        );
        let one = Compared { format: Some(format), ..Compared::new(at("raw")) };
        let error = vmstate::compare(
            &CompareSettings::new(one, Compared::new(at("raw"))),
            &Cancel::new().unwrap(),
            &Unobserved,
        );
        assert!(error.expect_err(&words).to_string().contains(&words), "compared as {said}");
    }
    check(
        &ConvertSettings { from_format: Some(raw), ..to(&stream, "to", Format::Stream) },
        Kind::Misuse,
        "stream is a stream image, and not libvirt-raw",
    );
    for format in Format::ALL {
        check(
            &with("<domain/>", to(&stream, "to", format)),
            Kind::Misuse,
            "only an image of libvirt begins with a description of the domain",
        );
    }
    let password = "root:x:0:0:root:/root:/bin/bash\n";
    check(&with(password, to(&stream, "to", raw)), Kind::Misuse, "the description of the domain is no XML");
    check(&with("<network/>", to(&stream, "to", raw)), Kind::Misuse, "is a <network>, and not a <domain>");
    std::fs::remove_file(at("raw")).unwrap();
    assert_eq!(std::fs::read(at("there")).unwrap(), b"mine");
    assert_eq!(others(directory.path(), &["mapped", "stream", "there", "fifo"]), Vec::<PathBuf>::new());
}

#[test]
fn a_cancelled_conversion_leaves_nothing() {
    let directory = directory();
    let (image, to) = (directory.path().join("image"), directory.path().join("to"));
    let guest = small_guest();
    let cancel = Cancel::new().unwrap();
    cancel.cancel();
    for write in
        [Guest::write_mapped_ram as fn(&Guest, &Path, u64), |guest, path, _| guest.write_stream(path, &[])]
    {
        write(&guest, &image, 0);
        for format in Format::ALL {
            let error = vmstate::convert(&settings(&image, &to, format), &cancel, &Unobserved).unwrap_err();
            assert_eq!(error.kind(), Kind::Interrupted, "{}", error.chain());
            assert_eq!(others(directory.path(), &["image"]), Vec::<PathBuf>::new());
        }
    }
}
