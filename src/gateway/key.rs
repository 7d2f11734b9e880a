//! The idempotency key, as it stands in its header.

use super::headers;
use super::problem::{Code, Problem};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};

/// Longest key, in characters.
pub const KEY_LEN_MAX: usize = 255;

/// A key, decoded, with the header value that it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    pub decoded: Bytes,
    pub header: HeaderValue,
}

/// Reads the key: one header line, an RFC 9651 String (parameters ignored) or a bare token of visible ASCII without `"`
/// and `,`. `None`: there is no such header.
///
/// # Errors
/// [`Code::KeyInvalid`], saying what is wrong.
pub fn parse(headers: &HeaderMap, name: &HeaderName) -> Result<Option<Key>, Problem> {
    let mut lines = headers.get_all(name).iter();
    let Some(header) = lines.next() else { return Ok(None) };
    let invalid = |detail: &str| Problem::new(Code::KeyInvalid, format!("{name}: {detail}."));
    if lines.next().is_some() {
        return Err(invalid("send exactly one line of this header"));
    }
    if headers::connection_names(headers, name) {
        return Err(invalid("the key must not be named in Connection, it is meant for the whole way"));
    }
    let decoded = decode(header.as_bytes()).map_err(invalid)?;
    Ok(Some(Key { decoded, header: header.clone() }))
}

fn decode(value: &[u8]) -> Result<Bytes, &'static str> {
    let value = value.trim_ascii();
    let decoded = if value.first() == Some(&b'"') {
        match sfv::Parser::new(value).parse::<sfv::Item>().map(|item| item.bare_item) {
            Ok(sfv::BareItem::String(string)) => Bytes::copy_from_slice(string.as_str().as_bytes()),
            _ => return Err("the quoted key is not an RFC 9651 String; close the quote and escape only \" and \\"),
        }
    } else if value.iter().all(|&byte| byte.is_ascii_graphic() && byte != b'"' && byte != b',') {
        Bytes::copy_from_slice(value)
    } else {
        return Err("a key consists of visible ASCII without quote and comma, or is a quoted string");
    };
    match decoded.len() {
        0 => Err("the key is empty; send 1 to 255 characters"),
        1..=KEY_LEN_MAX => Ok(decoded),
        _ => Err("the key is longer than 255 characters"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&[u8]]) -> Result<Option<Vec<u8>>, Problem> {
        let name = HeaderName::from_static("idempotency-key");
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(&name, HeaderValue::from_bytes(line).unwrap());
        }
        parse(&headers, &name).map(|key| key.map(|key| key.decoded.to_vec()))
    }

    #[test]
    fn accepted_keys() {
        let longest = "k".repeat(255);
        let quoted = format!("\"{longest}\"");
        for (line, key) in [
            (r#""abc""#, "abc"),
            ("abc", "abc"),
            ("  abc ", "abc"),
            (r#""abc";a=1;b="x""#, "abc"),
            (r#""a\"b\\c d""#, r#"a"b\c d"#),
            ("a;b=c", "a;b=c"),
            (r"a\b{}'()/%41", r"a\b{}'()/%41"),
            ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
            (&longest, &longest),
            (&quoted, &longest),
        ] {
            assert_eq!(read(&[line.as_bytes()]).unwrap().unwrap(), key.as_bytes(), "{line}");
        }
        assert_eq!(read(&[]).unwrap(), None);
    }

    #[test]
    fn refused_keys() {
        let long = "k".repeat(256);
        let long_quoted = format!("\"{long}\"");
        for line in [
            "",
            "  ",
            r#""""#,
            r#""abc"#,
            r#""abc" "def""#,
            r#""abc",d"#,
            "a,b",
            "a b",
            "a\"b",
            r#""a\c""#,
            r#""abc"; "#,
            &long,
            &long_quoted,
        ] {
            assert_eq!(read(&[line.as_bytes()]).unwrap_err().code, Code::KeyInvalid, "{line}");
        }
        assert!(read(&["schlüssel".as_bytes()]).is_err());
        assert!(read(&["\"schlüssel\"".as_bytes()]).is_err());
        assert!(read(&[b"\xff\xfe"]).is_err());
        assert!(read(&[b"a", b"a"]).is_err());
    }

    #[test]
    fn a_key_named_in_connection_is_refused() {
        let name = HeaderName::from_static("idempotency-key");
        let mut headers = HeaderMap::new();
        headers.append(&name, HeaderValue::from_static("abc"));
        headers.append("connection", HeaderValue::from_static("close, Idempotency-KEY"));
        assert!(parse(&headers, &name).is_err());
    }
}
