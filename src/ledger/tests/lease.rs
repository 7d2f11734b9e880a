//! Several gateways over one store: leases, waits for each other, answers that are lost.

mod copies;

use super::*;
use crate::idempotency::Resolution;
use tokio::time::Instant;

const LEASE_MS: u64 = 30_000;

fn leased() -> Policy {
    Policy { lease_ms: Some(LEASE_MS), ..policy() }
}

fn arriving(payload: u8, credentials: u8) -> Arrival {
    Arrival { policy: leased(), ..arrival(payload, credentials) }
}

/// Two gateways.
struct Fleet {
    store: Arc<Scripted>,
    clock: Clock,
    a: TestLedger,
    b: TestLedger,
}

fn fleet() -> Fleet {
    let (watches, _) = Watches::new();
    let store = Arc::new(Scripted { watches: Some(watches), ..Scripted::default() });
    let clock = Clock::mock(START);
    let (a, b) = (restart(&store, &clock), restart(&store, &clock));
    Fleet { store, clock, a, b }
}

impl Fleet {
    fn entry(&self) -> Option<Entry> {
        self.store.state.lock().unwrap().entries.get(&ID).cloned()
    }

    fn record(&self) -> Option<Record> {
        self.entry().map(|entry| codec::decode(&entry.value.bytes).unwrap())
    }

    fn fail(&self, fault: Fault) {
        self.store.state.lock().unwrap().faults.push_back(Some(fault));
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..10_000 {
            if holds(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("in vain: {what}");
    }
}

type Result_ = Result<ClaimResult<Arc<Scripted>, &'static str>, StoreError>;

async fn try_claim(ledger: &TestLedger) -> Result_ {
    lead(ledger, &arriving(1, 1)).claim().await
}

async fn claimed(ledger: &TestLedger) -> Claim<Arc<Scripted>, &'static str> {
    match try_claim(ledger).await.unwrap() {
        ClaimResult::Claimed(claim) => claim,
        ClaimResult::Answer(answer) => panic!("answered: {answer:?}"),
        ClaimResult::LookUp(_) | ClaimResult::Wait(_) => panic!("waits or asks"),
    }
}

async fn elsewhere(ledger: &TestLedger) -> Elsewhere<Arc<Scripted>, &'static str> {
    match try_claim(ledger).await.unwrap() {
        ClaimResult::Wait(elsewhere) => elsewhere,
        ClaimResult::Answer(answer) => panic!("answered: {answer:?}"),
        ClaimResult::LookUp(_) | ClaimResult::Claimed(_) => panic!("claims or asks"),
    }
}

async fn store_answer(ledger: &TestLedger) -> Answer {
    match try_claim(ledger).await.unwrap() {
        ClaimResult::Answer(answer) => answer,
        _ => panic!("no answer"),
    }
}

#[tokio::test(start_paused = true)]
async fn all_who_wait_at_another_gateway_get_the_result() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    let first = elsewhere(&fleet.b).await;
    let second = waiting(&fleet.b, &arriving(1, 2));
    assert!(matches!(answered(&fleet.b, &arriving(2, 2)), Answer::KeyReused), "422 beats waiting, there too");
    let first = tokio::spawn(first.settled(soon()));
    tokio::task::yield_now().await;
    assert!(!first.is_finished());
    let began = Instant::now();
    claim.settle(response("one"), None).await.unwrap();
    let Ok(Settlement::Recorded(record)) = first.await.unwrap() else { panic!() };
    assert_eq!(began.elapsed(), Duration::ZERO, "word comes at once");
    assert_eq!(replayed_body(&fleet.b.answer_from(&arriving(1, 1), &record).unwrap()), "one");
    assert!(matches!(second.settled(soon()).await, Ok(Settlement::Recorded(_))));
    let reads = fleet.store.state.lock().unwrap().reads;
    assert_eq!(replayed_body(&answered(&fleet.b, &arriving(1, 9))), "one");
    assert_eq!(fleet.store.state.lock().unwrap().reads, reads, "it is hot there now");
}

#[tokio::test(start_paused = true)]
async fn without_word_the_poll_finds_the_result() {
    let Fleet { store, clock, .. } = fleet();
    let silent = Arc::new(Scripted::default());
    let (a, b) = (restart(&silent, &clock), restart(&silent, &clock));
    drop(store);
    let claim = claimed(&a).await;
    let waits = tokio::spawn(elsewhere(&b).await.settled(soon()));
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(!waits.is_finished());
    claim.settle(response("one"), None).await.unwrap();
    let began = Instant::now();
    assert!(matches!(waits.await.unwrap(), Ok(Settlement::Recorded(_))));
    assert!(began.elapsed() <= Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_another_gateway_ends_at_its_deadline_and_with_a_freed_key() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    let waits = elsewhere(&fleet.b).await;
    let impatient = waits.settled(Instant::now() + Duration::from_secs(3)).await;
    assert_eq!(impatient.unwrap_err(), StillInProgress { late: false });
    // The slot is free again: somebody else watches on.
    let waits = tokio::spawn(elsewhere(&fleet.b).await.settled(soon()));
    tokio::task::yield_now().await;
    claim.settle(Outcome::NotExecuted(Evidence::ThisSend), Some("busy")).await.unwrap();
    assert!(
        matches!(waits.await.unwrap(), Ok(Settlement::Again)),
        "of another gateway's waiters each tries for itself"
    );
    claimed(&fleet.b).await.settle(response("two"), None).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_another_gateway_ends_with_its_lease() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    let waits = tokio::spawn(elsewhere(&fleet.b).await.settled(soon()));
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(!waits.is_finished());
    fleet.clock.advance(LEASE_MS);
    assert!(matches!(waits.await.unwrap(), Ok(Settlement::Again)), "long before the deadline");
    assert!(matches!(store_answer(&fleet.b).await, Answer::OutcomeUnknown));
    drop(claim);
}

#[tokio::test]
async fn a_lapsed_claim_is_unknown_and_its_holder_may_still_settle_it() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    fleet.clock.advance(LEASE_MS - 1);
    drop(elsewhere(&fleet.b).await);
    fleet.clock.advance(1 + 500);
    assert!(matches!(store_answer(&fleet.b).await, Answer::OutcomeUnknown), "never free");
    let record = fleet.record().unwrap();
    let lapsed_at = START.plus(LEASE_MS);
    assert_eq!(record.state, State::Unknown { why: Why::Lease, since: lapsed_at, expires_at: lapsed_at.plus(50_000) });
    claim.settle(response("late"), None).await.unwrap();
    assert_eq!(replayed_body(&store_answer(&fleet.b).await), "late");
}

#[tokio::test]
async fn a_lease_is_renewed_while_its_owner_works_and_looked_at_before_a_byte_is_sent() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    assert!(claim.may_send());
    fleet.clock.advance(LEASE_MS / 3 - 1);
    fleet.a.renew_leases();
    tokio::task::yield_now().await;
    assert_eq!(fleet.store.state.lock().unwrap().writes, 1, "not yet");
    for _ in 0..5 {
        let before = fleet.entry().unwrap().version;
        fleet.clock.advance(LEASE_MS / 3);
        fleet.a.renew_leases();
        fleet.a.renew_leases();
        fleet.until("renewed", |fleet| fleet.entry().unwrap().version != before).await;
        let until = fleet.clock.now().plus(LEASE_MS);
        assert_eq!(fleet.record().unwrap().state, State::Claimed { lease_until: Some(until) });
        assert_eq!(fleet.entry().unwrap().value.expires_at_ms, Some(until.0 + 50_000), "should its owner vanish");
        fleet.until("counted", |_| claim.may_send()).await;
    }
    assert_eq!(fleet.store.state.lock().unwrap().writes, 6, "one renewal at a time");
    // It cannot be renewed: with less than a third left nothing is sent, long before anybody takes it for lapsed.
    fleet.clock.advance(LEASE_MS / 3 * 2 - 1);
    assert!(claim.may_send());
    fleet.clock.advance(1);
    assert!(!claim.may_send());
    drop(elsewhere(&fleet.b).await);
    let writes = fleet.store.state.lock().unwrap().writes;
    claim.settle(response("one"), None).await.unwrap();
    assert_eq!(fleet.store.state.lock().unwrap().writes, writes + 1, "settled in one go after renewals");
    fleet.clock.advance(LEASE_MS);
    fleet.a.renew_leases();
    tokio::task::yield_now().await;
    assert_eq!(fleet.store.state.lock().unwrap().writes, writes + 1, "nothing is left to renew");
}

/// The slots hold the claim as it was made, or seen; its lease has been renewed since.
#[tokio::test]
async fn duplicates_of_a_renewed_claim_wait_at_both_gateways() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    let watches = elsewhere(&fleet.b).await;
    for _ in 0..4 {
        let before = fleet.entry().unwrap().version;
        fleet.clock.advance(LEASE_MS / 3);
        fleet.a.renew_leases();
        fleet.until("renewed", |fleet| fleet.entry().unwrap().version != before).await;
    }
    let waiters = [&fleet.a, &fleet.b].map(|ledger| waiting(ledger, &arriving(1, 1)));
    assert!(matches!(answered(&fleet.a, &arriving(2, 2)), Answer::KeyReused));
    let watches = tokio::spawn(watches.settled(soon()));
    claim.settle(response("one"), None).await.unwrap();
    for waiter in waiters {
        assert!(matches!(waiter.settled(soon()).await, Ok(Settlement::Recorded(_))));
    }
    assert!(matches!(watches.await.unwrap(), Ok(Settlement::Recorded(_))));
}

#[tokio::test]
async fn a_lease_that_somebody_took_for_lapsed_is_lost() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    // As if this gateway had been stopped: its own count has gone on, too.
    fleet.clock.advance(LEASE_MS);
    assert!(matches!(store_answer(&fleet.b).await, Answer::OutcomeUnknown));
    fleet.a.renew_leases();
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert!(!claim.may_send());
    assert!(matches!(fleet.record().unwrap().state, State::Unknown { .. }), "not revived");
    // Unsent, so not executed: its holder knows.
    claim.settle(Outcome::NotExecuted(Evidence::ThisSend), None).await.unwrap();
    assert_eq!(fleet.record(), None);
}

/// As where the store's clock was set forward: by its owner's own count the lease has only begun.
#[tokio::test]
async fn a_lease_that_somebody_took_for_lapsed_is_lost_however_young_its_owner_believes_it() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    let ahead = restart(&fleet.store, &Clock::mock(START.plus(LEASE_MS)));
    assert!(matches!(store_answer(&ahead).await, Answer::OutcomeUnknown));
    fleet.clock.advance(LEASE_MS / 3);
    assert!(claim.may_send());
    fleet.a.renew_leases();
    fleet.until("told that it is lost", |_| !claim.may_send()).await;
}

#[tokio::test]
async fn a_lease_counts_from_before_its_write_was_sent() {
    let fleet = fleet();
    let held_up = fleet.store.held_up.lock().await;
    let a = fleet.a.clone();
    let claiming = tokio::spawn(async move { claimed(&a).await });
    fleet.store.arrived.notified().await;
    fleet.clock.advance(LEASE_MS / 3 * 2);
    drop(held_up);
    let claim = claiming.await.unwrap();
    assert!(!claim.may_send(), "the answer was long on its way");
    let before = fleet.entry().unwrap().version;
    let held_up = fleet.store.held_up.lock().await;
    fleet.a.renew_leases();
    let sent = tokio::time::timeout(Duration::from_secs(10), fleet.store.arrived.notified());
    sent.await.expect("its renewal is sent");
    fleet.clock.advance(LEASE_MS / 3 * 2);
    drop(held_up);
    fleet.until("renewed", |fleet| fleet.entry().unwrap().version != before).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert!(!claim.may_send(), "that of its renewal, too");
    }
    fleet.a.renew_leases();
    fleet.until("renewed in time", |_| claim.may_send()).await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_answer_was_lost_is_settled_as_not_executed() {
    let until = START.plus(4_000);
    for (lands, late) in [(true, false), (false, false), (false, true)] {
        let fleet = fleet();
        fleet.fail(Fault::Lost { lands, until });
        fleet.store.state.lock().unwrap().unreachable = 3;
        let Err(error) = try_claim(&fleet.a).await else { panic!("claimed") };
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
        assert_eq!(fleet.record().is_some(), lands);
        if late {
            // After the store was first found without it.
            fleet.until("looked", |fleet| fleet.store.state.lock().unwrap().reads > 4).await;
            let token = ClaimToken([9; 16]);
            let claimed = Record { token, ..a_claim() };
            let value = to_value(&leased(), &claimed);
            fleet.store.state.lock().unwrap().entries.insert(ID, Entry { version: Version(77), value });
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert_eq!(fleet.record().unwrap().token, token, "another's claim is left alone");
            continue;
        }
        fleet.until("given back", |fleet| fleet.record().is_none()).await;
        fleet.clock.advance(4_001);
        tokio::time::sleep(Duration::from_secs(3)).await;
        let reads = fleet.store.state.lock().unwrap().reads;
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(fleet.store.state.lock().unwrap().reads, reads, "it looks no more");
        claimed(&fleet.b).await.settle(response("one"), None).await.unwrap();
    }
}

fn a_claim() -> Record {
    let Arrival { origin, fingerprint, .. } = arriving(1, 1);
    let state = State::Claimed { lease_until: Some(START.plus(LEASE_MS)) };
    Record { origin, fingerprint, token: ClaimToken([0; 16]), state }
}

/// The write is delayed on its way, and lands when the store has already been found without it.
#[tokio::test(start_paused = true)]
async fn a_claim_that_lands_late_is_settled_as_not_executed() {
    let fleet = fleet();
    fleet.fail(Fault::Lost { lands: true, until: START.plus(4_000) });
    let Err(_) = try_claim(&fleet.a).await else { panic!("claimed") };
    let delayed = fleet.store.state.lock().unwrap().entries.remove(&ID).unwrap();
    let reads = |fleet: &Fleet| fleet.store.state.lock().unwrap().reads;
    fleet.until("looked in vain", |fleet| reads(fleet) >= 2).await;
    fleet.store.state.lock().unwrap().entries.insert(ID, delayed);
    fleet.until("given back", |fleet| fleet.record().is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn an_outcome_that_finds_the_store_out_of_reach_is_recorded_later() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    for lands in [false, true] {
        fleet.fail(Fault::Lost { lands, until: START.plus(4_000) });
    }
    let unsettled = claim.settle(response("one"), None).await.unwrap_err();
    assert!(matches!(unsettled.error, StoreError::Unavailable { .. }), "the caller gets his response all the same");
    tokio::spawn(unsettled.settle_later());
    let here = waiting(&fleet.a, &arriving(1, 1));
    assert!(matches!(here.settled(soon()).await, Ok(Settlement::Recorded(_))));
    assert_eq!(replayed_body(&store_answer(&fleet.b).await), "one");
    assert_eq!(fleet.store.state.lock().unwrap().writes, 2);
}

#[tokio::test]
async fn an_operator_acts_on_a_lapsed_claim_and_not_on_a_living_one() {
    for by_other in [false, true] {
        let fleet = fleet();
        let claim = claimed(&fleet.a).await;
        let act = |event: Event| Act::<()> {
            id: ID,
            if_version: None,
            who: Arc::from("test"),
            decide: Box::new(|_| Ok((leased(), event))),
        };
        let at = if by_other { &fleet.b } else { &fleet.a };
        let refused = at.act(act(Event::Resolve(Resolution::NotExecuted))).await;
        assert_eq!(refused.unwrap_err(), Refusal::InFlight);
        fleet.clock.advance(LEASE_MS);
        // It is shown as what it counts as.
        let shown = fleet.b.show(ID, |_| leased()).await.unwrap().unwrap();
        assert!(matches!(shown.record.state, State::Unknown { why: Why::Lease, .. }), "{:?}", shown.record);
        let listed = fleet.b.list(None, 0, 10, |_| leased(), |record| tags::of(record) == tags::UNKNOWN).await.unwrap();
        assert_eq!(listed.records.len(), 1);
        // Its own gateway still knows better.
        let acted = fleet.b.act(act(Event::Resolve(Resolution::NotExecuted))).await.unwrap();
        assert!(acted.after.is_none());
        assert_eq!(fleet.record(), None);
        claim.settle(response("too late"), None).await.unwrap();
        assert_eq!(fleet.record(), None, "what an operator has said stands");
    }
}

#[tokio::test]
async fn lapsed_claims_are_found_by_whoever_looks_and_living_ones_are_left_alone() {
    let fleet = fleet();
    let living = claimed(&fleet.a).await;
    let gone = Record { state: State::Claimed { lease_until: Some(START.plus(10)) }, ..a_claim() };
    // More than one page of them.
    for n in 0..300_u16 {
        let mut id = [1; 16];
        id[..2].copy_from_slice(&n.to_be_bytes());
        let entry = Entry { version: Version(1000 + u64::from(n)), value: to_value(&leased(), &gone) };
        fleet.store.state.lock().unwrap().entries.insert(RecordId(id), entry);
    }
    fleet.store.state.lock().unwrap().version = 2000;
    fleet.clock.advance(9);
    assert_eq!(fleet.b.find_lapsed(|_| Some(leased())).await.unwrap(), 0);
    fleet.clock.advance(500);
    let before = fleet.entry();
    // Of a route that nobody knows.
    assert_eq!(fleet.b.find_lapsed(|_| None).await.unwrap(), 0);
    assert_eq!(fleet.b.find_lapsed(|_| Some(leased())).await.unwrap(), 300);
    assert_eq!(fleet.a.find_lapsed(|_| Some(leased())).await.unwrap(), 0, "once");
    assert_eq!(fleet.entry(), before);
    let since = START.plus(10);
    let unknown = State::Unknown { why: Why::Lease, since, expires_at: since.plus(50_000) };
    let entries = fleet.store.state.lock().unwrap().entries.clone();
    for (_, entry) in entries.into_iter().filter(|(id, _)| *id != ID) {
        assert_eq!(entry.value.tag, tags::UNKNOWN);
        assert_eq!(codec::decode(&entry.value.bytes).unwrap(), Record { state: unknown.clone(), ..a_claim() });
    }
    living.settle(response("one"), None).await.unwrap();
}

/// It is renewed between the look and the write.
#[tokio::test]
async fn a_claim_that_is_renewed_meanwhile_does_not_lapse() {
    let fleet = fleet();
    let claim = claimed(&fleet.a).await;
    let seen = fleet.entry().unwrap();
    fleet.clock.advance(LEASE_MS / 3);
    fleet.a.renew_leases();
    fleet.until("renewed", |fleet| fleet.entry().unwrap().version != seen.version).await;
    fleet.clock.advance(LEASE_MS * 2 / 3);
    let stale = decode(ID, seen);
    let found = fleet.b.0.apply(ID, &leased(), stale, &Event::Lapse).await.unwrap();
    assert_eq!(found.0, Decision::Superseded);
    assert!(matches!(fleet.record().unwrap().state, State::Claimed { .. }));
    claim.settle(response("one"), None).await.unwrap();
}
