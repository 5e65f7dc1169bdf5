//! lzop's container: a header, blocks of LZO1X with their lengths and checksums, a zero.
//!
//! | field | |
//! |---|---|
//! | magic | 9 bytes |
//! | version, library's version | be16 each; then, from version 0x0940 on, the be16 version that is needed to extract |
//! | method | u8: 1, 2 and 3 are LZO1X; then, from 0x0940 on, a u8 level |
//! | flags | be32; with [`F_H_FILTER`] a be32 filter follows |
//! | mode, mtime | be32 each; then, from 0x0940 on, the high be32 of mtime |
//! | name | u8 length and so many bytes |
//! | checksum | be32 of all of this behind the magic: Adler-32, with [`F_H_CRC32`] CRC-32 |
//! | extra | with [`F_H_EXTRA_FIELD`]: be32 length, so many bytes, be32 checksum |
//!
//! A block is a be32 length, a be32 length compressed, checksums of the data (Adler-32, CRC-32, by the flags) and, if
//! it is compressed, of what it is compressed to, then that. Where both lengths are the same it is as it was. A
//! length of 0 ends the file, behind which another may begin.

use std::io::{self, Read};

use flate2::Crc;

use super::{Member, Pieces, Rest, damaged, lzo1x};

const MAGIC: [u8; 9] = *b"\x89LZO\0\r\n\x1a\n";
/// The version of lzop that wrote the last of these fields; so we call ourselves.
const VERSION: u16 = 0x1040;
const LIB_VERSION: u16 = 0x20a0;
const VERSION_WITH_LEVELS: u16 = 0x0940;
const METHOD_LZO1X_1: u8 = 1;
const METHODS: std::ops::RangeInclusive<u8> = 1..=3;
const LEVEL: u8 = 5;

/// Each block's data has an Adler-32.
const F_ADLER32_D: u32 = 0x1;
/// So has what it is compressed to.
const F_ADLER32_C: u32 = 0x2;
const F_H_EXTRA_FIELD: u32 = 0x40;
/// The same with CRC-32.
const F_CRC32_D: u32 = 0x100;
const F_CRC32_C: u32 = 0x200;
const F_MULTIPART: u32 = 0x400;
const F_H_FILTER: u32 = 0x800;
const F_H_CRC32: u32 = 0x1000;
/// The file was made on Unix.
const F_OS_UNIX: u32 = 0x0300_0000;

/// The length of a block, as lzop has it.
const BLOCK_LEN: usize = 256 << 10;
/// Limit: the length of a block that is read; lzop reads up to 64 MiB, and writes 256 KiB.
const BLOCK_LEN_MAX: usize = 8 << 20;
/// Limit: how much of a file is looked at for its header.
const HEADER_LEN_MAX: usize = 4 << 10;

pub(super) struct Lzop;

impl Pieces for Lzop {
    fn chunk_len(&self) -> usize {
        BLOCK_LEN
    }

    fn head(&self) -> Vec<u8> {
        let mut header = Vec::new();
        for version in [VERSION, LIB_VERSION, VERSION_WITH_LEVELS] {
            header.extend_from_slice(&version.to_be_bytes());
        }
        header.extend_from_slice(&[METHOD_LZO1X_1, LEVEL]);
        // No mode, no time, no name: it came through a pipe.
        for word in [F_ADLER32_D | F_OS_UNIX, 0, 0, 0] {
            header.extend_from_slice(&word.to_be_bytes());
        }
        header.push(0);
        let checksum = adler32(&header);
        [&MAGIC, header.as_slice(), &checksum.to_be_bytes()].concat()
    }

    fn tail(&self) -> Vec<u8> {
        vec![0; 4]
    }

    fn compress(&self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        // The end of the file is a block of no length; nothing else may be one.
        let Some(len) = u32::try_from(chunk.len()).ok().filter(|len| *len > 0) else { return Ok(Vec::new()) };
        let compressed = lzo1x::compress(chunk);
        let data = if compressed.len() < chunk.len() { &compressed } else { chunk };
        let mut block = Vec::with_capacity(data.len() + 12);
        for word in [len, data.len() as u32, adler32(chunk)] {
            block.extend_from_slice(&word.to_be_bytes());
        }
        block.extend_from_slice(data);
        Ok(block)
    }

    fn piece_len(&self, window: &[u8], _is_all: bool, first: &[u8]) -> Option<usize> {
        // A file may be followed by another, with other flags: the stream reads that.
        if window.starts_with(&MAGIC) {
            return header(window)
                .ok()
                .filter(|header| first.starts_with(&window[..header.len]))
                .map(|h| h.len);
        }
        let flags = header(first).ok()?.flags;
        Block::of(&mut &*window, flags).ok().map(|block| block.map_or(4, |block| block.whole_len))
    }

    fn decompress(&self, piece: &[u8], first: &[u8]) -> io::Result<Vec<u8>> {
        if piece.starts_with(&MAGIC) {
            return Ok(Vec::new());
        }
        let mut rest = piece;
        let block = Block::of(&mut rest, header(first)?.flags)?;
        block.map_or(Ok(Vec::new()), |block| block.decompress(&mut rest))
    }

    fn ends_member(&self, piece: &[u8]) -> bool {
        piece == [0; 4]
    }

    fn begins(&self, bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC[..4])
    }

    fn member(&self, input: Rest, first: &[u8]) -> io::Result<Box<dyn Member>> {
        let flags = header(first)?.flags;
        Ok(Box::new(LzopReader { input, flags, has_ended: false, block: Vec::new(), given: 0 }))
    }
}

struct Header {
    flags: u32,
    len: usize,
}

/// Reads a header that `bytes` begin with.
fn header(bytes: &[u8]) -> io::Result<Header> {
    let bytes = &bytes[..bytes.len().min(HEADER_LEN_MAX)];
    let mut rest = bytes.strip_prefix(&MAGIC).ok_or_else(|| damaged("no magic of lzop's"))?;
    let checked = rest;
    let version = be16(&mut rest)?;
    let _library = be16(&mut rest)?;
    let has_levels = version >= VERSION_WITH_LEVELS;
    if has_levels {
        let _needed = be16(&mut rest)?;
    }
    let [method] = take(&mut rest)?;
    if !METHODS.contains(&method) {
        return Err(damaged(format!("method {method} is not LZO1X")));
    }
    if has_levels {
        let [_level] = take(&mut rest)?;
    }
    let flags = be32(&mut rest)?;
    if flags & (F_H_FILTER | F_MULTIPART) != 0 {
        return Err(damaged("a filter or several parts, which are not read"));
    }
    let _mode = be32(&mut rest)?;
    let _mtime = be32(&mut rest)?;
    if has_levels {
        let _mtime_high = be32(&mut rest)?;
    }
    let [name_len] = take(&mut rest)?;
    rest = rest.get(usize::from(name_len)..).ok_or_else(short)?;
    let covered = &checked[..checked.len() - rest.len()];
    let expected = if flags & F_H_CRC32 != 0 { crc32(covered) } else { adler32(covered) };
    if be32(&mut rest)? != expected {
        return Err(damaged("the checksum of lzop's header is wrong"));
    }
    if flags & F_H_EXTRA_FIELD != 0 {
        let len = be32(&mut rest)? as usize;
        rest = rest.get(len..).ok_or_else(short)?;
        let _checksum = be32(&mut rest)?;
    }
    Ok(Header { flags, len: bytes.len() - rest.len() })
}

/// The head of a block.
struct Block {
    len: usize,
    compressed_len: usize,
    adler: Option<u32>,
    crc: Option<u32>,
    /// The length of the block, with its head.
    whole_len: usize,
}

impl Block {
    /// Takes the head of a block; `None` where it is the end.
    fn of(input: &mut impl Read, flags: u32) -> io::Result<Option<Block>> {
        let len = read_be32(input)? as usize;
        if len == 0 {
            return Ok(None);
        }
        let compressed_len = read_be32(input)? as usize;
        if len > BLOCK_LEN_MAX || compressed_len > len || compressed_len == 0 {
            return Err(damaged(format!("a block of {len:#x} bytes in {compressed_len:#x}")));
        }
        let mut words = 2;
        let mut sum = |flag: u32| -> io::Result<Option<u32>> {
            let is_there = flags & flag != 0;
            words += usize::from(is_there);
            is_there.then(|| read_be32(input)).transpose()
        };
        let (adler, crc) = (sum(F_ADLER32_D)?, sum(F_CRC32_D)?);
        if compressed_len < len {
            // What the data come out as is looked at, so what they came from need not be.
            let _ = (sum(F_ADLER32_C)?, sum(F_CRC32_C)?);
        }
        Ok(Some(Block { len, compressed_len, adler, crc, whole_len: 4 * words + compressed_len }))
    }

    fn decompress(&self, input: &mut impl Read) -> io::Result<Vec<u8>> {
        let mut data = vec![0; self.compressed_len];
        input.read_exact(&mut data)?;
        if self.compressed_len < self.len {
            let mut out = vec![0; self.len];
            let len = lzokay::decompress::decompress(&data, &mut out)
                .map_err(|error| damaged(error.to_string()))?;
            if len != self.len {
                return Err(damaged(format!("a block of {:#x} bytes came out as {len:#x}", self.len)));
            }
            data = out;
        }
        let is = |expected: Option<u32>, sum: fn(&[u8]) -> u32| {
            expected.is_none_or(|expected| sum(&data) == expected)
        };
        if is(self.adler, adler32) && is(self.crc, crc32) {
            return Ok(data);
        }
        Err(damaged("the checksum of a block is wrong"))
    }
}

/// Reads block after block, to the end of a file.
struct LzopReader {
    input: Rest,
    flags: u32,
    has_ended: bool,
    block: Vec<u8>,
    given: usize,
}

impl Read for LzopReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.given == self.block.len() && !buffer.is_empty() && !self.has_ended {
            let mut start = [0; 4];
            self.input.read_exact(&mut start).map_err(|_| short())?;
            // Blocks never begin like a file: its first byte would make one far too long.
            if start == MAGIC[..4] {
                self.flags = self.next_header()?;
                continue;
            }
            let mut input = start.chain(&mut self.input);
            match Block::of(&mut input, self.flags)? {
                Some(block) => {
                    self.block = block.decompress(&mut input)?;
                    self.given = 0;
                }
                None => self.has_ended = true,
            }
        }
        let left = &self.block[self.given..];
        let len = left.len().min(buffer.len());
        buffer[..len].copy_from_slice(&left[..len]);
        self.given += len;
        Ok(len)
    }
}

impl Member for LzopReader {
    fn into_rest(self: Box<Self>) -> Rest {
        self.input
    }
}

impl LzopReader {
    /// Reads a header whose first four bytes are taken already; a byte at a time, since only it tells its length.
    fn next_header(&mut self) -> io::Result<u32> {
        let mut bytes = MAGIC[..4].to_vec();
        loop {
            let mut byte = [0];
            self.input.read_exact(&mut byte)?;
            bytes.push(byte[0]);
            match header(&bytes) {
                Ok(header) => return Ok(header.flags),
                Err(error) if bytes.len() == HEADER_LEN_MAX => return Err(error),
                Err(_) => {}
            }
        }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> io::Result<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk().ok_or_else(short)?;
    *bytes = rest;
    Ok(*taken)
}

fn be16(bytes: &mut &[u8]) -> io::Result<u16> {
    take(bytes).map(u16::from_be_bytes)
}

fn be32(bytes: &mut &[u8]) -> io::Result<u32> {
    take(bytes).map(u32::from_be_bytes)
}

fn read_be32(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends too early")
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// RFC 1950.
fn adler32(bytes: &[u8]) -> u32 {
    const BASE: u32 = 65521;
    /// So many bytes can be added up before a sum of 32 bits must be brought back below the base.
    const RUN: usize = 5552;
    let (mut a, mut b) = (1u32, 0u32);
    for run in bytes.chunks(RUN) {
        for byte in run {
            a += u32::from(*byte);
            b += a;
        }
        a %= BASE;
        b %= BASE;
    }
    b << 16 | a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adler_32_is_that_of_the_rfc() {
        assert_eq!(adler32(b""), 1);
        assert_eq!(adler32(b"Wikipedia"), 0x11e6_0398);
        assert_eq!(adler32(&[0xff; 100_000]), 0x149a_302c);
    }
}
