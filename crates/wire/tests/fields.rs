//! Device state field by field: what real QEMUs wrote reads as they describe it, our own schemas are theirs, and a
//! description that lies is found out.

mod golden;

use golden::{at, load};
use proptest::prelude::*;
use wire::FileRange;
use wire::qemu::fields::{
    ARRAY_VALUES_MAX, FieldDecoder, FieldValue, Fields, VALUES_MAX, Value, decode_fields, schema,
};
use wire::qemu::format::VMDESCRIPTION_HEADER_LEN;
use wire::qemu::vmdesc::{self, Description, Device, Field, VmDescription};
use wire::qemu::{DeviceState, decode_xen_device_state, dump, split_sections};

/// The streams that QEMU itself described, with the version of that QEMU.
const DESCRIBED: [(&str, (u32, u32)); 3] =
    [("q35-10.0-stream", (10, 0)), ("q35-7.2-stream", (7, 2)), ("pc-7.2-stream", (7, 2))];

/// A golden stream with its device state taken apart.
struct Golden {
    file: Vec<u8>,
    state: DeviceState,
    description: VmDescription,
}

impl Golden {
    fn load(name: &str) -> Golden {
        let file = load(name);
        let mut scanner = wire::qemu::StreamScanner::new(0, page::PageSize::X86);
        let mut tail = None;
        scanner
            .feed::<wire::Fault>(&file, |event| {
                if let wire::qemu::Event::DeviceState { at, .. } = event {
                    tail = Some(at);
                }
                Ok(())
            })
            .unwrap();
        let tail = tail.unwrap();
        let state = split_sections(&file[tail as usize..], tail).unwrap();
        let json = state.vmdesc.unwrap().start + VMDESCRIPTION_HEADER_LEN as u64;
        let description = vmdesc::parse(&file[json as usize..], json).unwrap();
        Golden { file, state, description }
    }

    fn described(&self, name: &str, instance_id: u32) -> &Device {
        self.description.devices.iter().find(|d| d.name == name && d.instance_id == instance_id).unwrap()
    }

    fn payload(&self, name: &str) -> (&[u8], u64) {
        let range = self.state.section(name, 0).unwrap().payload;
        (at(&self.file, range), range.start)
    }

    /// The lines of a section, without their offsets.
    fn lines(&self, name: &str) -> Vec<String> {
        let (payload, base) = self.payload(name);
        let fields = decode_fields(self.described(name, 0), payload, base).unwrap();
        dump::fields(&fields).lines.iter().map(|line| format!("{} = {}", line.field, line.value)).collect()
    }
}

#[test]
fn every_section_that_qemu_describes_is_read_to_its_last_byte() {
    for (name, _) in DESCRIBED {
        let golden = Golden::load(name);
        let mut decoder = FieldDecoder::default();
        let mut lines = 0;
        for section in &golden.state.sections {
            let device = golden.described(&section.idstr, section.instance_id);
            let payload = at(&golden.file, section.payload);
            let fields = decoder.decode(device, payload, section.payload.start).unwrap();
            lines += dump::fields(&fields).lines.len();
            // A byte too few, and one too many, are found out.
            assert!(decode_fields(device, &payload[..payload.len() - 1], 0).is_err(), "{}", section.idstr);
            assert!(decode_fields(device, &[payload, &[0]].concat(), 0).is_err(), "{}", section.idstr);
            // What a description says of a section fits the section.
            assert_eq!(FieldDecoder::default().fit(device, payload, 0), Ok(device.clone()));
        }
        assert!(lines > 900, "{name}: {lines}");
    }
}

#[test]
fn values_are_those_of_a_processor_at_its_reset() {
    for (name, _) in DESCRIBED {
        let lines = Golden::load(name).lines("cpu");
        let value = |field: &str| {
            let line = lines.iter().find_map(|line| line.strip_prefix(field)?.strip_prefix(" = "));
            line.unwrap_or_else(|| panic!("{name}: no {field}")).to_owned()
        };
        for (field, expected) in [
            ("env.eip", "0xfff0"),
            ("env.eflags", "0x2"),
            ("env.cr[0]", "0x60000010"),
            ("env.cr[3]", "0x0"),
            ("env.segs[1].selector", "0xf000"),
            ("env.segs[1].base", "0xffff0000"),
            ("env.segs[1].limit", "0xffff"),
            ("env.segs[3].base", "0x0"),
            ("env.fpregs[7].tmp.tmp_mant", "0x0"),
            ("env.a20_mask", "-1"),
            ("env.mxcsr", "0x1f80"),
            ("env.smbase", "0x30000"),
            ("env.pat", "0x7040600070406"),
            ("env.interrupt_injected", "-1"),
            ("env.exception_nr", "-1"),
            ("env.xcr0", "0x1"),
            ("cpu/poll_control_msr", "version 1"),
            ("cpu/poll_control_msr.env.poll_control_msr", "0x0"),
        ] {
            assert_eq!(value(field), expected, "{name}: {field}");
        }
        assert_eq!(value("env.regs").split(' ').count(), 16, "{name}");
    }
    let golden = Golden::load("q35-10.0-stream");
    assert_eq!(
        golden.lines("timer"),
        ["cpu_ticks_offset = 0", "unused = 0000000000000000", "cpu_clock_offset = 0"]
    );
    assert_eq!(
        golden.lines("globalstate")[..2],
        ["size = 0xa".to_owned(), format!("runstate = 7072656c61756e6368{}", "00".repeat(23)),]
    );
    // Structs within structs, subsections of a struct in the middle of the payload.
    assert_eq!(
        golden.lines("pckbd")[..5],
        [
            "kbd.write_cmd = 0x0",
            "kbd.status = 0x18",
            "kbd.mode = 0x3",
            "kbd.pending_tmp = 0x0",
            "kbd.pckbd/extended_state = version 0",
        ]
    );
}

#[test]
fn offsets_are_those_of_the_values() {
    let golden = Golden::load("q35-10.0-stream");
    let (payload, base) = golden.payload("cpu");
    let fields = decode_fields(golden.described("cpu", 0), payload, base).unwrap();
    let mut seen = 0;
    for line in dump::fields(&fields).lines.iter().filter(|line| line.field.ends_with(".base")) {
        let at = line.offset as usize;
        let value = u64::from_be_bytes(golden.file[at..at + 8].try_into().unwrap());
        assert_eq!(line.value, format!("{value:#x}"), "{line}");
        seen += 1;
    }
    assert_eq!(seen, 6 + 4 + 8, "segments, tables, MTRRs");
}

#[test]
fn our_schemas_are_the_descriptions_of_qemu_7_2_and_10_0() {
    for (name, qemu) in DESCRIBED {
        let golden = Golden::load(name);
        for (section, version) in [("cpu", 12), ("globalstate", 1)] {
            let template = schema::template(section, version, Some(qemu)).unwrap();
            let (payload, base) = golden.payload(section);
            let fitted = FieldDecoder::default().fit(&template, payload, base).unwrap();
            assert_eq!(fitted, *golden.described(section, 0), "{name}: {section}");
        }
        // A newer template reads what 7.2 wrote as well: what it did not know is zero.
        let template = schema::template("globalstate", 1, None).unwrap();
        let (payload, base) = golden.payload("globalstate");
        assert!(decode_fields(&template, payload, base).is_ok());
    }
    assert_eq!(schema::template("cpu", 11, None), None);
    assert_eq!(schema::template("apic", 3, None), None);
}

#[test]
fn a_template_tells_which_subsections_are_there() {
    let golden = Golden::load("q35-10.0-stream");
    let (payload, _) = golden.payload("cpu");
    let template = schema::template("cpu", 12, None).unwrap();
    let fit = |payload: &[u8]| FieldDecoder::default().fit(&template, payload, 0x100);
    let names =
        |device: &Device| device.subsections.iter().map(|part| part.vmsd_name.clone()).collect::<Vec<_>>();
    let head_len = payload.len() - (6 + "cpu/poll_control_msr".len() + 8);
    let bare = &payload[..head_len];
    assert_eq!(names(&fit(bare).unwrap()), Vec::<String>::new());

    let subsection = |name: &str, content: &[u8]| {
        [&[5, name.len() as u8], name.as_bytes(), &[0, 0, 0, 1], content].concat()
    };
    let umwait = subsection("cpu/umwait", &[0, 0, 0, 7]);
    let both = [payload, &umwait].concat();
    let fitted = fit(&both).unwrap();
    assert_eq!(names(&fitted), ["cpu/poll_control_msr", "cpu/umwait"]);
    let fields = decode_fields(&fitted, &both, 0).unwrap();
    assert_eq!(fields.subsections[1].content.fields[0].value, Value::Unsigned(7));

    // A struct with subsections of its own in a subsection.
    let vmx = subsection("cpu/kvm_nested_state/vmx", &[0; 18]);
    let nested = subsection("cpu/nested_state", &[&[0, 1, 0, 0, 0, 0, 1, 0], &vmx[..]].concat());
    let fitted = fit(&[bare, &nested].concat()).unwrap();
    let structure = fitted.subsections[0].fields[0].structure.as_ref().unwrap();
    assert_eq!(structure.subsections[0].vmsd_name, "cpu/kvm_nested_state/vmx");
    assert_eq!(fitted.subsections[0].fields[0].size, 8 + vmx.len() as u64);

    let end = 0x100 + payload.len() as u64;
    for (payload, expected) in [
        ([payload, &[1]].concat(), format!("payload at {end:#x}: 1 bytes are left behind what is described")),
        (
            [payload, &subsection("cpu/other", &[])].concat(),
            format!("subsection `cpu/other` at {end:#x}: is not described"),
        ),
        // They have an order.
        (
            [payload, &subsection("cpu/exception_info", &[0; 11])].concat(),
            format!("subsection `cpu/exception_info` at {end:#x}: is not described"),
        ),
        (
            bare[..10].to_vec(),
            "field `env.regs` at 0x100: has more bytes than the section has left".to_owned(),
        ),
        (
            [payload, &umwait[..14]].concat(),
            format!("subsection version at {:#x}: the input ends 2 bytes too early", end + 12),
        ),
    ] {
        assert_eq!(fit(&payload).unwrap_err().to_string(), expected);
    }
}

#[test]
fn an_image_with_a_description_describes_another() {
    let other = Golden::load("q35-10.0-stream");
    let xen = load("q35-10.0-xen");
    let state = decode_xen_device_state(&xen, 0).unwrap();
    let mut decoder = FieldDecoder::default();
    for section in &state.sections {
        let template = other.described(&section.idstr, section.instance_id);
        let payload = at(&xen, section.payload);
        let fitted = decoder.fit(template, payload, section.payload.start).unwrap();
        decoder.decode(&fitted, payload, section.payload.start).unwrap();
    }
    assert_eq!(state.sections.len(), other.state.sections.len());
}

fn device(fields: Vec<Field>) -> Device {
    Device { name: "d".into(), vmsd_name: Some("d".into()), fields, ..Device::default() }
}

fn structure(fields: Vec<Field>, subsections: Vec<Description>) -> Option<Box<Description>> {
    Some(Box::new(Description { vmsd_name: "s".into(), version: 1, fields, subsections }))
}

/// The one value of a field.
fn value(field: Field, payload: &[u8]) -> String {
    let device = device(vec![field]);
    match decode_fields(&device, payload, 0) {
        Ok(Fields { fields, .. }) => match &fields[..] {
            [FieldValue { value: Value::Array(elements), .. }] => format!("{elements:?}"),
            [FieldValue { value: value @ Value::Struct(_), .. }] => format!("{value:?}"),
            [FieldValue { value: value @ Value::Bytes(_), .. }] => format!("bytes {value}"),
            [FieldValue { value, .. }] => value.to_string(),
            other => panic!("{other:?}"),
        },
        Err(fault) => fault.to_string(),
    }
}

#[test]
fn types_are_read_as_qemu_writes_them() {
    let ff = [0xff; 8];
    for (kind, payload, expected) in [
        ("uint8", &[0x30][..], "0x30"),
        ("uint16", &[1, 2], "0x102"),
        ("uint32 equal", &[1, 2, 3, 4], "0x1020304"),
        ("uint64", &[1, 2, 3, 4, 5, 6, 7, 8], "0x102030405060708"),
        ("int8", &ff[..1], "-1"),
        ("int16", &[0x80, 0], "-32768"),
        // `le` is what the loader demands: less or equal.
        ("int32 le", &[0, 0, 0, 3], "3"),
        ("int64 equal", &ff[..], "-1"),
        ("timer", &ff[..], "-1"),
        ("bool", &[0], "false"),
        ("bool", &[1], "true"),
        ("bool", &[2], "0x2"),
        ("nullptr", b"0", "null"),
        ("uint64", b"0", "null"),
        ("uint64", b"1", "0x31"),
        ("buffer", &[1, 2, 3], "bytes 010203"),
        ("CPU_Double_U", &ff[..], "bytes ffffffffffffffff"),
        // A type of somebody's own under a known name.
        ("uint32", &[1, 2, 3], "bytes 010203"),
        ("bitmap", &[], "bytes "),
    ] {
        assert_eq!(value(Field::plain("f", kind, payload.len() as u64), payload), expected, "{kind}");
    }
    let array = |kind: &str, size, len| Field { array_len: Some(len), ..Field::plain("f", kind, size) };
    assert_eq!(value(array("uint16", 2, 2), &[0, 1, 0, 2]), "[Unsigned(1), Unsigned(2)]");
    assert_eq!(value(array("uint8", 1, 2), &[1, 2]), "bytes 0102");
    assert_eq!(value(array("uint16", 2, ARRAY_VALUES_MAX + 1), &[0; 8194]).len(), "bytes ".len() + 2 * 8194);
    assert!(value(array("uint16", 2, ARRAY_VALUES_MAX), &[0; 8192]).starts_with("[Unsigned"));
}

#[test]
fn lists_and_trees_are_read_by_the_descriptions_of_their_elements() {
    let part = |size| Description {
        vmsd_name: "e".into(),
        version: 1,
        fields: vec![Field::plain("v", if size == 1 { "uint8" } else { "uint16" }, size)],
        subsections: Vec::new(),
    };
    let list = |kind: &str, parts: Vec<Description>, size| Field { parts, ..Field::plain("l", kind, size) };
    let lines = |field: Field, payload: &[u8]| {
        let device = device(vec![field]);
        decode_fields(&device, payload, 0).map_or_else(
            |fault| fault.to_string(),
            |fields| {
                let lines = dump::fields(&fields).lines;
                lines
                    .iter()
                    .map(|line| format!("{} = {}", line.field, line.value))
                    .collect::<Vec<_>>()
                    .join("; ")
            },
        )
    };
    for (field, payload, expected) in [
        (list("qtailq", vec![part(1), part(1)], 5), &[1, 7, 1, 8, 0][..], "l[0].v = 0x7; l[1].v = 0x8"),
        (list("qlist", vec![], 1), &[0], "l = "),
        (
            list("qtailq", vec![part(1)], 3),
            &[1, 7, 1],
            "field `l` at 0x2: does not end after its last element",
        ),
        (list("qtailq", vec![part(1)], 3), &[0, 7, 0], "field `l` at 0x0: lacks an element"),
        (
            list("gtree", vec![part(1), part(2)], 9),
            &[0, 0, 0, 1, 1, 7, 0, 8, 0],
            "l[0][0].v = 0x7; l[0][1].v = 0x8",
        ),
        (
            list("gtree", vec![part(1)], 15),
            &[0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 9, 7, 0],
            "l[0][0] = 0x9; l[0][1].v = 0x7",
        ),
        (list("tmp", vec![part(2)], 2), &[0, 5], "l.v = 0x5"),
        (
            list("vstruct", vec![part(2)], 3),
            &[0, 5, 0],
            "field `l` at 0x0: has 0x3 bytes, of which 0x2 are described",
        ),
    ] {
        assert_eq!(lines(field, payload), expected);
    }
}

#[test]
fn descriptions_that_lie_are_refused() {
    let plain = |size| Field::plain("f", "uint32", size);
    let array = |size, len| Field { array_len: Some(len), ..Field::plain("f", "buffer", size) };
    let subsection = Description { vmsd_name: "d/s".into(), ..Description::default() };
    let with = |subsection: Description| Device { subsections: vec![subsection], ..device(vec![]) };
    let nested = |depth: u32| {
        (0..depth).fold(plain(4), |inner, _| Field {
            structure: structure(vec![inner], Vec::new()),
            ..Field::plain("f", "struct", 4)
        })
    };
    for (device, expected) in [
        (device(vec![plain(5)]), "field `f` at 0x10: 0x5 bytes are more than the section has left"),
        (device(vec![plain(2)]), "payload at 0x12: 2 bytes are left behind what is described"),
        (device(vec![]), "payload at 0x10: 4 bytes are left behind what is described"),
        (
            device(vec![array(2, 3)]),
            "field `f` at 0x10: 3 times 0x2 bytes are more than the section has left",
        ),
        (
            device(vec![array(u64::MAX, 2)]),
            "field `f` at 0x10: 2 times 0xffffffffffffffff bytes are more than the section has left",
        ),
        (
            device(vec![Field {
                array_len: Some(u64::MAX),
                structure: structure(vec![], vec![]),
                ..plain(0)
            }]),
            "device state at 0x10: there are more than 262144 values",
        ),
        (
            device(vec![Field { structure: structure(vec![plain(4)], vec![]), ..plain(3) }]),
            "field `f` at 0x10: has 0x3 bytes, of which 0x4 are described",
        ),
        (with(subsection.clone()), "subsection `d/s` at 0x10: is described but not there"),
        (
            with(Description { vmsd_name: "d/\u{1b}[31m".into(), ..Description::default() }),
            "vmdescription at 0x10: a name of 7 bytes is too long or not printable",
        ),
        (
            device(vec![Field::plain(&"x".repeat(256), "uint32", 4)]),
            "vmdescription at 0x10: a name of 256 bytes is too long or not printable",
        ),
        (device(vec![nested(66)]), "vmdescription at 0x10: structs are nested more than 64 deep"),
    ] {
        let fault = decode_fields(&device, &[0; 4], 0x10).unwrap_err();
        assert_eq!(fault.to_string(), expected);
    }
    assert!(decode_fields(&device(vec![nested(64)]), &[0; 4], 0).is_ok());
    // Templates have the same limits.
    let deep = device(vec![nested(66)]);
    let fault = FieldDecoder::default().fit(&deep, &[0; 4], 0x10).unwrap_err();
    assert_eq!(fault.to_string(), "vmdescription at 0x10: structs are nested more than 64 deep");
}

#[test]
fn a_decoder_reads_so_many_values_and_no_more() {
    let empty =
        Field { array_len: Some(VALUES_MAX - 1), structure: structure(vec![], vec![]), ..Field::default() };
    let (all, one) = (device(vec![empty]), device(vec![Field::plain("f", "uint8", 1)]));
    let mut decoder = FieldDecoder::default();
    decoder.decode(&all, &[], 0).unwrap();
    decoder.decode(&one, &[1], 0).unwrap();
    let expected = "device state at 0x0: there are more than 262144 values";
    assert_eq!(decoder.decode(&one, &[1], 0).unwrap_err().to_string(), expected);
    assert_eq!(decoder.fit(&one, &[1], 0).unwrap_err().to_string(), expected);
}

/// A field with a payload that it describes.
fn described() -> impl Strategy<Value = (Field, Vec<u8>)> {
    let kinds = prop_oneof![
        Just(("uint8", 1)),
        Just(("uint16", 2)),
        Just(("int32", 4)),
        Just(("uint64", 8)),
        Just(("bool", 1)),
        Just(("timer", 8)),
        (0..40usize).prop_map(|len| ("buffer", len)),
    ];
    let leaf =
        (kinds, proptest::option::of(0..6u64), "[a-z.]{1,12}").prop_flat_map(|((kind, size), len, name)| {
            let field = Field { array_len: len, ..Field::plain(&name, kind, size as u64) };
            let bytes = size * len.unwrap_or(1) as usize;
            (Just(field), proptest::collection::vec(any::<u8>(), bytes))
        });
    leaf.prop_recursive(4, 24, 4, |inner| {
        (proptest::collection::vec(inner, 0..4), "[a-z]{1,8}").prop_map(|(parts, name)| {
            let payload: Vec<u8> = parts.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
            let fields = parts.into_iter().map(|(field, _)| field).collect();
            let field = Field {
                structure: structure(fields, Vec::new()),
                ..Field::plain(&name, "struct", payload.len() as u64)
            };
            (field, payload)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn what_is_described_truly_is_read_and_written_as_json_and_back((field, payload) in described()) {
        let device = device(vec![field]);
        let fields = decode_fields(&device, &payload, 0).unwrap();
        prop_assert_eq!(fields.fields[0].len, payload.len() as u64);
        let json = serde_json::to_string(&device).unwrap();
        prop_assert_eq!(serde_json::from_str::<Device>(&json).unwrap(), device);
    }

    #[test]
    fn a_byte_more_or_less_is_found_out((field, payload) in described(), more in any::<bool>()) {
        let device = device(vec![field]);
        let mut payload = payload;
        if more { payload.push(0) } else if payload.pop().is_none() { return Ok(()) }
        prop_assert!(decode_fields(&device, &payload, 0).is_err());
    }
}

#[test]
fn the_range_of_a_section_is_its_payload() {
    let golden = Golden::load("q35-7.2-stream");
    let section = golden.state.section("globalstate", 0).unwrap();
    assert_eq!(section.payload, FileRange::new(section.payload.start, section.payload.start + 104));
    assert_eq!(golden.lines("globalstate").len(), 2, "7.2 has one buffer");
}
