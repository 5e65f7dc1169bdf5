//! `vmstate devices`.

mod json;
mod tree;

use vmstate::job::{DevicesSettings, SectionReport, devices};
use vmstate::source::readable_again;

use super::Outcome;
use crate::args::Devices;
use crate::output::Lines;

/// Shows the device state of an image, field by field.
pub fn run(args: &Devices) -> vmstate::Result<Outcome> {
    let settings = DevicesSettings {
        offset: args.offset,
        name: args.name.clone(),
        describe_by: args.describe_by.clone(),
    };
    let image = readable_again(&args.image)?;
    let mut out = Lines::new();
    if args.json {
        let mut separator = "{\n  \"sections\": [";
        let mut print = |section: &SectionReport<'_>| {
            out.add(separator);
            out.add(json::section(section));
            separator = ",";
        };
        let format = devices(&image, &settings, &mut print)?;
        if separator.starts_with('{') {
            out.add(separator);
        }
        out.line(format!("\n  ],\n  \"format\": \"{}\"\n}}", format.name()));
    } else {
        // Who asks for one wants all of it.
        let whole = args.name.is_some();
        let mut print = |section: &SectionReport<'_>| tree::section(&mut out, section, whole);
        devices(&image, &settings, &mut print)?;
    }
    Ok(Outcome::Done)
}
