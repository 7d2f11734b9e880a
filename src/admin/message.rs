//! An operator's answer: an HTTP/1.1 response message (RFC 9112), as it will be replayed.

use super::records::RouteRules;
use crate::gateway::reply::{recordable, to_recorded};
use crate::idempotency::Response;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

/// Field lines that a head may have.
const LINES_MAX: usize = 100;

#[derive(Debug)]
pub(super) struct Message {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

/// Reads a message: a status line, fields, an empty line, and all the rest as the body.
///
/// # Errors
/// Why it cannot be replayed.
pub(super) fn parse(message: &Bytes) -> Result<Message, String> {
    let mut lines = [httparse::EMPTY_HEADER; LINES_MAX];
    let mut head = httparse::Response::new(&mut lines);
    let parsed = head.parse(message).map_err(|error| format!("its head is malformed: {error}"))?;
    let httparse::Status::Complete(head_len) = parsed else {
        return Err("its head does not end: an empty line stands before the body".to_owned());
    };
    if head.version != Some(1) {
        return Err("its first line does not begin with HTTP/1.1".to_owned());
    }
    let status = head.code.and_then(|code| StatusCode::from_u16(code).ok());
    let Some(status) = status.filter(|status| (200..600).contains(&status.as_u16())) else {
        return Err("its status is not between 200 and 599".to_owned());
    };
    let mut headers = HeaderMap::with_capacity(head.headers.len());
    for line in head.headers.iter() {
        let field = HeaderName::from_bytes(line.name.as_bytes()).ok().zip(HeaderValue::from_bytes(line.value).ok());
        let Some((name, value)) = field else { return Err(format!("its field {} is invalid", line.name)) };
        headers.append(name, value);
    }
    let body = message.slice(head_len..);
    if headers.contains_key(TRANSFER_ENCODING) {
        return Err("it has a Transfer-Encoding: give the body as it is, without the field".to_owned());
    }
    let declared = |len: &HeaderValue| len.to_str().ok()?.parse::<usize>().ok();
    if headers.get_all(CONTENT_LENGTH).iter().any(|len| declared(len) != Some(body.len())) {
        let len = body.len();
        return Err(format!("its Content-Length is not that of its body, which has {len} bytes: correct or remove it"));
    }
    let bodiless = matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED);
    if bodiless && !body.is_empty() {
        return Err(format!("a response with status {} has no body", status.as_u16()));
    }
    Ok(Message { status, headers, body })
}

impl Message {
    /// What is recorded of it, as of any response on this route.
    ///
    /// # Errors
    /// It is too long.
    pub(super) fn record(self, rules: &RouteRules) -> Result<Response, String> {
        if self.body.len() > rules.max_recorded_body {
            return Err(format!(
                "its body is longer than the route's max_recorded_body ({} bytes)",
                rules.max_recorded_body
            ));
        }
        let kept = recordable(&self.headers, &rules.drop_headers);
        Ok(to_recorded(self.status, &kept, self.body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &'static str) -> Result<Response, String> {
        let rules = RouteRules {
            max_recorded_body: 8,
            drop_headers: vec![http::header::SET_COOKIE],
            ..RouteRules::unconfigured()
        };
        parse(&Bytes::from_static(text.as_bytes()))?.record(&rules)
    }

    #[test]
    fn a_message_is_recorded_as_any_response() {
        let text = "HTTP/1.1 201 Created\r\nLocation: /posts/1\r\nX-A: 1\r\nx-a: 2\r\nSet-Cookie: a=b\r\nConnection: close, x-hop\r\n\
                    X-Hop: 1\r\nKeep-Alive: timeout=1\r\nIdempotency-Outcome: final\r\nContent-Length: 4\r\n\r\n{\n}\n";
        let response = read(text).unwrap();
        let field = |name, value| (Bytes::from_static(name), Bytes::from_static(value));
        let expected = [field(b"location", b"/posts/1"), field(b"x-a", b"1"), field(b"x-a", b"2")];
        assert_eq!((response.status, response.body.as_ref()), (201, b"{\n}\n".as_slice()));
        assert_eq!(response.headers, expected);
    }

    #[test]
    fn lines_may_end_in_lf_alone_and_the_reason_may_be_missing() {
        for text in ["HTTP/1.1 200 OK\nA: b\n\nbody\r\n", "HTTP/1.1 200\r\nA: b\r\n\r\nbody\r\n"] {
            let response = read(text).unwrap();
            assert_eq!(
                (response.status, response.headers.len(), response.body.as_ref()),
                (200, 1, b"body\r\n".as_slice())
            );
        }
        for status in [204, 304, 599] {
            let text = format!("HTTP/1.1 {status} X\r\n\r\n");
            assert_eq!(parse(&Bytes::from(text)).unwrap().status.as_u16(), status);
        }
    }

    #[test]
    fn what_cannot_be_replayed_is_refused() {
        for (text, why) in [
            ("", "does not end"),
            ("HTTP/1.1 200 OK\r\n", "does not end"),
            ("HTTP/1.1 200 OK\r\nA: b\r\n", "does not end"),
            ("{\"id\": 1}\n\n", "malformed"),
            ("HTTP/2 200\r\n\r\n", "malformed"),
            ("HTTP/1.0 200 OK\r\n\r\n", "HTTP/1.1"),
            ("HTTP/1.1 100 Continue\r\n\r\n", "between 200 and 599"),
            ("HTTP/1.1 101 Switching\r\n\r\n", "between 200 and 599"),
            ("HTTP/1.1 600 X\r\n\r\n", "between 200 and 599"),
            ("HTTP/1.1 20 X\r\n\r\n", "malformed"),
            ("HTTP/1.1 200 OK\r\na b: c\r\n\r\n", "malformed"),
            ("HTTP/1.1 200 OK\r\nA: b\0c\r\n\r\n", "malformed"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbody", "Content-Length"),
            ("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nbody", "Content-Length"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody", "Content-Length"),
            ("HTTP/1.1 204 No Content\r\n\r\nbody", "has no body"),
            ("HTTP/1.1 205 Reset\r\n\r\nbody", "has no body"),
            ("HTTP/1.1 304 Not Modified\r\n\r\nbody", "has no body"),
            ("HTTP/1.1 200 OK\r\n\r\n123456789", "max_recorded_body"),
        ] {
            let error = read(text).err().unwrap_or_else(|| panic!("taken: {text:?}"));
            assert!(error.contains(why), "{text:?}: {error}");
        }
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(LINES_MAX + 1));
        assert!(parse(&Bytes::from(many)).is_err());
    }
}
