//! A file system of huge pages for a test.

#![allow(clippy::print_stdout, reason = "a test that leaves something out says what it misses")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// A hugetlbfs that is mounted for a test, and unmounted when this is dropped.
#[derive(Debug)]
pub struct HugeMount(PathBuf);

impl HugeMount {
    /// Mounts it; `None`, aloud, where that cannot be done.
    pub fn new(at: &Path) -> Option<HugeMount> {
        let output =
            Command::new("mount").args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"]).arg(at).output();
        match output {
            Ok(output) if output.status.success() => return Some(HugeMount(at.to_owned())),
            Ok(output) => println!(
                "NOT TESTED here: files on hugetlbfs: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ),
            Err(error) => println!("NOT TESTED here: files on hugetlbfs: mount: {error}"),
        }
        None
    }
}

impl Drop for HugeMount {
    fn drop(&mut self) {
        // A mount that stays is seen by whoever removes its directory.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
