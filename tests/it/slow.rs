//! Slow clients: each kind is gone after its limit, and none hinders the others.

use crate::support::{Client, Gate, Gateway, PATIENCE, Upstream, eventually, post, request};
use std::time::{Duration, Instant};

/// Sends a byte now and then, until the connection ends; says how long that took.
#[track_caller]
fn trickle(client: &mut Client, text: impl Iterator<Item = u8>, pause: Duration) -> Duration {
    use std::io::{ErrorKind, Read, Write};
    let started = Instant::now();
    client.stream.set_read_timeout(Some(pause)).unwrap();
    let mut answer = Vec::new();
    for byte in text {
        assert!(started.elapsed() < PATIENCE, "it is never cut");
        let _ = client.stream.write_all(&[byte]);
        // The pause between two bytes; an answer or the end cuts it short.
        let mut chunk = [0; 4096];
        match client.stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => answer.extend_from_slice(&chunk[..len]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    client.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    client.put_back(answer);
    started.elapsed()
}

fn endless(text: &str) -> impl Iterator<Item = u8> {
    text.bytes().chain(std::iter::repeat(b'x'))
}

const PAUSE: Duration = Duration::from_millis(40);

#[test]
fn a_head_that_trickles_is_cut_though_it_never_stops() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.header_timeout = \"300ms\"");
    for text in ["", "GET / HTTP/1.1\r\nHost: a\r\nX: ", "POST /posts HTTP/1.1\r\nHost: a\r\nIdempotency-Key: "] {
        let mut client = Client::connect(gateway.addr);
        client.send(text);
        let took = trickle(&mut client, endless(""), PAUSE);
        assert!(took >= Duration::from_millis(250), "{text:?}: {took:?}");
    }
    // Empty lines before a request are no request either (RFC 9112 §2.2).
    let mut client = Client::connect(gateway.addr);
    trickle(&mut client, b"\r\n".iter().copied().cycle(), PAUSE);
    assert_eq!((upstream.count(), upstream.connections()), (0, 0));
    assert_eq!(gateway.call(request("GET", "/", &[], "")).status, 201);
}

#[test]
fn an_intercepted_body_that_trickles_is_a_408_and_claims_nothing() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.body_timeout = \"300ms\"");
    let long = post("/posts", "k", "").replace("Content-Length: 0", "Content-Length: 100000");
    let chunked = post("/posts", "k", "").replace("Content-Length: 0", "Transfer-Encoding: chunked") + "fff\r\n";
    for head in [long, chunked] {
        let mut client = Client::connect(gateway.addr);
        client.send(&head);
        trickle(&mut client, endless(""), PAUSE);
        client.read().expect_problem(408, "request_timeout");
        assert!(client.at_end());
        assert_eq!((upstream.count(), upstream.connections()), (0, 0));
    }
    assert_eq!(gateway.metric("oncegate_buffered_bytes"), 0.0);
    let retry = gateway.post("k", "{}");
    assert_eq!((retry.status, retry.replayed()), (201, false));
}

#[test]
fn a_passing_body_that_trickles_passes_and_one_that_stops_is_a_408() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.body_timeout = \"300ms\"");
    let head = "PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n";
    let mut client = Client::connect(gateway.addr);
    client.send(head);
    let took = trickle(&mut client, "0123456789012345678".bytes(), PAUSE);
    assert!(took > Duration::from_millis(600), "longer than the limit: {took:?}");
    client.send("9");
    assert_eq!(client.read().status, 201);
    assert_eq!(upstream.requests()[0].body, b"01234567890123456789");
    for rest in ["", "0123456789"] {
        let mut client = Client::connect(gateway.addr);
        client.send(head);
        client.send(rest);
        client.read().expect_problem(408, "request_timeout");
        assert!(client.at_end());
    }
    assert_eq!(upstream.count(), 1, "half a request is none");
}

#[test]
fn a_refusal_reaches_a_client_that_is_still_sending() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let large = vec![b'x'; 16 << 20];
    for (key, status) in [("k", 413), ("", 400)] {
        let mut client = Client::connect(gateway.addr);
        let head = post("/posts", key, "").replace("Content-Length: 0", &format!("Content-Length: {}", large.len()));
        client.send(head);
        client.try_send(&large);
        assert_eq!(client.read().status, status);
        assert!(client.at_end());
    }
    assert_eq!((upstream.count(), upstream.connections()), (0, 0));
}

#[test]
fn a_slow_reader_is_cut_and_its_upstream_connection_with_it() {
    let closed = Gate::default();
    let gone = closed.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        if request.target == "/next" {
            return reply.send(200, &[], "next");
        }
        reply.send(200, &[], vec![b'x'; 64 << 20]);
        if reply.closed_by_peer() {
            gone.open();
        }
        reply.close();
    });
    let gateway = Gateway::start(&upstream, "server.limits.write_timeout = \"300ms\"");
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/x", &[], ""));
    eventually("the upstream's connection is closed", || closed.is_open().then_some(()));
    eventually("the client's, too", || (gateway.metric("oncegate_connections") == 0.0).then_some(()));
    assert_eq!(gateway.call(request("GET", "/next", &[], "")).text(), "next");
    assert!(client.try_read().is_none());
}

#[test]
fn a_client_that_sends_and_never_reads_is_cut() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], vec![b'x'; 200_000]));
    let gateway = Gateway::start(&upstream, "server.limits.write_timeout = \"300ms\"");
    gateway.post("k", "{}");
    // Pass-through, and replays out of memory.
    for text in [request("GET", "/x", &[], ""), post("/posts", "k", "{}")] {
        let mut client = Client::connect(gateway.addr);
        client.stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        client.try_send(text.repeat(500));
        eventually("it is cut", || (gateway.metric("oncegate_connections") == 0.0).then_some(()));
        let before = upstream.count();
        assert!(before < 500, "they are not served ahead of their reader: {before}");
    }
}

#[test]
fn places_of_slow_clients_are_free_after_their_limits() {
    let upstream = Upstream::counting();
    let settings = "server.limits.max_connections = 4\nserver.limits.idle_timeout = \"400ms\"\n\
                    server.limits.header_timeout = \"400ms\"\nserver.limits.body_timeout = \"400ms\"";
    let gateway = Gateway::start(&upstream, settings);
    let kinds = [
        "",
        "GET / HTTP/1.1\r\nHost",
        "PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n",
        &post("/posts", "k", "{}"),
    ];
    let mut slow = kinds.map(|text| {
        let mut client = Client::connect(gateway.addr);
        client.send(text);
        client
    });
    eventually("all places are taken", || (gateway.metric("oncegate_connections") == 4.0).then_some(()));
    let mut one_more = Client::connect(gateway.addr);
    one_more.try_send(request("GET", "/", &[], ""));
    let refused = one_more.read();
    refused.expect_problem(503, "overloaded");
    assert_eq!((refused.header("retry-after"), refused.header("connection")), (Some("1"), Some("close")));
    assert!(one_more.at_end());
    // The keyed request is whole: it is served, and then idle.
    assert_eq!(slow[3].read().status, 201);
    assert!(slow[0].at_end() && slow[3].at_end());
    assert!(slow[1].try_read().is_none());
    slow[2].read().expect_problem(408, "request_timeout");
    eventually("all places are free", || (gateway.metric("oncegate_connections") == 0.0).then_some(()));
    let mut clients = (0..4).map(|_| Client::connect(gateway.addr)).collect::<Vec<_>>();
    for client in &mut clients {
        client.send(request("GET", "/", &[], ""));
        assert_eq!(client.read().status, 201);
    }
}

#[test]
fn slow_clients_of_every_kind_do_not_hinder_the_others() {
    let upstream = Upstream::scripted(|request, reply| {
        let len = if request.target == "/large" { 16 << 20 } else { 4 };
        reply.send(200, &[], vec![b'x'; len]);
    });
    let limits = ["idle", "header", "write", "body"];
    let settings = limits.map(|limit| format!("server.limits.{limit}_timeout = \"1s\"")).join("\n");
    let gateway = Gateway::start(&upstream, &settings);
    let kinds = [
        String::new(),
        "GET / HTTP/1.1\r\nHost".to_owned(),
        "PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n".to_owned(),
        post("/posts", "k", "").replace("Content-Length: 0", "Content-Length: 9"),
        request("GET", "/large", &[], ""),
    ];
    let open = |text: &String| {
        let mut client = Client::connect(gateway.addr);
        client.send(text);
        client
    };
    let slow = (0..20).flat_map(|_| kinds.iter().map(open)).collect::<Vec<_>>();
    let started = Instant::now();
    let mut number = 0;
    loop {
        let key = format!("good-{number}");
        assert_eq!(gateway.post(&key, "{}").text(), "xxxx");
        assert!(gateway.post(&key, "{}").replayed());
        assert_eq!(gateway.call(request("GET", "/", &[], "")).text(), "xxxx");
        number += 1;
        if gateway.metric("oncegate_connections") == 0.0 {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "not all slow ones are gone");
    }
    assert!(number > 3, "well-behaved requests are answered meanwhile: {number}");
    drop(slow);
}
