//! What the gateway itself answers: one error type, RFC 9457 bodies.

use super::cors::Reader;
use super::reply::ReplyBody;
use crate::telemetry::Outcome as Result_;
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use std::borrow::Cow;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    KeyMissing,
    KeyInvalid,
    ScopeMissing,
    TokenInvalid,
    PathAmbiguous,
    BadRequest,
    TargetTooLong,
    HeadersTooLarge,
    RequestTimeout,
    InProgress,
    OutcomeUnknown,
    BodyNotRecorded,
    BodyTooLarge,
    KeyReused,
    UpstreamUnreachable,
    UpstreamBroken,
    UpstreamTimeout,
    StoreUnavailable,
    Overloaded,
    Draining,
    ProbeFailed,
}

impl Code {
    /// The code's name, its status and its title.
    fn facts(self) -> (&'static str, StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::KeyMissing => ("key_missing", S::BAD_REQUEST, "Idempotency key missing"),
            Self::KeyInvalid => ("key_invalid", S::BAD_REQUEST, "Idempotency key invalid"),
            Self::ScopeMissing => ("scope_missing", S::BAD_REQUEST, "The key's owner cannot be told"),
            Self::TokenInvalid => ("token_invalid", S::UNAUTHORIZED, "Token invalid"),
            Self::PathAmbiguous => ("path_ambiguous", S::BAD_REQUEST, "Ambiguous path"),
            Self::BadRequest => ("bad_request", S::BAD_REQUEST, "Bad request"),
            Self::TargetTooLong => ("target_too_long", S::URI_TOO_LONG, "Target too long"),
            Self::HeadersTooLarge => ("headers_too_large", S::REQUEST_HEADER_FIELDS_TOO_LARGE, "Headers too large"),
            Self::RequestTimeout => ("request_timeout", S::REQUEST_TIMEOUT, "Request timeout"),
            Self::InProgress => ("in_progress", S::CONFLICT, "Request in progress"),
            Self::OutcomeUnknown => ("outcome_unknown", S::CONFLICT, "Outcome unknown"),
            Self::BodyNotRecorded => ("body_not_recorded", S::CONFLICT, "Response not recorded"),
            Self::BodyTooLarge => ("body_too_large", S::PAYLOAD_TOO_LARGE, "Body too large"),
            Self::KeyReused => ("key_reused", S::UNPROCESSABLE_ENTITY, "Idempotency key reused"),
            Self::UpstreamUnreachable => ("upstream_unreachable", S::BAD_GATEWAY, "Upstream unreachable"),
            Self::UpstreamBroken => ("upstream_broken", S::BAD_GATEWAY, "Upstream connection broken"),
            Self::UpstreamTimeout => ("upstream_timeout", S::GATEWAY_TIMEOUT, "Upstream timeout"),
            Self::StoreUnavailable => ("store_unavailable", S::SERVICE_UNAVAILABLE, "Store unavailable"),
            Self::Overloaded => ("overloaded", S::SERVICE_UNAVAILABLE, "Overloaded"),
            Self::Draining => ("draining", S::SERVICE_UNAVAILABLE, "Draining"),
            Self::ProbeFailed => ("probe_failed", S::SERVICE_UNAVAILABLE, "The caller could not be checked"),
        }
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.facts().0
    }

    #[must_use]
    pub fn status(self) -> StatusCode {
        self.facts().1
    }

    /// How a request that gets this answer is counted.
    pub(super) fn result(self) -> Result_ {
        match self {
            Self::InProgress => Result_::in_progress,
            Self::OutcomeUnknown => Result_::outcome_unknown,
            Self::BodyNotRecorded => Result_::body_not_recorded,
            Self::KeyReused => Result_::key_reused,
            Self::UpstreamUnreachable
            | Self::UpstreamBroken
            | Self::UpstreamTimeout
            | Self::StoreUnavailable
            | Self::Overloaded
            | Self::ProbeFailed
            | Self::Draining => Result_::failed,
            Self::KeyMissing
            | Self::KeyInvalid
            | Self::ScopeMissing
            | Self::TokenInvalid
            | Self::PathAmbiguous
            | Self::BadRequest
            | Self::TargetTooLong
            | Self::HeadersTooLarge
            | Self::RequestTimeout
            | Self::BodyTooLarge => Result_::rejected,
        }
    }

    /// Seconds after which a retry makes sense, where it does.
    fn retry_after(self) -> Option<u32> {
        match self {
            Self::InProgress | Self::StoreUnavailable | Self::Overloaded | Self::ProbeFailed => Some(1),
            Self::Draining => Some(5),
            _ => None,
        }
    }

    /// Whether the request may not have been read whole, or not be understood: its connection ends.
    fn closes(self) -> bool {
        matches!(self, Self::BadRequest | Self::TargetTooLong | Self::HeadersTooLarge | Self::RequestTimeout)
    }
}

/// An answer of the gateway's own.
#[derive(Clone, Debug)]
pub struct Problem {
    pub code: Code,
    /// What to do, in one sentence.
    pub detail: Cow<'static, str>,
    retry_after: Option<u32>,
    /// The RFC 9209 error type, where the upstream is at fault.
    proxy_error: Option<&'static str>,
    /// What `WWW-Authenticate` says, where a credential is at fault.
    challenge: Option<HeaderValue>,
    /// Whether this gateway keeps the record, if there must be one.
    recorded: bool,
    /// Further members of the body.
    members: Vec<(&'static str, serde_json::Value)>,
}

/// Who gets an answer of the gateway's own.
pub(super) struct Asker {
    /// Whether there is a gateway of this kind in front.
    pub chained: bool,
    /// The page that may read it, where the request comes from a browser.
    pub reader: Option<Reader>,
}

/// What the type of each problem begins with.
const TYPE: &str = "urn:oncegate:problem:";

/// Whether a response was made by a gateway itself, one behind this one perhaps; `body`: unless it is too large to be read,
/// which counts as such.
pub(super) fn is_a_gateways(headers: &HeaderMap, body: Option<&[u8]>) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.is_some_and(|kind| kind.starts_with(PROBLEM_JSON.as_bytes()))
        && body.is_none_or(|body| {
            let problem = serde_json::from_slice::<serde_json::Value>(body).unwrap_or_default();
            problem.get("type").and_then(serde_json::Value::as_str).is_some_and(|kind| kind.starts_with(TYPE))
        })
}

const PROBLEM_JSON: &str = "application/problem+json";

impl Problem {
    #[must_use]
    pub fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        let retry_after = code.retry_after();
        let (proxy_error, challenge, members) = (None, None, Vec::new());
        Self { code, detail: detail.into(), retry_after, proxy_error, challenge, recorded: true, members }
    }

    /// The duplicate of a request in flight; `late`: its first caller has got a 504, so it may take longer.
    #[must_use]
    pub fn in_progress(late: bool) -> Self {
        let detail = "The first request with this key is still under way; retry after Retry-After seconds.";
        let mut problem = Self::new(Code::InProgress, detail);
        if late {
            problem.retry_after = Some(5);
        }
        problem
    }

    #[must_use]
    pub fn outcome_unknown() -> Self {
        let detail = "The request may have been executed; find out from the API before you send it with another key.";
        Self::new(Code::OutcomeUnknown, detail)
    }

    /// A bearer token that does not verify, and what is wrong with it.
    #[must_use]
    pub fn token_invalid(what: &str) -> Self {
        let mut problem = Self::new(Code::TokenInvalid, format!("{what}; nothing was sent on: get a valid token."));
        // RFC 6750 §3: neither quotes nor a backslash, and ASCII alone.
        let plain = |c: char| matches!(c, ' ' | '!' | '#'..='[' | ']'..='~');
        let described = what.chars().map(|c| if plain(c) { c } else { '?' }).take(200).collect::<String>();
        let challenge = format!("Bearer error=\"invalid_token\", error_description=\"{described}\"");
        problem.challenge = HeaderValue::try_from(challenge).ok();
        problem
    }

    #[must_use]
    pub fn key_reused() -> Self {
        let detail = "This key was used with another payload; send a new request with a new key.";
        Self::new(Code::KeyReused, detail)
    }

    #[must_use]
    pub fn body_not_recorded(status: u16, location: Option<&[u8]>) -> Self {
        let detail =
            "The request was executed, but its response was too large to be kept; read the result from the API.";
        let mut problem = Self::new(Code::BodyNotRecorded, detail);
        problem.members.push(("upstream_status", status.into()));
        if let Some(location) = location {
            problem.members.push(("location", String::from_utf8_lossy(location).into()));
        }
        problem
    }

    #[must_use]
    pub fn store_unavailable() -> Self {
        let detail = "The key could not be recorded, so nothing was sent; retry after Retry-After seconds.";
        Self::new(Code::StoreUnavailable, detail)
    }

    #[must_use]
    pub fn overloaded() -> Self {
        let detail = "The gateway is at its limits and has sent nothing; retry after Retry-After seconds.";
        Self::new(Code::Overloaded, detail)
    }

    #[must_use]
    pub fn draining() -> Self {
        let detail = "The gateway is shutting down; retry after Retry-After seconds.";
        Self::new(Code::Draining, detail)
    }

    #[must_use]
    pub fn upstream(code: Code, detail: &'static str, proxy_error: &'static str) -> Self {
        Self { proxy_error: Some(proxy_error), ..Self::new(code, detail) }
    }

    /// The request was sent, then the connection or the response broke off.
    #[must_use]
    pub fn upstream_broken(proxy_error: &'static str) -> Self {
        let detail = "The upstream broke off; whether it executed the request is not known.";
        Self::upstream(Code::UpstreamBroken, detail, proxy_error)
    }

    #[must_use]
    pub fn upstream_timeout() -> Self {
        let detail = "The upstream has not answered in time; whether it executed the request is not known.";
        Self::upstream(Code::UpstreamTimeout, detail, "http_response_timeout")
    }

    /// The same, of a request that was sent on without a record of it: a gateway in front keeps its own.
    #[must_use]
    pub fn without_record(mut self) -> Self {
        self.recorded &= self.code == Code::UpstreamUnreachable;
        self
    }

    /// The response for whoever has asked.
    #[must_use]
    pub(super) fn answer(self, asker: &Asker) -> Response<ReplyBody> {
        let mut response = self.into_response(asker.chained);
        if let Some(reader) = &asker.reader {
            reader.admit(response.headers_mut());
        }
        response
    }

    /// The response. `chained`: there is a gateway of this kind in front, which is told that it needs no record of its own:
    /// nothing was executed, or this gateway keeps the record.
    #[must_use]
    pub fn into_response(self, chained: bool) -> Response<ReplyBody> {
        let (code, status, title) = self.code.facts();
        let mut body = serde_json::Map::new();
        body.insert("type".into(), format!("{TYPE}{code}").into());
        body.insert("title".into(), title.into());
        body.insert("status".into(), status.as_u16().into());
        body.insert("detail".into(), self.detail.into());
        body.insert("code".into(), code.into());
        body.extend(self.members.into_iter().map(|(name, value)| (name.to_owned(), value)));
        let body = Bytes::from(serde_json::Value::Object(body).to_string());
        let mut response = Response::new(ReplyBody::full(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if let Some(challenge) = self.challenge {
            headers.insert(WWW_AUTHENTICATE, challenge);
        }
        if let Some(error) = self.proxy_error
            && let Ok(value) = HeaderValue::try_from(format!("oncegate; error={error}"))
        {
            headers.insert(HeaderName::from_static("proxy-status"), value);
        }
        if self.code.closes() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if chained && self.recorded {
            headers.insert(&super::headers::IDEMPOTENCY_OUTCOME, HeaderValue::from_static("not-executed"));
        }
        response
    }

    /// The whole HTTP/1.1 response as text, for where there is no HTTP library; the connection ends with it.
    #[must_use]
    pub fn to_http11(self) -> Vec<u8> {
        let (head, body) = self.into_response(false).into_parts();
        let body = if let ReplyBody::Full(Some(body)) = body { body } else { Bytes::new() };
        let reason = head.status.canonical_reason().unwrap_or("Error");
        let mut text = format!("HTTP/1.1 {} {reason}\r\n", head.status.as_u16()).into_bytes();
        for (name, value) in head.headers.iter().filter(|(name, _)| **name != CONNECTION) {
            text.extend_from_slice(name.as_str().as_bytes());
            text.extend_from_slice(b": ");
            text.extend_from_slice(value.as_bytes());
            text.extend_from_slice(b"\r\n");
        }
        text.extend_from_slice(format!("content-length: {}\r\nconnection: close\r\n\r\n", body.len()).as_bytes());
        text.extend_from_slice(&body);
        text
    }
}
