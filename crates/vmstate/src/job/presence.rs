//! Which pages a guest has, and how long that takes to learn.

use std::time::{Duration, Instant};

use mem::GuestRam;
use page::Window;

use super::untold_pages;
use crate::Result;

/// How long a job has waited to learn which pages are there. It learns that while it moves them, so that this is a part
/// of the time which that takes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Presence {
    /// All of it so far.
    pub waited: Duration,
}

impl Presence {
    /// The windows of a region that have pages, as [`GuestRam::windows`]; what a wait for each takes is added.
    ///
    /// # Errors
    /// [`Kind::Io`](crate::Kind::Io), with the name of the block, and [`Kind::Interrupted`](crate::Kind::Interrupted);
    /// so are those of its items.
    pub fn windows<'a>(
        &'a mut self,
        ram: &'a GuestRam,
        region: usize,
        name: &'a str,
    ) -> Result<impl Iterator<Item = Result<Window>> + use<'a>> {
        let untold = move |error| untold_pages(name, error);
        let start = Instant::now();
        let mut windows = ram.windows(region).map_err(untold)?;
        self.waited += start.elapsed();
        Ok(std::iter::from_fn(move || {
            let start = Instant::now();
            let window = windows.next();
            self.waited += start.elapsed();
            window.map(|window| window.map_err(untold))
        }))
    }
}
