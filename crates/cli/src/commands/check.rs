//! `vmstate check`.

use serde_json::json;
use vmstate::Kind;
use vmstate::source::readable_again;

use super::Outcome;
use crate::args::Inspect;
use crate::output::{line, print_json};

/// Lists every structural fault of an image.
pub fn run(args: &Inspect) -> vmstate::Result<Outcome> {
    let path = args.image.display();
    let (format, faults, dropped) = match vmstate::check_at(&readable_again(&args.image)?, args.offset) {
        Ok(check) => {
            (check.format.map(vmstate::source::Format::name), check.report.faults, check.report.dropped)
        }
        // What is no image at all is an answer too, and it is no.
        Err(error) if error.kind() == Kind::Damaged => {
            if args.json {
                let faults = [json!({ "problem": error.chain() })];
                print_json(&json!({ "format": null, "sound": false, "faults": faults, "more_faults": 0 }));
            } else {
                line(error.chain());
            }
            return Ok(Outcome::No);
        }
        Err(error) => return Err(error),
    };
    let sound = faults.is_empty();
    if args.json {
        let faults: Vec<_> = faults
            .iter()
            .map(|fault| json!({ "offset": fault.offset, "field": fault.field, "problem": fault.problem }))
            .collect();
        print_json(&json!({ "format": format, "sound": sound, "faults": faults, "more_faults": dropped }));
    } else {
        for fault in &faults {
            line(format!("{path}: {fault}"));
        }
        match faults.len() {
            0 => line(format!("{path}: {}, no fault found", format.unwrap_or("image"))),
            n => line(format!("{path}: {} fault{} found", n as u64 + dropped, if n == 1 { "" } else { "s" })),
        }
    }
    Ok(if sound { Outcome::Done } else { Outcome::No })
}
