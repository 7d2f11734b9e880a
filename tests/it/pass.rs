//! Pass-through: streams both ways, changes nothing but what a proxy must.

use crate::support::{Client, Gate, Gateway, Upstream, eventually, request};
use std::io::Write;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn only_post_on_a_route_is_intercepted() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let key = [("Idempotency-Key", "k"), ("Authorization", "Bearer alice")];
    let mut expected = 0;
    for (method, target) in [
        ("GET", "/posts"),
        ("PUT", "/posts"),
        ("PATCH", "/posts"),
        ("DELETE", "/posts"),
        ("POST", "/posts/1"),
        ("POST", "/"),
    ] {
        for _ in 0..2 {
            let answer = gateway.call(request(method, target, &key, "{}"));
            expected += 1;
            assert_eq!(
                (answer.text(), answer.replayed()),
                (format!("{{\"n\":{expected}}}"), false),
                "{method} {target}"
            );
        }
    }
    assert!(upstream.requests().iter().all(|request| request.key() == Some("k")), "the header passes, too");
    assert_eq!(gateway.metric("oncegate_records{state=\"completed\"}"), 0.0);
}

#[test]
fn without_a_key_a_post_passes_through() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_body = \"1KiB\"");
    for n in 1..=2 {
        let answer = gateway.call(request("POST", "/posts", &[], &"x".repeat(100_000)));
        assert_eq!(answer.text(), format!("{{\"n\":{n}}}"), "and streams without a cap");
    }
}

#[test]
fn both_directions_stream() {
    // The upstream answers with the first half of its response before it has the request's end.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let gateway = Gateway::start_before(&format!("http://{addr}"), "");
    let mut client = Client::connect(gateway.addr);
    client.send("POST /other HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n");
    let mut server = accept(&listener);
    let mut seen = String::new();
    while !seen.ends_with("first\r\n") {
        seen += &String::from_utf8(server.read_some().unwrap()).unwrap();
    }
    server.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n");
    let mut got = String::new();
    while !got.ends_with("4\r\nhalf\r\n") {
        got += &String::from_utf8(client.read_some().unwrap()).unwrap();
    }
    client.send("4\r\nlast\r\n0\r\n\r\n");
    while !seen.ends_with("0\r\n\r\n") {
        seen += &String::from_utf8(server.read_some().unwrap()).unwrap();
    }
    server.send("0\r\n\r\n");
    while !got.ends_with("0\r\n\r\n") {
        got += &String::from_utf8(client.read_some().unwrap()).unwrap();
    }
}

fn accept(listener: &TcpListener) -> Client {
    let (stream, _) = listener.accept().unwrap();
    Client::from(stream)
}

#[test]
fn head_and_bodyless_responses_keep_their_framing() {
    let upstream = Upstream::scripted(|request, reply| match request.target.as_str() {
        "/head" => reply.raw("HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n"),
        "/204" => reply.raw("HTTP/1.1 204 No Content\r\n\r\n"),
        "/304" => reply.raw("HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\nContent-Length: 99\r\n\r\n"),
        _ => reply.send(200, &[], "end"),
    });
    let gateway = Gateway::start(&upstream, "");
    let mut client = Client::connect(gateway.addr);
    client.send(request("HEAD", "/head", &[], ""));
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        head += &String::from_utf8(client.read_some().unwrap()).unwrap();
    }
    assert!(head.to_ascii_lowercase().contains("content-length: 1234\r\n"), "{head}");
    for (target, status) in [("/204", 204), ("/304", 304), ("/end", 200)] {
        client.send(request("GET", target, &[], ""));
        assert_eq!(client.read().status, status);
    }
    assert_eq!(upstream.connections(), 1, "one connection serves them all");
}

const GIB: u64 = 1 << 30;
const GROWTH_KIB_MAX: u64 = 8 << 10;

/// Runs `transfer` and returns by how much the gateway's memory grew at most.
fn growth(gateway: &Gateway, transfer: impl FnOnce()) -> u64 {
    let done = AtomicBool::new(false);
    let before = gateway.rss_kib();
    std::thread::scope(|scope| {
        let peak = scope.spawn(|| {
            let mut peak = before;
            while !done.load(Ordering::Acquire) {
                peak = peak.max(gateway.rss_kib());
                std::thread::sleep(std::time::Duration::from_millis(5)); // Between two samples.
            }
            peak
        });
        transfer();
        done.store(true, Ordering::Release);
        peak.join().unwrap() - before
    })
}

#[test]
fn a_gibibyte_in_either_direction_does_not_stay_in_memory() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let gateway = Gateway::start_before(&format!("http://{}", listener.local_addr().unwrap()), "");
    let chunk = vec![b'x'; 1 << 20];
    // Warm: one small exchange.
    let upstream = std::thread::spawn(move || {
        let chunk = vec![b'x'; 1 << 20];
        let mut server = accept(&listener);
        for answer in [1_u64 << 20, 0, GIB] {
            // The request's head, then as much body as it says.
            let mut text = Vec::new();
            while !text.windows(4).any(|window| window == b"\r\n\r\n") {
                text.extend(server.read_some().unwrap());
            }
            let at = text.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
            let head = String::from_utf8_lossy(&text[..at]).to_ascii_lowercase();
            let len = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<u64>().ok());
            let mut left = len.unwrap_or(0) - (text.len() - at) as u64;
            while left > 0 {
                left -= server.read_some().unwrap().len() as u64;
            }
            server.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {answer}\r\n\r\n"));
            (0..answer / chunk.len() as u64).for_each(|_| server.send(&chunk));
        }
    });
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/warm", &[], ""));
    assert_eq!(client.read().body.len(), 1 << 20);
    let up = growth(&gateway, || {
        client.send(format!("POST /other HTTP/1.1\r\nHost: a\r\nContent-Length: {GIB}\r\n\r\n"));
        (0..GIB / chunk.len() as u64).for_each(|_| client.stream.write_all(&chunk).unwrap());
        assert_eq!(client.read().status, 200);
    });
    let down = growth(&gateway, || {
        client.send(request("GET", "/large", &[], ""));
        let mut left = GIB;
        let head = client.read_some().unwrap();
        let at = head.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        left -= (head.len() - at) as u64;
        while left > 0 {
            left -= client.read_some().unwrap().len() as u64;
        }
    });
    upstream.join().unwrap();
    println!("1 GiB up: +{up} KiB, down: +{down} KiB");
    assert!(up < GROWTH_KIB_MAX && down < GROWTH_KIB_MAX, "up {up} KiB, down {down} KiB");
}

#[test]
fn an_upstream_that_cannot_be_reached_or_breaks_or_is_late_is_told() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gateway = Gateway::start_before(&format!("http://{closed}"), "");
    let answer = gateway.call(request("GET", "/x", &[], ""));
    answer.expect_problem(502, "upstream_unreachable");
    assert_eq!(answer.header("proxy-status"), Some("oncegate; error=connection_refused"));

    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| match request.target.as_str() {
        "/reset" => reply.reset(),
        _ => passed.wait(),
    });
    let gateway = Gateway::start(&upstream, "upstream.response_timeout = \"100ms\"");
    gateway.call(request("GET", "/reset", &[], "")).expect_problem(502, "upstream_broken");
    gateway.call(request("GET", "/late", &[], "")).expect_problem(504, "upstream_timeout");
    gate.open();
    gateway.call(request("GET", "/reset", &[], "")).expect_problem(502, "upstream_broken");
}

#[test]
fn a_truncated_response_ends_the_clients_connection() {
    let upstream = Upstream::scripted(|_, reply| {
        reply.raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345");
        reply.close();
    });
    let gateway = Gateway::start(&upstream, "");
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/x", &[], ""));
    assert!(client.try_read().is_none());
}

#[test]
fn response_timeout_counts_from_the_end_of_the_upload_and_never_cuts_a_moving_stream() {
    let upstream = Upstream::scripted(|_, reply| {
        reply.raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n");
        for _ in 0..10 {
            std::thread::sleep(std::time::Duration::from_millis(60)); // A slow stream, ten times within the limit.
            reply.raw("x");
        }
    });
    let gateway = Gateway::start(&upstream, "upstream.response_timeout = \"400ms\"");
    let mut client = Client::connect(gateway.addr);
    client.send("PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n");
    for _ in 0..10 {
        std::thread::sleep(std::time::Duration::from_millis(60)); // A slow upload.
        client.send("y");
    }
    assert_eq!(client.read().body, b"xxxxxxxxxx");
}

#[test]
fn upstream_connections_are_used_again() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let mut client = Client::connect(gateway.addr);
    for n in 0..20 {
        client.send(request("GET", "/x", &[], ""));
        client.read();
        // The connection goes back to the pool a moment after its last byte.
        eventually("it is back", || (gateway.metric("oncegate_upstream_idle_connections") == 1.0).then_some(()));
        assert_eq!(upstream.connections(), 1, "{n}");
    }
}

#[test]
fn keep_alive_of_the_upstream_lowers_the_idle_time() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[("Keep-Alive", "timeout=1")], ""));
    let gateway = Gateway::start(&upstream, "");
    for n in 1..=3 {
        gateway.call(request("GET", "/x", &[], ""));
        assert_eq!(upstream.connections(), n, "an idle time below one second: not pooled");
    }
}

#[test]
fn a_unix_socket_upstream_and_listener_work() {
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};
    let dir = tempfile::tempdir().unwrap();
    let (behind, before) = (dir.path().join("up.sock"), dir.path().join("gw.sock"));
    let listener = UnixListener::bind(&behind).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut text = [0; 4096];
            let len = stream.read(&mut text).unwrap();
            assert!(String::from_utf8_lossy(&text[..len]).contains("x-forwarded-proto: http"));
            stream.write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 4\r\nConnection: close\r\n\r\nmade").unwrap();
        }
    });
    // The harness wants a TCP address as well.
    let url = format!("unix:{}", behind.display());
    let both = format!("[\"127.0.0.1:0\", \"unix:{}\"]", before.display());
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let gateway = Gateway::try_start(dir, &url, "", &[], &[("ONCEGATE_SERVER__LISTEN", &both)]).unwrap();
    for replayed in [false, true] {
        let mut stream = UnixStream::connect(&before).unwrap();
        stream
            .write_all(
                crate::support::post("/posts", "k", "{}").replace("Host:", "Connection: close\r\nHost:").as_bytes(),
            )
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 201 ") && answer.ends_with("made"), "{answer}");
        assert_eq!(answer.contains("idempotency-replayed: true"), replayed);
    }
    drop(gateway);
}
