//! Runs every test of the workspace and says of each suite how long it took; what passes needs no more lines.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::{Findings, tree};

/// A test program as cargo built it.
struct Suite {
    name: String,
    program: PathBuf,
    package_dir: PathBuf,
}

/// Builds and runs all suites, to the last, and finds those that failed.
pub fn run(root: &Path) -> Findings {
    let start = Instant::now();
    let suites = build(root)?;
    println!("{:>8.1} s  build", start.elapsed().as_secs_f64());
    let mut found = Vec::new();
    let mut total = Tally::default();
    for suite in suites {
        let mut command = Command::new(&suite.program);
        // As cargo does it: a test may look for its files from its package.
        command.current_dir(&suite.package_dir).env("CARGO_MANIFEST_DIR", &suite.package_dir);
        found.extend(report(&suite.name, command, &mut total)?);
    }
    let mut examples = Command::new(env!("CARGO"));
    examples.args(["test", "--quiet", "--workspace", "--doc"]).current_dir(root);
    found.extend(report("examples of the documentation", examples, &mut total)?);
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(found)
}

fn build(root: &Path) -> Result<Vec<Suite>, String> {
    let output = Command::new(env!("CARGO"))
        .args(["test", "--quiet", "--workspace", "--no-run", "--message-format=json-render-diagnostics"])
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    if !output.status.success() {
        return Err("the tests do not build".to_owned());
    }
    let mut suites = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: Value =
            serde_json::from_str(line).map_err(|error| format!("cargo's answer: {error}"))?;
        suites.extend(suite(root, &message));
    }
    suites.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(suites)
}

/// The suite that a message of cargo announces, if it does.
fn suite(root: &Path, message: &Value) -> Option<Suite> {
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let program = message["executable"].as_str()?.into();
    let source = Path::new(message["target"]["src_path"].as_str()?);
    let package_dir = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    Some(Suite { name: tree::name(root, source), program, package_dir })
}

/// Runs one suite, prints its line, and its output if it failed.
fn report(name: &str, mut command: Command, total: &mut Tally) -> Result<Option<String>, String> {
    let start = Instant::now();
    let output =
        command.stdin(Stdio::null()).output().map_err(|error| format!("cannot start {name}: {error}"))?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let tally = Tally::of(&stdout);
    println!("{:>8.1} s  {name}: {tally}", start.elapsed().as_secs_f64());
    total.passed += tally.passed;
    // A suite that ended without a result has failed as well.
    total.failed += tally.failed.max(u64::from(!output.status.success()));
    if output.status.success() {
        // What a suite skipped, it says on stderr.
        print!("{stderr}");
        return Ok(None);
    }
    print!("{stdout}{stderr}");
    Ok(Some(format!("{name} failed with {}", output.status)))
}

/// How many tests passed, failed and were left out.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Tally {
    /// The sum of all the results that a suite printed.
    fn of(stdout: &str) -> Tally {
        let count = |what: &str| -> u64 {
            let results = stdout.lines().filter(|line| line.starts_with("test result:"));
            let parts = results.flat_map(|line| line.split([';', '.'])).map(str::trim);
            parts.filter_map(|part| part.strip_suffix(what)?.trim().parse::<u64>().ok()).sum()
        };
        Tally { passed: count("passed"), failed: count("failed"), ignored: count("ignored") }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.failed > 0 {
            write!(f, "{} FAILED, ", self.failed)?;
        }
        write!(f, "{} passed", self.passed)?;
        if self.ignored > 0 {
            write!(f, ", {} ignored", self.ignored)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_adds_up_all_results() {
        let line = |passed, failed, ignored| {
            format!(
                "test result: ok. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; \
                 0 filtered out; finished in 0.31s\n"
            )
        };
        for (stdout, expected) in [
            (line(3, 0, 0) + &line(2, 0, 0), "5 passed"),
            (line(3, 1, 0), "1 FAILED, 3 passed"),
            ("running 2 tests\ntest 7 passed ... ok\n".to_owned() + &line(3, 0, 2), "3 passed, 2 ignored"),
            (String::new(), "0 passed"),
        ] {
            assert_eq!(Tally::of(&stdout).to_string(), expected);
        }
    }
}
