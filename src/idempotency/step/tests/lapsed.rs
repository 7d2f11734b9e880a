//! Claims whose owner has not renewed them.

use super::*;
use crate::idempotency::step::{droppable_at, lapsed};

#[test]
fn a_lapsed_claim_is_unknown_since_its_lease_was_over() {
    for until in [10_000, 9_999, 3_001] {
        let stored = record(claimed(Some(until)));
        let unknown = record(unknown_since(until, Why::Lease, until + 7_000));
        assert_eq!(lapsed(&LEASED, NOW, &stored), Some(unknown.clone()));
        assert_eq!(arrive(&LEASED, Some(&stored), 1), put(unknown, Decision::Reject(RejectReason::OutcomeUnknown)));
        assert_eq!(droppable_at(&LEASED, &stored), Some(Millis(until + 7_000)));
    }
    // Nobody has come in all the time that it would have been unknown.
    let forgotten = record(claimed(Some(3_000)));
    assert_eq!(arrive(&LEASED, Some(&forgotten), 2), fresh(Some(10_030)));
    for living in [claimed(None), claimed(Some(10_001)), completed(10_001), unknown_since(1, Why::Reset, 10_001)] {
        assert_eq!(lapsed(&LEASED, NOW, &record(living)), None);
    }
    assert_eq!(droppable_at(&LEASED, &record(claimed(None))), None);
    assert_eq!(droppable_at(&LEASED, &record(completed(10_001))), Some(Millis(10_001)));
}

#[test]
fn an_operator_takes_a_lapsed_claim_for_what_it_counts_as() {
    let gone = record(claimed(Some(9_999)));
    let response = Recorded::Full(answer());
    let resolved = record(State::Completed { response, completed_at: NOW, expires_at: NOW.plus(LEASED.retention_ms) });
    for (event, write) in [
        (Event::Resolve(Resolution::NotExecuted), Write::Remove),
        (Event::Resolve(Resolution::Response(answer())), Write::Put(resolved)),
        (Event::Forget, Write::Remove),
    ] {
        assert_eq!(step(&LEASED, NOW, Some(&gone), &event), Step { write, decision: Decision::Settled });
        let forgotten = record(claimed(Some(3_000)));
        assert_eq!(step(&LEASED, NOW, Some(&forgotten), &event), Step::keep(Decision::NotFound));
    }
}

#[test]
fn whoever_finds_a_lapsed_claim_makes_it_unknown_and_leaves_all_else_alone() {
    for until in [10_000, 9_999, 3_001] {
        let found = step(&LEASED, NOW, Some(&record(claimed(Some(until)))), &Event::Lapse);
        assert_eq!(found, put(record(unknown_since(until, Why::Lease, until + 7_000)), Decision::Settled));
    }
    let others = [claimed(None), claimed(Some(10_001)), completed(10_001), unknown_since(1, Why::Reset, 10_001)];
    // The last would have been forgotten by now.
    for state in others.into_iter().chain([claimed(Some(3_000))]) {
        let left = step(&LEASED, NOW, Some(&record(state)), &Event::Lapse);
        assert_eq!(left, Step::keep(Decision::Superseded));
    }
    assert_eq!(step(&LEASED, NOW, None, &Event::Lapse), Step::keep(Decision::Superseded));
}
