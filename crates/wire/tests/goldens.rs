//! What real QEMUs wrote is read exactly, and written again byte for byte.

mod golden;

use golden::{at, layout, load};
use page::{PageCount, PageRange, PageSize};
use wire::mapped_ram::{BitmapScanner, ImagePlan, decode_bitmap, encode_bitmap};
use wire::qemu::format::VMDESCRIPTION_HEADER_LEN;
use wire::qemu::global_state::{patch_run_state, run_state};
use wire::qemu::{
    Command, DeviceSection, DeviceState, Event, Item, RamSetup, RecordEncoder, StreamScanner, Witness,
    check_early, decode_preamble, decode_xen_device_state, split_sections, survey, vmdesc,
};
use wire::{Fault, FileRange, IdStr};

const MAPPED: [(&str, u64); 3] = [
    ("q35-10.0-mapped-ram", 0),
    ("q35-10.0-mapped-ram-multifd-direct-io", 0),
    ("q35-10.0-mapped-ram-offset", 0x1234),
];

/// The guest with virtio-mem, whose one early section stands among RAM's.
const EARLY: &str = "0000:00:01.0/virtio-mem-device-early";

/// The blocks of the other golden guests, in QEMU's order.
const BLOCKS: [(&str, u64); 6] = [
    ("/rom@etc/acpi/tables", 0x20000),
    ("pc.ram", 0x100000),
    ("pc.bios", 0x40000),
    ("pc.rom", 0x20000),
    ("/rom@etc/table-loader", 0x1000),
    ("/rom@etc/acpi/rsdp", 0x1000),
];

#[test]
fn mapped_ram_images_of_qemu_10_0_are_laid_out_as_qemu_says() {
    for (name, start) in MAPPED {
        let file = load(name);
        let layout = layout(&file, start).unwrap();
        let configuration = layout.preamble.configuration.as_ref().unwrap();
        assert_eq!(configuration.machine, "pc-q35-10.0", "{name}");
        assert_eq!(configuration.capabilities, ["mapped-ram"], "{name}");
        assert_eq!((layout.ram.section_id, layout.ram.version_id), (1, 4), "{name}");
        assert_eq!(layout.total, 0x182000, "{name}");
        let blocks: Vec<_> = layout.blocks.iter().map(|b| (b.name.as_str(), b.used_length)).collect();
        assert_eq!(blocks, BLOCKS, "{name}");
        let pages: Vec<_> = layout.blocks.iter().map(|b| b.pages.start).collect();
        // The offsets count from the start of the file: an image at 0x1234 has its pages at the same places.
        let expected = [0x100000, 0x200000, 0x400000, 0x500000, 0x600000, 0x700000];
        assert_eq!(pages, expected, "{name}");
        assert_eq!(layout.blocks[0].bitmap, FileRange::new(start + 0x99, start + 0xa1), "{name}");
        assert_eq!(layout.file_len, 0x713b31, "{name}");
        assert_eq!(layout.device_state, FileRange::new(0x701036, 0x708f17), "{name}");
        assert_eq!(layout.vmdesc, Some(FileRange::new(0x708f17, 0x713b31)), "{name}");
    }
}

#[test]
fn the_plan_of_an_image_is_what_qemu_wrote() {
    for (name, start) in MAPPED {
        let file = load(name);
        let layout = layout(&file, start).unwrap();
        let entries: Vec<_> = layout.blocks.iter().map(|block| block.entry()).collect();
        let configuration = layout.preamble.configuration.as_ref().unwrap();
        let plan =
            ImagePlan::new(configuration, &layout.ram, &entries, PageSize::X86, layout.stream_start).unwrap();
        for (planned, read) in plan.blocks.iter().zip(&layout.blocks) {
            assert_eq!(planned.placement, *read, "{name}");
            let place = FileRange::of_len(planned.metadata_at, planned.metadata.len() as u64).unwrap();
            assert_eq!(at(&file, place), planned.metadata, "{name}, block `{}`", read.name);
        }
        let last = layout.blocks.last().unwrap();
        assert_eq!(plan.tail_offset, last.pages.end, "{name}");
    }
}

#[test]
fn a_configuration_without_capabilities_becomes_that_of_a_mapped_ram_image() {
    let (stream, mapped) = (load("q35-10.0-stream"), load("q35-10.0-mapped-ram"));
    let (mut preamble, _) = decode_preamble(&stream, 0).unwrap();
    let configuration = preamble.configuration.take().unwrap();
    preamble.configuration = Some(configuration.with_capability(IdStr::new("mapped-ram").unwrap()));
    let mut bytes = Vec::new();
    preamble.encode(&mut bytes);
    assert_eq!(mapped[..bytes.len()], bytes);
}

#[test]
fn bitmaps_of_qemu_mark_the_pages_that_are_not_zero() {
    let file = load("q35-10.0-mapped-ram");
    let layout = layout(&file, 0).unwrap();
    // A guest that never ran has no page of its own in pc.ram; its firmware is there in part.
    let expected: [&[(u64, u64)]; 6] = [&[(0, 3)], &[], &[(17, 64)], &[], &[(0, 1)], &[(0, 1)]];
    for (block, expected) in layout.blocks.iter().zip(expected) {
        let bytes = at(&file, block.bitmap);
        let set = decode_bitmap(bytes, block.bitmap.start, block.page_count()).unwrap();
        let runs: Vec<_> = set.runs().map(|run| (run.start.0, run.end.0)).collect();
        assert_eq!(runs, expected, "block `{}`", block.name);

        let mut again = Vec::new();
        encode_bitmap(&set, &mut again);
        assert_eq!(again, bytes, "block `{}`", block.name);

        let mut scanned = Vec::new();
        let mut scanner = BitmapScanner::new(block.bitmap.start, block.page_count());
        for byte in bytes {
            scanner.push(&[*byte], |run: PageRange| scanned.push((run.start.0, run.end.0))).unwrap();
        }
        scanner.finish(|run| scanned.push((run.start.0, run.end.0))).unwrap();
        assert_eq!(scanned, expected, "block `{}`", block.name);
    }
}

/// A stream that was written again from its events, and what the events were.
struct Replay {
    bytes: Vec<u8>,
    setup: RamSetup,
    pages: usize,
    zeros: usize,
    commands: Vec<Command>,
    ends: Vec<u32>,
    early: Vec<DeviceSection>,
    device_state_at: u64,
}

fn replay(file: &[u8], window: usize) -> Result<Replay, Fault> {
    let mut replay = Replay {
        bytes: Vec::new(),
        setup: RamSetup::default(),
        pages: 0,
        zeros: 0,
        commands: Vec::new(),
        ends: Vec::new(),
        early: Vec::new(),
        device_state_at: 0,
    };
    let mut records = RecordEncoder::new(&replay.setup);
    let mut scanner = StreamScanner::new(0, PageSize::X86);
    for piece in file.chunks(window) {
        scanner.feed::<Fault>(piece, |event| {
            let out = &mut replay.bytes;
            match event {
                Event::Preamble(preamble) => preamble.encode(out),
                Event::Section(header) => header.encode(out),
                Event::Early(section) => {
                    assert_eq!(out.len() as u64, section.header_at, "it stands where its event says");
                    out.extend_from_slice(at(file, FileRange::new(section.header_at, section.end)));
                    replay.early.push(section);
                }
                Event::Blocks(setup) => {
                    setup.encode(out);
                    records = RecordEncoder::new(&setup);
                    replay.setup = setup;
                }
                Event::Command(command) => {
                    command.encode(out);
                    replay.commands.push(command);
                }
                Event::Part { section_id } => Item::Part { section_id }.encode(out),
                Event::End { section_id } => {
                    Item::End { section_id }.encode(out);
                    replay.ends.push(section_id);
                }
                Event::Footer { section_id } => Item::Footer { section_id }.encode(out),
                Event::Page { block, offset, data, at: place } => {
                    records.page_head(block, offset, out);
                    assert_eq!(out.len() as u64, place, "a page stands where its event says");
                    out.extend_from_slice(data);
                    replay.pages += 1;
                }
                Event::Zero { block, offset } => {
                    records.zero(block, offset, out);
                    replay.zeros += 1;
                }
                Event::Flush => records.flush(out),
                Event::Eos => records.eos(out),
                Event::DeviceState { at, ram_ended } => {
                    assert!(ram_ended);
                    replay.device_state_at = at;
                }
            }
            Ok(())
        })?;
    }
    scanner.finish()?;
    Ok(replay)
}

#[test]
fn streams_are_written_again_byte_for_byte() {
    for (name, section_id, pages, zeros, commands, device_state_at) in [
        ("q35-10.0-stream", 1, 52, 334, vec![Command::SwitchoverStart], 0x34e9d),
        ("q35-10.0-stream-ignore-shared-uuid", 1, 52, 78, vec![Command::SwitchoverStart], 0x34622),
        ("q35-7.2-stream", 2, 52, 334, vec![], 0x34e97),
        ("pc-7.2-stream", 2, 50, 336, vec![], 0x32e9c),
    ] {
        let file = load(name);
        for window in [file.len(), 1 << 16, 4097, 1] {
            let replay = replay(&file, window).unwrap();
            let blocks: Vec<_> =
                replay.setup.blocks.iter().map(|b| (b.name.as_str(), b.used_length)).collect();
            assert_eq!(blocks, BLOCKS, "{name}");
            assert_eq!((replay.pages, replay.zeros), (pages, zeros), "{name}, windows of {window}");
            assert_eq!((replay.commands, replay.ends), (commands.clone(), vec![section_id]), "{name}");
            assert_eq!(replay.device_state_at, device_state_at, "{name}");
            let same = replay.bytes == file[..device_state_at as usize];
            assert!(same, "{name}: windows of {window} give another stream");
        }
    }
}

#[test]
fn a_stream_with_x_ignore_shared_tells_addresses_and_the_uuid() {
    let file = load("q35-10.0-stream-ignore-shared-uuid");
    let (preamble, _) = decode_preamble(&file, 0).unwrap();
    let configuration = preamble.configuration.unwrap();
    assert_eq!(configuration.capabilities, ["x-ignore-shared"]);
    assert_eq!(configuration.uuid, Some(0x00112233_4455_6677_8899_aabbccddeeff_u128.to_be_bytes()));
    let replay = replay(&file, file.len()).unwrap();
    let addresses: Vec<_> = replay.setup.blocks.iter().map(|block| block.address).collect();
    assert_eq!(addresses, [0, 0, 0xfffc0000, 0xc0000, 0, 0].map(Some));
}

/// The device state of a golden file, with the file.
fn device_state(name: &str) -> (Vec<u8>, DeviceState) {
    let file = load(name);
    let state = if name.contains("-xen") {
        decode_xen_device_state(&file, 0)
    } else {
        let start = match MAPPED.iter().find(|mapped| mapped.0 == name) {
            Some((_, start)) => layout(&file, *start).unwrap().device_state.start,
            None if name.contains("mapped-ram") => layout(&file, 0).unwrap().device_state.start,
            None => replay(&file, file.len()).unwrap().device_state_at,
        };
        split_sections(&file[start as usize..], start)
    };
    (file, state.unwrap())
}

#[test]
fn every_section_of_the_device_state_is_found() {
    for name in golden::ALL {
        let (file, state) = device_state(name);
        let witness = if name.contains("-xen") { Witness::OnlyReading } else { Witness::VmDescription };
        assert_eq!(state.witness, witness, "{name}");
        let expected = match name {
            "pc-7.2-stream" => 30,
            // The early one is among them only here.
            "q35-10.0-xen-virtio-mem" => 31,
            "q35-10.0-mapped-ram-virtio-mem" | "q35-10.0-stream-virtio-mem" => 30,
            _ => 29,
        };
        assert_eq!(state.sections.len(), expected, "{name}");
        // The sections and the end mark cover the blob without a gap.
        let mut end = state.sections[0].header_at;
        for section in &state.sections {
            assert_eq!(section.header_at, end, "{name}, section `{}`", section.idstr);
            end = section.end;
        }
        assert_eq!(state.eof_at, end, "{name}");

        let cpu = state.section("cpu", 0).unwrap();
        assert_eq!((cpu.version_id, cpu.payload.len()), (12, 0x73b), "{name}");
        assert_eq!(state.section("dma", 1).unwrap().payload.len(), 0x4b, "{name}");
        let global = state.section("globalstate", 0).unwrap();
        let recorded = if name.contains("-xen") { "running" } else { "prelaunch" };
        assert_eq!(run_state(at(&file, global.payload)), Ok(recorded), "{name}");
    }
}

#[test]
fn the_search_finds_what_the_description_says() {
    for name in golden::ALL {
        let (file, state) = device_state(name);
        let start = state.sections[0].header_at;
        let blob = &file[start as usize..=state.eof_at as usize];
        let searched = split_sections(blob, start).unwrap();
        assert_eq!(searched.witness, Witness::OnlyReading, "{name}");
        assert_eq!(searched.sections, state.sections, "{name}");
    }
}

#[test]
fn surveys_of_what_qemu_wrote_are_clean() {
    for name in golden::ALL {
        let (file, state) = device_state(name);
        let start = state.sections[0].header_at;
        let (report, surveyed) = survey::device_state(&file[start as usize..], start);
        assert_eq!(report.faults, [], "{name}");
        assert_eq!(surveyed, Some(state), "{name}");
    }
}

#[test]
fn the_run_state_that_xen_save_records_can_be_patched() {
    let (mut xen, state) = device_state("q35-10.0-xen");
    let payload = state.section("globalstate", 0).unwrap().payload;
    let payload = &mut xen[payload.start as usize..payload.end as usize];
    patch_run_state(payload, "prelaunch").unwrap();
    // QEMU's own save of the same machine recorded the state in which it really was.
    let (stream, state) = device_state("q35-10.0-stream");
    assert_eq!(payload, at(&stream, state.section("globalstate", 0).unwrap().payload));
}

#[test]
fn descriptions_tell_every_section_and_its_length() {
    for name in golden::ALL.into_iter().filter(|name| !name.contains("-xen")) {
        let (file, state) = device_state(name);
        let range = state.vmdesc.unwrap();
        let json_at = range.start + VMDESCRIPTION_HEADER_LEN as u64;
        let json = at(&file, FileRange::new(json_at, range.end));
        let parsed = vmdesc::parse(json, json_at).unwrap();
        assert_eq!(parsed.page_size, Some(4096), "{name}");
        assert_eq!(parsed.vmstate, None, "{name}");
        let described: Vec<_> = parsed.devices.iter().map(|d| (d.name.as_str(), d.payload_len())).collect();
        // An early section is described, too: first, as it was written.
        let early = name.ends_with("virtio-mem").then_some((EARLY, Some(0x2c)));
        let later = state.sections.iter().map(|s| (s.idstr.as_str(), Some(s.payload.len())));
        let found: Vec<_> = early.into_iter().chain(later).collect();
        assert_eq!(described, found, "{name}");
        let mut again = Vec::new();
        parsed.encode(&mut again).unwrap();
        let (_, again) = again.split_at(VMDESCRIPTION_HEADER_LEN);
        assert!(vmdesc::parse(again, 0).unwrap() == parsed, "{name}: encoded and parsed it differs");
    }
}

#[test]
fn our_description_of_the_configuration_is_qemus() {
    // QEMU 7.2 describes no configuration.
    for name in golden::ALL.into_iter().filter(|name| name.contains("10.0") && !name.contains("-xen")) {
        let (file, state) = device_state(name);
        let start = MAPPED.iter().find(|mapped| mapped.0 == name).map_or(0, |mapped| mapped.1);
        let (preamble, _) = decode_preamble(&file[start as usize..], start).unwrap();
        let ours = vmdesc::describe(preamble.configuration.as_ref(), 4096, &state.sections, None);
        let range = state.vmdesc.unwrap();
        let json_at = range.start + VMDESCRIPTION_HEADER_LEN as u64;
        let theirs = vmdesc::parse(at(&file, FileRange::new(json_at, range.end)), json_at).unwrap();
        assert_eq!(ours.configuration, theirs.configuration, "{name}");
    }
}

#[test]
fn an_early_section_is_found_by_its_description_or_as_the_only_one_that_can_be() {
    let mapped = load("q35-10.0-mapped-ram-virtio-mem");
    let described = layout(&mapped, 0).unwrap();
    let [section] = &described.early[..] else { panic!("{:?}", described.early) };
    assert_eq!((section.idstr.as_str(), section.instance_id, section.version_id), (EARLY, 0, 1));
    assert_eq!(section.payload.len(), 0x2c);
    // Without its last byte there is no description any more; the end mark is the last byte then.
    let end = described.vmdesc.unwrap().start as usize;
    let searched = layout(&mapped[..end], 0).unwrap();
    assert_eq!(searched.early, described.early);
    assert_eq!(searched.device_state, described.device_state);

    let stream = load("q35-10.0-stream-virtio-mem");
    let scanned = replay(&stream, 1).unwrap();
    let [in_stream] = &scanned.early[..] else { panic!("{:?}", scanned.early) };
    // What `xen-save-devices-state` writes among the others is the very same section.
    let (xen, state) = device_state("q35-10.0-xen-virtio-mem");
    let lifted = state.section(EARLY, 0).unwrap();
    let bytes = |file: &[u8], section: &DeviceSection| {
        at(file, FileRange::new(section.header_at, section.end)).to_vec()
    };
    assert_eq!(bytes(&mapped, section), bytes(&xen, lifted));
    assert_eq!(bytes(&stream, in_stream), bytes(&xen, lifted));
}

#[test]
fn an_early_section_of_a_stream_has_the_length_that_is_described() {
    let (file, state) = device_state("q35-10.0-stream-virtio-mem");
    let early = replay(&file, file.len()).unwrap().early;
    let range = state.vmdesc.unwrap();
    let json_at = range.start + VMDESCRIPTION_HEADER_LEN as u64;
    let mut described = vmdesc::parse(at(&file, FileRange::new(json_at, range.end)), json_at).unwrap();
    assert_eq!(check_early(&early, Some(&described)), Ok(()));
    assert_eq!(check_early(&[], None), Ok(()));
    let message = |described| check_early(&early, described).unwrap_err().to_string();
    let section = format!("section `{EARLY}` at 0xdd");
    assert_eq!(message(None), format!("{section}: stands before the RAM, and nothing tells its length"));
    described.devices[0].fields[0].size += 1;
    let expected = format!("{section}: seems to have 0x2c bytes, but is described with 0x2d");
    assert_eq!(message(Some(&described)), expected);
}

#[test]
fn a_flipped_byte_is_refused() {
    // Each golden test proves here that it can fail: one byte of the metadata changes, and the reading of
    // the whole file is an error.
    let mapped = |file: &[u8]| layout(file, 0).map(drop);
    let stream = |file: &[u8]| replay(file, file.len()).map(drop);
    let xen = |file: &[u8]| decode_xen_device_state(file, 0).map(drop);
    type Read<'a> = &'a dyn Fn(&[u8]) -> Result<(), Fault>;
    let cases: [(&str, Read, usize, u8, &str); 13] = [
        (
            "q35-10.0-mapped-ram-virtio-mem",
            &mapped,
            0xc0106b,
            1,
            "section `0000:00:01.0/virtio-mem-device-early` at 0xc0103f: has no end",
        ),
        (
            "q35-10.0-stream-virtio-mem",
            &stream,
            0x13b,
            1,
            "stream at 0x52fb9: ends before the RAM section does",
        ),
        ("q35-10.0-mapped-ram", &mapped, 0, 1, "magic at 0x0: 0x5045564d is not 0x5145564d (`QEVM`)"),
        ("q35-10.0-mapped-ram", &mapped, 7, 1, "stream version at 0x4: version 2 is not 3"),
        (
            "q35-10.0-mapped-ram",
            &mapped,
            0x1f,
            1,
            "configuration subsection `confifuration/capabilities` at 0x18: is unknown and has no length",
        ),
        ("q35-10.0-mapped-ram", &mapped, 0x80, 1, "mapped-ram header at 0x7d: version 0 is not 1"),
        (
            "q35-10.0-mapped-ram",
            &mapped,
            0x84,
            1,
            "mapped-ram header of block `/rom@etc/acpi/tables` at 0x7d: page size 0x100001000 is none",
        ),
        (
            "q35-10.0-mapped-ram",
            &mapped,
            0x98,
            1,
            "mapped-ram header of block `/rom@etc/acpi/tables` at 0x7d: pages offset 0x100001 is not aligned to pages",
        ),
        (
            "q35-10.0-mapped-ram",
            &mapped,
            0x701036 - 1,
            1,
            "footer at 0x701031: closes section 0, but 1 is open",
        ),
        ("q35-10.0-stream", &stream, 0x18, 1, "end mark at 0x18: stands before the end of the RAM section"),
        ("q35-7.2-stream", &stream, 0x34e97 - 1, 1, "footer at 0x34e92: closes section 3, but 2 is open"),
        ("q35-10.0-xen", &xen, 0x5d + 1, 1, "section `cpu_common` at 0x38: has no end"),
        ("q35-7.2-xen", &xen, 0x7ee8, 1, "device state at 0x7ee9: has no end mark before its end"),
    ];
    for (name, read, place, flip, expected) in cases {
        let mut file = load(name);
        assert_eq!(read(&file), Ok(()), "{name}");
        file[place] ^= flip;
        assert_eq!(read(&file).unwrap_err().to_string(), expected, "{name}, byte {place:#x}");
    }
}

#[test]
fn a_bit_beyond_the_block_is_refused() {
    let file = load("q35-10.0-mapped-ram");
    let layout = layout(&file, 0).unwrap();
    let block = &layout.blocks[0];
    let mut bytes = at(&file, block.bitmap).to_vec();
    bytes[4] |= 0x10;
    assert_eq!(
        decode_bitmap(&bytes, block.bitmap.start, block.page_count()).unwrap_err().to_string(),
        "bitmap at 0x99: page 0x24 is marked, but the block has 0x20"
    );
    assert_eq!(block.page_count(), PageCount(0x20));
}
