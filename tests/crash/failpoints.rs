//! Crashes at the very points where the store and the upstream know different things.

use crate::support::{Client, Gateway, Upstream, post};
use crate::{Random, World, under_load};
use std::sync::Arc;

/// How the upstream answers its first request; the next one gets 201.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Final,
    Large,
    Refused,
    Reset,
}

const ANSWERS: [Answer; 4] = [Answer::Final, Answer::Large, Answer::Refused, Answer::Reset];
const SETTINGS: &str = "idempotency.max_recorded_body = \"1KiB\"";

fn upstream(first: Answer) -> Upstream {
    Upstream::scripted(move |request, reply| match first {
        Answer::Large if request.number == 1 => reply.send(201, &[("Location", "/posts/1")], "x".repeat(100_000)),
        Answer::Refused if request.number == 1 => reply.send(429, &[], "slower"),
        Answer::Reset if request.number == 1 => reply.reset(),
        _ => reply.send(201, &[("X-Run", &request.number.to_string())], format!("run {}", request.number)),
    })
}

/// Lets a gateway die at `point` while it answers a request, and starts it again.
fn crash_at(point: &str, upstream: &Upstream, settings: &str) -> Gateway {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let mut gateway =
        Gateway::try_start(dir, &upstream.url(), settings, &[], &[("ONCEGATE_FAILPOINT", point)]).unwrap();
    let mut client = Client::connect(gateway.addr);
    client.send(post("/posts", "k", "{}"));
    assert_eq!(client.try_read(), None, "{point}: it answered");
    assert_eq!(gateway.wait(), None, "{point}: it aborts");
    gateway.again(&[("ONCEGATE_FAILPOINT", "")]).unwrap()
}

#[track_caller]
fn expect_unknown(gateway: &Gateway, upstream: &Upstream, seen: usize) {
    for _ in 0..2 {
        gateway.post("k", "{}").expect_problem(409, "outcome_unknown");
    }
    assert_eq!(upstream.count(), seen);
    // Other keys are not held up, and the payload is still compared first.
    gateway.post("k", r#"{"other":1}"#).expect_problem(422, "key_reused");
    assert_eq!(gateway.post("other", "{}").status, 201);
}

#[test]
fn a_claim_that_was_never_forwarded_is_unknown_and_never_executed() {
    let upstream = Upstream::counting();
    let gateway = crash_at("after-claim-commit", &upstream, SETTINGS);
    assert_eq!(upstream.count(), 0);
    expect_unknown(&gateway, &upstream, 0);
}

#[test]
fn whatever_the_upstream_said_before_the_settlement_is_unknown() {
    for point in ["after-forward", "before-settle-commit"] {
        for answer in ANSWERS {
            eprintln!("{point}, {answer:?}");
            let upstream = upstream(answer);
            let gateway = crash_at(point, &upstream, SETTINGS);
            expect_unknown(&gateway, &upstream, 1);
        }
    }
}

#[test]
fn what_was_settled_holds_though_no_client_saw_it() {
    let final_ = upstream(Answer::Final);
    let gateway = crash_at("after-settle-commit", &final_, SETTINGS);
    for _ in 0..2 {
        let retry = gateway.post("k", "{}");
        assert_eq!((retry.status, retry.text().as_str(), retry.replayed()), (201, "run 1", true));
        assert_eq!(retry.header("x-run"), Some("1"));
    }
    assert_eq!(final_.count(), 1);

    let large = upstream(Answer::Large);
    let gateway = crash_at("after-settle-commit", &large, SETTINGS);
    let retry = gateway.post("k", "{}");
    retry.expect_problem(409, "body_not_recorded");
    assert_eq!((&retry.json()["upstream_status"], &retry.json()["location"]), (&201.into(), &"/posts/1".into()));
    assert_eq!(large.count(), 1);

    let refused = upstream(Answer::Refused);
    let gateway = crash_at("after-settle-commit", &refused, SETTINGS);
    let retry = gateway.post("k", "{}");
    assert_eq!((retry.status, retry.text().as_str(), retry.replayed()), (201, "run 2", false));
    assert!(gateway.post("k", "{}").replayed());
    assert_eq!(refused.count(), 2);

    let reset = upstream(Answer::Reset);
    let gateway = crash_at("after-settle-commit", &reset, SETTINGS);
    expect_unknown(&gateway, &reset, 1);
}

#[test]
fn an_unknown_outcome_is_forwarded_again_with_the_first_header_where_the_operator_says_so() {
    let upstream = Upstream::counting();
    let settings = "idempotency.unknown_outcome = \"forward\"";
    let gateway = crash_at("after-forward", &upstream, settings);
    let quoted = post("/posts", "\"k\"", "{}");
    assert_eq!(gateway.call(&quoted).text(), r#"{"n":2}"#);
    let headers = upstream.requests().iter().map(|request| request.key().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(headers, ["k", "k"]);
    assert!(gateway.call(&quoted).replayed());
    assert_eq!(upstream.count(), 2);
}

#[test]
fn crashes_at_the_points_under_load_execute_nothing_twice_and_forget_nothing() {
    const POINTS: [&str; 4] = ["after-claim-commit", "after-forward", "before-settle-commit", "after-settle-commit"];
    let mut first = true;
    let die_at_a_random_point = |world: &World, mut gateway: Gateway, random: &mut Random| {
        // The first one has no such point.
        if std::mem::take(&mut first) {
            world.strike();
            gateway.kill();
        } else {
            assert_eq!(gateway.wait(), None, "it aborts");
            world.strike();
        }
        let point = format!("{}:{}", POINTS[random.below(4) as usize], 1 + random.below(60));
        (gateway.again(&[("ONCEGATE_FAILPOINT", &point)]).unwrap(), 1)
    };
    under_load("failpoints", "", 20, die_at_a_random_point);
}
