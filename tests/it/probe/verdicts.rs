//! What counts as a verdict, and for how long.

use super::{PROBE, alice_alone, by, expect_made, made, probes, sent, upstream, waiters};
use crate::support::{Client, Gate, Gateway, Reply, Response, Upstream, eventually, request};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[track_caller]
fn expect_failed(answer: &Response) {
    answer.expect_problem(503, "probe_failed");
    assert_eq!(answer.header("retry-after"), Some("1"), "{answer:?}");
}

#[test]
fn what_is_neither_2xx_nor_401_nor_403_is_no_verdict() {
    type Answer = fn(&mut Reply<'_>);
    let answers: [(&str, Answer, u16); 20] = [
        ("200", |reply| reply.send(200, &[], "yes"), 201),
        ("204", |reply| reply.raw("HTTP/1.1 204 X\r\n\r\n"), 201),
        ("299", |reply| reply.send(299, &[], ""), 201),
        ("yes, at length", |reply| reply.send(200, &[], "x".repeat(3 << 20)), 201),
        ("no, at too great a length", |reply| reply.send(403, &[], "x".repeat(3 << 20)), 503),
        ("301", |reply| reply.send(301, &[("Location", "/me2")], ""), 503),
        ("304", |reply| reply.raw("HTTP/1.1 304 X\r\n\r\n"), 503),
        ("400", |reply| reply.send(400, &[], ""), 503),
        ("402", |reply| reply.send(402, &[], ""), 503),
        ("404", |reply| reply.send(404, &[], ""), 503),
        ("407", |reply| reply.send(407, &[], ""), 503),
        ("429", |reply| reply.send(429, &[], ""), 503),
        ("500", |reply| reply.send(500, &[], ""), 503),
        ("503", |reply| reply.send(503, &[], ""), 503),
        ("reset", |reply| reply.reset(), 503),
        ("closed", |reply| reply.close(), 503),
        ("silence", |reply| assert!(reply.closed_by_peer()), 503),
        ("nonsense", |reply| reply.raw("nonsense\r\n\r\n"), 503),
        (
            "cut off",
            |reply| {
                reply.raw("HTTP/1.1 403 X\r\nContent-Length: 9\r\n\r\nno");
                reply.close();
            },
            503,
        ),
        (
            "yes, cut off",
            |reply| {
                reply.raw("HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\nye");
                reply.close();
            },
            503,
        ),
    ];
    let at = Arc::new(AtomicUsize::new(0));
    let now = Arc::clone(&at);
    let upstream = upstream(move |_, reply| answers[now.load(Ordering::SeqCst)].1(reply));
    let gateway = made(&upstream, "idempotency.probe.timeout = \"300ms\"\n");
    for (number, (name, _, status)) in answers.iter().enumerate() {
        at.store(number, Ordering::SeqCst);
        let before = probes(&upstream);
        for retry in 1..=2 {
            let answer = gateway.call(by(name));
            if *status == 201 {
                expect_made(&answer);
                assert_eq!(probes(&upstream), before + 1, "{name}");
            } else {
                expect_failed(&answer);
                // A GET may be sent again on another connection, if the first one breaks.
                assert!(probes(&upstream) >= before + retry, "{name}: a failure is not kept");
            }
        }
    }
    assert_eq!(upstream.executions("k"), 1);
    assert!(upstream.requests().iter().all(|request| request.target != "/me2"));
    let failed = answers.iter().filter(|(.., status)| *status == 503).count();
    assert_eq!(gateway.metric("oncegate_probes_total{verdict=\"failed\"}"), 2.0 * failed as f64);
}

#[test]
fn an_upstream_that_cannot_be_reached_shows_nothing_to_anyone() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway = Gateway::start_before(&url, PROBE);
    let mut first = sent(&gateway, by("Bearer alice"));
    let mut connection = Client::from(listener.accept().unwrap().0);
    connection.read_head();
    connection.send("HTTP/1.1 201 X\r\nContent-Length: 4\r\nConnection: close\r\n\r\nmade");
    assert_eq!(first.read().text(), "made");
    drop((connection, listener));
    expect_failed(&gateway.call(by("Bearer alice")));
}

#[test]
fn a_verdict_counts_for_probe_cache_and_no_longer() {
    let allowed = Arc::new(AtomicBool::new(true));
    let now = Arc::clone(&allowed);
    let upstream = upstream(move |_, reply| {
        let status = if now.load(Ordering::SeqCst) { 200 } else { 403 };
        reply.send(status, &[], "verdict");
    });
    let gateway = made(&upstream, "idempotency.probe.cache = \"800ms\"\n");
    let asked = Instant::now();
    for _ in 0..10 {
        expect_made(&gateway.call(by("Bearer alice")));
    }
    assert!(asked.elapsed() < Duration::from_millis(800), "this machine is too slow for this test");
    assert_eq!(probes(&upstream), 1, "one for many replays");
    allowed.store(false, Ordering::SeqCst);
    let denied = eventually("the withdrawal is noticed", || {
        let answer = gateway.call(by("Bearer alice"));
        if answer.status == 403 {
            Some(answer)
        } else {
            expect_made(&answer);
            None
        }
    });
    assert!(asked.elapsed() >= Duration::from_millis(800) && asked.elapsed() < Duration::from_secs(5));
    assert_eq!((denied.text().as_str(), probes(&upstream)), ("verdict", 2));
    allowed.store(true, Ordering::SeqCst);
    assert_eq!(gateway.call(by("Bearer alice")).status, 403, "a denial counts as long");
    eventually("the grant is noticed", || gateway.call(by("Bearer alice")).replayed().then_some(()));
    assert_eq!(probes(&upstream), 3);
}

#[test]
fn a_verdict_is_for_these_credentials_at_this_host() {
    let upstream = upstream(alice_alone);
    let gateway = made(&upstream, "");
    let call = |host: &str, fields: &[(&str, &str)]| {
        let fields = fields.iter().copied().chain([("Idempotency-Key", "k")]).collect::<Vec<_>>();
        gateway.call(request("POST", "/posts", &fields, "{}").replace("api.example", host))
    };
    let alice = ("Authorization", "Bearer alice");
    for (host, fields) in [
        ("api.example", vec![alice]),
        ("api.example", vec![("Authorization", "Bearer alice2")]),
        ("api.example", vec![alice, ("Cookie", "a=b")]),
        ("api.example", vec![alice, ("Cookie", "a=c")]),
        ("api.example", vec![alice, ("X-Api-Key", "1")]),
        ("api.example", vec![alice, ("X-Api-Key", "2")]),
        ("other.example", vec![alice]),
    ] {
        let before = probes(&upstream);
        for _ in 0..2 {
            expect_made(&call(host, &fields));
        }
        assert_eq!(probes(&upstream), before + 1, "{host} {fields:?}");
    }
    expect_made(&call("api.example", &[alice, ("X-Other", "no credential")]));
    assert_eq!(probes(&upstream), 7);
    assert_eq!(call("api.example", &[("Authorization", "Bearer bob")]).status, 403, "whatever alice may");
}

/// An upstream that holds its answers to probes until the gate opens.
fn holding(gate: &Gate, status: u16, body: String) -> Upstream {
    let gate = gate.clone();
    upstream(move |_, reply| {
        gate.wait();
        reply.send(status, &[], &body);
    })
}

#[test]
fn of_50_replays_at_once_one_asks() {
    for (status, settings) in [(200, ""), (403, ""), (200, "server.workers = 4\n")] {
        let gate = Gate::default();
        let upstream = holding(&gate, status, "verdict".to_owned());
        let gateway = made(&upstream, settings);
        let mut clients = (0..50).map(|_| sent(&gateway, by("Bearer alice"))).collect::<Vec<_>>();
        upstream.wait_for(2);
        gate.open();
        for answer in clients.iter_mut().map(Client::read) {
            assert_eq!(answer.status, if status == 200 { 201 } else { 403 }, "{answer:?}");
        }
        assert_eq!((probes(&upstream), upstream.executions("k")), (1, 1));
    }
}

#[test]
fn without_a_cache_each_is_probed_but_those_at_once_share_one() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200, String::new());
    let gateway = made(&upstream, "idempotency.probe.cache = \"0s\"\n");
    let mut clients = (0..50).map(|_| sent(&gateway, by("Bearer alice"))).collect::<Vec<_>>();
    upstream.wait_for(2);
    gate.open();
    clients.iter_mut().for_each(|client| expect_made(&client.read()));
    let shared = probes(&upstream);
    assert!(shared <= 10, "{shared} probes for 50 callers at once");
    for more in 1..=3 {
        expect_made(&gateway.call(by("Bearer alice")));
        assert_eq!(probes(&upstream), shared + more, "each for itself");
    }
}

#[test]
fn what_is_not_kept_is_shared_by_those_who_waited_for_it() {
    for (status, body) in [(500, 0), (403, 100 << 10)] {
        let gate = Gate::default();
        let upstream = holding(&gate, status, "x".repeat(body));
        let gateway = made(&upstream, "");
        let mut clients = (0..50).map(|_| sent(&gateway, by("Bearer alice"))).collect::<Vec<_>>();
        upstream.wait_for(2);
        gate.open();
        for answer in clients.iter_mut().map(Client::read) {
            assert_eq!((answer.status, answer.replayed()), (if status == 500 { 503 } else { 403 }, false));
        }
        let asked = probes(&upstream);
        assert!(asked <= 10, "an upstream that says {status} was asked {asked} times by 50 callers at once");
        gateway.call(by("Bearer alice"));
        assert_eq!(probes(&upstream), asked + 1, "who comes later asks again");
    }
}

#[test]
fn a_probe_that_takes_too_long_fails_all_who_wait_for_it_in_time() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200, String::new());
    let gateway = made(&upstream, "idempotency.probe.timeout = \"300ms\"\n");
    let asked = Instant::now();
    let mut clients = (0..20).map(|_| sent(&gateway, by("Bearer alice"))).collect::<Vec<_>>();
    clients.iter_mut().for_each(|client| expect_failed(&client.read()));
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    gate.open();
    expect_made(&gateway.call(by("Bearer alice")));
    assert_eq!(upstream.executions("k"), 1);
}

#[test]
fn a_client_that_hangs_up_leaves_the_probe_to_the_others() {
    let gate = Gate::default();
    let upstream = holding(&gate, 200, String::new());
    let gateway = made(&upstream, "");
    let first = sent(&gateway, by("Bearer alice"));
    upstream.wait_for(2);
    let mut second = sent(&gateway, by("Bearer alice"));
    first.reset();
    gate.open();
    expect_made(&second.read());
    expect_made(&gateway.call(by("Bearer alice")));
    assert!(probes(&upstream) <= 2);
}

#[test]
fn a_denial_with_a_large_body_is_that_very_response() {
    let upstream = upstream(|_, reply| reply.send(403, &[("X-Why", "large")], "x".repeat(100 << 10)));
    // What may be recorded is no limit for it.
    let gateway = made(&upstream, "idempotency.max_recorded_body = \"1KiB\"\n");
    for _ in 0..2 {
        let denied = gateway.call(by("Bearer bob"));
        assert_eq!((denied.status, denied.body.len(), denied.header("x-why")), (403, 100 << 10, Some("large")));
        assert!(!denied.replayed());
    }
    assert_eq!(upstream.executions("k"), 1);
}

#[test]
fn a_denials_cookies_are_for_one_caller_alone() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = upstream(move |request, reply| {
        held.wait();
        reply.send(401, &[("Set-Cookie", &format!("n={}", request.number)), ("WWW-Authenticate", "Bearer")], "");
    });
    let gateway = made(&upstream, "");
    let mut clients = (0..3).map(|_| sent(&gateway, by("Bearer bob"))).collect::<Vec<_>>();
    upstream.wait_for(2);
    gate.open();
    for answer in clients.iter_mut().map(Client::read) {
        assert_eq!(
            (answer.status, answer.header("www-authenticate"), answer.header("set-cookie")),
            (401, Some("Bearer"), None)
        );
    }
}

#[test]
fn waiters_are_probed_once_each_has_something_to_see() {
    let (post_gate, probe_gate) = (Gate::default(), Gate::default());
    let (made_, asked) = (post_gate.clone(), probe_gate.clone());
    let upstream = Upstream::scripted(move |request, reply| {
        if request.method == "POST" {
            made_.wait();
            return reply.send(201, &[], "made");
        }
        asked.wait();
        alice_alone(request, reply);
    });
    let gateway = Gateway::start(&upstream, PROBE);
    let mut first = sent(&gateway, by("Bearer alice"));
    upstream.wait_for(1);
    let mut waiting = (0..20).map(|_| sent(&gateway, by("Bearer alice"))).collect::<Vec<_>>();
    waiters(&gateway, 20);
    post_gate.open();
    assert!(!first.read().replayed(), "the first caller is not probed");
    upstream.wait_for(2);
    probe_gate.open();
    waiting.iter_mut().for_each(|client| expect_made(&client.read()));
    assert_eq!((probes(&upstream), upstream.executions("k")), (1, 1));
}
