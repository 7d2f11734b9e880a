//! Outcomes that the store does not take at once.

use super::*;
use tokio::time::Instant;

#[tokio::test]
async fn a_settle_that_finds_no_room_is_recorded_once_there_is() {
    let bench = bench();
    let claimed = claim(&bench.ledger).await;
    bench.store.state.lock().unwrap().faults.extend([Some(Fault::Full); 2]);
    let unsettled = claimed.settle(response("one"), None).await.unwrap_err();
    let waiter = waiting(&bench.ledger, &arrival(1, 1));
    unsettled.settle_later().await;
    assert!(matches!(waiter.settled(soon()).await, Ok(Settlement::Recorded(_))));
    assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 1))), "one");
}

#[tokio::test(start_paused = true)]
async fn of_an_outcome_that_the_store_refuses_less_is_recorded() {
    for (refused, executed) in [(1, true), (2, true), (3, true), (1, false), (2, false)] {
        let bench = bench();
        let claimed = claim(&bench.ledger).await;
        let waiter = waiting(&bench.ledger, &arrival(1, 1));
        bench.store.state.lock().unwrap().faults.extend(vec![Some(Fault::Decline); refused]);
        let headers = vec![(Bytes::from_static(b"Location"), Bytes::from_static(b"/posts/1"))];
        let full = Response { status: 201, headers, body: Bytes::from_static(b"large") };
        let outcome =
            if executed { Outcome::Final(Recorded::Full(full)) } else { Outcome::NotExecuted(Evidence::ThisSend) };
        let settled = claimed.settle(outcome, Some("429")).await;
        let woken = waiter.settled(soon()).await.unwrap();
        match (refused, executed) {
            (1, true) => {
                settled.unwrap();
                let Settlement::Recorded(record) = woken else { panic!("{woken:?}") };
                let answer = bench.ledger.answer_from(&arrival(1, 1), &record).unwrap();
                let Answer::BodyNotRecorded { status: 201, location } = answer else { panic!("{answer:?}") };
                assert_eq!(location.unwrap(), "/posts/1");
                assert!(matches!(answered(&bench.ledger, &arrival(1, 1)), Answer::BodyNotRecorded { .. }));
            }
            (2, true) | (1, false) => {
                settled.unwrap();
                assert!(matches!(woken, Settlement::Again), "{woken:?}");
                assert!(matches!(claim_answer(&bench.ledger, &arrival(1, 1)).await, Answer::OutcomeUnknown));
            }
            // Nothing is kept alive that cannot be settled: its lease will make it unknown.
            _ => {
                settled.unwrap_err().settle_later().await;
                assert!(matches!(woken, Settlement::Again), "{woken:?}");
                assert!(matches!(claim_answer(&bench.ledger, &arrival(1, 1)).await, Answer::InProgress { .. }));
            }
        }
    }
}

/// The disk stays full until the process has to end.
#[tokio::test(start_paused = true)]
async fn what_waits_to_be_recorded_is_tried_once_more_when_time_is_up_and_then_left() {
    for room in [true, false] {
        let bench = bench();
        let claimed = claim(&bench.ledger).await;
        let tries = 20;
        bench.store.state.lock().unwrap().faults.extend(vec![Some(Fault::Full); tries]);
        let unsettled = claimed.settle(response("one"), None).await.unwrap_err();
        let mut later = std::pin::pin!(unsettled.settle_later());
        let pending = tokio::time::timeout(Duration::from_secs(10), &mut later).await;
        assert!(pending.is_err(), "whoever has sent the request still holds its permit");
        if room {
            bench.store.state.lock().unwrap().faults.clear();
        }
        let began = Instant::now();
        bench.ledger.stop_trying();
        later.await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        let restarted = restart(&bench.store, &bench.clock);
        bench.store.state.lock().unwrap().faults.clear();
        assert_eq!(restarted.recover(|_| Some(policy())).await.unwrap(), usize::from(!room));
    }
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_claim_is_waited_for_until_it_is_recorded() {
    let bench = bench();
    let claimed = claim(&bench.ledger).await;
    bench.store.state.lock().unwrap().faults.extend([Some(Fault::Full); 3]);
    drop(claimed);
    bench.ledger.settled_behind().await;
    assert!(matches!(claim_answer(&bench.ledger, &arrival(1, 1)).await, Answer::OutcomeUnknown));
}
