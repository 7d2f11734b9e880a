//! The admin address, and how a gateway starts and stops.

use crate::support::{Client, Gate, Gateway, Upstream, eventually, post, request};
use std::sync::Arc;

#[test]
fn every_result_is_counted_by_route() {
    let upstream = Upstream::scripted(|request, reply| match request.key() {
        Some("unknown") => reply.reset(),
        Some("large") => reply.send(201, &[], "x".repeat(2000)),
        _ => reply.send(201, &[], ""),
    });
    let gateway = Gateway::start(&upstream, "idempotency.max_recorded_body = \"1KiB\"");
    gateway.call(request("GET", "/", &[], ""));
    gateway.call(request("POST", "/posts", &[], "{}"));
    gateway.post("k", "{}");
    gateway.post("k", "{}");
    gateway.post("k", "[]");
    gateway.post("unknown", "{}");
    gateway.post("unknown", "{}");
    gateway.post("large", "{}");
    gateway.post("large", "{}");
    gateway.post("", "{}");
    for (route, result, count) in [
        ("-", "passed", 1.0),
        ("/posts", "passed", 1.0),
        ("/posts", "forwarded", 2.0),
        ("/posts", "replayed", 1.0),
        ("/posts", "key_reused", 1.0),
        ("/posts", "failed", 1.0),
        ("/posts", "outcome_unknown", 1.0),
        ("/posts", "body_not_recorded", 1.0),
        ("/posts", "rejected", 1.0),
        ("/posts", "waited", 0.0),
        ("/posts", "in_progress", 0.0),
    ] {
        let line = format!("oncegate_requests_total{{route=\"{route}\",result=\"{result}\"}}");
        assert_eq!(gateway.metric(&line), count, "{line}");
    }
    for (state, count) in [("claimed", 0.0), ("completed", 2.0), ("unknown", 1.0)] {
        assert_eq!(gateway.metric(&format!("oncegate_records{{state=\"{state}\"}}")), count, "{state}");
    }
    assert_eq!(gateway.metric("oncegate_upstream_in_flight"), 0.0);
    assert_eq!(gateway.metric("oncegate_store_failed"), 0.0);
    assert_eq!(gateway.metric("oncegate_store_created"), 1.0);
    eventually("the unknown record ages", || (gateway.metric("oncegate_oldest_unknown_seconds") >= 1.0).then_some(()));
    let gateway = gateway.restart();
    assert_eq!(gateway.metric("oncegate_store_created"), 0.0);
    assert_eq!(gateway.metric("oncegate_records{state=\"unknown\"}"), 1.0);
    assert!(gateway.metric("oncegate_oldest_unknown_seconds") >= 1.0, "across a restart, too");
}

#[test]
fn liveness_and_readiness_are_open_and_other_paths_are_not_there() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    assert_eq!(gateway.admin("/livez").status, 200);
    assert_eq!(gateway.admin("/readyz").status, 200);
    for path in ["/", "/record", "/recordsx", "/livez/"] {
        assert_eq!(gateway.admin(path).status, 404, "{path}");
    }
    assert_eq!(crate::support::call(gateway.admin, request("POST", "/livez", &[], "")).status, 405);
    assert!(gateway.admin("/metrics").text().contains("oncegate_build_info{version="));
}

#[test]
fn one_line_is_logged_per_intercepted_request_without_key_credential_or_body() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let headers =
        [("Authorization", "Bearer s3cr3t-token"), ("Idempotency-Key", "s3cr3t-key"), ("Cookie", "s3cr3t-cookie")];
    gateway.call(request("POST", "/posts", &headers, r#"{"text":"s3cr3t-body"}"#));
    let line: serde_json::Value = serde_json::from_str(&gateway.wait_for_log("keyed request")).unwrap();
    assert_eq!(
        (&line["result"], &line["status"], &line["route"]),
        (&"forwarded".into(), &201.into(), &"/posts".into())
    );
    assert_eq!(line["record"].as_str().unwrap().len(), 32);
    assert!(!gateway.log().contains("s3cr3t"), "{}", gateway.log());
    let mut files = vec![gateway.data()];
    let mut read = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        read += bytes.len();
        for secret in ["s3cr3t-token", "s3cr3t-cookie", "s3cr3t-body"] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{secret} in {}", path.display());
        }
    }
    assert!(read > 0);
}

#[test]
fn a_drain_finishes_what_is_in_flight_and_answers_open_connections_politely() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let mut gateway = Gateway::start(&upstream, "");
    let mut open = Client::connect(gateway.addr);
    open.send(request("GET", "/x", &[], ""));
    assert_eq!(open.read().header("connection"), None);
    let mut in_flight = Client::connect(gateway.addr);
    in_flight.send(post("/posts", "k", "{}"));
    upstream.wait_for(2);
    gateway.terminate();
    eventually("it is not ready", || (gateway.admin("/readyz").status == 503).then_some(()));
    assert_eq!(gateway.admin("/livez").status, 200);
    eventually("it listens no more", || Client::try_connect(gateway.addr).err());
    open.send(request("GET", "/x", &[], ""));
    let polite = open.read();
    assert_eq!((polite.status, polite.header("connection")), (201, Some("close")));
    assert!(open.at_end());
    gate.open();
    assert_eq!(in_flight.read().text(), "run 2");
    assert_eq!(gateway.wait(), Some(0));
}

#[test]
fn connections_that_have_sent_nothing_do_not_hold_up_the_drain() {
    let upstream = Upstream::counting();
    let mut gateway = Gateway::start(&upstream, "server.drain_timeout = \"1h\"");
    let _silent = [(); 2].map(|()| Client::connect(gateway.addr));
    let mut begun = Client::connect(gateway.addr);
    begun.send("PRI * HT");
    eventually("they are accepted", || (gateway.metric("oncegate_connections") == 3.0).then_some(()));
    gateway.terminate();
    assert_eq!(gateway.wait(), Some(0));
}

#[test]
fn drain_delay_keeps_the_listeners_open_and_nothing_open_ends_the_drain_at_once() {
    let upstream = Upstream::counting();
    let mut gateway = Gateway::start(&upstream, "server.drain_delay = \"500ms\"\nserver.drain_timeout = \"1h\"");
    gateway.terminate();
    eventually("it is not ready", || (gateway.admin("/readyz").status == 503).then_some(()));
    let answer = gateway.call(request("GET", "/x", &[], ""));
    assert_eq!((answer.status, answer.header("connection")), (201, Some("close")));
    assert_eq!(gateway.wait(), Some(0));
}

#[test]
fn claims_that_outlive_the_drain_are_unknown_late_ones_included() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let settings = "server.drain_timeout = \"300ms\"\nupstream.response_timeout = \"200ms\"";
    let mut gateway = Gateway::start(&upstream, settings);
    gateway.post("late", "{}").expect_problem(504, "upstream_timeout");
    gateway.terminate();
    assert_eq!(gateway.wait(), Some(0));
    let gateway = gateway.restart();
    gateway.post("late", "{}").expect_problem(409, "outcome_unknown");
    assert_eq!(upstream.count(), 1);
    assert!(!gateway.log().contains("requests were under way"), "it was settled before the exit");
    gate.open();
}

#[test]
fn what_comes_after_the_drain_timeout_is_told_so() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let mut gateway = Gateway::start(&upstream, "server.drain_timeout = \"200ms\"");
    let mut client = Client::connect(gateway.addr);
    client.send(post("/posts", "k", "{}"));
    upstream.wait_for(1);
    gateway.terminate();
    let answer = client.read();
    answer.expect_problem(503, "draining");
    assert_eq!(answer.header("retry-after"), Some("5"));
    assert_eq!(gateway.wait(), Some(0));
    let gateway = gateway.restart();
    gateway.post("k", "{}").expect_problem(409, "outcome_unknown");
    gate.open();
}

#[test]
fn a_second_process_on_the_same_store_is_refused() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let refusal = gateway.again(&[]).err().unwrap();
    assert_eq!(refusal.code, Some(1));
    assert!(refusal.stderr.contains("in use by another process"), "{}", refusal.stderr);
    assert_eq!(gateway.post("k", "{}").status, 201, "the first goes on");
}

#[test]
fn a_change_that_gives_keys_other_ids_is_refused_unless_accepted() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    gateway.post("k", "{}");
    let dir = gateway.dir();
    drop(gateway);
    let try_start = |settings: &str, arguments: &[&str]| {
        Gateway::try_start(Arc::clone(&dir), &upstream.url(), settings, arguments, &[])
    };
    let changed = "idempotency.scope = [\"authorization\"]";
    let refusal = try_start(changed, &[]).err().unwrap();
    assert_eq!(refusal.code, Some(2), "{refusal:?}");
    for text in ["/posts", "[authorization, path]", "[authorization]", "--accept-new-identity"] {
        assert!(refusal.stderr.contains(text), "{text}: {}", refusal.stderr);
    }
    let folded = "[[routes]]\npath = \"/posts\"\ncase_sensitive = false";
    assert_eq!(try_start(folded, &[]).err().unwrap().code, Some(2));
    assert!(try_start("idempotency.retention = \"1h\"", &[]).unwrap().post("k", "{}").replayed(), "other settings may");
    drop(try_start(changed, &["--accept-new-identity"]).unwrap());
    drop(try_start(changed, &[]).unwrap());
    assert_eq!(try_start("", &[]).err().unwrap().code, Some(2), "it is the new one that counts now");
}

#[test]
fn a_missing_store_is_an_error_where_none_is_to_be_created_and_else_a_warning() {
    let upstream = Upstream::counting();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let refusal =
        Gateway::try_start(Arc::clone(&dir), &upstream.url(), "store.create = false", &[], &[]).err().unwrap();
    assert_eq!(refusal.code, Some(1));
    assert!(refusal.stderr.contains("no store at"), "{}", refusal.stderr);
    let gateway = Gateway::start(&upstream, "");
    let line: serde_json::Value = serde_json::from_str(&gateway.wait_for_log("a new store was created")).unwrap();
    assert_eq!((&line["level"], line["path"].as_str().unwrap()), (&"WARN".into(), gateway.data().to_str().unwrap()));
    let dir = gateway.dir();
    drop(gateway);
    let gateway = Gateway::try_start(dir, &upstream.url(), "store.create = false", &[], &[]).unwrap();
    assert!(!gateway.log().contains("a new store was created"));
}

#[test]
fn an_address_that_is_taken_is_named() {
    let upstream = Upstream::counting();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    let refusal = Gateway::try_start(dir, &upstream.url(), "", &["--listen", &taken], &[]).err().unwrap();
    assert_eq!(refusal.code, Some(1));
    assert!(refusal.stderr.contains(&taken), "{}", refusal.stderr);
}

#[test]
fn a_store_in_memory_works_and_forgets() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "store.engine = \"memory\"");
    gateway.post("k", "{}");
    assert!(gateway.post("k", "{}").replayed());
    assert!(!gateway.restart().post("k", "{}").replayed());
}
