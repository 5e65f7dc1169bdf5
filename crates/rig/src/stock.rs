//! Stock QEMU saving and loading by itself: the oracle.

use std::path::Path;

use lab::{Incoming, Qemu, QemuSpec};
use serde_json::{Value, json};
use vmstate::Cancel;
use vmstate::net::QmpAddress;
use vmstate::qmp::{Capability, Client};

use crate::DEADLINE;

/// How a stock QEMU saves or loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StockLoad {
    /// `mapped-ram`, or a plain stream.
    pub mapped_ram: bool,
    /// With multifd and this many channels; 0 is without.
    pub channels: u8,
    /// Past the page cache.
    pub direct_io: bool,
}

impl StockLoad {
    /// What QEMU does best: mapped-ram, four channels, direct I/O.
    pub const BEST: StockLoad = StockLoad { mapped_ram: true, channels: 4, direct_io: true };
    /// mapped-ram in one thread.
    pub const PLAIN: StockLoad = StockLoad { mapped_ram: true, channels: 0, direct_io: false };
    /// A stream.
    pub const STREAM: StockLoad = StockLoad { mapped_ram: false, channels: 0, direct_io: false };
}

/// A QMP client of a QEMU of the lab.
///
/// # Panics
/// When it cannot connect.
pub fn client(qemu: &Qemu) -> Client {
    connect(&qemu.qmp_path())
}

fn connect(path: &Path) -> Client {
    let cancel = Cancel::new().expect("an eventfd");
    let mut client = Client::connect(&QmpAddress::Unix(path.to_owned()), &cancel)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    client.timeout = Some(DEADLINE);
    client
}

fn configure(client: &mut Client, how: StockLoad) {
    let switch = |name: &str, state| Capability { name: name.to_owned(), state };
    client
        .set_capabilities(&[
            switch("events", true),
            switch("mapped-ram", how.mapped_ram),
            switch("multifd", how.channels > 0),
        ])
        .expect("capabilities");
    let mut parameters = json!({ "max-bandwidth": 1u64 << 60, "direct-io": how.direct_io });
    if how.channels > 0 {
        parameters["multifd-channels"] = how.channels.into();
    }
    let Value::Object(parameters) = parameters else { unreachable!("an object was made above") };
    client.set_parameters(parameters).expect("parameters");
}

fn await_completion(client: &mut Client) {
    loop {
        let now = client.migration().expect("query-migrate");
        match now.status.as_str() {
            "completed" => return,
            "failed" | "cancelled" => panic!("QEMU's migration: {now:?}"),
            _ => {}
        }
        let deadline = Some(std::time::Instant::now() + DEADLINE);
        client.next_event(deadline).expect("an event").expect("an event within the deadline");
    }
}

/// Has stock QEMU save the guest into `image`, by nothing but its own commands. The guest is paused first,
/// and QEMU is in the state `postmigrate` afterwards.
///
/// # Panics
/// When QEMU refuses.
pub fn stock_save(qemu: &Qemu, image: &Path, how: StockLoad) {
    let mut client = client(qemu);
    configure(&mut client, how);
    client.stop().expect("stop");
    client.migrate(&format!("file:{}", image.display())).expect("migrate");
    await_completion(&mut client);
}

/// Starts a stock QEMU like `spec` and has it load `image`, by nothing but its own commands.
///
/// # Panics
/// When QEMU refuses.
pub fn stock_load(spec: &QemuSpec, image: &Path, how: StockLoad) -> Qemu {
    let spec = QemuSpec { incoming: Incoming::Defer, ..spec.clone() };
    let qemu = spec.start().expect("a QEMU that waits");
    let mut client = client(&qemu);
    configure(&mut client, how);
    client
        .execute(
            "migrate-incoming",
            json!({ "uri": format!("file:{}", image.display()), "exit-on-error": false }),
        )
        .expect("migrate-incoming");
    await_completion(&mut client);
    drop(client);
    qemu
}

/// Has a QEMU of any age do a migration by a command of its own, `migrate` or `migrate-incoming`, and waits until it is
/// complete.
///
/// # Panics
/// When QEMU refuses.
pub fn stock_migrate(qemu: &Qemu, command: &str, uri: &str) {
    let mut client = client(qemu);
    client.set_capabilities(&[Capability { name: "events".to_owned(), state: true }]).expect("capabilities");
    client.execute(command, json!({ "uri": uri })).unwrap_or_else(|error| panic!("{uri}: {}", error.chain()));
    await_completion(&mut client);
}
