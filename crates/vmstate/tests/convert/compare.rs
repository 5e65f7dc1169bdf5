//! What differs is told, whatever the formats, and what does not count is not.

use std::path::{Path, PathBuf};

use vmstate::job::{MapKind, MapRun, MapSettings, MapVisitor, MappedImage, map, map_changes};
use vmstate::source::Format;
use vmstate::{Cancel, CompareSettings, Compared, Comparison, ConvertSettings, Kind, Unobserved};

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
    run(&ConvertSettings { domain_xml: Some("<domain/>\n".into()), ..settings(&plain, to, format) }).unwrap();
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
    };
    let other = Guest {
        is_described: true,
        blocks: vec![("b".into(), vec![Page::Zero; 3]), ("c".into(), vec![Page::Data(1)])],
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
