//! How long it takes to find out which pages are there, against the size of the memory and what of it was touched.
//!
//! The memory is reserved in this process and has no more pages than those that are touched, evenly spread. Each costs
//! a page of memory and, where they are far apart, a page table; single ones are the worst that they can be.
#![expect(clippy::print_stdout, reason = "it prints a table")]

use std::sync::Arc;
use std::time::Instant;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vmstate_mem::{BlockAddress, GuestRam, PagemapMethod, Peer};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;

/// Sizes in GiB, how many pages apart the touched ones are, and how many are side by side.
const CASES: [(u64, u64, u64); 7] = [
    (1, 100, 1),
    (16, 100, 1),
    (64, 100, 1),
    (64, 25_600, 256),
    (64, 10_000, 1),
    (256, 1000, 1),
    (1024, 10_000, 1),
];

fn main() {
    println!("| memory | touched | side by side | by | pages | time |\n|---:|---:|---:|---|---:|---:|");
    for (gib, apart, run) in CASES {
        let length = gib * GIB;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let (null, access) = (std::ptr::null_mut(), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping at an address that the kernel chooses touches nobody's memory.
        let base = unsafe { mmap_anonymous(null, length as usize, access, flags) }.expect("address space");
        // Or each page that is touched would be a huge one, and the memory of this machine gone.
        // SAFETY: the advice changes nobody's bytes.
        unsafe { rustix::mm::madvise(base, length as usize, rustix::mm::Advice::LinuxNoHugepage) }
            .expect("advice");
        for page in (0..length / PAGE).filter(|page| page % apart < run) {
            // SAFETY: the byte lies in the mapping, which is writable and this program's alone.
            unsafe { base.cast::<u8>().wrapping_add((page * PAGE) as usize).write_volatile(1) };
        }
        let address = base.addr() as u64;
        let block = BlockAddress { name: "reserved".into(), address, length, page_size: PAGE };
        let peer = Arc::new(Peer::open(std::process::id()).expect("this process"));
        let ram = GuestRam::attach(peer, &[block]).expect("memory of its own");
        for (name, method) in
            [("PAGEMAP_SCAN", PagemapMethod::Scan), ("/proc/PID/pagemap", PagemapMethod::Entries)]
        {
            let started = Instant::now();
            let pages: u64 = match ram.windows_by(0, method) {
                Ok(windows) => windows.map(|window| u64::from(window.expect("a window").mask.count())).sum(),
                Err(error) => {
                    println!("| {gib} GiB | | {run} | {name} | | {error} |");
                    continue;
                }
            };
            let took = started.elapsed().as_secs_f64() * 1000.0;
            let percent = 100.0 * run as f64 / apart as f64;
            println!("| {gib} GiB | {percent} % | {run} | {name} | {pages} | {took:.0} ms |");
        }
        // SAFETY: the mapping made above, to which nothing refers any more.
        unsafe { rustix::mm::munmap(base, length as usize) }.expect("a mapping");
    }
}
