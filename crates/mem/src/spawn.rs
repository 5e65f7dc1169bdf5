//! Programs that are started to stay.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::io::FdFlags;
use rustix::process::{Resource, getrlimit};

/// The highest descriptor that is looked at one by one, on kernels without close_range's flag (before 5.11).
const DESCRIPTORS_MAX: u64 = 1 << 20;

/// A program to start, with the descriptors it is to have.
///
/// It inherits the environment and the working directory, and of the descriptors only the standard three and
/// those passed on: a caller that waits for the end of a pipe must get it when *we* end.
#[derive(Debug)]
pub struct Program {
    /// The program: a path, or a name to be looked up in PATH.
    pub path: OsString,
    /// Its arguments, without the program.
    pub args: Vec<OsString>,
    /// Descriptors it gets under the numbers they have here. They are closed here once it is started.
    pub pass: Vec<OwnedFd>,
}

/// Where a detached program writes; `/dev/null` where nothing is named.
#[derive(Debug, Default)]
pub struct Output {
    /// Its standard output.
    pub stdout: Option<File>,
    /// Its standard error.
    pub stderr: Option<File>,
}

impl Program {
    /// Starts the program in a session of its own, with nothing to read: no terminal reaches it, and no
    /// signal that a terminal sends.
    ///
    /// # Errors
    /// What starting it said; `InvalidInput` for a passed descriptor that is a standard one.
    pub fn spawn_detached(self, output: Output) -> io::Result<Child> {
        self.spawn_reading(Stdio::null(), output)
    }

    /// As [`Program::spawn_detached`], with this to read from as its standard input, which may be a socket.
    ///
    /// # Errors
    /// As [`Program::spawn_detached`].
    pub fn spawn_detached_reading(self, stdin: OwnedFd, output: Output) -> io::Result<Child> {
        self.spawn_reading(stdin.into(), output)
    }

    fn spawn_reading(self, stdin: Stdio, output: Output) -> io::Result<Child> {
        let or_null = |file: Option<File>| file.map_or_else(Stdio::null, Stdio::from);
        let mut command = Command::new(&self.path);
        command.stdin(stdin).stdout(or_null(output.stdout)).stderr(or_null(output.stderr));
        self.spawn(command, true)
    }

    /// Starts the program with our own terminal, standard streams and session.
    ///
    /// # Errors
    /// As [`Program::spawn_detached`].
    pub fn spawn_foreground(self) -> io::Result<Child> {
        let command = Command::new(&self.path);
        self.spawn(command, false)
    }

    fn spawn(self, mut command: Command, is_detached: bool) -> io::Result<Child> {
        let pass: Vec<RawFd> = self.pass.iter().map(AsRawFd::as_raw_fd).collect();
        if let Some(standard) = pass.iter().find(|&&number| number <= 2) {
            let text = format!("descriptor {standard} cannot be passed on: it is a standard stream");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        command.args(&self.args);
        let prepare = move || prepare_child(&pass, is_detached);
        // SAFETY: the closure runs between fork and exec, where other threads' locks may be held for ever:
        // it makes plain system calls only, and neither allocates nor locks. Its captures were made before.
        unsafe { command.pre_exec(prepare) };
        // `self.pass` lives until after the fork, so the numbers are still those descriptors there.
        command.spawn()
    }
}

/// What the child does to itself before it becomes the program.
fn prepare_child(pass: &[RawFd], is_detached: bool) -> io::Result<()> {
    if is_detached {
        rustix::process::setsid()?;
    }
    mark_all_to_be_closed()?;
    for &number in pass {
        // SAFETY: the parent keeps the descriptor open until after the fork, and nothing closes it here.
        let passed = unsafe { BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(passed, FdFlags::empty())?;
    }
    Ok(())
}

/// Marks every descriptor but the standard three to be closed by exec. They are not closed at once, because
/// the standard library reports a failing exec through one of them.
fn mark_all_to_be_closed() -> io::Result<()> {
    let (first, last): (libc::c_uint, libc::c_uint) = (3, libc::c_uint::MAX);
    // SAFETY: the call takes numbers only, and changes nothing but flags of this process's own table.
    let marked = unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC) };
    if marked == 0 {
        return Ok(());
    }
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(DESCRIPTORS_MAX).min(DESCRIPTORS_MAX);
    for number in 3..limit as RawFd {
        // SAFETY: the number is used for one call that fails harmlessly where nothing is open.
        let maybe_open = unsafe { BorrowedFd::borrow_raw(number) };
        let _ = rustix::io::fcntl_setfd(maybe_open, FdFlags::CLOEXEC);
    }
    Ok(())
}
