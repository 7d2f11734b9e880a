//! The key: what is one, and what happens without one.

use crate::support::{Client, Gateway, Upstream, call, eventually, request};

/// A POST whose header lines are raw bytes, with a body of `{}`.
fn raw(path: &str, lines: &[u8]) -> Vec<u8> {
    let mut bytes = format!("POST {path} HTTP/1.1\r\nHost: a.example\r\nAuthorization: Bearer alice\r\n").into_bytes();
    bytes.extend_from_slice(lines);
    bytes.extend_from_slice(b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}");
    bytes
}

fn keyed(value: &[u8]) -> Vec<u8> {
    raw("/posts", &[b"Idempotency-Key: ", value, b"\r\n"].concat())
}

#[test]
fn every_form_of_a_key_is_accepted_and_forwarded_byte_for_byte() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let (bare, quoted) = ("k".repeat(255), format!("\"{}\"", "q".repeat(255)));
    let escaped = format!("\"{}\"", "\\\"".repeat(255));
    let forms = [
        "a",
        "8e03978e-40d5-43dd-bc93-6894a57f9324",
        "\"quoted\"",
        "\"with, a comma; and space\"",
        "\"with \\\"escapes\\\" \\\\\"",
        "\"with parameters\";a=1;b=\"x\";c",
        "\" \"",
        "a;b=c",
        "!#$%&'()*+-./09:;<=>?@AZ[\\]^_`az{|}~",
        "%41",
        bare.as_str(),
        quoted.as_str(),
        escaped.as_str(),
    ];
    for (number, form) in forms.iter().enumerate() {
        let first = gateway.call(keyed(form.as_bytes()));
        assert_eq!((first.status, first.replayed()), (201, false), "{form}: {first:?}");
        assert!(gateway.call(keyed(form.as_bytes())).replayed(), "{form}");
        let received = &upstream.requests()[number];
        assert_eq!(received.headers("idempotency-key"), vec![*form]);
    }
    assert_eq!(upstream.count(), forms.len());
}

#[test]
fn a_quoted_and_a_bare_key_are_the_same_and_parameters_do_not_count() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    gateway.call(keyed(b"abc"));
    for form in ["\"abc\"", "\"abc\";v=1", "\"abc\"; v=1", "  abc\t", "\"abc\";x;y=?1"] {
        let answer = gateway.call(keyed(form.as_bytes()));
        assert!(answer.replayed(), "{form}: {answer:?}");
    }
    assert_eq!(upstream.count(), 1);
    // The decoded value counts, not the escaping.
    gateway.call(keyed(br"a\b"));
    assert!(gateway.call(keyed(br#""a\\b""#)).replayed());
    // Of a bare token every character counts.
    assert!(!gateway.call(keyed(b"abc;v=1")).replayed());
    assert!(gateway.call(keyed(b"\"abc;v=1\"")).replayed());
}

#[test]
fn the_case_of_a_key_matters() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for key in ["abc", "Abc", "ABC", "\"aBc\""] {
        assert!(!gateway.call(keyed(key.as_bytes())).replayed(), "{key}");
    }
    assert_eq!(upstream.count(), 4);
}

#[test]
fn anything_that_is_not_a_key_is_refused() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let (bare, quoted) = ("k".repeat(256), format!("\"{}\"", "q".repeat(256)));
    let wrong: [&[u8]; 23] = [
        b"",
        b"   ",
        b"\"\"",
        b"\"\";a=1",
        b"\"abc",
        b"abc\"",
        b"a\"b",
        b"\"abc\"x",
        b"\"abc\" ;a=1",
        b"\"abc\", \"def\"",
        b"\"a\\bc\"",
        b"\"abc\\\"",
        b"\"abc\";",
        b"a,b",
        b",",
        b"a b",
        b"a\tb",
        b"caf\xc3\xa9",
        b"\"caf\xc3\xa9\"",
        b"\xff",
        b"\"a\tb\"",
        bare.as_bytes(),
        quoted.as_bytes(),
    ];
    for value in wrong {
        let answer = gateway.call(keyed(value));
        assert_eq!(answer.status, 400, "{}: {answer:?}", String::from_utf8_lossy(value));
        answer.expect_problem(400, "key_invalid");
    }
    let twice = b"Idempotency-Key: a\r\nIdempotency-Key: a\r\n";
    gateway.call(raw("/posts", twice)).expect_problem(400, "key_invalid");
    gateway.call(raw("/posts", b"Idempotency-Key: a\r\nidempotency-key: \r\n")).expect_problem(400, "key_invalid");
    assert_eq!(upstream.count(), 0);
    // What is no key elsewhere is nobody's business here.
    assert_eq!(gateway.call(raw("/other", twice)).status, 201);
    assert_eq!(upstream.requests()[0].headers("idempotency-key"), vec!["a", "a"]);
}

#[test]
fn a_key_that_connection_names_is_refused() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for connection in ["Idempotency-Key", "close, idempotency-key", "keep-alive,IDEMPOTENCY-KEY , x"] {
        let lines = format!("Connection: {connection}\r\nIdempotency-Key: a\r\n");
        let answer = gateway.call(raw("/posts", lines.as_bytes()));
        assert_eq!(answer.status, 400, "{connection}: {answer:?}");
        answer.expect_problem(400, "key_invalid");
    }
    let lines = b"Connection: x\r\nConnection: idempotency-key\r\nIdempotency-Key: a\r\n";
    gateway.call(raw("/posts", lines)).expect_problem(400, "key_invalid");
    assert_eq!(upstream.count(), 0);
}

#[test]
fn without_a_key_a_post_passes_by_default() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for number in 1..=2 {
        let answer = gateway.call(raw("/posts", b""));
        assert_eq!((answer.text(), answer.replayed()), (format!("{{\"n\":{number}}}"), false));
    }
    assert_eq!(upstream.requests()[0].key(), None);
    assert_eq!(gateway.metric("oncegate_records{state=\"completed\"}"), 0.0);
}

#[test]
fn without_a_key_a_post_streams_to_the_upstream_before_it_is_whole() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_body = \"1KiB\"\n");
    let mut client = Client::connect(gateway.addr);
    client.send("POST /posts HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4096\r\n\r\n");
    client.send("x".repeat(2048));
    eventually("the upstream is connected to", || (upstream.connections() == 1).then_some(()));
    client.send("x".repeat(2048));
    assert_eq!(client.read().status, 201);
    assert_eq!(upstream.requests()[0].body.len(), 4096, "no cap without a key");
}

#[test]
fn missing_key_reject_refuses_a_post_without_a_key() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.missing_key = \"reject\"\n");
    gateway.call(raw("/posts", b"")).expect_problem(400, "key_missing");
    assert_eq!(upstream.count(), 0);
    assert_eq!(gateway.call(raw("/other", b"")).status, 201, "no route");
    assert_eq!(gateway.call(request("GET", "/posts", &[], "")).status, 201, "no POST");
    assert_eq!(gateway.call(keyed(b"k")).status, 201);
    assert!(gateway.call(keyed(b"k")).replayed());
}

#[test]
fn missing_key_derive_makes_the_key_from_tenant_and_payload() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.missing_key = \"derive\"\n");
    let unkeyed = |tenant: &str, target: &str, body: &str| {
        let headers = [("Authorization", tenant), ("Content-Type", "application/json")];
        call(gateway.addr, request("POST", target, &headers, body))
    };
    assert_eq!(unkeyed("alice", "/posts", r#"{"a":1,"b":2}"#).status, 201);
    assert!(unkeyed("alice", "/posts", r#"{"a":1,"b":2}"#).replayed());
    assert!(unkeyed("alice", "/posts", r#"{ "b": 2, "a": 1 }"#).replayed(), "the same payload");
    assert_eq!(upstream.count(), 1);
    for (tenant, target, body) in [
        ("alice", "/posts", r#"{"a":1,"b":3}"#),
        ("alice", "/posts?x", r#"{"a":1,"b":2}"#),
        ("bob", "/posts", r#"{"a":1,"b":2}"#),
        ("alice", "/v1/workspaces/w/posts", r#"{"a":1,"b":2}"#),
    ] {
        let answer = unkeyed(tenant, target, body);
        assert_eq!((answer.status, answer.replayed()), (201, false), "{tenant} {target} {body}");
    }
    let requests = upstream.requests();
    let mut keys = requests.iter().map(|request| request.key().unwrap()).collect::<Vec<_>>();
    for key in &keys {
        let hex = key.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        assert!(key.len() == 64 && hex, "{key}");
    }
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 5, "each its own: {keys:?}");
    // A key that the client brings stays what it is.
    assert_eq!(gateway.call(keyed(b"mine")).status, 201);
    assert_eq!(upstream.requests()[5].headers("idempotency-key"), vec!["mine"]);
    gateway.call(keyed(b"")).expect_problem(400, "key_invalid");
}

#[test]
fn a_derived_key_is_the_same_when_the_request_is_executed_again() {
    let upstream = Upstream::scripted(|_, reply| reply.send(429, &[], "slow down"));
    let gateway = Gateway::start(&upstream, "idempotency.missing_key = \"derive\"\n");
    for _ in 0..2 {
        assert_eq!(gateway.call(raw("/posts", b"")).status, 429);
    }
    let gateway = gateway.restart();
    assert_eq!(gateway.call(raw("/posts", b"")).status, 429);
    let requests = upstream.requests();
    assert_eq!(requests.len(), 3, "not executed, so sent anew");
    assert!(requests.iter().all(|request| request.key() == requests[0].key()), "{requests:?}");
    assert_eq!(requests[0].headers("idempotency-key").len(), 1);
}

#[test]
fn derive_without_a_fingerprint_is_an_error_at_start() {
    let settings = "idempotency.missing_key = \"derive\"\nidempotency.fingerprint = \"none\"\n";
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let refusal = Gateway::try_start(dir, "http://127.0.0.1:1", settings, &[], &[]).err().unwrap();
    assert_eq!(refusal.code, Some(2), "{refusal:?}");
    assert!(refusal.stderr.contains("missing_key") && refusal.stderr.contains("fingerprint"), "{refusal:?}");
}

#[test]
fn the_key_may_stand_in_another_header() {
    let upstream = Upstream::counting();
    let settings = "idempotency.header = \"X-Request-Key\"\nidempotency.missing_key = \"derive\"\n[[routes]]\npath = \"/posts\"\n\
                    [[routes]]\npath = \"/orders\"\nheader = \"Order-Key\"\nmissing_key = \"reject\"\n";
    let gateway = Gateway::start(&upstream, settings);
    let other = raw("/posts", b"X-Request-Key: \"k\";v=1\r\nIdempotency-Key: a\r\nIdempotency-Key: b\r\n");
    assert_eq!(gateway.call(&other).status, 201);
    assert!(gateway.call(&other).replayed());
    let received = &upstream.requests()[0];
    assert_eq!(received.headers("x-request-key"), vec!["\"k\";v=1"]);
    assert_eq!(received.headers("idempotency-key"), vec!["a", "b"], "just a header here");
    gateway.call(raw("/posts", b"X-Request-Key: \r\n")).expect_problem(400, "key_invalid");
    gateway.call(raw("/orders", b"X-Request-Key: k\r\n")).expect_problem(400, "key_missing");
    assert_eq!(gateway.call(raw("/orders", b"Order-Key: k\r\n")).status, 201);
    assert!(gateway.call(raw("/orders", b"order-key: k\r\n")).replayed());
    gateway.call(raw("/posts", b"Idempotency-Key: a\r\n"));
    let received = &upstream.requests()[2];
    assert_eq!(received.header("x-request-key").map(str::len), Some(64), "derived: {received:?}");
    assert_eq!(received.headers("idempotency-key"), vec!["a"]);
}

#[test]
fn an_upload_that_the_client_cuts_off_claims_nothing() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let head = "POST /posts HTTP/1.1\r\nHost: a.example\r\nAuthorization: Bearer alice\r\nIdempotency-Key: k\r\n";
    for (rest, half) in [
        ("Content-Length: 10\r\n\r\n{}", false),
        ("Content-Length: 10\r\n\r\n{}", true),
        ("Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", false),
        ("Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", true),
    ] {
        let mut client = Client::connect(gateway.addr);
        client.send(format!("{head}{rest}"));
        if half {
            client.half_close();
            if let Some(answer) = client.try_read() {
                assert_eq!(answer.status, 400, "{rest}: {answer:?}");
            }
        } else {
            client.reset();
        }
    }
    let answer = gateway.call(format!("{head}Content-Length: 10\r\n\r\n{{\"a\":1234}}"));
    assert_eq!((answer.status, answer.replayed()), (201, false), "{answer:?}");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn expect_continue_is_answered_after_key_and_length_have_been_checked() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_body = \"1KiB\"\n");
    let head = |key: &str, len: usize| {
        format!(
            "POST /posts HTTP/1.1\r\nHost: a.example\r\nAuthorization: Bearer alice\r\nIdempotency-Key: {key}\r\n\
             Expect: 100-continue\r\nContent-Length: {len}\r\n\r\n"
        )
    };
    for (key, len, status, code) in [("a b", 2, 400, "key_invalid"), ("k", 4096, 413, "body_too_large")] {
        let mut client = Client::connect(gateway.addr);
        client.send(head(key, len));
        let answer = client.try_read_any().unwrap();
        assert_eq!(answer.status, status, "{answer:?}");
        answer.expect_problem(status, code);
    }
    let mut client = Client::connect(gateway.addr);
    client.send(head("k", 2));
    assert_eq!(client.try_read_any().unwrap().status, 100);
    client.send("{}");
    assert_eq!(client.read().status, 201);
    assert_eq!(upstream.count(), 1);
    assert_eq!(upstream.requests()[0].header("expect"), None, "answered here");
}
