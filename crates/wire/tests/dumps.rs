//! The metadata as text: one line a field, at the offset where it stands.

mod golden;

use page::PageSize;
use wire::Fault;
use wire::qemu::{self, Event, StreamScanner, split_sections};

#[test]
fn a_layout_is_dumped_at_its_offsets() {
    let file = golden::load("q35-10.0-mapped-ram");
    let layout = golden::layout(&file, 0).unwrap();
    let dump = wire::mapped_ram::dump::layout(&layout);
    let text = dump.to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[..12],
        [
            "0x000000000000  magic = QEVM",
            "0x000000000004  version = 3",
            "0x000000000008  configuration.machine = pc-q35-10.0",
            "0x000000000018  configuration.capabilities = mapped-ram",
            "0x000000000047  ram.section_id = 1",
            "0x000000000058  ram.total = 0x182000",
            "0x000000000075  /rom@etc/acpi/tables.used_length = 0x20000",
            "0x00000000007d  /rom@etc/acpi/tables.version = 1",
            "0x000000000081  /rom@etc/acpi/tables.page_size = 0x1000",
            "0x000000000089  /rom@etc/acpi/tables.bitmap = 0x99..0xa1",
            "0x000000000091  /rom@etc/acpi/tables.pages = 0x100000..0x120000",
            "0x000000120007  pc.ram.used_length = 0x100000",
        ]
    );
    // Every line stands where the file has that value: the offsets are those of the fields.
    for line in dump.lines.iter().filter(|line| line.field.ends_with(".used_length")) {
        let at = line.offset as usize;
        let value = u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
        assert_eq!(line.value, format!("{value:#x}"), "{line}");
    }
}

#[test]
fn a_stream_is_dumped_at_its_offsets() {
    let file = golden::load("q35-10.0-stream-ignore-shared-uuid");
    let mut lines = Vec::new();
    let mut device_state_at = 0;
    let mut payload_at = 0;
    let mut scanner = StreamScanner::new(0, PageSize::X86);
    let on_event = |event: Event<'_>| {
        match event {
            Event::Preamble(preamble) => lines.extend(qemu::dump::preamble(&preamble, 0).lines),
            Event::Section(header) => {
                let mut head = Vec::new();
                header.encode(&mut head);
                let start = file.windows(head.len()).position(|bytes| bytes == head).unwrap();
                payload_at = (start + head.len()) as u64;
            }
            Event::Blocks(setup) => lines.extend(qemu::dump::ram_setup(&setup, payload_at).lines),
            Event::DeviceState { at, .. } => device_state_at = at,
            _ => {}
        }
        Ok::<(), Fault>(())
    };
    scanner.feed(&file, on_event).unwrap();
    let be64 = |at: u64| u64::from_be_bytes(file[at as usize..][..8].try_into().unwrap());
    let uuid = lines.iter().find(|line| line.field == "configuration.uuid").unwrap();
    assert_eq!(uuid.value, "00112233445566778899aabbccddeeff");
    let length = lines.iter().find(|line| line.field == "pc.ram.used_length").unwrap();
    assert_eq!((length.value.as_str(), be64(length.offset)), ("0x100000", 0x100000));
    let address = lines.iter().find(|line| line.field == "pc.bios.address").unwrap();
    assert_eq!((address.value.as_str(), be64(address.offset)), ("0xfffc0000", 0xfffc0000));

    let blob = &file[device_state_at as usize..];
    let dump = qemu::dump::device_state(&split_sections(blob, device_state_at).unwrap());
    assert_eq!(
        dump.lines[0].to_string(),
        "0x000000034622  section 0 `timer` = instance 0x0, version 2, 0x18 bytes"
    );
    assert_eq!(dump.lines.len(), 29 + 2, "sections, the end mark, the description");
}
