//! The bodies of the fuzz targets, which the property tests run too.
//!
//! Each takes any bytes, must not panic for any of them, and asserts what holds for all of them.

#![allow(clippy::indexing_slicing, clippy::panic, reason = "a panic here is a finding")]

use page::{PageCount, PageSize};

use crate::libvirt::Head;
use crate::mapped_ram::format::bitmap_len;
use crate::mapped_ram::survey::{LayoutReport, LayoutSurvey, SurveyStep};
use crate::mapped_ram::{BitmapScanner, Layout, LayoutDecoder, Step, decode_bitmap, encode_bitmap};
use crate::postcopy::{self, Message, RequestedBlock, Requests};
use crate::qemu::fields::{FieldDecoder, decode_fields};
use crate::qemu::format::VMDESCRIPTION_HEADER_LEN;
use crate::qemu::vmdesc::{self, Located};
use crate::qemu::{
    BlockListVariant, Event, StreamScanner, decode_item, decode_preamble, decode_ram_setup, survey,
};
use crate::{DecodeError, Fault, FileRange, IdStr, libvirt_rpc};

/// What is read can be written, and is the same bytes then.
pub fn preamble(data: &[u8]) {
    if let Ok((preamble, len)) = decode_preamble(data, 0) {
        let mut again = Vec::new();
        preamble.encode(&mut again);
        assert_eq!(again, data[..len]);
    }
}

/// What is read can be written, and is the same bytes then.
pub fn item(data: &[u8]) {
    if let Ok((item, len)) = decode_item(data, 0) {
        let mut again = Vec::new();
        item.encode(&mut again);
        assert_eq!(again, data[..len]);
    }
}

/// What is read can be written, and is the same bytes then. The first byte chooses the variant.
pub fn block_list(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let variant = match choice % 3 {
        0 => BlockListVariant::Plain,
        1 => BlockListVariant::Postcopy,
        _ => BlockListVariant::IgnoreShared,
    };
    if let Ok((setup, len)) = decode_ram_setup(data, 0, variant) {
        let mut again = Vec::new();
        setup.encode(&mut again);
        assert_eq!(again, data[..len]);
    }
}

/// Any division of a stream gives the same events, and a survey's first fault is the one that a reading
/// stops at. The first byte chooses the size of the windows.
pub fn stream(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let whole = scan(StreamScanner::new(0, PageSize::X86), data, data.len().max(1));
    let pieces = scan(StreamScanner::new(0, PageSize::X86), data, usize::from(*choice) + 1);
    assert_eq!(whole, pieces);

    let mut surveyor = StreamScanner::surveying(0, PageSize::X86);
    let _ = surveyor.feed::<Fault>(data, |_| Ok(()));
    let report = surveyor.into_report();
    // A stream that only ends too early has no fault that a survey, which may go on, would list.
    let stopped = whole.stopped;
    assert_eq!(report.faults.first(), stopped.as_ref());
}

/// What a scan of a stream gave: events in text, the fault that stopped it, the end's verdict.
#[derive(Debug, PartialEq)]
struct Scan {
    events: Vec<String>,
    stopped: Option<Fault>,
    finished: Result<(), Fault>,
    taken: u64,
}

fn scan(mut scanner: StreamScanner, data: &[u8], window: usize) -> Scan {
    let mut scan = Scan { events: Vec::new(), stopped: None, finished: Ok(()), taken: 0 };
    let mut is_at = 0;
    for piece in data.chunks(window) {
        let fed = scanner.feed::<Fault>(piece, |event| {
            if let Event::Page { at, data, .. } = &event {
                assert!(*at >= is_at, "pages come in order");
                is_at = at + data.len() as u64;
            }
            scan.events.push(format!("{event:?}"));
            Ok(())
        });
        match fed {
            Ok(taken) => scan.taken += taken as u64,
            Err(fault) => {
                scan.stopped = Some(fault);
                break;
            }
        }
        if scanner.is_done() {
            break;
        }
    }
    scan.finished = scanner.finish();
    scan.taken = scanner.position();
    scan
}

/// The sections that are found cover the blob, and a survey's first fault is the one of the reading.
pub fn device_split(data: &[u8]) {
    let base = 0x1000;
    let split = crate::qemu::split_sections(data, base);
    let (report, state) = survey::device_state(data, base);
    match split {
        Ok(split) => {
            for pair in split.sections.windows(2) {
                assert!(pair[0].end <= pair[1].header_at);
            }
            if let Some(last) = split.sections.last() {
                assert!(last.end <= split.eof_at);
            }
            assert!(split.eof_at < base + data.len() as u64);
            assert_eq!(Some(split), state);
        }
        Err(fault) => assert_eq!(report.faults.first(), Some(&fault)),
    }
}

/// A description is found where it was put, and what is parsed can be written and parsed again.
pub fn description(data: &[u8]) {
    if let Located::Found(range) = vmdesc::locate(data, 0) {
        assert_eq!(range.end, data.len() as u64);
        let json = &data[range.start as usize + VMDESCRIPTION_HEADER_LEN..];
        let _ = vmdesc::parse(json, range.start);
    }
    if let Ok(parsed) = vmdesc::parse(data, 0) {
        for device in &parsed.devices {
            let _ = device.payload_len();
        }
        let mut encoded = vec![0];
        if parsed.encode(&mut encoded).is_ok() {
            let section = FileRange::new(1, encoded.len() as u64);
            assert_eq!(vmdesc::locate(&encoded, 0), Located::Found(section));
            let again = vmdesc::parse(&encoded[1 + VMDESCRIPTION_HEADER_LEN..], 0);
            // Numbers of a manifest that are no exact floats may change; all else may not.
            assert_eq!(again.map(|again| again.devices), Ok(parsed.devices));
        }
    }
}

/// A section that can be read by its description has the length that is described, and so has one that a description
/// was made to fit. First be16 length and the payload, then the description of the first device.
pub fn fields(data: &[u8]) {
    let Some((len, data)) = data.split_first_chunk::<2>() else { return };
    let Some((payload, json)) = data.split_at_checked(usize::from(u16::from_be_bytes(*len))) else { return };
    let Ok(description) = vmdesc::parse(json, 0) else { return };
    let Some(device) = description.devices.first() else { return };
    if let Ok(fields) = decode_fields(device, payload, 0x1000) {
        assert_eq!(device.payload_len(), Some(payload.len() as u64));
        let mut at = 0x1000;
        for field in &fields.fields {
            assert_eq!(field.offset, at);
            at += field.len;
        }
        assert!(at <= 0x1000 + payload.len() as u64);
        let _ = crate::qemu::dump::fields(&fields).to_string();
    }
    if let Ok(fitted) = FieldDecoder::default().fit(device, payload, 0x1000) {
        assert_eq!(fitted.payload_len(), Some(payload.len() as u64));
    }
}

/// A sparse file in few bytes: be32 length, then pieces of be32 offset, be16 length and bytes.
pub struct Sparse<'a> {
    len: u64,
    pieces: Vec<(u64, &'a [u8])>,
}

impl<'a> Sparse<'a> {
    /// The file in `data`; a piece that is cut short is taken as it is.
    pub fn new(data: &'a [u8]) -> Option<Sparse<'a>> {
        let (len, mut rest) = data.split_first_chunk::<4>()?;
        let mut pieces = Vec::new();
        while let Some(([a, b, c, d, high, low], bytes)) = rest.split_first_chunk::<6>() {
            let wanted = usize::from(u16::from_be_bytes([*high, *low])).min(bytes.len());
            let (piece, behind) = bytes.split_at(wanted);
            pieces.push((u64::from(u32::from_be_bytes([*a, *b, *c, *d])), piece));
            rest = behind;
        }
        Some(Sparse { len: u64::from(u32::from_be_bytes(*len)), pieces })
    }

    /// The length of the file.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// The bytes of a range; what no piece covers is zero.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for (at, piece) in &self.pieces {
            for (i, byte) in piece.iter().enumerate() {
                let place = (at + i as u64).checked_sub(offset).and_then(|i| usize::try_from(i).ok());
                if let Some(target) = place.and_then(|place| bytes.get_mut(place)) {
                    *target = *byte;
                }
            }
        }
        bytes
    }
}

/// The ranges of a layout lie in the file and do not overlap, and a survey's first fault is the one of
/// the reading.
pub fn layout(data: &[u8]) {
    let Some(file) = Sparse::new(data) else { return };
    let decoded = decode(&file);
    let surveyed = survey_layout(&file);
    match decoded {
        Ok(layout) => {
            assert_eq!(surveyed.report.faults, []);
            check_layout(&layout, file.file_len());
            assert_eq!(surveyed.layout, Some(layout));
        }
        Err(fault) => assert_eq!(surveyed.report.faults.first(), Some(&fault)),
    }
}

fn decode(file: &Sparse<'_>) -> Result<Layout, Fault> {
    let mut decoder = LayoutDecoder::new(0, file.file_len());
    loop {
        match decoder.step()? {
            Step::Need { offset, len } => {
                assert!(len > 0 && offset + len as u64 <= file.file_len());
                decoder.supply(&file.read(offset, len))?;
            }
            Step::Done(layout) => return Ok(*layout),
        }
    }
}

fn survey_layout(file: &Sparse<'_>) -> LayoutReport {
    let mut survey = LayoutSurvey::new(0, file.file_len());
    while let SurveyStep::Need { offset, len } = survey.step() {
        assert!(len > 0 && offset + len as u64 <= file.file_len());
        survey.supply(&file.read(offset, len));
    }
    survey.finish()
}

fn check_layout(layout: &Layout, file_len: u64) {
    let mut ranges = vec![layout.device_state];
    ranges.extend(layout.vmdesc);
    for block in &layout.blocks {
        ranges.extend([block.bitmap, block.pages]);
        if !block.is_ignored() {
            assert_eq!(block.pages.len(), block.used_length);
            assert_eq!(block.bitmap.len(), bitmap_len(block.page_count().0));
        }
    }
    for (i, range) in ranges.iter().enumerate() {
        assert!(range.end <= file_len);
        for other in &ranges[..i] {
            assert!(!range.overlaps(*other), "{range} and {other}");
        }
    }
    let mut end = layout.stream_start;
    for section in &layout.early {
        assert!(end <= section.header_at && section.header_at < section.payload.start);
        assert!(section.payload.start <= section.payload.end && section.payload.end < section.end);
        end = section.end;
    }
    assert!(end <= layout.device_state.start);
    assert_eq!(layout.total, layout.blocks.iter().map(|block| block.used_length).sum::<u64>());
    let _ = crate::mapped_ram::dump::layout(layout).to_string();
}

/// A bitmap is the same read whole and in pieces, and written again. The first two bytes choose how many
/// pages it lacks to its last word, and the size of the pieces.
pub fn bitmap(data: &[u8]) {
    let Some(([lacking, window], data)) = data.split_first_chunk::<2>() else { return };
    let pages = PageCount((data.len() as u64 / 8 * 64).saturating_sub(u64::from(lacking % 64)));
    let data = &data[..bitmap_len(pages.0) as usize];
    let whole = decode_bitmap(data, 0, pages);

    let mut runs = Vec::new();
    let mut scanner = BitmapScanner::new(0, pages);
    let mut pieces = Ok(());
    for piece in data.chunks(usize::from(*window) + 1) {
        let is_zero = piece.iter().all(|byte| *byte == 0);
        pieces = pieces.and_then(|()| match is_zero {
            true => scanner.skip(piece.len() as u64, |run| runs.push(run)),
            false => scanner.push(piece, |run| runs.push(run)),
        });
    }
    let pieces = pieces.and_then(|()| scanner.finish(|run| runs.push(run)));
    assert_eq!(whole.is_ok(), pieces.is_ok());
    if let Ok(set) = whole {
        assert_eq!(set.runs().collect::<Vec<_>>(), runs);
        let mut again = Vec::new();
        encode_bitmap(&set, &mut again);
        assert_eq!(again, data);
    }
}

/// A head asks for no byte beyond the file, a survey's first fault is the one of the reading, and what is read
/// can be written and read again.
pub fn libvirt_head(data: &[u8]) {
    let file_len = data.len() as u64;
    let mut given = 0;
    let decoded = loop {
        let surveyed = crate::libvirt::survey::head(&data[..given], 0, file_len);
        match Head::decode(&data[..given], 0, file_len) {
            Ok(head) => {
                let Ok(report) = surveyed else { panic!("a survey wants more than a reading") };
                assert_eq!(report.report.faults, []);
                assert_eq!(report.payload_at, Some(head.len()));
                assert_eq!(report.head.as_ref(), Some(&head));
                break head;
            }
            Err(DecodeError::Fault(fault)) => {
                // A survey may read on, and want more bytes for that.
                let Ok(report) = crate::libvirt::survey::head(data, 0, file_len) else {
                    panic!("a survey of all bytes wants more")
                };
                assert_eq!(report.report.faults.first(), Some(&fault));
                return;
            }
            Err(DecodeError::Incomplete { needed, .. }) => {
                assert!(needed > 0 && given as u64 + needed <= file_len);
                given += needed as usize;
            }
        }
    };
    assert!(decoded.len() <= file_len);
    let mut again = Vec::new();
    decoded.encode(&mut again);
    assert_eq!(Head::decode(&again, 0, again.len() as u64), Ok(decoded.clone()));
    let _ = crate::libvirt::dump::head(&decoded, 0).to_string();
    let _ = decoded.check_payload(&data[decoded.len() as usize..], decoded.len());
}

/// A return path: what is read can be written, and is the same bytes then; no request that was judged right
/// reaches beyond its block; and a survey's first fault is the one that a reading stops at.
pub fn return_path(data: &[u8]) {
    let block = |name: &str, length: u64, host_page: u64| {
        IdStr::new(name).map(|name| RequestedBlock { name, length, host_page })
    };
    let blocks: Vec<_> = [
        block("pc.ram", 1 << 30, 4096),
        block("huge", 4 << 20, 2 << 20),
        block("/rom@etc/acpi/tables", 0x20000, 4096),
    ]
    .into_iter()
    .flatten()
    .collect();
    let stopped = read_return_path(data, &blocks).err();
    let report = postcopy::survey::return_path(data, 0, &blocks, 4096);
    assert_eq!(report.faults.first(), stopped.as_ref());
    let _ = postcopy::dump::return_path(data, 0).to_string();
    let _ = postcopy::decode_package(data, 0);
}

fn read_return_path(data: &[u8], blocks: &[RequestedBlock]) -> Result<(), Fault> {
    let mut requests = Requests::new(blocks.to_vec());
    let mut at = 0;
    while at < data.len() {
        let (message, len) = postcopy::decode_message(&data[at..], at as u64).map_err(DecodeError::at_end)?;
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(again, data[at..at + len]);
        match message {
            Message::RequestPages(request) => {
                let wanted = requests.judge(&request, at as u64)?;
                let block = &blocks[wanted.block];
                assert!(wanted.pages.end.0 * block.host_page <= block.length);
                assert!(!wanted.pages.is_empty());
            }
            Message::ReceivedBitmap { block: name } => {
                let Some(block) = blocks.iter().find(|block| block.name == name) else {
                    let problem = format!("block `{name}` is unknown");
                    return Err(Fault::damaged(at as u64, "bitmap's block", problem));
                };
                let (behind, pages) = (at + len, PageCount(block.length / 4096));
                let (set, taken) = postcopy::decode_received(&data[behind..], behind as u64, pages)
                    .map_err(DecodeError::at_end)?;
                let mut again = Vec::new();
                postcopy::encode_received(&set, &mut again);
                assert_eq!(again, data[behind..behind + taken]);
                at += taken;
            }
            _ => {}
        }
        at += len;
    }
    Ok(())
}

/// Every message of libvirt's daemon is read or refused; the first byte chooses which it is taken for.
pub fn libvirt_rpc(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    match choice % 7 {
        0 => {
            if let Some((header, _)) = data.split_first_chunk()
                && let Ok(read) = libvirt_rpc::Header::decode(header, 0)
            {
                let mut again = Vec::new();
                read.encode(&mut again);
                assert_eq!(again, header);
            }
        }
        1 => drop(libvirt_rpc::decode_error(data, 0)),
        2 => {
            if let Ok(domain) = libvirt_rpc::decode_domain(data, 0) {
                let again = libvirt_rpc::Arguments::new().domain(&domain);
                assert_eq!(libvirt_rpc::decode_domain(again.bytes(), 0), Ok(domain));
            }
        }
        3 => drop(libvirt_rpc::decode_string(data, 0)),
        4 => drop(libvirt_rpc::decode_auth_types(data, 0)),
        5 => drop(libvirt_rpc::decode_monitor_event(data, 0)),
        _ => {
            if let Some((word, _)) = data.split_first_chunk() {
                drop(libvirt_rpc::decode_message_len(*word, 0));
            }
        }
    }
}
