//! `unknown_outcome = "lookup"`: the upstream is asked what became of a request.

mod question;
mod races;
mod row;

use crate::support::{Client, Gate, Gateway, Received, Reply, Response, Upstream, eventually, post};
use std::collections::HashSet;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Asks by key, and believes a 404 at once.
const LOOKUP: &str = "idempotency.unknown_outcome = \"lookup\"\nidempotency.lookup.path = \"/posts/by-key/{key}\"\n\
                      idempotency.lookup.not_executed = [\"404\"]\nidempotency.lookup.min_age = \"0s\"\n";

/// An upstream that loses the connection at the first POST with a key, and executes the next; GETs are answered as told.
fn upstream(answer: impl Fn(&Received, &mut Reply<'_>) + Send + Sync + 'static) -> Upstream {
    let met = Mutex::new(HashSet::new());
    Upstream::scripted(move |request, reply| match request.key() {
        None => answer(request, reply),
        Some(key) if met.lock().unwrap().insert(key.to_owned()) => reply.reset(),
        Some(_) => reply.send(201, &[], "executed anew"),
    })
}

fn lookups(upstream: &Upstream) -> usize {
    upstream.requests().iter().filter(|request| request.method == "GET").count()
}

/// A gateway that knows not what became of the key `k`.
fn unknown(upstream: &Upstream, settings: &str) -> Gateway {
    let gateway = Gateway::start(upstream, &format!("{LOOKUP}{settings}"));
    gateway.post("k", "{}").expect_problem(502, "upstream_broken");
    gateway
}

fn sent(gateway: &Gateway, request: impl AsRef<[u8]>) -> Client {
    let mut client = Client::connect(gateway.addr);
    client.send(request);
    client
}

fn waiters(gateway: &Gateway, count: u32) {
    eventually("they wait", || (gateway.metric("oncegate_waiters") == f64::from(count)).then_some(()));
}

/// What an answer to a question makes of the next retry.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// It is replayed, with this status and body.
    Replay(u16, &'static str),
    /// 409 `body_not_recorded`.
    NoBody,
    /// 409 `outcome_unknown`, and the next retry asks again.
    AskAgain,
    /// It is executed anew.
    Execute,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Keep,
    Close,
    Reset,
    Silence,
}

/// Retries twice, and checks that both fare as told.
#[track_caller]
fn retry_twice(gateway: &Gateway, upstream: &Upstream, key: &str, then: Then) {
    let target = format!("/posts/by-key/{key}");
    let asked = || upstream.requests().iter().filter(|request| request.target == target).count();
    for retry in 1..=2 {
        let answer = gateway.post(key, "{}");
        let context = format!("{key}, retry {retry}, {then:?}: {answer:?}");
        assert_eq!(answer.header("idempotency-outcome"), None, "{context}");
        match then {
            Then::Replay(status, body) => {
                assert_eq!(
                    (answer.status, answer.text().as_str(), answer.replayed()),
                    (status, body, true),
                    "{context}"
                );
                assert_eq!(answer.header("set-cookie"), None, "{context}");
                assert!(answer.header("age").is_some() && answer.header("cache-status").is_some(), "{context}");
            }
            Then::NoBody => {
                answer.expect_problem(409, "body_not_recorded");
                assert_eq!(
                    (&answer.json()["upstream_status"], &answer.json()["location"]),
                    (&200.into(), &"/posts/7".into())
                );
            }
            Then::AskAgain => {
                answer.expect_problem(409, "outcome_unknown");
                assert_eq!(answer.header("retry-after"), None, "{context}");
            }
            Then::Execute => {
                assert_eq!(
                    (answer.status, answer.text().as_str(), answer.replayed()),
                    (201, "executed anew", retry == 2)
                );
            }
        }
        let lookups = if matches!(then, Then::AskAgain) { retry } else { 1 };
        assert_eq!(asked(), lookups, "questions; {context}");
        assert_eq!(upstream.executions(key), if matches!(then, Then::Execute) { 2 } else { 1 }, "{context}");
    }
}

fn framed(status: u16, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status} Status\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
}

/// Each answer with what it means, and what it means where a 404 proves nothing.
fn answers() -> Vec<(&'static str, String, End, Then, Then)> {
    use Then::{AskAgain, Execute, NoBody, Replay};
    let found = Replay(200, "found");
    let large = "x".repeat(2048);
    let mut answers = vec![
        ("ok", framed(200, "X-Post: 7\r\nSet-Cookie: a=b\r\n", "found"), End::Keep, found, found),
        ("created", framed(201, "", "found"), End::Keep, Replay(201, "found"), Replay(201, "found")),
        ("accepted", framed(202, "", ""), End::Keep, Replay(202, ""), Replay(202, "")),
        ("empty", "HTTP/1.1 204 Status\r\n\r\n".to_owned(), End::Keep, Replay(204, ""), Replay(204, "")),
        ("missing", framed(404, "", "none"), End::Keep, Execute, AskAgain),
        ("ok-unframed", "HTTP/1.1 200 OK\r\n\r\nfound".to_owned(), End::Close, found, found),
        ("ok-large", framed(200, "Location: /posts/7\r\n", &large), End::Keep, NoBody, NoBody),
        (
            "ok-large-chunked",
            format!(
                "HTTP/1.1 200 OK\r\nLocation: /posts/7\r\nTransfer-Encoding: chunked\r\n\r\n800\r\n{large}\r\n0\r\n\r\n"
            ),
            End::Keep,
            NoBody,
            NoBody,
        ),
        ("missing-large", framed(404, "", &large), End::Keep, Execute, AskAgain),
        ("says-not-executed", framed(200, "Idempotency-Outcome: not-executed\r\n", "x"), End::Keep, Execute, Execute),
        ("says-so-with-500", framed(500, "Idempotency-Outcome: not-executed\r\n", ""), End::Keep, Execute, Execute),
        ("says-so-with-403", framed(403, "Idempotency-Outcome: not-executed\r\n", ""), End::Keep, Execute, Execute),
        ("says-unknown", framed(200, "Idempotency-Outcome: unknown\r\n", "x"), End::Keep, AskAgain, AskAgain),
        ("unknown-not-missing", framed(404, "Idempotency-Outcome: unknown\r\n", ""), End::Keep, AskAgain, AskAgain),
        ("says-final", framed(200, "Idempotency-Outcome: final\r\n", "found"), End::Keep, found, found),
        ("final-not-missing", framed(404, "Idempotency-Outcome: final\r\n", ""), End::Keep, AskAgain, AskAgain),
        ("says-nonsense", framed(200, "Idempotency-Outcome: perhaps\r\n", "found"), End::Keep, found, found),
        ("ok-cut-off", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nfou".to_owned(), End::Close, AskAgain, AskAgain),
        ("ok-reset", "HTTP/1.1 200 OK\r\n\r\nfou".to_owned(), End::Reset, AskAgain, AskAgain),
        (
            "chunks-cut-off",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nfou\r\n".to_owned(),
            End::Close,
            AskAgain,
            AskAgain,
        ),
        ("missing-cut-off", "HTTP/1.1 404 X\r\nContent-Length: 9\r\n\r\nno".to_owned(), End::Close, AskAgain, AskAgain),
        ("body-stalls", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfou".to_owned(), End::Silence, AskAgain, AskAgain),
        ("silence", String::new(), End::Silence, AskAgain, AskAgain),
        ("closed", String::new(), End::Close, AskAgain, AskAgain),
        ("reset", String::new(), End::Reset, AskAgain, AskAgain),
        ("nonsense", "nonsense\r\n\r\n".to_owned(), End::Close, AskAgain, AskAgain),
        (
            "switching",
            "HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n".to_owned(),
            End::Close,
            AskAgain,
            AskAgain,
        ),
    ];
    for (name, status) in
        [("302", 302), ("304", 304), ("400", 400), ("401", 401), ("403", 403), ("405", 405), ("409", 409)]
            .into_iter()
            .chain([("410", 410), ("429", 429), ("500", 500), ("501", 501), ("502", 502), ("503", 503), ("504", 504)])
    {
        let answer = match status {
            304 => "HTTP/1.1 304 Status\r\n\r\n".to_owned(),
            _ => framed(status, "Location: /elsewhere\r\nRetry-After: 1\r\n", "text"),
        };
        answers.push((name, answer, End::Keep, AskAgain, AskAgain));
    }
    answers
}

fn scripted_answers() -> Upstream {
    let answers = answers();
    upstream(move |request, reply| {
        let name = request.target.strip_prefix("/posts/by-key/");
        let Some((_, answer, end, ..)) = answers.iter().find(|answer| name == Some(answer.0)) else {
            return reply.send(200, &[], "nobody has asked for this");
        };
        reply.raw(answer);
        match end {
            End::Keep => {}
            End::Close => reply.close(),
            End::Reset => reply.reset(),
            End::Silence => assert!(reply.closed_by_peer()),
        }
    })
}

/// With one worker no connection is pooled when a question is asked (the POST before has just lost it): a GET that is lost on
/// a pooled one would be sent again.
const SMALL: &str =
    "server.workers = 1\nidempotency.max_recorded_body = \"1KiB\"\nidempotency.lookup.timeout = \"300ms\"\n";

#[test]
fn a_2xx_is_recorded_and_replayed_a_proof_frees_the_key_anything_else_decides_nothing() {
    let upstream = scripted_answers();
    let gateway = Gateway::start(&upstream, &format!("{LOOKUP}{SMALL}"));
    for (key, _, _, then, _) in answers() {
        gateway.post(key, "{}").expect_problem(502, "upstream_broken");
        retry_twice(&gateway, &upstream, key, then);
    }
    assert_eq!(upstream.requests().iter().filter(|request| request.target == "/elsewhere").count(), 0);
    let recorded = gateway.post("ok", "{}");
    assert_eq!(recorded.header("x-post"), Some("7"), "{recorded:?}");
}

#[test]
fn no_status_proves_that_nothing_was_executed_unless_the_operator_says_so() {
    let upstream = scripted_answers();
    let settings = LOOKUP.replace("idempotency.lookup.not_executed = [\"404\"]\n", "");
    let gateway = Gateway::start(&upstream, &format!("{settings}{SMALL}"));
    for (key, _, _, _, then) in answers() {
        gateway.post(key, "{}").expect_problem(502, "upstream_broken");
        retry_twice(&gateway, &upstream, key, then);
    }
}

#[test]
fn statuses_that_prove_it_may_be_classes_and_depend_on_retry_after() {
    let upstream = scripted_answers();
    let settings = LOOKUP.replace("[\"404\"]", "[\"40x\", \"503+retry-after\"]");
    let gateway = Gateway::start(&upstream, &settings);
    for (key, then) in
        [("missing", Then::Execute), ("403", Then::Execute), ("503", Then::Execute), ("500", Then::AskAgain)]
    {
        gateway.post(key, "{}").expect_problem(502, "upstream_broken");
        retry_twice(&gateway, &upstream, key, then);
    }
}

#[test]
fn an_upstream_that_cannot_be_reached_decides_nothing() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway = Gateway::start_before(&url, LOOKUP);
    let mut first = sent(&gateway, post("/posts", "k", "{}"));
    let (connection, _) = listener.accept().unwrap();
    eventually("it is sent", || (gateway.metric("oncegate_upstream_in_flight") == 1.0).then_some(()));
    let mut connection = Client::from(connection);
    connection.read_head();
    connection.reset();
    first.read().expect_problem(502, "upstream_broken");
    drop(listener);
    for _ in 0..2 {
        gateway.post("k", "{}").expect_problem(409, "outcome_unknown");
    }
    assert_eq!(gateway.metric("oncegate_lookups_total{verdict=\"undecided\"}"), 2.0);
}

/// However a record has become unknown, it is looked up.
#[test]
fn every_way_to_become_unknown_ends_in_a_lookup() {
    for (key, then) in [("ok", Then::Replay(200, "found")), ("missing", Then::Execute), ("500", Then::AskAgain)] {
        for way in ["reset", "timeout", "status", "malformed", "kill"] {
            let gate = Gate::default();
            let (held, met) = (gate.clone(), Mutex::new(false));
            let upstream = Upstream::scripted(move |request, reply| {
                let first = request.key().is_some() && !std::mem::replace(&mut *met.lock().unwrap(), true);
                match (first, way, request.target.as_str()) {
                    (true, "reset", _) => reply.reset(),
                    (true, "status", _) => reply.send(502, &[], "lost"),
                    (true, "malformed", _) => reply.raw("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
                    (true, ..) => held.wait(),
                    (false, _, "/posts/by-key/ok") => reply.send(200, &[], "found"),
                    (false, _, "/posts/by-key/missing") => reply.send(404, &[], ""),
                    (false, _, "/posts") => reply.send(201, &[], "executed anew"),
                    _ => reply.send(500, &[], ""),
                }
            });
            let short = "upstream.response_timeout = \"300ms\"\nupstream.late_window = \"100ms\"\n";
            let mut gateway = Gateway::start(&upstream, &format!("{LOOKUP}{short}"));
            match way {
                "kill" => {
                    let _lost = sent(&gateway, post("/posts", key, "{}"));
                    upstream.wait_for(1);
                    gateway.kill();
                    gateway = gateway.again(&[]).unwrap();
                }
                "timeout" => gateway.post(key, "{}").expect_problem(504, "upstream_timeout"),
                "status" => assert_eq!(gateway.post(key, "{}").text(), "lost"),
                _ => gateway.post(key, "{}").expect_problem(502, "upstream_broken"),
            }
            let unknown = "oncegate_records{state=\"unknown\"}";
            eventually("it is unknown", || (gateway.metric(unknown) == 1.0).then_some(()));
            assert_eq!(upstream.count(), 1, "{way}: nothing was asked before somebody wanted to know");
            retry_twice(&gateway, &upstream, key, then);
            gate.open();
        }
    }
}

#[test]
fn a_not_executed_counts_only_min_age_after_the_claim() {
    let upstream = upstream(|_, reply| reply.send(404, &[], ""));
    for (settings, min_age) in [
        ("idempotency.lookup.min_age = \"700ms\"\n", 700),
        ("upstream.response_timeout = \"300ms\"\nupstream.late_window = \"400ms\"\n", 700),
    ] {
        let key = settings.len().to_string();
        let base = LOOKUP.replace("idempotency.lookup.min_age = \"0s\"\n", "");
        let gateway = Gateway::start(&upstream, &format!("{base}{settings}"));
        let before = Instant::now();
        gateway.post(&key, "{}").expect_problem(502, "upstream_broken");
        let (mut early, asked_before) = (0, lookups(&upstream));
        let executed = eventually("the key is free", || {
            let answer = gateway.post(&key, "{}");
            if answer.status == 201 {
                return Some(answer);
            }
            answer.expect_problem(409, "in_progress");
            assert!(answer.header("retry-after").is_some(), "{answer:?}");
            early += 1;
            None
        });
        assert!(before.elapsed() >= Duration::from_millis(min_age), "too early: {:?}", before.elapsed());
        assert!(early > 0 && !executed.replayed());
        assert_eq!(lookups(&upstream) - asked_before, early + 1, "each asks");
        assert!(gateway.post(&key, "{}").replayed());
        assert_eq!(upstream.executions(&key), 2);
    }
}

#[test]
fn min_age_is_over_when_the_question_is_sent_not_when_it_is_answered() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = upstream(move |_, reply| {
        held.wait();
        reply.send(404, &[], "");
    });
    let start = Instant::now();
    let gateway = Gateway::start(&upstream, &LOOKUP.replace("\"0s\"", "\"2s\""));
    gateway.post("k", "{}").expect_problem(502, "upstream_broken");
    let mut retry = sent(&gateway, post("/posts", "k", "{}"));
    upstream.wait_for(2);
    assert!(start.elapsed() < Duration::from_secs(2), "this machine is too slow for this test");
    // Time has to pass between the question and its answer.
    std::thread::sleep(Duration::from_millis(2100));
    gate.open();
    retry.read().expect_problem(409, "in_progress");
    assert_eq!(upstream.executions("k"), 1);
    assert_eq!(gateway.post("k", "{}").text(), "executed anew");
}

#[test]
fn a_2xx_counts_at_any_time() {
    let upstream = upstream(|_, reply| reply.send(200, &[], "found"));
    let gateway = Gateway::start(&upstream, &LOOKUP.replace("\"0s\"", "\"1h\""));
    gateway.post("k", "{}").expect_problem(502, "upstream_broken");
    assert_eq!(gateway.post("k", "{}").text(), "found");
    let verdicts = ["executed", "not_executed", "undecided"].map(|verdict| {
        gateway.admin("/metrics").text().contains(&format!("oncegate_lookups_total{{verdict=\"{verdict}\"}} 1"))
    });
    assert_eq!(verdicts, [true, false, false]);
}

#[test]
fn after_a_new_claim_its_own_loss_is_looked_up_anew() {
    let upstream = Upstream::scripted(|request, reply| match (request.number, request.key()) {
        (1 | 3, Some(_)) => reply.reset(),
        (2, None) => reply.send(404, &[], ""),
        (4, None) => reply.send(200, &[], "found"),
        _ => reply.send(500, &[], "nobody asks for this"),
    });
    let gateway = unknown(&upstream, "");
    gateway.post("k", "{}").expect_problem(502, "upstream_broken");
    let found: Response = gateway.post("k", "{}");
    assert_eq!((found.text().as_str(), found.replayed()), ("found", true));
    assert_eq!(upstream.count(), 4);
}
