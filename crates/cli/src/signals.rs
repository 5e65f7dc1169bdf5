//! Signals become a cancel: the job puts everything back and ends by itself.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::iterator::Signals;
use vmstate::Cancel;

/// Keeps SIGUSR1, which asks a job how far it is, from ending a command that has nothing to tell. What is started from
/// here has it as before.
pub fn outlive_questions() {
    // Where no handler is to be had, the command goes on without one.
    let _ = signal_hook::flag::register(SIGUSR1, std::sync::Arc::default());
}

/// A cancel that the catchable signals trigger. A file that is larger than a process may make one is an error of the write then,
/// and no end of the process, which would leave the guest paused.
///
/// # Errors
/// Where the handlers cannot be installed.
pub fn cancel_on_signals() -> vmstate::Result<Cancel> {
    let cancel = Cancel::new().map_err(|error| vmstate::Error::io("cannot create an eventfd", error))?;
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM, SIGXFSZ])
        .map_err(|error| vmstate::Error::io("cannot handle signals", error))?;
    let ours = cancel.clone();
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signal != SIGXFSZ {
                ours.cancel();
            }
        }
    });
    Ok(cancel)
}
