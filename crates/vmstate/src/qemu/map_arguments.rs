//! QEMU's arguments, rewritten so that RAM blocks are mapped from an image.
//!
//! Only what says where the memory comes from is touched. Whether QEMU understood it as it is meant here is
//! looked at afterwards, in its address space: nothing depends on this page knowing every option.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde_json::{Map, Value};

use crate::{Error, Kind, Result};

/// A RAM block of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageBlock {
    /// Its idstr: the id of its backend, or `/objects/ID` for machines of QEMU 3.1 and before.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// Where in the image's file its pages begin.
    pub offset: u64,
}

/// What became of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapArguments {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// The blocks that are mapped, by their place in the list given.
    pub mapped: Vec<usize>,
    /// What the user may want to know: a clause each.
    pub notes: Vec<String>,
}

/// What the name of every memory backend's type starts with.
const BACKEND: &str = "memory-backend-";
/// The properties that say where memory comes from, and so go. `discard-data` would have QEMU throw the
/// image's pages away when it ends.
const SOURCE: [&str; 11] = [
    "mem-path",
    "offset",
    "share",
    "readonly",
    "rom",
    "align",
    "discard-data",
    "pmem",
    "seal",
    "hugetlb",
    "hugetlbsize",
];
/// Devices whose memory backend is not RAM that may be replaced: their memory outlives the guest, or comes and goes.
const OWN_MEMORY: [&str; 3] = ["nvdimm", "virtio-pmem", "virtio-mem"];
/// What in an argument shows that another process needs the memory, too.
const SHARERS: [&str; 2] = ["vhost-user", "vfio-user"];
/// The names that boards give to their RAM where nobody else does.
const BOARD_RAM: [&str; 3] = ["pc.ram", "mach-virt.ram", "ram"];

/// Rewrites a command line so that every block of the image that is RAM of the board, or of a memory backend,
/// is a private mapping of the file `path`, which QEMU opens for reading.
///
/// Backends are told by their ids, which are the names of their blocks. Where the board makes its RAM itself
/// (`-m`, and neither `memory-backend=` nor nodes with `memdev=`), it gets a backend of the name that the
/// image has.
///
/// # Errors
/// [`Kind::Unsupported`] for what cannot be mapped, [`Kind::Incompatible`] where the memory is another than
/// the image's; each with a hint.
pub fn map_arguments(command: &[OsString], blocks: &[ImageBlock], path: &str) -> Result<MapArguments> {
    let scan = Scan::of(command);
    scan.refuse()?;
    let mut out = MapArguments { command: command.to_vec(), mapped: Vec::new(), notes: Vec::new() };
    for object in &scan.objects {
        let Some(index) = blocks.iter().position(|block| object.is(&block.name)) else { continue };
        if scan.own_memory.contains(&object.id) {
            continue;
        }
        let block = &blocks[index];
        object.refuse(block)?;
        if object.is_shared() {
            out.notes
                .push(format!("`{}` is private to QEMU, although its backend says share=on", block.name));
        }
        out.command[object.at] = object.mapped(block, path)?;
        out.mapped.push(index);
    }
    if let Some(id) = &scan.memory_backend {
        let is_in_image = |block: &ImageBlock| block.name == *id || block.name == format!("/objects/{id}");
        if !blocks.iter().any(is_in_image) {
            let has = main_block(blocks, &[]).map_or("", |index| &blocks[index].name);
            return Err(Error::new(
                Kind::Incompatible,
                format!("target's RAM is the memory backend `{id}`, image has no such block"),
            )
            .hint(format!("give the backend the id `{has}`")));
        }
    } else if !scan.has_node_memory {
        let Some(index) = main_block(blocks, &out.mapped) else {
            return Err(Error::new(Kind::Unsupported, "the image has no RAM that could be mapped"));
        };
        let block = &blocks[index];
        if let Some(has) = scan.memory_bytes.filter(|has| *has != block.length) {
            return Err(
                length_differs(block, has).hint(format!("start the target with -m {}M", block.length >> 20))
            );
        }
        let id = block.name.strip_prefix("/objects/").unwrap_or(&block.name);
        let object =
            format!("memory-backend-file,id={},size={},{}", escaped(id), block.length, source(block, path));
        let machine = format!("memory-backend={}", escaped(id));
        out.command.extend(["-object", &object, "-machine", &machine].map(OsString::from));
        out.mapped.push(index);
    }
    let largest = blocks.iter().map(|block| block.length).max();
    if !out.mapped.iter().any(|index| Some(blocks[*index].length) == largest) {
        return Err(Error::new(
            Kind::Unsupported,
            "none of the target's memory backends is RAM of the image",
        )
        .hint("give the backends the ids that they had when the guest was saved, or --mode eager"));
    }
    Ok(out)
}

/// Whether an error of QEMU's says that it does not know what a mapped backend is told: `rom` came with 8.2,
/// `offset` with 8.1.
pub fn is_too_old_to_map(text: &str) -> bool {
    // The latter is what 7.2 says, which knows the properties of each object from its schema.
    ["rom", "offset"].iter().any(|property| {
        text.contains(&format!("Property 'memory-backend-file.{property}' not found"))
            || text.contains("memory-backend-file")
                && text.contains(&format!("Invalid parameter '{property}'"))
    })
}

/// The board's RAM among blocks that are no backend's: by name, or else the largest.
fn main_block(blocks: &[ImageBlock], taken: &[usize]) -> Option<usize> {
    let free = || (0..blocks.len()).filter(|index| !taken.contains(index));
    let by_name = free().find(|index| BOARD_RAM.contains(&blocks[*index].name.as_str()));
    by_name.or_else(|| free().max_by_key(|index| blocks[*index].length))
}

fn length_differs(block: &ImageBlock, has: u64) -> Error {
    Error::new(
        Kind::Incompatible,
        format!("target has {has:#x} bytes for `{}`, image has {:#x}", block.name, block.length),
    )
}

fn unsupported(clause: String, hint: &str) -> Error {
    Error::new(Kind::Unsupported, clause).hint(hint)
}

/// The properties that make a backend a private mapping.
fn source(block: &ImageBlock, path: &str) -> String {
    format!("mem-path={},offset={},share=off,readonly=on,rom=off", escaped(path), block.offset)
}

/// What was found in a command line.
#[derive(Default)]
struct Scan {
    objects: Vec<Object>,
    /// The backend that the machine is told to use.
    memory_backend: Option<String>,
    /// What `-m` says, where it is understood.
    memory_bytes: Option<u64>,
    /// Whether nodes have backends.
    has_node_memory: bool,
    /// Ids of backends that devices own.
    own_memory: Vec<String>,
    /// Why nothing can be mapped.
    obstacle: Option<(String, &'static str)>,
}

impl Scan {
    fn of(command: &[OsString]) -> Scan {
        let mut scan = Scan::default();
        let mut at = 1;
        while at < command.len() {
            let bytes = command[at].as_bytes();
            let name = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-")).unwrap_or_default();
            let value = command.get(at + 1).map(|value| String::from_utf8_lossy(value.as_bytes()));
            match (std::str::from_utf8(name).unwrap_or_default(), value) {
                ("mem-prealloc", _) => scan.prevent(
                    "-mem-prealloc would copy the whole image at the start".to_owned(),
                    "leave it out, or restore with --mode eager",
                ),
                ("", _) | (_, None) => {}
                (name, Some(value)) => {
                    if scan.option(name, &value, at + 1) {
                        at += 1;
                    }
                }
            }
            at += 1;
        }
        scan
    }

    fn prevent(&mut self, clause: String, hint: &'static str) {
        self.obstacle.get_or_insert((clause, hint));
    }

    /// Looks at an option with its value, which is argument `at`. Whether it is one that takes a value for sure.
    fn option(&mut self, name: &str, value: &str, at: usize) -> bool {
        match name {
            "object" => self.objects.extend(Object::parse(value, at)),
            "machine" | "M" => {
                let found = pairs(value).into_iter().rev().find(|(key, _)| key == "memory-backend");
                self.memory_backend = found.map(|(_, id)| id).or(self.memory_backend.take());
            }
            "m" => {
                let size = pairs(value).into_iter().find_map(|(key, value)| match value.is_empty() {
                    true => Some(key),
                    false => (key == "size").then_some(value),
                });
                self.memory_bytes = size.and_then(|size| bytes_of(&size, 1 << 20)).or(self.memory_bytes);
            }
            "numa" => self.has_node_memory |= pairs(value).iter().any(|(key, _)| key == "memdev"),
            "mem-path" => self.prevent(
                format!("-mem-path {value} says where the memory comes from"),
                "leave it out: it comes from the image; or restore with --mode eager",
            ),
            "overcommit" if pairs(value).iter().any(|(key, is)| key == "mem-lock" && is_on(is)) => self
                .prevent(
                    "-overcommit mem-lock would copy the whole image at the start".to_owned(),
                    "leave it out, or restore with --mode eager",
                ),
            "device" | "netdev" | "chardev" | "fsdev" => self.device(value),
            _ => return false,
        }
        true
    }

    fn device(&mut self, value: &str) {
        let (kind, memory) = match serde_json::from_str::<Value>(value) {
            Ok(json) => {
                let text = |key: &str| json[key].as_str().map(str::to_owned);
                (text("driver").or_else(|| text("type")).unwrap_or_default(), text("memdev"))
            }
            Err(_) => {
                let pairs = pairs(value);
                let memory = pairs.iter().find(|(key, _)| key == "memdev").map(|(_, id)| id.clone());
                (pairs.first().map(|(key, _)| key.clone()).unwrap_or_default(), memory)
            }
        };
        if OWN_MEMORY.iter().any(|name| kind.starts_with(name)) {
            self.own_memory.extend(memory);
        }
        if SHARERS.iter().any(|name| kind.starts_with(name)) {
            self.prevent(
                format!("`{kind}` needs memory that another process shares, and a mapped image is private"),
                "restore with --mode eager",
            );
        }
        if kind.starts_with("vfio-") {
            self.prevent(
                format!("`{kind}` pins the guest's memory, which would copy the whole image at the start"),
                "restore with --mode eager",
            );
        }
    }

    fn refuse(&self) -> Result<()> {
        match &self.obstacle {
            Some((clause, hint)) => Err(unsupported(clause.clone(), hint)),
            None => Ok(()),
        }
    }
}

/// A memory backend among the arguments.
struct Object {
    /// Which argument it is.
    at: usize,
    kind: String,
    id: String,
    form: Form,
}

/// The two ways to write one.
enum Form {
    Pairs(Vec<(String, String)>),
    Json(Map<String, Value>),
}

impl Object {
    fn parse(value: &str, at: usize) -> Option<Object> {
        let form = match value.trim_start().starts_with('{') {
            true => match serde_json::from_str(value).ok()? {
                Value::Object(json) => Form::Json(json),
                _ => return None,
            },
            false => Form::Pairs(pairs(value)),
        };
        let property = |key: &str| match &form {
            Form::Json(json) => json.get(key).and_then(Value::as_str).map(str::to_owned),
            Form::Pairs(pairs) => last(pairs, key),
        };
        let implied = match &form {
            Form::Pairs(pairs) => pairs.first().filter(|(_, is)| is.is_empty()).map(|(kind, _)| kind.clone()),
            Form::Json(_) => None,
        };
        let kind = property("qom-type").or(implied).filter(|kind| kind.starts_with(BACKEND))?;
        Some(Object { at, kind, id: property("id")?, form })
    }

    /// Whether it is the backend of the block of that name.
    fn is(&self, block: &str) -> bool {
        block == self.id || block.strip_prefix("/objects/") == Some(&self.id)
    }

    fn property(&self, key: &str) -> Option<String> {
        match &self.form {
            Form::Pairs(pairs) => last(pairs, key),
            Form::Json(json) => match json.get(key)? {
                Value::String(text) => Some(text.clone()),
                Value::Bool(is) => Some(if *is { "on" } else { "off" }.to_owned()),
                other => Some(other.to_string()),
            },
        }
    }

    fn is_on(&self, key: &str) -> bool {
        self.property(key).is_some_and(|value| is_on(&value))
    }

    /// A memfd and POSIX shared memory are shared unless told otherwise.
    fn is_shared(&self) -> bool {
        let default = matches!(self.kind.as_str(), "memory-backend-memfd" | "memory-backend-shm");
        self.property("share").map_or(default, |value| is_on(&value))
    }

    /// Refuses what a mapping of an image cannot take the place of.
    fn refuse(&self, block: &ImageBlock) -> Result<()> {
        let name = &block.name;
        let eager = "restore with --mode eager";
        let refuse = |clause: String| Err(unsupported(clause, eager));
        if let Some(has) =
            self.property("size").and_then(|size| bytes_of(&size, 1)).filter(|has| *has != block.length)
        {
            let hint = format!("give the backend `{}` a size of {}M", self.id, block.length >> 20);
            return Err(length_differs(block, has).hint(hint));
        }
        let path = self.property("mem-path");
        if self.is_on("hugetlb") || path.as_deref().is_some_and(on_huge_pages) {
            return refuse(format!("`{name}` is on huge pages, which no image's file is"));
        }
        if self.is_on("pmem") {
            return refuse(format!("`{name}` is persistent memory"));
        }
        if self.is_on("prealloc") {
            let clause = format!("`{name}` has prealloc=on, which would copy the whole image at the start");
            return Err(unsupported(clause, "leave it out, or restore with --mode eager"));
        }
        match path {
            Some(path) if self.is_shared() => {
                refuse(format!("`{name}` is the shared file {path}, which others may look into"))
            }
            _ => Ok(()),
        }
    }

    /// The same backend, as a mapping of the image.
    fn mapped(&self, block: &ImageBlock, path: &str) -> Result<OsString> {
        match &self.form {
            Form::Pairs(pairs) => {
                let mut text = "memory-backend-file".to_owned();
                for (key, value) in pairs {
                    let is_type = value.is_empty() && *key == self.kind || key == "qom-type";
                    if !is_type && !SOURCE.contains(&key.as_str()) {
                        text.push_str(&format!(",{key}={}", escaped(value)));
                    }
                }
                text.push(',');
                text.push_str(&source(block, path));
                Ok(text.into())
            }
            Form::Json(json) => {
                let mut json: Map<_, _> =
                    json.clone().into_iter().filter(|(key, _)| !SOURCE.contains(&key.as_str())).collect();
                json.insert("qom-type".into(), "memory-backend-file".into());
                json.insert("mem-path".into(), path.into());
                json.insert("offset".into(), block.offset.into());
                json.insert("share".into(), false.into());
                json.insert("readonly".into(), true.into());
                json.insert("rom".into(), "off".into());
                Ok(OsString::from_vec(Value::Object(json).to_string().into_bytes()))
            }
        }
    }
}

/// The pairs of an option's value as QEMU reads it (util/qemu-option.c, util/keyval.c): commas part them, two
/// commas are one of the value. What has no `=` is a key alone.
fn pairs(text: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let mut part = String::new();
        loop {
            let (before, after) = rest.split_once(',').map_or((rest, None), |(b, a)| (b, Some(a)));
            part.push_str(before);
            match after {
                Some(after) if after.starts_with(',') => {
                    part.push(',');
                    rest = &after[1..];
                }
                after => {
                    rest = after.unwrap_or_default();
                    break;
                }
            }
        }
        let (key, value) = part.split_once('=').unwrap_or((&part, ""));
        pairs.push((key.to_owned(), value.to_owned()));
    }
    pairs
}

fn last(pairs: &[(String, String)], key: &str) -> Option<String> {
    pairs.iter().rev().find(|(is, _)| is == key).map(|(_, value)| value.clone())
}

fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

/// QEMU's words for yes (qapi/qapi-util.c `qapi_bool_parse`).
fn is_on(value: &str) -> bool {
    matches!(value, "on" | "yes" | "true" | "y")
}

/// A size as QEMU reads it, in a unit of `unit` bytes where it names none; `None` for fractions and whatever
/// else is left to QEMU.
fn bytes_of(text: &str, unit: u64) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => unit,
        "b" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// Whether a path, or the directory that it is to be made in, lies on hugetlbfs.
fn on_huge_pages(path: &str) -> bool {
    const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
    let path = std::path::Path::new(path);
    [Some(path), path.parent()]
        .into_iter()
        .flatten()
        .find_map(|path| rustix::fs::statfs(path).ok())
        .is_some_and(
            #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
            |found| found.f_type as u32 as u64 == HUGETLBFS_MAGIC,
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, mib: u64, offset: u64) -> ImageBlock {
        ImageBlock { name: name.to_owned(), length: mib << 20, offset }
    }

    fn image() -> Vec<ImageBlock> {
        vec![block("pc.ram", 1024, 0x10_0000), block("vga.vram", 16, 0x4010_0000)]
    }

    fn nodes() -> Vec<ImageBlock> {
        vec![
            block("node0", 512, 0x10_0000),
            block("/objects/node1", 256, 0x2010_0000),
            block("pc.bios", 1, 0),
        ]
    }

    fn rewrite(line: &str, blocks: &[ImageBlock]) -> Result<MapArguments> {
        let command: Vec<_> = format!("qemu {line}").split_whitespace().map(OsString::from).collect();
        map_arguments(&command, blocks, "/proc/self/fd/9")
    }

    fn check(line: &str, blocks: &[ImageBlock], expected: &str) {
        let found = rewrite(line, blocks).unwrap_or_else(|error| panic!("{line}: {}", error.chain()));
        let words: Vec<_> = found.command.iter().map(|word| word.to_string_lossy()).collect();
        assert_eq!(words.join(" "), format!("qemu {expected}"), "{line}");
    }

    fn refused(line: &str, blocks: &[ImageBlock], expected: &str) {
        let error = rewrite(line, blocks).expect_err(line);
        assert_eq!(error.to_string(), expected, "{line}");
        assert!(error.hint_text().is_some(), "{line}");
    }

    const FROM: &str = "mem-path=/proc/self/fd/9,offset=1048576,share=off,readonly=on,rom=off";

    #[test]
    fn the_boards_own_ram_gets_a_backend_of_the_images_name() {
        for line in [
            "-machine q35 -m 1G",
            "-M pc -m size=1024,slots=2,maxmem=4G",
            "-m 1048576k",
            "--m 1024M",
            "-m 1.0G",
        ] {
            let added = format!(
                "{line} -object memory-backend-file,id=pc.ram,size=1073741824,{FROM} -machine memory-backend=pc.ram"
            );
            check(line, &image(), &added);
        }
        let named = [block("ram,0", 64, 0x10_0000)];
        check(
            "-m 64",
            &named,
            &format!(
                "-m 64 -object memory-backend-file,id=ram,,0,size=67108864,{FROM} -machine memory-backend=ram,,0"
            ),
        );
    }

    #[test]
    fn a_backend_is_replaced_where_it_stands() {
        for (object, kept) in [
            ("memory-backend-ram,id=pc.ram,size=1G", "id=pc.ram,size=1G"),
            ("qom-type=memory-backend-ram,id=pc.ram,size=1G,share=off", "id=pc.ram,size=1G"),
            (
                "memory-backend-ram,size=1073741824,id=pc.ram,merge=off,prealloc=off",
                "size=1073741824,id=pc.ram,merge=off,prealloc=off",
            ),
            (
                "memory-backend-memfd,id=pc.ram,size=1024M,share=on,hugetlb=off,seal=on",
                "id=pc.ram,size=1024M",
            ),
            (
                "memory-backend-file,id=pc.ram,size=1G,mem-path=/x,,y,align=4096,discard-data=on",
                "id=pc.ram,size=1G",
            ),
            (
                "memory-backend-ram,id=pc.ram,size=1G,host-nodes=0-1,policy=bind",
                "id=pc.ram,size=1G,host-nodes=0-1,policy=bind",
            ),
        ] {
            check(
                &format!("-object {object} -machine q35,memory-backend=pc.ram -m 1G"),
                &image(),
                &format!(
                    "-object memory-backend-file,{kept},{FROM} -machine q35,memory-backend=pc.ram -m 1G"
                ),
            );
        }
        check(
            r#"-machine memory-backend=pc.ram -object {"qom-type":"memory-backend-memfd","id":"pc.ram","size":1073741824,"share":true,"host-nodes":[0]}"#,
            &image(),
            r#"-machine memory-backend=pc.ram -object {"host-nodes":[0],"id":"pc.ram","mem-path":"/proc/self/fd/9","offset":1048576,"qom-type":"memory-backend-file","readonly":true,"rom":"off","share":false,"size":1073741824}"#,
        );
    }

    #[test]
    fn every_node_is_mapped_from_its_own_place() {
        let line = "-object memory-backend-ram,id=node0,size=512M -object memory-backend-ram,id=node1,size=256M \
                    -numa node,memdev=node0 -numa node,memdev=node1 -m 768";
        let other = FROM.replace("1048576", &0x2010_0000.to_string());
        let line_expected = format!(
            "-object memory-backend-file,id=node0,size=512M,{FROM} -object memory-backend-file,id=node1,size=256M,{other} \
             -numa node,memdev=node0 -numa node,memdev=node1 -m 768"
        );
        check(line, &nodes(), &line_expected);
        assert_eq!(rewrite(line, &nodes()).unwrap().mapped, [0, 1]);
    }

    #[test]
    fn memory_of_a_device_stays_as_it_is() {
        let blocks = [block("pc.ram", 1024, 0x10_0000), block("nv", 64, 0x4010_0000)];
        let object =
            "-object memory-backend-file,id=nv,size=64M,mem-path=/pmem,share=on -device nvdimm,memdev=nv";
        check(
            &format!("-m 1G {object}"),
            &blocks,
            &format!(
                "-m 1G {object} -object memory-backend-file,id=pc.ram,size=1073741824,{FROM} -machine memory-backend=pc.ram"
            ),
        );
    }

    #[test]
    fn what_cannot_be_mapped_is_refused_by_name() {
        let with =
            |object: &str| format!("-m 1G -machine memory-backend=pc.ram -object {object},id=pc.ram,size=1G");
        for (line, expected) in [
            (with("memory-backend-memfd,hugetlb=on"), "`pc.ram` is on huge pages, which no image's file is"),
            (with("memory-backend-file,pmem=on,mem-path=/x"), "`pc.ram` is persistent memory"),
            (
                with("memory-backend-ram,prealloc=on"),
                "`pc.ram` has prealloc=on, which would copy the whole image at the start",
            ),
            (
                with("memory-backend-file,mem-path=/dev/shm/x,share=on"),
                "`pc.ram` is the shared file /dev/shm/x, which others may look into",
            ),
            (
                with("memory-backend-memfd") + " -device vhost-user-fs-pci,chardev=c",
                "`vhost-user-fs-pci` needs memory that another process shares, and a mapped image is private",
            ),
            (
                r#"-m 1G -netdev {"type":"vhost-user","id":"n"}"#.to_owned(),
                "`vhost-user` needs memory that another process shares, and a mapped image is private",
            ),
            (
                "-m 1G -device vfio-pci,host=1".to_owned(),
                "`vfio-pci` pins the guest's memory, which would copy the whole image at the start",
            ),
            ("-m 1G -mem-prealloc".to_owned(), "-mem-prealloc would copy the whole image at the start"),
            (
                "-m 1G -mem-path /dev/hugepages".to_owned(),
                "-mem-path /dev/hugepages says where the memory comes from",
            ),
            (
                "-m 1G -overcommit mem-lock=on".to_owned(),
                "-overcommit mem-lock would copy the whole image at the start",
            ),
            ("-m 2G".to_owned(), "target has 0x80000000 bytes for `pc.ram`, image has 0x40000000"),
            (
                "-machine memory-backend=ram0 -object memory-backend-ram,id=ram0,size=1G".to_owned(),
                "target's RAM is the memory backend `ram0`, image has no such block",
            ),
            (
                "-machine memory-backend=pc.ram -object memory-backend-ram,id=pc.ram,size=512M".to_owned(),
                "target has 0x20000000 bytes for `pc.ram`, image has 0x40000000",
            ),
            (
                "-numa node,memdev=a -object memory-backend-ram,id=a,size=1G".to_owned(),
                "none of the target's memory backends is RAM of the image",
            ),
        ] {
            refused(&line, &image(), expected);
        }
    }

    #[test]
    fn a_shared_memfd_becomes_private_and_is_told_of() {
        let line = "-machine memory-backend=pc.ram -object memory-backend-memfd,id=pc.ram,size=1G";
        let notes = rewrite(line, &image()).unwrap().notes;
        assert_eq!(notes, ["`pc.ram` is private to QEMU, although its backend says share=on"]);
    }

    #[test]
    fn values_are_taken_apart_as_qemu_does() {
        for (text, expected) in [
            ("", &[][..]),
            ("a", &[("a", "")]),
            ("a,b=c", &[("a", ""), ("b", "c")]),
            ("a=b,,c,d=e", &[("a", "b,c"), ("d", "e")]),
            ("a=,,,b=c", &[("a", ","), ("b", "c")]),
            ("a=b=c", &[("a", "b=c")]),
        ] {
            let found = pairs(text);
            let found: Vec<_> = found.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn a_qemu_that_is_too_old_is_known_by_its_words() {
        for (text, expected) in [
            ("-object …: Property 'memory-backend-file.offset' not found", true),
            ("Property 'memory-backend-file.rom' not found", true),
            ("Property 'memory-backend-ram.rom' not found", false),
            ("-object memory-backend-file,id=pc.ram,rom=off: Invalid parameter 'rom'", true),
            ("-object memory-backend-ram,id=pc.ram,rom=off: Invalid parameter 'rom'", false),
        ] {
            assert_eq!(is_too_old_to_map(text), expected, "{text}");
        }
    }
}
