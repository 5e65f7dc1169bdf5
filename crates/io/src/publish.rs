//! The last steps of a draft, in the order that survives a crash.

use std::ffi::OsStr;
use std::ops::ControlFlow;

use rustix::fs::{
    AtFlags, Mode, OFlags, RenameFlags, fstat, linkat, openat, renameat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use crate::draft::{Draft, DraftError, DraftStep, Replaced};

impl Draft {
    /// Makes the file visible under its final name: sync the file, rename, sync the directory.
    ///
    /// In this order a crash at any moment leaves under the final name either what was there before or the
    /// whole new file. Without `overwrite` the rename refuses a file that appeared meanwhile. Without `sync`
    /// only the rename is made.
    ///
    /// # Errors
    /// [`DraftError::Exists`] when the name was taken meanwhile; otherwise the step that failed. The final name
    /// is gone then, except that a file which was to be overwritten and *was* replaced stays replaced when only
    /// the sync of the directory failed. The temporary file goes when the draft is dropped: that takes its time
    /// on a slow disk, and whoever has something to do first does it before.
    pub fn publish(&mut self) -> Result<(), DraftError> {
        self.publish_observed(|_| ControlFlow::Continue(()))
    }

    /// Publishes, asking `observe` before each step; a break stops there as a crash would, leaving all as is.
    pub(crate) fn publish_observed(
        &mut self,
        mut observe: impl FnMut(DraftStep) -> ControlFlow<()>,
    ) -> Result<(), DraftError> {
        let steps: &[DraftStep] = match self.options.sync {
            true => &[DraftStep::SyncFile, DraftStep::Rename, DraftStep::SyncDirectory],
            false => &[DraftStep::Rename],
        };
        for &step in steps {
            if observe(step).is_break() {
                self.is_partial = false;
                return Ok(());
            }
            match step {
                DraftStep::SyncFile => self.buffered.sync_all().map_err(|source| self.fail(step, source))?,
                DraftStep::Rename => self.rename()?,
                _ => self.sync_directory()?,
            }
        }
        Ok(())
    }

    fn rename(&mut self) -> Result<(), DraftError> {
        match self.is_ours(&self.partial_name) {
            Ok(true) => {}
            Ok(false) => return Err(self.changeling(DraftStep::Rename)),
            Err(source) => return Err(self.fail(DraftStep::Rename, source.into())),
        }
        let renamed = match self.options.overwrite {
            true => self.rename_replacing(),
            false => self.rename_without_replacing(),
        };
        match renamed {
            Ok(()) => {
                self.is_partial = false;
                Ok(())
            }
            Err(Errno::EXIST) => Err(DraftError::Exists { path: self.path.clone() }),
            Err(source) => Err(self.fail(DraftStep::Rename, source.into())),
        }
    }

    /// What is replaced is kept open: the rename would wait until all of its room is back.
    fn rename_replacing(&mut self) -> Result<(), Errno> {
        // A descriptor that reads nothing needs no permission of the file. Where there is none to be had, the rename
        // takes longer and nothing else.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let replaced = openat(&self.directory, &self.name, flags, Mode::empty()).ok();
        renameat(&self.directory, &self.partial_name, &self.directory, &self.name)?;
        self.replaced = replaced.map(Replaced);
        Ok(())
    }

    fn rename_without_replacing(&self) -> Result<(), Errno> {
        let (directory, partial, name) = (&self.directory, &self.partial_name, &self.name);
        match renameat_with(directory, partial, directory, name, RenameFlags::NOREPLACE) {
            // Some network file systems do not know the flag; a second link refuses a taken name as well.
            Err(Errno::INVAL | Errno::NOSYS) => self.link_without_replacing(),
            renamed => renamed,
        }
    }

    fn link_without_replacing(&self) -> Result<(), Errno> {
        let (directory, partial, name) = (&self.directory, &self.partial_name, &self.name);
        linkat(directory, partial, directory, name, AtFlags::empty())?;
        unlinkat(directory, partial, AtFlags::empty())
    }

    fn sync_directory(&self) -> Result<(), DraftError> {
        self.directory.sync_all().map_err(|source| {
            if !self.options.overwrite {
                self.withdraw();
            }
            self.fail(DraftStep::SyncDirectory, source)
        })
    }

    /// Takes the final name back after a failure, unless it is another file's by now.
    fn withdraw(&self) {
        if self.is_ours(&self.name) == Ok(true) {
            let _ = unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }

    /// Whether `name` in the draft's directory is the file that the draft has open.
    fn is_ours(&self, name: &OsStr) -> Result<bool, Errno> {
        let ours = fstat(&self.buffered)?;
        let named = statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok((ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::draft::DraftOptions;

    /// Publishes up to the step number `survived`, then "crashes"; gives the steps that were begun.
    fn crash_after(mut draft: Draft, survived: usize) -> Vec<DraftStep> {
        let mut steps = Vec::new();
        let published = draft.publish_observed(|step| {
            steps.push(step);
            if steps.len() > survived { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        published.expect("no step fails");
        steps
    }

    #[test]
    fn a_crash_at_any_step_leaves_the_old_file_or_the_whole_new_one() {
        let order = [DraftStep::SyncFile, DraftStep::Rename, DraftStep::SyncDirectory];
        for overwrite in [false, true] {
            for survived in 0..=order.len() {
                let directory = tempfile::tempdir().expect("a temporary directory");
                let path = directory.path().join("vm.img");
                if overwrite {
                    fs::write(&path, "old").expect("a file");
                }
                let options = DraftOptions { overwrite, ..DraftOptions::default() };
                let draft = Draft::create(&path, options).expect("a draft");
                draft.buffered().write_all_at(b"new", 0).expect("three bytes");
                let partial = draft.partial_path().to_owned();

                let steps = crash_after(draft, survived);
                let begun = order.len().min(survived + 1);
                assert_eq!(
                    steps,
                    order[..begun],
                    "the file is synced before the rename, the directory after"
                );
                let expected: Option<&[u8]> = match (survived >= 2, overwrite) {
                    (true, _) => Some(b"new"),
                    (false, true) => Some(b"old"),
                    (false, false) => None,
                };
                assert_eq!(fs::read(&path).ok().as_deref(), expected, "after {survived} steps");
                assert_eq!(partial.exists(), survived < 2, "after {survived} steps");
            }
        }
    }

    #[test]
    fn what_was_replaced_is_let_go_of_when_its_holder_wants() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("vm.img");
        let options = DraftOptions { overwrite: true, ..DraftOptions::default() };
        let mut first = Draft::create(&path, options).expect("a draft");
        first.publish().expect("a free name");
        assert!(first.take_replaced().is_none(), "nothing was there");
        first.buffered().write_all_at(b"old", 0).expect("three bytes");
        let mut second = Draft::create(&path, options).expect("a draft");
        second.publish().expect("a file to replace");
        let replaced = second.take_replaced().expect("the first file");
        let held = fstat(&replaced).expect("a stat");
        assert_eq!((held.st_ino, held.st_nlink), (fstat(first.buffered()).expect("a stat").st_ino, 0));
        assert!(second.take_replaced().is_none(), "there was one");
        assert_eq!(fs::metadata(&path).expect("the second file").len(), 0);
    }

    #[test]
    fn without_sync_only_the_rename_is_made() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let options = DraftOptions { sync: false, ..DraftOptions::default() };
        let draft = Draft::create(&directory.path().join("vm.img"), options).expect("a draft");
        assert_eq!(crash_after(draft, 9), [DraftStep::Rename]);
    }

    #[test]
    fn linking_takes_the_place_of_renaming_and_refuses_a_taken_name() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("vm.img");
        let draft = Draft::create(&path, DraftOptions::default()).expect("a draft");
        fs::write(&path, "somebody else's").expect("a file");
        assert_eq!(draft.link_without_replacing(), Err(Errno::EXIST));
        assert!(draft.partial_path().exists());
        fs::remove_file(&path).expect("the file");
        assert_eq!(draft.link_without_replacing(), Ok(()));
        assert_eq!(draft.is_ours(&draft.name), Ok(true));
        assert!(!draft.partial_path().exists());
    }

    #[test]
    fn a_withdrawn_name_is_taken_back_only_from_our_own_file() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("vm.img");
        let mut draft = Draft::create(&path, DraftOptions::default()).expect("a draft");
        fs::write(&path, "somebody else's").expect("a file");
        draft.withdraw();
        assert!(path.exists());
        fs::remove_file(&path).expect("the file");
        draft.rename().expect("a free name");
        draft.withdraw();
        assert!(!path.exists());
    }
}
