//! The body of the fuzz target of compressed streams.

use std::io::{Read, Write};

use super::{Codec, Decompressor};

/// The most that is taken out of a stream: what a guest with little RAM would be.
const OUT_LEN_MAX: u64 = 64 << 20;

/// No bytes make a decompressor panic, and pieces and threads change nothing about what comes out. The first byte
/// chooses the codec.
pub fn decompress(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let codec = Codec::ALL[usize::from(*choice) % Codec::ALL.len()];
    let mut file = tempfile();
    file.write_all(data).expect("a file in memory takes what is written");
    let read = |threads| {
        let file = file.try_clone().expect("a descriptor");
        let decompressor = Decompressor::with_threads(codec, file, 0, data.len() as u64, threads);
        let mut out = Vec::new();
        let read = decompressor.and_then(|reader| reader.take(OUT_LEN_MAX).read_to_end(&mut out));
        (out, read.is_ok())
    };
    assert_eq!(read(1), read(3));
}

fn tempfile() -> std::fs::File {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory");
    fd.into()
}
