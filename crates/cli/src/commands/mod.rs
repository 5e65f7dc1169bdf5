//! One file per command: each turns its arguments into a job's settings and its report into words.

mod background;
mod bench;
mod check;
mod compare;
mod convert;
mod demo;
mod devices;
mod info;
mod map;
mod restore;
mod resume;
mod save;

use clap::CommandFactory;

use crate::args::{Args, Command};

/// How a command that could be carried out ended.
pub enum Outcome {
    /// Done, or the answer is yes.
    Done,
    /// The answer is no.
    No,
    /// The exit code of a program that ran in the foreground.
    Exit(u8),
}

/// Runs the command.
pub fn run(args: Args) -> vmstate::Result<Outcome> {
    match args.command {
        Command::Save(args) => save::run(args),
        Command::Restore(args) => restore::run(args),
        Command::Resume(args) => resume::run(args),
        Command::Info(args) => info::run(&args),
        Command::Convert(args) => convert::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Check(args) => check::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Devices(args) => devices::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "vmstate", &mut std::io::stdout());
            Ok(Outcome::Done)
        }
        Command::Man => {
            clap_mangen::Man::new(Args::command())
                .render(&mut std::io::stdout())
                .map_err(|error| vmstate::Error::io("cannot print the manual page", error))?;
            Ok(Outcome::Done)
        }
    }
}
