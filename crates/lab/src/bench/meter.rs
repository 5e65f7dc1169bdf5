//! What a measurement cost beside its time: processor seconds and memory, as the kernel counts them.

use std::fs;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How often our own memory is looked at while a job runs.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// What a process had used up to one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor seconds of all its threads, in the program and in the kernel on its behalf.
    pub cpu_s: f64,
    /// Its resident memory in bytes that is backed by no file on a disk: anonymous and shared.
    pub memory_bytes: u64,
}

impl Usage {
    /// Of the process `pid`; nothing where the kernel does not tell.
    pub fn of(pid: u32) -> Usage {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        Usage {
            cpu_s: cpu_ticks(&read("stat")) as f64 / rustix::param::clock_ticks_per_second() as f64,
            memory_bytes: resident_bytes(&read("status"), &["RssAnon:", "RssShmem:"]),
        }
    }
}

/// Both ends of a measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Processor seconds of this process.
    pub cpu_vmstate_s: f64,
    /// Processor seconds of QEMU.
    pub cpu_qemu_s: f64,
    /// By how many bytes QEMU's memory has grown.
    pub qemu_growth_bytes: i64,
    /// The most anonymous memory of this process that was seen.
    pub vmstate_peak_bytes: u64,
}

/// A measurement under way.
pub struct Meter {
    qemu_pid: u32,
    qemu: Usage,
    own: Usage,
    watch: Watch,
}

impl Meter {
    /// Begins to measure this process and the QEMU of that pid.
    pub fn start(qemu_pid: u32) -> Meter {
        let watch = Watch::start();
        Meter { qemu_pid, qemu: Usage::of(qemu_pid), own: Usage::of(std::process::id()), watch }
    }

    /// Ends the measurement, while QEMU is still there.
    pub fn stop(self) -> Cost {
        let (own, qemu) = (Usage::of(std::process::id()), Usage::of(self.qemu_pid));
        let difference = |after: u64, before: u64| after as i64 - before as i64;
        Cost {
            cpu_vmstate_s: own.cpu_s - self.own.cpu_s,
            cpu_qemu_s: qemu.cpu_s - self.qemu.cpu_s,
            qemu_growth_bytes: difference(qemu.memory_bytes, self.qemu.memory_bytes),
            vmstate_peak_bytes: self.watch.stop(),
        }
    }
}

/// Looks at our own memory every now and then: a lane's memory is gone when its job is done.
struct Watch {
    end: Sender<()>,
    thread: JoinHandle<u64>,
}

impl Watch {
    fn start() -> Watch {
        let (end, ended) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut peak = 0;
            loop {
                let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
                peak = resident_bytes(&status, &["RssAnon:"]).max(peak);
                if ended.recv_timeout(LOOK_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return peak;
                }
            }
        });
        Watch { end, thread }
    }

    fn stop(self) -> u64 {
        drop(self.end);
        self.thread.join().unwrap_or(0)
    }
}

/// The processor time of `/proc/PID/stat`, in clock ticks: fields 14 and 15 of proc_pid_stat(5), counted from the end
/// of the program's name, which may hold anything.
fn cpu_ticks(stat: &str) -> u64 {
    let Some((_, fields)) = stat.rsplit_once(')') else { return 0 };
    fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// The sum of some lines of `/proc/PID/status`, which are in KiB.
fn resident_bytes(status: &str, names: &[&str]) -> u64 {
    let value = |name: &&str| {
        let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
        rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    names.iter().filter_map(value).sum::<u64>() << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 250 50 7 8 20 0 9";
        for (stat, expected) in [
            (format!("42 (qemu-system-x86) {fields}"), 300),
            (format!("42 (a) b (c) 9 9) {fields}"), 300),
            ("42 (short) S 1 2".to_owned(), 0),
            (String::new(), 0),
        ] {
            assert_eq!(cpu_ticks(&stat), expected, "{stat}");
        }
    }

    #[test]
    fn memory_is_the_sum_of_the_lines_asked_for() {
        let status = "Name:\tqemu\nRssAnon:\t    1024 kB\nRssFile:\t  7 kB\nRssShmem:\t       8 kB\n";
        assert_eq!(resident_bytes(status, &["RssAnon:", "RssShmem:"]), 1032 << 10);
        assert_eq!(resident_bytes(status, &["RssAnon:"]), 1 << 20);
        assert_eq!(resident_bytes("", &["RssAnon:"]), 0);
    }

    #[test]
    fn a_process_has_used_something() {
        let usage = Usage::of(std::process::id());
        assert!(usage.memory_bytes > 0, "{usage:?}");
        let cost = Meter::start(std::process::id()).stop();
        assert!(cost.vmstate_peak_bytes > 0, "{cost:?}");
    }
}
