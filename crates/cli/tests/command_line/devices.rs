//! `vmstate devices`: what QEMU describes, what vmstate knows, what one image tells of another.

use serde_json::Value;

use crate::answers::{json, keys, stock};
use crate::{Said, booted, images, other, run};

/// The sections of an answer, by name and instance.
fn sections(said: &Said) -> Vec<(String, Value)> {
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{said:?}");
    let answer = json(said);
    let name = |section: &Value| format!("{} {}", section["name"].as_str().unwrap(), section["instance_id"]);
    answer["sections"].as_array().unwrap().iter().map(|section| (name(section), section.clone())).collect()
}

/// Without what differs from file to file.
fn without_offsets(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("offset");
            map.remove("described_by");
            map.values_mut().for_each(without_offsets);
        }
        Value::Array(values) => values.iter_mut().for_each(without_offsets),
        _ => {}
    }
}

#[test]
fn device_state_is_told_by_the_image_by_another_or_by_vmstate() {
    let qemu = booted();
    let dir = images();
    let (ours, qemus) = (dir.path().join("ours.img"), dir.path().join("qemus.img"));
    let (ours, qemus) = (ours.display(), qemus.display());
    let said = run(&format!("save --via direct --qmp {} {ours}", qemu.qmp_path().display()));
    assert_eq!(said.code, Some(0), "{said:?}");
    stock(&mut other(&qemu), std::path::Path::new(&qemus.to_string()));

    let told = sections(&run(&format!("devices --json {qemus}")));
    assert!(told.len() > 20, "{told:?}");
    for (name, section) in &told {
        assert_eq!(section["described_by"], "image", "{name}");
        assert_eq!(
            keys(section),
            [
                "bytes",
                "described_by",
                "fields",
                "instance_id",
                "name",
                "offset",
                "problem",
                "subsections",
                "version"
            ]
        );
        assert_eq!(section["problem"], Value::Null, "{name}");
    }

    // vmstate's own image describes no field: two sections are known, the others are bytes.
    for (name, section) in sections(&run(&format!("devices --json {ours}"))) {
        let known = ["cpu 0", "globalstate 0"].contains(&name.as_str());
        assert_eq!(section["described_by"], if known { "schema".into() } else { Value::Null }, "{name}");
        if !known {
            let data = section["data"].as_str().unwrap();
            assert_eq!(data.len() as u64, 2 * section["bytes"].as_u64().unwrap(), "{name}");
        }
    }

    // The guest stood still, so what the one image tells with the help of the other is what the other tells of itself.
    let helped = sections(&run(&format!("devices --json --describe-by {qemus} {ours}")));
    assert_eq!(helped.len(), told.len());
    let mut differ = Vec::new();
    for ((name, mut told), (other, mut helped)) in told.into_iter().zip(helped) {
        assert_eq!(name, other);
        assert_eq!(helped["described_by"], "other", "{name}");
        without_offsets(&mut told);
        without_offsets(&mut helped);
        if told != helped {
            differ.push(name);
        }
    }
    // The one was saved from a guest that ran, the other from the guest that this left paused.
    assert_eq!(differ, ["globalstate 0"]);

    // A description that contradicts itself costs one section its fields, and says why.
    let lying = dir.path().join("lying.img");
    let mut bytes = std::fs::read(dir.path().join("qemus.img")).unwrap();
    let truth = br#""selector", "type": "uint32", "size": 4"#;
    let at = bytes.windows(truth.len()).position(|window| window == truth).unwrap();
    bytes[at + truth.len() - 1] = b'5';
    std::fs::write(&lying, bytes).unwrap();
    let lied = sections(&run(&format!("devices --json {}", lying.display())));
    let (name, cpu) = lied.iter().find(|(_, section)| section["problem"] != Value::Null).unwrap();
    assert_eq!((name.as_str(), &cpu["described_by"]), ("cpu 0", &Value::from("schema")));
    let problem = cpu["problem"].as_str().unwrap();
    assert!(problem.starts_with("field `env.segs` at 0x"), "{problem}");
    assert!(problem.ends_with(": has 0x14 bytes, of which 0x15 are described"), "{problem}");

    let page = run(&format!("devices {qemus} globalstate"));
    assert_eq!((page.code, page.stderr.as_str()), (Some(0), ""));
    let mut lines = page.stdout.lines();
    assert!(lines.next().unwrap().starts_with("globalstate 0 · version 1, 104 bytes at 0x"), "{page:?}");
    assert_eq!(
        lines.collect::<Vec<_>>(),
        [
            "  size                  uint32      0x7",
            "  runstate              buffer(32)  \"paused\"",
            "  has_vm_was_suspended  uint8       0x1",
            "  vm_was_suspended      uint8       0x0",
            "  unused                buffer(66)  all zero",
            "",
        ]
    );

    let none = run(&format!("devices {qemus} no-such-device"));
    assert_eq!(none.code, Some(2));
    assert_eq!(
        none.stderr,
        format!("error: {qemus} has no device section `no-such-device`\nhint: `vmstate info` lists them\n")
    );
    let mute = run(&format!("devices {qemus} --describe-by {ours}"));
    assert_eq!(mute.code, Some(2));
    let error = format!("error: {ours} does not describe its device state field by field\n");
    assert!(mute.stderr.starts_with(&error), "{mute:?}");
}
