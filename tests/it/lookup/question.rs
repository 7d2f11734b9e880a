//! What is asked, and with which fields.

use super::{LOOKUP, lookups, unknown, upstream};
use crate::support::{Gateway, Received, Upstream, request};

fn question(upstream: &Upstream) -> Received {
    let mut questions = upstream.requests();
    questions.retain(|request| request.method != "POST");
    assert_eq!(questions.len(), 1, "{questions:?}");
    questions.remove(0)
}

fn found() -> Upstream {
    upstream(|_, reply| reply.send(200, &[], "found"))
}

#[test]
fn it_is_asked_with_the_callers_credentials_and_nothing_of_the_body() {
    let upstream = found();
    let gateway = unknown(&upstream, "server.trusted_proxies = [\"127.0.0.0/8\"]\n");
    let fields = [
        ("Authorization", "Bearer alice"),
        ("Cookie", "session=1; theme=dark"),
        ("X-Api-Key", "secret"),
        ("Accept", "application/json"),
        ("Idempotency-Key", "k"),
        ("Content-Type", "application/json"),
        ("Content-Encoding", "identity"),
        ("Content-Language", "en"),
        ("Digest", "sha-256=x"),
        ("Expect", "100-continue"),
        ("If-None-Match", "\"x\""),
        ("Range", "bytes=0-1"),
        ("Via", "1.1 edge"),
        ("X-Forwarded-For", "192.0.2.1"),
        ("Connection", "x-hop"),
        ("X-Hop", "1"),
        ("TE", "trailers"),
    ];
    let lost = request("POST", "/posts?a=b", &fields, "{}");
    gateway.call(lost.replace("Expect: 100-continue\r\n", "")).expect_problem(422, "key_reused");
    assert_eq!(lookups(&upstream), 0, "another payload: 422 comes first");
    let lost = lost.replace("/posts?a=b", "/posts").replace("Content-Encoding: identity\r\n", "");
    assert_eq!(gateway.call(lost).text(), "found");
    let question = question(&upstream);
    assert_eq!((question.method.as_str(), question.target.as_str()), ("GET", "/posts/by-key/k"));
    assert!(question.body.is_empty());
    for (name, value) in [
        ("Host", "api.example"),
        ("Authorization", "Bearer alice"),
        ("Cookie", "session=1; theme=dark"),
        ("X-Api-Key", "secret"),
        ("Accept", "application/json"),
        ("X-Forwarded-For", "192.0.2.1, 127.0.0.1"),
        ("X-Forwarded-Proto", "http"),
    ] {
        assert_eq!(question.headers(name), [value], "{name}: {}", question.head);
    }
    let gone = "Idempotency-Key Content-Type Content-Encoding Content-Language Content-Length Transfer-Encoding Digest \
                Expect If-None-Match Range Via X-Hop TE";
    for name in gone.split_whitespace() {
        assert_eq!(question.header(name), None, "{}", question.head);
    }
}

#[test]
fn the_key_is_one_segment_percent_encoded() {
    for (field, target) in [
        ("a/b?c", "/posts/by-key/a%2Fb%3Fc"),
        ("\"with spaces, and #%41\"", "/posts/by-key/with%20spaces%2C%20and%20%23%2541"),
        ("\"quote \\\" and \\\\\"", "/posts/by-key/quote%20%22%20and%20%5C"),
        ("\"plain\"", "/posts/by-key/plain"),
        ("A-b._~", "/posts/by-key/A-b._~"),
        ("...", "/posts/by-key/..."),
        ("..%2F", "/posts/by-key/..%252F"),
        ("a;b&c=d+e:f@g", "/posts/by-key/a%3Bb%26c%3Dd%2Be%3Af%40g"),
    ] {
        let upstream = found();
        let gateway = Gateway::start(&upstream, LOOKUP);
        gateway.post(field, "{}").expect_problem(502, "upstream_broken");
        assert_eq!(gateway.post(field, "{}").text(), "found", "{field}");
        assert_eq!(question(&upstream).target, target);
    }
}

#[test]
fn keys_that_would_be_another_path_are_not_looked_up() {
    let upstream = upstream(|_, reply| reply.send(404, &[], ""));
    let gateway = Gateway::start(&upstream, LOOKUP);
    for key in [".", "..", "\"..\""] {
        let first = gateway.post(key, "{}");
        assert_eq!(first.status, if key == "\"..\"" { 409 } else { 502 }, "{key}: {first:?}");
        gateway.post(key, "{}").expect_problem(409, "outcome_unknown");
    }
    assert_eq!(upstream.count(), 2);
}

#[test]
fn parameters_of_the_path_are_filled_in() {
    let upstream = found();
    let route = "[[routes]]\npath = \"/v1/workspaces/{workspace}/posts\"\n[[routes]]\npath = \"/files/{*rest}\"\n\
                 lookup.path = \"/lost/{rest}?key={key}\"\n";
    let settings = LOOKUP.replace("/posts/by-key/{key}", "/by-key/{workspace}/{key}");
    let gateway = Gateway::start(&upstream, &format!("{settings}{route}"));
    for (target, key, question) in [
        ("/v1/workspaces/acme/posts", "a", "/by-key/acme/a"),
        ("/v1/workspaces/a%2Fb%20c/posts?x=y", "b", "/by-key/a%2Fb%20c/b"),
        ("/v1/./workspaces//%61cm%65/posts/", "c", "/by-key/acme/c"),
        ("/files/a/b%2Fc", "d/e", "/lost/a/b%2Fc?key=d%2Fe"),
    ] {
        let post = || gateway.call(crate::support::post(target, key, "{}"));
        post().expect_problem(502, "upstream_broken");
        assert_eq!(post().text(), "found");
        assert_eq!(upstream.requests().last().unwrap().target, question);
    }
}

#[test]
fn a_derived_key_is_looked_up_as_it_was_sent() {
    let upstream = found();
    let gateway = Gateway::start(&upstream, &format!("{LOOKUP}idempotency.missing_key = \"derive\"\n"));
    let keyless = || gateway.call(request("POST", "/posts", &[("Authorization", "Bearer alice")], "{}"));
    keyless().expect_problem(502, "upstream_broken");
    assert_eq!(keyless().text(), "found");
    let [sent, asked] = &upstream.requests()[..] else { panic!("{:?}", upstream.requests()) };
    assert_eq!(asked.target, format!("/posts/by-key/{}", sent.key().unwrap()));
}

#[test]
fn only_the_routes_that_want_it_ask() {
    let upstream = found();
    let route = "[[routes]]\npath = \"/posts\"\n[[routes]]\npath = \"/held\"\nunknown_outcome = \"hold\"\n";
    let gateway = unknown(&upstream, route);
    gateway.call(crate::support::post("/held", "other", "{}")).expect_problem(502, "upstream_broken");
    gateway.call(crate::support::post("/held", "other", "{}")).expect_problem(409, "outcome_unknown");
    assert_eq!(lookups(&upstream), 0);
    assert_eq!(gateway.post("k", "{}").text(), "found");
    assert_eq!(lookups(&upstream), 1);
}
