//! `[server.cors]`: which pages may read what the gateway answers by itself. What a browser makes of an answer is decided
//! here as in the Fetch standard ("CORS check", "CORS-exposed header-name list").

use crate::support::{Client, Gate, Gateway, H2, Response, Upstream, eventually, h2_request, post, request};
use std::time::Duration;

const APP: &str = "https://app.example";
const SHOP: &str = "http://shop.example:8443";
const STRANGER: &str = "https://stranger.example";
const LISTED: &str = "server.cors.allow_origins = [\"https://app.example\", \"http://shop.example:8443\"]\n";
const ANY: &str = "server.cors.allow_origins = \"*\"\n";

/// The request of a page: a keyed POST by tenant "alice".
fn from(origin: &str, target: &str, key: &str, body: &str) -> String {
    post(target, key, body).replacen("\r\n", &format!("\r\nOrigin: {origin}\r\n"), 1)
}

fn lines<'a>(answer: &'a Response, name: &str) -> Vec<&'a str> {
    let lines = answer.headers.iter().filter(|(line, _)| line.eq_ignore_ascii_case(name));
    lines.map(|(_, value)| value.as_str()).collect()
}

/// The names in a field that is a list, over all lines.
fn listed(answer: &Response, name: &str) -> Vec<String> {
    let lines = lines(answer, name).join(",");
    lines.split(',').map(|name| name.trim().to_ascii_lowercase()).filter(|name| !name.is_empty()).collect()
}

/// Whether a browser lets the page read the answer; `credentials`: to a request with cookies.
fn reads(answer: &Response, origin: &str, credentials: bool) -> bool {
    let allowed = lines(answer, "access-control-allow-origin").join(", ");
    match (allowed.as_str(), credentials) {
        ("*", false) => true,
        (allowed, false) => allowed == origin,
        (allowed, true) => allowed == origin && lines(answer, "access-control-allow-credentials") == ["true"],
    }
}

/// Whether the page then sees a field; `credentials`: "*" is then a name like others.
fn sees(answer: &Response, field: &str, credentials: bool) -> bool {
    let exposed = listed(answer, "access-control-expose-headers");
    exposed.iter().any(|name| name == field) || !credentials && exposed.iter().any(|name| name == "*")
}

/// Asserts that pages of `origin` read it and see both fields, whether they send cookies or not.
#[track_caller]
fn expect_readable(answer: &Response, origin: &str) {
    for credentials in [false, true] {
        assert!(reads(answer, origin, credentials), "credentials: {credentials}: {answer:?}");
        for field in ["idempotency-replayed", "retry-after"] {
            assert!(sees(answer, field, credentials), "{field}: {answer:?}");
        }
    }
    assert_eq!(lines(answer, "access-control-allow-origin"), [origin], "{answer:?}");
    assert!(listed(answer, "vary").contains(&"origin".to_owned()), "{answer:?}");
}

/// Asserts that there is nothing about CORS in it.
#[track_caller]
fn expect_silent(answer: &Response) {
    let said = answer.headers.iter().filter(|(name, _)| {
        name.to_ascii_lowercase().starts_with("access-control-") || name.eq_ignore_ascii_case("vary")
    });
    assert_eq!(said.count(), 0, "{answer:?}");
}

/// An upstream whose answers the key chooses, and a gateway that is quick to give up.
fn with_problems(cors: &str) -> (Upstream, Gateway) {
    let upstream = Upstream::scripted(|request, reply| match request.key() {
        Some("lost") => reply.reset(),
        Some("large") => reply.send(201, &[], "x".repeat(4096)),
        Some("slow") => std::thread::sleep(Duration::from_secs(2)),
        _ => reply.send(201, &[], "done"),
    });
    let settings = format!(
        "{cors}server.limits.max_body = \"1KiB\"\nserver.limits.body_timeout = \"300ms\"\n\
         idempotency.max_recorded_body = \"1KiB\"\nidempotency.wait_timeout = \"50ms\"\n\
         upstream.response_timeout = \"300ms\"\n\
         [[routes]]\npath = \"/posts\"\n[[routes]]\npath = \"/strict\"\nmissing_key = \"reject\"\n"
    );
    let gateway = Gateway::start(&upstream, &settings);
    (upstream, gateway)
}

/// Every problem that one gateway before one upstream can be brought to, on routes and on pass-through.
#[track_caller]
fn each_problem(gateway: &Gateway, origin: &str, expect: impl Fn(&Response)) {
    assert_eq!(gateway.call(from(origin, "/posts", "large", "{}")).status, 201);
    assert_eq!(gateway.call(from(origin, "/posts", "k", "{}")).status, 201);
    let slowly = |target: &str| from(origin, target, "k2", "{}").replace("Content-Length: 2", "Content-Length: 9");
    let keyless = request("POST", "/strict", &[("Authorization", "a"), ("Origin", origin)], "{}");
    let anonymous = [("X-Api-Key", "a"), ("Idempotency-Key", "k"), ("Origin", origin)];
    let two_hosts = from(origin, "/posts", "k", "{}").replacen("\r\n", "\r\nHost: b\r\n", 1);
    for (request, status, code) in [
        (from(origin, "/posts", "k", "[]"), 422, "key_reused"),
        (from(origin, "/posts", "a b", "{}"), 400, "key_invalid"),
        (keyless, 400, "key_missing"),
        (request("POST", "/posts", &anonymous, "{}"), 400, "scope_missing"),
        (from(origin, "/Posts", "k", "{}"), 400, "path_ambiguous"),
        (two_hosts, 400, "bad_request"),
        (slowly("/posts"), 408, "request_timeout"),
        (slowly("/other"), 408, "request_timeout"),
        (from(origin, "/posts", "long", &"x".repeat(2000)), 413, "body_too_large"),
        (from(origin, "/posts", "large", "{}"), 409, "body_not_recorded"),
        (from(origin, "/posts", "lost", "{}"), 502, "upstream_broken"),
        (from(origin, "/posts", "lost", "{}"), 409, "outcome_unknown"),
        (from(origin, "/other", "lost", "{}"), 502, "upstream_broken"),
        (from(origin, "/posts", "slow", "{}"), 504, "upstream_timeout"),
        (from(origin, "/posts", "slow", "{}"), 409, "in_progress"),
        (from(origin, "/other", "slow", "{}"), 504, "upstream_timeout"),
    ] {
        let answer = gateway.call(request);
        answer.expect_problem(status, code);
        expect(&answer);
    }
}

#[test]
fn pages_of_listed_origins_read_every_problem() {
    for origin in [APP, SHOP] {
        let (_upstream, gateway) = with_problems(LISTED);
        each_problem(&gateway, origin, |answer| expect_readable(answer, origin));
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let gateway = Gateway::start_before(&nowhere, LISTED);
    for target in ["/posts", "/other"] {
        let answer = gateway.call(from(APP, target, "k", "{}"));
        answer.expect_problem(502, "upstream_unreachable");
        expect_readable(&answer, APP);
    }
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, &format!("{LISTED}store.min_free = \"1000000GiB\"\n"));
    let answer = gateway.call(from(APP, "/posts", "k", "{}"));
    answer.expect_problem(503, "store_unavailable");
    assert_eq!(answer.header("retry-after"), Some("1"));
    expect_readable(&answer, APP);
    // No problem, but no answer of the upstream's either.
    let last_hop = request("OPTIONS", "/posts", &[("Max-Forwards", "0"), ("Origin", APP)], "");
    let answer = gateway.call(last_hop);
    assert!(answer.status == 200 && answer.header("allow").is_some(), "{answer:?}");
    expect_readable(&answer, APP);
    assert_eq!(upstream.count(), 0);
}

#[test]
fn with_a_star_any_page_reads_every_problem_but_none_that_comes_with_cookies() {
    let (_upstream, gateway) = with_problems(ANY);
    each_problem(&gateway, STRANGER, |answer| {
        assert!(reads(answer, STRANGER, false) && !reads(answer, STRANGER, true), "{answer:?}");
        assert!(sees(answer, "retry-after", false) && sees(answer, "idempotency-replayed", false), "{answer:?}");
        assert_eq!(lines(answer, "access-control-allow-origin"), ["*"]);
        assert_eq!((answer.header("access-control-allow-credentials"), answer.header("vary")), (None, None));
    });
}

#[test]
fn other_pages_are_told_nothing() {
    let (_upstream, gateway) = with_problems(LISTED);
    each_problem(&gateway, STRANGER, expect_silent);
    for origin in [
        "null",
        "*",
        "",
        "https://app.example.stranger.example",
        "https://app.example:443",
        "https://APP.example",
        "http://app.example",
        "http://shop.example",
        "https://app.example, https://app.example",
        "https://app.example/",
    ] {
        let answer = gateway.call(from(origin, "/posts", "a b", "{}"));
        answer.expect_problem(400, "key_invalid");
        expect_silent(&answer);
    }
    expect_silent(&gateway.call(post("/posts", "a b", "{}")));
    let twice = from(APP, "/posts", "a b", "{}").replacen("\r\n", &format!("\r\nOrigin: {STRANGER}\r\n"), 1);
    expect_silent(&gateway.call(twice));
}

#[test]
fn without_the_setting_no_page_is_told_anything() {
    for settings in ["", "server.cors.allow_origins = []\n"] {
        let (_upstream, gateway) = with_problems(settings);
        each_problem(&gateway, APP, expect_silent);
        let replay = gateway.call(from(APP, "/posts", "k", "{}"));
        assert!(replay.replayed());
        expect_silent(&replay);
    }
}

/// What an upstream says of CORS that lets pages of any origin read, with cookies, and shows them `X-Total`.
fn mirroring() -> Upstream {
    Upstream::scripted(|request, reply| {
        let origin = request.header("origin").unwrap_or("https://none.example").to_owned();
        let headers = [
            ("Access-Control-Allow-Origin", origin.as_str()),
            ("Access-Control-Allow-Credentials", "true"),
            ("Access-Control-Expose-Headers", "X-Total"),
            ("Vary", "Accept, origin"),
            ("X-Total", "1"),
        ];
        reply.send(201, &headers, format!("run {}", request.number));
    })
}

/// The page of the first request may have been another's.
#[test]
fn a_replay_is_readable_for_the_page_that_retries() {
    let upstream = mirroring();
    let gateway = Gateway::start(&upstream, LISTED);
    assert_eq!(lines(&gateway.call(from(APP, "/posts", "k", "{}")), "access-control-expose-headers"), ["X-Total"]);
    for origin in [APP, SHOP, APP] {
        let replay = gateway.call(from(origin, "/posts", "k", "{}"));
        assert!(replay.replayed() && replay.text() == "run 1", "{replay:?}");
        expect_readable(&replay, origin);
        assert!(sees(&replay, "x-total", true), "the upstream's own list stays: {replay:?}");
        assert_eq!(lines(&replay, "vary"), ["Accept, origin"], "it is not said twice");
    }
    // To others it is what was recorded.
    for request in [from(STRANGER, "/posts", "k", "{}"), post("/posts", "k", "{}")] {
        let replay = gateway.call(request);
        assert!(replay.replayed());
        assert_eq!(lines(&replay, "access-control-allow-origin"), [APP]);
        assert_eq!(lines(&replay, "access-control-expose-headers"), ["X-Total"]);
    }
    let replay = gateway.restart().call(from(SHOP, "/posts", "k", "{}"));
    assert!(replay.replayed());
    expect_readable(&replay, SHOP);
    assert_eq!(upstream.count(), 1);
}

#[test]
fn with_a_star_a_replay_keeps_what_its_own_page_was_allowed() {
    let upstream = mirroring();
    let gateway = Gateway::start(&upstream, ANY);
    gateway.call(from(APP, "/posts", "k", "{}"));
    let own = gateway.call(from(APP, "/posts", "k", "{}"));
    assert!(own.replayed() && reads(&own, APP, true) && sees(&own, "idempotency-replayed", true), "{own:?}");
    let strange = gateway.call(from(STRANGER, "/posts", "k", "{}"));
    assert!(strange.replayed() && reads(&strange, STRANGER, false), "{strange:?}");
    assert!(!reads(&strange, STRANGER, true), "no cookies for just anyone: {strange:?}");
    assert_eq!(strange.header("access-control-allow-credentials"), None, "{strange:?}");
    assert!(sees(&strange, "idempotency-replayed", false), "{strange:?}");
}

/// About credentials the gateway says nothing where the upstream's content is concerned.
#[test]
fn a_replay_of_a_response_without_cors_is_readable_without_cookies() {
    let upstream = Upstream::scripted(|request, reply| match request.key() {
        Some("star") => {
            let headers = [("Access-Control-Allow-Origin", "*"), ("Access-Control-Expose-Headers", "*")];
            reply.send(201, &headers, "open");
        }
        Some("twice") => {
            let headers = [("Access-Control-Allow-Origin", APP), ("Access-Control-Allow-Origin", SHOP)];
            reply.send(201, &headers, "twice");
        }
        Some("varies") => reply.send(201, &[("Vary", "*")], "varies"),
        _ => reply.send(201, &[("Vary", "Accept")], "plain"),
    });
    let gateway = Gateway::start(&upstream, LISTED);
    for key in ["plain", "star", "twice", "varies"] {
        gateway.call(post("/posts", key, "{}"));
        let replay = gateway.call(from(APP, "/posts", key, "{}"));
        assert!(replay.replayed() && reads(&replay, APP, false) && !reads(&replay, APP, true), "{replay:?}");
        assert!(
            sees(&replay, "idempotency-replayed", true),
            "\"*\" is no wildcard to requests with cookies: {replay:?}"
        );
        let (allowed, vary): (&str, &[&str]) = match key {
            "plain" => (APP, &["Accept", "Origin"]),
            "star" => ("*", &[]),
            "twice" => (APP, &["Origin"]),
            _ => (APP, &["*"]),
        };
        assert_eq!(
            (lines(&replay, "access-control-allow-origin"), lines(&replay, "vary")),
            (vec![allowed], vary.to_vec())
        );
    }
}

#[test]
fn a_response_that_is_shared_without_a_record_is_readable_for_whoever_waited() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        held.wait();
        let headers = [("Access-Control-Allow-Origin", request.header("origin").unwrap()), ("Retry-After", "7")];
        reply.send(503, &headers, format!("run {}", request.number));
    });
    let gateway = Gateway::start(&upstream, LISTED);
    let mut first = Client::connect(gateway.addr);
    first.send(from(APP, "/posts", "k", "{}"));
    upstream.wait_for(1);
    let mut second = Client::connect(gateway.addr);
    second.send(from(SHOP, "/posts", "k", "{}"));
    eventually("it waits", || (gateway.metric("oncegate_waiters") == 1.0).then_some(()));
    gate.open();
    let (first, second) = (first.read(), second.read());
    assert_eq!((first.text(), second.text()), ("run 1".to_owned(), "run 1".to_owned()));
    assert!(reads(&first, APP, false) && !sees(&first, "retry-after", false), "the upstream's own answer: {first:?}");
    assert!(reads(&second, SHOP, false) && sees(&second, "retry-after", false), "{second:?}");
}

#[test]
fn a_probes_refusal_is_readable_for_whoever_gets_it() {
    let upstream = Upstream::scripted(|request, reply| {
        let headers = [("Access-Control-Allow-Origin", request.header("origin").unwrap())];
        let refused = request.method == "GET" && request.header("authorization") == Some("Bearer bob");
        reply.send(if refused { 403 } else { 201 }, &headers, "");
    });
    let settings = "[[routes]]\npath = \"/posts\"\nscope = [\"path\"]\nreplay_auth = \"probe\"\nprobe.path = \"/me\"\n";
    let gateway = Gateway::start(&upstream, &format!("{LISTED}{settings}"));
    gateway.call(from(APP, "/posts", "k", "{}"));
    for origin in [APP, SHOP] {
        let refusal = gateway.call(from(origin, "/posts", "k", "{}").replace("alice", "bob"));
        assert_eq!(refusal.status, 403);
        assert!(reads(&refusal, origin, false), "{refusal:?}");
    }
    assert_eq!(upstream.count(), 2, "bob was asked about once");
}

#[test]
fn what_the_upstream_answers_itself_is_left_as_it_is_and_so_are_preflights() {
    let upstream = Upstream::scripted(|request, reply| match request.method.as_str() {
        "OPTIONS" => {
            let headers = [
                ("Access-Control-Allow-Origin", "https://upstream.example"),
                ("Access-Control-Allow-Headers", "idempotency-key"),
                ("Access-Control-Max-Age", "60"),
            ];
            reply.send(204, &headers, "");
        }
        _ => reply.send(500, &[("Retry-After", "3"), ("Vary", "Accept")], "done"),
    });
    let preflight = |target: &str| {
        let asked = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "idempotency-key")];
        request("OPTIONS", target, &[&[("Origin", APP)], &asked[..]].concat(), "")
    };
    for cors in [LISTED, ANY] {
        let (gateway, plain) = (Gateway::start(&upstream, cors), Gateway::start(&upstream, ""));
        for request in [
            preflight("/posts"),
            preflight("/other"),
            from(APP, "/posts", "k", "{}"),
            from(APP, "/other", "k", "{}"),
            request("GET", "/posts", &[("Origin", APP)], ""),
        ] {
            let fields = |gateway: &Gateway| {
                let headers = gateway.call(&request).headers;
                headers.into_iter().filter(|(name, _)| name != "date").collect::<Vec<_>>()
            };
            assert_eq!(fields(&gateway), fields(&plain), "{request}");
            let seen = upstream.requests();
            let [.., ours, theirs] = &seen[..] else { panic!("both were sent on") };
            assert_eq!(ours.headers, theirs.headers, "{request}");
        }
    }
}

#[test]
fn through_two_gateways_an_answer_is_admitted_once() {
    let upstream = Upstream::scripted(|_, reply| reply.reset());
    let inner = Gateway::start(&upstream, LISTED);
    let outer = Gateway::start_before(&format!("http://{}", inner.addr), LISTED);
    for (status, code) in [(502, "upstream_broken"), (409, "outcome_unknown")] {
        let answer = outer.call(from(APP, "/posts", "k", "{}"));
        answer.expect_problem(status, code);
        expect_readable(&answer, APP);
    }
}

#[test]
fn over_http2_it_is_the_same() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, LISTED);
    let mut client = H2::connect(gateway.addr);
    let request = |origin: &str| {
        let headers = [("authorization", "Bearer alice"), ("idempotency-key", "k"), ("origin", origin)];
        h2_request("POST", "/posts", &headers)
    };
    expect_silent(&client.call(request(APP), "{}"));
    let replay = client.call(request(APP), "{}");
    assert!(
        replay.replayed() && reads(&replay, APP, false) && sees(&replay, "idempotency-replayed", true),
        "{replay:?}"
    );
    let problem = client.call(request(SHOP), "[]");
    problem.expect_problem(422, "key_reused");
    expect_readable(&problem, SHOP);
    expect_silent(&client.call(request(STRANGER), "[]"));
}

#[test]
fn while_draining_it_is_the_same() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let gateway = Gateway::start(&upstream, &format!("{LISTED}server.drain_timeout = \"0s\"\n"));
    let mut client = Client::connect(gateway.addr);
    client.send(from(APP, "/posts", "k", "{}"));
    upstream.wait_for(1);
    gateway.terminate();
    let answer = client.read();
    answer.expect_problem(503, "draining");
    assert_eq!(answer.header("retry-after"), Some("5"));
    expect_readable(&answer, APP);
    gate.open();
}
