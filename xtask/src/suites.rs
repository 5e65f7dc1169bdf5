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
    for suite in suites {
        let mut command = Command::new(&suite.program);
        // As cargo does it: a test may look for its files from its package.
        command.current_dir(&suite.package_dir).env("CARGO_MANIFEST_DIR", &suite.package_dir);
        found.extend(report(&suite.name, command)?);
    }
    let mut examples = Command::new(env!("CARGO"));
    examples.args(["test", "--quiet", "--workspace", "--doc"]).current_dir(root);
    found.extend(report("examples of the documentation", examples)?);
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
fn report(name: &str, mut command: Command) -> Result<Option<String>, String> {
    let start = Instant::now();
    let output =
        command.stdin(Stdio::null()).output().map_err(|error| format!("cannot start {name}: {error}"))?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{:>8.1} s  {name}: {}", start.elapsed().as_secs_f64(), verdict(&stdout));
    if output.status.success() {
        // What a suite skipped, it says on stderr.
        print!("{stderr}");
        return Ok(None);
    }
    print!("{stdout}{stderr}");
    Ok(Some(format!("{name} failed with {}", output.status)))
}

/// How many tests passed and failed, out of all the results that a suite printed.
fn verdict(stdout: &str) -> String {
    let count = |what: &str| -> u64 {
        let results = stdout.lines().filter(|line| line.starts_with("test result:"));
        let parts = results.flat_map(|line| line.split([';', '.'])).map(str::trim);
        parts.filter_map(|part| part.strip_suffix(what)?.trim().parse::<u64>().ok()).sum()
    };
    let (passed, failed, ignored) = (count("passed"), count("failed"), count("ignored"));
    let ignored = if ignored > 0 { format!(", {ignored} ignored") } else { String::new() };
    if failed > 0 {
        format!("{failed} FAILED, {passed} passed{ignored}")
    } else {
        format!("{passed} passed{ignored}")
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
            assert_eq!(verdict(&stdout), expected);
        }
    }
}
