//! Every limit is reached by a test, and what lies beyond it is refused by name.

use page::{PageCount, PageSize};
use wire::mapped_ram::format::{HEADER_LEN, RAM_SECTIONS_MAX};
use wire::mapped_ram::{BitmapScanner, ImagePlan, LayoutDecoder, Sections, Step, decode_bitmap, encode_tail};
use wire::qemu::format::*;
use wire::qemu::vmdesc::{self, Located, VmDescription};
use wire::qemu::{
    BlockEntry, BlockListVariant, Command, Configuration, DiscardRange, Event, Item, Preamble, RamSetup,
    SectionHeader, SectionKind, StreamScanner, decode_item, decode_preamble, decode_ram_setup,
    early_payload_len, split_sections,
};
use wire::{DecodeError, Fault, FileRange, IdStr};

fn name(text: &str) -> IdStr {
    IdStr::new(text).unwrap()
}

/// The message of a fault; a decoder that asked for more bytes instead shows as such.
fn message<T: std::fmt::Debug>(result: Result<T, DecodeError>) -> String {
    result.unwrap_err().to_string()
}

fn preamble(rest: &[u8]) -> Vec<u8> {
    [b"QEVM\0\0\0\x03\x07", rest].concat()
}

#[test]
fn a_preamble_keeps_its_limits() {
    let long = [&256u32.to_be_bytes()[..], &[b'x'; 256]].concat();
    let subsection = |name: &str, fields: &[u8]| {
        let mut rest = b"\0\0\0\x02pc\x05".to_vec();
        rest.push(name.len() as u8);
        rest.extend_from_slice(name.as_bytes());
        rest.extend_from_slice(&[0, 0, 0, 1]);
        rest.extend_from_slice(fields);
        rest
    };
    for (rest, expected) in [
        (long, "machine name length at 0x9: 256 is more than 255"),
        (b"\0\0\0\0\x01".to_vec(), "machine name at 0x9: is empty or not printable text"),
        (subsection(TARGET_PAGE_BITS, &[0, 0, 0, 9]), "target page bits at 0x33: 9 bits make no target page"),
        (
            subsection(TARGET_PAGE_BITS, &[0, 0, 0, 17]),
            "target page bits at 0x33: 17 bits make no target page",
        ),
        (subsection(CAPABILITIES, &[0, 0, 0, 0]), "number of capabilities at 0x2f: 0 is not within 1..=64"),
        (subsection(CAPABILITIES, &[0, 0, 0, 65]), "number of capabilities at 0x2f: 65 is not within 1..=64"),
        (subsection(CAPABILITIES, b"\0\0\0\x02\x01a\x01a"), "capability at 0x35: `a` is listed twice"),
    ] {
        assert_eq!(message(decode_preamble(&preamble(&rest), 0)), expected);
    }
    for bits in TARGET_PAGE_BITS_RANGE {
        let bytes = preamble(&[&subsection(TARGET_PAGE_BITS, &bits.to_be_bytes())[..], &[1]].concat());
        let (decoded, _) = decode_preamble(&bytes, 0).unwrap();
        assert_eq!(decoded.configuration.unwrap().page_size().unwrap().shift(), bits);
    }
}

#[test]
fn the_most_capabilities_are_read() {
    let mut configuration = Configuration::new(name(&"m".repeat(MACHINE_NAME_LEN_MAX as usize)));
    configuration.capabilities = (0..CAPABILITIES_MAX).map(|i| name(&format!("c{i}"))).collect();
    let preamble = Preamble { configuration: Some(configuration) };
    let mut bytes = Vec::new();
    preamble.encode(&mut bytes);
    bytes.push(1);
    assert_eq!(decode_preamble(&bytes, 0).unwrap().0, preamble);
}

#[test]
fn a_subsection_out_of_order_is_refused() {
    let mut bytes = preamble(b"\0\0\0\x02pc");
    for _ in 0..2 {
        bytes.extend_from_slice(b"\x05\x12configuration/uuid\0\0\0\x01");
        bytes.extend_from_slice(&[7; 16]);
    }
    bytes.push(1);
    let expected = "configuration subsection `configuration/uuid` at 0x37: is repeated or out of order";
    assert_eq!(message(decode_preamble(&bytes, 0)), expected);
}

fn block(i: usize, used_length: u64) -> BlockEntry {
    BlockEntry { name: name(&format!("b{i}")), used_length, page_size: None, address: None }
}

fn decode_list(setup: &RamSetup) -> Result<RamSetup, DecodeError> {
    let mut bytes = Vec::new();
    setup.encode(&mut bytes);
    decode_ram_setup(&bytes, 0, BlockListVariant::Plain).map(|(setup, _)| setup)
}

#[test]
fn a_block_list_keeps_its_limits() {
    let many =
        |count| RamSetup { blocks: (0..count).map(|i| block(i, 0x1000)).collect(), multifd_flush: false };
    assert_eq!(decode_list(&many(RAM_BLOCKS_MAX)).unwrap().blocks.len(), RAM_BLOCKS_MAX);
    let expected = "RAM block `b4096` at 0xdbb2: is one more than 4096";
    assert_eq!(message(decode_list(&many(RAM_BLOCKS_MAX + 1))), expected);

    let list = |blocks| RamSetup { blocks, multifd_flush: false };
    assert_eq!(decode_list(&list(vec![block(0, RAM_LEN_MAX)])).unwrap().total(), RAM_LEN_MAX);
    for (blocks, expected) in [
        (
            vec![block(0, RAM_LEN_MAX), block(1, 0x1000)],
            "total RAM size at 0x0: 0x10000000001000 bytes are more than 0x10000000000000",
        ),
        (vec![block(0, 0x1000), block(0, 0x1000)], "RAM block `b0` at 0x13: is listed twice"),
        (vec![block(0, 0), block(1, 0x1000)], "RAM block `b0` at 0x8: used length 0x0 is no number of pages"),
    ] {
        assert_eq!(message(decode_list(&list(blocks))), expected);
    }

    // A total that the blocks do not meet.
    let mut bytes = Vec::new();
    list(vec![block(0, 0x2000)]).encode(&mut bytes);
    bytes[6] = 0x10;
    let expected = "RAM block `b0` at 0x8: the blocks add up to 0x2000 bytes, the total is 0x1000";
    assert_eq!(message(decode_ram_setup(&bytes, 0, BlockListVariant::Plain)), expected);
    bytes[6] = 0x24;
    // The end mark reads as the next block's name length then, and that is empty.
    let expected = "RAM block name at 0x13: is empty or not printable text";
    assert_eq!(message(decode_ram_setup(&bytes, 0, BlockListVariant::Plain)), expected);
}

#[test]
fn commands_keep_their_lengths() {
    let discard = |count: usize| Command::PostcopyRamDiscard {
        block: name("b"),
        ranges: vec![DiscardRange { start: 0, len: 0x1000 }; count],
    };
    let mut bytes = Vec::new();
    discard(RAM_DISCARD_RANGES_MAX).encode(&mut bytes);
    assert_eq!(decode_item(&bytes, 0).unwrap().0, Item::Command(discard(RAM_DISCARD_RANGES_MAX)));
    for (bytes, expected) in [
        (&b"\x08\x00\x00\x00\x00"[..], "command at 0x0: 0 is unknown"),
        (b"\x08\x00\x0c\x00\x00", "command at 0x0: 12 is unknown"),
        (b"\x08\x00\x0b\x00\x01x", "command 11 at 0x0: 1 bytes are left over in its payload"),
        (b"\x08\x00\x02\x00\x03xyz", "ping value at 0x5: the input ends 1 bytes too early"),
        (b"\x08\x00\x06\x00\x04\x00\x01b\x00", "discard start at 0x9: the input ends 8 bytes too early"),
        (b"\x08\x00\x06\x00\x04\x01\x01b\x00", "discard version at 0x5: 1 is not 0"),
        (
            b"\x08\x00\x06\x00\x14\x00\x01b\x00\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\0\0\x01",
            "discard range at 0x9: 0x1 bytes from 0xffffffffffffffff are no range",
        ),
        (b"\x05", "section type at 0x0: 0x05 is no type that may stand here"),
    ] {
        assert_eq!(message(decode_item(bytes, 0)), expected);
    }
}

#[test]
#[should_panic(expected = "4080 ranges to discard")]
fn a_discard_that_does_not_fit_is_a_mistake_of_the_caller() {
    let ranges = vec![DiscardRange { start: 0, len: 1 }; RAM_DISCARD_RANGES_MAX + 1];
    Command::PostcopyRamDiscard { block: name("b"), ranges }.encode(&mut Vec::new());
}

fn encoded(item: Item) -> Vec<u8> {
    let mut out = Vec::new();
    item.encode(&mut out);
    out
}

fn head(section_id: u32, idstr: &str) -> Vec<u8> {
    let (kind, idstr) = (SectionKind::Full, name(idstr));
    encoded(Item::Section(SectionHeader { kind, section_id, idstr, instance_id: 0, version_id: 1 }))
}

fn section(id: u32, idstr: &str, payload: &[u8]) -> Vec<u8> {
    [&head(id, idstr)[..], payload, &encoded(Item::Footer { section_id: id })].concat()
}

#[test]
fn a_blob_of_nothing_but_ends_is_refused() {
    // Every footer is followed by a head that the next footer could close.
    let blob = [section(1, "a", b"").repeat(SECTION_ENDS_MAX + 1), vec![0]].concat();
    let expected = "device state at 0x14000f: more than 65536 places look like the end of a section";
    assert_eq!(split_sections(&blob, 0).unwrap_err().to_string(), expected);
}

#[test]
fn a_blob_with_too_many_readings_is_refused() {
    // Twenty pieces that can each be read in two ways, between two sections of one id: a million readings
    // in which that id appears twice come before the one in which the first section swallows all.
    let mut blob = section(1, "z", b"");
    for i in 1..=20 {
        let inner =
            [encoded(Item::Footer { section_id: 10 * i }), head(10 * i + 2, &format!("e{i}"))].concat();
        blob.extend_from_slice(&section(10 * i, &format!("b{i}"), b""));
        blob.extend_from_slice(&section(10 * i + 1, &format!("c{i}"), b""));
        blob.extend_from_slice(&section(10 * i + 2, &format!("d{i}"), &inner));
    }
    blob.extend_from_slice(&section(1, "z", b""));
    blob.push(0);
    let expected = "device state at 0x0: can be read in several ways";
    assert_eq!(split_sections(&blob, 0).unwrap_err().to_string(), expected);
}

#[test]
fn section_heads_beyond_the_plausible_end_no_section() {
    for (id, version, plausible) in [
        (SECTION_ID_MAX, SECTION_VERSION_MAX, true),
        (SECTION_ID_MAX + 1, 1, false),
        (2, SECTION_VERSION_MAX + 1, false),
    ] {
        let mut blob = section(1, "first", b"abc");
        let kind = SectionKind::Full;
        SectionHeader { kind, section_id: id, idstr: name("x"), instance_id: 0, version_id: version }
            .encode(&mut blob);
        Item::Footer { section_id: id }.encode(&mut blob);
        blob.push(0);
        let found = split_sections(&blob, 0).map(|state| state.sections.len()).map_err(|f| f.to_string());
        let expected = if plausible { Ok(2) } else { Err("section `first` at 0x0: has no end".to_owned()) };
        assert_eq!(found, expected, "id {id}, version {version}");
    }
}

#[test]
fn a_description_keeps_its_length() {
    let long = serde_json::Value::String("x".repeat(VMDESCRIPTION_LEN_MAX as usize));
    let description = VmDescription { vmstate: Some(long), ..VmDescription::default() };
    let mut out = vec![1, 2, 3];
    let expected = "vmdescription at 0x3: 16777243 bytes are more than 16777216";
    assert_eq!(description.encode(&mut out).unwrap_err().to_string(), expected);
    assert_eq!(out, [1, 2, 3], "nothing is appended");

    let spaces = vec![b' '; VMDESCRIPTION_LEN_MAX as usize + 1];
    let expected = "vmdescription at 0x0: 16777217 bytes are more than 16777216";
    assert_eq!(vmdesc::parse(&spaces, 0).unwrap_err().to_string(), expected);
    assert_eq!(vmdesc::locate(&spaces, 0), Located::TailTooShort);
    assert_eq!(vmdesc::locate(&vec![b' '; VMDESCRIPTION_LEN_MAX as usize + 6], 0), Located::Absent);

    // The longest description there can be is found.
    let mut longest = vec![0, 6];
    longest.extend_from_slice(&VMDESCRIPTION_LEN_MAX.to_be_bytes());
    longest.push(b'{');
    longest.resize(6 + VMDESCRIPTION_LEN_MAX as usize, b' ');
    let found = FileRange::new(1, longest.len() as u64);
    assert_eq!(vmdesc::locate(&longest, 0), Located::Found(found));
}

#[test]
fn deep_json_is_refused() {
    let json = format!(r#"{{"devices":[],"vmstate":{}{}}}"#, "[".repeat(200), "]".repeat(200));
    let found = vmdesc::parse(json.as_bytes(), 0x40).unwrap_err().to_string();
    let expected = "vmdescription at 0x40: is not as expected: recursion limit exceeded at line 1 column 151";
    assert_eq!(found, expected);
}

fn mapped_configuration() -> Configuration {
    Configuration::new(name("pc")).with_capability(name("mapped-ram"))
}

fn plan(blocks: &[BlockEntry], start: u64) -> Result<ImagePlan, Fault> {
    ImagePlan::new(&mapped_configuration(), &SectionHeader::ram(1), blocks, PageSize::X86, start)
}

#[test]
fn a_plan_keeps_its_limits() {
    let many: Vec<_> = (0..=RAM_BLOCKS_MAX).map(|i| block(i, 0x1000)).collect();
    assert!(plan(&many[..RAM_BLOCKS_MAX], 0).is_ok());
    for (found, expected) in [
        (plan(&many, 0), "planned image at 0x0: has no block or too many"),
        (plan(&[], 0), "planned image at 0x0: has no block or too many"),
        (plan(&[block(0, 0x1400)], 0), "planned image at 0x0: has a block that is no number of pages"),
        (
            plan(&[block(0, RAM_LEN_MAX), block(1, 0x1000)], 0),
            "planned image at 0x0: has more RAM than fits, or no number of pages",
        ),
        (
            plan(&[block(0, RAM_LEN_MAX)], i64::MAX as u64 - RAM_LEN_MAX),
            "planned image at 0x7fefffffffffffff: is longer than a file can be",
        ),
    ] {
        assert_eq!(found.unwrap_err().to_string(), expected);
    }
    let plain = Configuration::new(name("pc"));
    let found = ImagePlan::new(&plain, &SectionHeader::ram(1), &many[..1], PageSize::X86, 0);
    let expected = "planned image at 0x0: needs the capability `mapped-ram` without `x-ignore-shared`";
    assert_eq!(found.unwrap_err().to_string(), expected);
}

#[test]
fn an_image_with_endless_parts_is_refused() {
    let plan = plan(&[block(0, 0x1000)], 0).unwrap();
    let mut part = Vec::new();
    Item::Part { section_id: 1 }.encode(&mut part);
    part.extend_from_slice(&RAM_SAVE_FLAG_EOS.to_be_bytes());
    Item::Footer { section_id: 1 }.encode(&mut part);
    let setup_end = &part[5..];
    // The file goes on with PARTs for ever: it is made as it is read.
    let tail = plan.tail_offset;
    let byte = |at: u64| match at {
        at if at < plan.blocks[0].metadata.len() as u64 => plan.blocks[0].metadata[at as usize],
        at if at < tail => 0,
        at if at - tail < setup_end.len() as u64 => setup_end[(at - tail) as usize],
        at => part[((at - tail - setup_end.len() as u64) % part.len() as u64) as usize],
    };
    let mut decoder = LayoutDecoder::new(0, 1 << 40);
    let fault = loop {
        match decoder.step() {
            Ok(Step::Need { offset, len }) => {
                let bytes: Vec<u8> = (offset..offset + len as u64).map(byte).collect();
                decoder.supply(&bytes).unwrap();
            }
            Ok(Step::Done(_)) => panic!("an endless image has no end"),
            Err(fault) => break fault,
        }
    };
    assert_eq!(fault.problem, format!("more than {RAM_SECTIONS_MAX} of them"));
    assert_eq!(HEADER_LEN, 28);
}

#[test]
fn bitmaps_have_the_length_of_their_block() {
    let pages = PageCount(65);
    let expected = "bitmap at 0x10: 0x8 bytes instead of 0x10";
    assert_eq!(decode_bitmap(&[0; 8], 0x10, pages).unwrap_err().to_string(), expected);
    let mut scanner = BitmapScanner::new(0x10, pages);
    let expected = "bitmap at 0x10: is longer than its block";
    assert_eq!(scanner.push(&[0; 17], |_| {}).unwrap_err().to_string(), expected);
    assert_eq!(scanner.skip(17, |_| {}).unwrap_err().to_string(), expected);
    scanner.skip(9, |_| {}).unwrap();
    let expected = "bitmap at 0x19: 0x7 bytes are lacking";
    assert_eq!(scanner.clone().finish(|_| {}).unwrap_err().to_string(), expected);
    let expected = "bitmap at 0x19: page 0x4b is marked, but the block has 0x41";
    assert_eq!(scanner.push(&[8, 0], |_| {}).unwrap_err().to_string(), expected);
}

#[test]
fn there_are_no_more_early_sections_than_a_machine_has_slots() {
    let sections =
        |count: usize| (0..count as u32).flat_map(|id| section(id + 10, &format!("v{id}"), b"state"));
    let blocks = vec![block(0, 0x1000)];
    let stream = |count| {
        let mut out = Vec::new();
        Preamble { configuration: Some(Configuration::new(name("pc"))) }.encode(&mut out);
        RamSetup { blocks: blocks.clone(), multifd_flush: false }.encode_section(1, &mut out);
        let at = out.len();
        out.extend(sections(count));
        let end = [&encoded(Item::End { section_id: 1 })[..], &RAM_SAVE_FLAG_EOS.to_be_bytes()].concat();
        out.extend([&end[..], &encoded(Item::Footer { section_id: 1 })].concat());
        (out, at)
    };
    let image = |count| {
        let plan = plan(&blocks, 0).unwrap();
        let mut file = vec![0; plan.tail_offset as usize];
        let first = &plan.blocks[0];
        file[..first.metadata.len()].copy_from_slice(&first.metadata);
        let early: Vec<u8> = sections(count).collect();
        let tail = Sections { early: &early, devices: b"" };
        file.extend(encode_tail(1, tail, &VmDescription::default()).unwrap());
        let mut decoder = LayoutDecoder::new(0, file.len() as u64);
        loop {
            match decoder.step()? {
                Step::Need { offset, len } => decoder.supply(&file[offset as usize..][..len])?,
                Step::Done(layout) => return Ok::<_, Fault>(layout.early.len()),
            }
        }
    };
    let scan = |count| {
        let (stream, at) = stream(count);
        let mut found = 0;
        let mut scanner = StreamScanner::new(0, PageSize::X86);
        let fed = scanner.feed::<Fault>(&stream, |event| {
            found += usize::from(matches!(event, Event::Early(_)));
            Ok(())
        });
        (fed.map(|_| found), at)
    };
    assert_eq!(image(EARLY_SECTIONS_MAX), Ok(EARLY_SECTIONS_MAX));
    assert_eq!(scan(EARLY_SECTIONS_MAX).0, Ok(EARLY_SECTIONS_MAX));
    let fault = image(EARLY_SECTIONS_MAX + 1).unwrap_err();
    assert_eq!(fault.problem, "is one more than 256 before the end of RAM");
    let fault = scan(EARLY_SECTIONS_MAX + 1).0.unwrap_err();
    assert_eq!(
        (fault.field.as_ref(), fault.problem.as_ref()),
        ("section `v256`", "is one more than 256 before the RAM")
    );
}

#[test]
fn an_early_section_may_have_a_mebibyte() {
    let header = SectionHeader {
        kind: SectionKind::Full,
        section_id: 9,
        idstr: name("v"),
        instance_id: 0,
        version_id: 1,
    };
    let footer = [encoded(Item::Footer { section_id: 9 }), encoded(Item::Part { section_id: 1 })].concat();
    let told = |len: usize| {
        let bytes = [vec![0x7e; len], footer.clone()].concat();
        early_payload_len(&bytes, 0, &header, Some(1))
    };
    assert_eq!(told(EARLY_SECTION_LEN_MAX), Ok(EARLY_SECTION_LEN_MAX));
    assert_eq!(
        message(told(EARLY_SECTION_LEN_MAX + 1)),
        "section `v` at 0x0: has no end within 0x100000 bytes"
    );
    // No prefix is enough, and none is refused.
    let bytes = [vec![0x7e; 30], footer].concat();
    for len in 0..bytes.len() {
        let told = early_payload_len(&bytes[..len], 0, &header, Some(1));
        assert!(matches!(told, Err(DecodeError::Incomplete { .. })), "{len} bytes: {told:?}");
    }
}
