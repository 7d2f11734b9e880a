//! Questions about what is unknown, and what happens to the record until they are answered.

use super::operator::{act, not_executed, respond};
use super::*;
use crate::idempotency::Verdict;

type TestInquiry = Inquiry<Arc<Scripted>, &'static str>;
type Told = ClaimResult<Arc<Scripted>, &'static str>;

const MIN_AGE_MS: u64 = 1_000;

fn asking(payload: u8, credentials: u8) -> Arrival {
    let unknown_outcome = UnknownOutcome::Lookup { min_age_ms: MIN_AGE_MS };
    Arrival { policy: Policy { unknown_outcome, ..policy() }, ..arrival(payload, credentials) }
}

async fn inquire(ledger: &TestLedger) -> TestInquiry {
    match lead(ledger, &asking(1, 1)).claim().await.unwrap() {
        ClaimResult::LookUp(inquiry) => inquiry,
        ClaimResult::Claimed(_) => panic!("claimed"),
        ClaimResult::Answer(answer) => panic!("answered: {answer:?}"),
        ClaimResult::Wait(_) => panic!("waits"),
    }
}

/// A record that became unknown, and has been so for long.
async fn unknown(bench: &Bench) {
    claim(&bench.ledger).await.settle(Outcome::Unknown(Why::Reset), None).await.unwrap();
    bench.clock.advance(MIN_AGE_MS);
}

fn found() -> Verdict {
    let body = Bytes::from_static(b"found");
    Verdict::Executed(Recorded::Full(Response { status: 200, headers: Vec::new(), body }))
}

fn answer_of(told: Told) -> Answer {
    match told {
        ClaimResult::Answer(answer) => answer,
        ClaimResult::Claimed(_) => panic!("claimed"),
        ClaimResult::LookUp(_) => panic!("asks again"),
        ClaimResult::Wait(_) => panic!("waits"),
    }
}

fn stored(bench: &Bench) -> Option<Record> {
    let entry = bench.store.state.lock().unwrap().entries.get(&ID).cloned()?;
    Some(decode(ID, entry).unwrap().1)
}

#[tokio::test]
async fn what_was_found_is_recorded_and_shared_with_all_who_waited() {
    let bench = bench();
    unknown(&bench).await;
    let inquiry = inquire(&bench.ledger).await;
    assert_eq!((inquiry.id(), inquiry.key().as_ref()), (ID, b"key".as_slice()));
    let waiters = [waiting(&bench.ledger, &asking(1, 1)), waiting(&bench.ledger, &asking(1, 2))];
    assert!(matches!(answered(&bench.ledger, &asking(2, 1)), Answer::KeyReused), "422 beats the question");
    assert_eq!(replayed_body(&answer_of(inquiry.tell(found()).await.unwrap())), "found");
    for waiter in waiters {
        let Ok(Settlement::Recorded(record)) = waiter.settled(soon()).await else { panic!() };
        assert_eq!(replayed_body(&bench.ledger.answer_from(&asking(1, 2), &record).unwrap()), "found");
    }
    assert_eq!(replayed_body(&answered(&bench.ledger, &asking(1, 3))), "found", "from the hot cache");
    let restarted = restart(&bench.store, &bench.clock);
    assert_eq!(replayed_body(&claim_answer(&restarted, &asking(1, 1)).await), "found");
}

#[tokio::test]
async fn a_verdict_in_vain_is_told_to_waiters_with_its_credentials() {
    for (verdict, wait_ms) in [(Verdict::Undecided, MIN_AGE_MS), (Verdict::NotExecuted, 0)] {
        let bench = bench();
        claim(&bench.ledger).await.settle(Outcome::Unknown(Why::Reset), None).await.unwrap();
        bench.clock.advance(wait_ms);
        let before = stored(&bench);
        let inquiry = inquire(&bench.ledger).await;
        let waiter = waiting(&bench.ledger, &asking(1, 1));
        let told = answer_of(inquiry.tell(verdict.clone()).await.unwrap());
        let Ok(Settlement::Undecided { answer, credentials }) = waiter.settled(soon()).await else { panic!() };
        assert_eq!(credentials, Credentials([1; 32]));
        for answer in [told, answer] {
            match verdict {
                Verdict::Undecided => assert!(matches!(answer, Answer::OutcomeUnknown)),
                _ => assert!(matches!(answer, Answer::InProgress { .. })),
            }
        }
        assert_eq!(stored(&bench), before);
        drop(inquire(&bench.ledger).await);
    }
}

#[tokio::test]
async fn min_age_is_counted_to_the_moment_the_question_is_sent() {
    let bench = bench();
    claim(&bench.ledger).await.settle(Outcome::Unknown(Why::Reset), None).await.unwrap();
    bench.clock.advance(MIN_AGE_MS - 1);
    let inquiry = inquire(&bench.ledger).await;
    bench.clock.advance(MIN_AGE_MS);
    let told = inquiry.tell(Verdict::NotExecuted).await.unwrap();
    assert!(matches!(answer_of(told), Answer::InProgress { .. }), "it was asked too early");
    let ClaimResult::Claimed(claim) = inquire(&bench.ledger).await.tell(Verdict::NotExecuted).await.unwrap() else {
        panic!("not claimed")
    };
    assert!(!claim.resend, "nothing was executed: it is a first send");
    let waiter = waiting(&bench.ledger, &asking(1, 1));
    claim.settle(response("anew"), None).await.unwrap();
    assert!(matches!(waiter.settled(soon()).await, Ok(Settlement::Recorded(_))));
    assert_eq!(replayed_body(&answered(&bench.ledger, &asking(1, 1))), "anew");
}

#[tokio::test]
async fn whoever_waits_looks_again_when_a_question_is_dropped_or_its_verdict_cannot_be_written() {
    let bench = bench();
    unknown(&bench).await;
    let before = stored(&bench);
    let dropped = inquire(&bench.ledger).await;
    let waiter = waiting(&bench.ledger, &asking(1, 1));
    drop(dropped);
    assert!(matches!(waiter.settled(soon()).await, Ok(Settlement::Again)));
    for verdict in [found(), Verdict::NotExecuted] {
        let inquiry = inquire(&bench.ledger).await;
        let waiter = waiting(&bench.ledger, &asking(1, 1));
        bench.store.state.lock().unwrap().faults.push_back(Some(Fault::Refuse));
        assert!(inquiry.tell(verdict).await.is_err());
        assert!(matches!(waiter.settled(soon()).await, Ok(Settlement::Again)));
        assert_eq!(stored(&bench), before);
    }
}

#[tokio::test]
async fn this_gateways_operator_does_not_act_while_the_upstream_is_asked() {
    let bench = bench();
    unknown(&bench).await;
    let inquiry = inquire(&bench.ledger).await;
    assert!(matches!(act(&bench.ledger, not_executed).await, Err(Refusal::InFlight)));
    drop(inquiry);
    assert!(act(&bench.ledger, not_executed).await.is_ok());
}

/// The record moves on between the question and its answer: at another gateway, or because its sender learned the end.
#[tokio::test]
async fn a_verdict_on_a_record_that_has_moved_on_does_not_count() {
    for verdict in [found(), Verdict::NotExecuted] {
        // It was settled, with another answer.
        let bench = bench();
        unknown(&bench).await;
        let inquiry = inquire(&bench.ledger).await;
        let other = restart(&bench.store, &bench.clock);
        act(&other, respond).await.unwrap();
        let by_hand = stored(&bench);
        assert_eq!(replayed_body(&answer_of(inquiry.tell(verdict.clone()).await.unwrap())), "by hand");
        assert_eq!(stored(&bench), by_hand, "{verdict:?}");

        // Its key was freed, and is in flight again.
        let bench = self::bench();
        unknown(&bench).await;
        let inquiry = inquire(&bench.ledger).await;
        let other = restart(&bench.store, &bench.clock);
        act(&other, not_executed).await.unwrap();
        let in_flight = claim(&other).await;
        let claimed = stored(&bench);
        assert!(matches!(answer_of(inquiry.tell(verdict.clone()).await.unwrap()), Answer::InProgress { .. }));
        assert_eq!(stored(&bench), claimed, "{verdict:?}");

        // That one is unknown, too: the answer was not about it.
        let inquiry = {
            in_flight.settle(Outcome::Unknown(Why::Reset), None).await.unwrap();
            let first = stored(&bench).unwrap();
            let inquiry = inquire(&bench.ledger).await;
            act(&other, not_executed).await.unwrap();
            claim(&other).await.settle(Outcome::Unknown(Why::Reset), None).await.unwrap();
            assert_ne!(stored(&bench).unwrap().token, first.token);
            inquiry
        };
        bench.clock.advance(MIN_AGE_MS);
        let anew = stored(&bench);
        assert!(matches!(answer_of(inquiry.tell(verdict.clone()).await.unwrap()), Answer::InProgress { .. }));
        assert_eq!(stored(&bench).unwrap(), anew.unwrap(), "{verdict:?}");
    }
}

#[tokio::test]
async fn after_the_record_is_gone_a_verdict_counts_for_nothing_and_the_request_is_a_first_one() {
    for verdict in [found(), Verdict::NotExecuted] {
        let bench = bench();
        unknown(&bench).await;
        let inquiry = inquire(&bench.ledger).await;
        act(&restart(&bench.store, &bench.clock), not_executed).await.unwrap();
        let ClaimResult::Claimed(claim) = inquiry.tell(verdict).await.unwrap() else { panic!("not claimed") };
        claim.settle(response("anew"), None).await.unwrap();
        assert_eq!(replayed_body(&answered(&bench.ledger, &asking(1, 1))), "anew");
    }
}
