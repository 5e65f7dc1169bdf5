//! The built-in guest in real QEMUs.

mod qmp;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp::Qmp;
use vmstate_lab::{
    Error, Fault, Guest, GuestSettings, MachineKind, MemoryBackend, Pattern, Qemu, QemuSpec, SCATTERED,
    VerifyError, verify,
};

/// Generous: a wait ends as soon as what it waits for has come.
const DEADLINE: Duration = Duration::from_secs(60);

/// A guest whose RAM the test may read and write: a memfd, opened by way of the process that holds it.
struct Machine {
    qemu: Qemu,
    guest: Guest,
    ram: File,
}

impl Machine {
    fn boot(machine: MachineKind, ram_mib: u64, settings: GuestSettings) -> Machine {
        let guest = Guest::new(settings);
        let spec = QemuSpec {
            backend: MemoryBackend::Memfd,
            guest: Some(guest),
            ..QemuSpec::new(machine, ram_mib << 20)
        };
        let qemu = spec.start().unwrap();
        let ram = memfd_of(&qemu);
        assert_eq!(ram.metadata().unwrap().len(), qemu.layout().ram_bytes());
        Machine { qemu, guest, ram }
    }

    /// Stops the guest, verifies its memory, and lets it go on.
    fn verify_stopped(&self) -> Result<Pattern, VerifyError<std::io::Error>> {
        let mut qmp = Qmp::connect(&self.qemu.qmp_path());
        qmp.execute("stop");
        let pattern = self.verify();
        qmp.execute("cont");
        pattern
    }

    fn verify(&self) -> Result<Pattern, VerifyError<std::io::Error>> {
        verify(&self.guest, &self.qemu.layout(), |offset, page| self.ram.read_exact_at(page, offset))
    }
}

#[test]
fn it_owns_what_the_layout_says_and_its_memory_is_whole_whenever_it_is_stopped() {
    // 3 GiB are split on q35 and not on pc; 5 GiB are split on both. Of the large ones little is touched.
    let some = GuestSettings { pages_low_max: 3000, pages_high_max: 2000, ..GuestSettings::default() };
    let filled = GuestSettings { fill_rounds: 2, ..GuestSettings::default() };
    let always_filled = GuestSettings { fill_rounds: u32::MAX, ..some };
    for (machine, ram_mib, settings) in [
        (MachineKind::Q35, 64, GuestSettings::default()),
        (MachineKind::Pc, 64, filled),
        (MachineKind::Q35, 3072, some),
        (MachineKind::Pc, 3072, some),
        (MachineKind::Q35, 5120, always_filled),
        (MachineKind::Pc, 5120, some),
    ] {
        let name = format!("{} with {ram_mib} MiB, {settings:?}", machine.name());
        let mut vm = Machine::boot(machine, ram_mib, settings);
        let before = vm.qemu.wait_for_round(3, DEADLINE).expect(&name);
        let owned = vm.guest.owned_pages(&vm.qemu.layout());
        assert_eq!(vm.qemu.serial.wait_for_pages(None, DEADLINE).unwrap(), owned, "{name}");

        let pattern = vm.verify_stopped().expect(&name);
        assert!(pattern.round >= before, "{name}: {pattern:?} after round {before}");
        let in_progress = u64::from(pattern.in_progress.is_some());
        assert_eq!(pattern.pages_at_round + pattern.pages_before + in_progress, owned, "{name}");

        // It goes on, and finds all its pages as it left them.
        vm.qemu.wait_for_round(pattern.round + 2, DEADLINE).expect(&name);
    }
}

#[test]
fn a_guest_that_scatters_is_whole_in_its_own_order_whenever_it_is_stopped() {
    let settings =
        GuestSettings { pages_low_max: 3000, pages_high_max: 2000, fill_rounds: 1, ..Default::default() };
    let mut vm = Machine::boot(MachineKind::Q35, 3072, GuestSettings { stride: SCATTERED, ..settings });
    let mut round = vm.qemu.wait_for_round(1, DEADLINE).unwrap();
    // Between two rounds any order would do.
    let mut amid = 0;
    while amid < 3 {
        let pattern = vm.verify_stopped().unwrap();
        amid += u32::from(pattern.pages_before > 0);
        round = vm.qemu.wait_for_round(round + 1, DEADLINE).unwrap();
    }
}

#[test]
fn it_owns_all_of_five_gibibytes() {
    let settings = GuestSettings { halt_after_round: 1, ..GuestSettings::default() };
    let mut spec = QemuSpec::new(MachineKind::Q35, 5 << 30);
    spec.guest = Some(Guest::new(settings));
    let mut qemu = spec.start().unwrap();
    assert_eq!(qemu.wait_for_round(1, DEADLINE).unwrap(), 1);
    assert_eq!(qemu.serial.wait_for_pages(None, DEADLINE).unwrap(), (5 << 18) - 0x400);
}

#[test]
fn a_halted_guest_stands_still_with_all_pages_of_one_round() {
    let settings = GuestSettings { halt_after_round: 4, fill_rounds: 1, ..GuestSettings::default() };
    let mut vm = Machine::boot(MachineKind::Q35, 64, settings);
    assert_eq!(vm.qemu.wait_for_round(4, DEADLINE).unwrap(), 4);
    let expected =
        Pattern { round: 4, pages_at_round: (64 << 8) - 0x400, pages_before: 0, in_progress: None };
    // Not even stopped: nothing runs any more.
    assert_eq!(vm.verify().unwrap(), expected);
    assert_eq!(vm.qemu.serial.latest_round().unwrap(), 4);
}

#[test]
fn an_idle_guest_sleeps_between_its_rounds_and_touches_little() {
    let settings = GuestSettings::idle(256);
    let mut vm = Machine::boot(MachineKind::Pc, 512, settings);
    vm.qemu.wait_for_round(2, DEADLINE).unwrap();
    let mut qmp = Qmp::connect(&vm.qemu.qmp_path());
    let before = timer_interrupts(&mut qmp);
    let first = vm.qemu.serial.latest_round().unwrap();
    let last = vm.qemu.wait_for_round(first + 10, DEADLINE).unwrap();
    let ticks = timer_interrupts(&mut qmp) - before;
    drop(qmp);
    // Each round waits for a tick; that of the first may have come before. Awake, it would be through within one.
    assert!(ticks + 1 >= u64::from(last - first), "{ticks} ticks from round {first} to {last}");

    // The firmware touches some memory too, but nothing in the order of what the machine has.
    use std::os::unix::fs::MetadataExt;
    let touched = vm.ram.metadata().unwrap().blocks() * 512;
    assert!(touched < 32 << 20, "{touched} bytes");
    vm.verify_stopped().unwrap();
}

#[test]
fn a_page_changed_behind_its_back_is_reported_by_the_guest_and_by_the_host() {
    // Asleep, the guest is nearly always between two rounds, so the page that is spoilt is of a finished round.
    let mut vm = Machine::boot(MachineKind::Q35, 64, GuestSettings { pause_ticks: 4, ..Default::default() });
    vm.qemu.wait_for_round(2, DEADLINE).unwrap();
    let mut qmp = Qmp::connect(&vm.qemu.qmp_path());
    qmp.execute("stop");

    let page = 0x1234;
    let mut word = [0; 8];
    vm.ram.read_exact_at(&mut word, page << 12).unwrap();
    let first = u64::from_le_bytes(word);
    vm.ram.write_all_at(&[0], (page << 12) + 8 * 511).unwrap();
    let expected = Fault::Wrong { page, first, last: first & !0xff };
    match vm.verify() {
        Err(VerifyError::Fault(fault)) => assert_eq!(fault, expected),
        other => panic!("{other:?}"),
    }

    qmp.execute("cont");
    match vm.qemu.wait_for_round(u32::MAX, DEADLINE) {
        Err(Error::GuestFault { page: reported, .. }) => assert_eq!(reported, page),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_page_of_the_high_ram_is_reported_under_its_own_address() {
    let settings =
        GuestSettings { pages_low_max: 16, pages_high_max: 16, pause_ticks: 4, ..Default::default() };
    let mut vm = Machine::boot(MachineKind::Pc, 3584, settings);
    vm.qemu.wait_for_round(2, DEADLINE).unwrap();
    let page = 0x10_0003;
    let offset = vm.qemu.layout().block_offset(page << 12).unwrap();
    assert_eq!(offset, (3 << 30) + 0x3000);
    vm.ram.write_all_at(&[0xff], offset).unwrap();
    match vm.qemu.wait_for_round(u32::MAX, DEADLINE) {
        Err(Error::GuestFault { page: reported, .. }) => assert_eq!(reported, page),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_backend_boots_with_one_or_two_sockets_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let file = MemoryBackend::File(dir.path().join("ram,1"));
    for backend in [MemoryBackend::Plain, MemoryBackend::Ram, MemoryBackend::Memfd, file] {
        let spec = QemuSpec {
            backend: backend.clone(),
            second_qmp: true,
            ..QemuSpec::new(MachineKind::Q35, 64 << 20)
        };
        let mut qemu = spec.start().unwrap();
        qemu.wait_for_round(1, DEADLINE).unwrap_or_else(|error| panic!("{backend}: {error}"));
        let mut first = Qmp::connect(&qemu.qmp_path());
        let mut second = Qmp::connect(&qemu.second_qmp_path());
        first.execute("stop");
        assert_eq!(second.execute("query-status")["status"], "paused", "{backend}");

        let (pid, dir) = (qemu.pid(), qemu.dir().to_owned());
        drop(qemu);
        assert!(!process_dir(pid).exists() && !dir.exists(), "{backend}");
    }
}

#[test]
fn a_paused_and_a_waiting_qemu_say_so() {
    use vmstate_lab::Incoming;
    for (paused, incoming, status) in [
        (true, Incoming::No, "prelaunch"),
        (false, Incoming::Defer, "inmigrate"),
        (true, Incoming::Defer, "inmigrate"),
        (false, Incoming::No, "running"),
    ] {
        let spec =
            QemuSpec { paused, incoming: incoming.clone(), ..QemuSpec::new(MachineKind::Q35, 64 << 20) };
        let mut qemu = spec.start().unwrap();
        let mut qmp = Qmp::connect(&qemu.qmp_path());
        assert_eq!(qmp.execute("query-status")["status"], status, "paused {paused}, incoming {incoming:?}");
        qmp.execute("quit");
        assert!(qemu.wait(DEADLINE).unwrap().success());
    }
}

#[test]
fn a_wait_for_a_guest_whose_qemu_was_killed_ends_at_once() {
    let mut qemu = QemuSpec::new(MachineKind::Q35, 64 << 20).start().unwrap();
    qemu.wait_for_round(1, DEADLINE).unwrap();
    assert_eq!(qemu.kill().unwrap().to_string(), "signal: 9 (SIGKILL)");
    match qemu.wait_for_round(u32::MAX, DEADLINE) {
        Err(Error::Ended { awaited, .. }) => assert_eq!(awaited, format!("round {}", u32::MAX)),
        other => panic!("{other:?}"),
    }
}

/// How often the timer has interrupted.
fn timer_interrupts(qmp: &mut Qmp) -> u64 {
    let answer = qmp.execute("x-query-irq");
    let text = answer["human-readable-text"].as_str().unwrap();
    let count = text.lines().find_map(|line| line.trim().strip_prefix("0: "));
    count.unwrap_or_else(|| panic!("no interrupt 0 in {text}")).parse().unwrap()
}

/// The one memfd that the process holds.
fn memfd_of(qemu: &Qemu) -> File {
    let descriptors =
        fs::read_dir(process_dir(qemu.pid()).join("fd")).unwrap().map(|entry| entry.unwrap().path());
    let is_memfd = |path: &PathBuf| {
        // A descriptor may be closed between being listed and being looked at.
        fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:"))
    };
    let path = descriptors.into_iter().find(is_memfd).expect("QEMU holds a memfd");
    File::options().read(true).write(true).open(path).unwrap()
}

fn process_dir(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}
