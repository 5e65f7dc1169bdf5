//! Heads of libvirt's images: real ones are read exactly, every lie is refused by name and offset, and what holds
//! for all of them.

mod golden;

use proptest::prelude::*;
use wire::libvirt::format::*;
use wire::libvirt::survey::HeadReport;
use wire::libvirt::{ByteOrder, Head, PayloadFormat, dump, survey};
use wire::{DecodeError, Fault, fuzz};

/// Reads a head out of memory, giving no more than is asked for.
fn decode(file: &[u8], base: u64) -> Result<Head, Fault> {
    let mut given = 0;
    loop {
        match Head::decode(&file[base as usize..][..given], base, file.len() as u64) {
            Ok(head) => return Ok(head),
            Err(DecodeError::Incomplete { needed, .. }) => given += needed as usize,
            Err(DecodeError::Fault(fault)) => return Err(fault),
        }
    }
}

fn survey(file: &[u8]) -> HeadReport {
    survey::head(file, 0, file.len() as u64).unwrap()
}

#[test]
fn heads_of_libvirt_11_3_are_read_exactly_and_written_again() {
    for (name, format) in golden::LIBVIRT.into_iter().zip(PayloadFormat::ALL) {
        let file = golden::load(name);
        let head = decode(&file, 0).unwrap();
        assert_eq!(head.format, format, "{name}");
        assert_eq!((head.version, head.byte_order), (2, ByteOrder::Little), "{name}");
        // One was saved with --paused.
        assert_eq!(head.was_running, name != "libvirt-11.3-xz", "{name}");
        assert!(head.xml.starts_with("<domain type='qemu'>\n  <name>fxbios</name>"), "{name}");
        assert!(head.xml.ends_with("</domain>\n"), "{name}");
        let cookie = head.cookie.as_deref().unwrap();
        assert!(cookie.starts_with("<cookie>\n  <cpu mode='custom' match='exact' check='full'>"), "{name}");
        assert!(cookie.ends_with("  <slirpHelper/>\n</cookie>\n"), "{name}");
        assert_eq!((head.gap_len, head.padding_len), (0, PADDING_LEN), "{name}");
        assert_eq!(head.len(), 0x10901, "{name}");
        head.check_payload(&file[head.len() as usize..], head.len()).unwrap();

        let mut again = Vec::new();
        head.encode(&mut again);
        assert!(again == file[..head.len() as usize], "{name}");
        let composed = Head::new(format, head.was_running, head.xml.clone(), head.cookie.clone());
        assert_eq!(composed, Ok(head), "{name}");
    }
}

/// A fuzzer found that four bytes which are no image's were first told to be too few, and then to be no image's.
#[test]
fn a_file_that_is_shorter_than_a_header_is_told_the_same_however_much_of_it_is_given() {
    for (file, expected) in [
        (&b"LLii"[..], "magic at 0x0: is not libvirt's"),
        (b"Libv", "header at 0x0: the file ends at 0x4, 88 bytes too early"),
        (b"", "header at 0x0: the file ends at 0x0, 92 bytes too early"),
    ] {
        assert_eq!(decode(file, 0).unwrap_err().to_string(), expected);
        assert_eq!(survey(file).report.faults[0].to_string(), expected);
        fuzz::libvirt_head(file);
    }
}

#[test]
fn little_more_than_the_texts_is_asked_for() {
    let file = golden::load("libvirt-11.3-raw");
    let mut given = 0;
    while let Err(DecodeError::Incomplete { needed, .. }) = Head::decode(&file[..given], 0, file.len() as u64)
    {
        given += needed as usize;
    }
    assert!(given < 8192, "{given} of {} bytes", file.len());
}

#[test]
fn a_golden_that_is_changed_is_refused() {
    for (field, byte, expected) in [
        (MAGIC_AT, b'l', "magic at 0x0: is not libvirt's"),
        (VERSION_AT + 3, 7, "version at 0x10: 33554439 is not within 1..=2"),
        (FORMAT_AT, 9, "format at 0x1c: 9 is none that is known"),
    ] {
        let mut file = golden::load("libvirt-11.3-zstd");
        file[field] = byte;
        assert_eq!(decode(&file, 0).unwrap_err().to_string(), expected);
    }
}

#[test]
fn a_payload_of_another_format_is_refused() {
    let file = golden::load("libvirt-11.3-zstd");
    let head = decode(&file, 0).unwrap();
    let other = golden::load("libvirt-11.3-gzip");
    for first in [&other[head.len() as usize..], b"(\xb5"] {
        assert_eq!(
            head.check_payload(first, head.len()).unwrap_err().to_string(),
            "payload at 0x10901: does not begin as zstd does"
        );
    }
}

#[test]
fn a_head_is_read_behind_any_offset_and_in_either_byte_order() {
    let head = Head::new(PayloadFormat::Xz, true, "<domain/>".into(), Some("<cookie/>".into())).unwrap();
    for byte_order in [ByteOrder::Little, ByteOrder::Big] {
        for (base, version) in [(0, 2), (0x1001, 2), (7, 1)] {
            let head = Head { byte_order, version, ..head.clone() };
            let mut file = vec![0xff; base];
            head.encode(&mut file);
            assert_eq!(decode(&file, base as u64), Ok(head), "{byte_order:?} {base:#x}");
        }
    }
}

#[test]
fn a_head_is_padded_to_where_its_payload_is_wanted() {
    let head = Head::new(PayloadFormat::Sparse, true, "<domain/>".into(), None).unwrap();
    for (base, alignment) in [(0, 1), (0, 4096), (0x201, 4096), (0, 1 << 20)] {
        let aligned = head.clone().aligned(base, alignment);
        assert_eq!((base + aligned.len()) % alignment, 0);
        assert!((PADDING_LEN..PADDING_LEN + alignment).contains(&aligned.padding_len));
        let mut file = vec![0; base as usize];
        aligned.encode(&mut file);
        assert_eq!(decode(&file, base), Ok(aligned));
    }
}

/// A small image: XML of 9 bytes, cookie of 9 bytes, 16 bytes of padding, 4 of payload.
fn small() -> Vec<u8> {
    let head = Head::new(PayloadFormat::Raw, true, "<domain/>".into(), Some("<cookie/>".into())).unwrap();
    let mut file = Vec::new();
    Head { padding_len: 16, ..head }.encode(&mut file);
    file.extend_from_slice(b"QEVM");
    file
}

#[test]
fn every_lie_of_a_head_is_refused_by_name_and_offset() {
    type Damage = fn(&mut Vec<u8>);
    let cases: [(Damage, &str); 16] = [
        (|file| file.truncate(0), "header at 0x0: the file ends at 0x0, 92 bytes too early"),
        (|file| file.truncate(91), "header at 0x0: the file ends at 0x5b, 1 bytes too early"),
        (|file| file[0] = b'Q', "magic at 0x0: is not libvirt's"),
        (
            |file| file[..16].copy_from_slice(&QEMU_SAVE_PARTIAL),
            "magic at 0x0: says that the image was not written to its end",
        ),
        (|file| file[VERSION_AT] = 0, "version at 0x10: 0 is not within 1..=2"),
        (|file| file[VERSION_AT] = 3, "version at 0x10: 50331648 is not within 1..=2"),
        (|file| file[FORMAT_AT] = 7, "format at 0x1c: 7 is none that is known"),
        (|file| file[DATA_LEN_AT] = 0, "data length at 0x14: is zero, but there is an XML"),
        (
            |file| file[DATA_LEN_AT] = 41,
            "data length at 0x14: 0x29 bytes reach beyond the file, which ends at 0x84",
        ),
        (
            |file| file[DATA_LEN_AT + 3] = 0xff,
            "data length at 0x14: 0xff000024 bytes reach beyond the file, which ends at 0x84",
        ),
        // libvirt computes data_len - cookieOffset and asks for so much memory.
        (
            |file| file[COOKIE_OFFSET_AT] = 36,
            "cookie offset at 0x20: 0x24 lies behind the data, which has 0x24 bytes",
        ),
        (
            |file| file[COOKIE_OFFSET_AT + 3] = 0x80,
            "cookie offset at 0x20: 0x8000000a lies behind the data, which has 0x24 bytes",
        ),
        (|file| file[HEADER_LEN] = 0, "domain XML at 0x5c: is empty"),
        (|file| file[HEADER_LEN + 4] = 0xff, "domain XML at 0x60: is not UTF-8"),
        (|file| file[HEADER_LEN + 9] = b' ', "domain XML at 0x5c: has no end within its 0xa bytes"),
        (|file| file[HEADER_LEN + 19..].fill(b' '), "cookie at 0x66: has no end within its 0x1a bytes"),
    ];
    for (damage, expected) in cases {
        let mut file = small();
        damage(&mut file);
        let fault = decode(&file, 0).unwrap_err();
        assert_eq!(fault.to_string(), expected);
        assert_eq!(survey(&file).report.faults.first(), Some(&fault), "a survey meets it first");
    }
}

#[test]
fn a_survey_lists_all_faults_and_finds_the_payload_all_the_same() {
    let mut file = small();
    file[..16].copy_from_slice(&QEMU_SAVE_PARTIAL);
    file[FORMAT_AT] = 7;
    file[COOKIE_OFFSET_AT] = 0xff;
    let found = survey(&file);
    let faults: Vec<String> = found.report.faults.iter().map(|fault| fault.to_string()).collect();
    assert_eq!(
        faults,
        [
            "magic at 0x0: says that the image was not written to its end",
            "format at 0x1c: 7 is none that is known",
            "cookie offset at 0x20: 0xff lies behind the data, which has 0x24 bytes",
        ]
    );
    assert_eq!((found.payload_at, found.head), (Some(128), None));
}

#[test]
fn a_survey_reads_the_head_of_an_image_that_was_cut_short() {
    let mut file = small();
    file[..16].copy_from_slice(&QEMU_SAVE_PARTIAL);
    let head = survey(&file).head.unwrap();
    assert!(!head.is_complete);
    assert_eq!(head.xml, "<domain/>");
    let mut again = Vec::new();
    head.encode_header(&mut again);
    assert_eq!(again, file[..HEADER_LEN]);
}

#[test]
fn a_cookie_may_stand_apart_from_the_xml() {
    let mut file = small();
    file[COOKIE_OFFSET_AT] = 12;
    file.splice(HEADER_LEN + 10.., *b"??<cookie/>\0");
    file.extend_from_slice(&[0; 14]);
    let head = decode(&file, 0).unwrap();
    assert_eq!((head.gap_len, head.padding_len), (2, 14));
    assert_eq!(head.cookie.as_deref(), Some("<cookie/>"));
    assert_eq!(head.cookie_range(0).unwrap().start, HEADER_LEN as u64 + 12);
}

#[test]
fn texts_keep_their_limit() {
    let longest = "x".repeat(TEXT_LEN_MAX as usize - 1);
    let head = Head::new(PayloadFormat::Raw, false, longest.clone(), Some(longest.clone())).unwrap();
    let mut file = Vec::new();
    head.encode(&mut file);
    assert!(decode(&file, 0).as_ref() == Ok(&head));
    // One byte more of either.
    let longer = format!("{longest}x");
    for (xml, cookie, expected) in [
        (&longer, None, "domain XML at 0x5c: is longer than any that is read"),
        (&longest, Some(&longer), "cookie at 0x100005c: is longer than any that is read"),
    ] {
        let refused = Head::new(PayloadFormat::Raw, false, xml.clone(), cookie.cloned());
        assert_eq!(refused.unwrap_err().to_string(), expected);
    }
    let mut file = Vec::new();
    Head { xml: longer, cookie: None, ..head.clone() }.encode(&mut file);
    let fault = decode(&file, 0).unwrap_err();
    assert_eq!(fault.to_string(), "domain XML at 0x5c: is longer than 0x1000000 bytes");
    let mut file = Vec::new();
    Head { gap_len: 1, ..head }.encode(&mut file);
    let fault = decode(&file, 0).unwrap_err();
    assert_eq!(
        fault.to_string(),
        "cookie offset at 0x20: 0x1000001 leaves room for more XML than 0x1000000 bytes"
    );
}

#[test]
fn texts_that_would_not_be_read_again_are_not_written() {
    for (xml, cookie, expected) in [
        ("", None, "domain XML at 0x5c: is empty"),
        ("a\0b", None, "domain XML at 0x5c: has a NUL in it, where it would end"),
        ("ab", Some("\0"), "cookie at 0x5f: has a NUL in it, where it would end"),
    ] {
        let refused = Head::new(PayloadFormat::Raw, false, xml.into(), cookie.map(str::to_owned));
        assert_eq!(refused.unwrap_err().to_string(), expected);
    }
}

#[test]
fn a_head_is_dumped_at_its_offsets() {
    let file = golden::load("libvirt-11.3-sparse");
    let text = dump::head(&decode(&file, 0).unwrap(), 0).to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "0x000000000000  magic = LibvirtQemudSave",
            "0x000000000010  version = 2",
            "0x000000000014  data_len = 0x108a5",
            "0x000000000018  was_running = 1",
            "0x00000000001c  format = 6 (sparse)",
            "0x000000000020  cookie_offset = 0x7b9",
            "0x00000000005c  xml = 0x5c..0x814",
            "0x000000000815  cookie = 0x815..0x900",
            "0x000000000901  padding = 0x901..0x10901",
            "0x000000010901  payload = sparse",
        ]
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn every_head_is_read_as_it_was_written(
        format in prop::sample::select(PayloadFormat::ALL.to_vec()),
        was_running: bool,
        is_complete: bool,
        big: bool,
        xml in "[^\0]{1,300}",
        cookie in proptest::option::of("[^\0]{0,300}"),
        padding_len in 0u64..10_000,
        base in 0usize..100,
    ) {
        let byte_order = if big { ByteOrder::Big } else { ByteOrder::Little };
        let head = Head::new(format, was_running, xml, cookie).unwrap();
        let head = Head { is_complete, byte_order, padding_len, ..head };
        let mut file = vec![0; base];
        head.encode(&mut file);
        let found = survey::head(&file[base..], base as u64, file.len() as u64).unwrap();
        prop_assert_eq!(found.head.as_ref(), Some(&head));
        prop_assert_eq!(found.payload_at, Some(file.len() as u64));
        prop_assert_eq!(decode(&file, base as u64).is_ok(), is_complete);
    }

    #[test]
    fn a_damaged_head_harms_nobody(at in 0usize..0x920, byte: u8, cut in 0usize..0x10911) {
        let mut file = golden::load("libvirt-11.3-raw");
        file[at] = byte;
        fuzz::libvirt_head(&file);
        file.truncate(cut);
        fuzz::libvirt_head(&file);
    }
}
