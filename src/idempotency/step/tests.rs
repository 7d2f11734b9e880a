//! Every cell of the decision, with exact times. That the cells add up to "at most once" is the model's to show.

mod lapsed;

use super::*;
use crate::idempotency::record::Response;
use bytes::Bytes;

const NOW: Millis = Millis(10_000);
const MINE: ClaimToken = ClaimToken([1; 16]);
const OTHER: ClaimToken = ClaimToken([2; 16]);
const HOLD: Policy = Policy {
    retention_ms: 1_000,
    unknown_retention_ms: 7_000,
    concurrent: Concurrent::Wait,
    unknown_outcome: UnknownOutcome::Hold,
    lease_ms: None,
};
const FORWARD: Policy = Policy { unknown_outcome: UnknownOutcome::Forward, ..HOLD };
const LEASED: Policy = Policy { lease_ms: Some(30), ..HOLD };

fn origin(name: &'static str) -> Origin {
    let name = Bytes::from_static(name.as_bytes());
    Origin {
        key: name.clone(),
        key_header: name.clone(),
        path: name.clone(),
        route: name,
        claimed_at: Millis(5),
        attempts: 1,
    }
}

fn fingerprint(payload: u8) -> Fingerprint {
    Fingerprint { settings: 7, digest: [payload; 32] }
}

/// A record of payload 1, claimed by [`MINE`].
fn record(state: State) -> Record {
    Record { origin: origin("stored"), fingerprint: fingerprint(1), token: MINE, state }
}

fn resent(state: State) -> Record {
    let record = record(state);
    Record { origin: Origin { attempts: 2, ..record.origin.clone() }, ..record }
}

fn claimed(lease_until: Option<u64>) -> State {
    State::Claimed { lease_until: lease_until.map(Millis) }
}

fn full() -> Recorded {
    Recorded::Full(Response { status: 201, headers: Vec::new(), body: Bytes::from_static(b"{}") })
}

fn completed(expires_at: u64) -> State {
    State::Completed { response: full(), completed_at: Millis(9_000), expires_at: Millis(expires_at) }
}

fn unknown_since(since: u64, why: Why, expires_at: u64) -> State {
    State::Unknown { why, since: Millis(since), expires_at: Millis(expires_at) }
}

fn arrive(policy: &Policy, stored: Option<&Record>, payload: u8) -> Step {
    let origin = Origin { attempts: 9, ..origin("new") };
    let event = Event::Arrive { origin, fingerprint: fingerprint(payload), token: OTHER };
    step(policy, NOW, stored, &event)
}

fn settle_with(policy: &Policy, stored: Option<&Record>, token: ClaimToken, outcome: Outcome) -> Step {
    step(policy, NOW, stored, &Event::Settle { token, outcome })
}

fn put(record: Record, decision: Decision) -> Step {
    Step { write: Write::Put(record), decision }
}

/// The claim that a newcomer makes of a free key.
fn fresh(lease_until: Option<u64>) -> Step {
    let origin = Origin { attempts: 1, claimed_at: NOW, ..origin("new") };
    let record = Record { origin, fingerprint: fingerprint(2), token: OTHER, state: claimed(lease_until) };
    put(record, Decision::Forward { resend: false })
}

#[test]
fn a_new_key_is_claimed() {
    assert_eq!(arrive(&HOLD, None, 2), fresh(None));
    assert_eq!(arrive(&LEASED, None, 2), fresh(Some(10_030)));
}

#[test]
fn a_record_whose_time_is_over_counts_as_absent() {
    for state in [completed(10_000), unknown_since(9_000, Why::Reset, 10_000), completed(1)] {
        assert_eq!(arrive(&HOLD, Some(&record(state.clone())), 2), fresh(None));
        assert_eq!(arrive(&FORWARD, Some(&resent(state)), 2), fresh(None));
    }
}

#[test]
fn one_millisecond_before_its_end_a_record_still_counts() {
    assert_eq!(arrive(&HOLD, Some(&record(completed(10_001))), 1), Step::keep(Decision::Replay));
    let unknown = record(unknown_since(9_000, Why::Reset, 10_001));
    assert_eq!(arrive(&HOLD, Some(&unknown), 1), Step::keep(Decision::Reject(RejectReason::OutcomeUnknown)));
}

#[test]
fn another_payload_is_refused_before_anything_else() {
    let omitted = Recorded::Omitted { status: 200, location: None };
    let omitted = State::Completed { response: omitted, completed_at: NOW, expires_at: Millis(99_999) };
    for state in [claimed(None), claimed(Some(9_999)), completed(20_000), unknown_since(1, Why::Crash, 20_000), omitted]
    {
        for policy in [HOLD, FORWARD, LEASED, Policy { concurrent: Concurrent::Conflict, ..HOLD }] {
            let step = arrive(&policy, Some(&record(state.clone())), 2);
            assert_eq!(step, Step::keep(Decision::Reject(RejectReason::KeyReused)));
        }
    }
}

#[test]
fn payloads_condensed_otherwise_are_not_compared() {
    let mut stored = record(completed(20_000));
    stored.fingerprint.settings = 8;
    assert_eq!(arrive(&HOLD, Some(&stored), 2), Step::keep(Decision::Replay));
}

#[test]
fn a_duplicate_waits_or_is_refused_as_configured() {
    let conflict = Policy { concurrent: Concurrent::Conflict, ..HOLD };
    for (state, until) in [(claimed(None), None), (claimed(Some(10_001)), Some(Millis(10_001)))] {
        let stored = record(state);
        assert_eq!(arrive(&HOLD, Some(&stored), 1), Step::keep(Decision::Wait { until }));
        assert_eq!(arrive(&FORWARD, Some(&stored), 1), Step::keep(Decision::Wait { until }));
        assert_eq!(arrive(&conflict, Some(&stored), 1), Step::keep(Decision::Reject(RejectReason::InProgress)));
    }
}

#[test]
fn under_forward_an_unknown_or_lapsed_record_is_sent_again() {
    let leased = Policy { lease_ms: Some(30), ..FORWARD };
    for (policy, stored, lease_until) in [
        (FORWARD, unknown_since(9_000, Why::Reset, 20_000), None),
        (leased, unknown_since(9_000, Why::Reset, 20_000), Some(10_030)),
        (leased, claimed(Some(10_000)), Some(10_030)),
    ] {
        let stored = record(stored);
        let resend = Record { token: OTHER, ..resent(claimed(lease_until)) };
        assert_eq!(arrive(&policy, Some(&stored), 1), put(resend, Decision::Forward { resend: true }));
    }
    let mut often = record(unknown_since(9_000, Why::Reset, 20_000));
    often.origin.attempts = u32::MAX;
    let Write::Put(again) = arrive(&FORWARD, Some(&often), 1).write else { panic!("not claimed") };
    assert_eq!(again.origin, often.origin, "the first send's origin, and no overflow");
}

#[test]
fn a_body_that_was_not_recorded_is_said_to_be() {
    let location = Some(Bytes::from_static(b"/posts/1"));
    let response = Recorded::Omitted { status: 201, location: location.clone() };
    let stored = record(State::Completed { response, completed_at: NOW, expires_at: Millis(20_000) });
    let refused = Decision::Reject(RejectReason::BodyNotRecorded { status: 201, location });
    assert_eq!(arrive(&HOLD, Some(&stored), 1), Step::keep(refused));
}

#[test]
fn the_holder_renews_a_live_claim_and_nothing_else() {
    let renew = |stored: Option<&Record>, token| step(&LEASED, NOW, stored, &Event::Renew { token });
    for until in [None, Some(10_001)] {
        let renewed = put(record(claimed(Some(10_030))), Decision::Renewed);
        assert_eq!(renew(Some(&record(claimed(until))), MINE), renewed);
        assert_eq!(renew(Some(&record(claimed(until))), OTHER), Step::keep(Decision::Superseded));
    }
    for state in
        [claimed(Some(10_000)), claimed(Some(9_000)), completed(20_000), unknown_since(9_000, Why::Lease, 20_000)]
    {
        assert_eq!(renew(Some(&record(state)), MINE), Step::keep(Decision::Superseded));
    }
    assert_eq!(renew(None, MINE), Step::keep(Decision::Superseded));
}

#[test]
fn the_holder_settles_its_claim_and_the_unknown_that_became_of_it() {
    let done = State::Completed { response: full(), completed_at: NOW, expires_at: Millis(11_000) };
    for state in [claimed(None), claimed(Some(9_000)), unknown_since(9_000, Why::Lease, 20_000)] {
        let stored = record(state);
        let settle = |outcome| settle_with(&HOLD, Some(&stored), MINE, outcome);
        assert_eq!(settle(Outcome::Final(full())), put(record(done.clone()), Decision::Settled));
        for evidence in [Evidence::ThisSend, Evidence::ThisKey] {
            let freed = Step { write: Write::Remove, decision: Decision::Settled };
            assert_eq!(settle(Outcome::NotExecuted(evidence)), freed);
        }
    }
    let stored = record(claimed(Some(9_000)));
    let unknown = record(unknown_since(10_000, Why::Status(504), 17_000));
    let step = settle_with(&HOLD, Some(&stored), MINE, Outcome::Unknown(Why::Status(504)));
    assert_eq!(step, put(unknown, Decision::Settled));
}

#[test]
fn an_unknown_record_keeps_its_reason_and_its_end() {
    for stored in [record(unknown_since(9_000, Why::Lease, 20_000)), resent(unknown_since(9_000, Why::Lease, 20_000))] {
        let step = settle_with(&HOLD, Some(&stored), MINE, Outcome::Unknown(Why::Reset));
        assert_eq!(step, Step::keep(Decision::Settled));
    }
}

#[test]
fn a_resend_that_was_not_executed_frees_the_key_only_if_the_upstream_speaks_of_the_key() {
    for state in [claimed(None), unknown_since(9_000, Why::Lease, 20_000)] {
        let was_claimed = matches!(state, State::Claimed { .. });
        let stored = resent(state);
        let this_send = settle_with(&FORWARD, Some(&stored), MINE, Outcome::NotExecuted(Evidence::ThisSend));
        let unknown = resent(unknown_since(10_000, Why::EarlierSend, 17_000));
        let kept = if was_claimed { put(unknown, Decision::Settled) } else { Step::keep(Decision::Settled) };
        assert_eq!(this_send, kept);
        let this_key = settle_with(&FORWARD, Some(&stored), MINE, Outcome::NotExecuted(Evidence::ThisKey));
        assert_eq!(this_key, Step { write: Write::Remove, decision: Decision::Settled });
    }
}

fn outcomes() -> [Outcome; 4] {
    [
        Outcome::Final(Recorded::Omitted { status: 200, location: None }),
        Outcome::NotExecuted(Evidence::ThisSend),
        Outcome::NotExecuted(Evidence::ThisKey),
        Outcome::Unknown(Why::Abandoned),
    ]
}

#[test]
fn a_completed_record_never_changes() {
    for outcome in outcomes() {
        for stored in [record(completed(20_000)), resent(completed(20_000)), record(completed(10_000))] {
            assert_eq!(settle_with(&HOLD, Some(&stored), MINE, outcome.clone()), Step::keep(Decision::Settled));
        }
    }
}

#[test]
fn nobody_else_settles() {
    for outcome in outcomes() {
        for state in [claimed(None), claimed(Some(1)), completed(20_000), unknown_since(9_000, Why::Crash, 20_000)] {
            let step = settle_with(&FORWARD, Some(&record(state)), OTHER, outcome.clone());
            assert_eq!(step, Step::keep(Decision::Superseded));
        }
        assert_eq!(settle_with(&HOLD, None, MINE, outcome), Step::keep(Decision::Superseded));
    }
}

#[test]
fn recovery_turns_claims_into_unknowns_and_leaves_the_rest() {
    let recover = |stored: Option<&Record>| step(&HOLD, NOW, stored, &Event::Recover);
    for until in [None, Some(99_999)] {
        let unknown = record(unknown_since(10_000, Why::Crash, 17_000));
        assert_eq!(recover(Some(&record(claimed(until)))), put(unknown, Decision::Settled));
    }
    for state in [completed(20_000), unknown_since(9_000, Why::Reset, 20_000)] {
        assert_eq!(recover(Some(&record(state))), Step::keep(Decision::Superseded));
    }
    assert_eq!(recover(None), Step::keep(Decision::Superseded));
}

fn answer() -> Response {
    Response { status: 200, headers: Vec::new(), body: Bytes::from_static(b"by hand") }
}

fn acts() -> [Event; 3] {
    [Event::Resolve(Resolution::NotExecuted), Event::Resolve(Resolution::Response(answer())), Event::Forget]
}

#[test]
fn an_operator_resolves_what_is_unknown() {
    for policy in [HOLD, FORWARD, LEASED] {
        for stored in
            [record(unknown_since(9_000, Why::Status(502), 10_001)), resent(unknown_since(1, Why::Crash, 20_000))]
        {
            let freed = Step { write: Write::Remove, decision: Decision::Settled };
            assert_eq!(step(&policy, NOW, Some(&stored), &Event::Resolve(Resolution::NotExecuted)), freed);
            assert_eq!(step(&policy, NOW, Some(&stored), &Event::Forget), freed);
            let response = Recorded::Full(answer());
            let state = State::Completed { response, completed_at: NOW, expires_at: Millis(11_000) };
            let completed = put(Record { state, ..stored.clone() }, Decision::Settled);
            let resolution = Resolution::Response(answer());
            assert_eq!(step(&policy, NOW, Some(&stored), &Event::Resolve(resolution)), completed);
        }
    }
}

#[test]
fn an_operator_forgets_a_completed_record_but_never_resolves_it() {
    let omitted = Recorded::Omitted { status: 200, location: None };
    let omitted = State::Completed { response: omitted, completed_at: NOW, expires_at: Millis(20_000) };
    for stored in [record(completed(10_001)), resent(completed(20_000)), record(omitted)] {
        let [not_executed, response, forget] = acts().map(|event| step(&HOLD, NOW, Some(&stored), &event));
        assert_eq!([not_executed, response], [(); 2].map(|()| Step::keep(Decision::NotUnknown)));
        assert_eq!(forget, Step { write: Write::Remove, decision: Decision::Settled });
    }
}

#[test]
fn a_claim_refuses_every_operator() {
    for event in acts() {
        for (policy, until) in [(HOLD, None), (LEASED, Some(10_001))] {
            for stored in [record(claimed(until)), resent(claimed(until))] {
                assert_eq!(step(&policy, NOW, Some(&stored), &event), Step::keep(Decision::InFlight), "{event:?}");
            }
        }
    }
}

#[test]
fn what_is_absent_or_expired_is_not_found_by_an_operator() {
    for event in acts() {
        assert_eq!(step(&HOLD, NOW, None, &event), Step::keep(Decision::NotFound));
        for state in [completed(10_000), unknown_since(9_000, Why::Reset, 10_000), unknown_since(1, Why::Reset, 2)] {
            assert_eq!(step(&HOLD, NOW, Some(&record(state)), &event), Step::keep(Decision::NotFound), "{event:?}");
        }
    }
}

#[test]
fn after_an_operators_act_the_token_settles_nothing_more() {
    let unknown = record(unknown_since(9_000, Why::Timeout, 20_000));
    let Write::Put(resolved) = step(&HOLD, NOW, Some(&unknown), &Event::Resolve(Resolution::Response(answer()))).write
    else {
        panic!("not resolved")
    };
    for outcome in outcomes() {
        let late = settle_with(&HOLD, Some(&resolved), MINE, outcome.clone());
        assert_eq!(late, Step::keep(Decision::Settled), "the operator's answer stays");
        assert_eq!(settle_with(&HOLD, None, MINE, outcome), Step::keep(Decision::Superseded));
    }
}

#[test]
fn times_saturate() {
    let forever = Policy { retention_ms: u64::MAX, unknown_retention_ms: u64::MAX, lease_ms: Some(u64::MAX), ..HOLD };
    let Write::Put(claim) = arrive(&forever, None, 1).write else { panic!("not claimed") };
    assert_eq!(claim.state, claimed(Some(u64::MAX)));
    for outcome in [Outcome::Final(full()), Outcome::Unknown(Why::Reset)] {
        let Write::Put(settled) = settle_with(&forever, Some(&claim), OTHER, outcome).write else {
            panic!("not settled")
        };
        assert_eq!(settled.expires_at(), Some(Millis(u64::MAX)));
    }
    assert_eq!(Millis(5).since(Millis(7)), 0);
    assert_eq!(Millis(7).since(Millis(5)), 2);
}

const LOOKUP: Policy = Policy { unknown_outcome: UnknownOutcome::Lookup { min_age_ms: 100 }, ..HOLD };

fn looked_up(policy: &Policy, stored: Option<&Record>, asked_at: u64, verdict: Verdict, payload: u8) -> Step {
    let event = Event::LookedUp {
        of: MINE,
        asked_at: Millis(asked_at),
        verdict,
        origin: Origin { attempts: 9, ..origin("new") },
        fingerprint: fingerprint(payload),
        token: OTHER,
    };
    step(policy, NOW, stored, &event)
}

fn verdicts() -> [Verdict; 4] {
    let omitted = Recorded::Omitted { status: 200, location: Some(Bytes::from_static(b"/posts/1")) };
    [Verdict::Executed(full()), Verdict::Executed(omitted), Verdict::NotExecuted, Verdict::Undecided]
}

/// The record of a claim made at a time, which is unknown since another.
fn lost(claimed_at: u64, since: u64, attempts: u32) -> Record {
    let mut record = record(unknown_since(since, Why::Reset, 20_000));
    (record.origin.claimed_at, record.origin.attempts) = (Millis(claimed_at), attempts);
    record
}

#[test]
fn under_lookup_an_unknown_or_lapsed_record_is_asked_for() {
    let unknown = record(unknown_since(9_000, Why::Reset, 10_001));
    assert_eq!(arrive(&LOOKUP, Some(&unknown), 1), Step::keep(Decision::Lookup));
    let lapsed = record(claimed(Some(10_000)));
    let leased = Policy { lease_ms: Some(30), ..LOOKUP };
    let asked_for = put(record(unknown_since(10_000, Why::Lease, 17_000)), Decision::Lookup);
    assert_eq!(arrive(&leased, Some(&lapsed), 1), asked_for);
    let live = record(claimed(Some(10_001)));
    assert_eq!(arrive(&leased, Some(&live), 1), Step::keep(Decision::Wait { until: Some(Millis(10_001)) }));
    assert_eq!(arrive(&LOOKUP, Some(&record(completed(20_000))), 1), Step::keep(Decision::Replay));
}

#[test]
fn what_the_upstream_has_executed_is_recorded_whenever_it_was_asked() {
    for asked_at in [0, 10_000] {
        for (verdict, stored) in verdicts().into_iter().zip([lost(9_999, 10_000, 1), lost(1, 9_000, 3)]) {
            let Verdict::Executed(response) = verdict.clone() else { unreachable!() };
            let state = State::Completed { response: response.clone(), completed_at: NOW, expires_at: Millis(11_000) };
            let decision = match response {
                Recorded::Full(_) => Decision::Replay,
                Recorded::Omitted { status, location } => {
                    Decision::Reject(RejectReason::BodyNotRecorded { status, location })
                }
            };
            let recorded = put(Record { state, ..stored.clone() }, decision);
            assert_eq!(looked_up(&LOOKUP, Some(&stored), asked_at, verdict, 1), recorded);
        }
    }
}

#[test]
fn not_executed_counts_if_it_was_asked_min_age_after_the_claim() {
    let in_progress = Step::keep(Decision::Reject(RejectReason::InProgress));
    let not_executed = |stored: &Record, asked_at| looked_up(&LOOKUP, Some(stored), asked_at, Verdict::NotExecuted, 1);
    let again = {
        let origin = Origin { attempts: 1, claimed_at: NOW, ..origin("new") };
        let record = Record { origin, fingerprint: fingerprint(1), token: OTHER, state: claimed(None) };
        put(record, Decision::Forward { resend: false })
    };
    // Of one claim, its time counts; it became unknown later.
    let once = lost(9_000, 9_800, 1);
    assert_eq!(not_executed(&once, 9_099), in_progress);
    assert_eq!(not_executed(&once, 9_100), again);
    // Of several, the last was made before its outcome was unknown.
    let often = lost(1_000, 9_000, 2);
    assert_eq!(not_executed(&often, 9_099), in_progress, "the last claim is not as old as the first");
    assert_eq!(not_executed(&often, 9_100), again);
    let never = Policy { unknown_outcome: UnknownOutcome::Lookup { min_age_ms: u64::MAX }, ..HOLD };
    assert_eq!(looked_up(&never, Some(&once), 9_999, Verdict::NotExecuted, 1), in_progress);
    let at_once = Policy { unknown_outcome: UnknownOutcome::Lookup { min_age_ms: 0 }, ..HOLD };
    assert_eq!(looked_up(&at_once, Some(&once), 9_000, Verdict::NotExecuted, 1), again);
    for policy in [HOLD, FORWARD] {
        let step = looked_up(&policy, Some(&once), 9_999, Verdict::NotExecuted, 1);
        assert_eq!(step, Step::keep(Decision::Reject(RejectReason::OutcomeUnknown)), "it is asked for no more");
    }
}

#[test]
fn what_the_upstream_does_not_say_changes_nothing() {
    for stored in [lost(9_000, 9_800, 1), lost(1, 2, 2)] {
        let step = looked_up(&LOOKUP, Some(&stored), 10_000, Verdict::Undecided, 1);
        assert_eq!(step, Step::keep(Decision::Reject(RejectReason::OutcomeUnknown)));
    }
}

#[test]
fn a_verdict_counts_for_the_claim_it_was_asked_for_alone() {
    let others = Record { token: OTHER, ..lost(1, 2, 1) };
    for verdict in verdicts() {
        let told = |stored: Option<&Record>| looked_up(&LOOKUP, stored, 10_000, verdict.clone(), 1);
        // Whose outcome is unknown anew is not asked for twice by one arrival.
        assert_eq!(told(Some(&others)), Step::keep(Decision::Reject(RejectReason::InProgress)), "{verdict:?}");
        for token in [MINE, OTHER] {
            let in_flight = Record { token, ..record(claimed(None)) };
            assert_eq!(told(Some(&in_flight)), Step::keep(Decision::Wait { until: None }), "{verdict:?}");
            let done = Record { token, ..record(completed(10_001)) };
            assert_eq!(told(Some(&done)), Step::keep(Decision::Replay), "{verdict:?}");
            let over = Record { token, ..record(unknown_since(1, Why::Reset, 10_000)) };
            let new = looked_up(&LOOKUP, Some(&over), 10_000, verdict.clone(), 2);
            assert_eq!(new, fresh(None), "{verdict:?}: its time is over, as if nothing had been asked");
        }
        assert_eq!(looked_up(&LOOKUP, None, 10_000, verdict.clone(), 2), fresh(None), "{verdict:?}");
        let lapsed = Record { token: OTHER, ..record(claimed(Some(9_999))) };
        let unknown = Record { token: OTHER, ..record(unknown_since(9_999, Why::Lease, 16_999)) };
        let step = looked_up(&Policy { lease_ms: Some(30), ..LOOKUP }, Some(&lapsed), 10_000, verdict.clone(), 1);
        assert_eq!(step, put(unknown, Decision::Reject(RejectReason::InProgress)), "{verdict:?}");
    }
}

#[test]
fn another_payload_learns_nothing_from_a_verdict_and_changes_nothing_by_it() {
    for verdict in verdicts() {
        for state in [unknown_since(9_000, Why::Reset, 20_000), claimed(None), completed(20_000)] {
            let step = looked_up(&LOOKUP, Some(&record(state)), 10_000, verdict.clone(), 2);
            assert_eq!(step, Step::keep(Decision::Reject(RejectReason::KeyReused)), "{verdict:?}");
        }
    }
}
