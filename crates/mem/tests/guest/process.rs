//! A process whose memory is known: this test program started once more, doing as it is told.
//!
//! The parent writes one command a line; the child answers each with a line that has `@` before the answer
//! (the test runner writes lines of its own).

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::ptr::null_mut;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap,
};
use vmstate_mem::{BlockAddress, GuestRam, Peer, PeerError};

const VARIABLE: &str = "VMSTATE_MEM_TEST_CHILD";

/// The child, as its parent sees it. Dropping it ends it.
pub struct Process {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// Memory in the child.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub address: u64,
    pub length: u64,
}

/// A memfd in the child, mapped shared.
#[derive(Clone, Copy, Debug)]
pub struct Memfd {
    pub memory: Memory,
    pub number: u32,
    pub device: u64,
    pub inode: u64,
}

impl Process {
    pub fn start() -> Process {
        let mut child = Command::new(std::env::current_exe().expect("this test program"))
            .args(["process::child", "--exact", "--nocapture", "--test-threads=1"])
            .env(VARIABLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test program once more");
        let commands = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        Process { child, commands, answers }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn peer(&self) -> Arc<Peer> {
        Arc::new(Peer::open(self.pid()).expect("the child"))
    }

    /// Has a command carried out; gives the words of the answer.
    pub fn tell(&mut self, command: &str) -> Vec<String> {
        let commands = self.commands.as_mut().expect("the child has not ended");
        writeln!(commands, "{command}").expect("a pipe to the child");
        loop {
            let mut line = String::new();
            let read = self.answers.read_line(&mut line).expect("a pipe from the child");
            assert!(read > 0, "the child ended at `{command}`");
            if let Some((_, answer)) = line.split_once('@') {
                return answer.split_whitespace().map(str::to_owned).collect();
            }
        }
    }

    fn tell_numbers(&mut self, command: &str) -> Vec<u64> {
        self.tell(command).iter().map(|word| word.parse().expect("a number")).collect()
    }

    pub fn anonymous(&mut self, length: u64) -> Memory {
        Memory { address: self.tell_numbers(&format!("anonymous {length}"))[0], length }
    }

    pub fn memfd(&mut self, length: u64, sealed: bool) -> Memfd {
        let answer = self.tell_numbers(&format!("memfd {length} {}", u8::from(sealed)));
        let memory = Memory { address: answer[0], length };
        Memfd { memory, number: answer[1] as u32, device: answer[2], inode: answer[3] }
    }

    /// Has `kind LENGTH` mapped, a command whose answer starts with an address.
    pub fn map(&mut self, kind: &str, length: u64) -> Memory {
        self.try_map(kind, length).unwrap_or_else(|reason| panic!("{kind}: {reason}"))
    }

    /// The same, for what this system may not have.
    pub fn try_map(&mut self, kind: &str, length: u64) -> Result<Memory, String> {
        let (command, rest) = kind.split_once(' ').unwrap_or((kind, ""));
        let answer = self.tell(format!("{command} {length} {rest}").trim_end());
        match answer[0].parse() {
            Ok(address) => Ok(Memory { address, length }),
            Err(_) => Err(answer.join(" ")),
        }
    }

    pub fn fill(&mut self, memory: Memory, from: u64, to: u64, byte: u8) {
        assert!(from < to && to <= memory.length);
        self.tell(&format!("fill {} {} {byte}", memory.address + from, to - from));
    }

    /// Ends the child and waits until it is gone.
    pub fn end(&mut self) {
        self.commands = None;
        self.child.wait().expect("the child");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

pub fn block(name: &str, memory: Memory) -> BlockAddress {
    BlockAddress {
        name: name.to_owned(),
        address: memory.address,
        length: memory.length,
        page_size: rustix::param::page_size() as u64,
    }
}

/// The child. Run as an ordinary test it has nothing to do.
#[test]
fn child() {
    if std::env::var_os(VARIABLE).is_none() {
        return;
    }
    let mut files = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line.expect("a pipe from the parent");
        let answer = obey(&line.split(' ').collect::<Vec<_>>(), &mut files);
        println!("@{answer}");
    }
    std::process::exit(0);
}

fn obey(words: &[&str], files: &mut Vec<OwnedFd>) -> String {
    let number = |i: usize| words[i].parse::<usize>().expect("a number");
    let address = |i: usize| std::ptr::with_exposed_provenance_mut::<u8>(number(i));
    let anonymous = |flags| {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let mapped = unsafe { mmap_anonymous(null_mut(), number(1), protection, flags) };
        small_pages(mapped.expect("a mapping").cast(), number(1)).to_string()
    };
    match words[0] {
        "anonymous" => anonymous(MapFlags::PRIVATE),
        "shared-anonymous" => anonymous(MapFlags::SHARED),
        "huge-anonymous" => anonymous(sharing(words[2]) | MapFlags::HUGETLB),
        "memfd" => memfd(number(1), number(2) == 1, files),
        "huge-memfd" => {
            let file = memfd_create("test ram", MemfdFlags::HUGETLB | MemfdFlags::CLOEXEC).expect("a memfd");
            ftruncate(&file, number(1) as u64).expect("a length");
            let address = map_file(&file, number(1), 0, sharing(words[2]));
            files.push(file);
            let file = files.last().expect("just pushed");
            format!("{address} {}", file.as_raw_fd())
        }
        // file LENGTH SHARING OFFSET PATH
        "file" => {
            let file = File::options().read(true).write(true).open(words[4]).expect("a file");
            let address = map_file(&file, number(1), number(3) as u64, sharing(words[2]));
            files.push(file.into());
            address.to_string()
        }
        "device" => {
            let file = File::open("/dev/zero").expect("/dev/zero");
            map_file(&file, number(1), 0, MapFlags::PRIVATE).to_string()
        }
        "secret" => secret(number(1), files),
        "userfault" => userfault(number(1), number(2), files).map_or_else(error_number, |_| "0".to_owned()),
        "poison" => userfault(number(1), number(2), files)
            .and_then(|fd| poison(fd, number(1), number(2)))
            .map_or_else(error_number, |()| "0".to_owned()),
        "fill" => {
            let byte = u8::try_from(number(3)).expect("a byte");
            // SAFETY: the parent names memory that this process mapped for it and nobody else uses.
            unsafe { address(1).write_bytes(byte, number(2)) };
            String::new()
        }
        "read" => {
            for offset in (0..number(2)).step_by(4096) {
                // SAFETY: as for `fill`.
                unsafe { address(1).wrapping_add(offset).read_volatile() };
            }
            String::new()
        }
        "protect" => {
            let flags = if number(3) == 0 { MprotectFlags::empty() } else { MprotectFlags::READ };
            // SAFETY: as for `fill`; nothing reads the range afterwards but the parent's tests.
            unsafe { mprotect(address(1).cast(), number(2), flags) }.expect("a range of a mapping");
            String::new()
        }
        "unmap" => {
            // SAFETY: as for `fill`; nothing uses the range afterwards.
            unsafe { munmap(address(1).cast(), number(2)) }.expect("a range of a mapping");
            String::new()
        }
        "truncate" => {
            ftruncate(&files[0], number(1) as u64).expect("a memfd that is not sealed");
            String::new()
        }
        "close-files" => {
            files.clear();
            String::new()
        }
        "become-user" => {
            let user = u32::try_from(number(1)).expect("a user");
            // SAFETY: the call takes a number and changes the credentials of this process.
            let changed = unsafe { libc::setuid(user) };
            changed.to_string()
        }
        "look-into" => look_into(number(1) as u32),
        other => panic!("no such command: {other}"),
    }
}

fn sharing(word: &str) -> MapFlags {
    match word {
        "shared" => MapFlags::SHARED,
        "private" => MapFlags::PRIVATE,
        other => panic!("no such sharing: {other}"),
    }
}

/// Maps a file, writable where it was opened so.
fn map_file(file: impl AsFd, length: usize, offset: u64, flags: MapFlags) -> usize {
    let map = |protection| {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        unsafe { mmap(null_mut(), length, protection, flags, file.as_fd(), offset) }
    };
    let mapped = map(ProtFlags::READ | ProtFlags::WRITE).expect("a mapping");
    small_pages(mapped.cast(), length)
}

fn error_number(error: std::io::Error) -> String {
    error.raw_os_error().unwrap_or(-1).to_string()
}

/// Memory that not even the kernel reads; the answer is its address or why there is none.
fn secret(length: usize, files: &mut Vec<OwnedFd>) -> String {
    // SAFETY: a system call that takes a number and gives a descriptor.
    let number = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) };
    if number < 0 {
        return format!("error {}", error_number(std::io::Error::last_os_error()));
    }
    // SAFETY: a fresh descriptor, which nobody else has.
    let file = unsafe { OwnedFd::from_raw_fd(number as i32) };
    ftruncate(&file, length as u64).expect("a length");
    let address = map_file(&file, length, 0, MapFlags::SHARED);
    files.push(file);
    address.to_string()
}

// linux/userfaultfd.h.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;
const UFFD_FEATURE_POISON: u64 = 1 << 14;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// Has missing pages of a range reported to a userfaultfd, whose number it gives; `files` keep it.
fn userfault(start: usize, length: usize, files: &mut Vec<OwnedFd>) -> std::io::Result<i32> {
    // SAFETY: a system call that takes flags and gives a descriptor.
    let number = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let number = i32::try_from(number).ok().filter(|number| *number >= 0);
    let number = number.ok_or_else(std::io::Error::last_os_error)?;
    // SAFETY: a fresh descriptor, which nobody else has.
    files.push(unsafe { OwnedFd::from_raw_fd(number) });
    // A kernel without poison refuses the feature; the descriptor then does all the rest.
    if order(number, UFFDIO_API, &mut [0xaa, UFFD_FEATURE_POISON, 0]).is_err() {
        order(number, UFFDIO_API, &mut [0xaa, 0, 0])?;
    }
    order(number, UFFDIO_REGISTER, &mut [start as u64, length as u64, UFFDIO_REGISTER_MODE_MISSING, 0])?;
    Ok(number)
}

fn poison(number: i32, start: usize, length: usize) -> std::io::Result<()> {
    order(number, UFFDIO_POISON, &mut [start as u64, length as u64, 0, 0])
}

fn order<const N: usize>(number: i32, code: libc::c_ulong, argument: &mut [u64; N]) -> std::io::Result<()> {
    // SAFETY: the argument has as many words as the code says, and the kernel keeps no pointer to it.
    match unsafe { libc::ioctl(number, code as _, argument.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Keeps huge pages away: what is present shall be what was touched.
fn small_pages(mapped: *mut u8, length: usize) -> usize {
    // SAFETY: the caller's fresh mapping; the advice keeps its content.
    let advised = unsafe { madvise(mapped.cast(), length, Advice::LinuxNoHugepage) };
    // A kernel without huge pages refuses the advice, which it does not need.
    let _ = advised;
    mapped.expose_provenance()
}

fn memfd(length: usize, sealed: bool, files: &mut Vec<OwnedFd>) -> String {
    let file = memfd_create("test ram", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&file, length as u64).expect("a length");
    if sealed {
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK).expect("seals");
    }
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let mapped = unsafe { mmap(null_mut(), length, protection, MapFlags::SHARED, &file, 0) };
    let address = small_pages(mapped.expect("a mapping").cast(), length);
    let found = rustix::fs::fstat(&file).expect("the memfd");
    let answer = format!("{address} {} {} {}", file.as_raw_fd(), found.st_dev, found.st_ino);
    files.push(file);
    answer
}

/// What the library says of a process, in the words of its error.
fn look_into(pid: u32) -> String {
    let peer = match Peer::open(pid) {
        Ok(peer) => Arc::new(peer),
        Err(error) => return format!("open: {error}"),
    };
    let attached = GuestRam::attach(peer.clone(), &[]).map(drop);
    let error = attached.expect_err("a process of another user");
    let holds = peer.holds(0, 0).expect_err("a process of another user");
    match holds {
        PeerError::Denied { hint, .. } => format!("{error}; denied; {hint}"),
        other => format!("{error}; {other}"),
    }
}
