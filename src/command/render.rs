//! Records for people's eyes, or as JSON. Keys, paths and all that a gateway says may come from strangers: no control
//! character of theirs reaches the terminal.

use serde_json::Value;
use std::fmt::Write;

/// What a terminal, or the eye, could be deceived by: control and format characters, exotic spaces, what is no character.
fn is_harmless(c: char) -> bool {
    matches!(c, '\'' | '"' | '\\') || c.escape_debug().len() == 1
}

/// Replaces all but harmless characters by `\n`, `\u{7f}` and the like. A backslash becomes two, so that nobody can forge an escape.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            c if is_harmless(c) => out.push(c),
            c => out.extend(c.escape_debug()),
        }
    }
    out
}

/// A JSON document and a line end; in its strings all but harmless characters are escaped, which no parser minds.
pub(super) fn json(document: &Value) -> String {
    let text = document.to_string();
    let mut out = String::with_capacity(text.len() + 1);
    // Outside of strings there are harmless ones only.
    for c in text.chars() {
        if is_harmless(c) {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out.push('\n');
    out
}

fn plain(record: &Value, name: &str) -> String {
    match record.get(name) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) if text.is_empty() => "\"\"".to_owned(),
        Some(Value::String(text)) => escape(text),
        Some(other) => escape(&other.to_string()),
    }
}

/// Without the fraction of a second.
fn time(record: &Value, name: &str) -> String {
    let text = plain(record, name);
    match text.split_once('.') {
        Some((seconds, fraction)) if fraction.ends_with('Z') => format!("{seconds}Z"),
        _ => text,
    }
}

/// Head and body of what was recorded, in bytes.
fn size(record: &Value) -> String {
    match record.get("recorded").and_then(Value::as_str) {
        Some("full") => format!("{}+{}", plain(record, "header_bytes"), plain(record, "body_bytes")),
        _ => plain(record, "recorded"),
    }
}

type Column = (&'static str, fn(&Value) -> String);

const COLUMNS: [Column; 14] = [
    ("ID", |record| plain(record, "id")),
    ("STATE", |record| plain(record, "state")),
    ("STATUS", |record| plain(record, "status")),
    ("WHY", |record| plain(record, "why")),
    ("ATTEMPTS", |record| plain(record, "attempts")),
    ("CLAIMED", |record| time(record, "claimed_at")),
    ("SETTLED", |record| time(record, "settled_at")),
    ("EXPIRES", |record| time(record, "expires_at")),
    ("SIZE", size),
    ("TOKEN", |record| plain(record, "token")),
    ("ROUTE", |record| plain(record, "route")),
    ("METHOD", |record| plain(record, "method")),
    ("PATH", |record| plain(record, "path")),
    ("KEY", |record| plain(record, "key")),
];

pub(super) fn table(records: &[Value]) -> String {
    let head = COLUMNS.map(|(name, _)| name.to_owned());
    let rows: Vec<_> =
        std::iter::once(head).chain(records.iter().map(|record| COLUMNS.map(|(_, cell)| cell(record)))).collect();
    let mut widths = [0; COLUMNS.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// All that is known of a record, a line for each field.
pub(super) fn record(record: &Value) -> String {
    const FIELDS: [&str; 17] = [
        "id",
        "token",
        "state",
        "why",
        "status",
        "in_flight",
        "attempts",
        "claimed_at",
        "settled_at",
        "expires_at",
        "recorded",
        "header_bytes",
        "body_bytes",
        "route",
        "method",
        "path",
        "key",
    ];
    let mut out = String::new();
    for name in FIELDS {
        let _ = writeln!(out, "{:<14}{}", format!("{name}:"), plain(record, name));
    }
    out
}

fn state(record: &Value) -> String {
    let state = plain(record, "state");
    match (plain(record, "status").as_str(), plain(record, "why").as_str()) {
        ("-", "-") => state,
        ("-", why) => format!("{state} ({why})"),
        (status, _) => format!("{state} {status}"),
    }
}

/// What was done to a record.
pub(super) fn done(document: &Value) -> String {
    let id = plain(document, "id");
    let before = document.get("before").map(state).unwrap_or_default();
    match document.get("after").filter(|after| !after.is_null()) {
        Some(after) => format!("{id}: was {before}, is {}\n", state(after)),
        None => format!("{id}: was {before}, is gone: its key is free\n"),
    }
}

pub(super) fn refused(id: &str, problem: &Value) -> String {
    format!("{}: refused: {}: {}\n", escape(id), plain(problem, "code"), plain(problem, "detail"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const HOSTILE: &str = "a\x1b[31m\r\n\u{7f}\u{9b}2J\u{202e}evil\u{200b}\u{feff}\u{2028}\u{e0001}\u{0301}é漢\\x1b\"'";

    fn is_tame(text: &str) -> bool {
        !text.chars().any(|c| {
            (c.is_control() && c != '\n')
                || matches!(c, '\u{200b}'..='\u{202e}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
        })
    }

    #[test]
    fn what_strangers_write_cannot_drive_the_terminal() {
        assert!(!is_tame(HOSTILE));
        let escaped = escape(HOSTILE);
        assert!(is_tame(&escaped) && !escaped.contains('\n'), "{escaped}");
        assert!(escaped.starts_with("a\\u{1b}[31m\\r\\n\\u{7f}\\u{9b}2J\\u{202e}evil"), "{escaped}");
        assert!(escaped.ends_with("é漢\\\\x1b\"'"), "{escaped}");
        let fields =
            ["id", "token", "state", "key", "path", "route", "method", "why", "claimed_at", "recorded", "status"];
        let hostile: Value = fields.iter().map(|name| ((*name).to_owned(), Value::from(HOSTILE))).collect();
        let table = table(std::slice::from_ref(&hostile));
        assert!(is_tame(&table));
        assert_eq!(table.lines().count(), 2);
        assert_eq!(record(&hostile).lines().count(), 17);
        assert!(is_tame(&record(&hostile)));
        let document = json!({ "id": HOSTILE, "before": hostile, "after": hostile });
        assert!(is_tame(&done(&document)) && done(&document).lines().count() == 1);
        let problem = json!({ "code": HOSTILE, "detail": HOSTILE });
        assert!(is_tame(&refused(HOSTILE, &problem)) && refused(HOSTILE, &problem).lines().count() == 1);
    }

    #[test]
    fn json_says_the_same_without_raw_controls() {
        let document = json!({ HOSTILE: [HOSTILE, 1.50, null, { "a": true }] });
        let text = json(&document);
        assert!(is_tame(&text), "{text}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), document);
    }

    #[test]
    fn columns_are_aligned() {
        let records = [
            json!({ "id": "1".repeat(32), "state": "unknown", "status": 502, "why": "status", "key": "k" }),
            json!({
                "id": "2".repeat(32), "state": "completed", "claimed_at": "2026-01-31T12:00:00.123Z", "recorded": "full",
                "header_bytes": 40, "body_bytes": 7, "key": "",
            }),
        ];
        let table = table(&records);
        let lines: Vec<_> = table.lines().collect();
        let at = |name: &str| lines[0].find(name).unwrap();
        assert_eq!(lines[1][at("STATUS")..].split(' ').next(), Some("502"));
        assert_eq!(lines[2][at("STATUS")..].split(' ').next(), Some("-"));
        assert_eq!(lines[2][at("CLAIMED")..].split(' ').next(), Some("2026-01-31T12:00:00Z"));
        assert_eq!(lines[2][at("SIZE")..].split(' ').next(), Some("40+7"));
        assert_eq!((&lines[1][at("KEY")..], &lines[2][at("KEY")..]), ("k", "\"\""));
    }
}
