//! An exhaustive breadth-first search over the real `step`: three requests on one key (two with the same payload, one
//! with another) at gateways that may die at any instant, a store whose answers get lost and whose writes land late,
//! a clock, renewals, recovery at start, an operator who settles by hand what he has found out, and an upstream that
//! executes at once or later, refuses, or says nothing, and may be asked what it has executed.
//!
//! The store is one register, changed by compare-and-swap with versions that never repeat. Two abstractions keep the
//! search finite and complete, without a bound on time: a time is the ticks left until it (0: over), and a version is
//! only whether it is still the current one.
//!
//! `every_mutant_is_caught` plants faults in the core and in the shell around it, and asserts that the search finds each,
//! by the invariant that names it: it is the test of the model itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

use bytes::Bytes;
use oncegate::idempotency::{
    ClaimToken, Concurrent, Decision, Event, Evidence, Fingerprint, Millis, Origin, Outcome, Policy, Record, Recorded,
    RejectReason, Resolution, Response, State, Step, UnknownOutcome, Verdict, Why, Write, step,
};
use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasherDefault, Hash, Hasher};

const NOW: Millis = Millis(1_000);
const LEASE: u8 = 1;
const RETENTION: u8 = 1;
const UNKNOWN_RETENTION: u8 = 1;
/// Whether it has passed is modelled by what it is for: whether the upstream may still be at an earlier send.
const MIN_AGE: u64 = 1;
/// What must hold, always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Invariant {
    /// Under `hold`, one execution until the record's time is over.
    AtMostOnce,
    /// A claim ends only by its holder's settle, or as unknown: lapsed, or found at start.
    ClaimsStay,
    /// Only the holder of the token changes a record that it has claimed, or creates none.
    OnlyTheHolderSettles,
    /// A completed record does not change before its time is over.
    CompletedStays,
    /// An unknown record is settled by its holder, re-sent where the policy says so, or kept until its time is over.
    UnknownStays,
    /// A key is freed only if nothing was executed, and never by a re-send that speaks for itself alone.
    FreedOnlyUnexecuted,
    /// Another payload is refused as such, the same payload never.
    PayloadsApart,
    /// A request goes to the upstream only while the store holds its live claim.
    SentUnderClaim,
    /// A client sees a final answer that the gateway has settled only once the store holds it.
    DurableBeforeSeen,
    /// What one client has seen is what later ones get.
    AnswersAgree,
    /// A lease that is over is not renewed.
    LapsedStaysLapsed,
    /// An operator changes what is unknown, or gives a settled key back; else he is told why not.
    OperatorsAreTold,
    /// When all requests have ended and nobody has died, no claim is left.
    NoClaimLeft,
}
use Invariant::*;

type Checked = Result<(), Invariant>;

/// A fault planted into the core or into the shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    NoSwapCheck,
    SweepUnconditionally,
    UnknownIsNotExecuted,
    NoFingerprintCheck,
    StaleTokenSettles,
    StaleTokenRenews,
    LapsedIsFree,
    LiveClaimIsUnknown,
    LiveClaimLapses,
    RecoverFrees,
    ClaimsExpire,
    ExpiresEarly,
    UnknownIsFree,
    ResendFrees,
    LateUnknownOverwrites,
    RenewRevives,
    ClaimCountsBeforeItLands,
    AnswerSeenBeforeItIsDurable,
    LostClaimCountsAsLanded,
    LostClaimIsForgotten,
    SendsWithoutLookingAtTheLease,
    LeaseCountsFromTheAnswer,
    RetryProlongsTheLease,
    OperatorTakesClaims,
    ResolveOverwritesCompleted,
    ResolveSettlesForAnother,
    OperatorIsNotToldOfClaims,
    OperatorActsUnconditionally,
    OperatorTriesAgain,
    VerdictForAnyClaim,
    NoMinAge,
    MinAgeCountsToTheAnswer,
    LookupOfALiveClaim,
    UndecidedIsNotExecuted,
}

/// What only happens where the upstream is asked.
const OF_LOOKUPS: [Mutant; 5] = [
    Mutant::VerdictForAnyClaim,
    Mutant::NoMinAge,
    Mutant::MinAgeCountsToTheAnswer,
    Mutant::LookupOfALiveClaim,
    Mutant::UndecidedIsNotExecuted,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Rec {
    payload: u8,
    holder: u8,
    attempts: u8,
    state: Is,
    /// When the store may drop a claim: never, but for a mutant.
    claim_expiry: Option<u8>,
}

/// Times are the ticks left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Is {
    Claimed { lease: Option<u8> },
    Completed { answer: u8, left: u8 },
    Unknown { left: u8 },
}

impl Rec {
    fn expired(&self) -> bool {
        matches!(self.state, Is::Completed { left: 0, .. } | Is::Unknown { left: 0 })
    }

    fn claimed(&self) -> bool {
        matches!(self.state, Is::Claimed { .. })
    }

    fn lapsed(&self) -> bool {
        matches!(self.state, Is::Claimed { lease: Some(0) })
    }

    fn real(&self) -> Record {
        let at = |left: u8| NOW.plus(left.into());
        Record {
            origin: Origin { attempts: self.attempts.into(), ..origin() },
            fingerprint: fingerprint(self.payload),
            token: token(self.holder),
            state: match self.state {
                Is::Claimed { lease } => State::Claimed { lease_until: lease.map(at) },
                Is::Completed { answer, left } => {
                    State::Completed { response: response(answer), completed_at: NOW, expires_at: at(left) }
                }
                Is::Unknown { left } => State::Unknown { why: Why::Crash, since: NOW, expires_at: at(left) },
            },
        }
    }

    fn of(record: &Record) -> Self {
        let left = |at: &Millis| u8::try_from(at.since(NOW)).unwrap();
        Self {
            payload: record.fingerprint.digest[0],
            holder: record.token.0[0],
            attempts: u8::try_from(record.origin.attempts).unwrap(),
            state: match &record.state {
                State::Claimed { lease_until } => Is::Claimed { lease: lease_until.as_ref().map(left) },
                State::Completed { response: Recorded::Full(response), expires_at, .. } => {
                    Is::Completed { answer: u8::try_from(response.status - 200).unwrap(), left: left(expires_at) }
                }
                State::Completed { .. } => panic!("no body is omitted here"),
                State::Unknown { expires_at, .. } => Is::Unknown { left: left(expires_at) },
            },
            claim_expiry: None,
        }
    }
}

fn origin() -> Origin {
    Origin {
        key: Bytes::from_static(b"k"),
        key_header: Bytes::from_static(b"k"),
        path: Bytes::from_static(b"/posts"),
        route: Bytes::from_static(b"/posts"),
        claimed_at: NOW,
        attempts: 0,
    }
}

fn fingerprint(payload: u8) -> Fingerprint {
    Fingerprint { settings: 1, digest: [payload; 32] }
}

fn token(holder: u8) -> ClaimToken {
    ClaimToken([holder; 16])
}

/// The upstream's answer to an execution; executions are numbered by the request that caused them, from 1.
fn response(answer: u8) -> Recorded {
    Recorded::Full(plain(answer))
}

fn plain(answer: u8) -> Response {
    Response { status: 200 + u16::from(answer), headers: Vec::new(), body: Bytes::new() }
}

/// What a write expects to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Expected {
    Nothing,
    Current,
    /// A version that is gone for good.
    Gone,
}

/// A write on its way to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pending {
    expected: Expected,
    new: Option<Rec>,
    by: By,
    /// What is decided once it has landed.
    then: Then,
}

/// The event behind a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum By {
    Arrive,
    Renew,
    Settle(Ended),
    Recover,
    Lapse,
    Sweep,
    Operate(Hand),
    LookedUp(Told),
}

/// What the upstream said when it was asked; that nothing was executed it says of now, not of what it has yet to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Told {
    Executed(u8),
    NotExecuted,
    Nothing,
}

/// What an operator does. He says the truth, as it was when he looked at the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Hand {
    NotExecuted,
    Response(u8),
    Forget,
}

impl Hand {
    fn event(self) -> Event {
        match self {
            Self::NotExecuted => Event::Resolve(Resolution::NotExecuted),
            Self::Response(answer) => Event::Resolve(Resolution::Response(plain(answer))),
            Self::Forget => Event::Forget,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Then {
    Forward,
    Refuse,
    Conclude,
    Renewed,
    Ask,
    Replay,
}

/// How a forward has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Ended {
    Final(u8),
    NotThisSend,
    NotThisKey,
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Idle,
    /// Reads the store and decides; waits for its write, if there is one.
    Arriving,
    Waiting,
    /// Its claim has landed; nothing is sent yet.
    Claimed,
    /// `answer`: the execution that the upstream will tell of; 0: it did not execute this.
    Sent {
        answer: u8,
    },
    /// `silent`: the client has got its answer already.
    Settling {
        ended: Ended,
        answer: Option<u8>,
        silent: bool,
    },
    /// Settled as unknown, but the answer may still come.
    Listening {
        answer: u8,
    },
    /// The upstream has the request, and executes it later, or never.
    Queued,
    /// The upstream is to be asked what became of this holder's request.
    Asking {
        of: u8,
    },
    /// `early`: when it was asked, it may still have been about to execute an earlier send.
    Told {
        of: u8,
        told: Told,
        early: bool,
    },
    /// The client is answered, but a claim of its own may still land late: then it is settled as not executed.
    GaveUp,
    Done,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Actor {
    phase: Phase,
    write: Option<Pending>,
    /// A write whose answer is not waited for: a renewal, or one whose answer was lost.
    late: Option<Pending>,
    /// A claim's answer was lost: what bears its token may be its own.
    issued: bool,
    /// Ticks left of its lease, as it counts them itself.
    lease: u8,
    /// It was sent in an earlier retention period.
    outdated: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    store: Option<Rec>,
    actors: [Actor; 3],
    /// The sweeper has found the record expired, in this version.
    sweep: Option<Expected>,
    /// An operator's write, on the version of the record that he has looked at.
    operator: Option<Pending>,
    /// The one gateway of an embedded store is dead, and has not yet recovered.
    down: bool,
    faults: u8,
    renewals: u8,
    acts: u8,
    // What nobody in the model knows: the truth, for one retention period.
    executions: u8,
    /// The requests that the upstream has yet to execute or to drop, a bit each.
    queued: u8,
    /// The execution that an upstream which honours keys answers with again.
    executed: u8,
    /// The final answer that clients have seen.
    seen: u8,
    claim_given_up: bool,
}

impl World {
    /// The time of the record is over: what was executed until now is no longer promised.
    fn period_over(&mut self) {
        (self.executions, self.executed, self.seen, self.queued) = (0, 0, 0, 0);
        for actor in &mut self.actors {
            actor.outdated |= !matches!(actor.phase, Phase::Idle | Phase::Done | Phase::Dead);
        }
    }
}

#[derive(Clone, Copy)]
struct Model {
    policy: Policy,
    size: Size,
    mutant: Option<Mutant>,
    /// The invariants that are looked at; empty: all.
    watched: &'static [Invariant],
}

/// How much of the world is searched.
#[derive(Clone, Copy, Debug)]
struct Size {
    /// Of each request that may arrive.
    payloads: &'static [u8],
    /// Crashes, lost answers and dropped tasks in one run.
    faults: u8,
    renewals: u8,
    /// Of an operator.
    acts: u8,
}

type Action = (&'static str, usize);
type Successors = Vec<(Action, World)>;

impl Model {
    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn hold(&self, invariant: Invariant, holds: bool) -> Checked {
        if holds || !self.watched.is_empty() && !self.watched.contains(&invariant) { Ok(()) } else { Err(invariant) }
    }

    fn forward(&self) -> bool {
        self.policy.unknown_outcome == UnknownOutcome::Forward
    }

    fn looks_up(&self) -> bool {
        matches!(self.policy.unknown_outcome, UnknownOutcome::Lookup { .. })
    }

    fn shared(&self) -> bool {
        self.policy.lease_ms.is_some()
    }

    fn initial(&self) -> World {
        let idle = Actor { phase: Phase::Idle, write: None, late: None, issued: false, lease: 0, outdated: false };
        let mut actors = [idle; 3];
        actors.iter_mut().skip(self.size.payloads.len()).for_each(|actor| actor.phase = Phase::Done);
        World {
            store: None,
            actors,
            sweep: None,
            operator: None,
            down: false,
            faults: self.size.faults,
            renewals: self.size.renewals,
            acts: self.size.acts,
            executions: 0,
            queued: 0,
            executed: 0,
            seen: 0,
            claim_given_up: false,
        }
    }

    /// The core, with the mutants that belong into it.
    fn step(&self, stored: Option<Rec>, event: Event) -> Step {
        let mut policy = self.policy;
        let (mut stored, mut event) = (stored.map(|rec| rec.real()), event);
        let lapsed =
            |record: &Record| matches!(record.state, State::Claimed { lease_until: Some(until) } if until <= NOW);
        match (self.mutant, &mut event, &mut stored) {
            (Some(Mutant::NoFingerprintCheck), Event::Arrive { fingerprint, .. }, Some(record)) => {
                *fingerprint = record.fingerprint;
            }
            (Some(Mutant::LapsedIsFree), Event::Arrive { .. }, Some(record)) if lapsed(record) => stored = None,
            (Some(Mutant::LiveClaimIsUnknown), Event::Arrive { .. }, Some(record)) => {
                if let State::Claimed { .. } = record.state {
                    record.state = State::Unknown { why: Why::Lease, since: NOW, expires_at: NOW.plus(1) };
                }
            }
            (
                Some(Mutant::LiveClaimLapses),
                Event::Lapse,
                Some(Record { state: State::Claimed { lease_until }, .. }),
            ) => {
                *lease_until = Some(NOW);
            }
            (Some(Mutant::UnknownIsFree), Event::Arrive { .. }, _) => policy.unknown_outcome = UnknownOutcome::Forward,
            (Some(Mutant::ExpiresEarly), Event::Arrive { .. }, Some(record))
                if record.expires_at().is_some_and(|at| at <= NOW.plus(1)) =>
            {
                stored = None;
            }
            (Some(Mutant::StaleTokenSettles), Event::Settle { token, .. }, Some(record)) => *token = record.token,
            (Some(Mutant::StaleTokenRenews), Event::Renew { token }, Some(record)) => *token = record.token,
            (Some(Mutant::UnknownIsNotExecuted), Event::Settle { outcome: outcome @ Outcome::Unknown(_), .. }, _) => {
                *outcome = Outcome::NotExecuted(Evidence::ThisSend);
            }
            (Some(Mutant::ResendFrees), Event::Settle { outcome: Outcome::NotExecuted(evidence), .. }, _) => {
                *evidence = Evidence::ThisKey;
            }
            (Some(Mutant::LateUnknownOverwrites), Event::Settle { outcome: Outcome::Unknown(_), .. }, Some(record)) => {
                record.state = State::Claimed { lease_until: None };
            }
            (Some(Mutant::RenewRevives), Event::Renew { .. }, Some(record)) if lapsed(record) => {
                record.state = State::Claimed { lease_until: Some(NOW.plus(1)) };
            }
            (Some(Mutant::OperatorTakesClaims), Event::Resolve(_) | Event::Forget, Some(record))
            | (Some(Mutant::ResolveOverwritesCompleted), Event::Resolve(_), Some(record)) => {
                let claims = self.is(Mutant::OperatorTakesClaims);
                if claims == matches!(record.state, State::Claimed { .. }) && !record.expired(NOW) {
                    record.state = State::Unknown { why: Why::Crash, since: NOW, expires_at: NOW.plus(1) };
                }
            }
            (Some(Mutant::ResolveSettlesForAnother), Event::Resolve(_), Some(record)) => record.token = token(9),
            (Some(Mutant::OperatorIsNotToldOfClaims), Event::Forget, Some(record)) if lapsed(record) => stored = None,
            (Some(Mutant::VerdictForAnyClaim), Event::LookedUp { of, .. }, Some(record)) => *of = record.token,
            (Some(Mutant::LookupOfALiveClaim), Event::Arrive { .. } | Event::LookedUp { .. }, Some(record)) => {
                if let State::Claimed { .. } = record.state {
                    record.state = State::Unknown { why: Why::Lease, since: NOW, expires_at: NOW.plus(1) };
                }
            }
            (
                Some(Mutant::UndecidedIsNotExecuted),
                Event::LookedUp { verdict: verdict @ Verdict::Undecided, .. },
                _,
            ) => {
                *verdict = Verdict::NotExecuted;
            }
            (Some(Mutant::RecoverFrees), Event::Recover, Some(Record { state: State::Claimed { .. }, .. })) => {
                return Step { write: Write::Remove, decision: Decision::Settled };
            }
            _ => {}
        }
        step(&policy, NOW, stored.as_ref(), &event)
    }

    /// Makes the write that a step asks for; `None`: it asks for none.
    fn pending(&self, world: &World, write: &Write, by: By, then: Then) -> Option<Pending> {
        let new = match write {
            Write::Keep => return None,
            Write::Remove => None,
            Write::Put(record) => {
                let rec = Rec::of(record);
                let claim_expiry = (rec.claimed() && self.is(Mutant::ClaimsExpire)).then_some(LEASE);
                Some(Rec { claim_expiry, ..rec })
            }
        };
        let expected = if world.store.is_some() { Expected::Current } else { Expected::Nothing };
        Some(Pending { expected, new, by, then })
    }

    /// A write reaches the store. Says whether it found what it expected.
    fn land(&self, world: &mut World, actor: usize, pending: Pending) -> Result<bool, Invariant> {
        let expected = match pending.expected {
            Expected::Nothing => world.store.is_none(),
            Expected::Current => true,
            Expected::Gone => false,
        };
        let unchecked =
            self.is(Mutant::NoSwapCheck) || self.is(Mutant::SweepUnconditionally) && pending.by == By::Sweep;
        let unchecked =
            unchecked || self.is(Mutant::OperatorActsUnconditionally) && matches!(pending.by, By::Operate(_));
        if !expected && !unchecked {
            return Ok(false);
        }
        self.check_change(world, actor, pending.by, pending.new)?;
        world.store = pending.new;
        if let Some(rec) = pending.new.filter(|_| matches!(pending.by, By::Arrive | By::LookedUp(_))) {
            // A claim made with the same token again (its first answer was lost) is younger than the question.
            for actor in &mut world.actors {
                if let Phase::Told { of, early, .. } = &mut actor.phase
                    && *of == rec.holder
                    && rec.claimed()
                {
                    *early = true;
                }
            }
        }
        if pending.by == By::Operate(Hand::Forget) {
            world.period_over();
        }
        // A write may have been under way for longer than the record lives.
        if world.store.is_some_and(|rec| rec.expired()) {
            world.period_over();
        }
        let gone = |expected: &mut Expected| {
            if *expected == Expected::Current {
                *expected = Expected::Gone;
            }
        };
        world
            .actors
            .iter_mut()
            .flat_map(|actor| actor.write.iter_mut().chain(&mut actor.late))
            .chain(&mut world.operator)
            .for_each(|pending| gone(&mut pending.expected));
        world.sweep.iter_mut().for_each(gone);
        Ok(true)
    }

    fn check_change(&self, world: &World, actor: usize, by: By, new: Option<Rec>) -> Checked {
        let Some(old) = world.store else {
            let arrives = matches!(by, By::Arrive | By::LookedUp(_));
            let claim = arrives && new.is_some_and(|new| new.claimed() && usize::from(new.holder) == actor);
            return self.hold(OnlyTheHolderSettles, claim || new.is_none());
        };
        if matches!(by, By::Settle(_) | By::Renew) {
            let own = usize::from(old.holder) == actor && new.is_none_or(|new| new.holder == old.holder);
            self.hold(OnlyTheHolderSettles, own)?;
            if let (By::Settle(ended), None) = (by, new) {
                let speaks_for_the_key = ended == Ended::NotThisKey || old.attempts == 1;
                let not_executed = matches!(ended, Ended::NotThisSend | Ended::NotThisKey);
                self.hold(FreedOnlyUnexecuted, not_executed && speaks_for_the_key && world.executions == 0)?;
            }
        }
        let resent = new.is_some_and(|new| new.claimed() && new.attempts == old.attempts + 1 && by == By::Arrive);
        let forgotten = by == By::Operate(Hand::Forget) && new.is_none();
        // To all but its holder a claim whose lease is over counts as unknown.
        let state = match (old.lapsed(), by) {
            (true, By::Operate(_) | By::LookedUp(Told::Executed(_) | Told::NotExecuted))
                if !new.is_some_and(|new| matches!(new.state, Is::Unknown { .. })) =>
            {
                Is::Unknown { left: UNKNOWN_RETENTION }
            }
            _ => old.state,
        };
        match state {
            Is::Claimed { .. } => {
                let given_up =
                    new.is_some_and(|new| matches!(new.state, Is::Unknown { .. }) && new.holder == old.holder);
                let arrives = matches!(by, By::Arrive | By::LookedUp(_));
                let lapsed = old.lapsed() && arrives && (given_up || resent && self.forward());
                let found = by == By::Recover && given_up || by == By::Lapse && given_up && old.lapsed();
                let held = matches!(by, By::Settle(_) | By::Renew);
                self.hold(ClaimsStay, lapsed || found || held)
            }
            _ if old.expired() => Ok(()),
            Is::Completed { .. } => self.hold(CompletedStays, forgotten),
            Is::Unknown { .. } if matches!(by, By::LookedUp(_)) => {
                let claimed = new.is_some_and(|new| new.claimed() && usize::from(new.holder) == actor);
                self.hold(FreedOnlyUnexecuted, !claimed || world.executions == 0 && world.queued == 0)?;
                let answered = new.is_some_and(|new| {
                    let Is::Completed { answer, .. } = new.state else { return false };
                    by == By::LookedUp(Told::Executed(answer)) && new.holder == old.holder
                });
                self.hold(UnknownStays, claimed && by == By::LookedUp(Told::NotExecuted) || answered)
            }
            Is::Unknown { .. } if by == By::Operate(Hand::NotExecuted) => {
                self.hold(FreedOnlyUnexecuted, new.is_none() && world.executions == 0)
            }
            Is::Unknown { .. } if matches!(by, By::Operate(_)) => {
                let answered = new.is_some_and(|new| {
                    let By::Operate(Hand::Response(told)) = by else { return false };
                    matches!(new.state, Is::Completed { answer, .. } if answer == told) && new.holder == old.holder
                });
                self.hold(UnknownStays, answered || forgotten)
            }
            Is::Unknown { .. } => {
                let settled = matches!(by, By::Settle(_));
                self.hold(UnknownStays, settled || resent && self.forward())
            }
        }
    }

    /// A client gets a final answer.
    fn see(&self, world: &mut World, answer: u8) -> Checked {
        self.hold(AnswersAgree, [0, answer].contains(&world.seen))?;
        world.seen = answer;
        Ok(())
    }

    /// A request has its answer; if it may have a claim in the store, or on the way there, it looks after it.
    fn finish(&self, world: &mut World, actor: usize) {
        let this = &mut world.actors[actor];
        this.phase = if this.issued { Phase::GaveUp } else { Phase::Done };
    }

    /// Reads the store and decides on a request that arrives, or has waited.
    fn arrive(&self, world: &mut World, actor: usize) -> Checked {
        let stored = world.store;
        if let Some(own) = stored.filter(|rec| world.actors[actor].issued && usize::from(rec.holder) == actor) {
            let this = &mut world.actors[actor];
            this.phase = if own.claimed() {
                Phase::Claimed
            } else {
                Phase::Settling { ended: Ended::NotThisSend, answer: None, silent: true }
            };
            return Ok(());
        }
        let event = Event::Arrive {
            origin: origin(),
            fingerprint: fingerprint(self.size.payloads[actor]),
            token: token(u8::try_from(actor).unwrap()),
        };
        let Step { write, decision } = self.step(stored, event);
        let live = stored.filter(|rec| !rec.expired());
        let other_payload = live.is_some_and(|rec| rec.payload != self.size.payloads[actor]);
        self.hold(PayloadsApart, other_payload == (decision == Decision::Reject(RejectReason::KeyReused)))?;
        let then = match decision {
            Decision::Forward { .. } => Then::Forward,
            Decision::Lookup => Then::Ask,
            _ => Then::Refuse,
        };
        if let Some(pending) = self.pending(world, &write, By::Arrive, then) {
            let this = &mut world.actors[actor];
            if let Some(Rec { state: Is::Claimed { lease: Some(lease) }, .. }) = pending.new {
                // Which of its writes will have landed nobody knows: the oldest lease counts.
                let shorter = if this.issued { this.lease.min(lease) } else { lease };
                this.lease = if self.is(Mutant::RetryProlongsTheLease) { lease } else { shorter };
            }
            this.write = Some(pending);
            this.phase = Phase::Arriving;
            if self.is(Mutant::ClaimCountsBeforeItLands) && then == Then::Forward {
                this.late = this.write.take();
                this.phase = Phase::Claimed;
            }
            return Ok(());
        }
        match decision {
            Decision::Replay => {
                if let Some(Rec { state: Is::Completed { answer, .. }, .. }) = stored {
                    self.see(world, answer)?;
                }
                self.finish(world, actor);
            }
            Decision::Wait { .. } => world.actors[actor].phase = Phase::Waiting,
            Decision::Reject(_) => self.finish(world, actor),
            Decision::Lookup => self.ask(world, actor),
            other => panic!("{other:?} without a write"),
        }
        Ok(())
    }

    fn ask(&self, world: &mut World, actor: usize) {
        world.actors[actor].phase = match world.store {
            Some(rec) => Phase::Asking { of: rec.holder },
            None => Phase::Arriving,
        };
    }

    /// Reads the store and tells it what the upstream has said.
    fn tell(&self, world: &mut World, actor: usize) -> Checked {
        let Phase::Told { of, told, early } = world.actors[actor].phase else { panic!("has asked nothing") };
        let early = match self.mutant {
            Some(Mutant::NoMinAge) => false,
            Some(Mutant::MinAgeCountsToTheAnswer) => world.queued != 0,
            _ => early,
        };
        let event = Event::LookedUp {
            of: token(of),
            asked_at: if early { NOW } else { NOW.plus(MIN_AGE) },
            verdict: match told {
                Told::Executed(answer) => Verdict::Executed(response(answer)),
                Told::NotExecuted => Verdict::NotExecuted,
                Told::Nothing => Verdict::Undecided,
            },
            origin: origin(),
            fingerprint: fingerprint(self.size.payloads[actor]),
            token: token(u8::try_from(actor).unwrap()),
        };
        let Step { write, decision } = self.step(world.store, event);
        let then = match decision {
            Decision::Forward { .. } => Then::Forward,
            Decision::Replay => Then::Replay,
            _ => Then::Refuse,
        };
        world.actors[actor].outdated = false;
        if let Some(pending) = self.pending(world, &write, By::LookedUp(told), then) {
            let this = &mut world.actors[actor];
            if let Some(Rec { state: Is::Claimed { lease: Some(lease) }, .. }) = pending.new {
                this.lease = lease;
            }
            this.write = Some(pending);
            return Ok(());
        }
        match decision {
            Decision::Replay => {
                if let Some(Rec { state: Is::Completed { answer, .. }, .. }) = world.store {
                    self.see(world, answer)?;
                }
                self.finish(world, actor);
            }
            Decision::Wait { .. } => world.actors[actor].phase = Phase::Waiting,
            Decision::Reject(_) => self.finish(world, actor),
            other => panic!("{other:?} without a write"),
        }
        Ok(())
    }

    /// Reads the store and settles.
    fn settle(&self, world: &mut World, actor: usize, ended: Ended) -> Checked {
        let outcome = match ended {
            Ended::Final(answer) => Outcome::Final(response(answer)),
            Ended::NotThisSend => Outcome::NotExecuted(Evidence::ThisSend),
            Ended::NotThisKey => Outcome::NotExecuted(Evidence::ThisKey),
            Ended::Unknown => Outcome::Unknown(Why::Timeout),
        };
        let Step { write, decision } =
            self.step(world.store, Event::Settle { token: token(u8::try_from(actor).unwrap()), outcome });
        let pending = self.pending(world, &write, By::Settle(ended), Then::Conclude);
        world.actors[actor].write = pending;
        match pending {
            None => self.conclude(world, actor, decision == Decision::Settled),
            Some(_) if self.is(Mutant::AnswerSeenBeforeItIsDurable) && world.actors[actor].late.is_none() => {
                world.actors[actor].late = world.actors[actor].write.take();
                self.conclude(world, actor, true)
            }
            Some(_) => Ok(()),
        }
    }

    /// A settle has landed, or came too late.
    fn conclude(&self, world: &mut World, actor: usize, settled: bool) -> Checked {
        let Phase::Settling { ended, answer, silent } = world.actors[actor].phase else { panic!("settles nothing") };
        match ended {
            Ended::Final(answer) => {
                let durable = world
                    .store
                    .is_some_and(|rec| matches!(rec.state, Is::Completed { answer: held, .. } if held == answer));
                self.hold(DurableBeforeSeen, durable || !settled)?;
                if !silent && !world.actors[actor].outdated {
                    self.see(world, answer)?;
                }
                self.finish(world, actor);
            }
            Ended::Unknown if !silent => match answer {
                Some(answer) => world.actors[actor].phase = Phase::Listening { answer },
                None => self.finish(world, actor),
            },
            Ended::Unknown | Ended::NotThisSend | Ended::NotThisKey => self.finish(world, actor),
        }
        Ok(())
    }

    fn send(&self, world: &mut World, actor: usize, executes: bool) -> Checked {
        let under_claim =
            world.store.is_some_and(|rec| usize::from(rec.holder) == actor && rec.claimed() && !rec.lapsed());
        self.hold(SentUnderClaim, under_claim)?;
        let own = u8::try_from(actor + 1).unwrap();
        let answer = match (executes, self.forward(), world.executed) {
            (false, ..) => 0,
            // `forward` is for upstreams that honour the key: they answer again, and execute nothing.
            (true, true, executed) if executed != 0 => executed,
            (true, ..) => {
                world.executions += 1;
                world.executed = own;
                own
            }
        };
        self.hold(AtMostOnce, world.executions <= 1)?;
        world.actors[actor].phase = Phase::Sent { answer };
        world.actors[actor].outdated = false;
        Ok(())
    }

    /// The upstream comes to a request that it has had for a while.
    fn come_to(&self, world: &mut World, actor: usize, executes: bool) -> Checked {
        world.queued &= !(1 << actor);
        if executes {
            world.executions += 1;
            world.executed = u8::try_from(actor + 1).unwrap();
        }
        self.hold(AtMostOnce, world.executions <= 1)
    }

    /// A write of `actor` is answered.
    fn answered(&self, world: &mut World, actor: usize, pending: Pending, landed: bool) -> Checked {
        let this = &mut world.actors[actor];
        match (pending.then, landed) {
            (Then::Renewed, true) => {
                if let Some(Rec { state: Is::Claimed { lease: Some(left) }, .. }) = pending.new {
                    this.lease = if self.is(Mutant::LeaseCountsFromTheAnswer) { LEASE } else { left };
                }
            }
            (Then::Forward, true) => {
                this.phase = Phase::Claimed;
                if self.is(Mutant::LeaseCountsFromTheAnswer) {
                    this.lease = LEASE;
                }
            }
            (Then::Refuse, true) => self.finish(world, actor),
            (Then::Ask, true) => self.ask(world, actor),
            (Then::Replay, true) => {
                let outdated = this.outdated;
                if let (Some(Rec { state: Is::Completed { answer, .. }, .. }), false) = (pending.new, outdated) {
                    self.see(world, answer)?;
                }
                self.finish(world, actor);
            }
            (Then::Conclude, true) => return self.conclude(world, actor, true),
            // It reads again.
            (_, false) => {}
        }
        Ok(())
    }

    fn tick(world: &mut World) -> bool {
        let before = world.clone();
        let tick = |rec: &mut Rec| {
            match &mut rec.state {
                Is::Claimed { lease } => *lease = lease.map(|left| left.saturating_sub(1)),
                Is::Completed { left, .. } | Is::Unknown { left } => *left = left.saturating_sub(1),
            }
            rec.claim_expiry = rec.claim_expiry.map(|left| left.saturating_sub(1));
        };
        let over = world.store.is_some_and(|rec| rec.expired());
        world.store.iter_mut().for_each(tick);
        for actor in &mut world.actors {
            actor.write.iter_mut().chain(&mut actor.late).filter_map(|pending| pending.new.as_mut()).for_each(tick);
            actor.lease = actor.lease.saturating_sub(1);
        }
        world.operator.iter_mut().filter_map(|pending| pending.new.as_mut()).for_each(tick);
        if !over && world.store.is_some_and(|rec| rec.expired()) {
            world.period_over();
        }
        *world != before
    }

    /// Makes alike what differs only in things that matter no more.
    fn forget(&self, world: &mut World) {
        let useless = |write: Option<Pending>| {
            write.is_some_and(|pending| pending.expected == Expected::Gone) && !self.is(Mutant::NoSwapCheck)
        };
        for actor in &mut world.actors {
            if actor.phase == Phase::Dead && actor.late.is_none() {
                actor.late = actor.write.take();
            }
            if useless(actor.late) {
                actor.late = None;
            }
            if let Some(write) = actor.write.as_mut().filter(|write| useless(Some(**write))) {
                write.new = None;
            }
            let leases = matches!(actor.phase, Phase::Arriving | Phase::Waiting | Phase::Claimed | Phase::Told { .. });
            if !self.shared() || !leases {
                actor.lease = 0;
            }
            if matches!(actor.phase, Phase::Idle | Phase::Done | Phase::Dead) {
                actor.issued = false;
            }
            let sees = matches!(actor.phase, Phase::Sent { .. } | Phase::Settling { silent: false, .. });
            actor.outdated &= sees || matches!(actor.phase, Phase::Told { .. }) && actor.write.is_some();
        }
        if useless(world.operator)
            && !self.is(Mutant::OperatorActsUnconditionally)
            && !self.is(Mutant::OperatorTriesAgain)
        {
            world.operator = None;
        }
    }

    /// All that can happen next. An error names the action that breaks an invariant.
    fn successors(&self, world: &World, out: &mut Successors) -> Result<(), (Action, Invariant)> {
        let mut go = |name: &'static str, actor: usize, change: &dyn Fn(&mut World) -> Checked| {
            let mut next = world.clone();
            change(&mut next).map_err(|invariant| ((name, actor), invariant))?;
            self.forget(&mut next);
            out.push(((name, actor), next));
            Ok(())
        };
        let mut later = world.clone();
        if Self::tick(&mut later) {
            go("tick", 9, &|world| {
                *world = later.clone();
                Ok(())
            })?;
        }
        let droppable = world.store.is_some_and(|rec| rec.expired() || rec.claim_expiry == Some(0));
        if droppable && world.sweep.is_none() {
            go("find expired", 9, &|world| {
                world.sweep = Some(Expected::Current);
                Ok(())
            })?;
        }
        if let Some(expected) = world.sweep {
            go("sweep", 9, &|world| {
                world.sweep = None;
                let pending = Pending { expected, new: None, by: By::Sweep, then: Then::Refuse };
                self.land(world, 9, pending).map(drop)
            })?;
        }
        if self.shared() && world.store.is_some_and(|rec| rec.claimed()) {
            go("a gateway looks for lapsed claims", 9, &|world| self.let_lapse(world))?;
        }
        self.operates(world, &mut go)?;
        if world.down {
            go("recover", 9, &|world| self.recover(world))?;
        } else if !self.shared() && world.faults > 0 && world.actors.iter().any(|actor| alive(actor.phase)) {
            go("crash", 9, &|world| {
                world.faults -= 1;
                world.down = true;
                world.actors.iter_mut().filter(|actor| alive(actor.phase)).for_each(|actor| actor.phase = Phase::Dead);
                Ok(())
            })?;
        }
        for actor in 0..world.actors.len() {
            if world.queued & 1 << actor != 0 {
                go("what was queued is executed", actor, &|world| self.come_to(world, actor, true))?;
                go("what was queued is dropped", actor, &|world| self.come_to(world, actor, false))?;
            }
            self.writes(world, actor, &mut go)?;
            if !world.down && world.actors[actor].write.is_none() {
                self.acts(world, actor, &mut go)?;
            }
        }
        Ok(())
    }

    fn recover(&self, world: &mut World) -> Checked {
        // The process is gone, and what it had not written is gone with it.
        for actor in &mut world.actors {
            (actor.write, actor.late) = (None, None);
        }
        world.operator = None;
        world.down = false;
        let Step { write, .. } = self.step(world.store, Event::Recover);
        match self.pending(world, &write, By::Recover, Then::Refuse) {
            Some(pending) => self.land(world, 9, pending).map(drop),
            None => Ok(()),
        }
    }

    /// In one go: a write on a version that is there no more changes nothing, and its answer is of no interest.
    fn let_lapse(&self, world: &mut World) -> Checked {
        let Step { write, .. } = self.step(world.store, Event::Lapse);
        match self.pending(world, &write, By::Lapse, Then::Refuse) {
            Some(pending) => self.land(world, 9, pending).map(drop),
            None => Ok(()),
        }
    }

    /// What an operator can do.
    fn operates(&self, world: &World, go: &mut Go<'_>) -> Result<(), (Action, Invariant)> {
        if let Some(write) = world.operator {
            go("operator's write is answered", 9, &|world| {
                world.operator = None;
                if let (By::Operate(hand), false, true) =
                    (write.by, self.land(world, 9, write)?, self.is(Mutant::OperatorTriesAgain))
                {
                    self.operate(world, hand)?;
                }
                Ok(())
            })?;
            return go("operator's write is lost", 9, &|world| {
                world.operator = None;
                Ok(())
            });
        }
        if world.acts == 0 || world.down {
            return Ok(());
        }
        // What he can find out: whether it was executed, and with which answer.
        let found_out = match world.executed {
            // He waits until the upstream can be at it no more.
            0 if world.queued != 0 => Hand::Forget,
            0 => Hand::NotExecuted,
            answer => Hand::Response(answer),
        };
        for hand in [found_out, Hand::Forget] {
            go("operator acts", 9, &|world| self.operate(world, hand))?;
        }
        Ok(())
    }

    /// Reads the store and decides on an operator's act.
    fn operate(&self, world: &mut World, hand: Hand) -> Checked {
        let Step { write, decision } = self.step(world.store, hand.event());
        let refused = match world.store.filter(|rec| !rec.expired()).map(|rec| rec.state) {
            None => Some(Decision::NotFound),
            Some(Is::Claimed { lease }) if lease != Some(0) => Some(Decision::InFlight),
            Some(Is::Claimed { .. }) => None,
            Some(Is::Completed { .. }) if hand != Hand::Forget => Some(Decision::NotUnknown),
            Some(Is::Completed { .. } | Is::Unknown { .. }) => None,
        };
        let told = refused.unwrap_or(Decision::Settled) == decision;
        world.operator = self.pending(world, &write, By::Operate(hand), Then::Conclude);
        // Whoever may act where he must not is seen by what he does.
        self.hold(OperatorsAreTold, told || world.operator.is_some())?;
        if world.operator.is_some() {
            world.acts = world.acts.saturating_sub(1);
        }
        Ok(())
    }

    /// What can become of an actor's writes.
    fn writes(&self, world: &World, actor: usize, go: &mut Go<'_>) -> Result<(), (Action, Invariant)> {
        let this = world.actors[actor];
        let dead = this.phase == Phase::Dead;
        if let Some(late) = this.late {
            go("late write lands", actor, &|world| {
                world.actors[actor].late = None;
                self.land(world, actor, late).map(drop)
            })?;
            go("late write is dropped", actor, &|world| {
                world.actors[actor].late = None;
                Ok(())
            })?;
            if late.then == Then::Renewed && !dead {
                go("renewal is answered", actor, &|world| {
                    world.actors[actor].late = None;
                    let landed = self.land(world, actor, late)?;
                    self.answered(world, actor, late, landed)
                })?;
            }
        }
        let Some(write) = this.write else { return Ok(()) };
        if dead {
            go("dead gateway's write lands", actor, &|world| {
                world.actors[actor].write = None;
                self.land(world, actor, write).map(drop)
            })?;
            return go("dead gateway's write is dropped", actor, &|world| {
                world.actors[actor].write = None;
                Ok(())
            });
        }
        go("write is answered", actor, &|world| {
            world.actors[actor].write = None;
            let landed = self.land(world, actor, write)?;
            self.answered(world, actor, write, landed)
        })?;
        if world.faults == 0 {
            return Ok(());
        }
        let lose = |world: &mut World| {
            world.faults -= 1;
            let this = &mut world.actors[actor];
            this.write = None;
            if write.then == Then::Forward && !self.is(Mutant::LostClaimIsForgotten) {
                this.issued = true;
            }
            if matches!(this.phase, Phase::Told { .. }) {
                this.phase = Phase::Arriving;
            }
            if write.then == Then::Forward && self.is(Mutant::LostClaimCountsAsLanded) {
                this.phase = Phase::Claimed;
            }
        };
        go("write lands, answer lost", actor, &|world| {
            lose(world);
            self.land(world, actor, write).map(drop)
        })?;
        go("write is lost", actor, &|world| {
            lose(world);
            Ok(())
        })?;
        if this.late.is_none() {
            go("write is late", actor, &|world| {
                lose(world);
                world.actors[actor].late = Some(write);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// What an actor can do that waits for no write.
    fn acts(&self, world: &World, actor: usize, go: &mut Go<'_>) -> Result<(), (Action, Invariant)> {
        let this = world.actors[actor];
        let become_ = |phase: Phase| {
            move |world: &mut World| {
                world.actors[actor].phase = phase;
                Ok(())
            }
        };
        match this.phase {
            Phase::Idle | Phase::Arriving => go("read and decide", actor, &|world| self.arrive(world, actor))?,
            Phase::Waiting => {
                go("wait is over", actor, &|world| {
                    self.finish(world, actor);
                    Ok(())
                })?;
                if world.store.is_none_or(|rec| !rec.claimed() || rec.lapsed()) {
                    go("wake, read and decide", actor, &|world| self.arrive(world, actor))?;
                }
            }
            Phase::Claimed => {
                if !self.shared() || this.lease > 0 || self.is(Mutant::SendsWithoutLookingAtTheLease) {
                    go("send, executed", actor, &|world| self.send(world, actor, true))?;
                    go("send, not executed", actor, &|world| self.send(world, actor, false))?;
                    if self.looks_up() {
                        go("send, queued", actor, &|world| {
                            self.send(world, actor, false)?;
                            world.queued |= 1 << actor;
                            world.actors[actor].phase = Phase::Queued;
                            Ok(())
                        })?;
                    }
                }
                let unsent = Phase::Settling { ended: Ended::NotThisSend, answer: None, silent: false };
                go("not sent", actor, &become_(unsent))?;
            }
            Phase::Sent { answer } => {
                let ended = |ended| become_(Phase::Settling { ended, answer: Some(answer), silent: false });
                go("no answer", actor, &ended(Ended::Unknown))?;
                if answer != 0 {
                    go("final answer", actor, &ended(Ended::Final(answer)))?;
                } else {
                    go("not executed", actor, &ended(Ended::NotThisSend))?;
                    if world.executions == 0 && world.queued == 0 {
                        go("key not executed", actor, &ended(Ended::NotThisKey))?;
                    }
                }
            }
            Phase::Settling { ended, answer, silent } => {
                go("read and settle", actor, &|world| self.settle(world, actor, ended))?;
                if world.faults > 0 && ended != Ended::Unknown && answer.is_some() {
                    go("task dropped", actor, &|world| {
                        world.faults -= 1;
                        world.actors[actor].phase = Phase::Settling { ended: Ended::Unknown, answer, silent: true };
                        Ok(())
                    })?;
                }
                if let (true, false, Ended::Final(answer), false) = (world.faults > 0, silent, ended, self.forward()) {
                    go("store fails, answer goes out", actor, &|world| {
                        world.faults -= 1;
                        world.claim_given_up = true;
                        if !world.actors[actor].outdated {
                            self.see(world, answer)?;
                        }
                        world.actors[actor].phase = Phase::Done;
                        Ok(())
                    })?;
                }
            }
            Phase::Listening { answer } => {
                let ended = if answer == 0 { Ended::NotThisSend } else { Ended::Final(answer) };
                go("late answer", actor, &become_(Phase::Settling { ended, answer: Some(answer), silent: true }))?;
                go("no late answer", actor, &|world| {
                    self.finish(world, actor);
                    Ok(())
                })?;
            }
            Phase::Queued => {
                go(
                    "no answer",
                    actor,
                    &become_(Phase::Settling { ended: Ended::Unknown, answer: None, silent: false }),
                )?;
            }
            Phase::Asking { of } => {
                go("the upstream is asked", actor, &|world| {
                    let told = match world.executed {
                        0 => Told::NotExecuted,
                        answer => Told::Executed(answer),
                    };
                    let claimed = world.store.is_some_and(|rec| rec.claimed() && rec.holder == of);
                    let early = world.queued != 0 || claimed;
                    world.actors[actor].phase = Phase::Told { of, told, early };
                    Ok(())
                })?;
                go(
                    "the upstream says nothing",
                    actor,
                    &become_(Phase::Told { of, told: Told::Nothing, early: false }),
                )?;
            }
            Phase::Told { .. } => go("read and tell", actor, &|world| self.tell(world, actor))?,
            Phase::GaveUp => {
                if this.late.is_none() {
                    let own = world.store.is_some_and(|rec| usize::from(rec.holder) == actor && rec.claimed());
                    let settle = Phase::Settling { ended: Ended::NotThisSend, answer: None, silent: true };
                    go("look after the late claim", actor, &become_(if own { settle } else { Phase::Done }))?;
                }
            }
            Phase::Done | Phase::Dead => return Ok(()),
        }
        let owner = matches!(this.phase, Phase::Claimed | Phase::Sent { .. } | Phase::Queued | Phase::Settling { .. });
        if self.shared() && owner && world.renewals > 0 && this.late.is_none() {
            go("renew", actor, &|world| self.renew(world, actor))?;
        }
        if self.shared() && alive(this.phase) && world.faults > 0 {
            go("die", actor, &|world| {
                world.faults -= 1;
                world.actors[actor].phase = Phase::Dead;
                Ok(())
            })?;
        }
        Ok(())
    }

    fn renew(&self, world: &mut World, actor: usize) -> Checked {
        world.renewals -= 1;
        let Step { write, decision } =
            self.step(world.store, Event::Renew { token: token(u8::try_from(actor).unwrap()) });
        let lapsed = world.store.is_some_and(|rec| rec.lapsed());
        self.hold(LapsedStaysLapsed, !(lapsed && decision == Decision::Renewed))?;
        world.actors[actor].late = self.pending(world, &write, By::Renew, Then::Renewed);
        Ok(())
    }

    fn check(&self, world: &World) -> Checked {
        let ended = world.actors.iter().all(|actor| actor.phase == Phase::Done && actor.late.is_none());
        let claimed = world.store.is_some_and(|rec| rec.claimed());
        self.hold(NoClaimLeft, !(ended && claimed) || world.down || world.claim_given_up)
    }

    /// Visits every state; the number of them, or the shortest way to a broken invariant.
    fn search(&self) -> Result<usize, (Invariant, Vec<Action>)> {
        let mut seen: HashSet<World, BuildHasherDefault<WordHasher>> = HashSet::default();
        let mut ways: Vec<(usize, Action)> = vec![(0, ("start", 9))];
        let mut queue = VecDeque::from([self.initial()]);
        seen.insert(self.initial());
        let trace = |ways: &[(usize, Action)], mut at: usize, last: Option<Action>| {
            let mut actions: Vec<Action> = last.into_iter().collect();
            while at > 0 {
                let (before, action) = ways[at];
                actions.push(action);
                at = before;
            }
            actions.reverse();
            actions
        };
        let mut next = Vec::new();
        let mut at = 0;
        while let Some(world) = queue.pop_front() {
            self.check(&world).map_err(|invariant| (invariant, trace(&ways, at, None)))?;
            self.successors(&world, &mut next)
                .map_err(|(action, invariant)| (invariant, trace(&ways, at, Some(action))))?;
            for (action, world) in next.drain(..) {
                if !seen.contains(&world) {
                    seen.insert(world.clone());
                    queue.push_back(world);
                    ways.push((at, action));
                }
            }
            at += 1;
        }
        Ok(seen.len())
    }
}

type Go<'a> = dyn FnMut(&'static str, usize, &dyn Fn(&mut World) -> Checked) -> Result<(), (Action, Invariant)> + 'a;

fn alive(phase: Phase) -> bool {
    !matches!(phase, Phase::Idle | Phase::Done | Phase::Dead)
}

/// A quick hash for small keys (Fowler–Noll–Vo over words, with the high bits folded back).
#[derive(Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((*byte).into()));
    }
    fn write_u8(&mut self, byte: u8) {
        self.write_u64(byte.into());
    }
    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
    fn write_isize(&mut self, word: isize) {
        self.write_u64(word as u64);
    }
}

fn policies() -> Vec<Policy> {
    let mut policies = Vec::new();
    for unknown_outcome in [UnknownOutcome::Hold, UnknownOutcome::Forward] {
        for concurrent in [Concurrent::Wait, Concurrent::Conflict] {
            for lease_ms in [None, Some(LEASE.into())] {
                policies.push(Policy {
                    retention_ms: RETENTION.into(),
                    unknown_retention_ms: UNKNOWN_RETENTION.into(),
                    concurrent,
                    unknown_outcome,
                    lease_ms,
                });
            }
        }
    }
    policies
}

/// `lookup`, in an embedded and in a shared store.
fn lookups() -> Vec<Policy> {
    let unknown_outcome = UnknownOutcome::Lookup { min_age_ms: MIN_AGE };
    let hold = policies().into_iter().filter(|policy| waits(policy) && policy.unknown_outcome == UnknownOutcome::Hold);
    hold.map(|policy| Policy { unknown_outcome, ..policy }).collect()
}

/// Searches the chosen policies at one size.
fn search_all(size: Size, chosen: impl Fn(&Policy) -> bool) {
    search(size, policies().into_iter().filter(chosen).collect());
}

fn search(size: Size, policies: Vec<Policy>) {
    let mut visited = 0;
    for policy in policies {
        match (Model { policy, size, mutant: None, watched: &[] }).search() {
            Ok(states) => {
                println!("{states} states with {size:?} under {policy:?}");
                visited += states;
            }
            Err((invariant, trace)) => panic!("{invariant:?} is broken with {size:?} under {policy:?}: {trace:?}"),
        }
    }
    println!("states visited: {visited}");
    assert!(visited > 500_000, "the search has become too small to mean anything: {visited}");
}

fn waits(policy: &Policy) -> bool {
    policy.concurrent == Concurrent::Wait
}

#[test]
fn every_invariant_holds_for_three_requests() {
    search_all(Size { payloads: &[0, 0, 1], faults: 0, renewals: 1, acts: 0 }, |_| true);
}

#[test]
fn every_invariant_holds_for_three_requests_and_a_fault() {
    let hold = |policy: &Policy| policy.unknown_outcome == UnknownOutcome::Hold;
    search_all(Size { payloads: &[0, 0, 1], faults: 1, renewals: 0, acts: 0 }, |policy| waits(policy) && hold(policy));
}

#[test]
fn every_invariant_holds_for_two_requests_and_many_faults() {
    search_all(Size { payloads: &[0, 0], faults: 2, renewals: 1, acts: 0 }, waits);
}

#[test]
fn every_invariant_holds_with_an_operator() {
    search_all(Size { payloads: &[0, 0], faults: 1, renewals: 1, acts: 1 }, waits);
    search_all(Size { payloads: &[0, 0, 0], faults: 0, renewals: 0, acts: 2 }, waits);
}

#[test]
fn every_invariant_holds_where_the_upstream_is_asked() {
    search(Size { payloads: &[0, 0], faults: 1, renewals: 1, acts: 1 }, lookups());
    search(Size { payloads: &[0, 0, 0], faults: 0, renewals: 0, acts: 0 }, lookups());
}

#[test]
#[ignore = "15 million states, minutes and gigabytes: after changes to the core or to this model"]
fn every_invariant_holds_in_a_large_world() {
    search_all(Size { payloads: &[0, 0, 1], faults: 1, renewals: 1, acts: 0 }, |_| true);
    search_all(Size { payloads: &[0, 0], faults: 3, renewals: 2, acts: 0 }, |_| true);
    search_all(Size { payloads: &[0, 0], faults: 2, renewals: 1, acts: 2 }, |_| true);
    search(Size { payloads: &[0, 0, 1], faults: 1, renewals: 0, acts: 1 }, lookups());
    search(Size { payloads: &[0, 0], faults: 2, renewals: 1, acts: 2 }, lookups());
}

/// The first invariant among `watched` that a mutant is found to break, and how.
fn catch(mutant: Mutant, watched: &'static [Invariant]) -> Option<(Invariant, Vec<Action>)> {
    let sizes = [
        Size { payloads: &[0, 0], faults: 0, renewals: 0, acts: 0 },
        Size { payloads: &[0, 1], faults: 0, renewals: 0, acts: 0 },
        Size { payloads: &[0, 0], faults: 1, renewals: 1, acts: 0 },
        Size { payloads: &[0, 0, 0], faults: 0, renewals: 0, acts: 0 },
        Size { payloads: &[0, 0], faults: 0, renewals: 0, acts: 1 },
        Size { payloads: &[0, 0], faults: 2, renewals: 1, acts: 0 },
        Size { payloads: &[0, 0, 0], faults: 0, renewals: 0, acts: 1 },
    ];
    let policies = if OF_LOOKUPS.contains(&mutant) { lookups() } else { policies() };
    sizes
        .into_iter()
        .flat_map(|size| {
            policies.clone().into_iter().map(move |policy| Model { policy, size, mutant: Some(mutant), watched })
        })
        .find_map(|model| model.search().err())
}

#[test]
fn every_mutant_is_caught() {
    let mutants: &[(Mutant, &[Invariant])] = &[
        (Mutant::NoSwapCheck, &[ClaimsStay, OnlyTheHolderSettles]),
        (Mutant::SweepUnconditionally, &[ClaimsStay]),
        (Mutant::UnknownIsNotExecuted, &[FreedOnlyUnexecuted]),
        (Mutant::NoFingerprintCheck, &[PayloadsApart]),
        (Mutant::StaleTokenSettles, &[OnlyTheHolderSettles]),
        (Mutant::StaleTokenRenews, &[OnlyTheHolderSettles]),
        (Mutant::LapsedIsFree, &[ClaimsStay]),
        (Mutant::LiveClaimIsUnknown, &[ClaimsStay]),
        (Mutant::LiveClaimLapses, &[ClaimsStay]),
        (Mutant::RecoverFrees, &[ClaimsStay]),
        (Mutant::ClaimsExpire, &[ClaimsStay]),
        (Mutant::ExpiresEarly, &[CompletedStays, UnknownStays]),
        (Mutant::UnknownIsFree, &[UnknownStays]),
        (Mutant::ResendFrees, &[FreedOnlyUnexecuted]),
        (Mutant::LateUnknownOverwrites, &[CompletedStays]),
        (Mutant::RenewRevives, &[LapsedStaysLapsed]),
        (Mutant::ClaimCountsBeforeItLands, &[SentUnderClaim]),
        (Mutant::AnswerSeenBeforeItIsDurable, &[DurableBeforeSeen]),
        (Mutant::LostClaimCountsAsLanded, &[SentUnderClaim]),
        (Mutant::LostClaimIsForgotten, &[NoClaimLeft]),
        (Mutant::SendsWithoutLookingAtTheLease, &[SentUnderClaim]),
        (Mutant::LeaseCountsFromTheAnswer, &[SentUnderClaim]),
        (Mutant::RetryProlongsTheLease, &[SentUnderClaim]),
        (Mutant::OperatorTakesClaims, &[ClaimsStay]),
        (Mutant::ResolveOverwritesCompleted, &[CompletedStays]),
        (Mutant::ResolveSettlesForAnother, &[UnknownStays]),
        (Mutant::OperatorIsNotToldOfClaims, &[OperatorsAreTold]),
        (Mutant::OperatorActsUnconditionally, &[ClaimsStay, CompletedStays, OnlyTheHolderSettles]),
        (Mutant::OperatorTriesAgain, &[FreedOnlyUnexecuted]),
        (Mutant::VerdictForAnyClaim, &[FreedOnlyUnexecuted]),
        (Mutant::NoMinAge, &[FreedOnlyUnexecuted]),
        (Mutant::MinAgeCountsToTheAnswer, &[FreedOnlyUnexecuted]),
        (Mutant::LookupOfALiveClaim, &[ClaimsStay]),
        (Mutant::UndecidedIsNotExecuted, &[FreedOnlyUnexecuted, UnknownStays]),
    ];
    for (mutant, expected) in mutants {
        let caught = catch(*mutant, &[]);
        let Some((invariant, trace)) = caught else { panic!("{mutant:?} slips through") };
        println!("{mutant:?}: {invariant:?} after {} steps", trace.len());
        assert!(expected.contains(&invariant), "{mutant:?} is caught by {invariant:?}, not by {expected:?}: {trace:?}");
    }
}

/// Most invariants are about the way. These two are the promise itself: they notice, too, when the way is left.
#[test]
fn the_promise_itself_catches_mutants() {
    let executed_twice = [
        Mutant::NoSwapCheck,
        Mutant::SweepUnconditionally,
        Mutant::UnknownIsNotExecuted,
        Mutant::StaleTokenSettles,
        Mutant::LapsedIsFree,
        Mutant::RecoverFrees,
        Mutant::ClaimsExpire,
        Mutant::ExpiresEarly,
        Mutant::UnknownIsFree,
        Mutant::ClaimCountsBeforeItLands,
        Mutant::LostClaimCountsAsLanded,
        Mutant::SendsWithoutLookingAtTheLease,
        Mutant::OperatorTakesClaims,
        Mutant::OperatorActsUnconditionally,
        Mutant::OperatorTriesAgain,
        Mutant::VerdictForAnyClaim,
        Mutant::NoMinAge,
        Mutant::MinAgeCountsToTheAnswer,
        Mutant::UndecidedIsNotExecuted,
    ];
    for mutant in executed_twice {
        assert!(catch(mutant, &[AtMostOnce]).is_some(), "{mutant:?} executes nothing twice");
    }
    let answered_differently =
        [Mutant::NoSwapCheck, Mutant::LapsedIsFree, Mutant::ClaimsExpire, Mutant::ExpiresEarly, Mutant::UnknownIsFree];
    for mutant in answered_differently {
        assert!(catch(mutant, &[AnswersAgree]).is_some(), "{mutant:?} gives the same answer always");
    }
}
