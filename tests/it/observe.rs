//! `mode = "observe"`: nothing is changed, and what would have been done is told.

use crate::support::{Client, Gate, Gateway, Upstream, call, eventually, post, request};

const OBSERVE: &str = "idempotency.mode = \"observe\"";

fn would(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("oncegate_observed_total{{route=\"/posts\",result=\"{result}\"}}"))
}

#[test]
fn every_request_passes_through_unchanged_and_the_repeated_one_is_told() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, OBSERVE);
    for n in 1..=3 {
        let answer = gateway.post("k", r#"{"a": 1}"#);
        assert_eq!((answer.status, answer.text(), answer.replayed()), (201, format!("{{\"n\":{n}}}"), false));
        assert!(answer.header("cache-status").is_none() && answer.header("age").is_none());
    }
    assert_eq!(upstream.executions("k"), 3, "nothing is intercepted");
    assert_eq!((would(&gateway, "forwarded"), would(&gateway, "replayed")), (1.0, 2.0));
    assert_eq!(gateway.metric("oncegate_requests_total{route=\"/posts\",result=\"passed\"}"), 3.0);
    assert_eq!(gateway.metric("oncegate_records{state=\"completed\"}"), 0.0, "nothing is recorded");
    let log = gateway.wait_for_log("would=\"replayed\"");
    assert!(log.contains("observed request") && !log.contains("Bearer"), "{log}");
}

#[test]
fn another_payload_under_the_key_and_another_tenant_are_told_apart() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, OBSERVE);
    let send = |token: &str, body: &str| {
        let fields = [("idempotency-key", "k"), ("authorization", token), ("content-type", "application/json")];
        assert_eq!(call(gateway.addr, request("POST", "/posts", &fields, body)).status, 201);
    };
    send("Bearer a", r#"{"a":1,"b":2}"#);
    send("Bearer a", r#"{"b":2, "a":1}"#);
    send("Bearer a", r#"{"a":2}"#);
    send("Bearer b", r#"{"a":2}"#);
    assert_eq!(upstream.executions("k"), 4);
    assert_eq!(
        (would(&gateway, "forwarded"), would(&gateway, "replayed"), would(&gateway, "key_reused")),
        (2.0, 1.0, 1.0)
    );
}

#[test]
fn a_duplicate_of_a_request_in_flight_is_told_and_passes_at_once() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        if request.number == 1 {
            held.wait();
        }
        reply.send(201, &[], format!("run {}", request.number));
    });
    let gateway = Gateway::start(&upstream, OBSERVE);
    let mut first = Client::connect(gateway.addr);
    first.send(post("/posts", "k", "{}"));
    upstream.wait_for(1);
    eventually("the first is taken in", || (would(&gateway, "forwarded") == 1.0).then_some(()));
    assert_eq!(gateway.post("k", "{}").text(), "run 2");
    assert_eq!(would(&gateway, "waited"), 1.0);
    gate.open();
    assert_eq!(first.read().text(), "run 1");
    assert_eq!(gateway.post("k", "{}").text(), "run 3");
    assert_eq!(would(&gateway, "replayed"), 1.0);
}

#[test]
fn what_an_outcome_would_have_led_to_is_told() {
    let upstream = Upstream::scripted(move |request, reply| {
        let status =
            if request.number % 2 == 0 { 201 } else { std::str::from_utf8(&request.body).unwrap().parse().unwrap() };
        reply.send(status, &[], "");
    });
    let gateway = Gateway::start(&upstream, OBSERVE);
    for (status, then) in [(201, "replayed"), (500, "replayed"), (429, "forwarded"), (502, "outcome_unknown")] {
        let (key, body) = (format!("k{status}"), status.to_string());
        let before = would(&gateway, then);
        assert_eq!(gateway.post(&key, &body).status, status);
        let settled = would(&gateway, then) - before;
        assert_eq!(gateway.post(&key, &body).status, 201);
        let again = would(&gateway, then) - before - settled;
        assert_eq!(again, 1.0, "{status}: {then}");
    }
}

#[test]
fn what_would_have_been_refused_passes() {
    let upstream = Upstream::counting();
    let settings =
        "idempotency.mode = \"observe\"\nidempotency.missing_key = \"reject\"\nserver.limits.max_body = \"64\"";
    let gateway = Gateway::start(&upstream, settings);
    let long = "x".repeat(65);
    let rows: [(&[(&str, &str)], &str, &str); 5] = [
        (&[("idempotency-key", "a,b")], "/posts", "{}"),
        (&[], "/posts", "{}"),
        (&[("idempotency-key", "k"), ("x-api-key", "1")], "/posts", "{}"),
        (&[("idempotency-key", "k"), ("authorization", "DPoP x")], "/posts", "{}"),
        (&[("idempotency-key", "k")], "/posts", &long),
    ];
    for (n, (fields, path, body)) in rows.into_iter().enumerate() {
        assert_eq!(call(gateway.addr, request("POST", path, fields, body)).status, 201, "{fields:?}");
        assert_eq!(would(&gateway, "rejected"), n as f64 + 1.0, "{fields:?}");
    }
    let ambiguous = request("POST", "/POSTS", &[("idempotency-key", "k")], "{}");
    assert_eq!(call(gateway.addr, ambiguous).status, 201, "refusing would change something");
    assert_eq!(upstream.count(), 6);
}

#[test]
fn a_body_without_a_length_and_an_empty_one_are_observed_too() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, OBSERVE);
    let chunked = "POST /posts HTTP/1.1\r\nhost: a\r\nidempotency-key: k\r\ntransfer-encoding: chunked\r\n\r\n\
                   2\r\n{}\r\n0\r\n\r\n";
    for _ in 0..2 {
        assert_eq!(call(gateway.addr, chunked).status, 201);
    }
    let empty = "POST /posts HTTP/1.1\r\nhost: a\r\nidempotency-key: e\r\ncontent-length: 0\r\n\r\n";
    for _ in 0..2 {
        assert_eq!(call(gateway.addr, empty).status, 201);
    }
    assert_eq!((would(&gateway, "forwarded"), would(&gateway, "replayed")), (2.0, 2.0));
}

#[test]
fn an_upload_that_breaks_off_claims_nothing_and_one_that_is_left_is_unknown() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        if request.number == 1 {
            held.wait();
        }
        reply.send(201, &[], "");
    });
    let gateway = Gateway::start(&upstream, OBSERVE);
    let mut client = Client::connect(gateway.addr);
    client.send("POST /posts HTTP/1.1\r\nhost: a\r\nidempotency-key: cut\r\ncontent-length: 5\r\n\r\n{}");
    client.reset();
    let mut client = Client::connect(gateway.addr);
    client.send(post("/posts", "left", "{}"));
    eventually("it is taken in", || (would(&gateway, "forwarded") == 1.0).then_some(()));
    client.reset();
    eventually("its end is unknown", || {
        let answer = gateway.post("left", "{}");
        assert_eq!(answer.status, 201);
        (would(&gateway, "outcome_unknown") >= 1.0).then_some(())
    });
    assert_eq!(gateway.post("cut", "12345").status, 201);
    assert_eq!(would(&gateway, "forwarded"), 2.0, "nothing was claimed by what broke off");
    gate.open();
}

#[test]
fn one_route_is_observed_while_another_is_enforced() {
    let upstream = Upstream::counting();
    let settings = "[[routes]]\npath = \"/posts\"\nmode = \"observe\"\n[[routes]]\npath = \"/mails\"";
    let gateway = Gateway::start(&upstream, settings);
    for path in ["/posts", "/mails"] {
        for _ in 0..2 {
            assert_eq!(gateway.call(post(path, path, "{}")).status, 201);
        }
    }
    assert_eq!((upstream.executions("/posts"), upstream.executions("/mails")), (2, 1));
}
