//! `mode = "observe"`: requests pass through unchanged, while a model of the records tells what would have become of them.
//! It is kept in memory and bounded: what it has forgotten looks new to it.

use super::body::join;
use super::forward::outcome_word;
use super::key::Key;
use super::memo::Memo;
use super::path::{NormalPath, Params};
use super::problem::Problem;
use super::reply::to_omitted;
use super::upstream::SendError;
use super::{Gateway, MissingKey, Peer, Route, derived, fingerprint, headers, scope};
use crate::idempotency::outcome::Class;
use crate::idempotency::{
    ClaimToken, Decision, Event, Evidence, Millis, Origin, Outcome, Record, Recorded, RejectReason, Response, Step,
    Why, Write, step,
};
use crate::ledger::{Reservation, new_token};
use crate::store::RecordId;
use crate::telemetry::Outcome as Result_;
use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::request::Parts;
use http::{Request, response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

/// Records in the model; each takes a few hundred bytes.
const RECORDS_MAX: u64 = 50_000;

/// The records as they would be, for all workers.
pub(super) struct Model {
    records: Memo<Mutex<Option<Record>>>,
}

impl Default for Model {
    fn default() -> Self {
        Self { records: Memo::new(RECORDS_MAX) }
    }
}

/// One request that is observed while it passes through.
pub(super) struct Observed {
    gateway: Arc<Gateway>,
    route: Arc<Route>,
    parts: Parts,
    path: NormalPath,
    params: Params,
    peer: Peer,
    key: Result<Option<Key>, Problem>,
    progress: Mutex<Progress>,
}

struct Progress {
    /// The body so far.
    read: Vec<Bytes>,
    len: usize,
    room: Reservation,
    /// The response may come before the body has ended.
    outcome: Option<Outcome>,
    phase: Phase,
}

enum Phase {
    Reading,
    /// It would have been claimed and forwarded.
    Claimed(RecordId, ClaimToken),
    Done,
}

impl Observed {
    pub(super) fn new(
        gateway: &Arc<Gateway>,
        route: &Arc<Route>,
        request: &Request<Incoming>,
        (path, params): (NormalPath, Params),
        peer: &Peer,
        key: Result<Option<Key>, Problem>,
    ) -> Arc<Self> {
        let mut head = Request::new(());
        *head.method_mut() = request.method().clone();
        *head.uri_mut() = request.uri().clone();
        *head.headers_mut() = request.headers().clone();
        let room = gateway.budget.reservation();
        let progress = Progress { read: Vec::new(), len: 0, room, outcome: None, phase: Phase::Reading };
        Arc::new(Self {
            gateway: Arc::clone(gateway),
            route: Arc::clone(route),
            parts: head.into_parts().0,
            path,
            params,
            peer: peer.clone(),
            key,
            progress: Mutex::new(progress),
        })
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece of the body has gone by.
    fn take(&self, data: &Bytes) {
        let progress = &mut *self.progress();
        if !matches!(progress.phase, Phase::Reading) {
            return;
        }
        progress.len = progress.len.saturating_add(data.len());
        if progress.len > self.gateway.options.max_body {
            self.tell(progress, None, Result_::rejected);
        } else if !progress.room.grow(data.len()) {
            self.tell(progress, None, Result_::failed);
        } else {
            progress.read.push(data.clone());
        }
    }

    /// The body has gone by whole: now it would have been decided upon.
    pub(super) fn body_ended(&self) {
        let progress = &mut *self.progress();
        if !matches!(progress.phase, Phase::Reading) {
            return;
        }
        let body = join(std::mem::take(&mut progress.read), progress.len);
        let (id, event) = match self.arrival(&body) {
            Ok(arrival) => arrival,
            Err(problem) => return self.tell(progress, None, problem.code.result()),
        };
        let decision = self.step(id, &event);
        self.tell(progress, Some(id), result(&decision));
        if let (Decision::Forward { .. }, Event::Arrive { token, .. }) = (decision, event) {
            progress.phase = Phase::Claimed(id, token);
            if let Some(outcome) = progress.outcome.take() {
                self.settle(progress, outcome);
            }
        }
    }

    /// What the ledger would have been asked.
    fn arrival(&self, body: &[u8]) -> Result<(RecordId, Event), Problem> {
        let options = &self.route.options;
        let key = self.key.clone()?;
        if key.is_none() && options.missing_key == MissingKey::Reject {
            return Err(Problem::new(super::Code::KeyMissing, "A key would be needed."));
        }
        let claims = match (scope::bearer(options, &self.parts.headers)?, &self.gateway.options.auth) {
            (Some(token), Some(auth)) => {
                // What is not known at once would be waited for; an observer delays nobody.
                let mut verified = pin!(auth.verify(token, self.gateway.ledger.now()));
                match verified.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                    Poll::Ready(claims) => Some(claims?),
                    Poll::Pending => {
                        return Err(Problem::new(super::Code::ProbeFailed, "The token's key is not known yet."));
                    }
                }
            }
            _ => None,
        };
        let Self { parts, path, params, peer, .. } = self;
        let asked = scope::Request { headers: &parts.headers, path, params, peer, claims: claims.as_deref() };
        let tenant = scope::tenant(&self.gateway.secret, options, &asked)?;
        let fingerprint = fingerprint(&self.route, parts, path, body);
        let key = match key {
            Some(key) => key,
            None => derived(&tenant.derive_key(&fingerprint.digest))?,
        };
        let origin = Origin { route: Bytes::copy_from_slice(options.pattern.as_str().as_bytes()), ..Origin::default() };
        Ok((tenant.record_id(&key.decoded), Event::Arrive { origin, fingerprint, token: new_token() }))
    }

    fn step(&self, id: RecordId, event: &Event) -> Decision {
        let (policy, now): (_, Millis) = (&self.route.options.policy, self.gateway.ledger.now());
        let mut name = [0; 32];
        if let Some(start) = name.first_chunk_mut() {
            *start = id.0;
        }
        let slot = self.gateway.model.records.get_or_default(name);
        let mut stored = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let Step { write, decision } = step(policy, now, stored.as_ref(), event);
        match write {
            Write::Keep => {}
            Write::Put(record) => *stored = Some(record),
            Write::Remove => *stored = None,
        }
        decision
    }

    /// Counts and logs what would have become of the request; that is all there is to say of it, unless it is claimed.
    fn tell(&self, progress: &mut Progress, id: Option<RecordId>, would: Result_) {
        progress.phase = Phase::Done;
        progress.read = Vec::new();
        self.route.observed.count(would);
        tracing::info!(
            record = id.map(tracing::field::display),
            route = self.route.options.pattern.as_str(),
            would = would.as_str(),
            "observed request"
        );
    }

    /// The upstream has answered, or has not.
    pub(super) fn answered<B>(
        &self,
        sent: Result<http::Response<B>, SendError>,
    ) -> Result<http::Response<B>, SendError> {
        let (sent, outcome) = match sent {
            Ok(response) => {
                let (head, body) = response.into_parts();
                let outcome = self.outcome(&head);
                (Ok(http::Response::from_parts(head, body)), outcome)
            }
            Err(error) => {
                let outcome = unanswered(&error);
                (Err(error), outcome)
            }
        };
        let progress = &mut *self.progress();
        match progress.phase {
            Phase::Reading => progress.outcome = Some(outcome),
            Phase::Claimed(..) => self.settle(progress, outcome),
            Phase::Done => {}
        }
        sent
    }

    /// By the response's head: its body is on its way.
    fn outcome(&self, head: &response::Parts) -> Outcome {
        let (options, status) = (&self.route.options, head.status.as_u16());
        let by_status = || options.outcomes.classify(status, head.headers.contains_key(RETRY_AFTER));
        match outcome_word(head).unwrap_or_else(by_status) {
            Class::NotExecuted => Outcome::NotExecuted(Evidence::ThisSend),
            Class::Unknown => Outcome::Unknown(Why::Status(status)),
            Class::Final => {
                let limit = u64::try_from(options.max_recorded_body).unwrap_or(u64::MAX);
                let omitted = headers::declared_length(&head.headers).is_some_and(|len| len > limit);
                Outcome::Final(if omitted {
                    to_omitted(head.status, &head.headers)
                } else {
                    Recorded::Full(Response { status, headers: Vec::new(), body: Bytes::new() })
                })
            }
        }
    }

    fn settle(&self, progress: &mut Progress, outcome: Outcome) {
        if let Phase::Claimed(id, token) = std::mem::replace(&mut progress.phase, Phase::Done) {
            self.step(id, &Event::Settle { token, outcome });
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        let progress = self.progress.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The client is gone, and with it the request: a claimed one would have gone on, to an end that is not known here.
        if let Phase::Claimed(id, token) = std::mem::replace(&mut progress.phase, Phase::Done) {
            self.step(id, &Event::Settle { token, outcome: Outcome::Unknown(Why::Abandoned) });
        }
    }
}

fn unanswered(error: &SendError) -> Outcome {
    match error {
        SendError::Unreachable { .. } | SendError::Withheld => Outcome::NotExecuted(Evidence::ThisSend),
        SendError::TimedOut => Outcome::Unknown(Why::Timeout),
        SendError::Malformed(_) => Outcome::Unknown(Why::Malformed),
        SendError::Broken(_) | SendError::Upload(_) => Outcome::Unknown(Why::Reset),
    }
}

fn result(decision: &Decision) -> Result_ {
    match decision {
        Decision::Forward { .. } => Result_::forwarded,
        Decision::Replay => Result_::replayed,
        Decision::Wait { .. } => Result_::waited,
        Decision::Reject(RejectReason::KeyReused) => Result_::key_reused,
        Decision::Reject(RejectReason::InProgress) => Result_::in_progress,
        Decision::Reject(RejectReason::BodyNotRecorded { .. }) => Result_::body_not_recorded,
        Decision::Reject(RejectReason::OutcomeUnknown) | Decision::Lookup => Result_::outcome_unknown,
        Decision::Renewed
        | Decision::Settled
        | Decision::Superseded
        | Decision::NotFound
        | Decision::InFlight
        | Decision::NotUnknown => Result_::failed,
    }
}

/// A body that is observed on its way.
pub struct Tee {
    body: Incoming,
    observed: Arc<Observed>,
}

impl Tee {
    pub(super) fn new(body: Incoming, observed: Arc<Observed>) -> Self {
        Self { body, observed }
    }
}

impl Body for Tee {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.observed.take(data);
        }
        // Whoever knows the length does not ask for the end.
        if frame.is_none() || self.body.is_end_stream() && !matches!(frame, Some(Err(_))) {
            self.observed.body_ended();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
