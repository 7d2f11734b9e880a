//! Lookups beside other requests with the same key.

use super::{LOOKUP, lookups, sent, unknown, upstream, waiters};
use crate::support::{Client, Gate, Gateway, Upstream, eventually, post, request};

/// An upstream that holds its answers to questions until the gate opens.
fn holding(gate: &Gate, status: u16) -> Upstream {
    let gate = gate.clone();
    upstream(move |_, reply| {
        gate.wait();
        reply.send(status, &[], "found");
    })
}

#[test]
fn a_request_in_flight_is_never_looked_up_nor_one_that_may_still_be_answered_late() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let gateway = Gateway::start(
        &upstream,
        &format!("{LOOKUP}idempotency.wait_timeout = \"50ms\"\nupstream.response_timeout = \"700ms\"\n"),
    );
    let mut first = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(1);
    let in_flight = gateway.post("k", "{}");
    in_flight.expect_problem(409, "in_progress");
    first.read().expect_problem(504, "upstream_timeout");
    let late = gateway.post("k", "{}");
    late.expect_problem(409, "in_progress");
    assert_eq!((in_flight.header("retry-after"), late.header("retry-after")), (Some("1"), Some("5")));
    assert_eq!(upstream.count(), 1);
    let mut waiting = sent(&gateway, post("/posts", "k", "{}"));
    gate.open();
    let answer = waiting.read();
    assert!(answer.status == 409 || answer.text() == "run 1", "{answer:?}");
    eventually("the late answer is there", || gateway.post("k", "{}").replayed().then_some(()));
    assert_eq!(upstream.count(), 1, "nothing was asked");
}

#[test]
fn another_payload_is_refused_without_a_question_and_while_one_is_asked() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200);
    let gateway = unknown(&upstream, "");
    gateway.post("k", "[]").expect_problem(422, "key_reused");
    assert_eq!(upstream.count(), 1);
    let mut asks = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(2);
    gateway.post("k", "[]").expect_problem(422, "key_reused");
    gate.open();
    assert_eq!(asks.read().text(), "found");
    gateway.post("k", "[]").expect_problem(422, "key_reused");
    assert_eq!(upstream.count(), 2);
}

/// 30 retries at once, all of them there before the question is answered.
fn thirty(gateway: &Gateway, upstream: &Upstream, gate: &Gate) -> Vec<crate::support::Response> {
    let mut clients = (0..30).map(|_| sent(gateway, post("/posts", "k", "{}"))).collect::<Vec<_>>();
    upstream.wait_for(2);
    waiters(gateway, 29);
    gate.open();
    clients.iter_mut().map(Client::read).collect()
}

#[test]
fn of_many_retries_one_asks_and_all_get_what_was_found() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200);
    let gateway = unknown(&upstream, "");
    for answer in thirty(&gateway, &upstream, &gate) {
        assert_eq!((answer.text().as_str(), answer.replayed()), ("found", true));
    }
    assert_eq!(upstream.count(), 2);
}

#[test]
fn of_many_retries_one_asks_and_one_is_executed() {
    let gate = Gate::default();
    let upstream = holding(&gate, 404);
    let gateway = unknown(&upstream, "");
    let answers = thirty(&gateway, &upstream, &gate);
    assert!(answers.iter().all(|answer| (answer.status, answer.text().as_str()) == (201, "executed anew")));
    assert_eq!(answers.iter().filter(|answer| !answer.replayed()).count(), 1);
    assert_eq!((lookups(&upstream), upstream.executions("k")), (1, 2));
}

#[test]
fn of_many_retries_one_asks_in_vain_for_all() {
    for (status, min_age, code) in [(500, "0s", "outcome_unknown"), (404, "1h", "in_progress")] {
        let gate = Gate::default();
        let upstream = holding(&gate, status);
        let gateway = Gateway::start(&upstream, &LOOKUP.replace("0s", min_age));
        gateway.post("k", "{}").expect_problem(502, "upstream_broken");
        for answer in thirty(&gateway, &upstream, &gate) {
            answer.expect_problem(409, code);
        }
        assert_eq!((lookups(&upstream), upstream.executions("k")), (1, 1), "all heard it");
        gateway.post("k", "{}").expect_problem(409, code);
        assert_eq!(lookups(&upstream), 2, "who comes later asks again");
    }
}

#[test]
fn a_waiter_waits_no_longer_than_wait_timeout_for_a_question() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200);
    let gateway = unknown(&upstream, "idempotency.wait_timeout = \"50ms\"\n");
    let mut asks = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(2);
    let waiter = gateway.post("k", "{}");
    waiter.expect_problem(409, "in_progress");
    assert!(waiter.header("retry-after").is_some());
    gate.open();
    assert_eq!(asks.read().text(), "found");
}

#[test]
fn with_conflict_a_retry_during_a_question_is_refused_at_once() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200);
    let gateway = unknown(&upstream, "idempotency.concurrent = \"conflict\"\nidempotency.wait_timeout = \"1h\"\n");
    let mut asks = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(2);
    for _ in 0..3 {
        let refused = gateway.post("k", "{}");
        refused.expect_problem(409, "in_progress");
        assert!(refused.header("retry-after").is_some());
    }
    assert_eq!(lookups(&upstream), 1);
    gate.open();
    assert_eq!(asks.read().text(), "found");
}

fn by(caller: &str) -> String {
    request("POST", "/posts", &[("Authorization", caller), ("Idempotency-Key", "k")], "{}")
}

#[test]
fn whoever_has_other_credentials_asks_with_his_own_one_at_a_time() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = upstream(move |request, reply| {
        held.wait();
        let owner = request.header("authorization") == Some("Bearer owner");
        if owner { reply.send(200, &[], "found") } else { reply.send(403, &[], "no") }
    });
    let gateway = Gateway::start(
        &upstream,
        &format!("{LOOKUP}idempotency.scope = [\"path\"]\nidempotency.replay_auth = \"none\"\n"),
    );
    gateway.call(by("Bearer owner")).expect_problem(502, "upstream_broken");
    let mut stranger = sent(&gateway, by("Bearer stranger"));
    upstream.wait_for(2);
    let mut others = ["Bearer stranger", "Bearer owner"].map(|caller| sent(&gateway, by(caller)));
    waiters(&gateway, 2);
    gate.open();
    stranger.read().expect_problem(409, "outcome_unknown");
    let [like, owner] = others.each_mut().map(Client::read);
    // He heard what the one before him heard, or came to look when the owner had found it.
    assert!(like.status == 409 || like.text() == "found", "{like:?}");
    assert_eq!((owner.text().as_str(), owner.replayed()), ("found", true));
    let asked = upstream.requests().split_off(1);
    let asked = asked.iter().map(|request| request.header("authorization").unwrap()).collect::<Vec<_>>();
    assert_eq!(asked, ["Bearer stranger", "Bearer owner"]);
}

#[test]
fn a_client_that_hangs_up_changes_nothing() {
    for (status, found, executions) in [(200, "found", 1), (404, "executed anew", 2)] {
        let gate = Gate::default();
        let upstream = holding(&gate, status);
        let gateway = unknown(&upstream, "");
        sent(&gateway, post("/posts", "k", "{}")).stream.shutdown(std::net::Shutdown::Both).unwrap();
        let client = sent(&gateway, post("/posts", "k", "{}"));
        upstream.wait_for(2);
        client.reset();
        gate.open();
        let completed = "oncegate_records{state=\"completed\"}";
        eventually("it is settled", || (gateway.metric(completed) == 1.0).then_some(()));
        let retry = gateway.post("k", "{}");
        assert_eq!((retry.text().as_str(), retry.replayed()), (found, true));
        assert_eq!((lookups(&upstream), upstream.executions("k")), (1, executions));
    }
}

#[test]
fn at_the_end_of_a_drain_a_question_is_given_up_and_nothing_is_sent() {
    let gate = Gate::default();
    let upstream = holding(&gate, 404);
    let mut gateway = unknown(&upstream, "server.drain_timeout = \"300ms\"\nidempotency.lookup.timeout = \"1h\"\n");
    let mut retry = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(2);
    gateway.terminate();
    let answer = retry.read();
    answer.expect_problem(503, "draining");
    assert_eq!(answer.header("retry-after"), Some("5"));
    assert_eq!(gateway.wait(), Some(0), "{}", gateway.log());
    gate.open();
    let gateway = gateway.again(&[]).unwrap();
    assert_eq!(gateway.metric("oncegate_records{state=\"unknown\"}"), 1.0);
    assert_eq!(upstream.executions("k"), 1);
    assert_eq!(gateway.post("k", "{}").text(), "executed anew");
}

#[test]
fn within_the_drain_a_question_is_waited_for() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200);
    let mut gateway = unknown(&upstream, "");
    let mut retry = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(2);
    gateway.terminate();
    gateway.wait_for_log("drain");
    gate.open();
    assert_eq!(retry.read().text(), "found");
    assert_eq!(gateway.wait(), Some(0), "{}", gateway.log());
    let gateway = gateway.again(&[]).unwrap();
    assert!(gateway.post("k", "{}").replayed());
    assert_eq!(lookups(&upstream), 1);
}

#[test]
fn a_gateway_killed_while_it_asks_leaves_the_record_as_it_was() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200);
    let mut gateway = unknown(&upstream, "");
    let _retry = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(2);
    gateway.kill();
    gate.open();
    let gateway = gateway.again(&[]).unwrap();
    assert_eq!(gateway.metric("oncegate_records{state=\"unknown\"}"), 1.0);
    assert_eq!(gateway.post("k", "{}").text(), "found");
    assert_eq!((lookups(&upstream), upstream.executions("k")), (2, 1));
}

#[test]
fn beyond_max_in_flight_nothing_is_asked() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200);
    let gateway = unknown(&upstream, "upstream.max_in_flight = 1\n");
    gateway.post("other", "{}").expect_problem(502, "upstream_broken");
    let mut asks = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(3);
    gateway.post("other", "{}").expect_problem(503, "overloaded");
    assert_eq!(lookups(&upstream), 1);
    gate.open();
    assert_eq!(asks.read().text(), "found");
}
