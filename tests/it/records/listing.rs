//! Which records are listed, and what is told of them.

use super::{BY_HAND, ask, flaky, get, list, record, resolve, with_unknown};
use crate::support::{Client, Gate, Gateway, Upstream, eventually, post, request};
use serde_json::{Value, json};
use std::collections::BTreeSet;

const MEMBERS: [&str; 17] = [
    "attempts",
    "body_bytes",
    "claimed_at",
    "expires_at",
    "header_bytes",
    "id",
    "in_flight",
    "key",
    "method",
    "path",
    "recorded",
    "route",
    "settled_at",
    "state",
    "status",
    "token",
    "why",
];

#[track_caller]
fn members(record: &Value) -> BTreeSet<&str> {
    record.as_object().unwrap().keys().map(String::as_str).collect()
}

#[track_caller]
fn is_time(value: &Value) -> bool {
    let text = value.as_str().unwrap_or_default();
    let shape = |(byte, like): (u8, u8)| if like == b'0' { byte.is_ascii_digit() } else { byte == like };
    text.len() == 24 && text.bytes().zip(*b"0000-00-00T00:00:00.000Z").all(shape)
}

#[test]
fn a_record_says_what_an_operator_needs_and_absent_things_are_null() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| match request.key() {
        Some("claimed") => {
            held.wait();
            reply.send(201, &[], "");
        }
        Some("unknown") => reply.send(502, &[], "bad"),
        Some("large") => reply.send(202, &[], "x".repeat(2000)),
        _ => reply.send(201, &[("X-Four", "four")], "body!"),
    });
    let gateway = Gateway::start(&upstream, "idempotency.max_recorded_body = \"1KiB\"");
    let mut client = Client::connect(gateway.addr);
    client.send(post("/posts", "claimed", "{}"));
    upstream.wait_for(1);
    gateway.call(post("/v1/workspaces/w%2f1/posts/?q=1", "completed", "{}"));
    gateway.post("large", "{}");
    gateway.post("unknown", "{}");
    let completed = record(&gateway, "completed");
    assert_eq!(members(&completed), MEMBERS.into_iter().collect());
    for (member, expected) in [
        ("state", json!("completed")),
        ("key", json!("completed")),
        ("method", json!("POST")),
        ("path", json!("/v1/workspaces/w%2F1/posts")),
        ("route", json!("/v1/workspaces/{workspace}/posts")),
        ("attempts", json!(1)),
        ("status", json!(201)),
        ("why", Value::Null),
        ("in_flight", json!(false)),
        ("recorded", json!("full")),
        ("header_bytes", json!("x-fourfour".len())),
        ("body_bytes", json!(5)),
    ] {
        assert_eq!(completed[member], expected, "{member}: {completed}");
    }
    assert!(["claimed_at", "settled_at", "expires_at"].iter().all(|time| is_time(&completed[time])), "{completed}");
    assert!(completed["claimed_at"].as_str() <= completed["settled_at"].as_str(), "{completed}");
    let id = completed["id"].as_str().unwrap();
    assert!(id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')), "{id}");
    assert_eq!(get(&gateway, &format!("/records/{id}")).json(), completed, "shown as listed");

    let large = record(&gateway, "large");
    assert_eq!(
        (&large["state"], &large["recorded"], &large["status"]),
        (&json!("completed"), &json!("omitted"), &json!(202))
    );
    assert_eq!((&large["header_bytes"], &large["body_bytes"]), (&Value::Null, &Value::Null));
    let unknown = record(&gateway, "unknown");
    assert_eq!(
        (&unknown["why"], &unknown["status"], &unknown["recorded"]),
        (&json!("status"), &json!(502), &Value::Null)
    );
    assert!(is_time(&unknown["expires_at"]) && is_time(&unknown["settled_at"]), "{unknown}");
    let claimed = record(&gateway, "claimed");
    assert_eq!((&claimed["state"], &claimed["in_flight"]), (&json!("claimed"), &json!(true)));
    assert!(
        ["settled_at", "expires_at", "status", "why", "recorded"].iter().all(|name| claimed[name].is_null()),
        "{claimed}"
    );
    gate.open();
    client.read();
    assert_eq!(record(&gateway, "claimed")["in_flight"], false);
}

#[test]
fn why_an_outcome_is_unknown_is_told() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| match request.key().unwrap_or_default() {
        "reset" => reply.reset(),
        "malformed" => reply.raw("HTTP/1.1 2xx\r\n\r\n"),
        "status" => reply.send(504, &[], ""),
        "told" => reply.send(200, &[("Idempotency-Outcome", "unknown")], ""),
        _ => held.wait(),
    });
    let settings = "upstream.response_timeout = \"200ms\"\nupstream.late_window = \"100ms\"";
    let gateway = Gateway::start(&upstream, settings);
    for key in ["reset", "malformed", "status", "told", "timeout"] {
        gateway.post(key, "{}");
    }
    eventually("it is settled", || (record(&gateway, "timeout")["state"] == "unknown").then_some(()));
    let in_flight = |gateway: &Gateway, key| {
        let mut client = Client::connect(gateway.addr);
        client.send(post("/posts", key, "{}"));
        eventually("it is sent", || (upstream.executions(key) == 1).then_some(()));
        client
    };
    let crashing = Gateway::start(&upstream, "");
    let _client = in_flight(&crashing, "crash");
    let crashed = crashing.restart();
    let mut stopping = Gateway::start(&upstream, "server.drain_timeout = \"0s\"");
    let _client = in_flight(&stopping, "shutdown");
    stopping.terminate();
    assert_eq!(stopping.wait(), Some(0));
    let stopped = record(&stopping.restart(), "shutdown");
    assert_eq!((&stopped["why"], &stopped["state"]), (&json!("shutdown"), &json!("unknown")), "{stopped}");
    for (key, status) in [("reset", None), ("malformed", None), ("timeout", None), ("status", Some(504))] {
        let record = record(&gateway, key);
        assert_eq!((&record["why"], &record["state"]), (&json!(key), &json!("unknown")), "{record}");
        assert_eq!(record["status"], json!(status), "{record}");
    }
    let told = record(&gateway, "told");
    assert_eq!((&told["why"], &told["status"]), (&json!("status"), &json!(200)));
    let crash = record(&crashed, "crash");
    assert_eq!((&crash["why"], &crash["in_flight"]), (&json!("crash"), &json!(false)), "{crash}");
    gate.open();
}

#[test]
fn a_re_send_counts_as_an_attempt() {
    let upstream = Upstream::scripted(|request, reply| match request.number {
        1 => reply.reset(),
        _ => reply.send(429, &[], ""),
    });
    let gateway = Gateway::start(&upstream, "idempotency.unknown_outcome = \"forward\"");
    gateway.post("k", "{}");
    let first = record(&gateway, "k");
    gateway.post("k", "{}");
    let second = record(&gateway, "k");
    assert_eq!(
        (&first["attempts"], &second["attempts"], &second["why"]),
        (&json!(1), &json!(2), &json!("earlier_send"))
    );
    assert_eq!(first["claimed_at"], second["claimed_at"]);
    assert_ne!(first["token"], second["token"]);
}

/// Times have milliseconds: what comes after this is later.
fn tick() {
    std::thread::sleep(std::time::Duration::from_millis(5));
}

#[test]
fn filters_say_which_records_are_listed() {
    let upstream = Upstream::scripted(|request, reply| match request.key().unwrap_or_default() {
        "\"bad gateway\"" => reply.send(502, &[], ""),
        "reset" => reply.reset(),
        "a+b" => reply.send(200, &[], ""),
        _ => reply.send(201, &[], ""),
    });
    let gateway = Gateway::start(&upstream, "");
    gateway.call(post("/posts", "\"bad gateway\"", "{}"));
    gateway.post("reset", "{}");
    gateway.post("a+b", "{}");
    tick();
    gateway.call(post("/v1/workspaces/w/posts", "other", "{}"));
    let between = record(&gateway, "other")["settled_at"].as_str().unwrap().to_owned();
    tick();
    gateway.post("later", "{}");
    let keys = |query: &str| {
        let records = list(&gateway, query);
        let keys = records.iter().map(|record| record["key"].as_str().unwrap().to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(keys.len(), records.len(), "each once: {records:?}");
        keys.into_iter().collect::<Vec<_>>().join(",")
    };
    for (query, expected) in [
        ("", "a+b,bad gateway,later,other,reset"),
        ("state=unknown", "bad gateway,reset"),
        ("state=completed", "a+b,later,other"),
        ("state=claimed", ""),
        ("status=502", "bad gateway"),
        ("status=201", "later,other"),
        ("route=/posts", "a+b,bad gateway,later,reset"),
        ("route=/v1/workspaces/%7Bworkspace%7D/posts", "other"),
        ("route=/v1/workspaces/w/posts", ""),
        ("key=a+b", "a+b"),
        ("key=a%2Bb", "a+b"),
        ("key=bad%20gateway", "bad gateway"),
        ("key=bad+gateway", ""),
        ("key=bad", ""),
        ("state=unknown&route=/posts&status=502&since=1h&limit=1000", "bad gateway"),
        ("since=1h", "a+b,bad gateway,later,other,reset"),
        ("until=1h", ""),
        ("until=0s", "a+b,bad gateway,later,other,reset"),
        ("since=2999-01-01T00:00:00Z", ""),
        (&format!("since={between}"), "later,other"),
        (&format!("until={between}&state=unknown"), "bad gateway,reset"),
        (&format!("since={between}&until={between}"), ""),
    ] {
        assert_eq!(keys(query), expected, "{query}");
    }
}

#[test]
fn every_engine_lists_all_it_holds_in_pages_oldest_first() {
    for engine in ["sled", "fjall", "memory"] {
        let upstream = flaky();
        let gateway = Gateway::start(&upstream, &format!("store.engine = {engine:?}"));
        let keys = (0..25).map(|n| if n % 5 == 0 { format!("unknown-{n:02}") } else { format!("k-{n:02}") });
        let keys = keys.collect::<Vec<_>>();
        keys.iter().for_each(|key| drop(gateway.post(key, "{}")));
        for (query, expected) in [
            ("limit=10", keys.clone()),
            ("limit=1&state=unknown", keys.iter().filter(|key| key.starts_with("unknown")).cloned().collect()),
            ("limit=7&state=completed&status=201", keys.iter().filter(|key| key.starts_with("k-")).cloned().collect()),
        ] {
            let (mut found, mut after, mut pages) = (Vec::new(), String::new(), 0);
            loop {
                let page = get(&gateway, &format!("/records?{query}{after}")).json();
                let records = page["records"].as_array().unwrap();
                let limit = query.split(['=', '&']).nth(1).unwrap().parse::<usize>().unwrap();
                assert!(records.len() <= limit, "{engine}: {page}");
                found.extend(records.iter().map(|record| record["key"].as_str().unwrap().to_owned()));
                pages += 1;
                let Some(next) = page["next"].as_str() else { break };
                after = format!("&after={next}");
            }
            assert_eq!(found, expected, "{engine} {query}");
            assert!(pages > 1, "{engine} {query}");
        }
    }
}

#[test]
fn expired_records_are_not_listed() {
    let upstream = flaky();
    let gateway =
        Gateway::start(&upstream, "idempotency.unknown_retention = \"300ms\"\nidempotency.retention = \"1h\"");
    gateway.post("unknown", "{}");
    gateway.post("k", "{}");
    eventually("it has expired", || (list(&gateway, "").len() == 1).then_some(()));
    assert_eq!(record(&gateway, "k")["state"], "completed");
    assert!(list(&gateway, "state=unknown").is_empty());
}

#[test]
fn what_is_not_understood_is_refused() {
    let (_upstream, gateway, id) = with_unknown("", "unknown");
    for query in [
        "state=open",
        "status=abc",
        "status=99",
        "since=yesterday",
        "until=12",
        "limit=0",
        "limit=1001",
        "limit=x",
        "after=x",
        "colour=red",
        "limit=1&limit=1",
        "key=%zz",
        "if_token=1",
        "State=unknown",
    ] {
        get(&gateway, &format!("/records?{query}")).expect_problem(400, "invalid_request");
    }
    get(&gateway, &format!("/records/{id}?state=unknown")).expect_problem(400, "invalid_request");
    for path in [
        "/records/",
        "/records/x",
        "/records//resolve",
        &format!("/records/{id}/"),
        &format!("/records/{id}/x"),
        &format!("/records/{id}0"),
    ] {
        get(&gateway, path).expect_problem(404, "record_not_found");
    }
    let mut client = crate::support::Client::connect(gateway.admin);
    client.send("HEAD /records HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    assert!(client.read_head().starts_with("HTTP/1.1 200 ") && client.at_end());
    for (method, path, allow) in [
        ("POST", "/records".to_owned(), "GET, HEAD"),
        ("DELETE", "/records".to_owned(), "GET, HEAD"),
        ("PUT", format!("/records/{id}"), "GET, HEAD, DELETE"),
        ("POST", format!("/records/{id}"), "GET, HEAD, DELETE"),
        ("GET", format!("/records/{id}/resolve"), "POST"),
        ("DELETE", format!("/records/{id}/resolve"), "POST"),
    ] {
        let answer = ask(&gateway, method, &path, &[], "");
        answer.expect_problem(405, "method_not_allowed");
        assert_eq!(answer.header("allow"), Some(allow), "{method} {path}");
    }
    assert_eq!(record(&gateway, "unknown")["state"], "unknown");
}

#[test]
fn no_credential_and_nothing_of_a_response_is_told_or_logged() {
    let upstream = Upstream::scripted(|request, reply| match request.key() {
        Some("unknown") => reply.reset(),
        _ => reply.send(201, &[("X-Secret", "s3cr3t-field"), ("Set-Cookie", "s3cr3t-set")], "s3cr3t-body"),
    });
    let gateway = Gateway::start(&upstream, "");
    for key in ["unknown", "k"] {
        let headers = [("Authorization", "Bearer s3cr3t-token"), ("Cookie", "s3cr3t=1"), ("Idempotency-Key", key)];
        gateway.call(request("POST", "/posts?token=s3cr3t-query", &headers, "{\"text\":\"s3cr3t-text\"}"));
    }
    let mut told = get(&gateway, "/records").text();
    for record in list(&gateway, "") {
        let id = record["id"].as_str().unwrap();
        told += &get(&gateway, &format!("/records/{id}")).text();
        told += &resolve(&gateway, id, &json!({ "response": format!("{BY_HAND} s3cr3t-answer") })).text();
        told += &super::forget(&gateway, id).text();
    }
    gateway.wait_for_log("an operator's act");
    assert!(told.len() > 1000 && !told.contains("s3cr3t"), "{told}");
    assert!(!gateway.log().contains("s3cr3t"), "{}", gateway.log());
}
