//! Gateways in a row: what an inner one answers by itself never becomes a record of the outer one.

use crate::support::{Client, Gate, Gateway, Response, Upstream, eventually, post, request};

const OUTCOME: &str = "idempotency-outcome";
const VIA: (&str, &str) = ("Via", "1.1 oncegate");

/// A request by "alice" from behind another gateway.
fn chained(method: &str, target: &str, key: Option<&str>, body: &str) -> String {
    let mut headers = vec![("Authorization", "Bearer alice"), ("Content-Type", "application/json"), VIA];
    headers.extend(key.map(|key| ("Idempotency-Key", key)));
    request(method, target, &headers, body)
}

/// The address of a port on which nothing listens.
fn nowhere() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// Asserts that the answer is a problem of this gateway's, which tells the one in front to keep no record.
#[track_caller]
fn expect_freed(answer: &Response, status: u16, code: &str) {
    answer.expect_problem(status, code);
    assert_eq!(answer.header(OUTCOME), Some("not-executed"), "{answer:?}");
}

#[test]
fn every_own_answer_to_another_gateway_says_that_it_keeps_no_record() {
    let upstream = Upstream::scripted(|request, reply| match request.key() {
        Some("lost") => reply.reset(),
        Some("large") => reply.send(201, &[], "x".repeat(4096)),
        Some("slow") => std::thread::sleep(std::time::Duration::from_secs(2)),
        _ => reply.send(201, &[], "done"),
    });
    let settings = "server.limits.max_body = \"1KiB\"\nidempotency.max_recorded_body = \"1KiB\"\n\
                    upstream.response_timeout = \"200ms\"\nidempotency.wait_timeout = \"50ms\"\n[[routes]]\npath = \"/posts\"\n\
                    [[routes]]\npath = \"/strict\"\nmissing_key = \"reject\"\n";
    let gateway = Gateway::start(&upstream, settings);
    let first = gateway.call(chained("POST", "/posts", Some("k"), "{}"));
    let retry = gateway.call(chained("POST", "/posts", Some("k"), "{}"));
    assert!(retry.replayed() && !first.replayed());
    assert_eq!((first.header(OUTCOME), retry.header(OUTCOME)), (None, None), "the upstream's answer is the outcome");
    assert_eq!(gateway.call(chained("POST", "/posts", Some("large"), "{}")).header(OUTCOME), None);
    for (target, key, body, status, code) in [
        ("/posts", Some("k"), "[]", 422, "key_reused"),
        ("/posts", Some("a b"), "{}", 400, "key_invalid"),
        ("/strict", None, "{}", 400, "key_missing"),
        ("/Posts", Some("k"), "{}", 400, "path_ambiguous"),
        ("/posts", Some("long"), &"x".repeat(2000), 413, "body_too_large"),
        ("/posts", Some("large"), "{}", 409, "body_not_recorded"),
        ("/posts", Some("lost"), "{}", 502, "upstream_broken"),
        ("/posts", Some("lost"), "{}", 409, "outcome_unknown"),
        ("/posts", Some("slow"), "{}", 504, "upstream_timeout"),
        ("/posts", Some("slow"), "{}", 409, "in_progress"),
    ] {
        expect_freed(&gateway.call(chained("POST", target, key, body)), status, code);
    }
    let refused = "POST /posts HTTP/1.1\r\nHost: a\r\nHost: a\r\nVia: 1.1 oncegate\r\nContent-Length: 0\r\n\r\n";
    expect_freed(&gateway.call(refused), 400, "bad_request");
    let anonymous = [("Cookie", "a=b"), VIA, ("Idempotency-Key", "k")];
    expect_freed(&gateway.call(request("POST", "/posts", &anonymous, "{}")), 400, "scope_missing");
    let gateway = Gateway::start_before(&nowhere(), "");
    expect_freed(&gateway.call(chained("POST", "/posts", Some("k"), "{}")), 502, "upstream_unreachable");
}

#[test]
fn an_own_answer_to_anybody_else_says_nothing_of_the_kind() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for (via, named) in [
        (None, false),
        (Some("1.1 nginx"), false),
        (Some("1.1 notoncegate"), false),
        (Some("1.1 oncegate2, 1.0 x"), false),
        (Some("1.1 nginx (oncegate)"), false),
        (Some("1.1 oncegate"), true),
        (Some("1.0 oncegate"), true),
        (Some("HTTP/1.1 oncegate"), true),
        (Some("2 oncegate (edge)"), true),
        (Some("1.1 nginx, 1.1 oncegate"), true),
        (Some("1.1 oncegate , 1.1 nginx"), true),
    ] {
        let headers = [Some(("Idempotency-Key", "a b")), via.map(|via| ("Via", via))];
        let answer = gateway.call(request("POST", "/posts", &headers.into_iter().flatten().collect::<Vec<_>>(), "{}"));
        answer.expect_problem(400, "key_invalid");
        assert_eq!(answer.header(OUTCOME), named.then_some("not-executed"), "{via:?}: {answer:?}");
    }
    let lines = [("Via", "1.1 oncegate"), ("Via", "1.1 nginx"), ("Idempotency-Key", "")];
    expect_freed(&gateway.call(request("POST", "/posts", &lines, "{}")), 400, "key_invalid");
}

#[test]
fn a_passed_request_that_may_have_been_executed_is_not_called_unexecuted() {
    let upstream = Upstream::scripted(|request, reply| match request.target.as_str() {
        "/lost" => reply.reset(),
        "/broken" => reply.raw("nonsense\r\n\r\n"),
        _ => std::thread::sleep(std::time::Duration::from_secs(2)),
    });
    let gateway = Gateway::start(&upstream, "upstream.response_timeout = \"200ms\"\n");
    for (target, status, code) in
        [("/lost", 502, "upstream_broken"), ("/broken", 502, "upstream_broken"), ("/slow", 504, "upstream_timeout")]
    {
        let answer = gateway.call(chained("POST", target, Some("k"), "{}"));
        answer.expect_problem(status, code);
        assert_eq!(answer.header(OUTCOME), None, "{target}: there is no record here: {answer:?}");
    }
    assert_eq!(upstream.count(), 3, "none was sent twice");
    let gateway = Gateway::start_before(&nowhere(), "");
    expect_freed(&gateway.call(chained("POST", "/other", Some("k"), "{}")), 502, "upstream_unreachable");
}

#[test]
fn of_64_duplicates_through_two_gateways_one_is_executed() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        held.wait();
        reply.send(201, &[], format!("run {}", request.number));
    });
    let inner = Gateway::start(&upstream, "");
    let outer = Gateway::start_before(&format!("http://{}", inner.addr), "");
    let mut clients = (0..64).map(|_| Client::connect(outer.addr)).collect::<Vec<_>>();
    clients.iter_mut().for_each(|client| client.send(post("/posts", "k", "{}")));
    upstream.wait_for(1);
    eventually("63 wait", || (outer.metric("oncegate_waiters") == 63.0).then_some(()));
    gate.open();
    for client in &mut clients {
        let answer = client.read();
        assert_eq!((answer.status, answer.text().as_str()), (201, "run 1"));
    }
    assert!(outer.post("k", "{}").replayed() && inner.post("k", "{}").replayed());
    assert_eq!(upstream.count(), 1);
    assert_eq!(upstream.requests()[0].headers("via").join(", "), "1.1 oncegate, 1.1 oncegate");
}

#[test]
fn an_inner_409_never_becomes_an_outer_record() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        held.wait();
        reply.send(201, &[], format!("run {}", request.number));
    });
    let inner = Gateway::start(&upstream, "idempotency.concurrent = \"conflict\"\n");
    let outer = Gateway::start_before(&format!("http://{}", inner.addr), "");
    let mut first = Client::connect(inner.addr);
    first.send(post("/posts", "k", "{}"));
    upstream.wait_for(1);
    for _ in 0..2 {
        let answer = outer.post("k", "{}");
        answer.expect_problem(409, "in_progress");
        assert_eq!((answer.header(OUTCOME), answer.header("retry-after")), (None, Some("1")), "{answer:?}");
        assert!(!answer.replayed());
    }
    gate.open();
    assert_eq!(first.read().text(), "run 1");
    let answer = outer.post("k", "{}");
    assert_eq!((answer.status, answer.text().as_str()), (201, "run 1"), "the key was free in the outer gateway");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn an_unknown_outcome_inside_is_known_outside_as_soon_as_it_is_settled_inside() {
    let upstream = Upstream::scripted(|_, reply| reply.reset());
    let inner = Gateway::start(&upstream, "");
    let outer = Gateway::start_before(&format!("http://{}", inner.addr), "");
    outer.post("k", "{}").expect_problem(502, "upstream_broken");
    for _ in 0..2 {
        outer.post("k", "{}").expect_problem(409, "outcome_unknown");
    }
    assert_eq!(outer.metric("oncegate_records{state=\"unknown\"}"), 0.0, "the inner gateway keeps the record");
    assert_eq!(inner.metric("oncegate_records{state=\"unknown\"}"), 1.0);
    assert_eq!(upstream.count(), 1);
}
