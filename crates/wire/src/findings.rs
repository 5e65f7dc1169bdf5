//! Two readings of the same bytes: stop at the first lie, or list them all.

use crate::Fault;

/// The most faults that one survey lists; a file that lies more often is not worth more lines.
pub const FINDINGS_MAX: usize = 1000;

/// Where a decoder's checks put what they find.
///
/// A decoder that can read on after a fault reports it here. When it is asked to decode, the fault comes
/// straight back as an error; when it is asked to survey, it is noted and the decoder goes on.
#[derive(Clone, Debug)]
pub struct Findings {
    collect: bool,
    report: Report,
}

/// What a survey found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The faults in the order in which they were met; at most [`FINDINGS_MAX`].
    pub faults: Vec<Fault>,
    /// How many more there were.
    pub dropped: u64,
}

impl Report {
    /// Whether nothing was found wrong.
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty()
    }

    /// Adds a fault, or counts it where the list is full.
    pub fn push(&mut self, fault: Fault) {
        if self.faults.len() < FINDINGS_MAX {
            self.faults.push(fault);
        } else {
            self.dropped += 1;
        }
    }

    /// Adds the faults of another report behind its own.
    pub fn append(&mut self, other: Report) {
        for fault in other.faults {
            self.push(fault);
        }
        self.dropped += other.dropped;
    }
}

impl Findings {
    /// Findings of which the first is an error.
    pub fn strict() -> Findings {
        Findings { collect: false, report: Report::default() }
    }

    /// Findings that are collected.
    pub fn collecting() -> Findings {
        Findings { collect: true, report: Report::default() }
    }

    /// Reports a fault after which the decoder can go on.
    ///
    /// # Errors
    /// The fault itself, when the findings are strict.
    pub fn note(&mut self, fault: Fault) -> Result<(), Fault> {
        if !self.collect {
            return Err(fault);
        }
        self.report.push(fault);
        Ok(())
    }

    /// Whether faults are collected.
    pub fn is_collecting(&self) -> bool {
        self.collect
    }

    /// The fault that was collected last.
    pub fn last(&self) -> Option<&Fault> {
        self.report.faults.last()
    }

    /// What was collected.
    pub fn into_report(self) -> Report {
        self.report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_findings_is_bounded() {
        let mut findings = Findings::collecting();
        for offset in 0..FINDINGS_MAX as u64 + 5 {
            assert_eq!(findings.note(Fault::damaged(offset, "byte", "is wrong")), Ok(()));
        }
        let report = findings.into_report();
        assert_eq!((report.faults.len(), report.dropped), (FINDINGS_MAX, 5));
    }

    #[test]
    fn a_strict_reading_stops_at_the_first_fault() {
        let fault = Fault::damaged(1, "byte", "is wrong");
        assert_eq!(Findings::strict().note(fault.clone()), Err(fault));
    }
}
