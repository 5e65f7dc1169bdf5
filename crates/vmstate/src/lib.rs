//! Saves, restores and inspects the state of virtual machines in QEMU's formats.
//!
//! The jobs are functions: [`save()`], [`restore()`], [`info()`], [`check()`]. Each takes settings, a
//! [`Cancel`] and an [`Observer`], and returns a report; none prints. What they are composed of is public as
//! well: a [`qmp`] client, sessions with a running [`qemu`], images as [`source`] and [`sink`].
//!
//! ```no_run
//! use vmstate::{Cancel, SaveSettings, Unobserved, net::QmpAddress};
//!
//! let settings = SaveSettings::new(QmpAddress::Unix("/run/vm.qmp".into()), "vm.img");
//! let report = vmstate::save(&settings, &Cancel::new()?, &Unobserved)?;
//! println!("{} bytes via {}", report.data_bytes, report.via.name());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg(feature = "codecs")]
pub mod codec;
mod error;
pub mod job;
pub mod libvirt;
pub mod manifest;
pub mod net;
mod ordered;
pub mod qemu;
pub mod qmp;
mod rate;
pub mod sink;
pub mod source;

pub use page;

pub use error::{Error, Kind, Result};
pub use io::{Cancel, Draft, DraftOptions, Owner, Replaced};
pub use job::{Answer, Server, start_server};
pub use job::{
    CompareSettings, Compared, Comparison, ConvertReport, ConvertSettings, DeviceStateBy, DirectIo, Estimate,
    FaultReport, FaultTimes, Mode, Observer, Pace, Phases, Progress, ProgressReading, ReadySerial, Record,
    Rehearsal, RestoreReport, RestoreSettings, ResumeReport, ResumeSettings, SaveFormat, SaveReport,
    SaveSettings, Target, Then, Unobserved, Via, check, check_at, compare, compare_files, convert, info,
    info_at, rehearse, restore, resume, save,
};
pub use job::{
    DomainRestoreReport, DomainRestoreSettings, ManagedSaveReport, ManagedSaveSettings, managed_image,
    restore_domain, save_managed,
};
pub use job::{TakeUpReport, TakeUpSettings, take_up};
pub use rate::Rate;
