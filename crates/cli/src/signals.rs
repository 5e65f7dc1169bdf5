//! Signals become a cancel: the job puts everything back and ends by itself.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use vmstate::Cancel;

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
