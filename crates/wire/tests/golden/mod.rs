//! Loads the golden files; `golden.toml` says what they are and how they are packed.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::Path;

use wire::mapped_ram::{Layout, LayoutDecoder, Step};
use wire::{Fault, FileRange};

/// Every golden file of QEMU's.
pub const ALL: [&str; 12] = [
    "q35-10.0-mapped-ram",
    "q35-10.0-mapped-ram-multifd-direct-io",
    "q35-10.0-mapped-ram-offset",
    "q35-10.0-stream",
    "q35-10.0-stream-ignore-shared-uuid",
    "q35-7.2-stream",
    "pc-7.2-stream",
    "q35-10.0-xen",
    "q35-7.2-xen",
    "q35-10.0-mapped-ram-virtio-mem",
    "q35-10.0-stream-virtio-mem",
    "q35-10.0-xen-virtio-mem",
];

/// The heads of libvirt's images, in the order of the formats' numbers.
pub const LIBVIRT: [&str; 7] = [
    "libvirt-11.3-raw",
    "libvirt-11.3-gzip",
    "libvirt-11.3-bzip2",
    "libvirt-11.3-xz",
    "libvirt-11.3-lzop",
    "libvirt-11.3-zstd",
    "libvirt-11.3-sparse",
];

/// The file as QEMU wrote it, but for the pages of RAM, which are zero.
pub fn load(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.golden"));
    let packed = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let head_len = packed.windows(2).position(|pair| pair == b"\n\n").expect("a golden file has a head") + 2;
    let (head, mut pieces) = packed.split_at(head_len);
    let mut file = Vec::new();
    for line in std::str::from_utf8(head).unwrap().lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["vmstate-golden", "1"] | [""] => {}
            ["length", len] => file = vec![0; len.parse().unwrap()],
            ["extent", offset, len] => {
                let (offset, len): (usize, usize) = (offset.parse().unwrap(), len.parse().unwrap());
                let (piece, rest) = pieces.split_at(len);
                file[offset..offset + len].copy_from_slice(piece);
                pieces = rest;
            }
            other => panic!("{other:?} in the head of {name}"),
        }
    }
    assert!(pieces.is_empty(), "{name} has bytes that no extent names");
    file
}

/// Reads the layout of a mapped-ram image out of memory.
pub fn layout(file: &[u8], stream_start: u64) -> Result<Layout, Fault> {
    let mut decoder = LayoutDecoder::new(stream_start, file.len() as u64);
    loop {
        match decoder.step()? {
            Step::Need { offset, len } => decoder.supply(&file[offset as usize..][..len])?,
            Step::Done(layout) => return Ok(*layout),
        }
    }
}

/// The bytes of a range.
pub fn at(file: &[u8], range: FileRange) -> &[u8] {
    &file[range.start as usize..range.end as usize]
}

/// A golden file in the form of the fuzz target `layout`: be32 length, then pieces of be32 offset, be16
/// length and bytes.
pub fn sparse(name: &str) -> Vec<u8> {
    let file = load(name);
    let mut packed = (file.len() as u32).to_be_bytes().to_vec();
    let mut at = 0;
    while at < file.len() {
        // Pieces begin at a byte that is not zero and end before 64 zeroes.
        let Some(start) = file[at..].iter().position(|byte| *byte != 0).map(|i| at + i) else { break };
        let limit = &file[start..file.len().min(start + 0x8000)];
        let len = limit.windows(64).position(|gap| gap == [0; 64]).unwrap_or(limit.len());
        packed.extend_from_slice(&(start as u32).to_be_bytes());
        packed.extend_from_slice(&(len as u16).to_be_bytes());
        packed.extend_from_slice(&file[start..start + len]);
        at = start + len;
    }
    packed
}
