//! The guests of the benchmark: QEMUs whose memory stands still, and QEMUs that wait for such a guest.

use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmstate::qmp::Client;
use vmstate::{Cancel, Error, Kind, Result, net::QmpAddress};

use super::{Backend, Load};
use crate::{Guest, GuestSettings, Incoming, MachineKind, MemoryBackend, Qemu, QemuSpec};

/// How long a guest may take to fill its memory.
const FILL_DEADLINE: Duration = Duration::from_secs(300);
/// How long a wait for the guest goes on before the caller's wish to stop is looked at.
const SLICE: Duration = Duration::from_millis(200);
/// What an idle guest owns, in pages: 8 MiB.
pub const IDLE_PAGES: u32 = 2048;
/// Where memory that is a file lies: on every Linux a file system in memory.
pub const MEMORY_DIRECTORY: &str = "/dev/shm";
/// Shared memory that is all there before a guest is.
const POPULATED: &str = "memory-backend-memfd,share=on,prealloc=on";
/// Shared memory on huge pages, which are found as they are filled.
const HUGE: &str = "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M";

/// The guests of one row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Guests {
    /// Their size.
    pub memory_mib: u64,
    /// Where their memory comes from.
    pub backend: Backend,
    /// What they have done with it.
    pub load: Load,
}

/// A QEMU with its memory. It is killed when this is dropped.
pub struct Running {
    /// The QEMU; dropped first.
    pub qemu: Qemu,
    _memory: Option<TempDir>,
}

impl Guests {
    /// Starts a guest and waits until it has done what it does to its memory, and halts.
    pub fn boot(&self, cancel: &Cancel) -> Result<Running> {
        until_halted(self.start(Incoming::No)?, cancel)
    }

    /// Starts a QEMU that waits for such a guest.
    pub fn wait(&self) -> Result<Running> {
        self.start(Incoming::Defer)
    }

    fn start(&self, incoming: Incoming) -> Result<Running> {
        let settings = GuestSettings { fill_rounds: 1, halt_after_round: 1, ..GuestSettings::default() };
        let settings = match self.load {
            Load::Dirty => settings,
            Load::Idle => GuestSettings { pages_low_max: IDLE_PAGES, pages_high_max: 0, ..settings },
        };
        // A file anew for each QEMU: what an earlier one left would be this one's memory.
        let memory = match self.backend {
            Backend::File => Some(memory_directory()?),
            Backend::Private | Backend::Memfd | Backend::Populated | Backend::Huge => None,
        };
        let backend = match (self.backend, &memory) {
            (Backend::Memfd, _) => MemoryBackend::Memfd,
            (Backend::Populated, _) => MemoryBackend::Object(POPULATED.to_owned()),
            (Backend::Huge, _) => MemoryBackend::Object(HUGE.to_owned()),
            (_, Some(directory)) => MemoryBackend::File(directory.path().join("ram")),
            (_, None) => MemoryBackend::Plain,
        };
        let guest = Some(Guest::new(settings));
        let spec =
            QemuSpec { backend, guest, incoming, ..QemuSpec::new(MachineKind::Q35, self.memory_mib << 20) };
        Ok(Running { qemu: spec.start().map_err(failed)?, _memory: memory })
    }
}

/// Starts a guest that goes through its memory once and then halts, and waits until it has. Its memory is no file with
/// a name.
pub fn boot(spec: &QemuSpec, cancel: &Cancel) -> Result<Running> {
    until_halted(Running { qemu: spec.start().map_err(failed)?, _memory: None }, cancel)
}

fn until_halted(mut running: Running, cancel: &Cancel) -> Result<Running> {
    let deadline = Instant::now() + FILL_DEADLINE;
    loop {
        match running.qemu.wait_for_round(1, SLICE) {
            Ok(_) => return Ok(running),
            Err(_) if cancel.is_cancelled() => return Err(Error::interrupted()),
            Err(crate::Error::Deadline { .. }) if Instant::now() < deadline => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

impl Running {
    /// Connects to the monitor.
    pub fn client(&self, cancel: &Cancel) -> Result<Client> {
        Client::connect(&self.address(), cancel)
    }

    /// The monitor's address.
    pub fn address(&self) -> QmpAddress {
        QmpAddress::Unix(self.qemu.qmp_path())
    }
}

fn memory_directory() -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix("vmstate-bench-")
        .tempdir_in(Path::new(MEMORY_DIRECTORY))
        .map_err(|error| Error::io(format!("cannot create a directory in {MEMORY_DIRECTORY}"), error))
}

fn failed(error: crate::Error) -> Error {
    Error::new(Kind::Io, "the benchmark's guest").because(error)
}
