//! What holds for all values and for all bytes.

mod golden;

use page::{PageCount, PageRange, PageSet, PageSize};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use wire::mapped_ram::{ImagePlan, Sections, encode_tail};
use wire::qemu::vmdesc::{self, Located};
use wire::qemu::{
    BlockEntry, BlockListVariant, Command, Configuration, DiscardRange, Event, Item, PostcopyAdvise,
    Preamble, RamSetup, RecordEncoder, SectionHeader, SectionKind, StreamScanner, decode_item,
    decode_preamble, decode_ram_setup, split_sections,
};
use wire::{DecodeError, Fault, IdStr, fuzz};

/// So many cases; a failure is printed whole and kept nowhere.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

fn idstr() -> impl Strategy<Value = IdStr> {
    prop_oneof![
        "[a-z0-9:./@-]{1,30}",
        // Every printable ASCII name, and the longest.
        "[ -~]{1,255}",
    ]
    .prop_map(|text| IdStr::new(&text).unwrap())
}

fn configuration() -> impl Strategy<Value = Configuration> {
    let bits = proptest::option::of(10..=16u32);
    let capabilities = btree_set(idstr(), 0..5).prop_map(|names| names.into_iter().collect::<Vec<_>>());
    (idstr(), bits, capabilities, any::<Option<[u8; 16]>>()).prop_map(
        |(machine, target_page_bits, capabilities, uuid)| Configuration {
            machine,
            target_page_bits,
            capabilities,
            uuid,
        },
    )
}

fn header(kind: SectionKind) -> impl Strategy<Value = SectionHeader> {
    (0..1u32 << 24, idstr(), any::<u32>(), 0..1u32 << 16).prop_map(
        move |(section_id, idstr, instance_id, version_id)| SectionHeader {
            kind,
            section_id,
            idstr,
            instance_id,
            version_id,
        },
    )
}

fn command() -> impl Strategy<Value = Command> {
    let range = (any::<u32>(), 1..u64::MAX / 4)
        .prop_map(|(start, len)| DiscardRange { start: u64::from(start) << 12, len });
    prop_oneof![
        Just(Command::OpenReturnPath),
        any::<u32>().prop_map(Command::Ping),
        any::<Option<(u64, u64)>>().prop_map(|advise| Command::PostcopyAdvise(
            advise.map(|(a, b)| { PostcopyAdvise { page_size_summary: a, target_page_size: b } })
        )),
        Just(Command::PostcopyListen),
        Just(Command::PostcopyRun),
        (idstr(), vec(range, 1..20))
            .prop_map(|(block, ranges)| Command::PostcopyRamDiscard { block, ranges }),
        any::<u32>().prop_map(|len| Command::Packaged { len }),
        Just(Command::EnableColo),
        Just(Command::PostcopyResume),
        idstr().prop_map(|block| Command::RecvBitmap { block }),
        Just(Command::SwitchoverStart),
    ]
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        Just(Item::Eof),
        header(SectionKind::Start).prop_map(Item::Section),
        header(SectionKind::Full).prop_map(Item::Section),
        any::<u32>().prop_map(|section_id| Item::Part { section_id }),
        any::<u32>().prop_map(|section_id| Item::End { section_id }),
        any::<u32>().prop_map(|section_id| Item::Footer { section_id }),
        any::<u32>().prop_map(|len| Item::VmDescription { len }),
        command().prop_map(Item::Command),
    ]
}

fn setup() -> impl Strategy<Value = (RamSetup, BlockListVariant)> {
    let block = (1..1u64 << 28, proptest::option::of(10..40u32), any::<u64>());
    let blocks = (btree_set(idstr(), 1..12), vec(block, 12));
    let variant = prop_oneof![
        Just(BlockListVariant::Plain),
        Just(BlockListVariant::Postcopy),
        Just(BlockListVariant::IgnoreShared),
    ];
    (blocks, any::<bool>(), variant).prop_map(|((names, blocks), multifd_flush, variant)| {
        let blocks = names
            .into_iter()
            .zip(blocks)
            .map(|(name, (kib, page_bits, address))| BlockEntry {
                name,
                used_length: kib << 10,
                page_size: page_bits.filter(|_| variant == BlockListVariant::Postcopy).map(|bits| 1 << bits),
                address: (variant == BlockListVariant::IgnoreShared).then_some(address),
            })
            .collect();
        (RamSetup { blocks, multifd_flush }, variant)
    })
}

/// Every prefix of `bytes` that is shorter asks for more, and not for more than there is.
fn check_prefixes<T>(bytes: &[u8], len: usize, decode: impl Fn(&[u8]) -> Result<T, DecodeError>) {
    for cut in 0..len {
        match decode(&bytes[..cut]) {
            Err(DecodeError::Incomplete { needed, .. }) => {
                assert!((1..=(len - cut) as u64).contains(&needed), "cut at {cut} of {len}: {needed}");
            }
            Err(DecodeError::Fault(fault)) => panic!("cut at {cut} of {len}: {fault}"),
            Ok(_) => panic!("cut at {cut} of {len}: decoded"),
        }
    }
}

proptest! {
    #![proptest_config(config(128))]

    #[test]
    fn preambles_are_read_as_written(configuration in proptest::option::of(configuration())) {
        let preamble = Preamble { configuration };
        let mut bytes = Vec::new();
        preamble.encode(&mut bytes);
        let len = bytes.len();
        bytes.push(1);
        prop_assert_eq!(decode_preamble(&bytes, 0), Ok((preamble, len)));
        check_prefixes(&bytes, bytes.len(), |bytes| decode_preamble(bytes, 0));
    }

    #[test]
    fn items_are_read_as_written(item in item()) {
        let mut bytes = Vec::new();
        item.encode(&mut bytes);
        prop_assert_eq!(decode_item(&bytes, 7), Ok((item, bytes.len())));
        check_prefixes(&bytes, bytes.len(), |bytes| decode_item(bytes, 7));
    }

    #[test]
    fn block_lists_are_read_as_written((setup, variant) in setup()) {
        let mut bytes = Vec::new();
        setup.encode(&mut bytes);
        prop_assert_eq!(decode_ram_setup(&bytes, 7, variant), Ok((setup, bytes.len())));
        check_prefixes(&bytes, bytes.len(), |bytes| decode_ram_setup(bytes, 7, variant));
    }

    #[test]
    fn arbitrary_bytes_panic_nowhere(data in vec(any::<u8>(), 0..600)) {
        for target in [
            fuzz::preamble, fuzz::item, fuzz::block_list, fuzz::stream, fuzz::device_split,
            fuzz::description, fuzz::fields, fuzz::layout, fuzz::bitmap, fuzz::return_path, fuzz::libvirt_rpc,
        ] {
            target(&data);
        }
    }

    #[test]
    fn bitmaps_are_the_same_whole_and_in_pieces(
        ranges in vec((0..3000u64, 1..400u64), 0..20),
        pages in 3400..3500u64,
        window in any::<u8>(),
    ) {
        let mut set = PageSet::new(PageCount(pages));
        for (start, len) in ranges {
            set.insert(PageRange::new(start, start + len));
        }
        let mut bytes = vec![(64 - pages % 64) as u8 % 64, window];
        wire::mapped_ram::encode_bitmap(&set, &mut bytes);
        fuzz::bitmap(&bytes);
    }
}

/// One step of a made-up stream behind the block list.
#[derive(Clone, Debug)]
enum Op {
    Page { block: usize, page: u64, fill: u8 },
    Zero { block: usize, page: u64 },
    Flush,
    NextPart,
    Command,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..3usize, 0..4u64, any::<u8>()).prop_map(|(block, page, fill)| Op::Page { block, page, fill }),
        4 => (0..3usize, 0..4u64).prop_map(|(block, page)| Op::Zero { block, page }),
        1 => Just(Op::Flush),
        1 => Just(Op::NextPart),
        1 => Just(Op::Command),
    ]
}

/// A page of a stream: block, offset, and what it is filled with, if it is no ZERO record.
type PageSeen = (usize, u64, Option<u8>);

/// Writes a stream of three blocks of four pages, and says what its pages are.
fn compose(ops: &[Op]) -> (Vec<u8>, Vec<PageSeen>) {
    let name = |i: usize| IdStr::new(&format!("block{i}")).unwrap();
    let block = |i| BlockEntry { name: name(i), used_length: 0x4000, page_size: None, address: None };
    let setup = RamSetup { blocks: (0..3).map(block).collect(), multifd_flush: ops.len() % 2 == 1 };
    let mut out = Vec::new();
    Preamble { configuration: None }.encode(&mut out);
    setup.encode_section(5, &mut out);
    let mut records = RecordEncoder::new(&setup);
    let mut pages = Vec::new();
    Item::Part { section_id: 5 }.encode(&mut out);
    for op in ops {
        match *op {
            Op::Page { block, page, fill } => {
                records.page_head(block, page << 12, &mut out);
                out.extend_from_slice(&[fill; 4096]);
                pages.push((block, page << 12, Some(fill)));
            }
            Op::Zero { block, page } => {
                records.zero(block, page << 12, &mut out);
                pages.push((block, page << 12, None));
            }
            Op::Flush => records.flush(&mut out),
            Op::NextPart | Op::Command => {
                records.eos(&mut out);
                Item::Footer { section_id: 5 }.encode(&mut out);
                if matches!(op, Op::Command) {
                    Command::SwitchoverStart.encode(&mut out);
                }
                Item::Part { section_id: 5 }.encode(&mut out);
            }
        }
    }
    records.eos(&mut out);
    Item::Footer { section_id: 5 }.encode(&mut out);
    Item::End { section_id: 5 }.encode(&mut out);
    records.eos(&mut out);
    Item::Footer { section_id: 5 }.encode(&mut out);
    (out, pages)
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn any_division_of_a_stream_gives_the_same_pages(
        ops in vec(op(), 0..30),
        cuts in vec(1..6000usize, 1..8),
    ) {
        let (mut stream, expected) = compose(&ops);
        let end = stream.len();
        stream.extend_from_slice(b"\x04 is opaque");
        let mut scanner = StreamScanner::new(100, PageSize::X86);
        let mut pages = Vec::new();
        let mut device_state = None;
        let (mut at, mut taken, mut turn) = (0, 0, 0);
        while at < stream.len() {
            let piece = &stream[at..(at + cuts[turn % cuts.len()]).min(stream.len())];
            taken += scanner.feed::<Fault>(piece, |event| {
                match event {
                    Event::Page { block, offset, data, .. } => {
                        assert!(data.len() == 4096 && data.iter().all(|byte| *byte == data[0]));
                        pages.push((block, offset, Some(data[0])));
                    }
                    Event::Zero { block, offset } => pages.push((block, offset, None)),
                    Event::DeviceState { at, ram_ended } => device_state = Some((at, ram_ended)),
                    _ => {}
                }
                Ok(())
            }).unwrap();
            at += piece.len();
            turn += 1;
        }
        prop_assert_eq!(pages, expected);
        prop_assert_eq!(device_state, Some((100 + end as u64, true)));
        prop_assert_eq!(taken, end, "nothing of the device state is taken");
        prop_assert_eq!(scanner.leftover(), b"");
        prop_assert_eq!(scanner.finish(), Ok(()));
    }

    #[test]
    fn damaged_streams_read_the_same_in_any_division(
        ops in vec(op(), 0..12),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        window in any::<u8>(),
    ) {
        let (mut data, _) = compose(&ops);
        data.insert(0, window);
        for (place, byte) in damage {
            let place = place.index(data.len());
            data[place] = byte;
        }
        fuzz::stream(&data);
    }

    #[test]
    fn sections_are_found_whatever_they_hold(
        sections in vec((header(SectionKind::Full), vec(any::<u8>(), 0..200)), 1..12),
    ) {
        let mut blob = Vec::new();
        let mut expected = Vec::new();
        for (i, (mut header, payload)) in sections.into_iter().enumerate() {
            header.section_id = i as u32;
            expected.push((header.idstr.clone(), blob.len()));
            header.encode(&mut blob);
            blob.extend_from_slice(&payload);
            Item::Footer { section_id: i as u32 }.encode(&mut blob);
        }
        let end = blob.len();
        blob.push(0);
        let state = split_sections(&blob, 0x100).unwrap();
        let found: Vec<_> =
            state.sections.iter().map(|s| (s.idstr.clone(), (s.header_at - 0x100) as usize)).collect();
        prop_assert_eq!(found, expected);
        prop_assert_eq!(state.eof_at, 0x100 + end as u64);
        fuzz::device_split(&blob);
    }

    #[test]
    fn composed_images_are_laid_out_as_planned(
        sizes in vec(1..40u64, 1..5),
        start in 0..0x20_0000u64,
        sections in vec((header(SectionKind::Full), vec(any::<u8>(), 0..100)), 0..4),
        early in vec((header(SectionKind::Full), vec(any::<u8>(), 0..100)), 0..4),
    ) {
        let configuration = Configuration::new(IdStr::new("pc-q35-10.0").unwrap())
            .with_capability(IdStr::new("mapped-ram").unwrap());
        let blocks: Vec<_> = sizes.iter().enumerate().map(|(i, pages)| BlockEntry {
            name: IdStr::new(&format!("block{i}")).unwrap(),
            used_length: pages << 12,
            page_size: None,
            address: None,
        }).collect();
        let ram = SectionHeader::ram(3);
        let plan = ImagePlan::new(&configuration, &ram, &blocks, PageSize::X86, start).unwrap();
        let encoded = |sections: &[(SectionHeader, Vec<u8>)]| {
            let mut blob = Vec::new();
            for (header, payload) in sections {
                header.encode(&mut blob);
                blob.extend_from_slice(payload);
                Item::Footer { section_id: header.section_id }.encode(&mut blob);
            }
            blob
        };
        // Of one id there is one section; the description tells names apart.
        let early: Vec<_> = early.into_iter().enumerate().map(|(i, (mut header, payload))| {
            header.section_id = 1000 + i as u32;
            header.instance_id = i as u32;
            (header, payload)
        }).collect();
        let (blob, early_blob) = (encoded(&sections), encoded(&early));
        let sections = Sections { early: &early_blob, devices: &blob };
        let manifest = serde_json::json!({ "tool": "vmstate", "höhe": [1, 2] });
        let mut description = vmdesc::describe(Some(&configuration), 4096, &[], Some(manifest.clone()));
        description.devices = early.iter().map(|(header, payload)| vmdesc::Device {
            name: header.idstr.as_str().to_owned(),
            instance_id: header.instance_id,
            fields: vec![vmdesc::Field::plain("data", "buffer", payload.len() as u64)],
            ..vmdesc::Device::default()
        }).collect();
        let tail = encode_tail(3, sections, &description).unwrap();

        let mut file = vec![0; plan.tail_offset as usize];
        for block in &plan.blocks {
            let place = block.metadata_at as usize;
            file[place..place + block.metadata.len()].copy_from_slice(&block.metadata);
        }
        file.extend_from_slice(&tail);
        let layout = golden::layout(&file, start).unwrap();
        prop_assert_eq!(&layout.ram, &ram);
        prop_assert_eq!(layout.preamble.configuration, Some(configuration));
        let planned: Vec<_> = plan.blocks.into_iter().map(|block| block.placement).collect();
        prop_assert_eq!(layout.blocks, planned);
        let found: Vec<_> = layout.early.iter()
            .map(|section| (section.section_id, golden::at(&file, section.payload).to_vec())).collect();
        let put: Vec<_> = early.iter().map(|(header, payload)| (header.section_id, payload.clone())).collect();
        prop_assert_eq!(found, put);
        let state = golden::at(&file, layout.device_state);
        prop_assert_eq!(&state[..blob.len()], &blob[..]);
        prop_assert_eq!(&state[blob.len()..], b"\0");
        let vmdesc = layout.vmdesc.unwrap();
        prop_assert_eq!(vmdesc::locate(golden::at(&file, vmdesc), vmdesc.start), Located::Found(vmdesc));
        let parsed = vmdesc::parse(&golden::at(&file, vmdesc)[5..], vmdesc.start + 5).unwrap();
        prop_assert_eq!(parsed.vmstate, Some(manifest));
    }
}

/// The device state of a golden file, cut where no padding of RAM is left.
fn golden_blob(name: &str) -> Vec<u8> {
    let mut file = golden::load(name);
    match name {
        "q35-10.0-xen" | "q35-7.2-xen" => file.split_off(8),
        "q35-10.0-stream" => file.split_off(0x34e9d),
        other => panic!("{other} has no known device state"),
    }
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn mutated_goldens_panic_nowhere(
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        for name in ["q35-10.0-xen", "q35-7.2-xen", "q35-10.0-stream"] {
            let mut blob = golden_blob(name);
            for (place, byte) in &damage {
                let place = place.index(blob.len());
                blob[place] = *byte;
            }
            fuzz::device_split(&blob);
            blob.truncate(cut.index(blob.len()));
            fuzz::device_split(&blob);
        }
        let mut stream = vec![255];
        stream.extend_from_slice(&golden::load("q35-10.0-stream"));
        for (place, byte) in &damage {
            let place = place.index(stream.len());
            stream[place] = *byte;
        }
        fuzz::stream(&stream);
    }

    #[test]
    fn mutated_images_panic_nowhere(damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        for name in ["q35-10.0-mapped-ram", "q35-10.0-mapped-ram-virtio-mem"] {
            let mut packed = golden::sparse(name);
            // The blocks' metadata is in the first half kilobyte; the rest is device state and JSON.
            for (place, byte) in &damage {
                let place = place.index(520);
                packed[place] = *byte;
            }
            fuzz::layout(&packed);
        }
    }
}
