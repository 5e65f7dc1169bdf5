//! Processes that end, memory that moves, kinds that cannot be reached, permissions that are not there.

use ::io::{Piece, Scratch, Supply};
use page::{PageRange, Window};
use vmstate_mem::{AttachError, AttachReason, GuestRam, PagemapMethod, Peer, PeerError, RecheckError};

use crate::process::{Memory, Process, block};
use crate::{MIB, PAGE, presence};

fn refuse(process: &Process, memory: Memory) -> String {
    let refused = GuestRam::attach(process.peer(), &[block("pc.ram", memory)]).expect_err("no such memory");
    assert!(matches!(refused, AttachError::Block { .. }), "{refused:?}");
    told(&refused)
}

#[test]
fn kinds_that_cannot_be_reached_say_what_they_are() {
    let mut process = Process::start();
    let unreachable = |reason: &str| format!("block `pc.ram`: cannot be reached from outside: {reason}");
    let device = process.map("device", MIB);
    if rustix::process::geteuid().is_root() {
        assert_eq!(refuse(&process, device), unreachable("memory of the device `/dev/zero`"));
    } else {
        println!("memory of devices not tested here: looking at map_files needs root");
    }
    match process.try_map("secret", MIB) {
        Ok(secret) => assert_eq!(refuse(&process, secret), unreachable("secret memory (memfd_secret)")),
        Err(reason) => println!("secret memory not tested here: memfd_secret says {reason}"),
    }
}

#[test]
fn memory_that_userfaultfd_still_fills_is_refused_until_it_is_all_there() {
    let mut process = Process::start();
    let (awaited, other) = (process.anonymous(4 * MIB), process.anonymous(MIB));
    let answer = process.tell(&format!("userfault {} {}", awaited.address + MIB, MIB));
    if answer[0] != "0" {
        println!("userfaultfd not tested here: it says error {}", answer[0]);
        return;
    }
    let text = "block `pc.ram`: cannot be reached from outside: its missing pages are still to come \
                (userfaultfd: a postcopy is under way)";
    assert_eq!(refuse(&process, awaited), text);
    GuestRam::attach(process.peer(), &[block("other", other)]).expect("nothing is awaited there");
    process.tell("close-files");
    GuestRam::attach(process.peer(), &[block("pc.ram", awaited)]).expect("nothing is awaited any more");
}

#[test]
fn a_page_that_is_lost_is_an_error_and_not_a_zero() {
    // A poisoned page of userfaultfd reads as one that the hardware has lost does: not at all.
    let mut process = Process::start();
    let memory = process.anonymous(MIB);
    process.fill(memory, 0, 10 * PAGE, 1);
    let lost = memory.address + 20 * PAGE;
    let answer = process.tell(&format!("poison {lost} {PAGE}"));
    if answer[0] != "0" {
        println!(
            "poisoned pages not tested here: userfaultfd says error {} (Linux has them since 6.6)",
            answer[0]
        );
        return;
    }
    process.tell("close-files");
    let ram = GuestRam::attach(process.peer(), &[block("pc.ram", memory)]).expect("private memory");
    for method in [PagemapMethod::Auto, PagemapMethod::Entries] {
        let found = presence(&ram, 0, method).expect("pagemap");
        let expected = [PageRange::new(0, 10), PageRange::new(20, 21)];
        assert_eq!(found.runs().collect::<Vec<_>>(), expected, "{method:?}");
    }
    let window = ram.windows(0).expect("pagemap").next().expect("a window").expect("a window");
    let mut scratch = Scratch::new(MIB as usize).expect("a slab");
    let refused = ram.supply(&ram.piece(0, &window, 0), &mut scratch).map(drop).expect_err("a lost page");
    assert_eq!(refused.to_string(), format!("block `pc.ram` at address {lost:#x}"));
}

#[test]
fn memory_that_is_not_all_there_is_refused_with_the_address() {
    let mut process = Process::start();
    let memory = process.anonymous(4 * MIB);
    let hole = memory.address + MIB;
    process.tell(&format!("protect {hole} {PAGE} 0"));
    let text =
        format!("block `pc.ram`: cannot be reached from outside: the mapping at {hole:#x} is not readable");
    assert_eq!(refuse(&process, memory), text);
    process.tell(&format!("unmap {hole} {PAGE}"));
    assert_eq!(refuse(&process, memory), format!("block `pc.ram`: nothing is mapped at {hole:#x}"));
}

#[test]
fn a_file_that_ends_amid_the_block_is_refused() {
    let mut process = Process::start();
    let memfd = process.memfd(4 * MIB, false);
    process.tell(&format!("truncate {MIB}"));
    let text = "block `pc.ram`: cannot be reached from outside: its file ends at 0x100000, amid the block";
    assert_eq!(refuse(&process, memfd.memory), text);
}

#[test]
fn a_memfd_that_shrinks_while_it_is_read_is_an_error_and_no_crash() {
    let mut process = Process::start();
    let memfd = process.memfd(4 * MIB, false);
    process.fill(memfd.memory, 0, 4 * MIB, 1);
    let ram = GuestRam::attach(process.peer(), &[block("pc.ram", memfd.memory)]).expect("a memfd");
    let windows: Vec<Window> =
        ram.windows(0).expect("SEEK_DATA").map(|window| window.expect("a window")).collect();
    process.tell(&format!("truncate {}", 2 * MIB));
    let mut scratch = Scratch::new(MIB as usize).expect("a slab");
    let mut supply = |window: &Window| ram.supply(&ram.piece(0, window, 0), &mut scratch).map(drop);
    supply(&windows[1]).expect("what is still there");
    let refused = supply(&windows[2]).expect_err("what is gone");
    assert_eq!(refused.kind(), std::io::ErrorKind::UnexpectedEof);
    let address = memfd.memory.address + 2 * MIB;
    assert_eq!(refused.to_string(), format!("block `pc.ram` at address {address:#x}"));
}

#[test]
fn memory_that_goes_away_is_an_error_that_names_block_and_address() {
    let mut process = Process::start();
    let memory = process.anonymous(4 * MIB);
    process.fill(memory, 0, 4 * MIB, 1);
    let ram = GuestRam::attach(process.peer(), &[block("pc.ram", memory)]).expect("private memory");
    let window = ram.windows(0).expect("pagemap").next().expect("a window").expect("a window");
    let gone = memory.address + 100 * PAGE;
    process.tell(&format!("unmap {gone} {PAGE}"));
    let mut scratch = Scratch::new(MIB as usize).expect("a slab");
    let refused = ram.supply(&ram.piece(0, &window, 0), &mut scratch).map(drop).expect_err("a hole");
    assert_eq!(refused.to_string(), format!("block `pc.ram` at address {gone:#x}"));
    let source = refused.get_ref().and_then(|fault| fault.source()).expect("what the system said");
    assert!(source.to_string().contains("Bad address"), "{source}");
    let moved = ram.recheck().expect_err("a hole");
    let text = format!("block `pc.ram` at {:#x} was mapped anew while it was read", memory.address);
    assert_eq!(moved.to_string(), text);
}

#[test]
fn a_process_that_has_ended_has_no_pages_and_says_so() {
    let mut process = Process::start();
    let memory = process.anonymous(4 * MIB);
    let memfd = process.memfd(4 * MIB, true);
    process.fill(memory, 0, 4 * MIB, 1);
    let peer = process.peer();
    let blocks = [block("private", memory), block("shared", memfd.memory)];
    let ram = GuestRam::attach(peer.clone(), &blocks).expect("two blocks");
    let started = ram.windows(0).expect("pagemap");
    let window = ram.windows(0).expect("pagemap").next().expect("a window").expect("a window");
    process.end();

    assert!(!peer.is_alive());
    assert!(!peer.is_same());
    let ended = started.collect::<Result<Vec<Window>, _>>().expect_err("a dead process");
    assert_eq!(ended.raw_os_error(), Some(libc::ESRCH));
    for method in [PagemapMethod::Auto, PagemapMethod::Entries] {
        presence(&ram, 0, method).expect_err("a dead process");
    }
    let mut scratch = Scratch::new(MIB as usize).expect("a slab");
    let refused = ram.supply(&ram.piece(0, &window, 0), &mut scratch).map(drop).expect_err("a dead process");
    assert_eq!(refused.to_string(), format!("block `private` at address {:#x}", memory.address));
    let gone = format!("process {} is gone", process.pid());
    let rechecked = ram.recheck().expect_err("a dead process");
    assert!(matches!(rechecked, RecheckError::Peer(PeerError::Gone { .. })), "{rechecked:?}");
    assert_eq!(rechecked.to_string(), gone);
    assert_eq!(GuestRam::attach(peer.clone(), &blocks).expect_err("a dead process").to_string(), gone);
    assert_eq!(peer.holds(0, 0).expect_err("a dead process").to_string(), gone);
    assert_eq!(Peer::open(process.pid()).expect_err("a dead process").to_string(), gone);
}

#[test]
fn a_process_of_another_user_is_refused_with_a_hint() {
    if !rustix::process::geteuid().is_root() {
        println!("another user's process not tested here: becoming another user needs root");
        return;
    }
    let target = Process::start();
    let mut stranger = Process::start();
    assert_eq!(stranger.tell("become-user 65534"), ["0"]);
    let said = stranger.tell(&format!("look-into {}", target.pid())).join(" ");
    let pid = target.pid();
    assert!(
        said.starts_with(&format!("no permission for the memory map of process {pid}; denied; ")),
        "{said}"
    );
    assert!(said.contains("run as root"), "{said}");
}

#[test]
fn pieces_that_are_no_windows_are_refused() {
    let mut process = Process::start();
    let memory = process.anonymous(2 * MIB);
    let ram = GuestRam::attach(process.peer(), &[block("pc.ram", memory)]).expect("private memory");
    let mut scratch = Scratch::new(MIB as usize).expect("a slab");
    let whole = Piece { region: 0, offset: 0, target: 0, grain: PAGE as u32, len: MIB as u32, mask: [0; 4] };
    for (piece, text) in [
        (Piece { region: 1, ..whole }, "no region 1 among 1"),
        (Piece { offset: PAGE, ..whole }, "piece of 0x100000 bytes at 0x1000 is no window of block `pc.ram`"),
        (
            Piece { offset: 2 * MIB, ..whole },
            "piece of 0x100000 bytes at 0x200000 is no window of block `pc.ram`",
        ),
        (Piece { grain: 1024, ..whole }, "piece of 0x100000 bytes at 0x0 is no window of block `pc.ram`"),
        (
            Piece { len: PAGE as u32, mask: [2, 0, 0, 0], ..whole },
            "piece of 0x1000 bytes at 0x0 is no window of block `pc.ram`",
        ),
    ] {
        let refused = ram.supply(&piece, &mut scratch).map(drop).expect_err(text);
        assert_eq!((refused.kind(), refused.to_string().as_str()), (std::io::ErrorKind::InvalidInput, text));
    }
}

#[test]
fn blocks_that_cannot_be_are_refused_by_name() {
    let process = Process::start();
    let mut wrong = block("pc.rom", Memory { address: 0x1234, length: PAGE });
    let refused = GuestRam::attach(process.peer(), &[wrong.clone()]).expect_err("amid a page");
    assert_eq!(told(&refused), "block `pc.rom`: it starts at 0x1234, amid a page");
    (wrong.address, wrong.page_size) = (0, 3);
    let refused = GuestRam::attach(process.peer(), &[wrong]).expect_err("no page size");
    let AttachError::Block { reason: AttachReason::Implausible { text }, .. } = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!(text, "a page size of 0x3 bytes");
}

/// An error and its reason, as whoever prints the chain tells them.
fn told(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(reason) => format!("{error}: {reason}"),
        None => error.to_string(),
    }
}
