//! `replay_auth = "probe"`: before anyone gets what a record holds, the upstream is asked whether he may see it.

mod verdicts;

use crate::support::{Client, Gate, Gateway, Received, Reply, Response, Upstream, eventually, request};

/// One record for all callers of a path; the upstream says who may see it.
const PROBE: &str =
    "idempotency.scope = [\"path\"]\nidempotency.replay_auth = \"probe\"\nidempotency.probe.path = \"/me\"\n";

/// An upstream that executes every POST, and answers probes as told.
fn upstream(answer: impl Fn(&Received, &mut Reply<'_>) + Send + Sync + 'static) -> Upstream {
    Upstream::scripted(move |request, reply| match request.method.as_str() {
        "POST" => reply.send(201, &[("Location", "/posts/7")], "made"),
        _ => answer(request, reply),
    })
}

/// Lets those through whose credential begins with "Bearer alice".
fn alice_alone(request: &Received, reply: &mut Reply<'_>) {
    match request.header("authorization") {
        Some(credential) if credential.starts_with("Bearer alice") => reply.send(200, &[], "alice"),
        Some(_) => reply.send(403, &[("X-Why", "stranger")], "not yours"),
        None => reply.send(401, &[("WWW-Authenticate", "Bearer realm=\"posts\"")], "who are you?"),
    }
}

fn by(caller: &str) -> String {
    post_by(caller, "/posts", "k")
}

fn post_by(caller: &str, target: &str, key: &str) -> String {
    request("POST", target, &[("Authorization", caller), ("Idempotency-Key", key)], "{}")
}

fn sent(gateway: &Gateway, request: impl AsRef<[u8]>) -> Client {
    let mut client = Client::connect(gateway.addr);
    client.send(request);
    client
}

fn probes(upstream: &Upstream) -> usize {
    upstream.requests().iter().filter(|request| request.method == "GET").count()
}

fn waiters(gateway: &Gateway, count: u32) {
    eventually("they wait", || (gateway.metric("oncegate_waiters") == f64::from(count)).then_some(()));
}

#[track_caller]
fn expect_made(answer: &Response) {
    assert_eq!((answer.status, answer.text().as_str(), answer.replayed()), (201, "made", true), "{answer:?}");
}

/// A gateway on which alice has made a post.
fn made(upstream: &Upstream, settings: &str) -> Gateway {
    let gateway = Gateway::start(upstream, &format!("{PROBE}{settings}"));
    let first = gateway.call(by("Bearer alice"));
    assert_eq!((first.status, first.replayed()), (201, false), "{first:?}");
    gateway
}

#[test]
fn a_first_execution_is_not_probed() {
    let upstream = upstream(|_, reply| reply.send(403, &[], ""));
    let gateway = made(&upstream, "");
    assert_eq!(gateway.call(post_by("Bearer bob", "/posts", "other")).text(), "made");
    assert_eq!(probes(&upstream), 0);
}

#[test]
fn a_stranger_gets_the_upstreams_refusal_instead_of_the_replay() {
    let upstream = upstream(alice_alone);
    let gateway = made(&upstream, "");
    let refused = gateway.call(by("Bearer bob"));
    assert_eq!((refused.status, refused.text().as_str(), refused.replayed()), (403, "not yours", false));
    assert_eq!((refused.header("x-why"), refused.header("location")), (Some("stranger"), None), "{refused:?}");
    let nobody = gateway.call(request("POST", "/posts", &[("Idempotency-Key", "k")], "{}"));
    assert_eq!((nobody.status, nobody.text().as_str()), (401, "who are you?"));
    assert_eq!(nobody.header("www-authenticate"), Some("Bearer realm=\"posts\""));
    expect_made(&gateway.call(by("Bearer alice")));
    assert_eq!(upstream.executions("k"), 1);
    let verdicts =
        ["allowed", "denied"].map(|verdict| gateway.metric(&format!("oncegate_probes_total{{verdict=\"{verdict}\"}}")));
    assert_eq!(verdicts, [1.0, 2.0]);
}

#[test]
fn after_a_restart_a_stranger_is_refused_all_the_same() {
    let upstream = upstream(alice_alone);
    let mut gateway = made(&upstream, "cache.max_bytes = \"0B\"\n");
    assert_eq!(gateway.call(by("Bearer bob")).status, 403, "without a hot cache");
    gateway.terminate();
    gateway.wait();
    let gateway = gateway.again(&[]).unwrap();
    assert_eq!(gateway.call(by("Bearer bob")).status, 403);
    expect_made(&gateway.call(by("Bearer alice")));
}

#[test]
fn a_stranger_does_not_learn_where_a_large_response_is() {
    let upstream = upstream(alice_alone);
    let gateway = made(&upstream, "idempotency.max_recorded_body = \"1B\"\n");
    let refused = gateway.call(by("Bearer bob"));
    assert_eq!((refused.status, refused.text().as_str()), (403, "not yours"));
    let told = gateway.call(by("Bearer alice"));
    told.expect_problem(409, "body_not_recorded");
    assert_eq!(told.json()["location"], "/posts/7");
}

#[test]
fn a_waiting_stranger_does_not_get_the_result() {
    for (settings, large) in [("", false), ("idempotency.max_recorded_body = \"1B\"\n", true)] {
        let gate = Gate::default();
        let held = gate.clone();
        let upstream = Upstream::scripted(move |request, reply| match request.method.as_str() {
            "POST" => {
                held.wait();
                reply.send(201, &[("Location", "/posts/7")], "made");
            }
            _ => alice_alone(request, reply),
        });
        let gateway = Gateway::start(&upstream, &format!("{PROBE}{settings}"));
        let mut first = sent(&gateway, by("Bearer alice"));
        upstream.wait_for(1);
        let mut waiting = ["Bearer bob", "Bearer alice"].map(|caller| sent(&gateway, by(caller)));
        waiters(&gateway, 2);
        assert_eq!(probes(&upstream), 0, "there is nothing to see yet");
        gate.open();
        assert_eq!(first.read().text(), "made");
        let [bob, alice] = waiting.each_mut().map(Client::read);
        assert_eq!((bob.status, bob.text().as_str(), bob.header("location")), (403, "not yours", None));
        if large {
            alice.expect_problem(409, "body_not_recorded");
        } else {
            expect_made(&alice);
        }
        assert_eq!((probes(&upstream), upstream.executions("k")), (2, 1));
    }
}

#[test]
fn a_token_that_rotates_between_two_retries_is_probed_and_sees_the_replay() {
    let upstream = upstream(alice_alone);
    let gateway = made(&upstream, "");
    for token in ["Bearer alice-2", "Bearer alice-3"] {
        expect_made(&gateway.call(by(token)));
        expect_made(&gateway.call(by(token)));
    }
    let asked = upstream.requests().split_off(1);
    let asked = asked.iter().map(|request| request.header("authorization").unwrap()).collect::<Vec<_>>();
    assert_eq!(asked, ["Bearer alice-2", "Bearer alice-3"], "each for itself, once");
}

#[test]
fn what_is_found_by_a_lookup_is_shown_to_nobody_who_may_not_see_it() {
    let upstream = Upstream::scripted(|request, reply| match request.target.as_str() {
        "/posts" => reply.reset(),
        "/by-key/k" => reply.send(200, &[], "made"),
        _ => alice_alone(request, reply),
    });
    let lookup = "idempotency.unknown_outcome = \"lookup\"\nidempotency.lookup.path = \"/by-key/{key}\"\n";
    let gateway = Gateway::start(&upstream, &format!("{PROBE}{lookup}"));
    gateway.call(by("Bearer alice")).expect_problem(502, "upstream_broken");
    assert_eq!(gateway.call(by("Bearer bob")).status, 403);
    let alice = gateway.call(by("Bearer alice"));
    assert_eq!((alice.status, alice.text().as_str(), alice.replayed()), (200, "made", true));
}

#[test]
fn another_payload_is_refused_without_a_probe() {
    let upstream = upstream(alice_alone);
    let gateway = made(&upstream, "");
    gateway.call(by("Bearer alice").replace("\r\n\r\n{}", "\r\n\r\n[]")).expect_problem(422, "key_reused");
    assert_eq!(probes(&upstream), 0);
}

#[test]
fn the_probe_bears_the_callers_credentials_and_nothing_of_the_body() {
    let upstream = upstream(|_, reply| reply.send(204, &[], ""));
    let gateway = Gateway::start(&upstream, PROBE);
    let fields = [
        ("Authorization", "Bearer alice"),
        ("Cookie", "a=b"),
        ("Content-Type", "application/json"),
        ("Idempotency-Key", "k"),
        ("Via", "1.1 edge"),
        ("If-Match", "\"x\""),
    ];
    let made = request("POST", "/posts", &fields, "{}");
    assert!(!gateway.call(&made).replayed());
    expect_made(&gateway.call(&made));
    let probe = upstream.requests().remove(1);
    assert_eq!((probe.method.as_str(), probe.target.as_str()), ("GET", "/me"));
    assert_eq!((probe.header("authorization"), probe.header("cookie")), (Some("Bearer alice"), Some("a=b")));
    assert_eq!((probe.header("host"), probe.header("x-forwarded-for")), (Some("api.example"), Some("127.0.0.1")));
    for name in ["idempotency-key", "content-type", "content-length", "via", "if-match"] {
        assert_eq!(probe.header(name), None, "{}", probe.head);
    }
    assert!(probe.body.is_empty());
}

#[test]
fn parameters_of_the_path_are_filled_in_and_each_path_has_its_own_verdict() {
    let upstream = upstream(|request, reply| {
        let status = if request.target == "/v1/workspaces/acme%2F1/me" { 200 } else { 403 };
        reply.send(status, &[], "");
    });
    let settings = PROBE.replace("\"/me\"", "\"/v1/workspaces/{workspace}/me\"");
    let route = "[[routes]]\npath = \"/v1/workspaces/{workspace}/posts\"\n";
    let gateway = Gateway::start(&upstream, &format!("{settings}{route}"));
    for (workspace, status) in [("acme%2F1", 201), ("other", 403)] {
        let target = format!("/v1/workspaces/{workspace}/posts");
        assert!(!gateway.call(post_by("Bearer alice", &target, "k")).replayed());
        for _ in 0..2 {
            assert_eq!(gateway.call(post_by("Bearer alice", &target, "k")).status, status);
        }
    }
    let asked = upstream.requests().into_iter().filter(|request| request.method == "GET");
    let asked = asked.map(|request| request.target).collect::<Vec<_>>();
    assert_eq!(asked, ["/v1/workspaces/acme%2F1/me", "/v1/workspaces/other/me"]);
}
