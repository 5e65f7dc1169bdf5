//! Describes, starts and ends real QEMUs.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{env, fmt};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;

use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::layout::{MachineKind, RamLayout};
use crate::process::{ended_within, escaped, read_log};
use crate::serial::Serial;

/// How long a QEMU may take from its start to its greeting. Two busy cores need seconds, not minutes.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// A QEMU whose socket is not there yet is asked again this often; the end of the process is noticed at once.
const CONNECT_INTERVAL: Duration = Duration::from_millis(2);

/// One thread for all processors. With a thread for each, QEMU 10.0.13 was seen to die of an assertion of its own
/// (`iotlb_to_section`) while a guest with two processors booted on a busy machine.
const ACCELERATOR: &str = "tcg,thread=single";

/// Where the guest's RAM comes from. Every choice names the block `pc.ram`, so that images fit each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MemoryBackend {
    /// Plain `-m`: anonymous memory, private to QEMU.
    #[default]
    Plain,
    /// A `memory-backend-ram`: the same memory, by way of an object.
    Ram,
    /// A shared `memory-backend-memfd`.
    Memfd,
    /// A shared `memory-backend-file` at this path, which QEMU creates if need be.
    File(PathBuf),
    /// Any other backend: the value of `-object` without `id` and `size`, for example
    /// `memory-backend-memfd,share=off`.
    Object(String),
}

impl fmt::Display for MemoryBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemoryBackend::Plain => "plain",
            MemoryBackend::Ram => "memory-backend-ram",
            MemoryBackend::Memfd => "memory-backend-memfd",
            MemoryBackend::File(_) => "memory-backend-file",
            MemoryBackend::Object(object) => object,
        })
    }
}

/// Whether a QEMU boots its guest or waits for one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Incoming {
    /// It boots.
    #[default]
    No,
    /// `-incoming defer`: it waits to be told where the guest comes from.
    Defer,
    /// `-incoming ADDRESS`.
    Address(String),
}

/// The description of a QEMU: fill in what differs from [`QemuSpec::new`].
///
/// Always without default devices, without a display and by TCG, so that one image fits every run; a guest that
/// crashes ends its QEMU instead of booting again.
#[derive(Clone, Debug)]
pub struct QemuSpec {
    /// The program; `VMSTATE_QEMU` if that is set, or `qemu-system-x86_64`.
    pub program: PathBuf,
    /// Where the program looks for firmware, if not in its usual place (`-L`).
    pub firmware_dir: Option<PathBuf>,
    /// The board.
    pub machine: MachineKind,
    /// A versioned name for `-machine` instead of the board's newest, for example `pc-q35-7.2`.
    pub machine_version: Option<String>,
    /// The size of the RAM in bytes: a whole number of MiB.
    pub ram_bytes: u64,
    /// Where the RAM comes from.
    pub backend: MemoryBackend,
    /// The built-in guest, on a read-only disk; `None` leaves the choice of what to boot to `extra`.
    pub guest: Option<Guest>,
    /// Whether it waits for a guest.
    pub incoming: Incoming,
    /// Starts with the processors stopped (`-S`).
    pub paused: bool,
    /// Adds a second QMP socket, for tests of what another client may do.
    pub second_qmp: bool,
    /// More arguments, after all others.
    pub extra: Vec<OsString>,
}

impl QemuSpec {
    /// A QEMU with plain memory that boots the default built-in guest.
    pub fn new(machine: MachineKind, ram_bytes: u64) -> QemuSpec {
        let program = match env::var_os("VMSTATE_QEMU") {
            Some(program) if !program.is_empty() => program.into(),
            _ => "qemu-system-x86_64".into(),
        };
        QemuSpec {
            program,
            firmware_dir: None,
            machine,
            machine_version: None,
            ram_bytes,
            backend: MemoryBackend::Plain,
            guest: Some(Guest::default()),
            incoming: Incoming::No,
            paused: false,
            second_qmp: false,
            extra: Vec::new(),
        }
    }

    /// How the RAM lies in guest-physical space.
    pub fn layout(&self) -> RamLayout {
        RamLayout::new(self.machine, self.ram_bytes)
    }

    /// The arguments that make the machine, without QMP, `-incoming` and `-S`: what a user writes after `--`.
    ///
    /// The guest's disk and console are files in `dir`; the disk's is written here, so one directory serves one
    /// guest at a time. Two QEMUs may share the disk, for it is read-only, but not the console.
    ///
    /// # Errors
    /// [`Error::File`] when the guest's disk cannot be written.
    pub fn machine_args(&self, dir: &Path) -> Result<Vec<OsString>> {
        let mut args = Args::default();
        if let Some(firmware_dir) = &self.firmware_dir {
            args.pair("-L", firmware_dir);
        }
        let size = format!("{}M", self.ram_bytes >> 20);
        let mut machine = self.machine_version.clone().unwrap_or_else(|| self.machine.name().to_owned());
        let backend = match &self.backend {
            MemoryBackend::Plain => None,
            MemoryBackend::Ram => Some(OsString::from("memory-backend-ram")),
            MemoryBackend::Memfd => Some("memory-backend-memfd,share=on".into()),
            MemoryBackend::File(path) => {
                let mut object = OsString::from("memory-backend-file,share=on,mem-path=");
                object.push(escaped(path));
                Some(object)
            }
            MemoryBackend::Object(object) => Some(object.into()),
        };
        if let Some(mut object) = backend {
            object.push(format!(",id=pc.ram,size={size}"));
            args.pair("-object", object);
            machine.push_str(",memory-backend=pc.ram");
        }
        args.pair("-machine", machine).pair("-m", size);
        args.pair("-accel", ACCELERATOR).pair("-display", "none").flag("-nodefaults").flag("-no-reboot");
        args.pair("-serial", prefixed("file:", &QemuSpec::serial_path(dir)));
        if let Some(guest) = &self.guest {
            let image = dir.join(GUEST_IMAGE);
            guest.write_image(&image)?;
            let mut drive = OsString::from("if=none,id=boot,format=raw,readonly=on,file=");
            drive.push(escaped(&image));
            args.pair("-drive", drive).pair("-device", "virtio-blk-pci,drive=boot,bootindex=0");
        }
        args.0.extend(self.extra.iter().cloned());
        Ok(args.0)
    }

    /// The console of a QEMU that was given the [`QemuSpec::machine_args`] of `dir`: follow it with [`Serial::open`].
    pub fn serial_path(dir: &Path) -> PathBuf {
        dir.join(SERIAL)
    }

    /// Starts it in a temporary directory of its own and waits until it answers on its QMP socket.
    ///
    /// # Errors
    /// [`Error::Start`] when the program cannot be run, [`Error::Ended`] with QEMU's own words when it gives up,
    /// [`Error::Deadline`], [`Error::File`].
    pub fn start(&self) -> Result<Qemu> {
        let dir = tempfile::Builder::new()
            .prefix("vmstate-lab-")
            .tempdir()
            .map_err(Error::file("create a directory in", env::temp_dir()))?;
        let mut args = Args(self.machine_args(dir.path())?);
        for name in [QMP].into_iter().chain(self.second_qmp.then_some(QMP_SECOND)) {
            let mut socket = prefixed("unix:", &dir.path().join(name));
            socket.push(",server=on,wait=off");
            args.pair("-qmp", socket);
        }
        match &self.incoming {
            Incoming::No => {}
            Incoming::Defer => drop(args.pair("-incoming", "defer")),
            Incoming::Address(address) => drop(args.pair("-incoming", address)),
        }
        if self.paused {
            args.flag("-S");
        }
        // Followed before QEMU runs, so that not a line of the console is missed.
        let stderr_path = dir.path().join(STDERR);
        let serial = Serial::open(&QemuSpec::serial_path(dir.path()), &stderr_path)?;
        let stderr = File::create(&stderr_path).map_err(Error::file("create", &stderr_path))?;
        let child = Command::new(&self.program)
            .args(&args.0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|source| Error::Start { program: self.program.clone(), source })?;
        let mut qemu = Qemu::adopt(child, dir, serial, self.layout())?;
        qemu.wait_until_ready(QMP)?;
        if self.second_qmp {
            qemu.wait_until_ready(QMP_SECOND)?;
        }
        Ok(qemu)
    }
}

const QMP: &str = "qmp.sock";
const QMP_SECOND: &str = "qmp2.sock";
const SERIAL: &str = "serial.log";
const STDERR: &str = "stderr.log";
const GUEST_IMAGE: &str = "guest.img";

/// An argument list under construction.
#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, name: &str) -> &mut Args {
        self.0.push(name.into());
        self
    }

    fn pair(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Args {
        self.flag(name);
        self.0.push(value.as_ref().into());
        self
    }
}

fn prefixed(prefix: &str, path: &Path) -> OsString {
    let mut value = OsString::from(prefix);
    value.push(escaped(path));
    value
}

/// A QEMU that runs. It is killed when this is dropped, and its directory removed.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    pidfd: OwnedFd,
    dir: TempDir,
    /// The guest's console.
    pub serial: Serial,
    layout: RamLayout,
}

impl Qemu {
    fn adopt(mut child: Child, dir: TempDir, serial: Serial, layout: RamLayout) -> Result<Qemu> {
        let pid = Pid::from_child(&child);
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Qemu { child, pidfd, dir, serial, layout }),
            Err(errno) => {
                // Without a pidfd nothing would ever end this child.
                let _ = child.kill().and_then(|()| child.wait());
                Err(Error::System { action: "open a pidfd", source: errno.into() })
            }
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The directory with the sockets, the guest's disk, its console and QEMU's stderr.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The QMP socket. It serves one client at a time, and none is connected.
    pub fn qmp_path(&self) -> PathBuf {
        self.dir().join(QMP)
    }

    /// The second QMP socket, if the description asked for one.
    pub fn second_qmp_path(&self) -> PathBuf {
        self.dir().join(QMP_SECOND)
    }

    /// How the RAM lies in guest-physical space.
    pub fn layout(&self) -> RamLayout {
        self.layout
    }

    /// What QEMU has written to stderr so far.
    pub fn stderr(&self) -> String {
        read_log(&self.dir().join(STDERR))
    }

    /// Waits until the built-in guest has finished round `at_least`, and says which it has finished by then.
    ///
    /// # Errors
    /// [`Error::Deadline`], [`Error::GuestFault`], [`Error::Ended`], [`Error::File`].
    pub fn wait_for_round(&mut self, at_least: u32, deadline: Duration) -> Result<u32> {
        let waited = self.serial.wait_for_round(at_least, Some(self.pidfd.as_fd()), deadline);
        self.explain(waited)
    }

    /// Waits for a line of the console that `accept` makes something of.
    ///
    /// # Errors
    /// [`Error::Deadline`], [`Error::Ended`], [`Error::File`].
    pub fn wait_for_line<T>(
        &mut self,
        awaited: &str,
        deadline: Duration,
        accept: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let waited = self.serial.wait_for_line(awaited, Some(self.pidfd.as_fd()), deadline, accept);
        self.explain(waited)
    }

    /// Waits until QEMU has ended by itself (`quit`, a shutdown, a crash).
    ///
    /// # Errors
    /// [`Error::Deadline`] when it goes on, [`Error::System`].
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let awaited = "end of QEMU";
        if !ended_within(self.pidfd.as_fd(), deadline)? {
            let (console, stderr) = (String::new(), self.stderr());
            return Err(Error::Deadline { awaited: awaited.to_owned(), deadline, console, stderr });
        }
        self.child.wait().map_err(|source| Error::System { action: "wait for QEMU", source })
    }

    /// The exit status, if QEMU has ended.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(|source| Error::System { action: "wait for QEMU", source })
    }

    /// Kills it as nobody may complain about: SIGKILL.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child
            .kill()
            .and_then(|()| self.child.wait())
            .map_err(|source| Error::System { action: "kill QEMU", source })
    }

    /// A wait that came to nothing because QEMU has ended says so.
    fn explain<T>(&mut self, waited: Result<T>) -> Result<T> {
        match waited {
            Err(Error::Deadline { awaited, deadline, console, stderr }) => match self.try_wait()? {
                Some(status) => Err(Error::Ended { awaited, status, stderr }),
                None => Err(Error::Deadline { awaited, deadline, console, stderr }),
            },
            waited => waited,
        }
    }

    /// Connects, negotiates and leaves. The greeting alone proves nothing: it comes from the monitor's own thread,
    /// before the devices are made. An answer comes from the main loop, so by then the machine is complete. The
    /// next client finds the socket free as soon as that loop has noticed.
    fn wait_until_ready(&mut self, name: &str) -> Result<()> {
        let path = self.dir().join(name);
        let end = Instant::now() + START_DEADLINE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if !left.is_zero() && answers(&path, left).map_err(Error::file("connect to", &path))? {
                return Ok(());
            }
            let awaited = "answer on QMP".to_owned();
            if ended_within(self.pidfd.as_fd(), CONNECT_INTERVAL)? {
                let status = self.wait(CONNECT_INTERVAL)?;
                return Err(Error::Ended { awaited, status, stderr: self.stderr() });
            }
            if left.is_zero() {
                let (console, stderr) = (String::new(), self.stderr());
                return Err(Error::Deadline { awaited, deadline: START_DEADLINE, console, stderr });
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended already; all that matters is that nothing is left behind.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// Whether a QMP server greeted and answered; not if nobody listens yet, or no more.
fn answers(path: &Path, timeout: Duration) -> io::Result<bool> {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, TimedOut, WouldBlock};
    let negotiate = || -> io::Result<bool> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(timeout))?;
        let mut lines = BufReader::new(stream.try_clone()?);
        let mut line = Vec::new();
        lines.read_until(b'\n', &mut line)?;
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
        line.clear();
        lines.read_until(b'\n', &mut line)?;
        Ok(line.ends_with(b"\n"))
    };
    match negotiate() {
        Err(error)
            if matches!(
                error.kind(),
                NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | WouldBlock | TimedOut
            ) =>
        {
            Ok(false)
        }
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args_of(spec: &QemuSpec) -> String {
        let dir = tempfile::tempdir().unwrap();
        let args = spec.machine_args(dir.path()).unwrap();
        let text: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
        assert_eq!(dir.path().join(GUEST_IMAGE).exists(), spec.guest.is_some());
        text.join(" ").replace(&*dir.path().to_string_lossy(), "DIR")
    }

    #[test]
    fn every_backend_names_its_block_alike() {
        for (backend, expected) in [
            (MemoryBackend::Plain, "-machine q35 -m 64M"),
            (
                MemoryBackend::Ram,
                "-object memory-backend-ram,id=pc.ram,size=64M -machine q35,memory-backend=pc.ram -m 64M",
            ),
            (
                MemoryBackend::Memfd,
                "-object memory-backend-memfd,share=on,id=pc.ram,size=64M \
                 -machine q35,memory-backend=pc.ram -m 64M",
            ),
            (
                MemoryBackend::File("/a,b".into()),
                "-object memory-backend-file,share=on,mem-path=/a,,b,id=pc.ram,size=64M \
                 -machine q35,memory-backend=pc.ram -m 64M",
            ),
            (
                MemoryBackend::Object("memory-backend-memfd,share=off".to_owned()),
                "-object memory-backend-memfd,share=off,id=pc.ram,size=64M \
                 -machine q35,memory-backend=pc.ram -m 64M",
            ),
        ] {
            let spec = QemuSpec { backend, guest: None, ..QemuSpec::new(MachineKind::Q35, 64 << 20) };
            let rest =
                "-accel tcg,thread=single -display none -nodefaults -no-reboot -serial file:DIR/serial.log";
            assert_eq!(args_of(&spec), format!("{expected} {rest}"));
        }
    }

    #[test]
    fn the_guest_boots_from_a_read_only_disk_and_extra_comes_last() {
        let spec = QemuSpec {
            machine_version: Some("pc-i440fx-7.2".to_owned()),
            extra: vec!["-smp".into(), "2".into()],
            ..QemuSpec::new(MachineKind::Pc, 64 << 20)
        };
        assert_eq!(
            args_of(&spec),
            "-machine pc-i440fx-7.2 -m 64M -accel tcg,thread=single -display none -nodefaults -no-reboot \
             -serial file:DIR/serial.log -drive if=none,id=boot,format=raw,readonly=on,file=DIR/guest.img \
             -device virtio-blk-pci,drive=boot,bootindex=0 -smp 2"
        );
    }

    #[test]
    fn a_qemu_that_gives_up_is_quoted() {
        let spec = QemuSpec {
            extra: vec!["-device".into(), "no-such-device".into()],
            ..QemuSpec::new(MachineKind::Q35, 64 << 20)
        };
        match spec.start() {
            Err(Error::Ended { awaited, status, stderr }) => {
                assert_eq!((awaited.as_str(), status.code()), ("answer on QMP", Some(1)));
                assert!(stderr.contains("'no-such-device' is not a valid device model name"), "{stderr}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let spec = QemuSpec { program: "/no/such/qemu".into(), ..QemuSpec::new(MachineKind::Q35, 64 << 20) };
        assert_eq!(spec.start().unwrap_err().to_string(), "cannot start /no/such/qemu");
    }
}
