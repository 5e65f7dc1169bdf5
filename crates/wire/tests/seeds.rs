//! The seeds of the fuzz targets are cut from the golden files.

mod golden;

use std::path::Path;

use page::{PageCount, PageSet};
use wire::IdStr;
use wire::libvirt_rpc::{Arguments, Domain};
use wire::postcopy::{Message, PageRequest, encode_received};

/// The seeds: target, name, bytes.
fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let stream = golden::load("q35-10.0-stream");
    let shared = golden::load("q35-10.0-stream-ignore-shared-uuid");
    let xen = golden::load("q35-10.0-xen");
    let with = |first: &[u8], rest: &[u8]| [first, rest].concat();
    // A short stream: the list of blocks, the first page and what surrounds it, no device state.
    let image = golden::sparse("q35-10.0-mapped-ram");
    let early = golden::load("q35-10.0-stream-virtio-mem");
    vec![
        ("preamble", "q35-10.0-stream", stream[..0x19].to_vec()),
        ("preamble", "q35-10.0-stream-ignore-shared-uuid", shared[..0x72].to_vec()),
        ("item", "start-of-ram", stream[0x18..0x29].to_vec()),
        ("item", "switchover-start", vec![8, 0, 11, 0, 0]),
        ("item", "ram-discard", b"\x08\0\x06\0\x1a\0\x06pc.ram\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0".to_vec()),
        ("block_list", "q35-10.0-stream", with(&[0], &stream[0x29..0xbd])),
        ("stream", "q35-10.0-stream", with(&[255], &stream[..0x2200])),
        ("stream", "q35-10.0-stream-virtio-mem", with(&[255], &early[..0x2200])),
        ("device_split", "q35-10.0-xen-head", with(&xen[8..0xae1], &[0])),
        ("device_split", "two-ways", two_ways()),
        ("description", "small", br#"{"devices":[{"name":"a","instance_id":0,"fields":[{"name":"f","type":"struct","size":3,"array_len":2,"struct":{"vmsd_name":"s","version":1,"fields":[]}}],"subsections":[{"vmsd_name":"a/b","version":1,"fields":[]}]}],"vmstate":{"k":[1]}}"#.to_vec()),
        ("fields", "struct-array-subsection", fields()),
        ("layout", "q35-10.0-mapped-ram", image[..].to_vec()),
        ("layout", "q35-10.0-mapped-ram-virtio-mem", golden::sparse("q35-10.0-mapped-ram-virtio-mem")),
        ("libvirt_head", "libvirt-11.3-raw", libvirt_head()),
        ("return_path", "conversation", conversation()),
        ("libvirt_rpc", "event", with(&[5], &event())),
        ("libvirt_rpc", "domain", with(&[2], Arguments::new().domain(&domain()).bytes())),
        ("bitmap", "pc.bios", vec![0, 3, 0, 0, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]),
    ]
}

/// A head of libvirt's whose padding has 8 bytes instead of 64 KiB, and the beginning of a stream.
fn libvirt_head() -> Vec<u8> {
    let file = golden::load("libvirt-11.3-raw");
    let head = wire::libvirt::Head::decode(&file, 0, file.len() as u64).unwrap();
    let mut seed = Vec::new();
    wire::libvirt::Head { padding_len: 8, ..head.clone() }.encode(&mut seed);
    seed.extend_from_slice(&file[head.len() as usize..]);
    seed
}

fn domain() -> Domain {
    Domain { name: "fxa".into(), uuid: *b"0123456789abcdef", id: 3 }
}

/// What libvirt's daemon sends when a guest goes on.
fn event() -> Vec<u8> {
    let event = Arguments::new().word(1).domain(&domain()).string("RESUME").word(0).word(1).word(2);
    event.optional_string(None).bytes().to_vec()
}

/// A message of each type, and a bitmap.
fn conversation() -> Vec<u8> {
    let name = |text: &str| IdStr::new(text).unwrap();
    let request = |block, start, len| Message::RequestPages(PageRequest { block, start, len });
    let mut bytes = Vec::new();
    for message in [
        Message::Pong(1),
        request(Some(name("pc.ram")), 0xc0000, 0x1000),
        request(None, 0xc1000, 0x1000),
        request(Some(name("huge")), 2 << 20, 2 << 20),
        Message::Pong(3),
        Message::SwitchoverAck,
        Message::ReceivedBitmap { block: name("/rom@etc/acpi/tables") },
    ] {
        message.encode(&mut bytes);
    }
    encode_received(&PageSet::from_words(vec![0xffff_0001], PageCount(32)), &mut bytes);
    Message::ResumeAck(1).encode(&mut bytes);
    Message::Shut(0).encode(&mut bytes);
    bytes
}

/// Device state that can be read as sections b, c, d or as b, e.
fn two_ways() -> Vec<u8> {
    let head = |id: u8, name: u8| vec![4, 0, 0, 0, id, 1, name, 0, 0, 0, 0, 0, 0, 0, 1];
    let footer = |id: u8| vec![0x7e, 0, 0, 0, id];
    [
        head(1, b'b'),
        footer(1),
        head(2, b'c'),
        footer(2),
        head(3, b'd'),
        footer(1),
        head(3, b'e'),
        footer(3),
        vec![0],
    ]
    .concat()
}

/// A payload with one of each: a number, an array, a struct, a list, a subsection; and its description.
fn fields() -> Vec<u8> {
    let payload = b"\0\0\0\x07\0\x01\0\x02\x09\x01\x05\0\x05\x03d/s\0\0\0\x01\x01";
    let json = br#"{"devices":[{"name":"d","instance_id":0,"vmsd_name":"d","version":1,"fields":[{"name":"n","type":"uint32","size":4},{"name":"a","array_len":2,"type":"uint16","size":2},{"name":"s","type":"struct","struct":{"vmsd_name":"s","version":1,"fields":[{"name":"b","type":"uint8","size":1}]},"size":1},{"name":"l","type":"qtailq","vmsd_name":"e","version":1,"fields":[{"name":"v","type":"uint8","size":1}],"size":3}],"subsections":[{"vmsd_name":"d/s","version":1,"fields":[{"name":"t","type":"bool","size":1}]}]}]}"#;
    [&(payload.len() as u16).to_be_bytes()[..], payload, json].concat()
}

#[test]
fn the_seed_of_fields_is_read() {
    let bytes = fields();
    let (payload, json) = bytes[2..].split_at(usize::from(u16::from_be_bytes([bytes[0], bytes[1]])));
    let description = wire::qemu::vmdesc::parse(json, 0).unwrap();
    let fields = wire::qemu::fields::decode_fields(&description.devices[0], payload, 0).unwrap();
    assert_eq!(wire::qemu::dump::fields(&fields).lines.len(), 6);
}

#[test]
fn seeds_are_cut_from_the_goldens() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    let write = std::env::var_os("WIRE_WRITE_SEEDS").is_some();
    for (target, name, bytes) in seeds() {
        let path = folder.join(target).join(name);
        if write {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let found = std::fs::read(&path)
            .unwrap_or_else(|error| panic!("{}: {error}; WIRE_WRITE_SEEDS=1 writes it", path.display()));
        assert!(found == bytes, "{} differs; WIRE_WRITE_SEEDS=1 writes it again", path.display());
    }
}

/// libFuzzer ends where a folder that it is given does not exist.
#[test]
fn every_target_has_seeds() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    for target in std::fs::read_dir(fuzz.join("fuzz_targets")).unwrap() {
        let name = target.unwrap().path().file_stem().unwrap().to_owned();
        let seeds = std::fs::read_dir(fuzz.join("seeds").join(&name));
        assert!(seeds.is_ok_and(|mut seeds| seeds.next().is_some()), "{}", name.display());
    }
}

#[test]
fn every_seed_passes_its_target() {
    for (target, _, bytes) in seeds() {
        let run = match target {
            "preamble" => wire::fuzz::preamble,
            "item" => wire::fuzz::item,
            "block_list" => wire::fuzz::block_list,
            "stream" => wire::fuzz::stream,
            "device_split" => wire::fuzz::device_split,
            "description" => wire::fuzz::description,
            "fields" => wire::fuzz::fields,
            "layout" => wire::fuzz::layout,
            "bitmap" => wire::fuzz::bitmap,
            "libvirt_head" => wire::fuzz::libvirt_head,
            "return_path" => wire::fuzz::return_path,
            "libvirt_rpc" => wire::fuzz::libvirt_rpc,
            other => panic!("there is no target {other}"),
        };
        run(&bytes);
    }
}
