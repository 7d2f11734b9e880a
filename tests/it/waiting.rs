//! Duplicates of a request that is in flight.

use crate::support::{Client, Gate, Gateway, Response, Upstream, eventually, post, request};

/// An upstream that holds every request until the gate opens, then answers with `status`.
fn held(gate: &Gate, status: u16, headers: &'static [(&'static str, &'static str)]) -> Upstream {
    let gate = gate.clone();
    Upstream::scripted(move |request, reply| {
        gate.wait();
        reply.send(status, headers, format!("run {}", request.number));
    })
}

fn waiters(gateway: &Gateway, count: u32) {
    eventually("they wait", || (gateway.metric("oncegate_waiters") == f64::from(count)).then_some(()));
}

/// A client that has sent its request.
fn sent(gateway: &Gateway, request: impl AsRef<[u8]>) -> Client {
    let mut client = Client::connect(gateway.addr);
    client.send(request);
    client
}

/// Two clients with the same request: one whose request the upstream has, one that waits for it.
fn one_in_flight_one_waiting(gateway: &Gateway, upstream: &Upstream) -> (Client, Client) {
    let first = sent(gateway, post("/posts", "k", "{}"));
    upstream.wait_for(1);
    let second = sent(gateway, post("/posts", "k", "{}"));
    waiters(gateway, 1);
    (first, second)
}

#[test]
fn a_duplicate_waits_for_the_result_and_gets_it_as_a_replay() {
    let gate = Gate::default();
    let upstream = held(&gate, 201, &[]);
    let gateway = Gateway::start(&upstream, "");
    let (mut first, mut second) = one_in_flight_one_waiting(&gateway, &upstream);
    gate.open();
    let (first, second) = (first.read(), second.read());
    assert_eq!((first.text().as_str(), first.replayed()), ("run 1", false));
    assert_eq!((second.text().as_str(), second.replayed()), ("run 1", true));
}

#[test]
fn at_wait_timeout_a_duplicate_is_told_that_the_first_is_in_progress() {
    let gate = Gate::default();
    let upstream = held(&gate, 201, &[]);
    for settings in ["idempotency.wait_timeout = \"50ms\"", "idempotency.wait_timeout = \"0s\""] {
        let gateway = Gateway::start(&upstream, settings);
        let before = upstream.count();
        let _first = sent(&gateway, post("/posts", "k", "{}"));
        upstream.wait_for(before + 1);
        let second = gateway.post("k", "{}");
        second.expect_problem(409, "in_progress");
        assert_eq!(second.header("retry-after"), Some("1"));
    }
    gate.open();
}

#[test]
fn conflict_answers_at_once() {
    let gate = Gate::default();
    let upstream = held(&gate, 201, &[]);
    let gateway = Gateway::start(&upstream, "idempotency.concurrent = \"conflict\"\nidempotency.wait_timeout = \"1h\"");
    let mut first = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(1);
    gateway.post("k", "{}").expect_problem(409, "in_progress");
    gate.open();
    assert_eq!(first.read().text(), "run 1");
    assert!(gateway.post("k", "{}").replayed());
}

#[test]
fn another_payload_is_refused_before_it_waits() {
    let gate = Gate::default();
    let upstream = held(&gate, 201, &[]);
    let gateway = Gateway::start(&upstream, "");
    let _first = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(1);
    gateway.post("k", "[]").expect_problem(422, "key_reused");
    gate.open();
}

#[test]
fn the_number_of_waiters_is_bounded() {
    let gate = Gate::default();
    let upstream = held(&gate, 201, &[]);
    let gateway = Gateway::start(&upstream, "idempotency.max_waiters_per_key = 2");
    let mut all = vec![sent(&gateway, post("/posts", "k", "{}"))];
    upstream.wait_for(1);
    all.extend((0..2).map(|_| sent(&gateway, post("/posts", "k", "{}"))));
    waiters(&gateway, 2);
    gateway.post("k", "{}").expect_problem(409, "in_progress");
    gate.open();
    assert!(all.iter_mut().all(|client| client.read().text() == "run 1"));
}

#[test]
fn when_nothing_was_executed_waiters_with_the_same_credentials_get_that_same_response() {
    let gate = Gate::default();
    let upstream = held(&gate, 429, &[("Retry-After", "9"), ("Set-Cookie", "a=b"), ("X-Limit", "1")]);
    let gateway = Gateway::start(&upstream, "");
    let mut first = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(1);
    let mut others = (0..5).map(|_| sent(&gateway, post("/posts", "k", "{}"))).collect::<Vec<_>>();
    waiters(&gateway, 5);
    gate.open();
    let first = first.read();
    assert_eq!((first.status, first.header("set-cookie")), (429, Some("a=b")));
    for other in &mut others {
        let other = other.read();
        assert_eq!((other.status, other.text().as_str()), (429, "run 1"));
        assert_eq!((other.header("retry-after"), other.header("x-limit")), (Some("9"), Some("1")));
        assert_eq!((other.header("set-cookie"), other.replayed()), (None, false), "without drop_headers, unmarked");
    }
    assert_eq!(upstream.count(), 1, "a throttled upstream is not hit again");
    assert_eq!(gateway.post("k", "{}").text(), "run 2", "the key is free");
}

fn as_tenant(tenant: &str) -> String {
    request("POST", "/posts", &[("Authorization", tenant), ("Idempotency-Key", "k")], "{}")
}

#[test]
fn when_nothing_was_executed_others_claim_anew_one_at_a_time() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        passed.wait();
        let status = if request.header("authorization") == Some("Bearer c") { 201 } else { 403 };
        reply.send(status, &[], format!("for {}", request.header("authorization").unwrap()));
    });
    let gateway = Gateway::start(&upstream, "idempotency.scope = [\"path\"]\nidempotency.replay_auth = \"none\"");
    let mut first = sent(&gateway, as_tenant("Bearer a"));
    upstream.wait_for(1);
    let mut second = sent(&gateway, as_tenant("Bearer b"));
    waiters(&gateway, 1);
    gate.open();
    assert_eq!(first.read().text(), "for Bearer a");
    assert_eq!(second.read().text(), "for Bearer b", "not what another's credentials got");
    assert_eq!(gateway.call(as_tenant("Bearer c")).text(), "for Bearer c");
    assert_eq!(upstream.count(), 3);
}

#[test]
fn a_waiter_that_claims_anew_sends_its_own_bytes() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        passed.wait();
        reply.send(if request.number == 1 { 401 } else { 201 }, &[], "");
    });
    let gateway = Gateway::start(&upstream, "idempotency.scope = [\"path\"]\nidempotency.replay_auth = \"none\"");
    let body = |tenant: &str, body: &str| {
        request("POST", "/posts", &[("Authorization", tenant), ("Idempotency-Key", "k")], body)
    };
    let mut first = sent(&gateway, body("a", r#"{"a":1,"b":2}"#));
    upstream.wait_for(1);
    let mut second = sent(&gateway, body("b", r#"{ "b": 2, "a": 1 }"#));
    waiters(&gateway, 1);
    gate.open();
    assert_eq!((first.read().status, second.read().status), (401, 201));
    assert_eq!(upstream.requests()[1].body, br#"{ "b": 2, "a": 1 }"#);
}

#[test]
fn an_unreachable_upstream_is_not_tried_by_each_waiter() {
    // Nobody accepts: the backlog is full, so connecting hangs until its timeout.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket2::SockRef::from(&listener).listen(0).unwrap();
    let addr = listener.local_addr().unwrap();
    let _fill = (0..4).map(|_| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&addr.into());
        socket
    });
    let _fill = _fill.collect::<Vec<_>>();
    let gateway = Gateway::start_before(&format!("http://{addr}"), "upstream.connect_timeout = \"700ms\"");
    let mut first = sent(&gateway, post("/posts", "k", "{}"));
    eventually("it connects", || (gateway.metric("oncegate_upstream_in_flight") == 1.0).then_some(()));
    let mut second = sent(&gateway, post("/posts", "k", "{}"));
    waiters(&gateway, 1);
    for answer in [first.read(), second.read()] {
        answer.expect_problem(502, "upstream_unreachable");
        assert_eq!(answer.header("proxy-status"), Some("oncegate; error=connection_timeout"));
    }
    assert_eq!(gateway.metric("oncegate_settled_total{outcome=\"not_executed\"}"), 1.0, "one claim for both");
}

#[test]
fn when_the_outcome_is_unknown_waiters_are_told_so() {
    let gate = Gate::default();
    let upstream = held(&gate, 502, &[]);
    let gateway = Gateway::start(&upstream, "");
    let (mut first, mut second) = one_in_flight_one_waiting(&gateway, &upstream);
    gate.open();
    assert_eq!(first.read().text(), "run 1", "the caller gets the response");
    second.read().expect_problem(409, "outcome_unknown");
    assert_eq!(upstream.count(), 1);
}

const IMPATIENT: &str = "upstream.response_timeout = \"100ms\"\n";

/// The first caller has got its 504; the upstream still works on it.
fn timed_out(gate: &Gate, settings: &str) -> (Upstream, Gateway) {
    let upstream = held(gate, 201, &[]);
    let gateway = Gateway::start(&upstream, &format!("{IMPATIENT}{settings}"));
    let first = gateway.post("k", "{}");
    first.expect_problem(504, "upstream_timeout");
    assert_eq!(first.header("proxy-status"), Some("oncegate; error=http_response_timeout"));
    (upstream, gateway)
}

#[test]
fn after_the_504_a_duplicate_is_told_to_come_back_later() {
    let gate = Gate::default();
    let (_upstream, gateway) = timed_out(&gate, "idempotency.concurrent = \"conflict\"");
    let second = gateway.post("k", "{}");
    second.expect_problem(409, "in_progress");
    assert_eq!(second.header("retry-after"), Some("5"));
    gate.open();
}

#[test]
fn a_late_response_settles_the_key_and_replays() {
    let gate = Gate::default();
    let (upstream, gateway) = timed_out(&gate, "");
    let mut second = sent(&gateway, post("/posts", "k", "{}"));
    waiters(&gateway, 1);
    gate.open();
    let second: Response = second.read();
    assert_eq!((second.text().as_str(), second.replayed()), ("run 1", true), "the 504 did not wake it, the result did");
    assert!(gateway.post("k", "{}").replayed());
    assert_eq!(upstream.count(), 1);
}

#[test]
fn after_the_late_window_the_outcome_is_unknown() {
    let gate = Gate::default();
    let (upstream, gateway) = timed_out(&gate, "upstream.late_window = \"100ms\"");
    let second = gateway.post("k", "{}");
    second.expect_problem(409, "outcome_unknown");
    assert_eq!(upstream.count(), 1);
    gate.open();
}
