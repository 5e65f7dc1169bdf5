//! Images that libvirt wrote, one of each format, all of the same guest.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::{Incoming, MachineKind, MemoryBackend, Qemu, QemuSpec};
use vmstate::codec::{Codec, Compressor};
use vmstate::libvirt::PayloadFormat;
use vmstate::net::QmpAddress;
use vmstate::source::{Format, Input, MappedRamFile, Pages, Payload, open_image, open_source};
use vmstate::{
    Cancel, CompareSettings, Compared, ConvertReport, ConvertSettings, DirectIo, Kind, Record, RestoreReport,
    RestoreSettings, Result, SaveSettings, Target, Unobserved, Via,
};
use vmstate_rig::{client, unpack_golden};

const FORMATS: [&str; 7] = ["raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"];
const RAM_LEN: usize = 64 << 20;

struct Unpacked {
    dir: tempfile::TempDir,
}

impl Unpacked {
    fn new() -> Unpacked {
        Unpacked { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() }
    }

    fn file(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        if !path.exists() {
            unpack_golden(&format!("libvirt-11.3-{name}"), &path);
        }
        path
    }

    fn image(&self, format: &str) -> PathBuf {
        self.file(&format!("{format}-image"))
    }

    fn ram(&self) -> Vec<u8> {
        std::fs::read(self.file("ram")).unwrap()
    }
}

/// A QEMU as libvirt started it for the domain of the images, which waits.
fn waiting(backend: MemoryBackend) -> Qemu {
    let devices = [
        "pcie-root-port,port=8,chassis=1,id=pci.1,bus=pcie.0,multifunction=on,addr=0x1",
        "pcie-root-port,port=9,chassis=2,id=pci.2,bus=pcie.0,addr=0x1.0x1",
        "virtio-balloon-pci,id=balloon0,bus=pci.1,addr=0x0",
    ];
    let extra = devices.iter().flat_map(|device| ["-device".into(), device.into()]).collect();
    let spec = QemuSpec {
        machine_version: Some("pc-q35-10.0".into()),
        backend,
        guest: None,
        incoming: Incoming::Defer,
        extra,
        ..QemuSpec::new(MachineKind::Q35, RAM_LEN as u64)
    };
    spec.start().unwrap()
}

fn restore(image: &Path, target: &Qemu, record: Record) -> Result<RestoreReport> {
    let settings = RestoreSettings::new(image, Target::Waiting(QmpAddress::Unix(target.qmp_path())));
    vmstate::restore(&RestoreSettings { record, ..settings }, &Cancel::new().unwrap(), &Unobserved)
}

/// The memory of a guest that stands still, by way of an image of it.
fn memory(qemu: &Qemu) -> Vec<u8> {
    let image = qemu.dir().join("memory.img");
    let settings = SaveSettings::new(QmpAddress::Unix(qemu.qmp_path()), &image);
    vmstate::save(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
    memory_of(&image)
}

/// The memory of a guest in an image whose pages have places.
fn memory_of(image: &Path) -> Vec<u8> {
    let image = MappedRamFile::open(image).unwrap();
    let block = image.layout().blocks.iter().find(|block| block.name == "pc.ram").unwrap();
    let mut bytes = vec![0; RAM_LEN];
    image.read_ram(block, &image.pages(block).unwrap(), 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn images_of_every_format_are_sound_and_told_alike() {
    let unpacked = Unpacked::new();
    for format in FORMATS {
        let image = unpacked.image(format);
        let check = vmstate::check(&image).unwrap();
        assert_eq!(check.report.faults, [], "{format}");
        assert_eq!(check.format.unwrap().name(), format!("libvirt-{format}"));
        let info = vmstate::info(&image).unwrap();
        assert_eq!(info.format, format!("libvirt-{format}"));
        assert_eq!(info.machine.as_deref(), Some("pc-q35-10.0"), "{format}");
        // One was saved with --paused; libvirt stops every guest before it is saved, and tells how it was in its head.
        let paused = format == "xz";
        assert_eq!(info.run_state.as_deref(), Some(if paused { "paused" } else { "running" }), "{format}");
        assert_eq!(info.ram_bytes, (64 << 20) + 0x82000, "{format}");
        assert_eq!((info.devices.len(), info.described), (35, true), "{format}");
        let domain = info.domain.unwrap();
        assert_eq!(domain.name.as_deref(), Some("fxbios"), "{format}");
        assert_eq!(domain.uuid.as_deref(), Some("5f0c1a2e-1111-4222-8333-0123456789ac"), "{format}");
        let told = (domain.format, domain.was_running, domain.payload_offset, domain.cookie_bytes);
        assert_eq!(told, (format, !paused, 0x10901, Some(0xeb)), "{format}");
    }
}

#[test]
fn every_format_comes_back_in_qemu_with_the_same_memory() {
    let unpacked = Unpacked::new();
    let ram = unpacked.ram();
    for format in FORMATS {
        let target = waiting(MemoryBackend::Plain);
        let report = restore(&unpacked.image(format), &target, Record::Paused).unwrap();
        let expected = if ["raw", "sparse"].contains(&format) { Via::Qemu } else { Via::Socket };
        assert_eq!(report.via, expected, "{format}");
        assert_eq!(client(&target).status().unwrap().status, "paused", "{format}");
        assert!(memory(&target) == ram, "{format}: another memory");
    }
}

#[test]
fn shared_memory_is_filled_from_a_sparse_image() {
    let unpacked = Unpacked::new();
    let target = waiting(MemoryBackend::Memfd);
    let report = restore(&unpacked.image("sparse"), &target, Record::Paused).unwrap();
    assert_eq!(report.via, Via::Direct);
    assert!(memory(&target) == unpacked.ram());
}

#[test]
fn a_guest_comes_back_in_the_state_that_libvirt_noted() {
    let unpacked = Unpacked::new();
    for (format, expected) in
        [("raw", "running"), ("zstd", "running"), ("sparse", "running"), ("xz", "paused")]
    {
        let target = waiting(MemoryBackend::Plain);
        let report = restore(&unpacked.image(format), &target, Record::AsItWas).unwrap();
        assert_eq!(report.run_state, expected, "{format}");
    }
}

#[test]
fn an_image_that_was_not_written_to_its_end_is_refused_and_its_head_told() {
    let unpacked = Unpacked::new();
    for format in FORMATS {
        let image = unpacked.image(format);
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        file.write_all_at(b"LibvirtQemudPart", 0).unwrap();
        let target = waiting(MemoryBackend::Plain);
        let error = restore(&image, &target, Record::AsItWas).unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged, "{format}");
        let expected = "magic at 0x0: says that the image was not written to its end";
        assert_eq!(error.to_string(), format!("{}: {expected}", image.display()));
        // Nothing else is wrong with it.
        let faults = vmstate::check(&image).unwrap().report.faults;
        assert_eq!(faults.iter().map(|fault| fault.to_string()).collect::<Vec<_>>(), [expected], "{format}");
    }
}

#[test]
fn an_image_that_was_cut_is_refused_before_qemu_sees_it() {
    let unpacked = Unpacked::new();
    for format in FORMATS {
        let image = unpacked.image(format);
        let len = image.metadata().unwrap().len();
        // The last hundred bytes are of the description in raw and sparse, which QEMU does not read.
        for cut in [len / 2, 0x10901 + 3, 0x10901, 0x900, 91, 16] {
            OpenOptions::new().write(true).open(&image).unwrap().set_len(cut).unwrap();
            let target = waiting(MemoryBackend::Plain);
            let error = restore(&image, &target, Record::AsItWas).unwrap_err();
            assert_eq!(error.kind(), Kind::Damaged, "{format} cut to {cut:#x}: {}", error.chain());
            assert_eq!(client(&target).status().unwrap().status, "inmigrate", "{format}");
            let sound = vmstate::check(&image).is_ok_and(|check| check.report.is_clean());
            assert!(!sound, "{format} cut to {cut:#x}");
        }
    }
}

#[test]
fn a_payload_that_its_head_does_not_name_is_refused() {
    let unpacked = Unpacked::new();
    for (format, number, expected) in [
        ("raw", 6, "payload at 0x10901: is a stream, which sparse is not"),
        ("sparse", 0, "payload at 0x10901: is a mapped-ram image, which raw is not"),
        ("gzip", 5, "payload at 0x10901: does not begin as zstd does"),
        ("zstd", 0, "payload at 0x10901: does not begin as raw does"),
    ] {
        let image = unpacked.image(format);
        OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[number], 28).unwrap();
        let error = vmstate::info(&image).unwrap_err();
        assert_eq!(error.to_string(), format!("{}: {expected}", image.display()));
        let faults = vmstate::check(&image).unwrap().report.faults;
        assert_eq!(faults.iter().map(|fault| fault.to_string()).collect::<Vec<_>>(), [expected], "{format}");
    }
}

/// What convert and compare say of an image, and leave of it.
fn told_of_damage(image: &Path, whole: &Path, to: &Path) -> Vec<(Kind, String)> {
    let cancel = Cancel::new().unwrap();
    let converts = [Format::Stream, Format::MappedRam].map(|format| {
        let settings = ConvertSettings { sync: false, ..ConvertSettings::new(image, to, format) };
        let error = vmstate::convert(&settings, &cancel, &Unobserved).unwrap_err();
        assert!(!to.exists());
        (error.kind(), error.chain())
    });
    let settings = CompareSettings::new(Compared::new(image), Compared::new(whole));
    let error = vmstate::compare(&settings, &cancel, &Unobserved).unwrap_err();
    let info = vmstate::info(image).unwrap_err();
    [converts.to_vec(), vec![(error.kind(), error.chain()), (info.kind(), info.chain())]].concat()
}

#[test]
fn a_damaged_payload_is_told_alike_by_whatever_reads_it() {
    let unpacked = Unpacked::new();
    let (at, to) = (unpacked.dir.path().join("at"), unpacked.dir.path().join("to"));
    for format in ["gzip", "bzip2", "xz", "lzop", "zstd"] {
        let image = unpacked.image(format);
        let whole = std::fs::read(&image).unwrap();
        let payload = 0x10901;
        for place in [whole.len() - 20, payload + (whole.len() - payload) / 2, payload + 4000] {
            let mut bytes = whole.clone();
            bytes[place] ^= 0x10;
            std::fs::write(&at, bytes).unwrap();
            let title = format!("{format}, a byte at {place:#x}");
            let error = vmstate::check(&at).expect_err(&title);
            let begins = format!("{}: cannot be decompressed beyond 0x", at.display());
            assert!(error.chain().starts_with(&begins), "{title}: {}", error.chain());
            let expected = (Kind::Damaged, error.chain());
            for told in told_of_damage(&at, &image, &to) {
                assert_eq!(told, expected, "{title}");
            }
        }
    }
    // Of a gzip of one piece only its end says that it is damaged, and before it comes a record that is none.
    let raw = std::fs::read(unpacked.image("raw")).unwrap();
    let head = Payload::of(&open_image(&unpacked.image("gzip")).unwrap(), Path::new("gzip"), 0);
    let mut bytes = Vec::new();
    head.unwrap().head.unwrap().encode(&mut bytes);
    bytes.extend([0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3]);
    let mut stream = raw[0x10901..].to_vec();
    // More than is read at once.
    stream.resize(stream.len() + (3 << 20), 0);
    let name = stream.windows(4).position(|bytes| bytes == b"\x03ram").unwrap();
    stream[name + 11] = 9;
    let blocks = stream.chunks(0xffff);
    let last = blocks.len() - 1;
    for (i, block) in blocks.enumerate() {
        // Stored, not compressed.
        let len = block.len() as u16;
        bytes.push(u8::from(i == last));
        bytes.extend([len.to_le_bytes(), (!len).to_le_bytes()].concat());
        bytes.extend(block);
    }
    bytes.extend([0; 8]);
    std::fs::write(&at, bytes).unwrap();
    let error = vmstate::check(&at).unwrap_err();
    let begins = format!("{}: cannot be decompressed beyond {:#x} of its stream", at.display(), stream.len());
    assert!(error.chain().starts_with(&begins), "{}", error.chain());
    for told in told_of_damage(&at, &unpacked.image("gzip"), &to) {
        assert_eq!(told, (Kind::Damaged, error.chain()));
    }
}

#[test]
fn a_fault_of_a_sound_payload_is_told_with_its_place_in_what_comes_out() {
    let unpacked = Unpacked::new();
    let (at, to) = (unpacked.dir.path().join("at"), unpacked.dir.path().join("to"));
    let raw = std::fs::read(unpacked.image("raw")).unwrap();
    let head = Payload::of(&open_image(&unpacked.image("zstd")).unwrap(), Path::new("zstd"), 0);
    let mut bytes = Vec::new();
    head.unwrap().head.unwrap().encode(&mut bytes);
    // The version of RAM's section.
    let mut stream = raw[0x10901..].to_vec();
    let name = stream.windows(4).position(|bytes| bytes == b"\x03ram").unwrap();
    stream[name + 11] = 9;
    let mut compressor = Compressor::new(Codec::Zstd, bytes).unwrap();
    compressor.write_all(&stream).unwrap();
    std::fs::write(&at, compressor.finish().unwrap()).unwrap();
    let fault = format!("RAM section at {:#x}: version 9 is not 4", name - 5);
    let expected = (Kind::Unsupported, format!("{}, decompressed: {fault}", at.display()));
    for told in told_of_damage(&at, &unpacked.image("zstd"), &to) {
        assert_eq!(told, expected);
    }
    let faults = vmstate::check(&at).unwrap().report.faults;
    assert_eq!(faults.iter().map(ToString::to_string).collect::<Vec<_>>(), [fault]);
}

fn convert(from: &Path, to: &Path, format: Format) -> ConvertReport {
    let settings = ConvertSettings { sync: false, overwrite: true, ..ConvertSettings::new(from, to, format) };
    vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
        .unwrap_or_else(|error| panic!("{} to {}: {}", from.display(), format.name(), error.chain()))
}

/// What libvirt's head says, but for how the payload is kept.
fn told(image: &Path) -> (String, Option<String>, bool) {
    let head = Payload::of(&open_image(image).unwrap(), image, 0).unwrap().head.unwrap();
    (head.xml, head.cookie, head.was_running)
}

/// The device state as it stands in an image of libvirt: all sections and what describes them, byte for byte.
fn devices(image: &Path) -> Vec<u8> {
    let input = Input::open(image, 0, DirectIo::Off, &Cancel::new().unwrap()).unwrap();
    let mut source = open_source(input, None).unwrap();
    if let Pages::Flowing(pages) = source.pages().unwrap() {
        pages.for_each(&mut |_| Ok(())).unwrap();
    }
    let early = source.shape().early_bytes();
    [early, source.tail().unwrap().bytes].concat()
}

/// A file system in memory, of a length as mount wants it; unmounted at the end.
struct Small(tempfile::TempDir);

impl Small {
    fn new(size: &str) -> Small {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={size}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).status();
        assert!(mounted.unwrap().success(), "this test needs root, for a disk that is really full");
        Small(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily: what other threads start has our descriptors until its program begins.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn what_is_compressed_needs_the_room_that_it_takes_and_no_more() {
    let unpacked = Unpacked::new();
    let image = unpacked.image("raw");
    let to = |disk: &Small, format| ConvertSettings::new(&image, disk.0.path().join("to"), format);
    let run = |settings: &ConvertSettings| vmstate::convert(settings, &Cancel::new().unwrap(), &Unobserved);
    let zstd = Format::Libvirt(PayloadFormat::Zstd);
    let raw = Format::Libvirt(PayloadFormat::Raw);
    let disk = Small::new("340k");

    let error = run(&to(&disk, raw)).unwrap_err();
    let expected = format!("the file system of {} has 0 MiB left", disk.0.path().join("to").display());
    assert!(error.to_string().starts_with(&expected), "{}", error.chain());

    run(&to(&disk, zstd)).unwrap_or_else(|error| panic!("{}", error.chain()));
    let made = disk.0.path().join("to");
    assert_eq!(vmstate::check(&made).unwrap().report.faults, []);
    assert!(made.metadata().unwrap().len() < 340 << 10);

    let full = Small::new("128k");
    for format in Format::LIBVIRT.into_iter().filter(|format| format.is_compressed()) {
        let error = run(&to(&full, format)).unwrap_err();
        let what = format!("{}: {}", format.name(), error.chain());
        assert_eq!(error.kind(), Kind::Io, "{what}");
        assert_eq!(
            error.to_string(),
            format!("cannot write {}", full.0.path().join("to").display()),
            "{what}"
        );
        assert!(error.chain().ends_with("No space left on device (os error 28)"), "{what}");
        assert_eq!(std::fs::read_dir(full.0.path()).unwrap().count(), 0, "{what}");
    }
}

#[test]
fn every_format_becomes_every_other_and_says_the_same() {
    let unpacked = Unpacked::new();
    let ram = unpacked.ram();
    let (there, back) = (unpacked.dir.path().join("there"), unpacked.dir.path().join("back"));
    let full = std::env::var_os("VMSTATE_TEST_FULL").is_some();
    for from in FORMATS {
        let image = unpacked.image(from);
        let sections = devices(&image);
        // All of them from one that is a stream and one that is not; make test-full has the rest of the square.
        let all = full || ["zstd", "sparse"].contains(&from);
        for to in Format::LIBVIRT.into_iter().filter(|to| all || to.name() == "libvirt-sparse") {
            let report = convert(&image, &there, to);
            assert_eq!(report.from_format.name(), format!("libvirt-{from}"));
            let what = format!("{from} to {}", to.name());
            assert_eq!(vmstate::check(&there).unwrap().report.faults, [], "{what}");
            assert_eq!(vmstate::info(&there).unwrap().format, to.name(), "{what}");
            assert_eq!(told(&there), told(&image), "{what}");
            assert!(devices(&there) == sections, "{what}: another device state");
            convert(&there, &back, Format::MappedRam);
            assert!(memory_of(&back) == ram, "{what}: another memory");
            // What QEMU itself records is what the head says: without it a guest that ran would come back paused.
            let expected = if from == "xz" { "paused" } else { "running" };
            assert_eq!(vmstate::info(&back).unwrap().run_state.as_deref(), Some(expected), "{what}");
        }
    }
}

#[test]
fn an_image_without_a_head_gets_one_with_the_xml_that_is_given() {
    let unpacked = Unpacked::new();
    let (plain, image) = (unpacked.dir.path().join("plain"), unpacked.dir.path().join("image"));
    convert(&unpacked.image("raw"), &plain, Format::Stream);
    for format in Format::LIBVIRT {
        let settings =
            ConvertSettings { sync: false, overwrite: true, ..ConvertSettings::new(&plain, &image, format) };
        let error = vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap_err();
        assert_eq!(error.kind(), Kind::Misuse);
        let expected = "an image of libvirt needs the XML of its domain, which the source does not have";
        assert_eq!(error.to_string(), expected, "{}", format.name());
        let settings = ConvertSettings { domain_xml: Some("<domain/>\n".into()), ..settings };
        vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
        assert_eq!(told(&image), ("<domain/>\n".into(), None, true), "{}", format.name());
    }
}

#[test]
fn what_comes_out_of_little_is_not_all_believed() {
    let unpacked = Unpacked::new();
    // A stream whose device state goes on in zeroes.
    let raw = std::fs::read(unpacked.image("raw")).unwrap();
    let head = Payload::of(&open_image(&unpacked.image("zstd")).unwrap(), Path::new("zstd"), 0)
        .unwrap()
        .head
        .unwrap();
    let info = vmstate::info(&unpacked.image("raw")).unwrap();
    let devices_at = info.devices[0].offset as usize + 4096;
    let image = unpacked.dir.path().join("bomb");
    let mut bytes = Vec::new();
    head.encode(&mut bytes);
    let mut compressor = Compressor::new(Codec::Zstd, bytes).unwrap();
    compressor.write_all(&raw[0x10901..devices_at]).unwrap();
    let zeroes = vec![0; 1 << 20];
    (0..600).for_each(|_| compressor.write_all(&zeroes).unwrap());
    std::fs::write(&image, compressor.finish().unwrap()).unwrap();
    assert!(image.metadata().unwrap().len() < 2 << 20, "it is little");
    let error = vmstate::info(&image).unwrap_err();
    let expected = "more than 0x10000000 bytes of device state come out of it";
    assert_eq!(error.to_string(), format!("{}: {expected}", image.display()));
}

#[test]
fn what_is_not_whole_is_refused_before_libvirt_hears_of_it() {
    let unpacked = Unpacked::new();
    let restore = |image: &Path| {
        let settings = vmstate::DomainRestoreSettings {
            uri: "qemu:///system?socket=/nonexistent/socket".parse().unwrap(),
            image: image.to_owned(),
            xml: None,
            record: Record::AsItWas,
            direct_io: vmstate::DirectIo::Auto,
            channels: None,
            reset_nvram: false,
        };
        vmstate::restore_domain(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap_err()
    };
    for format in FORMATS {
        let image = unpacked.image(format);
        // There is no such daemon, and it is asked for only when the image was found to be whole.
        let error = restore(&image);
        assert_eq!(error.to_string(), "cannot connect to libvirt at /nonexistent/socket", "{format}");
        let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
        let len = file.metadata().unwrap().len();
        let cut = unpacked.dir.path().join("cut");
        std::fs::copy(&image, &cut).unwrap();
        OpenOptions::new().write(true).open(&cut).unwrap().set_len(len - len / 8).unwrap();
        assert_eq!(restore(&cut).kind(), Kind::Damaged, "{format}, cut");
        if matches!(format, "gzip" | "bzip2" | "xz" | "zstd") {
            let mut byte = [0];
            file.read_exact_at(&mut byte, len / 2).unwrap();
            file.write_all_at(&[byte[0] ^ 1], len / 2).unwrap();
            assert_eq!(restore(&image).kind(), Kind::Damaged, "{format}, a bit flipped");
        }
    }
}

/// Converts what somebody writes into a FIFO meanwhile.
fn convert_from_pipe(
    unpacked: &Unpacked,
    bytes: Vec<u8>,
    said: Option<Format>,
    to: &Path,
) -> Result<ConvertReport> {
    let fifo = unpacked.dir.path().join("fifo");
    if !fifo.exists() {
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
            .unwrap();
    }
    std::thread::scope(|scope| {
        // Whoever stops reading early lets the rest go.
        scope.spawn(|| drop(OpenOptions::new().write(true).open(&fifo).unwrap().write_all(&bytes)));
        let settings = ConvertSettings {
            overwrite: true,
            from_format: said,
            ..ConvertSettings::new(&fifo, to, Format::MappedRam)
        };
        vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved)
    })
}

#[test]
fn what_stands_in_a_row_is_converted_out_of_a_pipe() {
    let unpacked = Unpacked::new();
    for format in FORMATS {
        let image = unpacked.image(format);
        let (by_file, by_pipe) = (unpacked.dir.path().join("file"), unpacked.dir.path().join("pipe"));
        let bytes = std::fs::read(&image).unwrap();
        if format == "sparse" {
            let error = convert_from_pipe(&unpacked, bytes, None, &by_pipe).unwrap_err();
            assert_eq!(error.kind(), Kind::Misuse, "{format}");
            assert!(
                error.to_string().ends_with("read at offsets, which a pipe has not"),
                "{}",
                error.chain()
            );
            continue;
        }
        let settings =
            ConvertSettings { overwrite: true, ..ConvertSettings::new(&image, &by_file, Format::MappedRam) };
        vmstate::convert(&settings, &Cancel::new().unwrap(), &Unobserved).unwrap();
        let report = convert_from_pipe(&unpacked, bytes.clone(), None, &by_pipe)
            .unwrap_or_else(|error| panic!("{format}: {}", error.chain()));
        assert_eq!(report.from_format.name(), format!("libvirt-{format}"));
        let compared = vmstate::compare_files(&by_file, &by_pipe, &Cancel::new().unwrap()).unwrap();
        assert!(compared.same, "{format}: {compared:?}");
        std::fs::remove_file(&by_pipe).unwrap();
        let said = Format::Libvirt(if format == "raw" { PayloadFormat::Zstd } else { PayloadFormat::Raw });
        let error = convert_from_pipe(&unpacked, bytes.clone(), Some(said), &by_pipe).unwrap_err();
        assert!(error.to_string().contains(&format!("is a libvirt-{format} image")), "{}", error.chain());
        // Within the magic, the header, the XML, the padding, and the guest.
        for len in [5, 50, 1000, 5000, bytes.len() / 2] {
            let error = convert_from_pipe(&unpacked, bytes[..len].to_vec(), None, &by_pipe).unwrap_err();
            assert!(matches!(error.kind(), Kind::Damaged | Kind::Io), "{format}, {len}: {}", error.chain());
            assert!(!by_pipe.exists(), "{format}, {len}");
        }
    }
}

#[test]
fn an_image_in_a_pipe_says_of_its_guest_what_the_source_says() {
    let unpacked = Unpacked::new();
    let fifo = unpacked.dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    // The one of a guest that was paused, and one that ran.
    for from in ["xz", "raw"] {
        let (image, there) = (unpacked.image(from), unpacked.dir.path().join("there"));
        for to in [PayloadFormat::Raw, PayloadFormat::Zstd] {
            let bytes = std::thread::scope(|scope| {
                let reader = scope.spawn(|| std::fs::read(&fifo).unwrap());
                convert(&image, &fifo, Format::Libvirt(to));
                reader.join().unwrap()
            });
            std::fs::write(&there, bytes).unwrap();
            assert_eq!(told(&there), told(&image), "{from} to {to}");
            let compared = vmstate::compare_files(&image, &there, &Cancel::new().unwrap()).unwrap();
            assert!(compared.same, "{from} to {to}: {compared:?}");
        }
    }
}
