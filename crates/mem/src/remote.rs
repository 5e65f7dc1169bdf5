//! Copies out of another process's memory, and into it.

use std::io;

use crate::peer::Peer;

/// The most spans that one system call takes (`UIO_MAXIOV` of Linux).
const SPANS_MAX: usize = 1024;

/// Bytes of another process and where they go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RemoteSpan {
    /// The address in the other process.
    pub remote: u64,
    /// The address in this one.
    pub local: *mut u8,
    /// How many bytes.
    pub len: usize,
}

/// An address of another process that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("address {address:#x} of process {pid}")]
pub(crate) struct RemoteFault {
    pub pid: u32,
    pub address: u64,
    pub source: io::Error,
}

/// Copies all the spans, in order.
///
/// # Errors
/// The first address that could not be read; what was copied before it is there.
///
/// # Safety
/// The local range of every span must be mapped, writable and this call's alone.
pub(crate) unsafe fn read_spans(peer: &Peer, spans: &[RemoteSpan]) -> Result<(), RemoteFault> {
    let mut locals = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; SPANS_MAX];
    let mut remotes = locals;
    for batch in spans.chunks(SPANS_MAX) {
        let count = batch.len();
        for ((local, remote), span) in locals.iter_mut().zip(&mut remotes).zip(batch) {
            *local = libc::iovec { iov_base: span.local.cast(), iov_len: span.len };
            let address = usize::try_from(span.remote).unwrap_or(usize::MAX);
            // The other process's address is a number here; the kernel alone looks behind it.
            *remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: span.len };
        }
        let mut transfer = Transfer { locals: &mut locals[..count], remotes: &mut remotes[..count] };
        while transfer.skip_empty() {
            // SAFETY: the caller vouches for every local range, of which the vectors hold what is left.
            unsafe { transfer.step(peer) }?;
        }
    }
    Ok(())
}

/// Copies bytes into the memory of another process, and says how many: fewer where an address cannot be written.
///
/// # Errors
/// That the process has ended, or what the system said.
///
/// # Safety
/// `local..local + len` must be mapped and readable during the call. The bytes may change meanwhile.
pub(crate) unsafe fn write_span(
    peer: &Peer,
    local: *const u8,
    address: u64,
    len: usize,
) -> io::Result<usize> {
    // The call knows a process by its number, which another may be given when it has ended: not within the next
    // microseconds, in which all the others would have to be used up first.
    if !peer.is_alive() {
        return Err(rustix::io::Errno::SRCH.into());
    }
    let address = usize::try_from(address).unwrap_or(usize::MAX);
    // SAFETY: the caller's promise. The other process's address is a number here; the kernel alone looks behind it.
    unsafe { write_by_kernel(peer.pid(), local, std::ptr::without_provenance_mut(address), len) }
}

/// Has the kernel copy bytes into the memory of a process; how many it has copied.
///
/// # Errors
/// What the system said.
///
/// # Safety
/// The source must be mapped and readable, and where the process is this one, nobody may have a reference to the bytes of
/// the target.
pub(crate) unsafe fn write_by_kernel(
    pid: u32,
    source: *const u8,
    target: *mut u8,
    len: usize,
) -> io::Result<usize> {
    let local = libc::iovec { iov_base: source.cast_mut().cast(), iov_len: len };
    let remote = libc::iovec { iov_base: target.cast(), iov_len: len };
    // Linux numbers processes below 2^22.
    let pid = pid as libc::pid_t;
    // SAFETY: both vectors have one element; what they name is the caller's promise, and an address that cannot be
    // reached is an error.
    let copied = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}

/// What is left of a batch of spans.
struct Transfer<'a> {
    locals: &'a mut [libc::iovec],
    remotes: &'a mut [libc::iovec],
}

impl Transfer<'_> {
    /// Drops the finished spans; says whether anything is left.
    fn skip_empty(&mut self) -> bool {
        let done = self.locals.iter().take_while(|local| local.iov_len == 0).count();
        self.locals = std::mem::take(&mut self.locals).split_at_mut(done).1;
        self.remotes = std::mem::take(&mut self.remotes).split_at_mut(done).1;
        !self.locals.is_empty()
    }

    /// One system call. It stops early at an address that cannot be read, and fails when that is the first.
    ///
    /// # Safety
    /// Every local range must be mapped, writable and this call's alone.
    unsafe fn step(&mut self, peer: &Peer) -> Result<(), RemoteFault> {
        // Linux numbers processes below 2^22.
        let pid = peer.pid() as libc::pid_t;
        let (locals, remotes) = (self.locals.as_ptr(), self.remotes.as_ptr());
        let count = self.locals.len() as libc::c_ulong;
        // SAFETY: both vectors have `count` elements; the local ranges are the caller's promise, and the
        // remote ones are checked by the kernel.
        let copied = unsafe { libc::process_vm_readv(pid, locals, count, remotes, count, 0) };
        let source = match usize::try_from(copied) {
            Ok(copied @ 1..) => {
                self.advance(copied);
                return Ok(());
            }
            Ok(_) => io::ErrorKind::UnexpectedEof.into(),
            Err(_) => io::Error::last_os_error(),
        };
        match source.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            _ => Err(RemoteFault {
                pid: peer.pid(),
                address: self.remotes.first().map_or(0, |remote| remote.iov_base.addr() as u64),
                source,
            }),
        }
    }

    fn advance(&mut self, mut copied: usize) {
        for (local, remote) in self.locals.iter_mut().zip(self.remotes.iter_mut()) {
            let part = copied.min(local.iov_len);
            for vector in [local, remote] {
                vector.iov_base = vector.iov_base.wrapping_byte_add(part);
                vector.iov_len -= part;
            }
            copied -= part;
            if copied == 0 {
                break;
            }
        }
    }
}
