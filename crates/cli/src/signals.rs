//! Signals become a cancel: the job puts everything back and ends by itself.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmstate::Cancel;

/// A cancel that the catchable signals trigger.
///
/// # Errors
/// Where the handlers cannot be installed.
pub fn cancel_on_signals() -> vmstate::Result<Cancel> {
    let cancel = Cancel::new().map_err(|error| vmstate::Error::io("cannot create an eventfd", error))?;
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])
        .map_err(|error| vmstate::Error::io("cannot handle signals", error))?;
    let ours = cancel.clone();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            ours.cancel();
        }
    });
    Ok(cancel)
}
