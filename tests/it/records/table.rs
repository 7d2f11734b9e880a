//! Every act on a record in every state: what is answered, what becomes of the record, and what a client that retries at the
//! same time gets; and how often the upstream has executed the request in the end.

use super::{BY_HAND, flaky, forget, get, id, list, resolve};
use crate::support::{Client, Gate, Gateway, Response, Upstream, eventually, post};
use serde_json::json;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Claimed,
    LateClaim,
    Completed,
    WithoutBody,
    Unknown,
    Expired,
    Absent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    List,
    Show,
    NotExecuted,
    Response,
    Forget,
}

const ACTS: [Act; 5] = [Act::List, Act::Show, Act::NotExecuted, Act::Response, Act::Forget];

/// What is expected of a cell: the answer (status, and the code of a refusal), the record's state afterwards, the body that a
/// retry gets in the end ("" stands for 409 `outcome_unknown`), and how often the request was executed then.
struct Cell {
    answer: (u16, &'static str),
    state: Option<&'static str>,
    retry: &'static str,
    executions: usize,
}

fn cell(state: State, act: Act) -> Cell {
    use Act::{Forget, List, NotExecuted, Response, Show};
    use State::{Absent, Claimed, Completed, Expired, LateClaim, Unknown, WithoutBody};
    let ok = (200, "");
    match (state, act) {
        (Claimed | LateClaim, List | Show) => {
            Cell { answer: ok, state: Some("claimed"), retry: "run 1", executions: 1 }
        }
        (Claimed | LateClaim, NotExecuted | Response | Forget) => {
            Cell { answer: (409, "record_in_flight"), state: Some("claimed"), retry: "run 1", executions: 1 }
        }
        (Completed, List | Show) => Cell { answer: ok, state: Some("completed"), retry: "run 1", executions: 1 },
        (Completed, NotExecuted | Response) => {
            Cell { answer: (409, "record_not_unknown"), state: Some("completed"), retry: "run 1", executions: 1 }
        }
        (WithoutBody, List | Show) => Cell { answer: ok, state: Some("completed"), retry: "omitted", executions: 1 },
        (WithoutBody, NotExecuted | Response) => {
            Cell { answer: (409, "record_not_unknown"), state: Some("completed"), retry: "omitted", executions: 1 }
        }
        (Completed | WithoutBody, Forget) => Cell { answer: ok, state: None, retry: "run 2", executions: 2 },
        (Unknown, List | Show) => Cell { answer: ok, state: Some("unknown"), retry: "", executions: 1 },
        (Unknown, NotExecuted | Forget) => Cell { answer: ok, state: None, retry: "run 2", executions: 2 },
        (Unknown, Response) => Cell { answer: ok, state: Some("completed"), retry: "by hand", executions: 1 },
        (Expired, List) => Cell { answer: ok, state: None, retry: "run 2", executions: 2 },
        (Expired, _) => Cell { answer: (404, "record_not_found"), state: None, retry: "run 2", executions: 2 },
        (Absent, List) => Cell { answer: ok, state: None, retry: "run 1", executions: 1 },
        (Absent, _) => Cell { answer: (404, "record_not_found"), state: None, retry: "run 1", executions: 1 },
    }
}

struct Setting {
    upstream: Upstream,
    gateway: Gateway,
    /// Holds up what is claimed.
    gate: Gate,
    /// The first caller, where it has no answer yet.
    first: Option<Client>,
    key: &'static str,
    id: String,
}

fn set_up(state: State) -> Setting {
    let (gate, key) = (Gate::default(), if state == State::Unknown { "unknown" } else { "k" });
    let upstream = match state {
        State::Claimed | State::LateClaim => Upstream::holding(&gate),
        State::WithoutBody => Upstream::scripted(|request, reply| match request.number {
            1 => reply.send(201, &[], "x".repeat(2000)),
            number => reply.send(201, &[], format!("run {number}")),
        }),
        _ => flaky(),
    };
    let settings = match state {
        State::LateClaim => "upstream.response_timeout = \"200ms\"",
        State::WithoutBody => "idempotency.max_recorded_body = \"1KiB\"",
        State::Expired => "idempotency.retention = \"2s\"",
        _ => "",
    };
    let gateway = Gateway::start(&upstream, settings);
    let mut first = None;
    match state {
        State::Claimed => {
            let mut client = Client::connect(gateway.addr);
            client.send(post("/posts", key, "{}"));
            upstream.wait_for(1);
            first = Some(client);
        }
        State::Absent => {}
        _ => drop(gateway.post(key, "{}")),
    }
    let id = if state == State::Absent { "0".repeat(32) } else { id(&gateway, key) };
    if state == State::Expired {
        eventually("it expires", || (get(&gateway, &format!("/records/{id}")).status == 404).then_some(()));
    }
    Setting { upstream, gateway, gate, first, key, id }
}

fn perform(act: Act, gateway: &Gateway, id: &str) -> Response {
    match act {
        Act::List => get(gateway, "/records"),
        Act::Show => get(gateway, &format!("/records/{id}")),
        Act::NotExecuted => resolve(gateway, id, &json!({ "not_executed": true })),
        Act::Response => resolve(gateway, id, &json!({ "response": BY_HAND })),
        Act::Forget => forget(gateway, id),
    }
}

fn check(state: State, act: Act) {
    let expected = cell(state, act);
    let Setting { upstream, gateway, gate, first, key, id } = set_up(state);
    // Retries at the same time: of a claim they wait, of what is settled they are answered before or after the act.
    let mut retries = [(); 3].map(|()| Client::connect(gateway.addr));
    if matches!(state, State::Claimed | State::LateClaim) {
        retries.iter_mut().for_each(|client| client.send(post("/posts", key, "{}")));
        eventually("they wait", || (gateway.metric("oncegate_waiters") == 3.0).then_some(()));
    }
    let answer = perform(act, &gateway, &id);
    let cell = format!("{state:?} × {act:?}: {answer:?}");
    match expected.answer {
        (200, _) => assert_eq!(answer.status, 200, "{cell}"),
        (status, code) => answer.expect_problem(status, code),
    }
    match act {
        Act::List => {
            let listed = answer.json()["records"].as_array().unwrap().iter().any(|record| record["id"] == id.as_str());
            assert_eq!(listed, expected.state.is_some(), "{cell}");
        }
        Act::Show => assert_eq!(answer.json().get("state").and_then(|state| state.as_str()), expected.state, "{cell}"),
        _ if answer.status == 200 => {
            let document = answer.json();
            assert_eq!(document["id"], id.as_str(), "{cell}");
            assert_eq!(document["after"]["state"].as_str(), expected.state, "{cell}");
            assert_ne!(document["before"]["token"], document["after"]["token"], "{cell}");
        }
        _ => {}
    }
    let shown = get(&gateway, &format!("/records/{id}"));
    assert_eq!(shown.json()["state"].as_str(), expected.state, "{cell}");
    assert_eq!(list(&gateway, "").len(), usize::from(expected.state.is_some()), "{cell}");

    gate.open();
    if let Some(mut first) = first {
        assert_eq!(first.read().text(), "run 1", "{cell}");
    }
    if !matches!(state, State::Claimed | State::LateClaim) {
        retries.iter_mut().for_each(|client| client.send(post("/posts", key, "{}")));
    }
    for answer in retries.iter_mut().map(Client::read).chain([gateway.post(key, "{}")]) {
        match expected.retry {
            "" => answer.expect_problem(409, "outcome_unknown"),
            "omitted" => answer.expect_problem(409, "body_not_recorded"),
            body => assert_eq!(answer.text(), body, "{cell}"),
        }
    }
    assert_eq!(upstream.executions(key), expected.executions, "{cell}");
}

fn row(state: State) {
    std::thread::scope(|scope| {
        let cells = ACTS.map(|act| scope.spawn(move || check(state, act)));
        cells.into_iter().for_each(|cell| cell.join().unwrap());
    });
}

#[test]
fn a_claim_is_shown_and_refuses_every_act() {
    row(State::Claimed);
}

#[test]
fn a_claim_whose_caller_has_its_504_is_shown_and_refuses_every_act() {
    row(State::LateClaim);
}

#[test]
fn a_completed_record_is_forgotten_but_not_resolved() {
    row(State::Completed);
}

#[test]
fn a_record_without_its_body_is_forgotten_but_not_resolved() {
    row(State::WithoutBody);
}

#[test]
fn an_unknown_record_is_resolved_and_forgotten() {
    row(State::Unknown);
}

#[test]
fn an_expired_record_counts_as_absent() {
    row(State::Expired);
}

#[test]
fn what_is_absent_is_not_found() {
    row(State::Absent);
}
