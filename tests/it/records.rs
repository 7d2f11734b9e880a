//! Records in an operator's hands, over the admin address.

mod access;
mod acts;
mod listing;
mod races;
mod table;

use crate::support::{Client, Gateway, Response, Upstream};
use serde_json::Value;
use std::collections::HashSet;
use std::sync::Mutex;

const BY_HAND: &str = "HTTP/1.1 200 OK\r\nX-By: hand\r\n\r\nby hand";

/// A request to the admin address, as a tool on this machine sends it.
#[track_caller]
fn ask(gateway: &Gateway, method: &str, target: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Response {
    let body = body.as_ref();
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    let mut client = Client::connect(gateway.admin);
    client.send(head + "\r\n");
    client.try_send(body);
    client.read()
}

#[track_caller]
fn get(gateway: &Gateway, target: &str) -> Response {
    ask(gateway, "GET", target, &[], "")
}

#[track_caller]
fn list(gateway: &Gateway, query: &str) -> Vec<Value> {
    let response = get(gateway, &format!("/records?{query}"));
    assert_eq!(response.status, 200, "{response:?}");
    let document = response.json();
    assert_eq!(document["next"], Value::Null, "one page is enough here");
    document["records"].as_array().unwrap().clone()
}

/// The record of a key.
#[track_caller]
fn record(gateway: &Gateway, key: &str) -> Value {
    let mut records = list(gateway, &format!("key={key}"));
    assert_eq!(records.len(), 1, "{records:?}");
    records.remove(0)
}

#[track_caller]
fn id(gateway: &Gateway, key: &str) -> String {
    record(gateway, key)["id"].as_str().unwrap().to_owned()
}

#[track_caller]
fn resolve(gateway: &Gateway, id: &str, body: &Value) -> Response {
    let headers = [("Content-Type", "application/json")];
    ask(gateway, "POST", &format!("/records/{id}/resolve"), &headers, body.to_string())
}

#[track_caller]
fn resolve_with(gateway: &Gateway, id: &str, message: &str) -> Response {
    ask(gateway, "POST", &format!("/records/{id}/resolve"), &[("Content-Type", "message/http")], message)
}

#[track_caller]
fn forget(gateway: &Gateway, id: &str) -> Response {
    ask(gateway, "DELETE", &format!("/records/{id}"), &[], "")
}

/// Executes everything; resets the connection the first time that it sees a key that begins with "unknown".
fn flaky() -> Upstream {
    let seen = Mutex::new(HashSet::new());
    Upstream::scripted(move |request, reply| match request.key() {
        Some(key)
            if key.trim_start_matches('"').starts_with("unknown") && seen.lock().unwrap().insert(key.to_owned()) =>
        {
            reply.reset()
        }
        _ => reply.send(201, &[], format!("run {}", request.number)),
    })
}

/// A gateway, and a record of this key whose outcome is unknown.
fn with_unknown(settings: &str, key: &str) -> (Upstream, Gateway, String) {
    let upstream = flaky();
    let gateway = Gateway::start(&upstream, settings);
    gateway.post(key, "{}").expect_problem(502, "upstream_broken");
    let id = id(&gateway, key);
    (upstream, gateway, id)
}
