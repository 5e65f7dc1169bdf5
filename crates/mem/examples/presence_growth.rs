//! How long it takes to find out which pages are there, against the size of the memory and what of it was touched.
//!
//! The memory is reserved in this process and has no more pages than those that are touched, evenly spread. Each costs
//! a page of memory and, where they are far apart, a page table; single ones are the worst that they can be. It takes
//! 7 GiB of memory.
#![expect(clippy::print_stdout, reason = "it prints a table")]

use std::sync::Arc;
use std::time::Instant;

use vmstate_mem::{GuestRam, PagemapMethod, Peer, Reserved};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// How often each is measured.
const TIMES: usize = 7;

/// Sizes in GiB, how many pages apart the touched ones are, and how many are side by side.
const CASES: [(u64, u64, u64); 8] = [
    (1, 100, 1),
    (8, 100, 1),
    (16, 100, 1),
    (64, 100, 1),
    (64, 25_600, 256),
    (256, 1000, 1),
    (512, 100, 1),
    (1024, 10_000, 1),
];

fn main() {
    println!("| memory | touched | side by side | by | pages | median | min – max |");
    println!("|---:|---:|---:|---|---:|---:|---:|");
    for (gib, apart, run) in CASES {
        let mut reserved = Reserved::private(gib * GIB).expect("address space");
        reserved.touch(apart * PAGE, run * PAGE).expect("memory");
        let peer = Arc::new(Peer::open(std::process::id()).expect("this process"));
        let ram = GuestRam::attach(peer, &[reserved.block()]).expect("memory of its own");
        for (name, method) in
            [("PAGEMAP_SCAN", PagemapMethod::Scan), ("/proc/PID/pagemap", PagemapMethod::Entries)]
        {
            if let Err(error) = ram.windows_by(0, method) {
                println!("| {gib} GiB | | {run} | {name} | | {error} | |");
                continue;
            }
            let mut pages = 0;
            let mut took = [0.0; TIMES];
            for took in &mut took {
                let started = Instant::now();
                let windows = ram.windows_by(0, method).expect("it was there just now");
                pages = windows.map(|window| u64::from(window.expect("a window").mask.count())).sum();
                *took = started.elapsed().as_secs_f64() * 1000.0;
            }
            took.sort_by(f64::total_cmp);
            let (min, median, max) = (took[0], took[TIMES / 2], took[TIMES - 1]);
            let percent = 100.0 * run as f64 / apart as f64;
            println!(
                "| {gib} GiB | {percent} % | {run} | {name} | {pages} | {median:.1} ms | {min:.1} – {max:.1} ms |"
            );
        }
    }
}
