//! Golden files are bytes that another program made once.
//!
//! Beside them lies `golden.toml`, which says of each how it was made (its tables name them by `file = "NAME"`,
//! the bytes are in `NAME.golden`). What was made, for the whole tree, is in `xtask/SHA256SUMS`, in the format of
//! coreutils.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Findings, tree};

const MANIFEST: &str = "golden.toml";
const SUMS: &str = "xtask/SHA256SUMS";
const EXTENSION: &str = "golden";
/// The script beside a manifest that makes its files anew.
const MAKER: &str = "make.py";

/// Compares the golden files of the tree with what the manifests and the digests say.
pub fn check(root: &Path) -> Findings {
    let recorded: BTreeMap<String, String> = tree::text(&root.join(SUMS))?
        .lines()
        .filter_map(|line| line.split_once("  "))
        .map(|(digest, file)| (file.to_owned(), digest.to_owned()))
        .collect();
    let mut explained = BTreeSet::new();
    for dir in directories(root)? {
        let names = explained_by(&tree::text(&dir.join(MANIFEST))?);
        explained.extend(names.into_iter().map(|name| tree::name(root, &dir.join(name))));
    }
    let present = digests(root)?;

    let mut found = Vec::new();
    for file in recorded.keys().chain(&explained).collect::<BTreeSet<_>>() {
        if !present.contains_key(file) {
            found.push(format!("{file}: missing"));
        }
    }
    for (file, digest) in &present {
        match recorded.get(file) {
            None => found.push(format!("{file}: not in {SUMS}; run `cargo xtask golden --seal`")),
            Some(recorded) if recorded != digest => {
                found.push(format!("{file}: not the bytes whose digest is in {SUMS}"));
            }
            Some(_) => {}
        }
        if !explained.contains(file) {
            found.push(format!("{file}: no {MANIFEST} says how it was made"));
        }
    }
    Ok(found)
}

/// Makes all golden files anew that a script makes, with the installed QEMU and the old one that
/// `scripts/setup-qemu72.sh` unpacks, and records their digests.
pub fn regenerate(root: &Path) -> Result<(), String> {
    let assets = std::env::var_os("VMSTATE_ASSETS").map_or(root.join("target/guest-assets"), PathBuf::from);
    let old = format!("7.2={}", assets.join("qemu72/qemu-system-x86_64").display());
    for dir in directories(root)?.into_iter().filter(|dir| dir.join(MAKER).exists()) {
        let status = Command::new("python3")
            .arg(dir.join(MAKER))
            .args(["10.0=qemu-system-x86_64", &old])
            .current_dir(root)
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => return Err(format!("{} failed with {status}", tree::name(root, &dir.join(MAKER)))),
            Err(error) => return Err(format!("cannot start python3: {error}")),
        }
    }
    seal(root)
}

/// Records the digests of the files as they are.
pub fn seal(root: &Path) -> Result<(), String> {
    let sums: String =
        digests(root)?.into_iter().map(|(file, digest)| format!("{digest}  {file}\n")).collect();
    let path = root.join(SUMS);
    fs::write(&path, sums).map_err(tree::failed("write", &path))
}

fn directories(root: &Path) -> Result<Vec<PathBuf>, String> {
    let manifests = tree::files(root)?.into_iter().filter(|path| path.ends_with(MANIFEST));
    Ok(manifests.filter_map(|path| path.parent().map(Path::to_owned)).collect())
}

/// The files that a manifest names; what else it says is for the script that makes them.
fn explained_by(manifest: &str) -> BTreeSet<String> {
    let value = |line: &str| -> Option<String> {
        let (key, value) = line.split_once('=')?;
        (key.trim() == "file").then(|| format!("{}.{EXTENSION}", value.trim().trim_matches('"')))
    };
    manifest.lines().filter_map(value).collect()
}

/// The golden files that are there and their digests.
fn digests(root: &Path) -> Result<BTreeMap<String, String>, String> {
    let files = tree::files(root)?.into_iter().filter(|path| tree::extension(path) == EXTENSION);
    files.map(|path| Ok((tree::name(root, &path), digest(&path)?))).collect()
}

/// The SHA-256 digest of a file, by the coreutils that every Debian has.
fn digest(path: &Path) -> Result<String, String> {
    let output = Command::new("sha256sum")
        .arg(path)
        .output()
        .map_err(|error| format!("cannot start sha256sum: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim_end().to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).chars().take_while(char::is_ascii_hexdigit).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_goldens_of_the_tree_are_those_that_were_made() {
        assert_eq!(check(&tree::root()), Ok(Vec::new()));
    }

    #[test]
    fn every_difference_is_found_and_sealing_settles_the_digests() {
        let root = std::env::temp_dir().join(format!("xtask-golden-{}", std::process::id()));
        for dir in ["g", "xtask"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        let write = |name: &str, text: &str| fs::write(root.join(name), text).unwrap();
        let findings = |lines: &[&str]| Ok(lines.iter().map(|line| line.to_string()).collect::<Vec<_>>());
        let digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

        write("g/golden.toml", "[[golden]]\nfile = \"good\"\nargs = [\"-m\"]\n[[golden]]\nfile = \"gone\"\n");
        write("g/good.golden", "hello");
        write("g/other.golden", "hallo");
        write("g/stray.golden", "");
        write("g/make.py", "");
        write("xtask/SHA256SUMS", &format!("{digest}  g/good.golden\n{digest}  g/other.golden\n"));
        let different = check(&root);
        seal(&root).unwrap();
        let sealed = check(&root);
        fs::remove_dir_all(&root).unwrap();

        assert_eq!(
            different,
            findings(&[
                "g/gone.golden: missing",
                "g/other.golden: not the bytes whose digest is in xtask/SHA256SUMS",
                "g/other.golden: no golden.toml says how it was made",
                "g/stray.golden: not in xtask/SHA256SUMS; run `cargo xtask golden --seal`",
                "g/stray.golden: no golden.toml says how it was made",
            ])
        );
        assert_eq!(
            sealed,
            findings(&[
                "g/gone.golden: missing",
                "g/other.golden: no golden.toml says how it was made",
                "g/stray.golden: no golden.toml says how it was made",
            ])
        );
    }
}
