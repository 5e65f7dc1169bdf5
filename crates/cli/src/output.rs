//! How things are said: errors with their hints, sizes and times as people read them.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use vmstate::{Error, Kind, Observer};

/// The answer is no: damaged, different.
pub const EXIT_NO: u8 = 1;
/// It could not be done.
const EXIT_FAILED: u8 = 2;
/// A signal ended it; nothing was published.
const EXIT_INTERRUPTED: u8 = 130;

/// Says what went wrong and turns it into an exit code: the one place that does.
pub fn fail(error: &Error, as_json: bool) -> ExitCode {
    if as_json {
        print_json(&json!({
            "error": error.chain(),
            "kind": error.kind().name(),
            "hint": error.hint_text(),
        }));
    }
    tell("error", &format!("error: {}", error.chain()), &error.chain());
    if let Some(hint) = error.hint_text() {
        tell("hint", &format!("hint: {hint}"), hint);
    }
    ExitCode::from(if error.kind() == Kind::Interrupted { EXIT_INTERRUPTED } else { EXIT_FAILED })
}

/// Whether the standard output is an image's.
static STDOUT_IS_TAKEN: AtomicBool = AtomicBool::new(false);

/// Leaves the standard output to an image: everything that would be printed there goes to stderr.
pub fn leave_stdout() {
    STDOUT_IS_TAKEN.store(true, Ordering::Relaxed);
}

/// Prints a line of data.
pub fn line(text: impl AsRef<str>) {
    use std::io::Write;
    if STDOUT_IS_TAKEN.load(Ordering::Relaxed) {
        return say(text);
    }
    // A reader that has gone (a closed pipe) has read all it wanted.
    let _ = writeln!(std::io::stdout(), "{}", text.as_ref());
}

/// Prints one JSON object.
pub fn print_json(value: &Value) {
    line(format!("{value:#}"));
}

/// Writes data that are no text.
///
/// # Errors
/// What the system said, but for a reader that has gone: it has read all it wanted.
pub fn put_bytes(bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// Data of many lines, written in large pieces.
pub struct Lines {
    text: String,
}

/// How much text is gathered before it is written.
const LINES_LEN: usize = 64 << 10;

impl Lines {
    /// None yet.
    pub fn new() -> Lines {
        Lines { text: String::new() }
    }

    /// Adds a line.
    pub fn line(&mut self, text: impl AsRef<str>) {
        self.add(text);
        self.text.push('\n');
    }

    /// Adds text that is no whole line, or more than one.
    pub fn add(&mut self, text: impl AsRef<str>) {
        self.text.push_str(text.as_ref());
        if self.text.len() >= LINES_LEN {
            self.flush();
        }
    }

    fn flush(&mut self) {
        use std::io::Write;
        // A reader that has gone (a closed pipe) has read all it wanted.
        let _ = std::io::stdout().write_all(self.text.as_bytes());
        self.text.clear();
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Says something on stderr.
pub fn say(text: impl AsRef<str>) {
    tell("message", text.as_ref(), text.as_ref());
}

/// Whether every line of stderr is to be a JSON object.
static STDERR_IS_JSON: AtomicBool = AtomicBool::new(false);

/// From now on every line of stderr is a JSON object, so that a program can follow.
pub fn speak_json() {
    STDERR_IS_JSON.store(true, Ordering::Relaxed);
}

/// Says something on stderr: `line` for people, or `text` as an object of that kind.
fn tell(event: &str, line: &str, text: &str) {
    if STDERR_IS_JSON.load(Ordering::Relaxed) {
        print_event(&json!({ "event": event, "text": text }));
    } else {
        use std::io::Write;
        clear_bar();
        // Whoever closed it does not want to know; the job goes on.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// Prints an object on one line of stderr: in one piece, since a QEMU in the foreground may write there, too.
pub fn print_event(event: &Value) {
    clear_bar();
    put(&format!("{event}\n"));
}

/// What stands in the line of stderr that the cursor is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LineState {
    Free,
    Bar,
    /// Nothing, and no bar will: stderr is no terminal any more.
    NoMoreBars,
}

static LINE: Mutex<LineState> = Mutex::new(LineState::Free);
/// Goes to the beginning of the line and empties it.
const CLEAR_LINE: &str = "\r\x1b[K";

/// Draws a bar in place of the one before. What is said next takes its place; an empty one leaves nothing.
pub fn draw_bar(bar: &str) {
    let mut state = LINE.lock().unwrap_or_else(PoisonError::into_inner);
    if *state == LineState::NoMoreBars {
        return;
    }
    if *state == LineState::Bar || !bar.is_empty() {
        put(&format!("{CLEAR_LINE}{bar}"));
    }
    *state = if bar.is_empty() { LineState::Free } else { LineState::Bar };
}

/// Takes away the bar that stands, and draws none from now on.
pub fn end_bars() {
    let mut state = LINE.lock().unwrap_or_else(PoisonError::into_inner);
    if *state == LineState::Bar {
        put(CLEAR_LINE);
    }
    *state = LineState::NoMoreBars;
}

fn clear_bar() {
    draw_bar("");
}

fn put(text: &str) {
    use std::io::Write;
    // Whoever closed it does not want to know; the job goes on.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Tells what is going on as far as the user wants to know.
pub struct Reporter {
    /// Whether phases are told too, not only what the user must know.
    pub verbose: bool,
}

impl Observer for Reporter {
    fn phase(&self, name: &'static str) {
        if self.verbose {
            tell("phase", &format!("· {name}"), name);
        }
    }

    fn note(&self, text: &str) {
        if self.verbose {
            tell("note", &format!("  {text}"), text);
        }
    }

    fn warn(&self, text: &str) {
        tell("warning", &format!("warning: {text}"), text);
    }
}

/// A length as people read it: `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A time as people read it.
pub fn time(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1000.0;
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.2} s", ms / 1000.0),
    }
}

/// A number of milliseconds for JSON, to the microsecond.
pub fn ms(duration: Duration) -> Value {
    json!((duration.as_secs_f64() * 1_000_000.0).round() / 1000.0)
}

/// A moment, given in seconds since 1970-01-01 UTC, as a date and a time of day.
pub fn utc(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    // Years are counted from March, so that the day that leap years add is the last of its year; an era
    // has 400 years. Day 0 of the count is 0000-03-01, which lies 719,468 days before 1970-01-01.
    let day = days + 719_468;
    let (era, day_of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day_of_month:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_read_as_dates() {
        // The expected texts are those of date(1).
        for (unix_s, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_795_175_840, "2026-11-20 11:57:20 UTC"),
            (4_107_542_399, "2100-02-28 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(unix_s), text);
        }
    }

    #[test]
    fn sizes_and_times_read_well() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (5 << 30, "5 GiB")]
        {
            assert_eq!(size(bytes), text);
        }
        for (us, text) in [(1500, "1.5 ms"), (15_400, "15 ms"), (2_500_000, "2.50 s")] {
            assert_eq!(time(Duration::from_micros(us)), text);
        }
    }
}
