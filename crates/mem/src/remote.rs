//! Copies out of another process's memory.

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
