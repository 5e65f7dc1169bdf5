//! Where the set-up script puts what the tests did not build themselves.

use std::env;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The directory filled by `scripts/setup.sh`: `VMSTATE_ASSETS`, or `target/guest-assets` of this workspace.
///
/// The script reads the same variable, so the two agree wherever the tree lies.
pub fn assets_dir() -> PathBuf {
    match env::var_os("VMSTATE_ASSETS") {
        Some(dir) if !dir.is_empty() => dir.into(),
        _ => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest-assets"),
    }
}

/// The path of an asset that must be there.
pub(crate) fn asset(name: &str) -> Result<PathBuf> {
    let path = assets_dir().join(name);
    if path.exists() { Ok(path) } else { Err(Error::Asset { path }) }
}
