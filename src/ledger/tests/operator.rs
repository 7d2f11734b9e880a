//! Operators' acts, and the races with requests on the same key.

use super::*;
use crate::idempotency::{Resolution, Verdict};
use tokio::task::JoinHandle;

type Decide = fn(&Record) -> Result<(Policy, Event), &'static str>;
type Done = Result<Acted, Refusal<&'static str>>;

fn by_hand() -> Response {
    Response { status: 200, headers: Vec::new(), body: Bytes::from_static(b"by hand") }
}

pub(super) fn not_executed(_: &Record) -> Result<(Policy, Event), &'static str> {
    Ok((policy(), Event::Resolve(Resolution::NotExecuted)))
}

pub(super) fn respond(_: &Record) -> Result<(Policy, Event), &'static str> {
    Ok((policy(), Event::Resolve(Resolution::Response(by_hand()))))
}

fn forget(_: &Record) -> Result<(Policy, Event), &'static str> {
    Ok((policy(), Event::Forget))
}

const ALL: [Decide; 3] = [not_executed, respond, forget];

fn act_with(if_version: Option<Version>, decide: Decide) -> Act<&'static str> {
    Act { id: ID, if_version, who: "test".into(), decide: Box::new(decide) }
}

pub(super) async fn act(ledger: &TestLedger, decide: Decide) -> Done {
    ledger.act(act_with(None, decide)).await
}

/// Begins an act, and lets it come as far as it can.
async fn begin(ledger: &TestLedger, decide: Decide) -> JoinHandle<Done> {
    let ledger = ledger.clone();
    let acting = tokio::spawn(async move { act(&ledger, decide).await });
    settle_down().await;
    acting
}

/// There is one thread: whatever can go on without a lock that the test holds has gone on by then.
async fn settle_down() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

async fn unknown(ledger: &TestLedger) {
    claim(ledger).await.settle(Outcome::Unknown(Why::Reset), None).await.unwrap();
}

async fn completed(ledger: &TestLedger) {
    claim(ledger).await.settle(response("one"), None).await.unwrap();
}

fn stored(bench: &Bench) -> Option<Entry> {
    bench.store.state.lock().unwrap().entries.get(&ID).cloned()
}

fn refusal(done: Done) -> Refusal<&'static str> {
    done.err().unwrap()
}

#[tokio::test]
async fn what_was_not_executed_is_free_again() {
    let bench = bench();
    unknown(&bench.ledger).await;
    let shown = bench.ledger.show(ID, |_| policy()).await.unwrap().unwrap();
    let acted = act(&bench.ledger, not_executed).await.unwrap();
    assert_eq!((acted.before.version, &acted.before.record), (shown.version, &shown.record));
    assert!(acted.after.is_none() && stored(&bench).is_none());
    assert!(bench.ledger.show(ID, |_| policy()).await.unwrap().is_none());
    drop(claim(&bench.ledger).await);
}

#[tokio::test]
async fn an_answer_given_by_hand_is_replayed_at_once_and_after_a_restart() {
    let bench = bench();
    unknown(&bench.ledger).await;
    bench.clock.advance(500);
    let after = act(&bench.ledger, respond).await.unwrap().after.unwrap();
    assert_eq!(after.record.expires_at(), Some(START.plus(500 + policy().retention_ms)), "it counts from now on");
    let reads = bench.store.state.lock().unwrap().reads;
    assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 1))), "by hand");
    assert!(matches!(answered(&bench.ledger, &arrival(2, 1)), Answer::KeyReused), "the payload is the first one's");
    assert_eq!(bench.store.state.lock().unwrap().reads, reads, "from the hot cache");
    let shown = bench.ledger.show(ID, |_| policy()).await.unwrap().unwrap();
    assert_eq!((shown.version, shown.record), (after.version, after.record));
    let restarted = restart(&bench.store, &bench.clock);
    assert_eq!(replayed_body(&claim_answer(&restarted, &arrival(1, 1)).await), "by hand");
}

#[tokio::test]
async fn a_hot_record_that_is_forgotten_is_gone_at_once() {
    let bench = bench();
    completed(&bench.ledger).await;
    assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 1))), "one");
    assert!(act(&bench.ledger, forget).await.unwrap().after.is_none());
    assert!(stored(&bench).is_none());
    claim(&bench.ledger).await.settle(response("two"), None).await.unwrap();
    assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 1))), "two");
}

#[tokio::test]
async fn states_refuse_what_they_must() {
    let bench = bench();
    for decide in ALL {
        assert_eq!(refusal(act(&bench.ledger, decide).await), Refusal::NotFound, "absent");
    }
    completed(&bench.ledger).await;
    for decide in [not_executed, respond] {
        assert_eq!(refusal(act(&bench.ledger, decide).await), Refusal::NotUnknown);
    }
    assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 1))), "one");
    bench.clock.advance(policy().retention_ms);
    for decide in ALL {
        assert_eq!(refusal(act(&bench.ledger, decide).await), Refusal::NotFound, "expired");
    }
    assert!(stored(&bench).is_some(), "the sweep's to remove");
    assert!(bench.ledger.show(ID, |_| policy()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_claim_refuses_be_it_late_or_orphaned() {
    let bench = bench();
    let claimed = claim(&bench.ledger).await;
    for late in [false, true] {
        for decide in ALL {
            assert_eq!(refusal(act(&bench.ledger, decide).await), Refusal::InFlight, "{late}");
        }
        assert!(bench.ledger.show(ID, |_| policy()).await.unwrap().unwrap().in_flight);
        claimed.set_late();
    }
    // Its outcome cannot be written: the claim stays, and nobody is at it.
    bench.store.state.lock().unwrap().faults.push_back(Some(Fault::Refuse));
    assert!(claimed.settle(response("one"), None).await.is_err());
    assert!(!bench.ledger.show(ID, |_| policy()).await.unwrap().unwrap().in_flight);
    for decide in ALL {
        assert_eq!(refusal(act(&bench.ledger, decide).await), Refusal::InFlight);
    }
    assert!(matches!(claim_answer(&bench.ledger, &arrival(1, 1)).await, Answer::InProgress { .. }));
}

#[tokio::test]
async fn an_act_is_for_the_version_that_was_seen() {
    let bench = bench();
    unknown(&bench.ledger).await;
    let seen = bench.ledger.show(ID, |_| policy()).await.unwrap().unwrap().version;
    for decide in ALL {
        let other = act_with(Some(Version(seen.0 + 1)), decide);
        assert_eq!(bench.ledger.act(other).await.err().unwrap(), Refusal::Changed);
    }
    assert_eq!(stored(&bench).unwrap().version, seen);
    let after = bench.ledger.act(act_with(Some(seen), respond)).await.unwrap().after.unwrap();
    assert_eq!(bench.ledger.act(act_with(Some(seen), forget)).await.err().unwrap(), Refusal::Changed);
    bench.ledger.act(act_with(Some(after.version), forget)).await.unwrap();
    assert_eq!(bench.ledger.act(act_with(Some(after.version), forget)).await.err().unwrap(), Refusal::NotFound);
}

#[tokio::test]
async fn what_the_caller_finds_wrong_changes_nothing() {
    let bench = bench();
    unknown(&bench.ledger).await;
    let before = stored(&bench);
    assert_eq!(refusal(act(&bench.ledger, |_| Err("too long")).await), Refusal::Refused("too long"));
    assert_eq!(stored(&bench), before);
    drop(lead(&bench.ledger, &arrival(1, 1)));
}

/// Another gateway, on a shared store, moves the record on between the read and the write.
#[tokio::test]
async fn a_record_that_changes_meanwhile_is_left_alone() {
    for decide in ALL {
        let bench = bench();
        unknown(&bench.ledger).await;
        let held_up = bench.store.held_up.lock().await;
        let acting = begin(&bench.ledger, decide).await;
        {
            let mut state = bench.store.state.lock().unwrap();
            state.entries.get_mut(&ID).unwrap().version = Version(77);
        }
        let before = stored(&bench);
        drop(held_up);
        assert_eq!(refusal(acting.await.unwrap()), Refusal::Changed);
        assert_eq!(stored(&bench), before, "no second try");
    }
}

fn resending() -> Arrival {
    let mut resending = arrival(1, 1);
    resending.policy.unknown_outcome = UnknownOutcome::Forward;
    resending
}

/// `unknown_outcome = "forward"`: a retry claims the record anew while an operator wants to settle it.
#[tokio::test]
async fn a_retry_that_is_being_claimed_comes_before_the_operator() {
    for decide in ALL {
        let bench = bench();
        unknown(&bench.ledger).await;
        let held_up = bench.store.held_up.lock().await;
        let retry = tokio::spawn(lead(&bench.ledger, &resending()).claim());
        settle_down().await;
        let acting = begin(&bench.ledger, decide).await;
        assert!(!acting.is_finished(), "it waits for the claim");
        drop(held_up);
        let Ok(ClaimResult::Claimed(claimed)) = retry.await.unwrap() else { panic!("not claimed") };
        assert!(claimed.resend);
        assert_eq!(refusal(acting.await.unwrap()), Refusal::InFlight);
        claimed.settle(response("again"), None).await.unwrap();
        assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 1))), "again");
    }
}

#[tokio::test]
async fn a_retry_waits_for_an_act_under_way_and_finds_what_it_has_left() {
    for decide in ALL {
        let bench = bench();
        unknown(&bench.ledger).await;
        let held_up = bench.store.held_up.lock().await;
        let acting = begin(&bench.ledger, decide).await;
        let retry = waiting(&bench.ledger, &resending());
        drop(held_up);
        let after = acting.await.unwrap().unwrap().after;
        assert!(matches!(retry.settled(soon()).await, Ok(Settlement::Again)));
        if after.is_some() {
            assert_eq!(replayed_body(&answered(&bench.ledger, &resending())), "by hand");
        } else {
            let claimed = lead(&bench.ledger, &resending()).claim().await.unwrap();
            let ClaimResult::Claimed(claimed) = claimed else { panic!("not claimed") };
            assert!(!claimed.resend, "the key is new");
        }
    }
}

/// `unknown_outcome = "lookup"`: the upstream is being asked while an operator wants to settle the record.
#[tokio::test]
async fn an_operator_waits_for_the_upstreams_word_and_acts_on_what_it_leaves() {
    for (verdict, decide) in [Verdict::Undecided, Verdict::NotExecuted]
        .into_iter()
        .flat_map(|verdict| ALL.map(|decide| (verdict.clone(), decide)))
    {
        let bench = bench();
        unknown(&bench.ledger).await;
        let mut asking = arrival(1, 1);
        asking.policy.unknown_outcome = UnknownOutcome::Lookup { min_age_ms: 0 };
        let ClaimResult::LookUp(inquiry) = lead(&bench.ledger, &asking).claim().await.unwrap() else { panic!() };
        let acting = begin(&bench.ledger, decide).await;
        assert!(!acting.is_finished() && bench.ledger.show(ID, |_| policy()).await.unwrap().unwrap().in_flight);
        let told = inquiry.tell(verdict.clone()).await.unwrap();
        settle_down().await;
        let done = acting.await.unwrap();
        match (verdict, told) {
            (Verdict::NotExecuted, ClaimResult::Claimed(claimed)) => {
                assert_eq!(refusal(done), Refusal::InFlight, "it is sent again");
                drop(claimed);
            }
            (_, ClaimResult::Answer(Answer::OutcomeUnknown)) => drop(done.unwrap()),
            _ => panic!("told otherwise"),
        }
    }
}

#[tokio::test]
async fn a_late_result_and_an_operator_exclude_each_other() {
    for decide in [not_executed as Decide, respond] {
        let bench = bench();
        let claimed = claim(&bench.ledger).await;
        claimed.set_late();
        let held_up = bench.store.held_up.lock().await;
        let settling = tokio::spawn(claimed.settle(response("late"), None));
        settle_down().await;
        assert_eq!(refusal(act(&bench.ledger, decide).await), Refusal::InFlight, "it is being settled");
        drop(held_up);
        settling.await.unwrap().unwrap();
        assert_eq!(refusal(act(&bench.ledger, decide).await), Refusal::NotUnknown);
        assert_eq!(replayed_body(&answered(&bench.ledger, &arrival(1, 1))), "late");
    }
}

/// A request reads the record from the store, and is about to put it into the hot cache: it must not come back there.
#[tokio::test]
async fn a_replay_from_the_store_leaves_nothing_behind_of_what_is_forgotten() {
    let bench = bench();
    completed(&bench.ledger).await;
    let cold = restart(&bench.store, &bench.clock);
    let held_up = bench.store.held_up.lock().await;
    let replaying = tokio::spawn(lead(&cold, &arrival(1, 1)).claim());
    settle_down().await;
    let forgetting = begin(&cold, forget).await;
    assert!(!forgetting.is_finished(), "it waits for the replay");
    drop(held_up);
    let Ok(ClaimResult::Answer(answer)) = replaying.await.unwrap() else { panic!("claimed") };
    assert_eq!(replayed_body(&answer), "one");
    assert!(forgetting.await.unwrap().is_ok());
    let claimed = lead(&cold, &arrival(1, 1)).claim().await.unwrap();
    assert!(matches!(claimed, ClaimResult::Claimed(_)), "neither hot nor stored");
}

#[tokio::test]
async fn an_act_is_finished_even_if_nobody_waits_for_it() {
    let bench = bench();
    completed(&bench.ledger).await;
    let held_up = bench.store.held_up.lock().await;
    let forgetting = begin(&bench.ledger, forget).await;
    forgetting.abort();
    assert!(forgetting.await.unwrap_err().is_cancelled());
    let retry = waiting(&bench.ledger, &arrival(1, 1));
    drop(held_up);
    assert!(matches!(retry.settled(soon()).await, Ok(Settlement::Again)));
    assert!(stored(&bench).is_none());
    drop(claim(&bench.ledger).await);
}

#[tokio::test]
async fn an_act_whose_write_fails_leaves_the_stores_word() {
    for fault in [Fault::Refuse, Fault::LoseAnswer, Fault::Full] {
        let bench = bench();
        completed(&bench.ledger).await;
        bench.store.state.lock().unwrap().faults.push_back(Some(fault));
        let refusal = refusal(act(&bench.ledger, forget).await);
        assert!(matches!(refusal, Refusal::Store(_)), "{fault:?}: {refusal:?}");
        match fault {
            // It has landed: a copy in memory would contradict the store.
            Fault::LoseAnswer => drop(claim(&bench.ledger).await),
            Fault::Refuse | Fault::Full | Fault::Decline | Fault::Lost { .. } | Fault::Copied { .. } => {
                let answer = claim_answer(&bench.ledger, &arrival(1, 1)).await;
                assert_eq!(replayed_body(&answer), "one");
            }
        }
    }
}

#[tokio::test]
async fn an_act_does_not_wait_for_ever() {
    let bench = bench();
    unknown(&bench.ledger).await;
    let undecided = lead(&bench.ledger, &arrival(1, 1));
    assert!(bench.ledger.take_slot(ID, Duration::from_millis(20)).await.is_none());
    drop(undecided);
    assert!(bench.ledger.take_slot(ID, Duration::ZERO).await.is_some());
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_neither_shown_nor_touched() {
    let bench = bench();
    let value = Value { tag: tags::UNKNOWN, expires_at_ms: Some(u64::MAX), bytes: Bytes::from_static(b"\xffjunk") };
    bench.store.state.lock().unwrap().entries.insert(ID, Entry { version: Version(99), value });
    assert!(matches!(bench.ledger.show(ID, |_| policy()).await, Err(StoreError::Damaged { .. })));
    let before = stored(&bench);
    for decide in ALL {
        assert!(matches!(refusal(act(&bench.ledger, decide).await), Refusal::Store(_)));
    }
    assert_eq!(stored(&bench), before);
}

/// Fills the store with unknown records; the body of the value stands for a large response.
fn fill(bench: &Bench, count: u64, body_len: usize) {
    let mut state = bench.store.state.lock().unwrap();
    for n in 1..=count {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&n.to_be_bytes());
        let response = Response { status: 200, headers: Vec::new(), body: vec![b'x'; body_len].into() };
        let (completed_at, expires_at) = (START, START.plus(if n == 2 { 0 } else { 1000 }));
        let record = Record {
            origin: Origin { attempts: u32::try_from(n).unwrap(), ..arrival(1, 1).origin },
            fingerprint: arrival(1, 1).fingerprint,
            token: ClaimToken([1; 16]),
            state: State::Completed { response: Recorded::Full(response), completed_at, expires_at },
        };
        state.entries.insert(RecordId(id), Entry { version: Version(n), value: to_value(&policy(), &record) });
    }
}

fn numbers(listed: &Listed) -> Vec<u32> {
    listed.records.iter().map(|shown| shown.record.origin.attempts).collect()
}

#[tokio::test]
async fn a_list_goes_on_where_its_page_has_ended_and_leaves_out_what_has_expired() {
    let bench = bench();
    fill(&bench, 7, 1);
    let page = bench.ledger.list(None, 0, 3, |_| policy(), |_| true).await.unwrap();
    assert_eq!(numbers(&page), [1, 3, 4]);
    let rest = bench.ledger.list(None, page.next.unwrap(), 100, |_| policy(), |_| true).await.unwrap();
    assert_eq!((numbers(&rest), rest.next), (vec![5, 6, 7], None));
    let odd = bench.ledger.list(None, 0, 2, |_| policy(), |record| record.origin.attempts > 5).await.unwrap();
    assert_eq!(numbers(&odd), [6, 7]);
    let none = bench.ledger.list(Some(tags::UNKNOWN), 0, 10, |_| policy(), |_| true).await.unwrap();
    assert_eq!((numbers(&none), none.next), (vec![], None));
}

#[tokio::test]
async fn a_page_is_bounded_work() {
    let bench = bench();
    fill(&bench, 5000, 1);
    let (mut after, mut pages) = (0, 0);
    loop {
        let visits = std::cell::Cell::new(0);
        let wanted = |record: &Record| {
            visits.set(visits.get() + 1);
            record.origin.attempts == 4999
        };
        let page = bench.ledger.list(None, after, 1000, |_| policy(), wanted).await.unwrap();
        pages += 1;
        assert!(visits.get() <= 2048, "{}", visits.get());
        let Some(next) = page.next else {
            assert_eq!(numbers(&page), [4999]);
            break;
        };
        assert!(page.records.is_empty());
        after = next;
    }
    assert_eq!(pages, 3);
    let large = self::bench();
    fill(&large, 100, 1 << 20);
    let page = large.ledger.list(None, 0, 1000, |_| policy(), |_| true).await.unwrap();
    assert!(page.next.is_some() && page.records.len() <= 64, "{}", page.records.len());
}
