//! What the verbs that look into images have in common: names, signals, pictures that cost no image.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;

use rustix::pipe::{fcntl_setpipe_size, pipe};
use rustix::process::{Pid, Signal, kill_process};

use crate::answers::json;
use crate::{Said, booted, images, names_in, run, vmstate};

const VERBS: [&str; 4] = ["info", "check", "map", "devices"];

/// An image of a guest, and the directory that it is alone in.
fn saved() -> (tempfile::TempDir, String) {
    let qemu = booted();
    let dir = images();
    let image = dir.path().join("vm.img").display().to_string();
    let said = run(&format!("save --via direct --qmp {} {image}", qemu.qmp_path().display()));
    assert_eq!(said.code, Some(0), "{said:?}");
    (dir, image)
}

/// Runs vmstate in a directory, with a standard input.
fn run_in(dir: &Path, stdin: Stdio, line: &str) -> Said {
    vmstate().args(line.split_whitespace()).current_dir(dir).stdin(stdin).output().unwrap().into()
}

#[test]
fn a_pipe_is_refused_with_what_helps_and_a_file_may_come_by_the_standard_input() {
    let (dir, image) = saved();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    for verb in VERBS {
        for name in ["-", "fifo"] {
            let refused = run_in(dir.path(), Stdio::piped(), &format!("{verb} {name}"));
            let expected = format!(
                "error: {name}: a pipe is read once, and its pages are wanted in another order\n\
                 hint: convert it into a file first\n"
            );
            assert_eq!((refused.code, refused.stderr), (Some(2), expected), "{verb}");
        }
        let named = run(&format!("{verb} --json {image}"));
        assert_eq!(named.code, Some(0), "{verb}: {named:?}");
        let piped = run_in(dir.path(), File::open(&image).unwrap().into(), &format!("{verb} --json -"));
        assert_eq!(piped, named, "{verb}");
    }
}

#[test]
fn a_question_by_signal_ends_no_verb() {
    let (_dir, image) = saved();
    // Each says more than the pipe holds, so it has begun when something can be read, and has not ended.
    for line in ["map --svg -", "devices", "info --json"] {
        let (reader, writer) = pipe().unwrap();
        fcntl_setpipe_size(&writer, 4096).unwrap();
        let mut command = vmstate();
        let mut child = command.args(line.split_whitespace()).arg(&image).stdout(writer).spawn().unwrap();
        drop(command);
        let (mut reader, mut first) = (File::from(reader), [0]);
        reader.read_exact(&mut first).unwrap();
        kill_process(Pid::from_child(&child), Signal::USR1).unwrap();
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{line}");
        assert!(rest.len() > 4096, "{line}: {} bytes", rest.len());
    }
}

#[test]
fn a_picture_never_replaces_an_image_and_is_whole_when_it_has_its_name() {
    let (dir, image) = saved();
    let at = |name: &str| dir.path().join(name);
    fs::hard_link(&image, at("linked.img")).unwrap();
    symlink(&image, at("symbolic.img")).unwrap();
    fs::copy(&image, at("later.img")).unwrap();
    let before = fs::read(&image).unwrap();
    let names = names_in(dir.path());
    let own = "hint: give --svg and --png names of their own\n";
    for (pictures, expected) in [
        (
            "--png vm.img",
            "error: vm.img is the image itself, which the picture would replace\nhint: give another name\n",
        ),
        (
            "--svg ./linked.img",
            "error: ./linked.img is the image itself, which the picture would replace\nhint: give another name\n",
        ),
        (
            "--png symbolic.img",
            "error: symbolic.img is the image itself, which the picture would replace\nhint: give another name\n",
        ),
        (
            "--png later.img",
            "error: later.img is the image itself, which the picture would replace\nhint: give another name\n",
        ),
        ("--svg m --png ./m", &format!("error: m cannot be both pictures\n{own}")),
        ("--svg - --png -", &format!("error: - cannot be both pictures\n{own}")),
        (
            "--svg - --json",
            "error: the standard output takes a picture or one JSON object, and not both\n\
                            hint: give the picture the name of a file\n",
        ),
    ] {
        let refused =
            run_in(dir.path(), Stdio::null(), &format!("map --overwrite vm.img later.img {pictures}"));
        assert_eq!((refused.code, refused.stderr.as_str()), (Some(2), expected), "{pictures}");
        assert_eq!(names_in(dir.path()), names, "{pictures}");
        assert!(fs::read(&image).unwrap() == before, "{pictures}");
    }

    let said = run_in(dir.path(), Stdio::null(), "map vm.img --svg -");
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""));
    assert!(said.stdout.starts_with("<svg ") && said.stdout.trim_end().ends_with("</svg>"), "{said:?}");
    assert_eq!(names_in(dir.path()), names, "no file is called -");

    // Whoever has the old picture open keeps it: the new one is another file, and nothing else is left.
    fs::write(at("m.svg"), "the old one").unwrap();
    let mut old = File::open(at("m.svg")).unwrap();
    let said = run_in(dir.path(), Stdio::null(), "map --overwrite vm.img --svg m.svg");
    assert_eq!(said, Said { code: Some(0), stdout: String::new(), stderr: String::new() });
    let mut text = String::new();
    old.read_to_string(&mut text).unwrap();
    assert_eq!(text, "the old one");
    assert!(fs::read_to_string(at("m.svg")).unwrap().starts_with("<svg "));
    fs::remove_file(at("m.svg")).unwrap();
    assert_eq!(names_in(dir.path()), names);
}

#[test]
fn the_later_image_has_an_offset_of_its_own() {
    let (dir, image) = saved();
    let place = dir.path().join("place").display().to_string();
    fs::write(&place, vec![7; 1 << 20]).unwrap();
    let moved = run(&format!("convert -O mapped-ram --offset 1M {image} {place}"));
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let said = run(&format!("map --json --other-offset 1M {image} {place}"));
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""));
    let answer = json(&said);
    assert!(answer["same_bytes"].as_u64().unwrap() > 1 << 20, "{answer}");
    assert_eq!(answer.get("changed_bytes"), None);
    assert_eq!(run(&format!("map --json {image} {place}")).code, Some(2));
}
