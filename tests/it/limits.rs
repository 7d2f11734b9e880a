//! Every limit holds, and says so.

use crate::support::{Client, Gate, Gateway, Upstream, eventually, post, request};

#[test]
fn a_keyed_body_over_max_body_is_refused_and_claims_nothing() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_body = \"1KiB\"");
    gateway.post("declared", &"x".repeat(1025)).expect_problem(413, "body_too_large");
    let mut client = Client::connect(gateway.addr);
    client.send("POST /posts HTTP/1.1\r\nHost: a\r\nIdempotency-Key: chunked\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.try_send(format!("401\r\n{}\r\n0\r\n\r\n", "x".repeat(1025)));
    client.read().expect_problem(413, "body_too_large");
    assert_eq!(upstream.count(), 0);
    assert_eq!(gateway.post("fits", &"x".repeat(1024)).status, 201);
}

#[test]
fn an_intercepted_body_must_arrive_within_body_timeout() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.body_timeout = \"150ms\"");
    let mut client = Client::connect(gateway.addr);
    client.send("POST /posts HTTP/1.1\r\nHost: a\r\nIdempotency-Key: k\r\nContent-Length: 3\r\n\r\n{");
    let answer = client.read();
    answer.expect_problem(408, "request_timeout");
    assert_eq!(answer.header("connection"), Some("close"));
    assert!(client.at_end());
    assert_eq!(upstream.count(), 0);
}

#[test]
fn a_passing_body_must_make_progress() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.body_timeout = \"150ms\"");
    let mut client = Client::connect(gateway.addr);
    client.send("PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n{");
    client.read().expect_problem(408, "request_timeout");
    assert!(client.at_end());
}

#[test]
fn a_head_must_arrive_within_header_timeout_of_its_first_byte() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.header_timeout = \"150ms\"");
    let mut client = Client::connect(gateway.addr);
    client.send("GET / HTTP/1.1\r\nHost:");
    assert!(client.try_read().is_none(), "it is cut");
    // The second head of a connection, too.
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/", &[], ""));
    assert_eq!(client.read().status, 201);
    client.send("GET / HTTP/1.1\r\n");
    assert!(client.try_read().is_none());
    assert_eq!(upstream.count(), 1);
}

#[test]
fn a_connection_without_a_request_ends_after_idle_timeout() {
    let upstream = Upstream::counting();
    let limits = "server.limits.idle_timeout = \"150ms\"\nserver.limits.header_timeout = \"10m\"";
    let gateway = Gateway::start(&upstream, limits);
    assert!(Client::connect(gateway.addr).at_end(), "before the first byte");
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/", &[], ""));
    client.read();
    assert!(client.at_end(), "between requests");
}

#[test]
fn a_request_in_flight_is_not_idle() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        if request.target == "/slow" {
            passed.wait();
        }
        reply.send(200, &[], "done");
    });
    let limits = "server.limits.idle_timeout = \"100ms\"\nserver.limits.header_timeout = \"100ms\"";
    let gateway = Gateway::start(&upstream, limits);
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/slow", &[], ""));
    upstream.wait_for(1);
    // Others come and go idle meanwhile: more than both limits has passed.
    for _ in 0..2 {
        let mut other = Client::connect(gateway.addr);
        other.send(request("GET", "/quick", &[], ""));
        other.read();
        assert!(other.at_end());
    }
    gate.open();
    assert_eq!(client.read().text(), "done");
}

#[test]
fn a_reader_without_progress_is_cut_after_write_timeout() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], vec![b'x'; 64 << 20]));
    let gateway = Gateway::start(&upstream, "server.limits.write_timeout = \"200ms\"");
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/x", &[], ""));
    upstream.wait_for(1);
    eventually("it is cut", || (gateway.metric("oncegate_connections") == 0.0).then_some(()));
    assert!(client.try_read().is_none());
}

#[test]
fn a_head_over_max_header_bytes_is_refused() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_header_bytes = \"8KiB\"");
    let long = |len: usize| request("GET", "/", &[("X-Long", &"x".repeat(len))], "");
    let mut client = Client::connect(gateway.addr);
    client.try_send(long(9000));
    assert_eq!(client.read().status, 431);
    assert!(client.at_end());
    assert_eq!(upstream.count(), 0);
    assert_eq!(gateway.call(long(7000)).status, 201);
}

#[test]
fn a_connection_over_max_connections_is_told_and_closed() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_connections = 2");
    let first = Client::connect(gateway.addr);
    let _second = Client::connect(gateway.addr);
    eventually("both are in", || (gateway.metric("oncegate_connections") == 2.0).then_some(()));
    let mut third = Client::connect(gateway.addr);
    let refused = third.read();
    refused.expect_problem(503, "overloaded");
    assert_eq!((refused.header("retry-after"), refused.header("connection")), (Some("1"), Some("close")));
    assert!(third.at_end());
    drop(first);
    eventually("there is room again", || (gateway.metric("oncegate_connections") == 1.0).then_some(()));
    assert_eq!(gateway.call(request("GET", "/", &[], "")).status, 201);
}

#[test]
fn claimed_forwards_are_bounded_late_ones_included_and_replays_are_not() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        if request.key() == Some("slow") {
            passed.wait();
        }
        reply.send(201, &[], "made");
    });
    let settings = "upstream.max_in_flight = 1\nupstream.response_timeout = \"100ms\"\ncache.max_bytes = 0";
    let gateway = Gateway::start(&upstream, settings);
    gateway.post("before", "{}");
    gateway.post("slow", "{}").expect_problem(504, "upstream_timeout");
    let refused = gateway.post("other", "{}");
    refused.expect_problem(503, "overloaded");
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(gateway.post("before", "{}").replayed(), "from the store");
    assert_eq!(gateway.call(request("GET", "/x", &[], "")).status, 201, "pass-through is not bounded by it");
    assert_eq!(gateway.metric("oncegate_records{state=\"claimed\"}"), 1.0, "nothing was claimed");
    gate.open();
    eventually("there is room again", || (gateway.post("other", "{}").status == 201).then_some(()));
    assert_eq!(upstream.executions("other"), 1);
}

#[test]
fn buffered_bodies_are_bounded_all_together() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |_, reply| {
        passed.wait();
        reply.send(201, &[], "made");
    });
    let gateway =
        Gateway::start(&upstream, "server.limits.max_body = \"6KiB\"\nserver.limits.max_buffered = \"10KiB\"");
    let body = "x".repeat(6000);
    let mut first = Client::connect(gateway.addr);
    first.send(post("/posts", "k1", &body));
    upstream.wait_for(1);
    let refused = gateway.post("k2", &body);
    refused.expect_problem(503, "overloaded");
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(gateway.metric("oncegate_records{state=\"claimed\"}"), 1.0);
    gate.open();
    assert_eq!(first.read().status, 201);
    eventually("its room is free", || (gateway.metric("oncegate_buffered_bytes") == 0.0).then_some(()));
    assert_eq!(gateway.post("k2", &body).status, 201);
    assert_eq!(upstream.executions("k2"), 1);
}

#[test]
fn a_response_for_which_there_is_no_room_is_executed_but_not_recorded() {
    let upstream = Upstream::scripted(|_, reply| reply.send(201, &[], "x".repeat(20_000)));
    let gateway =
        Gateway::start(&upstream, "server.limits.max_body = \"1KiB\"\nserver.limits.max_buffered = \"10KiB\"");
    assert_eq!(gateway.post("k", "{}").body.len(), 20_000);
    gateway.post("k", "{}").expect_problem(409, "body_not_recorded");
    assert_eq!(upstream.count(), 1);
}
