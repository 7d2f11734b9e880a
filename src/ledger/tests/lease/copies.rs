//! Copies of a claim that may still land: of those that were given up, and of those that were settled.

use super::*;

impl Fleet {
    /// A copy of a creation that was on its way reaches the store.
    fn land(&self, copy: &Entry) {
        let mut state = self.store.state.lock().unwrap();
        state.version += 1;
        let landed = Entry { version: Version(state.version), value: copy.value.clone() };
        assert!(state.entries.insert(ID, landed).is_none(), "a creation lands on a free key alone");
    }

    /// From then on nobody looks for copies any more, and the key is free.
    async fn free_for_good(&self) {
        self.clock.advance(4_001);
        tokio::time::sleep(Duration::from_secs(3)).await;
        let reads = self.store.state.lock().unwrap().reads;
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(self.store.state.lock().unwrap().reads, reads, "it looks no more");
        claimed(&self.b).await.settle(response("another"), None).await.unwrap();
    }
}

/// Both copies of a creation were delayed: the second lands after the first was given back.
#[tokio::test(start_paused = true)]
async fn every_copy_of_a_claim_that_was_given_up_is_settled_as_not_executed() {
    let fleet = fleet();
    fleet.fail(Fault::Lost { lands: true, until: START.plus(4_000) });
    let Err(_) = try_claim(&fleet.a).await else { panic!("claimed") };
    let copy = fleet.entry().unwrap();
    for _ in 0..3 {
        fleet.until("given back", |fleet| fleet.record().is_none()).await;
        fleet.land(&copy);
    }
    fleet.until("given back", |fleet| fleet.record().is_none()).await;
    fleet.free_for_good().await;
}

/// Its second copy was done, and the first is still on its way when the key is given back.
#[tokio::test(start_paused = true)]
async fn a_copy_of_a_claim_that_lands_after_it_was_settled_is_given_back() {
    let fleet = fleet();
    fleet.fail(Fault::Copied { until: START.plus(4_000) });
    let claim = claimed(&fleet.a).await;
    let copy = fleet.entry().unwrap();
    let reads = fleet.store.state.lock().unwrap().reads;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(fleet.store.state.lock().unwrap().reads, reads, "as long as the claim stands no copy can land");
    claim.settle(Outcome::NotExecuted(Evidence::ThisSend), Some("429")).await.unwrap();
    assert_eq!(fleet.record(), None);
    fleet.land(&copy);
    fleet.until("given back", |fleet| fleet.record().is_none()).await;
    fleet.free_for_good().await;
}

/// The store stays out of reach until the process has to end.
#[tokio::test(start_paused = true)]
async fn a_claim_that_was_given_up_is_waited_for_until_time_is_up() {
    let fleet = fleet();
    fleet.fail(Fault::Lost { lands: true, until: START.plus(4_000) });
    let Err(_) = try_claim(&fleet.a).await else { panic!("claimed") };
    fleet.store.state.lock().unwrap().unreachable = usize::MAX;
    let mut settled = std::pin::pin!(fleet.a.settled_behind());
    assert!(tokio::time::timeout(Duration::from_secs(60), &mut settled).await.is_err());
    fleet.a.stop_trying();
    settled.await;
    fleet.clock.advance(LEASE_MS);
    assert!(matches!(store_answer(&fleet.b).await, Answer::OutcomeUnknown), "never free");
}

/// What was executed stays, whatever becomes of the copies.
#[tokio::test(start_paused = true)]
async fn a_claim_that_was_sent_twice_and_executed_is_left_alone() {
    for outcome in [response("one"), Outcome::Unknown(Why::Timeout)] {
        let fleet = fleet();
        fleet.fail(Fault::Copied { until: START.plus(4_000) });
        claimed(&fleet.a).await.settle(outcome, None).await.unwrap();
        let settled = fleet.entry();
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(fleet.entry(), settled);
    }
}

/// Its second copy finds another's claim, which then frees the key for the first one.
#[tokio::test(start_paused = true)]
async fn a_copy_of_a_claim_that_was_beaten_is_given_back() {
    let fleet = fleet();
    let claim = claimed(&fleet.b).await;
    fleet.fail(Fault::Copied { until: START.plus(4_000) });
    drop(elsewhere(&fleet.a).await);
    assert!(fleet.record().is_some(), "another's claim is left alone");
    let copy = fleet.store.state.lock().unwrap().copied.take().unwrap();
    claim.settle(Outcome::NotExecuted(Evidence::ThisSend), None).await.unwrap();
    fleet.land(&copy);
    fleet.until("given back", |fleet| fleet.record().is_none()).await;
    fleet.free_for_good().await;
}
