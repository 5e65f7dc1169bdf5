//! Looking into images: what they hold, and what is wrong with them.

mod check;
mod devices;
mod info;
mod map;

pub use check::{Check, check, check_at};
pub(super) use devices::SectionReader;
pub use devices::{DescribedBy, DevicesSettings, SectionContent, SectionReport, devices};
pub use info::{BlockSummary, ImageInfo, SectionSummary, info, info_at};
pub use map::{
    FilePlace, Joiner, MapKind, MapRange, MapRun, MapSettings, MapVisitor, MappedImage, map, map_changes,
};
