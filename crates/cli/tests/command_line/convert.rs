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
        ["blocks", "compared_bytes", "domain", "formats", "machine", "pages_different", "same", "sections"]
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

#[test]
fn what_is_given_for_the_xml_of_a_domain_is_one() {
    let dir = images();
    let at = |name: &str| dir.path().join(name).display().to_string();
    fs::write(at("passwords"), "root:x:0:0:root:/root:/bin/bash\n").unwrap();
    fs::write(at("network.xml"), "<network><name>default</name></network>\n").unwrap();
    let before = names_in(dir.path());
    for (xml, expected) in [
        ("passwords", "error: the description of the domain is no XML: unknown token at 1:1\n"),
        ("network.xml", "error: the description of the domain is a <network>, and not a <domain>\n"),
    ] {
        for line in [
            format!("save --qmp /no/such/monitor --format libvirt-raw --xml {} {}", at(xml), at("out")),
            format!("convert -O libvirt-raw --xml {} {} {}", at(xml), at("none"), at("out")),
        ] {
            let refused = run(&line);
            assert_eq!(refused.code, Some(2), "{line}: {refused:?}");
            let hint = "hint: give what `virsh dumpxml --migratable --security-info DOMAIN` prints\n";
            assert_eq!(refused.stderr, format!("{expected}{hint}"), "{line}");
            assert_eq!(names_in(dir.path()), before, "{line}");
        }
    }
}

#[test]
fn buffers_that_differ_are_told_as_text() {
    let qemu = booted();
    let dir = images();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (ran, stopped) = (at("ran.img"), at("stopped.img"));
    for (option, image) in [("--running", &ran), ("--paused", &stopped)] {
        let said = run(&format!("save {option} --via direct --qmp {} {image}", qemu.qmp_path().display()));
        assert_eq!(said.code, Some(0), "{said:?}");
    }
    // The clock of the host goes on while the guest stands still.
    let said = run(&format!("compare --ignore mc146818rtc {ran} {stopped}"));
    let expected = format!(
        "{ran} (mapped-ram) and {stopped} (mapped-ram) differ\n  device `globalstate` 0: first at byte 0x3\n    \
         size: 0x8 and 0x7\n    runstate: \"running\" and \"paused\"\n"
    );
    assert_eq!((said.code, said.stdout), (Some(1), expected));
}
