//! The fingerprint: one key, one payload.

use crate::support::{Client, Gate, Gateway, Response, Upstream, eventually, post, request};
use std::sync::Arc;

type Headers<'a> = &'a [(&'a str, &'a str)];

const JSON: Headers<'_> = &[("Content-Type", "application/json")];

fn send(gateway: &Gateway, key: &str, headers: Headers<'_>, body: impl AsRef<[u8]>) -> Response {
    send_to(gateway, "/posts", key, headers, body)
}

fn send_to(gateway: &Gateway, target: &str, key: &str, headers: Headers<'_>, body: impl AsRef<[u8]>) -> Response {
    let body = body.as_ref();
    let mut head =
        format!("POST {target} HTTP/1.1\r\nHost: a.example\r\nAuthorization: a\r\nIdempotency-Key: {key}\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    let head = format!("{head}Content-Length: {}\r\n\r\n", body.len());
    gateway.call([head.as_bytes(), body].concat())
}

/// Two payloads, each with its headers, and whether they are one.
type Pair<'a> = (Headers<'a>, &'a [u8], Headers<'a>, &'a [u8], bool);

/// Asserts of each pair of payloads whether they are one.
#[track_caller]
fn compare(settings: &str, pairs: &[Pair<'_>]) {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, settings);
    for (number, (first_headers, first, second_headers, second, same)) in pairs.iter().enumerate() {
        let key = format!("k{number}");
        let what = format!(
            "{first_headers:?} {} / {second_headers:?} {}",
            String::from_utf8_lossy(&first[..first.len().min(200)]),
            String::from_utf8_lossy(&second[..second.len().min(200)])
        );
        let answer = send(&gateway, &key, first_headers, first);
        assert_eq!(answer.status, 201, "{what}: {answer:?}");
        let answer = send(&gateway, &key, second_headers, second);
        assert_eq!(answer.status, if *same { 201 } else { 422 }, "{what}: {answer:?}");
        if *same {
            assert!(answer.replayed(), "{what}");
        } else {
            answer.expect_problem(422, "key_reused");
        }
    }
    assert_eq!(upstream.count(), pairs.len());
}

fn json(settings: &str, pairs: &[(&str, &str, bool)]) {
    let pairs = pairs.iter().map(|(first, second, same)| (JSON, first.as_bytes(), JSON, second.as_bytes(), *same));
    compare(settings, &pairs.collect::<Vec<_>>());
}

#[test]
fn json_payloads_are_the_same_up_to_whitespace_and_member_order() {
    json(
        "",
        &[
            (r#"{"a":1,"b":[1,2]}"#, " {\t\"b\" : [ 1 ,\r\n2 ] , \"a\":1 }\n", true),
            (r#"{"a":{"x":1,"y":2},"b":3}"#, r#"{"b":3,"a":{"y":2,"x":1}}"#, true),
            ("[1,2]", "[2,1]", false),
            (r#"{"a":1}"#, r#"{"a":1,"b":null}"#, false),
            (r#"{"a":null}"#, "{}", false),
            (r#"{"a":1}"#, r#"{"A":1}"#, false),
            (r#"{"a":"1"}"#, r#"{"a":1}"#, false),
            (r#"{"a":"x"}"#, r#"{"a":"x "}"#, false),
            (r#"{"a":true}"#, r#"{"a":"true"}"#, false),
            ("[[1],2]", "[1,[2]]", false),
            (r#"["a","b"]"#, r#"["a,b"]"#, false),
            (r#"{"a":{"b":1}}"#, r#"{"a":{},"b":1}"#, false),
            ("[]", "{}", false),
            ("{}", "", false),
        ],
    );
}

#[test]
fn json_numbers_compare_by_their_text_and_strings_by_their_value() {
    json(
        "",
        &[
            (r#"{"id":9007199254740993}"#, r#"{"id":9007199254740992}"#, false),
            (r#"{"id":12345678901234567890123}"#, r#"{"id":12345678901234567890124}"#, false),
            ("[1]", "[1.0]", false),
            ("[1.0]", "[1.00]", false),
            ("[1e2]", "[100]", false),
            ("[1e2]", "[1E2]", false),
            ("[1e2]", "[1e+2]", false),
            ("[0]", "[-0]", false),
            ("[0.1]", "[0.10000000000000001]", false),
            (r#"["A\/\n"]"#, "[\"\\u0041/\\u000a\"]", true),
            (r#"["\u00e9"]"#, r#"["é"]"#, true),
            (r#"["\ud83d\ude00"]"#, r#"["😀"]"#, true),
            ("[\"e\u{301}\"]", "[\"\u{e9}\"]", false),
            (r#"{"\u0061":1,"b":2}"#, r#"{"b":2,"a":1}"#, true),
        ],
    );
}

#[test]
fn a_body_that_is_no_plain_json_compares_by_its_bytes() {
    let nested = |depth: usize, space: &str| format!("{}{space}{}", "[".repeat(depth), "]".repeat(depth));
    let objects = |depth: usize, space: &str| format!("{}1{space}{}", "{\"a\":".repeat(depth), "}".repeat(depth));
    json(
        "",
        &[
            (r#"{"a":1,"a":2}"#, r#"{"a":1, "a":2}"#, false),
            (r#"{"a":1,"a":2}"#, r#"{"a":1,"a":2}"#, true),
            (r#"{"a":1,"a":2}"#, r#"{"a":2}"#, false),
            (r#"{"a":1,"\u0061":2}"#, r#"{"a":1, "\u0061":2}"#, false),
            (r#"[{"a":1,"a":1}]"#, r#"[ {"a":1,"a":1}]"#, false),
            ("{a:1}", "{a: 1}", false),
            ("[1,]", "[1, ]", false),
            ("[01]", "[ 01]", false),
            ("[1] x", "[1]  x", false),
            ("NaN", " NaN", false),
            (r#"["\ud800"]"#, r#"[ "\ud800"]"#, false),
            ("", " ", false),
            (&nested(128, ""), &nested(128, " "), true),
            (&nested(129, ""), &nested(129, " "), false),
            (&nested(129, ""), &nested(129, ""), true),
            (&objects(128, ""), &objects(128, " "), true),
            (&objects(129, ""), &objects(129, " "), false),
            (&nested(100_000, ""), &nested(100_000, " "), false),
        ],
    );
    compare(
        "",
        &[(JSON, b"[\"\xff\"]", JSON, b"[ \"\xff\"]", false), (JSON, b"[\"\xff\"]", JSON, b"[\"\xfe\"]", false)],
    );
}

#[test]
fn a_body_is_json_by_its_media_type() {
    let (first, second) = (br#"{"a":1,"b":2}"#.as_slice(), br#"{ "b":2, "a":1 }"#.as_slice());
    let of = |headers: Headers<'static>, same| (headers, first, headers, second, same);
    compare(
        "",
        &[
            of(&[], true),
            of(&[("Content-Type", "application/json; charset=utf-8")], true),
            of(&[("Content-Type", "Application/JSON")], true),
            of(&[("Content-Type", "application/vnd.api+json")], true),
            of(&[("Content-Type", "application/ld+json;profile=x")], true),
            of(&[("Content-Type", "text/plain")], false),
            of(&[("Content-Type", "text/json")], false),
            of(&[("Content-Type", "application/jsonx")], false),
            of(&[("Content-Type", "application/x-www-form-urlencoded")], false),
        ],
    );
}

#[test]
fn media_type_and_content_encoding_count_and_parameters_do_not() {
    let body = b"{}".as_slice();
    compare(
        "",
        &[
            (JSON, body, &[("Content-Type", "application/json; charset=utf-8")], body, true),
            (JSON, body, &[("content-type", "APPLICATION/json ;x=y")], body, true),
            (JSON, body, &[("Content-Type", "application/vnd.api+json")], body, false),
            (JSON, body, &[("Content-Type", "text/plain")], body, false),
            (JSON, body, &[], body, false),
            (JSON, body, &[("Content-Type", "application/json"), ("Content-Encoding", "gzip")], body, false),
            (&[("Content-Encoding", "gzip")], body, &[("Content-Encoding", "br")], body, false),
            (&[("Content-Encoding", "gzip")], body, &[("Content-Encoding", "gzip")], body, true),
            (&[("X-Other", "1"), ("Accept", "a")], body, &[("X-Other", "2"), ("User-Agent", "b")], body, true),
        ],
    );
}

#[test]
fn the_path_is_compared_fully_decoded_and_the_query_raw() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.scope = [\"authorization\"]\n");
    send_to(&gateway, "/v1/workspaces/a%40b/posts?x=%41", "k", JSON, "{}");
    assert!(send_to(&gateway, "//v1/workspaces/%61@b/posts/?x=%41", "k", JSON, "{}").replayed());
    for target in
        ["/v1/workspaces/A@b/posts?x=%41", "/v1/workspaces/a@b/posts?x=A", "/v1/workspaces/a@b/posts", "/posts?x=%41"]
    {
        send_to(&gateway, target, "k", JSON, "{}").expect_problem(422, "key_reused");
    }
    assert_eq!(upstream.count(), 1);
}

#[test]
fn the_boundary_of_a_multipart_body_does_not_count() {
    let body = |boundary: &str, text: &str| {
        format!("--{boundary}\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n{text}\r\n--{boundary}--\r\n")
            .into_bytes()
    };
    let first: Headers<'_> = &[("Content-Type", "multipart/form-data; boundary=one")];
    let second: Headers<'_> = &[("Content-Type", "multipart/form-data; boundary=\"two two\"")];
    let mixed: Headers<'_> = &[("Content-Type", "multipart/mixed; boundary=two")];
    compare(
        "",
        &[
            (first, &body("one", "x"), second, &body("two two", "x"), true),
            (first, &body("one", "x"), second, &body("two two", "y"), false),
            (first, &body("one", "x"), first, &body("one", "x"), true),
            (first, &body("one", "x"), mixed, &body("two", "x"), false),
            (first, &body("one", "one"), second, &body("two two", "two two"), false),
        ],
    );
}

#[test]
fn raw_compares_bytes_and_none_compares_nothing() {
    let raw = "idempotency.fingerprint = \"raw\"\n";
    json(raw, &[(r#"{"a":1}"#, r#"{"a": 1}"#, false), (r#"{"a":1}"#, r#"{"a":1}"#, true)]);
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.fingerprint = \"none\"\n");
    send(&gateway, "k", JSON, "{}");
    assert!(send(&gateway, "k", &[("Content-Type", "text/plain")], "quite another").replayed());
    assert!(send_to(&gateway, "/posts?x", "k", JSON, "").replayed());
    assert_eq!(upstream.count(), 1);
}

#[test]
fn json_pointers_may_be_left_out() {
    let ignore = r#"idempotency.fingerprint_ignore = ["/timestamp", "/meta/trace~1id", "/items/0/at", "/a~0b"]"#;
    json(
        &format!("{ignore}\n"),
        &[
            (r#"{"a":1,"timestamp":1}"#, r#"{"timestamp":2,"a":1}"#, true),
            (r#"{"a":1,"timestamp":1}"#, r#"{"a":1}"#, true),
            (r#"{"timestamp":{"x":[1]}}"#, r#"{"timestamp":null}"#, true),
            (r#"{"meta":{"trace/id":1,"x":1}}"#, r#"{"meta":{"trace/id":2,"x":1}}"#, true),
            (r#"{"meta":{"trace/id":1,"x":1}}"#, r#"{"meta":{"trace/id":1,"x":2}}"#, false),
            (r#"{"items":[{"at":1,"n":1}]}"#, r#"{"items":[{"at":2,"n":1}]}"#, true),
            (r#"{"items":[{},{"at":1}]}"#, r#"{"items":[{},{"at":2}]}"#, false),
            (r#"{"a~b":1}"#, r#"{"a~b":2}"#, true),
            (r#"{"x":{"timestamp":1}}"#, r#"{"x":{"timestamp":2}}"#, false),
            (r#"{"Timestamp":1}"#, r#"{"Timestamp":2}"#, false),
        ],
    );
}

#[test]
fn listed_headers_count() {
    let on: Headers<'_> = &[("Stripe-Account", "a")];
    compare(
        "idempotency.fingerprint_headers = [\"stripe-account\"]\n",
        &[
            (on, b"{}", &[("stripe-account", "a")], b"{}", true),
            (on, b"{}", &[("Stripe-Account", "b")], b"{}", false),
            (on, b"{}", &[("Stripe-Account", "A")], b"{}", false),
            (on, b"{}", &[], b"{}", false),
            (&[], b"{}", &[("Stripe-Account", "")], b"{}", false),
            (on, b"{}", &[("Stripe-Account", "a"), ("Stripe-Account", "b")], b"{}", false),
            (&[], b"{}", &[("X-Other", "b")], b"{}", true),
        ],
    );
}

#[test]
fn another_payload_is_refused_before_waiting() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |_, reply| {
        held.wait();
        reply.send(201, &[], "done");
    });
    let gateway = Gateway::start(&upstream, "idempotency.wait_timeout = \"60s\"\n");
    let mut first = Client::connect(gateway.addr);
    first.send(post("/posts", "k", "{}"));
    upstream.wait_for(1);
    gateway.post("k", r#"{"other":1}"#).expect_problem(422, "key_reused");
    let mut same = Client::connect(gateway.addr);
    same.send(post("/posts", "k", " {} "));
    eventually("the duplicate waits", || (gateway.metric("oncegate_waiters") == 1.0).then_some(()));
    gate.open();
    assert_eq!((first.read().status, same.read().replayed()), (201, true));
    assert_eq!(upstream.count(), 1);
}

#[test]
fn another_payload_is_refused_before_the_outcome_is_called_unknown() {
    let upstream = Upstream::scripted(|_, reply| reply.reset());
    let gateway = Gateway::start(&upstream, "");
    gateway.post("k", "{}").expect_problem(502, "upstream_broken");
    gateway.post("k", r#"{"other":1}"#).expect_problem(422, "key_reused");
    gateway.post("k", "{ }").expect_problem(409, "outcome_unknown");
    let gateway = gateway.restart();
    gateway.post("k", r#"{"other":1}"#).expect_problem(422, "key_reused");
    gateway.post("k", "{ }").expect_problem(409, "outcome_unknown");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn a_record_made_under_other_settings_is_not_compared() {
    let upstream = Upstream::counting();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let start = |settings: &str| Gateway::try_start(Arc::clone(&dir), &upstream.url(), settings, &[], &[]).unwrap();
    let gateway = start("");
    gateway.post("k", r#"{"a":1}"#);
    drop(gateway);
    for settings in [
        "idempotency.fingerprint = \"raw\"\n",
        "idempotency.fingerprint_ignore = [\"/timestamp\"]\n",
        "idempotency.fingerprint_headers = [\"stripe-account\"]\n",
        "idempotency.fingerprint = \"none\"\n",
    ] {
        let gateway = start(settings);
        assert!(gateway.post("k", r#"{"a":1}"#).replayed(), "{settings}");
        assert!(gateway.post("k", r#"{"a":2}"#).replayed(), "{settings}: not compared");
    }
    let gateway = start("");
    gateway.post("k", r#"{"a":2}"#).expect_problem(422, "key_reused");
    assert!(
        gateway
            .call(request(
                "POST",
                "/posts",
                &[("Authorization", "Bearer alice"), ("Content-Type", "application/json"), ("Idempotency-Key", "k")],
                "{ \"a\" : 1 }"
            ))
            .replayed()
    );
    assert_eq!(upstream.count(), 1);
}
