//! What a started program gets and what it does not.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use vmstate_mem::{Output, Program};

fn shell(script: &str, pass: Vec<OwnedFd>) -> Program {
    Program { path: "sh".into(), args: vec!["-c".into(), script.into()], pass }
}

/// A descriptor that a careless caller left to be inherited.
fn leaked() -> OwnedFd {
    let file = high(File::open("/dev/null").expect("/dev/null"));
    fcntl_setfd(&file, FdFlags::empty()).expect("a flag");
    file
}

fn passed() -> OwnedFd {
    high(File::open("/dev/zero").expect("/dev/zero"))
}

/// A duplicate with a number that no shell gives to a file of its own.
fn high(file: File) -> OwnedFd {
    fcntl_dupfd_cloexec(&file, 200).expect("a free number")
}

/// The session of this process. In a PID namespace whose sessions were made outside it is 0, which
/// the typed system call cannot say.
fn our_session() -> String {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc/self/stat");
    let (_, after_name) = stat.rsplit_once(") ").expect("a name in parentheses");
    after_name.split(' ').nth(3).expect("a session").to_owned()
}

fn run_detached(script: &str, pass: Vec<OwnedFd>) -> (u32, String) {
    let mut file = tempfile::tempfile().expect("a temporary file");
    let output = Output { stdout: Some(file.try_clone().expect("a duplicate")), stderr: None };
    let mut child = shell(script, pass).spawn_detached(output).expect("a shell");
    let pid = child.id();
    assert!(child.wait().expect("the shell").success());
    file.rewind().expect("a temporary file");
    let mut text = String::new();
    file.read_to_string(&mut text).expect("what the shell wrote");
    (pid, text)
}

#[test]
fn a_detached_program_leads_a_session_without_input_or_our_descriptors() {
    let leak = leaked();
    let given = passed();
    let number = given.as_fd().as_raw_fd();
    let script = "read -r _ _ _ _ _ session _ < /proc/$$/stat; echo $session; readlink /proc/$$/fd/0; \
                  readlink /proc/$$/fd/2; for f in /proc/$$/fd/*; do echo ${f##*/}; done";
    let (pid, text) = run_detached(script, vec![given]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..3], [pid.to_string().as_str(), "/dev/null", "/dev/null"]);
    let mut descriptors: Vec<i32> = lines[3..].iter().map(|line| line.parse().expect("a number")).collect();
    // The shell itself has the directory open while it lists it, under a low number.
    descriptors.retain(|found| *found <= 2 || *found >= 200);
    assert!(number >= 200 && leak.as_raw_fd() >= 200);
    descriptors.sort();
    assert_eq!(descriptors, [0, 1, 2, number]);
}

#[test]
fn a_passed_descriptor_has_its_number_and_is_closed_here() {
    let given = passed();
    let number = given.as_raw_fd();
    let (_, text) = run_detached(&format!("readlink /proc/$$/fd/{number}"), vec![given]);
    assert_eq!(text, "/dev/zero\n");
}

#[test]
fn a_foreground_program_keeps_our_session_and_gets_only_what_is_passed() {
    let leak = leaked();
    let given = passed();
    let session = our_session();
    let script = format!(
        "read -r _ _ _ _ _ session _ < /proc/$$/stat; test $session = {session} || exit 3; \
         test -e /proc/$$/fd/{} || exit 4; test ! -e /proc/$$/fd/{} || exit 5",
        given.as_raw_fd(),
        leak.as_raw_fd()
    );
    let mut child = shell(&script, vec![given]).spawn_foreground().expect("a shell");
    assert_eq!(child.wait().expect("the shell").code(), Some(0));
}

#[test]
fn the_environment_is_kept() {
    let (_, text) = run_detached("echo $CARGO_MANIFEST_DIR", Vec::new());
    assert_eq!(text.trim(), env!("CARGO_MANIFEST_DIR"));
}

#[test]
fn a_program_that_is_not_there_is_an_error() {
    let missing = Program { path: "/nonexistent/qemu".into(), args: Vec::new(), pass: Vec::new() };
    let refused = missing.spawn_detached(Output::default()).expect_err("no such program");
    assert_eq!(refused.kind(), std::io::ErrorKind::NotFound);
}
