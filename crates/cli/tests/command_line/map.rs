//! `vmstate map`: ranges that are true, changes to the page, pictures.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use crate::answers::{json, keys, stock};
use crate::{Said, booted, images, other, run};

/// A range: block, offset, bytes, kind, file offset, stride.
type Range = (String, u64, u64, String, Option<u64>, Option<u64>);

fn ranges(said: &Said) -> Vec<Range> {
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{said:?}");
    let mut ranges = Vec::new();
    for block in json(said)["blocks"].as_array().unwrap() {
        let mut at = 0;
        for range in block["ranges"].as_array().unwrap() {
            let number = |key: &str| range[key].as_u64();
            let (offset, bytes) = (number("offset").unwrap(), number("bytes").unwrap());
            assert_eq!(offset, at, "ranges lie one behind the other");
            at += bytes;
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            ranges.push((
                text(&block["name"]),
                offset,
                bytes,
                text(&range["kind"]),
                number("file_offset"),
                number("file_stride"),
            ));
        }
        assert_eq!(Some(at), block["ram_bytes"].as_u64(), "and cover their block");
    }
    ranges
}

/// Reads what the ranges say and finds it as they say.
fn check(image: &Path, ranges: &[Range]) {
    let file = fs::File::open(image).unwrap();
    let mut page = vec![0; 4096];
    let mut data = 0;
    for (block, offset, bytes, kind, at, stride) in ranges {
        let (Some(at), Some(stride)) = (at, stride) else {
            assert_ne!(kind, "data", "{block} {offset:#x}");
            continue;
        };
        for i in 0..bytes / 4096 {
            file.read_exact_at(&mut page, at + i * stride).unwrap();
            let is_zero = page.iter().all(|byte| *byte == 0);
            assert_eq!(is_zero, kind == "zero", "{block} {offset:#x}, page {i}");
            data += u64::from(!is_zero);
        }
    }
    assert!(data > 100, "{data}");
}

#[test]
fn a_map_says_where_pages_are_what_changed_and_how_it_looks() {
    let qemu = booted();
    let dir = images();
    let path = |name: &str| dir.path().join(name);
    let shown = |name: &str| path(name).display().to_string();
    let qmp = qemu.qmp_path().display().to_string();
    assert_eq!(run(&format!("save --via direct --qmp {qmp} {}", shown("a.img"))).code, Some(0));
    assert_eq!(run(&format!("save --format stream --qmp {qmp} {}", shown("s.img"))).code, Some(0));
    stock(&mut other(&qemu), &path("q.img"));

    let said = run(&format!("map --json {}", shown("a.img")));
    let mapped = ranges(&said);
    check(&path("a.img"), &mapped);
    assert_eq!(keys(&json(&said)["blocks"][0]), ["name", "page_size", "ram_bytes", "ranges"]);
    assert_eq!(json(&said)["format"], "mapped-ram");
    for name in ["s.img", "q.img"] {
        check(&path(name), &ranges(&run(&format!("map --json {}", shown(name)))));
        // The guest stood still: whoever wrote the image, and in whatever format, its memory is the same.
        let changes = ranges(&run(&format!("map --json {} {}", shown("a.img"), shown(name))));
        assert!(
            changes.iter().all(|(_, _, _, kind, ..)| ["same", "empty"].contains(&kind.as_str())),
            "{name}"
        );
    }
    // Without a scan, zero pages are those in holes of the file.
    let quick = ranges(&run(&format!("map --json --no-scan {}", shown("a.img"))));
    let sum = |ranges: &[Range], kind: &str| {
        ranges.iter().filter(|range| range.3 == kind).map(|range| range.2).sum::<u64>()
    };
    assert_eq!(sum(&quick, "hole"), sum(&mapped, "hole"));
    assert!(sum(&quick, "data") >= sum(&mapped, "data"));

    // One page other, one gone.
    fs::copy(path("a.img"), path("b.img")).unwrap();
    let (name, offset, _, _, at, _) = mapped
        .iter()
        .find(|(name, _, bytes, kind, ..)| name == "pc.ram" && kind == "data" && *bytes >= 4 * 4096)
        .unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(path("b.img")).unwrap();
    let mut page = vec![0; 4096];
    file.read_exact_at(&mut page, at.unwrap() + 4096).unwrap();
    page[4095] ^= 0xff;
    page[0] = 1;
    file.write_all_at(&page, at.unwrap() + 4096).unwrap();
    file.write_all_at(&[0; 4096], at.unwrap() + 2 * 4096).unwrap();
    let changed = |from: &str, to: &str| -> Vec<(String, u64, u64, String)> {
        let said = run(&format!("map --json {} {}", shown(from), shown(to)));
        let changed =
            ranges(&said).into_iter().filter(|range| !["same", "empty"].contains(&range.3.as_str()));
        changed.map(|(name, offset, bytes, kind, ..)| (name, offset, bytes, kind)).collect()
    };
    let range = |page: u64, kind: &str| (name.clone(), offset + page * 4096, 4096, kind.to_owned());
    assert_eq!(changed("a.img", "b.img"), [range(1, "changed"), range(2, "vanished")]);
    assert_eq!(changed("b.img", "a.img"), [range(1, "changed"), range(2, "appeared")]);

    let text = run(&format!("map {}", shown("a.img")));
    assert!(text.stdout.starts_with("pc.ram: 64 MiB\n"), "{}", text.stdout);
    assert!(text.stdout.lines().last().unwrap().starts_with("in all: "), "{}", text.stdout);

    let pictures = format!("--svg {} --png {}", shown("m.svg"), shown("m.png"));
    let nothing = Said { code: Some(0), stdout: String::new(), stderr: String::new() };
    assert_eq!(run(&format!("map {} {pictures}", shown("a.img"))), nothing);
    let again = run(&format!("map {} {pictures}", shown("a.img")));
    assert_eq!(again.code, Some(2));
    assert_eq!(
        again.stderr,
        format!("error: `{}` exists\nhint: give another name, or --overwrite\n", shown("m.svg"))
    );
    let over = run(&format!(
        "map --overwrite --layout rows --theme dark {} {} {pictures}",
        shown("a.img"),
        shown("b.img")
    ));
    assert_eq!(over, nothing);
    let svg = fs::read_to_string(path("m.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.contains("What changed from a.img to b.img"), "{svg:.200}");
    assert!(fs::read(path("m.png")).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
    assert!(svg.len() < 300_000, "{}", svg.len());
}
