//! A file system whose bad days are chosen: the n-th write, sync or rename fails, is cut short, or is the last thing
//! that its caller does. It is a real one, mounted by FUSE, so that whoever writes there, by whatever descriptor and
//! with direct I/O or without, meets what a kernel says on such a day.
//!
//! One directory of files, their bytes in unnamed files of a directory on a disk. Only what the tests need is there.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request,
    TimeOrNow, WriteFlags,
};
use rustix::process::{Pid, Signal, kill_process};

/// Nothing is remembered by the kernel: attributes change without its doing when a fault is met.
const TTL: Duration = Duration::ZERO;
/// The file system's one directory.
const ROOT: INodeNo = INodeNo(1);
/// What it says of its room, in blocks of [`BLOCK`] bytes.
const ROOM_BLOCKS: u64 = 1 << 24;
const BLOCK: u32 = 4096;

/// What can be made to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// A write to a file.
    Write,
    /// A sync of a file.
    SyncFile,
    /// A rename.
    Rename,
    /// A sync of the directory.
    SyncDirectory,
}

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is not done, with this error.
    Errno(rustix::io::Errno),
    /// From this one on each write takes half of what it is given, rounded down to 512 bytes, and at least that.
    Short,
    /// It is done, and its caller killed.
    Kill,
}

/// The day that is planned, and how far it is.
#[derive(Debug, Default)]
struct Day {
    plan: Option<(Step, u64, Fault)>,
    steps: BTreeMap<Step, u64>,
    is_met: bool,
}

/// Chooses what goes wrong, and tells what was done.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Day>>);

impl Faults {
    /// From now on step number `nth` of its kind, from 0, goes wrong like this. Counts begin anew.
    pub fn plan(&self, step: Step, nth: u64, fault: Fault) {
        *self.day() = Day { plan: Some((step, nth, fault)), ..Day::default() };
    }

    /// From now on nothing goes wrong. Counts begin anew.
    pub fn clear(&self) {
        *self.day() = Day::default();
    }

    /// How many steps of a kind were asked for since the day began.
    pub fn count(&self, step: Step) -> u64 {
        self.day().steps.get(&step).copied().unwrap_or(0)
    }

    /// Whether it has come to what was planned.
    pub fn is_met(&self) -> bool {
        self.day().is_met
    }

    fn day(&self) -> MutexGuard<'_, Day> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happens to the next step of a kind.
    fn next(&self, step: Step) -> Option<Fault> {
        let mut day = self.day();
        let count = day.steps.entry(step).or_default();
        let number = *count;
        *count += 1;
        let (_, nth, fault) = day.plan.filter(|plan| plan.0 == step)?;
        let is_now = if fault == Fault::Short { number >= nth } else { number == nth };
        day.is_met |= is_now;
        is_now.then_some(fault)
    }
}

/// The file system, mounted until it is dropped.
pub struct FaultyMount {
    /// What goes wrong there.
    pub faults: Faults,
    dir: tempfile::TempDir,
    session: Option<BackgroundSession>,
}

impl FaultyMount {
    /// Mounts it over a fresh directory; the bytes lie in `disk`.
    ///
    /// # Errors
    /// What the system said: a machine without FUSE, or a user who may not mount.
    pub fn new(disk: &Path) -> io::Result<FaultyMount> {
        let dir = tempfile::tempdir()?;
        let faults = Faults::default();
        let files = Files { disk: disk.to_owned(), faults: faults.clone(), state: Mutex::default() };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("vmstate-faulty".to_owned())];
        let session = fuser::spawn_mount(files, dir.path(), &config)?;
        Ok(FaultyMount { faults, dir, session: Some(session) })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for FaultyMount {
    fn drop(&mut self) {
        // A mount that stays is seen by whoever removes its directory.
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}

/// A file: its bytes, and what a directory says of it.
#[derive(Clone, Debug)]
struct Node {
    bytes: Arc<File>,
    perm: u16,
    owner: (u32, u32),
}

#[derive(Debug, Default)]
struct State {
    nodes: BTreeMap<u64, Node>,
    names: BTreeMap<OsString, u64>,
    last: u64,
}

struct Files {
    disk: std::path::PathBuf,
    faults: Faults,
    state: Mutex<State>,
}

impl Files {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, ino: INodeNo) -> Result<Node, Errno> {
        self.state().nodes.get(&ino.0).cloned().ok_or(Errno::ENOENT)
    }

    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let epoch = SystemTime::UNIX_EPOCH;
        let mut attr = FileAttr {
            ino,
            size: 0,
            blocks: 0,
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind: FileType::Directory,
            perm: 0o755,
            nlink: 2,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        };
        if ino == ROOT {
            return Ok(attr);
        }
        let node = self.node(ino)?;
        let found = node.bytes.metadata()?;
        (attr.kind, attr.size, attr.blocks) = (FileType::RegularFile, found.len(), found.blocks());
        (attr.perm, attr.uid, attr.gid) = (node.perm, node.owner.0, node.owner.1);
        attr.mtime = found.modified().unwrap_or(epoch);
        attr.nlink = self.state().names.values().filter(|known| **known == ino.0).count() as u32;
        Ok(attr)
    }

    fn find(&self, name: &OsStr) -> Result<INodeNo, Errno> {
        self.state().names.get(name).map(|ino| INodeNo(*ino)).ok_or(Errno::ENOENT)
    }

    /// Does a step, unless the day has it otherwise.
    fn step<T>(
        &self,
        step: Step,
        request: &Request,
        act: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match self.faults.next(step) {
            Some(Fault::Errno(errno)) => Err(Errno::from_i32(errno.raw_os_error())),
            Some(Fault::Kill) => {
                let done = act();
                // The number is that of a thread, which stands for its process.
                let caller = i32::try_from(request.pid()).ok().and_then(Pid::from_raw);
                let killed = caller.map(|caller| kill_process(caller, Signal::KILL));
                assert_eq!(killed, Some(Ok(())), "the caller of {step:?} is a process");
                done
            }
            Some(Fault::Short) | None => act(),
        }
    }
}

/// Answers with what a result has, or with its error.
macro_rules! answer {
    ($reply:expr, $result:expr, |$value:pat_param| $then:expr) => {
        match $result {
            Ok($value) => $then,
            Err(errno) => $reply.error(errno),
        }
    };
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.find(name).and_then(|ino| self.attr(ino));
        answer!(reply, found, |attr| reply.entry(&TTL, &attr, Generation(0)));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.attr(ino), |attr| reply.attr(&TTL, &attr));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = || {
            if let Some(size) = size {
                self.node(ino)?.bytes.set_len(size)?;
            }
            if let Some(node) = self.state().nodes.get_mut(&ino.0) {
                node.perm = mode.map_or(node.perm, |mode| (mode & 0o7777) as u16);
                node.owner = (uid.unwrap_or(node.owner.0), gid.unwrap_or(node.owner.1));
            }
            self.attr(ino)
        };
        answer!(reply, change(), |attr| reply.attr(&TTL, &attr));
    }

    fn create(
        &self,
        request: &Request,
        _: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let create = || {
            let bytes = Arc::new(tempfile::tempfile_in(&self.disk)?);
            let perm = (mode & !umask & 0o7777) as u16;
            let ino = {
                let mut state = self.state();
                state.last = state.last.max(ROOT.0) + 1;
                let ino = state.last;
                state.nodes.insert(ino, Node { bytes, perm, owner: (request.uid(), request.gid()) });
                state.names.insert(name.to_owned(), ino);
                INodeNo(ino)
            };
            self.attr(ino)
        };
        answer!(reply, create(), |attr| reply.created(
            &TTL,
            &attr,
            Generation(0),
            FileHandle(0),
            FopenFlags::empty()
        ));
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        answer!(reply, self.node(ino), |_| reply.opened(FileHandle(0), FopenFlags::empty()));
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut bytes = vec![0; size as usize];
        let read = || {
            let node = self.node(ino)?;
            let mut filled = 0;
            while filled < bytes.len() {
                match node.bytes.read_at(&mut bytes[filled..], offset + filled as u64)? {
                    0 => break,
                    len => filled += len,
                }
            }
            Ok(filled)
        };
        let len: Result<usize, Errno> = { read }();
        answer!(reply, len, |len| reply.data(&bytes[..len]));
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let is_short = {
            let day = self.faults.day();
            let begins = |(step, nth, fault): (Step, u64, Fault)| {
                let count = day.steps.get(&Step::Write).copied().unwrap_or(0);
                step == Step::Write && fault == Fault::Short && count >= nth
            };
            day.plan.is_some_and(begins)
        };
        let len = if is_short { (data.len() / 2 / 512 * 512).max(512).min(data.len()) } else { data.len() };
        let written = self.step(Step::Write, request, || {
            self.node(ino)?.bytes.write_all_at(&data[..len], offset)?;
            Ok(len as u32)
        });
        answer!(reply, written, |len| reply.written(len));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, request: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer!(reply, self.step(Step::SyncFile, request, || Ok(())), |()| reply.ok());
    }

    fn fsyncdir(&self, request: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer!(reply, self.step(Step::SyncDirectory, request, || Ok(())), |()| reply.ok());
    }

    fn rename(
        &self,
        request: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let renamed = self.step(Step::Rename, request, || {
            let mut state = self.state();
            if flags.contains(RenameFlags::RENAME_NOREPLACE) && state.names.contains_key(new_name) {
                return Err(Errno::EEXIST);
            }
            let ino = state.names.remove(name).ok_or(Errno::ENOENT)?;
            state.names.insert(new_name.to_owned(), ino);
            Ok(())
        });
        answer!(reply, renamed, |()| reply.ok());
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        // The node stays for whoever has it open; all goes with the mount.
        let removed = self.state().names.remove(name);
        answer!(reply, removed.ok_or(Errno::ENOENT), |_| reply.ok());
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let names: Vec<_> = self.state().names.iter().map(|(name, ino)| (*ino, name.clone())).collect();
        let dots = [".", ".."].map(|name| (ROOT, FileType::Directory, OsString::from(name)));
        let files = names.into_iter().map(|(ino, name)| (INodeNo(ino), FileType::RegularFile, name));
        for (place, (ino, kind, name)) in dots.into_iter().chain(files).enumerate().skip(offset as usize) {
            if reply.add(ino, place as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let room = ROOM_BLOCKS;
        reply.statfs(room, room, room, 1 << 20, 1 << 20, BLOCK, 255, BLOCK);
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let sought = || {
            let node = self.node(ino)?;
            let from = u64::try_from(offset).map_err(|_| Errno::EINVAL)?;
            // The only two that the kernel passes on (fs/fuse/file.c:fuse_file_llseek).
            let from = match whence {
                libc_seek::DATA => rustix::fs::SeekFrom::Data(from),
                libc_seek::HOLE => rustix::fs::SeekFrom::Hole(from),
                _ => return Err(Errno::EINVAL),
            };
            rustix::fs::seek(&node.bytes, from).map_err(|errno| Errno::from_i32(errno.raw_os_error()))
        };
        answer!(reply, sought(), |place| reply.offset(place as i64));
    }
}

/// The numbers of lseek(2), `include/uapi/linux/fs.h`.
mod libc_seek {
    pub(super) const DATA: i32 = 3;
    pub(super) const HOLE: i32 = 4;
}
