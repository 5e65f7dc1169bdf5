//! The Linux guest in a real QEMU: one boot, with every device that the suites plug in.

use std::time::Duration;

use vmstate_lab::{Count, LinuxGuest, LinuxSettings, MachineKind, QemuSpec};

const DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn it_counts_with_one_digest_and_its_network_and_disk_work() {
    let dir = tempfile::tempdir().unwrap();
    let linux = LinuxGuest::build(dir.path(), LinuxSettings { disk: true, ..Default::default() }).unwrap();
    let mut spec = QemuSpec::new(MachineKind::Q35, 512 << 20);
    spec.guest = None;
    spec.extra = linux.args();
    for arg in [
        "-smp",
        "2",
        "-device",
        "VGA",
        "-device",
        "qemu-xhci",
        "-device",
        "usb-tablet",
        "-device",
        "virtio-balloon-pci",
        "-device",
        "virtio-rng-pci",
        "-netdev",
        "user,id=net",
        "-device",
        "virtio-net-pci,netdev=net",
    ] {
        spec.extra.push(arg.into());
    }

    let mut qemu = spec.start().unwrap();
    let mut network = false;
    let mut failures = Vec::new();
    let mut next_count = |qemu: &mut vmstate_lab::Qemu| {
        qemu.wait_for_line("count", DEADLINE, |line| {
            network |= line == "N up";
            failures.extend(line.starts_with("F ").then(|| line.to_owned()));
            Count::parse(line)
        })
        .unwrap()
    };
    let first = next_count(&mut qemu);
    assert_eq!(first.counter, 1);
    for counter in 2..4 {
        assert_eq!(next_count(&mut qemu), Count { counter, digest: first.digest.clone() });
    }
    assert!(network, "the network did not answer");
    assert_eq!(failures, Vec::<String>::new());
}
