//! What a replay is: the recorded response, and nothing that was meant for one connection or one person's browser.

use crate::support::{Client, Gate, Gateway, Response, Upstream, call, eventually, post};

/// Header lines, without those that a replay adds.
fn lines(response: &Response) -> Vec<(String, String)> {
    let added = ["idempotency-replayed", "age", "cache-status"];
    let mut lines = response.headers.clone();
    lines.retain(|(name, _)| !added.contains(&name.to_ascii_lowercase().as_str()));
    lines
}

#[test]
fn status_headers_and_body_are_as_recorded() {
    let body = (0..=255).cycle().take(5000).collect::<Vec<u8>>();
    let sent = body.clone();
    let upstream = Upstream::scripted(move |_, reply| {
        reply.raw("HTTP/1.1 422 Whatever\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nX-Twice: 1\r\nX-Other: o\r\n");
        reply.raw(b"X-Twice: 2\r\nX-Latin: caf\xe9\r\nContent-Type: application/octet-stream\r\n");
        reply.raw(format!("Content-Length: {}\r\n\r\n", sent.len()));
        reply.raw(&sent);
    });
    let gateway = Gateway::start(&upstream, "");
    let first = gateway.post("k", "{}");
    let replay = gateway.post("k", "{}");
    assert_eq!((first.status, &first.body), (422, &body));
    assert_eq!((replay.status, &replay.body), (422, &body));
    assert_eq!(lines(&first), lines(&replay));
    assert_eq!(replay.header("date"), Some("Sun, 06 Nov 1994 08:49:37 GMT"));
    assert_eq!(replay.headers.iter().filter(|(name, _)| name == "x-twice").count(), 2);
    assert_eq!(first.header("idempotency-replayed"), None);
    assert_eq!(first.header("cache-status"), None);
    assert_eq!(replay.header("idempotency-replayed"), Some("true"));
    assert!(replay.header("age").unwrap().parse::<u64>().unwrap() < 20);
    let ttl = replay.header("cache-status").unwrap().strip_prefix("oncegate; hit; ttl=").unwrap();
    assert!((86_380..=86_400).contains(&ttl.parse::<u64>().unwrap()), "{ttl}");
}

#[test]
fn hop_by_hop_and_dropped_headers_are_not_recorded() {
    let upstream = Upstream::scripted(|_, reply| {
        let headers = [
            ("Connection", "x-hop, keep-alive"),
            ("X-Hop", "1"),
            ("Keep-Alive", "timeout=5"),
            ("Proxy-Connection", "keep-alive"),
            ("Set-Cookie", "session=secret"),
            ("X-Trace", "1"),
            ("X-End", "1"),
        ];
        reply.send(201, &headers, "made");
    });
    let gateway = Gateway::start(&upstream, "idempotency.drop_headers = [\"set-cookie\", \"X-Trace\"]");
    let first = gateway.post("k", "{}");
    assert_eq!((first.header("set-cookie"), first.header("x-trace")), (Some("session=secret"), Some("1")));
    let replay = gateway.post("k", "{}");
    for response in [&first, &replay] {
        for name in ["x-hop", "keep-alive", "proxy-connection"] {
            assert_eq!(response.header(name), None, "{name}");
        }
        assert_eq!(response.header("x-end"), Some("1"));
    }
    assert_eq!((replay.header("set-cookie"), replay.header("x-trace")), (None, None));
}

#[test]
fn chunked_and_close_delimited_responses_are_replayed_with_a_length() {
    for raw in [
        "HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nma\r\n2\r\nde\r\n0\r\nX-Trailer: t\r\n\r\n",
        "HTTP/1.1 201 Created\r\n\r\nmade",
        "HTTP/1.0 201 Created\r\n\r\nmade",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 4\r\n\r\nmade",
    ] {
        let upstream = Upstream::scripted(move |_, reply| {
            reply.raw(raw);
            reply.close();
        });
        let gateway = Gateway::start(&upstream, "");
        let first = gateway.post("k", "{}");
        assert_eq!((first.status, first.text().as_str()), (201, "made"), "{raw}");
        let replay = gateway.post("k", "{}");
        assert_eq!((replay.status, replay.text().as_str(), replay.replayed()), (201, "made", true), "{raw}");
        assert_eq!(replay.header("content-length"), Some("4"));
        assert_eq!(replay.header("transfer-encoding"), None);
    }
}

#[test]
fn an_http_1_0_client_gets_its_replay() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let old = post("/posts", "k", "{}").replace("HTTP/1.1", "HTTP/1.0");
    for replayed in [false, true] {
        let mut client = Client::connect(gateway.addr);
        client.send(&old);
        let answer = client.read();
        assert_eq!((answer.text().as_str(), answer.replayed()), (r#"{"n":1}"#, replayed));
        assert!(client.at_end());
    }
}

#[test]
fn records_survive_a_stop_and_a_kill() {
    let upstream = Upstream::scripted(|request, reply| {
        let headers = [("X-A", "1"), ("Date", "Sun, 06 Nov 1994 08:49:37 GMT")];
        reply.send(201, &headers, format!("run {}", request.number));
    });
    let mut gateway = Gateway::start(&upstream, "");
    let first = gateway.post("k", "{}");
    gateway.terminate();
    assert_eq!(gateway.wait(), Some(0));
    let gateway = gateway.restart();
    let after_stop = gateway.post("k", "{}");
    let gateway = gateway.restart();
    let after_kill = gateway.post("k", "{}");
    for replay in [after_stop, after_kill] {
        assert!(replay.replayed());
        assert_eq!((replay.status, &replay.body, lines(&replay)), (first.status, &first.body, lines(&first)));
    }
    gateway.post("k", "[]").expect_problem(422, "key_reused");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn a_claim_found_at_start_is_unknown() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |_, _| passed.wait());
    let gateway = Gateway::start(&upstream, "");
    let mut client = Client::connect(gateway.addr);
    client.send(post("/posts", "k", "{}"));
    upstream.wait_for(1);
    let gateway = gateway.restart();
    assert!(client.try_read().is_none());
    gateway.post("k", "{}").expect_problem(409, "outcome_unknown");
    gateway.post("k", "[]").expect_problem(422, "key_reused");
    assert_eq!(gateway.metric("oncegate_records{state=\"unknown\"}"), 1.0);
    assert_eq!(upstream.count(), 1);
    gate.open();
}

#[test]
fn after_its_retention_a_key_is_new() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.retention = \"300ms\"");
    let first = gateway.post("k", r#"{"a":1}"#);
    assert_eq!(first.text(), r#"{"n":1}"#);
    let fresh = eventually("the key is new, with a fresh payload", || {
        let answer = gateway.post("k", r#"{"a":2}"#);
        (answer.status == 201).then_some(answer)
    });
    assert_eq!((fresh.text().as_str(), fresh.replayed()), (r#"{"n":2}"#, false));
}

#[test]
fn after_unknown_retention_a_key_is_new() {
    let upstream = Upstream::scripted(|request, reply| match request.number {
        1 => reply.reset(),
        _ => reply.send(201, &[], "made"),
    });
    let gateway = Gateway::start(&upstream, "idempotency.unknown_retention = \"300ms\"");
    gateway.post("k", "{}").expect_problem(502, "upstream_broken");
    let fresh = eventually("the key is new", || Some(gateway.post("k", "{}")).filter(|answer| answer.status != 409));
    assert_eq!(fresh.text(), "made");
    assert_eq!(upstream.count(), 2);
}

/// A response of `len` bytes.
fn large(len: usize, declared: bool) -> Upstream {
    Upstream::scripted(move |_, reply| {
        let length = if declared { format!("Content-Length: {len}\r\n") } else { String::new() };
        reply.raw(format!("HTTP/1.1 201 Created\r\nLocation: /posts/7\r\n{length}\r\n"));
        reply.raw("x".repeat(len));
        if !declared {
            reply.close();
        }
    })
}

const CAP: &str = "idempotency.max_recorded_body = \"64KiB\"";

#[track_caller]
fn expect_not_recorded(answer: &Response) {
    answer.expect_problem(409, "body_not_recorded");
    assert_eq!(answer.json()["upstream_status"], 201);
    assert_eq!(answer.json()["location"], "/posts/7");
    assert!(!answer.replayed());
}

#[test]
fn a_response_too_large_to_record_reaches_the_caller_whole_and_is_never_executed_again() {
    for declared in [true, false] {
        let upstream = large(3 << 20, declared);
        let gateway = Gateway::start(&upstream, CAP);
        let first = gateway.post("k", "{}");
        assert_eq!((first.status, first.body.len()), (201, 3 << 20));
        expect_not_recorded(&gateway.post("k", "{}"));
        let gateway = gateway.restart();
        expect_not_recorded(&gateway.post("k", "{}"));
        assert_eq!(upstream.count(), 1);
    }
}

#[test]
fn a_response_of_just_the_cap_is_recorded_and_one_byte_more_is_not() {
    for declared in [true, false] {
        let upstream = large(64 << 10, declared);
        let gateway = Gateway::start(&upstream, CAP);
        gateway.post("k", "{}");
        assert!(gateway.post("k", "{}").replayed());
        let upstream = large((64 << 10) + 1, declared);
        let gateway = Gateway::start(&upstream, CAP);
        gateway.post("k", "{}");
        expect_not_recorded(&gateway.post("k", "{}"));
    }
}

#[test]
fn a_large_response_is_settled_before_its_first_byte_and_a_cut_off_changes_nothing() {
    let upstream = Upstream::scripted(|_, reply| {
        reply.raw("HTTP/1.1 201 Created\r\nLocation: /posts/7\r\nContent-Length: 1000000\r\n\r\n");
        reply.raw("x".repeat(100_000));
        // The rest never comes, and the connection stays open.
        reply.closed_by_peer();
    });
    let gateway = Gateway::start(&upstream, CAP);
    let mut client = Client::connect(gateway.addr);
    client.send(post("/posts", "k", "{}"));
    client.read_some().unwrap();
    let gateway = gateway.restart();
    expect_not_recorded(&gateway.post("k", "{}"));

    let upstream = Upstream::scripted(|_, reply| {
        reply.raw("HTTP/1.1 201 Created\r\nLocation: /posts/7\r\nContent-Length: 1000000\r\n\r\n");
        reply.raw("x".repeat(100_000));
        reply.reset();
    });
    let gateway = Gateway::start(&upstream, CAP);
    let mut client = Client::connect(gateway.addr);
    client.send(post("/posts", "k", "{}"));
    assert!(client.try_read().is_none(), "the client sees that the response was cut off");
    expect_not_recorded(&call(gateway.addr, post("/posts", "k", "{}")));
}

#[test]
fn a_waiter_for_a_response_too_large_is_told_so() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |_, reply| {
        passed.wait();
        reply.send(201, &[("Location", "/posts/7")], "x".repeat(100_000));
    });
    let gateway = Gateway::start(&upstream, CAP);
    let mut first = Client::connect(gateway.addr);
    first.send(post("/posts", "k", "{}"));
    upstream.wait_for(1);
    let mut second = Client::connect(gateway.addr);
    second.send(post("/posts", "k", "{}"));
    eventually("it waits", || (gateway.metric("oncegate_waiters") == 1.0).then_some(()));
    gate.open();
    assert_eq!(first.read().body.len(), 100_000);
    expect_not_recorded(&second.read());
}
