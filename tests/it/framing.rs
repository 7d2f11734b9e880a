//! Where one message ends and the next begins: neither side's left-over bytes ever become somebody's request or response.

use crate::support::{Client, Gateway, Upstream, call, post, request};

/// What would be a request of its own, were it not a body.
const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nHost: api.example\r\n\r\n";

#[track_caller]
fn expect_nothing_hidden(upstream: &Upstream) {
    let targets = upstream.requests().into_iter().map(|seen| seen.target).collect::<Vec<_>>();
    assert!(!targets.iter().any(|target| target == "/hidden"), "{targets:?}");
}

#[test]
fn the_body_of_a_refused_request_never_becomes_the_next_request() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_body = \"1KiB\"");
    gateway.post("used", "{}");
    let padding = "x".repeat(2000);
    let aws = [("Authorization", "AWS4-HMAC-SHA256 x"), ("Idempotency-Key", "k")];
    for (text, status, code) in [
        (post("/posts", "", HIDDEN), 400, "key_invalid"),
        (post("/posts;x", "k", HIDDEN), 400, "path_ambiguous"),
        (request("POST", "/posts", &aws, HIDDEN), 400, "scope_missing"),
        (post("/posts", "used", HIDDEN), 422, "key_reused"),
        (post("/posts", "k", &format!("{HIDDEN}{padding}")), 413, "body_too_large"),
    ] {
        let mut client = Client::connect(gateway.addr);
        client.try_send(&text);
        client.read().expect_problem(status, code);
        // Either the connection has ended, or it serves exactly what comes next.
        client.try_send(request("GET", "/next", &[("Connection", "close")], ""));
        if let Some(next) = client.try_read() {
            assert_eq!(next.status, 201, "{code}: {next:?}");
            assert_eq!(upstream.requests().last().unwrap().target, "/next", "{code}");
            assert!(client.at_end(), "{code}: no further answer");
        }
        expect_nothing_hidden(&upstream);
    }
    assert!(upstream.requests().iter().all(|seen| seen.key() != Some("k")), "refused requests stay here");
}

#[test]
fn a_refused_body_that_is_still_under_way_never_becomes_the_next_request() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let mut client = Client::connect(gateway.addr);
    let text = post("/posts", "", HIDDEN);
    let (head, body) = text.split_at(text.len() - HIDDEN.len());
    client.send(head);
    client.read().expect_problem(400, "key_invalid");
    client.try_send(body);
    client.try_send(request("GET", "/next", &[("Connection", "close")], ""));
    if let Some(next) = client.try_read() {
        assert_eq!(next.status, 201, "{next:?}");
        assert!(client.at_end());
    }
    expect_nothing_hidden(&upstream);
}

#[test]
fn two_lengths_or_both_framings_never_hide_a_request() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let both = format!("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}");
    let lengths = format!("Content-Length: 2\r\nContent-Length: {}\r\n\r\n{{}}{HIDDEN}", HIDDEN.len() + 2);
    let signed = format!("Content-Length: +2\r\n\r\n{{}}{HIDDEN}");
    for target in ["/posts", "/other"] {
        for rest in [&both, &lengths, &signed] {
            let mut client = Client::connect(gateway.addr);
            client.try_send(format!("POST {target} HTTP/1.1\r\nHost: a\r\nIdempotency-Key: k\r\n{rest}"));
            // It may be refused or its transfer coding taken at its word (RFC 9112 §6.1), but the connection ends.
            let first = client.read();
            assert!(first.status == 400 || rest == &both, "{target} {rest:?}: {first:?}");
            assert!(client.try_read().is_none(), "{target} {rest:?}");
        }
    }
    expect_nothing_hidden(&upstream);
    for seen in upstream.requests() {
        let framings = seen.headers("content-length").len() + seen.headers("transfer-encoding").len();
        assert_eq!(framings, 1, "{}", seen.head);
    }
}

#[test]
fn bytes_behind_an_upstreams_response_are_never_recorded_for_the_next_key() {
    let upstream = Upstream::scripted(|request, reply| {
        if request.key() == Some("first") {
            reply.raw("HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\nfirst");
            reply.raw("HTTP/1.1 201 Created\r\nContent-Length: 6\r\n\r\npoison");
        } else {
            reply.send(201, &[], request.key().unwrap_or("passed"));
        }
    });
    // One worker: the same pool of upstream connections for all.
    let gateway = Gateway::start(&upstream, "server.workers = 1");
    for round in 0..10 {
        let first = call(gateway.addr, post("/posts", "first", "{}"));
        assert_eq!((first.text().as_str(), first.replayed()), ("first", round > 0));
        let key = format!("k{round}");
        for replayed in [false, true] {
            let answer = gateway.post(&key, "{}");
            assert_eq!((answer.text(), answer.replayed()), (key.clone(), replayed));
        }
        assert_eq!(gateway.call(request("GET", "/x", &[], "")).text(), "passed");
        assert_eq!(upstream.executions(&key), 1);
    }
}

#[test]
fn duplicates_pipelined_on_one_connection_are_executed_once() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let mut client = Client::connect(gateway.addr);
    client.send(post("/posts", "k", "{}").repeat(5));
    let answers = (0..5).map(|_| client.read()).collect::<Vec<_>>();
    assert!(answers.iter().all(|answer| answer.text() == r#"{"n":1}"#), "{answers:?}");
    assert_eq!(answers.iter().filter(|answer| !answer.replayed()).count(), 1);
    assert_eq!(upstream.count(), 1);
}
