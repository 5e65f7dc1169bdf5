//! Picks the kernel modules a guest needs, in an order in which they load.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

/// A module and its content.
pub struct Module {
    /// The name of its file.
    pub file_name: String,
    /// The file.
    pub content: Vec<u8>,
}

/// The modules `wanted` that lie in `dir`, each after those it depends on. One that is not there is left out:
/// kernels differ in what they build in, and a driver that is truly missing shows when its device does nothing.
///
/// # Errors
/// [`Error::File`] when a file that is there cannot be read.
pub fn load_order(dir: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut order = Vec::new();
    let mut visited = BTreeSet::new();
    for name in wanted {
        visit(dir, name, &mut visited, &mut order)?;
    }
    Ok(order)
}

fn visit(dir: &Path, name: &str, visited: &mut BTreeSet<String>, order: &mut Vec<Module>) -> Result<()> {
    // A dependency is named with underscores; its file may have hyphens.
    if !visited.insert(name.replace('-', "_")) {
        return Ok(());
    }
    let candidates = [name.to_owned(), name.replace('_', "-")];
    let found = candidates.iter().map(|name| format!("{name}.ko")).find(|name| dir.join(name).exists());
    let Some(file_name) = found else { return Ok(()) };
    let path = dir.join(&file_name);
    let content = fs::read(&path).map_err(Error::file("read", &path))?;
    for dependency in dependencies(&content) {
        visit(dir, &dependency, visited, order)?;
    }
    order.push(Module { file_name, content });
    Ok(())
}

/// What a module says it depends on: its `.modinfo` section holds NUL-ended texts, one of them `depends=a,b`.
/// Looked for without the ELF headers: nothing else in a module begins so after a NUL.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = &module[at + KEY.len()..];
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    let names = String::from_utf8_lossy(&value[..end]);
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_once_and_after_what_it_depends_on() {
        let dir = tempfile::tempdir().unwrap();
        for (file, depends) in [
            ("net.ko", "ring,fail_over"),
            ("fail-over.ko", ""),
            ("ring.ko", "core"),
            ("core.ko", ""),
            // A circle does not occur in a kernel, and must not take our stack if it does.
            ("round.ko", "about"),
            ("about.ko", "round"),
        ] {
            fs::write(dir.path().join(file), format!("ELF\0license=GPL\0depends={depends}\0name=x\0"))
                .unwrap();
        }
        let order = load_order(dir.path(), &["core", "net", "built_in", "round"]).unwrap();
        let names: Vec<_> = order.iter().map(|module| module.file_name.as_str()).collect();
        assert_eq!(names, ["core.ko", "ring.ko", "fail-over.ko", "net.ko", "about.ko", "round.ko"]);
    }
}
