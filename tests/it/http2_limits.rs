//! Limits and floods over HTTP/2: the connection that goes too far ends, every other one is served.

use crate::support::h2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING, PREFACE, PRIORITY, RST_STREAM, SETTINGS,
    WINDOW_UPDATE, fields, reason,
};
use crate::support::{Gate, Gateway, H2, RawH2, Upstream, eventually, h2_post, h2_request};
use ::h2::Reason;
use std::time::{Duration, Instant};

const NO_ERROR: u32 = 0;
const ENHANCE_YOUR_CALM: u32 = 11;
const REFUSED_STREAM: u32 = 7;

/// An upstream that holds `/slow` until the gate opens.
fn holding(gate: &Gate) -> Upstream {
    let gate = gate.clone();
    Upstream::scripted(move |request, reply| {
        if request.target == "/slow" {
            gate.wait();
        }
        reply.send(200, &[], "done");
    })
}

/// That a client which keeps to the rules is served.
#[track_caller]
fn expect_service(gateway: &Gateway) {
    assert_eq!(H2::connect(gateway.addr).call(h2_request("GET", "/x", &[]), "").status, 200);
}

/// Waits for the gateway to close; what comes before does not count.
#[track_caller]
fn expect_end(client: &mut RawH2) {
    while client.read().is_some() {}
}

#[test]
fn the_limits_are_announced() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_header_bytes = \"32KiB\"");
    let mut client = RawH2::connect(gateway.addr);
    let settings = client.wait_for(SETTINGS, 0).unwrap().payload;
    let value = |id: u8| settings.chunks(6).find(|entry| entry[..2] == [0, id]).map(|entry| &entry[2..]);
    assert_eq!(value(3), Some(&[0, 0, 0, 128][..]), "SETTINGS_MAX_CONCURRENT_STREAMS");
    assert_eq!(value(6), Some(&[0, 0, 128, 0][..]), "SETTINGS_MAX_HEADER_LIST_SIZE");
    assert_eq!(value(8), None, "no extended CONNECT");
}

#[test]
fn a_preface_must_be_whole_within_header_timeout_of_its_first_byte() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.header_timeout = \"150ms\"");
    let whole = [PREFACE, &Frame::new(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9]).encode()].concat();
    for len in [1, 23, 24, 25, 34, whole.len() - 1] {
        let mut client = RawH2::silent(gateway.addr);
        client.send(&whole[..len]);
        expect_end(&mut client);
    }
    let mut client = RawH2::silent(gateway.addr);
    client.send(&whole);
    std::thread::sleep(Duration::from_millis(300));
    client.request(1, &fields("GET", "/x", &[]));
    assert!(client.wait_for(HEADERS, 1).is_some(), "a whole one may wait for its first request");
}

#[test]
fn a_head_must_be_whole_within_header_timeout_of_its_first_byte() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.header_timeout = \"200ms\"");
    let block = fields("GET", "/x", &[]);
    let head = [
        Frame::new(HEADERS, END_STREAM, 3, &block[..5]).encode(),
        Frame::new(CONTINUATION, 0, 3, &block[5..9]).encode(),
        Frame::new(CONTINUATION, END_HEADERS, 3, &block[9..]).encode(),
    ]
    .concat();
    for len in [1, 9, 10, 14, 20, 27, head.len() - 1] {
        let mut client = RawH2::connect(gateway.addr);
        client.request(1, &block);
        assert!(client.wait_for(HEADERS, 1).is_some());
        client.send(&head[..len]);
        expect_end(&mut client);
    }
    assert_eq!(upstream.count(), 7);
    // One byte after the other, each within the limit: it is the sum that counts.
    let mut client = RawH2::connect(gateway.addr);
    let started = Instant::now();
    let slow = head.iter().all(|byte| {
        std::thread::sleep(Duration::from_millis(40));
        client.send(&[*byte])
    });
    assert!(!slow || client.wait_for(HEADERS, 3).is_none());
    assert!(started.elapsed() < Duration::from_millis(40) * u32::try_from(head.len() + 10).unwrap());
    assert_eq!(upstream.count(), 7);
}

#[test]
fn a_connection_without_requests_is_sent_away_after_idle_timeout() {
    let gate = Gate::default();
    let upstream = holding(&gate);
    let settings = "server.limits.idle_timeout = \"200ms\"\nserver.limits.header_timeout = \"150ms\"";
    let gateway = Gateway::start(&upstream, settings);
    assert!(RawH2::silent(gateway.addr).read().is_none(), "before the first byte");
    H2::connect(gateway.addr).wait_for_end().unwrap();
    let mut busy = H2::connect(gateway.addr);
    let slow = busy.send(h2_request("GET", "/slow", &[]), "");
    upstream.wait_for(1);
    let mut other = H2::connect(gateway.addr);
    other.call(h2_request("GET", "/x", &[]), "");
    other.wait_for_end().unwrap();
    H2::connect(gateway.addr).wait_for_end().unwrap();
    gate.open();
    assert_eq!(busy.receive(slow).text(), "done", "a request in flight is not idle");
    busy.wait_for_end().unwrap();
}

#[test]
fn a_client_that_does_not_answer_the_goaway_is_not_waited_for() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.idle_timeout = \"100ms\"");
    let mut client = RawH2::connect(gateway.addr);
    assert_eq!(client.goaway(), Some(NO_ERROR));
}

#[test]
fn a_burst_of_resets_ends_the_connection_and_spares_the_upstream() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], "done"));
    let gateway = Gateway::start(&upstream, "");
    let block = fields("GET", "/rapid", &[]);
    let resets = |count| {
        (0..count).flat_map(|n| {
            let head = Frame::new(HEADERS, END_HEADERS | END_STREAM, 2 * n + 1, &block).encode();
            [head, Frame::new(RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8]).encode()].concat()
        })
    };
    let mut client = RawH2::connect(gateway.addr);
    client.wait_for(SETTINGS, 0).unwrap();
    client.send(&resets(60).collect::<Vec<_>>());
    assert_eq!(client.goaway(), Some(ENHANCE_YOUR_CALM));
    // What is on its way when the gateway closes may cost the client the GOAWAY.
    let mut client = RawH2::connect(gateway.addr);
    client.send(&resets(10_000).collect::<Vec<_>>());
    let end = client.goaway();
    assert!(matches!(end, Some(ENHANCE_YOUR_CALM) | None), "{end:?}");
    expect_service(&gateway);
    assert!(upstream.count() < 500, "{} of 10,000 were sent on", upstream.count());
}

#[test]
fn a_client_that_keeps_giving_up_requests_is_cut_off() {
    let gate = Gate::default();
    let upstream = holding(&gate);
    let gateway = Gateway::start(&upstream, "");
    let mut client = RawH2::connect(gateway.addr);
    client.request(1, &fields("GET", "/x", &[]));
    client.wait_for(DATA, 1).unwrap();
    let mut sent = 1;
    // Each is under way before it is given up: no burst that the HTTP library would see.
    let cut = (1..1000).find(|n| {
        let stream = 2 * n + 1;
        if !client.request(stream, &fields("GET", "/slow", &[])) {
            return true;
        }
        sent += 1;
        let deadline = Instant::now() + Duration::from_secs(20);
        while upstream.count() < sent && gateway.metric("oncegate_connections") > 0.0 {
            assert!(Instant::now() < deadline);
        }
        !client.frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]) || gateway.metric("oncegate_connections") == 0.0
    });
    assert!(cut.is_some_and(|n| (100..200).contains(&n)), "{cut:?}");
    gate.open();
    expect_service(&gateway);
}

#[test]
fn a_client_that_gives_up_some_requests_is_not() {
    let gate = Gate::default();
    let upstream = holding(&gate);
    let gateway = Gateway::start(&upstream, "");
    let mut client = H2::connect(gateway.addr);
    for _ in 0..150 {
        for _ in 0..2 {
            client.call(h2_request("GET", "/x", &[]), "");
        }
        let mut sent = client.send(h2_request("GET", "/slow", &[]), "");
        sent.body.send_reset(Reason::CANCEL);
    }
    assert_eq!(client.call(h2_request("GET", "/x", &[]), "").text(), "done");
    gate.open();
}

#[test]
fn errors_that_make_the_gateway_reset_streams_are_counted() {
    let gate = Gate::default();
    let upstream = holding(&gate);
    let gateway = Gateway::start(&upstream, "");
    let mut client = RawH2::connect(gateway.addr);
    let mut flood = Vec::new();
    // A window that overflows is an error of the stream (RFC 9113 §6.9.1).
    for n in 0..3000 {
        flood.extend(Frame::new(HEADERS, END_HEADERS | END_STREAM, 2 * n + 1, &fields("GET", "/slow", &[])).encode());
        flood.extend(Frame::new(WINDOW_UPDATE, 0, 2 * n + 1, &[0x7f, 0xff, 0xff, 0xff]).encode());
    }
    client.send(&flood);
    let end = client.goaway();
    assert!(matches!(end, Some(ENHANCE_YOUR_CALM) | None), "{end:?}");
    gate.open();
    expect_service(&gateway);
    assert!(upstream.count() < 1500, "{}", upstream.count());
}

#[test]
fn an_endless_head_ends_the_connection() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], "done"));
    let gateway = Gateway::start(&upstream, "");
    let mut client = RawH2::connect(gateway.addr);
    client.frame(HEADERS, END_STREAM, 1, &fields("GET", "/x", &[]));
    client.send(&Frame::new(CONTINUATION, 0, 1, &[]).encode().repeat(10));
    assert_eq!(client.goaway(), Some(ENHANCE_YOUR_CALM));
    let before = gateway.rss_kib();
    for payload in [Vec::new(), vec![0; 1], crate::support::h2::hpack(&[("x-long", &"x".repeat(16_000))])] {
        let mut client = RawH2::connect(gateway.addr);
        client.frame(HEADERS, END_STREAM, 1, &fields("GET", "/x", &[]));
        let mut taken = true;
        for _ in 0..100_000 {
            taken = taken && client.frame(CONTINUATION, 0, 1, &payload);
        }
        assert!(!taken, "{} bytes each", payload.len());
    }
    assert!(gateway.rss_kib() < before + 32 * 1024);
    assert_eq!(upstream.count(), 0);
    expect_service(&gateway);
}

#[test]
fn floods_of_frames_that_ask_for_nothing_end_the_connection() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], "done"));
    let gateway = Gateway::start(&upstream, "");
    let before = gateway.rss_kib();
    for frame in [
        Frame::new(PING, 0, 0, &[7; 8]),
        Frame::new(SETTINGS, 0, 0, &[]),
        Frame::new(PRIORITY, 0, 1, &[0, 0, 0, 3, 0]),
        Frame::new(99, 0, 0, &[]),
    ] {
        let mut client = RawH2::connect(gateway.addr);
        let mut reader = RawH2 { stream: client.stream.try_clone().unwrap() };
        let answers = std::thread::spawn(move || expect_end(&mut reader));
        let flood = frame.encode().repeat(1000);
        let taken = (0..1000).all(|_| client.send(&flood));
        assert!(!taken, "{frame:?}");
        answers.join().unwrap();
    }
    assert!(gateway.rss_kib() < before + 32 * 1024);
    expect_service(&gateway);
}

#[test]
fn pings_at_a_usual_pace_are_answered() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let mut client = RawH2::connect(gateway.addr);
    for _ in 0..200 {
        client.frame(PING, 0, 0, b"12345678");
        assert_eq!(client.wait_for(PING, 0).unwrap().payload, b"12345678");
    }
}

#[test]
fn a_head_that_is_too_large_is_refused_before_the_upstream() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_header_bytes = \"8KiB\"");
    let mut client = H2::connect(gateway.addr);
    let sent = client.send(h2_request("GET", "/x", &[("x-long", &"x".repeat(9000))]), "");
    match client.receive_all(sent) {
        Ok((answer, _)) => assert_eq!(answer.status, 431),
        Err(error) => assert!(error.is_reset(), "{error}"),
    }
    assert_eq!(upstream.count(), 0);
    assert_eq!(client.call(h2_request("GET", "/x", &[("x-long", &"x".repeat(7000))]), "").status, 201, "it goes on");
}

#[test]
fn streams_beyond_the_limit_are_refused_and_the_others_served() {
    let gate = Gate::default();
    let upstream = holding(&gate);
    let gateway = Gateway::start(&upstream, "");
    let mut client = RawH2::connect(gateway.addr);
    for n in 0..128 {
        client.request(2 * n + 1, &fields("GET", "/slow", &[]));
    }
    upstream.wait_for(128);
    client.request(257, &fields("GET", "/slow", &[]));
    assert_eq!(client.wait_for(RST_STREAM, 257).unwrap().number_at(0), REFUSED_STREAM);
    assert_eq!(upstream.count(), 128);
    gate.open();
    let mut ended = 0;
    while ended < 128 {
        let frame = client.read().unwrap();
        ended += usize::from(frame.kind == DATA && frame.flags & END_STREAM != 0);
    }
    client.request(259, &fields("GET", "/x", &[]));
    assert!(client.wait_for(DATA, 259).is_some());
}

#[test]
fn a_stream_whose_reader_makes_no_progress_is_reset_and_no_other() {
    let upstream = Upstream::scripted(|request, reply| {
        let len = if request.target == "/large" { 8 << 20 } else { 4 };
        reply.send(200, &[], vec![b'x'; len]);
    });
    let gateway = Gateway::start(&upstream, "server.limits.write_timeout = \"300ms\"");
    let mut client =
        H2::connect_with(gateway.addr, ::h2::client::Builder::new().initial_connection_window_size(1 << 20));
    let stalled = client.send(h2_request("GET", "/large", &[]), "");
    let stalled = client.receive_head(stalled).into_body();
    // It goes on for longer than the limit beside it.
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(600) {
        assert_eq!(client.call(h2_request("GET", "/x", &[]), "").text(), "xxxx");
    }
    let mut stalled = stalled;
    let end = client.run(async {
        loop {
            match stalled.data().await {
                Some(Ok(_)) => {}
                end => return end,
            }
        }
    });
    assert_eq!(end.map(reason), Some(Some(Reason::CANCEL)));
    assert_eq!(client.call(h2_request("GET", "/x", &[]), "").text(), "xxxx");
}

#[test]
fn a_small_response_that_the_client_gives_no_window_for_is_reset() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], "done"));
    let gateway = Gateway::start(&upstream, "server.limits.write_timeout = \"200ms\"");
    let mut client = RawH2::silent(gateway.addr);
    client.send(PREFACE);
    client.frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
    client.request(1, &fields("GET", "/x", &[]));
    assert!(client.wait_for(RST_STREAM, 1).is_some());
    client.frame(PING, 0, 0, &[0; 8]);
    assert!(client.wait_for(PING, 0).is_some(), "the connection goes on");
}

#[test]
fn a_reader_that_makes_progress_is_not_cut_however_slow() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], vec![b'x'; 200_000]));
    let gateway = Gateway::start(&upstream, "server.limits.write_timeout = \"400ms\"");
    let mut client = RawH2::silent(gateway.addr);
    client.send(PREFACE);
    client.frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
    client.request(1, &fields("GET", "/x", &[]));
    let mut got = 0;
    let mut ended = false;
    // 20,000 bytes at a time, each well within the limit, all together well beyond.
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(150));
        for stream in [0, 1] {
            client.frame(WINDOW_UPDATE, 0, stream, &20_000_u32.to_be_bytes());
        }
        let target = got + 20_000;
        while got < target {
            let frame = client.wait_for(DATA, 1).unwrap();
            got += frame.payload.len();
            ended = frame.flags & END_STREAM != 0;
        }
    }
    assert_eq!((got, ended), (200_000, true));
}

#[test]
fn a_client_that_reads_nothing_at_all_is_cut_after_write_timeout() {
    let upstream = Upstream::scripted(|_, reply| reply.send(200, &[], vec![b'x'; 64 << 20]));
    let gateway =
        Gateway::start(&upstream, "server.limits.write_timeout = \"200ms\"\nserver.limits.idle_timeout = \"200ms\"");
    let mut client = RawH2::silent(gateway.addr);
    client.send(PREFACE);
    client.frame(SETTINGS, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]);
    client.frame(WINDOW_UPDATE, 0, 0, &0x7000_0000_u32.to_be_bytes());
    client.request(1, &fields("GET", "/x", &[]));
    upstream.wait_for(1);
    eventually("it is cut", || (gateway.metric("oncegate_connections") == 0.0).then_some(()));
}

#[test]
fn a_slow_reader_fills_no_memory_and_stalls_no_other_stream() {
    let upstream = Upstream::scripted(|request, reply| {
        if request.target != "/endless" {
            return reply.send(200, &[], "done");
        }
        reply.raw(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 1_u64 << 30));
        let piece = vec![b'x'; 1 << 20];
        // Ends when the gateway closes.
        for _ in 0..1024 {
            reply.raw(&piece);
        }
    });
    let gateway = Gateway::start(&upstream, "");
    let mut client =
        H2::connect_with(gateway.addr, ::h2::client::Builder::new().initial_connection_window_size(16 << 20));
    let before = gateway.rss_kib();
    let mut bodies = Vec::new();
    for _ in 0..8 {
        let sent = client.send(h2_request("GET", "/endless", &[]), "");
        bodies.push(client.receive_head(sent).into_body());
    }
    // One of them is read on, past those that are not.
    let mut first = bodies.remove(0);
    client.run(async {
        let mut got = 0;
        while got < 64 << 20 {
            let chunk = first.data().await.unwrap().unwrap();
            first.flow_control().release_capacity(chunk.len()).unwrap();
            got += chunk.len();
        }
    });
    let grown = gateway.rss_kib().saturating_sub(before);
    assert!(grown < 32 * 1024, "{grown} KiB");
    assert_eq!(client.call(h2_request("GET", "/x", &[]), "").text(), "done");
}

#[test]
fn a_keyed_upload_that_stalls_gets_its_answer_and_the_connection_goes_on() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.body_timeout = \"150ms\"");
    let mut client = H2::connect(gateway.addr);
    let stalled = client.try_send(h2_post("/posts", "k"), false).unwrap();
    client.receive(stalled).expect_problem(408, "request_timeout");
    let mut passing = client.try_send(h2_request("PUT", "/x", &[]), false).unwrap();
    passing.body.send_data("x".into(), false).unwrap();
    client.receive(passing).expect_problem(408, "request_timeout");
    assert_eq!(client.call(h2_post("/posts", "k"), "{}").status, 201);
}

#[test]
fn a_keyed_body_over_max_body_is_refused_and_the_connection_goes_on() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_body = \"1KiB\"");
    let mut client = H2::connect(gateway.addr);
    client.call(h2_post("/posts", "k"), &"x".repeat(1025)).expect_problem(413, "body_too_large");
    assert_eq!(upstream.count(), 0);
    assert_eq!(client.call(h2_post("/posts", "k"), &"x".repeat(1024)).status, 201);
}

#[test]
fn a_goaway_of_the_client_ends_the_connection_after_what_is_in_flight() {
    let gate = Gate::default();
    let upstream = holding(&gate);
    let gateway = Gateway::start(&upstream, "");
    let mut client = RawH2::connect(gateway.addr);
    client.request(1, &fields("GET", "/slow", &[]));
    upstream.wait_for(1);
    client.frame(GOAWAY, 0, 0, &[0; 8]);
    gate.open();
    assert!(client.wait_for(DATA, 1).is_some());
    expect_end(&mut client);
}
