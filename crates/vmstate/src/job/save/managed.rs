//! A managed save that libvirt does itself, so that it knows of it at once.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use io::Cancel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use wire::libvirt_rpc::format::{
    VIR_DOMAIN_SAVE_BYPASS_CACHE, VIR_DOMAIN_SAVE_PAUSED, VIR_DOMAIN_SAVE_RUNNING,
};
use wire::libvirt_rpc::{Arguments, Domain, Procedure};

use super::envelope::managed_image_of;
use crate::job::{Observer, Record};
use crate::libvirt::{Connection, DomainName, GivingUp, LibvirtUri};
use crate::{Error, Result};

/// How often a job is told to end that has not begun yet, or will not.
const ABORT_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// How long one that has agreed to end is left alone: it needs the domain for that, as being told again does.
const ENDING_INTERVAL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Which domain libvirt is to save, and how.
#[derive(Clone, Debug)]
pub struct ManagedSaveSettings {
    /// The daemon.
    pub uri: LibvirtUri,
    /// The domain.
    pub name: DomainName,
    /// The state that `virsh start` brings the domain to.
    pub record: Record,
    /// Whether libvirt writes past the page cache.
    pub bypass_cache: bool,
}

/// What libvirt did.
#[derive(Clone, Debug)]
pub struct ManagedSaveReport {
    /// The domain's name.
    pub domain: String,
    /// The image.
    pub image: PathBuf,
    /// The whole save.
    pub duration: Duration,
}

/// Lets libvirt save a domain to where it looks when it starts it the next time.
///
/// `cancel` ends libvirt's job, after which the domain runs on.
///
/// # Errors
/// [`Kind::Peer`](crate::Kind::Peer) with libvirt's words; [`Kind::Interrupted`](crate::Kind::Interrupted).
pub fn save_managed(
    settings: &ManagedSaveSettings,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Result<ManagedSaveReport> {
    let start = Instant::now();
    observer.phase("connect");
    let mut libvirt = Connection::open(&settings.uri, GivingUp::Cancelled(cancel.clone()))?;
    let domain = libvirt.find(&settings.name)?;
    let image = managed_image_of(&mut libvirt, &settings.uri, &domain)?;
    drop(libvirt);
    observer.phase("save");
    let outcome = call(settings, &domain, cancel)?;
    match outcome {
        Err(_) if cancel.is_cancelled() => Err(Error::interrupted()),
        Err(error) => Err(error),
        // One that was done before the job was told to end is done.
        Ok(()) => Ok(ManagedSaveReport { domain: domain.name, image, duration: start.elapsed() }),
    }
}

/// Calls libvirt on a thread, and ends its job where the switch is thrown meanwhile. The outer error is ours.
fn call(settings: &ManagedSaveSettings, domain: &Domain, cancel: &Cancel) -> Result<Result<()>> {
    let failed = |error| Error::io("cannot make a pair of sockets", error);
    let (done, on_done) = UnixStream::pair().map_err(failed)?;
    // Whoever hangs up leaves libvirt saving: this call is waited for in any case.
    let until_the_end = done.try_clone().map_err(failed)?;
    let mut libvirt = Connection::open(&settings.uri, GivingUp::HungUp(until_the_end))?;
    let arguments = Arguments::new().domain(domain).word(flags(settings));
    std::thread::scope(|scope| {
        let saving = scope.spawn(move || {
            let outcome = libvirt.call(Procedure::DomainManagedSave, &arguments).map(drop);
            drop((libvirt, done));
            outcome
        });
        while !has_ended(&on_done, cancel)? {
            // It may not have begun, or be over: both are refusals.
            let hung_up = on_done.try_clone().map_err(failed)?;
            let told = Connection::open(&settings.uri, GivingUp::HungUp(hung_up)).and_then(|mut other| {
                other.call(Procedure::DomainAbortJob, &Arguments::new().domain(domain))
            });
            let interval = if told.is_ok() { ENDING_INTERVAL } else { ABORT_INTERVAL };
            let _ = poll(&mut [PollFd::new(&on_done, PollFlags::empty())], Some(&interval));
        }
        Ok(saving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Waits until the call is done or the switch is thrown, and says whether it is done.
fn has_ended(on_done: &UnixStream, cancel: &Cancel) -> Result<bool> {
    let mut fds =
        [PollFd::new(on_done, PollFlags::IN), PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("poll for the end of libvirt's save", error)),
            Ok(_) => return Ok(!fds[0].revents().is_empty()),
        }
    }
}

fn flags(settings: &ManagedSaveSettings) -> u32 {
    let state = match settings.record {
        Record::AsItWas => 0,
        Record::Running => VIR_DOMAIN_SAVE_RUNNING,
        Record::Paused => VIR_DOMAIN_SAVE_PAUSED,
    };
    state | if settings.bypass_cache { VIR_DOMAIN_SAVE_BYPASS_CACHE } else { 0 }
}
