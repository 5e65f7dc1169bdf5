//! How fast the kernel fills memory through a userfaultfd from a socket: what a lazy restore is measured by.
//!
//! A restore on demand sends pages through a unix socket to QEMU, one thread of which places them one by one with
//! UFFDIO_COPY. The same is done here by two threads that do nothing else: no file is read, and nobody waits for a page.

use std::ffi::c_void;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ::io::Cancel;
use rustix::ioctl::{Opcode, opcode};
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags, mmap_anonymous, munmap, userfaultfd};

/// What is placed at once: QEMU's page.
const PAGE: usize = 4096;
/// What is read from the socket, and written into it, at once.
const BATCH: usize = 64 * PAGE;
/// Memory is filled in pieces of this length, and given back: what is placed does not depend on how much is there.
const PIECE: usize = 256 << 20;

// include/uapi/linux/userfaultfd.h: `_IOWR(UFFDIO, …)` with UFFDIO = 0xAA.
const UFFDIO_API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0x00);
const UFFDIO_COPY: Opcode = opcode::read_write::<CopyPage>(0xaa, 0x03);
/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_USER_MODE_ONLY`: what is not privileged may have it for its own faults only, which is all that is wanted.
const USER_MODE_ONLY: u32 = 1;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MODE_MISSING: u64 = 1;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct CopyPage {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(size_of::<Register>() == 32);
const _: () = assert!(size_of::<CopyPage>() == 40);

/// Fills `bytes` of fresh memory page by page and says how long that took.
///
/// # Errors
/// Where the kernel has no userfaultfd, or lets this user have none (`vm.unprivileged_userfaultfd`); `Interrupted`.
pub fn fill_by_userfaultfd(bytes: u64, cancel: &Cancel) -> io::Result<Duration> {
    let mut left = bytes.next_multiple_of(PAGE as u64);
    let mut took = Duration::ZERO;
    while left > 0 {
        let piece = left.min(PIECE as u64);
        // No more than a piece, so it is a usize.
        took += fill_piece(piece as usize, cancel)?;
        left -= piece;
    }
    Ok(took)
}

fn fill_piece(length: usize, cancel: &Cancel) -> io::Result<Duration> {
    let area = Area::new(length)?;
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
    // SAFETY: the descriptor is for the memory registered with it, which is this function's own.
    let faults = unsafe { userfaultfd(flags) }?;
    let mut api = Api { api: API, features: 0, ioctls: 0 };
    // SAFETY: the argument is laid out as the kernel's and outlives the call.
    unsafe { call(&faults, UFFDIO_API, &mut api) }?;
    let mut register =
        Register { start: area.base.addr() as u64, len: length as u64, mode: MODE_MISSING, ioctls: 0 };
    // SAFETY: as above; the range is the area's, which nobody else knows.
    unsafe { call(&faults, UFFDIO_REGISTER, &mut register) }?;
    let (mut source, mut target) = UnixStream::pair()?;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let constant = vec![0x5a; BATCH];
            let mut left = length;
            while left > 0 {
                let len = left.min(BATCH);
                source.write_all(&constant[..len])?;
                left -= len;
            }
            io::Result::Ok(())
        });
        let placed = area.receive(&faults, &mut target, cancel);
        // A sender that still writes learns by this that nobody reads.
        drop(target);
        let sent = sender.join().unwrap_or_else(|_| Err(io::Error::other("the sender panicked")));
        placed.and(sent)
    })?;
    Ok(started.elapsed())
}

/// Memory that is filled. It is unmapped when this is dropped.
struct Area {
    base: *mut c_void,
    length: usize,
}

impl Area {
    fn new(length: usize) -> io::Result<Area> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nobody's memory.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), length, access, MapFlags::PRIVATE) }?;
        Ok(Area { base, length })
    }

    fn receive(&self, faults: &OwnedFd, from: &mut UnixStream, cancel: &Cancel) -> io::Result<()> {
        let mut buffer = vec![0; BATCH];
        let mut filled = 0;
        while filled < self.length {
            if cancel.is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let batch = &mut buffer[..BATCH.min(self.length - filled)];
            from.read_exact(batch)?;
            for page in batch.chunks(PAGE) {
                let mut copy = CopyPage {
                    dst: (self.base.addr() + filled) as u64,
                    src: page.as_ptr().expose_provenance() as u64,
                    len: page.len() as u64,
                    mode: 0,
                    copy: 0,
                };
                // SAFETY: the argument is laid out as the kernel's; what it reads is the page, which is borrowed, and
                // what it writes lies in the area, to whose bytes nothing refers.
                unsafe { call(faults, UFFDIO_COPY, &mut copy) }?;
                filled += page.len();
            }
        }
        Ok(())
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, to which nothing refers any more.
        let _ = unsafe { munmap(self.base, self.length) };
    }
}

/// One ioctl of a userfaultfd.
///
/// # Safety
/// The argument must be laid out as the kernel's for this request, and what it names be the caller's to write.
unsafe fn call<T>(faults: &OwnedFd, request: Opcode, argument: &mut T) -> io::Result<()> {
    // SAFETY: the caller has promised what the kernel relies on; the argument is borrowed exclusively.
    match unsafe { libc::ioctl(faults.as_raw_fd(), request as _, std::ptr::from_mut(argument)) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
#[expect(clippy::print_stdout, reason = "a skip says what is missing")]
mod tests {
    use super::*;

    #[test]
    fn memory_is_filled_to_its_last_page_and_a_cancel_ends_it() {
        let cancel = Cancel::new().unwrap();
        match fill_by_userfaultfd((2 << 20) + 1, &cancel) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                println!("not tested here: no userfaultfd for this user: {error}");
                return;
            }
            took => assert!(took.unwrap() > Duration::ZERO),
        }
        cancel.cancel();
        let error = fill_by_userfaultfd(1 << 20, &cancel).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    }
}
