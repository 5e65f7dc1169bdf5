//! Who is at the other end of a socket.

use std::os::fd::{AsFd, AsRawFd};

/// The process that made the other end of a unix socket, as the kernel remembers it: of a socket that was connected to,
/// whoever called `listen`. `None` where it has no number here, since it is of another PID namespace, and where the
/// socket has no other end.
///
/// The kernel then answers 0, which rustix's `socket_peercred` would put into a type that cannot be 0.
pub fn socket_peer_pid(socket: impl AsFd) -> Option<u32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the descriptor is open for as long as `socket` is borrowed; `credentials` and `len` are ours alone and
    // live through the call, and `len` is the size of `credentials`, beyond which the kernel writes nothing. Any bytes
    // make a `ucred`, which consists of integers.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    let pid = u32::try_from(credentials.pid).ok()?;
    (answer == 0 && pid != 0).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn the_process_that_listens_is_told_and_where_nobody_does_none_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        let _listener = UnixListener::bind(&path).expect("a listener");
        let connected = UnixStream::connect(&path).expect("a connection");
        assert_eq!(socket_peer_pid(&connected), Some(std::process::id()));
        // The kernel answers 0 for a socket without another end, as it does for one of another namespace.
        let alone =
            rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None);
        assert_eq!(socket_peer_pid(alone.expect("a socket")), None);
        let no_socket = std::fs::File::open("/dev/null").expect("/dev/null");
        assert_eq!(socket_peer_pid(no_socket), None);
    }
}
