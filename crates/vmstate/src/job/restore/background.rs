//! A restore that goes on behind its caller's back: the program starts itself once more, in a session of its own, and
//! passes on what that one says until the guest runs.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, PipeReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use io::Cancel;
use mem::{Output, Program};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::{Error, Kind, Result};

/// What the server writes on its control socket when the guest runs.
const RUNNING: u8 = b'r';
/// What is written to it when somebody asks how far it is.
const ASKED: u8 = b'?';
/// How much of what it says is passed on at once.
const CHUNK: usize = 16 << 10;
/// The exit code of a server that a signal has ended, beside the signal's number: as shells tell it.
const SIGNALLED: i32 = 128;

/// How a server answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The guest runs, and the server goes on.
    Running,
    /// It has ended, with this exit code: the restore was over by then, or it failed.
    Ended(u8),
}

/// The end of the control socket that a server has, as its standard input.
#[derive(Debug)]
pub struct Server {
    control: UnixStream,
    has_let_go: Arc<AtomicBool>,
}

/// Starts `program` with these arguments as a server, in a session of its own and with none of our descriptors, and
/// passes on what it says to `out` and `err`, until it lets go of them. Thrown, `cancel` is passed on as well, and so
/// is that somebody asks how far it is: something to read in `asked`, which does not block.
///
/// # Errors
/// [`Kind::Io`] where it cannot be started or heard.
pub fn start_server<'a>(
    program: PathBuf,
    args: Vec<OsString>,
    cancel: &Cancel,
    asked: &UnixStream,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
) -> Result<Answer> {
    let cannot = |error| Error::io("cannot start a server", error);
    let (control, theirs) = UnixStream::pair().map_err(cannot)?;
    let (stdout, their_stdout) = std::io::pipe().map_err(cannot)?;
    let (stderr, their_stderr) = std::io::pipe().map_err(cannot)?;
    let output = Output {
        stdout: Some(File::from(OwnedFd::from(their_stdout))),
        stderr: Some(File::from(OwnedFd::from(their_stderr))),
    };
    let program = Program { path: program.into_os_string(), args, pass: Vec::new() };
    let mut child = program.spawn_detached_reading(theirs.into(), output).map_err(cannot)?;

    let mut streams = vec![(stdout, out), (stderr, err)];
    let (mut cancel, mut asked) = (Some(cancel), Some(asked));
    while !streams.is_empty() {
        let mut fds: Vec<_> = streams.iter().map(|(from, _)| PollFd::new(from, PollFlags::IN)).collect();
        fds.extend(asked.map(|asked| PollFd::new(asked, PollFlags::IN)));
        fds.extend(cancel.map(|cancel| PollFd::new(cancel, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(Error::io("cannot wait for the server", error)),
        }
        let mut has: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if cancel.is_some() && has.pop() == Some(true) {
            // It reads the end, and heeds it as long as the guest cannot run.
            cancel = None;
            let _ = control.shutdown(Shutdown::Write);
        }
        if let Some(mut asking) = asked
            && has.pop() == Some(true)
        {
            match asking.read(&mut [0; 64]) {
                Ok(0) => asked = None,
                // A server that ends at this moment has nothing more to tell.
                Ok(_) => drop((&control).write_all(&[ASKED])),
                Err(_) => {}
            }
        }
        for index in (0..has.len()).rev().filter(|index| has[*index]) {
            let (from, to) = &mut streams[index];
            if pass_on(from, *to)? {
                streams.remove(index);
            }
        }
    }
    answer(&control, &mut child)
}

/// Passes on what is there; whether that was the end.
fn pass_on(from: &mut PipeReader, to: &mut dyn Write) -> Result<bool> {
    let mut bytes = [0; CHUNK];
    match from.read(&mut bytes) {
        Ok(0) => Ok(true),
        Ok(len) => {
            // A reader that has gone has read all it wanted.
            let _ = to.write_all(&bytes[..len]).and_then(|()| to.flush());
            Ok(false)
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(false),
        Err(error) => Err(Error::io("cannot hear the server", error)),
    }
}

fn answer(mut control: &UnixStream, child: &mut Child) -> Result<Answer> {
    let mut byte = [0];
    let answered = loop {
        match control.read(&mut byte) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => break other,
        }
    };
    // A socket whose other end was closed with something unread is reset; the answer is how it ended then, too.
    if answered.is_ok_and(|len| len == 1) && byte == [RUNNING] {
        return Ok(Answer::Running);
    }
    let status = child.wait().map_err(|error| Error::io("cannot wait for the server", error))?;
    let code = status.code().or(status.signal().map(|signal| SIGNALLED + signal)).unwrap_or(SIGNALLED);
    Ok(Answer::Ended(u8::try_from(code).unwrap_or(u8::MAX)))
}

impl Server {
    /// What this process is, if it was started by [`start_server`]: `control` is its standard input. Throws `cancel`
    /// when whoever started it ends or wants it to end, and calls `asked` when it asks how far this is, until
    /// [`Server::let_go`].
    ///
    /// # Errors
    /// [`Kind::Misuse`] where the standard input is no socket; [`Kind::Io`].
    pub fn serve(control: OwnedFd, cancel: &Cancel, asked: impl Fn() + Send + 'static) -> Result<Server> {
        rustix::net::sockopt::socket_type(&control).map_err(|_| {
            Error::new(Kind::Misuse, "the standard input of a server is no socket")
                .hint("use --background, which starts the server")
        })?;
        let listened = UnixStream::from(control);
        let cannot = |error| Error::io("cannot start a thread", error);
        let control = listened.try_clone().map_err(cannot)?;
        let has_let_go = Arc::new(AtomicBool::new(false));
        let (cancel, is_over) = (cancel.clone(), has_let_go.clone());
        std::thread::Builder::new()
            .name("caller".to_owned())
            .spawn(move || {
                let mut byte = [0];
                loop {
                    match (&listened).read(&mut byte) {
                        Ok(1) if byte == [ASKED] => asked(),
                        Err(error) if error.kind() == ErrorKind::Interrupted => {}
                        // The end, and so is what nobody says.
                        _ => break,
                    }
                }
                if !is_over.load(Ordering::Acquire) {
                    cancel.cancel();
                }
            })
            .map_err(cannot)?;
        Ok(Server { control, has_let_go })
    }

    /// Says that the guest runs: whoever started this process does not wait any longer, and is not listened to.
    pub fn let_go(self) {
        self.has_let_go.store(true, Ordering::Release);
        // Whoever it was may be gone, and the guest runs all the same. Rust's programs ignore SIGPIPE.
        let _ = (&self.control).write_all(&[RUNNING]);
        // The thread that listens ends, and with it the last of this socket here.
        let _ = self.control.shutdown(Shutdown::Read);
    }
}
