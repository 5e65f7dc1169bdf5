//! Guest memory as a picture: an SVG or a PNG that is drawn from one scene.

mod colour;
mod curve;
mod grid;
mod png;
mod scene;
mod svg;

pub use curve::Layout;
pub use grid::{Grids, KINDS};
pub use png::png;
pub use scene::{Caption, grids, scene};
pub use svg::svg;

/// What a picture is drawn on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Theme {
    /// As whoever looks at it prefers; a PNG is light.
    Auto,
    /// On light ground.
    Light,
    /// On dark ground.
    Dark,
}
