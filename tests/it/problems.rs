//! What the gateway itself answers: each code with its status, its headers and its members.

use crate::support::{Client, Gate, Gateway, Response, Upstream, call, post, request};

/// Asserts a problem with all of its headers: `Retry-After`, `Proxy-Status` (there or not), and whether the connection ends.
#[track_caller]
fn expect(answer: &Response, status: u16, code: &str, retry_after: Option<&str>, upstream_failed: bool, closes: bool) {
    answer.expect_problem(status, code);
    assert_eq!(answer.header("retry-after"), retry_after, "{answer:?}");
    let proxy_status = answer.header("proxy-status");
    assert_eq!(proxy_status.is_some(), upstream_failed, "{answer:?}");
    assert!(proxy_status.is_none_or(|value| value.len() > 16 && value.starts_with("oncegate; error=")), "{answer:?}");
    assert_eq!(answer.header("connection"), closes.then_some("close"), "{answer:?}");
    assert_eq!(answer.header("idempotency-replayed"), None, "{answer:?}");
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.ends_with('.') && detail.len() > 10, "{detail}");
}

/// Sends something malformed; the gateway has to answer 400 and to end the connection.
#[track_caller]
fn expect_bad_request(gateway: &Gateway, bytes: impl AsRef<[u8]>) {
    let mut client = Client::connect(gateway.addr);
    let what = String::from_utf8_lossy(bytes.as_ref()).into_owned();
    client.try_send(bytes);
    let answer = client.try_read().unwrap_or_else(|| panic!("no answer to {what}"));
    assert_eq!(answer.status, 400, "{what}: {answer:?}");
    assert_eq!(answer.header("connection"), Some("close"), "{what}: {answer:?}");
    if !answer.body.is_empty() {
        answer.expect_problem(400, "bad_request");
    }
    assert!(client.at_end(), "{what}: the connection goes on");
}

#[test]
fn what_a_client_may_put_right_is_a_400_on_a_connection_that_goes_on() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.missing_key = \"reject\"\n");
    let mut client = Client::connect(gateway.addr);
    for (target, headers, code) in [
        ("/posts", &[("Authorization", "a")][..], "key_missing"),
        ("/posts", &[("Idempotency-Key", "a b")], "key_invalid"),
        ("/posts", &[("Idempotency-Key", "k"), ("X-Api-Key", "x")], "scope_missing"),
        ("/Posts", &[("Idempotency-Key", "k")], "path_ambiguous"),
    ] {
        client.send(request("POST", target, headers, "{}"));
        expect(&client.read(), 400, code, None, false, false);
    }
    assert_eq!(upstream.count(), 0);
    client.send(post("/posts", "k", "{}"));
    assert_eq!(client.read().status, 201);
    client.send(post("/posts", "k", "[]"));
    expect(&client.read(), 422, "key_reused", None, false, false);
    assert_eq!(upstream.count(), 1);
}

#[test]
fn malformed_http_is_a_bad_request_and_never_a_502() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for start in ["GARBAGE\r\n\r\n", "POST /posts\r\n\r\n", "POST /po sts HTTP/1.1\r\nHost: a\r\n\r\n"] {
        expect_bad_request(&gateway, start);
    }
    for path in ["/posts", "/other"] {
        let head = format!("POST {path} HTTP/1.1\r\nHost: a.example\r\nAuthorization: a\r\nIdempotency-Key: k\r\n");
        for rest in [
            "Content-Length: x\r\n\r\n",
            "Content-Length: -1\r\n\r\n",
            "Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
            "Bad Name: x\r\nContent-Length: 0\r\n\r\n",
            "X: a\0b\r\nContent-Length: 0\r\n\r\n",
            "Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
            "Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n",
        ] {
            expect_bad_request(&gateway, format!("{head}{rest}"));
        }
    }
    assert_eq!(upstream.count(), 0, "{:?}", upstream.requests());
}

#[test]
fn a_target_too_long_is_a_414() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_header_bytes = \"256KiB\"\n");
    for method in ["GET", "POST"] {
        let mut client = Client::connect(gateway.addr);
        client.try_send(request(method, &format!("/{}", "x".repeat(70_000)), &[("Idempotency-Key", "k")], ""));
        expect(&client.read(), 414, "target_too_long", None, false, true);
    }
    assert_eq!(upstream.count(), 0);
}

#[test]
fn headers_too_large_are_a_431() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for path in ["/posts", "/other"] {
        let mut client = Client::connect(gateway.addr);
        client.try_send(request("POST", path, &[("X-Large", &"x".repeat(70_000))], ""));
        expect(&client.read(), 431, "headers_too_large", None, false, true);
    }
    assert_eq!(upstream.count(), 0);
}

#[test]
fn a_body_that_comes_too_slowly_is_a_408() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.body_timeout = \"200ms\"\n");
    for path in ["/posts", "/other"] {
        let mut client = Client::connect(gateway.addr);
        let head = post(path, "k", "{}").replace("Content-Length: 2", "Content-Length: 9");
        client.send(head);
        expect(&client.read(), 408, "request_timeout", None, false, true);
        assert!(client.at_end());
    }
    assert_eq!(upstream.count(), 0);
    assert!(!gateway.post("k", "{}").replayed(), "nothing was claimed");
}

#[test]
fn a_body_too_large_is_a_413_and_claims_nothing() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_body = \"1KiB\"\n");
    let large = "x".repeat(1025);
    let declared = post("/posts", "k", &large);
    let chunked = declared.replace("Content-Length: 1025", "Transfer-Encoding: chunked");
    let chunked = chunked.replace(&large, &format!("401\r\n{large}\r\n0\r\n\r\n"));
    for request in [declared, chunked] {
        let mut client = Client::connect(gateway.addr);
        client.try_send(request);
        let answer = client.read();
        answer.expect_problem(413, "body_too_large");
        assert_eq!((answer.header("retry-after"), answer.header("proxy-status")), (None, None));
    }
    assert_eq!(upstream.count(), 0);
    assert!(!call(gateway.addr, post("/posts", "k", &large[1..])).replayed(), "1024 bytes are not too many");
    assert_eq!(call(gateway.addr, request("POST", "/posts", &[], &large)).status, 201, "no cap without a key");
}

#[test]
fn a_duplicate_in_flight_is_a_409_with_retry_after() {
    for settings in ["idempotency.concurrent = \"conflict\"\n", "idempotency.wait_timeout = \"100ms\"\n"] {
        let gate = Gate::default();
        let held = gate.clone();
        let upstream = Upstream::scripted(move |_, reply| {
            held.wait();
            reply.send(201, &[], "done");
        });
        let gateway = Gateway::start(&upstream, &format!("{settings}upstream.response_timeout = \"2s\"\n"));
        let mut first = Client::connect(gateway.addr);
        first.send(post("/posts", "k", "{}"));
        upstream.wait_for(1);
        expect(&gateway.post("k", "{}"), 409, "in_progress", Some("1"), false, false);
        expect(&first.read(), 504, "upstream_timeout", None, true, false);
        expect(&gateway.post("k", "{}"), 409, "in_progress", Some("5"), false, false);
        gate.open();
    }
}

#[test]
fn an_unknown_outcome_is_a_409_without_retry_after() {
    let upstream = Upstream::scripted(|_, reply| reply.reset());
    let gateway = Gateway::start(&upstream, "");
    expect(&gateway.post("k", "{}"), 502, "upstream_broken", None, true, false);
    expect(&gateway.post("k", "{}"), 409, "outcome_unknown", None, false, false);
    expect(&gateway.restart().post("k", "{}"), 409, "outcome_unknown", None, false, false);
    assert_eq!(upstream.count(), 1);
}

#[test]
fn a_body_not_recorded_is_a_409_that_tells_status_and_location() {
    let upstream = Upstream::scripted(|request, reply| match request.key() {
        Some("located") => reply.send(202, &[("Location", "/posts/7")], "x".repeat(2048)),
        _ => reply.send(201, &[], "x".repeat(2048)),
    });
    let gateway = Gateway::start(&upstream, "idempotency.max_recorded_body = \"1KiB\"\n");
    assert_eq!(gateway.post("located", "{}").body.len(), 2048);
    assert_eq!(gateway.post("plain", "{}").body.len(), 2048);
    let answer = gateway.post("located", "{}");
    expect(&answer, 409, "body_not_recorded", None, false, false);
    assert_eq!((&answer.json()["upstream_status"], &answer.json()["location"]), (&202.into(), &"/posts/7".into()));
    let answer = gateway.post("plain", "{}");
    expect(&answer, 409, "body_not_recorded", None, false, false);
    assert_eq!(answer.json()["upstream_status"], 201);
    assert_eq!(upstream.count(), 2);
}

#[test]
fn the_upstreams_failures_are_told_apart_on_routes_and_on_pass_through() {
    let upstream = Upstream::scripted(|request, reply| match request.key() {
        Some("reset") => reply.reset(),
        Some("closed") => reply.close(),
        Some("nonsense") => reply.raw("nonsense\r\n\r\n"),
        _ => std::thread::sleep(std::time::Duration::from_secs(3)),
    });
    let gateway = Gateway::start(&upstream, "upstream.response_timeout = \"300ms\"\n");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let alone = Gateway::start_before(&nowhere, "");
    for path in ["/posts", "/other"] {
        for key in ["reset", "closed", "nonsense"] {
            expect(&gateway.call(post(path, key, "{}")), 502, "upstream_broken", None, true, false);
        }
        let answer = gateway.call(post(path, "slow", "{}"));
        expect(&answer, 504, "upstream_timeout", None, true, false);
        assert_eq!(answer.header("proxy-status"), Some("oncegate; error=http_response_timeout"));
        for _ in 0..2 {
            let answer = alone.call(post(path, "k", "{}"));
            expect(&answer, 502, "upstream_unreachable", None, true, false);
            assert_eq!(answer.header("proxy-status"), Some("oncegate; error=connection_refused"));
        }
    }
    assert_eq!(upstream.count(), 8, "none was sent twice");
}

#[test]
fn too_many_claimed_forwards_are_a_503_and_claim_nothing() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |_, reply| {
        held.wait();
        reply.send(201, &[], "done");
    });
    let gateway = Gateway::start(&upstream, "upstream.max_in_flight = 1\n");
    let mut first = Client::connect(gateway.addr);
    first.send(post("/posts", "a", "{}"));
    upstream.wait_for(1);
    expect(&gateway.post("b", "{}"), 503, "overloaded", Some("1"), false, false);
    gate.open();
    assert_eq!(first.read().status, 201);
    crate::support::eventually("the forward ends", || {
        (gateway.metric("oncegate_upstream_in_flight") == 0.0).then_some(())
    });
    let answer = gateway.post("b", "{}");
    assert_eq!((answer.status, answer.replayed()), (201, false));
}

#[test]
fn a_disk_without_room_is_a_503_for_new_claims() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "store.min_free = \"1000000GiB\"\n");
    expect(&gateway.post("k", "{}"), 503, "store_unavailable", Some("1"), false, false);
    assert_eq!(upstream.count(), 0);
    assert_eq!(gateway.call(request("POST", "/other", &[], "{}")).status, 201, "pass-through needs no store");
}
