//! One switch that stops everything, readable as a flag and as a descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// A switch that is thrown once and never taken back. Clones share it.
///
/// Loops that compute look at [`Cancel::is_cancelled`]; loops that wait in `poll` add [`Cancel::as_fd`] to
/// what they wait for: it becomes readable with the switch and stays so, because nobody reads it.
#[derive(Clone, Debug)]
pub struct Cancel {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    thrown: AtomicBool,
    event: OwnedFd,
}

impl Cancel {
    /// A switch that has not been thrown.
    ///
    /// # Errors
    /// When no descriptor is left for the event.
    pub fn new() -> io::Result<Cancel> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Cancel { inner: Arc::new(Inner { thrown: AtomicBool::new(false), event }) })
    }

    /// Throws the switch; doing so again has no effect.
    ///
    /// It takes no lock and allocates nothing, so a signal handler may call it.
    pub fn cancel(&self) {
        if !self.inner.thrown.swap(true, Ordering::AcqRel) {
            // The only failure of this write is a full counter, and a full counter is readable as well.
            let _ = rustix::io::write(&self.inner.event, &1u64.to_ne_bytes());
        }
    }

    /// Whether the switch has been thrown.
    pub fn is_cancelled(&self) -> bool {
        self.inner.thrown.load(Ordering::Acquire)
    }

    /// Waits for so long, or until the switch is thrown, and says whether it has been.
    pub fn wait(&self, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout);
        while !self.is_cancelled() {
            let rest = until.map(|until| until.saturating_duration_since(Instant::now()));
            if rest.is_some_and(|rest| rest.is_zero()) {
                break;
            }
            // A time that no clock reaches is waited for without one.
            let rest = rest.and_then(|rest| Timespec::try_from(rest).ok());
            // Whether it was the time, a signal or the switch is looked at again.
            let _ = poll(&mut [PollFd::new(self, PollFlags::IN)], rest.as_ref());
        }
        self.is_cancelled()
    }

    /// A descriptor that is readable from the moment the switch is thrown. Poll it; do not read it.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}

impl AsFd for Cancel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_readable(cancel: &Cancel) -> bool {
        let mut fds = [PollFd::new(cancel, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("poll of an eventfd");
        ready == 1
    }

    #[test]
    fn a_thrown_switch_shows_in_every_clone_and_stays_readable() {
        let cancel = Cancel::new().expect("eventfd");
        let clone = cancel.clone();
        assert!(!clone.is_cancelled());
        assert!(!is_readable(&clone));

        cancel.cancel();
        cancel.cancel();
        assert!(clone.is_cancelled());
        assert!(is_readable(&clone));
        assert!(is_readable(&clone), "polling does not use the event up");
    }

    #[test]
    fn a_wait_ends_with_its_time_or_with_the_switch() {
        let cancel = Cancel::new().expect("eventfd");
        assert!(!cancel.wait(Duration::ZERO));
        assert!(!cancel.wait(Duration::from_nanos(1)));
        let waiting = std::thread::spawn({
            let cancel = cancel.clone();
            // Nothing but the switch ends this wait within the life of a test.
            move || cancel.wait(Duration::MAX)
        });
        cancel.cancel();
        assert!(waiting.join().expect("no panic"));
        assert!(cancel.wait(Duration::from_secs(u64::MAX)));
    }
}
