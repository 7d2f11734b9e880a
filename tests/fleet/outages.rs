//! The store out of reach, slow, or its answers lost: what callers get, and that nothing is executed twice or stuck.

use crate::fleet::{Fleet, LEASE, TIMEOUT, assert_same, takes};
use crate::http::problem;
use crate::server::{Engine, Server};
use crate::support::{Gate, Response, Upstream, eventually, request};
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

/// Beyond the store's own time limit: for a machine that is busy.
const MARGIN: Duration = Duration::from_millis(800);

/// What a client gets in the end that comes again as long as it is told that the store is unavailable, or the key busy.
#[track_caller]
fn succeeds(fleet: &Fleet, gateway: usize, key: &str) -> Response {
    let answer = fleet.settled(gateway, key);
    assert_eq!(answer.status, 201, "{key}: {answer:?}");
    fleet.executed_once(key);
    answer
}

#[track_caller]
fn expect_unavailable(answer: &Response) {
    answer.expect_problem(503, "store_unavailable");
    assert_eq!(answer.header("retry-after"), Some("1"), "{answer:?}");
}

fn without_the_store_keyed_requests_are_refused_and_all_else_passes(engine: Engine) {
    let Some(mut fleet) = Fleet::alone(engine, 1, Upstream::counting(), "") else { return };
    fleet.join("admin.ready_needs_store = true", &[]).unwrap();
    assert_eq!(fleet.post(0, "before").status, 201);
    for gateway in &fleet.gateways {
        let ready = gateway.admin("/readyz");
        assert_eq!(ready.status, 200, "{ready:?}");
    }
    fleet.server.kill();
    for gateway in [0, 1] {
        expect_unavailable(&fleet.post(gateway, "k"));
        fleet.wait_for_store(gateway, false);
        let began = Instant::now();
        for n in 0..20 {
            expect_unavailable(&fleet.post(gateway, &format!("k{n}")));
        }
        assert!(began.elapsed() < 20 * TIMEOUT / 2, "who knows that it is gone does not try for long each time");
    }
    let keyed = fleet.upstream.requests().iter().filter(|request| request.key().is_some()).count();
    assert_eq!(keyed, 1, "nothing is sent without a claim");
    // What was hot stays so.
    assert!(fleet.post(0, "before").replayed());
    for gateway in &fleet.gateways {
        assert_eq!(gateway.call(request("POST", "/posts", &[], "{}")).status, 201);
        assert_eq!(gateway.call(request("GET", "/posts", &[], "")).status, 201);
        assert_eq!(gateway.admin("/livez").status, 200);
    }
    let ready = fleet.gateways.iter().map(|gateway| gateway.admin("/readyz")).collect::<Vec<_>>();
    assert_eq!((ready[0].status, ready[1].status), (200, 503), "{ready:?}");
    assert!(ready.iter().all(|ready| ready.text().contains("unreachable")), "{ready:?}");
    fleet.server.restart();
    for gateway in [0, 1] {
        fleet.wait_for_store(gateway, true);
        assert_eq!(fleet.gateways[gateway].admin("/readyz").status, 200);
    }
    succeeds(&fleet, 0, "k");
    assert!(fleet.post(1, "k").replayed());
    assert!(fleet.post(1, "before").replayed(), "it was on disk");
    fleet.executed_once("before");
}

fn a_store_that_answers_nothing_refuses_in_time_and_hangs_nobody(engine: Engine) {
    let Some(fleet) = Fleet::alone(engine, 2, Upstream::counting(), "") else { return };
    assert_eq!(fleet.post(0, "before").status, 201);
    fleet.server.pause();
    let began = Instant::now();
    let mut clients = (0..20).map(|n| fleet.begin(0, &format!("k{n}"))).collect::<Vec<_>>();
    clients.iter_mut().for_each(|client| expect_unavailable(&client.read()));
    let took = began.elapsed();
    assert!(took < TIMEOUT + MARGIN, "{took:?}");
    assert_eq!(fleet.upstream.count(), 1);
    let began = Instant::now();
    fleet.gateways[0].admin("/metrics");
    fleet.gateways[0].admin("/readyz");
    assert!(began.elapsed() < MARGIN, "{:?}", began.elapsed());
    fleet.server.resume();
    // What had been sent by then may land now, and is given back.
    (0..20).for_each(|n| drop(succeeds(&fleet, n % 2, &format!("k{n}"))));
}

fn a_claim_whose_answer_is_lost_is_executed_once_or_given_back(engine: Engine) {
    let Some(fleet) = Fleet::start(engine, 2, Upstream::counting(), "") else { return };
    let mut refused = 0;
    for n in 0..20 {
        let key = format!("lost-{n}-");
        // Several times in a row: its second try, too.
        let times = 1 + n % 4;
        let before = fleet.proxies[0].lost();
        (0..times).for_each(|_| fleet.proxies[0].lose_answer_to(&key));
        let began = Instant::now();
        let first = fleet.post(0, &key);
        assert!(began.elapsed() < TIMEOUT + MARGIN, "{:?}", began.elapsed());
        assert!(fleet.proxies[0].lost() > before, "the answer was lost");
        fleet.proxies[0].mend();
        match problem(&first).as_deref() {
            None => assert_eq!(first.status, 201, "{first:?}"),
            Some("store_unavailable") => refused += 1,
            _ => panic!("{first:?}"),
        }
        let last = succeeds(&fleet, 1, &key);
        if first.status == 201 {
            assert_same(&key, &first, &last);
        }
        assert_eq!(succeeds(&fleet, 0, &key).text(), last.text());
    }
    assert!(refused < 20, "the second try finds the claim");
}

fn a_single_lost_answer_costs_a_caller_nothing(engine: Engine) {
    let Some(fleet) = Fleet::start(engine, 1, Upstream::counting(), "") else { return };
    for n in 0..5 {
        let key = format!("lost-{n}-");
        fleet.proxies[0].lose_answer_to(&key);
        assert_eq!(fleet.post(0, &key).status, 201);
        assert_eq!(fleet.proxies[0].lost(), n + 1);
        fleet.executed_once(&key);
    }
}

/// On its way for longer than anybody waits.
fn a_claim_that_arrives_late_is_refused_by_the_store_or_given_back(engine: Engine) {
    for late in [TIMEOUT * 5 / 4, TIMEOUT * 4] {
        let Some(fleet) = Fleet::start(engine, 2, Upstream::counting(), "") else { return };
        for n in 0..3 {
            let key = format!("late-{n}-");
            fleet.proxies[0].hold(&key);
            let began = Instant::now();
            let mut client = fleet.begin(0, &key);
            eventually("the claim is on its way", || (fleet.proxies[0].held() > 0).then_some(()));
            let first = client.read();
            let took = began.elapsed();
            assert!(took < TIMEOUT + MARGIN, "{took:?}");
            thread::sleep(late.saturating_sub(began.elapsed()));
            fleet.proxies[0].release();
            let executed = fleet.upstream.executions(&key);
            match problem(&first).as_deref() {
                // Its second try, on another connection, has been quick enough.
                None => assert_eq!((first.status, executed), (201, 1), "{first:?}"),
                Some("store_unavailable") => assert_eq!(executed, 0),
                _ => panic!("{first:?}"),
            }
            let last = succeeds(&fleet, 1, &key);
            if executed == 1 {
                assert_same(&key, &first, &last);
            }
            assert_eq!(succeeds(&fleet, 0, &key).text(), last.text());
        }
    }
}

/// The second copy of a claim is quick; the first arrives once the key has been given back.
fn a_copy_of_a_claim_that_arrives_after_the_key_was_freed_leaves_it_free(engine: Engine) {
    let seen = Mutex::new(BTreeSet::new());
    let upstream = Upstream::scripted(move |request, reply| {
        let throttled = seen.lock().unwrap().insert(request.key().map(str::to_owned));
        reply.send(if throttled { 429 } else { 201 }, &[], format!("run {}", request.number));
    });
    let Some(fleet) = Fleet::start(engine, 2, upstream, "") else { return };
    for n in 0..3 {
        let key = format!("copy-{n}-");
        fleet.proxies[0].hold(&key);
        let first = fleet.post(0, &key);
        fleet.proxies[0].release();
        if problem(&first).is_some() {
            first.expect_problem(503, "store_unavailable");
            continue; // The second copy was not quick enough, on a machine that is busy.
        }
        assert_eq!(first.status, 429, "{first:?}");
        let last = fleet.settled(1, &key);
        assert_eq!((last.status, fleet.upstream.executions(&key)), (201, 2), "{last:?}");
        assert_same(&key, &last, &fleet.settled(0, &key));
    }
}

fn an_outcome_that_finds_no_store_is_delivered_and_recorded_later(engine: Engine) {
    // Back before the lease is over, and after it.
    for outage in [Duration::ZERO, LEASE + LEASE / 4] {
        let gate = Gate::default();
        let Some(fleet) = Fleet::alone(engine, 2, Upstream::holding(&gate), "") else { return };
        let mut owner = fleet.begin(0, "k");
        fleet.upstream.wait_for(1);
        fleet.server.kill();
        fleet.wait_for_store(0, false);
        gate.open();
        let began = Instant::now();
        let first = owner.read();
        assert_eq!((first.status, first.text().as_str()), (201, "run 1"), "the caller is not to suffer");
        assert!(began.elapsed() < TIMEOUT + MARGIN);
        let held = |gauge: &str| fleet.gateways[0].metric(gauge);
        assert_eq!(held("oncegate_upstream_in_flight"), 1.0, "what waits to be recorded counts against the limits");
        assert!(held("oncegate_buffered_bytes") >= "run 1".len() as f64);
        thread::sleep(outage);
        fleet.server.restart();
        fleet.wait_for_store(1, true);
        let replay = eventually("it is recorded", || Some(fleet.post(1, "k")).filter(|answer| answer.status == 201));
        assert!(replay.replayed(), "{replay:?}");
        assert_same("k", &first, &replay);
        assert_same("k", &first, &fleet.settled(0, "k"));
        fleet.executed_once("k");
        eventually("and no more then", || (held("oncegate_upstream_in_flight") == 0.0).then_some(()));
    }
}

fn a_gateway_that_is_stopped_meanwhile_records_it_before_it_ends(engine: Engine) {
    let gate = Gate::default();
    let Some(mut fleet) = Fleet::alone(engine, 2, Upstream::holding(&gate), "") else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    fleet.server.kill();
    fleet.wait_for_store(0, false);
    gate.open();
    let first = owner.read();
    assert_eq!((first.status, first.text().as_str()), (201, "run 1"));
    drop(owner);
    fleet.gateways[0].terminate();
    fleet.gateways[0].wait_for_log("draining");
    fleet.server.restart();
    assert_eq!(fleet.gateways[0].wait(), Some(0));
    fleet.wait_for_store(1, true);
    let replay = fleet.post(1, "k");
    assert!(replay.replayed(), "{replay:?}");
    assert_same("k", &first, &replay);
    fleet.executed_once("k");
}

fn a_gateway_that_is_stopped_without_its_store_ends_all_the_same(engine: Engine) {
    let gate = Gate::default();
    let brief = "server.drain_timeout = \"500ms\"";
    let Some(mut fleet) = Fleet::alone(engine, 2, Upstream::holding(&gate), brief) else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    fleet.server.kill();
    fleet.wait_for_store(0, false);
    gate.open();
    assert_eq!(owner.read().status, 201);
    drop(owner);
    fleet.gateways[0].terminate();
    assert_eq!(fleet.gateways[0].wait(), Some(0));
    fleet.server.restart();
    fleet.wait_for_store(1, true);
    fleet.settled(1, "k").expect_problem(409, "outcome_unknown");
    fleet.executed_once("k");
}

/// It answers, but does not take a record of that size.
fn a_response_that_the_store_refuses_is_delivered_and_recorded_without_its_body(engine: Engine) {
    let body = "x".repeat(2 << 20);
    let large = body.clone();
    let upstream = Upstream::scripted(move |_, reply| reply.send(201, &[("Location", "/posts/1")], &large));
    let further = "idempotency.max_recorded_body = \"4MiB\"";
    let Some(fleet) = Fleet::alone(engine, 2, upstream, further) else { return };
    match &*fleet.server {
        Server::Redis(server) => {
            server.lock().unwrap().client().ask(&["CONFIG", "SET", "proto-max-bulk-len", "1mb"]);
        }
        Server::Postgres(_) => {
            let table = format!("{}_records", fleet.prefix);
            fleet.server.sql(&format!("ALTER TABLE {table} ADD CHECK (octet_length(value) < 1048576)"));
        }
    }
    for key in ["k1", "k2"] {
        let first = fleet.post(0, key);
        assert_eq!((first.status, first.text() == body), (201, true), "the caller is not to suffer");
        for gateway in [0, 1] {
            let problem = fleet.settled(gateway, key);
            problem.expect_problem(409, "body_not_recorded");
            assert_eq!(problem.json()["location"], "/posts/1", "{problem:?}");
        }
        fleet.executed_once(key);
    }
    assert!(fleet.gateways[0].metric("oncegate_settle_failures_total") >= 2.0);
}

fn a_settlement_whose_answer_is_lost_is_recorded_once(engine: Engine) {
    let gate = Gate::default();
    let Some(fleet) = Fleet::start(engine, 2, Upstream::holding(&gate), "") else { return };
    let keys = (0..6).map(|n| format!("settle-{n}-")).collect::<Vec<_>>();
    let mut owners = keys.iter().map(|key| fleet.begin(0, key)).collect::<Vec<_>>();
    fleet.upstream.wait_for(keys.len());
    keys.iter().for_each(|key| fleet.proxies[0].lose_answer_to(key));
    gate.open();
    for (key, owner) in keys.iter().zip(&mut owners) {
        let first = owner.read();
        assert_eq!(first.status, 201, "{first:?}");
        assert_same(key, &first, &succeeds(&fleet, 1, key));
    }
    assert!(fleet.proxies[0].lost() > 0);
}

fn those_who_wait_elsewhere_live_through_an_outage(engine: Engine) {
    let gate = Gate::default();
    let Some(fleet) = Fleet::start(engine, 2, Upstream::holding(&gate), "") else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    let mut waiter = fleet.begin(1, "k");
    eventually("it waits", || (fleet.gateways[1].metric("oncegate_waiters") == 1.0).then_some(()));
    // Shorter than a lease.
    fleet.proxies.iter().for_each(|proxy| proxy.refuse(true));
    fleet.wait_for_store(1, false);
    fleet.proxies.iter().for_each(|proxy| proxy.refuse(false));
    fleet.wait_for_store(0, true);
    fleet.wait_for_store(1, true);
    gate.open();
    let (first, second) = (owner.read(), waiter.read());
    assert_eq!((first.status, first.text().as_str()), (201, "run 1"));
    assert_same("k", &first, &second);
    fleet.executed_once("k");
}

fn where_the_operator_says_so_requests_pass_without_a_record_and_are_counted(engine: Engine) {
    let Some(fleet) = Fleet::alone(engine, 1, Upstream::counting(), "idempotency.on_store_error = \"pass\"") else {
        return;
    };
    let passes = || fleet.gateways[0].metric("oncegate_unrecorded_passes_total");
    assert_eq!(fleet.post(0, "before").status, 201);
    assert_eq!(passes(), 0.0);
    fleet.server.kill();
    for n in 1..=3 {
        let answer = fleet.post(0, "k");
        assert_eq!((answer.status, answer.replayed()), (201, false));
        assert_eq!((fleet.upstream.executions("k"), passes()), (n, n as f64), "that is what he has chosen");
    }
    fleet.server.restart();
    fleet.wait_for_store(0, true);
    eventually("it is recorded again", || fleet.post(0, "k").replayed().then_some(()));
    assert_eq!(fleet.upstream.executions("k"), 4);
}

/// Who has started before it and who starts after it would make different ids of one key.
fn a_store_that_is_emptied_is_used_no_more_by_those_who_knew_it(engine: Engine) {
    let Some(mut fleet) = Fleet::alone(engine, 2, Upstream::counting(), "cache.max_bytes = 0") else { return };
    assert_eq!(fleet.post(0, "before").status, 201);
    fleet.server.empty(&fleet.prefix);
    for gateway in [0, 1] {
        fleet.wait_for_store(gateway, false);
    }
    fleet.join("cache.max_bytes = 0", &[]).unwrap();
    assert_eq!(fleet.post(2, "after").status, 201);
    for gateway in [0, 1] {
        expect_unavailable(&fleet.post(gateway, "after"));
        let log = fleet.gateways[gateway].log();
        let told = log.lines().filter(|line| line.contains("ERROR") && line.contains("not the store that the gateway"));
        assert_eq!(told.count(), 1, "told once: {log}");
    }
    fleet.executed_once("after");
    // All keys are new to it.
    fleet.restart(0);
    assert!(fleet.post(0, "after").replayed());
    assert!(!fleet.post(0, "before").replayed());
}

fn a_gateway_whose_connections_are_cut_connects_again_by_itself(engine: Engine) {
    let Some(fleet) = Fleet::start(engine, 2, Upstream::counting(), "") else { return };
    for n in 0..30 {
        let key = format!("k{n}");
        assert!(fleet.proxies[0].cut() > 0 || n > 0);
        succeeds(&fleet, 0, &key);
        assert!(fleet.settled(1, &key).replayed());
    }
    let back = takes("the store is there", || fleet.gateways[0].metric("oncegate_store_unreachable") == 0.0);
    assert!(back < Duration::from_secs(5), "{back:?}");
}

for_each_store! {
    without_the_store_keyed_requests_are_refused_and_all_else_passes
    a_store_that_answers_nothing_refuses_in_time_and_hangs_nobody
    a_claim_whose_answer_is_lost_is_executed_once_or_given_back
    a_single_lost_answer_costs_a_caller_nothing
    a_claim_that_arrives_late_is_refused_by_the_store_or_given_back
    a_copy_of_a_claim_that_arrives_after_the_key_was_freed_leaves_it_free
    an_outcome_that_finds_no_store_is_delivered_and_recorded_later
    a_gateway_that_is_stopped_meanwhile_records_it_before_it_ends
    a_gateway_that_is_stopped_without_its_store_ends_all_the_same
    a_response_that_the_store_refuses_is_delivered_and_recorded_without_its_body
    a_settlement_whose_answer_is_lost_is_recorded_once
    those_who_wait_elsewhere_live_through_an_outage
    where_the_operator_says_so_requests_pass_without_a_record_and_are_counted
    a_gateway_whose_connections_are_cut_connects_again_by_itself
    a_store_that_is_emptied_is_used_no_more_by_those_who_knew_it
}
