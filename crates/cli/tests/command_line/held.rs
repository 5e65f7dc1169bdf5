//! A program that is held where it is about to go on.

use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, tee};
use rustix::process::{Pid, Signal, kill_process};

use crate::DEADLINE;

/// A program whose stderr is a pipe with room for one packet. Each write is a packet, and the end of a line is one
/// of its own: while the text of a line lies unread in the pipe, the program cannot get past that line.
pub struct Held {
    child: Child,
    stderr: std::fs::File,
    text: String,
}

impl Held {
    pub fn start(mut command: Command) -> Held {
        let (reader, writer) = pipe_with(PipeFlags::DIRECT | PipeFlags::CLOEXEC).unwrap();
        assert_eq!(fcntl_setpipe_size(&writer, 4096).unwrap(), 4096, "room for one packet");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer).spawn().unwrap();
        // The command keeps the writing end, and the end of the file is not seen before that is closed.
        drop(command);
        Held { child, stderr: reader.into(), text: String::new() }
    }

    /// Lets it go on until it says `line`, and holds it there.
    pub fn hold_at(&mut self, line: &str) {
        let (copy, copy_writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut copy = std::fs::File::from(copy);
        let end = Instant::now() + DEADLINE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let ready = poll(&mut [PollFd::new(&self.stderr, PollFlags::IN)], Some(&timeout)).unwrap();
            assert_eq!(ready, 1, "no line `{line}` within {DEADLINE:?} after:\n{}", self.text);
            let len = tee(self.stderr.as_fd(), &copy_writer, 4096, SpliceFlags::empty()).unwrap();
            assert_ne!(len, 0, "it ended without a line `{line}`:\n{}", self.text);
            let mut packet = vec![0; len];
            copy.read_exact(&mut packet).unwrap();
            if packet == line.as_bytes() {
                return;
            }
            assert_ne!(packet, format!("{line}\n").as_bytes(), "a line in one packet does not hold");
            self.stderr.read_exact(&mut packet).unwrap();
            self.text.push_str(std::str::from_utf8(&packet).unwrap());
        }
    }

    /// Sends a signal and waits until the program has turned it into a cancel, an event that is counted.
    pub fn interrupt(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        let end = Instant::now() + DEADLINE;
        while !self.is_cancelled() {
            assert!(Instant::now() < end, "the signal has no effect");
            std::thread::yield_now();
        }
    }

    /// Sends a signal that is not to end it.
    pub fn ask(&self) {
        kill_process(Pid::from_child(&self.child), Signal::USR1).unwrap();
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it where it is held, as nobody may handle: SIGKILL.
    pub fn kill(mut self) -> ExitStatus {
        self.child.kill().unwrap();
        self.child.wait().unwrap()
    }

    fn is_cancelled(&self) -> bool {
        let entries = std::fs::read_dir(format!("/proc/{}/fdinfo", self.child.id())).unwrap();
        let infos: Vec<_> = entries
            .filter_map(Result::ok)
            .map(|entry| std::fs::read_to_string(entry.path()).unwrap_or_default())
            .collect();
        assert!(!infos.is_empty(), "the signal has ended it");
        infos.iter().any(|info| {
            let count = info.lines().find_map(|line| line.strip_prefix("eventfd-count:"));
            count.is_some_and(|count| count.trim() != "0")
        })
    }

    /// Lets it go on to its end; returns how it ended and all that it said.
    pub fn finish(mut self) -> (ExitStatus, String) {
        // What a read leaves of a packet is lost, so each gets room for a whole one.
        let mut packet = [0; 4096];
        loop {
            match self.stderr.read(&mut packet).unwrap() {
                0 => break,
                len => self.text.push_str(std::str::from_utf8(&packet[..len]).unwrap()),
            }
        }
        (self.child.wait().unwrap(), self.text)
    }
}
