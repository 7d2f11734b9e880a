//! Operators' acts while many clients retry.

use super::{BY_HAND, flaky, forget, get, id, list, resolve};
use crate::support::{Client, Gateway, Response, Upstream, post};
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};

const CLIENTS: usize = 4;
const ROUNDS: usize = 10;

/// Clients that retry one key over and over until `done` of an answer, each on a connection of its own, while `act` is
/// carried out. Returns the last answer of each.
fn retrying(
    gateway: &Gateway,
    key: &str,
    done: impl Fn(&Response) -> bool + Sync,
    act: impl FnOnce(),
) -> Vec<Response> {
    let begun = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients = (0..CLIENTS).map(|_| {
            scope.spawn(|| {
                let mut client = Client::connect(gateway.addr);
                loop {
                    client.send(post("/posts", key, "{}"));
                    let answer = client.read();
                    begun.store(true, Ordering::Release);
                    if done(&answer) {
                        return answer;
                    }
                }
            })
        });
        let clients = clients.collect::<Vec<_>>();
        while !begun.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        act();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    })
}

#[test]
fn what_was_not_executed_is_executed_once_by_all_who_retry() {
    let upstream = flaky();
    let gateway = Gateway::start(&upstream, "");
    for round in 0..ROUNDS {
        let key = format!("unknown-{round}");
        gateway.post(&key, "{}").expect_problem(502, "upstream_broken");
        let id = id(&gateway, &key);
        let answers = retrying(
            &gateway,
            &key,
            |answer| answer.status != 409,
            || {
                let done = if round % 2 == 0 {
                    resolve(&gateway, &id, &json!({ "not_executed": true }))
                } else {
                    forget(&gateway, &id)
                };
                assert_eq!(done.status, 200, "{done:?}");
            },
        );
        assert!(answers.iter().all(|answer| answer.status == 201 && answer.body == answers[0].body), "{answers:?}");
        assert!(answers.iter().filter(|answer| !answer.replayed()).count() == 1, "{answers:?}");
        assert_eq!(upstream.executions(&key), 2, "once before, once after");
    }
}

#[test]
fn an_answer_given_by_hand_reaches_all_who_retry_and_nothing_is_executed() {
    let upstream = flaky();
    let gateway = Gateway::start(&upstream, "");
    for round in 0..ROUNDS {
        let key = format!("unknown-{round}");
        gateway.post(&key, "{}");
        let id = id(&gateway, &key);
        let act = || assert_eq!(resolve(&gateway, &id, &json!({ "response": BY_HAND })).status, 200);
        let answers = retrying(&gateway, &key, |answer| answer.status != 409, act);
        for answer in answers {
            assert_eq!((answer.text().as_str(), answer.replayed()), ("by hand", true), "{answer:?}");
        }
        assert_eq!(upstream.executions(&key), 1);
    }
}

/// Under `forward` a retry claims the record anew: it and the operator exclude each other.
#[test]
fn a_re_send_and_an_operator_exclude_each_other() {
    let upstream = flaky();
    let gateway = Gateway::start(&upstream, "idempotency.unknown_outcome = \"forward\"");
    for round in 0..ROUNDS {
        let key = format!("unknown-{round}");
        gateway.post(&key, "{}");
        let id = id(&gateway, &key);
        let (mut client, mut other) = (Client::connect(gateway.addr), Client::connect(gateway.addr));
        client.send(post("/posts", &key, "{}"));
        let act = resolve(&gateway, &id, &json!({ "response": BY_HAND }));
        other.send(post("/posts", &key, "{}"));
        let answers = [client.read(), other.read(), gateway.post(&key, "{}")].map(|answer| answer.text());
        match act.status {
            200 => assert!(answers.iter().all(|text| text == "by hand"), "{answers:?}"),
            _ => {
                assert!(["record_in_flight", "record_not_unknown"].iter().any(|code| act.json()["code"] == *code));
                assert!(answers.iter().all(|text| text.starts_with("run ") && *text == answers[0]), "{answers:?}");
            }
        }
        assert_eq!(upstream.executions(&key), if act.status == 200 { 1 } else { 2 });
    }
}

#[test]
fn what_is_forgotten_is_never_replayed_again() {
    let upstream = Upstream::counting();
    for settings in ["", "cache.max_bytes = 0", "cache.max_age = \"1ms\""] {
        let gateway = Gateway::start(&upstream, settings);
        for round in 0..ROUNDS {
            let key = format!("{}-{round}", settings.len());
            let old = gateway.post(&key, "{}").body;
            let id = id(&gateway, &key);
            let forgotten = AtomicBool::new(false);
            let answers = retrying(
                &gateway,
                &key,
                |answer| forgotten.load(Ordering::Acquire) && answer.body != old,
                || {
                    assert_eq!(forget(&gateway, &id).status, 200);
                    let retry = gateway.post(&key, "{}");
                    assert_ne!(retry.body, old, "a retry that begins after the answer");
                    forgotten.store(true, Ordering::Release);
                },
            );
            assert!(answers.iter().all(|answer| answer.body == answers[0].body), "{answers:?}");
            assert_eq!(upstream.executions(&key), 2);
        }
    }
}

/// Of operators who act on one version of one record, one succeeds.
#[test]
fn two_operators_on_one_record_do_not_both_succeed() {
    let upstream = flaky();
    let gateway = Gateway::start(&upstream, "");
    for round in 0..ROUNDS {
        let key = format!("unknown-{round}");
        gateway.post(&key, "{}");
        let record = list(&gateway, &format!("key={key}")).remove(0);
        let (id, token) = (record["id"].as_str().unwrap(), &record["token"]);
        let gateway = &gateway;
        let answers = std::thread::scope(|scope| {
            let acts =
                [json!({ "not_executed": true, "if_token": token }), json!({ "response": BY_HAND, "if_token": token })];
            let acts = acts.map(|body| scope.spawn(move || (body.clone(), resolve(gateway, id, &body))));
            acts.map(|act| act.join().unwrap())
        });
        let landed = answers.iter().filter(|(_, answer)| answer.status == 200).collect::<Vec<_>>();
        assert_eq!(landed.len(), 1, "{answers:?}");
        let left = get(gateway, &format!("/records/{id}")).json();
        let by_hand = landed[0].0.get("response").is_some();
        assert_eq!(left["state"] == "completed", by_hand, "{left}");
    }
}
