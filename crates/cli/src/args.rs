//! The command line's grammar. Help, man page and completions all come from here.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use vmstate::net::QmpAddress;
use vmstate::{Owner, Rate, ReadySerial};

use crate::monitor::{ConnectArgs, DomainRestoreArgs, MonitorArgs};

/// Saves, restores and inspects the state of virtual machines, in the formats that QEMU reads and writes.
#[derive(Debug, Parser)]
#[command(name = "vmstate", version, max_term_width = 100, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 the answer is no (damaged, different), 2 could not do it, 130 interrupted.\n\
                  Data goes to stdout, everything else to stderr."
)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Save a running guest into an image that stock QEMU loads
    Save(Save),
    /// Bring a guest back from an image
    Restore(Restore),
    /// Bring back a guest that a killed save left paused, and clear what that save left in QEMU
    Resume(Resume),
    /// Show what an image holds
    Info(Inspect),
    /// Look for every structural fault of an image; exit 1 when there is one
    Check(Inspect),
    /// Show where guest memory is in an image, or what changed from one to another; as ranges or as a picture
    Map(Map),
    /// Show the device state of an image, field by field
    Devices(Devices),
    /// Make an image of another format that says the same
    Convert(Convert),
    /// Say in what two images differ, whatever their formats; exit 1 when they do
    Compare(Compare),
    /// Boot the built-in guest, save it, restore it, and compare with QEMU's own best way
    Demo(Demo),
    /// Compare QEMU's own ways of saving and restoring with ours, in real QEMUs
    Bench(Bench),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

#[derive(Debug, ClapArgs)]
pub struct Save {
    #[command(flatten)]
    pub monitor: MonitorArgs,

    /// The image to write: a new file, a block device, a FIFO, or - for the standard output
    #[arg(required_unless_present = "managed")]
    pub image: Option<PathBuf>,

    /// Save to where libvirt looks when it starts the domain the next time, instead of to IMAGE
    #[arg(long, requires = "domain", conflicts_with = "image")]
    pub managed: bool,

    /// Who carries the RAM: vmstate from outside, or QEMU's own mapped-ram into our descriptors; with --managed also
    /// libvirt, which then knows of the image at once
    #[arg(long, value_enum, default_value_t = ViaArg::Auto)]
    pub via: ViaArg,

    /// How QEMU gives the state of the devices where vmstate carries the RAM
    ///
    /// `command` is xen-save-devices-state, which leaves the guest as it is. `migration` is one of all but the RAM, for
    /// guests whose RAM is a memory-backend-file with share=on: the image gets QEMU's description of every field, and
    /// QEMU is in the state postmigrate afterwards, as with --via qemu. `auto` takes the command if there is one.
    #[arg(long, value_enum, default_value_t = DeviceStateArg::Auto)]
    pub device_state: DeviceStateArg,

    /// The image's format [default: mapped-ram; stream into a pipe, a FIFO or -; with --domain that of qemu.conf, else
    /// libvirt-sparse where libvirt and QEMU know it, else libvirt-raw]
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,

    /// The XML of the domain that an image of libvirt is to become, of a guest that is none yet (with --qmp)
    #[arg(long, value_name = "FILE", conflicts_with = "domain")]
    pub xml: Option<PathBuf>,

    /// Write into the file IMAGE, which must exist, from this offset on (0x10000, 64K, 1M, 2G)
    ///
    /// What the file has before N stays as it is; what it has behind is lost and needs --overwrite. The file is
    /// written in place, so this cannot be undone: after a save that failed there is no image, old or new. What
    /// tells an image, its first bytes, is written last, so that half of one never passes for the whole.
    #[arg(long, value_name = "N", value_parser = bytes)]
    pub offset: Option<u64>,

    /// How many channels write in parallel (1 to 255) [default: one per processor, 2 to 8; 1 where QEMU carries the RAM]
    #[arg(long, value_name = "N", aliases = ["parallel-channels", "parallel-connections"],
          value_parser = clap::value_parser!(u16).range(1..=255))]
    pub channels: Option<u16>,

    /// As many channels as serve (this is the default)
    #[arg(long, conflicts_with = "channels")]
    pub parallel: bool,

    #[command(flatten)]
    pub direct_io: DirectIoArgs,

    /// How many bytes of pages a second are moved at the most (500M, 1.5G, 100MiB, 100MB) [default: no limit]
    #[arg(long, value_name = "RATE")]
    pub max_bandwidth: Option<Rate>,

    /// What becomes of the guest after a save that succeeded [default: pause; quit with --domain]
    #[arg(long, value_enum)]
    pub then: Option<ThenArg>,

    #[command(flatten)]
    pub record: RecordArgs,

    /// Replace IMAGE if it exists; the old one stays whole until the new one is
    ///
    /// Of a block device, or of a file with --offset, what is there is overwritten in place.
    #[arg(long)]
    pub overwrite: bool,

    /// Do not wait until the image is on the disk
    #[arg(long)]
    pub no_sync: bool,

    /// The permission bits of a new file
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = octal)]
    pub mode: u32,

    /// Whom a new file is given to: names or numbers
    #[arg(long, value_name = "USER[:GROUP]")]
    pub owner: Option<Owner>,

    /// Say what would be written, how and whether it fits; the guest is not stopped, nothing is left behind
    #[arg(long)]
    pub dry_run: bool,

    /// Give up where QEMU takes longer to answer a command [default: wait]
    #[arg(long, value_name = "SECS", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: Option<u64>,

    /// QEMU's process, where vmstate should not look for it itself (containers)
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,

    #[command(flatten)]
    pub progress: ProgressArgs,

    #[command(flatten)]
    pub report: ReportArgs,
}

#[derive(Debug, ClapArgs)]
pub struct Restore {
    /// The image to read: a file or a block device
    pub image: PathBuf,

    /// Where in IMAGE it starts (0x10000, 64K, 1M, 2G)
    #[arg(long, value_name = "N", default_value = "0", value_parser = bytes)]
    pub offset: u64,

    /// When the memory comes: before the guest runs, or from the image as it is asked for
    #[arg(long, value_enum, default_value_t = ModeArg::Auto)]
    pub mode: ModeArg,

    /// Give the guest behind --qmp the rest of its memory, whose restore with --mode lazy broke off or was killed
    #[arg(long, conflicts_with_all = ["mode", "via", "running", "paused", "channels", "direct_io", "bypass_cache", "qemu",
                                      "qemu_log", "foreground", "domain"])]
    pub resume: bool,

    /// Return when the guest runs, and leave a process behind that gives it its memory and then ends (--mode lazy).
    /// What that process has to say afterwards goes to FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true,
          conflicts_with_all = ["resume", "wait", "ready_serial", "domain", "foreground"])]
    pub background: Option<Option<PathBuf>>,

    /// This is the process that --background leaves behind; stderr ends in a terminal of so many columns, or in none
    #[arg(long, value_name = "COLUMNS", num_args = 0..=1, require_equals = true, hide = true, requires = "background")]
    pub background_server: Option<Option<usize>>,

    /// With --mode map: end only when all of the image is in the page cache. The other modes wait for the memory anyway
    #[arg(long, conflicts_with_all = ["resume", "domain"])]
    pub wait: bool,

    /// Tell when the guest is ready: when its serial console says TEXT, which QEMU writes to FILE (-serial file:FILE).
    /// Only what is written after the resume counts
    #[arg(long, value_name = "FILE:TEXT", conflicts_with_all = ["resume", "domain", "paused"])]
    pub ready_serial: Option<ReadySerial>,

    /// Who carries the RAM: vmstate into shared memory, QEMU's own mapped-ram, or a stream from vmstate
    #[arg(long, value_enum, default_value_t = RestoreViaArg::Auto)]
    pub via: RestoreViaArg,

    /// Let libvirt restore the domain whose image this is
    #[arg(long, conflicts_with_all = ["qmp", "qemu", "via", "mode", "force", "qemu_log", "foreground", "offset",
                                      "max_bandwidth"])]
    pub domain: bool,

    #[command(flatten)]
    pub domain_args: DomainRestoreArgs,

    /// A QEMU that waits with -incoming defer: its QMP monitor
    #[arg(long, value_name = "ADDR", env = "VMSTATE_QMP")]
    pub qmp: Option<QmpAddress>,

    /// How many channels read in parallel (1 to 255) [default: one per processor, 2 to 8; 8 where QEMU carries the RAM]
    #[arg(long, value_name = "N", aliases = ["parallel-channels", "parallel-connections"],
          value_parser = clap::value_parser!(u16).range(1..=255))]
    pub channels: Option<u16>,

    #[command(flatten)]
    pub direct_io: DirectIoArgs,

    /// How many bytes of pages a second are moved at the most (500M, 1.5G, 100MiB, 100MB) [default: no limit]
    #[arg(long, value_name = "RATE")]
    pub max_bandwidth: Option<Rate>,

    #[command(flatten)]
    pub record: RecordArgs,

    /// Restore although devices or disks are not as they were when the guest was saved
    #[arg(long)]
    pub force: bool,

    /// Where the messages of the QEMU that is started go [default: kept, and shown if the restore fails]
    #[arg(long, value_name = "FILE")]
    pub qemu_log: Option<PathBuf>,

    /// Let the QEMU that is started keep the terminal and its signals, and wait for it
    #[arg(long)]
    pub foreground: bool,

    #[command(flatten)]
    pub progress: ProgressArgs,

    #[command(flatten)]
    pub report: ReportArgs,

    /// The QEMU to start and its arguments; vmstate adds -S, -incoming and a monitor of its own
    #[arg(last = true, value_name = "QEMU ARGS")]
    pub qemu: Vec<OsString>,
}

#[derive(Debug, ClapArgs)]
pub struct Resume {
    #[command(flatten)]
    pub monitor: MonitorArgs,

    /// Clear also what a save by a process of another host or container has left
    #[arg(long)]
    pub force: bool,

    #[command(flatten)]
    pub report: ReportArgs,
}

#[derive(Debug, ClapArgs)]
pub struct Inspect {
    /// The image to read: of any format, by vmstate, QEMU or libvirt
    pub image: PathBuf,

    /// Where in IMAGE it starts (0x10000, 64K, 1M, 2G)
    #[arg(long, value_name = "N", default_value = "0", value_parser = bytes)]
    pub offset: u64,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, ClapArgs)]
pub struct Map {
    /// The image to read: of any format, by vmstate, QEMU or libvirt
    pub image: PathBuf,

    /// A later image of the same guest: tell what changed
    #[arg(value_name = "LATER")]
    pub other: Option<PathBuf>,

    /// Draw a picture instead of listing ranges; - is the standard output
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,

    /// Draw a picture instead of listing ranges; - is the standard output
    #[arg(long, value_name = "FILE")]
    pub png: Option<PathBuf>,

    /// How memory runs through the picture
    #[arg(long, value_enum, default_value_t = LayoutArg::Hilbert)]
    pub layout: LayoutArg,

    /// What the picture is drawn on; auto is what the reader of an SVG prefers, and light in a PNG
    #[arg(long, value_enum, default_value_t = ThemeArg::Auto)]
    pub theme: ThemeArg,

    /// Do not read pages to find those that are all zero, nor how random they are
    #[arg(long, conflicts_with = "other")]
    pub no_scan: bool,

    /// Replace pictures that exist
    #[arg(long)]
    pub overwrite: bool,

    /// Where in IMAGE it starts (0x10000, 64K, 1M, 2G)
    #[arg(long, value_name = "N", default_value = "0", value_parser = bytes)]
    pub offset: u64,

    /// Where in LATER it starts
    #[arg(long, value_name = "N", default_value = "0", value_parser = bytes, requires = "other")]
    pub other_offset: u64,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LayoutArg {
    /// Neighbours in memory stay together
    Hilbert,
    /// Row by row
    Rows,
}

impl From<LayoutArg> for crate::picture::Layout {
    fn from(layout: LayoutArg) -> Self {
        match layout {
            LayoutArg::Hilbert => Self::Hilbert,
            LayoutArg::Rows => Self::Rows,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ThemeArg {
    Auto,
    Light,
    Dark,
}

impl From<ThemeArg> for crate::picture::Theme {
    fn from(theme: ThemeArg) -> Self {
        match theme {
            ThemeArg::Auto => Self::Auto,
            ThemeArg::Light => Self::Light,
            ThemeArg::Dark => Self::Dark,
        }
    }
}

#[derive(Debug, ClapArgs)]
pub struct Devices {
    /// The image to read: of any format, by vmstate, QEMU or libvirt
    pub image: PathBuf,

    /// Only the sections of this name, whole, and bytes in full: cpu, virtio-net, 0000:00:02.0/virtio-net
    pub name: Option<String>,

    /// An image of the same machine that QEMU itself wrote: it describes what IMAGE does not
    #[arg(long, value_name = "IMAGE")]
    pub describe_by: Option<PathBuf>,

    /// Where in IMAGE it starts (0x10000, 64K, 1M, 2G)
    #[arg(long, value_name = "N", default_value = "0", value_parser = bytes)]
    pub offset: u64,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, ClapArgs)]
pub struct Convert {
    /// The image to read: a file, a block device, a FIFO, or - for the standard input
    #[arg(value_name = "IN")]
    pub input: PathBuf,

    /// The image to write: a new file, a block device, a FIFO, or - for the standard output
    #[arg(value_name = "OUT")]
    pub output: PathBuf,

    /// What IN is read as [default: what its first bytes say]
    #[arg(long, short = 'f', value_name = "FORMAT", value_enum)]
    pub from_format: Option<ImageFormatArg>,

    /// The format of OUT
    #[arg(long, short = 'O', value_name = "FORMAT", value_enum)]
    pub to_format: ImageFormatArg,

    /// The XML of the domain, for an image of libvirt [default: that of IN, which is one, too]
    ///
    /// As `virsh dumpxml --migratable --security-info` gives it.
    #[arg(long, value_name = "FILE")]
    pub xml: Option<PathBuf>,

    /// Where in IN the image starts (0x10000, 64K, 1M, 2G)
    #[arg(long, value_name = "N", default_value = "0", value_parser = bytes)]
    pub in_offset: u64,

    /// Write into the file OUT, which must exist, from this offset on (0x10000, 64K, 1M, 2G)
    ///
    /// What the file has before N stays as it is; what it has behind is lost and needs --overwrite. The file is
    /// written in place, so this cannot be undone.
    #[arg(long, value_name = "N", value_parser = bytes)]
    pub offset: Option<u64>,

    /// How many channels read and write in parallel (1 to 255) [default: one per processor, 2 to 8]
    #[arg(long, value_name = "N", aliases = ["parallel-channels", "parallel-connections"],
          value_parser = clap::value_parser!(u16).range(1..=255))]
    pub channels: Option<u16>,

    #[command(flatten)]
    pub direct_io: DirectIoArgs,

    /// Replace OUT if it exists; the old one stays whole until the new one is
    ///
    /// Of a block device, or of a file with --offset, what is there is overwritten in place.
    #[arg(long)]
    pub overwrite: bool,

    /// Do not wait until the image is on the disk
    #[arg(long)]
    pub no_sync: bool,

    /// The permission bits of a new file
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = octal)]
    pub mode: u32,

    /// Whom a new file is given to: names or numbers
    #[arg(long, value_name = "USER[:GROUP]")]
    pub owner: Option<Owner>,

    #[command(flatten)]
    pub report: ReportArgs,

    #[command(flatten)]
    pub progress: ProgressArgs,
}

#[derive(Debug, ClapArgs)]
pub struct Compare {
    /// One image: a file or a block device
    #[arg(value_name = "A")]
    pub one: PathBuf,

    /// The other one
    #[arg(value_name = "B")]
    pub other: PathBuf,

    /// What both are read as [default: what their first bytes say]
    #[arg(long, short = 'f', value_name = "FORMAT", value_enum)]
    pub format: Option<ImageFormatArg>,

    /// Where in A the image starts (0x10000, 64K, 1M, 2G)
    #[arg(long, value_name = "N", default_value = "0", value_parser = bytes)]
    pub offset: u64,

    /// Where in B the image starts
    #[arg(long, value_name = "N", default_value = "0", value_parser = bytes)]
    pub other_offset: u64,

    /// Compare the memory and not the devices
    #[arg(long, conflicts_with = "devices_only")]
    pub ram_only: bool,

    /// Compare the devices and not the memory
    #[arg(long)]
    pub devices_only: bool,

    /// A device section or RAM block that may differ, by its name or what is behind its last slash; XML and cookie are
    /// those of libvirt; may be given again
    #[arg(long, value_name = "NAME")]
    pub ignore: Vec<String>,

    #[command(flatten)]
    pub direct_io: DirectIoArgs,

    #[command(flatten)]
    pub report: ReportArgs,

    #[command(flatten)]
    pub progress: ProgressArgs,
}

#[derive(Debug, ClapArgs)]
pub struct Demo {
    /// The guest's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=65536))]
    pub memory: u64,

    /// Where the images go [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What `--restore-modes` takes where no sizes are given.
const MODES_MIB: [u64; 4] = [256, 1024, 4096, 8192];

#[derive(Debug, ClapArgs)]
pub struct Bench {
    /// The same as --restore-modes with its own sizes
    #[arg(value_enum, value_name = "restore", conflicts_with_all = ["backend", "only", "repeat", "clones", "growth", "convert", "domain"])]
    pub of: Option<BenchOfArg>,

    /// The guests' memory in MiB [default: 1024; with --growth and --convert 4096]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(64..=1_048_576))]
    pub memory: Option<u64>,

    /// Where the guests' memory comes from; may be given again [default: private, memfd and file]
    #[arg(long, value_enum)]
    pub backend: Vec<BackendArg>,

    /// Instead: restores in each mode and QEMU's own load beside each other, of idle and dirty guests of these sizes in
    /// MiB; those that memory or disk do not hold are left out
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', num_args = 0..=1, default_missing_value = "256,1024,4096,8192",
          value_parser = clap::value_parser!(u64).range(64..=1_048_576), conflicts_with_all = ["backend", "only", "repeat", "clones"])]
    pub restore_modes: Option<Vec<u64>>,

    /// Instead: so many clones of one guest of --memory, eager and mapped, and what they cost
    #[arg(long, value_name = "N,...", value_delimiter = ',', num_args = 0..=1, default_missing_value = "1,5,20",
          value_parser = clap::value_parser!(u16).range(1..=1000), conflicts_with_all = ["backend", "only", "rounds", "repeat", "quick", "plot"])]
    pub clones: Option<Vec<u16>>,

    /// Instead: how the cost grows, with the memory of idle guests of these sizes in MiB and with what one of --memory has
    /// touched; plans for a tebibyte, `info` of images, and how soon a job ends that is cancelled
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', num_args = 0..=1, default_missing_value = "1024,4096,8192,16384",
          value_parser = clap::value_parser!(u64).range(64..=1_048_576),
          conflicts_with_all = ["backend", "only", "repeat", "clones", "restore_modes"])]
    pub growth: Option<Vec<u64>>,

    /// Instead: the image of a dirty guest converted from mapped-ram into a stream and into libvirt's formats, and back,
    /// beside what reading and writing as much takes
    #[arg(long, conflicts_with_all = ["backend", "only", "repeat", "plot", "clones", "restore_modes", "growth"])]
    pub convert: bool,

    /// Instead: virsh save and restore beside ours, of a domain of libvirt that runs. It is suspended, ended and restored
    /// many times, and in the end goes on where it was
    #[arg(long, value_name = "DOMAIN", conflicts_with_all = ["memory", "backend", "only", "repeat", "plot", "clones", "restore_modes", "growth", "convert"])]
    pub domain: Option<String>,

    #[command(flatten)]
    pub connect: ConnectArgs,

    /// How many channels are used where several are
    #[arg(long, value_name = "N", default_value_t = 2, requires = "domain", value_parser = clap::value_parser!(u16).range(1..=255))]
    pub channels: u16,

    /// A command of QEMU that the domain's images are restored into without libvirt, too
    #[arg(last = true, value_name = "QEMU ARGS", requires = "domain")]
    pub command: Vec<OsString>,

    /// Only saves, or only restores
    #[arg(long, value_enum, value_name = "JOB")]
    pub only: Option<BenchJobArg>,

    /// Where the images go, four times the guests' memory [default: the current directory]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,

    /// With --convert: where the images in mapped-ram go, on another disk, so that one is read while the other is written
    #[arg(long, value_name = "DIR", requires = "convert")]
    pub second_directory: Option<PathBuf>,

    /// How many rounds a ratio is measured in [default: 9, fewer where that takes ten minutes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=999))]
    pub rounds: Option<u16>,

    /// How often the other rows are measured [default: 3, fewer where that takes ten minutes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=999))]
    pub repeat: Option<u16>,

    /// Three rounds, and every row once: too few for a verdict
    #[arg(long)]
    pub quick: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,

    /// Print tables for a document
    #[arg(long, conflicts_with = "json")]
    pub markdown: bool,

    /// Draw a picture, too
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub struct DirectIoArgs {
    /// Whether pages bypass the page cache; auto asks the file and tries it
    #[arg(long, value_enum, default_value_t = DirectIoArg::Auto)]
    pub direct_io: DirectIoArg,

    /// The same as --direct-io on
    #[arg(long, conflicts_with = "direct_io")]
    pub bypass_cache: bool,
}

impl DirectIoArgs {
    pub fn choice(&self) -> vmstate::DirectIo {
        match (self.bypass_cache, self.direct_io) {
            (true, _) | (false, DirectIoArg::On) => vmstate::DirectIo::On,
            (false, DirectIoArg::Auto) => vmstate::DirectIo::Auto,
            (false, DirectIoArg::Off) => vmstate::DirectIo::Off,
        }
    }
}

#[derive(Debug, ClapArgs)]
pub struct RecordArgs {
    /// The guest shall run after a restore [default: as it was before the save]
    #[arg(long, conflicts_with = "paused")]
    pub running: bool,

    /// The guest shall be paused after a restore
    #[arg(long)]
    pub paused: bool,
}

impl RecordArgs {
    pub fn choice(&self) -> vmstate::Record {
        match (self.running, self.paused) {
            (true, _) => vmstate::Record::Running,
            (false, true) => vmstate::Record::Paused,
            (false, false) => vmstate::Record::AsItWas,
        }
    }
}

#[derive(Clone, Copy, Debug, ClapArgs)]
pub struct ReportArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,

    /// Say what is being done, why, and how long each phase took
    #[arg(long, short)]
    pub verbose: bool,
}

#[derive(Debug, ClapArgs)]
pub struct ProgressArgs {
    /// How it is told how far the job is: a bar on a terminal, or one JSON object a line on stderr
    ///
    /// Whatever is chosen, SIGUSR1 prints a line. With json everything on stderr is an object: what is said, too.
    #[arg(long, value_name = "HOW", value_enum, default_value_t = ProgressArg::Auto)]
    pub progress: ProgressArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProgressArg {
    /// A bar where stderr is a terminal, nothing elsewhere
    Auto,
    /// A bar; nothing where stderr is no terminal
    Bar,
    /// Objects
    Json,
    /// Nothing
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ViaArg {
    Auto,
    Direct,
    Qemu,
    /// libvirt's own managed save (with --managed)
    Libvirt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceStateArg {
    Auto,
    Command,
    Migration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RestoreViaArg {
    Auto,
    Direct,
    Qemu,
    Socket,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// Pages at fixed offsets, written and read in parallel
    MappedRam,
    /// One record after the other: every QEMU reads it
    Stream,
    /// What virsh restore takes, the RAM one record after the other: for every libvirt
    LibvirtRaw,
    /// The same, compressed by gzip as parallel members
    LibvirtGzip,
    /// The same by bzip2
    LibvirtBzip2,
    /// The same by xz
    LibvirtXz,
    /// The same by lzop
    LibvirtLzop,
    /// The same by zstd, which libvirt reads since 10.4
    LibvirtZstd,
    /// What virsh restore takes since libvirt 11.2, the RAM at fixed offsets
    LibvirtSparse,
}

/// The formats of images that are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormatArg {
    /// Pages at fixed offsets, written and read in parallel
    MappedRam,
    /// One record after the other: every QEMU reads it
    Stream,
    /// libvirt's: its head, and a stream
    LibvirtRaw,
    /// The same, the stream through gzip, as parallel members
    LibvirtGzip,
    /// The same by bzip2
    LibvirtBzip2,
    /// The same by xz
    LibvirtXz,
    /// The same by lzop
    LibvirtLzop,
    /// The same by zstd, which libvirt reads since 10.4
    LibvirtZstd,
    /// libvirt's head, and pages at fixed offsets, which libvirt reads since 11.2
    LibvirtSparse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// Eager if the image is small, cached or remote, or cannot be mapped; else map
    Auto,
    /// Everything is read first
    Eager,
    /// RAM is a private mapping of the image, which must stay as it is while the guest runs
    Map,
    /// The guest runs at once; its memory comes as it is asked for, and all of it in the background
    Lazy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DirectIoArg {
    Auto,
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ThenArg {
    Pause,
    Resume,
    Quit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendArg {
    /// Plain -m
    Private,
    /// A shared memfd that nobody has touched
    Memfd,
    /// A shared file in /dev/shm
    File,
    /// A memfd whose pages are all there before the guest is (prealloc=on)
    Populated,
    /// A memfd on pages of 2 MiB; where the pool has not got enough of them it is made larger for the time
    Huge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchOfArg {
    /// Restores in each mode and QEMU's own load beside each other
    Restore,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchJobArg {
    Save,
    Restore,
}

impl Args {
    /// Whether errors, too, are to be JSON.
    pub fn wants_json(&self) -> bool {
        match &self.command {
            Command::Save(args) => args.report.json,
            Command::Restore(args) => args.report.json,
            Command::Resume(args) => args.report.json,
            Command::Info(args) | Command::Check(args) => args.json,
            Command::Map(args) => args.json,
            Command::Devices(args) => args.json,
            Command::Convert(args) => args.report.json,
            Command::Compare(args) => args.report.json,
            Command::Demo(args) => args.json,
            Command::Bench(args) => args.json,
            Command::Completions { .. } | Command::Man => false,
        }
    }
}

impl Bench {
    /// The sizes in MiB that the modes of a restore are measured with, if it is they.
    pub fn sizes_of_modes(&self) -> Option<&[u64]> {
        let asked_by_name = self.of.map(|BenchOfArg::Restore| MODES_MIB.as_slice());
        self.restore_modes.as_deref().or(asked_by_name)
    }
}

impl Convert {
    /// Whether the image goes to the standard output, so that nothing else may.
    pub fn takes_stdout(&self) -> bool {
        is_stdout(&self.output)
    }
}

/// Whether the name stands for the standard output.
pub fn is_stdout(path: &std::path::Path) -> bool {
    ["-", "/dev/stdout"].iter().any(|name| path.as_os_str() == *name)
}

impl Save {
    /// Whether the image goes to the standard output, so that nothing else may.
    pub fn takes_stdout(&self) -> bool {
        !self.dry_run && self.image.as_deref().is_some_and(is_stdout)
    }
}

/// A number of bytes: decimal, decimal with K, M, G or T for the powers of 1024, or hexadecimal.
fn bytes(text: &str) -> Result<u64, String> {
    let wanted = || "a number of bytes is wanted, for example 4096, 64K, 1M, 2G or 0x10000".to_owned();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).map_err(|_| wanted());
    }
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wanted()),
    };
    let number: u64 = digits.parse().map_err(|_| wanted())?;
    let bytes = number.checked_mul(1 << shift).filter(|bytes| i64::try_from(*bytes).is_ok());
    bytes.ok_or_else(|| format!("{text} is more than a file can have"))
}

fn octal(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("three octal digits are wanted, for example 640".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn offsets_are_decimal_hexadecimal_or_have_a_unit() {
        let wanted = "a number of bytes is wanted, for example 4096, 64K, 1M, 2G or 0x10000";
        for (text, expected) in [
            ("0", Ok(0)),
            ("4096", Ok(4096)),
            ("0x10000", Ok(65536)),
            ("64K", Ok(65536)),
            ("64k", Ok(65536)),
            ("1M", Ok(1 << 20)),
            ("2G", Ok(2 << 30)),
            ("1T", Ok(1 << 40)),
            ("", Err(wanted.to_owned())),
            ("K", Err(wanted.to_owned())),
            ("-1", Err(wanted.to_owned())),
            ("1 M", Err(wanted.to_owned())),
            ("1MiB", Err(wanted.to_owned())),
            ("0x", Err(wanted.to_owned())),
            ("0x1M", Err(wanted.to_owned())),
            ("8388608T", Err("8388608T is more than a file can have".to_owned())),
            ("18446744073709551615", Err("18446744073709551615 is more than a file can have".to_owned())),
        ] {
            assert_eq!(bytes(text), expected, "{text}");
        }
    }

    fn save(line: &str) -> Result<Save, clap::error::ErrorKind> {
        let line = ["vmstate", "save", "--qmp", "q"].into_iter().chain(line.split_whitespace());
        match Args::try_parse_from(line).map_err(|error| error.kind())?.command {
            Command::Save(save) => Ok(save),
            _ => panic!("not a save"),
        }
    }

    #[test]
    fn targets_of_a_save_are_named_and_bounded() {
        let parsed =
            save("--offset 1M --owner 0:0 --timeout 5 --format stream --dry-run i").expect("all of it");
        assert_eq!((parsed.offset, parsed.timeout, parsed.dry_run), (Some(1 << 20), Some(5), true));
        assert_eq!(parsed.owner, Some(Owner { user: Some(0), group: Some(0) }));
        assert_eq!(parsed.format, Some(FormatArg::Stream));
        assert_eq!(save("i").expect("the least").format, None);
        for line in
            ["--offset x i", "--owner no-such-user-here i", "--timeout 0 i", "--format raw i", "--mode 8 i"]
        {
            let refused = save(line).expect_err(line);
            let bad_value = matches!(
                refused,
                clap::error::ErrorKind::ValueValidation | clap::error::ErrorKind::InvalidValue
            );
            assert!(bad_value, "{line}: {refused:?}");
        }
    }

    #[test]
    fn the_standard_output_is_left_to_an_image_that_goes_there() {
        for (line, expected) in
            [("-", true), ("/dev/stdout", true), ("./-", false), ("i", false), ("--dry-run -", false)]
        {
            assert_eq!(save(line).expect(line).takes_stdout(), expected, "{line}");
        }
    }

    #[test]
    fn aliases_of_libvirt_are_taken() {
        let args = Args::parse_from([
            "vmstate",
            "save",
            "--qmp",
            "q",
            "--parallel-channels",
            "4",
            "--bypass-cache",
            "i",
        ]);
        let Command::Save(save) = args.command else { panic!("not a save") };
        assert_eq!(save.channels, Some(4));
        assert_eq!(save.direct_io.choice(), vmstate::DirectIo::On);
    }
}
