//! Images become others of every format and say the same: guests out of nothing, there and back.

mod compare;
mod images;
mod refused;

use std::path::{Path, PathBuf};

use images::{Content, Guest, Page, read_mapped_ram, read_stream};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use vmstate::source::Format;
use vmstate::{Cancel, ConvertReport, ConvertSettings, DirectIo, Unobserved};

/// A directory on a disk: a temporary file system has no direct I/O.
pub fn directory() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

/// Converts, watched by nobody.
pub fn run(settings: &ConvertSettings) -> vmstate::Result<ConvertReport> {
    vmstate::convert(settings, &Cancel::new().unwrap(), &Unobserved)
}

/// Settings that do not wait for the disk: nothing here outlives the test.
pub fn settings(from: &Path, to: &Path, format: Format) -> ConvertSettings {
    ConvertSettings { sync: false, ..ConvertSettings::new(from, to, format) }
}

fn convert(from: &Path, to: &Path, format: Format) -> ConvertReport {
    run(&settings(from, to, format)).unwrap_or_else(|error| panic!("{}", error.chain()))
}

fn read(path: &Path, format: Format) -> Content {
    match format {
        Format::MappedRam => read_mapped_ram(path, 0),
        Format::Stream => read_stream(path),
        Format::Libvirt(_) => panic!("{format:?} is none of QEMU's own"),
    }
}

/// Runs of pages that are alike, as memory has them.
fn pages() -> impl Strategy<Value = Vec<Page>> {
    let kind = prop_oneof![
        3 => Just(Page::Absent),
        1 => Just(Page::Zero),
        1 => Just(Page::Blank),
        4 => any::<u8>().prop_map(Page::Data),
    ];
    let runs = vec((kind, prop_oneof![1..4usize, 1..300usize, Just(256)]), 1..8);
    runs.prop_map(|runs| {
        runs.into_iter().flat_map(|(page, count)| std::iter::repeat_n(page, count)).collect()
    })
}

fn guest() -> impl Strategy<Value = Guest> {
    // The last block is one of those too large to have their absent pages sent.
    let large = prop_oneof![4 => Just(0), 1 => Just(5000usize)];
    (vec(pages(), 1..5), large, any::<bool>()).prop_map(|(mut blocks, absent, is_described)| {
        if let Some(last) = blocks.last_mut() {
            last.splice(0..0, std::iter::repeat_n(Page::Absent, absent));
        }
        let named = blocks.into_iter().enumerate().map(|(i, pages)| (format!("block.{i}"), pages));
        Guest { is_described, blocks: named.collect(), ..Guest::default() }
    })
}

/// What was sent of pages before they were sent again, as a live save does it.
fn earlier() -> impl Strategy<Value = Vec<(u16, u16, Page)>> {
    let page = prop_oneof![Just(Page::Zero), any::<u8>().prop_map(Page::Data)];
    vec((any::<u16>(), any::<u16>(), page), 0..200)
}

/// How many guests there are: each is converted a dozen times, and back.
fn cases() -> u32 {
    if std::env::var_os("VMSTATE_TEST_FULL").is_some() { 256 } else { 16 }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    #[test]
    fn there_and_back_is_the_same_content(
        guest in guest(),
        earlier in earlier(),
        channels in 1..4u16,
        direct in prop_oneof![Just(DirectIo::Auto), Just(DirectIo::Off)],
        libvirts in select(Format::LIBVIRT.as_slice()),
        start in prop_oneof![Just(0), (0..64u64).prop_map(|pages| pages * 4096), 0..1u64 << 18],
    ) {
        let directory = directory();
        let at = |name: &str| -> PathBuf { directory.path().join(name) };
        let before: Vec<_> = earlier.iter().map(|(block, page, was)| {
            let block = usize::from(*block) % guest.blocks.len();
            (block, usize::from(*page) % guest.blocks[block].1.len(), *was)
        }).collect();
        guest.write_mapped_ram(&at("mapped"), 0);
        guest.write_stream(&at("stream"), &before);
        let expected = Content::of(&guest);
        prop_assert_eq!(&read_mapped_ram(&at("mapped"), 0), &expected, "the generator");
        prop_assert_eq!(&read_stream(&at("stream")), &expected, "the generator");
        for source in ["mapped", "stream"] {
            let (one, other) = (at("one"), at("other"));
            let with = |from: &Path, to: &Path, format| ConvertSettings {
                channels: Some(channels),
                direct_io: direct,
                overwrite: true,
                // An image of QEMU's own has no place for it.
                domain_xml: matches!(format, Format::Libvirt(_)).then(|| "<domain/>\n".to_owned()),
                ..settings(from, to, format)
            };
            for there in Format::ALL.into_iter().chain([libvirts]) {
                run(&with(&at(source), &one, there)).unwrap();
                if there != libvirts {
                    prop_assert_eq!(&read(&one, there), &expected, "{} to {:?}", source, there);
                }
                for back in Format::ALL {
                    run(&with(&one, &other, back)).unwrap();
                    prop_assert_eq!(&read(&other, back), &expected, "{} to {:?} to {:?}", source, there, back);
                }
            }
            let mapped = Format::MappedRam;
            std::fs::write(&one, vec![7; start as usize]).unwrap();
            run(&ConvertSettings { to_offset: Some(start), ..with(&at(source), &one, mapped) }).unwrap();
            prop_assert_eq!(&read_mapped_ram(&one, start), &expected, "{} to {:#x}", source, start);
            for back in Format::ALL {
                run(&ConvertSettings { from_offset: start, ..with(&one, &other, back) }).unwrap();
                prop_assert_eq!(&read(&other, back), &expected, "{} from {:#x}", source, start);
            }
        }
    }
}

fn sparse_guest() -> Guest {
    let mut large = vec![Page::Absent; 20_000];
    large[3] = Page::Data(1);
    large[4] = Page::Zero;
    large[5] = Page::Blank;
    large[19_999] = Page::Data(2);
    let small = vec![Page::Zero, Page::Data(3), Page::Absent];
    Guest {
        is_described: true,
        blocks: vec![("large".into(), large), ("small".into(), small)],
        ..Guest::default()
    }
}

#[test]
fn holes_stay_holes() {
    use std::os::unix::fs::MetadataExt;
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let guest = sparse_guest();
    guest.write_mapped_ram(&at("mapped"), 0);
    guest.write_stream(&at("stream"), &[]);
    for (from, to, marks) in [
        // A mark over a hole is kept. What a stream sends as zero is marked in a small block only.
        ("mapped", Format::MappedRam, [vec![3, 4, 5, 19_999], vec![0, 1]]),
        ("stream", Format::MappedRam, [vec![3, 19_999], vec![0, 1]]),
    ] {
        convert(&at(from), &at(&format!("from-{from}")), to);
        let image = at(&format!("from-{from}"));
        assert_eq!(images::marked(&image, 0), marks[0], "{from}");
        assert_eq!(images::marked(&image, 1), marks[1], "{from}");
        let on_disk = std::fs::metadata(&image).unwrap().blocks() * 512;
        // Four pages at the most, and what holds headers, bitmaps and device state.
        assert!(on_disk <= 128 << 10, "{from}: {on_disk} bytes on the disk");
    }
    let report = convert(&at("mapped"), &at("as-stream"), Format::Stream);
    assert_eq!(report.data_bytes, 4 * images::PAGE as u64, "a blank page is read to be known");
    assert_eq!(report.zero_bytes, 2 * images::PAGE as u64);
    assert!(std::fs::metadata(at("as-stream")).unwrap().len() < 64 << 10);
}

#[test]
fn an_image_moves_inside_its_file_and_its_offsets_with_it() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let guest = sparse_guest();
    let expected = Content::of(&guest);
    for (from, to) in [(0, 4096), (4096, 0), (0x12345, 1 << 20), (1 << 20, 512)] {
        let (image, moved) = (at("image"), at("moved"));
        guest.write_mapped_ram(&image, from);
        std::fs::write(&moved, vec![7; to as usize]).unwrap();
        let settings = ConvertSettings {
            from_offset: from,
            to_offset: Some(to),
            ..settings(&image, &moved, Format::MappedRam)
        };
        let report = run(&settings).unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(report.from_format, Format::MappedRam);
        assert_eq!(read_mapped_ram(&moved, to), expected, "{from:#x} to {to:#x}");
        assert!(std::fs::read(&moved).unwrap()[..to as usize].iter().all(|byte| *byte == 7));
        std::fs::remove_file(&moved).unwrap();
    }
}

#[test]
fn an_image_moves_behind_itself_and_not_over_itself() {
    let directory = directory();
    let disk = directory.path().join("disk");
    let guest = sparse_guest();
    for from in [0, 0x12345, 1 << 20] {
        guest.write_mapped_ram(&disk, from);
        let end = std::fs::metadata(&disk).unwrap().len();
        let before = std::fs::read(&disk).unwrap();
        let to = |offset: u64| ConvertSettings {
            from_offset: from,
            to_offset: Some(offset),
            overwrite: true,
            ..settings(&disk, &disk, Format::MappedRam)
        };
        for offset in [0, from, from + 4096, end - 1] {
            let error = run(&to(offset)).unwrap_err();
            let clause = format!(
                "{} would be written over while it is read: from {offset:#x} on, and it is read up to {end:#x}",
                disk.display()
            );
            assert_eq!((error.kind(), error.chain()), (vmstate::Kind::Misuse, clause));
            let hint = format!("give an --offset of {end:#x} or more, or convert into another file");
            assert_eq!(error.hint_text(), Some(hint.as_str()));
            assert!(std::fs::read(&disk).unwrap() == before, "a refusal changes nothing");
        }
        // At once behind it, somewhere behind it, and over what was moved there.
        for offset in [end, end + 0x1_0203, end + 4096] {
            run(&to(offset)).unwrap_or_else(|error| panic!("{offset:#x}: {}", error.chain()));
            assert!(std::fs::read(&disk).unwrap()[..end as usize] == before, "{offset:#x}");
            assert_eq!(read_mapped_ram(&disk, offset), Content::of(&guest), "{from:#x} to {offset:#x}");
            for start in [from, offset] {
                let check = vmstate::check_at(&disk, start).unwrap();
                assert_eq!(check.report.faults, [], "{start:#x}");
            }
        }
        std::fs::remove_file(&disk).unwrap();
    }
    // Where a stream ends is known when it was read.
    guest.write_stream(&disk, &[]);
    let len = std::fs::metadata(&disk).unwrap().len();
    let settings = ConvertSettings { to_offset: Some(len), ..settings(&disk, &disk, Format::MappedRam) };
    let error = run(&settings).unwrap_err();
    let clause = format!("{} would be written over while it is read", disk.display());
    assert_eq!((error.kind(), error.chain()), (vmstate::Kind::Misuse, clause));
}

#[test]
fn a_file_may_be_replaced_by_its_own_conversion() {
    let directory = directory();
    let image = directory.path().join("image");
    let guest = sparse_guest();
    guest.write_mapped_ram(&image, 0);
    for format in [Format::Stream, Format::MappedRam] {
        run(&ConvertSettings { overwrite: true, ..settings(&image, &image, format) }).unwrap();
        assert_eq!(read(&image, format), Content::of(&guest));
    }
}

#[test]
fn a_pipe_is_read_no_further_than_its_stream_goes() {
    use std::io::Write;
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let guest = sparse_guest();
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    // All that there is, and more than anyone could read.
    for (behind, times) in [(vec![0; 5000], 1), (vec![0xff; 5000], 1), (vec![0xff; 1 << 20], usize::MAX)] {
        let (fifo, stream) = (at("fifo"), guest.stream(&[]));
        let writer = std::thread::spawn(move || {
            let mut pipe = std::fs::File::options().write(true).open(fifo).unwrap();
            pipe.write_all(&stream).unwrap();
            (0..times).take_while(|_| pipe.write_all(&behind).is_ok()).count()
        });
        run(&ConvertSettings { overwrite: true, ..settings(&at("fifo"), &at("to"), Format::MappedRam) })
            .unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(read_mapped_ram(&at("to"), 0), Content::of(&guest));
        assert!(writer.join().unwrap() < 100, "the writer is told that nobody reads on");
    }
}

#[test]
fn streams_go_through_pipes() {
    let directory = directory();
    let at = |name: &str| -> PathBuf { directory.path().join(name) };
    let guest = sparse_guest();
    guest.write_mapped_ram(&at("mapped"), 0);
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    let (from, fifo) = (at("mapped"), at("fifo"));
    let writer = std::thread::spawn(move || convert(&from, &fifo, Format::Stream));
    let report = convert(&at("fifo"), &at("again"), Format::MappedRam);
    assert_eq!(writer.join().unwrap().to_format, Format::Stream);
    assert_eq!(report.from_format, Format::Stream);
    assert_eq!(read_mapped_ram(&at("again"), 0), Content::of(&guest));
}
