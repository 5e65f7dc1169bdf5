//! `vmstate restore --background`: a process that goes on when the caller has its answer.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;

use vmstate::{Answer, Cancel, Error, Observer, Progress, RestoreReport, Server};

use super::Outcome;
use super::restore::tell;
use crate::args::ReportArgs;
use crate::output::end_bars;
use crate::progress::{Told, asked_by_signal, terminal_columns};
use crate::signals::cancel_on_signals;

/// The option that makes this program the server of a caller.
const SERVER: &str = "--background-server";

/// Starts this program once more, as a server, and returns when the guest runs or the restore has failed.
pub fn start() -> vmstate::Result<Outcome> {
    let cancel = cancel_on_signals()?;
    let asked = asked_by_signal()?;
    let mut args: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Behind the name of the command, which has no option before it.
    let server = terminal_columns().map_or(SERVER.to_owned(), |columns| format!("{SERVER}={columns}"));
    args.insert(1.min(args.len()), server.into());
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    match vmstate::start_server(this_program(), args, &cancel, &asked, &mut out, &mut err)? {
        Answer::Running | Answer::Ended(0) => Ok(Outcome::Done),
        Answer::Ended(code) => Ok(Outcome::Exit(code)),
    }
}

/// Its path, so that it has its name among the processes; where it was replaced meanwhile, what it still is.
fn this_program() -> PathBuf {
    std::env::current_exe().ok().filter(|path| path.exists()).unwrap_or_else(|| "/proc/self/exe".into())
}

/// What this process does as the server.
pub struct Background {
    /// Gone when the caller was told.
    server: Mutex<Option<Server>>,
    /// What this process reads from and writes to afterwards.
    nothing: File,
    log: Option<File>,
    image: PathBuf,
    report: ReportArgs,
}

impl Background {
    /// Listens to the caller, which is at the other end of the standard input; `told` answers when it asks.
    ///
    /// # Errors
    /// Where nobody is there, or the log cannot be written.
    pub fn new(
        log: Option<&Path>,
        image: &Path,
        report: ReportArgs,
        cancel: &Cancel,
        told: &Told,
    ) -> vmstate::Result<Background> {
        let cannot = |what: &Path| {
            let clause = format!("cannot open {}", what.display());
            move |error| Error::io(clause, error)
        };
        let control = std::io::stdin().as_fd().try_clone_to_owned();
        let control = control.map_err(|error| Error::io("cannot duplicate a descriptor", error))?;
        let null = Path::new("/dev/null");
        let nothing = File::options().read(true).write(true).open(null).map_err(cannot(null))?;
        let open = |path: &Path| File::options().append(true).create(true).open(path).map_err(cannot(path));
        let log = log.map(open).transpose()?;
        let server = Mutex::new(Some(Server::serve(control, cancel, told.asker()?)?));
        Ok(Background { server, nothing, log, image: image.to_owned(), report })
    }

    /// An observer that tells the caller when the guest runs, and everything else to `told`.
    pub fn telling<'a>(&'a self, told: &'a Told) -> impl Observer + 'a {
        Telling { background: self, told }
    }

    /// Whether the caller has its answer.
    pub fn has_told(&self) -> bool {
        self.server.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Gives the caller its answer, and lets go of everything that is the caller's.
    fn leave(&self, report: &RestoreReport) {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(server) = server else { return };
        // The bar is the caller's, too.
        end_bars();
        tell(report, &self.image, &self.report, Some(std::process::id()));
        server.let_go();
        let last_words = self.log.as_ref().unwrap_or(&self.nothing);
        // A number that is in use already cannot fail to be used again.
        let _ = rustix::stdio::dup2_stdin(&self.nothing);
        let _ = rustix::stdio::dup2_stdout(last_words);
        let _ = rustix::stdio::dup2_stderr(last_words);
    }
}

struct Telling<'a> {
    background: &'a Background,
    told: &'a Told,
}

impl Observer for Telling<'_> {
    fn phase(&self, name: &'static str) {
        self.told.phase(name);
    }

    fn note(&self, text: &str) {
        self.told.note(text);
    }

    fn warn(&self, text: &str) {
        self.told.warn(text);
    }

    fn progress(&self, progress: &Progress) {
        self.told.progress(progress);
    }

    fn running(&self, report: &RestoreReport) {
        self.background.leave(report);
    }
}
