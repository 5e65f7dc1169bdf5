//! A private mapping of a file: pages that the process has of its own, over a file that shows everywhere else.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::file::BackingFile;
use crate::pagemap::is_there;
use crate::peer::{Peer, PeerError};

/// How many entries of pagemap are read at once: those of the largest piece.
const ENTRIES: usize = page::WINDOW_PAGES as usize;

/// The file of a block that is mapped privately, and the page tables that lie over it.
///
/// A page that is in the page tables (or in swap) is read from the process: it is a copy that the process
/// wrote, or the file's own. Any other page is the file's, and is read from the file: reading it from the
/// process as well would map it there, and in a hole of tmpfs or hugetlbfs allocate it.
#[derive(Debug)]
pub(crate) struct PrivateFileBlock {
    file: BackingFile,
    pagemap: File,
}

impl PrivateFileBlock {
    pub(crate) fn open(peer: &Peer, file: BackingFile) -> Result<PrivateFileBlock, PeerError> {
        let pagemap = peer.open_file("pagemap").map_err(|error| peer.error("the page tables", error))?;
        Ok(PrivateFileBlock { file, pagemap })
    }

    pub(crate) fn file(&self) -> &BackingFile {
        &self.file
    }

    /// Splits `range` of the process's addresses where it passes from pages of the process to pages of the file;
    /// `true` are the former.
    ///
    /// # Errors
    /// What reading pagemap said; ESRCH when the process has ended.
    pub(crate) fn split(&self, range: Range<u64>) -> io::Result<Vec<(Range<u64>, bool)>> {
        let page = rustix::param::page_size() as u64;
        let mut parts: Vec<(Range<u64>, bool)> = Vec::new();
        let mut entries = [0u8; ENTRIES * 8];
        let mut at = range.start;
        while at < range.end {
            let first = at / page;
            let count = (range.end.div_ceil(page) - first).min(ENTRIES as u64);
            let bytes = &mut entries[..count as usize * 8];
            match self.pagemap.read_exact_at(bytes, first * 8) {
                // A process that has ended has no page tables.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Errno::SRCH.into()),
                read => read?,
            }
            for (page_index, entry) in (first..).zip(bytes.as_chunks::<8>().0) {
                let end = ((page_index + 1) * page).min(range.end);
                let is_of_process = is_there(*entry);
                match parts.last_mut() {
                    Some((last, kind)) if *kind == is_of_process => last.end = end,
                    _ => parts.push((at..end, is_of_process)),
                }
                at = end;
            }
        }
        Ok(parts)
    }
}
