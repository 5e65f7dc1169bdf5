//! Checks of the tree itself, as `cargo xtask NAME`; `make test` and `cargo test` run them too.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a tool for people, with nothing but a console"
)]

mod callgrind;
mod golden;
mod layers;
mod suites;
mod tidy;
mod tree;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask COMMAND
  layers                no crate depends on one that it must not know
  tidy                  sizes, names, unsafe code, ignored tests, links of the documents
  golden                golden files are those that were made, and it is written how
  golden --regenerate   make them anew with real QEMUs
  golden --seal         record the digests of those that are there
  callgrind             instructions of what is done most, compared with the table in SPECIFICATION.md
  callgrind --update    write them into that table
  test                  every test of the workspace; a line with its time for each suite";

/// What a check found: one line for each finding, none if all is well. An error says why it could not look.
type Findings = Result<Vec<String>, String>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let root = tree::root();
    let findings = match args[..] {
        ["layers"] => layers::check(&root),
        ["tidy"] => tidy::check(&root),
        ["golden"] => golden::check(&root),
        ["golden", "--regenerate"] => golden::regenerate(&root).and_then(|()| golden::check(&root)),
        ["golden", "--seal"] => golden::seal(&root).and_then(|()| golden::check(&root)),
        ["callgrind"] => callgrind::check(&root),
        ["callgrind", "--update"] => callgrind::update(&root),
        ["test"] => suites::run(&root),
        _ => Err(USAGE.to_owned()),
    };
    match findings {
        Ok(findings) if findings.is_empty() => ExitCode::SUCCESS,
        Ok(findings) => {
            findings.iter().for_each(|finding| println!("{finding}"));
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}
