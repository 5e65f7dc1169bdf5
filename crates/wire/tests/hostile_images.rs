//! What a crash or an enemy can have done to a mapped-ram image is refused, by name and offset.

mod golden;

use page::PageSize;
use wire::mapped_ram::format::{BITMAP_OFFSET_AT, PAGE_SIZE_AT, PAGES_OFFSET_AT, VERSION_AT};
use wire::mapped_ram::survey::{LayoutReport, LayoutSurvey, SurveyStep};
use wire::mapped_ram::{Header, ImagePlan, Sections, encode_tail};
use wire::qemu::format::*;
use wire::qemu::vmdesc::{self, VmDescription};
use wire::qemu::{BlockEntry, Command, Configuration, Item, Preamble, SectionHeader, SectionKind};
use wire::{FaultKind, FileRange, IdStr};

fn name(text: &str) -> IdStr {
    IdStr::new(text).unwrap()
}

/// An image of two blocks of 16 pages, `a` and `b`, and the places in it that the cases damage.
struct Image {
    file: Vec<u8>,
    header_a: usize,
    header_b: usize,
    length_a: usize,
    total: usize,
    tail: usize,
}

fn image() -> Image {
    let configuration = Configuration::new(name("pc")).with_capability(name("mapped-ram"));
    let block = |text| BlockEntry { name: name(text), used_length: 0x10000, page_size: None, address: None };
    let blocks = [block("a"), block("b")];
    let plan = ImagePlan::new(&configuration, &SectionHeader::ram(1), &blocks, PageSize::X86, 0).unwrap();
    let mut file = vec![0; plan.tail_offset as usize];
    for planned in &plan.blocks {
        let place = planned.metadata_at as usize;
        file[place..place + planned.metadata.len()].copy_from_slice(&planned.metadata);
    }
    let description = vmdesc::describe(Some(&configuration), 4096, &[], None);
    file.extend_from_slice(&encode_tail(1, Sections::default(), &description).unwrap());
    let header_a = plan.blocks[0].placement.header_at as usize;
    let header_b = plan.blocks[1].placement.header_at as usize;
    let tail = plan.tail_offset as usize;
    Image { file, header_a, header_b, length_a: header_a - 8, total: header_a - 18, tail }
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

fn survey(file: &[u8]) -> LayoutReport {
    let mut survey = LayoutSurvey::new(0, file.len() as u64);
    while let SurveyStep::Need { offset, len } = survey.step() {
        survey.supply(&file[offset as usize..][..len]);
    }
    survey.finish()
}

/// Damages an image, and expects this fault of a reading, and the same first of a survey.
fn check(damage: impl Fn(&mut Image), expected: &str) -> LayoutReport {
    let mut image = image();
    damage(&mut image);
    let fault = golden::layout(&image.file, 0).unwrap_err();
    assert_eq!(fault.to_string(), expected);
    let report = survey(&image.file);
    assert_eq!(report.report.faults.first(), Some(&fault));
    report
}

#[test]
fn the_undamaged_image_is_read() {
    let image = image();
    let layout = golden::layout(&image.file, 0).unwrap();
    assert_eq!(survey(&image.file).layout, Some(layout));
}

#[test]
fn lies_in_a_header_are_refused() {
    type Case = (usize, &'static [u8], &'static str);
    let cases: [Case; 11] = [
        (VERSION_AT, &[0, 0, 0, 2], "version 2 is not 1"),
        (PAGE_SIZE_AT, &[0; 8], "page size 0x0 is none"),
        (PAGE_SIZE_AT, &[0, 0, 0, 0, 0, 0, 0x18, 0], "page size 0x1800 is none"),
        (PAGE_SIZE_AT, &[0, 0, 0, 0, 0x80, 0, 0, 0], "page size 0x80000000 is none"),
        (PAGE_SIZE_AT, &[0, 0, 0, 0, 0, 2, 0, 0], "used length 0x10000 is no multiple of 0x20000"),
        (PAGES_OFFSET_AT, &[0, 0, 0, 0, 0, 0x10, 8, 0], "pages offset 0x100800 is not aligned to pages"),
        (PAGES_OFFSET_AT, &[0, 0, 0, 0, 0, 0x30, 0, 0], "pages offset 0x300000 lies outside the file"),
        (PAGES_OFFSET_AT, &[0x7f; 8], "pages offset 0x7f7f7f7f7f7f7f7f is not aligned to pages"),
        (PAGES_OFFSET_AT, &[0xff; 8], "pages offset 0xffffffffffffffff is not aligned to pages"),
        (
            BITMAP_OFFSET_AT,
            &[0, 0, 0, 0, 0, 0x32, 0x34, 0x56],
            "bitmap offset 0x323456 lies outside the file",
        ),
        (BITMAP_OFFSET_AT, &[0xff; 8], "bitmap offset 0xffffffffffffffff lies outside the file"),
    ];
    for (field, bytes, problem) in cases {
        let header = if field == VERSION_AT { "mapped-ram header" } else { "mapped-ram header of block `a`" };
        let expected = format!("{header} at 0x61: {problem}");
        check(|image| put(&mut image.file, image.header_a + field, bytes), &expected);
    }
}

#[test]
fn block_headers_must_agree_with_each_other_and_the_configuration() {
    check(
        |image| put(&mut image.file, image.header_b + PAGE_SIZE_AT, &0x2000u64.to_be_bytes()),
        "mapped-ram header of block `b` at 0x11000a: page size 0x2000 is not the image's 0x1000",
    );
    check(
        |image| put(&mut image.file, image.length_a, &0x10400u64.to_be_bytes()),
        "mapped-ram header of block `a` at 0x61: used length 0x10400 is no multiple of 0x1000",
    );
}

#[test]
fn sums_and_names_of_blocks_are_checked() {
    let word = |total: u64| (total | RAM_SAVE_FLAG_MEM_SIZE).to_be_bytes();
    check(
        |image| put(&mut image.file, image.total, &word(0x1f000)),
        "RAM block `b` at 0x110000: the blocks add up to 0x20000 bytes, the total is 0x1f000",
    );
    // One more block was announced than there are: the end mark of the setup reads as its name.
    check(
        |image| put(&mut image.file, image.total, &word(0x21000)),
        "RAM block name at 0x210000: is empty or not printable text",
    );
    check(|image| image.file[image.header_b - 9] = b'a', "RAM block `a` at 0x110000: is listed twice");
}

#[test]
fn regions_that_overlap_are_refused() {
    check(
        |image| put(&mut image.file, image.header_b + BITMAP_OFFSET_AT, &0x7du64.to_be_bytes()),
        "bitmap of block `b` at 0x7d: 0x7d..0x85 overlaps bitmap of block `a` at 0x7d..0x85",
    );
    check(
        |image| put(&mut image.file, image.header_b + BITMAP_OFFSET_AT, &0x100ff8u64.to_be_bytes()),
        "bitmap of block `b` at 0x100ff8: 0x100ff8..0x101000 overlaps pages of block `a` at 0x100000..0x110000",
    );
    check(
        |image| put(&mut image.file, image.header_b + BITMAP_OFFSET_AT, &0x20u64.to_be_bytes()),
        "bitmap of block `b` at 0x20: 0x20..0x28 overlaps stream at 0x0..0x7d",
    );
    // The device state would lie in the pages of the block before.
    check(
        |image| {
            let tail = image.file.split_off(image.tail);
            put(&mut image.file, image.header_b + PAGES_OFFSET_AT, &0xf8000u64.to_be_bytes());
            put(&mut image.file, 0x108000, &tail);
        },
        "pages of block `a` at 0x100000: 0x100000..0x110000 overlaps pages of block `b` at 0xf8000..0x108000",
    );
}

#[test]
fn records_of_pages_have_no_place() {
    for (word, kind, problem) in [
        (0x1008u64, FaultKind::Damaged, "0x1008 has no place in a mapped-ram image"),
        (0x1002, FaultKind::Damaged, "0x1002 has no place in a mapped-ram image"),
        (0x200, FaultKind::Damaged, "0x200 has no place in a mapped-ram image"),
        (0x40, FaultKind::Unsupported, "is a difference (xbzrle), which no image holds"),
        (0x80, FaultKind::Unsupported, "is RDMA's"),
        (0x100, FaultKind::Unsupported, "is a compressed page of QEMU before 9.1"),
        (0x1, FaultKind::Unsupported, "has a flag that is obsolete since 2009"),
        (0, FaultKind::Damaged, "0x0 has no known combination of flags"),
    ] {
        let report = check(
            |image| put(&mut image.file, image.tail, &word.to_be_bytes()),
            &format!("RAM record at 0x210000: {problem}"),
        );
        assert_eq!(report.report.faults[0].kind, kind, "{word:#x}");
        assert!(report.vmdesc_json.is_some(), "a survey finds the description all the same");
        assert_eq!(report.blocks.len(), 2);
    }
}

#[test]
fn a_save_that_was_cut_short_is_refused() {
    // Killed while pages were written: nothing stands behind them, or the file ends within them.
    check(
        |image| image.file.truncate(image.tail + 13),
        "section type at 0x21000d: the file ends at 0x21000d, 1 bytes too early",
    );
    check(
        |image| {
            image.file.truncate(image.tail + 13);
            image.file.resize(image.tail + 100, 0);
        },
        "RAM section at 0x21000d: never ends: the save was cut short and its bitmaps are empty",
    );
    check(
        |image| image.file.truncate(image.tail - 1),
        "mapped-ram header of block `b` at 0x11000a: pages offset 0x200000: its 0x10000 bytes go beyond the end of the file at 0x20ffff",
    );
    check(
        |image| {
            image.file.truncate(image.tail);
        },
        "RAM record at 0x210000: the file ends at 0x210000, 8 bytes too early",
    );
    check(
        |image| {
            let len = image.file.len();
            image.file.truncate(len - 1);
        },
        "device state at 0x210190: no end mark stands before the end of the file or its vmdescription",
    );
}

/// An image whose RAM goes on with `items` behind the setup's footer.
fn with_items(items: &[u8]) -> impl Fn(&mut Image) {
    let items = items.to_vec();
    move |image| {
        image.file.truncate(image.tail + 13);
        image.file.extend_from_slice(&items);
    }
}

fn encoded(item: Item) -> Vec<u8> {
    let mut out = Vec::new();
    item.encode(&mut out);
    out
}

fn section(kind: SectionKind, idstr: &str) -> Item {
    Item::Section(SectionHeader { kind, section_id: 9, idstr: name(idstr), instance_id: 0, version_id: 1 })
}

#[test]
fn foreign_items_among_rams_sections_are_refused() {
    for (item, expected) in [
        (
            section(SectionKind::Start, "dirty-bitmap"),
            "section `dirty-bitmap` at 0x21000d: hands its state over in pieces without lengths, which only QEMU can tell apart",
        ),
        (section(SectionKind::Start, "ram"), "RAM section at 0x21000d: is started twice"),
        (Item::Part { section_id: 2 }, "PART or END at 0x21000d: section 2 was not started"),
        (Item::Footer { section_id: 1 }, "footer at 0x21000d: closes no section"),
        (Item::Command(Command::Ping(1)), "command at 0x21000d: has no place in an image"),
        (Item::VmDescription { len: 0 }, "vmdescription at 0x21000d: stands before the end mark"),
    ] {
        check(with_items(&encoded(item)), expected);
    }
}

#[test]
fn device_state_behind_the_parts_of_ram_is_that_of_a_background_snapshot() {
    let part = [
        &encoded(Item::Part { section_id: 1 })[..],
        &RAM_SAVE_FLAG_EOS.to_be_bytes(),
        &encoded(Item::Footer { section_id: 1 }),
        &encoded(section(SectionKind::Full, "cpu")),
    ];
    check(
        with_items(&part.concat()),
        "section `cpu` at 0x21001f: stands before the end of RAM, as in a background snapshot, whose bitmaps are empty",
    );
}

/// An image with these bytes behind the footer of RAM's START, and what is left of the image behind them; with a
/// description of devices of these names and lengths, if any.
fn with_early(early: &[u8], described: Option<&[(&str, u64)]>) -> impl Fn(&mut Image) {
    let early = early.to_vec();
    let devices = described.map(|described| {
        let device = |(name, size): &(&str, u64)| vmdesc::Device {
            name: (*name).to_owned(),
            fields: vec![vmdesc::Field::plain("data", "buffer", *size)],
            ..vmdesc::Device::default()
        };
        described.iter().map(device).collect::<Vec<_>>()
    });
    move |image| {
        let tail = image.file.split_off(image.tail);
        image.file.extend_from_slice(&tail[..13]);
        image.file.extend_from_slice(&early);
        // RAM's END and the end mark.
        image.file.extend_from_slice(&tail[13..32]);
        if let Some(devices) = &devices {
            let description = VmDescription { devices: devices.clone(), ..VmDescription::default() };
            description.encode(&mut image.file).unwrap();
        }
    }
}

/// An early section of id 9 with this payload.
fn early(idstr: &str, payload: &[u8]) -> Vec<u8> {
    let footer = encoded(Item::Footer { section_id: 9 });
    [&encoded(section(SectionKind::Full, idstr)), payload, &footer].concat()
}

fn image_with_early(early: &[u8], described: Option<&[(&str, u64)]>) -> Vec<u8> {
    let mut image = image();
    with_early(early, described)(&mut image);
    image.file
}

/// What a guest may write into its device state to look like the end of it: a footer, and an END of RAM.
fn lure() -> Vec<u8> {
    [encoded(Item::Footer { section_id: 9 }), encoded(Item::End { section_id: 1 })].concat()
}

#[test]
fn the_end_of_an_early_section_is_the_one_described_or_the_only_one() {
    let harmless = [vec![0x7e; 40], encoded(Item::Footer { section_id: 9 }), vec![0xff; 300]].concat();
    let head = encoded(section(SectionKind::Full, "v")).len() as u64;
    for (payload, described) in [
        (&b"state"[..], None),
        (b"", None),
        (&harmless, None),
        (b"state", Some(5)),
        // A description that is wrong, or of something else, is no worse than none.
        (b"state", Some(4)),
        (b"state", Some(1 << 40)),
        (b"state", Some(u64::MAX)),
        (&lure(), Some(lure().len() as u64)),
    ] {
        let described = described.map(|len| [("v", len), ("w", 3)]);
        let file = image_with_early(&early("v", payload), described.as_ref().map(|all| &all[..]));
        let layout = golden::layout(&file, 0).unwrap();
        let [section] = &layout.early[..] else { panic!("{:?}", layout.early) };
        let start = 0x21000d + head;
        assert_eq!(section.payload, FileRange::new(start, start + payload.len() as u64), "{described:?}");
        assert_eq!((section.section_id, section.idstr.as_str()), (9, "v"));
        assert_eq!(layout.device_state.start, section.end + 18);
        assert_eq!(survey(&file).layout, Some(layout));
    }
}

#[test]
fn early_sections_whose_end_cannot_be_told_are_refused() {
    let lured = early("v", &lure());
    let several = "section `v` at 0x21001c: may end at 0x21001c or at 0x210026, and nothing tells its length";
    check(with_early(&lured, None), several);
    check(with_early(&lured, Some(&[("v", 3)])), several);
    // Of two that are described alike, none is.
    let len = lure().len() as u64;
    check(with_early(&lured, Some(&[("v", len), ("v", len)])), several);
    let mut torn = early("v", b"state");
    let last = torn.len() - 1;
    torn[last] ^= 1;
    check(with_early(&torn, None), "section `v` at 0x21001c: has no end");
    check(
        with_early(&early("v", &vec![0x7e; EARLY_SECTION_LEN_MAX + 300]), None),
        "section `v` at 0x21001c: has no end within 0x100000 bytes",
    );
    let image = |count| image_with_early(&early("v", b"").repeat(count), None);
    assert!(golden::layout(&image_with_early(&early("v", b"x"), None), 0).is_ok());
    // Two of one id have two ends each, as far as anybody can tell.
    assert!(golden::layout(&image(2), 0).unwrap_err().to_string().contains("may end at"));
    // Nothing ends behind an early section either.
    check(with_items(&[&early("v", b"state")[..], b"\0"].concat()), "section `v` at 0x21001c: has no end");
}

#[test]
fn early_sections_before_ram_are_read_as_well() {
    let mut image = image();
    let section = early("v", b"state");
    // The head of RAM's START has 17 bytes. What is inserted before it is taken from the gap before the first
    // pages, so that only the bitmap of the first block moves.
    image.file.drain(0xf0000..0xf0000 + section.len());
    image.file.splice(image.total - 17..image.total - 17, section.iter().copied());
    let bitmap = 0x7d + section.len() as u64;
    put(&mut image.file, image.header_a + section.len() + BITMAP_OFFSET_AT, &bitmap.to_be_bytes());
    let layout = golden::layout(&image.file, 0).unwrap();
    assert_eq!((layout.early.len(), layout.early[0].idstr.as_str()), (1, "v"));
    assert_eq!(layout.early[0].end, image.total as u64 - 17 + section.len() as u64);
    assert_eq!(layout.blocks[0].bitmap.start, bitmap);
    assert_eq!(survey(&image.file).layout, Some(layout));
}

#[test]
fn parts_and_the_switchover_command_are_passed_over() {
    let mut image = image();
    let tail = image.file.split_off(image.tail);
    let (setup_end, end) = tail.split_at(13);
    image.file.extend_from_slice(setup_end);
    for _ in 0..3 {
        image.file.extend_from_slice(&encoded(Item::Part { section_id: 1 }));
        image.file.extend_from_slice(&RAM_SAVE_FLAG_EOS.to_be_bytes());
        image.file.extend_from_slice(&encoded(Item::Footer { section_id: 1 }));
    }
    image.file.extend_from_slice(&encoded(Item::Command(Command::SwitchoverStart)));
    image.file.extend_from_slice(end);
    let layout = golden::layout(&image.file, 0).unwrap();
    assert_eq!(layout.device_state.start, image.tail as u64 + 13 + 3 * 18 + 5 + 18);
}

#[test]
fn an_ignored_block_has_no_place_in_the_file() {
    // As QEMU 11.0 writes it: an address, a header of zero offsets, and the stream goes on behind it.
    let configuration = Configuration::new(name("pc"))
        .with_capability(name("mapped-ram"))
        .with_capability(name("x-ignore-shared"));
    let mut file = Vec::new();
    Preamble { configuration: Some(configuration) }.encode(&mut file);
    SectionHeader::ram(1).encode(&mut file);
    file.extend_from_slice(&(0x11000 | RAM_SAVE_FLAG_MEM_SIZE).to_be_bytes());
    let entry = |text, used_length, address| BlockEntry {
        name: name(text),
        used_length,
        page_size: None,
        address: Some(address),
    };
    entry("pc.ram", 0x10000, 0).encode(&mut file);
    Header { page_size: 0x1000, bitmap_offset: 0, pages_offset: 0 }.encode(&mut file);
    entry("pc.rom", 0x1000, 0xc0000).encode(&mut file);
    let bitmap_offset = file.len() as u64 + 28;
    Header { page_size: 0x1000, bitmap_offset, pages_offset: 0x1000 }.encode(&mut file);
    file.resize(0x2000, 0);
    file.extend_from_slice(&encode_tail(1, Sections::default(), &VmDescription::default()).unwrap());

    let layout = golden::layout(&file, 0).unwrap();
    assert!(layout.blocks[0].is_ignored() && !layout.blocks[1].is_ignored());
    assert_eq!(layout.blocks[0].address, Some(0));
    assert_eq!((layout.blocks[1].address, layout.blocks[1].pages.start), (Some(0xc0000), 0x1000));
    assert_eq!(layout.total, 0x11000);
}

#[test]
fn a_plain_stream_is_not_an_image() {
    let file = golden::load("q35-10.0-stream");
    let expected = "configuration at 0x0: names no capability `mapped-ram`: this is a plain stream";
    assert_eq!(golden::layout(&file, 0).unwrap_err().to_string(), expected);
}

#[test]
fn a_file_that_is_shorter_than_its_length_is_refused() {
    let image = image();
    let mut survey = LayoutSurvey::new(0, image.file.len() as u64);
    let mut left = 2;
    while let SurveyStep::Need { offset, len } = survey.step() {
        let bytes = if left > 0 { &image.file[offset as usize..][..len] } else { &[] };
        left -= i32::from(left > 0);
        survey.supply(bytes);
    }
    let faults: Vec<_> = survey.finish().report.faults.iter().map(|fault| fault.to_string()).collect();
    assert_eq!(faults, ["file at 0x210000: ends before its length"]);
}
