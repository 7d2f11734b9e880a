//! Duplicates at several gateways: one is executed, and all get its answer soon.

use crate::fleet::{DATE, Fleet, assert_same};
use crate::server::Engine;
use crate::support::{Gate, Upstream, eventually};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Who waits looks at the store by himself once a second, if no word comes.
const WORD: Duration = Duration::from_millis(500);

/// Holds each key at a gate of its own, and says which run it is.
fn gated() -> (Upstream, impl Fn(&str) -> Gate) {
    let gates = Arc::new(Mutex::new(HashMap::<String, Gate>::new()));
    let gate = move |key: &str| gates.lock().unwrap().entry(key.to_owned()).or_default().clone();
    let of = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        gate(request.key().unwrap()).wait();
        reply.send(201, &[("X-Run", &request.number.to_string())], format!("run {}", request.number));
    });
    (upstream, of)
}

#[track_caller]
fn wait_for_waiters(fleet: &Fleet, gateway: usize, count: usize) {
    eventually("so many wait", || (fleet.gateways[gateway].metric("oncegate_waiters") == count as f64).then_some(()));
}

fn of_64_duplicates_at_three_gateways_one_is_executed_and_all_get_its_answer(engine: Engine) {
    let (upstream, gate) = gated();
    // A store of its own, whose connections are counted.
    let Some(fleet) = Fleet::alone(engine, 3, upstream, "") else { return };
    gate("warm").open();
    (0..3).for_each(|gateway| assert_eq!(fleet.post(gateway, "warm").status, 201));
    let quiet = fleet.server.connections();
    let mut clients = (0..64).map(|n| fleet.begin(n % 3, "k")).collect::<Vec<_>>();
    fleet.upstream.wait_for(2);
    let owners = |gateway: usize| {
        let forwards = fleet.gateways[gateway].metric("oncegate_upstream_in_flight");
        forwards as usize
    };
    let owner = (0..3).find(|gateway| owners(*gateway) == 1).unwrap();
    for gateway in 0..3 {
        let sent = (0..64).filter(|n| n % 3 == gateway).count();
        wait_for_waiters(&fleet, gateway, sent - usize::from(gateway == owner));
    }
    // What it takes to be told, once for each gateway.
    let busy = fleet.server.connections();
    assert!(busy <= quiet + 3 && busy <= 3 * 6, "{quiet} connections, {busy} with 63 waiters");
    // Another payload does not wait, wherever it comes.
    (0..3).for_each(|gateway| fleet.gateways[gateway].post("k", "[]").expect_problem(422, "key_reused"));
    gate("k").open();
    for client in &mut clients {
        let answer = client.read();
        assert_eq!((answer.status, answer.text().as_str(), answer.header("x-run")), (201, "run 2", Some("2")));
    }
    fleet.executed_once("k");
}

fn word_comes_to_those_who_wait_elsewhere(engine: Engine) {
    let (upstream, gate) = gated();
    let Some(fleet) = Fleet::start(engine, 3, upstream, "") else { return };
    let keys = (0..6).map(|n| format!("k{n}")).collect::<Vec<_>>();
    let mut owners = keys.iter().map(|key| fleet.begin(0, key)).collect::<Vec<_>>();
    fleet.upstream.wait_for(keys.len());
    let mut waiters = keys.iter().map(|key| [fleet.begin(1, key), fleet.begin(2, key)]).collect::<Vec<_>>();
    [1, 2].iter().for_each(|gateway| wait_for_waiters(&fleet, *gateway, keys.len()));
    // Until their own looks are a second apart.
    thread::sleep(Duration::from_millis(1600));
    for ((key, owner), waiters) in keys.iter().zip(&mut owners).zip(&mut waiters) {
        gate(key).open();
        let first = owner.read();
        let settled = Instant::now();
        for waiter in waiters {
            let answer = waiter.read();
            assert!(settled.elapsed() < WORD, "{key}: only after {:?}", settled.elapsed());
            assert!(answer.replayed());
            assert_same(key, &first, &answer);
        }
        fleet.executed_once(key);
        // So that a look of theirs does not come just in time for all of the keys.
        thread::sleep(Duration::from_millis(130));
    }
}

fn a_replay_at_another_gateway_is_the_first_answer_byte_for_byte(engine: Engine) {
    let upstream = Upstream::scripted(|request, reply| {
        let headers = [
            ("Date", DATE),
            ("Content-Type", "application/octet-stream"),
            ("Location", "/posts/7"),
            ("X-Two", "one"),
            ("X-Two", "two"),
            ("Set-Cookie", "not=recorded"),
        ];
        let body = (0..100_000).map(|n: usize| (n * 7 + request.number) as u8).collect::<Vec<_>>();
        reply.send(201, &headers, body);
    });
    let Some(fleet) = Fleet::start(engine, 3, upstream, "") else { return };
    let first = fleet.post(0, "k");
    assert!(!first.replayed());
    for gateway in 0..3 {
        // The second time from its cache.
        for _ in 0..2 {
            let replay = fleet.post(gateway, "k");
            assert!(replay.replayed());
            assert_eq!(replay.body, first.body);
            assert_same("k", &first, &replay);
            assert_eq!(replay.header("set-cookie"), None);
        }
        fleet.gateways[gateway].post("k", "[]").expect_problem(422, "key_reused");
    }
    fleet.executed_once("k");
}

fn those_who_wait_elsewhere_try_for_themselves_when_nothing_was_executed(engine: Engine) {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        held.wait();
        match request.number {
            1 => reply.send(429, &[("Retry-After", "1")], "slower"),
            n => reply.send(201, &[], format!("run {n}")),
        }
    });
    let Some(fleet) = Fleet::start(engine, 2, upstream, "") else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    let mut elsewhere = (0..8).map(|_| fleet.begin(1, "k")).collect::<Vec<_>>();
    wait_for_waiters(&fleet, 1, 8);
    gate.open();
    assert_eq!(owner.read().status, 429);
    for client in &mut elsewhere {
        let answer = client.read();
        assert_eq!((answer.status, answer.text().as_str()), (201, "run 2"));
    }
    assert_eq!(fleet.upstream.count(), 2);
}

fn a_wait_elsewhere_has_its_end(engine: Engine) {
    let (upstream, gate) = gated();
    let Some(fleet) = Fleet::start(engine, 2, upstream, "idempotency.wait_timeout = \"300ms\"") else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    let began = Instant::now();
    let answer = fleet.post(1, "k");
    answer.expect_problem(409, "in_progress");
    assert_eq!(answer.header("retry-after"), Some("1"));
    let waited = began.elapsed();
    assert!(waited >= Duration::from_millis(300) && waited < Duration::from_secs(2), "{waited:?}");
    gate("k").open();
    assert_eq!(owner.read().text(), "run 1");
    assert_eq!(fleet.settled(1, "k").text(), "run 1");
}

fn where_nobody_waits_a_duplicate_elsewhere_is_a_conflict_at_once(engine: Engine) {
    let (upstream, gate) = gated();
    let Some(fleet) = Fleet::start(engine, 2, upstream, "idempotency.concurrent = \"conflict\"") else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    for gateway in 0..2 {
        fleet.post(gateway, "k").expect_problem(409, "in_progress");
    }
    gate("k").open();
    assert_eq!(owner.read().text(), "run 1");
    assert_eq!(fleet.post(1, "k").text(), "run 1");
}

fn one_who_waits_elsewhere_in_vain_hands_the_watch_over(engine: Engine) {
    let (upstream, gate) = gated();
    let Some(fleet) = Fleet::start(engine, 2, upstream, "idempotency.wait_timeout = \"2s\"") else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    // It has looked into the store for all who come behind it.
    let mut leads = fleet.begin(1, "k");
    wait_for_waiters(&fleet, 1, 1);
    thread::sleep(Duration::from_secs(1));
    let mut follow = (0..8).map(|_| fleet.begin(1, "k")).collect::<Vec<_>>();
    wait_for_waiters(&fleet, 1, 9);
    leads.read().expect_problem(409, "in_progress");
    wait_for_waiters(&fleet, 1, 8);
    gate("k").open();
    assert_eq!(owner.read().text(), "run 1");
    follow.iter_mut().for_each(|client| assert_eq!(client.read().text(), "run 1"));
    fleet.executed_once("k");
}

for_each_store! {
    of_64_duplicates_at_three_gateways_one_is_executed_and_all_get_its_answer
    word_comes_to_those_who_wait_elsewhere
    a_replay_at_another_gateway_is_the_first_answer_byte_for_byte
    those_who_wait_elsewhere_try_for_themselves_when_nothing_was_executed
    a_wait_elsewhere_has_its_end
    where_nobody_waits_a_duplicate_elsewhere_is_a_conflict_at_once
    one_who_waits_elsewhere_in_vain_hands_the_watch_over
}
