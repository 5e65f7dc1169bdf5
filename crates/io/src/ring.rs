//! One io_uring, with the owner of everything that is under way in it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, squeue, types};

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file into memory.
    Read,
    /// From memory into the file.
    Write,
}

/// Bytes of memory and the place in a file that they go to or come from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer<'a> {
    pub direction: Direction,
    pub descriptor: BorrowedFd<'a>,
    pub base: *mut u8,
    pub len: u32,
    pub offset: u64,
}

/// A ring in which every operation has an owner that comes home when it is done.
///
/// The owner is what keeps the memory: while the kernel has an operation, nobody else has its owner. Dropping the
/// ring waits for what is under way.
pub(crate) struct Ring<T> {
    uring: IoUring,
    /// The owners of what is under way, by the number that the operation has.
    owners: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Ring<T> {
    /// Opens a ring for up to `operations` at once; it is used by this thread alone.
    ///
    /// # Errors
    /// What the system said: containers forbid io_uring by EPERM, old kernels do not know it.
    ///
    /// # Panics
    /// When the number is 0.
    pub(crate) fn open(operations: usize) -> io::Result<Ring<T>> {
        assert!(operations > 0, "a ring for nothing");
        let entries = u32::try_from(operations).map_err(|_| io::ErrorKind::InvalidInput)?;
        // The kernel then does its part of a completion when this thread asks for it and not in the middle of a
        // copy (since 6.1); an older one refuses the request, and does it whenever it likes.
        let ours = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .dontfork()
            .build(entries);
        let uring = match ours {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().dontfork().build(entries)?
            }
            other => other?,
        };
        // The reads and writes used here came with Linux 5.6, and so did this.
        if !uring.params().is_feature_rw_cur_pos() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "it is older than Linux 5.6"));
        }
        let owners = (0..operations).map(|_| None).collect();
        Ok(Ring { uring, owners, free: (0..operations).rev().collect() })
    }

    /// Whether nothing more can be started before something has come home.
    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Whether nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.free.len() == self.owners.len()
    }

    /// Queues an operation; [`Ring::submit`] or a wait sets it going.
    ///
    /// # Panics
    /// When the ring is full.
    ///
    /// # Safety
    /// The bytes must be mapped, readable for a write and writable and nobody else's for a read, until `owner`
    /// has come home; the descriptor must be open until then.
    pub(crate) unsafe fn start(&mut self, transfer: Transfer<'_>, owner: T) {
        let number = self.free.pop().expect("a place in the ring, which is not full");
        let entry = entry_of(&transfer).user_data(number as u64);
        self.owners[number] = Some(owner);
        // SAFETY: the caller keeps the memory and the descriptor until the owner comes home, which it does only
        // when the kernel is done.
        let queued = unsafe { self.uring.submission().push(&entry) };
        // The queue has as many entries as the ring has places, rounded up.
        assert!(queued.is_ok(), "a place in the ring without an entry in its queue");
    }

    /// Sets going what was queued, without waiting for any of it.
    ///
    /// # Errors
    /// What the system said, but for what passes by itself.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        match self.uring.submit() {
            Ok(_) => Ok(()),
            // What was not taken stays in the queue, and goes along with the next call.
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// One that is done, if there is one: its owner, and how many bytes were moved.
    pub(crate) fn done(&mut self) -> Option<(T, io::Result<usize>)> {
        let completion = self.uring.completion().next()?;
        let number = usize::try_from(completion.user_data()).ok()?;
        let owner = self.owners.get_mut(number).and_then(Option::take);
        let owner = owner.expect("a completion of something that is under way");
        self.free.push(number);
        let moved = match usize::try_from(completion.result()) {
            Ok(moved) => Ok(moved),
            Err(_) => Err(io::Error::from_raw_os_error(completion.result().wrapping_neg())),
        };
        Some((owner, moved))
    }

    /// Waits until something is done, or a signal comes.
    ///
    /// # Errors
    /// What the system said.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        if self.is_idle() {
            return Ok(());
        }
        match self.uring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        while !self.is_idle() {
            while self.done().is_some() {}
            if self.wait().is_err() {
                // The kernel may still have the memory, and it cannot be asked: the owners are never dropped.
                std::mem::forget(std::mem::take(&mut self.owners));
                return;
            }
        }
    }
}

/// Whether the same call may succeed the next time: interrupted, or the kernel is short of something that
/// completions give back.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

fn entry_of(transfer: &Transfer<'_>) -> squeue::Entry {
    let Transfer { direction, descriptor, base, len, offset } = *transfer;
    let descriptor = types::Fd(descriptor.as_raw_fd());
    match direction {
        Direction::Read => opcode::Read::new(descriptor, base, len).offset(offset).build(),
        Direction::Write => opcode::Write::new(descriptor, base, len).offset(offset).build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use crate::Slab;

    /// A ring, or nothing and the reason why.
    #[allow(clippy::print_stderr, reason = "a test that cannot look says so")]
    fn ring<T>(operations: usize) -> Option<Ring<T>> {
        Ring::open(operations).map_err(|error| eprintln!("not looked at: io_uring: {error}")).ok()
    }

    #[test]
    fn every_owner_comes_home_with_what_was_moved() {
        let Some(mut ring) = ring::<usize>(3) else { return };
        let file = tempfile::tempfile().unwrap();
        let slab = Slab::map(4, 4096).unwrap();
        let (mut begun, mut home) = (0, Vec::new());
        while home.len() < 10 {
            while begun < 10 && !ring.is_full() {
                let transfer = Transfer {
                    direction: Direction::Write,
                    descriptor: file.as_fd(),
                    base: slab.buffer(begun % 4),
                    len: 100 + begun as u32,
                    offset: begun as u64 * 4096,
                };
                // SAFETY: the buffers outlive the ring and nobody writes them; the file outlives it, too.
                unsafe { ring.start(transfer, begun) };
                begun += 1;
            }
            ring.wait().unwrap();
            while let Some((owner, moved)) = ring.done() {
                assert_eq!(moved.unwrap(), 100 + owner);
                home.push(owner);
            }
        }
        home.sort_unstable();
        assert_eq!(home, (0..10).collect::<Vec<_>>());
        assert!(ring.is_idle());
        assert_eq!(file.metadata().unwrap().len(), 9 * 4096 + 109);
    }

    #[test]
    fn a_ring_that_is_dropped_waits_for_what_is_under_way() {
        let slab = Slab::map(1, 1 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        let owner = std::rc::Rc::new(());
        let Some(mut ring) = ring(1) else { return };
        let transfer = Transfer {
            direction: Direction::Read,
            descriptor: file.as_fd(),
            base: slab.buffer(0),
            len: 4096,
            offset: 0,
        };
        // SAFETY: the buffer is nobody else's and outlives the ring, as the file does.
        unsafe { ring.start(transfer, owner.clone()) };
        assert!(ring.is_full());
        drop(ring);
        assert_eq!(std::rc::Rc::strong_count(&owner), 1);
        // SAFETY: a byte of the slab, which the kernel has no more.
        assert_eq!(unsafe { slab.buffer(0).wrapping_add(4095).read_volatile() }, 7);
    }

    #[test]
    fn what_the_kernel_refuses_comes_home_as_its_error() {
        let Some(mut ring) = ring(1) else { return };
        let file = std::fs::File::open("/dev/null").unwrap();
        let slab = Slab::map(1, 4096).unwrap();
        let transfer = Transfer {
            direction: Direction::Write,
            descriptor: file.as_fd(),
            base: slab.buffer(0),
            len: 4096,
            offset: 0,
        };
        // SAFETY: the buffer and the file outlive the ring.
        unsafe { ring.start(transfer, ()) };
        ring.wait().unwrap();
        let ((), moved) = ring.done().unwrap();
        assert_eq!(moved.unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
