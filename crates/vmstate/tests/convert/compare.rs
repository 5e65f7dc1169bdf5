//! What differs is told, whatever the formats, and what does not count is not.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmstate::job::{MapKind, MapRun, MapSettings, MapVisitor, MappedImage, TextDifference, map, map_changes};
use vmstate::libvirt::PayloadFormat;
use vmstate::source::Format;
use vmstate::{Cancel, CompareSettings, Compared, Comparison, ConvertSettings, Kind, Unobserved};

use wire::libvirt::Head;

use super::images::{Guest, PAGE, Page};
use super::{convert, directory, run, settings};

fn compare(settings: &CompareSettings) -> Comparison {
    vmstate::compare(settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{}", error.chain()))
}

fn guest() -> Guest {
    let mut pages = vec![Page::Absent; 1000];
    for (at, page) in [(0, Page::Data(1)), (1, Page::Zero), (2, Page::Blank), (700, Page::Data(2))] {
        pages[at] = page;
    }
    Guest {
        is_described: true,
        blocks: vec![("pc.ram".into(), pages), ("rom".into(), vec![Page::Data(3); 3])],
        ..Guest::default()
    }
}

#[test]
fn the_same_guest_is_the_same_in_every_format() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let guest = guest();
    guest.write_mapped_ram(&at("mapped"), 0);
    guest.write_mapped_ram(&at("moved"), 0x3000);
    // The first page was another one when it was sent first.
    guest.write_stream(&at("stream"), &[(0, 0, Page::Data(9)), (0, 5, Page::Data(8))]);
    convert(&at("stream"), &at("converted"), Format::MappedRam);
    let all = [("mapped", 0), ("moved", 0x3000), ("stream", 0), ("converted", 0)];
    for (one, start) in all {
        for (other, other_start) in all {
            let found = compare(&CompareSettings::new(
                Compared { offset: start, ..Compared::new(at(one)) },
                Compared { offset: other_start, ..Compared::new(at(other)) },
            ));
            assert!(found.same, "{one} and {other}: {found:?}");
            // Pages that either has as bytes, in whole.
            assert!(found.compared_bytes >= 5 * PAGE as u64, "{one} and {other}");
        }
    }
}

/// The guest as an image of libvirt of a format.
fn write_libvirt(guest: &Guest, to: &Path, format: Format) {
    let plain = to.with_extension("plain");
    guest.write_stream(&plain, &[]);
    let settings = ConvertSettings { overwrite: true, ..settings(&plain, to, format) };
    run(&ConvertSettings { domain_xml: Some("<domain/>\n".into()), ..settings }).unwrap();
}

#[derive(Default)]
struct Seen(Vec<(String, u64, u64, MapKind)>);

impl MapVisitor for Seen {
    fn block(&mut self, block: &page::RamBlock) {
        self.0.push((block.name.clone(), 0, 0, MapKind::Hole));
    }

    fn run(&mut self, run: &MapRun<'_>) {
        let (start, end) = (run.range.start.0, run.range.end.0);
        match self.0.last_mut() {
            Some(last) if last.3 == run.kind && last.2 == start => last.2 = end,
            Some(last) => {
                let name = last.0.clone();
                self.0.push((name, start, end, run.kind));
            }
            None => panic!("a run before its block"),
        }
    }
}

#[test]
fn images_of_libvirt_are_compared_and_mapped_whether_compressed_or_not() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let (one, mut other) = (guest(), guest());
    other.blocks[0].1[700] = Page::Data(40);
    one.write_stream(&at("stream"), &[]);
    let seen = |path: &Path| {
        let (mut seen, mut placed) = (Seen::default(), Seen::default());
        let image = MappedImage::open(path, 0).unwrap();
        map(&image, MapSettings { offset: 0, scan: true }, &mut seen).unwrap();
        map_changes(&MappedImage::open(&at("stream"), 0).unwrap(), &image, &mut placed).unwrap();
        (seen.0.into_iter().filter(|run| run.3 == MapKind::Data).collect::<Vec<_>>(), placed.0)
    };
    let expected = seen(&at("stream")).0;
    assert!(expected.contains(&("pc.ram".into(), 700, 701, MapKind::Data)), "{expected:?}");
    for format in Format::LIBVIRT {
        let (same, changed) =
            (at(&format!("{}-same", format.name())), at(&format!("{}-other", format.name())));
        write_libvirt(&one, &same, format);
        write_libvirt(&other, &changed, format);
        for (image, is_same) in [(&same, true), (&changed, false)] {
            for sides in [[&at("stream"), image], [image, &at("stream")], [&same, image]] {
                let [one, other] = sides.map(Compared::new);
                let found = compare(&CompareSettings::new(one, other));
                let pages = u64::from(!is_same);
                assert_eq!((found.same, found.pages_different), (is_same, pages), "{sides:?}");
                let ranges: Vec<_> = found.blocks.iter().flat_map(|block| &block.ranges).collect();
                let page = PAGE as u64;
                let expected = [[700 * page, 701 * page]];
                assert!(
                    ranges.iter().copied().eq(expected.iter().filter(|_| !is_same)),
                    "{sides:?} {ranges:?}"
                );
            }
            let (kinds, changes) = seen(image);
            // Which of the other pages are sent as zero is up to the format.
            assert_eq!(kinds, expected, "{}", image.display());
            let changes: Vec<_> = changes.iter().filter(|change| change.3 == MapKind::Changed).collect();
            assert_eq!(changes.len(), usize::from(!is_same), "{} {changes:?}", image.display());
        }
    }
}

#[test]
fn pages_that_differ_are_told_by_range_and_first_byte() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let one = guest();
    let mut other = guest();
    // Ends that touch across windows, one that is only in the other, one that is zero in the other.
    for page in [254, 255, 256, 700] {
        other.blocks[0].1[page] = Page::Data(40);
    }
    other.blocks[0].1[0] = Page::Absent;
    other.blocks[1].1[1] = Page::Data(4);
    one.write_mapped_ram(&at("one"), 0);
    other.write_stream(&at("other"), &[]);
    let mut settings = CompareSettings::new(Compared::new(at("one")), Compared::new(at("other")));
    let found = compare(&settings);
    assert!(!found.same && found.sections.is_empty() && found.machine.is_empty(), "{found:?}");
    assert_eq!(found.formats, ["mapped-ram", "stream"]);
    let page = PAGE as u64;
    let ram = &found.blocks[0];
    assert_eq!((ram.name.as_str(), ram.pages, ram.first), ("pc.ram", 5, Some(0)));
    assert_eq!(ram.ranges, [[0, page], [254 * page, 257 * page], [700 * page, 701 * page]]);
    let rom = &found.blocks[1];
    let differing =
        (0..PAGE).find(|i| Page::Data(3).bytes()[*i] != Page::Data(4).bytes()[*i]).unwrap() as u64;
    assert_eq!((rom.pages, rom.first, rom.ranges.len()), (1, Some(page + differing), 1));
    assert_eq!(found.pages_different, 6);

    settings.ignore = vec!["rom".into()];
    assert_eq!(compare(&settings).blocks.len(), 1);
    settings.ignore.push("pc.ram".into());
    assert!(compare(&settings).same);
    settings.ignore.clear();
    settings.ram = false;
    assert!(compare(&settings).same, "the devices are the same");
}

#[test]
fn blocks_that_only_one_has_or_of_other_lengths_differ() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let one = Guest {
        is_described: true,
        blocks: vec![("a".into(), vec![Page::Data(1); 4]), ("b".into(), vec![Page::Zero; 2])],
        ..Guest::default()
    };
    let other = Guest {
        is_described: true,
        blocks: vec![("b".into(), vec![Page::Zero; 3]), ("c".into(), vec![Page::Data(1)])],
        ..Guest::default()
    };
    one.write_mapped_ram(&at("one"), 0);
    other.write_mapped_ram(&at("other"), 0);
    let found = compare(&CompareSettings::new(Compared::new(at("one")), Compared::new(at("other"))));
    let page = PAGE as u64;
    let told: Vec<_> = found.blocks.iter().map(|block| (block.name.as_str(), block.bytes)).collect();
    let expected =
        [("a", [Some(4 * page), None]), ("b", [Some(2 * page), Some(3 * page)]), ("c", [None, Some(page)])];
    assert_eq!(told, expected);
}

#[test]
fn device_sections_that_differ_are_told_by_field() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    guest().write_mapped_ram(&at("one"), 0);
    let mut bytes = std::fs::read(at("one")).unwrap();
    // The payload of the first section: one byte, then two.
    let head = b"\x05timer\0\0\0\0\0\0\0\x02";
    let payload = bytes.windows(head.len()).position(|window| window == head).unwrap() + head.len();
    assert_eq!(bytes[payload..payload + 3], [1, 2, 3]);
    bytes[payload + 2] = 0x2a;
    std::fs::write(at("other"), &bytes).unwrap();
    let mut settings = CompareSettings::new(Compared::new(at("one")), Compared::new(at("other")));
    let found = compare(&settings);
    assert!(!found.same && found.blocks.is_empty(), "{found:?}");
    let [section] = &found.sections[..] else { panic!("{found:?}") };
    assert_eq!((section.name.as_str(), section.first, section.more_fields), ("timer", Some(2), 0));
    let fields: Vec<_> =
        section.fields.iter().map(|f| (f.name.as_str(), f.one.clone(), f.other.clone())).collect();
    assert_eq!(fields, [("rest", Some("0203".into()), Some("022a".into()))]);
    settings.ignore = vec!["timer".into()];
    assert!(compare(&settings).same);
}

/// The offset of the word of libvirt's head that says whether the guest ran.
const WAS_RUNNING_AT: u64 = 24;

/// As libvirt saves a guest: it stops it first, so that QEMU records `paused`, and says in its head how it was.
fn write_as_libvirt(guest: &Guest, to: &Path, format: Format, was_running: bool) {
    write_libvirt(&Guest { run_state: Some("paused"), ..guest.clone() }, to, format);
    let file = File::options().write(true).open(to).unwrap();
    file.write_all_at(&[u8::from(was_running)], WAS_RUNNING_AT).unwrap();
}

#[test]
fn the_run_state_of_an_image_of_libvirt_is_the_one_in_its_head() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let guest = guest();
    for state in ["running", "paused"] {
        Guest { run_state: Some(state), ..guest.clone() }.write_stream(&at(state), &[]);
    }
    for format in Format::LIBVIRT {
        let (ran, stopped) = (at("ran"), at("stopped"));
        write_as_libvirt(&guest, &ran, format, true);
        write_as_libvirt(&guest, &stopped, format, false);
        for (one, other, is_same) in [
            (&ran, &at("running"), true),
            (&at("running"), &ran, true),
            (&stopped, &at("paused"), true),
            (&ran, &at("paused"), false),
            (&at("running"), &stopped, false),
            (&ran, &stopped, false),
        ] {
            let found = compare(&CompareSettings::new(Compared::new(one), Compared::new(other)));
            let what = format!("{}: {} and {}", format.name(), one.display(), other.display());
            assert_eq!(found.same, is_same, "{what}: {found:?}");
            let sections: Vec<_> = found.sections.iter().map(|section| section.name.as_str()).collect();
            assert!(is_same || sections == ["globalstate"], "{what}: {found:?}");
        }
        // What QEMU recorded of a guest that ran in truth, which only its head says to be paused.
        let plain = at("plain");
        write_libvirt(&Guest { run_state: Some("running"), ..guest.clone() }, &stopped, format);
        File::options().write(true).open(&stopped).unwrap().write_all_at(&[0], WAS_RUNNING_AT).unwrap();
        run(&ConvertSettings { overwrite: true, ..settings(&stopped, &plain, Format::Stream) }).unwrap();
        for image in [&stopped, &plain] {
            let state = vmstate::info(image).unwrap().run_state;
            assert_eq!(state.as_deref(), Some("paused"), "{}: {}", format.name(), image.display());
        }
    }
}

#[test]
fn a_conversion_compares_equal_and_leaves_the_device_state_to_a_head_of_libvirts() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let guest = guest();
    let paused = Guest { run_state: Some("paused"), ..guest.clone() }.tail();
    for from in Format::LIBVIRT {
        for was_running in [true, false] {
            let (image, to) = (at("image"), at("to"));
            write_as_libvirt(&guest, &image, from, was_running);
            for format in Format::ALL.into_iter().chain(Format::LIBVIRT) {
                run(&ConvertSettings { overwrite: true, ..settings(&image, &to, format) }).unwrap();
                let what = format!("{} to {}, {was_running}", from.name(), format.name());
                for [one, other] in [[&image, &to], [&to, &image]] {
                    let found = compare(&CompareSettings::new(Compared::new(one), Compared::new(other)));
                    assert!(found.same, "{what}: {found:?}");
                }
                let state = if was_running { "running" } else { "paused" };
                assert_eq!(vmstate::info(&to).unwrap().run_state.as_deref(), Some(state), "{what}");
                // What is compressed is looked at by way of another head.
                let bytes = match format {
                    Format::Libvirt(payload) if payload.is_compressed() => {
                        let raw = Format::Libvirt(PayloadFormat::Raw);
                        run(&ConvertSettings { overwrite: true, ..settings(&to, &at("raw"), raw) }).unwrap();
                        std::fs::read(at("raw")).unwrap()
                    }
                    _ => std::fs::read(&to).unwrap(),
                };
                let is_kept = bytes.ends_with(&paused);
                assert_eq!(is_kept, !was_running || matches!(format, Format::Libvirt(_)), "{what}");
            }
        }
    }
}

#[test]
fn what_libvirts_heads_say_of_the_domain_is_compared() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let stream = guest().stream(&[]);
    let write = |name: &str, xml: &str, cookie: Option<&str>| {
        let head = Head::new(PayloadFormat::Raw, true, xml.to_owned(), cookie.map(str::to_owned)).unwrap();
        let mut bytes = Vec::new();
        head.encode(&mut bytes);
        bytes.extend(&stream);
        std::fs::write(at(name), bytes).unwrap();
    };
    write("one", "<domain/>\n", Some("<cookie/>"));
    write("again", "<domain/>\n", Some("<cookie/>"));
    write("other", "<domain id='1'/>\n", Some("<cookie/>"));
    write("without", "<domain/>\n", None);
    std::fs::write(at("plain"), &stream).unwrap();
    let text = |name, bytes, first| TextDifference { name, bytes, first };
    for (other, expected) in [
        ("again", vec![]),
        ("other", vec![text("XML", [Some(10), Some(17)], Some(7))]),
        ("without", vec![text("cookie", [Some(9), None], None)]),
        // An image of QEMU's own says nothing of a domain.
        ("plain", vec![]),
    ] {
        let mut settings = CompareSettings::new(Compared::new(at("one")), Compared::new(at(other)));
        let found = compare(&settings);
        assert_eq!((found.same, &found.domain), (expected.is_empty(), &expected), "{other}");
        settings.ignore = vec!["XML".into(), "cookie".into()];
        assert!(compare(&settings).same, "{other}");
        let parts = [(true, false), (false, true)];
        for (ram, devices) in parts {
            let settings = CompareSettings { ram, devices, ignore: Vec::new(), ..settings.clone() };
            assert!(compare(&settings).same, "{other}: {ram} {devices}");
        }
    }
}

#[test]
fn one_description_serves_both_images() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    guest().write_mapped_ram(&at("described"), 0);
    Guest { is_opaque: true, ..guest() }.write_mapped_ram(&at("opaque"), 0);
    // Another byte of the payload of the first section; another version of it.
    let head = b"\x05timer\0\0\0\0\0\0\0\x02";
    for (name, offset, byte) in [("changed", head.len() + 2, 0x2a), ("versioned", head.len() - 1, 3)] {
        let mut bytes = std::fs::read(at("opaque")).unwrap();
        let place = bytes.windows(head.len()).position(|window| window == head).unwrap();
        bytes[place + offset] = byte;
        std::fs::write(at(name), &bytes).unwrap();
    }
    let (was, is) = (Some("0203".to_owned()), Some("022a".to_owned()));
    let field = |one: &Option<String>, other: &Option<String>| {
        vec![("rest".to_owned(), one.clone(), other.clone(), true)]
    };
    for (one, other, expected) in [
        ("described", "changed", field(&was, &is)),
        ("changed", "described", field(&is, &was)),
        // Nobody tells: neither describes itself, or the one that does has another version.
        ("opaque", "changed", vec![]),
        ("described", "versioned", vec![]),
    ] {
        let found = compare(&CompareSettings::new(Compared::new(at(one)), Compared::new(at(other))));
        let [section] = &found.sections[..] else { panic!("{one} {other}: {found:?}") };
        assert_eq!(section.name, "timer");
        let fields = section.fields.iter();
        let fields: Vec<_> =
            fields.map(|f| (f.name.clone(), f.one.clone(), f.other.clone(), f.is_bytes)).collect();
        assert_eq!(fields, expected, "{one} {other}");
    }
}

#[test]
fn a_pipe_is_not_compared_and_damage_is_an_error() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    guest().write_mapped_ram(&at("one"), 0);
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    let stream = guest().stream(&[]);
    std::fs::write(at("cut"), &stream[..stream.len() / 2]).unwrap();
    for (other, kind, words) in [
        ("fifo", Kind::Misuse, "a pipe is read once"),
        ("cut", Kind::Damaged, "ends before the RAM section does"),
    ] {
        let error = vmstate::compare_files(&at("one"), &at(other), &Cancel::new().unwrap()).expect_err(words);
        assert_eq!((error.kind(), error.chain().contains(words)), (kind, true), "{}", error.chain());
    }
}
