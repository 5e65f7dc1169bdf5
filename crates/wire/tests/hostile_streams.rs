//! What a scanner cannot read is refused, by name and offset, and a survey reads past what it can.

use page::PageSize;
use wire::qemu::format::*;
use wire::qemu::{
    BlockEntry, Command, Configuration, Event, Item, PostcopyAdvise, Preamble, RamSetup, SectionHeader,
    SectionKind, StreamScanner,
};
use wire::{Fault, FaultKind, IdStr};

fn name(text: &str) -> IdStr {
    IdStr::new(text).unwrap()
}

fn encoded(item: Item) -> Vec<u8> {
    let mut out = Vec::new();
    item.encode(&mut out);
    out
}

fn section(kind: SectionKind, idstr: &str) -> Vec<u8> {
    let header = SectionHeader { kind, section_id: 9, idstr: name(idstr), instance_id: 0, version_id: 1 };
    encoded(Item::Section(header))
}

fn preamble(capabilities: &[&str]) -> Vec<u8> {
    let configuration = capabilities
        .iter()
        .fold(Configuration::new(name("pc")), |known, capability| known.with_capability(name(capability)));
    let mut out = Vec::new();
    Preamble { configuration: Some(configuration) }.encode(&mut out);
    out
}

/// RAM's START with one block `a` of four pages, section id 1.
fn start() -> Vec<u8> {
    let blocks = vec![BlockEntry { name: name("a"), used_length: 0x4000, page_size: None, address: None }];
    let mut out = Vec::new();
    RamSetup { blocks, multifd_flush: false }.encode_section(1, &mut out);
    out
}

fn part(payload: &[u8]) -> Vec<u8> {
    let eos = RAM_SAVE_FLAG_EOS.to_be_bytes();
    let (head, footer) = (Item::Part { section_id: 1 }, Item::Footer { section_id: 1 });
    [&encoded(head)[..], payload, &eos, &encoded(footer)].concat()
}

fn end() -> Vec<u8> {
    let eos = RAM_SAVE_FLAG_EOS.to_be_bytes();
    let (head, footer) = (Item::End { section_id: 1 }, Item::Footer { section_id: 1 });
    [&encoded(head)[..], &eos, &encoded(footer)].concat()
}

/// A record: word, name unless it continues, data.
fn record(word: u64, block: &str, data: &[u8]) -> Vec<u8> {
    let mut out = word.to_be_bytes().to_vec();
    if word & RAM_SAVE_FLAG_CONTINUE == 0 {
        out.push(block.len() as u8);
        out.extend_from_slice(block.as_bytes());
    }
    out.extend_from_slice(data);
    out
}

fn scan(stream: &[u8]) -> Result<(), Fault> {
    let mut scanner = StreamScanner::new(0, PageSize::X86);
    scanner.feed::<Fault>(stream, |_| Ok(()))?;
    scanner.finish()
}

const UNSUPPORTED: FaultKind = FaultKind::Unsupported;
const DAMAGED: FaultKind = FaultKind::Damaged;

#[test]
fn what_cannot_be_read_is_refused() {
    let full = SectionKind::Full;
    let advise = PostcopyAdvise { page_size_summary: 0x1000, target_page_size: 0x1000 };
    let advise = Command::PostcopyAdvise(Some(advise));
    for (rest, kind, expected) in [
        (
            section(SectionKind::Start, "dirty-bitmap"),
            UNSUPPORTED,
            "section `dirty-bitmap` at 0xf: hands its state over in pieces without lengths, which only QEMU can tell apart",
        ),
        (
            [section(full, "virtio-mem-early"), vec![0x7e; EARLY_SECTION_LEN_MAX + 100]].concat(),
            UNSUPPORTED,
            "section `virtio-mem-early` at 0xf: has no end within 0x100000 bytes",
        ),
        (section(SectionKind::Start, "ram"), UNSUPPORTED, "RAM section at 0xf: version 1 is not 4"),
        (
            [start(), section(SectionKind::Start, "ram")].concat(),
            DAMAGED,
            "RAM section at 0x3f: is started twice",
        ),
        (encoded(Item::Part { section_id: 1 }), DAMAGED, "PART or END at 0xf: section 1 was not started"),
        (
            [start(), encoded(Item::Part { section_id: 2 })].concat(),
            DAMAGED,
            "PART or END at 0x3f: section 2 was not started",
        ),
        (vec![0], DAMAGED, "end mark at 0xf: stands before the end of the RAM section"),
        (vec![6, 0, 0, 0, 0], DAMAGED, "vmdescription at 0xf: stands before the end mark"),
        (
            encoded(Item::Footer { section_id: 1 }),
            DAMAGED,
            "footer at 0xf: closes section 1, but no section is open",
        ),
        (
            encoded(Item::Command(Command::PostcopyListen)),
            UNSUPPORTED,
            "command at 0xf: belongs to a postcopy or COLO stream, which is no image",
        ),
        (
            [&start()[..start().len() - 5], &section(full, "cpu")].concat(),
            UNSUPPORTED,
            "RAM section at 0x3a: has no footer, as machine types before 2.4 write it",
        ),
        ([start(), part(&[])].concat(), DAMAGED, "stream at 0x51: ends before the RAM section does"),
        (encoded(Item::Command(advise)), DAMAGED, "stream at 0x24: ends before the RAM section does"),
    ] {
        let stream = [preamble(&[]), rest].concat();
        let fault = scan(&stream).unwrap_err();
        assert_eq!((fault.to_string().as_str(), fault.kind), (expected, kind));
    }
    let mapped = [preamble(&["mapped-ram"]), start()].concat();
    let expected =
        "configuration at 0x0: the stream has its pages at fixed offsets: read it as a mapped-ram image";
    assert_eq!(scan(&mapped).unwrap_err().to_string(), expected);
    let both =
        [preamble(&["x-ignore-shared"]), encoded(Item::Command(Command::PostcopyAdvise(None)))].concat();
    let expected = "command at 0x43: announces postcopy, which excludes `x-ignore-shared`";
    assert_eq!(scan(&both).unwrap_err().to_string(), expected);
}

#[test]
fn records_that_lie_are_refused_and_surveyed() {
    let page = [7; 4096];
    for (record, kind, expected) in [
        (record(0x4008, "a", &page), DAMAGED, "offset 0x4000 is no page of a block of 0x4000 bytes"),
        (record(0x3c08, "a", &page), DAMAGED, "offset 0x3c00 is no page of a block of 0x4000 bytes"),
        (
            record(u64::MAX << 10 | 2, "a", &[0]),
            DAMAGED,
            "offset 0xfffffffffffffc00 is no page of a block of 0x4000 bytes",
        ),
        (record(0x1008, "b", &page), DAMAGED, "block `b` is unknown"),
        (record(0x1028, "", &page), DAMAGED, "continues no block"),
    ] {
        let stream = [preamble(&[]), start(), part(&record), end()].concat();
        let fault = scan(&stream).unwrap_err();
        assert_eq!((fault.to_string(), fault.kind), (format!("RAM record at 0x44: {expected}"), kind));

        let mut survey = StreamScanner::surveying(0, PageSize::X86);
        let mut pages = 0;
        let count = |event: Event<'_>| {
            pages += u32::from(matches!(event, Event::Page { .. } | Event::Zero { .. }));
            Ok::<(), Fault>(())
        };
        survey.feed(&stream, count).unwrap();
        assert!(survey.is_done(), "a survey reads past {expected}");
        assert_eq!(pages, 0, "a record that lies is no page: {expected}");
        assert_eq!(survey.into_report().faults, [fault]);
    }
}

#[test]
fn records_that_cannot_be_read_are_refused() {
    for (word, kind, expected) in [
        (0x1040u64, UNSUPPORTED, "is a difference (xbzrle), which no image holds"),
        (0x80, UNSUPPORTED, "is RDMA's"),
        (0x1100, UNSUPPORTED, "is a compressed page of QEMU before 9.1"),
        (0x1001, UNSUPPORTED, "has a flag that is obsolete since 2009"),
        (0x4004, DAMAGED, "0x4004 has no known combination of flags"),
        (0x1010, DAMAGED, "0x1010 has no known combination of flags"),
        (0x1018, DAMAGED, "0x1018 has no known combination of flags"),
    ] {
        let stream = [preamble(&[]), start(), part(&word.to_be_bytes())].concat();
        let fault = scan(&stream).unwrap_err();
        assert_eq!((fault.to_string(), fault.kind), (format!("RAM record at 0x44: {expected}"), kind));
    }
    let filled = [preamble(&[]), start(), part(&record(2, "a", &[0xaa])), end()].concat();
    let expected = "zero page at 0x44: the page is filled with 0xaa";
    assert_eq!(scan(&filled).unwrap_err().to_string(), expected);
}

#[test]
fn a_fault_stays() {
    let mut scanner = StreamScanner::new(0, PageSize::X86);
    let fault = scanner.step(b"QEVX").unwrap_err();
    assert_eq!(scanner.step(b"M").unwrap_err(), fault);
    assert_eq!(scanner.finish(), Err(fault));
}

#[test]
fn a_background_snapshot_hands_its_device_state_over_whole() {
    // There is no END: the first FULL head behind a PART is the device state, and its bytes come back
    // even where an earlier window held their start.
    let stream =
        [preamble(&[]), start(), part(&record(0x1002, "a", &[0])), section(SectionKind::Full, "cpu")];
    let stream = stream.concat();
    let device_state_at = stream.len() as u64 - 17;
    for window in [stream.len(), 7, 1] {
        let mut scanner = StreamScanner::new(0, PageSize::X86);
        let (mut found, mut taken) = (None, 0);
        for piece in stream.chunks(window) {
            taken += scanner
                .feed::<Fault>(piece, |event| {
                    if let Event::DeviceState { at, ram_ended } = event {
                        found = Some((at, ram_ended));
                    }
                    Ok(())
                })
                .unwrap();
        }
        assert_eq!(found, Some((device_state_at, false)), "windows of {window}");
        let blob = [scanner.leftover(), &stream[taken..]].concat();
        assert_eq!(blob, section(SectionKind::Full, "cpu"), "windows of {window}");
    }
}

#[test]
fn a_stream_of_other_page_size_is_read_with_it() {
    let mut configuration = Configuration::new(name("virt"));
    configuration.target_page_bits = Some(14);
    let mut stream = Vec::new();
    Preamble { configuration: Some(configuration) }.encode(&mut stream);
    stream.extend_from_slice(&start());
    stream.extend_from_slice(&part(&record(8, "a", &[1; 0x4000])));
    stream.extend_from_slice(&end());
    let mut lens = Vec::new();
    let mut scanner = StreamScanner::new(0, PageSize::X86);
    let on_event = |event: Event<'_>| {
        if let Event::Page { data, .. } = event {
            lens.push(data.len());
        }
        Ok::<(), Fault>(())
    };
    scanner.feed(&stream, on_event).unwrap();
    assert_eq!(lens, [0x4000]);
}

#[test]
fn early_sections_are_told_apart_in_windows_of_any_size() {
    let head = |id| {
        let header = SectionHeader {
            kind: SectionKind::Full,
            section_id: id,
            idstr: name("v"),
            instance_id: id,
            version_id: 1,
        };
        encoded(Item::Section(header))
    };
    let footer = |id| encoded(Item::Footer { section_id: id });
    // Footers of its own behind which nothing follows that could, and of others behind which something does.
    let payload =
        [vec![0x7e; 7], footer(9), vec![9], footer(8), end(), footer(9), vec![8, 0, 11, 0xff, 0xff]].concat();
    let before = [head(7), b"before RAM".to_vec(), footer(7)].concat();
    let early = [head(9), payload.clone(), footer(9), head(10), footer(10)].concat();
    let stream =
        [preamble(&[]), before, start(), early, part(&record(0x1008, "a", &[7; 4096])), end(), vec![0]]
            .concat();
    let mut found = Vec::new();
    for window in [stream.len(), 1, 2, 5, 64] {
        let mut sections = Vec::new();
        let mut scanner = StreamScanner::new(0, PageSize::X86);
        for piece in stream.chunks(window) {
            let on_event = |event: Event<'_>| {
                if let Event::Early(section) = event {
                    sections.push(section);
                }
                Ok::<_, Fault>(())
            };
            scanner.feed(piece, on_event).unwrap();
        }
        scanner.finish().unwrap();
        let ids: Vec<_> =
            sections.iter().map(|section| (section.section_id, section.payload.len())).collect();
        assert_eq!(ids, [(7, 10), (9, payload.len() as u64), (10, 0)], "windows of {window}");
        found.push(sections);
    }
    assert!(found.iter().all(|sections| *sections == found[0]));
}
