//! THE decision: what may happen to a key. One total function without IO, clock or randomness.

use super::record::{ClaimToken, Fingerprint, Millis, Origin, Record, Recorded, Response, State, Why};

/// What to do with a duplicate of a request that is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concurrent {
    Wait,
    Conflict,
}

/// What to do with a newcomer whose key's outcome is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownOutcome {
    /// Refuse it, until an operator resolves the record or it expires.
    Hold,
    /// Send it again, for upstreams that honour the key themselves.
    Forward,
    /// Ask the upstream. That it has not been executed counts only if it was asked so long after the claim.
    Lookup { min_age_ms: u64 },
}

/// A route's rules, as far as they decide what happens to a key. Times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub retention_ms: u64,
    pub unknown_retention_ms: u64,
    pub concurrent: Concurrent,
    pub unknown_outcome: UnknownOutcome,
    /// How long a claim lives without being renewed; `None`: as long as its gateway (embedded store).
    pub lease_ms: Option<u64>,
}

/// What a configuration that says nothing says.
impl Default for Policy {
    fn default() -> Self {
        const DAY_MS: u64 = 24 * 60 * 60 * 1000;
        Self {
            retention_ms: DAY_MS,
            unknown_retention_ms: 7 * DAY_MS,
            concurrent: Concurrent::Wait,
            unknown_outcome: UnknownOutcome::Hold,
            lease_ms: None,
        }
    }
}

/// How a forward ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The upstream answered and that answer stands.
    Final(Recorded),
    /// The upstream has certainly not executed this send.
    NotExecuted(Evidence),
    /// It may have been executed.
    Unknown(Why),
}

/// What a "not executed" is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// It speaks for this send alone: a failed connect, a status such as 429.
    ThisSend,
    /// The upstream says so of the key: `Idempotency-Outcome: not-executed`.
    ThisKey,
}

/// Something that happens to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request with this key has arrived. `origin.attempts` is ignored.
    Arrive { origin: Origin, fingerprint: Fingerprint, token: ClaimToken },
    /// The owner keeps its claim alive.
    Renew { token: ClaimToken },
    /// The owner's forward has ended.
    Settle { token: ClaimToken, outcome: Outcome },
    /// Found at start: the gateway that held this claim is dead.
    Recover,
    /// Somebody looks whether the claim's lease is over. It is no business of his whose it was.
    Lapse,
    /// The upstream was asked at `asked_at` what became of the request whose outcome `of`'s holder never learned. The rest
    /// is as in [`Event::Arrive`].
    LookedUp {
        of: ClaimToken,
        asked_at: Millis,
        verdict: Verdict,
        origin: Origin,
        fingerprint: Fingerprint,
        token: ClaimToken,
    },
    /// An operator has found out what became of a request whose outcome is unknown.
    Resolve(Resolution),
    /// An operator gives the key back: what becomes of its next use is his to answer for.
    Forget,
}

/// What the upstream says of a key that it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has been executed, and this is the answer to give.
    Executed(Recorded),
    NotExecuted,
    /// It does not say.
    Undecided,
}

/// An operator's word on a request whose outcome is unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It has not been executed: the key is free.
    NotExecuted,
    /// It has been executed, and this is the answer to give.
    Response(Response),
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RejectReason {
    /// Same key, other payload.
    KeyReused,
    /// The first request is still in flight, and the route does not wait.
    InProgress,
    OutcomeUnknown,
    /// Executed, but its response was too large to be recorded.
    BodyNotRecorded {
        status: u16,
        location: Option<bytes::Bytes>,
    },
}

/// What the event means for whoever raised it. It counts only once the step's write has landed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send it; `resend`: it may have been executed before.
    Forward {
        resend: bool,
    },
    /// Answer from the record that the step leaves.
    Replay,
    /// Ask the upstream what became of it, and come back with [`Event::LookedUp`].
    Lookup,
    /// Wait for the claim to settle; its lease ends at `until`.
    Wait {
        until: Option<Millis>,
    },
    Reject(RejectReason),
    Renewed,
    /// The record says what the event wanted it to say.
    Settled,
    /// The record has moved on: the event changes nothing.
    Superseded,
    /// To an operator: there is no such record, or its time is over.
    NotFound,
    /// To an operator: a claim settles by itself, and nobody can say yet how.
    InFlight,
    /// To an operator: the outcome is known, so there is nothing to resolve.
    NotUnknown,
}

/// What to write, conditional on the record that was read.
#[allow(clippy::large_enum_variant, reason = "made once per request and taken apart at once: a box would cost more")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    Keep,
    Put(Record),
    Remove,
}

#[must_use = "a decision counts only after its write has landed"]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub write: Write,
    pub decision: Decision,
}

impl Step {
    fn keep(decision: Decision) -> Self {
        Self { write: Write::Keep, decision }
    }
}

/// Decides what `event` does to the record `stored` at `now`.
pub fn step(policy: &Policy, now: Millis, stored: Option<&Record>, event: &Event) -> Step {
    match stored.and_then(|record| lapsed(policy, now, record)) {
        Some(lapsed) if *event == Event::Lapse && !lapsed.expired(now) => {
            Step { write: Write::Put(lapsed), decision: Decision::Settled }
        }
        // Only its owner still takes it for a claim.
        Some(lapsed) if !matches!(event, Event::Renew { .. } | Event::Settle { .. } | Event::Recover) => {
            let step = decide(policy, now, Some(&lapsed), event);
            match (&step.write, event, &step.decision) {
                // Another payload changes nothing.
                (_, _, Decision::Reject(RejectReason::KeyReused)) => step,
                (Write::Keep, Event::Arrive { .. } | Event::LookedUp { .. }, _) => {
                    Step { write: Write::Put(lapsed), ..step }
                }
                _ => step,
            }
        }
        _ => decide(policy, now, stored, event),
    }
}

/// What a claim whose lease is over counts as, from that moment on: its outcome is unknown. `None`: it is no such claim.
#[must_use]
pub fn lapsed(policy: &Policy, now: Millis, record: &Record) -> Option<Record> {
    match record.state {
        State::Claimed { lease_until: Some(until) } if until <= now => Some(unknown(policy, until, record, Why::Lease)),
        _ => None,
    }
}

/// When a store may drop the record: an owner that is gone leaves a claim behind that counts as unknown once it has lapsed.
#[must_use]
pub fn droppable_at(policy: &Policy, record: &Record) -> Option<Millis> {
    match record.state {
        State::Claimed { lease_until } => lease_until.map(|until| until.plus(policy.unknown_retention_ms)),
        _ => record.expires_at(),
    }
}

fn decide(policy: &Policy, now: Millis, stored: Option<&Record>, event: &Event) -> Step {
    match event {
        Event::Arrive { origin, fingerprint, token } => match stored.filter(|record| !record.expired(now)) {
            None => claim(policy, now, Origin { attempts: 1, claimed_at: now, ..origin.clone() }, *fingerprint, *token),
            Some(record) => arrive_at(policy, now, record, fingerprint, *token),
        },
        Event::LookedUp { of, asked_at, verdict, origin, fingerprint, token } => {
            let asked_for = |record: &&Record| {
                matches!(record.state, State::Unknown { .. }) && record.token == *of && !record.expired(now)
            };
            match stored.filter(asked_for) {
                Some(record) if !record.fingerprint.conflicts_with(fingerprint) => {
                    let again = Origin { attempts: 1, claimed_at: now, ..origin.clone() };
                    looked_up(policy, now, record, *asked_at, verdict, (again, *fingerprint, *token))
                }
                _ => moved_on(decide(
                    policy,
                    now,
                    stored,
                    &Event::Arrive { origin: origin.clone(), fingerprint: *fingerprint, token: *token },
                )),
            }
        }
        Event::Renew { token } => renew(policy, now, stored, *token),
        Event::Settle { token, outcome } => settle(policy, now, stored, *token, outcome),
        Event::Recover => match stored {
            Some(record) if matches!(record.state, State::Claimed { .. }) => {
                Step { write: Write::Put(unknown(policy, now, record, Why::Crash)), decision: Decision::Settled }
            }
            _ => Step::keep(Decision::Superseded),
        },
        // It lives, or is none, or its time is over.
        Event::Lapse => Step::keep(Decision::Superseded),
        Event::Resolve(_) | Event::Forget => match stored.filter(|record| !record.expired(now)) {
            None => Step::keep(Decision::NotFound),
            Some(record) => operate(policy, now, record, event),
        },
    }
}

/// An operator's act on a live record. A claim that lives refuses all of them: its request may be on its way to the upstream.
fn operate(policy: &Policy, now: Millis, record: &Record, event: &Event) -> Step {
    let write = match (&record.state, event) {
        (State::Claimed { .. }, _) => return Step::keep(Decision::InFlight),
        (State::Unknown { .. }, Event::Resolve(Resolution::Response(response))) => {
            Write::Put(completed(policy, now, record, Recorded::Full(response.clone())))
        }
        (State::Completed { .. }, Event::Resolve(_)) => return Step::keep(Decision::NotUnknown),
        (State::Unknown { .. } | State::Completed { .. }, _) => Write::Remove,
    };
    Step { write, decision: Decision::Settled }
}

fn claim(policy: &Policy, now: Millis, origin: Origin, fingerprint: Fingerprint, token: ClaimToken) -> Step {
    let resend = origin.attempts > 1;
    let lease_until = policy.lease_ms.map(|ms| now.plus(ms));
    let record = Record { origin, fingerprint, token, state: State::Claimed { lease_until } };
    Step { write: Write::Put(record), decision: Decision::Forward { resend } }
}

/// A newcomer finds a live record. The fingerprint comes first: 422 beats waiting, replaying and `outcome_unknown`.
fn arrive_at(policy: &Policy, now: Millis, record: &Record, fingerprint: &Fingerprint, token: ClaimToken) -> Step {
    if record.fingerprint.conflicts_with(fingerprint) {
        return Step::keep(Decision::Reject(RejectReason::KeyReused));
    }
    match &record.state {
        State::Claimed { lease_until } => Step::keep(match policy.concurrent {
            Concurrent::Wait => Decision::Wait { until: *lease_until },
            Concurrent::Conflict => Decision::Reject(RejectReason::InProgress),
        }),
        State::Completed { response: Recorded::Full(_), .. } => Step::keep(Decision::Replay),
        State::Completed { response: Recorded::Omitted { status, location }, .. } => {
            let (status, location) = (*status, location.clone());
            Step::keep(Decision::Reject(RejectReason::BodyNotRecorded { status, location }))
        }
        State::Unknown { .. } => match policy.unknown_outcome {
            UnknownOutcome::Hold => Step::keep(Decision::Reject(RejectReason::OutcomeUnknown)),
            UnknownOutcome::Forward => {
                let attempts = record.origin.attempts.saturating_add(1);
                let origin = Origin { attempts, ..record.origin.clone() };
                claim(policy, now, origin, record.fingerprint, token)
            }
            UnknownOutcome::Lookup { .. } => Step::keep(Decision::Lookup),
        },
    }
}

/// A verdict on the very claim that it was asked for.
fn looked_up(
    policy: &Policy,
    now: Millis,
    record: &Record,
    asked_at: Millis,
    verdict: &Verdict,
    (origin, fingerprint, token): (Origin, Fingerprint, ClaimToken),
) -> Step {
    match verdict {
        Verdict::Executed(response) => {
            let record = completed(policy, now, record, response.clone());
            let decision = arrive_at(policy, now, &record, &fingerprint, token).decision;
            Step { write: Write::Put(record), decision }
        }
        Verdict::NotExecuted => {
            // Of several claims only the first one's time is known; all of them were made before the outcome was unknown.
            let claimed_at = match record.state {
                State::Unknown { since, .. } if record.origin.attempts > 1 => since,
                _ => record.origin.claimed_at,
            };
            match policy.unknown_outcome {
                UnknownOutcome::Lookup { min_age_ms } if claimed_at.plus(min_age_ms) <= asked_at => {
                    claim(policy, now, origin, fingerprint, token)
                }
                // The upstream may still be at it.
                UnknownOutcome::Lookup { .. } => Step::keep(Decision::Reject(RejectReason::InProgress)),
                UnknownOutcome::Hold | UnknownOutcome::Forward => {
                    Step::keep(Decision::Reject(RejectReason::OutcomeUnknown))
                }
            }
        }
        Verdict::Undecided => Step::keep(Decision::Reject(RejectReason::OutcomeUnknown)),
    }
}

/// Whoever has asked for a claim that is there no more does not ask again for the next: one question for each arrival.
fn moved_on(step: Step) -> Step {
    match step.decision {
        Decision::Lookup => Step { decision: Decision::Reject(RejectReason::InProgress), ..step },
        _ => step,
    }
}

fn renew(policy: &Policy, now: Millis, stored: Option<&Record>, token: ClaimToken) -> Step {
    match stored {
        Some(record) if record.token == token => match record.state {
            // A lapsed lease is not revived: a newcomer may be turning the claim into unknown right now.
            State::Claimed { lease_until } if lease_until.is_none_or(|until| until > now) => {
                let lease_until = policy.lease_ms.map(|ms| now.plus(ms));
                let state = State::Claimed { lease_until };
                Step { write: Write::Put(Record { state, ..record.clone() }), decision: Decision::Renewed }
            }
            _ => Step::keep(Decision::Superseded),
        },
        _ => Step::keep(Decision::Superseded),
    }
}

/// Only the holder of the token settles: a claim, or the unknown that its claim has turned into.
fn settle(policy: &Policy, now: Millis, stored: Option<&Record>, token: ClaimToken, outcome: &Outcome) -> Step {
    let Some(record) = stored.filter(|record| record.token == token) else {
        return Step::keep(Decision::Superseded);
    };
    let claimed = match record.state {
        State::Claimed { .. } => true,
        State::Unknown { .. } => false,
        // A settle whose answer was lost is repeated: it has landed already.
        State::Completed { .. } => return Step::keep(Decision::Settled),
    };
    let write = match outcome {
        Outcome::Final(response) => Write::Put(completed(policy, now, record, response.clone())),
        // An earlier send may have been executed, whatever became of this one.
        Outcome::NotExecuted(Evidence::ThisSend) if record.origin.attempts > 1 => {
            if claimed {
                Write::Put(unknown(policy, now, record, Why::EarlierSend))
            } else {
                Write::Keep
            }
        }
        Outcome::NotExecuted(_) => Write::Remove,
        Outcome::Unknown(why) if claimed => Write::Put(unknown(policy, now, record, *why)),
        Outcome::Unknown(_) => Write::Keep,
    };
    Step { write, decision: Decision::Settled }
}

fn completed(policy: &Policy, now: Millis, record: &Record, response: Recorded) -> Record {
    let expires_at = now.plus(policy.retention_ms);
    Record { state: State::Completed { response, completed_at: now, expires_at }, ..record.clone() }
}

fn unknown(policy: &Policy, now: Millis, record: &Record, why: Why) -> Record {
    let expires_at = now.plus(policy.unknown_retention_ms);
    Record { state: State::Unknown { why, since: now, expires_at }, ..record.clone() }
}

#[cfg(test)]
mod tests;
