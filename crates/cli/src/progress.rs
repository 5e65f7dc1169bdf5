//! How far a job is, told while it runs: a bar on a terminal, objects for a program, a line on SIGUSR1.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use signal_hook::SigId;
use signal_hook::consts::SIGUSR1;
use vmstate::{Cancel, Error, Estimate, Observer, Pace, Progress, ProgressReading};

use crate::args::ProgressArg;
use crate::output::{Reporter, draw_bar, ms, print_event, say, size, speak_json, time};

/// How often a bar is drawn.
const BAR_INTERVAL: Duration = Duration::from_millis(100);
/// How often an object is printed.
const JSON_INTERVAL: Duration = Duration::from_millis(500);
/// A job that is done by then needs no bar.
const BAR_AFTER: Duration = Duration::from_millis(300);
/// The columns of a bar's own marks, at the most and at the least; on a narrower terminal it is left out.
const BAR_LEN_MAX: usize = 40;
const BAR_LEN_MIN: usize = 8;
/// The columns of a terminal that does not tell.
const COLUMNS: usize = 80;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Bar,
    Json,
    Silent,
}

/// The job's progress, once it has begun, and what is known of its pace.
#[derive(Default)]
struct Watched {
    progress: Option<Progress>,
    pace: Pace,
}

type Shared = Arc<Mutex<Watched>>;

/// How far the job is now; `None` before it has begun.
fn look(watched: &Shared) -> Option<(ProgressReading, Estimate)> {
    let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
    let reading = watched.progress.as_ref()?.read();
    let estimate = watched.pace.note(&reading);
    Some((reading, estimate))
}

/// What a job's observer is told, passed on as the user wants to have it. Dropping it ends what it says of progress.
pub struct Told {
    reporter: Reporter,
    manner: Manner,
    watched: Shared,
    end: Cancel,
    signal: SigId,
    ask: UnixStream,
    thread: Option<JoinHandle<()>>,
}

/// Where somebody hears of SIGUSR1: a socket that has something to read then, and does not block. The handler writes
/// into the other end, of which the third is another.
fn heard() -> io::Result<(UnixStream, SigId, UnixStream)> {
    let (asked, ask) = UnixStream::pair()?;
    asked.set_nonblocking(true)?;
    ask.set_nonblocking(true)?;
    let another = ask.try_clone()?;
    Ok((asked, signal_hook::low_level::pipe::register(SIGUSR1, ask)?, another))
}

/// What becomes readable at each SIGUSR1, which ends this process no more.
///
/// # Errors
/// Where a descriptor or a handler cannot be had.
pub fn asked_by_signal() -> vmstate::Result<UnixStream> {
    let (asked, ..) = heard().map_err(|error| Error::io("cannot handle signals", error))?;
    Ok(asked)
}

impl Told {
    /// Starts to listen for SIGUSR1, and to tell in the manner wanted as soon as a job begins.
    ///
    /// # Errors
    /// Where a descriptor, a handler or a thread cannot be had.
    pub fn start(reporter: Reporter, wanted: ProgressArg) -> vmstate::Result<Told> {
        Told::start_on(reporter, wanted, terminal_columns())
    }

    /// The same where stderr ends in a terminal of so many columns, or in none.
    ///
    /// # Errors
    /// As [`Told::start`].
    pub fn start_on(
        reporter: Reporter,
        wanted: ProgressArg,
        columns: Option<usize>,
    ) -> vmstate::Result<Told> {
        let cannot = |error| Error::io("cannot tell progress", error);
        let manner = manner(wanted, columns.is_some(), std::env::var("TERM").ok().as_deref());
        if manner == Manner::Json {
            speak_json();
        }
        let (asked, signal, ask) = heard().map_err(cannot)?;
        let end = Cancel::new().map_err(cannot)?;
        let watched = Shared::default();
        let teller = Teller { manner, columns, watched: watched.clone(), end: end.clone(), asked };
        let thread = std::thread::Builder::new().name("progress".into()).spawn(|| teller.run());
        let mut told = Told { reporter, manner, watched, end, signal, ask, thread: None };
        told.thread = Some(thread.map_err(cannot)?);
        Ok(told)
    }

    /// Asks as SIGUSR1 does.
    ///
    /// # Errors
    /// Where a descriptor cannot be had.
    pub fn asker(&self) -> vmstate::Result<impl Fn() + Send + 'static> {
        let ask = self.ask.try_clone().map_err(|error| Error::io("cannot tell progress", error))?;
        // One that finds no room comes after others that were not answered yet.
        Ok(move || drop({ &ask }.write(&[0])))
    }
}

impl Observer for Told {
    fn phase(&self, name: &'static str) {
        if self.manner == Manner::Json {
            // Phases are short: whoever looked now and then would miss most of them.
            if let Some((reading, estimate)) = look(&self.watched) {
                print_event(&as_json(&reading, &estimate));
            }
        } else {
            self.reporter.phase(name);
        }
    }

    fn note(&self, text: &str) {
        self.reporter.note(text);
    }

    fn warn(&self, text: &str) {
        self.reporter.warn(text);
    }

    fn progress(&self, progress: &Progress) {
        let watched = Watched { progress: Some(progress.clone()), pace: Pace::default() };
        *self.watched.lock().unwrap_or_else(PoisonError::into_inner) = watched;
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.end.cancel();
        if let Some(thread) = self.thread.take() {
            // What it panicked of has been printed.
            let _ = thread.join();
        }
        // The handler stays without anything to do: a late SIGUSR1 must not end the program.
        signal_hook::low_level::unregister(self.signal);
    }
}

/// In which manner to tell on this stderr.
fn manner(wanted: ProgressArg, is_terminal: bool, term: Option<&str>) -> Manner {
    match wanted {
        ProgressArg::Json => Manner::Json,
        ProgressArg::None => Manner::Silent,
        // A dumb terminal cannot take back what it shows.
        ProgressArg::Auto | ProgressArg::Bar if is_terminal && term != Some("dumb") => Manner::Bar,
        ProgressArg::Auto | ProgressArg::Bar => Manner::Silent,
    }
}

/// The thread that tells.
struct Teller {
    manner: Manner,
    /// Those of the terminal at the time of the start; what stderr tells is newer.
    columns: Option<usize>,
    watched: Shared,
    end: Cancel,
    /// Readable when somebody has sent SIGUSR1.
    asked: UnixStream,
}

impl Teller {
    fn run(mut self) {
        loop {
            let is_asked = self.wait();
            // Whoever asked before the end is answered.
            if self.end.is_cancelled() && !is_asked {
                break;
            }
            let Some((reading, estimate)) = look(&self.watched) else { continue };
            match self.manner {
                Manner::Json => print_event(&as_json(&reading, &estimate)),
                Manner::Bar | Manner::Silent if is_asked => say(as_line(&reading, &estimate)),
                Manner::Bar if reading.elapsed >= BAR_AFTER => {
                    let columns = terminal_columns().or(self.columns).unwrap_or(COLUMNS);
                    draw_bar(&as_bar(&reading, &estimate, columns));
                }
                Manner::Bar | Manner::Silent => {}
            }
        }
        if self.manner == Manner::Bar {
            draw_bar("");
        }
    }

    /// Waits for the next time to tell, or to be asked; whether it was that.
    fn wait(&mut self) -> bool {
        let interval = match self.manner {
            Manner::Bar => Some(BAR_INTERVAL),
            Manner::Json => Some(JSON_INTERVAL),
            Manner::Silent => None,
        };
        let timeout =
            interval.map(|interval| Timespec { tv_sec: 0, tv_nsec: interval.subsec_nanos().into() });
        let mut fds = [
            PollFd::new(&self.end, PollFlags::IN),
            PollFd::from_borrowed_fd(self.asked.as_fd(), PollFlags::IN),
        ];
        // A signal that interrupts the wait is one that is told through the descriptor.
        let _ = poll(&mut fds, timeout.as_ref());
        let mut asked = [0; 64];
        self.asked.read(&mut asked).is_ok_and(|len| len > 0)
    }
}

/// The columns of stderr; `None` where that is no terminal.
pub fn terminal_columns() -> Option<usize> {
    if !std::io::stderr().is_terminal() {
        return None;
    }
    match rustix::termios::tcgetwinsize(std::io::stderr()) {
        Ok(size) if size.ws_col > 0 => Some(size.ws_col.into()),
        _ => Some(COLUMNS),
    }
}

/// The part that is done, from 0 to 1; `None` where the whole is not known.
fn part(reading: &ProgressReading) -> Option<f64> {
    let total = reading.total_bytes?;
    Some(if total == 0 { 1.0 } else { reading.done_bytes as f64 / total as f64 })
}

/// What is done of what, in words.
fn amount(reading: &ProgressReading) -> String {
    match (reading.total_bytes, part(reading)) {
        (Some(total), Some(part)) => {
            format!("{} of {} ({:.0} %)", size(reading.done_bytes), size(total), (part * 100.0).floor())
        }
        _ => String::new(),
    }
}

fn rate_and_left(estimate: &Estimate) -> String {
    let mut words = String::new();
    if estimate.rate_bytes_per_s > 0 {
        words = format!("{}/s", size(estimate.rate_bytes_per_s));
    }
    if let Some(left) = estimate.left.filter(|left| !left.is_zero()) {
        words = format!("{words}, {} left", time(left));
    }
    words
}

/// One line for whoever asks.
fn as_line(reading: &ProgressReading, estimate: &Estimate) -> String {
    let so_far = format!("{} so far", time(reading.elapsed));
    let parts = [amount(reading), rate_and_left(estimate), so_far];
    let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    format!("{}: {}", reading.phase, parts.join(", "))
}

/// The bar for a terminal of so many columns.
fn as_bar(reading: &ProgressReading, estimate: &Estimate, columns: usize) -> String {
    let words = rate_and_left(estimate);
    let (before, after) = match part(reading) {
        Some(_) => (format!("{:<8} ", reading.phase), format!(" {}  {words}", amount(reading))),
        None => (format!("{:<8} ", reading.phase), time(reading.elapsed)),
    };
    // The last column is left free: a terminal may go on to the next line when it is written.
    let room = columns.saturating_sub(before.chars().count() + after.chars().count() + 3);
    let bar = match part(reading) {
        Some(part) if room >= BAR_LEN_MIN => {
            let len = room.min(BAR_LEN_MAX);
            let full = ((len as f64 * part) as usize).min(len);
            format!("▕{}{}▏", "█".repeat(full), " ".repeat(len - full))
        }
        _ => String::new(),
    };
    let whole = format!("{before}{bar}{after}");
    whole.trim_end().chars().take(columns.saturating_sub(1)).collect()
}

fn as_json(reading: &ProgressReading, estimate: &Estimate) -> Value {
    json!({
        "event": "progress",
        "phase": reading.phase,
        "elapsed_ms": ms(reading.elapsed),
        "done_bytes": reading.done_bytes,
        "total_bytes": reading.total_bytes,
        "moved_bytes": reading.moved_bytes,
        "rate_bytes_per_s": estimate.rate_bytes_per_s,
        "left_ms": estimate.left.map(ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn halfway() -> (ProgressReading, Estimate) {
        let reading = ProgressReading {
            phase: "ram",
            elapsed: Duration::from_millis(1500),
            moving: Some(Duration::from_millis(1400)),
            done_bytes: 2 * GIB,
            total_bytes: Some(4 * GIB),
            moved_bytes: GIB,
        };
        let estimate = Estimate { rate_bytes_per_s: GIB, left: Some(Duration::from_millis(2250)) };
        (reading, estimate)
    }

    #[test]
    fn a_bar_is_for_terminals_that_can_take_it_back() {
        use ProgressArg::{Auto, Bar, Json, None as Nothing};
        for (wanted, is_terminal, term, expected) in [
            (Auto, true, Some("xterm"), Manner::Bar),
            (Auto, true, Option::None, Manner::Bar),
            (Auto, true, Some("dumb"), Manner::Silent),
            (Auto, false, Some("xterm"), Manner::Silent),
            (Bar, true, Some("xterm"), Manner::Bar),
            (Bar, false, Some("xterm"), Manner::Silent),
            (Json, true, Some("xterm"), Manner::Json),
            (Json, false, Option::None, Manner::Json),
            (Nothing, true, Some("xterm"), Manner::Silent),
        ] {
            assert_eq!(manner(wanted, is_terminal, term), expected, "{wanted:?} {is_terminal} {term:?}");
        }
    }

    #[test]
    fn a_bar_fits_its_terminal() {
        let (reading, estimate) = halfway();
        let before = ProgressReading { phase: "probe", moving: None, total_bytes: None, ..reading };
        for (reading, estimate, columns, expected) in [
            (
                &reading,
                &estimate,
                100,
                "ram      ▕████████████████████                    ▏ 2 GiB of 4 GiB (50 %)  1 GiB/s, 2.25 s left",
            ),
            (
                &reading,
                &estimate,
                72,
                "ram      ▕████████        ▏ 2 GiB of 4 GiB (50 %)  1 GiB/s, 2.25 s left",
            ),
            (&reading, &estimate, 60, "ram       2 GiB of 4 GiB (50 %)  1 GiB/s, 2.25 s left"),
            (&reading, &estimate, 20, "ram       2 GiB of "),
            (&reading, &estimate, 0, ""),
            (&before, &Estimate::default(), 80, "probe    1.50 s"),
        ] {
            let bar = as_bar(reading, estimate, columns);
            assert_eq!(bar, expected, "{columns}");
            assert!(bar.chars().count() <= columns, "{columns}");
        }
    }

    #[test]
    fn a_line_says_what_is_known() {
        let (reading, estimate) = halfway();
        let done = ProgressReading { done_bytes: 4 * GIB, phase: "publish", ..reading };
        let over = Estimate { rate_bytes_per_s: 0, left: Some(Duration::ZERO) };
        let before = ProgressReading { phase: "probe", moving: None, total_bytes: None, ..reading };
        let empty = ProgressReading { done_bytes: 0, total_bytes: Some(0), ..reading };
        for (reading, estimate, expected) in [
            (&reading, &estimate, "ram: 2 GiB of 4 GiB (50 %), 1 GiB/s, 2.25 s left, 1.50 s so far"),
            (&done, &over, "publish: 4 GiB of 4 GiB (100 %), 1.50 s so far"),
            (&before, &Estimate::default(), "probe: 1.50 s so far"),
            (&empty, &over, "ram: 0 B of 0 B (100 %), 1.50 s so far"),
        ] {
            assert_eq!(as_line(reading, estimate), expected);
        }
    }

    #[test]
    fn an_object_has_the_keys_that_the_guide_shows() {
        let (reading, estimate) = halfway();
        let expected = json!({
            "event": "progress", "phase": "ram", "elapsed_ms": 1500.0, "done_bytes": 2 * GIB,
            "total_bytes": 4 * GIB, "moved_bytes": GIB, "rate_bytes_per_s": GIB, "left_ms": 2250.0,
        });
        assert_eq!(as_json(&reading, &estimate), expected);
        let unknown = ProgressReading { total_bytes: None, ..reading };
        assert_eq!(as_json(&unknown, &Estimate::default())["total_bytes"], Value::Null);
        assert_eq!(as_json(&unknown, &Estimate::default())["left_ms"], Value::Null);
    }
}
