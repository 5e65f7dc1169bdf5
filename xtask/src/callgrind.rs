//! Counts instructions, which do not depend on the machine's mood, and compares them with those written down.
//!
//! What is counted is in examples named `counted_…`; callgrind counts within their function `measured`. The numbers
//! are those of a table in SPECIFICATION.md, which has no other copy. They depend on the compiler and on what the
//! processor has, so they are compared only when both are those of the table.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Findings, tree};

/// The crates with an example each, and its name.
const EXAMPLES: [(&str, &str); 2] = [("vmstate-wire", "counted_formats"), ("vmstate-mem", "counted_memory")];
const DOCUMENT: &str = "SPECIFICATION.md";
/// The heading that the table stands under.
const HEADING: &str = "## Instruction counts";
/// What the line begins with that says what the numbers depend on.
const CIRCUMSTANCES: &str = "Counted with ";
/// Callgrind's name for the function that it counts in, whatever it is generic over.
const MEASURED: &str = "*::measured*";
/// More than one in so many above or below what is written down is a finding. Less is a jump as well: the table is
/// old.
const JUMP_PART: u64 = 10;

/// Counts everything and finds what has jumped, what has no row, and rows of what is no more.
pub fn check(root: &Path) -> Findings {
    let document = tree::text(&root.join(DOCUMENT))?;
    let table = Table::parse(&document)?;
    let here = circumstances()?;
    let is_comparable = table.circumstances == here;
    if !is_comparable {
        println!("not compared: the table is of {}, this is {here}", table.circumstances);
    }
    let counted = count_all(root)?;
    for (name, instructions) in &counted {
        println!("{:>16}  {name}", grouped(*instructions));
    }
    Ok(if is_comparable { table.compare(&counted) } else { table.names_that_differ(&counted) })
}

/// Counts everything and writes it into the table; rows must be there already, with words for what they are.
pub fn update(root: &Path) -> Findings {
    let path = root.join(DOCUMENT);
    let document = tree::text(&path)?;
    let counted = count_all(root)?;
    let found = Table::parse(&document)?.names_that_differ(&counted);
    if found.is_empty() {
        let updated = rewritten(&document, &circumstances()?, &counted);
        fs::write(&path, updated).map_err(tree::failed("write", &path))?;
    }
    Ok(found)
}

/// What the numbers depend on beside the source.
fn circumstances() -> Result<String, String> {
    let version = output(Command::new("rustc").arg("--version"), "rustc is not there")?;
    let compiler = version.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    // Callgrind shows programs no more than AVX2 of what the processor has.
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has_avx2 = flags.split_whitespace().any(|flag| flag == "avx2");
    Ok(format!("{compiler} on {}{}", std::env::consts::ARCH, if has_avx2 { " with AVX2" } else { "" }))
}

fn count_all(root: &Path) -> Result<Vec<(String, u64)>, String> {
    output(
        Command::new("valgrind").arg("--version"),
        "valgrind is not there, and counts the instructions: `scripts/setup.sh valgrind` installs it",
    )?;
    let mut counted = Vec::new();
    for (package, example) in EXAMPLES {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--release", "--package", package, "--example", example]);
        output(build.current_dir(root), "cargo is not there")?;
        let program = root.join(target_dir()).join("release/examples").join(example);
        for name in output(&mut Command::new(&program), "the example is not there")?.lines() {
            counted.push((name.to_owned(), count(&program, name)?));
        }
    }
    Ok(counted)
}

/// Where cargo builds, from the root of the tree.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from)
}

fn count(program: &Path, name: &str) -> Result<u64, String> {
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
        .arg(format!("--toggle-collect={MEASURED}"))
        .arg(program)
        .arg(name)
        .output()
        .map_err(|error| format!("cannot start valgrind: {error}"))?;
    let stderr = String::from_utf8_lossy(&run.stderr);
    if !run.status.success() {
        return Err(format!("{name} failed under valgrind: {stderr}"));
    }
    match collected(&stderr) {
        Some(0) | None => Err(format!("{name}: callgrind counted nothing: {stderr}")),
        Some(instructions) => Ok(instructions),
    }
}

/// The sum that callgrind prints at the end.
fn collected(stderr: &str) -> Option<u64> {
    stderr.lines().find_map(|line| line.split_once("Collected :"))?.1.trim().parse().ok()
}

fn output(command: &mut Command, missing: &str) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{missing}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What is written down.
#[derive(Debug, PartialEq)]
struct Table {
    circumstances: String,
    rows: Vec<(String, u64)>,
}

impl Table {
    fn parse(document: &str) -> Result<Table, String> {
        let lines = || document.lines().skip_while(|line| *line != HEADING).skip(1);
        let section = || lines().take_while(|line| !line.starts_with("## "));
        let circumstances = section()
            .find_map(|line| line.strip_prefix(CIRCUMSTANCES)?.strip_suffix('.'))
            .ok_or_else(|| format!("{DOCUMENT}: no line under `{HEADING}` begins with `{CIRCUMSTANCES}`"))?;
        let rows = section().filter_map(row).map(|(name, count)| (name.to_owned(), count)).collect();
        Ok(Table { circumstances: circumstances.to_owned(), rows })
    }

    fn count(&self, name: &str) -> Option<u64> {
        self.rows.iter().find(|(known, _)| known == name).map(|(_, count)| *count)
    }

    fn compare(&self, counted: &[(String, u64)]) -> Vec<String> {
        let mut found = self.names_that_differ(counted);
        for (name, now) in counted {
            let Some(before) = self.count(name) else { continue };
            let change = *now as f64 / before as f64 - 1.0;
            if now.abs_diff(before) > before / JUMP_PART {
                found.push(format!(
                    "{name}: {} instructions, {:+.0} % of the {} in {DOCUMENT}; if that is meant, run \
                     `cargo xtask callgrind --update`",
                    grouped(*now),
                    change * 100.0,
                    grouped(before)
                ));
            }
        }
        found
    }

    fn names_that_differ(&self, counted: &[(String, u64)]) -> Vec<String> {
        let is_counted = |name: &str| counted.iter().any(|(known, _)| known == name);
        let new = counted.iter().filter(|(name, _)| self.count(name).is_none());
        let gone = self.rows.iter().filter(|(name, _)| !is_counted(name));
        new.map(|(name, _)| format!("{name}: no row in {DOCUMENT}"))
            .chain(gone.map(|(name, _)| format!("{name}: a row in {DOCUMENT}, and nothing is called that")))
            .collect()
    }
}

/// The name and the count of a row of the table: the first and the last cell.
fn row(line: &str) -> Option<(&str, u64)> {
    let name = line.strip_prefix("| `")?.split('`').next()?;
    let last = line.strip_suffix('|')?.rsplit('|').next()?;
    Some((name, last.replace(',', "").trim().parse().ok()?))
}

fn rewritten(document: &str, circumstances: &str, counted: &[(String, u64)]) -> String {
    let mut is_in = false;
    let mut text = String::new();
    for line in document.lines() {
        if line.starts_with("## ") {
            is_in = line == HEADING;
        }
        let count = |name: &str| counted.iter().find(|(known, _)| known == name).map(|(_, count)| *count);
        match row(line).and_then(|(name, _)| count(name)) {
            Some(count) if is_in => {
                let kept = line.trim_end_matches('|').rsplit_once('|').map_or(line, |(kept, _)| kept);
                text.push_str(&format!("{kept}| {} |", grouped(count)));
            }
            _ if is_in && line.starts_with(CIRCUMSTANCES) => {
                text.push_str(&format!("{CIRCUMSTANCES}{circumstances}."));
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

/// A number with its digits in threes.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# S\n\n| `scan` | elsewhere | 7 |\n\n## Instruction counts\n\nCounted with rustc 1.0 on x.\n\n\
        | what | of what | instructions |\n|---|---|---:|\n| `scan` | 64 MiB | 1,000 |\n| `plan` | 1 TiB | 2,000,000 |\n\n\
        ## Else\n\n| `other` | | 5 |\n";

    fn counted(scan: u64, plan: u64) -> Vec<(String, u64)> {
        vec![("scan".to_owned(), scan), ("plan".to_owned(), plan)]
    }

    #[test]
    fn a_jump_is_found_in_either_direction_and_a_step_is_not() {
        let table = Table::parse(TEXT).unwrap();
        assert_eq!(table.circumstances, "rustc 1.0 on x");
        assert_eq!(table.rows, counted(1000, 2_000_000));
        let jump = |words: &str| {
            format!("{words} in SPECIFICATION.md; if that is meant, run `cargo xtask callgrind --update`")
        };
        for (scan, plan, expected) in [
            (1000, 2_000_000, vec![]),
            (1100, 1_800_000, vec![]),
            (1101, 2_000_000, vec![jump("scan: 1,101 instructions, +10 % of the 1,000")]),
            (1000, 1_000_000, vec![jump("plan: 1,000,000 instructions, -50 % of the 2,000,000")]),
        ] {
            assert_eq!(table.compare(&counted(scan, plan)), expected, "{scan} {plan}");
        }
    }

    #[test]
    fn what_has_no_row_and_rows_of_nothing_are_found() {
        let table = Table::parse(TEXT).unwrap();
        let found = table.compare(&[("scan".to_owned(), 1000), ("new".to_owned(), 1)]);
        assert_eq!(
            found,
            [
                "new: no row in SPECIFICATION.md",
                "plan: a row in SPECIFICATION.md, and nothing is called that"
            ]
        );
        assert!(Table::parse("## Instruction counts\n").is_err(), "numbers of nobody knows what");
    }

    #[test]
    fn an_update_writes_the_numbers_and_leaves_the_rest() {
        let text = rewritten(TEXT, "rustc 2.0 on y", &counted(1234, 999));
        let expected = TEXT
            .replace("rustc 1.0 on x", "rustc 2.0 on y")
            .replace("64 MiB | 1,000 |", "64 MiB | 1,234 |")
            .replace("1 TiB | 2,000,000 |", "1 TiB | 999 |");
        assert_eq!(text, expected);
    }

    #[test]
    fn the_sum_of_callgrind_is_found_among_what_it_says() {
        let stderr = "==1== Callgrind, a call-graph generating cache profiler\n==1== Events    : Ir\n\
            ==1== Collected : 123456\n==1== \n";
        assert_eq!(collected(stderr), Some(123_456));
        assert_eq!(collected("==1== nothing"), None);
    }

    #[test]
    fn the_table_of_the_tree_can_be_read() {
        let document = tree::text(&tree::root().join(DOCUMENT)).unwrap();
        assert!(Table::parse(&document).unwrap().rows.len() >= 9);
    }
}
