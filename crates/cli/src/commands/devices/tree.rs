//! Sections as people read them: a tree of fields, bytes folded.

use vmstate::job::fields::{FieldValue, Fields, Value};
use vmstate::job::{DescribedBy, SectionContent, SectionReport};

use crate::buffer::{is_zero, short, text};
use crate::output::Lines;

/// Bytes in one row, and up to how many stand beside the field's name.
const ROW: usize = 32;
/// Numbers of an array in one row.
const NUMBERS: usize = 8;
/// How many rows of bytes are shown of a field where not all of it is asked for.
const ROWS_FOLDED: usize = 2;
/// A struct with no more fields than this, all plain, is one line.
const INLINE_FIELDS: usize = 4;
/// The columns of names and types are no wider.
const NAME_WIDTH_MAX: usize = 44;
const KIND_WIDTH_MAX: usize = 16;

/// Prints a section; `whole` means that bytes are not cut short.
pub fn section(out: &mut Lines, section: &SectionReport<'_>, whole: bool) {
    let by = match &section.content {
        SectionContent::Fields(DescribedBy::Image, _) => "",
        SectionContent::Fields(DescribedBy::Other, _) => ", described by the other image",
        SectionContent::Fields(DescribedBy::Schema, _) => ", described by vmstate's own schema",
        SectionContent::Bytes(_) => ", not described",
    };
    out.line(format!(
        "{} {} · version {}, {} bytes at {:#x}{by}",
        section.name, section.instance_id, section.version, section.bytes, section.offset
    ));
    if let Some(problem) = &section.problem {
        out.line(format!("  a description does not fit: {problem}"));
    }
    match &section.content {
        SectionContent::Fields(_, fields) => {
            let mut widths = Widths { name: 0, kind: 0 };
            widths.measure(fields, 2);
            let widths =
                Widths { name: widths.name.min(NAME_WIDTH_MAX), kind: widths.kind.min(KIND_WIDTH_MAX) };
            let mut tree = Tree { out, widths, whole };
            tree.fields(fields, 2);
        }
        SectionContent::Bytes(bytes) => {
            rows(bytes, whole).into_iter().for_each(|row| out.line(format!("  {row}")))
        }
    }
    out.line("");
}

struct Widths {
    name: usize,
    kind: usize,
}

impl Widths {
    fn measure(&mut self, content: &Fields<'_>, indent: usize) {
        for field in &content.fields {
            self.name = self.name.max(indent + label(field).chars().count());
            if !matches!(&field.value, Value::Struct(content) if !is_flat(content)) {
                self.kind = self.kind.max(kind(field).chars().count());
            }
            match &field.value {
                Value::Struct(content) if !is_flat(content) => self.measure(content, indent + 2),
                Value::Array(elements) => self.measure_elements(elements, indent + 2),
                _ => {}
            }
        }
        for subsection in &content.subsections {
            self.measure(&subsection.content, indent + 2);
        }
    }

    fn measure_elements(&mut self, elements: &[Value<'_>], indent: usize) {
        for element in elements {
            match element {
                Value::Struct(content) if !is_flat(content) => self.measure(content, indent + 2),
                Value::Array(elements) => self.measure_elements(elements, indent + 2),
                _ => {}
            }
        }
    }
}

/// Whether a struct fits into one line.
fn is_flat(content: &Fields<'_>) -> bool {
    let is_plain = |field: &FieldValue<'_>| match &field.value {
        Value::Struct(content) => is_flat(content),
        Value::Array(_) => false,
        Value::Bytes(bytes) => bytes.len() <= 8,
        _ => true,
    };
    content.subsections.is_empty()
        && content.fields.len() <= INLINE_FIELDS
        && content.fields.iter().all(is_plain)
}

/// A flat struct as one line.
fn flat(content: &Fields<'_>) -> String {
    let texts: Vec<String> = content
        .fields
        .iter()
        .map(|field| match &field.value {
            Value::Struct(content) => flat(content),
            value => format!("{} {value}", label(field)),
        })
        .collect();
    texts.join(", ")
}

fn label(field: &FieldValue<'_>) -> String {
    match field.index {
        Some(index) => format!("{}[{index}]", field.name),
        None => field.name.to_owned(),
    }
}

fn kind(field: &FieldValue<'_>) -> String {
    match &field.value {
        Value::Array(elements) => format!("{}[{}]", field.kind, elements.len()),
        Value::Bytes(_) => format!("{}({})", field.kind, field.len),
        _ => field.kind.to_owned(),
    }
}

struct Tree<'a> {
    out: &'a mut Lines,
    widths: Widths,
    whole: bool,
}

impl Tree<'_> {
    fn fields(&mut self, content: &Fields<'_>, indent: usize) {
        for field in &content.fields {
            self.field(field, indent);
        }
        for subsection in &content.subsections {
            self.out.line(format!(
                "{:indent$}{} · subsection, version {}",
                "", subsection.name, subsection.version
            ));
            self.fields(&subsection.content, indent + 2);
        }
    }

    fn field(&mut self, field: &FieldValue<'_>, indent: usize) {
        let name = label(field);
        match &field.value {
            Value::Struct(content) if is_flat(content) => {
                self.row(indent, &name, &kind(field), &flat(content))
            }
            Value::Struct(content) => {
                self.out.line(format!("{:indent$}{name}", ""));
                self.fields(content, indent + 2);
            }
            Value::Array(elements) => self.array(indent, &name, &kind(field), elements),
            Value::Bytes(bytes) if bytes.len() <= ROW || text(bytes).is_some() || is_zero(bytes) => {
                self.row(indent, &name, &kind(field), &short(bytes));
            }
            Value::Bytes(bytes) => {
                self.row(indent, &name, &kind(field), "");
                let deeper = indent + 2;
                for row in rows(bytes, self.whole) {
                    self.out.line(format!("{:deeper$}{row}", ""));
                }
            }
            value => self.row(indent, &name, &kind(field), &value.to_string()),
        }
    }

    fn row(&mut self, indent: usize, name: &str, kind: &str, value: &str) {
        let width = self.widths.name.saturating_sub(indent);
        let line = format!("{:indent$}{name:<width$}  {kind:<kinds$}  {value}", "", kinds = self.widths.kind);
        self.out.line(line.trim_end());
    }

    fn array(&mut self, indent: usize, name: &str, kind: &str, elements: &[Value<'_>]) {
        let is_plain = |value: &Value<'_>| !matches!(value, Value::Struct(_) | Value::Array(_));
        if elements.iter().all(is_plain) {
            return self.numbers(indent, name, kind, elements);
        }
        if let Some(first @ Value::Struct(content)) = elements.first()
            && elements.len() > 1
            && is_flat(content)
            && all_equal(first, elements)
        {
            return self.row(indent, name, kind, &format!("each {}", flat(content)));
        }
        self.out.line(format!("{:indent$}{name}", ""));
        for (index, element) in elements.iter().enumerate() {
            let index = format!("[{index}]");
            let deeper = indent + 2;
            match element {
                Value::Struct(content) if is_flat(content) => {
                    self.out.line(format!("{:deeper$}{index} {}", "", flat(content)));
                }
                Value::Struct(content) => {
                    self.out.line(format!("{:deeper$}{index}", ""));
                    self.fields(content, deeper + 2);
                }
                Value::Array(elements) => self.array(deeper, &index, "", elements),
                value => self.out.line(format!("{:deeper$}{index} {value}", "")),
            }
        }
    }

    fn numbers(&mut self, indent: usize, name: &str, kind: &str, elements: &[Value<'_>]) {
        let join = |values: &[Value<'_>]| values.iter().map(Value::to_string).collect::<Vec<_>>().join(" ");
        match elements.first() {
            Some(first) if elements.len() > 1 && all_equal(first, elements) => {
                self.row(indent, name, kind, &format!("each {first}"));
            }
            _ if elements.len() <= NUMBERS => self.row(indent, name, kind, &join(elements)),
            _ => {
                self.row(indent, name, kind, "");
                let deeper = indent + 2;
                let width = elements.len().saturating_sub(1).to_string().len();
                let mut folding = Folding::default();
                for (i, values) in elements.chunks(NUMBERS).enumerate() {
                    let first = i * NUMBERS;
                    if let Some(text) = folding.next(join(values)) {
                        let at = if text == "*" { String::new() } else { format!("[{first:>width$}] ") };
                        self.out.line(format!("{:deeper$}{at}{text}", ""));
                    }
                }
            }
        }
    }
}

fn all_equal(first: &Value<'_>, elements: &[Value<'_>]) -> bool {
    // The offsets within structs differ, so their text is compared.
    let text = |value: &Value<'_>| match value {
        Value::Struct(content) => flat(content),
        value => value.to_string(),
    };
    let is_comparable = |value: &Value<'_>| match value {
        Value::Struct(content) => is_flat(content),
        Value::Array(_) => false,
        _ => true,
    };
    let expected = text(first);
    elements.iter().all(|element| is_comparable(element) && text(element) == expected)
}

/// Rows that are like the one before become a star, once.
#[derive(Default)]
struct Folding {
    last: Option<String>,
    starred: bool,
}

impl Folding {
    fn next(&mut self, row: String) -> Option<String> {
        if self.last.as_ref() == Some(&row) {
            return (!std::mem::replace(&mut self.starred, true)).then(|| "*".to_owned());
        }
        self.starred = false;
        self.last = Some(row.clone());
        Some(row)
    }
}

/// Bytes in rows with their offsets; `whole` means all of them.
fn rows(bytes: &[u8], whole: bool) -> Vec<String> {
    let mut rows = Vec::new();
    let mut folding = Folding::default();
    for (i, row) in bytes.chunks(ROW).enumerate() {
        let at = i * ROW;
        if !whole && i >= ROWS_FOLDED && bytes.len() > (ROWS_FOLDED + 1) * ROW {
            rows.push(format!("… {} more bytes", bytes.len() - at));
            break;
        }
        if let Some(text) = folding.next(Value::Bytes(row).to_string()) {
            let at = if text == "*" { String::new() } else { format!("{at:04x}  ") };
            rows.push(format!("{at}{text}"));
        }
    }
    rows
}
