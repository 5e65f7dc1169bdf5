//! Damaged images: whatever is done to one, looking into it ends, without a panic, in little memory and few reads.
//!
//! The images are made by a real QEMU, once; damages are drawn from a generator with a fixed seed. The suite
//! takes less than a minute on two processors.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use lab::{Guest, GuestSettings, MachineKind, QemuSpec};
use vmstate::net::QmpAddress;
use vmstate::source::MappedRamFile;
use vmstate::{Cancel, SaveSettings, Then, Unobserved, Via};
use vmstate_rig::{DEADLINE, StockLoad, stock_save};

const SEED: u64 = 0x766d_7374_6174_6502;
/// Damages of each image; ten times as many in `make test-full`.
fn damages() -> usize {
    if std::env::var_os("VMSTATE_TEST_FULL").is_some() { 15_000 } else { 1500 }
}

/// How much memory looking at a damaged image of some MiB may take. A whole bitmap or device state is far below.
const MEMORY_BYTES_MAX: u64 = 64 << 20;
/// How much may be read for it, by both ways of looking together: a third of a mapped-ram image.
const READ_BYTES_MAX: u64 = 8 << 20;

/// splitmix64: a generator that is the same everywhere and for ever.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..end`.
    fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    fn pick<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize].clone()
    }
}

/// An image, and where the bytes are that mean something.
struct Image {
    name: &'static str,
    path: PathBuf,
    whole: Vec<u8>,
    metadata: Vec<Range<u64>>,
}

impl Image {
    fn new(name: &'static str, path: PathBuf) -> Image {
        let whole = fs::read(&path).unwrap();
        let len = whole.len() as u64;
        let metadata = match name {
            // Page records are everywhere.
            "stream" => vec![0..4096, 0..len, len - 16384..len],
            _ => {
                let layout = MappedRamFile::open(&path).unwrap().layout().clone();
                let mut ranges = Vec::new();
                let mut at = 0;
                for block in &layout.blocks {
                    ranges.push(at..block.bitmap.start);
                    ranges.push(block.bitmap.start..block.bitmap.end);
                    at = block.pages.end;
                }
                ranges.extend([at..len, layout.device_state.start..layout.device_state.end]);
                ranges.retain(|range| !range.is_empty());
                ranges
            }
        };
        Image { name, path, whole, metadata }
    }

    fn file(&self) -> File {
        File::options().write(true).open(&self.path).unwrap()
    }

    /// Damages the file, looks, and mends it again.
    fn damaged(&self, dice: &mut Dice, look: impl FnOnce(&str)) {
        let file = self.file();
        let len = self.whole.len() as u64;
        match dice.below(10) {
            0 => {
                let range = dice.pick(&self.metadata);
                let cut = range.start + dice.below(range.end - range.start);
                file.set_len(cut).unwrap();
                look(&format!("{} cut at {cut:#x}", self.name));
                self.mend(&file, cut);
            }
            1 => {
                let tail: Vec<u8> = (0..1 + dice.below(64)).map(|_| dice.roll() as u8).collect();
                file.write_all_at(&tail, len).unwrap();
                look(&format!("{} with {tail:02x?} behind its end", self.name));
                file.set_len(len).unwrap();
            }
            kind => {
                let range = dice.pick(&self.metadata);
                let at = range.start + dice.below(range.end - range.start);
                let value = match kind {
                    2 => 0,
                    3 => u64::MAX,
                    4 => 1 << 63,
                    5 => dice.pick(&[1u64, 0xfff, 0x1000, 0x1001, len, len + 1, len - 1, 1 << 32]),
                    _ => dice.roll(),
                };
                let width = dice.pick(&[1usize, 1, 1, 2, 4, 8]).min((len - at) as usize);
                let bytes = &value.to_be_bytes()[8 - width..];
                file.write_all_at(bytes, at).unwrap();
                look(&format!("{} with {bytes:02x?} at {at:#x}", self.name));
                let old = &self.whole[at as usize..at as usize + width];
                file.write_all_at(old, at).unwrap();
            }
        }
    }

    /// Writes everything from `cut` on again; what is zero becomes a hole.
    fn mend(&self, file: &File, cut: u64) {
        file.set_len(self.whole.len() as u64).unwrap();
        for (i, chunk) in self.whole[cut as usize..].chunks(4096).enumerate() {
            if chunk.iter().any(|byte| *byte != 0) {
                file.write_all_at(chunk, cut + 4096 * i as u64).unwrap();
            }
        }
    }
}

/// The same small guest as three images, in memory where there is a file system for that.
fn images() -> (tempfile::TempDir, Vec<Image>) {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let at = |name: &str| dir.path().join(name);
    let guest = Some(Guest::new(GuestSettings::idle(64)));
    let spec = QemuSpec { guest, ..QemuSpec::new(MachineKind::Pc, 16 << 20) };
    let start = || {
        let mut qemu = spec.start().unwrap();
        qemu.wait_for_round(1, DEADLINE).unwrap();
        qemu
    };
    let qemu = start();
    let settings = SaveSettings {
        via: Via::Direct,
        then: Then::Pause,
        ..SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), at("ours"))
    };
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
    stock_save(&qemu, &at("qemus"), StockLoad::PLAIN);
    stock_save(&start(), &at("stream"), StockLoad::STREAM);
    let images = ["ours", "qemus", "stream"].map(|name| Image::new(name, at(name))).into();
    (dir, images)
}

/// The most memory that this process has had, in bytes.
fn peak_memory_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// How much more that is than it was. The kernel notes a peak only now and then, and shows the present size where
/// that is larger: once memory was given back, what it shows may be less than it was.
fn grown_since(before: u64) -> u64 {
    peak_memory_bytes().saturating_sub(before)
}

/// How much this thread has read.
fn bytes_read() -> u64 {
    let counts = fs::read_to_string("/proc/thread-self/io").unwrap();
    counts.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn looking_into_a_damaged_image_ends_without_a_panic_in_little_memory_and_few_reads() {
    let (_dir, images) = images();
    let mut dice = Dice(SEED);
    // From here on only.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = peak_memory_bytes();
    let (mut refused, mut faulty) = (0, 0);
    for image in &images {
        for turn in 0..damages() {
            image.damaged(&mut dice, |damage| {
                let name = format!("seed {SEED:#x}, turn {turn}: {damage}");
                let read_before = bytes_read();
                let looked = catch_unwind(AssertUnwindSafe(|| {
                    (vmstate::info(&image.path), vmstate::check(&image.path))
                }));
                let Ok((info, check)) = looked else { panic!("{name}: it panicked") };
                let read = bytes_read() - read_before;
                assert!(read < READ_BYTES_MAX, "{name}: {read:#x} bytes read");
                let is_clean = check.as_ref().is_ok_and(|check| check.report.is_clean());
                if let Err(error) = &info {
                    refused += 1;
                    // Two readings of the same bytes: whatever stops the one, the other lists.
                    assert!(!is_clean, "{name}: {}, and check finds nothing", error.chain());
                }
                faulty += usize::from(!is_clean);
                let grown = grown_since(before);
                assert!(grown < MEMORY_BYTES_MAX, "{name}: {grown:#x} bytes of memory");
            });
        }
        // It was mended each time, so each damage stood alone.
        assert_eq!(fs::read(&image.path).unwrap(), image.whole, "{}", image.name);
    }
    let all = images.len() * damages();
    eprintln_budget(all, refused, faulty, grown_since(before));
    // The damages do damage.
    assert!(refused > all / 10 && faulty >= refused && faulty < all, "{refused} refused, {faulty} faulty");
}

#[allow(clippy::print_stderr)]
fn eprintln_budget(all: usize, refused: usize, faulty: usize, grown: u64) {
    eprintln!("seed {SEED:#x}: {all} damages, {refused} refused, {faulty} found faulty, {} KiB", grown >> 10);
}

#[test]
fn pages_may_hold_anything() {
    let (_dir, images) = images();
    let mut dice = Dice(SEED);
    for image in images.iter().filter(|image| image.name != "stream") {
        let info = vmstate::info(&image.path).unwrap();
        let layout = MappedRamFile::open(&image.path).unwrap().layout().clone();
        let file = image.file();
        for block in &layout.blocks {
            let opened = MappedRamFile::open(&image.path).unwrap();
            let mut pages = Vec::new();
            opened.runs(block, |run| pages.push(run.start.0)).unwrap();
            for page in pages {
                let bytes: Vec<u8> = (0..64).map(|_| dice.roll() as u8).collect();
                file.write_all_at(&bytes, block.pages.start + page * block.page_size.bytes()).unwrap();
            }
        }
        let now = vmstate::info(&image.path).unwrap();
        // Pages that lay in holes of the file are there now.
        assert_eq!((&now.blocks.len(), &now.devices), (&info.blocks.len(), &info.devices), "{}", image.name);
        assert_eq!((now.data_bytes, now.hole_bytes), (info.data_bytes, info.hole_bytes), "{}", image.name);
        assert_eq!((&now.saved, &now.run_state), (&info.saved, &info.run_state), "{}", image.name);
        assert!(vmstate::check(&image.path).unwrap().report.is_clean(), "{}", image.name);
    }
}
