//! The files of the workspace, as a check sees them.

use std::fs;
use std::path::{Path, PathBuf};

/// What is built, fetched or kept by git is not ours to judge.
const SKIPPED: [&str; 4] = ["target", ".git", "artifacts", "corpus"];

/// The root of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_owned()
}

/// All files below `dir`, sorted, so that findings come in the same order everywhere.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).map_err(failed("read", &dir))? {
            let entry = entry.map_err(failed("read", &dir))?;
            let kind = entry.file_type().map_err(failed("read", &entry.path()))?;
            if kind.is_dir() && !SKIPPED.iter().any(|skipped| entry.file_name() == *skipped) {
                pending.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The content of a file; bytes that are no text are replaced.
pub fn text(path: &Path) -> Result<String, String> {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).map_err(failed("read", path))
}

/// How findings name a file: from the root of the workspace.
pub fn name(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

/// The extension of a file, or nothing.
pub fn extension(path: &Path) -> &str {
    path.extension().and_then(|extension| extension.to_str()).unwrap_or_default()
}

/// Adapts an I/O error on `path`; for `map_err`.
pub fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> String {
    let path = path.display().to_string();
    move |error| format!("cannot {action} {path}: {error}")
}
