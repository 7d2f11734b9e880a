//! What is sent, and what is made of answers, however strange.

use super::support::{Received, Reply, Upstream};
use super::{finish, records, with_input};
use serde_json::{Value, json};
use std::net::TcpListener;
use std::process::Stdio;

const HOSTILE: &str = "k\x1b]0;owned\x07\x1b[2J\r\n\u{7f}\u{9b}31m\u{202e}txt\\";

fn record(n: usize) -> Value {
    json!({
        "id": format!("{n:032x}"), "token": format!("{}", 1000 + n), "state": "unknown", "key": format!("key-{n}"),
        "method": "POST", "path": "/posts", "route": "/posts", "claimed_at": "2026-01-31T12:00:00.123Z",
        "settled_at": "2026-01-31T12:00:01.000Z", "expires_at": "2026-02-07T12:00:01.000Z", "attempts": 1, "status": 502,
        "why": "status", "in_flight": false, "recorded": null, "header_bytes": null, "body_bytes": null,
    })
}

fn answer(reply: &mut Reply<'_>, document: &Value) {
    reply.send(200, &[("Content-Type", "application/json")], document.to_string());
}

fn refuse(reply: &mut Reply<'_>, status: u16, code: &str, detail: &str) {
    let problem = json!({
        "type": format!("urn:oncegate:problem:{code}"), "title": "No", "status": status, "detail": detail, "code": code
    });
    reply.send(status, &[("Content-Type", "application/problem+json")], problem.to_string());
}

fn gateway(script: impl Fn(&Received, &mut Reply<'_>) + Send + Sync + 'static) -> (Upstream, String) {
    let gateway = Upstream::scripted(script);
    let admin = gateway.addr.to_string();
    (gateway, admin)
}

fn targets(gateway: &Upstream) -> Vec<String> {
    gateway.requests().iter().map(|request| format!("{} {}", request.method, request.target)).collect()
}

/// No byte of it can do anything to a terminal but show itself.
#[track_caller]
fn assert_tame(text: &str) {
    let wild = text.chars().find(|c| (c.is_control() && *c != '\n') || ('\u{200b}'..='\u{202e}').contains(c));
    assert_eq!(wild, None, "{text:?}");
}

#[test]
fn a_list_goes_on_until_it_has_as_many_as_asked_for() {
    // A page may hold none although more follow, and a record may be met twice.
    let (gateway, admin) = gateway(|request, reply| {
        let page = match request.target.split("after=").nth(1) {
            None => json!({ "records": [record(1), record(2)], "next": "7" }),
            Some("7") => json!({ "records": [], "next": "8" }),
            Some("8") => json!({ "records": [record(2), record(3)], "next": "a/9" }),
            Some("a%2F9") => json!({ "records": [record(4)], "next": null }),
            other => panic!("{other:?}"),
        };
        answer(reply, &page);
    });
    let conditions = "status=502,route=/v1/{w}/posts,since=2h,key=a b&c";
    let run = records(&["list", "--state", "unknown", "--match", conditions, "--limit", "3", "--admin", &admin]).ok();
    let ids: Vec<_> = run.rows().iter().map(|row| row[0].clone()).collect();
    assert_eq!(ids, [1, 2, 3].map(|n| format!("{n:032x}")));
    assert_eq!(run.stderr, "more: --after a/9\n");
    let fixed = "GET /records?state=unknown&status=502&route=%2Fv1%2F%7Bw%7D%2Fposts&since=2h&key=a%20b%26c";
    let expected = ["&limit=3", "&limit=1&after=7", "&limit=1&after=8"].map(|rest| format!("{fixed}{rest}"));
    assert_eq!(targets(&gateway), expected);
    assert_eq!(gateway.connections(), 1, "on one connection");

    let run = records(&["list", "--after", "8", "--json", "--admin", &admin]).ok();
    assert_eq!(run.json(), json!({ "records": [record(2), record(3), record(4)], "next": null }));
    assert_eq!(run.stderr, "");
    assert_eq!(targets(&gateway)[3..], ["GET /records?limit=100&after=8", "GET /records?limit=98&after=a%2F9"]);
}

#[test]
fn nothing_listed_prints_nothing_and_is_no_failure() {
    let (_gateway, admin) = gateway(|_, reply| answer(reply, &json!({ "records": [], "next": null })));
    let run = records(&["list", "--admin", &admin]).ok();
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", ""));
    records(&["show", "--key", "k", "--admin", &admin]).fails(1, "there is no record with the key");
    let run = records(&["forget", "--match", "status=502", "--yes", "--admin", &admin]).ok();
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", "0 forgotten, 0 refused\n"));
}

#[test]
fn a_key_is_looked_for_among_all_records() {
    let (gateway, admin) = gateway(|request, reply| {
        let records = match request.target.as_str() {
            target if target.contains("state=unknown") => vec![record(1)],
            target if target.contains("state=claimed") => vec![],
            _ => vec![record(1), record(2)],
        };
        answer(reply, &json!({ "records": records, "next": null }));
    });
    let run = records(&["show", "--key", "order 7", "--admin", &admin]).ok();
    assert_eq!(run.rows().len(), 2);
    let expected =
        ["state=unknown&", "state=claimed&", ""].map(|s| format!("GET /records?{s}key=order%207&limit=1000"));
    assert_eq!(targets(&gateway), expected);
    let run = records(&["show", "--key", "order 7", "--json", "--admin", &admin]).ok();
    assert_eq!(run.json()["records"], json!([record(1), record(2)]));
}

#[test]
fn acts_are_sent_with_their_condition_and_their_body() {
    let (gateway, admin) = gateway(|request, reply| {
        let after = if request.method == "DELETE" { Value::Null } else { record(1) };
        answer(reply, &json!({ "id": format!("{:032x}", 1), "before": record(1), "after": after }));
    });
    let id = "000000000000000000000000000000AB";
    let admin = ["--admin", admin.as_str()];
    records(&[&["resolve", id, "--not-executed"][..], &admin].concat()).ok();
    records(&[&["resolve", id, "--not-executed", "--if-token", "t&1"][..], &admin].concat()).ok();
    let message = b"HTTP/1.1 201 Created\r\nX: \xff\r\n\r\n\x00\x01";
    with_input(&[&["resolve", id, "--response", "-", "--if-token", "t&1"][..], &admin].concat(), message).ok();
    let run = records(&[&["forget", id, "--if-token", "7"][..], &admin].concat()).ok();
    assert_eq!(run.stdout, format!("{:032x}: was unknown 502, is gone: its key is free\n", 1));
    let run = records(&[&["forget", id, "--json"][..], &admin].concat()).ok();
    assert_eq!(run.json(), json!({ "id": format!("{:032x}", 1), "before": record(1), "after": null }));

    let id = id.to_lowercase();
    assert_eq!(
        targets(&gateway),
        [
            format!("POST /records/{id}/resolve"),
            format!("POST /records/{id}/resolve"),
            format!("POST /records/{id}/resolve?if_token=t%261"),
            format!("DELETE /records/{id}?if_token=7"),
            format!("DELETE /records/{id}"),
        ]
    );
    let sent = gateway.requests();
    let body = |n: usize| serde_json::from_slice::<Value>(&sent[n].body).unwrap();
    assert_eq!(body(0), json!({ "not_executed": true }));
    assert_eq!(body(1), json!({ "not_executed": true, "if_token": "t&1" }));
    assert_eq!(sent[2].body, message);
    let types = [0, 1, 2, 3].map(|n| sent[n].header("content-type").map(str::to_owned));
    let [json, message] = ["application/json", "message/http"].map(|text| Some(text.to_owned()));
    assert_eq!(types, [json.clone(), json, message, None]);
    assert!(sent.iter().all(|request| request.headers("host") == [admin[1]] && request.header("origin").is_none()));
    assert!(sent.iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn the_first_token_of_the_file_is_sent_and_never_shown() {
    let (gateway, admin) = gateway(|_, reply| refuse(reply, 401, "unauthorized", "The request bears no token."));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens");
    std::fs::write(&file, "# alice:0123456789abcdef\nbob:s3cr3t-0123456789\ncarol:another-0123456789\n").unwrap();
    let run = records(&["list", "--token-file", file.to_str().unwrap(), "--admin", &admin]);
    run.fails(1, "unauthorized");
    assert!(run.stderr.contains("--token-file") && !run.stderr.contains("s3cr3t"), "{}", run.stderr);
    assert_eq!(gateway.requests()[0].header("authorization"), Some("Bearer s3cr3t-0123456789"));
    // From the configuration, where it is named there.
    let config = dir.path().join("config.toml");
    let text = format!("admin.listen = {admin:?}\nadmin.token_file = {:?}\n", file.display().to_string());
    std::fs::write(&config, text).unwrap();
    records(&["list", "--config", config.to_str().unwrap()]).fails(1, "unauthorized");
    assert_eq!(gateway.requests()[1].header("authorization"), Some("Bearer s3cr3t-0123456789"));
    // The one that is named with the command beats it, and the file in the working directory is the default.
    let other = dir.path().join("other");
    std::fs::write(&other, "mine-0123456789ab").unwrap();
    let run = finish(super::command(&["list", "--token-file", "other"]).current_dir(&dir).spawn().unwrap());
    run.fails(1, "unauthorized");
    assert_eq!(gateway.requests()[2].header("authorization"), Some("Bearer mine-0123456789ab"));
}

#[test]
fn each_of_many_is_done_under_its_token_and_one_refusal_stops_no_other() {
    let (gateway, admin) = gateway(|request, reply| match (request.method.as_str(), request.target.as_str()) {
        ("GET", target) if target.contains("state=unknown") => {
            answer(reply, &json!({ "records": [record(1), record(2), record(3)], "next": null }));
        }
        ("GET", _) => answer(reply, &json!({ "records": [record(3), record(4)], "next": null })),
        (_, target) if target.contains("02?") => refuse(reply, 409, "record_changed", "Look again."),
        (_, target) if target.contains("03?") => refuse(reply, 404, "record_not_found", "Gone."),
        (_, target) => {
            let id = target.trim_start_matches("/records/").split('?').next().unwrap();
            answer(reply, &json!({ "id": id, "before": record(1), "after": null }));
        }
    });
    let matching = ["forget", "--match", "status=502", "--admin", &admin];
    // Without --yes it is only listed.
    let run = records(&matching).ok();
    assert_eq!(run.rows().len(), 4);
    assert!(run.stderr.contains("4 would be forgotten; nothing was changed"), "{}", run.stderr);
    let run = records(&[&matching[..], &["--json"]].concat()).ok();
    assert_eq!(run.json()["records"].as_array().unwrap().len(), 4);
    assert!(gateway.requests().iter().all(|request| request.method == "GET"));

    let run = records(&[&matching[..], &["--yes"]].concat());
    assert_eq!(run.code, Some(1));
    assert_eq!(run.stderr, "2 forgotten, 2 refused\n");
    let lines: Vec<_> = run.stdout.lines().collect();
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[0], format!("{:032x}: was unknown 502, is gone: its key is free", 1));
    assert_eq!(lines[1], format!("{:032x}: refused: record_changed: Look again.", 2));
    let deleted: Vec<_> = targets(&gateway).into_iter().filter(|target| target.starts_with("DELETE")).collect();
    let expected = [1, 2, 3, 4].map(|n| format!("DELETE /records/{n:032x}?if_token={}", 1000 + n));
    assert_eq!(deleted, expected);

    let run = records(&[&matching[..], &["--yes", "--json"]].concat());
    assert_eq!(run.code, Some(1));
    let results = run.json()["results"].clone();
    assert_eq!(results.as_array().unwrap().len(), 4);
    assert_eq!(results[1]["problem"]["code"], "record_changed");
    assert_eq!((&results[0]["after"], &results[0]["before"]["status"]), (&Value::Null, &json!(502)));
}

#[test]
fn many_are_given_up_when_the_gateway_can_do_no_more() {
    for status in [401, 503] {
        let (gateway, admin) = gateway(move |request, reply| match request.number {
            1 => answer(reply, &json!({ "records": [record(1), record(2), record(3)], "next": null })),
            2 => answer(reply, &json!({ "id": format!("{:032x}", 1), "before": record(1), "after": null })),
            _ => refuse(reply, status, "no_more", "Not now."),
        });
        let resolve = ["resolve", "--match", "route=/posts", "--not-executed", "--yes", "--admin", &admin];
        let run = records(&resolve);
        assert_eq!(run.code, Some(1));
        assert!(run.stderr.contains("Not now."), "{}", run.stderr);
        assert_eq!(run.stdout.lines().count(), 1, "what was done is told: {}", run.stdout);
        assert_eq!(gateway.count(), 3, "the third is not tried");
        assert_eq!(gateway.requests()[0].target, "/records?state=unknown&route=%2Fposts&limit=1000");
        let body: Value = serde_json::from_slice(&gateway.requests()[1].body).unwrap();
        assert_eq!(body, json!({ "not_executed": true, "if_token": "1001" }));
    }
}

#[test]
fn what_strangers_have_written_cannot_drive_the_terminal() {
    let (_gateway, admin) = gateway(|request, reply| {
        let mut hostile = record(1);
        for name in ["key", "path", "route", "why", "method", "state", "claimed_at", "token", "recorded"] {
            hostile[name] = HOSTILE.into();
        }
        match (request.method.as_str(), request.target.as_str()) {
            ("GET", target) if target.starts_with("/records?") => {
                answer(reply, &json!({ "records": [hostile, record(2)], "next": HOSTILE }));
            }
            ("GET", _) => answer(reply, &hostile),
            ("DELETE", target) if target.contains("if_token") => refuse(reply, 409, HOSTILE, HOSTILE),
            _ => answer(reply, &json!({ "id": HOSTILE, "before": hostile, "after": hostile })),
        }
    });
    let id = "1".repeat(32);
    for (arguments, code) in [
        (&["list", "--limit", "2"][..], 0),
        (&["list", "--limit", "2", "--json"], 0),
        (&["show", &id], 0),
        (&["show", &id, "--json"], 0),
        (&["resolve", &id, "--not-executed"], 0),
        (&["resolve", &id, "--not-executed", "--json"], 0),
        (&["forget", &id, "--if-token", "x"], 1),
    ] {
        let run = records(&[arguments, &["--admin", &admin]].concat());
        assert_eq!(run.code, Some(code), "{arguments:?}: {}", run.stderr);
        assert_tame(&run.stdout);
        assert_tame(&run.stderr);
        assert!((run.stdout + &run.stderr).contains("owned"), "{arguments:?}: it is shown");
        if arguments.contains(&"--json") {
            let run = records(&[arguments, &["--admin", &admin]].concat());
            assert!(run.json().to_string().contains(&json!(HOSTILE).to_string()), "it is the same for a program");
        }
    }
    let run = records(&["list", "--limit", "2", "--admin", &admin]);
    assert_eq!(run.stdout.lines().count(), 3, "each in one line");
}

#[test]
fn whatever_answers_instead_of_a_gateway_is_a_failure() {
    let answers: [(u16, &str); 7] = [
        (404, "try /livez, /readyz or /metrics\n"),
        (200, "<html>hello</html>"),
        (200, "[]"),
        (200, "{}"),
        (200, r#"{"records":{},"next":null}"#),
        (200, r#"{"records":[],"next":7}"#),
        (302, r#"{"records":[],"next":null}"#),
    ];
    for (status, body) in answers {
        let (gateway, admin) = gateway(move |_, reply| reply.send(status, &[("Location", "/x")], body));
        let id = "1".repeat(32);
        for arguments in [&["list"][..], &["show", &id], &["forget", &id], &["resolve", &id, "--not-executed"]] {
            records(&[arguments, &["--admin", &admin]].concat()).fails(1, "is not the admin address of a gateway");
        }
        assert_eq!(gateway.count(), 4, "{body}");
    }
    // A cursor that leads to itself.
    let (gateway, admin) = gateway(|_, reply| answer(reply, &json!({ "records": [], "next": "7" })));
    records(&["list", "--admin", &admin]).fails(1, "is not the admin address of a gateway");
    assert_eq!(gateway.count(), 2);
    // A record without a token is not acted upon.
    let (gateway, admin) = self::gateway(|_, reply| {
        answer(reply, &json!({ "records": [{ "id": "x" }], "next": null }));
    });
    records(&["resolve", "--match", "status=502", "--not-executed", "--yes", "--admin", &admin])
        .fails(1, "without id or token");
    assert_eq!(gateway.count(), 1);
}

#[test]
fn a_lost_answer_to_an_act_is_called_unknown_and_the_act_is_not_repeated() {
    let (gateway, admin) = gateway(|_, reply| reply.reset());
    let id = "1".repeat(32);
    records(&["forget", &id, "--admin", &admin]).fails(1, "whether it was done is not known");
    let run = records(&["show", &id, "--admin", &admin]);
    run.fails(1, "has not answered");
    assert!(!run.stderr.contains("whether"), "{}", run.stderr);
    let deleted = gateway.requests().iter().filter(|request| request.method == "DELETE").count();
    assert_eq!(deleted, 1);
}

#[test]
fn a_gateway_that_is_not_there_is_a_failure_that_says_where() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let admin = listener.local_addr().unwrap().to_string();
    drop(listener);
    for arguments in [&["list"][..], &["show", &"1".repeat(32)], &["forget", "--match", "status=502", "--yes"]] {
        records(&[arguments, &["--admin", &admin]].concat()).fails(1, &format!("cannot reach a gateway at {admin}"));
    }
    records(&["list", "--admin", "unix:/nowhere/at/all"]).fails(1, "cannot reach a gateway at unix:/nowhere/at/all");
}

#[test]
fn what_the_gateway_does_not_understand_of_the_arguments_is_wrong_usage() {
    let (_gateway, admin) = gateway(|_, reply| refuse(reply, 400, "invalid_request", "since must be a time."));
    records(&["list", "--match", "since=yesterday", "--admin", &admin]).fails(2, "since must be a time.");
}

#[test]
fn a_closed_standard_output_does_not_stop_an_act() {
    let (gateway, admin) = gateway(|request, reply| match request.method.as_str() {
        "GET" => answer(reply, &json!({ "records": (1..=50).map(record).collect::<Vec<_>>(), "next": null })),
        _ => answer(reply, &json!({ "id": format!("{:032x}", 1), "before": record(1), "after": null })),
    });
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let arguments = ["resolve", "--match", "status=502", "--not-executed", "--yes", "--admin", &admin];
    let run = finish(super::command(&arguments).stdout(writer).stderr(Stdio::piped()).spawn().unwrap());
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), "50 resolved as not executed, 0 refused\n"));
    assert_eq!(gateway.count(), 51);
}
