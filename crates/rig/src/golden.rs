//! The golden files of this crate: whole images by other programs, packed.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vmstate::codec::{Codec, Decompressor};

/// Unpacks a golden file as it was, holes where it is zero. `golden/golden.toml` says how they are packed and made.
///
/// # Panics
/// When it is not there or not packed so.
pub fn unpack_golden(name: &str, to: &Path) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.golden"));
    let packed = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let len = packed.metadata().expect("a length").len();
    let mut bytes = Vec::new();
    let read =
        Decompressor::new(Codec::Zstd, packed, 0, len).and_then(|mut file| file.read_to_end(&mut bytes));
    read.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    unpack(&bytes, name, to);
}

/// The same of a golden file of `wire`, which is not compressed.
///
/// # Panics
/// As [`unpack_golden`].
pub fn unpack_wire_golden(name: &str, to: &Path) {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../wire/tests/golden").join(format!("{name}.golden"));
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    unpack(&bytes, name, to);
}

fn unpack(bytes: &[u8], name: &str, to: &Path) {
    let head_len = bytes.windows(2).position(|pair| pair == b"\n\n").expect("a head") + 2;
    let (head, mut pieces) = bytes.split_at(head_len);
    let file = File::create(to).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
    for line in String::from_utf8_lossy(head).lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| word.parse::<u64>().unwrap_or_else(|error| panic!("`{line}`: {error}"));
        match words.as_slice() {
            ["vmstate-golden", "1"] | [""] => {}
            ["length", len] => file.set_len(number(len)).expect("a file of that length"),
            ["extent", offset, len] => {
                let (piece, rest) = pieces.split_at(number(len) as usize);
                file.write_all_at(piece, number(offset)).expect("a piece is written");
                pieces = rest;
            }
            _ => panic!("`{line}` in the head of {name}"),
        }
    }
    assert!(pieces.is_empty(), "{name} has bytes that no extent names");
}
