//! Where the RAM blocks lie in a QEMU that does not say: before 8.0, `info ramblock` has no host addresses.
//!
//! Two sources, and each checks the other. `info mtree -f` and `gpa2hva` give the address of what is mapped into the
//! guest's address space, by the name of its memory region, which is only the end of the block's. What is not
//! mapped there (option ROMs, the tables that firmware fetches) is found by QEMU's own record of each block, in
//! its heap: a block's offset, used and total length stand side by side in it, close before its name, exactly as
//! `info ramblock` shows them, and the host address a few words before those. How many words is learnt from the
//! blocks that `gpa2hva` knows, so that nothing but "close together" is assumed of the record.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use mem::{Mapping, Mappings, Peer};

use super::HostBlock;
use crate::qmp::Client;
use crate::{Error, Kind, Result};

/// The most stretches of guest-physical space that are asked for per block. Those of `pc.ram` are about ten.
const STRETCHES_PER_BLOCK_MAX: usize = 64;
/// The most memory that is searched for records. QEMU's heap has some tens of MiB.
const SEARCH_LEN_MAX: u64 = 1 << 30;
/// A mapping that is larger is no heap of a thread's allocator: those are of 64 MiB.
const ARENA_LEN_MAX: u64 = 64 << 20;
/// How much is read at once.
const CHUNK_LEN: usize = 1 << 20;
/// How far before the lengths the host address may stand, and how far after them the name may begin.
const RECORD_REACH: usize = 64;
/// The longest idstr with its NUL (`RAMBlock.idstr`, include/exec/ramblock.h, QEMU 7.2).
const IDSTR_LEN_MAX: usize = 256;
/// What must be in hand before and after a place to judge it.
const AFTER_LEN: usize = 24 + RECORD_REACH + IDSTR_LEN_MAX;

/// The blocks with an address each, where QEMU has not told them.
///
/// # Errors
/// [`Kind::Unsupported`] where a block's address cannot be proven, naming the block; others as every QMP command.
pub fn with_addresses(client: &mut Client, peer: &Peer, blocks: &[HostBlock]) -> Result<Vec<HostBlock>> {
    if blocks.iter().all(|block| block.address.is_some()) {
        return Ok(blocks.to_vec());
    }
    let mapped = ask_mapped(client, blocks)?;
    let mappings = peer
        .mappings()
        .map_err(|error| Error::new(Kind::Unsupported, "QEMU's memory map cannot be read").because(error))?;
    let records = search(peer, &mappings, blocks, &mapped)?;
    blocks
        .iter()
        .enumerate()
        .map(|(index, block)| {
            let address = decide(block, mapped.get(&index).copied(), records.of(index))?;
            if let Err(gap) = mappings.covering(address, block.total_length) {
                return Err(unproven(block, format!("{gap}, inside of the block")));
            }
            Ok(HostBlock { address: Some(address), ..block.clone() })
        })
        .collect()
}

/// What both sources say of a block, made one.
fn decide(block: &HostBlock, mapped: Option<u64>, recorded: &[u64]) -> Result<u64> {
    match (mapped, recorded) {
        // A record that was freed may stand beside the one in use, so one that agrees is enough.
        (Some(mapped), recorded) if recorded.is_empty() || recorded.contains(&mapped) => Ok(mapped),
        (Some(mapped), recorded) => {
            Err(unproven(block, format!("`gpa2hva` says {mapped:#x} and QEMU's record {:#x}", recorded[0])))
        }
        (None, [address]) => Ok(*address),
        (None, []) => Err(unproven(block, "it is not mapped into the guest and has no record".to_owned())),
        (None, several) => Err(unproven(block, format!("there are {} records of it", several.len()))),
    }
}

fn unproven(block: &HostBlock, why: String) -> Error {
    let clause =
        format!("this QEMU does not tell where `{}` is, and it could not be found: {why}", block.name);
    Error::new(Kind::Unsupported, clause)
}

/// A stretch of guest-physical space that is a part of a memory region of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stretch {
    start: u64,
    region: String,
    offset: u64,
}

/// Asks `gpa2hva` for every stretch of RAM in the guest's address space; returns addresses by the block's index.
fn ask_mapped(client: &mut Client, blocks: &[HostBlock]) -> Result<BTreeMap<usize, u64>> {
    let stretches = flat_view(&client.human("info mtree -f")?);
    let mut found = BTreeMap::new();
    for (index, block) in blocks.iter().enumerate() {
        let of_block = stretches.iter().filter(|stretch| {
            // Two displays have a region `vga.vram` each: only its block's whole name tells them apart.
            let mut owners = blocks.iter().filter(|other| is_of(&other.name, &stretch.region));
            owners.next() == Some(block) && owners.next().is_none()
        });
        for stretch in of_block.take(STRETCHES_PER_BLOCK_MAX) {
            let answer = client.human(&format!("gpa2hva {:#x}", stretch.start))?;
            // What is mapped changes while the guest runs: the answer names the region that is there now.
            let Some(address) = host_address(&answer, &stretch.region) else { continue };
            let base = address.checked_sub(stretch.offset).filter(|base| *base != 0);
            match (base, found.insert(index, base.unwrap_or_default())) {
                (None, _) => {
                    return Err(unproven(block, format!("{address:#x} is before its own beginning")));
                }
                (Some(base), Some(before)) if base != before => {
                    return Err(unproven(
                        block,
                        format!("its parts give different addresses, {before:#x} and {base:#x}"),
                    ));
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

/// Whether a block is that of a region: its name is the region's, behind the path of a device.
fn is_of(block: &str, region: &str) -> bool {
    block.strip_suffix(region).is_some_and(|path| path.is_empty() || path.ends_with('/'))
}

/// The RAM in the view of `info mtree -f` that `gpa2hva` looks into, the one whose root is `system`
/// (softmmu/memory.c:mtree_print_flatview, QEMU 7.2):
/// `  0000000100000000-00000001bfffffff (prio 0, ram): pc.ram @0000000080000000 KVM`.
fn flat_view(text: &str) -> Vec<Stretch> {
    text.lines()
        .skip_while(|line| line.trim() != "Root memory region: system")
        .skip(1)
        .take_while(|line| !line.trim().is_empty() && !line.starts_with("FlatView"))
        .filter_map(stretch)
        .collect()
}

fn stretch(line: &str) -> Option<Stretch> {
    let (range, rest) = line.trim().split_once(" (prio ")?;
    let (kind, name) = rest.split_once("): ")?;
    let (_, kind) = kind.split_once(", ")?;
    if !matches!(kind.strip_prefix("nv-").unwrap_or(kind), "ram" | "rom" | "romd") {
        return None;
    }
    let start = u64::from_str_radix(range.split_once('-')?.0, 16).ok()?;
    let name = name.strip_suffix(" KVM").unwrap_or(name);
    let (region, offset) = match name.rsplit_once(" @") {
        Some((region, offset)) => (region, u64::from_str_radix(offset, 16).ok()?),
        None => (name, 0),
    };
    Some(Stretch { start, region: region.to_owned(), offset })
}

/// Reads `Host virtual address for 0x0 (pc.ram) is 0x7f5b6fe00000` where it is about `region`.
fn host_address(answer: &str, region: &str) -> Option<u64> {
    let (_, rest) = answer.trim().split_once(" (")?;
    let (name, address) = rest.rsplit_once(") is 0x")?;
    (name == region).then(|| u64::from_str_radix(address, 16).ok())?
}

/// The places in QEMU's memory that look like the record of a block.
#[derive(Debug, Default)]
struct Records {
    /// By the block's index: the words before the lengths, the nearest first.
    places: BTreeMap<usize, Vec<Vec<u64>>>,
    /// By the block's index, once the distance is known: each address that a record gives, once.
    addresses: BTreeMap<usize, Vec<u64>>,
}

impl Records {
    fn of(&self, index: usize) -> &[u64] {
        self.addresses.get(&index).map_or(&[], Vec::as_slice)
    }

    /// Learns from the blocks in `mapped` where in a record the address stands, and reads the others' from there.
    fn resolve(&mut self, mapped: &BTreeMap<usize, u64>) {
        let agrees = |distance: &usize| {
            let known = |(index, address): (&usize, &u64)| {
                let places = self.places.get(index)?;
                Some(places.iter().any(|words| words.get(*distance) == Some(address)))
            };
            let answers: Vec<bool> = mapped.iter().filter_map(known).collect();
            !answers.is_empty() && answers.iter().all(|agrees| *agrees)
        };
        let mut distances = (0..RECORD_REACH / 8).filter(agrees);
        self.addresses.clear();
        // More than one would be a coincidence, and none to build on.
        let (Some(distance), None) = (distances.next(), distances.next()) else { return };
        for (index, places) in &self.places {
            let mut addresses: Vec<u64> = places
                .iter()
                .filter_map(|words| words.get(distance).copied())
                .filter(|word| *word != 0)
                .collect();
            addresses.sort_unstable();
            addresses.dedup();
            self.addresses.insert(*index, addresses);
        }
    }
}

/// Searches the heap, and where that does not do the heaps of threads, for the records of the blocks.
fn search(
    peer: &Peer,
    mappings: &Mappings,
    blocks: &[HostBlock],
    mapped: &BTreeMap<usize, u64>,
) -> Result<Records> {
    let failed = |error| Error::new(Kind::Unsupported, "QEMU's heap cannot be read").because(error);
    let memory = File::open(format!("/proc/{}/mem", peer.pid())).map_err(failed)?;
    if !peer.is_same() {
        return Err(Error::new(Kind::Peer, "QEMU has ended"));
    }
    let is_heap = |mapping: &&Mapping| mapping.path == "[heap]";
    let is_arena = |mapping: &&Mapping| {
        mapping.path.is_empty() && !mapping.is_shared && mapping.end - mapping.start <= ARENA_LEN_MAX
    };
    let is_readable = |mapping: &&Mapping| mapping.is_readable;
    let all = mappings.as_slice();
    let heaps = all.iter().filter(is_heap).chain(all.iter().filter(is_arena)).filter(is_readable);
    let mut records = Records::default();
    let mut left = SEARCH_LEN_MAX;
    for heap in heaps {
        left = match left.checked_sub(heap.end - heap.start) {
            Some(left) => left,
            None => break,
        };
        search_mapping(&memory, heap, blocks, &mut records.places);
        records.resolve(mapped);
        let is_known = |index| mapped.contains_key(&index) || !records.of(index).is_empty();
        if (0..blocks.len()).all(is_known) {
            break;
        }
    }
    Ok(records)
}

/// Searches one mapping, chunk by chunk; each begins early enough that no record is cut in two.
fn search_mapping(
    memory: &File,
    heap: &Mapping,
    blocks: &[HostBlock],
    places: &mut BTreeMap<usize, Vec<Vec<u64>>>,
) {
    let mut chunk = vec![0; CHUNK_LEN];
    let mut at = heap.start;
    while at < heap.end {
        let len = (heap.end - at).min(CHUNK_LEN as u64) as usize;
        let Some(bytes) = chunk.get_mut(..len) else { return };
        let len = read_up_to(memory, bytes, at);
        let is_last = len < bytes.len() || at + len as u64 == heap.end;
        let bytes = &bytes[..len];
        // What is too near to the end is judged with the next chunk, what is too near to the start was with the last.
        let judged = if is_last { len } else { len - AFTER_LEN };
        let first = if at == heap.start { 0 } else { RECORD_REACH };
        for place in (first..judged).step_by(8) {
            if let Some((index, words)) = record_at(bytes, place, blocks) {
                places.entry(index).or_default().push(words);
            }
        }
        if is_last {
            return;
        }
        at += (judged - RECORD_REACH) as u64;
    }
}

/// Reads into `bytes` as far as there is something, and says how far: a heap may shrink while it is read, and what is left of
/// it is as good as before.
fn read_up_to(memory: &File, bytes: &mut [u8], at: u64) -> usize {
    let mut len = 0;
    while let Some(rest) = bytes.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match memory.read_at(rest, at + len as u64) {
            Ok(more) if more > 0 => len += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    len
}

/// The block whose offset, used and total length stand at `place`, with its name behind them; and the words before.
fn record_at(bytes: &[u8], place: usize, blocks: &[HostBlock]) -> Option<(usize, Vec<u64>)> {
    let total = word(bytes, place + 16)?;
    let used = word(bytes, place + 8)?;
    // Nearly every place ends here.
    if used == 0 || used > total {
        return None;
    }
    let offset = word(bytes, place)?;
    let is_it = |block: &HostBlock| {
        (block.offset, block.used_length, block.total_length) == (offset, used, total)
            && is_named(bytes.get(place + 24..).unwrap_or_default(), &block.name)
    };
    let index = blocks.iter().position(is_it)?;
    let words = (1..=RECORD_REACH / 8).map_while(|n| word(bytes, place.checked_sub(n * 8)?)).collect();
    Some((index, words))
}

fn is_named(bytes: &[u8], name: &str) -> bool {
    (0..RECORD_REACH).any(|at| {
        bytes
            .get(at..)
            .and_then(|rest| rest.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..)?.first_chunk::<8>().copied()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From QEMU 7.2 with `-M q35 -m 5G -vga std`, shortened.
    const FLAT_VIEWS: &str = "\
FlatView #0
 AS \"I/O\", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000fe000000-00000000fe000fff (prio 0, nv-ram): my dimm @0000000000001000 KVM
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

FlatView #2
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram
";

    #[test]
    fn the_view_that_gpa2hva_looks_into_is_read() {
        let rows: Vec<_> = flat_view(FLAT_VIEWS).into_iter().map(|s| (s.start, s.region, s.offset)).collect();
        let row = |start, region: &str, offset| (start, region.to_owned(), offset);
        assert_eq!(
            rows,
            [
                row(0, "pc.ram", 0),
                row(0xc0000, "pc.ram", 0xc0000),
                row(0xfd00_0000, "vga.vram", 0),
                row(0xfe00_0000, "my dimm", 0x1000),
                row(0xfffc_0000, "pc.bios", 0),
            ]
        );
        assert_eq!(flat_view("nothing\nof the kind"), []);
    }

    #[test]
    fn an_answer_counts_for_its_own_region_only() {
        let answer = "Host virtual address for 0x0 (pc.ram) is 0x7f5b6fe00000\r\n";
        assert_eq!(host_address(answer, "pc.ram"), Some(0x7f5b_6fe0_0000));
        assert_eq!(host_address(answer, "pc.rom"), None);
        assert_eq!(host_address("No memory is mapped at address 0x80000000", "pc.ram"), None);
    }

    #[test]
    fn a_block_is_of_the_region_that_its_name_ends_with() {
        for (block, region, expected) in [
            ("pc.ram", "pc.ram", true),
            ("0000:00:01.0/vga.vram", "vga.vram", true),
            ("0000:00:01.0/vga.vram", "vram", false),
            ("vga.vram", "0000:00:01.0/vga.vram", false),
        ] {
            assert_eq!(is_of(block, region), expected, "{block} {region}");
        }
    }

    fn block(name: &str, offset: u64, used_length: u64, total_length: u64) -> HostBlock {
        HostBlock { name: name.to_owned(), page_size: 4096, offset, used_length, total_length, address: None }
    }

    /// A record as QEMU 7.2 has it on 64-bit hosts.
    fn record(host: u64, block: &HostBlock) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [0, 0, 0x5630, host, 0, block.offset, block.used_length, block.total_length, 0x5631] {
            bytes.extend_from_slice(&u64::to_ne_bytes(word));
        }
        bytes.extend_from_slice(&[0x10, 0, 0, 0]);
        bytes.extend_from_slice(block.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8) + 256, 0);
        bytes
    }

    fn records(heap: &[u8], blocks: &[HostBlock], mapped: &BTreeMap<usize, u64>) -> Records {
        let mut records = Records::default();
        for place in (0..heap.len()).step_by(8) {
            if let Some((index, words)) = record_at(heap, place, blocks) {
                records.places.entry(index).or_default().push(words);
            }
        }
        records.resolve(mapped);
        records
    }

    #[test]
    fn what_gpa2hva_knows_teaches_where_the_others_stand() {
        let blocks =
            [block("pc.ram", 0, 0x4000_0000, 0x4000_0000), block("a/x.rom", 0x4000_0000, 0x1000, 0x2000)];
        let mut heap = vec![0; 128];
        heap.extend(record(0x7f00_0000_0000, &blocks[0]));
        heap.extend(record(0x7f11_0000_0000, &blocks[1]));
        let mapped = BTreeMap::from([(0, 0x7f00_0000_0000)]);
        assert_eq!(records(&heap, &blocks, &mapped).of(1), [0x7f11_0000_0000]);
        // Nothing to learn from, or what was learnt contradicts.
        assert_eq!(records(&heap, &blocks, &BTreeMap::new()).of(1), [0; 0]);
        assert_eq!(records(&heap, &blocks, &BTreeMap::from([(0, 0x7f00_0000_1000)])).of(1), [0; 0]);
        // A name that only begins like it, and lengths that are not those, are other blocks.
        for other in
            [block("a/x.rom2", 0x4000_0000, 0x1000, 0x2000), block("a/x.rom", 0x4000_0000, 0x800, 0x2000)]
        {
            let heap = [record(0x7f00_0000_0000, &blocks[0]), record(0x7f11_0000_0000, &other)].concat();
            assert_eq!(records(&heap, &blocks, &mapped).of(1), [0; 0], "{other:?}");
        }
    }

    #[test]
    fn a_heap_that_has_shrunk_since_it_was_listed_is_searched_to_its_end() {
        let blocks = [block("pc.ram", 0, 0x4000_0000, 0x4000_0000)];
        let memory = tempfile::tempfile().unwrap();
        let before = CHUNK_LEN as u64 + 4096;
        memory.write_all_at(&record(0x7f00_0000_0000, &blocks[0]), before).unwrap();
        let heap = Mapping {
            start: 0,
            end: 4 * CHUNK_LEN as u64,
            is_readable: true,
            is_writable: true,
            is_shared: false,
            offset: 0,
            device: 0,
            inode: 0,
            path: "[heap]".into(),
        };
        let mut places = BTreeMap::new();
        search_mapping(&memory, &heap, &blocks, &mut places);
        assert_eq!(places.get(&0).map(Vec::len), Some(1));
        // Nothing at all is left of it.
        let mut places = BTreeMap::new();
        search_mapping(&tempfile::tempfile().unwrap(), &heap, &blocks, &mut places);
        assert!(places.is_empty());
    }

    #[test]
    fn an_address_is_proven_or_refused_by_name() {
        let block = block("a/x.rom", 0, 0x1000, 0x1000);
        assert_eq!(decide(&block, Some(1), &[]).unwrap(), 1);
        assert_eq!(decide(&block, Some(1), &[1, 2]).unwrap(), 1);
        assert_eq!(decide(&block, None, &[2]).unwrap(), 2);
        for (mapped, recorded, why) in [
            (Some(1), &[2][..], "`gpa2hva` says 0x1 and QEMU's record 0x2"),
            (None, &[], "it is not mapped into the guest and has no record"),
            (None, &[1, 2], "there are 2 records of it"),
        ] {
            assert_eq!(
                decide(&block, mapped, recorded).unwrap_err().to_string(),
                format!("this QEMU does not tell where `a/x.rom` is, and it could not be found: {why}")
            );
        }
    }
}
