//! Whether a target can take a guest on demand, before anything of it is touched.

use std::path::{Path, PathBuf};

use rustix::fs::statfs;
use wire::postcopy::RequestedBlock;

use super::ledger::{Account, Ledger};
use crate::qemu::{HostBlock, Session};
use crate::source::MappedRamFile;
use crate::{Error, Kind, Result};

/// What the image and the target have together.
pub(super) struct Fit {
    pub ledger: Ledger,
    pub blocks: Vec<RequestedBlock>,
    /// The page sizes of all blocks of the target, combined by or.
    pub page_size_summary: u64,
    pub target_page: u64,
}

/// What the target's own page is: QEMU tells the page size of every block but not its host's.
fn real_page() -> u64 {
    rustix::param::page_size() as u64
}

/// Brings the blocks of the image and of the target together.
///
/// # Errors
/// [`Kind::Unsupported`] for an image without its RAM and for memory that QEMU would take away from others;
/// [`Kind::Incompatible`] where a block has no whole pages on the target.
pub(super) fn fit(
    image: &MappedRamFile,
    session: &mut Session,
    targets: &[HostBlock],
    pid: Option<u32>,
) -> Result<Fit> {
    let layout = image.layout();
    if let Some(ignored) = layout.blocks.iter().find(|block| block.is_ignored()) {
        let clause = format!("the image leaves `{}` out (x-ignore-shared)", ignored.name);
        return Err(Error::new(Kind::Unsupported, clause).hint("restore with --mode eager --via qemu"));
    }
    let mut summary = 0;
    let (mut accounts, mut blocks) = (Vec::new(), Vec::new());
    for block in &layout.blocks {
        let name = block.name.as_str();
        let Some(target) = targets.iter().find(|target| target.name == name) else {
            return Err(Error::new(Kind::Incompatible, format!("target has no RAM block `{name}`")));
        };
        let (host_page, target_page) = (target.page_size, block.page_size.bytes());
        if !host_page.is_power_of_two()
            || host_page < target_page
            || !block.used_length.is_multiple_of(host_page)
        {
            let clause = format!(
                "`{name}` of {:#x} bytes is no number of the target's pages of {host_page:#x}",
                block.used_length
            );
            return Err(Error::new(Kind::Incompatible, clause)
                .hint("give the target memory of pages that its size is a multiple of"));
        }
        accounts.push(Account::new(block.used_length, host_page, target_page, image.pages(block)?));
        blocks.push(RequestedBlock { name: block.name.clone(), length: block.used_length, host_page });
    }
    // QEMU counts every block that it would migrate, and has no other here: the lists were compared.
    for target in targets {
        if layout.blocks.iter().any(|block| block.name.as_str() == target.name) {
            summary |= target.page_size;
        }
    }
    refuse_files(session, pid)?;
    let target_page = layout.blocks.first().map_or(0x1000, |block| block.page_size.bytes());
    Ok(Fit { ledger: Ledger::new(accounts), blocks, page_size_summary: summary, target_page })
}

/// Whether a block's entry in the stream tells its page size: where it is not the host's own.
pub(super) fn tells_page_size(host_page: u64, target_page: u64) -> bool {
    host_page != real_page().max(target_page)
}

/// Refuses memory whose file is somebody's. QEMU throws a target's memory away before the guest comes: in a private
/// file that punches holes into the file itself. And nobody can catch faults on a disk's file.
fn refuse_files(session: &mut Session, pid: Option<u32>) -> Result<()> {
    for name in session.client.qom_children("/objects", "memory-backend-file")? {
        let object = format!("/objects/{name}");
        let path = session.client.qom_string(&object, "mem-path")?;
        let is_shared = session.client.qom_bool(&object, "share")?;
        let seen = seen_from_here(&path, pid);
        // In a directory QEMU makes a file without a name, which is nobody's.
        let what = if is_on_disk(&seen) {
            "a file on a disk, in which no fault can be caught"
        } else if !is_shared && !seen.is_dir() {
            "a private file (share=off), into which QEMU would punch holes"
        } else {
            continue;
        };
        let clause = format!("target's memory `{name}` is {what}: {path}");
        return Err(Error::new(Kind::Unsupported, clause)
            .hint("give the target plain memory, a memory-backend-memfd, or a file on tmpfs with share=on"));
    }
    Ok(())
}

/// A path of QEMU's as it is seen from here: the two may have different roots.
fn seen_from_here(path: &str, pid: Option<u32>) -> PathBuf {
    let relative = path.trim_start_matches('/');
    pid.map(|pid| Path::new("/proc").join(pid.to_string()).join("root").join(relative))
        .filter(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from(path))
}

/// Whether a file lies on neither tmpfs nor hugetlbfs. What cannot be seen is left to QEMU, which looks itself
/// since 8.0.
fn is_on_disk(path: &Path) -> bool {
    // linux/magic.h.
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
    // The type differs between architectures, and a negative number is one that was sign-extended.
    #[allow(clippy::unnecessary_cast)]
    let magic = statfs(path).map(|found| found.f_type as u32 as u64);
    magic.is_ok_and(|magic| !matches!(magic, TMPFS_MAGIC | HUGETLBFS_MAGIC))
}
