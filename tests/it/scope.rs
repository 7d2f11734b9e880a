//! The tenant scope: a replay never reaches someone who could not have made the first request.

use crate::support::gateway::Refusal;
use crate::support::{Gateway, Response, Upstream, request};
use std::path::Path;
use std::sync::Arc;

fn send(gateway: &Gateway, target: &str, headers: &[(&str, &str)]) -> Response {
    let all = [headers, &[("Content-Type", "application/json"), ("Idempotency-Key", "k")]].concat();
    gateway.call(request("POST", target, &all, "{}"))
}

/// Sends the key for each of the tenants, which must all be strangers to each other, and then again.
#[track_caller]
fn expect_strangers(gateway: &Gateway, upstream: &Upstream, target: &str, tenants: &[&[(&str, &str)]]) {
    for replayed in [false, true] {
        for tenant in tenants {
            let answer = send(gateway, target, tenant);
            assert_eq!((answer.status, answer.replayed()), (201, replayed), "{tenant:?}: {answer:?}");
        }
    }
    assert_eq!(upstream.count(), tenants.len());
}

#[track_caller]
fn expect_refused(gateway: &Gateway, upstream: &Upstream, requests: &[&[(&str, &str)]]) {
    let before = upstream.count();
    for headers in requests {
        let answer = send(gateway, "/posts", headers);
        assert_eq!(answer.status, 400, "{headers:?}: {answer:?}");
        answer.expect_problem(400, "scope_missing");
    }
    assert_eq!(upstream.count(), before);
}

fn refusal(settings: &str) -> Refusal {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    match Gateway::try_start(dir, "http://127.0.0.1:1", settings, &[], &[]) {
        Ok(_) => panic!("it started with {settings}"),
        Err(refusal) => refusal,
    }
}

#[test]
fn a_key_belongs_to_authorization_and_path() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let tenants: [&[(&str, &str)]; 4] = [
        &[("Authorization", "Bearer alice")],
        &[("Authorization", "Bearer Alice")],
        &[("Authorization", "Basic YWxpY2U=")],
        &[],
    ];
    expect_strangers(&gateway, &upstream, "/posts", &tenants);
    for target in ["/v1/workspaces/a/posts", "/v1/workspaces/b/posts"] {
        assert!(!send(&gateway, target, tenants[0]).replayed(), "{target}");
        assert!(send(&gateway, target, tenants[0]).replayed(), "{target}");
    }
    assert!(send(&gateway, "/posts", &[("Authorization", "Bearer alice"), ("Cookie", "a=1")]).replayed());
}

#[test]
fn requests_without_any_credential_share_one_tenant() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    assert!(!send(&gateway, "/posts", &[]).replayed());
    assert!(send(&gateway, "/posts", &[]).replayed());
    assert!(send(&gateway, "/posts", &[("User-Agent", "x"), ("X-Other", "y")]).replayed());
    assert!(send(&gateway, "/posts", &[("Authorization", ""), ("Cookie", "")]).replayed(), "empty is absent");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn an_anonymous_request_with_another_credential_is_refused() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for name in ["Cookie", "X-Api-Key", "Api-Key", "X-Auth-Token"] {
        expect_refused(&gateway, &upstream, &[&[(name, "a=1")]]);
        let detail = send(&gateway, "/posts", &[(name, "a=1")]).json()["detail"].to_string().to_lowercase();
        assert!(detail.contains(&name.to_lowercase()), "it says what to add: {detail}");
    }
    assert_eq!(upstream.count(), 0);
    assert_eq!(gateway.call(request("POST", "/posts", &[("Cookie", "a=1")], "{}")).status, 201, "no key, no scope");
}

#[test]
fn an_authorization_that_differs_with_every_request_is_refused() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for scheme in ["AWS4-HMAC-SHA256", "Digest", "DPoP", "OAuth", "Hawk", "digest", "dpop"] {
        expect_refused(&gateway, &upstream, &[&[("Authorization", &format!("{scheme} a=\"b\""))]]);
    }
    assert_eq!(send(&gateway, "/posts", &[("Authorization", "Bearer DPoP")]).status, 201);
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.scope = [\"header:x-api-key\"]\n");
    let headers = |nonce| [("Authorization", nonce), ("X-Api-Key", "a")];
    assert_eq!(send(&gateway, "/posts", &headers("Digest a")).status, 201, "authorization is not in the scope");
    assert!(send(&gateway, "/posts", &headers("Digest b")).replayed());
}

#[test]
fn a_scope_header_on_two_lines_or_named_in_connection_is_refused() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let requests: [&[(&str, &str)]; 3] = [
        &[("Authorization", "Bearer a"), ("authorization", "Bearer a")],
        &[("Authorization", "Bearer a"), ("Authorization", "")],
        &[("Authorization", "Bearer a"), ("Connection", "close, AUTHORIZATION")],
    ];
    expect_refused(&gateway, &upstream, &requests);
    let settings = "idempotency.scope = [\"cookie:sid\", \"header:x-shop\", \"path\"]\n";
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, settings);
    let requests: [&[(&str, &str)]; 4] = [
        &[("Cookie", "sid=a"), ("Cookie", "x=y")],
        &[("Cookie", "sid=a"), ("Connection", "cookie")],
        &[("Cookie", "sid=a"), ("X-Shop", "1"), ("X-Shop", "2")],
        &[("Cookie", "sid=a"), ("X-Shop", "1"), ("Connection", "x-shop")],
    ];
    expect_refused(&gateway, &upstream, &requests);
}

#[test]
fn a_cookie_may_tell_the_tenant() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.scope = [\"cookie:sid\", \"path\"]\n");
    let tenants: [&[(&str, &str)]; 4] =
        [&[("Cookie", "sid=a")], &[("Cookie", "sid=b")], &[("Cookie", "sid=A; theme=dark")], &[]];
    expect_strangers(&gateway, &upstream, "/posts", &tenants);
    assert!(send(&gateway, "/posts", &[("Cookie", "theme=light; sid=a;x=y")]).replayed(), "the others do not count");
    let strangers: [&[(&str, &str)]; 4] = [
        &[("Cookie", "theme=dark")],
        &[("Cookie", "xsid=a; SID=a")],
        &[("Authorization", "Bearer a")],
        &[("X-Api-Key", "a")],
    ];
    expect_refused(&gateway, &upstream, &strangers);
}

#[test]
fn a_credential_header_may_tell_the_tenant() {
    let settings = "idempotency.scope = [\"header:X-Shop-Secret\", \"path\"]\n\
                    idempotency.credential_headers = [\"x-shop-secret\", \"x-other-secret\"]\n";
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, settings);
    let tenants: [&[(&str, &str)]; 3] = [&[("X-Shop-Secret", "a")], &[("x-shop-secret", "b")], &[]];
    expect_strangers(&gateway, &upstream, "/posts", &tenants);
    expect_refused(&gateway, &upstream, &[&[("X-Other-Secret", "a")], &[("Authorization", "Bearer a")]]);
}

#[test]
fn host_and_path_parameters_may_tell_tenants_apart() {
    let settings = "idempotency.scope = [\"authorization\", \"path:workspace\", \"host\"]\n[[routes]]\n\
                    path = \"/w/{workspace}/{kind}\"\n";
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, settings);
    let from = |host: &str, target: &str| {
        gateway.call(format!(
            "POST {target} HTTP/1.1\r\nHost: {host}\r\nAuthorization: a\r\nIdempotency-Key: k\r\nContent-Length: 0\r\n\r\n"
        ))
    };
    for (host, target) in [("a.example", "/w/1/x"), ("b.example", "/w/1/x"), ("a.example", "/w/2/x")] {
        assert!(!from(host, target).replayed(), "{host} {target}");
        assert!(from(host, target).replayed(), "{host} {target}");
    }
    assert!(from("A.Example", "/w/%31/x").replayed(), "a host's case does not count, an escape neither");
    from("a.example", "/w/1/y").expect_problem(422, "key_reused");
    assert_eq!(upstream.count(), 3);
}

#[test]
fn a_trusted_header_counts_from_trusted_proxies_alone() {
    let settings = "idempotency.scope = [\"header:x-user\", \"path\"]\nidempotency.trusted_headers = [\"x-user\"]\n";
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, &format!("{settings}server.trusted_proxies = [\"127.0.0.1\"]\n"));
    let tenants: [&[(&str, &str)]; 3] = [&[("X-User", "a")], &[("X-User", "b")], &[]];
    expect_strangers(&gateway, &upstream, "/posts", &tenants);
    expect_refused(&gateway, &upstream, &[&[("Authorization", "Bearer a")], &[("X-User", "a"), ("X-User", "a")]]);
    let upstream = Upstream::counting();
    let gateway =
        Gateway::start(&upstream, &format!("{settings}server.trusted_proxies = [\"127.0.0.2\", \"10.0.0.0/8\"]\n"));
    expect_refused(&gateway, &upstream, &[&[("X-User", "a")], &[("X-User", "a"), ("Authorization", "Bearer a")]]);
    assert_eq!(send(&gateway, "/posts", &[]).status, 201);
    let refusal = refusal(settings);
    assert_eq!(refusal.code, Some(2), "{refusal:?}");
    assert!(refusal.stderr.contains("trusted_proxies"), "{refusal:?}");
}

#[test]
fn parts_are_joined_unambiguously() {
    let settings = "idempotency.scope = [\"cookie:a\", \"cookie:b\", \"header:x-api-key\"]\n";
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, settings);
    let tenants: [&[(&str, &str)]; 6] = [
        &[("Cookie", "a=xy; b=z")],
        &[("Cookie", "a=x; b=yz")],
        &[("Cookie", "a=xyz")],
        &[("Cookie", "b=xyz")],
        &[("X-Api-Key", "xyz")],
        &[("Cookie", "a=x,b=y"), ("X-Api-Key", "z")],
    ];
    expect_strangers(&gateway, &upstream, "/posts", &tenants);
}

#[test]
fn a_scope_that_no_credential_is_part_of_is_refused_at_start() {
    for settings in [
        "idempotency.scope = [\"path\"]\n",
        "idempotency.scope = []\n",
        "idempotency.scope = [\"host\", \"path\"]\n",
        "idempotency.scope = [\"header:x-user\", \"path\"]\n",
        "[[routes]]\npath = \"/posts\"\nscope = [\"path\"]\n",
        "[[routes]]\npath = \"/w/{a}\"\nscope = [\"path:a\"]\n",
    ] {
        let refusal = refusal(settings);
        assert_eq!(refusal.code, Some(2), "{settings}: {refusal:?}");
        assert!(refusal.stderr.contains("scope"), "{settings}: {refusal:?}");
    }
}

#[test]
fn a_scope_that_can_never_be_filled_is_refused_at_start() {
    for (settings, word) in [
        ("idempotency.scope = [\"client-cert\"]\n", "client-cert"),
        ("idempotency.scope = [\"authorization\", \"client-cert\"]\n", "client-cert"),
        ("idempotency.scope = [\"jwt:sub\"]\n", "jwt"),
        ("idempotency.scope = [\"authorization\", \"path:nothing\"]\n", "nothing"),
        ("idempotency.scope = [\"authorization\", \"cookie:\"]\n", "cookie"),
        ("idempotency.scope = [\"authorization\", \"header:a b\"]\n", "header"),
        ("idempotency.scope = [\"authorization\", \"colour\"]\n", "colour"),
    ] {
        let refusal = refusal(settings);
        assert_eq!(refusal.code, Some(2), "{settings}: {refusal:?}");
        assert!(refusal.stderr.contains(word), "{settings}: {refusal:?}");
    }
}

#[test]
fn replay_auth_none_lets_whoever_knows_tenant_and_key_see_the_replay() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.scope = [\"path\"]\nidempotency.replay_auth = \"none\"\n");
    assert!(!send(&gateway, "/posts", &[("Authorization", "Bearer a")]).replayed());
    assert!(send(&gateway, "/posts", &[("Authorization", "Bearer b")]).replayed());
    assert!(send(&gateway, "/posts", &[]).replayed());
    assert_eq!(upstream.count(), 1);
}

#[test]
fn a_credential_is_neither_stored_nor_logged() {
    const SECRETS: [&str; 3] = ["s3cret-bearer-41c7", "s3cret-cookie-41c7", "s3cret-apikey-41c7"];
    let upstream = Upstream::scripted(|request, reply| match request.key() {
        Some("lost") => reply.reset(),
        _ => reply.send(201, &[], "done"),
    });
    let settings = "idempotency.scope = [\"authorization\", \"cookie:sid\", \"header:x-api-key\"]\n";
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let environment = [("RUST_LOG", "trace"), ("ONCEGATE_LOG", "trace")];
    let gateway = Gateway::try_start(dir, &upstream.url(), settings, &[], &environment).unwrap();
    let (bearer, cookie) = (format!("Bearer {}", SECRETS[0]), format!("sid={}", SECRETS[1]));
    let mut headers = vec![("Authorization", bearer.as_str()), ("Cookie", &cookie), ("X-Api-Key", SECRETS[2])];
    for key in ["visible-key", "visible-key", "lost", "lost", "a b"] {
        headers.truncate(3);
        headers.push(("Idempotency-Key", key));
        gateway.call(request("POST", "/posts", &headers, "{}"));
    }
    headers.push(("Authorization", &bearer));
    gateway.call(request("POST", "/posts", &headers, "{}")).expect_problem(400, "key_invalid");
    let (dir, data, log) = (gateway.dir(), gateway.data(), gateway.log());
    drop(gateway);
    let mut stored = Vec::new();
    collect(&data, &mut stored);
    drop(dir);
    let contains = |text: &str| stored.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(contains("visible-key"), "the records are there to be searched");
    for secret in SECRETS {
        assert!(!contains(secret), "{secret} is stored");
        assert!(!log.contains(secret), "{secret} is logged:\n{log}");
    }
}

fn collect(dir: &Path, bytes: &mut Vec<u8>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, bytes);
        } else {
            bytes.extend(std::fs::read(&path).unwrap());
        }
    }
}
