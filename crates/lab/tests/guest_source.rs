//! The committed boot image is what its source assembles to.

use std::path::Path;
use std::process::Command;
use std::{fs, io};

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error: io::Error| panic!("{program} is needed to assemble the guest: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_committed_image_is_what_the_source_assembles_to() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/guest.S");
    let dir = tempfile::tempdir().unwrap();
    let object = dir.path().join("guest.o");
    let binary = dir.path().join("guest.bin");
    let text = |path: &Path| path.to_str().expect("a path of text").to_owned();

    run("as", &["--64", "-o", &text(&object), &text(&source)]);
    run(
        "ld",
        &[
            "-m",
            "elf_x86_64",
            "-Ttext",
            "0x7c00",
            "--oformat",
            "binary",
            "-o",
            &text(&binary),
            &text(&object),
        ],
    );

    let committed = include_bytes!("../guest/guest.bin");
    assert!(
        fs::read(&binary).unwrap() == committed,
        "guest/guest.bin is not what guest/guest.S assembles to; run `make guest`"
    );
    assert_eq!(committed.len(), 1024);
    assert_eq!(committed[510..512], [0x55, 0xaa], "the firmware would not boot it");
}
