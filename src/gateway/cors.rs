//! Who may read the gateway's own answers in a browser (Fetch standard, "HTTP responses" of the CORS protocol). Preflights,
//! and what the upstream answers to the request at hand, are the upstream's.

use super::headers::list;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue};

/// The origins whose pages may: serialized as browsers send them, or "*" for all. None by default.
#[derive(Clone, Debug, Default)]
pub struct AllowOrigins(pub Vec<HeaderValue>);

impl AllowOrigins {
    /// The page that a request comes from, if it may.
    pub(super) fn reader(&self, headers: &HeaderMap) -> Option<Reader> {
        // The usual case is not worth a look at the request.
        if self.0.is_empty() {
            return None;
        }
        let mut origins = headers.get_all(ORIGIN).iter();
        let origin = origins.next().filter(|_| origins.next().is_none())?;
        let allowed = self.0.iter().find(|allowed| *allowed == ANY || *allowed == origin)?;
        Some(Reader { origin: origin.clone(), any: allowed == ANY })
    }
}

const ANY: &str = "*";
/// What the gateway says in fields that a page may not see otherwise.
const EXPOSED: [&str; 2] = ["Idempotency-Replayed", "Retry-After"];
const EXPOSED_LIST: HeaderValue = HeaderValue::from_static("Idempotency-Replayed, Retry-After");

/// A page that may read the gateway's own answers.
pub(super) struct Reader {
    origin: HeaderValue,
    /// As every other.
    any: bool,
}

impl Reader {
    /// Of an answer that is the gateway's alone.
    ///
    /// To origins that are listed also with cookies and other credentials: else those who send them could read none. It tells
    /// them nothing but the state of their own keys; and a browser sends a key with credentials only after the upstream has
    /// agreed to both in the preflight. "*" would let any page read what concerns the user, and browsers refuse that themselves.
    pub(super) fn admit(&self, headers: &mut HeaderMap) {
        self.allow(headers);
        if !self.any {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED_LIST);
    }

    /// Of a response that the upstream gave to another request: what it allows names the origin of that request. About
    /// credentials the upstream's word stays, if it has said any.
    pub(super) fn admit_to_shared(&self, headers: &mut HeaderMap) {
        let mut allowed = headers.get_all(ACCESS_CONTROL_ALLOW_ORIGIN).iter();
        let allowed = allowed.next().filter(|_| allowed.next().is_none());
        if !allowed.is_some_and(|allowed| allowed == ANY || allowed == self.origin) {
            self.allow(headers);
        }
        if !EXPOSED.iter().all(|name| lists(headers, &ACCESS_CONTROL_EXPOSE_HEADERS, name)) {
            headers.append(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED_LIST);
        }
    }

    fn allow(&self, headers: &mut HeaderMap) {
        if self.any {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static(ANY));
            headers.remove(ACCESS_CONTROL_ALLOW_CREDENTIALS);
            return;
        }
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, self.origin.clone());
        if !lists(headers, &VARY, ORIGIN.as_str()) && !lists(headers, &VARY, ANY) {
            headers.append(VARY, HeaderValue::from_static("Origin"));
        }
    }
}

/// Whether a field lists a name; case does not count.
fn lists(headers: &HeaderMap, field: &HeaderName, name: &str) -> bool {
    list(headers, field).any(|listed| listed.eq_ignore_ascii_case(name.as_bytes()))
}
