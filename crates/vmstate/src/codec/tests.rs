//! What holds for every codec.

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};

use super::*;

fn compress(codec: Codec, bytes: &[u8], threads: usize) -> Vec<u8> {
    let mut compressor = Compressor::with_threads(codec, Vec::new(), threads).unwrap();
    compressor.write_all(bytes).unwrap();
    compressor.finish().unwrap()
}

/// Decompresses what stands in a file between other bytes.
fn decompress(codec: Codec, bytes: &[u8], threads: usize) -> io::Result<Vec<u8>> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"head").unwrap();
    file.write_all(bytes).unwrap();
    file.write_all(b"tail").unwrap();
    let mut out = Vec::new();
    Decompressor::with_threads(codec, file, 4, 4 + bytes.len() as u64, threads)?.read_to_end(&mut out)?;
    Ok(out)
}

/// Decompresses what comes through a pipe, to stand behind four bytes.
fn decompress_piped(codec: Codec, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    decompress_once(codec, io::Cursor::new(bytes.to_vec()), 4)?.read_to_end(&mut out)?;
    Ok(out)
}

/// Bytes as memory has them: some pages repeat, some do not compress, some are zero.
fn memory(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let page = (state >> 60) as u8;
        match page % 4 {
            0 => out.extend_from_slice(&[0; 4096]),
            1 => out.extend((0..4096u32).map(|i| (i % 251) as u8 ^ page)),
            _ => out.extend((0..512u64).flat_map(|i| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state ^ i).to_le_bytes()
            })),
        }
    }
    out.truncate(len);
    out
}

/// Passes bytes through a stock program, which `make setup` installs.
fn through(program: &str, args: &[&str], bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; `make setup` installs it"));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes));
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn what_is_compressed_comes_out_the_same_whatever_the_threads() {
    for codec in Codec::ALL {
        let chunk = codec.pieces().chunk_len();
        for len in [0, 1, chunk, 2 * chunk + 77] {
            let bytes = memory(len);
            let compressed = compress(codec, &bytes, 2);
            for threads in [1, 3] {
                assert!(decompress(codec, &compressed, threads).unwrap() == bytes, "{codec} {len} {threads}");
            }
        }
    }
}

#[test]
fn what_we_write_has_pieces_that_are_decompressed_apart() {
    for codec in Codec::ALL {
        let pieces = codec.pieces();
        let bytes = memory(2 * pieces.chunk_len() + 1);
        let compressed = compress(codec, &bytes, 1);
        let mut rest = compressed.as_slice();
        let mut out = Vec::new();
        let mut count = 0;
        while !rest.is_empty() {
            let len = pieces.piece_len(rest, true, &compressed).unwrap();
            out.extend(pieces.decompress(&rest[..len], &compressed).unwrap());
            rest = &rest[len..];
            count += 1;
        }
        assert!(out == bytes, "{codec}");
        // lzop's header and end count as pieces of nothing.
        assert_eq!(count, if codec == Codec::Lzop { 5 } else { 3 }, "{codec}");
    }
}

#[test]
fn stock_programs_decompress_what_we_compress() {
    for codec in Codec::ALL {
        let bytes = memory(2 * codec.pieces().chunk_len() + 1);
        let out = through(codec.name(), &["-dc"], &compress(codec, &bytes, 2));
        assert!(out == bytes, "{codec}");
    }
}

#[test]
fn what_stock_programs_compress_is_decompressed_joined_with_ours_or_not() {
    for codec in Codec::ALL {
        // More than a window, so that the rest is read as a stream.
        let bytes = memory(18 << 20);
        let args: &[&str] = if codec == Codec::Xz { &["-c", "-0"] } else { &["-c"] };
        let one = through(codec.name(), args, &bytes);
        let short = memory(100_000);
        let two = through(codec.name(), args, &short);
        let joined = [two.as_slice(), &one, &compress(codec, &short, 1)].concat();
        let expected = [short.as_slice(), &bytes, &short].concat();
        assert!(decompress(codec, &joined, 2).unwrap() == expected, "{codec}");
    }
}

#[test]
fn zeros_behind_the_payload_are_passed_over() {
    for codec in Codec::ALL {
        let bytes = memory(codec.pieces().chunk_len() + 1);
        let ours = compress(codec, &bytes, 1);
        let stock = through(codec.name(), &["-c"], &bytes);
        for (whose, payload) in [("ours", &ours), ("stock", &stock), ("both", &[&stock[..], &ours].concat())]
        {
            let expected = if whose == "both" { bytes.repeat(2) } else { bytes.clone() };
            // Those of the last are more than a piece can be.
            for zeros in [1, 4096, 9 << 20] {
                let padded = [payload.as_slice(), &vec![0; zeros]].concat();
                assert!(
                    decompress(codec, &padded, 2).unwrap() == expected,
                    "{codec}: {whose}, {zeros} zeros"
                );
            }
        }
    }
}

#[test]
fn a_hole_behind_the_payload_is_not_read() {
    for codec in Codec::ALL {
        let bytes = memory(100_000);
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&through(codec.name(), &["-c"], &bytes)).unwrap();
        // As many zeros as would take hours.
        let len = 1 << 43;
        file.set_len(len).unwrap();
        let mut out = Vec::new();
        Decompressor::with_threads(codec, file, 0, len, 2).unwrap().read_to_end(&mut out).unwrap();
        assert!(out == bytes, "{codec}");
    }
}

#[test]
fn anything_else_behind_the_payload_is_an_error_that_names_its_offset() {
    for codec in Codec::ALL {
        let bytes = memory(100_000);
        let ours = compress(codec, &bytes, 1);
        let stock = through(codec.name(), &["-c"], &bytes);
        for payload in [&ours, &stock] {
            for zeros in [0, 1, 4, 5000] {
                for junk in [&[1][..], b"junk and more of it", &[0xff; 5000], &[7, 0, 0, 0, 0]] {
                    let with = [payload.as_slice(), &vec![0; zeros], junk].concat();
                    let error = decompress(codec, &with, 2).unwrap_err();
                    let piped = decompress_piped(codec, &with).unwrap_err();
                    assert_eq!(error.to_string(), piped.to_string());
                    // The payload stands behind four bytes of the file.
                    let at = 4 + payload.len() + zeros;
                    let expected = format!("something else stands behind the payload, at {at:#x}");
                    assert_eq!(error.to_string(), expected, "{codec} with {zeros} zeros and {}", junk.len());
                }
            }
            // What begins like a member and is none.
            let with = [payload.as_slice(), &payload[..8], &[0xff; 100]].concat();
            assert!(decompress(codec, &with, 2).is_err(), "{codec}");
        }
    }
}

#[test]
fn a_piece_that_holds_very_much_is_read_as_a_stream() {
    for codec in Codec::ALL {
        let bytes = vec![0; 40 << 20];
        let args: &[&str] = if codec == Codec::Xz { &["-c", "-0"] } else { &["-c"] };
        let stock = through(codec.name(), args, &bytes);
        assert!(decompress(codec, &stock, 2).unwrap() == bytes, "{codec}");
    }
}

#[test]
fn damage_and_missing_ends_are_errors() {
    for codec in Codec::ALL {
        let bytes = memory(2 * codec.pieces().chunk_len());
        let compressed = compress(codec, &bytes, 1);
        for cut in [0, 1, 5, compressed.len() / 3, compressed.len() - 1] {
            let outcome = decompress(codec, &compressed[..cut], 2);
            assert!(outcome.is_err(), "{codec} cut to {cut}");
        }
        for at in [0, compressed.len() / 3, compressed.len() / 2] {
            let mut damaged = compressed.clone();
            damaged[at] ^= 0x10;
            let outcome = decompress(codec, &damaged, 2);
            assert!(outcome.is_err_and(|error| !error.to_string().is_empty()), "{codec} damaged at {at}");
        }
    }
}

#[test]
fn a_dictionary_that_is_too_large_is_refused() {
    let mut stream = compress(Codec::Xz, b"dictionary", 1);
    // The properties of LZMA2 in the header of the block, which ends with a CRC: 40 is 4 GiB less a byte.
    let header = 12;
    let len = (usize::from(stream[header]) + 1) * 4;
    let at = header + 4;
    assert_eq!(stream[at - 2..at], [0x21, 1]);
    stream[at] = 40;
    let mut crc = flate2::Crc::new();
    crc.update(&stream[header..header + len - 4]);
    stream[header + len - 4..header + len].copy_from_slice(&crc.sum().to_le_bytes());
    let error = decompress(Codec::Xz, &stream, 1).unwrap_err();
    assert!(error.to_string().contains("mem_limit"), "{error}");
}

#[test]
fn any_bytes_are_taken_without_a_panic() {
    for (choice, codec) in Codec::ALL.into_iter().enumerate() {
        let compressed = compress(codec, &memory(70_000), 1);
        for at in (0..compressed.len()).step_by(compressed.len() / 100 + 1) {
            let mut input = vec![choice as u8];
            input.extend_from_slice(&compressed);
            input[1 + at] ^= 1 << (at % 8);
            fuzz::decompress(&input);
        }
    }
}

/// What fuzzing begins with: 24 times a thousand like bytes and a line, by the stock programs (`-n -9`, `-9`, `-9`, `-9`,
/// `-19`), behind the byte that chooses the codec.
#[test]
fn the_seeds_of_the_fuzz_target_are_whole_files() {
    let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/decompress");
    let page = |i: u8| [&[i % 7; 1000][..], format!("QEVM page {i}\n").as_bytes()].concat();
    let expected: Vec<u8> = (0..24).flat_map(page).collect();
    for (choice, codec) in Codec::ALL.into_iter().enumerate() {
        let seed = std::fs::read(seeds.join(codec.name())).unwrap();
        assert_eq!(usize::from(seed[0]), choice, "{codec:?}");
        assert!(decompress(codec, &seed[1..], 1).unwrap() == expected, "{codec:?}");
        fuzz::decompress(&seed);
    }
}

#[test]
fn the_end_is_that_of_the_range_and_not_of_the_file() {
    let mut file: File = tempfile::tempfile().unwrap();
    let compressed = compress(Codec::Zstd, b"first", 1);
    file.write_all(&compressed).unwrap();
    file.write_all(&compress(Codec::Zstd, b"second", 1)).unwrap();
    let mut out = Vec::new();
    let end = compressed.len() as u64;
    Decompressor::new(Codec::Zstd, file, 0, end).unwrap().read_to_end(&mut out).unwrap();
    assert_eq!(out, b"first");
}
