//! The return path: what every message looks like, and what is taken from a target that lies.

use page::{PageCount, PageRange, PageSet};
use wire::postcopy::{
    Message, Opening, PageRequest, RequestedBlock, Requests, Wanted, decode_message, decode_package,
    decode_received, dump, encode_received, survey,
};
use wire::qemu::{
    BlockEntry, Command, Configuration, DiscardRange, Item, PostcopyAdvise, Preamble, RamSetup, decode_item,
};
use wire::{DecodeError, FileRange, IdStr};

fn name(text: &str) -> IdStr {
    IdStr::new(text).unwrap()
}

fn request(block: Option<&str>, start: u64, len: u32) -> PageRequest {
    PageRequest { block: block.map(name), start, len }
}

fn blocks() -> Vec<RequestedBlock> {
    vec![
        RequestedBlock { name: name("pc.ram"), length: 0x10_0000, host_page: 0x1000 },
        RequestedBlock { name: name("huge"), length: 4 << 20, host_page: 2 << 20 },
    ]
}

#[test]
fn every_message_has_the_bytes_of_qemu() {
    let table: [(&[u8], Message); 7] = [
        (b"\0\x01\0\x04\0\0\0\0", Message::Shut(0)),
        (b"\0\x02\0\x04\0\0\0\x03", Message::Pong(3)),
        (
            b"\0\x03\0\x13\0\0\0\0\0\x0c\0\0\0\0\x10\0\x06pc.ram",
            Message::RequestPages(request(Some("pc.ram"), 0xc0000, 0x1000)),
        ),
        (b"\0\x04\0\x0c\0\0\0\0\0\x20\0\0\0\x20\0\0", Message::RequestPages(request(None, 2 << 20, 2 << 20))),
        (b"\0\x05\0\x07\x06pc.ram", Message::ReceivedBitmap { block: name("pc.ram") }),
        (b"\0\x06\0\x04\0\0\0\x01", Message::ResumeAck(1)),
        (b"\0\x07\0\0", Message::SwitchoverAck),
    ];
    for (bytes, message) in table {
        let mut encoded = Vec::new();
        message.encode(&mut encoded);
        assert_eq!(encoded, bytes, "{message:?}");
        assert_eq!(decode_message(bytes, 0), Ok((message.clone(), bytes.len())));
        for len in 0..bytes.len() {
            let cut = decode_message(&bytes[..len], 0);
            assert!(matches!(cut, Err(DecodeError::Incomplete { .. })), "{message:?} cut to {len}: {cut:?}");
        }
    }
}

#[test]
fn a_message_that_lies_is_refused_with_its_place() {
    for (bytes, problem) in [
        (&b"\0\0\0\0"[..], "message type at 0x40: 0 is unknown"),
        (b"\0\x08\0\0", "message type at 0x40: 8 is unknown"),
        (b"\0\x03\x02\x01", "message length at 0x40: 513 bytes are more than 512"),
        (b"\0\x01\0\x02\0\0", "shut's error at 0x44: the input ends 2 bytes too early"),
        (b"\0\x02\0\x05\0\0\0\0\0", "message 2 at 0x40: 1 bytes are left over in its payload"),
        (b"\0\x06\0\x04\0\0\0\x02", "resume's acknowledgement at 0x44: 2 is not 1"),
        (
            b"\0\x03\0\x0d\0\0\0\0\0\0\0\0\0\0\x10\0\0",
            "requested block at 0x50: is empty or not printable text",
        ),
        (
            b"\0\x03\0\x0e\0\0\0\0\0\0\0\0\0\0\x10\0\x02a",
            "requested block at 0x51: the input ends 1 bytes too early",
        ),
        (b"\0\x05\0\x03\x02\xff\xff", "bitmap's block at 0x44: is empty or not printable text"),
    ] {
        match decode_message(bytes, 0x40) {
            Err(DecodeError::Fault(fault)) => assert_eq!(fault.to_string(), problem),
            other => panic!("{bytes:x?}: {other:?}"),
        }
    }
}

#[test]
fn only_whole_pages_within_a_block_are_served() {
    let mut requests = Requests::new(blocks());
    let refusal = |requests: &mut Requests, request: PageRequest| {
        requests.judge(&request, 0x10).unwrap_err().to_string()
    };
    assert_eq!(
        refusal(&mut requests, request(None, 0, 0x1000)),
        "page request at 0x10: names no block, and none was named before"
    );
    assert_eq!(
        refusal(&mut requests, request(Some("vga.vram"), 0, 0x1000)),
        "page request at 0x10: block `vga.vram` is unknown"
    );
    // A request that was refused is not what the next one refers to.
    assert_eq!(
        refusal(&mut requests, request(None, 0, 0x1000)),
        "page request at 0x10: names no block, and none was named before"
    );
    let wanted = |block, start, end| Ok(Wanted { block, pages: PageRange::new(start, end) });
    assert_eq!(requests.judge(&request(Some("huge"), 2 << 20, 2 << 20), 0), wanted(1, 1, 2));
    assert_eq!(requests.judge(&request(None, 0, 4 << 20), 0), wanted(1, 0, 2));
    assert_eq!(requests.judge(&request(Some("pc.ram"), 0xff000, 0x1000), 0), wanted(0, 0xff, 0x100));
    for (start, len) in [
        (0xff000, 0x2000),
        (0x10_0000, 0x1000),
        (0x800, 0x1000),
        (0, 0x800),
        (0, 0),
        (u64::MAX - 0xfff, 0x1000),
        (!0xfff, !0xfff),
    ] {
        assert_eq!(
            refusal(&mut requests, request(None, start, len)),
            format!(
                "page request at 0x10: {len:#x} bytes from {start:#x} are no pages of `pc.ram`, \
                 which has 0x100000 bytes in pages of 0x1000"
            )
        );
    }
    // Asked for twice is no lie: the first answer may be on its way.
    assert_eq!(requests.judge(&request(None, 0, 0x1000), 0), wanted(0, 0, 1));
    assert_eq!(requests.judge(&request(None, 0, 0x1000), 0), wanted(0, 0, 1));
    requests.reconnect();
    assert!(requests.judge(&request(None, 0, 0x1000), 0).is_err(), "a new connection has no block before");
}

#[test]
fn a_bitmap_is_taken_only_for_the_block_that_it_is_of() {
    let pages = PageCount(100);
    let mut set = PageSet::new(pages);
    set.insert(PageRange::new(3, 70));
    let mut bytes = Vec::new();
    encode_received(&set, &mut bytes);
    assert_eq!(bytes[..9], [0, 0, 0, 0, 0, 0, 0, 16, 0xf8], "be64 length, then little-endian bits");
    assert_eq!(decode_received(&bytes, 0, pages), Ok((set, bytes.len())));
    for len in 0..bytes.len() {
        assert!(matches!(decode_received(&bytes[..len], 0, pages), Err(DecodeError::Incomplete { .. })));
    }
    let fault = |bytes: &[u8], pages| decode_received(bytes, 0x20, PageCount(pages)).unwrap_err().to_string();
    assert_eq!(fault(&bytes, 129), "bitmap's length at 0x20: 0x10 bytes are not the 0x18 of 0x81 pages");
    assert_eq!(fault(&bytes, 69), "bitmap at 0x30: page 0x45 is marked, but the block has 0x45");
    let mut torn = bytes.clone();
    *torn.last_mut().unwrap() ^= 1;
    assert_eq!(fault(&torn, 100), "bitmap's end at 0x38: 0x123456789abcdee is not 0x123456789abcdef");
    // Nothing is reserved for a length that nobody will send.
    let absurd = u64::MAX.to_be_bytes();
    assert!(fault(&absurd, 100).starts_with("bitmap's length at 0x20: "));
}

#[test]
fn a_survey_goes_on_where_a_reading_stops() {
    let mut bytes = Vec::new();
    Message::Pong(1).encode(&mut bytes);
    Message::RequestPages(request(Some("nobody"), 0, 0x1000)).encode(&mut bytes);
    bytes.extend(b"\0\x06\0\x04\0\0\0\x09");
    Message::ReceivedBitmap { block: name("pc.ram") }.encode(&mut bytes);
    encode_received(&PageSet::new(PageCount(256)), &mut bytes);
    Message::RequestPages(request(Some("pc.ram"), 1, 0x1000)).encode(&mut bytes);
    bytes.extend(b"\0\x02");
    let report = survey::return_path(&bytes, 0, &blocks(), 4096);
    let faults: Vec<_> = report.faults.iter().map(ToString::to_string).collect();
    assert_eq!(
        faults,
        [
            "page request at 0x8: block `nobody` is unknown",
            "resume's acknowledgement at 0x23: 9 is not 1",
            "page request at 0x62: 0x1000 bytes from 0x1 are no pages of `pc.ram`, which has 0x100000 bytes in pages of 0x1000",
            "message length at 0x7b: the input ends 2 bytes too early",
        ]
    );
    assert_eq!(
        dump::return_path(&bytes, 0x100).to_string(),
        "0x000000000100  pong = 0x1\n0x000000000108  request = nobody 0x0..0x1000\n"
    );
}

fn opening(device_state: &[u8]) -> Opening<'_> {
    let entry = |text: &str, used_length, page_size| BlockEntry {
        name: name(text),
        used_length,
        page_size,
        address: None,
    };
    Opening {
        preamble: Preamble { configuration: Some(Configuration::new(name("pc-q35-10.0"))) },
        section_id: 2,
        setup: RamSetup {
            blocks: vec![entry("pc.ram", 4 << 20, Some(2 << 20)), entry("pc.rom", 0x20000, None)],
            multifd_flush: false,
        },
        advise: PostcopyAdvise { page_size_summary: 0x20_1000, target_page_size: 0x1000 },
        discards: vec![(name("pc.ram"), vec![DiscardRange { start: 0, len: 4 << 20 }; 13])],
        device_state,
    }
}

#[test]
fn the_opening_has_all_that_a_target_needs_in_the_order_that_it_needs() {
    let state = b"\x04 what is in here has no length";
    let mut bytes = Vec::new();
    opening(state).encode(&mut bytes).unwrap();
    let (_, mut at) = wire::qemu::decode_preamble(&bytes, 0).unwrap();
    let mut commands = Vec::new();
    let package = loop {
        let (item, len) = decode_item(&bytes[at..], at as u64).unwrap();
        at += len;
        match item {
            Item::Command(Command::Packaged { len }) => break &bytes[at..][..len as usize],
            Item::Command(Command::PostcopyRamDiscard { ranges, .. }) => {
                commands.push(format!("{}", ranges.len()))
            }
            Item::Command(command) => commands.push(format!("{command:?}")),
            Item::Section(header) => {
                assert_eq!((header.section_id, header.idstr.as_str()), (2, "ram"));
                let variant = wire::qemu::BlockListVariant::Postcopy;
                let (setup, len) = wire::qemu::decode_ram_setup(&bytes[at..], at as u64, variant).unwrap();
                assert_eq!(setup, opening(state).setup);
                at += len;
                commands.push("ram".to_owned());
            }
            Item::Footer { section_id: 2 } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        commands,
        [
            "OpenReturnPath",
            "Ping(1)",
            "PostcopyAdvise(Some(PostcopyAdvise { page_size_summary: 2101248, target_page_size: 4096 }))",
            "ram",
            // As many ranges as QEMU puts into one, and what is left.
            "12",
            "1",
        ]
    );
    let parts = decode_package(package, 0).unwrap();
    assert_eq!(parts.device_state, FileRange::new(5, 5 + state.len() as u64));
    assert_eq!(parts.ping, Some(3));
    assert_eq!(at + package.len(), bytes.len());
}

#[test]
#[should_panic(expected = "a page to discard")]
fn an_opening_without_a_discard_would_hang_its_target() {
    let _ = Opening { discards: Vec::new(), ..opening(b"") }.encode(&mut Vec::new());
}

#[test]
fn a_package_begins_with_listen_and_ends_with_run() {
    let (listen, run, ping) = (b"\x08\0\x04\0\0", b"\x08\0\x05\0\0", b"\x08\0\x02\0\x04\0\0\0\x03");
    let check = |pieces: &[&[u8]]| decode_package(&pieces.concat(), 0x10).map_err(|fault| fault.to_string());
    let found =
        |start, end, ping| Ok(wire::postcopy::Package { device_state: FileRange::new(start, end), ping });
    assert_eq!(check(&[listen, b"state", run]), found(0x15, 0x1a, None));
    assert_eq!(check(&[listen, b"state", ping, run]), found(0x15, 0x1a, Some(3)));
    assert_eq!(check(&[listen, run]), found(0x15, 0x15, None));
    assert_eq!(
        check(&[b"state", run]),
        Err("section type at 0x10: 0x73 is no type that may stand here".into())
    );
    assert_eq!(check(&[run, run]), Err("package at 0x10: does not begin with LISTEN".into()));
    assert_eq!(check(&[listen, b"state"]), Err("package at 0x1a: does not end with RUN".into()));
    assert_eq!(check(&[listen]), Err("package at 0x15: does not end with RUN".into()));
    assert_eq!(check(&[]), Err("section type at 0x10: the input ends 1 bytes too early".into()));
}
