//! Looking into images: what they hold, and what is wrong with them.

mod check;
mod devices;
mod info;

pub use check::{Check, check, check_at};
pub use devices::{DescribedBy, DevicesSettings, SectionContent, SectionReport, devices};
pub use info::{BlockSummary, ImageInfo, SectionSummary, info, info_at};
