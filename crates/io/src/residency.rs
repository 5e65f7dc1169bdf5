//! How much of a file is in the page cache: what is there is read from there, faster than from any disk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// cachestat(2), since Linux 6.5; the same number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

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
}
