//! Keeps a libvirtd for tests: starts it with directories of its own, and ends it and every QEMU that it started when
//! its own standard input ends, whatever became of whoever held the other end.
//!
//! libvirtd lets go of the QEMUs that it starts, and looks for a while whether one that it ended is gone. An init that
//! reaps late, as those of containers do, makes that seconds; so this process adopts and reaps them itself.

use std::collections::HashSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::channel;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, wait};

/// libvirtd's directories are compiled into it, so each is covered by one of ours, in a mount namespace of its own.
const START: &str = r#"
for place in etc:/etc/libvirt run:/run/libvirt lib:/var/lib/libvirt cache:/var/cache/libvirt log:/var/log/libvirt; do
    mkdir -p "$1/${place%%:*}" "${place#*:}"
    mount --bind "$1/${place%%:*}" "${place#*:}"
done
# It looks for these mounts when it starts. Whether there are huge pages is for the tests that want them to say.
mkdir -p "$1/hugetlbfs" && mount -t hugetlbfs -o pagesize=2M none "$1/hugetlbfs" || true
PATH=$PATH:/usr/sbin exec libvirtd -p "$1/libvirtd.pid"
"#;

fn main() -> ExitCode {
    let Some(root) = std::env::args_os().nth(1).map(PathBuf::from) else { return ExitCode::from(2) };
    let within = std::env::args_os().nth(2).map(PathBuf::from);
    let outcome = keep(&root, within.as_deref());
    let _ = std::fs::remove_dir_all(&root);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn keep(root: &Path, within: Option<&Path>) -> std::io::Result<()> {
    set_child_subreaper(Some(getpid()))?;
    start(root, within)?;
    let (reaped, on_reaped) = channel();
    std::thread::spawn(move || {
        loop {
            match wait(WaitOptions::empty()) {
                Err(Errno::CHILD) => return,
                // Whoever waits for it may have gone.
                _ => drop(reaped.send(())),
            }
        }
    });
    let mut byte = [0];
    while std::io::stdin().read(&mut byte)? > 0 {
        // Killed as by a crash: its QEMUs live on, and the next one finds them.
        let pid = std::fs::read_to_string(root.join("libvirtd.pid"))?;
        let pid = pid.trim().parse().ok().and_then(Pid::from_raw).ok_or(std::io::ErrorKind::InvalidData)?;
        kill_process(pid, Signal::KILL)?;
        start(root, within)?;
    }
    // A child that ends leaves us its own. The channel closes when there are none.
    let mut killed = HashSet::new();
    loop {
        for child in children()? {
            if killed.insert(child) {
                let _ = kill_process(child, Signal::KILL);
            }
        }
        if on_reaped.recv().is_err() {
            return Ok(());
        }
    }
}

/// The same within another root directory, in which the directory of the tests has the name that it has outside: what
/// libvirt is told of and what it tells is found by both sides.
const START_WITHIN: &str = r#"
for place in proc sys dev; do mount --rbind "/$place" "$2/$place"; done
mount -t tmpfs none "$2/run"
mount -t tmpfs none "$2/tmp"
mkdir -p "$2$1" "$1/etc" "$1/run" "$1/lib" "$1/cache" "$1/log"
mount --bind "$1" "$2$1"
for place in etc:/etc/libvirt run:/run/libvirt lib:/var/lib/libvirt cache:/var/cache/libvirt log:/var/log/libvirt; do
    mkdir -p "$2${place#*:}"
    mount --bind "$1/${place%%:*}" "$2${place#*:}"
done
exec chroot "$2" /usr/sbin/libvirtd -p "$1/libvirtd.pid"
"#;

/// Starts libvirtd, within the root directory `within` where there is one.
fn start(root: &Path, within: Option<&Path>) -> std::io::Result<()> {
    let log = std::fs::File::options().create(true).append(true).open(root.join("libvirtd.out"))?;
    Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-ec"])
        .arg(if within.is_some() { START_WITHIN } else { START })
        .arg("sh")
        .arg(root)
        .args(within)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .map(drop)
}

/// The processes whose parent this one is.
fn children() -> std::io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // One that has ended meanwhile has no file.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{number}/stat")) else { continue };
        // Its own name, in parentheses, may hold anything.
        let parent =
            stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<i32>().ok());
        if parent == Some(getpid().as_raw_nonzero().get()) {
            found.extend(Pid::from_raw(number));
        }
    }
    Ok(found)
}
