//! `vmstate convert` and `vmstate compare` as a user meets them.

use std::fs::{self, File};
use std::process::Stdio;

use crate::answers::{json, keys};
use crate::{Said, booted, images, names_in, run, vmstate};

#[test]
fn an_image_is_converted_and_compared_by_files_and_pipes() {
    let qemu = booted();
    let dir = images();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (image, stream, again) = (at("vm.img"), at("vm.stream"), at("again.img"));
    assert_eq!(run(&format!("save --qmp {} {image}", qemu.qmp_path().display())).code, Some(0));
    drop(qemu);

    let converted = run(&format!("convert --json -O stream {image} {stream}"));
    assert_eq!((converted.code, converted.stderr.as_str()), (Some(0), ""));
    let report = json(&converted);
    assert_eq!(
        keys(&report),
        [
            "channels",
            "data_bytes",
            "device_bytes",
            "direct_io",
            "direct_io_reason",
            "duration_ms",
            "from_format",
            "peak_memory_bytes",
            "phases",
            "ram_bytes",
            "rate_bytes_per_s",
            "to_format",
            "zero_bytes",
        ]
    );
    assert_eq!((&report["from_format"], &report["to_format"]), (&"mapped-ram".into(), &"stream".into()));
    assert_eq!(keys(&report["phases"]), ["metadata_ms", "open_ms", "publish_ms", "ram_ms"]);

    // The standard input may be a file, and the standard output takes the image alone.
    let piped = |input: &str, output: &str, args: &[&str]| -> Said {
        let mut command = vmstate();
        command.arg("convert").args(args).stdin(File::open(input).unwrap());
        command.stdout(File::create(output).unwrap()).stderr(Stdio::piped());
        command.spawn().unwrap().wait_with_output().unwrap().into()
    };
    let said = piped(&image, &again, &["-O", "stream", "-", "-"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stderr.starts_with("converted - (mapped-ram) into - (stream) in "), "{said:?}");
    assert_eq!(fs::read(&again).unwrap(), fs::read(&stream).unwrap());
    fs::remove_file(&again).unwrap();

    let said = run(&format!("convert -f stream -O mapped-ram {stream} {again}"));
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""));
    assert!(said.stdout.starts_with(&format!("converted {stream} (stream) into {again} (mapped-ram) in ")));
    for other in [&image, &stream] {
        let same = run(&format!("compare {other} {again}"));
        assert_eq!((same.code, same.stderr.as_str()), (Some(0), ""), "{same:?}");
        assert!(same.stdout.contains(" are the same: "), "{same:?}");
    }

    // One byte of the memory of the copy.
    let place = vmstate::source::MappedRamFile::open(again.as_ref()).unwrap().layout().blocks[0].pages.start;
    let mut bytes = fs::read(&again).unwrap();
    bytes[place as usize + 0x7c10] ^= 1;
    fs::write(&again, &bytes).unwrap();
    let differ = run(&format!("compare {image} {again}"));
    assert_eq!((differ.code, differ.stderr.as_str()), (Some(1), ""));
    let expected = format!(
        "{image} (mapped-ram) and {again} (mapped-ram) differ\n  block `pc.ram`: 1 page differs, the first byte at \
         0x7c10\n    0x7000..0x8000  1 page\n"
    );
    assert_eq!(differ.stdout, expected);
    let differ = run(&format!("compare --json {image} {again}"));
    let found = json(&differ);
    assert_eq!((differ.code, &found["same"]), (Some(1), &false.into()));
    assert_eq!(
        keys(&found),
        ["blocks", "compared_bytes", "formats", "machine", "pages_different", "same", "sections"]
    );
    for options in ["--devices-only", "--ignore pc.ram"] {
        assert_eq!(run(&format!("compare {options} {image} {again}")).code, Some(0), "{options}");
    }

    // What cannot be is said, and leaves nothing.
    let before = names_in(dir.path());
    for (line, hint) in [
        (format!("convert -O stream {image} {stream}"), "give another name, or --overwrite"),
        (format!("convert -O mapped-ram {image} -"), "give a file, or -O stream"),
    ] {
        let refused = run(&line);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.ends_with(&format!("hint: {hint}\n")), "{refused:?}");
    }
    fs::write(dir.path().join("none"), "no image").unwrap();
    assert_eq!(run(&format!("compare {image} {}", at("none"))).code, Some(2));
    fs::remove_file(dir.path().join("none")).unwrap();
    assert_eq!(names_in(dir.path()), before);
}
