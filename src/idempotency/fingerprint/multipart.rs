//! Multipart bodies (RFC 2046 §5.1) without their boundary, which clients make up anew for every attempt.

/// The one `boundary` parameter of a `Content-Type` (RFC 9110 §5.6.6), unquoted; `None` if there is none, or two.
pub(super) fn boundary(content_type: &[u8]) -> Option<Vec<u8>> {
    let mut rest = after_semicolon(content_type);
    let mut found = None;
    while !rest.is_empty() {
        let end = rest.iter().position(|byte| matches!(byte, b'=' | b';')).unwrap_or(rest.len());
        let (name, value) = rest.split_at_checked(end)?;
        let Some(value) = value.strip_prefix(b"=") else {
            rest = after_semicolon(value);
            continue;
        };
        let (value, next) = parameter_value(value)?;
        if name.trim_ascii().eq_ignore_ascii_case(b"boundary") && found.replace(value).is_some() {
            return None;
        }
        rest = next;
    }
    found.filter(|boundary| !boundary.is_empty())
}

fn after_semicolon(text: &[u8]) -> &[u8] {
    text.splitn(2, |byte| *byte == b';').nth(1).unwrap_or_default()
}

/// A token or quoted string, and what comes after the `;` behind it. `None`: the quotes are not closed.
fn parameter_value(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let Some(mut quoted) = text.trim_ascii_start().strip_prefix(b"\"") else {
        let token = text.split(|byte| *byte == b';').next()?.trim_ascii();
        return Some((token.to_vec(), after_semicolon(text)));
    };
    let mut value = Vec::new();
    loop {
        match quoted {
            [b'"', rest @ ..] => return Some((value, after_semicolon(rest))),
            [b'\\', byte, rest @ ..] | [byte, rest @ ..] => {
                value.push(*byte);
                quoted = rest;
            }
            [] => return None,
        }
    }
}

/// What stands between the delimiters, in order. With the delimiter put between them they are the body again: two
/// bodies with the same segments differ in nothing but the boundary.
///
/// A delimiter is `--boundary` at the start of the body or of a line (CRLF), followed by nothing but perhaps `--` and
/// blanks: a boundary that is only the beginning of a line is content here. The line break before it, and what
/// follows it, belong to the segments.
pub(super) fn segments<'a>(body: &'a [u8], boundary: &[u8]) -> impl Iterator<Item = &'a [u8]> {
    let delimiter = [b"--", boundary].concat();
    let mut rest = Some(body);
    let mut at_line_start = true;
    std::iter::from_fn(move || {
        let text = rest?;
        let mut at = 0;
        while let Some(line) = text.get(at..) {
            if at_line_start && line.strip_prefix(delimiter.as_slice()).is_some_and(ends_line) {
                rest = text.get(at + delimiter.len()..);
                at_line_start = false;
                return text.get(..at);
            }
            let Some(feed) = line.iter().position(|byte| *byte == b'\n') else { break };
            at_line_start = line.get(..feed).is_some_and(|line| line.ends_with(b"\r"));
            at += feed + 1;
        }
        rest = None;
        Some(text)
    })
}

fn ends_line(text: &[u8]) -> bool {
    let text = text.strip_prefix(b"--").unwrap_or(text);
    let blanks = text.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    text.get(blanks..).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"\r\n"))
}
