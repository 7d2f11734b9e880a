//! Pass-through: streams both ways, buffers nothing, records nothing.

use super::body::ForwardBody;
use super::headers::{self, last_hop, strip_hop_by_hop};
use super::observe::{Observed, Tee};
use super::problem::{Asker, Code, Problem};
use super::reply::ReplyBody;
use super::tunnel::Offer;
use super::upstream::{self, HostPolicy, Passing, Patience, SendError};
use super::{Gateway, Peer};
use crate::telemetry::{Outcome, RouteMetrics};
use bytes::Bytes;
use http::header::{ALLOW, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Body;
use hyper::body::Incoming;
use std::sync::Arc;
use tokio::time::Instant;

impl Gateway {
    /// Passes a request through.
    pub(super) async fn pass(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        peer: &Peer,
        metrics: &RouteMetrics,
        asker: &Asker,
        observed: Option<Arc<Observed>>,
    ) -> Response<ReplyBody> {
        let method = request.method().clone();
        if last_hop(&method, request.headers_mut()) {
            metrics.count(Outcome::passed);
            return answer_as_last_hop(&method, asker);
        }
        let offer = Offer::of(&mut request);
        let (mut parts, body) = request.into_parts();
        headers::prepare_request(&mut parts.headers, parts.version, peer);
        self.set_host(&mut parts.headers);
        if let Some(offer) = &offer {
            offer.write(&mut parts.headers);
        }
        parts.version = Version::HTTP_11;
        parts.extensions.clear();
        let body = if body.is_end_stream() {
            if let Some(observed) = &observed {
                observed.body_ended();
            }
            ForwardBody::Full(None)
        } else {
            if !parts.headers.contains_key(CONTENT_LENGTH) {
                parts.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
            match &observed {
                None => ForwardBody::Upload(body),
                Some(observed) => ForwardBody::Observed(Box::new(Tee::new(body, Arc::clone(observed)))),
            }
        };
        let (response_timeout, body_timeout) = (self.options.upstream.response_timeout, self.options.body_timeout);
        let patience =
            Patience { body: body_timeout, write: response_timeout.max(body_timeout), response: response_timeout };
        let started = Instant::now();
        let sent = self.upstream.send(Request::from_parts(parts, body), Some(patience)).await;
        self.metrics.upstream_seconds.observe(started.elapsed());
        let sent = match observed {
            None => sent,
            Some(observed) => observed.answered(sent),
        };
        match sent {
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                let offer = offer.filter(|offer| offer.accepted_by(response.headers()));
                match offer.and_then(|offer| self.open_tunnel(offer, response)) {
                    Some(response) => {
                        metrics.count(Outcome::passed);
                        response
                    }
                    None => {
                        metrics.count(Outcome::failed);
                        Problem::upstream_broken("http_protocol_error").without_record().answer(asker)
                    }
                }
            }
            Ok(response) => {
                metrics.count(Outcome::passed);
                self.pass_back(response)
            }
            Err(error) => {
                let client_failed = matches!(error, SendError::Upload(_));
                metrics.count(if client_failed { Outcome::rejected } else { Outcome::failed });
                send_problem(&error).without_record().answer(asker)
            }
        }
    }

    pub(super) fn set_host(&self, headers: &mut http::HeaderMap) {
        let host = match &self.options.upstream.host {
            HostPolicy::Preserve => return,
            HostPolicy::Upstream => self.options.upstream.authority.clone(),
            HostPolicy::Name(name) => name.clone(),
        };
        headers.insert(HOST, host);
    }

    fn pass_back(&self, response: Response<upstream::Incoming>) -> Response<ReplyBody> {
        let (mut parts, body) = response.into_parts();
        strip_hop_by_hop(&mut parts.headers);
        parts.version = Version::HTTP_11;
        parts.extensions.clear();
        let patience = self.options.upstream.response_timeout;
        Response::from_parts(parts, ReplyBody::Passing(Passing::new(body, patience)))
    }
}

/// What the client is told when sending failed.
pub(super) fn send_problem(error: &SendError) -> Problem {
    if !matches!(error, SendError::Upload(_) | SendError::TimedOut | SendError::Withheld) {
        tracing::warn!(error = %error, source = std::error::Error::source(error).map(tracing::field::display), "upstream failed");
    }
    match error {
        SendError::Unreachable { proxy_error, .. } => Problem::upstream(
            Code::UpstreamUnreachable,
            "The upstream cannot be reached and has been sent nothing; retry later.",
            proxy_error,
        ),
        SendError::Withheld => Problem::store_unavailable(),
        SendError::TimedOut => Problem::upstream_timeout(),
        SendError::Upload(None) => {
            Problem::new(Code::RequestTimeout, "The body made no progress; send it again, faster.")
        }
        SendError::Upload(Some(_)) => Problem::new(Code::BadRequest, "The body broke off or is malformed."),
        SendError::Malformed(_) => Problem::upstream_broken("http_protocol_error"),
        SendError::Broken(_) => Problem::upstream_broken("connection_terminated"),
    }
}

fn answer_as_last_hop(method: &Method, asker: &Asker) -> Response<ReplyBody> {
    let mut response = Response::new(ReplyBody::full(Bytes::new()));
    // TRACE would echo the request, credentials included.
    if method == Method::TRACE {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    }
    let allow = HeaderValue::from_static("GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS");
    response.headers_mut().insert(ALLOW, allow);
    if let Some(reader) = &asker.reader {
        reader.admit(response.headers_mut());
    }
    response
}
