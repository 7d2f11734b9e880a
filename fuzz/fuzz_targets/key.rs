//! A header line is a key or an error, as RFC 9651 and the grammar of bare keys say, written here a second time.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use oncegate::gateway::key::{Key, parse};
use oncegate::gateway::problem::Code;

static NAME: HeaderName = HeaderName::from_static("idempotency-key");

fn read(lines: &[&[u8]], connection: Option<&'static str>) -> Option<Key> {
    let mut headers = HeaderMap::new();
    for line in lines {
        headers.append(&NAME, HeaderValue::from_bytes(line).unwrap());
    }
    if let Some(connection) = connection {
        headers.insert("connection", HeaderValue::from_static(connection));
    }
    match parse(&headers, &NAME) {
        Ok(key) => Some(key.expect("there is such a header")),
        Err(problem) => {
            assert_eq!(problem.code, Code::KeyInvalid);
            None
        }
    }
}

fn decoded(line: &[u8]) -> Option<Vec<u8>> {
    read(&[line], None).map(|key| key.decoded.to_vec())
}

/// The String at the beginning (RFC 9651 §4.2.5), and what comes behind its closing quote.
fn string(line: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut bytes = line.strip_prefix(b"\"")?;
    let mut text = Vec::new();
    loop {
        let (&byte, rest) = bytes.split_first()?;
        bytes = rest;
        match byte {
            b'"' => return Some((text, bytes)),
            b'\\' => {
                let (&escaped, rest) = bytes.split_first()?;
                bytes = rest;
                if escaped != b'"' && escaped != b'\\' {
                    return None;
                }
                text.push(escaped);
            }
            0x20..=0x7e => text.push(byte),
            _ => return None,
        }
    }
}

/// `Some(None)`: surely no key. `None`: its parameters decide.
fn expected(line: &[u8]) -> Option<Option<Vec<u8>>> {
    let line = line.trim_ascii();
    let sized = |key: Vec<u8>| Some(key).filter(|key| (1..=255).contains(&key.len()));
    if line.first() != Some(&b'"') {
        let bare = line.iter().all(|byte| (0x21..=0x7e).contains(byte) && *byte != b'"' && *byte != b',');
        return Some(if bare { sized(line.to_vec()) } else { None });
    }
    match string(line) {
        Some((key, b"")) => Some(sized(key)),
        Some((key, [b';', ..])) if (1..=255).contains(&key.len()) => None,
        _ => Some(None),
    }
}

fuzz_target!(|data: &[u8]| {
    if HeaderValue::from_bytes(data).is_err() {
        return;
    }
    let key = read(&[data], None);
    if let Some(expected) = expected(data) {
        assert_eq!(key.as_ref().map(|key| key.decoded.to_vec()), expected);
    }
    assert!(read(&[data, data], None).is_none(), "two lines");
    assert!(read(&[data, b"other"], None).is_none(), "two lines");
    assert!(read(&[data], Some("close, Idempotency-Key")).is_none(), "named in Connection");
    let padded = [b" \t", data, b"\t "].concat();
    let Some(key) = key else {
        assert!(decoded(&padded).is_none());
        return;
    };
    assert_eq!(key.header.as_bytes(), data, "what goes upstream is what came");
    let key = key.decoded.to_vec();
    assert!((1..=255).contains(&key.len()));
    assert!(key.iter().all(|byte| (0x20..=0x7e).contains(byte)));
    assert_eq!(decoded(&padded).as_deref(), Some(&*key));
    if let Some((text, _)) = string(data.trim_ascii()) {
        assert_eq!(text, key, "parameters do not count");
    }

    let mut quoted = vec![b'"'];
    for &byte in &key {
        if byte == b'"' || byte == b'\\' {
            quoted.push(b'\\');
        }
        quoted.push(byte);
    }
    quoted.push(b'"');
    assert_eq!(decoded(&quoted).as_deref(), Some(&*key), "written out as a String");
    assert_eq!(decoded(&[&*quoted, b";a;b=\"x,;\\\"\"; c=?1"].concat()).as_deref(), Some(&*key), "with parameters");
    assert!(decoded(&[&*quoted, b",a"].concat()).is_none(), "a list is no key");
    // The same key as a bare token, where it can be one.
    if key.iter().all(|byte| !b" \",".contains(byte)) {
        assert_eq!(decoded(&key), Some(key));
    }
});
