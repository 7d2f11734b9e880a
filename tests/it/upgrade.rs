//! Upgrade (RFC 9110 §7.8) on pass-through: which offers are relayed, which answers count. What the tunnel does then is in
//! `tunnel.rs`.

use crate::support::{Client, Gateway, Upstream, post, request};
use std::net::TcpListener;

/// A handshake as browsers send it, with fields that are meant for the first connection alone.
const HANDSHAKE: &str = "GET /chat?x=1 HTTP/1.1\r\nHost: api.example\r\nConnection: keep-alive, Upgrade, X-Hop\r\n\
                         X-Hop: 1\r\nKeep-Alive: timeout=5\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

const ACCEPT: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade, X-Hop\r\nX-Hop: 1\r\n\
                      Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

pub fn listener_and_gateway(settings: &str) -> (TcpListener, Gateway) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let gateway = Gateway::start_before(&format!("http://{}", listener.local_addr().unwrap()), settings);
    (listener, gateway)
}

/// The next connection, and the head of the first request on it. What comes behind the head stays to be read.
pub fn accept(listener: &TcpListener) -> (Client, String) {
    let (stream, _) = listener.accept().unwrap();
    let mut server = Client::from(stream);
    let head = server.read_head();
    (server, head)
}

/// A tunnel that has just been opened: the client's end and the upstream's.
pub fn open(listener: &TcpListener, gateway: &Gateway) -> (Client, Client) {
    let mut client = Client::connect(gateway.addr);
    client.send(HANDSHAKE);
    let (mut server, _) = accept(listener);
    server.send(ACCEPT);
    assert_eq!(client.try_read_any().unwrap().status, 101);
    (client, server)
}

/// The lines of a head, sorted but for the first, names in lower case.
fn lines(head: &str) -> Vec<String> {
    let mut lines = head.trim_end().split("\r\n").map(str::to_owned).collect::<Vec<_>>();
    for line in &mut lines[1..] {
        let (name, value) = line.split_once(": ").unwrap();
        *line = format!("{}: {value}", name.to_ascii_lowercase());
    }
    lines[1..].sort();
    lines
}

#[test]
fn an_offer_and_its_acceptance_are_relayed_with_exactly_their_hop_by_hop_fields() {
    let (listener, gateway) = listener_and_gateway("");
    let mut client = Client::connect(gateway.addr);
    client.send(HANDSHAKE);
    let (mut server, head) = accept(&listener);
    assert_eq!(
        lines(&head),
        [
            "GET /chat?x=1 HTTP/1.1",
            "connection: upgrade",
            "host: api.example",
            "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
            "sec-websocket-version: 13",
            "upgrade: websocket",
            "via: 1.1 oncegate",
            "x-forwarded-for: 127.0.0.1",
            "x-forwarded-host: api.example",
            "x-forwarded-proto: http",
        ]
    );
    server.send(ACCEPT);
    let mut answer = lines(&client.read_head());
    answer.retain(|line| !line.starts_with("date: "));
    assert_eq!(
        answer,
        [
            "HTTP/1.1 101 Switching Protocols",
            "connection: upgrade",
            "sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
            "upgrade: websocket",
        ]
    );
    // Bytes that are no HTTP, and some that look like it: the gateway's own refusals among them.
    for bytes in [
        &b"\x81\x02hi\0\xff"[..],
        b"GET /posts HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
    ] {
        client.send(bytes);
        assert_eq!(server.read_exactly(bytes.len()), bytes);
        server.send(bytes);
        assert_eq!(client.read_exactly(bytes.len()), bytes);
    }
}

#[test]
fn bytes_that_come_with_the_head_are_not_lost() {
    let (listener, gateway) = listener_and_gateway("");
    let mut client = Client::connect(gateway.addr);
    client.send(format!("{HANDSHAKE}early up"));
    let (mut server, _) = accept(&listener);
    server.send(format!("{ACCEPT}early down"));
    assert_eq!(server.read_exactly(8), b"early up");
    client.read_head();
    assert_eq!(client.read_exactly(10), b"early down");
}

#[test]
fn a_refused_upgrade_is_an_ordinary_response_and_both_connections_go_on() {
    let upstream = Upstream::scripted(|request, reply| match request.header("upgrade") {
        Some(_) => reply.send(426, &[("Upgrade", "h3"), ("Connection", "upgrade")], "no"),
        None => reply.send(200, &[], "ordinary"),
    });
    let gateway = Gateway::start(&upstream, "");
    let mut client = Client::connect(gateway.addr);
    for _ in 0..2 {
        client.send(HANDSHAKE);
        let answer = client.read();
        assert_eq!((answer.status, answer.text().as_str()), (426, "no"));
        assert_eq!((answer.header("connection"), answer.header("upgrade")), (None, None));
        client.send(request("GET", "/next", &[], ""));
        assert_eq!(client.read().text(), "ordinary");
    }
    assert_eq!(upstream.count(), 4);
    assert_eq!(gateway.metric("oncegate_tunnels"), 0.0);
}

#[test]
fn a_101_that_was_not_asked_for_is_a_broken_upstream() {
    let (listener, gateway) = listener_and_gateway("");
    let offer = |protocols: &str| request("GET", "/x", &[("Connection", "upgrade"), ("Upgrade", protocols)], "");
    let accepts = |protocols: &str| format!("HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: {protocols}\r\n\r\n");
    let chunked =
        "POST /x HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: foo\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (text, answer) in [
        (request("GET", "/x", &[], ""), accepts("websocket")),
        (request("POST", "/x", &[], "{}"), accepts("websocket")),
        (offer("foo"), accepts("bar")),
        (offer("foo"), accepts("foo, bar")),
        (offer("foo"), "HTTP/1.1 101 S\r\nConnection: upgrade\r\n\r\n".to_owned()),
        // Not before the request is complete.
        (format!("{chunked}1\r\nx\r\n"), accepts("foo")),
    ] {
        let mut client = Client::connect(gateway.addr);
        client.send(&text);
        let (mut server, _) = accept(&listener);
        server.send(format!("{answer}HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"));
        let got = client.read();
        got.expect_problem(502, "upstream_broken");
        assert_eq!(got.header("proxy-status"), Some("oncegate; error=http_protocol_error"));
        assert!(server.ends(), "{text}: that connection is not used again");
        // The next request gets an answer of its own.
        let mut client = Client::connect(gateway.addr);
        client.send(request("GET", "/next", &[("Connection", "close")], ""));
        let (mut server, head) = accept(&listener);
        assert!(head.starts_with("GET /next "), "{head}");
        server.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\ngood");
        assert_eq!(client.read().text(), "good");
    }
    assert_eq!(gateway.metric("oncegate_tunnels"), 0.0);
}

#[test]
fn what_speaks_http_itself_is_never_offered() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], "ordinary"));
    let gateway = Gateway::start(&upstream, "");
    for (connection, offered, relayed) in [
        ("Upgrade, HTTP2-Settings", "h2c", None),
        ("upgrade", "H2C", None),
        ("upgrade", "h2c, HTTP/2.0, h2, TLS/1.0, HTTP/1.1", None),
        ("upgrade", " , ,", None),
        ("upgrade", "h2c, websocket", Some("websocket")),
        ("upgrade", "foo/2,h2c,bar", Some("foo/2, bar")),
        // Connection does not name it (RFC 9110 §7.8).
        ("keep-alive", "websocket", None),
    ] {
        let fields = [("Connection", connection), ("Upgrade", offered), ("HTTP2-Settings", "AAMAAABkAAQAAP__")];
        assert_eq!(gateway.call(request("GET", "/x", &fields, "")).text(), "ordinary", "{offered}");
        let seen = upstream.requests().pop().unwrap();
        assert_eq!(seen.header("upgrade"), relayed, "{offered}");
        assert_eq!(seen.header("connection"), relayed.map(|_| "upgrade"), "{offered}");
        assert_eq!(seen.header("http2-settings"), None, "{offered}");
    }
}

#[test]
fn two_lines_of_offers_are_one_list() {
    let (listener, gateway) = listener_and_gateway("");
    let mut client = Client::connect(gateway.addr);
    let fields = [("Upgrade", "foo"), ("Connection", "keep-alive"), ("Connection", "UPGRADE"), ("Upgrade", "h2c, bar")];
    client.send(request("GET", "/x", &fields, ""));
    let (mut server, head) = accept(&listener);
    assert!(head.to_ascii_lowercase().contains("\r\nupgrade: foo, bar\r\n"), "{head}");
    server.send("HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: BAR\r\n\r\n");
    let answer = client.read_head().to_ascii_lowercase();
    assert!(answer.contains("\r\nupgrade: bar\r\n") && answer.contains("\r\nconnection: upgrade\r\n"), "{answer}");
    server.send("x");
    assert_eq!(client.read_exactly(1), b"x");
}

#[test]
fn http_1_0_knows_no_upgrade() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], "ordinary"));
    let gateway = Gateway::start(&upstream, "");
    let answer = gateway.call(HANDSHAKE.replace("HTTP/1.1", "HTTP/1.0"));
    assert_eq!((answer.status, answer.text().as_str()), (200, "ordinary"));
    let seen = &upstream.requests()[0];
    assert_eq!((seen.header("upgrade"), seen.header("connection")), (None, None));
}

/// As Docker's clients do: the request has a body, and the tunnel begins after it.
#[test]
fn a_request_with_a_body_may_switch_once_it_is_complete() {
    let (listener, gateway) = listener_and_gateway("");
    let fields = [("Connection", "Upgrade"), ("Upgrade", "tcp"), ("Content-Type", "application/json")];
    let mut client = Client::connect(gateway.addr);
    client.send(request("POST", "/exec/1/start", &fields, r#"{"Tty":true}"#));
    let (mut server, head) = accept(&listener);
    assert!(head.to_ascii_lowercase().contains("\r\nupgrade: tcp\r\n"), "{head}");
    assert_eq!(server.read_exactly(12), br#"{"Tty":true}"#);
    server.send("HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n$ ");
    assert_eq!(client.try_read_any().unwrap().status, 101);
    assert_eq!(client.read_exactly(2), b"$ ");
    client.send("ls\n");
    assert_eq!(server.read_exactly(3), b"ls\n");
}

#[test]
fn an_intercepted_post_never_becomes_a_tunnel() {
    let upstream = Upstream::scripted(|request, reply| {
        assert_eq!((request.header("upgrade"), request.header("connection")), (None, None));
        match request.key() {
            Some("good") => reply.send(201, &[], "made"),
            _ => reply.raw("HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"),
        }
    });
    let gateway = Gateway::start(&upstream, "");
    let keyed = |key| post("/posts", key, "{}").replace("Host:", "Connection: upgrade\r\nUpgrade: websocket\r\nHost:");
    let made = gateway.call(keyed("good"));
    assert_eq!((made.status, made.text().as_str()), (201, "made"));
    assert!(gateway.call(keyed("good")).replayed());

    gateway.call(keyed("bad")).expect_problem(502, "upstream_broken");
    gateway.call(keyed("bad")).expect_problem(409, "outcome_unknown");
    assert_eq!((upstream.executions("good"), upstream.executions("bad")), (1, 1));
    assert_eq!(gateway.metric("oncegate_records{state=\"unknown\"}"), 1.0);
    assert_eq!(gateway.metric("oncegate_tunnels"), 0.0);
}

#[test]
fn a_post_without_a_key_may_switch() {
    let (listener, gateway) = listener_and_gateway("");
    let mut client = Client::connect(gateway.addr);
    client.send(request("POST", "/posts", &[("Connection", "upgrade"), ("Upgrade", "foo")], ""));
    let (mut server, _) = accept(&listener);
    server.send("HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: foo\r\n\r\nx");
    client.read_head();
    assert_eq!(client.read_exactly(1), b"x");
}
