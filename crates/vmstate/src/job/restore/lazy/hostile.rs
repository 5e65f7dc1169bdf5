//! Targets that no QEMU is: what they can make a server do.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use io::{Cancel, Counters, ReadPair};
use page::PageSize;
use wire::IdStr;
use wire::postcopy::{Message, PageRequest, RequestedBlock, Requests};
use wire::qemu::{Event, Preamble, StreamScanner};

use super::ledger::{Account, Ledger};
use super::server::{Served, Server, Signs};
use crate::Result;
use crate::source::MappedRamFile;

/// A golden image of `wire`, whose pages are zeroes.
fn image() -> MappedRamFile {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wire/tests/golden/q35-10.0-mapped-ram.golden");
    let packed = std::fs::read(&path).unwrap();
    let head_len = packed.windows(2).position(|pair| pair == b"\n\n").unwrap() + 2;
    let (head, mut pieces) = packed.split_at(head_len);
    let file = tempfile::tempfile().unwrap();
    for line in std::str::from_utf8(head).unwrap().lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["length", len] => file.set_len(len.parse().unwrap()).unwrap(),
            ["extent", offset, len] => {
                let (piece, rest) = pieces.split_at(len.parse().unwrap());
                file.write_all_at(piece, offset.parse().unwrap()).unwrap();
                pieces = rest;
            }
            _ => {}
        }
    }
    open(file, &path)
}

fn open(file: File, path: &Path) -> MappedRamFile {
    MappedRamFile::from_file(file, path, 0).unwrap()
}

/// Serves the image to `target`, which gets the other end of the connection.
fn serve(image: &MappedRamFile, target: impl FnOnce(UnixStream) + Send) -> Result<Served> {
    let layout = image.layout();
    let blocks: Vec<_> = layout
        .blocks
        .iter()
        .map(|block| RequestedBlock { name: block.name.clone(), length: block.used_length, host_page: 4096 })
        .collect();
    let accounts = layout
        .blocks
        .iter()
        .map(|block| Account::new(block.used_length, 4096, 4096, image.pages(block).unwrap()))
        .collect();
    let setup = super::ram_setup(image, &blocks, 4096);
    let mut opening = Vec::new();
    Preamble { configuration: None }.encode(&mut opening);
    setup.encode_section(layout.ram.section_id, &mut opening);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let requests = Requests::new(blocks);
    let pair = ReadPair::buffered(image.file().try_clone().unwrap());
    let ledger = Ledger::new(accounts);
    let mut server = Server::new(image, &pair, ledger, requests, &setup, ours, None, None)?;
    server.open_with(opening);
    std::thread::scope(|scope| {
        scope.spawn(|| target(theirs));
        server.serve(&Signs::default(), &Counters::default(), &Cancel::new().unwrap())
    })
}

fn say(socket: &mut UnixStream, messages: &[Message]) {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| message.encode(&mut bytes));
    // A server that has given up does not listen any more.
    let _ = socket.write_all(&bytes);
}

fn request(block: Option<&str>, start: u64, len: u32) -> Message {
    Message::RequestPages(PageRequest { block: block.map(|name| IdStr::new(name).unwrap()), start, len })
}

#[test]
fn a_target_that_lies_is_left_with_the_reason() {
    let image = image();
    let ram = Some("pc.ram");
    for (messages, expected) in [
        (
            vec![request(Some("nobody"), 0, 4096)],
            "QEMU sent what is no return path: page request at 0x0: block `nobody` is unknown",
        ),
        (
            vec![request(None, 0, 4096)],
            "QEMU sent what is no return path: page request at 0x0: names no block, and none was named before",
        ),
        (
            vec![Message::Pong(1), request(ram, 1 << 20, 4096)],
            "QEMU sent what is no return path: page request at 0x8: 0x1000 bytes from 0x100000 are no pages of \
             `pc.ram`, which has 0x100000 bytes in pages of 0x1000",
        ),
        (
            vec![request(ram, 0, 1)],
            "QEMU sent what is no return path: page request at 0x0: 0x1 bytes from 0x0 are no pages of `pc.ram`, \
             which has 0x100000 bytes in pages of 0x1000",
        ),
        (vec![Message::ResumeAck(1)], "QEMU sent what nobody asked for at 0x0 of the return path"),
        (vec![Message::Shut(0)], "QEMU ended the migration before it had all pages (error 0)"),
    ] {
        let error = serve(&image, |mut socket| {
            say(&mut socket, &messages);
            // Until the server closes, so that it is the lie that it stops at.
            let _ = socket.read_to_end(&mut Vec::new());
        });
        assert_eq!(error.unwrap_err().to_string(), expected, "{messages:?}");
    }
}

#[test]
fn a_target_that_goes_away_is_noticed() {
    let text = serve(&image(), drop).unwrap_err().to_string();
    assert!(text.starts_with("QEMU closed the connection with 0x"), "{text}");
}

#[test]
fn every_page_is_sent_once_whatever_is_asked_for_and_how_often() {
    let image = image();
    let started = Instant::now();
    let mut sent = BTreeMap::new();
    let served = serve(&image, |mut socket| {
        // All of a block at once, each of its pages again, and again.
        say(&mut socket, &[request(Some("pc.ram"), 0, 1 << 20)]);
        for _ in 0..2 {
            let all: Vec<_> = (0..256).map(|page| request(None, page << 12, 4096)).collect();
            say(&mut socket, &all);
        }
        let mut scanner = StreamScanner::new(0, PageSize::X86);
        let mut window = vec![0; 64 << 10];
        while !scanner.is_done() {
            let len = socket.read(&mut window).unwrap();
            assert_ne!(len, 0, "the stream has an end mark");
            scanner
                .feed(&window[..len], |event| {
                    if let Event::Page { block, offset, .. } | Event::Zero { block, offset } = event {
                        *sent.entry((block, offset)).or_insert(0) += 1;
                    }
                    Ok::<_, wire::Fault>(())
                })
                .unwrap();
        }
        // Asked for when the end was sent, as a target does that has not read it yet.
        say(&mut socket, &[request(Some("pc.bios"), 0, 4096), Message::Shut(0)]);
    })
    .unwrap();
    assert_eq!(served.requests, 514);
    assert!(sent.values().all(|times| *times == 1), "{sent:?}");
    for (index, block) in image.layout().blocks.iter().enumerate() {
        let there = |page: u64| sent.contains_key(&(index, page << 12));
        for run in image.pages(block).unwrap().runs() {
            assert!((run.start.0..run.end.0).all(there), "{}", block.name);
        }
        if block.name == "pc.ram" {
            assert!((0..256).all(there), "what was asked for comes, zero or not");
        }
    }
    let longest = served.latencies.beside.with(&served.latencies.alone).quantile(1.0).unwrap();
    assert!(longest <= started.elapsed(), "{longest:?}");
}
