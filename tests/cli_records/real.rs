//! The command against a real gateway.

use super::support::{Gate, Gateway, Upstream, call, eventually, request};
use super::{Run, finish, with_input};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;

fn records(gateway: &Gateway, arguments: &[&str]) -> Run {
    super::records(&[arguments, &["--admin", &gateway.admin.to_string()]].concat())
}

/// An upstream that loses its first answer to each key that begins with `lost`, answers `bad` ones with 502 once, and everything else
/// with 201.
fn failing() -> Upstream {
    let seen = std::sync::Mutex::new(std::collections::HashSet::new());
    Upstream::scripted(move |request, reply| {
        let key = request.key().unwrap_or_default().to_owned();
        let first = seen.lock().unwrap().insert(key.clone());
        match key {
            key if first && key.starts_with("lost") => reply.reset(),
            key if first && key.starts_with("bad") => reply.send(502, &[], "bad gateway"),
            key => reply.send(201, &[("Content-Type", "text/plain")], format!("created {key}")),
        }
    })
}

#[track_caller]
fn only(run: &Run) -> Value {
    let listed = run.json();
    assert_eq!(listed["records"].as_array().unwrap().len(), 1, "{listed}");
    listed["records"][0].clone()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

#[test]
fn an_unknown_outcome_is_found_and_resolved_as_not_executed() {
    let upstream = failing();
    let gateway = Gateway::start(&upstream, "");
    assert_eq!(gateway.post("fine", "{}").status, 201);
    gateway.post("lost-1", "{}").expect_problem(502, "upstream_broken");
    gateway.post("lost-1", "{}").expect_problem(409, "outcome_unknown");

    let run = records(&gateway, &["list", "--state", "unknown"]).ok();
    let rows = run.rows();
    assert_eq!((rows.len(), run.stderr.as_str()), (1, ""));
    let record = only(&records(&gateway, &["list", "--state", "unknown", "--json"]).ok());
    assert_eq!((text(&record["key"]), text(&record["why"]), text(&record["state"])), ("lost-1", "reset", "unknown"));
    let (id, token) = (text(&record["id"]), text(&record["token"]));
    assert_eq!(rows[0][..4], [id, "unknown", "-", "reset"]);
    assert!(rows[0].contains(&token.to_owned()), "{rows:?}");
    // All that is known of it, for people and for programs.
    let shown = records(&gateway, &["show", id]).ok().stdout;
    for line in [format!("id:           {id}"), format!("token:        {token}"), "key:          lost-1".to_owned()] {
        assert!(shown.lines().any(|found| found == line), "{line:?} in {shown}");
    }
    assert_eq!(records(&gateway, &["show", id, "--json"]).ok().json(), record);
    assert_eq!(records(&gateway, &["show", "--key", "lost-1"]).ok().stdout, shown);
    assert_eq!(records(&gateway, &["show", "--key", "lost-1", "--json"]).ok().json(), record);

    records(&gateway, &["resolve", id, "--not-executed", "--if-token", "1"]).fails(1, "record_changed");
    gateway.post("lost-1", "{}").expect_problem(409, "outcome_unknown");
    let done = records(&gateway, &["resolve", id, "--not-executed", "--if-token", token]).ok();
    assert_eq!(done.stdout, format!("{id}: was unknown (reset), is gone: its key is free\n"));
    records(&gateway, &["show", id]).fails(1, "record_not_found");
    assert_eq!(upstream.executions("lost-1"), 1);
    assert_eq!(gateway.post("lost-1", "{}").text(), "created lost-1");
    assert_eq!(upstream.executions("lost-1"), 2);
    records(&gateway, &["resolve", id, "--not-executed"]).fails(1, "record_not_unknown");
}

#[test]
fn an_unknown_outcome_is_resolved_with_a_response_that_is_replayed() {
    let upstream = failing();
    let gateway = Gateway::start(&upstream, "");
    gateway.post("lost", "{}");
    let record = only(&records(&gateway, &["list", "--state", "unknown", "--json"]).ok());
    let id = text(&record["id"]);
    let file = gateway.dir().path().join("response");
    let path = file.to_str().unwrap();
    std::fs::write(&file, "HTTP/1.1 100 Continue\r\n\r\n").unwrap();
    records(&gateway, &["resolve", id, "--response", path]).fails(1, "response_invalid");
    std::fs::write(&file, "HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nLocation: /posts/7\r\n\r\nby hand")
        .unwrap();
    let done = records(&gateway, &["resolve", id, "--response", path]).ok();
    assert_eq!(done.stdout, format!("{id}: was unknown (reset), is completed 201\n"));
    let answer = gateway.post("lost", "{}");
    assert!(answer.replayed());
    assert_eq!((answer.status, answer.header("location"), answer.text().as_str()), (201, Some("/posts/7"), "by hand"));
    assert_eq!(upstream.count(), 1);

    gateway.post("lost-2", "{}");
    let record = only(&records(&gateway, &["list", "--state", "unknown", "--json"]).ok());
    let admin = gateway.admin.to_string();
    let arguments = ["resolve", text(&record["id"]), "--response", "-", "--json", "--admin", &admin];
    let done = with_input(&arguments, b"HTTP/1.1 200 OK\n\nfrom a pipe").ok().json();
    assert_eq!((text(&done["before"]["state"]), text(&done["after"]["state"])), ("unknown", "completed"));
    assert_eq!((gateway.post("lost-2", "{}").text().as_str(), upstream.count()), ("from a pipe", 2));
}

#[test]
fn what_is_forgotten_is_executed_again_and_a_claim_is_not() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let gateway = Gateway::start(&upstream, "");
    let waiting = {
        let addr = gateway.addr;
        std::thread::spawn(move || call(addr, super::support::post("/posts", "slow", "{}")))
    };
    upstream.wait_for(1);
    let record = only(&records(&gateway, &["list", "--json"]).ok());
    let id = text(&record["id"]).to_owned();
    assert_eq!((text(&record["state"]), &record["in_flight"]), ("claimed", &Value::Bool(true)));
    records(&gateway, &["forget", &id]).fails(1, "record_in_flight");
    records(&gateway, &["resolve", &id, "--not-executed"]).fails(1, "record_in_flight");
    // It is nothing for many at once, either.
    let run = records(&gateway, &["forget", "--match", "route=/posts", "--yes"]).ok();
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", "0 forgotten, 0 refused\n"));
    gate.open();
    assert_eq!(waiting.join().unwrap().text(), "run 1");
    assert!(gateway.post("slow", "{}").replayed());
    let done = records(&gateway, &["forget", &id]).ok();
    assert_eq!(done.stdout, format!("{id}: was completed 201, is gone: its key is free\n"));
    let again = gateway.post("slow", "{}");
    assert_eq!((again.text().as_str(), again.replayed(), upstream.count()), ("run 2", false, 2));
}

#[test]
fn many_are_listed_first_and_acted_upon_with_yes() {
    let upstream = failing();
    let gateway = Gateway::start(&upstream, "");
    for n in 0..5 {
        assert_eq!(gateway.post(&format!("bad-{n}"), "{}").status, 502);
    }
    gateway.post("lost-1", "{}");
    gateway.post("fine-1", "{}");
    let unknown = || gateway.metric("oncegate_records{state=\"unknown\"}");
    let resolve = ["resolve", "--match", "status=502,since=1h", "--not-executed"];
    let run = records(&gateway, &resolve).ok();
    assert_eq!(run.rows().len(), 5);
    assert!(run.stderr.contains("5 would be resolved as not executed; nothing was changed"), "{}", run.stderr);
    assert_eq!(unknown(), 6.0);
    let run = records(&gateway, &["resolve", "--match", "status=502,until=1h", "--not-executed", "--yes"]).ok();
    assert_eq!((run.stdout.as_str(), unknown()), ("", 6.0), "none is that old");
    let run = records(&gateway, &[&resolve[..], &["--yes"]].concat()).ok();
    assert_eq!((run.stdout.lines().count(), run.stderr.as_str()), (5, "5 resolved as not executed, 0 refused\n"));
    assert_eq!(unknown(), 1.0);
    assert_eq!(gateway.post("bad-3", "{}").text(), "created bad-3");
    let completed = || gateway.metric("oncegate_records{state=\"completed\"}");
    assert_eq!(completed(), 2.0);
    let run = records(&gateway, &["forget", "--match", "route=/posts", "--yes", "--json"]).ok();
    assert_eq!(run.json()["results"].as_array().unwrap().len(), 3, "unknown and completed ones");
    assert_eq!((unknown(), completed()), (0.0, 0.0));
    records(&gateway, &["list", "--match", "since=yesterday"]).fails(2, "since");
}

#[test]
fn the_same_key_of_two_tenants_is_a_list() {
    let upstream = failing();
    let gateway = Gateway::start(&upstream, "");
    for name in ["Bearer alice", "Bearer bob"] {
        let headers = [("Authorization", name), ("Idempotency-Key", "\"the same\"")];
        assert_eq!(gateway.call(request("POST", "/posts", &headers, "{}")).status, 201);
    }
    let run = records(&gateway, &["show", "--key", "the same"]).ok();
    let rows = run.rows();
    assert_eq!(rows.len(), 2);
    assert_ne!(rows[0][0], rows[1][0]);
    assert!(!run.stdout.contains("alice") && !run.stdout.contains("bob"), "no credential is known");
    records(&gateway, &["show", "--key", "the"]).fails(1, "there is no record with the key \"the\"");
}

#[test]
fn a_long_list_comes_in_pages() {
    let upstream = failing();
    for engine in ["sled", "fjall", "memory"] {
        let gateway = Gateway::start(&upstream, &format!("store.engine = {engine:?}"));
        for n in 0..25 {
            gateway.post(&format!("{}{engine}-{n}", if n % 5 == 0 { "lost" } else { "" }), "{}");
        }
        let (mut keys, mut after) = (Vec::new(), None::<String>);
        loop {
            let mut arguments = vec!["list", "--limit", "10", "--json"];
            arguments.extend(after.iter().flat_map(|after| ["--after", after.as_str()]));
            let run = records(&gateway, &arguments).ok();
            let page = run.json();
            let listed = page["records"].as_array().unwrap();
            assert!(listed.len() <= 10);
            keys.extend(listed.iter().map(|record| text(&record["key"]).to_owned()));
            match page["next"].as_str() {
                None => break,
                Some(next) => {
                    assert_eq!(run.stderr, format!("more: --after {next}\n"));
                    after = Some(next.to_owned());
                }
            }
        }
        assert_eq!(keys.len(), 25, "{engine}: each once, and none missing");
        assert_eq!(keys.iter().collect::<std::collections::HashSet<_>>().len(), 25);
        assert!(keys[1].ends_with("-1") && keys[24].ends_with("-24"), "{engine}: oldest first: {keys:?}");
        assert_eq!(records(&gateway, &["list", "--state", "unknown"]).ok().rows().len(), 5);
        assert_eq!(records(&gateway, &["list", "--state", "completed", "--limit", "1000"]).ok().rows().len(), 20);
    }
}

#[test]
fn records_are_kept_from_those_without_a_token() {
    let upstream = failing();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let file = dir.path().join("tokens");
    std::fs::write(&file, "# operators\nalice:0123456789abcdef\nfedcba9876543210\n").unwrap();
    let settings = format!("admin.token_file = {:?}", file.display().to_string());
    let gateway = Gateway::try_start(Arc::clone(&dir), &upstream.url(), &settings, &[], &[]).unwrap();
    gateway.post("lost", "{}");
    records(&gateway, &["list"]).fails(1, "unauthorized");
    let token = ["--token-file", file.to_str().unwrap()];
    let record = only(&records(&gateway, &[&["list", "--json"][..], &token].concat()).ok());
    // As the operator on the machine has it: the address and the token from the configuration.
    let config = dir.path().join("operator.toml");
    std::fs::write(&config, format!("admin.listen = \"{}\"\n{settings}\n", gateway.admin)).unwrap();
    let arguments = ["forget", text(&record["id"]), "--config", config.to_str().unwrap()];
    super::records(&arguments).ok();
    let logged: Value = serde_json::from_str(&gateway.wait_for_log("operator's act")).unwrap();
    assert_eq!((&logged["who"], &logged["record"]), (&"alice".into(), &record["id"]), "who did it is noted: {logged}");
    assert!(!gateway.log().contains("0123456789abcdef"));
}

#[test]
fn a_unix_socket_will_do() {
    let upstream = failing();
    let dir = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", dir.path().join("admin.sock").display());
    let config = dir.path().join("config.toml");
    std::fs::write(
        &config,
        format!("server.listen = \"127.0.0.1:0\"\nadmin.listen = {socket:?}\nupstream.url = \"{}\"\n", upstream.url()),
    )
    .unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_oncegate"))
        .current_dir(&dir)
        .args(["serve", "--log-format", "json"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let address = log.find_map(|line| {
        let line: Value = serde_json::from_str(&line).ok()?;
        (line["message"] == "listening" && line["role"] == "server").then(|| line["address"].as_str()?.parse().ok())?
    });
    let reader = std::thread::spawn(move || log.count());
    let answer = address.map(|address| call(address, super::support::post("/posts", "lost", "{}")));
    let by_address = super::records(&["list", "--admin", &socket]);
    // ./config.toml is the default, as for the gateway.
    let by_default = finish(super::command(&["list", "--state", "unknown"]).current_dir(&dir).spawn().unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap();
    assert_eq!(answer.map(|answer| answer.status), Some(502));
    assert_eq!(by_address.ok().rows().len(), 1);
    assert_eq!(by_default.ok().rows().len(), 1);
}

#[test]
fn a_record_that_a_kill_left_behind_is_resolved() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let mut gateway = Gateway::start(&upstream, "");
    let addr = gateway.addr;
    let cut = std::thread::spawn(move || {
        let mut client = super::support::Client::connect(addr);
        client.send(super::support::post("/posts", "cut", "{}"));
        client.try_read()
    });
    upstream.wait_for(1);
    gateway.kill();
    assert_eq!(cut.join().unwrap(), None);
    let gateway = gateway.restart();
    gate.open();
    let record = only(&records(&gateway, &["list", "--state", "unknown", "--json"]).ok());
    assert_eq!((text(&record["why"]), &record["in_flight"]), ("crash", &Value::Bool(false)));
    records(&gateway, &["resolve", text(&record["id"]), "--not-executed", "--if-token", text(&record["token"])]).ok();
    let answer =
        eventually("it is executed again", || Some(gateway.post("cut", "{}")).filter(|answer| answer.status == 201));
    assert_eq!((answer.replayed(), upstream.executions("cut")), (false, 2));
}
