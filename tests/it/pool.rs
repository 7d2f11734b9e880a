//! Connections to the upstream: used again, given up in time, and never poisoned by what came on them before.

use crate::support::{Client, Gateway, Upstream, eventually, post, request};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

fn wait_for_idle(gateway: &Gateway, count: f64) {
    eventually("idle connections", || (gateway.metric("oncegate_upstream_idle_connections") == count).then_some(()));
}

/// Answers the first request of its first connection, and ends that connection on the second with `last` as its last
/// words. Other connections serve for ever.
fn closes_on_reuse(last: &'static str, reset: bool) -> Upstream {
    let seen = AtomicUsize::new(0);
    Upstream::scripted(move |request, reply| {
        if request.connection == 0 && seen.fetch_add(1, Ordering::SeqCst) == 1 {
            reply.raw(last);
            return if reset { reply.reset() } else { reply.close() };
        }
        reply.send(200, &[], "fine");
    })
}

/// One request that fills the pool, then this one on the same connection.
fn on_a_reused_connection(upstream: &Upstream, text: &str) -> (Gateway, Client) {
    let gateway = Gateway::start(upstream, "server.workers = 1\nupstream.idle_timeout = \"60s\"");
    gateway.call(request("GET", "/first", &[], ""));
    wait_for_idle(&gateway, 1.0);
    let mut client = Client::connect(gateway.addr);
    client.send(text);
    (gateway, client)
}

#[test]
fn a_safe_request_whose_pooled_connection_is_closed_unanswered_goes_out_once_more() {
    for reset in [false, true] {
        for method in ["GET", "HEAD", "OPTIONS"] {
            let upstream = closes_on_reuse("", reset);
            let fields = [("X-Once", "1"), ("Connection", "close")];
            let (gateway, mut client) = on_a_reused_connection(&upstream, &request(method, "/again?x=1", &fields, ""));
            let head = client.read_head();
            assert!(head.starts_with("HTTP/1.1 200 "), "{method}: {head}");
            let seen = upstream.requests();
            assert_eq!(seen.iter().map(|seen| seen.connection).collect::<Vec<_>>(), [0, 0, 1], "{method}");
            assert_eq!(seen[1].head, seen[2].head, "{method}: the same request");
            assert_eq!(gateway.metric("oncegate_upstream_retries_total"), 1.0);
        }
    }
}

#[test]
fn what_may_have_been_executed_never_goes_out_again() {
    let keyed = post("/posts", "k", "{}");
    for (text, last) in [
        (request("POST", "/x", &[], "{}"), ""),
        (request("POST", "/x", &[], ""), ""),
        (request("PUT", "/x", &[], "{}"), ""),
        (request("PATCH", "/x", &[], "{}"), ""),
        (request("DELETE", "/x", &[], ""), ""),
        (keyed.clone(), ""),
        // A safe method, but a body that is gone by now.
        (request("GET", "/x", &[], "{}"), ""),
        // It has begun to answer.
        (request("GET", "/x", &[], ""), "H"),
        (request("GET", "/x", &[], ""), "HTTP/1.1 200 OK\r\nContent-Le"),
        (request("GET", "/x", &[], ""), "HTTP/1.1 103 Early Hints\r\n\r\n"),
    ] {
        let upstream = closes_on_reuse(last, false);
        let (gateway, mut client) = on_a_reused_connection(&upstream, &text);
        client.read().expect_problem(502, "upstream_broken");
        assert_eq!(upstream.count(), 2, "{text}{last}");
        assert_eq!(gateway.metric("oncegate_upstream_retries_total"), 0.0);
        if text == keyed {
            gateway.post("k", "{}").expect_problem(409, "outcome_unknown");
            assert_eq!(upstream.executions("k"), 1);
        }
    }
}

#[test]
fn a_new_connection_gets_one_try() {
    let upstream = Upstream::scripted(|_, reply| reply.close());
    let gateway = Gateway::start(&upstream, "server.workers = 1");
    gateway.call(request("GET", "/x", &[], "")).expect_problem(502, "upstream_broken");
    assert_eq!(upstream.count(), 1);

    // The retry itself is one.
    let upstream = Upstream::scripted(|request, reply| match request.target.as_str() {
        "/first" => reply.send(200, &[], ""),
        _ => reply.close(),
    });
    let (_gateway, mut client) = on_a_reused_connection(&upstream, &request("GET", "/x", &[], ""));
    client.read().expect_problem(502, "upstream_broken");
    assert_eq!(upstream.count(), 3);
}

const EVIL: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";

/// What comes back, how the client sees it (0: cut off), and its method.
fn bad_responses() -> Vec<(&'static str, u16, String)> {
    let ok = "HTTP/1.1 200 OK\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n";
    vec![
        // More than one response.
        ("GET", 200, format!("{ok}Content-Length: 2\r\n\r\nok{EVIL}")),
        ("GET", 200, format!("{ok}Content-Length: 0\r\n\r\n{EVIL}")),
        ("GET", 200, format!("{ok}{chunked}\r\n2\r\nok\r\n0\r\n\r\n{EVIL}")),
        ("GET", 204, format!("HTTP/1.1 204 No Content\r\n\r\n{EVIL}")),
        ("GET", 304, format!("HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\n{EVIL}")),
        ("HEAD", 200, format!("{ok}Content-Length: 2\r\n\r\nok{EVIL}")),
        ("GET", 200, format!("HTTP/1.1 103 Early Hints\r\n\r\n{ok}Content-Length: 2\r\n\r\nok{EVIL}")),
        // Garbage.
        ("GET", 200, format!("{ok}Content-Length: 2\r\n\r\nok\0\0\0")),
        ("GET", 200, format!("{ok}Content-Length: 2\r\n\r\nok\r\n")),
        // Two opinions on the length: RFC 9112 §6.3.
        ("GET", 200, format!("{ok}Content-Length: 7\r\n{chunked}\r\n2\r\nok\r\n0\r\n\r\n")),
        ("GET", 200, format!("{ok}{chunked}Content-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n{EVIL}")),
        ("GET", 502, format!("{ok}Content-Length: 2\r\nContent-Length: 3\r\n\r\nok{EVIL}")),
        ("GET", 502, format!("{ok}Content-Length: 2, 3\r\n\r\nok{EVIL}")),
        ("GET", 502, format!("{ok}Content-Length: -2\r\n\r\nok{EVIL}")),
        ("GET", 502, format!("{ok}Content-Length: +2\r\n\r\nok{EVIL}")),
        ("GET", 502, format!("{ok}Content-Length: 99999999999999999999\r\n\r\nok")),
        // Codings: RFC 9112 §6.1.
        ("GET", 502, format!("{ok}Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")),
        ("GET", 502, format!("{ok}{chunked}{chunked}\r\n2\r\nok\r\n0\r\n\r\n")),
        ("GET", 502, format!("{ok}Transfer-Encoding: x-chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")),
        ("GET", 502, format!("HTTP/1.0 200 OK\r\n{chunked}\r\n2\r\nok\r\n0\r\n\r\n")),
        ("GET", 0, format!("{ok}{chunked}\r\nZ\r\nok\r\n0\r\n\r\n{EVIL}")),
        ("GET", 0, format!("{ok}{chunked}\r\n2\r\nokay\r\n0\r\n\r\n{EVIL}")),
        ("GET", 0, format!("{ok}{chunked}\r\n-2\r\nok\r\n0\r\n\r\n{EVIL}")),
        ("GET", 0, format!("{ok}{chunked}\r\nffffffffffffffffff\r\nok\r\n0\r\n\r\n")),
        // Heads that are none.
        ("GET", 502, format!("200 OK\r\nContent-Length: 2\r\n\r\nok{EVIL}")),
        ("GET", 502, format!("HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok{EVIL}")),
        ("GET", 502, format!("HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok{EVIL}")),
        ("GET", 502, format!("{ok}X-A: \0\r\nContent-Length: 2\r\n\r\nok{EVIL}")),
        ("GET", 502, format!("{ok}no colon\r\nContent-Length: 2\r\n\r\nok{EVIL}")),
        ("GET", 502, format!("{ok}{}", "X-Endless: x\r\n".repeat(100_000))),
        ("GET", 502, format!("{ok}X-Long: {}\r\n\r\n", "x".repeat(2 << 20))),
        ("GET", 502, "\0".repeat(100)),
    ]
}

/// Reads exactly one response, which is the upstream's first or the gateway's own.
#[track_caller]
fn expect_once(client: &mut Client, method: &str, status: u16, bytes: &str) {
    let head = client.read_head().to_ascii_lowercase();
    assert!(head.starts_with(&format!("http/1.1 {status} ")), "{bytes:?}: {head}");
    let chunked = "2\r\nok\r\n0\r\n\r\n";
    let len = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let body = match (method, status, len) {
        ("HEAD", ..) | (_, 204 | 304, _) => Vec::new(),
        (.., Some(len)) => client.read_exactly(len),
        (.., None) => client.read_exactly(chunked.len()),
    };
    let body = String::from_utf8(body).unwrap();
    match status {
        502 => assert!(body.contains("\"upstream_broken\""), "{bytes:?}: {body}"),
        _ => assert!(["", "ok", chunked].contains(&body.as_str()), "{bytes:?}: {body}"),
    }
}

#[test]
fn a_bad_response_never_becomes_part_of_the_next_one() {
    let bad = bad_responses();
    let answers = bad.iter().map(|(.., bytes)| bytes.clone()).collect::<Vec<_>>();
    let upstream = Upstream::scripted(move |request, reply| match request.target.strip_prefix("/bad/") {
        Some(n) => reply.raw(&answers[n.parse::<usize>().unwrap()]),
        None => reply.send(200, &[], &request.target),
    });
    let gateway = Gateway::start(&upstream, "server.workers = 1");
    for (n, (method, status, bytes)) in bad.into_iter().enumerate() {
        let bytes = &bytes[..bytes.len().min(200)];
        for round in 0..3 {
            let mut client = Client::connect(gateway.addr);
            client.send(request(method, &format!("/bad/{n}"), &[], ""));
            let kept = status != 0;
            if kept {
                expect_once(&mut client, method, status, bytes);
            } else {
                assert_eq!(client.try_read(), None, "{bytes:?}: cut off");
            }
            // On the same connection, where it goes on, and on a new one.
            for fresh in [!kept, true] {
                if fresh {
                    client = Client::connect(gateway.addr);
                }
                let next = format!("/next/{n}/{round}/{fresh}");
                client.send(request("GET", &next, &[], ""));
                let answer = client.read();
                assert_eq!((answer.status, answer.text()), (200, next), "after {bytes:?}");
            }
        }
    }
}

#[test]
fn a_bad_response_to_a_claimed_request_leaves_its_outcome_unknown_and_the_next_one_alone() {
    let bad = bad_responses().into_iter().filter(|(method, ..)| *method == "GET").collect::<Vec<_>>();
    let answers = bad.iter().map(|(.., bytes)| bytes.clone()).collect::<Vec<_>>();
    let upstream = Upstream::scripted(move |request, reply| match request.key().unwrap().strip_prefix("bad-") {
        Some(n) => reply.raw(&answers[n.parse::<usize>().unwrap()]),
        None => reply.send(201, &[], request.key().unwrap()),
    });
    let gateway = Gateway::start(&upstream, "server.workers = 1");
    for (n, (_, status, bytes)) in bad.into_iter().enumerate() {
        let bytes = &bytes[..bytes.len().min(200)];
        let key = format!("bad-{n}");
        let answer = gateway.post(&key, "{}");
        let retry = gateway.post(&key, "{}");
        if let 0 | 502 = status {
            answer.expect_problem(502, "upstream_broken");
            retry.expect_problem(409, "outcome_unknown");
        } else {
            assert_eq!((answer.status, retry.status, retry.replayed()), (status, status, true), "{bytes:?}");
            assert!(["", "ok"].contains(&answer.text().as_str()), "{bytes:?}: {answer:?}");
            assert_eq!(retry.body, answer.body, "{bytes:?}");
        }
        let next = format!("next-{n}");
        assert_eq!(gateway.post(&next, "{}").text(), next, "after {bytes:?}");
        assert_eq!((upstream.executions(&key), upstream.executions(&next)), (1, 1), "{bytes:?}");
    }
}

#[test]
fn bytes_on_an_idle_connection_end_it() {
    let upstream = Upstream::scripted(|request, reply| match request.target.as_str() {
        "/late" => {
            reply.send(200, &[], "");
            std::thread::sleep(Duration::from_millis(100)); // By now the connection is idle.
            reply.raw(EVIL);
        }
        _ => reply.send(200, &[], "good"),
    });
    let gateway = Gateway::start(&upstream, "server.workers = 1\nupstream.idle_timeout = \"60s\"");
    gateway.call(request("GET", "/late", &[], ""));
    wait_for_idle(&gateway, 1.0);
    wait_for_idle(&gateway, 0.0);
    assert_eq!(gateway.call(request("GET", "/x", &[], "")).text(), "good");
    assert_eq!(upstream.connections(), 2);
}

#[test]
fn an_idle_connection_is_closed_after_idle_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway = Gateway::start_before(&url, "upstream.idle_timeout = \"200ms\"");
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/x", &[], ""));
    let (mut server, _) = crate::upgrade::accept(&listener);
    server.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    client.read();
    assert!(server.at_end());
}

#[test]
fn a_connection_that_the_upstream_wants_to_end_is_not_used_again() {
    // Each leaves its end of the connection open.
    for head in [
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ] {
        let upstream = Upstream::scripted(move |_, reply| reply.raw(head));
        let gateway = Gateway::start(&upstream, "server.workers = 1");
        for n in 1..=3 {
            assert_eq!(gateway.call(request("GET", "/x", &[], "")).text(), "ok");
            assert_eq!(upstream.connections(), n);
        }
    }
    let head = "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok";
    let upstream = Upstream::scripted(move |_, reply| reply.raw(head));
    let gateway = Gateway::start(&upstream, "server.workers = 1");
    for _ in 1..=3 {
        assert_eq!(gateway.call(request("GET", "/x", &[], "")).text(), "ok");
        wait_for_idle(&gateway, 1.0);
    }
    assert_eq!(upstream.connections(), 1, "HTTP/1.0 with keep-alive is used again");
}

#[test]
fn a_connection_whose_response_had_both_lengths_is_not_used_again() {
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
    let upstream = Upstream::scripted(move |_, reply| reply.raw(head));
    let gateway = Gateway::start(&upstream, "server.workers = 1\nupstream.idle_timeout = \"60s\"");
    for n in 1..=3 {
        assert_eq!(gateway.call(request("GET", "/x", &[], "")).text(), "ok");
        assert_eq!(gateway.post(&format!("k{n}"), "{}").text(), "ok");
        assert_eq!(upstream.connections(), 2 * n);
    }
}

/// The addresses of "localhost", on one of which somebody can listen.
fn addresses(port: u16) -> Vec<SocketAddr> {
    ("localhost", port)
        .to_socket_addrs()
        .unwrap()
        .filter(|address| TcpListener::bind((address.ip(), 0)).is_ok())
        .collect()
}

#[test]
fn all_addresses_of_a_name_are_tried() {
    for address in addresses(0) {
        let listener = TcpListener::bind(address).unwrap();
        let port = listener.local_addr().unwrap().port();
        let upstream = Upstream::on(listener, |_, reply| reply.send(200, &[], "here"));
        let gateway = Gateway::start_before(&format!("http://localhost:{port}"), "");
        assert_eq!(gateway.call(request("GET", "/x", &[], "")).text(), "here", "{address}");
        assert_eq!(upstream.count(), 1);
    }
}
