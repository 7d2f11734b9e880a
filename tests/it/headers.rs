//! What a proxy does to header fields (RFC 9110 §7.6, RFC 9112 §3.2), on pass-through and on intercepted requests alike.

use crate::support::{Client, Gateway, Received, Upstream, request};

/// What the upstream sees of a request, once passed through and once intercepted.
#[track_caller]
fn seen(settings: &str, headers: &[(&str, &str)]) -> Vec<Received> {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, settings);
    for target in ["/other", "/posts"] {
        let all = [headers, &[("Idempotency-Key", "k")]].concat();
        assert_eq!(gateway.call(request("POST", target, &all, "{}")).status, 201);
    }
    upstream.requests()
}

#[test]
fn hop_by_hop_fields_end_here() {
    let headers = [
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Connection", "keep-alive"),
        ("TE", "trailers"),
        ("Upgrade", "h2c"),
        ("X-End", "1"),
    ];
    for request in seen("", &headers) {
        for name in ["connection", "x-hop", "keep-alive", "proxy-connection", "te", "upgrade"] {
            assert_eq!(request.header(name), None, "{name}: {}", request.head);
        }
        assert_eq!(request.header("x-end"), Some("1"));
    }
}

#[test]
fn via_and_forwarded_fields_tell_where_a_request_came_from() {
    let headers = [
        ("Via", "1.1 front"),
        ("X-Forwarded-For", "9.9.9.9"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "evil"),
    ];
    for request in seen("", &headers) {
        assert_eq!(request.headers("via"), ["1.1 front", "1.1 oncegate"]);
        assert_eq!(request.headers("x-forwarded-for"), ["9.9.9.9, 127.0.0.1"]);
        assert_eq!(request.headers("x-forwarded-proto"), ["http"]);
        assert_eq!(request.headers("x-forwarded-host"), ["api.example"]);
    }
    for request in seen("server.trusted_proxies = [\"127.0.0.0/8\"]", &headers) {
        assert_eq!(request.headers("x-forwarded-for"), ["9.9.9.9, 127.0.0.1"]);
        assert_eq!(request.headers("x-forwarded-proto"), ["https"]);
        assert_eq!(request.headers("x-forwarded-host"), ["evil"]);
    }
}

#[test]
fn the_host_is_preserved_or_what_the_operator_says() {
    for (settings, host) in [("", "api.example"), ("upstream.host = \"api.internal:81\"", "api.internal:81")] {
        assert!(seen(settings, &[]).iter().all(|request| request.headers("host") == [host]));
    }
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "upstream.host = \"upstream\"");
    gateway.post("k", "{}");
    assert_eq!(upstream.requests()[0].header("host"), Some(upstream.addr.to_string().as_str()));
}

#[test]
fn an_http_1_0_request_without_host_gets_the_upstreams() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    assert_eq!(gateway.call("GET /x HTTP/1.0\r\n\r\n").status, 201);
    assert_eq!(upstream.requests()[0].header("host"), Some(upstream.addr.to_string().as_str()));
    assert_eq!(upstream.requests()[0].headers("via"), ["1.0 oncegate"]);
}

#[test]
fn malformed_requests_are_refused_before_the_upstream() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for text in [
        "GET /x HTTP/1.1\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a b\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: user@a\r\n\r\n",
        "GET http://a/x HTTP/1.1\r\nHost: b\r\n\r\n",
        "GET ftp://a/x HTTP/1.1\r\nHost: a\r\n\r\n",
        "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\nConnection: Host\r\n\r\n",
    ] {
        let mut client = Client::connect(gateway.addr);
        client.send(text);
        let answer = client.read();
        assert_eq!(answer.status, 400, "{text:?}: {answer:?}");
        answer.expect_problem(400, "bad_request");
        assert_eq!(answer.header("connection"), Some("close"), "{text:?}");
    }
    assert_eq!(upstream.count(), 0);
    assert_eq!(gateway.call(request("GET", "/x", &[], "")).status, 201);
}

#[test]
fn an_absolute_target_becomes_origin_form() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let text = "POST http://API.example/posts?x=1 HTTP/1.1\r\nHost: api.example\r\nIdempotency-Key: k\r\nContent-Length: 2\r\n\r\n{}";
    assert_eq!(gateway.call(text).text(), r#"{"n":1}"#);
    assert!(gateway.call(text).replayed(), "and is a route");
    let seen = &upstream.requests()[0];
    assert_eq!(seen.target, "/posts?x=1");
    assert_eq!(seen.headers("host").len(), 1);
}

#[test]
fn max_forwards_counts_down_and_ends_here() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for method in ["OPTIONS", "TRACE"] {
        let before = upstream.count();
        let last = gateway.call(request(method, "/x", &[("Max-Forwards", "0"), ("Authorization", "Bearer s")], ""));
        assert!(!last.text().contains("Bearer"), "no echo");
        assert_eq!(upstream.count(), before, "{method}: answered here");
        gateway.call(request(method, "/x", &[("Max-Forwards", "5")], ""));
        assert_eq!(upstream.requests()[before].header("max-forwards"), Some("4"));
    }
    gateway.call(request("GET", "/x", &[("Max-Forwards", "0")], ""));
    assert_eq!(upstream.requests().last().unwrap().header("max-forwards"), Some("0"), "other methods are not counted");
}

#[test]
fn response_fields_for_one_connection_end_here_and_idempotency_outcome_passes() {
    let upstream = Upstream::scripted(|_, reply| {
        let headers =
            [("Connection", "x-hop"), ("X-Hop", "1"), ("Keep-Alive", "timeout=9"), ("Idempotency-Outcome", "final")];
        reply.send(200, &headers, "");
    });
    let gateway = Gateway::start(&upstream, "");
    let answer = gateway.call(request("GET", "/x", &[], ""));
    assert_eq!((answer.header("x-hop"), answer.header("keep-alive")), (None, None));
    assert_eq!(answer.header("idempotency-outcome"), Some("final"));
}
