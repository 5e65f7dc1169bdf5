//! How bytes move: lanes, aligned buffers, durable publish.
//!
//! The crate knows nothing of formats or guests. A planner deals [`Piece`]s, a [`Supply`] says where the
//! bytes of a piece are, the [`WriteLanes`] put them at fixed offsets of a [`Draft`], and the draft becomes
//! a file under its final name only when it is whole and on disk. Other places keep as much of that as they
//! can, see [`Target`]: a [`Place`] of a file or device, an [`Outflow`] into a pipe.
//!
//! Law: one lane is one thread with one ring and one set of buffers. The caller's thread plans, deals and reads
//! [`Counters`].

mod ahead;
mod aligned;
mod cancel;
mod constant_supply;
mod counters;
mod direct;
mod draft;
mod engine;
mod file_supply;
mod hold;
mod inflow;
mod lane;
mod numa;
mod outflow;
mod owner;
mod page_taker;
mod place;
mod publish;
mod queue;
mod rate_limit;
mod residency;
mod ring;
mod slab;
mod staging;
mod stray;
mod supply;
mod target;
mod timed;

pub use ahead::{Filled, ReadAhead};
pub use aligned::AlignedBuffer;
pub use cancel::Cancel;
pub use constant_supply::ConstantSupply;
pub use counters::{Counters, CountersReading};
pub use direct::{DirectChoice, DirectIo, ReadPair};
pub use draft::{Draft, DraftError, DraftOptions, DraftStep, Obstacle, Replaced};
pub use engine::{ENGINE_VARIABLE, Engine, EngineChoice};
pub use file_supply::FileSupply;
pub use hold::hold;
pub use inflow::Inflow;
pub use lane::{
    LaneError, LaneMemory, LaneOptions, LaneSettings, LaneTarget, PositionedWrite, RingWrite, WriteLanes,
};
pub use outflow::{Outflow, OutflowError};
pub use owner::{Owner, OwnerError};
pub use page_taker::{PageContent, PageTaker, PagesTaken, is_zero};
pub use place::{HEAD_LEN, Place};
pub use rate_limit::RateLimit;
pub use residency::{cached_bytes, is_nearly_cached};
pub use slab::{HUGE_PAGE, Slab};
pub use staging::{Part, Staging};
pub use stray::remove_strays;
pub use supply::{GRAIN_MAX, GRAIN_MIN, PIECE_GRAINS, Piece, Scratch, Supplied, Supply};
pub use target::{Target, TargetKind};
pub use timed::Rates;
