//! What a replay says of itself, it says once; and nothing else says it.

use crate::support::{Gateway, Response, Upstream};

fn lines<'a>(response: &'a Response, name: &str) -> Vec<&'a str> {
    let lines = response.headers.iter().filter(|(line, _)| line.eq_ignore_ascii_case(name));
    lines.map(|(_, value)| value.as_str()).collect()
}

#[test]
fn fields_of_a_replay_that_the_upstream_sent_itself_are_not_said_twice() {
    let upstream = Upstream::scripted(|_, reply| {
        let headers = [("Age", "100"), ("Idempotency-Replayed", "true"), ("Cache-Status", "origin; fwd=miss")];
        reply.send(201, &headers, "made");
    });
    let gateway = Gateway::start(&upstream, "");
    gateway.post("k", "{}");
    let replay = gateway.post("k", "{}");
    assert_eq!((lines(&replay, "idempotency-replayed"), replay.text().as_str()), (vec!["true"], "made"));
    // RFC 9111 §5.1: the time since the origin made it, that spent before it came here included.
    let ages = lines(&replay, "age");
    assert_eq!(ages.len(), 1, "{replay:?}");
    assert!((100..120).contains(&ages[0].parse::<u64>().unwrap()), "{replay:?}");
    // RFC 9211 §2: each cache adds its member behind those of the caches nearer to the origin.
    let members = lines(&replay, "cache-status").join(", ");
    assert!(members.starts_with("origin; fwd=miss, oncegate; hit; ttl="), "{replay:?}");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn the_answers_to_a_duplicate_tell_neither_a_record_nor_a_cache_hit_unless_they_are_one() {
    let upstream = Upstream::scripted(|_, reply| reply.reset());
    let gateway = Gateway::start(&upstream, "");
    gateway.post("k", "{}").expect_problem(502, "upstream_broken");
    for (body, status, code) in [("{}", 409, "outcome_unknown"), ("[]", 422, "key_reused")] {
        let answer = gateway.post("k", body);
        answer.expect_problem(status, code);
        for name in ["idempotency-replayed", "cache-status", "age", "retry-after"] {
            assert_eq!(answer.header(name), None, "{code} {name}");
        }
    }
    assert_eq!(upstream.count(), 1);
}
