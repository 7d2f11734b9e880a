//! The claimed forward: claim → send → settle → reply, in a task of its own that no client can cancel.

use super::body::{ForwardBody, join};
use super::headers::{self, IDEMPOTENCY_OUTCOME, strip_hop_by_hop};
use super::pass::send_problem;
use super::problem::Problem;
use super::reply::{BodyError, ReplyBody, recordable, to_omitted, to_recorded};
use super::upstream::{Incoming, SendError};
use super::{
    Counted, Gateway, Intercepted, NormalPath, OnStoreError, Params, Route, SharedClaim, Unrecorded as SharedResponse,
    unavailable,
};
use crate::fault;
use crate::idempotency::outcome::Class;
use crate::idempotency::{Evidence, Outcome, Recorded, Why};
use crate::ledger::{Answer, Claim, ClaimResult, Elsewhere, Held, Lead, Reservation, Unsettled};
use crate::store::{AnyStore, StoreError};
use crate::telemetry::Outcome as Result_;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, RETRY_AFTER, TRAILER};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, response};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use std::pin::pin;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

/// What a forward's task tells the request that started it.
pub(super) enum TaskAnswer {
    Respond(Response<ReplyBody>, Result_),
    Problem(Problem),
    /// The store had a record already.
    Record(Answer),
    /// Another gateway works on the key. The forward was not begun: it may yet be.
    Elsewhere(Box<Forward>, Elsewhere<AnyStore, SharedResponse>),
}

/// A response that is no record: waiters with the same credentials may share it.
#[derive(Debug)]
pub(crate) enum Unrecorded {
    Response { status: StatusCode, headers: HeaderMap, body: Bytes },
    Problem(Problem),
}

impl Unrecorded {
    /// Bytes of the response's body.
    pub(super) fn body_len(&self) -> usize {
        match self {
            Self::Response { body, .. } => body.len(),
            Self::Problem(_) => 0,
        }
    }

    pub(super) fn respond(&self, outcome: Result_) -> Result<Counted, Problem> {
        match self {
            Self::Problem(problem) => Err(problem.clone()),
            Self::Response { status, headers, body } => {
                let mut response = Response::new(ReplyBody::full(body.clone()));
                *response.status_mut() = *status;
                *response.headers_mut() = headers.clone();
                Ok((response, outcome))
            }
        }
    }
}

/// A request that is about to be claimed and forwarded.
pub(super) struct Forward {
    pub(super) gateway: Arc<Gateway>,
    pub(super) route: Arc<Route>,
    pub(super) parts: Parts,
    /// What the request was sent to, on a route that looks up.
    pub(super) asked: Option<(NormalPath, Params)>,
    /// Let go once the caller has got its 504: the request has been written by then.
    body: Option<Held>,
    /// One of those that are under way at a time.
    permit: Option<OwnedSemaphorePermit>,
    reply: Option<oneshot::Sender<TaskAnswer>>,
}

impl Gateway {
    pub(super) fn forward(self: &Arc<Self>, intercepted: Intercepted, body: &Held) -> Box<Forward> {
        let Intercepted { mut parts, route, path, params, peer, .. } = intercepted;
        headers::prepare_request(&mut parts.headers, parts.version, &peer);
        self.set_host(&mut parts.headers);
        parts.headers.insert(CONTENT_LENGTH, body.bytes.len().into());
        parts.headers.remove(TRAILER);
        parts.version = Version::HTTP_11;
        parts.extensions.clear();
        let gateway = Arc::clone(self);
        let asked = route.options.lookup.is_some().then_some((path, params));
        Box::new(Forward { gateway, route, parts, asked, body: None, permit: None, reply: None })
    }
}

type Lead_ = Lead<AnyStore, SharedResponse>;
type Claim_ = Claim<AnyStore, SharedResponse>;
type Unsettled_ = Unsettled<AnyStore, SharedResponse>;

/// How an exchange with the upstream went.
pub(super) enum Exchange {
    Complete(response::Parts, Bytes),
    Large(Large),
    Failed(SendError),
    /// The response broke off or was not one.
    Malformed(&'static str),
}

/// A response that is too large to be recorded: its head, what has been read, and the rest.
pub(super) struct Large {
    pub(super) head: response::Parts,
    read: Vec<Bytes>,
    rest: Incoming,
}

impl Forward {
    /// Runs the forward in a task of its own and waits for what it has to say.
    pub(super) async fn start(
        mut self: Box<Self>,
        lead: Lead_,
        body: Held,
        permit: OwnedSemaphorePermit,
    ) -> TaskAnswer {
        let (reply, answer) = oneshot::channel();
        (self.reply, self.body, self.permit) = (Some(reply), Some(body), Some(permit));
        let gateway = Arc::clone(&self.gateway);
        gateway.claims.spawn(self.run(lead));
        answer.await.unwrap_or_else(|_| TaskAnswer::Problem(Problem::upstream_broken("proxy_internal_error")))
    }

    fn tell(&mut self, answer: TaskAnswer) {
        if let Some(reply) = self.reply.take() {
            // The client may be gone; the forward goes on all the same.
            let _ = reply.send(answer);
        }
    }

    async fn run(mut self: Box<Self>, lead: Lead_) {
        let mut result: Result<SharedClaim, StoreError> = match fault::step("before-claim") {
            Ok(()) => lead.claim().await,
            Err(error) => Err(StoreError::Failed { reason: error.to_string() }),
        };
        if let Ok(ClaimResult::LookUp(inquiry)) = result {
            match Box::pin(self.look_up(inquiry)).await {
                Ok(told) => result = Ok(told),
                Err(problem) => return self.tell(TaskAnswer::Problem(problem)),
            }
        }
        let claim = match result {
            Ok(ClaimResult::Claimed(claim)) => claim,
            Ok(ClaimResult::Wait(elsewhere)) => {
                (self.body, self.permit) = (None, None);
                if let Some(reply) = self.reply.take() {
                    let _ = reply.send(TaskAnswer::Elsewhere(self, elsewhere));
                }
                return;
            }
            // One question for each arrival.
            Ok(ClaimResult::LookUp(_)) => return self.tell(TaskAnswer::Problem(Problem::in_progress(false))),
            Ok(ClaimResult::Answer(answer)) => return self.tell(TaskAnswer::Record(answer)),
            Err(error) if self.route.options.on_store_error == OnStoreError::Pass => {
                tracing::warn!(%error, "the store is unavailable; forwarding without a record, as on_store_error says");
                return Box::pin(self.pass_unrecorded()).await;
            }
            Err(error) => return self.tell(TaskAnswer::Problem(unavailable(&error))),
        };
        fault::point("after-claim-commit");
        if self.gateway.give_up.is_cancelled() {
            let _ = claim.settle(Outcome::NotExecuted(Evidence::ThisSend), None).await;
            return self.tell(TaskAnswer::Problem(Problem::draining()));
        }
        let in_flight = self.gateway.metrics.upstream_in_flight.clone();
        in_flight.inc();
        self.exchange_and_settle(claim).await;
        in_flight.dec();
    }

    /// Sends the request and settles by what comes back, be it late.
    async fn exchange_and_settle(mut self: Box<Self>, claim: Claim_) {
        let started = Instant::now();
        let request = self.request(claim.resend.then(|| claim.key_header()).flatten());
        let (done, reservation) = match self.exchange(request, &claim).await {
            Ok(done) => done,
            Err((why, problem)) => return self.settle_without_response(claim, why, problem).await,
        };
        self.gateway.metrics.upstream_seconds.observe(started.elapsed());
        let done = match fault::step("after-forward") {
            Ok(()) => done,
            Err(error) => Exchange::Failed(SendError::Broken(error)),
        };
        let (why, problem) = match done {
            Exchange::Complete(head, body) => {
                self.settle_complete(claim, head, body).await;
                return drop(reservation);
            }
            Exchange::Large(large) => return Box::pin(self.settle_large(claim, large)).await,
            Exchange::Malformed(proxy_error) => (Why::Malformed, Problem::upstream_broken(proxy_error)),
            Exchange::Failed(error) => {
                let problem = send_problem(&error);
                match error {
                    SendError::Withheld => {
                        tracing::warn!(
                            route = self.route.options.pattern.as_str(),
                            "a claim could not be kept alive; its request was not sent"
                        );
                        let unsettled = settle(claim, Outcome::NotExecuted(Evidence::ThisSend), None).await;
                        return self.end(TaskAnswer::Problem(problem), unsettled).await;
                    }
                    SendError::Unreachable { .. } => {
                        let shared = Arc::new(Unrecorded::Problem(problem.clone()));
                        let unsettled = settle(claim, Outcome::NotExecuted(Evidence::ThisSend), Some(shared)).await;
                        return self.end(TaskAnswer::Problem(problem), unsettled).await;
                    }
                    SendError::Malformed(_) => (Why::Malformed, problem),
                    // A buffered body does not break off, and the time is kept here.
                    SendError::Broken(_) | SendError::Upload(_) | SendError::TimedOut => (Why::Reset, problem),
                }
            }
        };
        self.settle_without_response(claim, why, problem).await;
    }

    /// Sends the request and waits for what comes back: for the caller as long as `response_timeout`, for the record
    /// `late_window` longer. The error: why there is no more to wait for.
    async fn exchange(
        &mut self,
        request: Request<ForwardBody>,
        claim: &Claim_,
    ) -> Result<(Exchange, Reservation), (Why, Problem)> {
        let gateway = Arc::clone(&self.gateway);
        let options = gateway.upstream.options();
        let may_send = || claim.may_send();
        let mut exchange = pin!(exchange(&gateway, request, self.route.options.max_recorded_body, &may_send));
        tokio::select! {
            biased;
            done = &mut exchange => return Ok(done),
            () = sleep(options.response_timeout) => {}
            () = gateway.give_up.cancelled() => return Err((Why::Shutdown, Problem::draining())),
        }
        claim.set_late();
        self.body = None;
        self.tell(TaskAnswer::Problem(Problem::upstream_timeout()));
        tokio::select! {
            biased;
            done = &mut exchange => Ok(done),
            () = sleep(options.late_window) => Err((Why::Timeout, Problem::outcome_unknown())),
            () = gateway.give_up.cancelled() => Err((Why::Shutdown, Problem::draining())),
        }
    }

    /// The request, which is made once.
    fn request(&mut self, first_header: Option<Bytes>) -> Request<ForwardBody> {
        let body = ForwardBody::full(self.body.as_ref().map_or_else(Bytes::new, |held| held.bytes.clone()));
        let mut request = Request::new(body);
        *request.method_mut() = self.parts.method.clone();
        *request.uri_mut() = std::mem::take(&mut self.parts.uri);
        *request.headers_mut() = std::mem::take(&mut self.parts.headers);
        // A re-send bears the header of the first send, byte for byte.
        if let Some(Ok(value)) = first_header.map(HeaderValue::from_maybe_shared) {
            request.headers_mut().insert(&self.route.options.header, value);
        }
        request
    }

    /// Tells the caller. Then, with the permit and whatever else this task holds of the limits, goes on to record what the
    /// store did not take.
    async fn end(mut self: Box<Self>, answer: TaskAnswer, unsettled: Option<Unsettled_>) {
        self.tell(answer);
        self.body = None;
        if let Some(unsettled) = unsettled {
            unsettled.settle_later().await;
        }
    }

    async fn settle_without_response(self: Box<Self>, claim: Claim_, why: Why, problem: Problem) {
        let unsettled = settle(claim, Outcome::Unknown(why), None).await;
        self.end(TaskAnswer::Problem(problem), unsettled).await;
    }

    async fn settle_complete(self: Box<Self>, claim: Claim_, head: response::Parts, body: Bytes) {
        let outcome = self.classify(&head, claim.resend);
        let response = respond(&head, ReplyBody::full(body.clone()));
        let kept = recordable(&head.headers, &self.route.options.drop_headers);
        let unsettled = match outcome {
            Verdict::Final => {
                let recorded = Recorded::Full(to_recorded(head.status, &kept, body));
                settle(claim, Outcome::Final(recorded), None).await
            }
            Verdict::NotExecuted(evidence) => {
                let shared = Arc::new(Unrecorded::Response { status: head.status, headers: kept, body });
                settle(claim, Outcome::NotExecuted(evidence), Some(shared)).await
            }
            Verdict::Unknown(why) => settle(claim, Outcome::Unknown(why), None).await,
        };
        self.end(TaskAnswer::Respond(response, Result_::forwarded), unsettled).await;
    }

    /// Settles before the first byte goes to the caller; a cut-off from then on changes the record no more.
    async fn settle_large(mut self: Box<Self>, claim: Claim_, large: Large) {
        let head = &large.head;
        let outcome = match self.classify(head, claim.resend) {
            Verdict::Final => Outcome::Final(to_omitted(head.status, &head.headers)),
            Verdict::NotExecuted(evidence) => Outcome::NotExecuted(evidence),
            Verdict::Unknown(why) => Outcome::Unknown(why),
        };
        let unsettled = settle(claim, outcome, None).await;
        // Held until both are through.
        let _permit = self.permit.take();
        let later = async {
            if let Some(unsettled) = unsettled {
                unsettled.settle_later().await;
            }
        };
        tokio::join!(self.stream(large, Result_::forwarded), later);
    }

    /// Streams what was read and what is still to come.
    async fn stream(mut self: Box<Self>, large: Large, result: Result_) {
        let Large { head, read, mut rest } = large;
        let (frames, body) = mpsc::channel(4);
        let mut response = respond(&head, ReplyBody::Relayed(body));
        if let Some(declared) = headers::declared_length(&head.headers) {
            response.headers_mut().insert(CONTENT_LENGTH, declared.into());
        }
        self.tell(TaskAnswer::Respond(response, result));
        for chunk in read {
            let _ = frames.send(Ok(Frame::data(chunk))).await;
        }
        let patience = self.gateway.options.upstream.response_timeout;
        loop {
            // A client that is gone does not end the transfer: the upstream may still be at work.
            let failed = match timeout(patience, rest.frame()).await {
                Ok(None) => return,
                Ok(Some(Ok(frame))) => {
                    let _ = frames.send(Ok(frame)).await;
                    continue;
                }
                Ok(Some(Err(error))) => error,
                Err(_) => BodyError::Stalled,
            };
            let _ = frames.send(Err(failed)).await;
            return;
        }
    }

    /// What a complete response says. The upstream's own word comes first.
    fn classify(&self, head: &response::Parts, resend: bool) -> Verdict {
        let status = head.status.as_u16();
        match outcome_word(head) {
            Some(Class::Final) => return Verdict::Final,
            Some(Class::NotExecuted) => return Verdict::NotExecuted(Evidence::ThisKey),
            Some(Class::Unknown) => return Verdict::Unknown(Why::Status(status)),
            None => {}
        }
        // After a re-send, 409 is the upstream's own "in progress".
        if resend && status == 409 {
            return Verdict::Unknown(Why::Status(status));
        }
        match self.route.options.outcomes.classify(status, head.headers.contains_key(RETRY_AFTER)) {
            Class::Final => Verdict::Final,
            Class::NotExecuted => Verdict::NotExecuted(Evidence::ThisSend),
            Class::Unknown => Verdict::Unknown(Why::Status(status)),
        }
    }

    /// `on_store_error = "pass"`: the operator prefers a possible duplicate to a refusal.
    async fn pass_unrecorded(mut self: Box<Self>) {
        self.gateway.metrics.unrecorded_passes.inc();
        let request = self.request(None);
        let limit = self.route.options.max_recorded_body;
        let gateway = Arc::clone(&self.gateway);
        let exchange = exchange(&gateway, request, limit, &|| true);
        let done = timeout(self.gateway.options.upstream.response_timeout, exchange).await;
        let problem = match done.map(|(done, _)| done) {
            Ok(Exchange::Complete(head, body)) => {
                return self.tell(TaskAnswer::Respond(respond(&head, ReplyBody::full(body)), Result_::passed));
            }
            Ok(Exchange::Large(large)) => return self.stream(large, Result_::passed).await,
            Ok(Exchange::Failed(error)) => send_problem(&error),
            Ok(Exchange::Malformed(proxy_error)) => Problem::upstream_broken(proxy_error),
            Err(_) => Problem::upstream_timeout(),
        };
        self.tell(TaskAnswer::Problem(problem.without_record()));
    }
}

/// The upstream's own word, if it gives one.
pub(super) fn outcome_word(head: &response::Parts) -> Option<Class> {
    let mut words = head.headers.get_all(&IDEMPOTENCY_OUTCOME).iter();
    let word = words.next().filter(|_| words.next().is_none())?;
    match word.as_bytes().trim_ascii() {
        b"final" => Some(Class::Final),
        b"not-executed" => Some(Class::NotExecuted),
        b"unknown" => Some(Class::Unknown),
        _ => None,
    }
}

/// What a complete response means for the claim.
enum Verdict {
    Final,
    NotExecuted(Evidence),
    Unknown(Why),
}

/// What the store did not take has been logged and counted; the claim stays, and the caller gets its answer all the same.
async fn settle(claim: Claim_, outcome: Outcome, shared_response: Option<SharedResponse>) -> Option<Unsettled_> {
    fault::point("before-settle-commit");
    let unsettled = claim.settle(outcome, shared_response).await.err();
    fault::point("after-settle-commit");
    unsettled
}

/// The response for the caller: everything but what is not for it.
fn respond(head: &response::Parts, body: ReplyBody) -> Response<ReplyBody> {
    let mut response = Response::new(body);
    *response.status_mut() = head.status;
    let headers = response.headers_mut();
    *headers = head.headers.clone();
    strip_hop_by_hop(headers);
    headers.remove(&IDEMPOTENCY_OUTCOME);
    headers.remove(CONTENT_LENGTH);
    response
}

/// Sends the request and reads the response, up to `limit` bytes of its body and as far as the budget goes.
pub(super) async fn exchange(
    gateway: &Gateway,
    request: Request<ForwardBody>,
    limit: usize,
    may_send: &(dyn Fn() -> bool + Sync),
) -> (Exchange, Reservation) {
    let mut reservation = gateway.budget.reservation();
    let response = match gateway.upstream.send_if(request, None, may_send).await {
        Ok(sent) => sent,
        Err(error) => return (Exchange::Failed(error), reservation),
    };
    let (head, mut rest) = response.into_parts();
    let mut read = Vec::new();
    let mut len = 0_usize;
    if rest.size_hint().lower() > limit as u64 {
        return (Exchange::Large(Large { head, read, rest }), reservation);
    }
    loop {
        match rest.frame().await {
            None => break,
            Some(Err(_)) => return (Exchange::Malformed("http_response_incomplete"), reservation),
            Some(Ok(frame)) => {
                // Trailers are not recorded.
                let Ok(data) = frame.into_data() else { continue };
                len = len.saturating_add(data.len());
                // Without room to hold it, the response counts as too large: executed, but not recorded.
                let fits = len <= limit && reservation.grow(data.len());
                read.push(data);
                if !fits {
                    return (Exchange::Large(Large { head, read, rest }), reservation);
                }
            }
        }
    }
    (Exchange::Complete(head, join(read, len)), reservation)
}
