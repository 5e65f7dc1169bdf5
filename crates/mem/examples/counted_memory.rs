//! Looks at memory whose instructions `cargo xtask callgrind` counts. Without an argument it lists them; with the
//! name of one it does that once.
#![expect(clippy::print_stdout, reason = "a program for another program")]

use std::hint::black_box;
use std::io;
use std::ops::Range;

use page::{Mask, PageSize, WINDOW_PAGES};
use vmstate_mem::{Windows, nonzero_mask};

/// How much memory is looked at for zeros.
const SCANNED_LEN: usize = 64 << 20;
const PAGE: usize = 4096;
const WINDOW_LEN: usize = WINDOW_PAGES as usize * PAGE;
/// The guest that is planned for, and which of its pages are there: single ones, the worst that they can be.
const GUEST_LEN: u64 = 1 << 40;
const ONE_PAGE_IN: u64 = 100;

/// What is counted begins and ends here: callgrind is told this name.
#[inline(never)]
fn measured<T>(work: impl FnOnce() -> T) -> T {
    black_box(work())
}

fn scan(memory: &[u8]) -> u64 {
    let all = Mask::range(0, WINDOW_PAGES as usize);
    measured(|| {
        memory
            .chunks(WINDOW_LEN)
            // SAFETY: the pages of a whole mask, cut at its length, are the window's bytes, which are borrowed.
            .map(|window| unsafe { nonzero_mask(window.as_ptr(), window.len(), PAGE, all) })
            .map(|nonzero| u64::from(nonzero.count()))
            .sum()
    })
}

fn zero_scan() {
    assert_eq!(scan(&vec![0; SCANNED_LEN]), 0);
}

fn data_scan() {
    // The first byte of a page tells, as it does of nearly every page that holds something.
    let mut memory = vec![0; SCANNED_LEN];
    memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    assert_eq!(scan(&memory), (SCANNED_LEN / PAGE) as u64);
}

fn plan_sparse() {
    let page = PAGE as u64;
    let stride = ONE_PAGE_IN * page;
    let runs =
        (0..GUEST_LEN / stride).map(|i| -> io::Result<Range<u64>> { Ok(i * stride..i * stride + page) });
    let pages: u64 = measured(|| {
        let windows = Windows::new(runs, PageSize::X86, GUEST_LEN);
        windows.map(|window| window.map_or(0, |window| u64::from(window.mask.count()))).sum()
    });
    assert_eq!(pages, GUEST_LEN / stride);
}

const COUNTED: [(&str, fn()); 3] =
    [("zero-scan", zero_scan), ("data-scan", data_scan), ("plan-sparse", plan_sparse)];

fn main() {
    match std::env::args().nth(1) {
        None => COUNTED.iter().for_each(|(name, _)| println!("{name}")),
        Some(wanted) => {
            let found = COUNTED.iter().find(|(name, _)| *name == wanted);
            found.unwrap_or_else(|| panic!("nothing is called {wanted}")).1();
        }
    }
}
