//! What one lane does: it has pieces filled, and writes them.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::flight::Flights;
use super::span::{Span, Stop};
use super::{LaneError, LaneTarget, PositionedWrite};
use crate::cancel::Cancel;
use crate::counters::{Counters, add};
use crate::engine::Engine;
use crate::queue::{Next, Queue};
use crate::rate_limit::RateLimit;
use crate::ring::Ring;
use crate::supply::Supply;

/// How many requests a ring holds. A piece of scattered pages is many of them, and those that do not fit wait.
const RING_REQUESTS: usize = 128;

/// A lane, as its thread has it.
pub(super) struct Lane {
    pub number: usize,
    pub lanes: usize,
    pub align: usize,
    pub engine: Engine,
    pub queue: Arc<Queue>,
    pub target: Arc<LaneTarget>,
    pub supply: Arc<dyn Supply>,
    pub limit: Option<Arc<RateLimit>>,
    pub counters: Arc<Counters>,
    pub cancel: Cancel,
}

impl Lane {
    pub(super) fn run_guarded(&self) {
        let failure = match catch_unwind(AssertUnwindSafe(|| self.run())) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(panic) => LaneError::Panicked { lane: self.number, message: panic_message(&*panic) },
        };
        self.queue.fail(failure);
    }

    fn run(&self) -> Result<(), LaneError> {
        let Some(first) = self.queue.pop() else { return Ok(()) };
        // Before its ring and its buffers are made.
        crate::numa::settle(self.number);
        let mut flights = Flights::new(self, self.open_ring()?, &first);
        let mut next = Next::Piece(first);
        loop {
            match next {
                Next::Piece(piece) => flights.begin(piece)?,
                Next::Nothing => flights.wait()?,
                Next::End => return flights.land(),
            }
            while !flights.has_room()? {
                flights.wait()?;
            }
            // What is being read will want to be written, so the queue is not waited for meanwhile. Writes go
            // their way alone.
            next = match flights.is_reading() {
                true => self.queue.try_pop(),
                false => self.queue.pop().map_or(Next::End, Next::Piece),
            };
        }
    }

    /// The ring, where there is something for it to do: what goes through the page cache is a copy, which the lane
    /// makes itself.
    fn open_ring<T>(&self) -> Result<Option<Ring<T>>, LaneError> {
        let Engine::IoUring { is_demanded } = self.engine else { return Ok(None) };
        let reads_direct = self.supply.as_file().is_some_and(|file| file.is_direct());
        if self.target.direct.is_none() && !reads_direct {
            return Ok(None);
        }
        match Ring::open(RING_REQUESTS) {
            Ok(ring) => Ok(Some(ring)),
            // There are limits to the number of rings, in old kernels to their memory: a lane without one is
            // slower and just as right.
            Err(_) if !is_demanded => Ok(None),
            Err(source) => Err(LaneError::start(self.number, source)),
        }
    }

    pub(super) fn write_buffered(&self, mut span: Span) -> Result<(), LaneError> {
        while span.len > 0 {
            let written = self.write_some(&*self.target.buffered, &span).map_err(|stop| stop.at(&span))?;
            span = self.advance(span, written);
        }
        Ok(())
    }

    pub(super) fn write_direct(&self, direct: &dyn PositionedWrite, mut span: Span) -> Result<(), LaneError> {
        while span.len > 0 {
            let written = self.write_some(direct, &span).map_err(|stop| stop.at_direct(&span))?;
            span = self.advance_direct(span, written)?;
        }
        Ok(())
    }

    /// One write call that got somewhere. An interrupted one is repeated, unless the interruption was ours.
    fn write_some(&self, file: &dyn PositionedWrite, span: &Span) -> Result<usize, Stop> {
        loop {
            if self.cancel.is_cancelled() {
                return Err(Stop::Cancelled);
            }
            add(&self.counters.write_calls, 1);
            // SAFETY: the span lies within grains that the supply named in `write`, which its contract keeps
            // mapped and readable until this lane uses their scratch again.
            match unsafe { file.write_span_at(span.base, span.len, span.offset) } {
                Ok(0) => return Err(Stop::Failed(io::ErrorKind::WriteZero.into())),
                Ok(written) => return Ok(written.min(span.len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Stop::Failed(error)),
            }
        }
    }

    /// What is left of a span of which a direct write took so many bytes.
    pub(super) fn advance_direct(&self, span: Span, written: usize) -> Result<Span, LaneError> {
        // A short count that ends amid a unit would leave the rest misaligned: the torn unit is written again,
        // and where not even one unit was taken, the page cache takes that one.
        let whole = written - written % self.align;
        if whole > 0 {
            return Ok(self.advance(span, whole));
        }
        let (unit, rest) = span.split_at(self.align);
        self.write_buffered(unit)?;
        Ok(rest)
    }

    fn advance(&self, span: Span, written: usize) -> Span {
        add(&self.counters.bytes_written, written as u64);
        span.split_at(written).1
    }

    pub(super) fn check_cancel(&self) -> Result<(), LaneError> {
        if self.cancel.is_cancelled() { Err(LaneError::Cancelled) } else { Ok(()) }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "no message".to_owned(),
    }
}
