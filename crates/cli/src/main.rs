//! The binary `vmstate`: arguments → settings → one file per command. The only place that prints.

mod args;
mod buffer;
mod commands;
mod monitor;
mod output;
mod picture;
mod progress;
mod signals;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = args::Args::parse();
    signals::outlive_questions();
    let json = args.wants_json();
    match commands::run(args) {
        Ok(commands::Outcome::Done) => ExitCode::SUCCESS,
        Ok(commands::Outcome::No) => ExitCode::from(output::EXIT_NO),
        Ok(commands::Outcome::Exit(code)) => ExitCode::from(code),
        Err(error) => output::fail(&error, json),
    }
}
