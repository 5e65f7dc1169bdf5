//! The benchmark of domains, with domains and a libvirtd of its own: idle and dirty, private memory and memfd.
//!
//! `scripts/bench-domains.sh` builds and runs it. `vmstate bench --domain` does the same with a domain that is there.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for developers, with no other output"
)]

use std::process::ExitCode;

use lab::bench::{DomainBenchSettings, Load, Style, domain, render_domain};
use lab::demo::Narrator;
use lab::{Guest, GuestSettings};
use serde_json::json;
use vmstate::Cancel;
use vmstate::libvirt::DomainName;
use vmstate_rig::{DomainSpec, Libvirtd};

/// What an idle guest owns, in pages: 8 MiB.
const IDLE_PAGES: u32 = 2048;

struct Teller;

impl Narrator for Teller {
    fn tell(&self, sentence: &str) {
        eprintln!("{sentence}");
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |i: usize, default: u64| words.get(i).map_or(Some(default), |word| word.parse().ok());
    let (Some(memory_mib), Some(rounds), true) = (number(0, 1024), number(1, 3), words.len() <= 4) else {
        eprintln!(
            "domain-bench [MIB [ROUNDS [text|markdown|json [idle-private|dirty-private|idle-memfd|dirty-memfd]]]]"
        );
        return ExitCode::from(2);
    };
    let keeper = std::env::current_exe().expect("this program").with_file_name("libvirt-keeper");
    let libvirtd = Libvirtd::start(keeper.to_str().expect("a path in UTF-8"));
    let cancel = Cancel::new().expect("an eventfd");
    for (backing, xml) in [("private", ""), ("memfd", "<source type='memfd'/><access mode='shared'/>")] {
        for load in [Load::Idle, Load::Dirty] {
            let mut settings =
                GuestSettings { fill_rounds: 1, halt_after_round: 1, ..GuestSettings::default() };
            if load == Load::Idle {
                settings = GuestSettings { pages_low_max: IDLE_PAGES, pages_high_max: 0, ..settings };
            }
            let name = format!("{}-{backing}", load.name());
            if words.get(3).is_some_and(|wanted| *wanted != name) {
                continue;
            }
            let mut spec = DomainSpec::new(&name, memory_mib << 20);
            spec.memory_backing = xml.to_owned();
            spec.guest = Guest::new(settings);
            let mut running = spec.start(&libvirtd);
            running.wait_for_rounds(1);
            let settings = DomainBenchSettings {
                uri: libvirtd.uri().parse().expect("a URI"),
                name: DomainName(name),
                command: running.command(),
                channels: 2,
                directory: running.dir().to_owned(),
                rounds: usize::try_from(rounds).expect("few rounds"),
            };
            let rows = match domain(&settings, &cancel, &Teller) {
                Ok(rows) => rows,
                Err(error) => {
                    eprintln!("{}\n{}", error.chain(), libvirtd.log());
                    return ExitCode::FAILURE;
                }
            };
            let title = format!("{} guest of {memory_mib} MiB, {backing} memory", load.name());
            match words.get(2) {
                Some(&"json") => println!("{}", json!({ "guest": title, "rows": rows })),
                Some(&"markdown") => println!("### {title}\n\n{}", render_domain(&rows, Style::Markdown)),
                _ => println!("{title}\n\n{}", render_domain(&rows, Style::Text)),
            }
        }
    }
    ExitCode::SUCCESS
}
