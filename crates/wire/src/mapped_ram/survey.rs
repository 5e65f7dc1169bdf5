//! All that is wrong with an image, not only the first of it.

use crate::qemu::format::VMDESCRIPTION_HEADER_LEN;
use crate::{FileRange, Report};

use super::decode::{LayoutDecoder, Step};
use super::layout::{BlockPlacement, Layout};

/// What a survey wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SurveyStep {
    /// Bytes of the file: pass them to [`LayoutSurvey::supply`].
    Need {
        /// Their absolute offset.
        offset: u64,
        /// How many; never zero.
        len: usize,
    },
    /// Nothing more: [`LayoutSurvey::finish`].
    Done,
}

/// Reads the metadata of an image to the end, whatever is wrong with it.
///
/// It asks for bytes as [`LayoutDecoder`] does. A fault behind which the stream cannot be followed sends
/// it to the end of the file, where a vmdescription is found without the rest.
#[derive(Clone, Debug)]
pub struct LayoutSurvey {
    decoder: LayoutDecoder,
    layout: Option<Layout>,
    is_done: bool,
}

/// What a survey of an image found.
#[derive(Clone, Debug, PartialEq)]
pub struct LayoutReport {
    /// The faults, in the order in which they were met: the first is what [`LayoutDecoder`] refuses.
    pub report: Report,
    /// The layout, where the stream could be followed to its end. With faults, its ranges may overlap.
    pub layout: Option<Layout>,
    /// The blocks that were understood.
    pub blocks: Vec<BlockPlacement>,
    /// The JSON of the vmdescription, if there is one.
    pub vmdesc_json: Option<FileRange>,
}

impl LayoutSurvey {
    /// A survey of the image whose magic stands at `stream_start` of a file of `file_len` bytes.
    pub fn new(stream_start: u64, file_len: u64) -> LayoutSurvey {
        let decoder = LayoutDecoder::surveying(stream_start, file_len);
        LayoutSurvey { decoder, layout: None, is_done: false }
    }

    /// A survey that goes no further than to the start of the device state, for whoever does not know yet where the
    /// image ends in its file: what [`LayoutSurvey::finish`] gives has a layout whose device state is empty and begins
    /// there. Early sections are taken to end at the first place that can be their end.
    pub fn seeking(stream_start: u64, file_len: u64) -> LayoutSurvey {
        let decoder = LayoutDecoder::seeking(stream_start, file_len);
        LayoutSurvey { decoder, layout: None, is_done: false }
    }

    /// Says what is needed next.
    pub fn step(&mut self) -> SurveyStep {
        while !self.is_done {
            match self.decoder.step() {
                Ok(Step::Need { offset, len }) => return SurveyStep::Need { offset, len },
                Ok(Step::Done(layout)) => {
                    // What a decoder that lost the stream makes of the rest is no layout.
                    self.layout = (!self.decoder.is_lost()).then_some(*layout);
                    self.is_done = true;
                }
                Err(fault) => self.is_done = !self.decoder.abandon(fault),
            }
        }
        SurveyStep::Done
    }

    /// Passes the bytes that were asked for, or as many of them as one read gave.
    pub fn supply(&mut self, bytes: &[u8]) {
        if let Err(fault) = self.decoder.supply(bytes) {
            self.is_done = !self.decoder.abandon(fault);
        }
    }

    /// What was found.
    pub fn finish(self) -> LayoutReport {
        let blocks = self.decoder.blocks().to_vec();
        let vmdesc_json = self
            .decoder
            .vmdesc()
            .map(|range| FileRange { start: range.start + VMDESCRIPTION_HEADER_LEN as u64, end: range.end });
        let report = self.decoder.into_report();
        LayoutReport { report, layout: self.layout, blocks, vmdesc_json }
    }
}
