//! What the records API answers instead of what was asked for (RFC 9457).

use super::{Answer, answer};
use http::header::{ALLOW, CONNECTION, WWW_AUTHENTICATE};
use http::{HeaderName, HeaderValue, StatusCode};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    RecordNotFound,
    RecordInFlight,
    RecordNotUnknown,
    RecordChanged,
    InvalidRequest,
    ResponseInvalid,
    Unauthorized,
    Forbidden,
    MethodNotAllowed,
    BodyTooLarge,
    RequestTimeout,
    StoreUnavailable,
}

impl Code {
    /// The code's name, its status and its title.
    fn facts(self) -> (&'static str, StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::RecordNotFound => ("record_not_found", S::NOT_FOUND, "No such record"),
            Self::RecordInFlight => ("record_in_flight", S::CONFLICT, "Request in flight"),
            Self::RecordNotUnknown => ("record_not_unknown", S::CONFLICT, "Outcome known"),
            Self::RecordChanged => ("record_changed", S::CONFLICT, "Record has changed"),
            Self::InvalidRequest => ("invalid_request", S::BAD_REQUEST, "Invalid request"),
            Self::ResponseInvalid => ("response_invalid", S::BAD_REQUEST, "Response cannot be replayed"),
            Self::Unauthorized => ("unauthorized", S::UNAUTHORIZED, "Unauthorized"),
            Self::Forbidden => ("forbidden", S::FORBIDDEN, "Forbidden"),
            Self::MethodNotAllowed => ("method_not_allowed", S::METHOD_NOT_ALLOWED, "Method not allowed"),
            Self::BodyTooLarge => ("body_too_large", S::PAYLOAD_TOO_LARGE, "Body too large"),
            Self::RequestTimeout => ("request_timeout", S::REQUEST_TIMEOUT, "Request timeout"),
            Self::StoreUnavailable => ("store_unavailable", S::SERVICE_UNAVAILABLE, "Store unavailable"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) code: Code,
    /// What is wrong, and what to do.
    detail: String,
    header: Option<(HeaderName, &'static str)>,
}

impl Problem {
    pub(super) fn new(code: Code, detail: impl Into<String>) -> Self {
        let header = match code {
            Code::Unauthorized => Some((WWW_AUTHENTICATE, "Bearer")),
            // What is left of the body is not waited for.
            Code::BodyTooLarge | Code::RequestTimeout => Some((CONNECTION, "close")),
            _ => None,
        };
        Self { code, detail: detail.into(), header }
    }

    pub(super) fn invalid(detail: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, detail)
    }

    pub(super) fn not_found() -> Self {
        Self::new(Code::RecordNotFound, "There is no record with this id, or its time is over.")
    }

    pub(super) fn method(allowed: &'static str) -> Self {
        let detail = format!("Here are: {allowed}.");
        Self { header: Some((ALLOW, allowed)), ..Self::new(Code::MethodNotAllowed, detail) }
    }

    pub(super) fn into_response(self) -> Answer {
        let (code, status, title) = self.code.facts();
        let body = serde_json::json!({
            "type": format!("urn:oncegate:problem:{code}"),
            "title": title,
            "status": status.as_u16(),
            "detail": self.detail,
            "code": code,
        });
        let mut response = answer(status, "application/problem+json", body.to_string());
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    }
}
