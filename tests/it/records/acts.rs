//! Resolving and forgetting: what is taken, what is recorded, what is refused and what is logged.

use super::{BY_HAND, ask, flaky, forget, get, id, list, record, resolve, resolve_with, with_unknown};
use crate::support::{Gateway, Upstream, call, post};
use serde_json::{Value, json};
use std::sync::Arc;

#[test]
fn an_answer_given_by_hand_is_replayed_as_if_the_upstream_had_given_it() {
    let settings = "idempotency.retention = \"2h\"\nidempotency.drop_headers = [\"x-drop\"]";
    let (upstream, gateway, id) = with_unknown(settings, "unknown");
    let message = "HTTP/1.1 201 Made\r\nLocation: /posts/7\r\nX-Two: a\r\nX-Two: b\r\nX-Drop: 1\r\nConnection: x-hop\r\nX-Hop: 1\r\n\
                   Date: Sun, 06 Nov 1994 08:49:37 GMT\r\nIdempotency-Outcome: unknown\r\nContent-Length: 9\r\n\r\n{\"id\":7}\n";
    let answer = resolve(&gateway, &id, &json!({ "response": message }));
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")), "{answer:?}");
    let document = answer.json();
    assert_eq!((&document["before"]["state"], &document["after"]["state"]), (&json!("unknown"), &json!("completed")));
    assert_eq!(document["after"], record(&gateway, "unknown"));
    let after = &document["after"];
    let names = ["key", "route", "path", "claimed_at", "attempts", "id"];
    assert!(names.iter().all(|name| after[name] == document["before"][name]), "{document}");
    let hour = |time: &Value| time.as_str().unwrap()[11..13].parse::<u32>().unwrap();
    assert_eq!(hour(&after["expires_at"]), (hour(&after["settled_at"]) + 2) % 24, "the retention counts from now on");
    let replay = gateway.post("unknown", "{}");
    assert_eq!((replay.status, replay.text().as_str(), replay.replayed()), (201, "{\"id\":7}\n", true));
    let lines = |name: &str| {
        replay.headers.iter().filter(|(found, _)| found == name).map(|(_, v)| v.as_str()).collect::<Vec<_>>()
    };
    assert_eq!((lines("location"), lines("x-two")), (vec!["/posts/7"], vec!["a", "b"]));
    assert_eq!((lines("date"), lines("content-length")), (vec!["Sun, 06 Nov 1994 08:49:37 GMT"], vec!["9"]));
    assert_eq!(lines("age"), ["0"]);
    for name in ["x-drop", "x-hop", "idempotency-outcome"] {
        assert!(lines(name).is_empty(), "{name}: {replay:?}");
    }
    gateway.post("unknown", "[]").expect_problem(422, "key_reused");
    let gateway = gateway.restart();
    assert_eq!(gateway.post("unknown", "{}").text(), "{\"id\":7}\n", "from the store, too");
    assert_eq!(upstream.executions("unknown"), 1);
}

#[test]
fn a_response_message_may_come_as_it_is() {
    let (upstream, gateway, id) = with_unknown("", "unknown");
    let headers = [("Content-Type", "Message/HTTP; version=1.1; msgtype=response")];
    let body = [b"HTTP/1.1 200\nContent-Type: application/octet-stream\n\n".as_slice(), &[0, 0xff, b'\r', b'\n', 0x80]]
        .concat();
    let token = record(&gateway, "unknown")["token"].as_str().unwrap().to_owned();
    let target = format!("/records/{id}/resolve?if_token={token}");
    assert_eq!(ask(&gateway, "POST", &target, &headers, &body).status, 200);
    let replay = gateway.post("unknown", "{}");
    assert_eq!((replay.status, replay.body.as_slice()), (200, [0, 0xff, b'\r', b'\n', 0x80].as_slice()));
    assert_eq!(upstream.executions("unknown"), 1);
}

#[test]
fn a_token_that_is_not_the_records_any_more_refuses() {
    let (upstream, gateway, id) = with_unknown("", "unknown");
    let before = record(&gateway, "unknown");
    let token = before["token"].as_str().unwrap();
    let other = (token.parse::<u64>().unwrap() + 1).to_string();
    for body in [json!({ "not_executed": true, "if_token": other }), json!({ "response": BY_HAND, "if_token": other })]
    {
        resolve(&gateway, &id, &body).expect_problem(409, "record_changed");
    }
    let target = format!("/records/{id}/resolve?if_token={other}");
    ask(&gateway, "POST", &target, &[("Content-Type", "message/http")], BY_HAND).expect_problem(409, "record_changed");
    ask(&gateway, "DELETE", &format!("/records/{id}?if_token={other}"), &[], "").expect_problem(409, "record_changed");
    assert_eq!(record(&gateway, "unknown"), before);
    let done = resolve(&gateway, &id, &json!({ "response": BY_HAND, "if_token": token })).json();
    assert_eq!(done["before"]["token"], token);
    let after = done["after"]["token"].as_str().unwrap();
    assert_ne!(after, token);
    ask(&gateway, "DELETE", &format!("/records/{id}?if_token={token}"), &[], "").expect_problem(409, "record_changed");
    assert_eq!(ask(&gateway, "DELETE", &format!("/records/{id}?if_token={after}"), &[], "").status, 200);
    ask(&gateway, "DELETE", &format!("/records/{id}?if_token={after}"), &[], "")
        .expect_problem(404, "record_not_found");
    assert_eq!(upstream.executions("unknown"), 1);
}

#[test]
fn what_is_no_resolution_changes_nothing() {
    let (_upstream, gateway, id) = with_unknown("idempotency.max_recorded_body = \"1KiB\"", "unknown");
    let before = record(&gateway, "unknown");
    for body in [
        "",
        "{}",
        "x",
        "[]",
        "{\"not_executed\": false}",
        "{\"not_executed\": true, \"response\": \"HTTP/1.1 200 OK\\r\\n\\r\\n\"}",
        "{\"not_executed\": true, \"if_token\": 1}",
        "{\"not_executed\": true, \"if_token\": \"x\"}",
        "{\"not_executed\": true, \"iftoken\": \"1\"}",
    ] {
        let headers = [("Content-Type", "application/json")];
        ask(&gateway, "POST", &format!("/records/{id}/resolve"), &headers, body).expect_problem(400, "invalid_request");
    }
    for (query, body) in [
        ("?if_token=x", "{\"not_executed\": true}"),
        ("?if_token=1", "{\"not_executed\": true, \"if_token\": \"1\"}"),
        ("?x=1", "{\"not_executed\": true}"),
    ] {
        let headers = [("Content-Type", "application/json")];
        ask(&gateway, "POST", &format!("/records/{id}/resolve{query}"), &headers, body)
            .expect_problem(400, "invalid_request");
    }
    for media_type in [
        &[][..],
        &[("Content-Type", "text/plain")],
        &[("Content-Type", "application/x-www-form-urlencoded")],
        &[("Content-Type", "application/json"), ("Content-Type", "message/http")],
    ] {
        let answer = ask(&gateway, "POST", &format!("/records/{id}/resolve"), media_type, "{\"not_executed\": true}");
        answer.expect_problem(400, "invalid_request");
    }
    ask(&gateway, "DELETE", &format!("/records/{id}"), &[], "x").expect_problem(400, "invalid_request");
    for message in [
        "HTTP/1.0 200 OK\r\n\r\n",
        "HTTP/2 200\r\n\r\n",
        "HTTP/1.1 200 OK\r\n",
        "{\"id\":1}",
        "HTTP/1.1 101 X\r\n\r\n",
        "HTTP/1.1 199 X\r\n\r\n",
        "HTTP/1.1 600 X\r\n\r\n",
        "HTTP/1.1 204 X\r\n\r\nbody",
        "HTTP/1.1 304 X\r\n\r\nbody",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nbody",
        "HTTP/1.1 200 OK\r\nbad name: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\nA: b\u{1}\r\n\r\n",
    ] {
        for answer in [resolve(&gateway, &id, &json!({ "response": message })), resolve_with(&gateway, &id, message)] {
            answer.expect_problem(400, "response_invalid");
        }
    }
    let long = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(1025));
    resolve_with(&gateway, &id, &long).expect_problem(400, "response_invalid");
    assert_eq!(record(&gateway, "unknown"), before);
    assert_eq!(resolve_with(&gateway, &id, &long[..long.len() - 1]).status, 200, "as long as the route allows");
}

#[test]
fn a_body_beyond_the_largest_recorded_response_is_refused_unread() {
    let settings = "idempotency.max_recorded_body = \"1KiB\"\n[[routes]]\npath = \"/posts\"\n[[routes]]\npath = \"/large\"\nmax_recorded_body = \"2KiB\"";
    let (_upstream, gateway, id) = with_unknown(settings, "unknown");
    let limit = 2048 + 65536;
    let message = |len: usize| {
        let head = "HTTP/1.1 200 OK\r\n\r\n";
        format!("{head}{}", "x".repeat(len - head.len()))
    };
    resolve_with(&gateway, &id, &message(limit + 1)).expect_problem(413, "body_too_large");
    resolve_with(&gateway, &id, &message(limit)).expect_problem(400, "response_invalid");
    let mut client = crate::support::Client::connect(gateway.admin);
    let head = format!(
        "POST /records/{id}/resolve HTTP/1.1\r\nHost: localhost\r\nContent-Type: message/http\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    client.send(head);
    let chunk = message(limit / 2);
    for _ in 0..3 {
        client.try_send(format!("{:x}\r\n{chunk}\r\n", chunk.len()));
    }
    let answer = client.read();
    answer.expect_problem(413, "body_too_large");
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(record(&gateway, "unknown")["state"], "unknown");
}

#[test]
fn each_routes_rules_count_for_its_records_and_the_first_ones_for_those_of_a_route_that_is_gone() {
    let upstream = flaky();
    let routes = |gone: &str| {
        format!(
            "[[routes]]\npath = \"/first\"\nmax_recorded_body = \"1KiB\"\ndrop_headers = [\"x-first\"]\nretention = \"1h\"\n\
                 [[routes]]\npath = \"{gone}\"\nmax_recorded_body = \"2KiB\"\ndrop_headers = [\"x-second\"]\nretention = \"3h\""
        )
    };
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let start = |gone| Gateway::try_start(Arc::clone(&dir), &upstream.url(), &routes(gone), &[], &[]).unwrap();
    let gateway = start("/second");
    for key in ["unknown-1", "unknown-2"] {
        call(gateway.addr, post("/second", key, "{}")).expect_problem(502, "upstream_broken");
    }
    let message = |len| format!("HTTP/1.1 200 OK\r\nX-First: 1\r\nX-Second: 2\r\n\r\n{}", "x".repeat(len));
    let hours = |record: &Value| {
        let hour = |name: &str| record[name].as_str().unwrap()[11..13].parse::<u32>().unwrap();
        (hour("expires_at") + 24 - hour("settled_at")) % 24
    };
    let first = id(&gateway, "unknown-1");
    resolve_with(&gateway, &first, &message(2049)).expect_problem(400, "response_invalid");
    let done = resolve_with(&gateway, &first, &message(2048)).json();
    assert_eq!((hours(&done["after"]), &done["after"]["header_bytes"]), (3, &json!("x-first1".len())));
    drop(gateway);
    let gateway = start("/third");
    let second = id(&gateway, "unknown-2");
    resolve_with(&gateway, &second, &message(1025)).expect_problem(400, "response_invalid");
    let done = resolve_with(&gateway, &second, &message(1024)).json();
    assert_eq!((hours(&done["after"]), &done["after"]["header_bytes"]), (1, &json!("x-second2".len())));
    assert_eq!(forget(&gateway, &first).status, 200);
    assert_eq!(list(&gateway, "").len(), 1);
}

#[test]
fn acts_survive_a_crash() {
    let upstream = flaky();
    let mut gateway = Gateway::start(&upstream, "");
    for key in ["unknown-1", "unknown-2", "k"] {
        gateway.post(key, "{}");
    }
    assert_eq!(resolve(&gateway, &id(&gateway, "unknown-1"), &json!({ "response": BY_HAND })).status, 200);
    assert_eq!(resolve(&gateway, &id(&gateway, "unknown-2"), &json!({ "not_executed": true })).status, 200);
    assert_eq!(forget(&gateway, &id(&gateway, "k")).status, 200);
    gateway.kill();
    let gateway = gateway.restart();
    assert_eq!(list(&gateway, "").len(), 1);
    assert_eq!(gateway.post("unknown-1", "{}").text(), "by hand");
    for key in ["unknown-2", "k"] {
        assert!(!gateway.post(key, "{}").replayed(), "{key}");
        assert_eq!(upstream.executions(key), 2, "{key}");
    }
}

#[test]
fn an_act_shows_in_the_metrics() {
    let (_upstream, gateway, id) = with_unknown("", "unknown");
    let state = |state: &str| gateway.metric(&format!("oncegate_records{{state=\"{state}\"}}"));
    assert_eq!((state("unknown"), state("completed")), (1.0, 0.0));
    assert_eq!(resolve(&gateway, &id, &json!({ "response": BY_HAND })).status, 200);
    assert_eq!((state("unknown"), state("completed")), (0.0, 1.0));
    assert_eq!(gateway.metric("oncegate_oldest_unknown_seconds"), 0.0);
    assert_eq!(forget(&gateway, &id).status, 200);
    assert_eq!((state("unknown"), state("completed")), (0.0, 0.0));
}

#[test]
fn every_act_that_lands_is_logged_and_no_other() {
    let upstream = flaky();
    let gateway = Gateway::start(&upstream, "");
    let mut expected = Vec::new();
    for (key, act) in
        [("unknown-1", "resolve not-executed"), ("unknown-2", "resolve response 200"), ("unknown 3", "forget")]
    {
        gateway.call(post("/posts", &format!("\"{key}\""), "{}"));
        let record = record(&gateway, &key.replace(' ', "%20"));
        let id = record["id"].as_str().unwrap();
        resolve(&gateway, id, &json!({ "not_executed": true, "if_token": "1" })).expect_problem(409, "record_changed");
        resolve(&gateway, id, &json!({ "response": "HTTP/1.1" })).expect_problem(400, "response_invalid");
        let done = match act {
            "forget" => forget(&gateway, id),
            "resolve not-executed" => resolve(&gateway, id, &json!({ "not_executed": true })),
            _ => resolve(&gateway, id, &json!({ "response": BY_HAND })),
        };
        assert_eq!(done.status, 200);
        if act.contains("response") {
            resolve(&gateway, id, &json!({ "not_executed": true })).expect_problem(409, "record_not_unknown");
        } else {
            forget(&gateway, id).expect_problem(404, "record_not_found");
        }
        let token = record["token"].as_str().unwrap().parse::<u64>().unwrap();
        expected.push(json!(["INFO", "local", id, key, "/posts", act, token]));
    }
    gateway.wait_for_log("\"act\":\"forget\"");
    let log = gateway.log();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let acts = lines.filter(|line| line["message"] == "an operator's act");
    let told =
        acts.map(|line| ["level", "who", "record", "key", "route", "act", "token"].map(|name| line[name].clone()));
    assert_eq!(told.map(|line| json!(line)).collect::<Vec<_>>(), expected);
}

#[test]
fn the_admin_address_takes_acts_while_the_gateway_drains() {
    let (_upstream, gateway, id) = with_unknown("server.drain_delay = \"1h\"", "unknown");
    gateway.terminate();
    gateway.wait_for_log("draining");
    assert_eq!(resolve(&gateway, &id, &json!({ "response": BY_HAND })).status, 200);
    assert_eq!(gateway.post("unknown", "{}").text(), "by hand");
}

/// Its bytes rot on the disk: it is neither absent nor readable.
#[test]
fn a_record_that_cannot_be_read_is_said_to_be_so_and_left_alone() {
    const MARK: &str = "a body that can be found on the disk";
    let upstream = Upstream::scripted(|_, reply| reply.send(201, &[], MARK.repeat(1000)));
    let gateway = Gateway::start(&upstream, "cache.max_bytes = 0");
    gateway.post("k", "{}");
    gateway.post("other", "{}");
    let id = id(&gateway, "k");
    let gateway = gateway.restart();
    let mut rotten = 0;
    let mut directories = vec![gateway.data()];
    while let Some(directory) = directories.pop() {
        for path in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            if let Some(at) = bytes.windows(MARK.len()).position(|window| window == MARK.as_bytes()) {
                let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&file, b"X", at as u64).unwrap();
                rotten += 1;
            }
        }
    }
    assert_eq!(rotten, 1, "the first record in the log");
    get(&gateway, &format!("/records/{id}")).expect_problem(503, "store_unavailable");
    resolve(&gateway, &id, &json!({ "not_executed": true })).expect_problem(503, "store_unavailable");
    forget(&gateway, &id).expect_problem(503, "store_unavailable");
    assert_eq!(list(&gateway, "").iter().map(|record| record["key"].clone()).collect::<Vec<_>>(), ["other"]);
    gateway.post("k", "{}").expect_problem(409, "outcome_unknown");
    assert_eq!(upstream.executions("k"), 1);
}
