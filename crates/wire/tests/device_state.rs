//! How sections are found where a payload pretends to end, and what cannot be told is refused.

use wire::qemu::vmdesc::{self, Device, Field, VmDescription};
use wire::qemu::{Command, Item, SectionHeader, SectionKind, Witness, split_sections, survey};
use wire::{Fault, IdStr};

fn encoded(item: Item) -> Vec<u8> {
    let mut out = Vec::new();
    item.encode(&mut out);
    out
}

fn head(section_id: u32, idstr: &str) -> Vec<u8> {
    let idstr = IdStr::new(idstr).unwrap();
    let kind = SectionKind::Full;
    encoded(Item::Section(SectionHeader { kind, section_id, idstr, instance_id: 0, version_id: 1 }))
}

fn footer(section_id: u32) -> Vec<u8> {
    encoded(Item::Footer { section_id })
}

fn section(id: u32, idstr: &str, payload: &[u8]) -> Vec<u8> {
    [&head(id, idstr)[..], payload, &footer(id)].concat()
}

/// The sections that are found and by what, or the fault.
fn found(blob: &[u8]) -> Result<(Vec<(String, u64)>, Witness), String> {
    split_sections(blob, 0x1000)
        .map(|state| {
            let sections = state.sections.iter().map(|s| (s.idstr.to_string(), s.payload.len())).collect();
            (sections, state.witness)
        })
        .map_err(|fault| fault.to_string())
}

#[test]
fn a_footer_counts_only_where_something_well_formed_follows() {
    let footer_in_payload = [b"x", &footer(1)[..], b"y"].concat();
    let footer_at_the_end_of_the_payload = [b"xy", &footer(1)[..]].concat();
    let foreign_head_in_payload = [b"xy", &footer(2)[..], &head(3, "c")].concat();
    for (name, blob, expected) in [
        ("nothing but the end", vec![0], vec![]),
        ("one section", [section(1, "a", b"xyz"), vec![0]].concat(), vec![("a", 3)]),
        ("a footer inside", [section(1, "a", &footer_in_payload), vec![0]].concat(), vec![("a", 7)]),
        (
            "two footers in a row",
            [section(1, "a", &footer_at_the_end_of_the_payload), vec![0]].concat(),
            vec![("a", 7)],
        ),
        (
            "another's footer and head inside",
            [section(1, "a", &foreign_head_in_payload), section(2, "b", b""), vec![0]].concat(),
            vec![("a", 22), ("b", 0)],
        ),
        ("an end mark inside", [section(1, "a", b"\x00"), vec![0]].concat(), vec![("a", 1)]),
        (
            "a command between sections",
            [
                section(1, "a", b"x"),
                encoded(Item::Command(Command::SwitchoverStart)),
                section(2, "b", b"y"),
                vec![0],
            ]
            .concat(),
            vec![("a", 1), ("b", 1)],
        ),
    ] {
        let expected = expected.into_iter().map(|(name, len)| (name.to_owned(), len)).collect();
        assert_eq!(found(&blob), Ok((expected, Witness::OnlyReading)), "{name}");
    }
}

#[test]
fn what_leads_nowhere_is_refused_at_the_section_that_has_no_end() {
    for (name, blob, expected) in [
        ("nothing", vec![], "device state at 0x1000: has no end mark before its end"),
        ("no section", vec![7, 0], "device state at 0x1000: does not begin with a section"),
        ("no footer", [head(1, "a"), vec![0]].concat(), "section `a` at 0x1000: has no end"),
        (
            "the second has no footer",
            [section(1, "a", b""), head(2, "b"), vec![0]].concat(),
            "section `b` at 0x1014: has no end",
        ),
        (
            "bytes behind the last section",
            [section(1, "a", b""), vec![9, 0]].concat(),
            "section `a` at 0x1000: has no end",
        ),
        ("two end marks", [section(1, "a", b""), vec![0, 0]].concat(), "section `a` at 0x1000: has no end"),
    ] {
        assert_eq!(found(&blob), Err(expected.to_owned()), "{name}");
    }
}

/// A piece that can be read as sections b, c, d or as b, e: the guest chose the payload of d.
fn two_ways() -> Vec<u8> {
    let inner = [footer(1), head(3, "e")].concat();
    [section(1, "b", b""), section(2, "c", b""), section(3, "d", &inner), vec![0]].concat()
}

fn description(devices: &[(&str, u64)]) -> VmDescription {
    let device = |(name, size): &(&str, u64)| Device {
        name: (*name).to_owned(),
        fields: vec![Field::plain("data", "buffer", *size)],
        ..Device::default()
    };
    VmDescription { devices: devices.iter().map(device).collect(), ..VmDescription::default() }
}

#[test]
fn what_can_be_read_in_two_ways_is_refused() {
    let expected = "section `b` at 0x1000: may end at 0x100f or at 0x1037";
    assert_eq!(found(&two_ways()), Err(expected.to_owned()));
}

#[test]
fn a_description_decides_between_two_ways() {
    for sizes in [&[("b", 0), ("c", 0), ("d", 20)][..], &[("b", 40), ("e", 0)]] {
        let mut blob = two_ways();
        description(sizes).encode(&mut blob).unwrap();
        let expected = sizes.iter().map(|(name, len)| ((*name).to_owned(), *len)).collect();
        assert_eq!(found(&blob), Ok((expected, Witness::VmDescription)), "{sizes:?}");
    }
}

#[test]
fn a_description_may_begin_with_sections_from_before_ram() {
    let mut blob = [section(1, "a", b"xyz"), vec![0]].concat();
    description(&[("early", 9), ("a", 3)]).encode(&mut blob).unwrap();
    assert_eq!(found(&blob), Ok((vec![("a".to_owned(), 3)], Witness::VmDescription)));
}

#[test]
fn a_description_that_disagrees_is_no_witness_but_a_finding() {
    for (described, problem) in
        [(("a", 4), "does not end after the 0x4 bytes that are described"), (("b", 3), "is not described")]
    {
        let mut blob = [section(1, "a", b"xyz"), vec![0]].concat();
        description(&[described]).encode(&mut blob).unwrap();
        assert_eq!(found(&blob), Ok((vec![("a".to_owned(), 3)], Witness::OnlyReading)));
        let (report, state) = survey::device_state(&blob, 0x1000);
        assert_eq!(report.faults, [Fault::damaged(0x1000, "section `a`", problem)]);
        assert!(state.is_some());
    }
}

#[test]
fn a_reading_in_which_nothing_appears_twice_is_better() {
    // The payload of `a` ends itself and starts another section of the same id, which the real footer
    // closes: as sections they are two of one id.
    let inner = [footer(1), head(1, "fake")].concat();
    let blob = [section(1, "a", &inner), section(2, "b", b""), vec![0]].concat();
    let expected = vec![("a".to_owned(), inner.len() as u64), ("b".to_owned(), 0)];
    assert_eq!(found(&blob), Ok((expected, Witness::DistinctSections)));
}

#[test]
fn a_survey_lists_what_does_not_stop_a_reading() {
    let mut blob = [section(1, "a", b""), section(1, "b", b""), section(2, "globalstate", b"no")].concat();
    blob.push(0);
    description(&[("a", 0), ("b", 0), ("globalstate", 2)]).encode(&mut blob).unwrap();
    let (report, _) = survey::device_state(&blob, 0x1000);
    let faults: Vec<_> = report.faults.iter().map(|fault| fault.to_string()).collect();
    assert_eq!(
        faults,
        [
            "section `b` at 0x1014: has the id 1 of another",
            "globalstate payload at 0x1041: has 2 bytes instead of 104",
        ]
    );
}

#[test]
fn an_empty_description_is_one() {
    // QEMU falls silent at `06 00 00 00 00`, so writers without a description end with that.
    let blob = [section(1, "a", b"x"), vec![0, 6, 0, 0, 0, 0]].concat();
    let state = split_sections(&blob, 0x1000).unwrap();
    assert_eq!(state.vmdesc.map(|range| range.len()), Some(5));
    assert_eq!(vmdesc::locate(&blob, 0x1000), vmdesc::Located::Found(state.vmdesc.unwrap()));
    let (report, _) = survey::device_state(&blob, 0x1000);
    assert_eq!(report.faults, []);
}
