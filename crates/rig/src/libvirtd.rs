//! A real libvirtd with directories of its own, and domains of the built-in guest in it.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use lab::{Guest, MachineKind, RamLayout, Serial};
use vmstate::libvirt::DomainName;
use vmstate::net::QmpAddress;
use vmstate::{Cancel, SaveFormat, SaveSettings, Then, Unobserved};

use crate::{DEADLINE, verify_image};

/// Everything by root, and nothing that only a service manager could give.
const QEMU_CONF: &str = r#"user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
remember_owner = 0
"#;
const LIBVIRTD_CONF: &str = r#"auth_unix_rw = "none"
unix_sock_group = "root"
"#;

/// A libvirtd that disturbs no other: its configuration, its sockets and its state are in a directory of its own. It
/// ends with this value, and with the process that holds it, and so does every QEMU that it started.
#[derive(Debug)]
pub struct Libvirtd {
    root: PathBuf,
    /// Ends libvirtd by being closed; a process that is killed closes it, too.
    keeping: Option<ChildStdin>,
    keeper: Child,
    /// Where it says that it is ready.
    ready: UnixDatagram,
    /// Its own root directory, where it has one.
    within: Option<PathBuf>,
}

impl Libvirtd {
    /// Starts one and waits until it is ready. `keeper` is the program `libvirt-keeper` of this crate, which cargo
    /// tells its tests only.
    ///
    /// # Panics
    /// When it cannot be started. It is installed by `make setup` and needs root.
    pub fn start(keeper: &str) -> Libvirtd {
        Libvirtd::start_in(keeper, None)
    }

    /// As [`Libvirtd::start`], the libvirt and the QEMU of another system whose root directory is `within`.
    ///
    /// # Panics
    /// As [`Libvirtd::start`].
    pub fn start_within(keeper: &str, within: &Path) -> Libvirtd {
        Libvirtd::start_in(keeper, Some(within.to_owned()))
    }

    fn start_in(keeper: &str, within: Option<PathBuf>) -> Libvirtd {
        // A socket's path has room for little more than a hundred bytes.
        let root = tempfile::Builder::new().prefix("lv-").tempdir().expect("a directory").keep();
        let write = |name: &str, text: &str| {
            let path = root.join("etc").join(name);
            std::fs::create_dir_all(root.join("etc"))
                .and_then(|()| std::fs::write(&path, text))
                .expect("a file");
        };
        write("qemu.conf", QEMU_CONF);
        write("libvirtd.conf", LIBVIRTD_CONF);
        let ready = UnixDatagram::bind(root.join("notify")).expect("a socket");
        ready.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        let mut keeper = Command::new(keeper)
            .arg(&root)
            .args(&within)
            .env("NOTIFY_SOCKET", root.join("notify"))
            .env("LIBVIRT_LOG_OUTPUTS", format!("3:file:{}", root.join("libvirtd.log").display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{keeper}: {error}"));
        let libvirtd = Libvirtd { keeping: keeper.stdin.take(), keeper, root, ready, within };
        libvirtd.await_ready();
        libvirtd
    }

    fn await_ready(&self) {
        let mut word = [0; 64];
        let mut received = self.ready.recv(&mut word);
        // A wait with a time limit is not taken up again behind a signal, whatever that was about.
        while received.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::Interrupted) {
            received = self.ready.recv(&mut word);
        }
        match received {
            Ok(len) if word[..len].starts_with(b"READY=1") => {}
            other => {
                panic!("libvirtd is not ready ({other:?}); `make setup` installs it, as root: {}", self.log())
            }
        }
    }

    /// Kills it, as a crash would, starts another one in its place, and waits until that is ready.
    ///
    /// # Panics
    /// When it cannot be started again.
    pub fn restart(&self) {
        let mut keeping = self.keeping.as_ref().expect("it is kept");
        keeping.write_all(b"!").expect("its keeper listens");
        self.await_ready();
    }

    /// Has it configured otherwise: `line` is one of its `qemu.conf`. It is restarted for that.
    ///
    /// # Panics
    /// As [`Libvirtd::restart`].
    pub fn configure(&self, line: &str) {
        std::fs::write(self.root.join("etc/qemu.conf"), format!("{QEMU_CONF}{line}\n")).expect("its file");
        self.restart();
    }

    /// The address for `virsh --connect`.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.root.join("run/libvirt-sock").display())
    }

    /// A directory for what the tests need.
    pub fn dir(&self) -> &Path {
        &self.root
    }

    /// What libvirtd has said.
    pub fn log(&self) -> String {
        let read = |name| std::fs::read_to_string(self.root.join(name)).unwrap_or_default();
        read("libvirtd.out") + &read("libvirtd.log")
    }

    /// Runs virsh and gives what it prints, or else its complaint.
    ///
    /// # Errors
    /// What virsh said.
    pub fn try_virsh(&self, args: &[&dyn AsRef<OsStr>]) -> Result<String, String> {
        let mut virsh = Command::new("virsh");
        if self.within.is_some() {
            // Another system's virsh is where its libvirtd is.
            let pid = std::fs::read_to_string(self.root.join("libvirtd.pid"))
                .map_err(|error| format!("libvirtd does not run: {error}"))?;
            virsh = Command::new("nsenter");
            virsh.args(["--target", pid.trim(), "--mount", "--root", "--wdns=/", "virsh"]);
        }
        let output = virsh
            .args(["--quiet", "--connect", &self.uri()])
            .args(args.iter().map(|arg| arg.as_ref()))
            .stdin(Stdio::null())
            .output()
            .expect("virsh is installed by `make setup`");
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// As [`Libvirtd::try_virsh`].
    ///
    /// # Panics
    /// When virsh complains.
    pub fn virsh(&self, args: &[&dyn AsRef<OsStr>]) -> String {
        self.try_virsh(args).unwrap_or_else(|error| {
            let words: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
            panic!("virsh {}: {error}\n{}", words.join(" "), self.log())
        })
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        self.keeping = None;
        let _ = self.keeper.wait();
    }
}

/// A domain of the built-in guest.
#[derive(Clone, Debug)]
pub struct DomainSpec {
    /// Its name, which is unique in its libvirtd.
    pub name: String,
    /// The size of its RAM: a whole number of MiB.
    pub ram_bytes: u64,
    /// What is inside the element `memoryBacking`; empty for private memory.
    pub memory_backing: String,
    /// The type of its machine, of q35.
    pub machine: String,
    /// What boots in it.
    pub guest: Guest,
}

impl DomainSpec {
    /// A domain with private memory.
    pub fn new(name: &str, ram_bytes: u64) -> DomainSpec {
        DomainSpec {
            name: name.to_owned(),
            ram_bytes,
            memory_backing: String::new(),
            machine: "pc-q35-10.0".to_owned(),
            guest: Guest::default(),
        }
    }

    /// How its RAM lies in guest-physical space.
    pub fn layout(&self) -> RamLayout {
        RamLayout::new(MachineKind::Q35, self.ram_bytes)
    }

    /// Defines it and starts it.
    ///
    /// # Panics
    /// When libvirt refuses.
    pub fn start<'a>(&self, libvirtd: &'a Libvirtd) -> Domain<'a> {
        let dir = libvirtd.dir().join(&self.name);
        std::fs::create_dir(&dir).expect("a directory of that name");
        self.guest.write_image(&dir.join("guest.img")).expect("the guest's disk");
        let console = dir.join("console");
        let serial = Serial::open(&console, &libvirtd.dir().join("libvirtd.log")).expect("the console");
        let xml = dir.join("domain.xml");
        std::fs::write(&xml, self.xml(&dir)).expect("the domain's XML");
        libvirtd.virsh(&[&"define", &xml]);
        libvirtd.virsh(&[&"start", &self.name]);
        Domain { libvirtd, spec: self.clone(), dir, serial }
    }

    fn xml(&self, dir: &Path) -> String {
        let (name, kib, backing, machine, dir) =
            (&self.name, self.ram_bytes >> 10, &self.memory_backing, &self.machine, dir.display());
        format!(
            "<domain type='qemu'>
  <name>{name}</name>
  <memory unit='KiB'>{kib}</memory>
  <memoryBacking>{backing}</memoryBacking>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='{machine}'>hvm</type><boot dev='hd'/></os>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact' check='none'><model>qemu64</model></cpu>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{dir}/guest.img'/>
      <target dev='vda' bus='virtio'/>
      <readonly/>
    </disk>
    <serial type='file'><source path='{dir}/console' append='on'/><target port='0'/></serial>
  </devices>
</domain>
"
        )
    }
}

/// A domain that was started. It is destroyed and forgotten when this is dropped.
#[derive(Debug)]
pub struct Domain<'a> {
    libvirtd: &'a Libvirtd,
    spec: DomainSpec,
    dir: PathBuf,
    /// Its console, which goes on over saves and restores.
    pub serial: Serial,
}

impl Domain<'_> {
    /// Its description.
    pub fn spec(&self) -> &DomainSpec {
        &self.spec
    }

    /// Its directory: disk, console, and whatever a test puts there.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its state, in virsh's words.
    pub fn state(&self) -> String {
        self.libvirtd.virsh(&[&"domstate", &self.spec.name]).trim().to_owned()
    }

    /// Waits until the guest has finished so many rounds more, and says which it has finished by then.
    ///
    /// # Panics
    /// When it does not, or finds its memory to be other than it left it.
    pub fn wait_for_rounds(&mut self, more: u32) -> u32 {
        let wanted = self.serial.latest_round().expect("the console") + more;
        self.serial
            .wait_for_round(wanted, None, DEADLINE)
            .unwrap_or_else(|error| panic!("{error}\n{}", self.libvirtd.log()))
    }

    /// Has libvirt save it.
    ///
    /// # Panics
    /// When libvirt refuses.
    pub fn save(&self, image: &Path, format: &str) {
        self.libvirtd.virsh(&[&"save", &self.spec.name, &image, &"--image-format", &format]);
    }

    /// The settings with which the command line saves it.
    ///
    /// # Panics
    /// When the daemon's address is none.
    pub fn settings(&self, image: &Path) -> SaveSettings {
        let name = DomainName(self.spec.name.clone());
        let uri = self.libvirtd.uri().parse().expect("a URI");
        SaveSettings { then: Then::Quit, ..SaveSettings::new(QmpAddress::Domain { uri, name }, image) }
    }

    /// Looks at every page of it, by way of an image; it runs on.
    ///
    /// # Panics
    /// When it cannot be saved, or a page is not as the guest left it.
    pub fn verify(&self) {
        let image = self.dir.join("look");
        let look =
            SaveSettings { format: Some(SaveFormat::MappedRam), then: Then::Resume, ..self.settings(&image) };
        vmstate::save(&look, &Cancel::new().expect("an eventfd"), &Unobserved)
            .unwrap_or_else(|error| panic!("{}: {}", self.spec.name, error.chain()));
        verify_image(&self.spec.guest, &self.spec.layout(), &image);
        std::fs::remove_file(&image).expect("the image goes");
    }

    /// The process of its QEMU.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> u32 {
        let path = self.libvirtd.dir().join("run/qemu").join(format!("{}.pid", self.spec.name));
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        text.trim().parse().expect("a process id")
    }

    /// The command of its QEMU without what ties it to libvirtd: what a user who has no libvirt starts.
    ///
    /// # Panics
    /// When it does not run.
    pub fn command(&self) -> Vec<OsString> {
        let line = std::fs::read(format!("/proc/{}/cmdline", self.pid())).expect("a command line");
        let mut words: Vec<_> =
            line.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec())).collect();
        words.pop();
        let mut command = Vec::new();
        let mut words = words.into_iter().peekable();
        while let Some(word) = words.next() {
            let value = words.next_if(|next| !next.as_encoded_bytes().starts_with(b"-"));
            let text = value.as_ref().map(|value| value.to_string_lossy().into_owned()).unwrap_or_default();
            let is_libvirts = match word.to_str() {
                Some("-S" | "-mon" | "-add-fd" | "-sandbox" | "-msg") => true,
                Some("-chardev") => text.contains("charmonitor"),
                Some("-object") => text.contains("\"secret\""),
                _ => false,
            };
            if is_libvirts {
                continue;
            }
            command.push(word);
            // libvirt's place for memory files is in a mount namespace of its own, and known by this name there.
            let memory = text.split('"').find(|part| part.starts_with("/var/lib/libvirt/qemu/ram/"));
            if let Some(memory) = memory {
                command.push(text.replace(memory, &format!("{}/pc.ram", self.dir.display())).into());
                continue;
            }
            // The console was opened by libvirt, and passed.
            let console = format!("path={}/console", self.dir.display());
            let passed = text.split(',').find(|part| part.starts_with("path=/dev/fdset/"));
            command.extend(match passed {
                Some(passed) => Some(text.replace(passed, &console).into()),
                None => value,
            });
        }
        command
    }
}

impl Drop for Domain<'_> {
    fn drop(&mut self) {
        let _ = self.libvirtd.try_virsh(&[&"destroy", &self.spec.name]);
        let _ = self.libvirtd.try_virsh(&[&"undefine", &self.spec.name, &"--managed-save"]);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
