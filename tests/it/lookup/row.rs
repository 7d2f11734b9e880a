//! Gateways in a row: what one behind answers by itself to a question is no word on what became of a request.

use super::{LOOKUP, sent, unknown, upstream};
use crate::support::{Client, Gate, Gateway, Upstream, eventually, post};
use std::net::TcpListener;

const SHORT: &str = "upstream.response_timeout = \"200ms\"\nupstream.late_window = \"0s\"\n";

fn before(gateway: &Gateway, settings: &str) -> Gateway {
    Gateway::start_before(&format!("http://{}", gateway.addr), settings)
}

/// Loses a request: its upstream takes it and is gone, for good.
fn lose(outer: &Gateway, upstream: TcpListener) -> Client {
    let mut first = sent(outer, post("/posts", "k", "{}"));
    let mut connection = Client::from(upstream.accept().unwrap().0);
    assert!(connection.read_head().starts_with("POST /posts "));
    first.read().expect_problem(504, "upstream_timeout");
    eventually("it is unknown", || (outer.metric("oncegate_records{state=\"unknown\"}") == 1.0).then_some(()));
    connection
}

#[test]
fn an_inner_gateway_without_its_upstream_proves_nothing() {
    // Even where the operator has written that statuses such as its own prove it.
    let settings = format!("{}{SHORT}", LOOKUP.replace("[\"404\"]", "[\"404\", \"502\", \"503\", \"409\"]"));
    for gateways in 2..=4 {
        let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut row = vec![Gateway::start_before(&format!("http://{}", upstream.local_addr().unwrap()), "")];
        while row.len() < gateways - 1 {
            row.push(before(row.last().unwrap(), ""));
        }
        let outer = before(row.last().unwrap(), &settings);
        let _lost = lose(&outer, upstream);
        for _ in 0..2 {
            outer.post("k", "{}").expect_problem(409, "outcome_unknown");
        }
        let asked = row[0].metric("oncegate_requests_total{route=\"-\",result=\"failed\"}");
        assert_eq!(asked, 2.0, "the innermost of {gateways} answered the questions");
    }
}

#[test]
fn no_answer_of_a_gateways_own_proves_anything() {
    let codes =
        [("draining", 503), ("overloaded", 503), ("upstream_unreachable", 502), ("in_progress", 409), ("x", 404)];
    for (code, status) in codes {
        let kind = format!("urn:oncegate:problem:{code}");
        let upstream = upstream(move |request, reply| {
            let kind = if request.target.ends_with("/theirs") { "urn:example:gone" } else { &kind };
            let fields = [("Content-Type", "application/problem+json"), ("Idempotency-Outcome", "not-executed")];
            reply.send(status, &fields, format!("{{\"status\":{status},\"type\":\"{kind}\"}}"));
        });
        let gateway = unknown(&upstream, "");
        for _ in 0..2 {
            gateway.post("k", "{}").expect_problem(409, "outcome_unknown");
        }
        gateway.post("theirs", "{}").expect_problem(502, "upstream_broken");
        assert_eq!(gateway.post("theirs", "{}").text(), "executed anew", "an upstream's own problem is its word");
        assert_eq!(upstream.executions("k"), 1);
    }
}

#[test]
fn what_the_upstream_says_behind_an_inner_gateway_counts() {
    for (status, text) in [(200, "found"), (404, "executed anew")] {
        let gate = Gate::default();
        let held = gate.clone();
        let upstream = Upstream::scripted(move |request, reply| match (request.number, request.method.as_str()) {
            (1, _) => held.wait(),
            (_, "GET") => reply.send(status, &[], "found"),
            _ => reply.send(201, &[], "executed anew"),
        });
        let inner_settings = format!("{LOOKUP}{SHORT}");
        let inner = Gateway::start(&upstream, &inner_settings);
        let outer = before(&inner, &format!("{LOOKUP}{SHORT}").replace("200ms", "100ms"));
        let mut first = sent(&outer, post("/posts", "k", "{}"));
        upstream.wait_for(1);
        first.read().expect_problem(504, "upstream_timeout");
        let unknown = "oncegate_records{state=\"unknown\"}";
        eventually("both know nothing", || (outer.metric(unknown) + inner.metric(unknown) == 2.0).then_some(()));
        assert_eq!(outer.post("k", "{}").text(), text);
        assert_eq!(upstream.executions("k"), if status == 200 { 1 } else { 2 });
        gate.open();
    }
}
