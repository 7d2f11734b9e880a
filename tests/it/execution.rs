//! One key, one execution.

use crate::support::{Client, Gate, Gateway, Upstream, post};

#[test]
fn a_retry_is_answered_from_the_record() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let first = gateway.post("k", r#"{"a":1}"#);
    assert_eq!((first.status, first.text().as_str(), first.replayed()), (201, r#"{"n":1}"#, false));
    let retry = gateway.post("k", r#"{"a":1}"#);
    assert_eq!((retry.status, retry.text().as_str(), retry.replayed()), (201, r#"{"n":1}"#, true));
    assert_eq!(upstream.executions("k"), 1);
    let other = gateway.post("k2", r#"{"a":1}"#);
    assert_eq!((other.text().as_str(), other.replayed()), (r#"{"n":2}"#, false));
}

#[test]
fn of_64_concurrent_duplicates_one_is_executed_and_all_get_its_answer() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        held.wait();
        reply.send(201, &[], format!("run {}", request.number));
    });
    let gateway = Gateway::start(&upstream, "");
    let mut clients = (0..64).map(|_| Client::connect(gateway.addr)).collect::<Vec<_>>();
    clients.iter_mut().for_each(|client| client.send(post("/posts", "k", "{}")));
    upstream.wait_for(1);
    crate::support::eventually("63 wait", || (gateway.metric("oncegate_waiters") == 63.0).then_some(()));
    gate.open();
    let answers = clients.iter_mut().map(Client::read).collect::<Vec<_>>();
    assert!(answers.iter().all(|answer| (answer.status, answer.text().as_str()) == (201, "run 1")));
    assert_eq!(answers.iter().filter(|answer| !answer.replayed()).count(), 1, "one unmarked");
    assert_eq!(upstream.count(), 1);
}
