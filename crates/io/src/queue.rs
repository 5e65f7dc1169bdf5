//! The bounded queue between the planner and the lanes, and the place of the first failure.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::lane::LaneError;
use crate::supply::Piece;

/// Pieces that wait, at most, so that the planner blocks instead of the memory growing.
pub(crate) struct Queue {
    state: Mutex<State>,
    /// Signalled when a lane may find something: a piece, the end, a failure.
    to_lanes: Condvar,
    /// Signalled when the planner may go on: room, or a failure.
    to_planner: Condvar,
    limit: usize,
}

/// What a lane that does not wait finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// A piece.
    Piece(Piece),
    /// Nothing yet.
    Nothing,
    /// Nothing any more: there will be none, or somebody has failed.
    End,
}

#[derive(Default)]
struct State {
    pieces: VecDeque<Piece>,
    closed: bool,
    failure: Option<LaneError>,
}

impl Queue {
    pub(crate) fn new(limit: usize) -> Queue {
        Queue { state: Mutex::default(), to_lanes: Condvar::new(), to_planner: Condvar::new(), limit }
    }

    /// Waits for room, then queues the piece; returns early with the failure once there is one.
    pub(crate) fn push(&self, piece: Piece) -> Result<(), LaneError> {
        let mut state = self.lock();
        while state.failure.is_none() && state.pieces.len() >= self.limit {
            state = self.to_planner.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        state.pieces.push_back(piece);
        drop(state);
        self.to_lanes.notify_one();
        Ok(())
    }

    /// Waits for a piece; `None` when there will be no more or somebody has failed.
    pub(crate) fn pop(&self) -> Option<Piece> {
        let mut state = self.lock();
        loop {
            if state.failure.is_some() {
                return None;
            }
            if let Some(piece) = state.pieces.pop_front() {
                drop(state);
                self.to_planner.notify_one();
                return Some(piece);
            }
            if state.closed {
                return None;
            }
            state = self.to_lanes.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next piece if it is there; never waits.
    pub(crate) fn try_pop(&self) -> Next {
        let mut state = self.lock();
        if state.failure.is_some() {
            return Next::End;
        }
        match state.pieces.pop_front() {
            Some(piece) => {
                drop(state);
                self.to_planner.notify_one();
                Next::Piece(piece)
            }
            None if state.closed => Next::End,
            None => Next::Nothing,
        }
    }

    /// No piece will follow: lanes that find the queue empty end.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.to_lanes.notify_all();
    }

    /// Stops everybody. The first failure is kept: those that follow are its echoes.
    pub(crate) fn fail(&self, failure: LaneError) {
        let mut state = self.lock();
        state.failure.get_or_insert(failure);
        state.pieces.clear();
        drop(state);
        self.to_lanes.notify_all();
        self.to_planner.notify_all();
    }

    /// The first failure, if there was one.
    pub(crate) fn failure(&self) -> Option<LaneError> {
        self.lock().failure.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock, so a poisoned one still holds a whole state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: Piece = Piece { region: 0, offset: 0, target: 0, grain: 4096, len: 0, mask: [0; 4] };

    #[test]
    fn the_first_failure_is_kept_and_ends_both_sides() {
        let queue = Queue::new(1);
        queue.push(PIECE).expect("room");
        queue.fail(LaneError::Panicked { lane: 3, message: "first".to_owned() });
        queue.fail(LaneError::Cancelled);
        assert_eq!(queue.failure().expect("a failure").to_string(), "lane 3 panicked: first");
        // The queue is full, and neither side waits any more.
        assert_eq!(queue.push(PIECE).expect_err("a failure").to_string(), "lane 3 panicked: first");
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn a_closed_queue_is_emptied_before_it_ends() {
        let queue = Queue::new(2);
        queue.push(PIECE).expect("room");
        queue.close();
        assert_eq!(queue.pop(), Some(PIECE));
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn whoever_does_not_wait_is_told_apart_nothing_yet_and_nothing_any_more() {
        let queue = Queue::new(2);
        assert_eq!(queue.try_pop(), Next::Nothing);
        queue.push(PIECE).expect("room");
        queue.close();
        assert_eq!(queue.try_pop(), Next::Piece(PIECE));
        assert_eq!(queue.try_pop(), Next::End);
        let failed = Queue::new(2);
        failed.push(PIECE).expect("room");
        failed.fail(LaneError::Cancelled);
        assert_eq!(failed.try_pop(), Next::End);
    }
}
