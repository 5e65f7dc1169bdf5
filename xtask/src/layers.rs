//! Who may depend on whom. Nothing points back up.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::Findings;

/// Every crate of the workspace and the crates of the workspace it may depend on, in any kind of dependency: a
/// development dependency that points up would put a second copy of a crate into the graph.
const EDGES: [(&str, &[&str]); 9] = [
    ("vmstate-page", &[]),
    ("vmstate-wire", &["vmstate-page"]),
    ("vmstate-io", &[]),
    ("vmstate-mem", &["vmstate-page", "vmstate-io"]),
    ("vmstate", &["vmstate-page", "vmstate-wire", "vmstate-mem", "vmstate-io"]),
    ("vmstate-lab", &["vmstate"]),
    ("vmstate-cli", &["vmstate", "vmstate-lab"]),
    ("vmstate-rig", &["vmstate-page", "vmstate-wire", "vmstate-mem", "vmstate-io", "vmstate", "vmstate-lab"]),
    ("xtask", &[]),
];

/// The vocabulary depends on nothing at all: every crate pays for what it does.
const WITHOUT_DEPENDENCIES: &str = "vmstate-page";

/// Asks cargo for the edges and compares them with the table.
pub fn check(root: &Path) -> Findings {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim_end()));
    }
    let metadata =
        serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata: {error}"))?;
    findings(&metadata)
}

fn findings(metadata: &Value) -> Findings {
    let array = |value: &Value, key: &str| -> Result<Vec<Value>, String> {
        value[key].as_array().cloned().ok_or(format!("cargo metadata has no list of {key}"))
    };
    let mut found = Vec::new();
    for package in array(metadata, "packages")? {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = EDGES.iter().find(|(known, _)| *known == name) else {
            found.push(format!("{name}: not in the table of layers (xtask/src/layers.rs)"));
            continue;
        };
        for dependency in array(&package, "dependencies")? {
            let target = dependency["name"].as_str().unwrap_or_default();
            let kind = dependency["kind"].as_str().map(|kind| format!(" ({kind})")).unwrap_or_default();
            // Only what lies in this workspace has a path.
            let is_ours = dependency["path"].is_string();
            if is_ours && !allowed.contains(&target) || name == WITHOUT_DEPENDENCIES {
                found.push(format!("{name} must not depend on {target}{kind}"));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_tree_keeps_its_layers() {
        assert_eq!(check(&crate::tree::root()), Ok(Vec::new()));
    }

    #[test]
    fn an_edge_that_points_up_is_found_whatever_its_kind() {
        let ours = |name: &str, kind: Value| json!({"name": name, "kind": kind, "path": "/tree/x"});
        let theirs = |name: &str| json!({"name": name, "kind": null});
        let metadata = json!({"packages": [
            {"name": "vmstate-wire", "dependencies": [ours("vmstate-page", json!(null)), theirs("serde")]},
            {"name": "vmstate-io", "dependencies": [ours("vmstate-mem", json!(null))]},
            {"name": "vmstate-lab", "dependencies": [ours("vmstate-rig", json!("dev"))]},
            {"name": "vmstate-page", "dependencies": [theirs("bitvec")]},
            {"name": "vmstate-new", "dependencies": []},
        ]});
        let expected = [
            "vmstate-io must not depend on vmstate-mem",
            "vmstate-lab must not depend on vmstate-rig (dev)",
            "vmstate-page must not depend on bitvec",
            "vmstate-new: not in the table of layers (xtask/src/layers.rs)",
        ];
        assert_eq!(findings(&metadata), Ok(expected.map(str::to_owned).to_vec()));
    }

    #[test]
    fn metadata_of_another_shape_is_no_clean_bill() {
        assert_eq!(findings(&json!({})), Err("cargo metadata has no list of packages".to_owned()));
    }
}
