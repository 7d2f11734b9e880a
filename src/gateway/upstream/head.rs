//! Heads on the way to and from the upstream (RFC 9112): written, read, and what they say about the body behind them.

use crate::gateway::headers::{declared_length, is_soundly_framed, keep_alive_seconds, list};
use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use std::mem::MaybeUninit;
use std::time::Duration;

/// Bytes that a response's head may have.
pub(super) const HEAD_MAX: usize = 64 * 1024;
/// Field lines that a response's head may have.
const LINES_MAX: usize = 100;

/// Writes a request's head. The target is in origin-form, or `*`.
pub(super) fn encode<B>(request: &Request<B>) -> Bytes {
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum::<usize>();
    let mut head = BytesMut::with_capacity(request.method().as_str().len() + target.len() + fields + 15);
    head.put_slice(request.method().as_str().as_bytes());
    head.put_u8(b' ');
    if target.starts_with('?') {
        // A query alone, from an absolute target (RFC 9112 §3.2.1).
        head.put_u8(b'/');
    }
    head.put_slice(target.as_bytes());
    head.put_slice(b" HTTP/1.1\r\n");
    for (name, value) in request.headers() {
        put_field(&mut head, name, value);
    }
    head.put_slice(b"\r\n");
    head.freeze()
}

pub(super) fn put_field(to: &mut BytesMut, name: &HeaderName, value: &HeaderValue) {
    to.put_slice(name.as_str().as_bytes());
    to.put_slice(b": ");
    to.put_slice(value.as_bytes());
    to.put_slice(b"\r\n");
}

/// Where a response's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    Length(u64),
    Chunked,
    /// With the connection.
    Close,
    /// It is no body: the protocol has been switched.
    Switched,
}

/// A response's head.
pub(super) struct Head {
    pub(super) response: Response<()>,
    pub(super) framing: Framing,
    /// How long the connection may be kept for the next request; zero: not at all.
    pub(super) keep: Duration,
}

/// Takes a final response's head out of what has been read; interim ones (RFC 9110 §15.2) in front of it are dropped and
/// counted in `interim`. `None`: its end has not come yet.
///
/// # Errors
/// What is wrong with it.
pub(super) fn take(
    read: &mut BytesMut,
    asked: &Asked,
    interim: &mut usize,
    idle_timeout: Duration,
) -> Result<Option<Head>, &'static str> {
    loop {
        let Some(len) = head_len(read) else {
            return if read.len() >= HEAD_MAX { Err("a head of more than 64 KiB") } else { check_start(read) };
        };
        let response = parse(read.split_to(len).freeze())?;
        let status = response.status();
        if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
            *interim += 1;
            if *interim > INTERIM_MAX {
                return Err("too many interim responses");
            }
            continue;
        }
        let framing = framing(&response, asked)?;
        let keep =
            if may_persist(&response, framing) { keep(response.headers(), idle_timeout) } else { Duration::ZERO };
        return Ok(Some(Head { response, framing, keep }));
    }
}

/// Interim responses before the final one: 100, 102 and 103 come a few times at most.
const INTERIM_MAX: usize = 64;

/// What has been asked, as far as the response's framing depends on it.
pub(super) struct Asked {
    pub(super) head_only: bool,
    pub(super) upgrade: bool,
}

impl Asked {
    pub(super) fn by<B>(request: &Request<B>) -> Self {
        let upgrade = request.headers().contains_key(http::header::UPGRADE);
        Self { head_only: request.method() == Method::HEAD, upgrade }
    }
}

/// Length of the head that `read` begins with, its empty line included.
fn head_len(read: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', read).find_map(|at| match read.get(at + 1..)? {
        [b'\n', ..] => Some(at + 2),
        [b'\r', b'\n', ..] => Some(at + 3),
        _ => None,
    })
}

/// Bytes within which a head has to look like one.
const START_LEN: usize = 256;

/// What is no HTTP is told early: its sender may wait for an answer for ever.
fn check_start(read: &[u8]) -> Result<Option<Head>, &'static str> {
    let mut lines = [MaybeUninit::uninit(); LINES_MAX];
    let mut response = httparse::Response::new(&mut []);
    let parser = httparse::ParserConfig::default();
    if read.len() <= START_LEN && !read.is_empty() {
        parser.parse_response_with_uninit_headers(&mut response, read, &mut lines).map_err(|_| MALFORMED)?;
    }
    Ok(None)
}

const MALFORMED: &str = "a head that is none";

fn parse(head: Bytes) -> Result<Response<()>, &'static str> {
    let mut lines = [MaybeUninit::uninit(); LINES_MAX];
    let mut parsed = httparse::Response::new(&mut []);
    let parser = httparse::ParserConfig::default();
    let done = parser.parse_response_with_uninit_headers(&mut parsed, &head, &mut lines).map_err(|_| MALFORMED)?;
    let (Some(version), Some(code), true) = (parsed.version, parsed.code, done.is_complete()) else {
        return Err(MALFORMED);
    };
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(code).map_err(|_| MALFORMED)?;
    *response.version_mut() = if version == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
    let headers = response.headers_mut();
    headers.reserve(parsed.headers.len());
    for line in parsed.headers {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| MALFORMED)?;
        let value = HeaderValue::from_maybe_shared(head.slice_ref(line.value)).map_err(|_| MALFORMED)?;
        headers.append(name, value);
    }
    Ok(response)
}

/// RFC 9112 §6.3. Refuses what others may read otherwise.
fn framing(response: &Response<()>, asked: &Asked) -> Result<Framing, &'static str> {
    let (status, headers) = (response.status(), response.headers());
    if !is_soundly_framed(headers) {
        return Err("a response whose end is in doubt");
    }
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return if asked.upgrade { Ok(Framing::Switched) } else { Err("101 to a request without Upgrade") };
    }
    if asked.head_only || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED {
        return Ok(Framing::Length(0));
    }
    if headers.contains_key(TRANSFER_ENCODING) {
        let understood = response.version() == Version::HTTP_11;
        return if understood { Ok(Framing::Chunked) } else { Err("a transfer coding in HTTP/1.0") };
    }
    Ok(declared_length(headers).map_or(Framing::Close, Framing::Length))
}

/// Whether the connection may serve another request after this response (RFC 9112 §9.3).
fn may_persist(response: &Response<()>, framing: Framing) -> bool {
    let headers = response.headers();
    let says = |word: &[u8]| list(headers, &CONNECTION).any(|option| option.eq_ignore_ascii_case(word));
    // Whoever sends both lengths may mean the other one.
    let both = framing == Framing::Chunked && headers.contains_key(CONTENT_LENGTH);
    let ends = framing == Framing::Close || both;
    !ends && !says(b"close") && (response.version() == Version::HTTP_11 || says(b"keep-alive"))
}

/// `Keep-Alive: timeout=N` lowers the idle time below N: the race with the upstream's close is its to lose.
fn keep(headers: &HeaderMap, idle_timeout: Duration) -> Duration {
    let told = keep_alive_seconds(headers).map(|seconds| Duration::from_secs(seconds.saturating_sub(1)));
    told.map_or(idle_timeout, |told| told.min(idle_timeout))
}
