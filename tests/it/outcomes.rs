//! The outcome table: what each way to end means for the caller, for a retry and for the upstream.

use crate::support::{Gateway, Reply, Response, Upstream, eventually};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// What a retry meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Replay,
    Executed,
    Unknown,
}

/// Sends a key twice and says what became of the retry.
#[track_caller]
fn retry(gateway: &Gateway, upstream: &Upstream, key: &str) -> (Response, Then) {
    let first = gateway.post(key, "{}");
    assert!(!first.replayed(), "{first:?}");
    let before = upstream.count();
    let second = gateway.post(key, "{}");
    let then = match (second.replayed(), upstream.count() - before) {
        (true, 0) => {
            assert_eq!((second.status, &second.body), (first.status, &first.body));
            Then::Replay
        }
        (false, 1) => Then::Executed,
        (false, 0) => {
            second.expect_problem(409, "outcome_unknown");
            assert_eq!(second.header("retry-after"), None, "a blind retry will not help");
            Then::Unknown
        }
        other => panic!("{key}: {other:?} {second:?}"),
    };
    (first, then)
}

/// Answers with the status that the key names: `503+` adds Retry-After.
fn by_key() -> Upstream {
    Upstream::scripted(|request, reply| {
        let key = request.key().unwrap();
        let retry_after: &[_] = if key.ends_with('+') { &[("Retry-After", "7")] } else { &[] };
        let status = key.trim_end_matches('+').parse().unwrap();
        reply.send(status, retry_after, if status == 204 || status == 304 { "" } else { "said" });
    })
}

#[track_caller]
fn check(settings: &str, rows: &[(&str, Then)]) {
    let upstream = by_key();
    let gateway = Gateway::start(&upstream, settings);
    for (key, then) in rows {
        let (first, found) = retry(&gateway, &upstream, key);
        assert_eq!(first.status.to_string(), key.trim_end_matches('+'), "the caller gets the response itself");
        assert_eq!(found, *then, "{key}");
    }
}

#[test]
fn final_statuses_are_replayed() {
    let keys =
        ["200", "201", "202", "301", "302", "303", "400", "402", "404", "405", "409", "410", "413", "415", "422"];
    let rows = keys.iter().chain(&["451", "500", "501", "505", "404+", "500+"]).map(|key| (*key, Then::Replay));
    check("", &rows.collect::<Vec<_>>());
}

#[test]
fn not_executed_statuses_free_the_key() {
    let keys = ["307", "308", "401", "403", "407", "421", "425", "429", "503+"];
    check("", &keys.map(|key| (key, Then::Executed)));
}

#[test]
fn unknown_statuses_hold_the_key() {
    check("", &["408", "502", "503", "504", "506", "507", "508", "511", "599"].map(|key| (key, Then::Unknown)));
}

#[test]
fn no_content_is_replayed_without_a_body() {
    check("", &[("204", Then::Replay)]);
}

#[test]
fn configured_outcomes_replace_lists_and_the_more_specific_entry_counts() {
    let general =
        "idempotency.outcomes.unknown = [\"404\", \"52x\"]\nidempotency.outcomes.not_executed = [\"5xx\", \"503\"]";
    check(
        general,
        &[
            ("404", Then::Unknown),
            ("521", Then::Unknown),
            ("533", Then::Executed),
            ("503", Then::Executed),
            ("500", Then::Executed),
            ("429", Then::Replay),
            ("408", Then::Replay),
        ],
    );
}

#[test]
fn a_routes_entry_beats_the_general_one() {
    let settings = "idempotency.outcomes.unknown = [\"404\"]\n\
        [[routes]]\npath = \"/posts\"\noutcomes.final = [\"404\", \"503+retry-after\"]\noutcomes.not_executed = [\"418\"]";
    check(settings, &[("404", Then::Replay), ("503+", Then::Replay), ("418", Then::Executed), ("429", Then::Replay)]);
}

#[test]
fn the_upstreams_own_word_overrides_the_table_and_is_not_passed_on() {
    let upstream = Upstream::scripted(|request, reply| {
        let (status, word) = request.key().unwrap().split_once('-').unwrap();
        reply.send(status.parse().unwrap(), &[("Idempotency-Outcome", word)], "said");
    });
    let gateway = Gateway::start(&upstream, "");
    for (key, then) in [
        ("429-final", Then::Replay),
        ("502-final", Then::Replay),
        ("201-not-executed", Then::Executed),
        ("502-not-executed", Then::Executed),
        ("201-unknown", Then::Unknown),
        ("429-unknown", Then::Unknown),
        ("201-maybe", Then::Replay),
        ("429-Final", Then::Executed),
        ("502-executed", Then::Unknown),
    ] {
        let (first, found) = retry(&gateway, &upstream, key);
        assert_eq!(found, then, "{key}");
        assert_eq!(first.header("idempotency-outcome"), None, "{key}");
    }
    let passed = gateway.call(crate::support::post("/other", "201-final", "{}"));
    assert_eq!(passed.header("idempotency-outcome"), Some("final"), "left alone on pass-through");
}

/// The caller's answer and a retry, when the upstream does `what` after it has read the request.
#[track_caller]
fn broken(what: impl Fn(&mut Reply<'_>) + Send + Sync + 'static) {
    let upstream = Upstream::scripted(move |_, reply| what(reply));
    let gateway = Gateway::start(&upstream, "");
    let (first, then) = retry(&gateway, &upstream, "k");
    first.expect_problem(502, "upstream_broken");
    assert!(first.header("proxy-status").is_some_and(|status| status.starts_with("oncegate; error=")), "{first:?}");
    assert_eq!(then, Then::Unknown);
    assert_eq!(upstream.count(), 1, "never sent again");
}

#[test]
fn a_reset_after_sending_is_unknown() {
    broken(|reply| reply.reset());
}

#[test]
fn a_close_without_an_answer_is_unknown() {
    broken(|reply| reply.close());
}

#[test]
fn a_truncated_response_is_unknown() {
    broken(|reply| {
        reply.raw("HTTP/1.1 201 Created\r\nContent-Length: 10\r\n\r\n12345");
        reply.close();
    });
}

#[test]
fn a_truncated_chunked_response_is_unknown() {
    broken(|reply| {
        reply.raw("HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n");
        reply.close();
    });
}

#[test]
fn a_malformed_response_is_unknown() {
    broken(|reply| {
        reply.raw("SSH-2.0-OpenSSH_9.2\r\n\r\n");
        reply.close();
    });
}

#[test]
fn an_upgrade_that_nobody_asked_for_is_unknown() {
    broken(|reply| reply.raw("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"));
}

#[test]
fn a_refused_connection_is_not_executed_and_frees_the_key() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let gateway = Gateway::start_before(&format!("http://{addr}"), "");
    let first = gateway.post("k", "{}");
    first.expect_problem(502, "upstream_unreachable");
    assert_eq!(first.header("proxy-status"), Some("oncegate; error=connection_refused"));
    assert_eq!(gateway.metric("oncegate_records{state=\"claimed\"}"), 0.0);
    let upstream = Upstream::on(TcpListener::bind(addr).unwrap(), |_, reply| reply.send(201, &[], "made"));
    assert_eq!(gateway.post("k", "{}").text(), "made");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn a_pooled_connection_that_was_closed_meanwhile_does_not_lose_or_double_a_request() {
    let upstream = Upstream::scripted(|request, reply| {
        reply.send(201, &[], format!("{}", request.number));
        reply.close();
    });
    let gateway = Gateway::start(&upstream, "");
    for n in 1..=50 {
        let answer = gateway.post(&format!("k{n}"), "{}");
        // Closed in the very moment of sending, it may be unknown; never is it sent twice.
        assert!(matches!(answer.status, 201 | 502), "{answer:?}");
        assert!(upstream.executions(&format!("k{n}")) <= 1);
    }
}

/// Answers a key's first send with a reset, every later one with what the test says.
fn reset_then(status: Arc<AtomicU16>, word: Option<&'static str>) -> Upstream {
    Upstream::scripted(move |request, reply| match request.number {
        1 => reply.reset(),
        _ => {
            let headers = word.map(|word| ("Idempotency-Outcome", word));
            reply.send(status.load(Ordering::Acquire), headers.as_slice(), "again");
        }
    })
}

const FORWARD: &str = "idempotency.unknown_outcome = \"forward\"";

#[test]
fn forward_sends_an_unknown_request_again_with_the_header_of_the_first_send() {
    let upstream = reset_then(Arc::new(AtomicU16::new(201)), None);
    let gateway = Gateway::start(&upstream, FORWARD);
    gateway.post("\"k\";a=1", "{}").expect_problem(502, "upstream_broken");
    let second = gateway.post("k", "{}");
    assert_eq!((second.status, second.replayed()), (201, false));
    assert!(gateway.post("k", "{}").replayed());
    let keys = upstream.requests().iter().map(|request| request.key().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(keys, ["\"k\";a=1", "\"k\";a=1"], "byte for byte");
}

#[test]
fn after_a_resend_a_conflict_or_a_throttle_leaves_the_outcome_unknown() {
    for status in [409, 429, 503, 307] {
        let answer = Arc::new(AtomicU16::new(status));
        let upstream = reset_then(Arc::clone(&answer), None);
        let gateway = Gateway::start(&upstream, FORWARD);
        gateway.post("k", "{}").expect_problem(502, "upstream_broken");
        assert_eq!(gateway.post("k", "{}").status, status);
        assert_eq!(gateway.metric("oncegate_records{state=\"unknown\"}"), 1.0, "{status}");
        // Held from now on: it has stayed unknown.
        let gateway = {
            let dir = gateway.dir();
            drop(gateway);
            Gateway::try_start(dir, &upstream.url(), "", &[], &[]).unwrap()
        };
        gateway.post("k", "{}").expect_problem(409, "outcome_unknown");
        assert_eq!(upstream.count(), 2);
    }
}

#[test]
fn after_a_resend_the_upstreams_word_that_nothing_was_executed_frees_the_key() {
    let upstream = reset_then(Arc::new(AtomicU16::new(409)), Some("not-executed"));
    let gateway = Gateway::start(&upstream, FORWARD);
    gateway.post("k", "{}").expect_problem(502, "upstream_broken");
    assert_eq!(gateway.post("k", "{}").status, 409);
    eventually("the key is free", || (gateway.metric("oncegate_records{state=\"unknown\"}") == 0.0).then_some(()));
}
