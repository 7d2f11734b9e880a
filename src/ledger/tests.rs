mod lease;
mod lookup;
mod operator;
mod settling;

use super::*;
use crate::idempotency::{Concurrent, Evidence, Outcome, Recorded, Response, UnknownOutcome, Why};
use crate::store::{Health, Page, Tag, Watch, shared::Watches};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What becomes of the next compare-and-swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing is written, and the store says so.
    Refuse,
    /// It is written, but the answer is lost.
    LoseAnswer,
    /// The disk is full.
    Full,
    /// A shared store does not take this write, ever.
    Decline,
    /// The answer is lost on its way from a shared store, which has written or not; it may land until then.
    Lost { lands: bool, until: Millis },
    /// A shared store is asked twice, and an earlier copy may land until then.
    Copied { until: Millis },
}

/// A store in memory whose writes can be held up or fail on command.
#[derive(Default)]
struct Scripted {
    state: Mutex<ScriptedState>,
    held_up: tokio::sync::Mutex<()>,
    arrived: Notify,
    /// Of a shared store.
    watches: Option<Arc<Watches>>,
}

#[derive(Default)]
struct ScriptedState {
    version: u64,
    entries: HashMap<RecordId, Entry>,
    faults: VecDeque<Option<Fault>>,
    writes: usize,
    reads: usize,
    /// So many reads find the store out of reach.
    unreachable: usize,
    /// Of [`Fault::Copied`]: what is still on its way.
    copied: Option<Entry>,
}

fn failed() -> StoreError {
    StoreError::Failed { reason: "the test says so".to_owned() }
}

impl Store for Arc<Scripted> {
    async fn get(&self, id: RecordId) -> Result<Option<Entry>, StoreError> {
        let mut state = self.state.lock().unwrap();
        state.reads += 1;
        if state.unreachable > 0 {
            state.unreachable -= 1;
            return Err(StoreError::Unavailable { reason: "cut off".to_owned(), may_land_until_ms: None });
        }
        Ok(state.entries.get(&id).cloned())
    }

    async fn compare_and_swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swap, StoreError> {
        Ok(self.swap_minding_copies(id, expected, new, now_ms, urgency).await?.swap)
    }

    async fn swap_minding_copies(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        _now_ms: u64,
        _urgency: Urgency,
    ) -> Result<Swapped, StoreError> {
        self.arrived.notify_one();
        drop(self.held_up.lock().await);
        let mut state = self.state.lock().unwrap();
        let fault = state.faults.pop_front().flatten();
        if fault == Some(Fault::Refuse) {
            return Err(failed());
        }
        if fault == Some(Fault::Full) {
            return Err(StoreError::Full { path: "here".to_owned(), min_free_bytes: 0 });
        }
        if fault == Some(Fault::Decline) {
            return Err(StoreError::Refused { reason: "too large".to_owned() });
        }
        if let Some(Fault::Lost { lands: false, until }) = fault {
            return Err(StoreError::Unavailable { reason: "lost".to_owned(), may_land_until_ms: Some(until.0) });
        }
        let may_land_until_ms = match fault {
            Some(Fault::Copied { until }) => Some(until.0),
            _ => None,
        };
        if may_land_until_ms.is_some() {
            state.copied = new.clone().map(|value| Entry { version: Version(0), value });
        }
        let current = state.entries.get(&id).cloned();
        if current.as_ref().map(|entry| entry.version) != expected {
            return Ok(Swapped { swap: Swap::Conflict(current), may_land_until_ms });
        }
        state.version += 1;
        state.writes += 1;
        let version = Version(state.version);
        match new {
            Some(value) => drop(state.entries.insert(id, Entry { version, value })),
            None => drop(state.entries.remove(&id)),
        }
        if let Some(watches) = &self.watches {
            watches.wake(id);
        }
        match fault {
            Some(Fault::LoseAnswer) => Err(failed()),
            Some(Fault::Lost { until, .. }) => {
                Err(StoreError::Unavailable { reason: "lost".to_owned(), may_land_until_ms: Some(until.0) })
            }
            _ => Ok(Swapped { swap: Swap::Done(version), may_land_until_ms }),
        }
    }

    fn watch(&self, id: RecordId) -> Watch {
        self.watches.as_ref().map_or_else(Watch::polling, |watches| watches.watch(id))
    }

    async fn sweep(&self, _now_ms: u64) -> Result<Duration, StoreError> {
        Err(failed())
    }

    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        let state = self.state.lock().unwrap();
        let claims = state.entries.iter().filter(|(_, entry)| entry.value.expires_at_ms.is_none());
        Ok(claims.map(|(id, entry)| (*id, entry.clone())).collect())
    }

    async fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        let state = self.state.lock().unwrap();
        let wanted = |entry: &Entry| entry.version.0 > after && tag.is_none_or(|tag| tag == entry.value.tag);
        let mut entries: Vec<_> = state.entries.iter().filter(|(_, entry)| wanted(entry)).collect();
        entries.sort_by_key(|(_, entry)| entry.version);
        let next = entries.get(visit.max(1) - 1).map(|(_, entry)| entry.version.0);
        let entries = entries.into_iter().take(visit.max(1)).map(|(id, entry)| (*id, entry.clone())).collect();
        Ok(Page { entries, next })
    }

    fn newest_ms(&self) -> u64 {
        0
    }

    async fn setting(&self, _name: &str) -> Result<Option<Bytes>, StoreError> {
        Err(failed())
    }

    async fn swap_setting(&self, _name: &str, _expected: Option<&[u8]>, _new: &[u8]) -> Result<bool, StoreError> {
        Err(failed())
    }

    fn status(&self) -> Status {
        Status {
            health: Health::Ok,
            created: false,
            entries: [0; Tag::COUNT],
            oldest_ms: [None; Tag::COUNT],
            queue_len: 0,
            batches: 0,
            batched_writes: 0,
            bytes_written: 0,
            swept: 0,
            disk_bytes: 0,
        }
    }

    fn close(&self) {}
}

type TestLedger = Ledger<Arc<Scripted>, &'static str>;

struct Bench {
    store: Arc<Scripted>,
    clock: Clock,
    ledger: TestLedger,
}

const START: Millis = Millis(1_000_000);
const ID: RecordId = RecordId([7; 16]);

fn bench() -> Bench {
    let store = Arc::new(Scripted::default());
    let clock = Clock::mock(START);
    let ledger = restart(&store, &clock);
    Bench { store, clock, ledger }
}

/// A new gateway over the same store.
fn restart(store: &Arc<Scripted>, clock: &Clock) -> TestLedger {
    let options = Options { cache_max_bytes: 1 << 20, cache_max_age: None, lease: None };
    Ledger::new(Arc::clone(store), clock.clone(), &options, Metrics::default())
}

fn policy() -> Policy {
    Policy {
        retention_ms: 10_000,
        unknown_retention_ms: 50_000,
        concurrent: Concurrent::Wait,
        unknown_outcome: UnknownOutcome::Hold,
        lease_ms: None,
    }
}

fn arrival(payload: u8, credentials: u8) -> Arrival {
    Arrival {
        id: ID,
        origin: Origin {
            key: Bytes::from_static(b"key"),
            key_header: Bytes::from_static(b"\"key\""),
            path: Bytes::from_static(b"/posts"),
            route: Bytes::from_static(b"/posts"),
            claimed_at: Millis(0),
            attempts: 0,
        },
        fingerprint: Fingerprint { settings: 1, digest: [payload; 32] },
        credentials: Credentials([credentials; 32]),
        policy: policy(),
        max_waiters: 2,
    }
}

fn body(text: &'static str) -> Held {
    let mut reservation = Budget::new(1 << 20, Metrics::default()).reservation();
    assert!(reservation.grow(text.len()));
    Held::new(Bytes::from_static(text.as_bytes()), reservation)
}

fn response(text: &'static str) -> Outcome {
    let body = Bytes::from_static(text.as_bytes());
    Outcome::Final(Recorded::Full(Response { status: 201, headers: Vec::new(), body }))
}

fn lead(ledger: &TestLedger, arrival: &Arrival) -> Lead<Arc<Scripted>, &'static str> {
    match ledger.arrive(arrival, &mut body("{}")) {
        Arrived::Lead(lead) => lead,
        Arrived::Wait(_) => panic!("waits"),
        Arrived::Answer(answer) => panic!("answered: {answer:?}"),
    }
}

fn waiting(ledger: &TestLedger, arrival: &Arrival) -> Waiting<&'static str> {
    match ledger.arrive(arrival, &mut body("{}")) {
        Arrived::Wait(waiting) => waiting,
        Arrived::Lead(_) => panic!("leads"),
        Arrived::Answer(answer) => panic!("answered: {answer:?}"),
    }
}

fn answered(ledger: &TestLedger, arrival: &Arrival) -> Answer {
    match ledger.arrive(arrival, &mut body("{}")) {
        Arrived::Answer(answer) => answer,
        Arrived::Lead(_) => panic!("leads"),
        Arrived::Wait(_) => panic!("waits"),
    }
}

async fn claim(ledger: &TestLedger) -> Claim<Arc<Scripted>, &'static str> {
    match lead(ledger, &arrival(1, 1)).claim().await.unwrap() {
        ClaimResult::Claimed(claim) => claim,
        ClaimResult::Answer(answer) => panic!("answered: {answer:?}"),
        ClaimResult::LookUp(_) => panic!("asks"),
        ClaimResult::Wait(_) => panic!("waits"),
    }
}

async fn claim_answer(ledger: &TestLedger, arrival: &Arrival) -> Answer {
    match lead(ledger, arrival).claim().await.unwrap() {
        ClaimResult::Answer(answer) => answer,
        ClaimResult::Claimed(_) => panic!("claimed"),
        ClaimResult::LookUp(_) => panic!("asks"),
        ClaimResult::Wait(_) => panic!("waits"),
    }
}

fn replayed_body(answer: &Answer) -> Bytes {
    let Answer::Replay(record) = answer else { panic!("no replay: {answer:?}") };
    let State::Completed { response: Recorded::Full(response), .. } = &record.state else { panic!("{record:?}") };
    response.body.clone()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[tokio::test]
async fn a_settled_claim_replays_from_memory_and_after_a_restart_from_the_store() {
    let bench = bench();
    claim(&bench.ledger).await.settle(response("one"), None).await.unwrap();
    let writes = bench.store.state.lock().unwrap().writes;
    assert_eq!(writes, 2, "one claim, one settle");
    assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 9))), "one");
    assert_eq!(bench.store.state.lock().unwrap().reads, 0, "a hot replay reads no store");
    let restarted = restart(&bench.store, &bench.clock);
    assert_eq!(replayed_body(&claim_answer(&restarted, &arrival(1, 1)).await), "one");
    assert!(matches!(claim_answer(&restart(&bench.store, &bench.clock), &arrival(2, 1)).await, Answer::KeyReused));
    assert!(matches!(answered(&restarted, &arrival(2, 1)), Answer::KeyReused));
}

#[tokio::test]
async fn after_its_retention_a_key_is_new() {
    let bench = bench();
    claim(&bench.ledger).await.settle(response("one"), None).await.unwrap();
    bench.clock.advance(9_999);
    assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 1))), "one");
    bench.clock.advance(1);
    claim(&bench.ledger).await.settle(response("two"), None).await.unwrap();
    assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 1))), "two");
}

#[tokio::test]
async fn the_store_is_told_when_it_may_drop_a_record_and_never_a_claim() {
    let bench = bench();
    let expiry = || bench.store.state.lock().unwrap().entries[&ID].value.expires_at_ms;
    let claimed = claim(&bench.ledger).await;
    assert_eq!(expiry(), None);
    claimed.settle(response("one"), None).await.unwrap();
    assert_eq!(expiry(), Some(START.0 + 10_000));
    bench.clock.advance(10_000);
    claim(&bench.ledger).await.settle(Outcome::Unknown(Why::Abandoned), None).await.unwrap();
    assert_eq!(expiry(), Some(START.0 + 10_000 + 50_000));
}

#[tokio::test]
async fn waiters_share_the_settled_record_and_their_number_is_bounded() {
    let bench = bench();
    let claim = claim(&bench.ledger).await;
    let first = waiting(&bench.ledger, &arrival(1, 1));
    let second = waiting(&bench.ledger, &arrival(1, 2));
    assert!(matches!(answered(&bench.ledger, &arrival(1, 1)), Answer::InProgress { late: false }));
    assert!(matches!(answered(&bench.ledger, &arrival(2, 1)), Answer::KeyReused), "422 beats waiting");
    drop(second);
    let third = waiting(&bench.ledger, &arrival(1, 3));
    claim.settle(response("one"), None).await.unwrap();
    for waiter in [first, third] {
        let Ok(Settlement::Recorded(record)) = waiter.settled(soon()).await else { panic!() };
        let answer = bench.ledger.answer_from(&arrival(1, 1), &record).unwrap();
        assert_eq!(replayed_body(&answer), "one");
    }
}

#[tokio::test]
async fn conflict_refuses_at_once_and_the_504_shows() {
    let bench = bench();
    let claim = claim(&bench.ledger).await;
    let mut impatient = arrival(1, 1);
    impatient.policy.concurrent = Concurrent::Conflict;
    assert!(matches!(answered(&bench.ledger, &impatient), Answer::InProgress { late: false }));
    claim.set_late();
    assert!(matches!(answered(&bench.ledger, &impatient), Answer::InProgress { late: true }));
    let waiter = waiting(&bench.ledger, &arrival(1, 1));
    assert_eq!(waiter.settled(Instant::now()).await.unwrap_err(), StillInProgress { late: true });
}

#[tokio::test]
async fn what_was_not_executed_is_shared_with_the_same_credentials_and_frees_the_key() {
    let bench = bench();
    let claimed = claim(&bench.ledger).await;
    let waiter = waiting(&bench.ledger, &arrival(1, 1));
    claimed.settle(Outcome::NotExecuted(Evidence::ThisSend), Some("429")).await.unwrap();
    let Ok(Settlement::NotExecuted { response, credentials }) = waiter.settled(soon()).await else { panic!() };
    assert_eq!((response, credentials), ("429", Credentials([1; 32])));
    assert!(bench.store.state.lock().unwrap().entries.is_empty());
    claim(&bench.ledger).await;
}

#[tokio::test]
async fn an_abandoned_claim_becomes_unknown_and_wakes_its_waiters() {
    let bench = bench();
    let claimed = claim(&bench.ledger).await;
    let waiter = waiting(&bench.ledger, &arrival(1, 1));
    drop(claimed);
    assert!(matches!(waiter.settled(soon()).await, Ok(Settlement::Again)));
    assert!(matches!(claim_answer(&bench.ledger, &arrival(1, 1)).await, Answer::OutcomeUnknown));
    assert!(matches!(claim_answer(&bench.ledger, &arrival(2, 1)).await, Answer::KeyReused));
}

#[tokio::test]
async fn a_claim_whose_write_fails_is_not_forwarded_even_if_it_has_landed() {
    for fault in [Fault::Refuse, Fault::LoseAnswer] {
        let bench = bench();
        bench.store.state.lock().unwrap().faults.push_back(Some(fault));
        let led = lead(&bench.ledger, &arrival(1, 1));
        let waiter = waiting(&bench.ledger, &arrival(1, 1));
        assert!(led.claim().await.is_err(), "{fault:?}");
        assert!(matches!(waiter.settled(soon()).await, Ok(Settlement::Again)));
        if fault == Fault::LoseAnswer {
            let answer = claim_answer(&bench.ledger, &arrival(1, 1)).await;
            assert!(matches!(answer, Answer::InProgress { .. }), "an orphaned claim is never free: {answer:?}");
        }
    }
}

#[tokio::test]
async fn a_claim_whose_settle_fails_stays_and_is_unknown_after_a_restart() {
    for fault in [Fault::Refuse, Fault::LoseAnswer] {
        let bench = bench();
        let claimed = claim(&bench.ledger).await;
        bench.store.state.lock().unwrap().faults.push_back(Some(fault));
        assert!(claimed.settle(response("one"), None).await.is_err());
        let restarted = restart(&bench.store, &bench.clock);
        let recovered = restarted.recover(|_| Some(policy())).await.unwrap();
        let answer = claim_answer(&restarted, &arrival(1, 1)).await;
        match fault {
            Fault::Refuse => assert!(recovered == 1 && matches!(answer, Answer::OutcomeUnknown), "{answer:?}"),
            _ => {
                assert_eq!((recovered, replayed_body(&answer)), (0, Bytes::from_static(b"one")))
            }
        }
    }
}

#[tokio::test]
async fn a_failed_not_executed_never_frees_the_key() {
    let bench = bench();
    let claimed = claim(&bench.ledger).await;
    bench.store.state.lock().unwrap().faults.push_back(Some(Fault::Refuse));
    assert!(claimed.settle(Outcome::NotExecuted(Evidence::ThisSend), Some("429")).await.is_err());
    assert!(matches!(claim_answer(&bench.ledger, &arrival(1, 1)).await, Answer::InProgress { .. }));
}

#[tokio::test]
async fn claims_found_at_start_become_unknown_and_the_retention_counts_from_then() {
    let bench = bench();
    std::mem::forget(claim(&bench.ledger).await);
    bench.clock.advance(1_000_000);
    let restarted = restart(&bench.store, &bench.clock);
    assert_eq!(restarted.recover(|_| Some(policy())).await.unwrap(), 1);
    bench.clock.advance(49_999);
    assert!(matches!(claim_answer(&restarted, &arrival(1, 1)).await, Answer::OutcomeUnknown));
    bench.clock.advance(1);
    claim(&restarted).await;
}

#[tokio::test]
async fn who_comes_before_the_claim_is_known_decides_only_then() {
    let bench = bench();
    claim(&bench.ledger).await.settle(response("one"), None).await.unwrap();
    // A gateway that has forgotten the record: its first arrival bears another payload, its second the recorded one.
    let restarted = restart(&bench.store, &bench.clock);
    let held_up = bench.store.held_up.lock().await;
    let other = lead(&restarted, &arrival(2, 1));
    let claiming = tokio::spawn(other.claim());
    bench.store.arrived.notified().await;
    let waiter = waiting(&restarted, &arrival(1, 1));
    drop(held_up);
    let Ok(ClaimResult::Answer(answer)) = claiming.await.unwrap() else { panic!() };
    assert!(matches!(answer, Answer::KeyReused));
    assert!(matches!(waiter.settled(soon()).await, Ok(Settlement::Again)), "not told that its key was reused");
    assert_eq!(replayed_body(&answered(&restarted, &arrival(1, 1))), "one");
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_unknown_and_never_overwritten() {
    let bench = bench();
    let value = Value { tag: tags::COMPLETED, expires_at_ms: Some(u64::MAX), bytes: Bytes::from_static(b"\xffjunk") };
    bench.store.state.lock().unwrap().entries.insert(ID, Entry { version: Version(99), value: value.clone() });
    assert!(matches!(claim_answer(&bench.ledger, &arrival(1, 1)).await, Answer::OutcomeUnknown));
    assert!(matches!(bench.ledger.look_up(&arrival(1, 1)).await, Ok(Some(Answer::OutcomeUnknown))));
    let entry = bench.store.state.lock().unwrap().entries.get(&ID).cloned();
    assert_eq!(entry.unwrap().value, value);
}

#[tokio::test]
async fn a_waiter_with_the_same_bytes_keeps_no_copy() {
    let bench = bench();
    let mut first = body("{\"a\":1}");
    let Arrived::Lead(led) = bench.ledger.arrive(&arrival(1, 1), &mut first) else { panic!() };
    let ClaimResult::Claimed(claimed) = led.claim().await.unwrap() else { panic!() };
    let budget = Budget::new(7, Metrics::default());
    let mut reservation = budget.reservation();
    assert!(reservation.grow(7));
    let mut same = Held::new(Bytes::copy_from_slice(b"{\"a\":1}"), reservation);
    let _waiting = bench.ledger.arrive(&arrival(1, 1), &mut same);
    assert!(budget.reservation().grow(7), "its room is free again");
    assert_eq!(same.bytes.as_ptr(), first.bytes.as_ptr());
    let mut other = body("{\"a\": 1}");
    let before = other.bytes.as_ptr();
    let _waiting = bench.ledger.arrive(&arrival(1, 1), &mut other);
    assert_eq!(other.bytes.as_ptr(), before, "other bytes are its own, even if the payload counts as the same");
    drop(claimed);
}
