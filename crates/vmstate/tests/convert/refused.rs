//! What is damaged, does not fit or is cancelled gives an error, and leaves no image behind.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmstate::libvirt::PayloadFormat;
use vmstate::source::{Format, Payload};
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

/// An XML for an image that needs one: QEMU's own have no place for it.
fn xml_for(format: Format) -> Option<String> {
    matches!(format, Format::Libvirt(_)).then(|| "<domain/>\n".to_owned())
}

/// The guest as an image of every format, each by its name.
fn images_of(guest: &Guest, directory: &Path) -> Vec<(Format, Vec<u8>)> {
    let (plain, image) = (directory.join("plain"), directory.join("made"));
    guest.write_stream(&plain, &[]);
    let mut images = Vec::new();
    for format in Format::LIBVIRT {
        let settings = ConvertSettings { domain_xml: xml_for(format), ..quick(&plain, &image, format) };
        run(&settings).unwrap_or_else(|error| panic!("{}: {}", format.name(), error.chain()));
        images.push((format, std::fs::read(&image).unwrap()));
        std::fs::remove_file(&image).unwrap();
    }
    guest.write_mapped_ram(&image, 0);
    images.push((Format::MappedRam, std::fs::read(&image).unwrap()));
    images.push((Format::Stream, guest.stream(&[])));
    std::fs::remove_file(&image).unwrap();
    std::fs::remove_file(&plain).unwrap();
    images
}

/// Where QEMU's bytes begin, or what they were compressed to.
fn payload_at(image: &Path) -> usize {
    Payload::of(&File::open(image).unwrap(), image, 0).unwrap().at as usize
}

/// What an image is made into, `i` being the number of a damage: of QEMU's own both of theirs, and every format in
/// turn.
fn targets(from: Format, i: usize) -> Vec<Format> {
    let all: Vec<Format> = Format::ALL.into_iter().chain(Format::LIBVIRT).collect();
    match from {
        Format::Libvirt(_) => vec![all[i % all.len()]],
        _ => Format::ALL.into_iter().chain([all[i % all.len()]]).collect(),
    }
}

/// The memory in an image, which is gone then.
fn take_memory(path: &Path, format: Format) -> Vec<Vec<u8>> {
    let memory = match format {
        Format::MappedRam => read_mapped_ram(path, 0).memory,
        Format::Stream => read_stream(path).memory,
        Format::Libvirt(_) => {
            let plain = path.with_extension("read");
            run(&quick(path, &plain, Format::MappedRam)).unwrap_or_else(|error| panic!("{}", error.chain()));
            take_memory(&plain, Format::MappedRam)
        }
    };
    std::fs::remove_file(path).unwrap();
    memory
}

#[test]
fn an_image_that_ends_early_is_refused_wherever_it_ends() {
    let directory = directory();
    let (image, to) = (directory.path().join("image"), directory.path().join("to"));
    let guest = small_guest();
    for (from, whole) in images_of(&guest, directory.path()) {
        // Every place in the metadata at both ends, and some between.
        std::fs::write(&image, &whole).unwrap();
        let payload = payload_at(&image);
        let places = (0..400).chain((400..whole.len()).step_by(99_991));
        let places = places.chain(payload..payload + 400).chain(whole.len() - 400..whole.len());
        let file = File::options().write(true).open(&image).unwrap();
        // From behind, so that each is a part of the one before.
        for len in places.filter(|at| *at < whole.len()).collect::<BTreeSet<_>>().into_iter().rev() {
            file.set_len(len as u64).unwrap();
            for format in targets(from, len) {
                let what = format!("{} cut to {len:#x}, to {}", from.name(), format.name());
                match run(&ConvertSettings { domain_xml: xml_for(format), ..quick(&image, &to, format) }) {
                    Err(error) => {
                        let kind = error.kind();
                        assert!(
                            matches!(kind, Kind::Damaged | Kind::Unsupported),
                            "{what}: {kind:?} {}",
                            error.chain()
                        );
                        assert_eq!(others(directory.path(), &["image"]), Vec::<PathBuf>::new(), "{what}");
                    }
                    // Where only the description lacks, which not every QEMU writes, it is an image still.
                    Ok(_) => assert_eq!(take_memory(&to, format), guest.memory(), "{what}"),
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
    for (from, whole) in images_of(&guest, directory.path()) {
        let mut refused = 0;
        std::fs::write(&image, &whole).unwrap();
        let file = File::options().write(true).open(&image).unwrap();
        let payload = payload_at(&image);
        let places =
            (0..300).chain(payload..payload + 300).chain(whole.len().saturating_sub(1100)..whole.len());
        let places: BTreeSet<_> = places.filter(|at| *at < whole.len()).collect();
        for (i, at) in places.into_iter().enumerate() {
            let flip = [0x01, 0x80, 0xff][i % 3];
            file.write_all_at(&[whole[at] ^ flip], at as u64).unwrap();
            for format in targets(from, i) {
                if run(&ConvertSettings { domain_xml: xml_for(format), ..quick(&image, &to, format) })
                    .is_err()
                {
                    refused += 1;
                } else {
                    std::fs::remove_file(&to).unwrap();
                }
                assert_eq!(
                    others(directory.path(), &["image"]),
                    Vec::<PathBuf>::new(),
                    "{} {at:#x} to {}",
                    from.name(),
                    format.name()
                );
            }
            file.write_all_at(&[whole[at]], at as u64).unwrap();
        }
        assert!(refused > 200, "{}: only {refused} damages were refused", from.name());
    }
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
    let images = images_of(&guest, directory.path());
    let cancel = Cancel::new().unwrap();
    cancel.cancel();
    for (from, whole) in images {
        std::fs::write(&image, whole).unwrap();
        for format in Format::ALL.into_iter().chain(Format::LIBVIRT) {
            let settings = ConvertSettings { domain_xml: xml_for(format), ..settings(&image, &to, format) };
            let error = vmstate::convert(&settings, &cancel, &Unobserved).unwrap_err();
            let what = format!("{} to {}", from.name(), format.name());
            assert_eq!(error.kind(), Kind::Interrupted, "{what}: {}", error.chain());
            assert_eq!(others(directory.path(), &["image"]), Vec::<PathBuf>::new(), "{what}");
        }
    }
}
