//! As much HTTP/1.1 as both ends of a proxy need that is known to behave: messages framed by `Content-Length`.

use std::io::{Error, ErrorKind, Result};

/// No head here is anywhere near this.
const HEAD_MAX: usize = 16 << 10;

/// Takes messages apart as they come from a stream; keeps of each what `T` says, and drops the bodies.
pub struct Reader<T> {
    /// A head of which the end is still missing.
    head: Vec<u8>,
    body_left: usize,
    message: Option<T>,
}

impl<T> Reader<T> {
    pub fn new() -> Self {
        Self { head: Vec::new(), body_left: 0, message: None }
    }

    /// Takes the bytes that a read has brought. `begin` judges a head, `end` gets its verdict when the body is complete.
    pub fn feed(
        &mut self,
        mut bytes: &[u8],
        mut begin: impl FnMut(&[u8]) -> Result<T>,
        mut end: impl FnMut(T),
    ) -> Result<()> {
        loop {
            if self.message.is_none() {
                if bytes.is_empty() {
                    return Ok(());
                }
                let head_len = if self.head.is_empty() {
                    head_len(bytes)
                } else {
                    // Rare: a head in two pieces. What was there already moves to the front of the rest.
                    self.head.extend_from_slice(bytes);
                    let whole = std::mem::take(&mut self.head);
                    if head_len(&whole).is_some() {
                        return self.feed(&whole, begin, end);
                    }
                    self.head = whole;
                    return if self.head.len() < HEAD_MAX { Ok(()) } else { Err(malformed("a head without end")) };
                };
                let Some(head_len) = head_len else {
                    self.head.extend_from_slice(bytes);
                    return Ok(());
                };
                let (head, rest) = bytes.split_at(head_len);
                self.body_left = content_length(head)?;
                self.message = Some(begin(head)?);
                bytes = rest;
            }
            let taken = self.body_left.min(bytes.len());
            self.body_left -= taken;
            bytes = &bytes[taken..];
            if self.body_left > 0 {
                return Ok(());
            }
            if let Some(message) = self.message.take() {
                end(message);
            }
        }
    }
}

pub fn malformed(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what.to_owned())
}

fn head_len(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|&byte| byte == b'\n') {
        from += at + 1;
        if bytes[..from].ends_with(b"\r\n\r\n") {
            return Some(from);
        }
    }
    None
}

fn content_length(head: &[u8]) -> Result<usize> {
    for line in head.split(|&byte| byte == b'\n') {
        if let Some(value) = value_of(line, b"content-length:") {
            let text = std::str::from_utf8(value).map_err(|_| malformed("Content-Length"))?;
            return text.trim().parse().map_err(|_| malformed("Content-Length"));
        }
        if value_of(line, b"transfer-encoding:").is_some() {
            return Err(malformed("a message in chunks, where its length was known"));
        }
    }
    Ok(0)
}

fn value_of<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (found, value) = line.split_at_checked(name.len())?;
    found.eq_ignore_ascii_case(name).then_some(value)
}

/// What a client looks at in the head of a response.
#[derive(Clone, Copy)]
pub struct Reply {
    pub status: u16,
    /// Marked as an answer from the record.
    pub replayed: bool,
}

impl Reply {
    pub fn of(head: &[u8]) -> Result<Self> {
        let text = head.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok());
        let status = text.and_then(|text| text.parse().ok()).ok_or_else(|| malformed("a status line"))?;
        Ok(Self { status, replayed: value(head, b"idempotency-replayed:").is_some_and(|value| value == b"true") })
    }
}

/// The idempotency key of a request of ours: 32 hexadecimal digits.
pub fn key(head: &[u8]) -> Result<Option<u128>> {
    let Some(value) = value(head, b"idempotency-key:") else { return Ok(None) };
    let text = std::str::from_utf8(value).ok();
    text.and_then(|text| u128::from_str_radix(text, 16).ok()).map(Some).ok_or_else(|| malformed("a key"))
}

/// The value of the first line with this name.
fn value<'a>(head: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    head.split(|&byte| byte == b'\n').find_map(|line| value_of(line, name)).map(<[u8]>::trim_ascii)
}

/// What the upstream answers with.
#[derive(Clone, Copy)]
pub enum Answer {
    /// 200, 128 bytes of JSON.
    Found,
    /// 201, 128 bytes of JSON.
    Created,
    /// 200, 64 KiB of JSON.
    Large,
}

impl Answer {
    /// A target with `large` in its query asks for a large answer.
    pub fn to(head: &[u8]) -> Result<Self> {
        let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
        Ok(if line.windows(6).any(|window| window == b"?large") {
            Self::Large
        } else if line.starts_with(b"POST ") {
            Self::Created
        } else {
            Self::Found
        })
    }
}

/// A JSON text of this many bytes.
pub fn json(len: usize) -> Vec<u8> {
    let (begin, end) = (r#"{"platform":"mastodon","accountId":"acc_1","status":"publish","text":""#, r#""}"#);
    let filler = "All work and no play makes a proxy dull. ";
    let text = filler.bytes().cycle().take(len - begin.len() - end.len());
    begin.bytes().chain(text).chain(end.bytes()).collect()
}

/// The upstream's answers, made once.
pub struct Answers {
    found: Vec<u8>,
    created: Vec<u8>,
    large: Vec<u8>,
}

impl Answers {
    pub fn new() -> Self {
        let make = |line: &str, len: usize| {
            let head = format!(
                "HTTP/1.1 {line}\r\nServer: upstream\r\nDate: Tue, 24 Nov 2026 08:00:00 GMT\r\n\
                 Content-Type: application/json\r\nContent-Length: {len}\r\n\r\n"
            );
            [head.into_bytes(), json(len)].concat()
        };
        Self {
            found: make("200 OK", 128),
            created: make("201 Created\r\nLocation: /posts/1", 128),
            large: make("200 OK", 64 << 10),
        }
    }

    pub fn bytes(&self, answer: Answer) -> &[u8] {
        match answer {
            Answer::Found => &self.found,
            Answer::Created => &self.created,
            Answer::Large => &self.large,
        }
    }
}
