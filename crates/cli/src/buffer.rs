//! Buffers as people read them: as text where they are text, and what differs of long ones.

use vmstate::job::fields::Value;

/// Up to how many characters a buffer is shown whole where two are told apart.
const SHOWN_LEN_MAX: usize = 40;
/// How many bytes of a longer one are shown, from the first that differs on.
const APART_LEN: usize = 8;

/// Whether all bytes are zero, and there are some.
pub fn is_zero(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|byte| *byte == 0)
}

/// The text that bytes are: printable, three characters at least, and zero behind.
pub fn text(bytes: &[u8]) -> Option<&str> {
    let len = bytes.iter().rposition(|byte| *byte != 0)? + 1;
    let text = std::str::from_utf8(bytes.get(..len)?).ok()?;
    (len >= 3 && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')).then_some(text)
}

/// All of a buffer, on one line.
pub fn short(bytes: &[u8]) -> String {
    match text(bytes) {
        Some(text) => format!("\"{text}\""),
        None if bytes.len() > 8 && is_zero(bytes) => "all zero".to_owned(),
        None => Value::Bytes(bytes).to_string(),
    }
}

/// Two buffers that differ, on one line: whole where both are short, else the first bytes that differ and where they
/// stand.
pub fn apart(one: &[u8], other: &[u8]) -> String {
    let whole = [short(one), short(other)];
    if whole.iter().all(|text| text.chars().count() <= SHOWN_LEN_MAX) {
        let [one, other] = whole;
        return format!("{one} and {other}");
    }
    let shorter = one.len().min(other.len());
    let at = one.iter().zip(other).position(|(one, other)| one != other).unwrap_or(shorter);
    let part = |bytes: &[u8]| {
        let rest = bytes.get(at..).unwrap_or_default();
        let shown = rest.get(..APART_LEN).unwrap_or(rest);
        match shown.len() {
            0 => "nothing".to_owned(),
            len => format!("{}{}", Value::Bytes(shown), if len < rest.len() { "…" } else { "" }),
        }
    };
    let (one_part, other_part) = (part(one), part(other));
    let len = match one.len() == other.len() {
        true => format!("{} bytes", one.len()),
        false => format!("{} and {} bytes", one.len(), other.len()),
    };
    format!("{one_part} and {other_part} at byte {at:#x} of {len}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_told_apart_by_what_differs() {
        let padded = |text: &str| {
            let mut bytes = text.as_bytes().to_vec();
            bytes.resize(100, 0);
            bytes
        };
        let mut late = vec![7; 528];
        late[0x12] = 9;
        for (one, other, expected) in [
            (padded("running"), padded("paused"), "\"running\" and \"paused\""),
            (padded(""), padded("paused"), "all zero and \"paused\""),
            (vec![1, 2], vec![1, 3], "0102 and 0103"),
            (vec![7; 528], late, "0707070707070707… and 0907070707070707… at byte 0x12 of 528 bytes"),
            (vec![7; 30], vec![7; 32], "nothing and 0707 at byte 0x1e of 30 and 32 bytes"),
        ] {
            assert_eq!(apart(&one, &other), expected);
        }
    }
}
