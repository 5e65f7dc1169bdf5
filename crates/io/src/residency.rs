//! How much of a file is in the page cache: what is there is read from there, faster than from any disk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::SeekFrom;

/// cachestat(2), since Linux 6.5; the same number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// Up to so many bytes of data every page is counted: that takes the kernel 20 ns or more for each that is there.
const COUNTED: u64 = 256 << 20;

/// How many pages of a larger file are looked at. Where a 32nd of them is missing in the cache, 16 of these are.
const SAMPLES: u64 = 512;

/// How few of them may be data. Fewer say nothing of the rest.
const SAMPLES_MIN: u64 = 64;

/// struct cachestat_range of linux/mman.h.
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// struct cachestat of linux/mman.h.
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached_pages: u64,
    dirty_pages: u64,
    writeback_pages: u64,
    evicted_pages: u64,
    recently_evicted_pages: u64,
}

const _: () = assert!(size_of::<Range>() == 16 && size_of::<CacheStat>() == 40);

/// How many bytes of `offset..offset + len` are in the page cache; whole pages are counted.
///
/// # Errors
/// `Unsupported` where the kernel does not tell (before 6.5, or a file system that has no page cache).
pub fn cached_bytes(file: &File, offset: u64, len: u64) -> io::Result<u64> {
    // A length of 0 would mean the whole file.
    if len == 0 {
        return Ok(0);
    }
    let range = Range { offset, len };
    let mut found = CacheStat::default();
    // SAFETY: both structs have the kernel's layout, as asserted above, and live through the call; the
    // kernel reads the first and writes the second.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut found, 0u32) };
    if result == 0 {
        return Ok(found.cached_pages.saturating_mul(rustix::param::page_size() as u64));
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => {
            Err(io::ErrorKind::Unsupported.into())
        }
        error => Err(error),
    }
}

/// Whether all but a 32nd of a file's data, which are `data_bytes`, is in the page cache.
///
/// Of a large file it looks at some pages, evenly spread over it: the kernel takes 80 to 110 ms to count the pages of 4 GiB.
///
/// # Errors
/// `Unsupported`, as [`cached_bytes`].
pub fn is_nearly_cached(file: &File, data_bytes: u64) -> io::Result<bool> {
    look(file, data_bytes, COUNTED)
}

/// Looks at some pages where there are more data than `counted`.
fn look(file: &File, data_bytes: u64, counted: u64) -> io::Result<bool> {
    let len = file.metadata()?.len();
    if data_bytes > counted {
        // Whoever has a descriptor of the same opened file may read on from there, as QEMU does.
        let position = rustix::fs::seek(file, SeekFrom::Current(0))?;
        let looked = sample(file, len);
        rustix::fs::seek(file, SeekFrom::Start(position))?;
        let (data, cached) = looked?;
        if data >= SAMPLES_MIN {
            return Ok(cached >= data - data / 32);
        }
    }
    Ok(cached_bytes(file, 0, len)? >= data_bytes - data_bytes / 32)
}

/// How many of some pages of a file of `len` bytes are data, and how many of those are in the page cache. The file is
/// somewhere else afterwards.
fn sample(file: &File, len: u64) -> io::Result<(u64, u64)> {
    let page = rustix::param::page_size() as u64;
    // An odd number of pages, so that it has no rhythm in common with what images are aligned to.
    let step = (len / page / SAMPLES) | 1;
    let (mut data, mut cached) = (0, 0);
    for offset in (0..SAMPLES).map(|sample| sample * step * page).take_while(|&offset| offset < len) {
        // A page that begins in a hole is taken for one.
        if rustix::fs::seek(file, SeekFrom::Data(offset)) == Ok(offset) {
            data += 1;
            cached += cached_bytes(file, offset, page.min(len - offset))? / page;
        }
    }
    Ok((data, cached))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    #[allow(clippy::print_stderr, reason = "a test that cannot look says so")]
    fn what_was_just_written_is_cached_and_a_hole_is_not() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&vec![1; 1 << 20], 32 << 20).unwrap();
        match cached_bytes(&file, 32 << 20, 1 << 20) {
            Ok(cached) => assert_eq!(cached, 1 << 20),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::Unsupported);
                eprintln!("not looked at: this kernel has no cachestat");
                return;
            }
        }
        assert_eq!(cached_bytes(&file, 0, 16 << 20).unwrap(), 0);
        assert_eq!(cached_bytes(&file, 32 << 20, 0).unwrap(), 0);
    }

    #[test]
    #[allow(clippy::print_stderr, reason = "a test that cannot look says so")]
    fn a_file_of_which_a_part_is_not_cached_is_told_from_one_that_is() {
        const LEN: u64 = 32 << 20;
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        // Half of it is a hole, of which nothing is ever in the cache.
        file.set_len(2 * LEN).unwrap();
        file.write_all_at(&vec![1; LEN as usize], 0).unwrap();
        file.sync_all().unwrap();
        let looks = || [look(&file, LEN, u64::MAX), look(&file, LEN, 0)].map(|nearly| nearly.ok());
        if looks()[0].is_none() {
            eprintln!("not looked at: this kernel has no cachestat");
            return;
        }
        assert_eq!(looks(), [Some(true); 2]);
        let forget = |len| {
            let advice = rustix::fs::Advice::DontNeed;
            rustix::fs::fadvise(&file, LEN / 2, std::num::NonZeroU64::new(len), advice).unwrap();
        };
        forget(LEN / 128);
        assert_eq!(looks(), [Some(true); 2]);
        forget(LEN / 8);
        assert_eq!(looks(), [Some(false); 2]);
        assert_eq!(rustix::fs::tell(&file).unwrap(), 0, "it reads on from where it was");
    }

    #[test]
    fn a_large_file_with_next_to_no_data_is_counted() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.set_len(1 << 40).unwrap();
        // Where the first page is looked at, and behind the last one.
        file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
        file.write_all_at(&[1], (1 << 40) - 1).unwrap();
        let Ok(cached) = cached_bytes(&file, 0, 1 << 40) else { return };
        assert!(look(&file, cached, 0).unwrap());
        assert!(!look(&file, 2 * cached, 0).unwrap());
    }
}
