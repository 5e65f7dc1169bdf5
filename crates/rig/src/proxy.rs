//! A monitor with commands missing, or one that is listened to: a real QEMU behind a proxy.

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde_json::{Value, json};

/// The longest command; vmstate's have some hundred bytes.
const COMMAND_LEN_MAX: usize = 64 << 10;

/// What happens when a command is heard, before QEMU hears it. By the second argument one waits until QEMU has answered all
/// before it.
pub type Heard = Box<dyn FnMut(&str, &dyn Fn()) + Send>;

/// A proxy for one client, which ends with it.
pub struct Proxy {
    /// Where the client connects.
    pub path: PathBuf,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Proxy {
    /// Listens in `dir` for a client of the monitor at `qmp`, and answers the commands `missing` as a QEMU
    /// does that has never heard of them.
    ///
    /// # Panics
    /// When there can be no socket.
    pub fn start(dir: &Path, qmp: &Path, missing: &'static [&'static str]) -> Proxy {
        Proxy::start_with(dir, qmp, missing, Box::new(|_, _| {}))
    }

    /// The same with no command missing, and `heard` called for each.
    ///
    /// # Panics
    /// As there.
    pub fn hearing(dir: &Path, qmp: &Path, heard: impl FnMut(&str, &dyn Fn()) + Send + 'static) -> Proxy {
        Proxy::start_with(dir, qmp, &[], Box::new(heard))
    }

    fn start_with(dir: &Path, qmp: &Path, missing: &'static [&'static str], heard: Heard) -> Proxy {
        let path = dir.join("proxy.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        let qmp = qmp.to_owned();
        let thread = std::thread::spawn(move || {
            let (client, _) = listener.accept()?;
            serve(&client, &UnixStream::connect(qmp)?, missing, heard)
        });
        Proxy { path, thread: Some(thread) }
    }

    /// Waits until the client has gone.
    ///
    /// # Panics
    /// When the proxy has failed.
    pub fn finish(mut self) {
        let thread = self.thread.take().expect("finished once");
        thread.join().expect("no panic").expect("a connection until the client leaves");
    }
}

fn serve(
    client: &UnixStream,
    qemu: &UnixStream,
    missing: &'static [&'static str],
    mut heard: Heard,
) -> std::io::Result<()> {
    let answered = Arc::new(AtomicU64::new(0));
    let mut passed = 0;
    let count = answered.clone();
    // Held while a command goes on: nobody is to have QEMU's answer while this process still has the descriptors, by which
    // it would be taken for QEMU.
    let passing = Arc::new(Mutex::new(()));
    let passed_on = passing.clone();
    let answers = (qemu.try_clone()?, client.try_clone()?);
    let back = std::thread::spawn(move || {
        let (from, mut to) = answers;
        for line in BufReader::new(from).split(b'\n') {
            let Ok(mut line) = line else { break };
            // What is missing is not listed either.
            for name in missing {
                let (listed, hidden) = (format!("\"name\": \"{name}\""), "\"name\": \"hidden\"");
                line = String::from_utf8_lossy(&line).replace(&listed, hidden).into_bytes();
            }
            let is_answer = serde_json::from_slice(&line).is_ok_and(|line: Value| line["id"].is_u64());
            line.push(b'\n');
            drop(passed_on.lock());
            if is_answer {
                count.fetch_add(1, Ordering::Release);
            }
            if to.write_all(&line).is_err() {
                break;
            }
        }
    });
    let mut pending = Vec::new();
    let mut fds = Vec::new();
    while receive(client, &mut pending, &mut fds)? {
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            // What is received at once ends with the descriptors in it.
            let is_last = pending.is_empty();
            let command: Value = serde_json::from_slice(&line)?;
            let name = command["execute"].as_str().unwrap_or_default();
            if missing.contains(&name) {
                let desc = format!("The command {name} has not been found");
                let error = json!({ "class": "CommandNotFound", "desc": desc });
                let mut answer = json!({ "error": error, "id": command["id"] }).to_string();
                answer.push('\n');
                (&*client).write_all(answer.as_bytes())?;
                if is_last {
                    fds.clear();
                }
            } else {
                let with = if is_last { std::mem::take(&mut fds) } else { Vec::new() };
                heard(name, &|| {
                    while answered.load(Ordering::Acquire) < passed {
                        std::thread::yield_now();
                    }
                });
                passed += 1;
                let held = passing.lock();
                send(qemu, &line, &with)?;
                drop(with);
                drop(held);
            }
        }
    }
    qemu.shutdown(std::net::Shutdown::Both)?;
    let _ = back.join();
    Ok(())
}

fn receive(from: &UnixStream, bytes: &mut Vec<u8>, fds: &mut Vec<OwnedFd>) -> std::io::Result<bool> {
    let mut chunk = vec![0; COMMAND_LEN_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = match recvmsg(from, &mut [IoSliceMut::new(&mut chunk)], &mut ancillary, flags) {
        Ok(received) => received,
        // It was killed, and has not read all that it was told.
        Err(rustix::io::Errno::CONNRESET) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            fds.extend(passed);
        }
    }
    bytes.extend_from_slice(&chunk[..received.bytes]);
    Ok(received.bytes > 0)
}

fn send(to: &UnixStream, line: &[u8], fds: &[OwnedFd]) -> std::io::Result<()> {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)), "room for the descriptors");
    }
    let sent = sendmsg(to, &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL)?;
    (&*to).write_all(&line[sent..])
}
