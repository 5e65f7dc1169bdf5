//! Metadata as lines of text: offset, field, value.

use std::fmt;

/// One field of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The absolute offset of the field.
    pub offset: u64,
    /// Its name.
    pub field: String,
    /// Its value as text.
    pub value: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#014x}  {} = {}", self.offset, self.field, self.value)
    }
}

/// The fields of an image, in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dump {
    /// The lines.
    pub lines: Vec<Line>,
}

impl Dump {
    /// Adds a field.
    pub fn line(&mut self, offset: u64, field: impl Into<String>, value: impl fmt::Display) {
        self.lines.push(Line { offset, field: field.into(), value: value.to_string() });
    }
}

impl fmt::Display for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}
