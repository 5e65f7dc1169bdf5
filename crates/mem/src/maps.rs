//! The address space of a process, as `/proc/PID/maps` tells it.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufRead};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// The most mappings that are read of one process; `vm.max_map_count` is 65530 unless raised.
const MAPPINGS_MAX: usize = 1 << 20;

/// One line of `/proc/PID/maps`: a stretch of address space with one backing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The first address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// Whether the process may read it.
    pub is_readable: bool,
    /// Whether the process may write it. A shared mapping is writable only if its file was opened for writing.
    pub is_writable: bool,
    /// Whether writes go to the backing (`s`) instead of private copies (`p`).
    pub is_shared: bool,
    /// The offset in the file of the first address.
    pub offset: u64,
    /// The device of the file, as `st_dev` has it; 0 without a file.
    pub device: u64,
    /// The inode of the file; 0 without a file.
    pub inode: u64,
    /// The path of the file or the kernel's name for the mapping, such as `[heap]`; often empty.
    ///
    /// A newline in a path is written `\012`, so the path serves to tell kinds apart and not to open files.
    pub path: OsString,
}

impl Mapping {
    /// Reads one line, without its newline.
    pub(crate) fn parse(line: &[u8]) -> Option<Mapping> {
        let mut rest = line;
        let (start, end) = split_at_byte(take_field(&mut rest)?, b'-')?;
        let permissions = take_field(&mut rest)?;
        let offset = take_field(&mut rest)?;
        let (major, minor) = split_at_byte(take_field(&mut rest)?, b':')?;
        let inode = take_field(&mut rest)?;
        let &[read, write, _execute, sharing] = permissions else { return None };
        let (start, end) = (hex(start)?, hex(end)?);
        let device = rustix::fs::makedev(hex(major)?.try_into().ok()?, hex(minor)?.try_into().ok()?);
        (start < end).then_some(Mapping {
            start,
            end,
            is_readable: read == b'r',
            is_writable: write == b'w',
            is_shared: sharing == b's',
            offset: hex(offset)?,
            device,
            inode: std::str::from_utf8(inode).ok()?.parse().ok()?,
            path: OsString::from_vec(rest.trim_ascii_start().to_vec()),
        })
    }
}

/// An address that nothing is mapped at, amid a range that should be mapped whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The first unmapped address.
    pub address: u64,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nothing is mapped at {:#x}", self.address)
    }
}

/// All mappings of a process, in the order of their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mappings(Vec<Mapping>);

impl Mappings {
    /// Reads the text of `/proc/PID/maps`.
    ///
    /// # Errors
    /// What reading said; `InvalidData` for a line that is none, for lines out of order, and for more than
    /// a million of them.
    pub fn read(text: impl BufRead) -> io::Result<Mappings> {
        let mut mappings: Vec<Mapping> = Vec::new();
        for line in text.split(b'\n') {
            let line = line?;
            let follows = |mapping: &Mapping| mappings.last().is_none_or(|last| last.end <= mapping.start);
            let mapping = Mapping::parse(&line)
                .filter(|mapping| mappings.len() < MAPPINGS_MAX && follows(mapping))
                .ok_or_else(|| {
                    let text = format!("line {} of maps: `{}`", mappings.len() + 1, line.escape_ascii());
                    io::Error::new(io::ErrorKind::InvalidData, text)
                })?;
            mappings.push(mapping);
        }
        Ok(Mappings(mappings))
    }

    /// All of them.
    pub fn as_slice(&self) -> &[Mapping] {
        &self.0
    }

    /// The adjacent mappings that together hold `address..address + length`.
    ///
    /// One block of guest memory may lie in several: `mprotect` and `madvise` split mappings.
    ///
    /// # Errors
    /// The first address in the range that is not mapped. A range that wraps has none beyond its end.
    pub fn covering(&self, address: u64, length: u64) -> Result<&[Mapping], Gap> {
        let end = address.checked_add(length).ok_or(Gap { address: u64::MAX })?;
        let first = self.0.partition_point(|mapping| mapping.end <= address);
        let mut reached = address;
        let mut count = 0;
        for mapping in &self.0[first..] {
            if reached >= end || mapping.start > reached {
                break;
            }
            reached = mapping.end;
            count += 1;
        }
        if reached < end || count == 0 {
            return Err(Gap { address: reached });
        }
        Ok(&self.0[first..first + count])
    }
}

/// The next field of a line; the fields are separated by one space, the path by many.
fn take_field<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let line = *rest;
    let end = line.iter().position(|&byte| byte == b' ').unwrap_or(line.len());
    *rest = line.get(end + 1..).unwrap_or_default();
    (end > 0).then(|| &line[..end])
}

fn split_at_byte(field: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = field.iter().position(|&byte| byte == separator)?;
    Some((&field[..at], &field[at + 1..]))
}

fn hex(digits: &[u8]) -> Option<u64> {
    // `from_str_radix` takes a sign; the kernel writes none.
    let digits = std::str::from_utf8(digits).ok().filter(|text| !text.starts_with('+'))?;
    u64::from_str_radix(digits, 16).ok()
}

/// Whether the path of a mapping starts with `prefix`.
pub(crate) fn path_starts_with(mapping: &Mapping, prefix: &str) -> bool {
    mapping.path.as_bytes().starts_with(prefix.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
5581c4e2b000-5581c4e2d000 r--p 00000000 fe:00 1835117                    /usr/bin/a b (deleted)
7f0000000000-7f0000200000 rw-p 00000000 00:00 0 
7f0000200000-7f0000300000 ---p 00000000 00:00 0 
7f0000400000-7f0000500000 rw-s 00100000 00:01 2051                       /memfd:pc.ram (deleted)
7fff0f5d0000-7fff0f5f1000 rw-p 00000000 00:00 0                          [stack]
";

    fn mappings() -> Mappings {
        Mappings::read(TEXT.as_bytes()).expect("maps as the kernel writes them")
    }

    #[test]
    fn lines_are_read_field_by_field() {
        let mappings = mappings();
        assert_eq!(mappings.as_slice().len(), 5);
        assert_eq!(
            mappings.as_slice()[3],
            Mapping {
                start: 0x7f00_0040_0000,
                end: 0x7f00_0050_0000,
                is_readable: true,
                is_writable: true,
                is_shared: true,
                offset: 0x10_0000,
                device: rustix::fs::makedev(0, 1),
                inode: 2051,
                path: "/memfd:pc.ram (deleted)".into(),
            }
        );
        assert_eq!(mappings.as_slice()[0].path, "/usr/bin/a b (deleted)");
        assert_eq!(mappings.as_slice()[1].path, "");
        assert!(!mappings.as_slice()[2].is_readable);
    }

    #[test]
    fn lines_that_are_none_are_refused_by_number() {
        for (line, text) in [
            ("", "line 1 of maps: ``"),
            ("7f00-7f00 rw-p 0 0:0 0", "line 1 of maps: `7f00-7f00 rw-p 0 0:0 0`"),
            ("+1-2 rw-p 0 0:0 0", "line 1 of maps: `+1-2 rw-p 0 0:0 0`"),
            ("1-2 rw-ps 0 0:0 0", "line 1 of maps: `1-2 rw-ps 0 0:0 0`"),
            ("1-2 rw-p 0 0:0", "line 1 of maps: `1-2 rw-p 0 0:0`"),
            ("4-5 rw-p 0 0:0 0\n1-2 rw-p 0 0:0 0", "line 2 of maps: `1-2 rw-p 0 0:0 0`"),
        ] {
            let text_in = format!("{line}\n");
            let refused = Mappings::read(text_in.as_bytes()).expect_err("no such line");
            assert_eq!(refused.to_string(), text);
        }
    }

    #[test]
    fn a_range_is_covered_without_gaps_or_not_at_all() {
        let mappings = mappings();
        let (base, mib) = (0x7f00_0000_0000, 1 << 20);
        for (address, length, expected) in [
            (base, 2 * mib, Ok(1)),
            (base, 3 * mib, Ok(2)),
            (base + mib, mib + 1, Ok(2)),
            (base + 4 * mib, mib, Ok(1)),
            (base, 4 * mib, Err(base + 3 * mib)),
            (base + 3 * mib, mib, Err(base + 3 * mib)),
            (base + 4 * mib, mib + 1, Err(base + 5 * mib)),
            (0, 1, Err(0)),
            (u64::MAX, 1, Err(u64::MAX)),
            (u64::MAX, 2, Err(u64::MAX)),
        ] {
            let found = mappings.covering(address, length).map(<[Mapping]>::len).map_err(|gap| gap.address);
            assert_eq!(found, expected, "{address:#x} + {length:#x}");
        }
    }
}
