//! `vmstate bench`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lab::bench::{
    Backend, BenchSettings, ConversionsSettings, DomainBenchSettings, GrowthSettings, ModesSettings, Style,
    growth_svg, modes_svg, render, render_clones, render_conversions, render_domain, render_growth,
    render_modes, svg,
};
use lab::demo::Narrator;
use serde::Serialize;
use vmstate::libvirt::DomainName;
use vmstate::{Error, Kind};

use super::Outcome;
use crate::args::{BackendArg, Bench, BenchJobArg};
use crate::output::{line, print_json, say};
use crate::signals::cancel_on_signals;

/// How long a run may take that was not told how often to measure.
const TIME_LIMIT: Duration = Duration::from_secs(9 * 60);
/// The same for the modes of a restore.
const MODES_TIME_LIMIT: Duration = Duration::from_secs(8 * 60);
/// The same for conversions.
const CONVERSIONS_TIME_LIMIT: Duration = Duration::from_secs(6 * 60);
/// How long one size of an idle guest is measured, when there are rounds enough for an interval.
const TIME_PER_SIZE: Duration = Duration::from_secs(30);
/// Guests of the table are small enough for all of it in ten minutes.
const MEMORY_MIB: u64 = 1024;
/// Those that show how something grows, or that are converted, are not.
const LARGE_MEMORY_MIB: u64 = 4096;
/// As much as leaves devices room in the tebibyte that QEMU's processors can address without KVM: with 960 GiB the
/// firmware does not find its disk.
const RESERVED_MIB: u64 = 512 << 10;
/// What is planned for without a guest.
const PLANNED_BYTES: u64 = 1 << 40;
const ROUNDS: u16 = 9;
const REPEATS: u16 = 3;
/// As few as show that everything works.
const ROUNDS_QUICK: u16 = 3;
const REPEATS_QUICK: u16 = 1;

/// Tells how it goes on stderr: stdout is for the table.
struct Teller;

impl Narrator for Teller {
    fn tell(&self, sentence: &str) {
        say(sentence);
    }
}

/// Compares QEMU's own ways with ours.
pub fn run(args: &Bench) -> vmstate::Result<Outcome> {
    let cancel = cancel_on_signals()?;
    let directory = match &args.directory {
        Some(directory) => directory.clone(),
        None => std::env::current_dir().map_err(|error| Error::io("there is no current directory", error))?,
    };
    // Before minutes are spent on a picture that cannot be written.
    if let Some(path) = &args.plot {
        require_directory(path)?;
    }
    let style = if args.markdown { Style::Markdown } else { Style::Text };
    if let Some(sizes) = args.sizes_of_modes() {
        let rounds = args.rounds.unwrap_or(if args.quick { 1 } else { ROUNDS });
        let settings = ModesSettings {
            sizes_mib: sizes.to_vec(),
            rounds: rounds.into(),
            directory,
            time_limit: args.rounds.is_none().then_some(MODES_TIME_LIMIT),
        };
        let report = lab::bench::modes(&settings, &cancel, &Teller)?;
        if let Some(path) = &args.plot {
            write_picture(path, &modes_svg(&report))?;
        }
        return tell(args, &report, || render_modes(&report, style));
    }
    if let Some(counts) = &args.clones {
        let counts: Vec<usize> = counts.iter().map(|count| usize::from(*count)).collect();
        let memory_mib = args.memory.unwrap_or(MEMORY_MIB);
        let rows = lab::bench::clones(&counts, memory_mib, &directory, &cancel, &Teller)?;
        return tell(args, &rows, || render_clones(&rows, style));
    }
    if let Some(sizes) = &args.growth {
        let report = lab::bench::growth(&growth_settings(args, sizes, directory), &cancel, &Teller)?;
        if let Some(path) = &args.plot {
            write_picture(path, &growth_svg(&report))?;
        }
        return tell(args, &report, || render_growth(&report, style));
    }
    if args.convert {
        let rounds = args.rounds.unwrap_or(if args.quick { ROUNDS_QUICK } else { ROUNDS });
        let settings = ConversionsSettings {
            memory_mib: args.memory.unwrap_or(LARGE_MEMORY_MIB),
            rounds: rounds.into(),
            time_limit: args.rounds.is_none().then_some(CONVERSIONS_TIME_LIMIT),
            directory,
            second_directory: args.second_directory.clone(),
        };
        let rows = lab::bench::conversions(&settings, &cancel, &Teller)?;
        return tell(args, &rows, || render_conversions(&rows, style));
    }
    if let Some(name) = &args.domain {
        let settings = DomainBenchSettings {
            uri: args.connect.uri()?,
            name: DomainName(name.clone()),
            command: args.command.clone(),
            channels: args.channels,
            directory,
            rounds: args.rounds.unwrap_or(if args.quick { ROUNDS_QUICK } else { ROUNDS }).into(),
        };
        let rows = lab::bench::domain(&settings, &cancel, &Teller)?;
        return tell(args, &rows, || render_domain(&rows, style));
    }
    let report = lab::bench::bench(&settings(args, directory), &cancel, &Teller)?;
    if let Some(path) = &args.plot {
        write_picture(path, &svg(&report))?;
    }
    tell(args, &report, || render(&report, style))
}

fn growth_settings(args: &Bench, sizes: &[u64], directory: PathBuf) -> GrowthSettings {
    GrowthSettings {
        sizes_mib: sizes.to_vec(),
        reserved_mib: Some(RESERVED_MIB),
        shares_mib: args.memory.unwrap_or(LARGE_MEMORY_MIB),
        planned_bytes: PLANNED_BYTES,
        rounds: args.rounds.unwrap_or(if args.quick { ROUNDS_QUICK } else { ROUNDS }).into(),
        time_per_size: TIME_PER_SIZE,
        directory,
        program: std::env::current_exe().ok(),
    }
}

fn write_picture(path: &Path, picture: &str) -> vmstate::Result<()> {
    std::fs::write(path, picture)
        .map_err(|error| Error::io(format!("cannot write {}", path.display()), error))
}

/// Prints what was measured, as it was asked for.
fn tell(args: &Bench, report: &impl Serialize, table: impl FnOnce() -> String) -> vmstate::Result<Outcome> {
    if args.json {
        let value = serde_json::to_value(report)
            .map_err(|error| Error::new(Kind::Misuse, "the report is no JSON").because(error))?;
        print_json(&value);
    } else {
        line(table().trim_end());
    }
    Ok(Outcome::Done)
}

fn settings(args: &Bench, directory: PathBuf) -> BenchSettings {
    let (rounds, repeats) = if args.quick { (ROUNDS_QUICK, REPEATS_QUICK) } else { (ROUNDS, REPEATS) };
    let backends: Vec<Backend> = args.backend.iter().map(|backend| backend.choice()).collect();
    // Whoever says how often gets it, however long it takes.
    let is_told = args.rounds.is_some() || args.repeat.is_some();
    BenchSettings {
        memory_mib: args.memory.unwrap_or(MEMORY_MIB),
        backends: if backends.is_empty() { Backend::USUAL.to_vec() } else { backends },
        saves: args.only != Some(BenchJobArg::Restore),
        restores: args.only != Some(BenchJobArg::Save),
        directory,
        rounds: args.rounds.unwrap_or(rounds).into(),
        repeats: args.repeat.unwrap_or(repeats).into(),
        time_limit: (!is_told).then_some(TIME_LIMIT),
    }
}

fn require_directory(path: &Path) -> vmstate::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if parent.is_dir() {
        return Ok(());
    }
    Err(Error::new(Kind::Misuse, format!("{} is no directory", parent.display()))
        .hint("create it first, or give another name for the picture"))
}

impl BackendArg {
    fn choice(self) -> Backend {
        match self {
            BackendArg::Private => Backend::Private,
            BackendArg::Memfd => Backend::Memfd,
            BackendArg::File => Backend::File,
            BackendArg::Populated => Backend::Populated,
            BackendArg::Huge => Backend::Huge,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;
    use clap::error::ErrorKind;

    fn args_of(line: &str) -> Bench {
        let args = Args::parse_from(["vmstate", "bench"].into_iter().chain(line.split_whitespace()));
        let Command::Bench(args) = args.command else { panic!("not a bench") };
        args
    }

    fn settings_of(line: &str) -> BenchSettings {
        settings(&args_of(line), PathBuf::from("/images"))
    }

    #[test]
    fn the_growth_has_sizes_and_a_guest_of_its_own() {
        for (line, sizes, shares_mib, rounds) in [
            ("--growth", vec![1024, 4096, 8192, 16_384], 4096, 9),
            ("--growth 64,128 --memory 256 --quick", vec![64, 128], 256, 3),
            ("--growth 64 --rounds 5 --plot growth.svg", vec![64], 4096, 5),
        ] {
            let args = args_of(line);
            let found = growth_settings(&args, args.growth.as_ref().expect("sizes"), PathBuf::new());
            assert_eq!(
                (found.sizes_mib, found.shares_mib, found.rounds),
                (sizes, shares_mib, rounds),
                "{line}"
            );
        }
        assert_eq!(settings_of("").memory_mib, 1024);
    }

    #[test]
    fn the_modes_of_a_restore_are_asked_for_by_option_or_by_name() {
        for (line, sizes) in [
            ("", None),
            ("--restore-modes", Some([256, 1024, 4096, 8192].as_slice())),
            ("restore", Some(&[256, 1024, 4096, 8192])),
            ("--quick --json restore --plot modes.svg", Some(&[256, 1024, 4096, 8192])),
            ("restore --restore-modes 64,128", Some(&[64, 128])),
        ] {
            assert_eq!(args_of(line).sizes_of_modes(), sizes, "{line}");
        }
        for (line, kind) in [
            ("restore --growth", ErrorKind::ArgumentConflict),
            ("restore --only restore", ErrorKind::ArgumentConflict),
            ("restore --domain d", ErrorKind::ArgumentConflict),
            ("save", ErrorKind::InvalidValue),
        ] {
            let words = ["vmstate", "bench"].into_iter().chain(line.split_whitespace());
            assert_eq!(Args::try_parse_from(words).unwrap_err().kind(), kind, "{line}");
        }
    }

    #[test]
    fn a_run_has_a_limit_unless_it_is_told_how_often() {
        for (line, rounds, repeats, is_limited) in [
            ("", 9, 3, true),
            ("--quick", 3, 1, true),
            ("--rounds 21", 21, 3, false),
            ("--quick --repeat 2", 3, 2, false),
        ] {
            let found = settings_of(line);
            assert_eq!((found.rounds, found.repeats), (rounds, repeats), "{line}");
            assert_eq!(found.time_limit.is_some(), is_limited, "{line}");
        }
    }

    #[test]
    fn what_is_measured_can_be_narrowed() {
        let all = settings_of("");
        assert_eq!((all.backends, all.saves, all.restores), (Backend::USUAL.to_vec(), true, true));
        let some = settings_of("--only save --backend memfd --backend private");
        assert_eq!(
            (some.backends, some.saves, some.restores),
            (vec![Backend::Memfd, Backend::Private], true, false)
        );
        let whole = settings_of("--only restore --backend populated --backend huge");
        assert_eq!((whole.backends, whole.saves), (vec![Backend::Populated, Backend::Huge], false));
    }

    #[test]
    fn a_picture_that_cannot_be_written_is_told_before_the_run() {
        let error = require_directory(Path::new("/no/such/picture.svg")).unwrap_err();
        assert_eq!(error.to_string(), "/no/such is no directory");
        require_directory(Path::new("picture.svg")).unwrap();
    }
}
