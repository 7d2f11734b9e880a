//! HTTP/2 towards clients (RFC 9113): the promises that hold over HTTP/1.1 hold here.

use crate::support::h2::{self, DATA, END_HEADERS, HEADERS, RST_STREAM, fields, hpack, reason};
use crate::support::{Gate, Gateway, H2, RawH2, Upstream, eventually, h2_post, h2_request, request};
use ::h2::Reason;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue};

const PROTOCOL_ERROR: u32 = 1;

#[test]
fn a_keyed_post_is_executed_once_and_replayed_whatever_the_protocol() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    let first = client.call(h2_post("/posts", "k"), "{}");
    assert_eq!((first.status, first.text().as_str(), first.replayed()), (201, r#"{"n":1}"#, false));
    assert!(client.call(h2_post("/posts", "k"), "{}").replayed());
    assert!(gateway.post("k", "{}").replayed(), "over HTTP/1.1, too");
    client.call(h2_post("/posts", "k"), "[]").expect_problem(422, "key_reused");
    assert_eq!(upstream.count(), 1);
    let seen = &upstream.requests()[0];
    assert_eq!((seen.header("idempotency-key"), seen.header("content-length")), (Some("k"), Some("2")));
}

#[test]
fn sixty_four_duplicates_on_one_connection_are_executed_once() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    let sent = (0..64).map(|_| client.send(h2_post("/posts", "k"), "{}")).collect::<Vec<_>>();
    eventually("all others wait", || (gateway.metric("oncegate_waiters") == 63.0).then_some(()));
    gate.open();
    let answers = sent.into_iter().map(|sent| client.receive(sent)).collect::<Vec<_>>();
    assert!(answers.iter().all(|answer| (answer.status, answer.text().as_str()) == (201, "run 1")), "{answers:?}");
    assert_eq!(answers.iter().filter(|answer| !answer.replayed()).count(), 1);
    assert_eq!(upstream.count(), 1);
}

#[test]
fn a_stream_that_is_reset_after_the_claim_does_not_cancel_it() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    let mut sent = client.send(h2_post("/posts", "k"), "{}");
    upstream.wait_for(1);
    sent.body.send_reset(Reason::CANCEL);
    drop(sent);
    // Whatever is answered after the reset proves that it has been seen.
    assert_eq!(client.call(h2_request("GET", "/x", &[]), "").status, 201);
    gate.open();
    let settled = "oncegate_settled_total{outcome=\"final\"}";
    eventually("it is settled", || (gateway.metric(settled) == 1.0).then_some(()));
    let retry = client.call(h2_post("/posts", "k"), "{}");
    assert_eq!((retry.text().as_str(), retry.replayed()), ("run 1", true));
    assert_eq!(upstream.executions("k"), 1);
}

#[test]
fn a_connection_that_is_cut_does_not_cancel_a_claim() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    let sent = client.send(h2_post("/posts", "k"), "{}");
    upstream.wait_for(1);
    drop((sent, client));
    eventually("it is gone", || (gateway.metric("oncegate_connections") == 0.0).then_some(()));
    gate.open();
    let retry = gateway.post("k", "{}");
    assert_eq!((retry.text().as_str(), upstream.count()), ("run 1", 1));
}

#[test]
fn an_upload_that_is_reset_or_shorter_than_declared_claims_nothing() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    let mut cut = client.try_send(h2_post("/posts", "cut"), false).unwrap();
    cut.body.send_data(Bytes::from_static(b"{"), false).unwrap();
    cut.body.send_reset(Reason::CANCEL);
    let mut short = h2_post("/posts", "short");
    short.headers_mut().insert("content-length", HeaderValue::from_static("3"));
    let mut short = client.try_send(short, false).unwrap();
    short.body.send_data(Bytes::from_static(b"{}"), true).unwrap();
    match client.receive_all(short) {
        Ok((answer, _)) => answer.expect_problem(400, "bad_request"),
        Err(error) => assert_eq!(error.reason(), Some(Reason::PROTOCOL_ERROR)),
    }
    assert_eq!(client.call(h2_request("GET", "/x", &[]), "").text(), r#"{"n":1}"#);
    assert_eq!(gateway.metric("oncegate_store_batched_writes_total"), 0.0, "nothing was claimed");
    assert!(!client.call(h2_post("/posts", "cut"), "{}").replayed());
}

#[test]
fn the_upstream_sees_http_1_1_with_host_joined_cookies_and_the_protocol_in_via() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    for path in ["/other?q=1", "/posts?q=1"] {
        let headers = [
            ("authorization", "Bearer alice"),
            ("cookie", "a=1"),
            ("te", "trailers"),
            ("cookie", "b=2; c=3"),
            ("x-end", "1"),
            ("idempotency-key", "k"),
        ];
        assert_eq!(client.call(h2_request("POST", path, &headers), "{}").status, 201);
        let seen = upstream.requests().pop().unwrap();
        assert!(seen.head.starts_with(&format!("POST {path} HTTP/1.1\r\n")), "{}", seen.head);
        assert_eq!(seen.headers("host"), ["api.example"]);
        assert_eq!(seen.headers("cookie"), ["a=1; b=2; c=3"]);
        assert_eq!(seen.headers("via"), ["2 oncegate"]);
        assert_eq!(
            (seen.header("x-forwarded-proto"), seen.header("x-forwarded-host")),
            (Some("http"), Some("api.example"))
        );
        assert_eq!(
            (seen.header("x-end"), seen.header("te"), seen.body.as_slice()),
            (Some("1"), None, b"{}".as_slice())
        );
        assert!(!seen.head.contains("\r\n:"), "{}", seen.head);
    }
}

#[test]
fn a_cookie_of_the_scope_is_found_on_whichever_line_it_stands() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "idempotency.scope = [\"cookie:sid\"]");
    let mut client = H2::connect(gateway.addr);
    let mut text = |cookies: &[&str]| {
        let mut headers = vec![("idempotency-key", "k")];
        headers.extend(cookies.iter().map(|cookie| ("cookie", *cookie)));
        client.call(h2_request("POST", "/posts", &headers), "{}").text()
    };
    assert_eq!(text(&["a=1", "sid=alice"]), r#"{"n":1}"#);
    assert_eq!(text(&["sid=alice; a=1"]), r#"{"n":1}"#);
    assert_eq!(text(&["sid=bob", "a=1"]), r#"{"n":2}"#);
}

#[test]
fn what_is_malformed_is_refused_before_the_upstream_and_the_connection_goes_on() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let mut client = RawH2::connect(gateway.addr);
    let pseudo = |path| [(":method", "GET"), (":scheme", "http"), (":authority", "api.example"), (":path", path)];
    let and = |more: (&'static str, &'static str)| hpack(&[pseudo("/x").as_slice(), &[more]].concat());
    let mut stream = 1;
    // RFC 9113 §8.2.2 and §8.3: malformed, so the stream is reset.
    for block in [
        and(("connection", "close")),
        and(("transfer-encoding", "chunked")),
        and(("keep-alive", "timeout=5")),
        and(("proxy-connection", "close")),
        and(("upgrade", "websocket")),
        and(("te", "gzip")),
        hpack(&[&pseudo("/x")[..3], &[("x", "1"), (":path", "/late")]].concat()),
        and((":path", "/twice")),
        hpack(&pseudo("/x")[1..]),
        hpack(&pseudo("/x")[..3]),
        hpack(&pseudo("")),
        hpack(&[
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "a"),
            (":path", "posts"),
            ("idempotency-key", "k"),
        ]),
        hpack(&[
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "http"),
            (":authority", "a"),
            (":path", "/"),
        ]),
    ] {
        client.request(stream, &block);
        let reset = client.wait_for(RST_STREAM, stream).unwrap_or_else(|| panic!("ended at stream {stream}"));
        assert_eq!(reset.number_at(0), PROTOCOL_ERROR, "{stream}");
        stream += 2;
    }
    // What the HTTP library lets through is a problem.
    for block in [
        and(("host", "other.example")),
        hpack(&[(":method", "GET"), (":scheme", "http"), (":path", "/x")]),
        hpack(&[(":method", "GET"), (":scheme", "ftp"), (":authority", "api.example"), (":path", "/x")]),
        hpack(&[(":method", "GET"), (":scheme", "http"), (":authority", "u@api.example"), (":path", "/x")]),
        hpack(&[(":method", "CONNECT"), (":authority", "api.example:80")]),
        hpack(&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "*")]),
    ] {
        client.request(stream, &block);
        let answer = client.read_answer(stream);
        assert!(answer.contains("\"code\":\"bad_request\""), "{stream}: {answer}");
        stream += 2;
    }
    assert_eq!(upstream.count(), 0);
    client.request(stream, &fields("GET", "/x", &[]));
    assert_eq!(client.read_answer(stream), r#"{"n":1}"#);
}

impl RawH2 {
    /// The body of a stream's response.
    fn read_answer(&mut self, stream: u32) -> String {
        let mut body = Vec::new();
        self.wait_for(HEADERS, stream).unwrap();
        loop {
            let frame = self.wait_for(DATA, stream).unwrap();
            body.extend(&frame.payload);
            if frame.flags & h2::END_STREAM != 0 {
                return String::from_utf8(body).unwrap();
            }
        }
    }
}

#[test]
fn responses_say_nothing_about_the_connection() {
    let upstream = Upstream::scripted(|_, reply| {
        reply.raw(
            "HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=9\r\nUpgrade: h2c\r\n\
             X-End: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        );
    });
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    for path in ["/other", "/posts"] {
        let answer = client.call(h2_post(path, "k"), "{}");
        assert_eq!((answer.text().as_str(), answer.header("x-end")), ("ok", Some("1")));
        for name in ["connection", "x-hop", "keep-alive", "upgrade", "transfer-encoding"] {
            assert_eq!(answer.header(name), None, "{path}: {name}");
        }
        assert!(answer.header("date").is_some());
    }
    let refused = client.call(h2_request("POST", "/posts", &[("idempotency-key", "")]), "{}");
    refused.expect_problem(400, "key_invalid");
    let refused = client.call(h2_request("GET", "/x", &[("host", "other")]), "");
    refused.expect_problem(400, "bad_request");
    assert_eq!(refused.header("connection"), None);
    assert_eq!(client.call(h2_request("GET", "/x", &[]), "").text(), "ok", "it goes on");
}

#[test]
fn trailers_pass_both_ways() {
    let upstream = Upstream::scripted(|_, reply| {
        reply.raw(
            "HTTP/1.1 200 OK\r\nTrailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n",
        );
    });
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    let mut sent = client.try_send(h2_request("PUT", "/x", &[("trailer", "x-sent")]), false).unwrap();
    sent.body.send_data(Bytes::from_static(b"up"), false).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sent", HeaderValue::from_static("5"));
    sent.body.send_trailers(trailers).unwrap();
    let (answer, trailers) = client.receive_all(sent).unwrap();
    assert_eq!((answer.text().as_str(), trailers.unwrap()["x-sum"].as_bytes()), ("ok", b"7".as_slice()));
    let seen = &upstream.requests()[0];
    assert_eq!((seen.body.as_slice(), seen.header("trailer")), (b"up".as_slice(), Some("x-sent")));
}

#[test]
fn a_response_to_head_has_no_body_even_if_it_is_the_gateways_own() {
    let unreachable = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gateway = Gateway::start_before(&format!("http://{unreachable}"), "");
    let mut client = H2::connect(gateway.addr);
    let answer = client.call(h2_request("HEAD", "/x", &[]), "");
    assert_eq!((answer.status, answer.text().as_str()), (502, ""));
    assert!(answer.header("content-length").is_some_and(|len| len != "0"));
    let upstream = Upstream::scripted(|_, reply| reply.raw("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"));
    let gateway = Gateway::start(&upstream, "");
    let answer = H2::connect(gateway.addr).call(h2_request("HEAD", "/x", &[]), "");
    assert_eq!((answer.status, answer.header("content-length"), answer.text().as_str()), (200, Some("5"), ""));
}

#[test]
fn a_response_that_breaks_off_resets_its_stream_and_no_other() {
    let upstream = Upstream::scripted(|request, reply| {
        if request.target == "/broken" {
            reply.raw("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab");
            reply.close();
        }
        reply.send(200, &[], "whole");
    });
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    let sent = client.send(h2_request("GET", "/broken", &[]), "");
    assert_eq!(reason(client.receive_all(sent)), Some(Reason::INTERNAL_ERROR));
    assert_eq!(client.call(h2_request("GET", "/x", &[]), "").text(), "whole");
}

#[test]
fn a_drain_says_goaway_and_finishes_what_is_in_flight() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let mut gateway = Gateway::start(&upstream, "server.drain_timeout = \"1h\"");
    let mut busy = H2::connect(gateway.addr);
    let mut idle = H2::connect(gateway.addr);
    idle.call(h2_request("GET", "/x", &[]), "");
    let sent = busy.send(h2_post("/posts", "k"), "{}");
    upstream.wait_for(2);
    gateway.terminate();
    idle.wait_for_end().unwrap();
    let mut refused = || busy.try_send(h2_request("GET", "/x", &[]), true).err();
    eventually("no further request is taken", &mut refused);
    gate.open();
    assert_eq!(busy.receive(sent).text(), "run 2");
    busy.wait_for_end().unwrap();
    assert_eq!(gateway.wait(), Some(0));
}

#[test]
fn what_comes_after_the_drain_timeout_is_told_so() {
    let gate = Gate::default();
    let upstream = Upstream::holding(&gate);
    let mut gateway = Gateway::start(&upstream, "server.drain_timeout = \"200ms\"");
    let mut client = H2::connect(gateway.addr);
    let sent = client.send(h2_post("/posts", "k"), "{}");
    upstream.wait_for(1);
    gateway.terminate();
    client.receive(sent).expect_problem(503, "draining");
    assert_eq!(gateway.wait(), Some(0));
    gate.open();
}

#[test]
fn uploads_larger_than_every_window_pass() {
    let upstream = Upstream::scripted(|request, reply| reply.send(200, &[], request.body.len().to_string()));
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    let mut sent = client.try_send(h2_request("PUT", "/x", &[]), false).unwrap();
    sent.body.send_data(Bytes::from(vec![b'x'; 8 << 20]), true).unwrap();
    assert_eq!(client.receive(sent).text(), (8 << 20).to_string());
}

#[test]
fn http_1_1_and_http_2_share_an_address() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    // Methods that begin as the preface does.
    for method in ["PUT", "PRI", "PRIX", "PROPFIND", "P"] {
        assert_eq!(gateway.call(request(method, "/x", &[], "")).status, 201, "{method}");
    }
    assert_eq!(H2::connect(gateway.addr).call(h2_request("PRIX", "/x", &[]), "").status, 201);
    let text = "PRI * HTTP/1.1\r\nHost: a\r\n\r\n";
    gateway.call(text).expect_problem(400, "bad_request");
    let mut client = RawH2::silent(gateway.addr);
    for byte in [h2::PREFACE, &h2::Frame::new(h2::SETTINGS, 0, 0, &[]).encode()].concat() {
        client.send(&[byte]);
    }
    client.frame(HEADERS, END_HEADERS | h2::END_STREAM, 1, &fields("GET", "/x", &[]));
    assert!(client.wait_for(HEADERS, 1).is_some(), "one byte at a time");
}
