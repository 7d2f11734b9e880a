//! Response bodies on their way to the client, and replays.

use super::headers::{CACHE_STATUS, IDEMPOTENCY_OUTCOME, IDEMPOTENCY_REPLAYED, strip_hop_by_hop};
use super::upstream::Passing;
use crate::idempotency::{Millis, Recorded, Response as RecordedResponse, State};
use crate::ledger::Remembered;
use bytes::Bytes;
use http::header::{AGE, CONTENT_LENGTH, LOCATION};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// A response body. No variant is boxed: the pass-through allocates nothing for it.
pub enum ReplyBody {
    /// In memory; `None` once it is written.
    Full(Option<Bytes>),
    /// Streamed from the upstream; its connection goes back to the pool at the end.
    Passing(Passing),
    /// Streamed by the task that holds the claim: a response too large to be recorded.
    Relayed(mpsc::Receiver<Result<Frame<Bytes>, BodyError>>),
}

/// A response body broke off. The client's connection is cut, so that it notices.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the upstream broke off its response: {0}")]
    Upstream(#[source] std::io::Error),
    #[error("the upstream's response is malformed: {0}")]
    Malformed(&'static str),
    #[error("the upstream's response made no progress within response_timeout")]
    Stalled,
}

impl ReplyBody {
    #[must_use]
    pub fn full(bytes: Bytes) -> Self {
        Self::Full(Some(bytes))
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().filter(|b| !b.is_empty()).map(|b| Ok(Frame::data(b)))),
            Self::Passing(passing) => Pin::new(passing).poll_frame(cx),
            Self::Relayed(frames) => frames.poll_recv(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Self::Passing(passing) => passing.is_end_stream(),
            Self::Relayed(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Passing(passing) => passing.size_hint(),
            Self::Relayed(_) => SizeHint::new(),
        }
    }
}

/// What is kept of a response's head: end-to-end fields without `drop_headers`, the length, which replays count anew, and the
/// upstream's word, which is for this gateway.
#[must_use]
pub fn recordable(headers: &HeaderMap, drop_headers: &[HeaderName]) -> HeaderMap {
    let mut kept = headers.clone();
    strip_hop_by_hop(&mut kept);
    kept.remove(CONTENT_LENGTH);
    kept.remove(&IDEMPOTENCY_OUTCOME);
    for name in drop_headers {
        kept.remove(name);
    }
    kept
}

/// The record's form of a response.
#[must_use]
pub fn to_recorded(status: StatusCode, headers: &HeaderMap, body: Bytes) -> RecordedResponse {
    let bytes = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
    let headers = headers.iter().map(|(name, value)| (bytes(name.as_str().as_bytes()), bytes(value.as_bytes())));
    RecordedResponse { status: status.as_u16(), headers: headers.collect(), body }
}

/// The record's form of a response whose body is too large.
#[must_use]
pub(super) fn to_omitted(status: StatusCode, headers: &HeaderMap) -> Recorded {
    let location = headers.get(LOCATION).map(|value| Bytes::copy_from_slice(value.as_bytes()));
    Recorded::Omitted { status: status.as_u16(), location }
}

/// Answers from a completed record (RFC 9211 `Cache-Status`, RFC 9111 §4.2.3 `Age`). `None`: it holds no such response.
#[must_use]
pub fn replay(record: &Remembered, now: Millis) -> Option<Response<ReplyBody>> {
    let State::Completed { response: Recorded::Full(recorded), completed_at, expires_at } = &record.state else {
        return None;
    };
    let mut response = Response::new(ReplyBody::full(recorded.body.clone()));
    *response.status_mut() = StatusCode::from_u16(recorded.status).ok()?;
    let headers = response.headers_mut();
    headers.clone_from(record.fields(&recorded.headers, replayable)?);
    let age_then = headers.get(AGE).and_then(|age| age.to_str().ok()?.trim().parse::<u64>().ok()).unwrap_or(0);
    headers.insert(AGE, age_then.saturating_add(now.since(*completed_at) / 1000).into());
    let ttl = HeaderValue::from(expires_at.since(now) / 1000);
    let ours = [b"oncegate; hit; ttl=".as_slice(), ttl.as_bytes()].concat();
    let ours = HeaderValue::from_maybe_shared(Bytes::from(ours)).ok()?;
    // Ours is the last one.
    *headers.iter_mut().filter(|(name, _)| *name == CACHE_STATUS).last()?.1 = ours;
    Some(response)
}

/// A recorded response's fields as they are replayed, with room for what differs each time. `None`: one of them is none.
fn replayable(lines: &[(Bytes, Bytes)]) -> Option<HeaderMap> {
    let mut headers = HeaderMap::with_capacity(lines.len() + 3);
    for (name, value) in lines {
        let name = HeaderName::from_bytes(name).ok()?;
        headers.append(name, HeaderValue::from_maybe_shared(value.clone()).ok()?);
    }
    headers.insert(&IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    headers.append(&CACHE_STATUS, HeaderValue::from_static("oncegate"));
    if !headers.contains_key(AGE) {
        headers.insert(AGE, HeaderValue::from_static("0"));
    }
    Some(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::idempotency::{ClaimToken, Fingerprint, Origin, Record};

    #[test]
    fn a_replay_is_the_recorded_response_with_its_age() {
        let headers = vec![
            (Bytes::from_static(b"date"), Bytes::from_static(b"Sun, 06 Nov 1994 08:49:37 GMT")),
            (Bytes::from_static(b"x-a"), Bytes::from_static(b"1")),
            (Bytes::from_static(b"x-a"), Bytes::from_static(b"\xe4")),
            (Bytes::from_static(b"age"), Bytes::from_static(b"7")),
            (Bytes::from_static(b"cache-status"), Bytes::from_static(b"origin; fwd=miss")),
        ];
        let recorded = RecordedResponse { status: 201, headers, body: Bytes::from_static(b"{}") };
        let origin = Origin {
            key: Bytes::new(),
            key_header: Bytes::new(),
            path: Bytes::new(),
            route: Bytes::new(),
            claimed_at: Millis(0),
            attempts: 1,
        };
        let state = State::Completed {
            response: Recorded::Full(recorded),
            completed_at: Millis(10_000),
            expires_at: Millis(20_000),
        };
        let fingerprint = Fingerprint { settings: 0, digest: [0; 32] };
        let record = Remembered::new(Record { origin, fingerprint, token: ClaimToken([0; 16]), state });
        let response = replay(&record, Millis(12_999)).unwrap();
        assert_eq!(response.status(), 201);
        let headers = response.headers();
        assert_eq!(headers["date"], "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(headers.get_all("x-a").iter().count(), 2);
        assert_eq!(headers["age"], "9");
        assert_eq!(headers["idempotency-replayed"], "true");
        let statuses = |response: &Response<ReplyBody>| {
            let statuses = response.headers().get_all("cache-status").iter();
            statuses.map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(statuses(&response), ["origin; fwd=miss", "oncegate; hit; ttl=7"]);
        let again = replay(&record, Millis(15_000)).unwrap();
        assert_eq!(
            (&again.headers()["age"], statuses(&again)[1].as_str()),
            (&HeaderValue::from(12), "oncegate; hit; ttl=5")
        );
    }
}
